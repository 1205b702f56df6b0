"""A plan in words: the ranked table, what the best layout needs and takes, why others are out, and
its config as YAML."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from omegaconf import OmegaConf

from megalora.config import RunConfig
from megalora.planner.layouts import Rejected
from megalora.planner.prices import BEHIND_WAITS
from megalora.planner.search import FULL, GIB, Plan, Planned

MARK = {"measured": "", "interpolated": "~", "assumed": "?"}
LEGEND = (
    "time: no mark measured, ~ interpolated, ? assumed. GiB: formulas measured against tensors of"
    " CPU ranks; context and room assumed."
)


def table(plan: Plan, top: int) -> str:
    """One line for each of the ``top`` fastest layouts."""
    header = ("", "tp", "pp", "vpp", "dp", "ep", "etp", "edp", "micro", "recompute", "lora r",
              "step s", "tokens/s/GPU", "GiB", "of GPU")  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for i, found in enumerate(plan.layouts()[:top], 1):
        p = found.layout.parallel
        mark = MARK[found.time.basis]
        share = plan.share(found)
        rows.append((
            str(i), *map(str, (p.tp, p.pp, p.vpp, found.layout.dp, p.ep, p.etp, found.layout.edp)),
            str(found.layout.micro_batch_size), found.layout.recompute, str(found.lora_rank),
            f"{found.time.seconds:.3g}{mark}",
            f"{found.tokens_per_second(plan.work):,.0f}{mark}",
            f"{found.memory.peak_bytes / GIB:.1f}",
            f"{100 * share:.0f} %{' !' if share > FULL else ''}",
        ))  # fmt: skip
    return _columns(rows)


def breakdown(plan: Plan, found: Planned) -> str:
    """Memory and time of one layout, part by part, each number with how it is known."""
    memory = [("memory of the fullest rank", f"stage {found.memory.stage}", "GiB", "")]
    memory += [
        (f"  {part.name}", part.when, f"{part.num_bytes / GIB:.3f}", part.basis)
        for part in found.memory.parts
    ]
    memory += [("  peak", "", f"{found.memory.peak_bytes / GIB:.3f}", "")]
    seconds = found.time.seconds
    time = [("time of a step", f"stage {found.time.stage}", "s", "")]
    for part in sorted(found.time.parts, key=lambda part: -part.seconds):
        time.append(
            (
                f"  {part.name}",
                f"{100 * part.seconds / seconds:.1f} %",
                f"{part.seconds:.4f}",
                part.basis,
            )
        )
    time += [("  step", "", f"{seconds:.4f}", found.time.basis)]
    return f"{_columns(memory)}\n{_columns(time)}"


def waits(found: Planned) -> str | None:
    """Where the host waits for the device, and what that adds; None for a layout in which it does
    not."""
    seconds = found.time[BEHIND_WAITS]
    if not seconds:
        return None
    again = "and again where it is recomputed " if found.layout.recompute == "full" else ""
    return (
        "with experts shared out, the host waits for the device before the all-to-all in every MoE"
        f" layer's forward {again}(sizes come from the routing). The host's work behind these waits"
        f" is not assumed hidden: {seconds:.3g} s of a step"
    )


def warning(plan: Plan, found: Planned) -> str | None:
    """When little memory is left."""
    share = plan.share(found)
    if share <= FULL:
        return None
    return (
        f"warning: {found.layout} needs {100 * share:.0f} % of the memory. Above {100 * FULL:.0f} %"
        " a batch routed unevenly, or fragments, may be too much. A smaller data.max_length or"
        " lora.rank needs less, and so do more recomputation and more ranks."
    )


def rejections(plan: Plan) -> str:
    """How many layouts each kind of reason rejects; digits stand as #."""
    lines = [
        f"{len(plan.rejected):,} layouts are out (--rejected FILE lists each with its reason):"
    ]
    return "\n".join(lines + [f"  {count:>6,}  {reason}" for reason, count in plan.reasons()])


def rejected_line(rejected: Rejected) -> str:
    """One layout and its reason."""
    p = rejected.parallel
    micro = rejected.micro_batch_size
    sizes = (
        f"tp={p.tp} pp={p.pp} vpp={p.vpp} ep={p.ep} etp={p.etp}"
        f" micro={'any' if micro is None else micro}"
    )
    recompute = f" recompute={rejected.layout.recompute}" if rejected.layout else ""
    return f"{sizes}{recompute}\t{rejected.reason}"


def planned_config(config: RunConfig, found: Planned) -> RunConfig:
    """The user's config with the layout's sizes."""
    layout = found.layout
    return replace(
        config, parallel=layout.parallel, lora=replace(config.lora, rank=found.lora_rank),
        train=replace(config.train, micro_batch_size=layout.micro_batch_size,
                      recompute=layout.recompute),
    )  # fmt: skip


def config_text(config: RunConfig, plan: Plan, found: Planned) -> str:
    """YAML that ``megalora train`` reads, what is not a default, with what was predicted in a
    comment."""
    n = found.layout.num_ranks
    work = plan.work
    time = found.time
    share = plan.share(found)
    head = [
        (
            f"{config.model.path} on {n} x {plan.machine.name}, samples of up to"
            f" {work.sequence_length:,} tokens: {found.layout}"
        ),
        f"Predicted ({plan.machine.note}):",
        (
            f"  memory of the fullest rank {found.memory.peak_bytes / GIB:.1f} GiB,"
            f" {100 * share:.0f} % of {plan.machine.memory_bytes / GIB:.0f} GiB:"
            f" {_largest([(p.name, p.num_bytes / GIB) for p in found.memory.parts], 'GiB')}"
        ),
        (
            f"  a step {time.seconds:.2f} s ({time.basis}), {found.tokens_per_second(work):,.0f}"
            " tokens/s/GPU at full length:"
            f" {_largest([(p.name, p.seconds) for p in time.parts], 's')}"
        ),
    ]
    return "".join(f"# {line}\n" for line in head) + OmegaConf.to_yaml(
        OmegaConf.create(_explicit(planned_config(config, found)))
    )


def _largest(parts: Sequence[tuple[str, float]], unit: str) -> str:
    most = sorted(parts, key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {value:.2f} {unit}" for name, value in most if value > 0)


def _explicit(config: RunConfig) -> dict[str, dict[str, object]]:
    """Sections without what is a default, layout and batch always."""
    always = {
        "parallel": {"tp", "pp", "vpp", "ep", "etp"},
        "train": {"micro_batch_size", "global_batch_size", "recompute"},
    }
    always |= {
        "lora": {"rank", "alpha", "target_modules"},
        "data": {"max_length"},
        "model": {"dtype"},
    }
    tree = {}
    for section, values in asdict(config).items():
        fields = type(getattr(config, section)).__dataclass_fields__
        kept = {
            k: v
            for k, v in values.items()
            if k in always.get(section, ())
            or v
            != (
                fields[k].default_factory()
                if callable(fields[k].default_factory)
                else fields[k].default
            )
        }
        tree |= {section: kept} if kept else {}
    return tree


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Padded to the widest cell; the first column on the left, others on the right, a last one of
    words on the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 or (len(row) == 4 and i == 3) else cell.rjust(w) for i,
                  (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip
