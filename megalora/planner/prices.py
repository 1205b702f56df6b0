"""Price work in seconds: multiplications, memory traffic, collectives and the host's own time.

Rates are the machine's (``hardware.py``); what work there is, ``layer_cost.py`` says.
"""

from megalora.planner.hardware import Kind, Machine, weakest
from megalora.planner.layouts import ParallelLayout
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import Microbatch
from megalora.planner.state_bytes import has_room
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

BEHIND_WAITS = "host behind waits"
"""The part of a step in which the host issues work to a device that has none left."""


class Prices:
    """Adds seconds of pieces of work to a ledger, for one layout on one machine."""

    def __init__(
        self, model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
    ) -> None:
        self.model = model
        self.layout = layout
        self.machine = machine
        self.shape = model.shape
        self.p = layout.parallel
        self.batch = Microbatch.of(model, layout, work, typical=True)
        self.e = work.element_bytes
        self.on_cpu = work.on_cpu
        self.teacher = work.teacher
        self.has_room = has_room(model, layout, work)
        p = layout.parallel
        # Ranks are numbered tp fastest, then cp, dp, pp; in experts etp fastest, then ep, then edp.
        # Stages exchange with their neighbour: a group of two.
        self.strides = {
            "tp": (p.tp, 1),
            "cp": (p.cp, p.tp),
            "dp_cp": (layout.dp_cp, p.tp),
            "etp": (p.etp, 1),
            "ep": (p.ep, p.etp),
            "edp": (layout.edp, p.etp * p.ep),
            "pp": (2, layout.num_ranks // p.pp),
        }
        """Group -> (ranks, distance in rank numbers between neighbours of the group)."""

    def gemm(
        self, to: Ledger, part: str, rows: float, outputs: float, inputs: float, times: float = 1
    ) -> None:
        """``[rows, inputs]`` times ``[inputs, outputs]``: 2 FLOPs for each product and its sum."""
        if rows and outputs and inputs and times:
            rate = self.machine.gemm.at(rows, outputs, inputs)
            to.add(part, times * 2 * rows * outputs * inputs / rate.value, rate.basis)

    def grouped(
        self, to: Ledger, part: str, outputs: float, inputs: float, extra: float = 0
    ) -> None:
        """All experts' rows; ``extra``: columns that adapters add to the inputs, at the base's
        rate."""
        experts = self.shape.num_experts // self.p.ep
        rows = self.batch.rows
        rate = self.machine.grouped_gemm.at(experts, rows, outputs, inputs)
        basis = rate.basis
        if extra:
            # The rate was not taken with these columns.
            basis = weakest(["interpolated", basis])
        to.add(part, 2 * rows * outputs * (inputs + extra) / rate.value, basis)

    def hidden_gemm(self, to: Ledger, rows: float, outputs: float, inputs: float) -> None:
        """A product inside a pass whose memory traffic is priced: it takes no time of its own."""
        to.hidden_flops += 2 * rows * outputs * inputs

    def traffic(self, to: Ledger, part: str, num_bytes: float, times: int = 1) -> None:
        """An element-wise pass that reads and writes so many bytes of the device's memory."""
        if num_bytes:
            rate = self.machine.memory.at(num_bytes)
            to.add(part, times * num_bytes / rate.value, rate.basis)

    def collective(
        self, to: Ledger, part: str, kind: Kind, group: str, num_bytes: float, times: int = 1
    ) -> None:
        """A collective over a group; ``num_bytes`` as ``Network.seconds`` counts them."""
        ranks, stride = self.strides[group]
        if ranks > 1 and num_bytes:
            nodes = self.machine.nodes_of(ranks, stride)
            found = self.machine.network.seconds(kind, ranks, nodes, num_bytes)
            to.add(part, times * found.value, found.basis)

    def host(self, to: Ledger, host: float, device: float, waits: bool) -> None:
        """The host's time for a pass that keeps the device busy for ``device`` seconds.

        A GPU works on while the host issues what comes next, so that the host counts only as far as
        it is slower. But behind a wait the GPU has nothing left to do: what the host then issues is
        not assumed to be hidden.
        """
        over = self.machine.overhead
        if not over.hidden:
            # On a CPU host and device are one: they take turns.
            to.add("host", host, over.basis)
            return
        slower = max(0.0, host - device)
        if waits:
            seconds = over.exposed * host + (1 - over.exposed) * slower
            to.add(BEHIND_WAITS, seconds, over.basis)
        else:
            to.add("host", slower, over.basis)
