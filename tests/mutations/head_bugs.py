"""Bugs in the model's head: log-probabilities chunk by chunk with the vocabulary divided. The same
form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

HEAD, FUSED, CHUNK, READERS, LOGITS = (
    f"megalora/model/{name}.py"
    for name in ("head", "token_logprobs", "chunk_logits", "chunked_readers", "vocab_logits")
)
TEST = "tests/model/test_head.py"
SFT = "megalora/objectives/sft.py"
SFT_TEST = "tests/objectives/test_sft.py"
IN_MODEL = "tests/distributed/test_head_in_model.py"

# fmt: off
HEAD_BUGS: tuple[Bug, ...] = (
    bug(0, "a chunk without its last token", FUSED, "min(begin + size, num_tokens)",
        "min(begin + size, num_tokens) - 1", f"{TEST} whole_logits"),
    bug(0, "a sum of exponentials over this rank's vocabulary alone", CHUNK,
        "(parts[:, 0] - largest_of_all).exp()).sum(0)",
        "(parts[:, 0] - largest_of_all).exp())[group.rank()]", f"{TEST} whole_logits"),
    bug(0, "exponentials of ranks joined without their maxima", CHUNK,
        "factor = (largest - largest_of_all).exp() / sum_of_all", "factor = 1 / sum_of_all",
        f"{TEST} whole_logits"),
    bug(0, "a mean over this rank's part of the vocabulary", CHUNK,
        "mean = parts[:, 3].sum(0) / (width * group.size())", "mean = parts[:, 3].sum(0) / width",
        f"{TEST} whole_logits"),
    bug(0, "the one-hot taken off after rounding", CHUNK,
        "        _add_to_targets(d_CV, targets_C, group, -1)\n", "",
        f"{TEST} bfloat16"),
    bug(0, "a chunk's logits kept beside the next one's", FUSED,
        "            # Or the next chunk's logits would lie beside these.\n            del chunk\n",
        "", "tests/model/test_head_memory.py twentieth"),
    bug(0, "tokens of other ranks' vocabularies taken for one's own", LOGITS,
        "columns = ids - first", "columns = ids % width", f"{TEST} whole_logits"),
    bug(0, "a reader's gradient counted once per rank", READERS,
        "gradient[part] / ctx.call.group.size()", "gradient[part]", f"{TEST} whole_logits"),
    bug(0, "ids of a rank's part of the vocabulary", LOGITS, "columns + chunk.first", "columns",
        f"{TEST} whole_logits"),
    bug(0, "the gradient of hidden states not summed over the vocabulary", HEAD,
        "gather_seq(hidden_states, group), context.positions",
        "__import__('megatron.core.tensor_parallel', fromlist=['_'])"
        ".gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False,"
        " group=group), context.positions", f"{IN_MODEL} megatron_s_own"),
    # the loss
    bug(0, "label smoothing towards zero logits", SFT,
        'outputs["logsumexp"] - outputs["mean_logit"]', 'outputs["logsumexp"]',
        f"{SFT_TEST} torch_s"),
    bug(0, "label smoothing on top of the whole target", SFT, "(smooth_N - cross_entropy_N)",
        "smooth_N", f"{SFT_TEST} torch_s"),
    bug(0, "divided by a microbatch's own target tokens", SFT, 'total / divisors["tokens"]',
        "total / count", f"{SFT_TEST} torch_s"),
    bug(0, "a divisor that counts sequences", SFT,
        "sum(map(sum, rows))", "sum(map(len, rows))", f"{SFT_TEST} torch_s"),
)
