"""Bugs in the kernels: arithmetic, rows, order, memory. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

GEMM, SHRINK, SWIGLU, WGRAD, MLP, ROUTE, REGROUP, ENGINE, TILES, JOINED = (
    f"kernels/megalora_kernels/{name}.py"
    for name in "gemm_kernel shrink swiglu lora_wgrad expert_mlp route regroup engine tiles joined".split()
)
ROUTE_TEST = "tests/kernels/test_route.py"
SWIGLU_TEST = "tests/kernels/test_swiglu.py"
MLP_TEST, KEPT, ORDER = (
    "tests/kernels/test_expert_mlp.py",
    "tests/kernels/test_kept_bytes.py",
    "tests/kernels/test_program_order.py",
)

# fmt: off
KERNEL_BUGS: tuple[Bug, ...] = (
    bug(0, "the last tile of an expert reads on into the next", GEMM, "row_ok, col_ok = rows < end, cols < block_columns", "row_ok, col_ok = rows < row0 + BLOCK_M, cols < block_columns", f"{MLP_TEST} triton"),
    bug(0, "the gather left out of the grouped GEMM", GEMM, "from_rows = tl.load(source_ptr + rows) if HAS_SOURCE else rows", "from_rows = rows", f"{MLP_TEST} triton"),
    bug(0, "an expert takes its neighbour's B", GEMM, "b_ptr + expert.to(tl.int64) * stride_be", "b_ptr + (expert ^ 1) * stride_be", f"{MLP_TEST} triton"),
    bug(0, "S beyond an expert's rows", SHRINK, "row_ok = rows < end", "row_ok = rows < row0 + BLOCK_M", f"{MLP_TEST} triton"),
    bug(0, "gate and up exchanged in SwiGLU", SWIGLU, "h = (gate * _sigmoid(gate, dtype == tl.float32) * up * p)", "h = (up * _sigmoid(up, dtype == tl.float32) * gate * p)", f"{MLP_TEST} triton"),
    bug(0, "SwiGLU's derivative without its second term", SWIGLU, "d_gate = dh * p * up * sigmoid * (1 + gate * (1 - sigmoid))", "d_gate = dh * p * up * sigmoid", f"{MLP_TEST} triton"),
    bug(0, "the probability's gradient scaled by itself", SWIGLU, "tl.sum(dh * product, 1)", "tl.sum(dh * product * p, 1)", f"{MLP_TEST} triton"),
    bug(0, "dA of down from values without the probability", SWIGLU, "h = _computed_once((product * p).to(dtype)", "h = _computed_once(product.to(dtype)", f"{MLP_TEST} triton"),
    bug(0, "a power of two for a power of e", SWIGLU, "tl.exp2(x * -1.4426950408889634)", "tl.exp2(-x)", f"{SWIGLU_TEST} forward"),
    bug(0, "columns beyond the edge read and written without a mask", SWIGLU, "EVEN_I=h_MI.shape[1] % block_i == 0", "EVEN_I=True", f"{SWIGLU_TEST} forward"),
    bug(0, "rows beyond an expert's end in the sums over its rows", SWIGLU, "s_ok = row_ok[:, None] & (r < R)[None, :]", "s_ok = (row_ok | True)[:, None] & (r < R)[None, :]", f"{SWIGLU_TEST} autograd"),
    bug(0, "only the last chunk's weight gradient", TILES, "        acc += tl.load(part_ptrs, mask=d < D, other=0.0)", "        acc = tl.load(part_ptrs, mask=d < D, other=0.0)", "tests/kernels/test_tiles.py sum_tiles"),
    bug(0, "an empty expert's gradient left as it was found", WGRAD, "        torch.mm(g, rows, out=out)", "        if rows.shape[0]:\n            torch.mm(g, rows, out=out)", "tests/kernels/test_lora_wgrad.py wgrad"),
    bug(0, "dS of gate and up without its scale", ENGINE, "self.passes.shrink(rows.x, blocks, self.routing, self._padded(rows), scale=scale)", "self.passes.shrink(rows.x, blocks, self.routing, self._padded(rows))", f"{MLP_TEST} triton"),
    bug(0, "dS of down without its scale", MLP, "engine.shrink(dout, o.blocks2, o.weight2, o.routing.source_M, scale=o.scale2)", "engine.shrink(dout, o.blocks2, o.weight2, o.routing.source_M)", f"{MLP_TEST} loop"),
    bug(0, "the scales of gate and up exchanged", "kernels/megalora_kernels/adapter.py", "RankScale(scales[0], scales[-1], split)", "RankScale(scales[-1], scales[0], split)", f"{MLP_TEST} triton"),
    bug(0, "the scale of S of down left out", SWIGLU, "(acc * scale).to(s_ptr", "acc.to(s_ptr", f"{MLP_TEST} triton"),
    bug(0, "up's factor on gate's columns", SHRINK, "x_ptrs, rows_ptrs, r2 = x_ptrs + K, rows_ptrs + K, r - R", "x_ptrs, rows_ptrs, r2 = x_ptrs, rows_ptrs + K, r - R", "tests/kernels/test_shrink.py two"),
    bug(0, "the last of a factor's ranks left out", SHRINK, "((r >= 0) & (r < R))", "((r >= 0) & (r < R - 1))", "tests/kernels/test_shrink.py one"),
    bug(0, "gate's B on up's part of S", "kernels/megalora_kernels/adapter.py", "start += b.shape[2]", "start += 0", f"{MLP_TEST} loop"),
    bug(0, "rows of one expert in reverse", ROUTE, "source_M[slots_TK.reshape(-1).long()] = token_TK.reshape(-1)", "source_M[slots_TK.reshape(-1).long()] = token_TK.flip(0).reshape(-1)", "tests/kernels/test_routing.py route"),
    bug(0, "received rows not sorted by expert", REGROUP, "source_M = row_M + shift_ER", "source_M = row_M + 0 * shift_ER", "tests/kernels/test_routing.py regroup"),
    bug(0, "rows of a chunk of tokens placed one chunk too far", ROUTE, "(c < chunk)[:, None]", "(c <= chunk)[:, None]", f"{ROUTE_TEST} test_route"),
    bug(0, "every block of tokens starts where its chunk does", ROUTE, "next_row += tl.sum(chosen, 0)", "next_row += 0", f"{ROUTE_TEST} test_route"),
    bug(0, "slots of a token from its last expert to its first", ROUTE, "tl.cumsum(chosen, 1) - chosen", "TOP_K - tl.cumsum(chosen, 1)", f"{ROUTE_TEST} test_route"),
    bug(0, "a token's row behind itself", ROUTE, "tl.cumsum(chosen, 0) - chosen", "tl.cumsum(chosen, 0)", f"{ROUTE_TEST} test_route"),
    bug(0, "a probability's gradient at the token's first expert", ROUTE, "expert_ptr + t_64 * TOP_K + j, mask=t_ok, other=-1", "expert_ptr + t_64 * TOP_K, mask=t_ok, other=-1", f"{ROUTE_TEST} test_route"),
    bug(0, "the router's map taken unchecked", ROUTE, "(tl.sum(chosen, 1) == TOP_K)", "(tl.sum(chosen, 1) >= 0)", f"{ROUTE_TEST} assertion"),
    bug(0, "a rank's rows behind those of the next rank", REGROUP, "((e == expert) & (r < rank))", "((e == expert) & (r > rank))", f"{ROUTE_TEST} test_regroup"),
    bug(0, "gradients of received probabilities sorted once more", REGROUP, "dsorted_M.index_select(0, slots_MK.view(-1))", "dsorted_M.index_select(0, slots_MK.view(-1).argsort().int())", f"{ROUTE_TEST} received"),
    bug(0, "the permuted rows kept for backward", MLP, "kept = (x if keep_x else None,", "kept = (x[source] if keep_x and source is not None else x if keep_x else None,", f"{KEPT} gathered"),
    bug(0, "gate_up kept although it is recomputed", MLP, "keep_y = before_swiglu and not static.recompute", "keep_y = before_swiglu", f"{KEPT} recomputed"),
    bug(0, "S kept as a view of its rows", MLP, "s1 = rows.s_MR.contiguous()", "s1 = rows.s_MR", f"{KEPT} joined"),
    bug(0, "probabilities in the order they were received", "megalora/model/dispatcher.py", "*regroup_values(self.counts_RE, global_probs)", "regroup_values(self.counts_RE, global_probs)[0], global_probs", "tests/distributed/test_moe_layer.py ep2"),
    bug(0, "experts' counts of the sending rank", "megalora/model/dispatcher.py", "self.counts_RE = counts.to(routing_map.device)", "self.counts_RE = counts.flip(0).to(routing_map.device)", "tests/distributed/test_moe_layer.py ep2"),
    bug(0, "selective recomputation that keeps all", "megalora/model/recompute.py", ".recompute = True", ".recompute = False", "tests/model/test_experts.py selective"),
)
# fmt: on
