"""Bugs in the loss that keeps experts evenly used. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

BALANCE = "megalora/model/balance.py"
INPUTS = "megalora/train/inputs.py"
GRID = "tests/parity/test_grid.py balanced"

BALANCE_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "choices of a sequence counted on one tensor-parallel rank",
        BALANCE,
        "for group in (self.groups.tp, self.groups.cp):",
        "for group in (self.groups.cp,):",
        GRID,
    ),
    bug(
        0,
        "choices of a sequence counted on one context-parallel rank",
        BALANCE,
        "for group in (self.groups.tp, self.groups.cp):",
        "for group in (self.groups.tp,):",
        GRID,
    ),
    bug(
        0,
        "filler is balanced",
        INPUTS,
        "pieces.append(torch.tensor([*lengths.tolist(), 0]))",
        "pieces.append(torch.tensor([*lengths.tolist(), batch.filler]))",
        GRID,
    ),
    bug(
        0,
        "each tensor-parallel rank takes the first tokens of the row for its own",
        INPUTS,
        "part_of_row.chunk(part.tp_size)[part.tp_rank]",
        "part_of_row.chunk(part.tp_size)[0]",
        GRID,
    ),
    bug(
        0,
        "unevenness is a mean over a rank's own sequences",
        BALANCE,
        "        dist.all_reduce(number, group=self.groups.dp)\n",
        "",
        GRID,
    ),
    bug(
        0,
        "what is recomputed is reported twice",
        BALANCE,
        "        if self._in_forward:\n",
        "        if self._in_forward or self._row is not None:\n",
        GRID,
    ),
    bug(
        0,
        "a recomputed layer is balanced by the row that went forward last",
        BALANCE,
        "        self._row = getattr(",
        "        if self._in_forward:\n            self._row = getattr(",
        GRID,
    ),
    bug(
        0,
        "sigmoids that do not add up to 1 are balanced",
        BALANCE,
        "return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)",
        "return scores_TE",
        GRID,
    ),
    bug(
        0,
        "the mean of scores is a sum",
        BALANCE,
        "lengths_Q.clamp(min=1).square())",
        "lengths_Q.clamp(min=1))",
        GRID,
    ),
    bug(
        0,
        "the planner forgets what balancing keeps",
        "megalora/planner/mlp_activations.py",
        "    if mlp.batch.balanced:\n",
        "    if False:\n",
        "tests/planner/test_peak.py balanced",
    ),
    bug(
        0,
        "a dense model's routing is balanced in silence",
        "megalora/model/shape.py",
        "not coefficient or bool(self.moe_layers)",
        "True",
        "tests/train/test_balance.py",
    ),
)
