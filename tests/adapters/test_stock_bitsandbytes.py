"""An adapter that was trained on nf4 says the same to a user of QLoRA, who loads the base in 4 bits
by stock transformers and bitsandbytes, and the adapter by stock PEFT."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.comm import gather_dim
from megalora.config import LoRAConfig, RunConfig
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.oracles.base import make_base, transformers_logits
from tests.oracles.bitsandbytes_apart import logits_in_own_process, write_in_own_process
from tests.parity.built import built
from tests.parity.runs import make_config
from tests.peft_warnings import IGNORED
from tests.serve.adapters import ATTENTION, tokens_of

pytestmark = [pytest.mark.long, IGNORED]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
"""bitsandbytes' blocks of 64 elements end at the ends of rows."""
ATOL = 1e-5
"""Both sides compute in float32 with the same values, bit for bit: what is left are the roundings
of sums in another order. 2.4e-6 was measured."""
STEPS = 4


@dataclass
class Case:
    """A base, and what of it bitsandbytes quantises."""

    arch: str
    is_written: bool
    """Whether the folder is in nf4 already, as transformers wrote it; else plain."""
    num_linears: int
    """Linears of its two layers in 4 bits."""
    lora: LoRAConfig
    sizes: dict[str, Any]


# Qwen's model.layers.*: q, k, v, o and gate, up, down; transformers leaves fused experts plain.
CASES = {
    "dense": Case("qwen3", False, 14, LoRAConfig(rank=4, alpha=12.0), {"intermediate_size": 192}),
    "experts stay plain": Case(
        "qwen3_moe", True, 8, LoRAConfig(rank=4, alpha=12.0, target_modules=ATTENTION),
        {"moe_intermediate_size": 192, "num_experts": 4},
    ),
}  # fmt: skip


def logprobs_of_ranks(config: RunConfig, adapter: Path, tokens: list[int]) -> Tensor:
    """A function for ``run_ranks``: the whole log-probabilities ``[S, V]``, on every rank."""
    with built(config, adapter) as run, torch.no_grad():
        tp = run.model.groups.tp
        ids = torch.tensor([tokens])
        out = run.model.chunks[0].eval()(ids, torch.arange(len(tokens))[None], None)
        # [1, S, V / TP] of each rank.
        return gather_dim(out.contiguous(), 2, tp, tp.size())[0].log_softmax(-1)


@pytest.mark.parametrize("name", CASES)
def test_qlora_users_get_the_model_that_was_trained(name: str, chats: Path, tmp_path: Path) -> None:
    case = CASES[name]
    base = make_base(tmp_path / "base", arch=case.arch, **SIZES, **case.sizes)
    plain = base
    if case.is_written:
        base = tmp_path / "written"
        write_in_own_process(plain, base)
        (base / "values.safetensors").unlink()
        # transformers has written the model alone; the template is in a file of the tokenizer.
        for file in plain.glob("*token*"):
            shutil.copy(file, base)
    config = make_config(
        base, chats, tmp_path / "run", {"tp": 2}, lora=case.lora, steps=STEPS, eval=4, lr=3e-2,
        weight_format="auto" if case.is_written else "nf4",
    )  # fmt: skip
    run_ranks(train, 2, config)
    adapter = tmp_path / f"run/step_{STEPS:06}"
    # Sequence parallelism divides the length by TP.
    tokens = tokens_of(1, 32)
    weights = adapter / "adapter_model.safetensors"
    config = replace(config, checkpoint=replace(config.checkpoint, dir=str(tmp_path / "again")))
    ours, others = run_ranks(logprobs_of_ranks, 2, config, weights, tokens)
    assert torch.equal(ours, others)
    theirs = logits_in_own_process(base, adapter, torch.tensor(tokens), tmp_path / "stock")
    assert theirs["linears"].item() == case.num_linears
    found = (theirs["logits"].log_softmax(-1) - ours).abs().max().item()
    evaluated = (theirs["evaluated"].log_softmax(-1) - ours).abs().max().item()
    alone = transformers_logits(plain, torch.tensor([tokens]))[0].log_softmax(-1)
    effect = (alone - ours).abs().max().item()
    print(f"\n{name}: {found:.2g}, evaluated {evaluated:.2g}, plain base alone {effect:.2g}")
    assert found <= ATOL
    # Else an adapter that was left out, or a base that was plain, would pass.
    assert effect > 0.1
