"""Bugs in the kernels: arithmetic, rows, order, memory. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

NAMES = (
    "gemm_kernel", "shrink", "swiglu", "lora_wgrad", "expert_mlp", "route", "regroup", "engine", "sums", "joined",
    "variants", "descriptors", "gemm_roles",
)  # fmt: skip
GEMM, SHRINK, SWIGLU, WGRAD, MLP, ROUTE, REGROUP, ENGINE, SUMS, JOINED, VARIANTS, DESCRIPTORS, ROLES = (
    f"kernels/megalora_kernels/{name}.py" for name in NAMES
)
VARIANT_TEST, RULE_TEST = "tests/kernels/test_gemm_variants.py", "tests/kernels/test_variants.py"
ROUTE_TEST, SUMS_TEST = "tests/kernels/test_route.py", "tests/kernels/test_sums.py test_sums"
SWIGLU_TEST = "tests/kernels/test_swiglu.py"
EACH, EACH_TEST = "kernels/megalora_kernels/each_expert.py", "tests/kernels/test_each_expert.py"
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
    bug(0, "only the last chunk's weight gradient", SUMS, "        acc += tl.load(part_ptrs, mask=d < D, other=0.0)", "        acc = tl.load(part_ptrs, mask=d < D, other=0.0)", SUMS_TEST),
    bug(0, "the first of an expert's parts left out", SUMS, "for _ in range(first, last):", "for _ in range(first + 1, last):", SUMS_TEST),
    bug(0, "the first block of dp left out", SUMS, "range(0, num_dp_blocks)", "range(1, num_dp_blocks)", SUMS_TEST),
    bug(0, "two gradients written as one", SUMS, "stop = tl.where(d < start_2, start_2, stop)", "stop = tl.where(d < start_2, stop, stop)", SUMS_TEST),
    bug(0, "gradients copied on their way to the parameters", MLP, "(FIRST_FACTOR - 3), *gradients)", "(FIRST_FACTOR - 3), *(None if g is None else g.clone() for g in gradients))", "tests/pretended/test_launches.py ceiling"),
    bug(0, "dB of up as wide as gate's", SWIGLU, "i[:, None] * (R - UP_FROM)", "i[:, None] * R_GATE", f"{MLP_TEST} triton"),
    bug(0, "an empty expert's gradient left as it was found", EACH, "        torch.mm(g, rows, out=out)", "        if rows.shape[0]:\n            torch.mm(g, rows, out=out)", f"{EACH_TEST} products"),
    bug(0, "dS of gate and up without its scale", ENGINE, "self.passes.shrink(rows.x, blocks, self.routing, self._padded(rows), scale=scale)", "self.passes.shrink(rows.x, blocks, self.routing, self._padded(rows))", f"{MLP_TEST} triton"),
    bug(0, "dS of down without its scale", MLP, "engine.shrink(dout, o.blocks2, o.weight2, o.routing.source_M, scale=o.scale2)", "engine.shrink(dout, o.blocks2, o.weight2, o.routing.source_M)", f"{MLP_TEST} loop"),
    bug(0, "the scales of gate and up exchanged", "kernels/megalora_kernels/adapter.py", "RankScale(scales[0], scales[-1], split)", "RankScale(scales[-1], scales[0], split)", f"{MLP_TEST} triton"),
    bug(0, "the scale of S of down left out", SWIGLU, "(acc * scale).to(s_ptr", "acc.to(s_ptr", f"{MLP_TEST} triton"),
    bug(0, "up's factor on gate's columns", SHRINK, "x_ptrs, rows_ptrs, r2 = x_ptrs + K, rows_ptrs + K, r - R", "x_ptrs, rows_ptrs, r2 = x_ptrs, rows_ptrs + K, r - R", "tests/kernels/test_shrink.py two"),
    bug(0, "the last of a factor's ranks left out", SHRINK, "((r >= 0) & (r < R))", "((r >= 0) & (r < R - 1))", "tests/kernels/test_shrink.py one"),
    bug(0, "gate's B on up's part of S", "kernels/megalora_kernels/adapter.py", "start += b.shape[2]", "start += 0", "tests/kernels/test_expert_mlp_dropout.py dropout"),
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
    bug(0, "up's B on gate's part of S", GEMM, "first = tl.where(mine, RANKS[i][0], first)", "first = tl.where(mine, RANKS[0][0], first)", f"{VARIANT_TEST} blocks_of_b"),
    bug(0, "up's rank taken for gate's", GEMM, "rank = tl.where(mine, RANKS[i][1], rank)", "rank = tl.where(mine, RANKS[0][1], rank)", f"{VARIANT_TEST} blocks_of_b"),
    bug(0, "an expert's B by the other block's strides", GEMM, "stride_be = tl.where(mine, blocks[i][1][0], stride_be)", "stride_be = stride_be", f"{VARIANT_TEST} blocks_of_b"),
    bug(0, "up's columns of the weight from gate's", GEMM, "(first_col + safe_cols)[None, :] * stride_wn", "safe_cols[None, :] * stride_wn", f"{VARIANT_TEST} every_kind"),
    bug(0, "the last tile of the walk left out", GEMM, "range(tl.program_id(0), num_tiles * tiles_n, tl.num_programs(0))", "range(tl.program_id(0), num_tiles * tiles_n - 1, tl.num_programs(0))", f"{VARIANT_TEST} every_kind"),
    bug(0, "the last group of the walk as large as the others", GEMM, "size = tl.minimum(num_tiles - group * GROUP, GROUP)", "size = GROUP", f"{VARIANT_TEST} every_kind"),
    bug(0, "columns beyond the edge read from the next block", GEMM, "safe_cols = cols if EVEN_N else tl.where(col_ok, cols, 0)", "safe_cols = cols + 1 if EVEN_N else tl.where(col_ok, cols, 0)", f"{VARIANT_TEST} every_kind"),
    bug(0, "a ragged end of K read unmasked", GEMM, "EVEN_K=K % variant.block_k == 0", "EVEN_K=True", f"{VARIANT_TEST} do_not_divide"),
    bug(0, "the adapter's product before K's in one kind of variant", GEMM, "    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n    for k0", "    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n    if BLOCK_R > 0 and W_TMA:\n        acc = _add_low_rank(acc, s_ptr, stride_s, blocks, block, rows, safe_cols, expert, RANKS, BLOCK_R)\n    for k0", f"{VARIANT_TEST} bits_do_not", ("    if BLOCK_R > 0:\n", "    if BLOCK_R > 0 and not W_TMA:\n")),
    bug(0, "experts of a joined weight without its room between them", DESCRIPTORS, "pitch = w.stride(0) // w.stride(1)", "pitch = num_rows", f"{VARIANT_TEST} every_kind"),
    bug(0, "the weight read by TMA from the expert's first column on", DESCRIPTORS, "desc.load([first_row + k0, n0])", "desc.load([first_row + k0, 0])", f"{VARIANT_TEST} every_kind"),
    bug(0, "rows that TMA cannot read taken for readable", GEMM, 'operands.append(("x", x))', "pass", f"{VARIANT_TEST} addresses"),
    bug(0, "a table's choice kept where addresses forbid it", GEMM, "            variant = rule(product, *limits)", "            pass", f"{VARIANT_TEST} gives_way"),
    bug(0, "a list of tiles taken for tiles of another height", ROLES, "if block_m not in routing.tile_lists:", "if not routing.tile_lists:", f"{VARIANT_TEST} share"),
    bug(0, "a tile's rows up to its end in the list", ROLES, "tl.store(tiles_ptr + 2, tl.where(there, end, 0))", "tl.store(tiles_ptr + 2, tl.where(there, row0 + ROWS, 0))", f"{VARIANT_TEST} roles"),
    bug(0, "another adapter's B left beside the blocks", JOINED, "if self._blocks and blocks != self._blocks:", "if False:", f"{VARIANT_TEST} joined_keeps"),
    bug(0, "S of gate and up exchanged in the loop", "kernels/megalora_kernels/grouped_gemm.py", "        start += rank", "        start += 0", f"{VARIANT_TEST} without_triton"),
    bug(0, "rows in one place read by TMA", DESCRIPTORS, "if steps[-1] < t.shape[-1] * t.element_size():", "if False:", f"{VARIANT_TEST} addresses"),
    bug(0, "roles with an adapter that has no B", ROLES, "if s_MR is None or b_ERN is None else", "if s_MR is None else", f"{VARIANT_TEST} roles_without"),
    bug(0, "a tile with a side that is no power of two", VARIANTS, "not _is_power_of_two(side) for side", "False for side", f"{RULE_TEST} named"),
    bug(0, "a tile taken that does not fit the device", VARIANTS, "if shared > shared_limit:", "if shared > HOPPER_SHARED:", f"{RULE_TEST} scarce"),
    bug(0, "wide tiles by the columns of gate and up together", VARIANTS, "if (product.N // product.blocks) % 256 == 0", "if product.N % 256 == 0", f"{RULE_TEST} hopper"),
    bug(0, "gathered rows by TMA", VARIANTS, 'if variant.rows == "tma" and product.gathered:', "if False:", f"{RULE_TEST} named"),
    bug(0, "roles for a Triton that aborts on them", VARIANTS, "if TRITON_VERSION != (3, 6) or", "if TRITON_VERSION < (3, 6) or", f"{RULE_TEST} roles_need"),
    bug(0, "rows of a block of experts counted from the first of all", "kernels/megalora_kernels/swiglu.py", "routing.offsets_E[block] - first", "routing.offsets_E[block]", f"{SWIGLU_TEST} taken_together"),
    bug(0, "the loop's gradient written over its operand", "kernels/megalora_kernels/swiglu.py", "        d_act = dh * p\n", "        d_act = dh.mul_(p)\n", f"{SWIGLU_TEST} taken_together"),
    bug(0, "a product that replaces what it is added to", EACH, "y_MC.add_(product(", "y_MC.copy_(product(", f"{EACH_TEST} products"),
    bug(0, "a product left in a buffer of its own", EACH, "return y_MN if out is None else out.copy_(y_MN)", "return y_MN", f"{EACH_TEST} products"),
    bug(0, "offsets not looked at before the grouped GEMM", EACH, "num_rows = sum(routing.counts)", "num_rows = routing.num_rows", f"{EACH_TEST} wrong"),
    bug(0, "rows between 16 bytes given to the grouped GEMM", EACH, "(pitch, *t.stride()[:-2], t.storage_offset())", "(pitch,)", f"{EACH_TEST} cannot_read"),
)
# fmt: on
