"""Check which variants of the grouped GEMM the rule names, which are worth measuring, and which
cannot run."""

from dataclasses import replace
from itertools import product as combinations

import pytest
import torch
from megalora_kernels import variants
from megalora_kernels.variants import Product, Variant, candidates, problem, rule, shared_limit_of

GATE_UP = Product(
    "forward", torch.bfloat16, N=1536, K=2048, rank=32, gathered=True, rows_per_expert=512, blocks=2
)
DOWN = Product(
    "forward", torch.bfloat16, N=2048, K=768, rank=16, gathered=False, rows_per_expert=512
)
AMPERE = (8, 0)
ADA = (8, 9)
HOPPER = (9, 0)
BLACKWELL = (10, 0)


def limits(capability: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return shared_limit_of(capability), capability


# Gate and up have 768 columns each, three times 256: the widest tile divides them.
@pytest.mark.parametrize(
    "changed, tile",
    [
        ({}, (128, 256, 64, 8, 4)),
        ({"rows_per_expert": 96}, (128, 256, 64, 8, 4)),
        ({"rows_per_expert": 95.9}, (64, 128, 64, 4, 4)),
        ({"N": 3072, "rows_per_expert": 8192}, (128, 256, 64, 8, 4)),
        # gate and up have 640 columns each
        ({"N": 1280, "rows_per_expert": 384}, (128, 128, 64, 8, 4)),
        ({"N": 1280, "rows_per_expert": 383}, (64, 128, 64, 4, 4)),
        ({"N": 1280, "blocks": 1}, (128, 256, 64, 8, 4)),
        ({"dtype": torch.float32}, (32, 64, 32, 4, 2)),
    ],
    ids=str,
)
def test_rule_on_hopper(changed, tile):
    assert rule(replace(GATE_UP, **changed)) == Variant(*tile)


def test_rule_walks_over_the_tiles_of_a_large_gathered_dgrad():
    """As measured on an H100; with few rows, where it cannot, and elsewhere it does not."""
    dgrad = replace(GATE_UP, op="dgrad", rows_per_expert=512)
    assert rule(dgrad) == Variant(128, 256, 64, 8, 4, persistent=True)
    for changed in ({"rows_per_expert": 511}, {"op": "forward"}, {"gathered": False}, {"rank": 65}):
        assert not rule(replace(dgrad, **changed)).persistent, changed
    assert not rule(dgrad, *limits(AMPERE)).persistent


def test_rule_takes_smaller_tiles_and_fewer_stages_where_registers_and_shared_memory_are_scarce():
    # An A100 has 163 KB for a program: four stages of 128 x 128 take 128 KB. Ada has 99 KB: three.
    assert rule(GATE_UP, *limits(AMPERE)) == Variant(128, 128, 64, 8, 4)
    assert rule(GATE_UP, *limits(ADA)) == Variant(128, 128, 64, 8, 3)
    for capability in (AMPERE, ADA):
        assert rule(replace(GATE_UP, rows_per_expert=383), *limits(capability)) == Variant(
            64, 128, 64, 4, 4
        )


def test_what_the_rule_names_can_run_anywhere():
    """By pointers: no condition on addresses or sizes."""
    # N, K, stacked rank, rows per expert and blocks; 10 and 7 are divided by no tile.
    sizes = combinations(
        (10, 1536, 2048, 1280), (7, 768, 2048), (0, 1, 16, 48, 128), (1.0, 100.0, 1e4), (1, 2)
    )
    for (N, K, rank, rows, blocks), dtype in combinations(
        sizes, (torch.bfloat16, torch.float16, torch.float32)
    ):
        for capability in (AMPERE, ADA, HOPPER, BLACKWELL, (12, 0)):
            product = Product("dgrad", dtype, N, K, rank, True, rows, blocks)
            variant = rule(product, *limits(capability))
            assert problem(variant, product, *limits(capability)) is None
            assert (variant.weight, variant.rows) == ("pointers", "pointers")


@pytest.mark.parametrize(
    "product", [GATE_UP, DOWN, replace(DOWN, op="dgrad")], ids=["gate_up", "down", "dgrad"]
)
@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER, BLACKWELL], ids=str)
def test_candidates_can_run_and_begin_with_the_rule(product, capability):
    found = candidates(product, *limits(capability))
    assert found[0] == rule(product, *limits(capability))
    assert len(set(found)) == len(found) >= 3
    rows_by_tma = set()
    for variant in found:
        assert problem(variant, product, *limits(capability)) is None
        if variant.weight == "tma":
            rows_by_tma.add(variant.rows)
    # TMA came with Hopper; it copies rectangles, so gathered rows still go by pointers.
    of_hopper = {"pointers" if product.gathered else "tma"}
    assert rows_by_tma == (of_hopper if capability >= HOPPER else set())
    assert any(variant.persistent for variant in found) == (capability >= HOPPER)


def test_no_persistent_candidate_where_the_rank_makes_it_spill():
    # A persistent program keeps 35 to 70 registers more for its walk over tiles.
    assert not any(variant.persistent for variant in candidates(replace(DOWN, rank=128)))


def test_only_one_candidate_in_float32():
    assert candidates(replace(DOWN, dtype=torch.float32)) == [Variant(32, 64, 32, 4, 2)]


# 128 x 256 sums by 8 warps are 128 for each thread, of 255 registers at most.
WIDE = Variant(128, 256, 64, 8, 4)
BY_TMA = replace(WIDE, weight="tma", rows="tma")


@pytest.mark.parametrize(
    "variant, product, capability, why",
    [
        (
            WIDE,
            DOWN,
            AMPERE,
            "it needs 196736 bytes of shared memory, the device has 166912 for a program",
        ),
        (
            replace(WIDE, num_stages=3),
            DOWN,
            AMPERE,
            "8 warps would hold 128 sums per thread, at most 64 fit",
        ),
        (replace(WIDE, num_stages=5), DOWN, HOPPER, "it needs 245888 bytes of shared memory"),
        (
            replace(WIDE, num_warps=4),
            DOWN,
            HOPPER,
            "4 warps would hold 256 sums per thread, at most 128 fit",
        ),
        (
            replace(BY_TMA, block_n=128),
            DOWN,
            AMPERE,
            "TMA needs compute capability 9.0, the device has 8.0",
        ),
        (replace(WIDE, block_m=48), DOWN, HOPPER, "powers of two from 16 on, not 48 x 256 x 64"),
        (replace(WIDE, block_k=8), DOWN, HOPPER, "powers of two from 16 on, not 128 x 256 x 8"),
        (replace(WIDE, num_warps=12), DOWN, HOPPER, "a power of two of warps, at most 32, not 12"),
        (replace(WIDE, num_warps=64), DOWN, HOPPER, "a power of two of warps, at most 32, not 64"),
        (BY_TMA, replace(DOWN, K=800), HOPPER, "K=800 is not a multiple of 64"),
        (BY_TMA, replace(DOWN, N=2176), HOPPER, "2176 columns are not a multiple of 256"),
        (BY_TMA, replace(DOWN, N=768, blocks=2), HOPPER, "384 columns are not a multiple of 256"),
        (BY_TMA, GATE_UP, HOPPER, "rows that are gathered cannot be read by TMA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problems_are_named(variant, product, capability, why):
    found = problem(variant, product, *limits(capability))
    with pytest.raises(ValueError, match=why):
        raise ValueError(found)


def test_shared_memory_does_not_grow_with_the_rank_until_its_operands_outgrow_the_pipeline():
    # Four stages of 128 + 256 rows of 64 values of two bytes, and 128 bytes of barriers.
    assert 4 * 384 * 64 * 2 + 128 == 196736
    for rank in (0, 16, 64, 128):
        assert variants.shared_bytes(WIDE, replace(DOWN, rank=rank)) == 196736, rank
    # With one stage, 128 + 256 rows of the adapter's 128 ranks need more than the pipeline.
    one_stage = variants.shared_bytes(replace(WIDE, num_stages=1), replace(DOWN, rank=128))
    assert one_stage == 384 * 2 * 128 + 128
