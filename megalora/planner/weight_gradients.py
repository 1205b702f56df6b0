"""Count and price the gradients of weights that are trained whole, and of trained rows.

Symbols as in ``layer_cost.py``; V vocabulary, K trained rows.
"""

import math

from megalora.model.head_chunk import CHUNK_BYTES, bytes_per_logit, chunk_tokens
from megalora.model.projections import O_PROJ
from megalora.planner.layer_cost import BIAS_PASSES, LayerCosts
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import STATISTIC
from megalora.planner.weights import attention_widths


class WeightGradients(LayerCosts):
    """Adds what they cost to the ledgers it is given."""

    def of_layer(self, to: Ledger, layer: int) -> None:
        """Norms read their input and their output's gradient once more; the router has a product of
        its own tokens, E H. A linear's trained biases read its output's gradient, and its output is
        read and written once more for them."""
        s = self.shape
        own = self.batch.own_tokens
        width, kv = attention_widths(s, self.p)
        heads = {
            "self_attention.q_layernorm": self.batch.tokens * width,
            "self_attention.k_layernorm": self.batch.tokens * kv,
        }
        biased: set[str] = set()
        for weight in self.model.whole.get(layer, []):
            if weight.is_bias:
                biased.add(weight.path)
            elif weight.path == "mlp.router":
                self.gemm(to, "dispatch", s.num_experts, s.hidden, own)
            elif weight.path in heads:
                self.traffic(to, "attention", 2 * heads[weight.path] * self.e)
            else:
                self.traffic(to, "other", 2 * own * s.hidden * self.e)
        # Once for q, k and v, which are one linear.
        for path in biased:
            elements = own * s.hidden if path == O_PROJ else self.batch.tokens * (width + 2 * kv)
            self.traffic(to, "attention", (1 + BIAS_PASSES) * elements * self.e)

    def of_embedding(self, to: Ledger) -> None:
        """The output's gradient, which comes from all ranks of TP, is added to a gradient of V / t
        rows that begins as zeros. Of trained rows each rank adds up its own tokens'."""
        if not self.model.trains_embedding:
            return
        hidden = self.shape.hidden * self.e
        if self.shape.tokens:
            self.traffic(to, "other", 3 * self.batch.own_tokens * hidden)
            return
        gathered = self.batch.tokens * hidden
        self.collective(to, "tensor parallel other", "all_gather", "tp", gathered)
        self.traffic(to, "other", 2 * gathered)
        elements = self.shape.vocab // self.p.tp * self.shape.hidden
        # Zeros are written.
        self.traffic(to, "other", elements * self.e)
        self._accumulate(to, "other", elements)

    def of_head(self, forward: Ledger, backward: Ledger) -> None:
        """The product for V / t rows, of which each chunk's part is added to a float32 sum; K rows
        have a product of their own in forward, and in backward that again, one for their gradient
        and one for the input's."""
        b = self.batch
        hidden = self.shape.hidden
        if self.shape.tokens:
            rows = len(self.shape.tokens)
            self.gemm(forward, "head", b.tokens, rows, hidden)
            self.gemm(backward, "head", b.tokens, rows, hidden, 3)
            return
        vocab = self.shape.vocab // self.p.tp
        self.gemm(backward, "head", vocab, hidden, b.tokens)
        elements = vocab * hidden
        width = bytes_per_logit(self.e, by_kernel=not self.on_cpu)
        chunks = math.ceil(b.tokens / chunk_tokens(CHUNK_BYTES, vocab, width))
        # A chunk's part is written and read, the sum is read and written.
        self.traffic(backward, "head", chunks * elements * 2 * (self.e + STATISTIC))
        # Rounded to the dtype of the weight.
        self.traffic(backward, "head", elements * (STATISTIC + self.e))
        self._accumulate(backward, "head", elements)

    def _accumulate(self, to: Ledger, part: str, elements: int) -> None:
        """A microbatch's gradient is read and added to the step's, in float32. Of adapters it is
        not worth counting."""
        self.traffic(to, part, elements * (self.e + 2 * STATISTIC))
