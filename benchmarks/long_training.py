"""Check megalora's own step on packed rows, on rows that context parallelism divides, and its peak
memory at 32k tokens.

Two trainings agree where the loss does within ``LOSS`` and all gradients together within
``GRADIENT``: in bfloat16 every rounding is 4e-3, and another order of sums rounds otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.long_attention import distance, stand_in
from benchmarks.model_plan import error_percent, machine_of, planned
from benchmarks.profile_step import profile_steps
from benchmarks.train_arms import Setup, Training
from benchmarks.train_case import QWEN3_30B_A3B, TINY_MODEL
from megalora.environment import SHARE_GPU

LOSS = 5e-3
GRADIENT = 5e-2
SMALL = TINY_MODEL | {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
"""Wide enough for every back end."""
LENGTHS = (150, 37, 90, 201, 64, 11)
"""Tokens of the samples: documents that end inside of chunks, and one that spans several."""
DRY_LENGTHS = (15, 4, 9, 20)
MULTIPLE = 4
"""Of the tokens of a row, so that two context-parallel ranks can divide it."""
CP_SECONDS = 120
"""Longest that a training of the context-parallel check may take."""
LAYERS = 4
"""Layers of Qwen3-30B-A3B whose peak is measured; with full recomputation all of them are alike."""
LONG = 32768


def small(device: torch.device, dry: bool) -> Setup:
    """The model of the checks of values, in bfloat16 on a CPU, too."""
    lengths = DRY_LENGTHS if dry else LENGTHS
    return Setup(TINY_MODEL if dry else SMALL, 8, sum(lengths), device)


def samples(setup: Setup, lengths: Sequence[int]) -> list[Any]:
    """Samples of random tokens; the first third of each is a prompt, outside of the loss."""
    from megalora.data.chat import Encoded

    generator = np.random.default_rng(setup.seed)
    found = []
    for length in lengths:
        ids = generator.integers(0, setup.config["vocab_size"], length).astype(np.int32)
        found.append(Encoded(ids, np.arange(length) >= length // 3))
    return found


def packed(of: Sequence[Any]) -> list[Any]:
    """All samples in one row."""
    from megalora.data.batch import flat_row

    return [flat_row(of, filler=of[0].input_ids, multiple_of=MULTIPLE)]


def padded(of: Sequence[Any]) -> list[Any]:
    """A row for each sample, all as long as the longest."""
    from megalora.data.batch import flat_row

    longest = max(len(sample.input_ids) for sample in of)
    length = -(-longest // MULTIPLE) * MULTIPLE
    filler = of[0].input_ids
    return [flat_row([sample], filler=filler, multiple_of=length) for sample in of]


def fill(parameters: Sequence[Tensor]) -> None:
    """Give adapters values, the same in every run: with B at zero A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.02 * drawn)


@contextmanager
def built(setup: Setup, cp: int = 1) -> Iterator[tuple[Any, Any, Any]]:
    """(adapted model, stepper, optimizer) of this rank."""
    from benchmarks.train_megalora import adapted_base, on_megatron
    from megalora.config import TrainConfig
    from megalora.train.assemble import make_stepper

    with on_megatron(setup, cp) as groups:
        model = adapted_base(setup, groups, cp)
        fill(model.parameters)
        settings = TrainConfig(steps=1, lr=1e-4)
        stepper, optimizer = make_stepper(settings, setup.dtype, model.chunks, groups)
        yield model, stepper, optimizer


def loss_and_gradients(
    model: Any, stepper: Any, optimizer: Any, rows: list[Any]
) -> dict[str, Tensor]:
    """ "loss", and every adapter tensor's gradient under its name; on the first rank alone."""
    from tests.parity.gradients import reduced_gradients

    # The loss is the first metric, and without options the only one.
    ((total, count),) = stepper.forward_backward(rows, optimizer)
    gradients = reduced_gradients(model, optimizer) or {}
    return {"loss": (total / count).cpu(), **gradients}


def compare(found: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[str, str, dict[str, float]]:
    """Status, figures for the line, and the two deviations.

    Raises:
        ValueError: the two do not have gradients of the same tensors.
    """
    if found.keys() != want.keys() or len(want) < 2:
        raise ValueError(f"gradients of {len(found) - 1} and of {len(want) - 1} tensors")
    loss = abs(found["loss"].item() / want["loss"].item() - 1)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for name, gradient in want.items():
        if name != "loss":
            ours.append(found[name].flatten())
            theirs.append(gradient.flatten())
    # All tensors as one: a small one may have a gradient of rounding alone.
    gradient = distance(torch.cat(ours), torch.cat(theirs))
    over = []
    for what, value, limit in (("loss", loss, LOSS), ("gradients", gradient, GRADIENT)):
        # Written so that a NaN exceeds the limit.
        if not value <= limit:
            over.append(f"{what} {value:.1e} > {limit:.0e}")
    status = f"FAILED: {', '.join(over)}" if over else "ok"
    figures = f"loss {loss:.1e}, gradients of {len(ours)} tensors {gradient:.1e}"
    return status, figures, {"loss": loss, "gradient": gradient}


# ---- packed rows ---------------------------------------------------------------------------------


def check_packed(device: torch.device, dry: bool) -> dict[str, Any]:
    """One packed row against a row a sample: loss, gradients, and no wait in the packed step."""
    from megalora.train.optim import clip_and_step

    setup = small(device, dry)
    of = samples(setup, DRY_LENGTHS if dry else LENGTHS)
    with built(setup) as (model, stepper, optimizer):
        want = loss_and_gradients(model, stepper, optimizer, padded(of))
        found = loss_and_gradients(model, stepper, optimizer, packed(of))
        status, figures, values = compare(found, want)
        rows = packed(of)
        training = Training(
            lambda: stepper.forward_backward(rows, optimizer).sum(),
            partial(clip_and_step, optimizer), len(want), "packed",
        )  # fmt: skip
        # Kernels are compiled at their first call, which waits.
        for _ in range(2):
            training.forward_backward()
            training.update()
        seen = profile_steps(training, device, setup.config["num_hidden_layers"])
    waits = waits_of(seen)
    if waits and device.type == "cuda":
        status = f"FAILED: the host waits in a step: {', '.join(waits)}"
    said = "no wait" if device.type == "cuda" else "waits not counted"
    if waits:
        said = f"waits: {', '.join(waits)}"
    line = f"packed against padded: {figures}; {said} in a step{stand_in(device)}"
    return {"status": status, "line": line, "waits": waits, **values}


def waits_of(profile: dict[str, Any]) -> list[str]:
    """Calls that wait for the device, and copies to the host, with their numbers in a step.

    Raises:
        RuntimeError: the profiler could not run.
    """
    if "problem" in profile:
        raise RuntimeError(f"no profile: {profile['problem']}")
    found = []
    for name, wait in profile["waits"].items():
        found.append(f"{wait['count']:g} {name}")
    for name, copy in profile["copies"].items():
        if "DtoH" in name:
            found.append(f"{copy['count']:g} {name}")
    return found


# ---- context parallelism -------------------------------------------------------------------------


def check_cp(device: torch.device, dry: bool) -> dict[str, Any]:
    """Two ranks that share the GPU and a packed row against one rank alone."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        outputs = []
        for cp in (1, 2):
            out = Path(folder) / f"cp{cp}.pt"
            log = out.with_suffix(".txt")
            outputs.append((out, log))
            processes.append(_start(cp, out, log, device, dry))
        try:
            codes = [process.wait(CP_SECONDS) for process in processes]
        finally:
            # The ranks of what is still running: torchrun ends its own when it is asked to.
            for process in processes:
                process.terminate()
                process.wait()
        found = []
        for code, (out, log) in zip(codes, outputs, strict=True):
            if code or not out.is_file():
                last = (log.read_text().strip().splitlines() or ["no output"])[-1]
                return {"status": f"FAILED: exit code {code}", "line": f"{out.stem}: {last}"}
            found.append(torch.load(out, weights_only=True))
    status, figures, values = compare(found[1], found[0])
    ranks = "on one GPU" if device.type == "cuda" else "on a CPU"
    line = f"cp 2 as two processes {ranks} against cp 1: {figures}{stand_in(device)}"
    return {"status": status, "line": line, **values}


def _start(
    cp: int, out: Path, log: Path, device: torch.device, dry: bool
) -> "subprocess.Popen[bytes]":
    """A training of ``cp`` ranks, which writes its loss and gradients."""
    ranks = ["--standalone", f"--nproc-per-node={cp}", "-m", "benchmarks.long_training"]
    words = ["--cp", str(cp), "--out", str(out), *(["--dry"] if dry else [])]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    if device.type == "cuda" and cp > 1:
        environment[SHARE_GPU] = "1"
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def rank_of_cp(cp: int, out: Path, device: torch.device, dry: bool) -> None:
    """What one of the ranks does."""
    setup = small(device, dry)
    of = samples(setup, DRY_LENGTHS if dry else LENGTHS)
    with built(setup, cp) as (model, stepper, optimizer):
        found = loss_and_gradients(model, stepper, optimizer, packed(of))
        # Gradients are gathered to the first rank.
        if len(found) > 1:
            torch.save(found, out)


# ---- memory --------------------------------------------------------------------------------------


def check_memory(device: torch.device, dry: bool) -> dict[str, Any]:
    """The peak of a step with every layer recomputed, beside the planner's."""
    from benchmarks.bench_train_gpu import measure_steps
    from benchmarks.train_megalora import adapted_base, on_megatron, training_on_megatron
    from megalora.model.recompute import apply_recompute

    config = TINY_MODEL if dry else QWEN3_30B_A3B | {"num_hidden_layers": LAYERS}
    setup = Setup(config, 16, 64 if dry else LONG, device)
    with on_megatron(setup) as groups:
        model = adapted_base(setup, groups)
        apply_recompute(model.chunks, "full")
        training = training_on_megatron(model.chunks[0], setup, groups, "full recomputation")
        row = measure_steps(training, device, 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    predicted = planned(setup, machine_of(name), "full")["peak_bytes"]
    error = error_percent(predicted, row["peak_bytes"])
    measured = "peak not measured on a CPU"
    if row["peak_bytes"]:
        measured = f"peak {row['peak_bytes'] / 2**30:.2f} GiB, the planner {error:+.1f} %"
    layers = setup.config["num_hidden_layers"]
    line = (
        f"{layers} layers, {setup.num_tokens} tokens, full recomputation: {measured}"
        f" (predicted {predicted / 2**30:.2f} GiB), step {row['step_ms']:.0f} ms"
    )
    status = row["status"] if row["status"] == "ok" else f"FAILED: {row['status']}"
    return {"status": status, "line": line, "predicted_bytes": predicted, "error": error, **{
        name: row[name] for name in ("peak_bytes", "step_ms", "loss")
    }}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cp", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    where = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rank_of_cp(given.cp, given.out, where, given.dry)
