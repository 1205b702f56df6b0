"""Report a plan in words: memory and time of the best layout, why others are rejected, and its
config as YAML."""

from collections.abc import Sequence
from dataclasses import replace

from omegaconf import OmegaConf

from megalora.config import RecomputeLayers, RunConfig
from megalora.config.commented import explicit_options
from megalora.planner.layout_table import columns, seconds_text, speed_text
from megalora.planner.layouts import Rejected
from megalora.planner.memory import GIB, gib_by_name
from megalora.planner.own_layout import OwnLayout
from megalora.planner.prices import BEHIND_WAITS
from megalora.planner.save_bytes import save_plan
from megalora.planner.search import FULL, Plan, Planned


def packing_line(plan: Plan, found: Planned) -> str | None:
    """How well samples fill rows; None where they are taken to be of full length."""
    packing = plan.work.packing
    if packing is None:
        return None
    use = found.layout.use(plan.work)
    return (
        f"{plan.work.called} have {packing.mean:,.0f} tokens on average ({packing.source}), packed"
        f" into rows of up to {found.layout.capacity(plan.work):,}: {100 * use.used:.1f} % of the"
        f" slots are used, in {use.num_rounds} rows a step on each data-parallel rank"
    )


def save_line(found: Planned) -> str:
    """What saving checkpoints takes of host memory, disk and time."""
    model, work, _ = found.asked
    return save_plan(model, found.layout, work).line()


def breakdown(plan: Plan, found: Planned) -> str:
    """Memory and time of one layout, part by part, each number with how it is known."""
    memory = [("memory of the fullest rank", f"stage {found.memory.stage}", "GiB", "")]
    for part in found.memory.parts:
        gib = f"{part.num_bytes / GIB:.3f}"
        memory.append((f"  {part.name}", part.when, gib, part.basis))
    memory.append(("  peak", "", f"{found.memory.peak_bytes / GIB:.3f}", ""))

    # The parts of time add up to the step, largest first; those of memory stay in the order of a
    # step, because not all of them are there at the peak.
    seconds = found.time.seconds
    time = [("time of a step", f"stage {found.time.stage}", "s", "")]
    for part in sorted(found.time.parts, key=lambda part: -part.seconds):
        share = f"{100 * part.seconds / seconds:.1f} %"
        time.append((f"  {part.name}", share, f"{part.seconds:.4f}", part.basis))
    time.append(("  step", "", f"{seconds:.4f}", found.time.basis))
    if found.time.basis == "assumed":
        low, high = found.limits
        time.append(("  step at the limits", "", f"{low:.3g}-{high:.3g}", found.time.basis))
    # The last column says in words how a number is known.
    words = (0, 3)
    return f"{columns(memory, words)}\n{columns(time, words)}"


def waits(found: Planned) -> str | None:
    """Where the host waits for the device, and how many seconds that adds; None for a layout in
    which it does not wait."""
    seconds = found.time[BEHIND_WAITS]
    if not seconds:
        return None
    again = ""
    if isinstance(found.layout.recompute, RecomputeLayers) or found.layout.recompute == "full":
        again = "and again where it is recomputed "
    *_, machine = found.asked
    exposed = 100 * machine.overhead.exposed
    return (
        "with experts split over ranks, the host waits for the device before the all-to-all in"
        f" every MoE layer's forward {again}(sizes come from the routing). Of the host's work"
        f" behind these waits {exposed:.0f} % is not assumed hidden: {seconds:.3g} s of a step"
    )


def warning(plan: Plan, found: Planned) -> str | None:
    """What to do where little memory is left; None where enough is."""
    share = plan.share(found)
    if share <= FULL:
        return None
    return (
        f"warning: {found.layout} needs {100 * share:.0f} % of the memory. Above {100 * FULL:.0f} %"
        " a batch routed unevenly, or fragments, may be too much. A smaller data.max_length or"
        " lora.rank needs less, and so do more recomputation and more ranks."
    )


def own_line(own: OwnLayout, best: Planned | None) -> str:
    """How the layout of the config does beside the choice, or why it is out."""
    found = own.planned
    if found is None or best is None or own.reason is not None:
        return f"yours: {own.reason}"
    if found.layout == best.layout:
        return "yours is the choice"
    # Errors of the rates are shared: their ratio is known better than either time.
    ratios = [found.time.seconds / best.time.seconds]
    for own_seconds, seconds in zip(found.by_scenario, best.by_scenario, strict=True):
        ratios.append(own_seconds / seconds)
    more_gib = (found.memory.peak_bytes - best.memory.peak_bytes) / GIB
    word = "more" if more_gib >= 0 else "less"
    return (
        f"yours takes {range_words(ratios, '.2f')} times as long as the choice, and"
        f" {abs(more_gib):.1f} GiB {word}"
    )


def range_words(values: Sequence[float], form: str) -> str:
    """``1.2 to 1.4``: the least and the most, or one number where they look alike."""
    low = format(min(values), form)
    high = format(max(values), form)
    return low if low == high else f"{low} to {high}"


def rivals_line(plan: Plan, top: int) -> str | None:
    """Which rows of the table may each be the fastest, and why the first of them was chosen; None
    where all rates were measured."""
    rivals = plan.rivals()
    if not rivals or rivals[0].time.basis != "assumed":
        return None
    if len(rivals) == 1:
        return (
            "row 1 is the fastest at both limits of each assumed rate (docs/planner.md): the ranges"
            " overlap, but the layouts share the rates"
        )
    shown = min(top, len(rivals))
    rows = "row 1" if shown == 1 else f"rows 1 to {shown}"
    if len(rivals) > shown:
        rows += f" and {len(rivals) - shown} more"
    _, reasons = plan.choose(rivals)
    return (
        f"{rows} cannot be told apart on assumed rates: each may be the fastest. Row 1 is chosen"
        f" for {', then '.join(reasons)}; megalora bench measures them"
    )


def rejections(plan: Plan) -> str:
    """How many layouts each kind of reason rejects; numbers in reasons stand as #."""
    rejected = f"{len(plan.rejected):,} layouts are rejected"
    lines = [f"{rejected} (--rejected FILE lists each with its reason):"]
    lines += [f"  {count:>6,}  {reason}" for reason, count in plan.reasons()]
    return "\n".join(lines)


def rejected_line(rejected: Rejected) -> str:
    """One rejected layout and its reason, with a tab between them."""
    p = rejected.parallel
    micro = rejected.micro_batch_size
    layout = f"tp={p.tp} cp={p.cp} {p.stages} ep={p.ep} etp={p.etp} micro={micro or 'any'}"
    # Recomputation decides about memory alone: layouts that are not possible name none.
    if rejected.layout:
        layout += f" recompute={rejected.layout.recompute}"
    return f"{layout}\t{rejected.reason}"


def planned_config(config: RunConfig, found: Planned) -> RunConfig:
    """The user's config with the layout's sizes."""
    layout = found.layout
    lora = replace(config.lora, rank=found.lora_rank)
    train = replace(
        config.train,
        micro_batch_size=layout.micro_batch_size,
        micro_batch_tokens=layout.micro_batch_tokens,
        recompute=layout.recompute,
    )
    return replace(config, parallel=layout.parallel, lora=lora, train=train)


def config_text(config: RunConfig, plan: Plan, found: Planned) -> str:
    """YAML that ``megalora train`` reads, without defaults, below comments with the prediction."""
    first = (
        f"{config.model.path} on {found.layout.num_ranks} x {plan.machine.name},"
        f" {plan.work.called} of up to {plan.work.sequence_length:,} tokens: {found.layout}"
    )
    memory, step = prediction(plan, found)
    comments = [first, f"Predicted ({plan.machine.note}):", f"  {memory}", f"  {step}"]
    head = "# " + "\n# ".join(comments) + "\n"
    # OmegaConf writes as it reads, so that a value such as 1e-4 comes back as the number it was.
    tree = explicit_options(planned_config(config, found), ALWAYS_WRITTEN)
    return head + OmegaConf.to_yaml(OmegaConf.create(tree))


def prediction(plan: Plan, found: Planned) -> tuple[str, str]:
    """Memory and time of a layout, each in one line with its largest parts."""
    memory_gib = found.memory.peak_bytes / GIB
    lengths = "at full length"
    if plan.work.packing is not None:
        lengths = f"with {plan.work.called} of {plan.work.packing.mean:,.0f} tokens on average"
    memory = (
        f"memory of the fullest rank {memory_gib:.1f} GiB, {100 * plan.share(found):.0f} % of"
        f" {plan.machine.memory_bytes / GIB:.0f} GiB:"
        f" {_largest(gib_by_name(found.memory.parts), 'GiB')}"
    )
    step = (
        f"a step {seconds_text(found)} s ({found.time.basis}),"
        f" {speed_text(plan, found, '{:,.0f}'.format)} tokens/s/GPU {lengths}:"
        f" {_largest(found.time.by_part(), 's')}"
    )
    return memory, step


def _largest(parts: dict[str, float], unit: str) -> str:
    """The four largest parts in one line."""
    most = sorted(parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {value:.2f} {unit}" for name, value in most if value > 0)


ALWAYS_WRITTEN: dict[str, tuple[str, ...]] = {
    "parallel": ("tp", "cp", "pp", "vpp", "ep", "etp"),
    "train": ("micro_batch_size", "global_batch_size", "recompute"),
    "lora": ("rank", "alpha", "target_modules"),
    "data": ("max_length",),
    "model": ("dtype",),
}
"""Section -> keys that a planned config names even where they are defaults: layout, batch and what
the prediction rests on."""
