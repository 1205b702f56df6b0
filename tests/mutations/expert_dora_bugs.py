"""Bugs in DoRA on routed experts and on some linears alone: kernels, norms, files. The same form as
``bugs.py``."""

from tests.mutations.bugs import Bug, bug

SCALED = "kernels/megalora_kernels/scaled_experts.py"
GAINS = "kernels/megalora_kernels/row_gain.py"
MAGNITUDE = "megalora/lora/magnitude.py"
ROWS = "tests/kernels/test_row_gain.py"
KERNELS = "tests/kernels/test_scaled_experts.py"
LOOP = "tests/lora/test_expert_magnitude.py"
FILES = "tests/adapters/test_dora_in_parts.py"
GRID = "tests/parity/test_grid.py dora"

EXPERT_DORA_BUGS: tuple[Bug, ...] = (
    bug(0, "dX of experts from the gradient before its gain", SCALED,
        "o.engine.passes.gain_rows(dy_MN, g_EN, o.routing, dy_MN)", "pass",
        f"{KERNELS} row_by_row"),
    bug(0, "dm of gate and up from what was scaled", SCALED,
        "_through_gain(o, rows1.x, u1_MJ, g1_EJ)",
        "_through_gain(o, rows1.x, _scaled(o, u1_MJ, g1_EJ), g1_EJ)", f"{KERNELS} row_by_row"),
    bug(0, "dm of down in the order of tokens", SCALED,
        "o.engine.passes.gain_gradient(dout, u2_MH, o.routing, dg2_EH, source_M)",
        "o.engine.passes.gain_gradient(dout, u2_MH, o.routing, dg2_EH, "
        "None if source_M is None else source_M.sort().values)", f"{KERNELS} row_by_row"),
    bug(0, "h of scaled experts from what was not scaled", SCALED,
        "inner = o.engine.swiglu(y1_MJ, o.p, o.a2, o.weight2, o.scale2)\n"
        "        u2_MH = o.engine.linear(inner, o.weight2, o.blocks2)\n        if g2_EH",
        "inner = o.engine.swiglu(u1_MJ, o.p, o.a2, o.weight2, o.scale2)\n"
        "        u2_MH = o.engine.linear(inner, o.weight2, o.blocks2)\n        if g2_EH",
        f"{LOOP} loop"),
    bug(0, "the neighbour's gain in Triton", GAINS,
        "gain_ptr + expert.to(tl.int64) * N + n, mask=n < N",
        "gain_ptr + (expert.to(tl.int64) // 2) * N + n, mask=n < N", f"{ROWS} rounded"),
    bug(0, "a gain in x's dtype", GAINS, "torch.mul(rows, g, out=out)",
        "torch.mul(rows, g.to(rows.dtype), out=out)", f"{ROWS} rounded"),
    bug(0, "gains of experts that are left out", "megalora/lora/experts.py",
        "gains(factors) if len(factors.lora_M) else None", "None", f"{LOOP} loop"),
    bug(0, "norms of down of one rank's features", MAGNITUDE,
        "if factors.sharding.split_a is not None:",
        "if factors.sharding.split_a is not None and not factors.is_expert:", GRID),
    bug(0, "the first expert's norms for all", MAGNITUDE,
        "factors.norms[name] = of_projection.flatten(-2).clone()",
        "factors.norms[name] = of_projection.flatten(-2)[:1].expand("
        "of_projection.flatten(-2).shape).clone()", f"{LOOP} loop"),
    bug(0, "DoRA on all where a list names some", "megalora/lora/select.py",
        "lora.use_dora is True or doras.first(base) is not None", "bool(lora.use_dora)",
        f"{FILES} two_folders"),
    bug(0, "experts that share factors, with DoRA", "megalora/lora/select.py", "if a.shared:",
        "if False:", f"{LOOP} share"),
    bug(0, "DoRA in part that PEFT takes for its own", "megalora/adapters/write/form.py",
        "peft_type = PART_DORA if in_parts(written) else LORA", "peft_type = LORA",
        f"{FILES} not_taken"),
    bug(0, "one folder for DoRA and LoRA", "megalora/adapters/write/parts.py",
        "if not all(halves.values()):", "if True:", f"{FILES} together"),
    bug(0, "plain linears written with DoRA's", "megalora/adapters/write/parts.py",
        'halves[PARTS["M" not in a.factors]]', "halves[PARTS[not a.layer]]",
        f"{FILES} together"),
    bug(0, "half of an adapter taken for all of it", "megalora/adapters/read/adapter.py",
        "if others := AdapterWeights(folder).part_of:", "if others := None:",
        f"{FILES} for_the_whole"),
    bug(0, "DoRA asked for where nothing is adapted", "megalora/lora/select.py",
        "if not any(entry.means(a) for a in with_magnitude):", "if not with_magnitude:",
        "tests/lora/test_expert_magnitude.py"),
    bug(0, "half of an adapter imported", "megalora/adapters/read/parts.py",
        "        adapted += part.adapted\n", "        adapted = part.adapted\n",
        f"{FILES} come_back"),
    bug(0, "DoRA on experts handed to PEFT", "megalora/adapters/write/engines.py",
        "    if _dora_beside(adapted, shape):\n        raise", "    if False:\n        raise",
        f"{FILES} refused_by_export"),
    bug(0, "experts without magnitudes read as zeros", "megalora/adapters/read/linears.py",
        'if "M" in wanted and len(modules) < len(a.hf_modules()):', "if False:",
        f"{FILES} without_its_magnitude"),
    bug(0, "down of scaled experts computed once in the plan", "megalora/planner/row_scaling.py",
        'self.grouped(backward, "experts", hidden, inner, columns)', "pass",
        "tests/planner/test_counted_layers.py test_dora"),
    bug(0, "magnitudes of experts planned once", "megalora/planner/magnitudes.py",
        "experts = max(1, a.num_experts // p.ep)", "experts = 1",
        "tests/planner/test_peak.py dora"),
)  # fmt: skip
