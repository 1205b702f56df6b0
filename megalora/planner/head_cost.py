"""Count and price the work of a model's end, forward and backward: of lm_head with its loss, or of
a score head.

Symbols as in ``layer_cost.py``.
"""

from megalora.planner.activations import head_input_needs_gradient
from megalora.planner.layer_cost import LayerCosts
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import STATISTIC
from megalora.planner.weights import stacked_rank

LOSS_PASSES = 9
"""Times that the float32 logits of a chunk are read or written whenever they are computed: widened,
their maximum, less it, exponentials, their sum, a factor, rounded. Assumed."""


class HeadCosts(LayerCosts):
    """Seconds of the head, beside those of layers."""

    def head_without_gradient(self) -> Ledger:
        """Log-probabilities of every token."""
        if self.shape.num_scores:
            return self._score_head()[0]
        vocab = self.shape.vocab // self.p.tp
        adapted = self.model.by_layer.get(None, {}).get("output_layer", [])
        forward = Ledger()
        self.traffic(forward, "head", LOSS_PASSES * self.batch.tokens * vocab * STATISTIC)
        self._linear(forward, Ledger(), "head", adapted, vocab, column=True, live=False)
        return forward

    def head(self) -> tuple[Ledger, Ledger]:
        """Output layer and log-probabilities, forward and backward, of which every token is taken
        for a target.

        A frozen layer makes the gradient of its input in forward, where the logits are; one with an
        adapter computes the logits again in backward.
        """
        if self.shape.num_scores:
            return self._score_head()
        b = self.batch
        hidden = self.shape.hidden
        vocab = self.shape.vocab // self.p.tp
        adapted = self.model.by_layer.get(None, {}).get("output_layer", [])
        forward = Ledger()
        backward = Ledger()
        live = head_input_needs_gradient(self.model, self.layout)
        passes = LOSS_PASSES * b.tokens * vocab * STATISTIC
        self.traffic(forward, "head", passes)
        if adapted:
            self._linear(forward, backward, "head", adapted, vocab, column=True, live=live)
            self.gemm(backward, "head", b.tokens, vocab, hidden)
            self.gemm(backward, "head", b.tokens, vocab, stacked_rank(adapted))
            self.traffic(backward, "head", passes)
            return forward, backward
        self._linear(forward, backward, "head", [], vocab, column=True, live=False)
        if live:
            self.gemm(forward, "head", b.tokens, hidden, vocab)
            moved = b.tokens * hidden * self.e
            self.collective(backward, "tensor parallel head", "reduce_scatter", "tp", moved)
        return forward, backward

    def _score_head(self) -> tuple[Ledger, Ledger]:
        """C scores of the rank's own tokens; in backward the gradients of the weight and, where
        anything below is adapted, of the input. What the loss does with one token of a sequence is
        not worth counting."""
        b = self.batch
        hidden = self.shape.hidden
        num_scores = self.shape.num_scores
        forward = Ledger()
        backward = Ledger()
        live = head_input_needs_gradient(self.model, self.layout)
        self.gemm(forward, "head", b.own_tokens, num_scores, hidden)
        self.gemm(backward, "head", b.own_tokens, num_scores, hidden, 1 + live)
        # Scores of all tokens come to every rank in float32; backward takes a slice.
        scores = b.tokens * num_scores * STATISTIC
        self.collective(forward, "tensor parallel head", "all_gather", "tp", scores)
        return forward, backward
