"""Compare the vocabularies of two Hugging Face folders, without torch and transformers."""

import hashlib
import json
from pathlib import Path

from megalora.hf.json_file import read_json_object

TOKENIZER = "tokenizer.json"


def check_same_vocabulary(teacher: Path, student: Path, option: str) -> None:
    """Raise ``ValueError`` unless every token id means the same in both folders.

    How a text becomes tokens may differ: the teacher reads the student's tokens.

    Args:
        option: name of the option that the teacher was given by, for messages.
    """
    theirs = _tokens(teacher, option)
    ours = _tokens(student, "model.path")
    for number in sorted(theirs.keys() | ours.keys()):
        their_token = theirs.get(number)
        our_token = ours.get(number)
        if their_token != our_token:
            raise ValueError(
                f"{option}={teacher} has another vocabulary than model.path={student}: token"
                f" {number} is {their_token!r} there and {our_token!r} here (None: no such token)."
                " A teacher must have the model's own tokens"
            )


def tokens_digest(folder: Path, option: str) -> str:
    """Digest of what every token id means in a folder."""
    listed = json.dumps(sorted(_tokens(folder, option).items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def _tokens(folder: Path, option: str) -> dict[int, str]:
    """Id of each token that the folder's tokenizer has -> its text."""
    file = folder / TOKENIZER
    if not file.is_file():
        raise ValueError(
            f"{option}={folder} has no {TOKENIZER}, by which the vocabularies of teacher and model"
            " are compared; save the tokenizer there with transformers"
        )
    content = read_json_object(file, exact_numbers=False)
    found: dict[int, str] = {}
    try:
        vocabulary = content["model"]["vocab"]
        # Unigram models have a list of (token, score), all others an object of ids.
        if isinstance(vocabulary, list):
            for number, (token, _score) in enumerate(vocabulary):
                found[number] = token
        else:
            for token, number in vocabulary.items():
                found[number] = token
        for added in content.get("added_tokens", []):
            found[added["id"]] = added["content"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: not a tokenizer's file, or one without a vocabulary") from None
    return found
