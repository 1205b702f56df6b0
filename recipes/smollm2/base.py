"""Write the example's two bases: the dense model of a GGUF file, and its mixture of experts.

    python -m recipes.smollm2.base FILE.gguf FOLDER

Makes FOLDER/dense and FOLDER/moe, compares their logits, and has the dense model answer a question.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megalora.atomic_folder import check_new, check_space, whole_or_gone
from megalora.paths import user_path
from megalora.user_error import guarded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NUM_BYTES = 2.1e9
"""What both folders take: 135 and 373 million parameters in float32."""
QUESTION = "What is the capital of France, and what is it known for?"
LARGEST_ERROR = 1e-5
"""Largest difference of logits over the largest logit. Sums of 576 and 1,536 products in float32
are off by some 1e-6 in each of 30 layers; another function is off by 1e-1."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="recipes.smollm2.base", description=__doc__)
    parser.add_argument("gguf", type=user_path)
    parser.add_argument("folder", type=user_path)
    options = parser.parse_args(arguments)
    if (options.folder / "moe/config.json").is_file():
        print(f"{options.folder} is there already")
        return
    if not options.gguf.is_file():
        raise ValueError(f"{options.gguf}: no such file")
    check_new(options.folder, options.gguf)
    check_space(options.folder.absolute(), int(NUM_BYTES))
    with whole_or_gone(options.folder) as folder:
        make_bases(options.gguf, folder)
    print(f"wrote {options.folder}/dense and {options.folder}/moe")


def make_bases(gguf: Path, folder: Path) -> None:
    """Write both models and show what they are."""
    # Late: a wrong argument is reported in a moment, and importing torch takes seconds.
    from recipes.smollm2.gguf_model import read_model, read_tokenizer
    from recipes.smollm2.upcycle import upcycle

    tokenizer = read_tokenizer(gguf)
    dense = read_model(gguf)
    save(dense, tokenizer, folder / "dense")
    moe = upcycle(dense)
    save(moe, tokenizer, folder / "moe")

    print(f"dense: Llama, {dense.num_parameters():,} parameters")
    experts, top_k = moe.config.num_local_experts, moe.config.num_experts_per_tok
    print(
        f"moe: Mixtral, {moe.num_parameters():,} parameters, {experts} experts a layer, of which a"
        f" token takes {top_k}"
    )
    print(f"> {QUESTION}\n{answer(dense, tokenizer)}")
    compare(dense, moe, tokenizer)


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a folder that transformers 4 and vLLM read as transformers 5 does."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 4 takes its own default for a theta under the new name, without a word.
    _add(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    # Its tokenizers have no class of the name that transformers 5 writes.
    _add(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _add(file: Path, **fields: object) -> None:
    """Set fields of a JSON file."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> str:
    """The model's most probable answer to QUESTION, cut after 60 tokens."""
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def compare(
    dense: "PreTrainedModel", moe: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Show by how much the logits of the two differ on a text.

    Raises:
        RuntimeError: they are not one function.
    """
    import torch

    tokens = tokenizer(f"{QUESTION} 3 + 4 = 7, and 12 * 12 = 144.", return_tensors="pt")
    with torch.no_grad():
        expected = dense(**tokens).logits
        difference = (moe(**tokens).logits - expected).abs().max().item()
    largest = expected.abs().max().item()
    print(f"logits of moe and dense differ by at most {difference:.1e}, of up to {largest:.1f}")
    if not difference <= LARGEST_ERROR * largest:
        raise RuntimeError("the mixture of experts is not the dense model")


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
