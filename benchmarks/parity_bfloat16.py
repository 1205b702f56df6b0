"""The bfloat16 arm of ``make parity``: does a layout stay as near to the exact training as plain
transformers in bfloat16 does?

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
from tests.parity.grid import QUICK, SHORT, Case, full_grid
from tests.parity.models import make_model

DTYPE = "bfloat16"
ROUNDOFF = 2.0**-9


def cases(gpus: int) -> list[Case]:
    """What the GPUs have room for, one rank each, and everything that runs on one; on the CPU up to
    four ranks."""
    if gpus == 0:
        return [case for case in QUICK if case.world <= 4]
    return [case for case in full_grid() if case.world == 1] + [
        case for case in QUICK if 1 < case.world <= gpus
    ]


def compare(
    case: Case, folder: Path, chats: Path, environment: dict[str, str] | None
) -> dict[str, Any]:
    """The row of a case; with an ``environment``, trained on GPUs by torchrun in it."""
    base = folder / f"base {case.model}, {DTYPE}"
    if not base.exists():
        in_bfloat16(make_model(case.model, base))
    exact = expected(case, SHORT, base, chats, DTYPE)
    plain = deviations(expected(case, SHORT, base, chats, DTYPE, torch.bfloat16), exact)
    run = folder / f"run {DTYPE} {case.name}"
    if environment is None:
        run_case(case, SHORT, base, chats, run, DTYPE)
    else:
        run_on_gpus(case, base, chats, run, environment)
    return {"case": case.name, **vars(case), **deviations(read_run(run), exact), "plain": plain}


def allowed(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        name: (
            2 * max(row["plain"][name] for row in rows)
            + ROUNDOFF * (LR if name == "adapters" else 1)
        )
        for name in LIMITS
    }


def run_on_gpus(
    case: Case, base: Path, chats: Path, run: Path, environment: dict[str, str]
) -> None:
    config, start = prepare_run(case, SHORT, base, chats, run, DTYPE, seed=0)
    save_config(config, run / "asked.yaml")
    torchrun = (
        f"-m torch.distributed.run --standalone --nproc-per-node={case.world} -m"
        " tests.parity.recorded".split()
    )
    command = [sys.executable, *torchrun, str(run / "asked.yaml"), str(start)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{case.name}: {result.stderr[-3000:]}")


def in_bfloat16(folder: Path) -> None:
    """Round a checkpoint to bfloat16 where it lies."""
    for shard in folder.glob("*.safetensors"):
        tensors = {name: t.to(torch.bfloat16) for name, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": DTYPE}))


def gpus_of(environment: dict[str, str]) -> tuple[int, str]:
    """(number, name) of the CUDA devices that a process with this environment sees."""
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
    """(rows, table) on the GPUs that ``environment`` shows, else on the CPU; a row with
    ``exceeded`` has failed."""
    gpus, device = gpus_of(environment)
    rows = [compare(case, folder, chats, environment if gpus else None) for case in cases(gpus)]
    limits = allowed(rows)
    for row in rows:
        row |= {"device": device, "failed": None, "exceeded": exceeded(row, limits)}
    return rows, table(rows)


def table(rows: list[dict[str, Any]]) -> str:
    head = f"bfloat16 on {rows[0]['device']}, {SHORT} steps"
    plain = {name: max(row["plain"][name] for row in rows) for name in LIMITS}
    lines = [f"{head:64}" + "".join(f"{name:>11}" for name in LIMITS)]
    for name, values in [
        *((r["case"], r) for r in rows),
        ("plain transformers, the farthest", plain),
        ("allowed", allowed(rows)),
    ]:
        lines.append(f"{name:64}" + "".join(f"{values[quantity]:11.1e}" for quantity in LIMITS))
    return "\n".join(lines)
