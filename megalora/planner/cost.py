"""Predict the seconds of a training step, part by part, each with how it is known.

Work is counted from sizes (``layer_cost.py``); how fast it is done is the machine's to say
(``hardware.py``).

    m  microbatches of a step; other symbols as in ``layer_cost.py``
"""

from collections import Counter

from megalora.config import ParallelConfig
from megalora.planner.hardware import Machine, weakest
from megalora.planner.layer_cost import STATISTIC, LayerCosts
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.ledger import Ledger, StepTime
from megalora.planner.state_bytes import buffers
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    adapter_parameters,
    chunks_of,
    first_of_their_like,
    shared_elements,
)

ADAM_BYTES = 90
"""Moved for an element of an optimizer's share: gradient, its norm and clipping, both moments,
master and parameter, as torch's tensor-list Adam passes over them. Counted in its source, not
measured."""


def waits_before_all_to_all(p: ParallelConfig) -> bool:
    """Whether every forward of an MoE layer has the host wait for the device.

    The all-to-all's sizes are computed on the device from the routing, and are arguments of the
    call on the host (see ``model/dispatcher.py``). A rank that holds all experts whole moves
    nothing and waits for nothing.
    """
    return p.ep * p.etp > 1


def step_time(
    model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
) -> StepTime:
    """How long one optimizer step takes.

    With m microbatches and stages that need a_s for one, 1F1B takes ``m max a + (sum a - max a)``,
    the second term divided by the chunks of a stage when they are interleaved: the bubble.
    Reductions and the optimizer follow.
    """
    p = layout.parallel
    costs = StageCosts(model, layout, work, machine)
    passes = [
        (stage, n, costs.microbatch(chunks_of(model.shape, p, stage)))
        for stage, n in first_of_their_like(model, p)
    ]
    stage, _, longest = max(passes, key=lambda found: found[2].total)
    step = Ledger()
    step.take(longest, layout.num_microbatches(work.global_batch_size))
    bubble = (sum(n * ledger.total for _, n, ledger in passes) - longest.total) / p.vpp
    step.add(
        "bubble",
        bubble,
        weakest([basis for *_, ledger in passes for basis in ledger.bases.values()]),
    )
    costs.after_backward(step, chunks_of(model.shape, p, stage))
    step.add("host", machine.overhead.step_s, machine.overhead.basis)
    return StepTime(stage, step.parts())


class StageCosts(LayerCosts):
    """Seconds of a pipeline stage and of what follows its passes; layers of one kind are counted
    once."""

    def __init__(
        self, model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
    ) -> None:
        super().__init__(model, layout, work, machine)
        self.known: dict[tuple[int, bool], Ledger] = {}

    def microbatch(self, chunks: list[Chunk]) -> Ledger:
        """Forward and backward of one microbatch through a stage's chunks."""
        found = Ledger()
        for chunk in chunks:
            for (layer, below), times in self._alike(chunk).items():
                if (layer, below) not in self.known:
                    self.known[layer, below] = self.layer(layer, below)
                found.take(self.known[layer, below], times)
            hidden = self.batch.own_tokens * self.shape.hidden * self.e
            if chunk.has_embedding:
                self.traffic(found, "other", 2 * self.batch.tokens * self.shape.hidden * self.e)
                self.collective(
                    found, "tensor parallel other", "reduce_scatter", "tp", hidden * self.p.tp
                )
            if chunk.has_head:
                for ledger in self.head():
                    found.take(ledger)
            # across each border an exchange: one microbatch's hidden states for another's gradients
            if self.p.pp > 1:
                borders = 2 - chunk.has_embedding - chunk.has_head
                self.collective(found, "pipeline transfers", "send", "pp", hidden, times=borders)
        return found

    def _alike(self, chunk: Chunk) -> dict[tuple[int, bool], int]:
        """(kind of layer, whether no backward reaches it) -> how many."""
        found: dict[tuple[int, bool], int] = {}
        for layer in chunk.layers:
            key = (
                self.model.kinds[layer],
                chunk.has_embedding and layer < self.model.first_adapted,
            )
            found[key] = found.get(key, 0) + 1
        return found

    def layer(self, layer: int, below: bool) -> Ledger:
        """One layer, forward, backward and what is computed again; no backward below the first
        adapter."""
        modules = self.model.by_layer.get(layer, {})
        forward = Ledger()
        backward = Ledger()
        again = Ledger()
        mlp = self.moe if self.shape.is_moe(layer) else self.dense
        self.attention(forward, backward, modules)
        mlp(forward, backward, modules)
        for ledger in (forward, backward):  # two norms, two residuals
            self.traffic(ledger, "other", 10 * self.batch.own_tokens * self.shape.hidden * self.e)
        if self.layout.recompute == "full":
            again.take(forward, before="recompute ")
        elif self.layout.recompute == "selective":
            again.take(self.selective(modules, self.shape.is_moe(layer)), before="recompute ")
        over = self.machine.overhead
        whole = Ledger()
        waits = self.shape.is_moe(layer) and waits_before_all_to_all(self.p)
        whole.take(forward)
        self.host(whole, over.layer_forward_s, forward.total, waits)
        if below:
            return whole
        whole.take(backward)
        whole.take(again)
        # The layer's forward, run again in full, waits as the first one did, and splits the host's
        # work in two.
        host = over.layer_backward_s
        device = backward.total
        if self.layout.recompute == "full" and waits:
            self.host(whole, over.layer_forward_s, again.total, waits)
        else:
            host += over.layer_forward_s * (self.layout.recompute == "full")
            device += again.total
        self.host(whole, host, device, waits=False)
        return whole

    def after_backward(self, to: Ledger, chunks: list[Chunk]) -> None:
        """float32 gradients to their owners, updated parameters back; sums over TP and ETP of what
        ranks share; Adam."""
        each = [
            (adapter_parameters(self.model, self.p, c), shared_elements(self.model, self.p, c))
            for c in chunks
        ]
        for (count, shared), times in Counter(each).items():
            for elements, group in zip(buffers(count, self.layout), ("dp", "edp"), strict=True):
                self.collective(
                    to, "reduction", "reduce_scatter", group, elements * STATISTIC, times
                )
                self.collective(to, "reduction", "all_gather", group, elements * self.e, times)
                moved = ADAM_BYTES * elements / self.strides[group][0] + STATISTIC * elements
                self.traffic(to, "optimizer", moved, times)
            for elements, group in zip(shared, ("tp", "etp"), strict=True):
                self.collective(to, "reduction", "all_reduce", group, elements * STATISTIC, times)
                self.traffic(to, "reduction", 4 * elements * STATISTIC, times)
