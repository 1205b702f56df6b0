"""Bugs in the kernels that read logits for the loss. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

ROWS = "kernels/megalora_kernels/logit_rows.py"
CHUNK = "megalora/model/chunk_logits.py"
TEST = "tests/kernels/test_logit_rows.py"
HEAD_TEST = "tests/model/test_head.py"

# fmt: off
LOGIT_BUGS: tuple[Bug, ...] = (
    bug(0, "a block's sum taken as if it had the row's maximum", ROWS,
        "s = tl.sum(sums * tl.exp(largest - m[None, :]), 0)", "s = tl.sum(sums, 0)",
        f"{TEST} rows_are_those_of_float64"),
    bug(0, "entries behind the last of a row counted", ROWS,
        'mask=v < V, other=float("-inf")).to(tl.float32)\n    largest',
        "mask=v < V, other=0.0).to(tl.float32)\n    largest", f"{TEST} rows_are_those_of_float64"),
    bug(0, "the target's logit of every block added", ROWS,
        "here = (column >= start) & (column < start + BLOCK) & (column < V)",
        "here = (column >= 0) & (column < V)", f"{TEST} rows_are_those_of_float64"),
    bug(0, "a target of the next rank read behind the row", ROWS,
        "(column < start + BLOCK) & (column < V)", "(column < start + BLOCK)",
        f"{TEST} rows_are_those_of_float64"),
    bug(0, "a masked block makes NaN of its row", ROWS,
        'tl.where(largest == float("-inf"), 0.0, largest)', "largest", f"{TEST} minus_infinity"),
    bug(0, "the one-hot at the whole vocabulary's column", ROWS,
        "column = tl.load(targets_ptr + row).to(tl.int64) - first\n    d +=",
        "column = tl.load(targets_ptr + row).to(tl.int64)\n    d +=", f"{TEST} rounded_once"),
    bug(0, "the gradient rounded before the one-hot is in it", ROWS,
        "    d += tl.where(v == column, at_target, 0.0)\n"
        "    tl.store(ptrs, d.to(logits_ptr.dtype.element_ty), mask=v < V)",
        "    d = d.to(logits_ptr.dtype.element_ty) + tl.where(v == column, at_target, 0.0)\n"
        "    tl.store(ptrs, d.to(logits_ptr.dtype.element_ty), mask=v < V)",
        f"{TEST} sure_token"),
    bug(0, "row numbers of more than 2^31 elements", ROWS,
        "ptrs = logits_ptr + row.to(tl.int64) * stride + v", "ptrs = logits_ptr + row * stride + v",
        "tests/kernels/test_big_offsets.py logits"),
    bug(0, "one number read for as many rows as there are", ROWS,
        "None if at_target_C is None else at_target_C.contiguous()", "at_target_C",
        f"{TEST} one_gradient_for_all"),
    bug(0, "kernels' sums not joined over ranks", CHUNK,
        "parts_P4C = gather_seq(own_P4C, group)", "parts_P4C = own_P4C",
        f"{HEAD_TEST} kernels_give"),
    bug(0, "a weighted gradient without that of logsumexp", CHUNK,
        "lse_C, g_lse - g_logprob, g_logprob, add_C", "lse_C, -g_logprob, g_logprob, add_C",
        f"{HEAD_TEST} kernels_give"),
    bug(0, "room for float32 logits that kernels do not make", "megalora/model/head_chunk.py",
        "    if by_kernel:\n        return element_bytes\n", "", f"{HEAD_TEST} more_tokens"),
)
