"""Make pairs of a preferred and a rejected answer out of chats."""

import random
from pathlib import Path

from tests.jsonl import read_jsonl, write_jsonl


def write_pairs(chats: Path) -> None:
    """A second answer to each chat, of another length, in the file that ``pairs_of`` names."""
    rows = []
    for i, row in enumerate(read_jsonl(chats)):
        *prompt, answer = row["messages"]
        words = answer["content"].split()
        # Backwards, with one to three words more or less.
        other = " ".join([*words[:0:-1], *["perhaps"] * (i % 5)]) or "none"
        rejected = {"role": "assistant", "content": other}
        chosen = [*prompt, answer]
        # Margins of a reward model: no two neighbours have the same.
        rows.append({"chosen": chosen, "rejected": [*prompt, rejected], "margin": 0.25 * (i % 4)})
    write_jsonl(pairs_of(chats), rows)


def write_rated(chats: Path) -> None:
    """Each chat with a label, good or bad, in the file that ``rated_of`` names."""
    rows = []
    for i, row in enumerate(read_jsonl(chats)):
        rows.append({"messages": row["messages"], "label": i % 3 != 1})
    write_jsonl(rated_of(chats), rows)


def write_rollouts(chats: Path) -> None:
    """Completions of random tokens with rewards, in groups of three or four, some with a tool's
    tokens in their middle, in the file that ``rollouts_of`` names."""
    drawn = random.Random(5)
    rows = []
    for i in range(96):
        # Groups neither stand together nor are of one size, and no two have rewards alike.
        prompt = [3 + (i % 28), *range(40, 40 + i % 28 % 5)]
        length = 28 + i % 13
        mask = [1] * length
        if i % 3 == 0:
            mask[5:9] = [0] * 4
        # Of a random model, whose tokens all have about the same probability.
        logprobs = [-6.9 + drawn.gauss(0, 0.3) for _ in range(length)]
        rows.append(
            {
                "prompt_ids": prompt,
                "completion_ids": [drawn.randrange(3, 250) for _ in range(length)],
                "logprobs": logprobs,
                "mask": mask,
                "reward": drawn.gauss(1, 0.6),
                "group": f"prompt {i % 28}",
                "version": i % 3,
            }
        )
    write_jsonl(rollouts_of(chats), rows)


def rollouts_of(chats: Path) -> Path:
    """Where ``write_chats`` puts rollouts."""
    return chats.with_name(f"{chats.stem}_rollouts.jsonl")


def rated_of(chats: Path) -> Path:
    """Where ``write_chats`` puts the chats with their labels."""
    return chats.with_name(f"{chats.stem}_rated.jsonl")


def write_labels(chats: Path) -> None:
    """Each chat with one of three labels, which the lengths of answers go with, in the file that
    ``labelled_of`` names."""
    rows = []
    for row in read_jsonl(chats):
        words = len(row["messages"][-1]["content"].split())
        rows.append({"messages": row["messages"], "label": words % 3})
    write_jsonl(labelled_of(chats), rows)


def labelled_of(chats: Path) -> Path:
    """Where ``write_chats`` puts the chats with labels."""
    return chats.with_name(f"{chats.stem}_labelled.jsonl")


def pairs_of(chats: Path) -> Path:
    """Where ``write_chats`` puts pairs of answers to the same questions."""
    return chats.with_name(f"{chats.stem}_pairs.jsonl")
