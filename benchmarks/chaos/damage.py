"""Damage files that a run resumes from: it must refuse in a line, or go on from what is right."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos.children import Ended, in_child
from benchmarks.chaos.fault import HANG, LOST, REFUSED, SURVIVED, Fault
from benchmarks.chaos.held_run import HeldRun
from benchmarks.chaos.saves import is_line
from megalora.config import RunConfig
from megalora.config.file import load_config

NEWEST = "step_000003"
STATE_FILES = (
    "training_state/state.json", "training_state/index.json",
    "training_state/rank_00000.safetensors", "adapter_model.safetensors", "adapter_config.json",
    "probe.json", "training_state/SHA256SUMS",
)  # fmt: skip
"""Files of a checkpoint, none of which may be another and be trained on."""
CHECKPOINT_FILES = (
    "latest", *(f"{NEWEST}/{name}" for name in STATE_FILES), "best", ".lock", ".digests.json",
)  # fmt: skip


def _flip(path: Path, chance: random.Random) -> str:
    """One bit, as a disk or a memory may turn it over."""
    data = bytearray(path.read_bytes())
    # Any byte: header, offsets and values alike.
    place = chance.randrange(len(data))
    bit = chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place:,} turned over"


def _cut(path: Path, chance: random.Random) -> str:
    # Down to nothing, as after a loss of power.
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size:,} bytes"


def _fill_with_zeros(path: Path, chance: random.Random) -> str:
    """A block, as file systems return it for what never reached the disk."""
    data = bytearray(path.read_bytes())
    # File systems lose whole sectors.
    begin = chance.randrange(len(data)) // 512 * 512
    block = data[begin : begin + 4096]
    data[begin : begin + 4096] = bytes(len(block))
    path.write_bytes(data)
    return f"zeros from byte {begin:,} on"


def _scribble(path: Path, chance: random.Random) -> str:
    path.write_bytes(chance.randbytes(chance.randrange(1, 2000)))
    return "other bytes altogether"


def _double(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    # As a write that was tried again leaves it.
    path.write_bytes(data + data[: chance.randrange(1, len(data) + 1)])
    return "part of it once more behind its end"


def _remove(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "removed"


def _make_folder(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _make_pipe(path: Path, chance: random.Random) -> str:
    path.unlink()
    # To open one waits for a writer, for ever.
    os.mkfifo(path)
    return "a pipe in its place"


def _dangle(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "a link to nowhere in its place"


def _forbid(path: Path, chance: random.Random) -> str:
    """Root may read everything, so a link to itself stands for what cannot be opened."""
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself in its place"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    _flip, _flip, _flip, _cut, _fill_with_zeros, _scribble, _double, _remove, _make_folder,
    _make_pipe, _dangle, _forbid,
)  # fmt: skip


def _whole(held: HeldRun, scratch: Path) -> Path:
    """A run folder with three checkpoints, and what a resumed run adds beside them."""
    whole = scratch.with_name("whole")
    if not whole.exists():
        held.begin(whole, 1, 2, 3)
        # Resuming writes its lock and its digests.
        in_child(lambda: held.resume(whole))
    return whole


def damaged_checkpoints(held: HeldRun, scratch: Path, times: int, seed: int) -> Iterator[Fault]:
    """Files of a run folder, each kind of damage in turn."""
    chance = random.Random(seed)
    whole = _whole(held, scratch)
    for number in range(times):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(whole, scratch)
        # Each file with one damage, then each with the next one.
        name = CHECKPOINT_FILES[number % len(CHECKPOINT_FILES)]
        damage = DAMAGES[number // len(CHECKPOINT_FILES) % len(DAMAGES)]
        path = scratch / name
        # A file that this run has no need of is damaged as an empty one.
        if not path.exists():
            path.write_text("")
        what = f"{name}: {damage(path, chance)}" if path.stat().st_size else f"{name}: empty"
        is_changed = name.startswith(NEWEST) and not _same(path, whole / name)
        ended = in_child(lambda: held.resume(scratch))
        yield _judged("damaged checkpoint", what, ended, is_changed)


def torn_checkpoints(held: HeldRun, scratch: Path) -> Iterator[Fault]:
    """Each file of the newest checkpoint replaced by that of an earlier one, whole in itself."""
    whole = _whole(held, scratch)
    for name in CHECKPOINT_FILES[1 : 1 + len(STATE_FILES)]:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(whole, scratch)
        # Only its neighbours tell that it is not of this step.
        earlier = name.replace(NEWEST, "step_000002")
        shutil.copyfile(scratch / earlier, scratch / name)
        what = f"{name}: that of the step before"
        is_changed = not _same(scratch / name, whole / name)
        ended = in_child(lambda: held.resume(scratch))
        yield _judged("file of another step", what, ended, is_changed)


def _same(path: Path, whole: Path) -> bool:
    """Whether a damaged file has all bytes that it had."""
    return path.is_file() and path.read_bytes() == whole.read_bytes()


def damaged_inputs(held: HeldRun, scratch: Path, times: int, seed: int) -> Iterator[Fault]:
    """The data, the base's config.json and its weights: a run that resumes must notice."""
    chance = random.Random(seed)
    whole = _whole(held, scratch)
    inputs = scratch.with_name("inputs")
    for number in range(times):
        for folder in (scratch, inputs):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, scratch)
        shutil.copytree(held.base, inputs / "base")
        shutil.copyfile(str(held.config.data.train), inputs / "chats.jsonl")
        # A base may have several shards.
        weights = sorted(path.name for path in (inputs / "base").glob("*.safetensors"))
        name = ("chats.jsonl", "base/config.json", f"base/{weights[0]}")[number % 3]
        damage = DAMAGES[number // 3 % len(DAMAGES)]
        what = f"{name}: {damage(inputs / name, chance)}"
        config = held.at(scratch)
        config = replace(
            config,
            data=replace(config.data, train=str(inputs / "chats.jsonl")),
            model=replace(config.model, path=str(inputs / "base")),
        )
        # The checkpoints are whole: what they were made of is not.
        ended = in_child(lambda config=config: held.resume(scratch, config))
        yield _judged("damaged data or base", what, ended)


def damaged_configs(held: HeldRun, scratch: Path, times: int, seed: int) -> Iterator[Fault]:
    """The YAML file of a run: refused in a line, or read as something that was checked."""
    chance = random.Random(seed)
    whole = _whole(held, scratch) / "config.yaml"
    path = scratch.with_name("damaged.yaml")
    for number in range(times):
        # What the damage before has left in its place.
        path.unlink(missing_ok=True)
        if path.is_dir():
            path.rmdir()
        shutil.copyfile(whole, path)
        what = f"config.yaml: {DAMAGES[number % len(DAMAGES)](path, chance)}"

        def read() -> dict[str, object]:
            config: RunConfig = load_config(str(path), [])
            return {"step": config.train.steps, "same": True}

        yield _judged("damaged config", what, in_child(read))
        if path.is_dir():
            path.rmdir()


def _judged(kind: str, what: str, ended: Ended, newest_is_changed: bool = False) -> Fault:
    """Refused in a line, or gone on from a step bit for bit; nothing else will do.

    Args:
        newest_is_changed: a file of the newest checkpoint is not what was saved: a run that goes on
            from it has not noticed.
    """
    answer = ended.answer
    said = answer.get("refused", "")
    left = tuple(answer.get("left", ()))
    if ended.hung:
        return Fault(kind, what, HANG, ended.seconds, "", left)
    if said:
        return Fault(kind, what, REFUSED if is_line(said) else LOST, ended.seconds, said, left)
    if newest_is_changed and answer.get("step") == int(NEWEST.removeprefix("step_")):
        return Fault(kind, what, LOST, ended.seconds, "taken for whole", left)
    if answer.get("same") and answer.get("step") is not None:
        detail = f"goes on from step {answer['step']}"
        return Fault(kind, what, SURVIVED, ended.seconds, detail, left)
    return Fault(kind, what, LOST, ended.seconds, f"{answer} signal {ended.signal}", left)
