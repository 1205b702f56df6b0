"""Bugs in factors that all experts of a layer share, and in ranks of single experts. The same form
as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

SPEC, SHARDS, FACTORS, SELECT = (
    f"megalora/lora/{name}.py" for name in ("spec", "shards", "factors", "select")
)
TRAINED = "megalora/adapters/trained.py"
COUNT = "megalora/planner/adapter_count.py"
TESTS = "tests/lora/test_share_outer.py"
RANKS, SECTION = "tests/lora/test_ranks_of_experts.py", "megalora/lora/section.py"

SHARED_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a shared factor without the sum over TP",
        SHARDS,
        "group_name if replicas > 1 else None",
        "group_name if replicas > 1 and factor != adapted.shared else None",
        f"{TESTS} starts_alike",
    ),
    bug(
        0,
        "a shared factor reduced over the replicas of experts",
        SHARDS,
        "adapted.projection.is_expert and factor != adapted.shared",
        "adapted.projection.is_expert",
        f"{TESTS} starts_alike",
    ),
    bug(
        0,
        "a shared factor drawn anew on every rank",
        FACTORS,
        "initial_a(self.seed, module,",
        "initial_a(self.seed + self.experts[0] if self.is_expert else self.seed, module,",
        f"{TESTS} starts_alike",
    ),
    bug(
        0,
        "the wrong factor of down shared",
        SPEC,
        '{"expert_column": "A", "expert_row": "B"}',
        '{"expert_column": "A", "expert_row": "A"}',
        f"{TESTS} one_a_of_gate",
    ),
    bug(
        0,
        "copies that differ taken for shared ones",
        TRAINED,
        "if not (outer == outer[:1]).all():",
        "if not torch.allclose(outer, outer[:1], atol=1e-5):",
        f"{TESTS} copies_that_differ",
    ),
    bug(
        0,
        "a shared column zeroed for the sake of one expert",
        TRAINED,
        'if a.shared == "B":',
        'if a.shared == "none":',
        f"{TESTS} without_a_row",
    ),
    bug(
        0,
        "a shared factor planned once for each expert",
        COUNT,
        "n = size if is_shared else lead * size",
        "n = lead * size",
        "tests/planner/test_dryrun.py bytes_of_a_rank",
    ),
    bug(
        0,
        "the last expert without its copy of a shared factor",
        "megalora/adapters/write/form.py",
        "value = get(own.tensor_name(factor, expert))",
        "value = get(own.tensor_name(factor, expert)) * (expert < 7 or factor != own.shared)",
        f"{TESTS} resumes_in",
    ),
    bug(0, "rows of A behind an expert's rank that are not zero", FACTORS,
        "whole[adapted.expert_ranks[expert] :] = 0", "pass", f"{RANKS} starts_alike"),
    bug(0, "ranks of experts counted from the rank's first expert", FACTORS,
        "adapted.expert_ranks[expert] :", "adapted.expert_ranks[expert % len(self.experts)] :",
        f"{RANKS} starts_alike"),
    bug(0, "the last entry that means an expert decides its rank", SELECT,
        "if is_meant and found[at] is None:", "if is_meant:", f"{RANKS} mean_all_experts"),
    bug(0, "the scale of experts from lora.rank", "megalora/lora/ranks.py",
        "    if max(each) != rank:\n", "    if False:\n", f"{RANKS} beside_a_rule"),
    bug(0, "the smallest rank of a layer's experts stored", SELECT,
        "rank = max(each)\n        if alpha_key", "rank = min(each)\n        if alpha_key",
        f"{RANKS} first_entry"),
    bug(0, "zeros of experts counted as parameters", SPEC,
        "return total - zeros * (self.in_features + self.out_features)", "return total",
        f"{RANKS} first_entry"),
    bug(0, "settings without the ranks of experts", SECTION,
        "if a.expert_ranks:\n", "if False:\n", f"{RANKS} say_the_ranks"),
    bug(0, "a section without the ranks of experts", SECTION,
        "layers_of[a.expert_ranks or (a.rank,), _alpha(a)]", "layers_of[(a.rank,), _alpha(a)]",
        f"{RANKS} say_the_ranks"),
)  # fmt: skip
