"""Compare rotary frequencies and angles with transformers' own modules, for every kind and
spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from megalora.config import ModelConfig, ParallelConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.build import make_chunks
from megalora.model.fields import model_shape
from megalora.model.rope_fields import read_rope
from megalora.model.rotary import frequencies, softmax_scale
from megalora.parallel import parallel_groups
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.model.published import edited

# A base that nobody has as its default.
THETA = {"rope_theta": 50_000.0}
# Llama 3.1's factors; the original lengths are shortened with the tiny model's 2,048 positions, so
# that the corrections fall inside its 16 frequencies.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
# Fields that are set in a config with THETA; "..." removes one.
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": {"rope_type": "default"}},
    "nothing": {},
    # 10,000, transformers' default, and a base in the newer place alone.
    "no theta": {"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 3}},
    "theta inside": {"rope_theta": ..., "rope_parameters": {"rope_theta": 123.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    # Megatron applies Llama 3.1's own factors, whatever the config says; these are others.
    "llama3, other numbers": {
        "rope_parameters": {
            "rope_type": "llama3",
            **LLAMA3,
            "low_freq_factor": 2.0,
            "high_freq_factor": 3.0,
        }
    },
    # Then max_position_embeddings, 2,048, is the original length.
    "llama3 without a length": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", **YARN}},
    # The kind under its older key, under both, in the newer dictionary, beside a plain one.
    "yarn, type": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn, both": {"rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}},
    "yarn, parameters": {"rope_parameters": {"rope_type": "yarn", **YARN}},
    "yarn beside a plain one": {
        "rope_parameters": {"rope_type": "default", **THETA},
        "rope_scaling": {"rope_type": "yarn", **YARN},
    },
    "yarn without a length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    # Optional settings: the border of the corrected frequencies (32 and 1 by default), the factor
    # of cos and sin (0.1 ln 4 + 1 = 1.139 by default), DeepSeek's way to set it, whose ratio counts
    # only if both are given, and a border that is not rounded to whole frequencies (GPT-OSS).
    "yarn, betas": {
        "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0}
    },
    "yarn, factor given": {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 1.3}},
    "yarn, mscale": {
        "rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 1.2, "mscale_all_dim": 0.7}
    },
    "yarn, one mscale": {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 1.2}},
    "yarn, not rounded": {"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": False}},
    "yarn, nulls": {
        "rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": None, "beta_fast": None}
    },
}


def config_with(tiny: Path, fields: dict[str, Any]) -> dict[str, Any]:
    config = read_hf_config(tiny)
    # Either spelling of the rotary settings, as transformers' version wrote them.
    config.pop("rope_theta", None)
    config.pop("rope_parameters", None)
    # A copy, for nested values are changed.
    return edited(json.loads(json.dumps(config)) | THETA, fields)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("rotary") / "base",
        num_hidden_layers=1,
        max_position_embeddings=2048,
    )


def rotary_of_transformers(hf: dict[str, Any]) -> Any:
    # A copy, because transformers moves rope_scaling into rope_parameters in place.
    config: Any = AutoConfig.for_model(**json.loads(json.dumps(hf)))
    return Qwen3MoeRotaryEmbedding(config)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factor(small: Path, name: str) -> None:
    hf = config_with(small, CASES[name])
    theirs = rotary_of_transformers(hf)
    inv_freq, factor = frequencies(read_rope(hf), hf["head_dim"], hf["max_position_embeddings"])
    # The same bits: frequencies are taken from transformers' functions, only their inputs can be
    # wrong.
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert factor == theirs.attention_scaling


def test_the_kinds_differ(small: Path) -> None:
    """So that none of the cases above passes for another."""
    found = set()
    for fields in CASES.values():
        inv_freq, factor = frequencies(read_rope(config_with(small, fields)), 32, 2048)
        found.add((tuple(inv_freq.tolist()), factor))
    # The same as another case: "nothing" (as "default"), four more spellings of yarn, its nulls,
    # and one mscale alone, which does nothing.
    num_same = 1 + 4 + 1 + 1
    assert len(found) == len(CASES) - num_same


def _angles_and_scale(hf: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Angles ``[2048, 32]`` and the scale of attention's scores, of a model built in bfloat16."""
    with parallel_groups(ParallelConfig()):
        config = ModelConfig(path="none", dtype="bfloat16")
        (chunk,) = make_chunks(hf, config, ParallelConfig(), model_shape(hf))
        module: Any = chunk
        angles = module.rotary_pos_emb(torch.arange(2048))[:, 0, 0]
        return angles, module.decoder.layers[0].self_attention.core_attention.scale


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn, betas", "yarn, factor given"])
def test_the_built_model_turns_as_transformers_does(small: Path, name: str) -> None:
    """cos and sin at every position up to max_position_embeddings; the factor is in the scale of
    the scores."""
    hf = config_with(small, CASES[name])
    theirs = rotary_of_transformers(hf)
    # Built in bfloat16, in which angles of 2,000 radians would be off by up to 4.
    angles, scale = run_ranks(_angles_and_scale, 1, hf)[0]
    cos, sin = theirs(torch.zeros(1), torch.arange(2048)[None])
    factor = theirs.attention_scaling
    # Up to 2,047 radians in float32: the last bit of an angle is 1.2e-4, and both sides round the
    # same product.
    torch.testing.assert_close(factor * angles.cos(), cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(factor * angles.sin(), sin[0], rtol=0, atol=1e-6)
    # transformers multiplies q and k by the factor, so that scores have its square; heads of 32.
    assert scale == pytest.approx(factor**2 / 32**0.5, rel=1e-12)
    assert scale == softmax_scale(factor, 32)
