"""``megalora init``: write a commented config that runs, in the layout that the planner chooses."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalora.config import ParallelConfig, RunConfig, TrainConfig
from megalora.config.checks import require
from megalora.config.commented import FILL_IN, WIDTH, commented_yaml
from megalora.config.file import load_config
from megalora.data.sources import locate
from megalora.paths import check_file_to_write, prepare_file
from megalora.planner.command import why_nothing_fits
from megalora.planner.first_values import Draft, fit_to_data, read_draft
from megalora.planner.gpus import find_machine, with_ranks_per_node
from megalora.planner.hardware import Machine
from megalora.planner.layouts import MAX_RANKS
from megalora.planner.models import find_architecture
from megalora.planner.own_layout import own_layout
from megalora.planner.question import PlanOptions, Question
from megalora.planner.report import ALWAYS_WRITTEN, planned_config, prediction
from megalora.planner.search import Plan, Planned, search
from megalora.preflight import check_model_path

WRITTEN = ALWAYS_WRITTEN | {
    "data": ("train", "eval", "max_length"),
    "train": ("global_batch_size", "lr", "warmup", "recompute", "eval_every"),
    "checkpoint": ("dir", "every", "keep", "resume"),
    "log": ("every", "tensorboard", "wandb"),
}
"""Section -> keys that a first config shows even where they are defaults."""


@dataclass(frozen=True)
class InitOptions:
    """Options of the command line, beside overrides."""

    model: str | None
    """None leaves it to be filled in."""
    data: str | None
    """As ``data.train`` names it; None leaves it to be filled in."""
    gpus: int
    """Number of GPUs, one rank each."""
    gpu: str
    """Name of a GPU or path of a calibration file."""
    gpus_per_node: int | None
    """None: as many as the machine has."""
    out: Path
    """The file to write."""


@dataclass(frozen=True)
class Choice:
    """A layout and why it is the one."""

    plan: Plan
    found: Planned
    reason: str


def init_command(
    options: InitOptions, overrides: Sequence[str], say: Callable[[str], None] = print
) -> None:
    """Write the config, and print what it is and how to start it.

    Raises:
        ValueError: the file exists, a mistake in an option, model or data, or nothing fits.
    """
    machine = _checked_machine(options)
    draft = read_draft(options.model, options.data, overrides)
    _check_named(draft)
    draft = fit_to_data(draft, options.gpus)
    config = draft.config
    choice = None
    # Without the model there are no sizes to plan with; without data its lengths are unknown alone.
    if draft.has_model:
        choice = _choose(config, options)
        config = planned_config(config, choice.found)
    body = commented_yaml(config, _written(config))
    text = f"{_head(draft, choice, options, machine)}\n{body}"
    prepare_file(options.out)
    # Only a new file: one may have come since the check.
    with options.out.open("x", encoding="utf-8") as file:
        file.write(text)
    missing = _to_fill_in(draft)
    if not missing:
        # The file as train will read it: a config that does not run must not be announced.
        written = load_config(options.out)
        written.check_world(options.gpus)
        assert written == config, f"{options.out} does not say what was planned"
    say(f"wrote {options.out}{f': {choice.found.layout}' if choice else ''}")
    if missing:
        say(f"fill in {' and '.join(missing)}, marked {FILL_IN} in the file")
    for line in _start_lines(options, machine):
        say(f"  {line}")


def _checked_machine(options: InitOptions) -> Machine:
    """The GPUs to plan for; raises ``ValueError`` for a number or a file that cannot be."""
    out = options.out
    require(
        not out.exists() and not out.is_symlink(),
        f"{out} exists; choose another file with --out, or remove it",
    )
    check_file_to_write(out)
    require(
        1 <= options.gpus <= MAX_RANKS,
        f"--gpus {options.gpus}: give a number of GPUs from 1 to {MAX_RANKS:,}",
    )
    machine = find_machine(options.gpu)
    if options.gpus_per_node is not None:
        machine = with_ranks_per_node(machine, options.gpus_per_node)
    return machine


def _check_named(draft: Draft) -> None:
    """Raise ``ValueError`` for a model that cannot be planned for, or data that is not there."""
    if draft.has_model:
        # What is planned here must be trained later: a file of an architecture will not do.
        check_model_path(draft.config.model.path)
        find_architecture(draft.config.model.path)
    if draft.has_data:
        for source in draft.config.data.sources:
            locate(source.path)


def _choose(config: RunConfig, options: InitOptions) -> Choice:
    """The planner's layout, or that of the command line where it gives one."""
    asked = PlanOptions(gpus=(options.gpus,), gpu=options.gpu, gpus_per_node=options.gpus_per_node)
    question = Question.of(config, asked)
    machine = question.machine
    if question.work.dtype != machine.dtype:
        # Memory is counted in the dtype that is asked for; of time no other rates are known.
        note = f"{machine.note}; in {machine.dtype}, so that {question.work.dtype} takes longer"
        machine = replace(machine, dtype=question.work.dtype, note=note)
        question = replace(question, machine=machine)
    rank = config.lora.rank
    if _names_a_layout(config):
        own = own_layout(question, options.gpus, rank)
        if own.planned is None or own.reason is not None:
            raise ValueError(
                f"the layout that the command line gives is out on {options.gpus} x"
                f" {machine.name}: {own.reason}"
            )
        plan = Plan(question.work, machine, rank, [own.planned], [])
        return Choice(plan, own.planned, "the command line gives it")
    plan = search(question.shape, config.lora, options.gpus, question.work, machine)
    if not plan.fitting:
        raise ValueError(why_nothing_fits(question, plan))
    return Choice(plan, plan.best(), _reason(plan))


def _names_a_layout(config: RunConfig) -> bool:
    """Whether an option that the planner would choose differs from its default."""
    train = config.train
    rows = (train.micro_batch_size, train.micro_batch_tokens, train.recompute)
    usual = (TrainConfig.micro_batch_size, TrainConfig.micro_batch_tokens, TrainConfig.recompute)
    return config.parallel != ParallelConfig() or rows != usual


def _written(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """``WRITTEN``, with what fills rows."""
    rows = "micro_batch_tokens"
    if config.train.micro_batch_tokens is None:
        rows = "micro_batch_size"
    steps = "steps" if config.train.epochs is None else "epochs"
    return WRITTEN | {"train": (*WRITTEN["train"], rows, steps)}


def _reason(plan: Plan) -> str:
    """Why the planner takes its choice."""
    rivals = plan.rivals()
    if len(rivals) == 1:
        return f"the fastest of {len(plan.fitting):,} layouts that fit"
    _, reasons = plan.choose(rivals)
    return (
        f"of {len(rivals):,} ways to split the model that the rates cannot tell apart, the one with"
        f" {', then '.join(reasons)}"
    )


def _head(draft: Draft, choice: Choice | None, options: InitOptions, machine: Machine) -> str:
    """Comments above the config: what it is for, how to start it, and what is predicted."""
    gpus = f"{options.gpus:,} x {machine.name}"
    lines = [f"# A LoRA run on {gpus}, written by megalora init. Start it:"]
    for line in _start_lines(options, machine):
        lines.append(f"#   {line}")
    paragraphs = ["megalora options SECTION.KEY explains an option in full."]
    if missing := _to_fill_in(draft):
        paragraphs.append(f"First fill in {' and '.join(missing)}: {FILL_IN} below.")
    if choice is None:
        paragraphs.append(
            f"The layout is not planned: that takes the model. megalora plan {options.out} --gpus"
            f" {options.gpus} --out planned.yaml does it."
        )
    else:
        memory, step = prediction(choice.plan, choice.found)
        paragraphs += [
            f"Layout: {choice.found.layout}",
            f"Why: {choice.reason}.",
            f"Predicted ({choice.plan.machine.note}):",
            f"  {memory}",
            f"  {step}",
        ]
    paragraphs += [f"Data: {note}." for note in draft.notes]
    for paragraph in paragraphs:
        lines += _wrapped(paragraph)
    return "\n".join([*lines, ""])


def _wrapped(text: str) -> list[str]:
    """A paragraph as comment lines."""
    indent = "# " + " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(
        text.strip(), WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _to_fill_in(draft: Draft) -> list[str]:
    """Options that only the user knows."""
    missing = []
    if not draft.has_model:
        missing.append("model.path")
    if not draft.has_data:
        missing.append("data.train")
    return missing


def _start_lines(options: InitOptions, machine: Machine) -> list[str]:
    """Commands that show the samples and start the run."""
    look = f"megalora data {options.out}"
    nodes = num_nodes(options.gpus, machine.ranks_per_node)
    if nodes == 1:
        return [look, f"megalora train {options.out} --nproc {options.gpus}"]
    return [
        look,
        f"NNODES={nodes} NODE_RANK=0 MASTER_ADDR=node0 NPROC_PER_NODE={options.gpus // nodes}"
        f" launch/torchrun_node.sh {options.out}",
        f"the same on each of {nodes} nodes, NODE_RANK=0 to {nodes - 1}; Slurm, Kubernetes:"
        " docs/launch.md",
    ]


def num_nodes(num_gpus: int, per_node: int) -> int:
    """The fewest nodes that give ``num_gpus`` with as many on each."""
    nodes = -(-num_gpus // per_node)
    # One GPU of every node always divides.
    while num_gpus % nodes:
        nodes += 1
    return nodes
