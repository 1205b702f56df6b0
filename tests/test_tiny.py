"""Read the tiny base model back through transformers, safetensors and plain JSON."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalora.tiny import make_tiny
from tests.named_tensors import assert_same_tensors
from tests.tiny_folder import VOCAB, load, read_json

# Sizes of a tiny model of Qwen3-MoE and Qwen3: no two are equal, and 6 query heads of 32 are more
# than the hidden size.
LAYERS = 4
HIDDEN = 96
INTER = 144
MOE_INTER = 80
EXPERTS = 8
Q_WIDTH = 192
KV_WIDTH = 64
HEAD_DIM = 32


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "moe")


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "dense", arch="qwen3")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor, taken from the shard that the index names."""
    weight_map = read_json(folder / "model.safetensors.index.json")["weight_map"]
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert weight_map[name] == file.name, "not where the index says"
            tensors[name] = tensor
    assert tensors.keys() == weight_map.keys()
    return tensors


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def expected_shapes(*, moe: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published names, [outputs, inputs], written out by hand."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        attn = f"model.layers.{n}.self_attn"
        mlp = f"model.layers.{n}.mlp"
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        # One norm for the heads of q and one for those of k.
        shapes[f"{attn}.q_norm.weight"] = (HEAD_DIM,)
        shapes[f"{attn}.k_norm.weight"] = (HEAD_DIM,)
        shapes[f"{attn}.q_proj.weight"] = (Q_WIDTH, HIDDEN)
        shapes[f"{attn}.k_proj.weight"] = (KV_WIDTH, HIDDEN)
        shapes[f"{attn}.v_proj.weight"] = (KV_WIDTH, HIDDEN)
        shapes[f"{attn}.o_proj.weight"] = (HIDDEN, Q_WIDTH)
        mlps = [mlp]
        width = INTER
        if moe:
            shapes[f"{mlp}.gate.weight"] = (EXPERTS, HIDDEN)
            mlps = [f"{mlp}.experts.{e}" for e in range(EXPERTS)]
            width = MOE_INTER
        for prefix in mlps:
            shapes[f"{prefix}.gate_proj.weight"] = (width, HIDDEN)
            shapes[f"{prefix}.up_proj.weight"] = (width, HIDDEN)
            shapes[f"{prefix}.down_proj.weight"] = (HIDDEN, width)
    return shapes


def test_no_two_sizes_are_equal(moe_dir: Path) -> None:
    """A transposed or mixed-up matrix must not fit."""
    config = read_json(moe_dir / "config.json")
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    sizes = [q_width, kv_width]
    for name in (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "num_attention_heads",
        "vocab_size",
        "num_experts_per_tok",
    ):
        sizes.append(config[name])
    assert len(set(sizes)) == len(sizes), sizes


def test_config(moe_dir: Path) -> None:
    config = read_json(moe_dir / "config.json")
    wanted = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTER,
        "moe_intermediate_size": MOE_INTER,
        "num_local_experts": EXPERTS,
        # transformers 4 reads this name and rope_theta, and no others.
        "num_experts": EXPERTS,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "dtype": "float32",
    }
    assert {name: config[name] for name in wanted} == wanted


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3"])
def test_tensors_and_shards(arch: str, moe_dir: Path, dense_dir: Path) -> None:
    folder = moe_dir if arch == "qwen3_moe" else dense_dir
    shapes = {}
    for name, tensor in read_tensors(folder).items():
        shapes[name] = tuple(tensor.shape)
        assert tensor.dtype == torch.float32
    assert shapes == expected_shapes(moe=arch == "qwen3_moe")
    # Several files, so that whatever reads them needs the index.
    weight_map = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert len(set(weight_map.values())) >= 2


def test_loaded_experts_are_the_saved_ones(moe_dir: Path) -> None:
    """transformers 5 fuses experts in memory: gate_up_proj [E, 2I, H], gate first."""
    saved = read_tensors(moe_dir)
    experts = load(moe_dir).model.layers[2].mlp.experts
    for e in range(EXPERTS):
        expert = f"model.layers.2.mlp.experts.{e}"
        gate = saved[f"{expert}.gate_proj.weight"]
        up = saved[f"{expert}.up_proj.weight"]
        down = saved[f"{expert}.down_proj.weight"]
        assert torch.equal(experts.gate_up_proj[e], torch.cat([gate, up]))
        assert torch.equal(experts.down_proj[e], down)


def test_spread_of_the_weights(moe_dir: Path) -> None:
    for name, weight in read_tensors(moe_dir).items():
        # Norms are 1 + noise; embeddings have a spread of 1, other matrices 1 / sqrt(fan in).
        mean = 0.0
        std = weight.shape[-1] ** -0.5
        if weight.dim() == 1:
            mean = 1.0
            std = 0.1
        elif "embed_tokens" in name:
            std = 1.0
        # Of n normal numbers the mean errs by std/sqrt(n), the spread by std/sqrt(2n): five of
        # these over 400 tensors
        assert abs(weight.mean() - mean) < 5 * std / math.sqrt(weight.numel()), name
        assert abs(weight.std() - std) < 5 * std / math.sqrt(2 * weight.numel()), name


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3"])
def test_loss_on_random_text_is_that_of_normal_logits(
    arch: str, moe_dir: Path, dense_dir: Path
) -> None:
    """Logits ~ N(0, 1) that know nothing of the label: E[logsumexp - logit] = ln V + 1/2, with a
    standard error of 1/sqrt(2048) = 0.02 for the labels drawn; the rest of the 0.15 is that 512
    logits share 96 hidden numbers.
    """
    tokens = random_tokens(8, 256)
    with torch.no_grad():
        loss = load(moe_dir if arch == "qwen3_moe" else dense_dir)(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(math.log(VOCAB) + 0.5, abs=0.15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_routing_is_uneven_and_uses_every_expert(seed: int, tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / "m", seed=seed))
    with torch.no_grad():
        layers = model(random_tokens(8, 256), output_router_logits=True).router_logits
    assert len(layers) == LAYERS
    for logits in layers:
        # 2,048 tokens with top 3: even would be 768 for each of 8 experts.
        tokens_per_expert = torch.bincount(logits.topk(3).indices.flatten(), minlength=EXPERTS)
        assert tokens_per_expert.min() > 0
        assert tokens_per_expert.max() > 1.15 * tokens_per_expert.min(), tokens_per_expert


def test_same_seed_same_files_and_the_callers_random_state_is_untouched(
    moe_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make_tiny(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    names = sorted(file.name for file in moe_dir.iterdir())
    assert sorted(file.name for file in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (moe_dir / name).read_bytes(), name


def test_another_seed_changes_every_tensor_and_not_the_tokenizer(
    moe_dir: Path, tmp_path: Path
) -> None:
    other = make_tiny(tmp_path / "other", seed=1)
    one = read_tensors(moe_dir)
    two = read_tensors(other)
    for name in one:
        assert not torch.equal(one[name], two[name]), name
    assert (other / "tokenizer.json").read_text() == (moe_dir / "tokenizer.json").read_text()


def test_bfloat16_is_the_float32_model_rounded(moe_dir: Path, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "bf16", dtype="bfloat16")
    rounded = read_tensors(folder)
    for name, weight in read_tensors(moe_dir).items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], weight.to(torch.bfloat16)), name
    assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert len(list(folder.glob("*.safetensors"))) >= 2
    assert load(folder).dtype == torch.bfloat16


def test_overrides_reach_the_model_and_not_the_next_call(tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": "default"}
    # The caller's own dict, which transformers would fill in where it is handed on.
    make_tiny(tmp_path / "a", num_hidden_layers=1, rope_parameters=rope)
    assert rope == {"rope_type": "default"}
    changed = make_tiny(
        tmp_path / "b", num_hidden_layers=2, num_experts=5, rope_theta=5e5, tie_word_embeddings=True
    )
    model = load(changed)
    # Both spellings, for transformers 5 and for 4.
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert read_json(changed / "config.json")["rope_theta"] == 5e5
    assert model.model.layers[1].mlp.experts.down_proj.shape == (5, HIDDEN, MOE_INTER)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # As an output matrix it has the spread of one; 2 % is more than 512 x 96 numbers err.
    assert model.lm_head.weight.std().item() == pytest.approx(HIDDEN**-0.5, rel=0.02)
    assert "lm_head.weight" not in read_tensors(changed)
    plain = read_json(make_tiny(tmp_path / "c", num_hidden_layers=1) / "config.json")
    assert plain["rope_theta"] == 1e6 and not plain["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "gpt2"}, "arch 'gpt2' is unknown; choose one of qwen3_moe, qwen3, qwen2_moe"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown; choose one of float32, bfloat16."),
        (
            {"num_expert": 4},
            "'num_expert' is not a field of the qwen3_moe config; did you mean num_experts?",
        ),
        ({"hiden_size": 4, "arch": "qwen3"}, "did you mean hidden_size?"),
        ({"num_experts": 4, "arch": "qwen3"}, "'num_experts' is not a field of the qwen3 config"),
        # transformers checks types; what it would take and no model could have comes after.
        ({"hidden_size": "96"}, "expected int, got str"),
        (
            {"num_key_value_heads": 4},
            "num_attention_heads=6 is not a multiple of num_key_value_heads=4",
        ),
        ({"num_key_value_heads": 0}, "not a multiple of num_key_value_heads=0"),
        ({"head_dim": 33}, "head_dim=33 must be an even number"),
        ({"head_dim": "32"}, "head_dim='32' must be an even number"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie between 1 and num_experts=8"),
        ({"vocab_size": 258}, "vocab_size=258 cannot hold 256 bytes and 3 special tokens"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_tiny(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_overwrites_its_own_folder_and_keeps_what_is_not_the_models(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m")
    (folder / "notes.txt").write_text("mine")
    # A shard of a larger model that stood here: a loader that globs would meet it.
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    make_tiny(folder, arch="qwen3", seed=3, num_hidden_layers=1)
    fresh = make_tiny(tmp_path / "fresh", arch="qwen3", seed=3, num_hidden_layers=1)
    assert_same_tensors(read_tensors(folder), read_tensors(fresh))
    names = {file.name for file in fresh.iterdir()}
    assert {file.name for file in folder.iterdir()} == names | {"notes.txt"}


def test_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    # An empty folder is welcome.
    make_tiny(tmp_path / "empty", num_hidden_layers=1)
    # The second looks like somebody's real checkpoint.
    for name in ("notes.txt", "config.json"):
        other = tmp_path / f"with-{name}"
        other.mkdir()
        (other / name).write_text("{}")
        with pytest.raises(ValueError, match="is not empty and was not written by make_tiny"):
            make_tiny(other)
        assert [file.name for file in other.iterdir()] == [name]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        make_tiny(tmp_path / "file")


def test_prints_nothing_and_returns_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert make_tiny(tmp_path / "deep" / "er") == tmp_path / "deep" / "er"
    assert capfd.readouterr() == ("", "")
