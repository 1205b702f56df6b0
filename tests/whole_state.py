"""Read a checkpoint's training state as docs/runs.md describes it, with none of our code;
damage it; and gather what ranks hold."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megalora.comm import sum_bucket
from megalora.parallel import Groups
from megalora.train.optim import owned_runs

KEYS = ("param", "exp_avg", "exp_avg_sq")
RANK_0 = "training_state/rank_00000.safetensors"
INDEX = "training_state/index.json"


def whole_state(checkpoint: Path, keys: tuple[str, ...] = KEYS) -> dict[str, Tensor]:
    """Masters and moments as KEY.NAME, whole; an assertion fails where an element is missing or
    twice."""
    folder = checkpoint / "training_state"
    index = json.loads((folder / "index.json").read_text())
    assert index["format"] == 2
    files = [load_file(folder / f"rank_{r:05d}.safetensors") for r in range(index["world_size"])]
    whole: dict[str, Tensor] = {}
    for name, tensor in index["tensors"].items():
        shape = tensor["shape"]
        numbers = torch.arange(torch.tensor(shape).prod().item()).view(shape)
        places: list[Tensor] = []
        for _, dim, num_shards, shard, start, end in tensor["pieces"]:
            part = numbers
            if dim is not None:
                size = shape[dim] // num_shards
                part = numbers.narrow(dim, shard * size, size)
            places.append(part.flatten()[start:end])
        every = torch.cat(places).sort().values
        assert torch.equal(every, numbers.flatten()), f"{name}: not every element once"
        for key in keys:
            if key in tensor["keys"]:
                pieces = [files[row[0]][f"{key}.{name}"] for row in tensor["pieces"]]
                flat = torch.zeros(numbers.numel(), dtype=pieces[0].dtype)
                for place, piece in zip(places, pieces, strict=True):
                    flat[place] = piece
                whole[f"{key}.{name}"] = flat.view(shape)
    return whole


def tensors_of(checkpoint: Path, key: str) -> dict[str, Tensor]:
    """The tensors of one key by name."""
    found = whole_state(checkpoint, (key,))
    return {name.removeprefix(f"{key}."): tensor for name, tensor in found.items()}


def change_state(
    checkpoint: Path,
    change: Callable[[dict[str, Tensor]], object],
    change_index: Callable[[dict[str, Any]], object] = lambda index: None,
) -> None:
    """Change the file of the first rank, and the index and the list of digests to agree with it."""
    path = checkpoint / RANK_0
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = json.loads((checkpoint / INDEX).read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    index["files"][path.name] = [path.stat().st_size, digest]
    change_index(index)
    (checkpoint / INDEX).write_text(json.dumps(index))
    sum_anew(checkpoint)


def sum_anew(checkpoint: Path) -> None:
    """Write the digests of a checkpoint's files anew, where it has them."""
    sums = checkpoint / "training_state/SHA256SUMS"
    if not sums.is_file():
        return
    sums.unlink()
    with sums.open("w") as lines:
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file() and path != sums:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lines.write(f"{digest}  {path.relative_to(checkpoint).as_posix()}\n")


def gathered_state(
    optimizer: Any, key: str, parameters: list[nn.Parameter], groups: Groups
) -> dict[nn.Parameter, Tensor]:
    """Masters or moments of this rank's parameters, whole again over data parallelism; the slices
    of others are added as zeros, which is exact. Collective."""
    state = {p: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters}
    for run in owned_runs(optimizer):
        if run.parameter in state:
            state[run.parameter].view(-1)[run.start : run.end] = run.state()[key]
    for group, allreduce in ((groups.dp_cp, True), (groups.edp, False)):
        of_group = [t for p, t in state.items() if p.allreduce is allreduce]  # type: ignore
        sum_bucket(of_group, group)
    return state
