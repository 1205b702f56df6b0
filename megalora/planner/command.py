"""``megalora plan``: from a config and numbers of GPUs to a table, a picture and a config that
runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.model.fields import scheme_of
from megalora.model.held import held_note
from megalora.paths import prepare_file
from megalora.planner import report
from megalora.planner.gpu_counts import fits_from, words_of
from megalora.planner.larger_batch import larger_batch_line
from megalora.planner.layout_table import (
    LEGEND,
    OfCount,
    count_table,
    layout_table,
    stages_lines,
)
from megalora.planner.models import find_architecture
from megalora.planner.own_layout import own_layout
from megalora.planner.question import PlanOptions, Question
from megalora.planner.search import CLOSE, Plan, Planned, search_ranks
from megalora.planner.training_length import training_length


def plan_command(
    path: Path, overrides: Sequence[str], options: PlanOptions, say: Callable[[str], None] = print
) -> None:
    """Print the plan of ``path``; write config, picture and the list of rejected layouts where they
    were asked for.

    Raises:
        ValueError: a mistake in config or options, or nothing fits at the config's LoRA rank.
    """
    _check_options(options)
    config = load_config(path, overrides)
    question = Question.of(config, options)
    if len(options.gpus) > 1:
        _compare_counts(question, options, say)
        return
    (num_gpus,) = options.gpus
    plans = search_ranks(
        question.shape, config.lora, num_gpus, question.work, question.machine,
        lora_ranks=options.lora_ranks,
    )  # fmt: skip
    plan = plans[config.lora.rank]
    # First of all, for these are wanted most where nothing fits.
    if options.rejected:
        lines = [f"{report.rejected_line(r)}\n" for r in plan.rejected]
        options.rejected.write_text("".join(lines))
    _say_question(question, f"{num_gpus} x", say)
    for of_rank in plans.values():
        _say_layouts(question, num_gpus, of_rank, options.top, say)
    if not plan.fitting:
        raise ValueError(why_nothing_fits(question, plan))
    best = plan.best()
    _say_choice(question, plan, best, say)
    if options.out:
        options.out.write_text(report.config_text(config, plan, best))
        # The file as train will read it: a config that does not run must not be announced.
        load_config(options.out).check_world(num_gpus)
        say(f"wrote {options.out}: megalora train {options.out}, or launch/ for several nodes")
    if options.figure:
        # Late: importing matplotlib takes longer than the plan.
        from megalora.planner.figure import draw, title_of

        draw(plan, options.top, options.figure, title_of(plan, config.model.path, num_gpus))
        say(f"wrote {options.figure}")


def _check_options(options: PlanOptions) -> None:
    """Raise ``ValueError`` for a file that cannot be written; make the folders above the others."""
    for name in ("out", "figure", "rejected"):
        file = getattr(options, name)
        if file is None:
            continue
        require(
            len(options.gpus) == 1,
            f"--{name} is of one number of GPUs, and --gpus names {len(options.gpus)}: choose one",
        )
        prepare_file(file)
    if options.figure:
        require(
            options.figure.suffix in (".png", ".pdf", ".svg"),
            f"--figure {options.figure}: end it in .png, .pdf or .svg",
        )


def why_nothing_fits(question: Question, plan: Plan) -> str:
    """What the smallest layout needs, and from how many GPUs on the model fits."""
    reason = plan.why_nothing_fits()
    needed = fits_from(question, plan.lora_rank)
    if needed is None:
        return reason
    return f"{reason}. It fits from {words_of(needed)}: --gpus {needed}"


def _say_question(question: Question, gpus: str, say: Callable[[str], None]) -> None:
    """What is planned, and what that rests on."""
    config = question.config
    work = question.work
    say(
        f"{config.model.path} on {gpus} {question.machine.name}, {work.in_words},"
        f" {work.dtype}, LoRA rank {config.lora.rank} on {config.lora.target_modules}"
    )
    scheme = scheme_of(find_architecture(config.model.path))
    if note := held_note(work.held, scheme, work.dtype):
        say(note)
    rates = f"rates {question.machine.note}"
    # A dense model routes nothing.
    if question.shape.moe_layers:
        rates += f"; routing {work.imbalance:g} times the mean on the fullest rank: assumed"
    say(rates)


def _say_layouts(
    question: Question, num_gpus: int, plan: Plan, top: int, say: Callable[[str], None]
) -> None:
    """The layouts of one LoRA rank, with the config's own among them."""
    own = own_layout(question, num_gpus, plan.lora_rank)
    say(
        f"\nLoRA rank {plan.lora_rank}, layouts that fit: {len(plan.fitting):,}. Of each way to"
        " split the model the leanest microbatch,\nchunks and recomputation within"
        f" {100 * CLOSE:.0f} % of its best; last the layout in the file:\n"
        f"{layout_table(plan, top, own)}\n{LEGEND}"
    )
    for line in (stages_lines(plan, top, own), report.rivals_line(plan, top)):
        if line:
            say(line)
    best = plan.best() if plan.fitting else None
    if best is None:
        say(f"at this rank nothing fits {num_gpus} x {question.machine.name}")
    say(report.own_line(own, best))


def _say_choice(question: Question, plan: Plan, best: Planned, say: Callable[[str], None]) -> None:
    """The choice of the config's own rank down to the reasons against other layouts."""
    say(f"\nthe choice: {best.layout}\n{report.breakdown(plan, best)}\n")
    for line in (
        report.packing_line(plan, best),
        report.save_line(best),
        report.waits(best),
        larger_batch_line(question, plan, best),
    ):
        if line:
            say(f"{line}\n")
    say(report.rejections(plan))
    if text := report.warning(plan, best):
        say(text)


def _compare_counts(question: Question, options: PlanOptions, say: Callable[[str], None]) -> None:
    """A table of the numbers of GPUs for each LoRA rank, and the smallest number that fits."""
    length = training_length(question)
    of_all: dict[int, list[OfCount]] = {}
    for num_gpus in dict.fromkeys(options.gpus):
        plans = search_ranks(
            question.shape, question.config.lora, num_gpus, question.work, question.machine,
            lora_ranks=options.lora_ranks,
        )  # fmt: skip
        for rank, plan in plans.items():
            own = own_layout(question, num_gpus, rank)
            of_all.setdefault(rank, []).append(OfCount(num_gpus, plan, own))
    _say_question(question, "several numbers of", say)
    for rank, counts in of_all.items():
        say(f"\nLoRA rank {rank}; GPU-hours for {length.what}:")
        say(f"{count_table(counts, length.num_steps)}\n{LEGEND}")
        for count in counts:
            if not count.plan.fitting:
                say(count.plan.why_nothing_fits())
            if count.own.reason is not None:
                say(f"{count.num_gpus} GPUs: {report.own_line(count.own, None)}")
        say(_smallest(question, counts, rank))


def _smallest(question: Question, counts: Sequence[OfCount], rank: int) -> str:
    """From how many GPUs on the model fits, be that among the numbers asked for or not."""
    found = [count.num_gpus for count in counts if count.plan.fitting]
    needed = fits_from(question, rank)
    if needed is not None:
        found.append(needed)
    if not found:
        return "fits none of these numbers of GPUs, nor more"
    return f"fits from {words_of(min(found))}"
