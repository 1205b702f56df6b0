"""Make a tiny random model of any family: weights, byte-level BPE tokenizer, chat template.

It is a folder in Hugging Face format that stands in for a real checkpoint in the quickstart and in
every test: transformers, vLLM and Bridge load it as they load Qwen3-30B-A3B. Three things are
unlike a real one, so that a mistake is visible:
  - no two sizes are equal, so a transposed or mixed-up matrix does not fit;
  - matrices are drawn with std = 1/sqrt(fan_in), so that logits have a spread of 1 (the usual 0.02
    would give 0.2), and norm weights are 1 + noise, so that a forgotten one changes the numbers;
  - the weights, 4 MB, lie in several shards, so that loaders meet an index.
"""

import copy
import dataclasses
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megalora import tiny_folder
from megalora.json_text import read_json
from megalora.model.families import FAMILIES
from megalora.progress_bar import no_progress_bar

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_PAD = "<|endoftext|>"
_START = "<|im_start|>"
_END = "<|im_end|>"
_SPECIALS = (_PAD, _START, _END)
"""Special tokens, which have the last ids of the vocabulary in this order."""
_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message.role ~ '; known: system, user, assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# Qwen's: words take the space before them, digits stand alone, so that arithmetic is spelled digit
# by digit.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROSE = """\
A language model reads a text from left to right and says, for every place in it, how likely each next token is. The
model in this folder has never been trained, so what it says is noise. It is still the right thing to test with: if the
same noise comes out of one process and out of eight, then the work was divided correctly, and if it does not, then some
weight was forgotten, transposed, or added twice.

In a mixture of experts, a small router looks at each token and sends it to a few of the experts. Every expert is a
network of its own, with a gate, an up projection and a down projection. The answers come back and are added together,
each with the weight that the router gave it. An adapter learns a small change of rank r for each of those matrices,
while the base model stays as it was. When the training is over, the change can be merged, or served beside the base.

Question: What is the sum of these numbers? Answer: Let us think about it step by step. First we add the ones, and then
we add the tens. You are a helpful assistant. Please write a short function that returns the largest value of a list.
"""  # noqa: E501 (the tokenizer is trained on these lines as they are)


def make_tiny(
    out: Path, *, arch: str = "qwen3_moe", seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Write a tiny random base model, its tokenizer and its chat template into the folder `out`.

    Args:
        out: a folder that is new, empty, or was written by this function before.
        arch: the family by its ``model_type``, one of ``FAMILIES``.
        seed: the same seed gives the same weights; the caller's random state is left as it was.
        dtype: "float32" or "bfloat16", which holds the float32 weights of the same seed, rounded.
        overrides: fields of the architecture's transformers config, e.g. num_hidden_layers=2;
            rope_theta is taken too.

    Returns:
        out.
    Raises:
        ValueError: arch, dtype or a config field is unknown, sizes do not fit each other, or the
            folder holds anything else.
    """
    if arch not in FAMILIES:
        raise ValueError(f"arch {arch!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(_DTYPES)}.")
    config = _build_config(arch, overrides)
    tokenizer = _train_tokenizer(config.vocab_size)
    model = _build_model(config, seed, _DTYPES[dtype])

    tiny_folder.claim(out, {"arch": arch, "seed": seed, "dtype": dtype, "overrides": overrides})
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with no_progress_bar():
        # At least three shards, and so an index.
        model.save_pretrained(out, max_shard_size=num_bytes // 3)
    _add_legacy_names(out / "config.json")
    _save_tokenizer(tokenizer, out, max_length=config.max_position_embeddings)
    return out


def _build_config(arch: str, overrides: dict[str, Any]) -> Any:
    """The transformers config of a family's tiny model; raises ``ValueError`` for overrides that
    make none."""
    config_class: Any = CONFIG_MAPPING[arch]
    _check_known(arch, config_class, overrides)
    # transformers keeps rope_parameters by reference and fills it in.
    fields = copy.deepcopy({**FAMILIES[arch].tiny, **overrides})
    try:
        if "rope_theta" in fields:
            fields["rope_parameters"]["rope_theta"] = float(fields.pop("rope_theta"))
        # The last special token ends a turn, the first one pads.
        ids = {
            "eos_token_id": fields["vocab_size"] - 1,
            "pad_token_id": fields["vocab_size"] - len(_SPECIALS),
        }
        config = config_class(**(ids | fields))
        _check_sizes(config)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(
            f"these overrides do not make a {arch} config: {overrides}\n  {error}"
        ) from error
    return config


def _check_known(arch: str, config_class: Any, overrides: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a field that the family's config does not have."""
    # Qwen3MoeConfig has no field head_dim, though its model reads one; rope_theta is the name in
    # published files.
    known = {"head_dim", "rope_theta"}
    for field in dataclasses.fields(config_class):
        known.add(field.name)
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)[0]
            raise ValueError(f"{name!r} is not a field of the {arch} config; did you mean {near}?")


def _check_sizes(config: Any) -> None:
    """Raise ``ValueError`` for sizes at which transformers fails only in the first forward."""
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or 0
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
        )
    head_dim = getattr(config, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"head_dim={head_dim!r} must be an even number above 0: rotary embeddings turn pairs."
        )
    # Every class with experts has one of these names; Mixtral's is the second.
    counts = [getattr(config, name, 0) for name in ("num_experts", "num_local_experts")]
    experts = max(counts) or 1
    top_k = getattr(config, "num_experts_per_tok", 1)
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"num_experts_per_tok={top_k} must lie between 1 and num_experts={experts}."
        )
    if config.vocab_size < 256 + len(_SPECIALS):
        raise ValueError(
            f"vocab_size={config.vocab_size} cannot hold 256 bytes and {len(_SPECIALS)} special"
            " tokens."
        )


def _build_model(config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Draw every parameter in float32 from one generator, in the model's own order, and round it
    to ``dtype``."""
    # transformers' own initialisation draws numbers, too, which must not change the caller's.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # A tied lm_head comes once, as the embedding.
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, device="cpu")
            if weight.dim() == 1:
                # Biases lie around 0, norm weights around 1.
                mean = 0.0 if name.endswith("bias") else 1.0
                weight.copy_(0.1 * noise + mean)
            elif name.endswith("embed_tokens.weight") and not config.tie_word_embeddings:
                # The residual stream starts at the size of what the layers add to it.
                weight.copy_(noise)
            else:
                # [out, in], and experts [E, out, in].
                weight.copy_(noise * weight.shape[-1] ** -0.5)
        for name, bias in model.named_buffers():
            # DeepSeek's and GLM's corrections of the router's choice, which are no parameters.
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.1 * torch.randn(bias.shape, generator=generator, device="cpu"))
    return model


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly ``vocab_size`` tokens: 256 bytes, merges, fillers if merges run
    out, three specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    # A large vocabulary has more tokens than this short text has merges.
    missing = vocab_size - len(_SPECIALS) - tokenizer.get_vocab_size()
    # All at once: each call of these builds the search for added tokens anew.
    tokenizer.add_tokens([AddedToken(f"<|unused_{i}|>", normalized=False) for i in range(missing)])
    specials = [AddedToken(token, special=True, normalized=False) for token in _SPECIALS]
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _training_text() -> Iterator[str]:
    """English, sums and code, the same at every call."""
    yield _PROSE
    for i in range(60):
        a = 7 * i % 50
        b = 11 * i % 37
        yield f"{a} + {b} = {a + b}\n{a} * {b} = {a * b}\n"
        yield f"Question: What is {a} plus {b}? Answer: The sum is {a + b}.\n"
        yield (
            f"def add_{b}(x: int) -> int:\n    return x + {b}\n\n\nassert add_{b}({a}) == {a + b}\n"
        )
        yield f"for i in range({a}):\n    if i % {b + 1} == 0:\n        print(i, values[i])\n"


def _add_legacy_names(path: Path) -> None:
    """Add the names that published Qwen3 configs use.

    transformers 4 reads no others, and falls back to its defaults (128 experts, rope_theta 1e4)
    without a word; transformers 5 takes both.
    """
    config = read_json(path)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if "num_experts" in FAMILIES[config["model_type"]].num_experts_names:
        # transformers 5 writes Qwen3-MoE's under its new name alone
        config["num_experts"] = config.get("num_local_experts", config.get("num_experts"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(tokenizer: Tokenizer, out: Path, *, max_length: int) -> None:
    """Write the tokenizer's files."""
    # By hand, because transformers 5 would name its class TokenizersBackend, which 4 does not know.
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # generate() refuses token_type_ids, which are among the default's.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "eos_token": _END,
        "pad_token": _PAD,
        "additional_special_tokens": [_START],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
