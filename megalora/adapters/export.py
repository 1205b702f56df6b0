"""Export an adapter, from a checkpoint or another folder, for one engine: what it honours, in its
layout, with a model card."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalora.adapters.files import CARD, PARTS, PROBE, STATE_JSON, read_config
from megalora.adapters.named_base import is_on_this_machine
from megalora.adapters.read.adapter import Adapter, read_adapter
from megalora.adapters.trained import trained_form
from megalora.adapters.trained_on import metadata_of, trained_on
from megalora.adapters.write.card import Facts, base_line, card, coverage
from megalora.adapters.write.engines import (
    ENGINES,
    PEFT_LAYOUTS,
    EngineName,
    check_dora,
    check_engine,
    loads_in_peft,
)
from megalora.adapters.write.parts import write_in_parts
from megalora.atomic_folder import check_new, whole_or_gone
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config, read_json_object
from megalora.lora.spec import in_parts
from megalora.lora.whole import saved_entries
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class Export:
    """Result of an export."""

    out: Path
    facts: Facts
    notes: list[str]
    """Lines about what the source holds beside the factors."""

    def text(self) -> str:
        """What was written and what to know of it, for the user."""
        lines = [
            f"wrote {self.out}; README.md in it says what it is and how to load it",
            *coverage(self.facts.adapted),
        ]
        if in_parts(self.facts.adapted):
            lines.append(
                f"in it are the folders {' and '.join(PARTS)}, which PEFT loads together: it has"
                " DoRA on all that a folder adapts, or on nothing"
            )
        if not self.facts.loads_in_peft:
            lines.append(
                "note: PEFT 0.21 cannot load adapters of this model's experts in this layout;"
                " --layout stacked it can"
            )
        if self.facts.zeros:
            lines.append(
                f"zeros stand in it, because engines want them, for {', '.join(self.facts.zeros)}"
            )
        if self.facts.absent:
            lines.append(
                f"{len(self.facts.absent)} linears of single experts had no adapter, such as"
                f" {self.facts.absent[0]}: zeros too"
            )
        if self.facts.dropped:
            lines.append(f"left out, as you asked: {', '.join(self.facts.dropped)}")
        if is_on_this_machine(self.facts.base):
            lines.append(
                f"note: the card names the base {self.facts.base}, a folder of this machine; --base"
                " OWNER/NAME names it for others"
            )
        if said := base_line(self.facts):
            lines.append(f"note: {said}")
        lines += self.notes
        trained = {a.name for a in self.facts.adapted}
        for engine in ENGINES.values():
            for name, does in engine.not_honoured.items():
                if name in trained:
                    lines.append(f"note: {engine.title} {does} ({name})")
        return "\n".join(lines)


def export(
    source: Path, out: Path, *, engine: EngineName | None = None, layout: str | None = None,
    drop: Sequence[str] = (), base: str | None = None,
) -> Export:  # fmt: skip
    """Write ``source``, a checkpoint or an adapter folder, to the new folder ``out``.

    Args:
        engine: refuse what this engine would not honour; None for a file that PEFT and vLLM both
            load.
        layout: one of the engine's; None for its default.
        drop: projections (gate, lm_head, ...) to leave out although they were trained.
        base: the base model's folder or hub name, of which config.json is read; None for the one
            the adapter names.
    Raises: ``ValueError`` for an adapter that does not fit its base, an engine that does not honour
        it, a ``drop`` that was not trained, an ``out`` that is not empty.
    """
    config = read_config(source)
    out = out.resolve()
    named = base or str(config.get("base_model_name_or_path") or "")
    if not named:
        raise ValueError(f"{source} does not name its base model; give --base")
    # Before the base is looked for, which may be on the hub.
    check_new(out, source)
    folder = local_folder(named, "--base", weights=False)
    shape = model_shape(read_hf_config(folder))
    # As trained, without zeros that an earlier export wrote: each engine wants zeros of its own.
    form = trained_form(read_adapter(source, shape, base=folder, score=True), shape)
    # What the user leaves out counts for no engine's refusal.
    adapter = _without(form.adapter, drop)
    shape = adapter.shape_of(shape)
    layout = _layout(engine, layout, adapter, shape)
    formats = ENGINES[engine].layouts if engine else PEFT_LAYOUTS
    known = trained_on(source)
    in_peft = loads_in_peft(layout, adapter.adapted, shape)
    with whole_or_gone(out) as temporary:
        zeros = write_in_parts(
            temporary, adapter.adapted, shape, adapter.tensors, named, formats[layout],
            **metadata_of(known),
        )  # fmt: skip
        facts = Facts(
            named, out.name, layout, engine, adapter.adapted, zeros, adapter.absent, list(drop),
            in_peft, adapter.num_scores, saved_entries(shape) if adapter.saved else [],
            adapter.biases, adapter.tokens, _run_of(source), known,
        )  # fmt: skip
        (temporary / CARD).write_text(card(facts))
        # With something left out, a server would rightly answer otherwise than the probe says.
        if (source / PROBE).is_file() and not drop:
            shutil.copyfile(source / PROBE, temporary / PROBE)
    return Export(out, facts, adapter.notes)


def _run_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its run; None where the adapter is not megalora's."""
    path = checkpoint / STATE_JSON
    return read_json_object(path) if path.is_file() else None


def _layout(
    engine: EngineName | None, layout: str | None, adapter: Adapter, shape: ModelShape
) -> str:
    """The file layout to write; raises ``ValueError`` for one that the engine does not read."""
    layouts = ENGINES[engine].layouts if engine else PEFT_LAYOUTS
    layout = layout or next(iter(layouts))
    if engine:
        check_engine(engine, layout, adapter.adapted, shape)
    elif layout not in layouts:
        raise ValueError(
            f"--layout {layout}: it must be one of {', '.join(layouts)}, or --for an engine that"
            " reads it"
        )
    else:
        check_dora(adapter.adapted, shape)
    return layout


def _without(adapter: Adapter, drop: Sequence[str]) -> Adapter:
    """The adapter without some projections; raises ``ValueError`` for one that it has not, or where
    nothing is left."""
    trained = {a.name for a in adapter.adapted}
    for name in drop:
        if name not in trained:
            raise ValueError(
                f"--drop {name}: this adapter has none; it adapts {', '.join(sorted(trained))}"
            )
    kept = [a for a in adapter.adapted if a.name not in drop]
    # An adapter of nothing would load, and be the base.
    if not kept:
        raise ValueError(f"--drop {' '.join(drop)} leaves nothing of the adapter")
    absent = [module for module in adapter.absent if module.rsplit(".", 1)[-1] not in drop]
    return replace(adapter, adapted=kept, absent=absent)
