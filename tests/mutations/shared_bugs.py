"""Bugs in factors that all experts of a layer share. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

SPEC, SHARDS, FACTORS, SELECT = (
    f"megalora/lora/{name}.py" for name in ("spec", "shards", "factors", "select")
)
TRAINED = "megalora/adapters/trained.py"
COUNT = "megalora/planner/adapter_count.py"
TESTS = "tests/lora/test_share_outer.py"

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
        "value = trained[own.tensor_name(factor, expert)]",
        "value = trained[own.tensor_name(factor, expert)] * (expert < 7 or factor != own.shared)",
        f"{TESTS} resumes_in",
    ),
)
