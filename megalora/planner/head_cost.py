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
"""Times that torch reads or writes the float32 logits of a chunk whenever they are computed:
widened, their maximum, less it, exponentials, their sum, a factor, rounded. Assumed, like the
next."""
READ_LOGITS = 1
"""The same by kernels, of logits in the model's dtype: read for what the loss needs of them."""
LOGITS_TO_GRADIENT = 2
"""The same where the gradient is written over them."""


class HeadCosts(LayerCosts):
    """Seconds of the head, beside those of layers."""

    def head_without_gradient(self) -> Ledger:
        """Log-probabilities of every token."""
        if self.shape.num_scores:
            return self._score_head()[0]
        vocab = self.shape.vocab // self.p.tp
        adapted = self.model.by_layer.get(None, {}).get("output_layer", [])
        forward = Ledger()
        self._logits(forward, vocab, READ_LOGITS)
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
        if adapted:
            self._logits(forward, vocab, READ_LOGITS)
            self._linear(forward, backward, "head", adapted, vocab, column=True, live=live)
            self.gemm(backward, "head", b.tokens, vocab, hidden)
            self.gemm(backward, "head", b.tokens, vocab, stacked_rank(adapted))
            self._logits(backward, vocab, LOGITS_TO_GRADIENT)
            return forward, backward
        self._logits(forward, vocab, READ_LOGITS + live * LOGITS_TO_GRADIENT)
        self._linear(forward, backward, "head", [], vocab, column=True, live=False)
        if live:
            self.gemm(forward, "head", b.tokens, hidden, vocab)
            moved = b.tokens * hidden * self.e
            self.collective(backward, "tensor parallel head", "reduce_scatter", "tp", moved)
        return forward, backward

    def _logits(self, to: Ledger, vocab: int, passes: int) -> None:
        """The loss of all tokens over logits that are there, by so many passes of kernels."""
        logits = self.batch.tokens * vocab
        if self.on_cpu:
            self.traffic(to, "head", LOSS_PASSES * logits * STATISTIC)
        else:
            self.traffic(to, "head", passes * logits * self.e)

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
