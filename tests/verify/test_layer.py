"""Check that the layer check finds a right model equal in every layout, and every mistake that is
put into one.

The mistakes are put in behind the back of what refuses config fields and tensors: a model is built
as it is, then spoiled, or held against a folder whose config.json says something else.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM, Qwen3MoeModel

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.lora.adapted_model import build_adapted
from megalora.lora.select import plan
from megalora.model.build import build_model
from megalora.model.recompute import apply_recompute
from megalora.parallel import parallel_groups
from megalora.tiny import make_tiny
from megalora.verify import records
from tests.distributed.ranks import run_ranks
from tests.parity.everything import NAMES
from tests.verify.built import Chunks, dense_gate_and_up, layer_of, loaded, said, said_in
from tests.verify.models import biased, packed_experts, with_config, with_tensors, without_prefix

LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {"ep": 2}),
    (2, {"tp": 2, "etp": 2}),
    # Four ranks on two key/value heads: each head is on two of them.
    (4, {"tp": 4}),
    (4, {"tp": 2, "ep": 2}),
    (4, {"pp": 2, "ep": 2}),
]


def layout_id(value: Any) -> str:
    """tp2-ep2; empty for the number of ranks."""
    if not isinstance(value, dict):
        return ""
    return "-".join(f"{name}{size}" for name, size in value.items())


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=layout_id)
def test_a_model_with_everything_is_equal_in_every_layout(world, parallel, everything):
    lines = run_ranks(said_in, world, everything, parallel, "float32")
    # The line ends in how long it took, which each rank measures itself.
    assert len({line.rsplit(" in ", 1)[0] for line in lines}) == 1, "the same on every rank"
    assert lines[0].startswith(
        "base: layers 0 (MoE), 1 (dense), embedding and head equal transformers' to "
    )
    # "... equal transformers' to 2e-7 ...": far from the tolerance, so that it can be trusted to
    # tell rounding from mistakes.
    assert float(lines[0].split(" to ")[1].split()[0]) < records.TOLERANCE / 10


@pytest.mark.parametrize(
    ("dtype", "stages"),
    [
        # The second stage has layers 1 and 3, and the head; or layers 1, 2 and 3.
        ("float32", {"vpp": 2}),
        ("bfloat16", {"vpp": 2}),
        ("float32", {"stage_layers": (1, 3)}),
    ],
)
def test_interleaved_and_unequal_stages_are_equal(dtype, stages, tiny):
    line = run_ranks(said_in, 2, tiny, {"pp": 2, **stages}, dtype)[1]
    assert line.startswith("base: layer 3 (MoE), embedding and head equal transformers' to "), line


def _several(cases: dict[str, tuple[Path, Path, str]]) -> dict[str, str]:
    """Each base built and held against a folder."""
    lines = {}
    for name, (base, folder, dtype) in cases.items():
        with loaded(base, dtype=dtype) as (chunks, groups):
            lines[name] = said(chunks, groups, folder, getattr(torch, dtype))
    return lines


def test_families_dtypes_and_files_are_equal(tiny, tiny_dense, everything, tmp_path):
    """The reference reads what transformers reads: experts packed or each by itself, names with and
    without a prefix."""
    tied = make_tiny(tmp_path / "tied", arch="qwen3", tie_word_embeddings=True)
    packed = with_tensors(tiny, tmp_path / "packed", packed_experts)
    bare = with_tensors(tiny, tmp_path / "bare", without_prefix)
    cases = {
        "dense": (tiny_dense, tiny_dense, "float32"),
        "dense bf16": (tiny_dense, tiny_dense, "bfloat16"),
        "shared expert bf16": (everything, everything, "bfloat16"),
        "tied": (tied, tied, "float32"),
        "packed": (packed, packed, "float32"),
        "no prefix": (bare, bare, "float32"),
        "packed, built from single experts": (tiny, packed, "float32"),
        "single experts, built from no prefix": (bare, tiny, "float32"),
    }
    for name, line in run_ranks(_several, 1, cases)[0].items():
        assert line.startswith("base: layer"), f"{name}: {line}"


# The tiny model has 4,096 positions, four times 1,024.
ROPE = {"rope_theta": 1e6, "original_max_position_embeddings": 1024, "factor": 4.0}
HONOURED: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **ROPE,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE}},
    "yarn with betas and a factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
            **ROPE,
        }
    },
    "another epsilon": {"rms_norm_eps": 1e-4},
    "no normalisation": {"norm_topk_prob": False},
}


def test_fields_that_are_honoured_are_equal(tiny, tmp_path):
    folders = {}
    for name, fields in HONOURED.items():
        folders[name] = with_config(tiny, tmp_path / name, **fields)
    folders["attention bias"] = with_tensors(
        with_config(tiny, tmp_path / "bias", attention_bias=True), tmp_path / "biased", biased
    )
    cases = {name: (folder, folder, "float32") for name, folder in folders.items()}
    # All layers are alike, and the last one is compared.
    for name, line in run_ranks(_several, 1, cases)[0].items():
        assert line.startswith("base: layer 3 (MoE)"), f"{name}: {line}"


def _with_adapters(base: Path, recompute: str) -> str:
    """What the check says of a base under adapters that change every output."""
    lora = LoRAConfig(rank=3, alpha=12.0, target_modules=NAMES)
    shape, adapted = plan(lora, ParallelConfig(), base)
    with parallel_groups(ParallelConfig()) as groups:
        model = build_adapted(
            partial(build_model, folder=base), shape, adapted, groups,
            model=ModelConfig(path=str(base), dtype="float32"), parallel=ParallelConfig(),
            lora=lora, seed=0,
        )  # fmt: skip
        # B is zero at first, so that an adapter that counts would not show.
        for parameter in model.parameters:
            parameter.data.normal_()
        apply_recompute(model.chunks, recompute)
        return said(model.chunks, groups, base)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_adapters_that_have_moved_and_recomputation_are_left_out(recompute, everything):
    assert run_ranks(_with_adapters, 1, everything, recompute)[0].startswith(
        "base: layers 0 (MoE), 1 (dense)"
    )


# Mistakes of loading and building, each made in one place of a right model. None changes a shape.


def _gate_and_up(chunks: Chunks) -> None:
    for weight in (
        layer_of(chunks, 0).mlp.experts.gate_up,
        layer_of(chunks, 0).mlp.shared_experts.linear_fc1.weight,
    ):
        weight.data.copy_(torch.cat(weight.data.chunk(2, -2)[::-1], -2))


def _norms_exchanged(chunks: Chunks) -> None:
    layer = layer_of(chunks, 0)
    input_norm = layer.input_layernorm
    layer.input_layernorm = layer.pre_mlp_layernorm
    layer.pre_mlp_layernorm = input_norm


def _experts_exchanged(chunks: Chunks) -> None:
    down = layer_of(chunks, 0).mlp.experts.down.data
    down[:2] = down[:2].flip(0)


def _epsilon(name: str, value: float = 1e-5) -> Callable[[Chunks], None]:
    # The tiny model has 1e-6; Megatron's own default is this.
    def spoil(chunks: Chunks) -> None:
        layer_of(chunks, 0).get_submodule(name).eps = value

    return spoil


def _final_epsilon(chunks: Chunks) -> None:
    chunks[-1].decoder.final_layernorm.eps = 1e-5


def _rope(factor: float) -> Callable[[Chunks], None]:
    def spoil(chunks: Chunks) -> None:
        for chunk in chunks:
            chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq * factor

    return spoil


def _scale(chunks: Chunks) -> None:
    layer_of(chunks, 1).self_attention.core_attention.scale *= 1.1


def _head_tied(chunks: Chunks) -> None:
    chunks[-1].output_layer.weight.data.copy_(chunks[0].embedding.word_embeddings.weight.data)


def _no_bias(chunks: Chunks) -> None:
    layer_of(chunks, 1).self_attention.linear_qkv.bias.data.zero_()


def _shared_gate(chunks: Chunks) -> None:
    # The shared expert's output then counts whole.
    layer_of(chunks, 0).mlp.shared_experts.use_shared_expert_gate = False
    layer_of(chunks, 0).mlp.shared_experts.gate_weight.data.zero_()


def _router_rows(chunks: Chunks) -> None:
    weight = layer_of(chunks, 0).mlp.router.weight.data
    weight.copy_(weight.roll(1, 0))


def _one_embedding_row(chunks: Chunks) -> None:
    # The last of 512 tokens: only a comparison of the whole table finds it.
    rows = chunks[0].embedding.word_embeddings.weight.data
    rows[-1] = rows[-2]


# The mistake, and the module that must be named: the first that is off, not one that follows it.
SPOILED: dict[str, tuple[Callable[[Chunks], None], str]] = {
    "gate and up of experts": (_gate_and_up, "layer 0 (MoE), experts"),
    "gate and up of a dense MLP": (dense_gate_and_up, "layer 1 (dense), MLP"),
    "norms of the layer exchanged": (_norms_exchanged, "layer 0 (MoE), input norm"),
    "two experts exchanged": (_experts_exchanged, "layer 0 (MoE), experts"),
    "epsilon of the first norm": (_epsilon("input_layernorm"), "layer 0 (MoE), input norm"),
    "epsilon of the second norm": (_epsilon("pre_mlp_layernorm"),
                                   "layer 0 (MoE), post-attention norm"),
    "epsilon of the last norm": (_final_epsilon, "final norm"),
    "rotary frequencies": (_rope(1.001), "layer 0 (MoE), rotary embedding"),
    "softmax scale": (_scale, "layer 1 (dense), attention"),
    "head tied to the embedding": (_head_tied, "head"),
    "biases of q, k, v lost": (_no_bias, "layer 1 (dense), attention"),
    "shared expert's gate lost": (_shared_gate, "layer 0 (MoE), MLP"),
    "router's rows": (_router_rows, "layer 0 (MoE), router"),
    "one row of the embedding": (_one_embedding_row, "embedding"),
}  # fmt: skip


def _spoiled(base: Path) -> dict[str, str]:
    """What the check says of each mistake, on one forked rank for all of them."""
    lines = {}
    for name, (spoil, _) in SPOILED.items():
        with loaded(base) as (chunks, groups):
            spoil(chunks)
            lines[name] = said(chunks, groups, base)
    return lines


@pytest.fixture(scope="module")
def of_spoiled(everything) -> dict[str, str]:
    return run_ranks(_spoiled, 1, everything)[0]


@pytest.mark.parametrize("name", SPOILED)
def test_a_mistake_in_a_model_is_named_with_its_module(name, of_spoiled):
    where = SPOILED[name][1]
    assert of_spoiled[name].startswith(
        f"ValueError: train.check_base: {where}: differs from transformers' by "
    ), of_spoiled[name]
    # One line, with the way to train all the same.
    assert "train.check_base=off" in of_spoiled[name]
    assert "\n" not in of_spoiled[name]


def _with_other_ends(base: Path) -> dict[str, str]:
    """transformers' model does something to embeddings, or to logits, that ours does not: it is no
    layer and no weight."""
    model = Qwen3MoeModel.forward
    head = Qwen3MoeForCausalLM.forward

    # As Gemma scales its embeddings.
    def scaled(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * 9
        return model(self, inputs_embeds=inputs_embeds, **others)

    # As Gemma 2 caps its logits.
    def capped(self: Any, *args: Any, **others: Any) -> Any:
        output: Any = head(self, *args, **others)
        output.logits = output.logits.tanh()
        return output

    lines = {}
    with loaded(base) as (chunks, groups):
        Qwen3MoeModel.forward = scaled  # type: ignore[assignment]
        lines["embedding"] = said(chunks, groups, base)
        Qwen3MoeModel.forward = model
        Qwen3MoeForCausalLM.forward = capped  # type: ignore[assignment]
        lines["head"] = said(chunks, groups, base)
    return lines


def test_what_a_model_does_around_its_layers_is_compared(tiny):
    for name, line in run_ranks(_with_other_ends, 1, tiny)[0].items():
        assert line.startswith(
            f"ValueError: train.check_base: {name}: differs from transformers' by"
        ), line
