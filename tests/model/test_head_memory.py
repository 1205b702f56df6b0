"""Bytes of the loss, counted on tensors without data: without whole logits and with them."""

import pytest

from benchmarks.lean_loss import Sizes, lean, peak_bytes, plain
from megalora.model.head import CHUNK_BYTES

QWEN3 = Sizes(tokens=32768, vocab=151936, hidden=2048)


@pytest.mark.parametrize(
    "adapted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["frozen", "adapted"]
)
def test_32k_tokens_take_a_twentieth_of_the_plain_loss(adapted: bool) -> None:
    ours = peak_bytes(lean, QWEN3, adapted=adapted)
    whole = peak_bytes(plain, QWEN3, adapted=adapted)
    # Logits in bfloat16 and in float32: what the plain loss holds at the least.
    assert whole >= QWEN3.tokens * QWEN3.vocab * 6
    assert ours <= 0.05 * whole
    # One chunk, and the gradient of x: made in forward and scaled in backward, or made there.
    assert ours <= CHUNK_BYTES + 2 * QWEN3.tokens * QWEN3.hidden * 2
