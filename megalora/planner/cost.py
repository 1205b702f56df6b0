"""Predict the seconds of a training step, part by part, each with how it is known.

Work is counted from sizes (``layer_cost.py``); how fast it is done is the machine's to say
(``hardware.py``).

    m  microbatches of a step; other symbols as in ``layer_cost.py``
"""

from collections import Counter
from dataclasses import replace

from megalora.config import Level, ParallelConfig
from megalora.planner.adapter_count import AdapterCount, adapter_parameters, shared_elements
from megalora.planner.hardware import Basis, Machine, weakest
from megalora.planner.head_cost import HeadCosts
from megalora.planner.layouts import ParallelLayout
from megalora.planner.ledger import Ledger, StepTime
from megalora.planner.state_bytes import GRADIENT, buffers
from megalora.planner.teacher_bytes import second_layout
from megalora.planner.weights import (
    Chunk,
    Content,
    PlannedModel,
    content_of,
    first_of_their_like,
    stage_chunks,
)
from megalora.planner.workload import Workload

ADAM_BYTES = 46
"""Bytes moved for an element of an optimizer's share: 4 for its gradient's norm and 8 for clipping;
28 in torch's fused Adam, which reads gradient, both moments and master and writes the last three;
6 to make the parameter of the master. Counted in torch's source, not measured."""
NORMS_AND_RESIDUALS = 10
"""Times that hidden states are read or written by a layer's two norms and two residual sums,
forward and backward each: a norm 2, a sum 3."""


REFERENCE = "reference"
"""The part of a step that is the forward passes of a teacher, or with adapters switched off, their
bubble included."""


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
    # One microbatch's seconds on every stage; stages that are alike are counted once.
    through_all = 0.0
    bases: set[Basis] = set()
    passes: dict[int, Ledger] = {}
    forwards: list[float] = []
    for stage, times in first_of_their_like(model, p):
        passes[stage] = costs.microbatch(stage_chunks(model, p, stage))
        # For the bubble: a microbatch passes every stage, also those that are alike.
        through_all += times * passes[stage].total
        bases.update(passes[stage].bases.values())
        if work.references:
            # A teacher's pass ends with hidden states: its logits are made in the step's own.
            ends = work.teacher is not None
            forward = costs.forward_only(stage_chunks(model, p, stage), until_head=ends)
            forwards += [forward.total] * times
    stage = max(passes, key=lambda stage: passes[stage].total)
    longest = passes[stage]

    step = Ledger()
    step.take(longest, layout.num_microbatches(work))
    bubble = (through_all - longest.total) / p.vpp
    step.add("bubble", bubble, weakest(list(bases)))
    num_microbatches = layout.num_microbatches(work)
    if forwards:
        once = _through(forwards, num_microbatches, p.vpp)
        step.add(REFERENCE, work.references * once, weakest(list(bases)))
    if work.teacher is not None and work.teacher.model is not None:
        forwards, basis = _second_model(work.teacher.model, layout, work, machine)
        step.add(REFERENCE, _through(forwards, num_microbatches, p.vpp), basis)
    # Adapters of all stages are about as many. A trained embedding or head is on one of them, which
    # the others wait for.
    reducing = list(passes) if model.whole else [stage]
    after = [costs.after_backward(stage) for stage in reducing]
    step.take(max(after, key=lambda ledger: ledger.total))
    step.add("host", machine.overhead.step_s, machine.overhead.basis)
    return StepTime(stage, step.parts())


def _through(forwards: list[float], num_microbatches: int, vpp: int) -> float:
    """Seconds of a forward pass of as many microbatches through stages that need so many seconds
    for one."""
    # Every microbatch passes the slowest stage. The others are waited for once, while the pipeline
    # fills; with several chunks a stage, for one chunk's share of that.
    slowest = max(forwards)
    return num_microbatches * slowest + (sum(forwards) - slowest) / vpp


def _second_model(
    model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
) -> tuple[list[float], Basis]:
    """(seconds of a teacher's forward pass of one microbatch on each stage, how they are known).
    It reads the same rows, and has no adapters."""
    assert work.teacher is not None
    beside = second_layout(work.teacher, layout)
    alone = replace(
        work, teacher=None, references=0, balanced=False, ranks_per_token=None, held=None
    )
    costs = StageCosts(model, beside, alone, machine)
    forwards: list[float] = []
    bases: set[Basis] = set()
    for stage, times in first_of_their_like(model, beside.parallel):
        chunks = stage_chunks(model, beside.parallel, stage)
        # Fills in the layers' forwards.
        costs.microbatch(chunks)
        forward = costs.forward_only(chunks, until_head=True)
        forwards += [forward.total] * times
        bases.update(forward.bases.values())
    return forwards, weakest(list(bases))


LayerKind = tuple[int, bool, Level]
"""The first layer with such parts, whether no backward reaches it, what it recomputes."""
ChunkKind = tuple[Content, tuple[int, Level]]
"""What a chunk holds, and its levels of recomputation."""


class StageCosts(HeadCosts):
    """Counts the seconds of a pipeline stage and of what follows its passes; layers of one kind are
    counted once for a model."""

    def __init__(
        self, model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
    ) -> None:
        super().__init__(model, layout, work, machine)
        key = ("layers", layout.cut(work), self.batch, machine)
        self.known: dict[LayerKind, Ledger] = model.memo.setdefault(key, {})
        """Seconds of a layer of each kind, for all layouts that cut layers alike."""
        self.forwards: dict[LayerKind, Ledger] = model.memo.setdefault(("forwards", *key), {})
        """The same of its forward alone, without what is kept for a backward."""
        # Messages between stages are the only part of a chunk that its layers do not decide about.
        border = layout.parallel.pp > 1, machine.nodes_of(*self.strides["pp"])
        self.chunks: dict[ChunkKind, Ledger] = model.memo.setdefault((*key, border), {})
        """Seconds of a chunk of each kind."""

    def forward_only(self, chunks: list[Chunk], *, until_head: bool = False) -> Ledger:
        """A microbatch through a stage's chunks without gradients; ``microbatch`` comes first. B is
        zero and multiplied all the same.

        Args:
            until_head: it ends with the last hidden states, which all ranks of TP get.
        """
        found = Ledger()
        for chunk in chunks:
            for kind, times in self._alike(chunk).items():
                found.take(self.forwards[kind], times)
            if chunk.has_embedding:
                self.embedding(found)
            if chunk.has_head:
                found.take(self.last_hidden() if until_head else self.head_without_gradient())
            self.borders(found, chunk)
        return found

    def microbatch(self, chunks: list[Chunk]) -> Ledger:
        """Forward and backward of one microbatch through a stage's chunks."""
        found = Ledger()
        alike: Counter[ChunkKind] = Counter()
        for chunk in chunks:
            kind = content_of(self.model, chunk), chunk.levels(self.layout.recompute)
            if kind not in self.chunks:
                self.chunks[kind] = self._chunk(chunk)
            alike[kind] += 1
        for kind, times in alike.items():
            found.take(self.chunks[kind], times)
        return found

    def _chunk(self, chunk: Chunk) -> Ledger:
        """Forward and backward of one microbatch through one chunk."""
        found = Ledger()
        for kind, times in self._alike(chunk).items():
            if kind not in self.known:
                self.known[kind] = self.layer(*kind)
            found.take(self.known[kind], times)
        if chunk.has_embedding:
            self.embedding(found)
            self.of_embedding(found)
        if chunk.has_head:
            for ledger in self.head():
                found.take(ledger)
        self.borders(found, chunk)
        return found

    def embedding(self, to: Ledger) -> None:
        """Rows are read from the table and written, T H e each. Every rank has part of the
        vocabulary: the sum over TP leaves each with its part of the sequence."""
        hidden = self.shape.hidden * self.e
        self.traffic(to, "other", 2 * self.batch.tokens * hidden)
        gathered = self.batch.own_tokens * hidden * self.p.tp
        self.collective(to, "tensor parallel other", "reduce_scatter", "tp", gathered)

    def borders(self, to: Ledger, chunk: Chunk) -> None:
        """Across each border of a chunk an exchange: one microbatch's hidden states for another's
        gradients. The first and the last chunk have one border, the others two."""
        if self.p.pp == 1:
            return
        hidden = self.batch.own_tokens * self.shape.hidden * self.e
        # In the middle a chunk has a neighbour at either end.
        borders = 2 - chunk.has_embedding - chunk.has_head
        self.collective(to, "pipeline transfers", "send", "pp", hidden, times=borders)

    def _alike(self, chunk: Chunk) -> dict[LayerKind, int]:
        """Layers of the chunk by kind."""
        found: dict[LayerKind, int] = {}
        num_full, rest = chunk.levels(self.layout.recompute)
        for i, layer in enumerate(chunk.layers):
            below = chunk.has_embedding and layer < self.model.first_adapted
            level = "full" if i < num_full else rest
            key = (self.model.kinds[layer], below, level)
            found[key] = found.get(key, 0) + 1
        return found

    def layer(self, layer: int, below: bool, level: Level) -> Ledger:
        """One layer, forward, backward and what is computed again at a level of recomputation; no
        backward below the first adapter."""
        modules = self.model.modules_of(layer)
        is_moe = self.shape.is_moe(layer)
        forward = Ledger()
        backward = Ledger()
        again = Ledger()
        self.attention(forward, backward, modules)
        if is_moe:
            self.moe(forward, backward, modules)
        else:
            self.dense(forward, backward, modules)
        hidden = self.batch.own_tokens * self.shape.hidden * self.e
        for ledger in (forward, backward):
            self.traffic(ledger, "other", NORMS_AND_RESIDUALS * hidden)
        self.of_layer(backward, layer)
        if level == "full":
            again.take(forward, before="recompute ")
        elif level == "selective":
            again.take(self.selective(modules, is_moe), before="recompute ")
        self.decode(forward, backward, again, layer, level)

        over = self.machine.overhead
        waits = is_moe and waits_before_all_to_all(self.p)
        whole = Ledger()
        whole.take(forward)
        self.host(whole, over.layer_forward_s, forward.total, waits)
        self.forwards[layer, below, level] = Ledger(dict(whole.seconds), dict(whole.bases))
        if below:
            return whole
        whole.take(backward)
        whole.take(again)
        host = over.layer_backward_s
        device = backward.total
        if level == "full" and waits:
            # The layer's forward, run again in full, waits as the first one did, and splits the
            # host's work in two.
            self.host(whole, over.layer_forward_s, again.total, waits)
        else:
            device += again.total
            # Selective recomputation is priced by its time on the device alone.
            if level == "full":
                host += over.layer_forward_s
        self.host(whole, host, device, waits=False)
        return whole

    def after_backward(self, stage: int) -> Ledger:
        """float32 gradients to their owners, updated parameters back; sums over TP and ETP of what
        ranks share; Adam. The same for every microbatch and recomputation."""
        key = ("after backward", self.p, self.layout.num_ranks, self.e, stage, self.machine)
        # DoRA's norms decode.
        key = (*key, self.held)
        if key not in self.model.memo:
            self.model.memo[key] = self._after_backward(stage_chunks(self.model, self.p, stage))
        return self.model.memo[key]

    def _after_backward(self, chunks: list[Chunk]) -> Ledger:
        to = Ledger()
        alike: Counter[tuple[AdapterCount, tuple[int, int]]] = Counter()
        for chunk in chunks:
            count = adapter_parameters(self.model, self.p, chunk)
            alike[count, shared_elements(self.model, self.p, chunk)] += 1
            self.norms(to, chunk)
            self.decode_for_norms(to, chunk)
        for (count, shared), times in alike.items():
            # Buffers of dense and of expert adapters, each sharded over its data-parallel group.
            for elements, group in zip(buffers(count, self.layout), ("dp_cp", "edp"), strict=True):
                gradients = GRADIENT * elements
                self.collective(to, "reduction", "reduce_scatter", group, gradients, times)
                self.collective(to, "reduction", "all_gather", group, elements * self.e, times)
                # Adam passes over this rank's share; the whole buffer is set to zero once a step.
                share = elements / self.strides[group][0]
                self.traffic(to, "optimizer", ADAM_BYTES * share + gradients, times)
            # First and last stage add up the gradients of a tied embedding.
            self.collective(to, "reduction", "all_reduce", "pp", GRADIENT * count.tied, times)
            # ``sum_partial_gradients`` writes tables, copies them to one bucket and reads the sums
            # back: 4 passes.
            for elements, group in zip(shared, ("tp", "etp"), strict=True):
                gradients = GRADIENT * elements
                self.collective(to, "reduction", "all_reduce", group, gradients, times)
                self.traffic(to, "reduction", 4 * gradients, times)
        return to
