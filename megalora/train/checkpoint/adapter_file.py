"""Write a checkpoint's adapter on the first rank while the ranks send it, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalora.adapters.as_plain import Get
from megalora.adapters.cycles import summed_source
from megalora.adapters.files import WEIGHTS
from megalora.adapters.write.form import checkpoint_form, write_config
from megalora.adapters.write.stream import write_tensors
from megalora.first_rank import on_first_rank
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape
from megalora.train.checkpoint.assembled import Assembled, Table, batches_of, send
from megalora.train.checkpoint.snapshot import Held


@dataclass
class Plan:
    """What is known of an adapter's files before a tensor has come."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Name in the file -> its shape and dtype, on the device "meta"."""
    uses: dict[str, int] = field(default_factory=dict)
    """Name of a trained tensor -> how often it is asked for, in the order of first times."""
    batches: list[list[str]] = field(default_factory=list)
    """Trained tensors in the order in which ranks send them."""


class AdapterFile:
    """The adapter's two files in one form, for every save of a run."""

    def __init__(
        self, adapted: list[Adapted], shape: ModelShape, base: str, key: str, cycles: int = 0
    ) -> None:
        """
        Args:
            key: of the training state's tensors that are written.
            cycles: adapters of earlier cycles that are added.
        """
        self.adapted = adapted
        self.shape = shape
        self.base = base
        self.key = key
        self.cycles = cycles
        self._plan: Plan | None = None
        """As the first rank has made it; on others only the batches."""

    def write(
        self,
        folder: Path,
        table: Table | None,
        held: list[Held],
        dtypes: dict[str, torch.dtype],
        group: dist.ProcessGroup | None,
        metadata: Mapping[str, str],
        earlier: Callable[[], Sequence[Get]] = tuple,
    ) -> Exception | None:
        """Write the files into ``folder`` on the first rank; collective. Returns what went wrong
        there: the other ranks have sent everything in any case.

        Args:
            table: on the first rank.
            held: this rank's pieces of ``key``.
            dtypes: of their parameters.
            metadata: for the header of the weights' file.
            earlier: opens the factors of earlier cycles, each a function by name.
        """
        if self._plan is None:
            self._plan = self._agree(table, group)
        if table is None:
            assert group is not None
            send(held, dtypes, self._plan.batches, group)
            return None
        arriving = Assembled(table, held, self._plan.batches, self._plan.uses, group)
        try:
            tensors, config = self._form(arriving.get, table, earlier())
            folder.mkdir(exist_ok=True)
            path = folder / WEIGHTS
            write_tensors(path, self._plan.tensors, tensors, {"format": "pt", **metadata})
            write_config(folder, config)
        except Exception as error:
            arriving.drain()
            return error
        return None

    def _agree(self, table: Table | None, group: dist.ProcessGroup | None) -> Plan:
        """The plan, of which all ranks need the batches; collective. Raises on every rank where the
        first one cannot make it."""
        made: list[Plan] = []

        def make() -> list[list[str]]:
            assert table is not None
            made.append(self._make_plan(table))
            return made[0].batches

        batches = on_first_rank(make, f"the plan of {WEIGHTS}", group)
        return made[0] if made else Plan(batches=batches)

    def _make_plan(self, table: Table) -> Plan:
        """Make the file of tensors without contents: what is asked for, and what comes out."""
        plan = Plan()

        def ask(name: str) -> Tensor:
            plan.uses[name] = plan.uses.get(name, 0) + 1
            shape = table.tensors[name].shape
            return torch.empty(shape, dtype=table.dtypes[name], device="meta")

        def earlier(name: str) -> Tensor:
            shape = table.tensors[name].shape
            return torch.empty(shape, dtype=table.dtypes[name], device="meta")

        tensors, _ = self._form(ask, table, [earlier] * self.cycles)
        for name, tensor in tensors:
            plan.tensors[name] = torch.empty_like(tensor, device="meta")
        plan.batches = batches_of(table, plan.uses)
        return plan

    def _form(self, get: Get, table: Table, earlier: Sequence[Get]) -> Any:
        """As ``checkpoint_form``, with the adapters of earlier cycles added."""
        adapted = self.adapted
        if earlier:
            adapted, get = summed_source(adapted, earlier, get)
        matrices = [name for name, tensor in table.tensors.items() if len(tensor.shape) > 1]
        dtype = table.dtypes[matrices[0]]
        return checkpoint_form(adapted, self.shape, get, dtype, self.base)
