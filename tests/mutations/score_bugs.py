"""Bugs in score heads, their data, losses and files. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

LOSS = "megalora/objectives/scored.py"
DATA = "megalora/data/scored.py"
HEAD = "megalora/model/score_head.py"
OF_LOSS = "tests/objectives/test_scored.py trl"
OF_DATA = "tests/data/test_scored.py"
OF_HEAD = "tests/train/test_score_head.py"
OF_FILES = "tests/adapters/test_score.py"
OF_EVALUATIONS = "tests/evaluate/test_scores.py"
GRID = "tests/parity/test_grid.py classify"

SCORE_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a system message beside a text left out in silence",
        DATA,
        "        refuse_unused(row, set(columns.values()), allow_left_out, read)\n",
        "",
        "tests/data/test_scored.py rows_that_are_refused",
    ),
    # the head
    bug(
        0,
        "scores gathered as before a weight that is split",
        "megalora/comm.py",
        "gather_alike = _collective(all_gather, _own_slice)",
        "gather_alike = _collective(all_gather, _reduce_scatter)",
        GRID,
    ),
    bug(
        0,
        "a head whose gradient is this rank's tokens' alone",
        "megalora/lora/trained_weight.py",
        'parameter.sum_group = "tp" if is_partial else None',
        "parameter.sum_group = None",
        GRID,
    ),
    bug(
        0,
        "a head that starts as another seed's",
        "megalora/lora/unfrozen.py",
        "drawn = initial_score(seed, rows",
        "drawn = initial_score(0 * seed + 7, rows",
        f"{OF_HEAD} every_layout",
    ),
    bug(
        0,
        "lm_head beside the score head",
        "megalora/model/build.py",
        "if shape.num_scores and chunk.post_process:",
        "if False:",
        f"{OF_HEAD} lm_head",
        (
            "            provider.share_embeddings_and_output_weights = False\n",
            "            pass\n",
        ),
    ),
    # losses
    bug(
        0,
        "a margin with the other sign",
        LOSS,
        "chosen - rejected - margins",
        "chosen - rejected + margins",
        OF_LOSS,
    ),
    bug(
        0,
        "the worse answer's score the higher one",
        LOSS,
        "chosen - rejected - margins",
        "rejected - chosen - margins",
        OF_LOSS,
    ),
    bug(
        0,
        "a centre of the difference",
        LOSS,
        "(chosen + rejected).square()",
        "(chosen - rejected).square()",
        OF_LOSS,
    ),
    bug(
        0,
        "rewards divided by the pairs of their row",
        LOSS,
        'total = terms.sum() / divisors["pairs"]',
        "total = terms.mean()",
        OF_LOSS,
    ),
    bug(
        0,
        "labels divided by the sequences of their row",
        LOSS,
        'total / divisors["samples"]',
        "total / max(1, len(values_N))",
        OF_LOSS,
    ),
    bug(
        0,
        "the label of another sequence of the row",
        LOSS,
        "sequences.values[sequences.numbers]",
        "sequences.values[: len(sequences.numbers)]",
        OF_LOSS,
    ),
    bug(
        0,
        "half the squared error",
        LOSS,
        "(scores_NC[:, 0] - values_N).square()",
        "(scores_NC[:, 0] - values_N).square() / 2",
        OF_LOSS,
    ),
    # data
    bug(
        0,
        "the token before the last one scored",
        DATA,
        "ids = np.append(ids[: last + 1], np.int32(0))",
        "ids = np.append(ids[: max(last, 1)], np.int32(0))",
        f"{OF_DATA} text_ends",
    ),
    bug(
        0,
        "a closing token scored that is padding to transformers",
        DATA,
        "kept = np.flatnonzero(ids != pad)",
        "kept = np.arange(len(ids))",
        f"{OF_DATA} padding",
    ),
    bug(
        0,
        "a label out of range",
        DATA,
        "0 <= number < scoring.num_labels",
        "0 <= number <= scoring.num_labels",
        f"{OF_DATA} refused",
    ),
    bug(
        0,
        "a margin that nobody reads",
        DATA,
        "return replace(joined_pair(*sides), value=margin)",
        "return joined_pair(*sides)",
        f"{OF_DATA} margin",
    ),
    bug(
        0,
        "labels that do not tell data apart",
        "megalora/data/samples.py",
        "if values.any():",
        "if False:",
        f"{OF_DATA} part_of_what",
    ),
    bug(
        0,
        "a limit that the place to score uses up",
        "megalora/data/splits.py",
        "fit(store, max_length, too_long, places)",
        "fit(store, max_length, too_long)",
        f"{OF_DATA} limit",
    ),
    # checkpoints and folders
    bug(
        0,
        "a head that is not saved",
        "megalora/adapters/write/whole.py",
        "        tensors[weight.tensor] = trained[weight.tensor].contiguous()\n",
        "        pass\n",
        f"{OF_FILES} verifies",
    ),
    bug(
        0,
        "a classifier's folder that says it writes text",
        "megalora/adapters/write/whole.py",
        '"SEQ_CLS" if shape.num_scores else "CAUSAL_LM"',
        '"CAUSAL_LM"',
        f"{OF_FILES} verifies",
    ),
    bug(
        0,
        "a head that a resumed run draws anew",
        "megalora/lora/gather.py",
        "    for shard in shards:\n        name = prefix + shard.name",
        "    for shard in shards:\n        if shard.factor is None:\n            continue\n"
        "        name = prefix + shard.name",
        f"{OF_HEAD} resumes",
    ),
    bug(
        0,
        "other labels in the middle of a run",
        "megalora/train/checkpoint/same_run.py",
        '"objective.labels": None,',
        "",
        f"{OF_HEAD} resumes",
    ),
    bug(
        0,
        "a merged folder without its head",
        "megalora/adapters/merge_head.py",
        "own = entry if name == place else None",
        "own = None",
        f"{OF_FILES} merged_folder",
    ),
    bug(
        0,
        "a head merged with its rows turned round",
        "megalora/adapters/merge_score.py",
        "score.to(DTYPES[neighbour.dtype])",
        "score.flip(0).to(DTYPES[neighbour.dtype])",
        f"{OF_FILES} merged_folder",
    ),
    bug(
        0,
        "a classifier of a family that transformers has none of",
        "megalora/model/families/olmoe.py",
        "    has_classifier=False,\n",
        "",
        f"{OF_FILES} classifiers_are",
    ),
    # evaluations
    bug(
        0,
        "a base judged by the adapter's score head",
        "megalora/evaluate/judge.py",
        "        if not config.objective.num_scores:\n",
        "        if True:\n",
        f"{OF_EVALUATIONS} alone",
    ),
    bug(
        0,
        "the rarest label said to be the commonest",
        "megalora/evaluate/judge.py",
        "counts.most_common(1)[0]",
        "counts.most_common()[-1]",
        f"{OF_EVALUATIONS} alone",
    ),
    bug(
        0,
        "a head of other labels judged",
        "megalora/evaluate/request.py",
        "        num_scores == objective.num_scores,\n",
        "        True,\n",
        f"{OF_EVALUATIONS} refusals",
    ),
    bug(
        0,
        "a score head that is judged as a language model",
        "megalora/evaluate/request.py",
        "        not num_scores or objective.num_scores > 0,\n",
        "        True,\n",
        f"{OF_EVALUATIONS} refusals",
    ),
    bug(
        0,
        "a server that is given a head",
        "megalora/adapters/write/engines.py",
        'if shape.num_scores and name == "sglang":',
        "if False:",
        f"{OF_FILES} no_server",
    ),
    bug(
        0,
        "a classifier that is asked to write",
        "megalora/adapters/read/options.py",
        "    if has_score(config) and not score:\n",
        "    if False:\n",
        f"{OF_FILES} writes_text",
    ),
)
