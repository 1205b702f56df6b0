"""Read a Llama and its tokenizer from a GGUF file, as llama.cpp's quantised models come.

transformers dequantises the weights and undoes llama.cpp's order of rows in q and k; the package
gguf reads the file. The tokenizer is made here: the one that transformers 5.12 makes of this file
has <|im_start|> for its end token, with which no answer would end, and splits digits from a run of
spaces in another place than the published one.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from megalora.progress_bar import no_progress_bar

CONTROL = 3
"""``tokenizer.ggml.token_type`` of tokens that are never text, such as <|im_start|>."""
SPECIAL_IDS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id", "pad_token": "padding_token_id",
}  # fmt: skip
"""Names of special tokens in transformers, and of their ids below ``tokenizer.ggml`` in a file."""


def read_model(path: Path) -> LlamaForCausalLM:
    """The model in float32, every weight dequantised."""
    with no_progress_bar():
        model = LlamaForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    return model.eval()


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file that says ``tokenizer.ggml.pre = smollm``, with its chat template.

    Raises:
        ValueError: the file's text is split by other rules.
    """
    # Late: it lies in the example's own folder, which must be on the path by then.
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    rules = value("ggml.model"), value("ggml.pre")
    if rules != ("gpt2", "smollm"):
        raise ValueError(f"{path} splits text by the rules {rules}; only gpt2 and smollm are known")
    tokens = value("ggml.tokens")
    names = {name: tokens[value(f"ggml.{field}")] for name, field in SPECIAL_IDS.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(tokens, value("ggml.merges"), value("ggml.token_type")),
        model_max_length=fields["llama.context_length"].contents(),
        # What the model takes: generate() refuses token_type_ids, which are among the default's.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **names,
    )
    tokenizer.chat_template = value("chat_template")
    return tokenizer


def _byte_level_bpe(tokens: list[str], merges: list[str], types: list[int]) -> Tokenizer:
    """A BPE of bytes whose text is first split at digits, each of which stands alone, then as
    GPT-2's is."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer
