"""Check for ``make parity`` that a layout in bfloat16 stays as near to the exact training as plain
transformers in bfloat16 does.

Base weights and the starting adapter are numbers that bfloat16 holds, so the training in float64 is
exact for both. The tolerance is derived, not chosen: plain transformers runs the same trainings in
bfloat16, with masters in float64, and its distance from the exact ones is what this precision costs
on these models and data, routing flips at near ties included. A layout adds in another order, which
is another draw of the same rounding: it may be twice as far as the farthest of them, plus one
rounding of the quantity itself (2^-9, relative; of an adapter, 2^-9 of a step).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megalora.config.file import save_config
from tests.parity.case import (
    LIMITS,
    LR,
    deviations,
    exceeded,
    expected,
    prepare_run,
    read_run,
    run_case,
)
from tests.parity.grid import SHORT, Case, full_grid
from tests.parity.models import make_model, make_teacher
from tests.parity.quick_cases import QUICK

DTYPE = "bfloat16"
ROUNDOFF = 2.0**-9
"""Largest relative error of one rounding to bfloat16, which keeps 8 bits of a number."""


def cases(gpus: int) -> list[Case]:
    """Cases with at most one rank on each GPU, and all cases of one rank; on the CPU cases of up to
    four ranks."""
    if gpus == 0:
        return [case for case in QUICK if case.world <= 4]
    # QUICK has cases of one rank too, but the full grid has all of those.
    single = [case for case in full_grid() if case.world == 1]
    return single + [case for case in QUICK if 1 < case.world <= gpus]


def compare(
    case: Case, folder: Path, chats: Path, environment: dict[str, str] | None
) -> dict[str, Any]:
    """Run a case and return its row. With an ``environment``, torchrun trains on GPUs in it."""
    base = folder / f"base {case.model}, {DTYPE}"
    if not base.exists():
        in_bfloat16(make_model(case.model, base))
        in_bfloat16(make_teacher(base))
    # Both start from the same checkpoint, so only the arithmetic between them differs.
    exact = expected(case, SHORT, base, chats, DTYPE)
    plain = deviations(expected(case, SHORT, base, chats, DTYPE, torch.bfloat16), exact)
    run = folder / f"run {DTYPE} {case.name}"
    if environment is None:
        run_case(case, SHORT, base, chats, run, DTYPE)
    else:
        run_on_gpus(case, base, chats, run, environment)
    return {"case": case.name, **vars(case), **deviations(read_run(run), exact), "plain": plain}


def allowed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The limit of each quantity, derived from how far plain transformers is from the exact one."""
    limits = {}
    for name, distance in farthest_plain(rows).items():
        # Adapters move by about LR a step, so one rounding of a step is that much smaller.
        size = LR if name == "adapters" else 1
        limits[name] = 2 * distance + ROUNDOFF * size
    return limits


def run_on_gpus(
    case: Case, base: Path, chats: Path, run: Path, environment: dict[str, str]
) -> None:
    config, start = prepare_run(case, SHORT, base, chats, run, DTYPE, seed=0)
    save_config(config, run / "asked.yaml")
    # In processes of their own: this one has hidden the GPUs from torch (tests/environment.py).
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.world}"]
    program = ["-m", "tests.parity.recorded", str(run / "asked.yaml"), str(start)]
    command = [sys.executable, *torchrun, *program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{case.name}: {result.stderr[-3000:]}")


def farthest_plain(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest deviation of plain transformers in bfloat16 over all cases, by quantity."""
    found = dict.fromkeys(LIMITS, 0.0)
    for row in rows:
        for name in LIMITS:
            found[name] = max(found[name], row["plain"][name])
    return found


def in_bfloat16(folder: Path) -> None:
    """Round a checkpoint to bfloat16 where it lies."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.bfloat16)
        save_file(tensors, shard, metadata={"format": "pt"})
    # transformers reads the dtype from the config, not from the tensors.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": DTYPE}))


def gpus_of(environment: dict[str, str]) -> tuple[int, str]:
    """Number and name of the CUDA devices that a process with this environment sees."""
    code = (
        "import torch; n = torch.cuda.device_count(); print(n, torch.cuda.get_device_name(0) if n"
        " else 'CPU')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout
    number, name = out.strip().split(" ", 1)
    return int(number), name


def run_all(
    chats: Path, folder: Path, environment: dict[str, str]
) -> tuple[list[dict[str, Any]], str]:
    """Run all cases on the GPUs that ``environment`` shows, else on the CPU; returns rows and their
    table. A row with ``exceeded`` has failed."""
    gpus, device = gpus_of(environment)
    rows = []
    for case in cases(gpus):
        rows.append(compare(case, folder, chats, environment if gpus else None))
    # After all cases: the limits come from the farthest of them.
    limits = allowed(rows)
    for row in rows:
        row |= {"device": device, "failed": None, "exceeded": exceeded(row, limits)}
    return rows, table(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Every case, then the values that they are compared with."""
    line = f"bfloat16 on {rows[0]['device']}, {SHORT} steps".ljust(64)
    for name in LIMITS:
        line += f"{name:>11}"
    lines = [line]
    named = [(row["case"], row) for row in rows]
    named.append(("plain transformers, the farthest", farthest_plain(rows)))
    named.append(("allowed", allowed(rows)))
    for name, values in named:
        line = f"{name:64}"
        for quantity in LIMITS:
            line += f"{values[quantity]:11.1e}"
        lines.append(line)
    return "\n".join(lines)
