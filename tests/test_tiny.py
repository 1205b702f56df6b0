"""The tiny base model, read back through transformers, safetensors and plain JSON."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalora.tiny import make_tiny
from tests.named_tensors import assert_same_tensors

LAYERS = 4
HIDDEN = 96
INTER = 144
MOE_INTER = 80
EXPERTS = 8
Q_WIDTH = 192
KV_WIDTH = 64
HEAD_DIM = 32
VOCAB = 512
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4 + 4?"},
]
CHAT_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
    "<|im_start|>assistant\n5<|im_end|>\n<|im_start|>user\nAnd 4 + 4?<|im_end|>\n"
)


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "moe")


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "dense", arch="qwen3")


@pytest.fixture(scope="module")
def tokenizer(moe_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(moe_dir)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


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


def load(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def expected_shapes(*, moe: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    shapes["model.norm.weight"] = (HIDDEN,)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        attn = f"model.layers.{n}.self_attn"
        mlp = f"model.layers.{n}.mlp"
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes |= {f"{attn}.q_norm.weight": (HEAD_DIM,), f"{attn}.k_norm.weight": (HEAD_DIM,)}
        shapes |= {
            f"{attn}.q_proj.weight": (Q_WIDTH, HIDDEN),
            f"{attn}.o_proj.weight": (HIDDEN, Q_WIDTH),
        }
        shapes |= {
            f"{attn}.k_proj.weight": (KV_WIDTH, HIDDEN),
            f"{attn}.v_proj.weight": (KV_WIDTH, HIDDEN),
        }
        if moe:
            shapes[f"{mlp}.gate.weight"] = (EXPERTS, HIDDEN)
        width = MOE_INTER if moe else INTER
        for prefix in [f"{mlp}.experts.{e}" for e in range(EXPERTS)] if moe else [mlp]:
            shapes |= {
                f"{prefix}.gate_proj.weight": (width, HIDDEN),
                f"{prefix}.up_proj.weight": (width, HIDDEN),
            }
            shapes[f"{prefix}.down_proj.weight"] = (HIDDEN, width)
    return shapes


def test_no_two_sizes_are_equal(moe_dir: Path) -> None:
    config = read_json(moe_dir / "config.json")
    names = (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "num_attention_heads",
    )
    sizes = [config[name] for name in names] + [config["vocab_size"], config["num_experts_per_tok"]]
    sizes.append(config["num_attention_heads"] * config["head_dim"])
    sizes.append(config["num_key_value_heads"] * config["head_dim"])
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
        "num_experts": EXPERTS,  # transformers 4 reads this name and rope_theta, and no others
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
    tensors = read_tensors(moe_dir if arch == "qwen3_moe" else dense_dir)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == expected_shapes(moe=arch == "qwen3_moe")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    folder = moe_dir if arch == "qwen3_moe" else dense_dir
    assert len(set(read_json(folder / "model.safetensors.index.json")["weight_map"].values())) >= 2


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
        if weight.dim() == 1:
            mean = 1.0
            std = 0.1
        else:
            mean = 0.0
            std = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
        # of n normal numbers the mean errs by std/sqrt(n), the spread by std/sqrt(2n): five of
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
    files = {file.name: file.read_bytes() for file in moe_dir.iterdir()}
    assert {file.name: file.read_bytes() for file in again.iterdir()} == files


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
    make_tiny(tmp_path / "a", num_hidden_layers=1, rope_parameters=rope)
    assert rope == {"rope_type": "default"}
    changed = make_tiny(
        tmp_path / "b", num_hidden_layers=2, num_experts=5, rope_theta=5e5, tie_word_embeddings=True
    )
    model = load(changed)
    assert (
        model.config.rope_parameters["rope_theta"]
        == read_json(changed / "config.json")["rope_theta"]
        == 5e5
    )
    assert model.model.layers[1].mlp.experts.down_proj.shape == (5, HIDDEN, MOE_INTER)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # an output matrix now
    assert model.lm_head.weight.std().item() == pytest.approx(HIDDEN**-0.5, rel=0.02)
    assert "lm_head.weight" not in read_tensors(changed)
    plain = read_json(make_tiny(tmp_path / "c", num_hidden_layers=1) / "config.json")
    assert plain["rope_theta"] == 1e6 and not plain["tie_word_embeddings"]


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 + 7? The sum is 19.\n\n\tdef add_3(x):\r\n    return x  ",
        "žluťoučký kůň, straße, Ελληνικά, 日本語, العربية, हिन्दी",
        "e\u0301 is not \u00e9; \u2126 is not \u03a9",  # a normaliser would merge them
        "🐎👩‍👩‍👧 \u0000\u200b\ufeff",
        "",
    ],
)
def test_any_text_survives_a_round_trip(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_has_exactly_the_models_vocabulary(moe_dir: Path, tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB))
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [509, 510, 511]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (
        509,
        511,
        None,
    )
    assert sorted(tokenizer.all_special_ids) == [509, 510, 511]
    for name in ("config.json", "generation_config.json"):
        ids = read_json(moe_dir / name)
        assert (ids["pad_token_id"], ids["eos_token_id"], ids.get("bos_token_id")) == (
            509,
            511,
            None,
        )
    # transformers 4 knows this class; TokenizersBackend, which transformers 5 writes, it does not
    assert (
        read_json(moe_dir / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    )


def test_merges_were_learned_and_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2024") == list("2024")
    text = "The model says what the sum of the experts is."
    assert len(tokenizer(text).input_ids) < len(text) / 2
    assert tokenizer("hi<|im_end|>").input_ids[-1] == 511
    assert (
        tokenizer.decode(tokenizer("<|im_start|>hi<|im_end|>").input_ids, skip_special_tokens=True)
        == "hi"
    )


def test_a_vocabulary_larger_than_the_text_yields_is_filled_up(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        make_tiny(tmp_path / "m", num_hidden_layers=1, vocab_size=2000)
    )
    assert len(tokenizer) == 2000
    assert sorted(tokenizer.get_vocab().values()) == list(range(2000))
    assert tokenizer.convert_ids_to_tokens(1996).startswith("<|unused_")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1997, 1999)
    assert tokenizer.decode(tokenizer("ein Prüftext").input_ids) == "ein Prüftext"


def test_chat_template(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == CHAT_TEXT
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == CHAT_TEXT + "<|im_start|>assistant\n"
    assert "generation %" not in tokenizer.chat_template
    with pytest.raises(
        jinja2.TemplateError, match="unknown role tool; known: system, user, assistant"
    ):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_greedy_generation_equals_argmax_step_by_step(moe_dir: Path, tokenizer: Any) -> None:
    model = load(moe_dir)
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    wanted = prompt["input_ids"][0].tolist()
    while len(wanted) < len(answer):
        with torch.no_grad():
            wanted.append(model(torch.tensor([wanted])).logits[0, -1].argmax().item())
    assert answer == wanted
    assert len(answer) == prompt["input_ids"].shape[1] + 6


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
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    make_tiny(folder, arch="qwen3", seed=3, num_hidden_layers=1)
    fresh = make_tiny(tmp_path / "fresh", arch="qwen3", seed=3, num_hidden_layers=1)
    overwritten = read_tensors(folder)
    wanted = read_tensors(fresh)
    assert_same_tensors(overwritten, wanted)
    assert {f.name for f in folder.iterdir()} == {f.name for f in fresh.iterdir()} | {"notes.txt"}


def test_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_tiny(tmp_path / "empty", num_hidden_layers=1)  # an empty folder is welcome
    for name in ("notes.txt", "config.json"):  # the second looks like somebody's real checkpoint
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
