"""Bugs in what the planner says of layers recomputed in part, and in recomputing them. The same
form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

LAYERS_TEST = "tests/planner/test_recompute_layers.py"

# fmt: off
PLAN_BUGS: tuple[Bug, ...] = (
    bug(0, "recomputed layers counted anew in every chunk", "megalora/model/recompute.py",
        "            level = level_of(recompute, position)\n",
        "            level = level_of(recompute, i)\n", f"{LAYERS_TEST} through_the_chunks"),
    bug(0, "layers planned as recomputed in every chunk", "megalora/planner/weights.py",
        "min(max(recompute.layers - self.layers_before, 0), num_layers)",
        "min(recompute.layers, num_layers)", f"{LAYERS_TEST} that_are_wrapped"),
    bug(0, "what the layers above kept still there below", "megalora/planner/pass_bytes.py",
        "        freed += kept[i]\n", "        freed += 0 * kept[i]\n", f"{LAYERS_TEST} peak"),
    bug(0, "one recomputed layer more than needed", "megalora/planner/recompute_layers.py",
        "    while enough - too_few > 1:\n", "    while enough - too_few > 2:\n",
        f"{LAYERS_TEST} fewest_layers"),
)
# fmt: on
