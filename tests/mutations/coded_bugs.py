"""Bugs in the grouped GEMM that decodes codes in its load path, and in the choice of it. The same
form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

CODED = "kernels/megalora_kernels/coded_gemm.py"
ENGINE = "kernels/megalora_kernels/engine.py"
TEST = "tests/kernels/test_coded_gemm.py"

# fmt: off
CODED_BUGS: tuple[Bug, ...] = (
    bug(0, "low nibbles taken for high ones", CODED,
        "(codes & 15).to(tl.int32)", "(codes >> 4).to(tl.int32)",
        f"{TEST} test_products_with_codes"),
    bug(0, "the second half of a block times inputs of the first", CODED,
        "x = tl.load(x_ptrs + BLOCK_K)", "x = tl.load(x_ptrs)", f"{TEST} test_products_with_codes"),
    bug(0, "the scale of the block before", CODED,
        "scales_ptrs + k0 // Q", "scales_ptrs + tl.maximum(k0 // Q - 1, 0)",
        f"{TEST} test_products_with_codes"),
    bug(0, "up decoded with gate's scales", CODED,
        "(n // p) * stride_qn", "(safe_cols // p) * stride_qn", f"{TEST} test_products_with_codes"),
    bug(0, "columns beyond a ragged tile stored", CODED,
        "mask=row_ok[None, :] & col_ok[:, None]", "mask=row_ok[None, :]",
        f"{TEST} test_products_with_codes"),
    bug(0, "rows of the next expert written by a ragged tile", CODED,
        "row_ok = rows < end", "row_ok = rows >= row0",
        f"{TEST} test_products_with_codes_in_the_opposite_order"),
    bug(0, "every expert decoded from the first one's codes", CODED,
        "expert_64 * stride_ce", "0 * expert_64", f"{TEST} test_products_with_codes"),
    bug(0, "subnormal codes of fp8 by float16's other exponent", CODED,
        ".to(tl.float32) * 256.0", ".to(tl.float32) * 128.0",
        f"{TEST} test_every_fp8_code_has_its_value"),
    bug(0, "all rows compared with the rows of one expert", CODED,
        "most * routing.num_experts", "most", f"{TEST} test_few_rows"),
    bug(0, "codes decoded first however few the rows", ENGINE,
        "if codes and self.gemm is grouped_gemm_triton and in_load(codes, self.routing):",
        "if False:",
        f"{TEST} test_a_linear_decodes_nothing"),
)
# fmt: on
