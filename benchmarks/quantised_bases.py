"""Measure what quantised forms take and lose: bytes, weights in memory, distance from the original.

    python -m benchmarks.quantised_bases --out benchmarks/results/quantised_bases.json

Of each form: bytes of a weight in a folder (an expert's matrix of Qwen3-30B-A3B), GiB of that
model's weights in memory as ``megalora plan`` counts them, and how far two tiny random models with
bfloat16 weights are from themselves once decoded. Groups of GPTQ, AWQ and int4 have 32 columns.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import save
from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import memory_of
from megalora.planner.models import find_architecture, held_by_config
from megalora.planner.workload import Workload
from megalora.verify.stock_model import load_stock
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base, rewrite, stored_tensors

MATRIX = (768, 2048)
"""An expert's gate of Qwen3-30B-A3B."""
MODEL = "Qwen/Qwen3-30B-A3B"
FORMS = ["fp8", "nf4", "nf4 nested", "int4", "gptq", "awq", "nvfp4", "modelopt", "mxfp4"]
HELD = ("fp8", "nf4", "nf4 nested")
"""Forms that stay codes in memory; others are decoded to bfloat16 as they are read."""
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8},
    "qwen3": {"intermediate_size": 384},
}
COMMON: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 4,
}  # fmt: skip
GiB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Sums in one order, so that a second call gives the same digits.
    torch.set_num_threads(1)
    distances = {}
    for arch in TINY:
        distances[arch] = distances_of(arch)
    rows = []
    # What is quantised stands beside what it was made from.
    for form in ["plain", *FORMS]:
        row: dict[str, Any] = {"form": form, "bytes_per_weight": 2.0}
        if form != "plain":
            row["bytes_per_weight"] = stored_bytes(form)
            for arch, found in distances.items():
                row[arch] = found[form]
        row["weights_gib_30b"] = planned_gib(form if form in HELD else "plain")
        rows.append(row)
        print(row)
    if args.out:
        save("quantised_bases", rows, args.out)


def stored_bytes(form: str) -> float:
    """Bytes of a weight in a folder of this form, scales and all."""
    generator = torch.Generator().manual_seed(0)
    # Of the size of an initialised weight; the number of bytes does not depend on it.
    weight = (torch.randn(*MATRIX, generator=generator) * 0.02).bfloat16()
    stored, _ = oracle.FORMS[form](weight)
    return sum(t.numel() * t.element_size() for t in stored.values()) / weight.numel()


def planned_gib(form: str) -> float:
    """GiB of the weights of the 30B model on one rank, as the planner counts them."""
    hf = find_architecture(MODEL)
    if form != "plain":
        hf = hf | {"quantization_config": oracle.CONFIGS[form]()}
    # The oracle's settings are those of doubly quantised scales.
    if form == "nf4":
        hf["quantization_config"] = hf["quantization_config"] | {"bnb_4bit_use_double_quant": False}
    held = held_by_config(ModelConfig(path=MODEL), hf)
    # Weights depend on neither length nor batch.
    work = Workload(sequence_length=4096, global_batch_size=1, held=held)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    return memory_of(model_shape(hf), LoRAConfig(), layout, work)["weights"] / GiB


def distances_of(arch: str) -> dict[str, dict[str, float]]:
    """Form -> distances of a tiny model from itself in bfloat16."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make_base(folder / "base", arch=arch, **COMMON, **TINY[arch])
        # All forms start from what a published folder has: bfloat16.
        rewrite(base, lambda tensors: {n: t.bfloat16().float() for n, t in tensors.items()})
        expected = logprobs_of(load_stock(base, torch.float32))
        plain = stored_tensors(base)
        for form in FORMS:
            quantised = folder / form
            oracle.quantise_folder(base, quantised, form)
            # Decoded by megalora, computed by transformers.
            logprobs = logprobs_of(load_stock(quantised, torch.float32))
            # Mean over places of KL(original || decoded), in nats.
            divergence = (expected.exp() * (expected - logprobs)).sum(-1).mean()
            found[form] = {
                "relative_rms_error": weight_error(quantised, plain),
                "kl_nats": divergence.item(),
                "largest_logprob_difference": (expected - logprobs).abs().max().item(),
            }
    return found


@torch.no_grad()
def logprobs_of(model: Any) -> Tensor:
    """``[4 * 64, V]`` of random tokens, in float64 so that a small divergence keeps its digits."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size - 3, (4, 64), generator=generator)
    return model.eval()(tokens).logits.double().flatten(0, 1).log_softmax(-1)


def weight_error(quantised: Path, plain: dict[str, Tensor]) -> float:
    """Root mean square of what decoding misses of all quantised weights, over theirs."""
    missed = 0.0
    whole = 0.0
    for name, value in BaseWeights(open_folder(quantised)).items():
        # Router, norms, embedding and head stay as they are.
        if oracle.is_linear(name):
            missed += (value - plain[name]).square().sum().item()
            whole += plain[name].square().sum().item()
    return (missed / whole) ** 0.5


if __name__ == "__main__":
    main()
