"""Keep what a sweep has found so far: a table that kernels can read, and beside it all that the
table rests on. The file is written after every step.

Its part ``sweep`` holds refused variants with their reason, all times, and what was not reached.
The name of what is running stands in a small file beside it: where a variant crashed the process,
the next one finds its name there and refuses it.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from megalora_kernels import tuned
from megalora_kernels.tuned_table import DTYPES, Key
from megalora_kernels.variants import Product, Variant, tile_rank

from benchmarks.expert_case import Sizes
from benchmarks.gpu_timing import environment, save
from benchmarks.tune_points import Point

MEANINGLESS = "a dry run on a CPU: times mean nothing"
CONTINUED = ("refused", "points", "crossing", "failures", "seconds", "clocks")
"""Attributes that a second call takes over from the first."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Record:
    """A file of results, begun or continued."""

    def __init__(self, path: Path, device: torch.device, dry: bool) -> None:
        self.path = path
        self.device = device
        self.dry = dry
        self.gpu = tuned.gpu_name(device)
        self.refused: dict[str, str] = {}
        """``GEMM: variant`` to the reason."""
        self.points: dict[str, dict[str, Any]] = {}
        """``Point.label`` to its row, or that the rule stands, and all times."""
        self.crossing: dict[str, dict[str, Any]] = {}
        """Label of a layer to the times of both back ends."""
        self.failures: dict[str, str] = {}
        """Points and layers that could not be measured, with the reason; they are not tried
        again."""
        self.not_reached: list[str] = []
        self.seconds: dict[str, float] = {}
        self.clocks: list[str] = []
        self.driver, _ = smi("driver_version")
        self.running = path.with_suffix(".running")
        self.running_since: float | None = None
        if path.is_file():
            self._continue(json.loads(path.read_text()))
        # Left by a process that ended inside ``run``: its variant must not end the next one too.
        if self.running.is_file():
            self.refused[self.running.read_text()] = "the process ended, or hung, while it ran"
            self.running.unlink()

    def _continue(self, found: dict[str, Any]) -> None:
        """Take over what an earlier call wrote.

        Raises:
            ValueError: it was measured on another GPU or with other versions.
        """
        # Another torch or Triton compiles other kernels: their times do not belong in one table.
        versions = environment(self.device)["versions"]
        same = {
            "gpu": (found.get("gpu"), self.gpu),
            "torch": (found["versions"]["torch"], versions["torch"]),
            "triton": (found["versions"]["triton"], versions["triton"]),
            "dry": (found.get("dry"), self.dry),
        }
        for name, (then, now) in same.items():
            if then != now:
                raise ValueError(
                    f"{self.path}: begun with {name} {then!r}, but this is {now!r}; give another"
                    " --out, or remove it"
                )
        sweep = found["sweep"]
        # ``not_reached`` begins empty: this call may reach what the earlier one did not.
        for name in CONTINUED:
            setattr(self, name, sweep[name])

    def save(self) -> None:
        """Write the whole file anew."""
        rows = []
        rule_stands = []
        for point in self.points.values():
            if point["row"]:
                rows.append(point["row"])
            else:
                # Written too: a look-up takes the row of the nearest number of rows per expert, and
                # must not take one where the rule was measured to be best.
                rule_stands.append(point["key"])
        # One choice of back end for each layer, from all its points.
        by_layer: dict[str, list[dict[str, Any]]] = {}
        for point in self.crossing.values():
            by_layer.setdefault(point["layer"], []).append(point)
        layers = []
        for mine in by_layer.values():
            layers.append({**mine[0]["key"], "vendor_from": vendor_from(mine)})
        sweep = {}
        for name in (*CONTINUED, "not_reached"):
            sweep[name] = getattr(self, name)
        save(
            self.path,
            "tune",
            self.device,
            dry=self.dry,
            gpu=self.gpu,
            measured=self._measured(),
            rows=rows,
            rule_stands=rule_stands,
            layers=layers,
            sweep=sweep,
        )

    def _measured(self) -> dict[str, Any]:
        found = environment(self.device)
        return {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": found["commit"],
            "torch": found["versions"]["torch"],
            "triton": found["versions"]["triton"],
            "driver": self.driver,
            "card": found["device"],
            "clocks": MEANINGLESS if self.dry else "; ".join(self.clocks),
        }

    def note_clocks(self, when: str) -> None:
        """Note clocks and temperature of the card: a table of a throttled card is worth less."""
        found, names = smi(
            "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw"
        )
        self.clocks.append(f"{when}: {names} = {found}")

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """Call with the name on file, so that it is known if the process ends in it."""
        self.running.parent.mkdir(parents=True, exist_ok=True)
        self.running.write_text(name)
        self.running_since = time.monotonic()
        try:
            return call()
        finally:
            self.running_since = None
            self.running.unlink()


def smi(*fields: str) -> tuple[str | None, str]:
    """What nvidia-smi says of the first card, None where it cannot; and the names of the fields."""
    names = ", ".join(fields)
    if shutil.which("nvidia-smi") is None:
        return None, names
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip() if done.returncode == 0 else None), names


def key_of(product: Product, rows: int) -> dict[str, Any]:
    """The fields by which kernels look a row up."""
    p = product
    bucket = tuned.bucket_of(rows)
    key = Key(p.op, DTYPE_NAMES[p.dtype], p.N, p.K, tile_rank(p.rank), p.blocks, p.gathered, bucket)
    return key._asdict()


def row_of(
    point: Point, dtype: torch.dtype, variant: Variant, times: dict[str, Any]
) -> dict[str, Any]:
    """A row of the table."""
    return {
        **key_of(point.gemm.product(dtype, point.rows), point.rows),
        "variant": asdict(variant),
        **times,
    }


def layer_key(sizes: Sizes, dtype: torch.dtype, stacked_rank: int) -> dict[str, Any]:
    """The fields by which kernels look up a layer's back end."""
    # Kernels pad the rank to what a tensor core multiplies, so one row holds for all ranks of a
    # padded size.
    rank = tile_rank(stacked_rank)
    return {
        "dtype": DTYPE_NAMES[dtype],
        "hidden": sizes.hidden,
        "intermediate": sizes.inner,
        "R": rank,
    }


GAIN = 0.02
"""Share of the time that a variant must save to be worth a row: tables stay short."""


def beats(us: float, other_us: float, spread: float) -> bool:
    """Whether a time is shorter by more than noise: by ``GAIN``, and by twice the spread."""
    return us < other_us * (1 - max(GAIN, 2 * spread))


def vendor_from(points: list[dict[str, Any]]) -> int | None:
    """The fewest rows per expert from which on torch's grouped GEMM was always faster by more than
    noise; None: never."""
    found = None
    # Downwards from the most rows, to the first point that Triton wins, ties included.
    for point in sorted(points, key=lambda point: (-point["rows_per_expert"], point["experts"])):
        triton = point["triton_us"]
        vendor = point["grouped_mm_us"]
        # None: it could not run there, out of memory perhaps, and nothing can be said.
        if triton is None or vendor is None or not beats(vendor, triton, point["spread"]):
            break
        found = point["rows_per_expert"]
    return found
