"""Read adapters from pickles without running their code, and refuse pickles of anything else."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from megalora.adapters.files import WEIGHTS
from megalora.adapters.read.weights import PICKLE, AdapterWeights
from megalora.serve.check import check_adapter
from megalora.serve.errors import AdapterInvalid
from tests.adapters.adapters import Trained
from tests.adapters.weight_files import in_pickle


def test_a_server_gets_what_was_checked(stored: Trained, tmp_path: Path) -> None:
    """vLLM would unpickle, and knows no shards: megalora checks, copies and serves one form."""
    in_pickle(stored.folder)
    with pytest.raises(
        AdapterInvalid,
        match=f"holds {PICKLE}; .* serves {WEIGHTS}, which megalora export {stored.folder} OUT",
    ):
        check_adapter(stored.folder)


class Runs:
    """What a pickle can do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        # torch.load reads protocol 2, and names what it would have to call; 149 is FRAME, with
        # which protocol 4 begins.
        (2, "a pickle that would run posix.mkdir, .* save it again with PEFT"),
        (4, r"\(UnpicklingError: Unsupported operand 149\)"),
    ],
)
def test_a_pickle_runs_no_code(
    stored: Trained, tmp_path: Path, protocol: int, message: str
) -> None:
    (stored.folder / WEIGHTS).unlink()
    with (stored.folder / PICKLE).open("wb") as file:
        # Whoever loads it with pickle makes a folder.
        pickle.dump({"a": Runs(tmp_path / "trace")}, file, protocol)
    with pytest.raises(ValueError, match=message) as caught:
        AdapterWeights(stored.folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "trace").exists()


# Nothing, no whole signature, and within a zip file, whose table of contents is at its end.
@pytest.mark.parametrize("length", [0, 1, 100, 5000])
def test_a_pickle_cut_short(stored: Trained, length: int) -> None:
    in_pickle(stored.folder)
    os.truncate(stored.folder / PICKLE, length)
    with pytest.raises(
        ValueError, match=rf"{PICKLE}: not a readable pickle \(.*\); is it cut short"
    ) as caught:
        AdapterWeights(stored.folder)
    # torch's own message has ten lines, and advises to load the file unsafely.
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


# Content, and what the refusal says.
BAD_PICKLES: dict[str, tuple[object, str]] = {
    "a list": ([torch.ones(2, 2)], "must hold a dictionary of tensors, holds a list"),
    "a training state": ({"epoch": 3, "state": {"a": torch.ones(2, 2)}},
                         "epoch is a int; an adapter's weights are"),
    "numbers for names": ({1: torch.ones(2, 2)}, "1 is a Tensor; an adapter's"),
    # torch.load returns these as tensors; their bytes are no plain matrix.
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "a is not a plain tensor"),
    # 10^12 numbers that are one: reading them would take 4 TB.
    "a view larger than its storage": ({"a": torch.ones(1).expand(10**9, 10**3)},
                                       "a is larger than its contents"),
    "nothing": ({}, f"{PICKLE} holds no tensors: nothing was adapted"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_pickle_of_something_else(stored: Trained, case: str) -> None:
    content, message = BAD_PICKLES[case]
    (stored.folder / WEIGHTS).unlink()
    torch.save(content, stored.folder / PICKLE)
    with pytest.raises(ValueError, match=message):
        AdapterWeights(stored.folder)
