"""List the steps of ``gpu_all.sh``, checks of values and then the most telling first, with the
share of its time that each may take. Shares are what an H100 with 16 cores needed.

Standard library only: the driver that reads this table runs before anything is known to be
installed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MEGATRON = ("megatron.core", "megatron.bridge", "omegaconf")
"""Modules that wheels bring; torch, triton, transformers and peft are taken to be installed, and
rows say so where they are not."""
TESTS = (*MEGATRON, "pytest", "hypothesis", "matplotlib")
"""Modules that a program needs which imports tests/prepare.py."""
RESULTS = "{results}"
OUT = "{out}"
BUDGET = "{budget}"
"""Placeholders in a command: the folder of all results, the step's own JSON, and the seconds that
its program may take."""


@dataclass(frozen=True)
class Step:
    """One program that leaves one JSON."""

    name: str
    share: int
    """Seconds that it may take of ``SECONDS``, in proportion for another total. What a step leaves
    over goes to the next."""
    shows: str
    """Purpose, as ``--list`` and the summary say it."""
    result: str
    """Name of its JSON in the results' folder."""
    command: tuple[str, ...]
    """Arguments of the interpreter in a run on a GPU."""
    dry: tuple[str, ...] | None = None
    """The same at tiny sizes on a CPU; None: the command with ``--dry``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    """Modules without which the step is not run."""
    after: str = ""
    """JSON of an earlier step without which this one is not run."""
    interpreted: bool = True
    """Whether Triton's interpreter runs its kernels in a dry run; else the plain loop computes."""
    margin_s: int = 8
    """Seconds of its limit that its program does not get, to write and to end."""
    least_s: int = 0
    """Seconds on a GPU without which it is not started."""
    usual: bool = True
    """Whether it is run where no step is named."""
    values: bool = False
    """Whether it checks values and times nothing: such steps run at once, before the others."""


def program(module: str, *options: str) -> tuple[str, ...]:
    """Return the command of a benchmark that keeps to a budget and continues from its own JSON."""
    return ("-m", f"benchmarks.{module}", *options, "--budget-seconds", BUDGET, "--out", OUT)


SECONDS = 540
"""Time of all usual steps together; ``--seconds`` gives another."""
UNTUNED = {"MEGALORA_TUNED": "off"}
TUNED = {"MEGALORA_TUNED": f"{RESULTS}/gpu_tuned.json"}
"""The table that ``tune`` writes. Later steps use it where it exists
(``gpu_machine.Machine.environment_of``)."""

STEPS = (
    # Together they took 105 s of 16 cores, nearly all of it to compile kernels for each rank.
    Step(
        "tests", 125, "the real training step runs, kernels are right in bfloat16, nothing waits",
        "gpu_tests.json", program("gpu_tests"), modules=("pytest",), values=True,
    ),
    Step(
        "shared", 125, "layouts whose ranks share the GPU against float64",
        "gpu_shared.json", program("shared_gpu", "--at-once", "10"), modules=TESTS,
        interpreted=False, values=True,
    ),
    Step(
        "packed", 125, "attention by document, packed rows against padded ones",
        "gpu_packed.json", program("gpu_long", "--only", "attention", "packed"), modules=MEGATRON,
        interpreted=False, values=True,
    ),
    Step(
        "cp", 125, "a row that two ranks share against one alone",
        "gpu_cp.json", program("gpu_long", "--only", "cp"), modules=MEGATRON, interpreted=False,
        values=True,
    ),
    Step(
        "anchors", 15, "what this GPU does at best: memory, L2, dense GEMM",
        "gpu_anchors.json", program("anchors"), margin_s=2,
    ),
    # Unsloth compiles for a minute; an adapter for each of Bridge's experts takes 3 s a step.
    Step(
        "peers", 150, "PEFT, Unsloth, Megatron-Bridge's LoRA, grouped_mm beside ours",
        "gpu_peers.json", program("peers"), environment=TUNED,
    ),
    Step(
        "model", 70,
        "a 30B-shaped model: tokens/s, launches, waits, gaps, memory beside the planner's",
        "gpu_model.json", program("bench_train_gpu"), environment=TUNED,
    ),
    # A layout takes a minute.
    Step(
        "layouts", 76, "megalora bench: recomputation and microbatches beside the planner",
        "gpu_layouts.json", program("layouts"), environment=TUNED, modules=MEGATRON,
        interpreted=False, least_s=75,
    ),
    Step(
        "long", 58, "speed of attention by document, the chunked loss, memory at 32k tokens",
        "gpu_long.json", program("gpu_long", "--only", "speed", "loss", "memory", "flash4"),
        modules=MEGATRON, interpreted=False,
    ),
    # A point takes 7 s, and compiling its variants about as much.
    Step(
        "tune", 20, "which variant of the grouped GEMM is fastest for which product",
        "gpu_tuned.json", program("tune"),
    ),
    Step(
        "kernels-tuned", 20, "the base's TFLOP/s and the cost of LoRA with the table just written",
        "gpu_kernels_tuned.json", program("bench_grouped_lora", "--quick"), environment=TUNED,
        after="gpu_tuned.json",
    ),
    Step(
        "coded", 2, "experts from 4- and 8-bit codes: decoded in the GEMM's loads or first",
        "gpu_coded.json", program("bench_coded_gemm"), environment=UNTUNED, least_s=30,
    ),
    Step(
        "kernels", 2, "the kernels again, with the untuned rule",
        "gpu_kernels.json", program("bench_grouped_lora", "--quick"), environment=UNTUNED,
        least_s=40,
    ),
    Step(
        "calibration", 2, "what the planner's time model needs",
        "gpu_calibration.json",
        ("-m", "megalora.bench.calibrate", OUT, "--budget-seconds", BUDGET),
        dry=("-m", "megalora.bench.calibrate", OUT, "--budget-seconds", "1"), modules=MEGATRON,
        # Its budget is for measuring alone, which takes 30 s; to start and to end takes it as much,
        # and it writes at its end.
        interpreted=False, margin_s=35, least_s=65,
    ),
    Step(
        "all-tests", 300, "every test in tests/gpu",
        "gpu_all_tests.json", program("gpu_tests", "--all"), modules=TESTS, usual=False,
    ),
)  # fmt: skip
"""Shares of the usual ones add up to ``SECONDS``, those of steps that run at once counted once."""


def named(names: Sequence[str]) -> list[Step]:
    """Return the steps of these names in the table's order; the usual ones where there are none.

    Raises:
        ValueError: there is no such step.
    """
    known = [step.name for step in STEPS]
    for name in names:
        if name not in known:
            raise ValueError(f"no step is called {name!r}; there are {', '.join(known)}")
    chosen = []
    for step in STEPS:
        if step.name in names or (step.usual and not names):
            chosen.append(step)
    return chosen


def command_of(step: Step, results: Path, budget_s: float, dry: bool) -> list[str]:
    """Return what follows the interpreter."""
    words = step.command
    if dry:
        words = (*step.command, "--dry") if step.dry is None else step.dry
    filled = {OUT: str(results / step.result), BUDGET: f"{budget_s:.0f}"}
    return [filled.get(word, word) for word in words]


def groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in the order they run in: those of the first group, if any, check values and
    run at once, every other step is a group of its own."""
    at_once = [step for step in steps if step.values]
    alone = [[step] for step in steps if not step.values]
    return [at_once, *alone] if at_once else alone


def limits(steps: Sequence[Step], seconds: float) -> dict[str, float]:
    """Return for each step the second, counted from now, by which it must have ended.

    Shares are scaled so that together they take ``seconds``. A step that ends early leaves its rest
    to the next, since the moments stay where they are.
    """
    # A group takes the longest of its shares. Only the steps of this call: a few named ones share
    # all of the time.
    shares = [max(step.share for step in group) for group in groups(steps)]
    ends: dict[str, float] = {}
    passed = 0
    for group, share in zip(groups(steps), shares, strict=True):
        passed += share
        for step in group:
            ends[step.name] = seconds * passed / sum(shares)
    return ends
