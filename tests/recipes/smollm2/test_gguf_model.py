"""A tiny invented GGUF file, written by the package gguf, becomes the two bases.

The package is no part of the environment: these tests fetch it as the example does."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import import_utils

from megalora.tiny import make_tiny
from recipes.smollm2 import base, fetch

ROOT = Path(__file__).parents[3]
UV = shutil.which("uv") or str(ROOT / ".tools/bin/uv")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS, KV_HEADS = 6, 2
# Multiples of 32, the numbers that share a scale; no two alike.
SIZES = {
    "hidden_size": 192, "intermediate_size": 160, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": 32, "num_hidden_layers": 2,
    "tie_word_embeddings": True, "rope_theta": 54_321.0,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""llama.cpp's names of what lies in a layer."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package gguf, as the example pins it."""
    folder = tmp_path_factory.mktemp("packages")
    pinned = folder / "requirements.txt"
    lines = fetch.REQUIREMENTS.read_text().splitlines()
    pinned.write_text("\n".join(line for line in lines if line.startswith("gguf==")))
    try:
        fetch._install(folder, UV, pinned)
    except ValueError as error:
        pytest.skip(f"the package gguf cannot be had: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        # transformers has looked which packages there are when it was imported.
        patch.setitem(import_utils.PACKAGE_DISTRIBUTION_MAPPING, "gguf", ["gguf"])
        import_utils.is_gguf_available.cache_clear()
        import gguf

        yield gguf
    import_utils.is_gguf_available.cache_clear()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    folder = make_tiny(tmp_path_factory.mktemp("models") / "llama", arch="llama", **SIZES)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def dequantised_q4_1(weight: torch.Tensor, gguf: Any) -> torch.Tensor:
    """What Q4_1 keeps of a matrix, from the format's definition.

    32 numbers share 20 bytes: scale d and minimum m in float16, then 16 bytes of which the low
    halves are numbers 0 to 15 and the high halves 16 to 31; a number is d q + m.
    """
    stored = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    blocks = stored.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    values = scale[:, None] * halves.astype(np.float32) + minimum[:, None]
    return torch.from_numpy(values.reshape(tuple(weight.shape)))


def llama_cpp_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in llama.cpp's order: it turns neighbouring features, transformers those half
    a head apart."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, gguf: Any, pre: str = "smollm") -> Path:
    """A file as llama.cpp's converter makes it: matrices in Q4_1, the embedding in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*SPECIALS, *sorted(bytes_to_unicode().values()), "he", "ll"]
    tokens += [f"unused{number}" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        add_tensor(writer, name, weight, gguf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: Any, name: str, weight: torch.Tensor, gguf: Any) -> None:
    kinds = gguf.GGMLQuantizationType
    if name == "model.embed_tokens.weight":
        stored = gguf.quants.quantize(weight.numpy(), kinds.Q8_0)
        writer.add_tensor("token_embd.weight", stored, raw_dtype=kinds.Q8_0)
    elif name == "model.norm.weight":
        writer.add_tensor("output_norm.weight", weight.numpy())
    elif name != "lm_head.weight":
        _, _, layer, rest = name.split(".", 3)
        name = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        if weight.dim() == 1:
            writer.add_tensor(name, weight.numpy())
            return
        if "attn_q" in name or "attn_k" in name:
            weight = llama_cpp_rows(weight, HEADS if "attn_q" in name else KV_HEADS)
        stored = gguf.quants.quantize(weight.numpy(), kinds.Q4_1)
        writer.add_tensor(name, stored, raw_dtype=kinds.Q4_1)


def test_a_file_becomes_two_bases_of_one_function(dense, gguf, tmp_path, capsys) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", dense, gguf)
    out = tmp_path / "base"
    base.main([str(file), str(out)])
    said = capsys.readouterr().out
    assert "logits of moe and dense differ by at most" in said and f"> {base.QUESTION}" in said

    read = AutoModelForCausalLM.from_pretrained(out / "dense").eval()
    weights = read.state_dict()
    for name, weight in dense.state_dict().items():
        if weight.dim() == 2 and "layers" in name:
            # Rows keep their 32 numbers together, so their order changes nothing of the values.
            assert torch.equal(weights[name], dequantised_q4_1(weight, gguf)), name
        elif weight.dim() == 1:
            assert torch.equal(weights[name], weight), name
    # A byte for each number and a scale for 32: half a step is a 254th of the largest.
    embedding = dense.get_input_embeddings().weight
    error = (read.get_input_embeddings().weight - embedding).abs().max()
    assert 0 < error <= embedding.abs().max() / 250
    assert read.config.rope_parameters["rope_theta"] == SIZES["rope_theta"]

    moe = AutoModelForCausalLM.from_pretrained(out / "moe").eval()
    tokens = torch.arange(200)[None]
    with torch.no_grad():
        torch.testing.assert_close(moe(tokens).logits, read(tokens).logits, rtol=0, atol=1e-5)

    base.main([str(file), str(out)])
    assert capsys.readouterr().out == f"{out} is there already\n"


def test_the_tokenizer_of_a_file(dense, gguf, tmp_path, capsys) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", dense, gguf)
    base.main([str(file), str(tmp_path / "base")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base/moe")
    # transformers 5.12 takes the first token of a turn for its end where it reads the file itself.
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")
    chat = [{"role": "user", "content": "1 + 2  3?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n1 + 2  3?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [ids.count(number) for number in (1, 2)] == [3, 2]
    # Both names of theta and of the class, for readers of either generation.
    assert '"rope_theta": 54321.0' in (tmp_path / "base/moe/config.json").read_text()
    assert "PreTrainedTokenizerFast" in (tmp_path / "base/moe/tokenizer_config.json").read_text()


def test_other_rules_of_splitting_text_are_refused(dense, gguf, tmp_path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", dense, gguf, pre="llama-bpe")
    with pytest.raises(ValueError, match=r"splits text by the rules \('gpt2', 'llama-bpe'\)"):
        base.main([str(file), str(tmp_path / "base")])
    # Nothing is left of a base that could not be finished.
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_index_is_held_to_the_hash(gguf, tmp_path) -> None:
    """By uv itself, with a package that it can have."""
    wrong = tmp_path / "requirements.txt"
    wrong.write_text("gguf==0.19.0 --hash=sha256:" + "0" * 64)
    with pytest.raises(ValueError, match=r"could not get the packages .*(?i:hash)") as refused:
        fetch._install(tmp_path / "packages", UV, wrong)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "packages/gguf").exists()
