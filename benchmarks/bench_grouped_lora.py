"""Time experts with LoRA on a GPU: our kernels, the base alone, and how others do it, on the same
tensors in one process.

    python -m benchmarks.bench_grouped_lora --quick --budget-seconds 200      a few minutes
    python -m benchmarks.bench_grouped_lora                                   the whole sweep
    python -m benchmarks.bench_grouped_lora --model 235b --tokens 8192

Only arms that agreed with float32 (``benchmarks/expert_case.py``) have times; ours also gave the
same bits twice and did not wait for the device. The exit code is 1 where one did not. Cases for
which ``--budget-seconds`` left no time are named and recorded; a second call with the same
``--out`` runs them. ``--dry`` tries the whole path at tiny sizes on a CPU, with interpreted
kernels: its times mean nothing.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import our_arms, their_arms
from benchmarks.compare import Row, as_json, compare, show
from benchmarks.expert_case import (
    ROUTINGS,
    SIZES,
    Sizes,
    Spec,
    make_case,
    reference,
    sweep,
    with_rows,
)
from benchmarks.goals import (
    Crossing,
    Verdict,
    of_layer,
    of_linear,
    of_peft_case,
    show_crossing,
    show_verdicts,
)
from benchmarks.gpu_timing import Budget, Stats, earlier, first_line, save, the_gpu
from benchmarks.linear_case import (
    PEFT_CASE,
    LinearSpec,
    linear_reference,
    make_linear,
    our_linear_arms,
    their_linear_arms,
)

QUICK = {
    "tokens": [8192],
    # All of the model's experts on one GPU, and a share of them under EP 8.
    "experts": [128, 16],
    "ranks": [16],
    "routing": ["balanced", "zipf"],
    "crossing": [256, 512, 1024, 2048, 4096],
}
FULL = {
    "tokens": [4096, 8192, 16384, 65536],
    "experts": [128, 16],
    "ranks": [8, 16, 32, 64],
    "routing": [*ROUTINGS],
    "crossing": [64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096],
}
DRY = {
    "tokens": [8],
    "experts": [2],
    # The rank that the goals suppose, so that a dry run judges them too.
    "ranks": [16],
    "routing": ["balanced"],
    "crossing": [],
}
TINY = Sizes("tiny", hidden=32, inner=16, num_experts=2, top_k=1)
TINY_PEFT_CASE = LinearSpec("tiny peft", 16, 2, 24, 32, 16)
LEAST_SECONDS = 25
"""Seconds without which no case is begun."""
COMPILE_SECONDS = 110
"""Seconds without which the split arm is not compiled: torch.compile takes about a minute for each
shape."""


@dataclass
class Report:
    """All that was found so far; written after every case."""

    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    crossing: list[Crossing] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Report":
        """The report that an earlier call wrote, without its list of cases not reached: this call
        makes its own."""
        rows = []
        for row in record["rows"]:
            fields = dict(row)
            for name in ("forward", "train"):
                if fields[name]:  # null where the arm was not timed
                    fields[name] = Stats(**fields[name])
            rows.append(Row(**fields))
        verdicts = [Verdict(**verdict) for verdict in record["goals"]]
        crossing = [Crossing(**point) for point in record["crossing"]]
        return cls(rows, verdicts, crossing, [], record["failures"], record["seconds"])

    def content(self) -> dict[str, Any]:
        """The report as JSON has it; ``of`` reads it back."""
        return {
            "rows": as_json(self.rows),
            "goals": [asdict(verdict) for verdict in self.verdicts],
            "crossing": [asdict(point) for point in self.crossing],
            "not_reached": self.not_reached,
            "failures": self.failures,
            "seconds": self.seconds,
        }


class Bench:
    """Runs cases on one device into one report."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, repeats: int, budget: Budget,
        compiled: bool,
        peft_case: LinearSpec = PEFT_CASE, warmup: int = 3,
    ) -> None:  # fmt: skip
        self.device = device
        self.dtype = dtype
        self.repeats = repeats
        self.budget = budget
        self.compiled = compiled
        self.peft_case = peft_case
        self.warmup = warmup
        self.report = Report()

    def layer(self, spec: Spec) -> None:
        """Time every arm on one layer's experts."""
        case = make_case(spec, self.device, self.dtype)
        # Once for each share of the experts: compiling takes longer than all other arms.
        usual = spec.rank == 16 and spec.routing == "balanced"
        compiled = self.compiled and usual and self.budget.left() > COMPILE_SECONDS
        rows = compare(
            spec.label, our_arms(case), their_arms(case, compiled),
            lambda: {"adapted": reference(case, True), "base": reference(case, False)},
            spec.base_flops(), self.device, self.dtype, self.repeats, self.warmup,
        )  # fmt: skip
        self._found(rows, of_layer(spec, rows))

    def linear(self, spec: LinearSpec) -> None:
        """Time every arm on one grouped linear."""
        case = make_linear(spec, self.device, self.dtype)
        rows = compare(
            spec.label, our_linear_arms(case), their_linear_arms(case),
            lambda: {"adapted": linear_reference(case, True),
                     "base": linear_reference(case, False)},
            spec.base_flops(), self.device, self.dtype, self.repeats, self.warmup,
        )  # fmt: skip
        # PEFT's case has goals of its own: the numbers that PEFT published.
        if spec is self.peft_case:
            self._found(rows, of_peft_case(case, rows))
        else:
            self._found(rows, of_linear(spec, rows))

    def cross(self, spec: Spec) -> None:
        """Time both back ends at one point, to find from how many rows on torch's is faster."""
        case = make_case(spec, self.device, self.dtype)
        # The bases too: an arm's ratio to them shows whether the GEMM or the adapters decide.
        wanted = ("base triton", "base grouped_mm", "ours triton", "ours grouped_mm joined")
        arms = {name: build for name, build in our_arms(case).items() if name in wanted}
        # Half as many samples: there are up to ten of these points for each share of the experts.
        rows = compare(
            f"crossing: {spec.label}", arms, {},
            lambda: {"adapted": reference(case, True), "base": reference(case, False)},
            spec.base_flops(), self.device, self.dtype, max(3, self.repeats // 2), self.warmup,
        )  # fmt: skip
        self.report.crossing.append(Crossing.of(spec, rows))
        self._found(rows, [])

    def _found(self, rows: list[Row], verdicts: list[Verdict]) -> None:
        self.report.rows += rows
        self.report.verdicts += verdicts
        for row in rows:
            if row.failed:
                self.report.failures.append(f"{row.case}: {row.arm}: {row.status}")
        print(f"\n{show(rows)}", flush=True)


def plan(bench: Bench, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """All cases, the most telling first: the usual ones, the single linear, PEFT's, the crossing,
    then the rest."""
    sizes = SIZES[args.model]
    specs = sweep(sizes, args.tokens, args.experts, args.ranks, args.routing)
    # ``sweep`` puts the usual case of each number of experts first.
    usual = specs[: len(args.experts)]
    rest = specs[len(args.experts) :]
    for spec in usual:
        yield spec.label, lambda spec=spec: bench.layer(spec)
    for spec in usual:
        label = f"linear gate_up: {spec.label}"
        linear = LinearSpec(
            label, spec.num_rows, spec.experts, 2 * sizes.inner, sizes.hidden, spec.rank
        )
        yield label, lambda linear=linear: bench.linear(linear)
    yield bench.peft_case.label, lambda: bench.linear(bench.peft_case)
    for spec in usual:
        for rows in args.crossing:
            point = with_rows(spec, rows)
            yield f"crossing: {point.label}", lambda point=point: bench.cross(point)
    for spec in rest:
        yield spec.label, lambda spec=spec: bench.layer(spec)


def run(bench: Bench, args: argparse.Namespace) -> int:
    """Run every planned case that time allows and no earlier call has done; the exit code."""
    if record := earlier(args.out, "grouped_lora", bench.device, _settings(args)):
        bench.report = Report.of(record)
    report = bench.report
    for label, case in plan(bench, args):
        if label in report.seconds:
            continue
        if bench.budget.left() < (0 if args.dry else LEAST_SECONDS):
            report.not_reached.append(label)
            continue
        started = time.monotonic()
        try:
            case()
        except Exception as error:
            # The next case may well run; this one is reported and recorded as a failure.
            traceback.print_exc()
            report.failures.append(f"{label}: {first_line(error)}")
        if bench.device.type == "cuda":
            # Cases have other sizes: blocks of the last one would leave the next in fragments.
            torch.cuda.empty_cache()
        report.seconds[label] = round(time.monotonic() - started, 1)
        save(args.out, "grouped_lora", bench.device, settings=_settings(args), **report.content())
    save(args.out, "grouped_lora", bench.device, settings=_settings(args), **report.content())
    print(f"\n{show_crossing(report.crossing)}\n\n{show_verdicts(report.verdicts)}")
    if report.not_reached:
        print(
            f"\nout of time before {len(report.not_reached)} cases: {'; '.join(report.not_reached)}"
        )
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"wrote {args.out}")
    return 1 if report.failures else 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that the numbers depend on; a record with others is not continued."""
    settings = dict(vars(args))
    # A second call may have another budget, and it is found by its file.
    settings.pop("budget_seconds", None)
    settings.pop("out", None)
    settings["tuned"] = os.environ.get("MEGALORA_TUNED", "")
    return settings


def arguments(parser: argparse.ArgumentParser, given: list[str] | None) -> argparse.Namespace:
    """The command line; ``--quick`` and ``--dry`` fill in what it leaves open."""
    parser.add_argument(
        "--quick", action="store_true", help="8k tokens, rank 16, balanced and Zipf only"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU: to try the script itself"
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="begin no case when this much time has passed"
    )
    parser.add_argument("--model", choices=SIZES, default="30b")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="tokens of this rank; each goes to 8 experts"
    )
    parser.add_argument(
        "--experts",
        type=int,
        nargs="+",
        help="experts of this rank: 128, or 16 as with 8 expert-parallel ranks",
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="LoRA ranks")
    parser.add_argument("--routing", choices=ROUTINGS, nargs="+")
    parser.add_argument(
        "--crossing", type=int, nargs="*", help="rows per expert; none: leave it out"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--no-compiled", action="store_true", help="leave out torch.compile of the split arm"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_kernels.json"))
    args = parser.parse_args(given)
    if args.dry:
        args.model = TINY.name
        args.repeats = 1
        args.no_compiled = True
    defaults = FULL
    if args.quick:
        defaults = QUICK
    if args.dry:
        defaults = DRY
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values)
    return args


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = arguments(parser, given)
    device = the_gpu(parser, args.dry)
    # It would overrule the back end that an arm asks for.
    os.environ.pop("MEGALORA_BACKEND", None)
    # References are float32; TF32 would round their inputs to 10 bits.
    torch.set_float32_matmul_precision("highest")
    budget = Budget(args.budget_seconds)
    if args.dry:
        SIZES[TINY.name] = TINY
        return run(
            Bench(device, torch.float32, args.repeats, budget, False, TINY_PEFT_CASE, warmup=0),
            args,
        )
    return run(Bench(device, torch.bfloat16, args.repeats, budget, not args.no_compiled), args)


if __name__ == "__main__":
    sys.exit(main())
