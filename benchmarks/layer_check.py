"""Measure the check before step 1 (``train.check_base: layer``) at the sizes of Qwen3-30B-A3B, on
one rank of this host.

    python -m benchmarks.layer_check --threads 1 --runs 3 --out layer_check.json

Writes a model of one layer with random bfloat16 weights to a temporary folder (2.5 GB), loads it as
a run does, and measures the time of the check, the largest difference it finds, and the rounding of
transformers itself: the same layer by the same classes in float32 and in float64, on the same
inputs.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.train_case import QWEN3_30B_A3B
from megalora import host
from megalora.versions import versions

BASE = {
    **QWEN3_30B_A3B,
    "num_hidden_layers": 1,
    "torch_dtype": "bfloat16",
    "architectures": ["Qwen3MoeForCausalLM"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer_check.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, host.process_group():
        record = measure(write_base(Path(folder), BASE), options.runs)
    record |= {
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """Load the base on one rank and check it ``runs`` times: seconds, the line it says, and
    transformers' own rounding."""
    from megalora.config import ModelConfig, ParallelConfig
    from megalora.hf.json_file import read_hf_config
    from megalora.model.build import build_model
    from megalora.model.fields import model_shape
    from megalora.parallel import parallel_groups
    from megalora.verify.layer import check_layers

    parallel = ParallelConfig()
    dtype = torch.bfloat16
    seconds = []
    # Beside wall time, which depends on what else the machine does.
    cpu_seconds = []
    line = ""
    with parallel_groups(parallel) as groups:
        shape = model_shape(read_hf_config(folder))
        chunks = build_model(
            ModelConfig(path=str(folder), dtype="bfloat16"), parallel, shape, folder
        )
        for _ in range(runs):
            start = time.perf_counter()
            cpu_start = time.process_time()
            line = check_layers(chunks, groups, folder, dtype)
            seconds.append(round(time.perf_counter() - start, 2))
            cpu_seconds.append(round(time.process_time() - cpu_start, 2))
            print(line, flush=True)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "line": line,
        "rounding_of_transformers": rounding(folder, dtype),
    }


@torch.no_grad()
def rounding(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of each module's output between transformers in float32 and in float64, as
    the check measures it.

    A token that gets another expert in float64, because two are equally good within rounding, is
    left out.
    """
    from megalora.verify.records import relative_difference

    single, chosen = reference_records(folder, dtype, torch.float32)
    double, again = reference_records(folder, dtype, torch.float64)
    # Tokens with the same experts in float32 and float64, for either input of the MLP. A dense
    # layer chooses none, so all tokens count.
    num_tokens = single[0][1].shape[0]
    same_T = torch.ones(num_tokens, dtype=torch.bool)
    for experts_TK, other_TK in zip(chosen, again, strict=True):
        same_T &= (experts_TK == other_TK).all(1)
    found = {}
    for (name, value), (_, other) in zip(single, double, strict=True):
        found[name] = relative_difference(value[same_T].double(), other[same_T])
    return found


def reference_records(
    folder: Path, dtype: torch.dtype, compute: torch.dtype
) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """Outputs of the modules of transformers' last layer, computed in ``compute``, as the check
    records them; and each token's experts for either input of its MLP."""
    from megalora.model.families.family import DECODER_MODULES
    from megalora.verify import records as r
    from megalora.verify.reference import Reference

    reference = Reference(folder, dtype, compute)
    config = reference.config
    number = len(reference.layers) - 1
    inputs = r.Inputs.make(config.vocab_size, config.hidden_size, config.max_position_embeddings)
    x_TH = inputs.x_TH.to(compute)
    # transformers computes the rotary tables in float32 whatever the model's dtype.
    cos, sin = reference.base.rotary_emb(inputs.x_TH[None], inputs.positions_T[None])
    tables = (cos.to(compute), sin.to(compute))
    reference.load(reference.base.norm)
    reference.load_layer(number)
    chosen: list[Tensor] = []
    if reference.experts_path(number):
        reference.load_experts(number, range(config.num_experts))
        # The experts' second argument is [T, k]; sorted, since the order of a token's experts
        # does not matter.
        reference.experts.register_forward_pre_hook(
            lambda module, args: chosen.append(args[1].sort(1).values)
        )
    layer: Any = reference.layers[number]
    found: r.Records = []
    with r.noted(layer, r.THEIRS, DECODER_MODULES, found):
        reference.run(number, x_TH, inputs.positions_T, tables)
    # The check gives the MLP a second input, whose gates go far beyond those of the first.
    with r.noted(layer, r.THEIRS, DECODER_MODULES, found, " (second input)"):
        layer.mlp(r.driven(dict(found)["post-attention norm"])[None])
    return found, chosen


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """Write a Hugging Face folder with random weights N(0, 0.02), norms N(1, 0.1), one file for
    each layer and one for the rest."""
    torch.manual_seed(0)
    files = {"ends": dict(_ends(config))}
    for number in range(config["num_hidden_layers"]):
        files[f"layer{number}"] = dict(_layer(config, number))
    where = {}
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"{file}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return folder


def _ends(c: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors before the first layer and after the last."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, _random(c["vocab_size"], c["hidden_size"])
    yield "model.norm.weight", _norm(c["hidden_size"])


def _layer(c: dict[str, Any], number: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one layer by their published names, each expert's apart."""
    prefix = f"model.layers.{number}"
    hidden = c["hidden_size"]
    head = c["head_dim"]
    q = c["num_attention_heads"] * head
    kv = c["num_key_value_heads"] * head
    inner = c["moe_intermediate_size"]
    for name, rows, columns in (
        ("q", q, hidden),
        ("k", kv, hidden),
        ("v", kv, hidden),
        ("o", hidden, q),
    ):
        yield f"{prefix}.self_attn.{name}_proj.weight", _random(rows, columns)
    for name, size in (("self_attn.q_norm", head), ("self_attn.k_norm", head)):
        yield f"{prefix}.{name}.weight", _norm(size)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", _norm(hidden)
    yield f"{prefix}.mlp.gate.weight", _random(c["num_experts"], hidden)
    for expert in range(c["num_experts"]):
        for name, rows, columns in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            yield f"{prefix}.mlp.experts.{expert}.{name}_proj.weight", _random(rows, columns)


def _random(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16).normal_(std=0.02)


def _norm(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(1, 0.1)


if __name__ == "__main__":
    main()
