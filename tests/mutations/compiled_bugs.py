"""Bugs that change no value, only what the compiler makes of a kernel for a GPU. The same form as
``bugs.py``."""

from tests.mutations.bugs import Bug, bug

GEMM, SWIGLU, SWIGLU_BACKWARD, VARIANTS = (
    f"kernels/megalora_kernels/{name}.py"
    for name in ("gemm_kernel", "swiglu", "swiglu_backward", "variants")
)
TEST = "tests/kernels/test_compiled.py TestForHopper"
LOW_RANK = (
    "acc = _add_low_rank(acc, s_ptr, stride_s, blocks, block, rows, safe_cols, expert, RANKS,"
    " BLOCK_R)"
)

# fmt: off
COMPILED_BUGS: tuple[Bug, ...] = (
    bug(0, "a weight taken element by element through registers", GEMM,
        "safe_cols = cols if EVEN_N else tl.where(col_ok, cols, 0)",
    "safe_cols = tl.where(col_ok, cols, 0)", TEST),
    bug(0, "the adapter's product before the loop, with buffers of its own", GEMM,
        f"    if BLOCK_R > 0:\n        {LOW_RANK}\n", "", TEST,
    ("    for k0 in range(0, K, BLOCK_K):",
     f"    if BLOCK_R > 0:\n        {LOW_RANK}\n    for k0 in range(0, K, BLOCK_K):")),
    bug(0, "an activation computed as often as it is used", SWIGLU, "is_pure=False", "is_pure=True",
        TEST),
    bug(0, "shared memory counted for one stage less", VARIANTS,
        "per_k * variant.num_stages * variant.block_k",
    "per_k * (variant.num_stages - 1) * variant.block_k", TEST),
    bug(0, "twice the columns for a program of SwiGLU's backward pass", SWIGLU_BACKWARD,
        '"BLOCK_I": 64, "num_warps": 4, "num_stages": stages',
    '"BLOCK_I": 128, "num_warps": 4, "num_stages": stages', TEST),
    bug(0, "SwiGLU's opaque step pipelined on Blackwell", SWIGLU_BACKWARD,
        "stages = 2 if capability < (10, 0) else 1", "stages = 2", TEST),
)
# fmt: on
