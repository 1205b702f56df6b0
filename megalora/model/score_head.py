"""The score head of a classifier or a reward model: in place of lm_head, a few numbers for each
token.

    scores = x W^T        W: score.weight [C, H], as ``...ForSequenceClassification`` has it

Legend: S sequence, H hidden, C labels, /t divided over the tensor-parallel group.

tensor    shape on one rank   across TP           gradient across TP
x         [S/t, 1, H]         dim 0               whole
weight    [C, H]              replicated          partial: each rank saw S/t tokens
scores    [S, 1, C]           replicated          whole on each rank
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.comm import gather_alike


class ScoreHead(nn.Module):
    """Stands where Megatron has its output layer. Every rank scores its own tokens, so that C
    numbers a token travel instead of H."""

    def __init__(self, weight_CH: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_CH)
        self.group = group

    def forward(self, hidden_S1H: Tensor) -> Tensor:
        """``[S, 1, C]`` scores of all tokens, float32 at least, on every rank."""
        # [S/t, 1, C]: the rank's own tokens.
        scores_S1C = F.linear(hidden_S1H, self.weight)
        wide = torch.promote_types(scores_S1C.dtype, torch.float32)
        # Every rank goes on to the same loss: backward takes the rank's slice. To add them up, as
        # before a weight that is split, would make every gradient of the model t times too large.
        return gather_alike(scores_S1C.to(wide), self.group)
