"""Loss and gradients of what is trained beside adapters, embedding, head, norms, routers and rows
of single tokens, against stock transformers + PEFT."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import LoRAConfig
from megalora.tiny import make_tiny
from tests.distributed.test_against_peft import check_gradients
from tests.parity.everything import first_batch
from tests.parity.models import SIZES

EVERYTHING = [
    "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "gate",
]  # fmt: skip
HEAD_NORMS = ["q_norm", "k_norm"]
SAVED = LoRAConfig(rank=5, alpha=20.0, modules_to_save=EVERYTHING + HEAD_NORMS)
# Some have no token in the first batch, and some layers keep their norms.
TOKENS = replace(
    SAVED, modules_to_save=[r"layers\.1\.input_layernorm"], trainable_token_indices=[7, 300, 44, 5]
)
CASES = {
    "single": (SAVED, False, 1, {}),
    "tp2-ep2": (SAVED, False, 2, {"tp": 2, "ep": 2}),
    "tied: dp2-pp2": (SAVED, True, 4, {"pp": 2}),
    "tied: tp2-ep2": (SAVED, True, 4, {"tp": 2, "ep": 2}),
    "tokens: tp2-ep2": (TOKENS, False, 2, {"tp": 2, "ep": 2}),
    "tokens, tied: single": (TOKENS, True, 1, {}),
    "tokens, tied: tp2-pp2": (TOKENS, True, 4, {"tp": 2, "pp": 2, "ep": 2}),
}


FAST = ("tp2-ep2", "tokens, tied: tp2-pp2")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_stock_peft(name: str, chats: Path, tmp_path: Path) -> None:
    lora, tied, world, parallel = CASES[name]
    base = make_tiny(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=tied)
    if lora is TOKENS:
        # Some that the first batch has, not in ascending order, beside some that it may lack.
        there = first_batch(base, chats)[0].input_ids[:3]
        tokens = list(dict.fromkeys([*TOKENS.trainable_token_indices, *map(int, there)]))
        lora = replace(TOKENS, trainable_token_indices=tokens)
    check_gradients(base, lora, world, parallel, chats, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["olmoe", "glm4_moe", "mixtral", "qwen2_moe", "llama"])
def test_gradients_in_other_families(family: str, chats: Path, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", arch=family, num_hidden_layers=2, **SIZES)
    saved = list(EVERYTHING)
    # A norm over all heads is cut with them.
    if family == "olmoe":
        saved += HEAD_NORMS
    # No router, and one whose correction bias PEFT would want in the file.
    if family in ("llama", "glm4_moe"):
        saved.remove("gate")
    lora = replace(SAVED, modules_to_save=saved, target_modules=["q_proj", "o_proj"])
    parallel = {"tp": 2, "ep": 1 if family == "llama" else 2}
    check_gradients(base, lora, 2, parallel, chats, tmp_path)
