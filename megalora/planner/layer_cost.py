"""Count and price the work of one decoder layer, forward and backward.

A linear multiplies once forward and once backward, for the gradient of its input: the base is
frozen. Each adapter factor multiplies once more, for its own.

    T  tokens of a microbatch, S B     t, n  TP, ETP size     e  bytes per element
    M  rows of this rank's experts     q, g  features of query, key / t
    N  rows that this rank receives    R  sum of stacked ranks     m  microbatches of a step
"""

from collections.abc import Iterable

from megalora.lora.spec import Adapted, has_biases
from megalora.model.formats.augmented import Augmented
from megalora.planner.gpus import attention_flops
from megalora.planner.hardware import Kind
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import PAIR, STATISTIC
from megalora.planner.row_scaling import RowScaling
from megalora.planner.shared_factors import copied_elements
from megalora.planner.weights import attention_widths, stacked_rank

ROPE_PASSES = 8
"""Times that q and k are read or written for norms and rotary embeddings, forward and backward
each. Assumed."""
ROUTER_PASSES = 10
"""Times that the router's probabilities are read or written, forward and backward each. Assumed."""
BALANCE_PASSES = 6
"""The same for scores and factors of the loss that keeps experts evenly used. Assumed."""
GATED_FORWARD = 7
"""Times that I / t features of a token are read or written by silu(gate) * up in forward. Assumed,
like the next."""
GATED_BACKWARD = 10
"""The same of its backward."""
BIAS_PASSES = 2
"""Times that the output of a linear is read or written by the sum with biases of B. Assumed."""


EXPERTS = ("mlp.experts.gate_up", "mlp.experts.down")
"""Megatron modules of routed experts."""


class LayerCosts(RowScaling):
    """Seconds of the parts of a layer. Each method adds to the ledgers it is given."""

    def _adapter(self, ledgers: Iterable[Ledger], part: str, adapted: list[Adapted],
                 rows: tuple[float, float], sizes: tuple[float, float],
                 live: bool = True) -> None:  # fmt: skip
        """A of ``rows[0]``, B of ``rows[1]``; in backward once for the factor itself and once for
        its input, which A's gets only where it is ``live``. A0 needs no gradient itself, B0 gets
        one with B's."""
        rank = stacked_rank(adapted)
        trained = sum(a.rank for a in adapted)
        for ledger, own, live_input, of_b in zip(
            ledgers, (0, 1), (True, live), (1, 2), strict=True
        ):
            self.gemm(ledger, part, rows[0], trained, sizes[0], own + live_input)
            # A0 reads what dropout leaves, and what it takes away (``LoRAFactors.times_a``).
            reads = 2 if self.model.has_dropout else 1
            self.gemm(ledger, part, rows[0], rank - trained, sizes[0], reads * live_input)
            self.gemm(ledger, part, rows[1], sizes[1], rank, of_b)
        if rank:
            self._dropout(ledgers, part, rows[0] * sizes[0], live)

    def _dropout(
        self, ledgers: Iterable[Ledger], part: str, elements: float, live: bool = True
    ) -> None:
        """The copy that an A reads, and the way back: read, written, and the mask beside it. The
        gradient's sum with that of the base is made without dropout, too."""
        if not self.model.has_dropout:
            return
        for ledger, needed in zip(ledgers, (True, live), strict=True):
            if needed:
                self.traffic(ledger, part, elements * (2 * self.e + self.batch.mask_bytes))

    def _linear(
        self, forward: Ledger, backward: Ledger, part: str, adapted: list[Adapted], inner: float, *,
        column: bool, live: bool = True
    ) -> None:  # fmt: skip
        """H to ``inner`` features, which are split (column): x is gathered and its gradient
        scattered. Back to H (row): y is scattered and its gradient gathered. Of an adapter h moves
        the same way, R wide. Where the input needs no gradient (not ``live``), backward has the
        adapter's own work alone."""
        b = self.batch
        h = self.shape.hidden
        rank = stacked_rank(adapted)
        # What is H wide is split by tokens, what is `inner` wide by features: of an adapter the
        # factor on the H side meets a rank's own tokens, the other one all of them.
        if column:
            sizes = (h, inner)
            rows = (b.own_tokens, b.tokens)
            there: Kind = "all_gather"
            back: Kind = "reduce_scatter"
        else:
            sizes = (inner, h)
            rows = (b.tokens, b.own_tokens)
            there = "reduce_scatter"
            back = "all_gather"
        ways: list[tuple[Ledger, Kind]] = [(forward, there)]
        if live:
            ways.append((backward, back))
        inputs, outputs = sizes
        for ledger, kind in ways:
            self.gemm(ledger, part, b.tokens, outputs, inputs)
            for width in (h, rank):
                self.collective(
                    ledger, f"tensor parallel {part}", kind, "tp", b.tokens * width * self.e
                )
        self._adapter((forward, backward), part, adapted, rows, sizes, live)
        self.scale(forward, backward, part, adapted, rows[1] * outputs)
        if has_biases(adapted):
            self.traffic(forward, part, BIAS_PASSES * rows[1] * outputs * self.e)

    def attention(
        self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]
    ) -> None:
        """qkv, norms of q and k, rotary embeddings, core attention and o."""
        width, kv = attention_widths(self.shape, self.p)
        qkv = modules.get("self_attention.linear_qkv", [])
        o = modules.get("self_attention.linear_proj", [])
        self._linear(forward, backward, "attention", qkv, width + 2 * kv, column=True)
        self._linear(forward, backward, "attention", o, width, column=False)
        q_and_k = self.batch.tokens * (width + kv) * self.e
        for ledger in (forward, backward):
            self.traffic(ledger, "attention", ROPE_PASSES * q_and_k)
        self._core_attention(forward, "attention")
        self._core_attention(backward, "attention", backward=True)

    def _core_attention(self, to: Ledger, part: str, backward: bool = False) -> None:
        """Attention over all keys of the row, which the ranks that share it out gather, and the
        gradients of which they scatter. Early and late chunks together are as much work for each.
        """
        width, kv = attention_widths(self.shape, self.p)
        b = self.batch
        if self.p.cp > 1:
            keys_and_values = 2 * b.row_tokens * kv * self.e
            kind: Kind = "reduce_scatter" if backward else "all_gather"
            self.collective(to, f"context parallel {part}", kind, "cp", keys_and_values)
            # Read and written once more to bring chunks into the order of the row.
            self.traffic(to, part, 2 * keys_and_values)
        rate = self.machine.attention_backward if backward else self.machine.attention
        d = self.shape.head_dim
        found = rate.at(b.samples, b.sequence, width // d, kv // d, d)
        flops = attention_flops(b.samples, b.sequence, width) / self.p.cp
        to.add(part, flops / found.value, found.basis)

    def dense(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]) -> None:
        self._gated_mlp(forward, backward, modules, "mlp", self.shape.intermediate)

    def _gated_mlp(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]],
                   name: str, size: int) -> None:  # fmt: skip
        """fc1 = [gate | up], silu(gate) * up, fc2, over ``size`` features before TP splits them."""
        inner = size // self.p.tp
        fc1 = modules.get(f"{name}.linear_fc1", [])
        fc2 = modules.get(f"{name}.linear_fc2", [])
        self._linear(forward, backward, "mlp", fc1, 2 * inner, column=True)
        self._linear(forward, backward, "mlp", fc2, inner, column=False)
        product = self.batch.tokens * inner * self.e
        self.traffic(forward, "mlp", GATED_FORWARD * product)
        self.traffic(backward, "mlp", GATED_BACKWARD * product)

    def moe(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]) -> None:
        """Router, dispatch, experts, combine; a token's H e move once to each rank that has experts
        of it and back, N H e to the fullest rank."""
        s = self.shape
        b = self.batch
        own = b.own_tokens
        sent = b.sent * s.hidden * self.e
        received = b.received * s.hidden * self.e
        for ledger in (forward, backward):
            self.gemm(ledger, "dispatch", own, s.num_experts, s.hidden)
            probabilities = own * s.num_experts * STATISTIC
            self.traffic(ledger, "dispatch", ROUTER_PASSES * probabilities)
            self.traffic(ledger, "dispatch", b.balanced * BALANCE_PASSES * probabilities)
            # Out to the experts and back. It ends when the fullest rank has its rows, which ETP
            # ranks receive in equal parts and then gather.
            self.collective(
                ledger, "dispatch", "all_to_all", "ep", max(sent, received / self.p.etp), times=2
            )
            # Probabilities and places out, the probabilities' gradients back.
            self.collective(ledger, "dispatch", "all_to_all", "ep", own * s.top_k * PAIR)
            self.collective(ledger, "dispatch", "all_gather", "etp", received)
            self.collective(ledger, "dispatch", "reduce_scatter", "etp", received)
            # Rows are written before the all-to-all, and summed by token behind it.
            if self.p.ep * self.p.etp > 1:
                self.traffic(ledger, "dispatch", 2 * sent + 2 * own * s.hidden * self.e)
        if b.balanced:
            # How often each sequence, and filler, chose each expert.
            counts = (b.samples + 1) * s.num_experts * STATISTIC
            for group in ("tp", "cp"):
                self.collective(forward, "dispatch", "all_reduce", group, counts)
        router = modules.get("mlp.router", [])
        ways = (forward, backward)
        self._adapter(ways, "dispatch", router, (own, own), (s.hidden, s.num_experts))
        self._experts(forward, backward, modules)
        if s.shared_intermediate:
            self._shared_expert(forward, backward, modules)

    def _experts(
        self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]
    ) -> None:
        """The passes of ``megalora_kernels.expert_mlp``: an adapter's second product rides on the
        base's; its first, and the gradients of its factors, lie in passes that read the rows
        anyway or once more."""
        rows = self.batch.rows * self.e
        h = self.shape.hidden
        inner = self.shape.expert_intermediate // self.p.etp
        big = stacked_rank(modules.get("mlp.experts.gate_up", []))
        small = stacked_rank(modules.get("mlp.experts.down", []))
        # What experts share is copied for each of them, and the copies' gradients are summed.
        for module in EXPERTS:
            copied = copied_elements(self.model, self.p, modules.get(module, []))
            for ledger in (forward, backward):
                self.traffic(ledger, "experts", copied * self.e)
        self._gate_up(forward, modules)
        self.grouped(forward, "experts", h, inner, self._columns(small))
        self.hidden_gemm(forward, self.batch.rows, small, inner)
        # Permute and combine H each; SwiGLU reads gate and up and writes their product.
        self.traffic(forward, "experts", rows * (2 * h + 3 * inner + big + small))

        # Gradients of the inputs: of down's [rows, I / n], of gate_up's [rows, H].
        self.grouped(backward, "experts", inner, h, self._columns(small))
        self.grouped(backward, "experts", h, 2 * inner, self._columns(big))
        # dS of down and of gate_up, dA and dB of both; each B of gate and up meets its own half, or
        # with dropout, as parts of one matrix, the zeros of the other as well.
        halves = 2 if self.model.has_dropout else 1
        self.hidden_gemm(backward, self.batch.rows, small, 2 * h + inner)
        self.hidden_gemm(backward, self.batch.rows, big, 2 * halves * inner + h)
        # Permute and combine; SwiGLU's backward reads gate, up and the gradient and writes two.
        self.traffic(backward, "experts", rows * (2 * h + 5 * inner + big + small))
        # Once more over the rows for dS, dA and dB of the adapters that are there.
        once_more = 0
        if big:
            once_more += 2 * inner + h
        if small:
            once_more += h
        self.traffic(backward, "experts", rows * once_more)
        self._experts_dropout((forward, backward), big, small, h, inner)
        self.scale_experts(forward, backward, modules, self._columns(small))

    def _experts_dropout(
        self, ledgers: tuple[Ledger, Ledger], big: int, small: int, h: int, inner: int
    ) -> None:
        """What dropout adds to experts, which are not one node with it: copies of the permuted rows
        and of SwiGLU's result, which A reads apart from the base; in backward the gradients of
        both, written and summed with the base's."""
        if not self.model.has_dropout:
            return
        forward, backward = ledgers
        for rank, width in ((big, h), (small, inner)):
            if rank:
                elements = self.batch.rows * width
                self._dropout(ledgers, "experts", elements)
                self.traffic(forward, "experts", elements * self.e)
                # A's product is written; the sum reads two and writes one.
                self.traffic(backward, "experts", 4 * elements * self.e)

    def _gate_up(self, to: Ledger, modules: dict[str, list[Adapted]]) -> None:
        """[gate | up] and S: beside the weight B is one matrix, whose columns all rows meet; alone,
        gate's and up's B meet their own ranks."""
        h = self.shape.hidden
        inner = self.shape.expert_intermediate // self.p.etp
        rank = stacked_rank(modules.get("mlp.experts.gate_up", []))
        # Each of 2 I / n outputs is gate's or up's: alone, it meets half of the stacked ranks, but
        # not where both B's are one matrix.
        is_one = self.has_room or self.model.has_dropout
        columns = self._columns(rank) if is_one else rank / 2
        self.grouped(to, "experts", 2 * inner, h, columns)
        self.hidden_gemm(to, self.batch.rows, rank, h)

    def _columns(self, rank: int) -> float:
        """Columns that an adapter of this rank adds to the inputs of its second product."""
        return Augmented(rank).room if self.has_room else rank

    def _shared_expert(
        self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]
    ) -> None:
        """A gated MLP, and the gate of its output, if it has one: one feature of each token."""
        size = self.shape.shared_intermediate
        self._gated_mlp(forward, backward, modules, "mlp.shared_experts", size)
        for ledger in (forward, backward):
            self.hidden_gemm(
                ledger, self.batch.own_tokens, self.shape.shared_gate, self.shape.hidden
            )

    def selective(self, modules: dict[str, list[Adapted]], is_moe: bool) -> Ledger:
        """What selective recomputation runs again: core attention, gate_up with its SwiGLU, a dense
        or shared MLP's whole forward."""
        s = self.shape
        again = Ledger()
        unused = Ledger()
        self._core_attention(again, "attention")
        if is_moe:
            inner = s.expert_intermediate // self.p.etp
            if self.model.has_dropout and (modules.keys() & EXPERTS):
                # Without a node of their own experts cannot drop [gate | up] alone.
                self._experts(again, unused, modules)
            else:
                self._gate_up(again, modules)
                self.traffic(again, "experts", 3 * inner * self.batch.rows * self.e)
            if s.shared_intermediate:
                self._shared_expert(again, unused, modules)
        else:
            self.dense(again, unused, modules)
        return again
