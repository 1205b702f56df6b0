"""Count the work of one decoder layer and of the head, forward and backward, and price it.

A linear multiplies once forward and once backward, for the gradient of its input: the base is
frozen. Each adapter factor multiplies once more, for its own.

    T  tokens of a microbatch, S B     t, n  TP, ETP size     e  bytes per element
    M  rows of this rank's experts     q, g  features of query, key / t
    R  sum of stacked ranks            m  microbatches of a step
"""

from collections.abc import Iterable

from megalora.lora.spec import Adapted
from megalora.model.formats.augmented import Augmented
from megalora.planner.activations import head_input_needs_gradient
from megalora.planner.gpus import attention_flops
from megalora.planner.hardware import Kind
from megalora.planner.ledger import Ledger
from megalora.planner.prices import Prices
from megalora.planner.weights import attention_widths

STATISTIC = 4
"""Bytes of a float32."""
ROPE_PASSES = 8
"""Times that q and k are read or written, forward and backward each. Assumed."""
LOSS_PASSES = 6
"""Times that the logits are. Assumed."""
ROUTER_PASSES = 10
"""Times that the router's probabilities are. Assumed."""


class LayerCosts(Prices):
    """Seconds of the parts of a layer. Each method adds to the ledgers it is given."""

    def _adapter(self, ledgers: Iterable[Ledger], part: str, adapted: list[Adapted],
                 rows: tuple[float, float], sizes: tuple[float, float],
                 live: bool = True) -> None:  # fmt: skip
        """A of ``rows[0]``, B of ``rows[1]``; in backward once for the factor itself and once for
        its input, which A's gets only where it is ``live``."""
        rank = sum(a.rank for a in adapted)
        for ledger, of_a, of_b in zip(ledgers, (1, 1 + live), (1, 2), strict=True):
            self.gemm(ledger, part, rows[0], rank, sizes[0], of_a)
            self.gemm(ledger, part, rows[1], sizes[1], rank, of_b)

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
        rank = sum(a.rank for a in adapted)
        outputs, inputs = (inner, h) if column else (h, inner)
        there, back = (
            ("all_gather", "reduce_scatter") if column else ("reduce_scatter", "all_gather")
        )
        ways: tuple[tuple[Ledger, Kind], ...] = ((forward, there), (backward, back))
        for ledger, kind in ways if live else ways[:1]:
            self.gemm(ledger, part, b.tokens, outputs, inputs)
            for width in (h, rank):
                self.collective(
                    ledger, f"tensor parallel {part}", kind, "tp", b.tokens * width * self.e
                )
        rows = (b.own_tokens, b.tokens) if column else (b.tokens, b.own_tokens)
        self._adapter((forward, backward), part, adapted, rows, (inputs, outputs), live)

    def attention(
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

    def dense(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]) -> None:
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

    def moe(self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]]) -> None:
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
        gate_up = modules.get("mlp.experts.gate_up", [])
        down = modules.get("mlp.experts.down", [])
        big = sum(a.rank for a in gate_up)
        small = sum(a.rank for a in down)
        self._gate_up(forward, modules)
        self.grouped(forward, "experts", h, inner, self._columns(small))
        self.hidden_gemm(forward, self.batch.rows, small, inner)
        # permute, SwiGLU, combine
        self.traffic(forward, "experts", rows * (2 * h + 3 * inner + big + small))
        self.grouped(backward, "experts", inner, h, self._columns(small))
        self.grouped(backward, "experts", h, 2 * inner, self._columns(big))
        # dS of down and of gate_up, dA and dB of both; each B of gate and up meets its own half
        self.hidden_gemm(backward, self.batch.rows, small, 2 * h + inner)
        self.hidden_gemm(backward, self.batch.rows, big, 2 * inner + h)
        self.traffic(backward, "experts", rows * (2 * h + 5 * inner + big + small))
        if gate_up or down:  # dS, dA and dB
            self.traffic(
                backward, "experts", rows * ((2 * inner + h) * bool(gate_up) + h * bool(down))
            )

    def _gate_up(self, to: Ledger, modules: dict[str, list[Adapted]]) -> None:
        """[gate | up] and S: beside the weight B is one matrix, whose columns all rows meet; alone,
        gate's and up's B meet their own ranks."""
        h = self.shape.hidden
        inner = self.shape.expert_intermediate // self.p.etp
        rank = sum(a.rank for a in modules.get("mlp.experts.gate_up", []))
        columns = self._columns(rank) if self.has_room else rank / 2
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
        """Core attention, gate_up with its SwiGLU, a dense or shared MLP's whole forward."""
        s = self.shape
        again = Ledger()
        unused = Ledger()
        self._core_attention(again, "attention")
        if is_moe:
            inner = s.expert_intermediate // self.p.etp
            self._gate_up(again, modules)
            self.traffic(again, "experts", 3 * inner * self.batch.rows * self.e)
            if s.shared_intermediate:
                self._shared_expert(again, unused, modules)
        else:
            self.dense(again, unused, modules)
        return again

    def head(self) -> tuple[Ledger, Ledger]:
        """Output layer and cross entropy, forward and backward."""
        b = self.batch
        vocab = self.shape.vocab // self.p.tp
        adapted = self.model.by_layer.get(None, {}).get("output_layer", [])
        forward = Ledger()
        backward = Ledger()
        live = head_input_needs_gradient(self.model, self.layout)
        self._linear(forward, backward, "head", adapted, vocab, column=True, live=live)
        self.traffic(forward, "head", LOSS_PASSES * b.tokens * vocab * STATISTIC)
        self.traffic(backward, "head", LOSS_PASSES / 2 * b.tokens * vocab * STATISTIC)
        return forward, backward
