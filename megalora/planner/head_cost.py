"""Count and price the work of a model's end, forward and backward: of lm_head with its loss, or of
a score head.

Symbols as in ``layer_cost.py``.
"""

from megalora.planner.activations import head_input_needs_gradient
from megalora.planner.head_bytes import head_is_trained
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import STATISTIC
from megalora.planner.teacher import PlannedTeacher
from megalora.planner.weight_gradients import WeightGradients
from megalora.planner.weights import stacked_rank

LOSS_PASSES = 9
"""Times that torch reads or writes the float32 logits of a chunk whenever they are computed:
widened, their maximum, less it, exponentials, their sum, a factor, rounded. Assumed, like the
next."""
READ_LOGITS = 1
"""The same by kernels, of logits in the model's dtype: read for what the loss needs of them."""
LOGITS_TO_GRADIENT = 2
"""The same where the gradient is written over them."""
DISTANCE_PASSES = {"forward": 17, "reverse": 17, "jsd": 33}
"""The same beside a teacher, of both models' logits together, by the distance: widened, their
log-probabilities, terms and sums. Assumed, like the next two."""
FILE_PASSES = 8
"""The same beside the tokens of a file."""
SCALED_PASSES = 4
"""What a temperature adds to it: a copy of both models' logits."""


class HeadCosts(WeightGradients):
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

    def last_hidden(self) -> Ledger:
        """Hidden states of every token, gathered and copied to where they stay."""
        forward = Ledger()
        hidden = self.batch.tokens * self.shape.hidden * self.e
        self.collective(forward, "tensor parallel head", "all_gather", "tp", hidden)
        self.traffic(forward, "head", 2 * hidden)
        return forward

    def _beside_teacher(self, teacher: PlannedTeacher) -> tuple[Ledger, Ledger]:
        """Logits of the model and of its teacher, which backward makes anew, and the distance."""
        b = self.batch
        hidden = self.shape.hidden
        vocab = self.shape.vocab // self.p.tp
        adapted = self.model.by_layer.get(None, {}).get("output_layer", [])
        forward = Ledger()
        backward = Ledger()
        # The gradient of x is made in any case, and with it those of h and B.
        self._linear(forward, backward, "head", adapted, vocab, column=True, live=True)
        self.gemm(backward, "head", b.tokens, vocab, hidden)
        self.gemm(backward, "head", b.tokens, vocab, stacked_rank(adapted))
        if not teacher.top:
            shape = teacher.shape or self.shape
            for ledger in (forward, backward):
                self.gemm(ledger, "head", b.tokens, vocab, shape.hidden)
        passes = FILE_PASSES if teacher.top else DISTANCE_PASSES[teacher.divergence]
        passes += SCALED_PASSES * teacher.is_scaled
        once = passes * b.tokens * vocab * STATISTIC
        self.traffic(forward, "head", once)
        # The same again, and the gradients.
        self.traffic(backward, "head", 2 * once)
        return forward, backward

    def head(self) -> tuple[Ledger, Ledger]:
        """Output layer and log-probabilities, forward and backward, of which every token is taken
        for a target.

        A frozen layer makes the gradient of its input in forward, where the logits are; one with an
        adapter, or that is trained, computes the logits again in backward.
        """
        if self.shape.num_scores:
            return self._score_head()
        if self.teacher is not None:
            return self._beside_teacher(self.teacher)
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
        if head_is_trained(self.model):
            self._logits(forward, vocab, READ_LOGITS)
            self._linear(forward, backward, "head", [], vocab, column=True, live=live)
            self.gemm(backward, "head", b.tokens, vocab, hidden)
            self._logits(backward, vocab, LOGITS_TO_GRADIENT)
            self.of_head(forward, backward)
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
