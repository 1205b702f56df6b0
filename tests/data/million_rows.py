"""Build or read a token store in a process of its own and print the process's peak memory.

    python -m tests.data.million_rows build ROWS.jsonl CACHE
    python -m tests.data.million_rows read ROWS.jsonl CACHE

Tokens are made up: a million rows take the tokenizer ten minutes, and it holds none of them. All
else is real, from the file's lines to the store and back.
"""

import json
import sys
from pathlib import Path

import numpy as np

from megalora.data import encode_rows
from megalora.data.chat import Encoded
from megalora.data.order import global_batch_indices
from megalora.data.samples import digest_of_samples
from megalora.data.splits import Split, load_split
from tests.data.chat_tokenizer import make_tokenizer

MAX_LENGTH = 200


def made_up(conversation, template, allow_left_out):
    """A sample of 8 to 207 tokens, all different from those of the next conversation."""
    number = int(conversation.messages[0]["content"])
    ids = np.arange(number, number + 8 + number % 200, dtype=np.int32)
    mask = np.zeros(len(ids), bool)
    mask[-5:] = True
    return Encoded(ids, mask)


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            question = {"role": "user", "content": f"{number}"}
            answer = {"role": "assistant", "content": "yes"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


def load(rows: str, cache: str) -> Split:
    encode_rows.encode_conversation = made_up
    # 7 tokens of 200 are longer than the limit: some samples are split.
    return load_split(
        rows, make_tokenizer(), format="auto", max_length=MAX_LENGTH, too_long="split",
        cache=cache, workers=1,
    )  # fmt: skip


def read(split: Split) -> int:
    """Do with the samples what a rank does in 400 steps; returns how many tokens it has read."""
    assert len(digest_of_samples(split.samples)) == 72
    num_tokens = int(split.sample_lengths.max())
    for step in range(400):
        for index in global_batch_indices(step, 256, len(split.samples), seed=0):
            num_tokens += len(split.samples[index].input_ids)
    return num_tokens


def main(action: str, rows: str, cache: str) -> None:
    split = load(rows, cache)
    num_tokens = read(split) if action == "read" else 0
    # The largest that this process ever had, in kB, pages of files included. ru_maxrss begins with
    # what the process that started this one had.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    record = {"peak_bytes": peak, "samples": len(split.samples), "tokens_read": num_tokens}
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
