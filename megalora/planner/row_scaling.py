"""What DoRA adds to the time of a step: scaling rows in every pass, and norms once a step."""

from megalora.lora.spec import SHARDINGS, Adapted, has_magnitudes
from megalora.planner.decode_cost import Decoding
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import STATISTIC
from megalora.planner.weights import Chunk, stacked_rank

SCALED_FORWARD = 2
"""Times that the output of a linear with DoRA is read or written by its scaling. Assumed, like the
next."""
SCALED_BACKWARD = 6
"""The same of the gradients of the output and of the magnitudes. Routed experts' gate and up also
make their outputs again, and gradients are scaled in place: as many."""
DOWN_BACKWARD = 4
"""The same of routed experts' down, whose output is computed again: it is read and overwritten, and
the output's gradient is read twice."""


class RowScaling(Decoding):
    """Adds what DoRA costs to the ledgers it is given."""

    def scale(
        self, forward: Ledger, backward: Ledger, part: str, adapted: list[Adapted], elements: float
    ) -> None:
        """The rows of a dense linear's output, of so many elements."""
        if has_magnitudes(adapted):
            self.traffic(forward, part, SCALED_FORWARD * elements * self.e)
            self.traffic(backward, part, SCALED_BACKWARD * elements * self.e)

    def scale_experts(
        self, forward: Ledger, backward: Ledger, modules: dict[str, list[Adapted]], columns: float
    ) -> None:
        """The rows of routed experts' outputs.

        Args:
            columns: those that down's adapter adds to the inputs of its product.
        """
        # I / n features of an expert, and the M rows of this rank's experts.
        inner = self.shape.expert_intermediate // self.p.etp
        rows = self.batch.rows
        gate_up = modules.get("mlp.experts.gate_up", [])
        down = modules.get("mlp.experts.down", [])
        self.scale(forward, backward, "experts", gate_up, rows * 2 * inner)
        if not has_magnitudes(down):
            return
        hidden = self.shape.hidden
        self.traffic(forward, "experts", SCALED_FORWARD * rows * hidden * self.e)
        self.traffic(backward, "experts", DOWN_BACKWARD * rows * hidden * self.e)
        # SwiGLU and down once more, without the output being kept: it would be the largest of all.
        self.grouped(backward, "experts", hidden, inner, columns)
        self.hidden_gemm(backward, rows, stacked_rank(down), inner)
        self.traffic(backward, "experts", 3 * inner * rows * self.e)

    def norms(self, to: Ledger, chunk: Chunk) -> None:
        """|W + s B A| of each adapted row, once a step: ``W A^T`` reads the weight, and is as much
        work as one more token for each row of it through A."""
        for layer in chunk.layers:
            for adapted in self.model.modules_of(layer).values():
                if not has_magnitudes(adapted):
                    continue
                sizes = {"tp": self.p.tp, "etp": self.p.etp}
                first = adapted[0]
                group_size = sizes[first.group("B")]
                experts = max(1, first.num_experts // self.p.ep)
                _, inputs = first.shard_shape("A", group_size)
                # Of all experts on the rank.
                outputs = 0
                for a in adapted:
                    outputs += experts * a.shard_shape("B", group_size)[0]
                self.gemm(to, "optimizer", outputs, stacked_rank(adapted), inputs)
                self.traffic(to, "optimizer", outputs * inputs * self.e)
                # Where columns of the weight are split, each rank has part of every sum.
                if SHARDINGS[first.projection.kind].split("A") is not None:
                    squares = outputs * STATISTIC
                    self.collective(to, "optimizer", "all_reduce", first.group("A"), squares)
