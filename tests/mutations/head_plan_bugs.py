"""Bugs in what the planner and the benchmark know of score heads, teachers and passes before a
step's own. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

WEIGHTS = "megalora/planner/weights.py"
HEAD_BYTES = "megalora/planner/head_bytes.py"
HEAD_COST = "megalora/planner/head_cost.py"
SAMPLES = "megalora/bench/samples.py"
DRY = "tests/planner/test_dryrun.py score_head"
PEAK = "tests/planner/test_peak.py classify"
COST = "tests/planner/test_cost.py score_head"
BENCH = "tests/bench/test_objectives.py"

HEAD_PLAN_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "lm_head planned beside the score head",
        WEIGHTS,
        "if not (is_tied or shape.num_scores):",
        "if not is_tied:",
        DRY,
    ),
    bug(
        0,
        "a score head that no adapter count has",
        WEIGHTS,
        "total += AdapterCount(dense=n, dense_padded=n + -n % ALIGNMENT)",
        "total += AdapterCount(dense_padded=n + -n % ALIGNMENT)",
        DRY,
    ),
    bug(
        0,
        "a score head's gradient summed without a table",
        WEIGHTS,
        "if layer is None and p.tp > 1:",
        "if layer is None and p.tp > 9:",
        "tests/planner/test_memory.py score_head",
    ),
    bug(
        0,
        "the score head's input not kept",
        HEAD_BYTES,
        "return 2 * hidden + batch.own_tokens * STATISTIC",
        "return hidden + batch.own_tokens * STATISTIC",
        PEAK,
    ),
    bug(
        0,
        "a score head planned with the logits of lm_head",
        HEAD_BYTES,
        "        return _scores_bytes(model, layout, work, chunk)\n",
        "        pass\n",
        PEAK,
    ),
    bug(
        0,
        "no gradient of the score head's weight",
        HEAD_COST,
        "b.own_tokens, num_scores, hidden, 1 + live)",
        "b.own_tokens, num_scores, hidden, live)",
        COST,
    ),
    bug(
        0,
        "scores that travel in the dtype of the model",
        HEAD_COST,
        "scores = b.tokens * num_scores * STATISTIC",
        "scores = b.tokens * num_scores * self.e",
        COST,
    ),
    bug(
        0,
        "a benchmark of a score head that scores every token",
        SAMPLES,
        "mask = np.zeros(len(text.input_ids) + 1, dtype=bool)",
        "mask = np.ones(len(text.input_ids) + 1, dtype=bool)",
        f"{BENCH} samples",
    ),
    bug(
        0,
        "a benchmark of pairs without a token to learn in one of them",
        SAMPLES,
        "    masks[:, -1] = True\n",
        "    masks[1] = False\n",
        f"{BENCH} natural",
    ),
    bug(
        0,
        "layers of a reference counted as the step's own",
        "megalora/bench/timers.py",
        "self._moments.append((self._whole or self._parts[-1],",
        "self._moments.append((self._parts[-1],",
        f"{BENCH} nested",
    ),
)
