"""Compare the tile model with figures worked out by hand, published times, and the roofline."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from megalora_kernels.variants import Product, Variant, rule

from benchmarks import roofline, tile_model
from benchmarks.tile_gpus import H100, H200
from benchmarks.tile_model import PUBLISHED, TOLERANCE, cost, floor_us

# Qwen3-30B-A3B's gate and up on one of 8 expert-parallel ranks: 16 experts with 4,096 rows each.
GATE_UP = Product(
    "forward", torch.bfloat16, N=1536, K=2048, rank=0, gathered=True, rows_per_expert=4096
)
NARROW = Variant(128, 128, 64, 8, 4)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.what)
def test_published_times(case):
    assert cost(case.variant, case.product, case.experts).us == pytest.approx(
        case.us, rel=TOLERANCE
    )


def test_one_product_by_hand():
    """16 experts x 4,096 rows, 128 x 128 tiles: 16 x 32 x 12 tiles on 132 SMs, one at a time, bound
    by L2."""
    # Of each SM: 7 TB/s over 132 of them at 1,755 MHz.
    l2_bytes_per_cycle = 7.0e12 / 132 / 1.755e9
    # A tile reads 128 rows of x and 128 of the weight, 2,048 bfloat16 each, and ends in 1,800
    # cycles.
    cycles = 2 * 2048 * (128 + 128) / l2_bytes_per_cycle + 1800
    # The last wave of tiles takes as long as a full one.
    us = math.ceil(16 * 32 * 12 / 132) * cycles / 1755
    found = cost(NARROW, GATE_UP, 16)
    assert found.us == pytest.approx(us) and round(us) == 978 and found.bound == "L2"
    assert found.tflops == pytest.approx(2 * 65536 * 1536 * 2048 / us / 1e6)
    # A rank of 17 is multiplied as 32 columns more.
    wider = 2 * (2048 + 32) * (128 + 128) / l2_bytes_per_cycle + 1800
    with_adapter = cost(NARROW, replace(GATE_UP, rank=17), 16)
    assert with_adapter.us == pytest.approx(math.ceil(16 * 32 * 12 / 132) * wider / 1755)
    wasted = cost(NARROW, replace(GATE_UP, rows_per_expert=4097), 16)
    # One row more is one tile more of 32 for each expert; 1 % is for the rounding of waves.
    assert wasted.us > found.us * 33 / 32 * 0.99


@pytest.mark.parametrize(
    ("tile", "shared", "l2"),
    [
        ((64, 128, 4), 192, 96),
        ((64, 256, 4), 160, 80),
        ((128, 128, 8), 160, 64),
        ((256, 128, 8), 144, 48),
        ((128, 256, 8), 128, 48),
    ],
)
def test_bytes_per_cycle_at_the_full_tensor_rate(tile, shared, l2):
    """By hand: wgmma reads both operands of 64 rows from shared memory, copies write it, 4,096
    FLOPs a cycle. Of 128 x 128 that is 160 bytes and 64 from L2; shared memory moves 128."""
    m, n, warps = tile
    cycles = tile_model.tile_cycles(Variant(m, n, 64, warps, 4), 2048, H100)
    # Cycles of a tile with 2,048 inputs if nothing but the tensor cores took time.
    full_rate = 2 * m * n * 2048 / 4096
    assert cycles["shared memory"] * 128 / full_rate == pytest.approx(shared)
    assert cycles["L2"] * H100.l2_bytes_per_cycle / full_rate == pytest.approx(l2)
    # 790 TFLOP/s are sustained of the 949 that all SMs could do.
    assert cycles["tensor cores"] / full_rate == pytest.approx(132 * 4096 * 1.755e9 / 790e12)


def test_two_warp_groups_on_the_same_rows_read_them_twice():
    one = tile_model.tile_cycles(Variant(64, 256, 64, 4, 4), 64, H100)["shared memory"]
    two = tile_model.tile_cycles(Variant(64, 256, 64, 8, 4), 64, H100)["shared memory"]
    # 64 rows of 64 inputs in bfloat16; shared memory moves 128 bytes a cycle.
    assert (two - one) * 128 == 64 * 64 * 2


@pytest.mark.parametrize(
    ("variant", "programs"),
    [
        (NARROW, 1),
        (Variant(128, 128, 64, 8, 3), 2),
        (Variant(64, 128, 64, 4, 4), 2),
        (Variant(128, 256, 64, 8, 4), 1),
        # Five stages do not fit into shared memory, and four warps have too few registers.
        (Variant(128, 256, 64, 8, 5), 0),
        (Variant(128, 256, 64, 4, 3), 0),
        # A persistent program has its SM to itself.
        (Variant(128, 128, 64, 8, 3, "tma", "tma", persistent=True), 1),
    ],
)
def test_programs_of_an_sm_as_compiled(variant, programs):
    assert tile_model.programs_per_sm(variant, GATE_UP) == programs
    if programs == 0:
        with pytest.raises(ValueError, match="take a smaller tile"):
            cost(variant, GATE_UP, 16)


def test_few_rows_are_bound_by_hbm():
    few = replace(GATE_UP, rows_per_expert=64)
    # Weights of all experts, inputs and outputs of all rows, in bytes; 3.0 and 4.3 TB/s.
    moved = 2 * (128 * 1536 * 2048 + 128 * 64 * (1536 + 2048))
    slow = cost(Variant(64, 128, 64, 4, 4), few, 128, H100)
    fast = cost(Variant(64, 128, 64, 4, 4), few, 128, H200)
    assert slow.us == floor_us(few, 128) == pytest.approx(moved / 3.0e6) and slow.bound == "HBM"
    assert fast.us == pytest.approx(moved / 4.3e6)
    # With many rows the memory's rate no longer matters.
    many = replace(GATE_UP, rows_per_expert=512)
    wide = Variant(128, 256, 64, 8, 4)
    assert cost(wide, many, 128).us == cost(wide, many, 128, H200).us


def test_ends_hide_behind_other_programs_and_less_in_a_persistent_one():
    def ends(variant: Variant) -> float:
        """Microseconds that the ends of all tiles add."""
        without = replace(H100, ends_cycles=replace(H100.ends_cycles, value=0.0))
        return cost(variant, GATE_UP, 16).us - cost(variant, GATE_UP, 16, without).us

    alone = Variant(128, 256, 64, 8, 4, "tma", "tma")
    assert ends(replace(alone, persistent=True)) == pytest.approx(0.6 * ends(alone))
    # Of two programs on an SM a quarter of the 1,800 cycles shows, for each of its tiles.
    tiles_of_an_sm = 16 * 32 * 12 / 132
    two = Variant(128, 128, 64, 8, 3)
    assert ends(two) == pytest.approx(0.25 * 1800 / 1755 * tiles_of_an_sm)


def test_the_floor_is_the_roofline_s_traffic():
    case = roofline.Case(H=2048, I=768, M=128 * 8, T=1024, E=128, r=16)
    for name, product in tile_model.products("30b", 128, 8, 16).items():
        flat = roofline.gemm_us(case, product.N, product.K, product.rank, "grouped_mm")
        assert floor_us(product, 128) == pytest.approx(flat), name
    # Three bfloat16 of each of 1,024 tokens, at the same 3.0 TB/s.
    assert roofline.traffic_us(case, 3) == pytest.approx(2 * 1024 * 3 / 3.0e6)


def test_the_roofline_takes_the_rule_s_variant():
    case = roofline.layer("30b", tokens=8192, ep=8, rank=16)
    passes = roofline.forward(case, "triton", 16)
    for step, name in (("gate_up", "gate_up forward"), ("down", "down forward")):
        product = tile_model.products("30b", 16, 4096, 16)[name]
        assert passes[step] == cost(rule(product), product, 16).us, name
    # The vendor's GEMM at 640 TFLOP/s, whatever its shape.
    vendor = roofline.forward(case, "grouped_mm", 0)["gate_up"]
    assert vendor == pytest.approx(2 * 65536 * 1536 * 2048 / 640e6)
    # The goal is 1.3 over the base.
    ratios = roofline.ratios(case, "triton")
    assert 1 < ratios.forward < ratios.both < 1.3
    assert 1.3 < ratios.split_over_ours < 2.5


def test_the_best_is_no_slower_than_the_last_release():
    for experts, rows in tile_model.POINTS:
        for product in tile_model.products("235b", experts, rows, 16).values():
            chosen = tile_model.best(product, experts)
            # TMA loads whole tiles, and no rows that lie apart.
            assert product.N % chosen.block_n == 0
            assert not (product.gathered and chosen.rows == "tma")
            before = cost(tile_model.last_release(product), product, experts)
            ruled = cost(rule(product), product, experts)
            assert cost(chosen, product, experts).us <= ruled.us <= before.us


def test_command_line(monkeypatch, capsys):
    given = ["--gpu", "h200", "--rank", "16", "--l2-tb-per-s", "10"]
    monkeypatch.setattr(sys, "argv", ["tile_model", *given])
    tile_model.main()
    said = capsys.readouterr().out
    # Two lines of heads, four products at each of eight points, and the published times.
    assert said.startswith("30b, h200, rank 16")
    assert said.count("\n") == 2 + 8 * 4 + len(PUBLISHED)
    for wrong in (["--rank", "-1"], ["--l2-tb-per-s", "0"]):
        monkeypatch.setattr(sys, "argv", ["tile_model", *wrong])
        with pytest.raises(SystemExit) as left:
            tile_model.main()
        assert left.value.code == 2 and wrong[1] in capsys.readouterr().err
