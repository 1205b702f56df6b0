"""Run the steps of ``gpu_steps.py`` on one GPU within a given time: those that check values at
once, then those that time something one after the other.

    bash benchmarks/gpu_all.sh                     every usual step, the most telling first
    bash benchmarks/gpu_all.sh tests kernels       these alone
    bash benchmarks/gpu_all.sh --seconds 200       a second call: continues where the first stopped
    bash benchmarks/gpu_all.sh --again tune        one step anew, then what is missing
    bash benchmarks/gpu_all.sh --dry               the same path at tiny sizes on a CPU

Checks of values mostly compile kernels, which takes a core for each of their processes, and a GPU
that is busy does not change what they find.

Each step has its share of the time and is stopped at its end; what it leaves over goes to the next.
It writes its JSON into the results' folder case by case, and a log beside it. A step that fails is
named at the end, the others go on, and the exit code is 1. A second call leaves out the steps that
are done, continues those that were cut off or had no time for all their cases, and then tries those
that failed. After a fix, --again measures a step anew that had succeeded before.

A call ends within --seconds and some ten more, its start included. To split 15 minutes of a
machine: 540 seconds first, then 200 while it is still there, or 120 on a fresh one, whose start
takes a minute or two. A fresh one needs the results' folder, or the content of --archive unpacked
there.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.gpu_machine import ROOT, Machine, check_machine, install_wheels, probe
from benchmarks.gpu_outcomes import Outcome, Record
from benchmarks.gpu_steps import SECONDS, STEPS, Step, groups, limits, named

RESERVE_S = 8
"""Seconds that are kept for the summary."""
LEAST_S = 15
"""Seconds without which no step is started: importing torch alone takes a third of them."""


def run_steps(
    machine: Machine, record: Record, steps: Sequence[Step], seconds: float, archive: Path | None
) -> None:
    """Run steps within ``seconds``, those that check values at once and the others one by one;
    after each, record its outcome and pack the archive anew."""
    start = time.monotonic()
    ends = limits(steps, max(0.0, seconds))
    for group in groups(steps):
        # Steps of one group end at one moment.
        left_s = ends[group[0].name] - (time.monotonic() - start)
        with closing(run_at_once(machine, group, record, left_s)) as ended:
            for step, outcome in ended:
                record.put(step.name, outcome)
                why = f", {outcome.why}" if outcome.why else ""
                print(f"   {step.name}: {outcome.result}{why}, {outcome.seconds} s", flush=True)
                if archive:
                    pack(machine.results, archive)


def run_at_once(
    machine: Machine, steps: Sequence[Step], record: Record, left_s: float
) -> Generator[tuple[Step, Outcome]]:
    """Run steps beside each other if they can be run in the time left, and say what became of
    each."""
    able = []
    for step in steps:
        if outcome := why_not(machine, step, record, left_s):
            yield step, outcome
            continue
        calls = record.outcomes[step.name].calls
        if not calls:
            # A file of another run, such as one whose results were committed.
            (machine.results / step.result).unlink(missing_ok=True)
            machine.log_of(step).unlink(missing_ok=True)
        print(f"== {step.name} (at most {left_s:.0f} s): {step.shows}", flush=True)
        # Where this call is ended in the middle, the next one goes on with what the step has
        # written.
        record.put(
            step.name, Outcome("stopped", "the call was ended while it ran", calls=calls + 1)
        )
        able.append(step)
    # Closed with this block: a generator that is dropped ends its programs at some later time.
    with closing(machine.run(able, left_s)) as ended:
        for step, outcome in ended:
            outcome.calls = record.outcomes[step.name].calls
            yield step, outcome


def why_not(machine: Machine, step: Step, record: Record, left_s: float) -> Outcome | None:
    """What becomes of a step that cannot be run in the time left; None where it can."""
    before = record.outcomes[step.name]
    if why := machine.missing(step):
        return Outcome("not run", why, calls=before.calls)
    needs_s = LEAST_S if machine.dry else max(LEAST_S, step.least_s)
    if left_s >= needs_s:
        return None
    # What earlier calls found still holds.
    if before.calls:
        return before
    why = f"{max(0.0, left_s):.0f} s were left of the {needs_s:g} that it needs"
    return Outcome("not reached", why)


def pack(results: Path, archive: Path) -> None:
    """Write all results and logs as one file, whole or not at all."""
    # Renamed when it is complete: the machine may be taken away at any time.
    part = archive.with_name(f"{archive.name}.part")
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(results.glob("gpu_*")):
            if path.is_file() and path.suffix != ".part":
                tar.add(path, path.name)
    part.replace(archive)


def summarise(machine: Machine, steps: Sequence[Step], record: Record) -> bool:
    """Print the table of all results so far, and write it; False where the results cannot be
    read."""
    command = [machine.python, "-m", "benchmarks.gpu_summary", str(machine.results)]
    environment = machine.environment_of(STEPS[0])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [done.stdout + done.stderr.rstrip()]
    unfinished: dict[str, list[str]] = {"part": [], "not reached": [], "not run": []}
    for step in steps:
        found = record.outcomes[step.name]
        if found.failed:
            lines.append(f"FAILED {step.name}: {found.why}")
        elif found.result in unfinished:
            unfinished[found.result].append(step.name)
    # Failures first, one a line with the reason; then by kind what a second call would go on with.
    for kind, names in unfinished.items():
        if names:
            lines.append(f"{kind}: {', '.join(names)}")
    text = "\n".join(lines) + "\n"
    (machine.results / "gpu_summary.txt").write_text(text)
    print(f"\n{text}", end="", flush=True)
    return done.returncode == 0


def results_folder(asked: Path | None, dry: bool) -> Path:
    """Return the folder of the results, which is created if it does not exist."""
    # Results of a dry run must not lie among those of a GPU.
    if asked is None and dry:
        return Path(tempfile.mkdtemp(prefix="gpu_all_dry_"))
    folder = ROOT / "benchmarks/results" if asked is None else asked.absolute()
    make_writable(folder, f"--out {folder}")
    return folder


def make_writable(folder: Path, what: str) -> None:
    """Make a folder, and try to write into it, before time is spent on measuring.

    Raises:
        ValueError: that cannot be done; ``what`` names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what} cannot be written: {error.strerror}; name another") from None


def forget(record: Record, steps: Sequence[Step], results: Path) -> None:
    """Forget the results of steps, so that they begin anew."""
    for step in steps:
        (results / step.result).unlink(missing_ok=True)
        record.put(step.name, Outcome())


def measure(args: argparse.Namespace) -> int:
    """Run the steps that the command line asks for; returns the exit code.

    Raises:
        ValueError: the user's mistake.
    """
    begun = time.monotonic()
    python = os.environ.get("PYTHON") or sys.executable
    if not args.seconds >= LEAST_S + RESERVE_S:
        least = LEAST_S + RESERVE_S
        raise ValueError(
            f"--seconds {args.seconds:g} is too little for any step; give {least} or more"
        )
    again = named(args.again) if args.again else []
    # A step that is to begin anew is asked for, whether it is among the others or not.
    steps = named([*args.steps, *args.again]) if args.steps else named([])
    steps = [step for step in STEPS if step in steps or step in again]
    results = results_folder(args.out, args.dry)
    if args.archive:
        make_writable(args.archive.absolute().parent, f"--archive {args.archive}")
        if args.archive.is_dir():
            raise ValueError(f"--archive {args.archive} is a folder; name a file in it")
    record = Record(results, args.dry)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        # Without wheels some steps still run: the failure is reported, and the exit code is 1.
        trouble = install_wheels(python, site)
        if trouble:
            print(f"FAILED wheels: {trouble}", file=sys.stderr, flush=True)
        modules = probe(python, site)
        check_machine(modules, python, args.dry)
        forget(record, again, results)
        machine = Machine(python, results, args.dry, site, modules)
        todo = record.still_to_do(steps)
        if done := [step.name for step in steps if step not in todo]:
            print(f"done before: {', '.join(done)}", flush=True)
        # Installing and probing have taken some of the time already.
        left_s = args.seconds - (time.monotonic() - begun) - RESERVE_S
        run_steps(machine, record, todo, left_s, args.archive)
        readable = summarise(machine, steps, record)
        if args.archive:
            pack(results, args.archive)
    print(f"results in {results}, {time.monotonic() - begun:.0f} s")
    failed = any(record.outcomes[step.name].failed for step in steps)
    return int(bool(trouble) or failed or not readable)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line; where it leaves something open, variables of the environment hold."""
    parser = argparse.ArgumentParser(
        prog="gpu_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help="default: the usual ones; see --list")
    add("--list", action="store_true", help="show the steps and their shares, and do nothing")
    dry = os.environ.get("DRY") == "1"
    add("--dry", action="store_true", default=dry, help="tiny sizes on a CPU (DRY=1)")
    seconds = os.environ.get("TOTAL_SECONDS") or SECONDS
    add("--seconds", type=float, default=seconds, help="of the whole call (TOTAL_SECONDS)")
    out = os.environ.get("OUT") or None
    add("--out", type=Path, default=out, metavar="FOLDER", help="for the results (OUT); default: "
        "benchmarks/results, in a dry run a new temporary folder")  # fmt: skip
    add("--again", action="append", default=[], metavar="STEP", help="begin this step anew")
    add("--archive", type=Path, metavar="FILE.tar.gz", help="write all results as one file too")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.list:
        for step in STEPS:
            only = "" if step.usual else " (only when named)"
            print(f"{step.name:<14} {step.share:>4} s  {step.shows}{only}")
        return 0
    # By default SIGTERM ends Python at once; as an exception it ends the running step first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return measure(args)
    except KeyboardInterrupt:
        print("gpu_all.sh: interrupted; the same call again goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    except ValueError as error:
        print(f"gpu_all.sh: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
