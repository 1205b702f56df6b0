"""Bugs in what the planner and the benchmark know of score heads, teachers and passes before a
step's own. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

WEIGHTS = "megalora/planner/weights.py"
COUNT = "megalora/planner/adapter_count.py"
HEAD_BYTES = "megalora/planner/head_bytes.py"
HEAD_COST = "megalora/planner/head_cost.py"
SAMPLES = "megalora/bench/samples.py"
DRY = "tests/planner/test_dryrun.py score_head"
PEAK = "tests/planner/test_peak.py classify"
COST = "tests/planner/test_cost.py score_head"
TEACHER_BYTES = "megalora/planner/teacher_bytes.py"
TEACHER = "tests/planner/test_teacher.py"
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
        COUNT,
        "return AdapterCount(dense=n, dense_padded=n + -n % ALIGNMENT)",
        "return AdapterCount(dense_padded=n + -n % ALIGNMENT)",
        DRY,
    ),
    bug(
        0,
        "a score head's gradient summed without a table",
        COUNT,
        "return weight.num_parameters if weight.num_shards(p.tp) < p.tp else 0",
        "return 0 if weight.split or p.tp < 9 else weight.num_parameters",
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
    # teachers
    bug(
        0,
        "a mixture of two distributions planned like one",
        TEACHER_BYTES,
        '"jsd": (8, 11)',
        '"jsd": (7, 7)',
        f"{TEACHER} holds_of_a_chunk",
    ),
    bug(
        0,
        "a teacher's states of one microbatch",
        TEACHER_BYTES,
        "return received + layout.num_microbatches(work) * batch.tokens * token",
        "return received + batch.tokens * token",
        f"{TEACHER} states",
    ),
    bug(
        0,
        "the last input that a teacher's stage received forgotten",
        TEACHER_BYTES,
        "number = len(chunks) - chunks[0].has_embedding",
        "number = 0",
        f"{TEACHER} states",
    ),
    bug(
        0,
        "a dense teacher cut by the experts' groups",
        "megalora/model/second_model.py",
        "cut = replace(cut, ep=1, etp=1)",
        "pass",
        f"{TEACHER} second_model",
    ),
    bug(
        0,
        "a teacher's MLP without what SwiGLU copies",
        TEACHER_BYTES,
        "batch.tokens * 5 * (s.intermediate",
        "batch.tokens * 3 * (s.intermediate",
        "tests/planner/test_peak.py wide",
    ),
    bug(
        0,
        "a teacher's logits that backward finds again for nothing",
        HEAD_COST,
        "for ledger in (forward, backward):\n                self.gemm(ledger",
        "for ledger in (forward,):\n                self.gemm(ledger",
        f"{TEACHER} two_heads",
    ),
    bug(
        0,
        "a teacher's pass with the products of its head",
        "megalora/planner/cost.py",
        "forward = costs.forward_only(chunks, until_head=True)",
        "forward = costs.forward_only(chunks)",
        f"{TEACHER} two_heads",
    ),
    bug(
        0,
        "a layout that the teacher cannot be cut by",
        "megalora/planner/layouts.py",
        "            work.teacher.check(shape, p)\n",
        "            pass\n",
        f"{TEACHER} rejected",
    ),
    bug(
        0,
        "a teacher's pass timed as other work",
        "megalora/bench/passes_before.py",
        "        stepper.teacher = _Timed(stepper.teacher, timeline)\n",
        "        pass\n",
        f"{BENCH} for_real",
    ),
    # dropout
    bug(
        0,
        "dropout's cost of a run that has none",
        "megalora/planner/dropout_cost.py",
        "model = PlannedModel(shape, tuple(adapted), has_dropout)",
        "model = PlannedModel(shape, tuple(adapted), False)",
        "tests/planner/test_dropout_cost.py ratios",
    ),
    bug(
        0,
        "traffic of a GPU's kernels said of a CPU",
        "megalora/planner/dropout_cost.py",
        """" of a GPU's kernels" if on_cpu""",
        """" of a GPU's kernels" if not on_cpu""",
        "tests/planner/test_dropout_cost.py whose_traffic",
    ),
    bug(
        0,
        "a log that leaves out what dropout costs",
        "megalora/train/announce.py",
        "        lines.append(cost)\n",
        "        pass\n",
        "tests/planner/test_dropout_cost.py log",
    ),
    bug(
        0,
        "passes that time dropout draw masks of the run",
        "megalora/train/first_pass.py",
        "    host.set_rng_state(state)\n",
        "",
        "tests/planner/test_dropout_cost.py log",
    ),
    bug(
        0,
        "dropout stays off behind the passes that time it",
        "megalora/lora/without_dropout.py",
        "            module.dropout = probability\n",
        "            pass\n",
        "tests/planner/test_dropout_cost.py block",
    ),
)
