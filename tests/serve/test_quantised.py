"""vLLM serves an adapter beside a dense base in the form in which it was published, and computes
with the values that megalora decodes."""

from pathlib import Path
from typing import Any

import pytest

from megalora.serve.server import Server
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base, rewrite
from tests.peft_warnings import IGNORED
from tests.serve.adapters import ATTENTION, EXPERTS, make_adapter, tokens_of
from tests.serve.conftest import VLLM_ENVIRONMENT
from tests.serve.stock_peft import logprobs, stock_model

pytestmark = [pytest.mark.vllm, IGNORED]
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
"""Every matrix is whole blocks of fp8; vLLM wants that of each one in a fused weight."""
ATOL = 0.12
"""vLLM computes in bfloat16, whose values are 2^-8 apart: logits between 2 and 4 are rounded by
up to 0.008, and hidden states a dozen times before. 0.02 to 0.05 were measured."""
FORMS = [
    "int4",
    # As much time once more, for forms that the same code serves.
    pytest.param("fp8", marks=pytest.mark.long),
    pytest.param("gptq symmetric", marks=pytest.mark.long),
]


@pytest.mark.parametrize("form", FORMS)
def test_adapter_beside_codes(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "gptq symmetric":
        # vLLM refuses zero points.
        monkeypatch.setitem(oracle.FORMS, form, lambda w: oracle.gptq(w, symmetric=True))
        settings = oracle.CONFIGS["gptq"]() | {"sym": True}
        monkeypatch.setitem(oracle.CONFIGS, form, lambda: settings)
    base = make_base(tmp_path / "base", arch="qwen3", **SIZES)
    values = oracle.quantise_folder(base, tmp_path / "codes", form)
    rewrite(tmp_path / "codes", dtype="bfloat16")
    decoded = oracle.plain_folder(base, tmp_path / "decoded", values)
    adapter = make_adapter(tmp_path / "adapter", base, 3, target_modules=[*ATTENTION, *EXPERTS])
    prompt = tokens_of(1, 24)
    with (
        Server(
            tmp_path / "codes", {"mine": adapter}, dtype="bfloat16", log=tmp_path / "vllm.log",
            env=VLLM_ENVIRONMENT, extra=["--enforce-eager", "--max-model-len", "256"],
        ) as server,
        server.client() as client,
    ):  # fmt: skip
        served = client.prompt_logprobs(server.models["mine"], prompt)
        bare = client.prompt_logprobs(str(tmp_path / "codes"), prompt)
    expected = logprobs(stock_model(decoded, adapter), prompt)
    expected_bare = logprobs(stock_model(decoded), prompt)
    found = farthest(served, expected)
    found_bare = farthest(bare, expected_bare)
    effect = farthest(expected, expected_bare)
    print(
        f"\n{form}: {found:.3f} with the adapter, {found_bare:.3f} without; it moves {effect:.2f}"
    )
    assert max(found, found_bare) <= ATOL
    # An adapter that is not applied would be seen.
    assert effect > 4 * ATOL


def farthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
