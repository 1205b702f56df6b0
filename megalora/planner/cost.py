"""Seconds of a training step, part by part, each with how it is known.

Work is counted from sizes; how fast it is done is the machine's to say (``hardware.py``). A linear
multiplies once forward and once backward, for the gradient of its input: the base is frozen. Each
adapter factor multiplies once more, for its own.

    T  tokens of a microbatch, S B     t, n  TP, ETP size     e  bytes per element     R  sum of stacked ranks
    M  rows of this rank's experts     q, g  features of query, key / t                m  microbatches of a step
"""

from collections import Counter
from collections.abc import Iterable

from megalora.config import ParallelConfig
from megalora.lora.spec import Adapted
from megalora.planner.activations import Microbatch
from megalora.planner.gpus import attention_flops
from megalora.planner.hardware import Estimate, Kind, Machine, weakest
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.ledger import Ledger, StepTime
from megalora.planner.memory import buffers
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    adapter_parameters,
    attention_widths,
    chunks_of,
    first_of_their_like,
    shared_elements,
)

ADAM_BYTES = 90
"""Moved for an element of an optimizer's share: gradient, its norm and clipping, both moments,
master and parameter, as torch's tensor-list Adam passes over them. Counted in its source, not
measured."""
ROPE_PASSES = 8
LOSS_PASSES = 6
ROUTER_PASSES = 10
"""Times that q and k, the logits, and the router's probabilities are read or written, forward and
backward each. Assumed."""

BEHIND_WAITS = "host behind waits"


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
    costs = _Costs(model, layout, work, machine)
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


class _Costs:
    """Seconds of one layout's pieces; layers of one kind are counted once."""

    def __init__(
        self, model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
    ) -> None:
        self.model = model
        self.layout = layout
        self.machine = machine
        self.shape, self.p, self.batch = (
            model.shape,
            layout.parallel,
            Microbatch.of(model, layout, work),
        )
        self.e = work.element_bytes
        self.layers = {}
        self.strides = {"tp": (self.p.tp, 1), "etp": (self.p.etp, 1), "ep": (self.p.ep, self.p.etp)}
        self.strides |= {"dp": (layout.dp, self.p.tp), "edp": (layout.edp, self.p.etp * self.p.ep)}
        self.strides["pp"] = (2, layout.num_ranks // self.p.pp)

    # What a pass is made of.

    def gemm(
        self, to: Ledger, part: str, rows: float, outputs: float, inputs: float, times: float = 1
    ) -> None:
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
        basis = weakest(["interpolated", rate.basis]) if extra else rate.basis
        to.add(part, 2 * rows * outputs * (inputs + extra) / rate.value, basis)

    def traffic(self, to: Ledger, part: str, num_bytes: float, times: int = 1) -> None:
        if num_bytes:
            rate = self.machine.memory.at(num_bytes)
            to.add(part, times * num_bytes / rate.value, rate.basis)

    def collective(
        self, to: Ledger, part: str, kind: Kind, group: str, num_bytes: float, times: int = 1
    ) -> None:
        ranks, stride = self.strides[group]
        if ranks > 1 and num_bytes:
            nodes = self.machine.nodes_of(ranks, stride)
            found: Estimate = self.machine.network.seconds(kind, ranks, nodes, num_bytes)
            to.add(part, times * found.value, found.basis)

    # What a stage does.

    def microbatch(self, chunks: list[Chunk]) -> Ledger:
        """Forward and backward of one microbatch through a stage's chunks."""
        found = Ledger()
        for chunk in chunks:
            for (layer, below), times in self._alike(chunk).items():
                if (layer, below) not in self.layers:
                    self.layers[layer, below] = self._count(layer, below)
                found.take(self.layers[layer, below], times)
            hidden = self.batch.own_tokens * self.shape.hidden * self.e
            if chunk.has_embedding:
                self.traffic(found, "other", 2 * self.batch.tokens * self.shape.hidden * self.e)
                self.collective(
                    found, "tensor parallel other", "reduce_scatter", "tp", hidden * self.p.tp
                )
            if chunk.has_head:
                self._head(found)
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

    def _count(self, layer: int, below: bool) -> Ledger:
        """One layer, forward, backward and what is computed again; no backward below the first
        adapter."""
        modules = self.model.by_layer.get(layer, {})
        forward = Ledger()
        backward = Ledger()
        again = Ledger()
        mlp = self._moe if self.shape.is_moe(layer) else self._dense
        self._attention(forward, backward, modules)
        mlp(forward, backward, modules)
        for ledger in (forward, backward):  # two norms, two residuals
            self.traffic(ledger, "other", 10 * self.batch.own_tokens * self.shape.hidden * self.e)
        if self.layout.recompute == "full":
            again.take(forward, before="recompute ")
        elif self.layout.recompute == "selective":
            again.take(self._selective(modules, self.shape.is_moe(layer)), before="recompute ")
        over = self.machine.overhead
        whole = Ledger()
        waits = self.shape.is_moe(layer) and waits_before_all_to_all(self.p)
        whole.take(forward)
        self._host(whole, over.layer_forward_s, forward.total, waits)
        if below:
            return whole
        whole.take(backward)
        whole.take(again)
        # The layer's forward, run again in full, waits as the first one did, and splits the host's
        # work in two.
        host = over.layer_backward_s
        device = backward.total
        if self.layout.recompute == "full" and waits:
            self._host(whole, over.layer_forward_s, again.total, waits)
        else:
            host += over.layer_forward_s * (self.layout.recompute == "full")
            device += again.total
        self._host(whole, host, device, waits=False)
        return whole

    def _host(self, to: Ledger, host: float, device: float, waits: bool) -> None:
        """The host's time for a pass that keeps the device busy for ``device`` seconds.

        A GPU works on while the host issues what comes next, so that the host counts only as far as
        it is slower. But behind a wait the GPU has nothing left to do: what the host then issues is
        not assumed to be hidden.
        """
        over = self.machine.overhead
        if waits and over.hidden:
            to.add(BEHIND_WAITS, host, over.basis)
        else:
            to.add("host", max(0.0, host - device) if over.hidden else host, over.basis)

    def _adapter(self, ledgers: Iterable[Ledger], part: str, adapted: list[Adapted],
                 rows: tuple[float, float], sizes: tuple[float, float]) -> None:  # fmt: skip
        """A of ``rows[0]``, B of ``rows[1]``; twice in backward, for the input and for the factor
        itself."""
        rank = sum(a.rank for a in adapted)
        for ledger, times in zip(ledgers, (1, 2), strict=True):
            self.gemm(ledger, part, rows[0], rank, sizes[0], times)
            self.gemm(ledger, part, rows[1], sizes[1], rank, times)

    def _linear(
        self, forward: Ledger, backward: Ledger, part: str, adapted: list[Adapted], inner: float, *,
        column: bool
    ) -> None:  # fmt: skip
        """H to ``inner`` features, which are split (column): x is gathered and its gradient
        scattered. Back to H (row): y is scattered and its gradient gathered. Of an adapter h moves
        the same way, R wide."""
        b = self.batch
        h = self.shape.hidden
        rank = sum(a.rank for a in adapted)
        outputs, inputs = (inner, h) if column else (h, inner)
        there, back = (
            ("all_gather", "reduce_scatter") if column else ("reduce_scatter", "all_gather")
        )
        ways: tuple[tuple[Ledger, Kind], ...] = ((forward, there), (backward, back))
        for ledger, kind in ways:
            self.gemm(ledger, part, b.tokens, outputs, inputs)
            for width in (h, rank):
                self.collective(
                    ledger, f"tensor parallel {part}", kind, "tp", b.tokens * width * self.e
                )
        rows = (b.own_tokens, b.tokens) if column else (b.tokens, b.own_tokens)
        self._adapter((forward, backward), part, adapted, rows, (inputs, outputs))

    def _attention(
        self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]
    ) -> None:
        width, kv = attention_widths(self.shape, self.p)
        self._linear(
            forward,
            backward,
            "attention",
            modules.get("self_attention.linear_qkv", []),
            width + 2 * kv,
            column=True,
        )
        self._linear(
            forward,
            backward,
            "attention",
            modules.get("self_attention.linear_proj", []),
            width,
            column=False,
        )
        for ledger in (forward, backward):  # norms of q and k, rotary embeddings
            self.traffic(
                ledger, "attention", ROPE_PASSES * self.batch.tokens * (width + kv) * self.e
            )
        self._core_attention(forward, "attention")
        self._core_attention(backward, "attention", backward=True)

    def _core_attention(self, to: Ledger, part: str, backward: bool = False) -> None:
        width, kv = attention_widths(self.shape, self.p)
        b = self.batch
        rate = self.machine.attention_backward if backward else self.machine.attention
        d = self.shape.head_dim
        found = rate.at(b.samples, b.sequence, width // d, kv // d, d)
        to.add(part, attention_flops(b.samples, b.sequence, width) / found.value, found.basis)

    def _dense(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]) -> None:
        self._gated_mlp(forward, backward, modules, "mlp", self.shape.intermediate)

    def _gated_mlp(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]],
                   name: str, size: int) -> None:  # fmt: skip
        inner = size // self.p.tp
        self._linear(
            forward, backward, "mlp", modules.get(f"{name}.linear_fc1", []), 2 * inner, column=True
        )
        self._linear(
            forward, backward, "mlp", modules.get(f"{name}.linear_fc2", []), inner, column=False
        )
        self.traffic(forward, "mlp", 7 * self.batch.tokens * inner * self.e)
        self.traffic(backward, "mlp", 10 * self.batch.tokens * inner * self.e)

    def _moe(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]) -> None:
        """Router, dispatch, experts, combine; M H e and (T / t) k H e move through each sort and
        each all-to-all."""
        s = self.shape
        b = self.batch
        e = self.e
        sent = b.own_tokens * s.top_k * s.hidden * e
        received = b.rows * s.hidden * e
        hidden = s.hidden
        for ledger in (forward, backward):
            self.gemm(ledger, "dispatch", b.own_tokens, s.num_experts, hidden)
            self.traffic(
                ledger, "dispatch", ROUTER_PASSES * b.own_tokens * s.num_experts * STATISTIC
            )
            self.collective(
                ledger, "dispatch", "all_to_all", "ep", max(sent, received / self.p.etp), times=2
            )
            self.collective(ledger, "dispatch", "all_gather", "etp", received)
            self.collective(ledger, "dispatch", "reduce_scatter", "etp", received)
            # rows are written before the all-to-all, and summed behind it
            if self.p.ep * self.p.etp > 1:
                self.traffic(ledger, "dispatch", 2 * sent + 2 * b.own_tokens * hidden * e)
        router = modules.get("mlp.router", [])
        self._adapter(
            (forward, backward),
            "dispatch",
            router,
            (b.own_tokens, b.own_tokens),
            (hidden, s.num_experts),
        )
        self._experts(forward, backward, modules)
        if s.shared_intermediate:
            self._gated_mlp(forward, backward, modules, "mlp.shared_experts", s.shared_intermediate)

    def _experts(
        self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]
    ) -> None:
        """The passes of ``megalora_kernels.expert_mlp``: an adapter's second product rides on the
        base's; its first reads what another pass reads anyway, or reads it once more."""
        rows = self.batch.rows * self.e
        h = self.shape.hidden
        inner = self.shape.expert_intermediate // self.p.etp
        gate_up = modules.get("mlp.experts.gate_up", [])
        down = modules.get("mlp.experts.down", [])
        big = sum(a.rank for a in gate_up)
        small = sum(a.rank for a in down)
        self.grouped(forward, "experts", 2 * inner, h, big)
        self.grouped(forward, "experts", h, inner, small)
        # permute, SwiGLU, combine
        self.traffic(forward, "experts", rows * (2 * h + 3 * inner + big + small))
        self.grouped(backward, "experts", inner, h, small)
        self.grouped(backward, "experts", h, 2 * inner, big)
        self.traffic(backward, "experts", rows * (2 * h + 5 * inner + big + small))
        if gate_up or down:  # dS, dA and dB
            self.traffic(
                backward, "experts", rows * ((2 * inner + h) * bool(gate_up) + h * bool(down))
            )

    def _selective(self, modules: dict[str, list[Adapted]], is_moe: bool) -> Ledger:
        """Core attention, gate_up with its SwiGLU, a dense or shared MLP's whole forward."""
        s = self.shape
        again = Ledger()
        unused = Ledger()
        self._core_attention(again, "attention")
        if is_moe:
            inner = s.expert_intermediate // self.p.etp
            self.grouped(
                again,
                "experts",
                2 * inner,
                s.hidden,
                sum(a.rank for a in modules.get("mlp.experts.gate_up", [])),
            )
            self.traffic(again, "experts", 3 * inner * self.batch.rows * self.e)
        size = s.shared_intermediate if is_moe else s.intermediate
        if size:
            self._gated_mlp(again, unused, modules, "mlp.shared_experts" if is_moe else "mlp", size)
        return again

    def _head(self, to: Ledger) -> None:
        """Output layer and cross entropy."""
        b = self.batch
        vocab = self.shape.vocab // self.p.tp
        adapted = self.model.by_layer.get(None, {}).get("output_layer", [])
        forward = Ledger()
        backward = Ledger()
        self._linear(forward, backward, "head", adapted, vocab, column=True)
        self.traffic(forward, "head", LOSS_PASSES * b.tokens * vocab * STATISTIC)
        self.traffic(backward, "head", LOSS_PASSES / 2 * b.tokens * vocab * STATISTIC)
        to.take(forward)
        to.take(backward)

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


STATISTIC = 4
"""Bytes of a float32."""
