"""Check which variant and back end are taken from the table of measured variants, and from which
file."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Product, Variant, problem, rule, tile_rank

from tests.kernels.tables import BEST, CPU, KEY, LAYER, OTHER, PRODUCT, chosen, content, row

pytestmark = pytest.mark.usefixtures("no_table")

# ---- the look-up -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [
        (0, 64),
        (1, 64),
        # Between 64 and 128 the border is at 64 x sqrt(2) = 90.51.
        (90.5, 64),
        (90.6, 128),
        (315, 256),
        (512, 512),
        (724, 512),
        (725, 1024),
        (1e6, 8192),
    ],
)
def test_bucket_is_the_nearest_by_ratio(rows, bucket):
    assert tuned.bucket_of(rows) == bucket


@pytest.mark.parametrize(
    ("rank", "key"), [(0, 0), (1, 16), (16, 16), (17, 32), (32, 32), (128, 128)]
)
def test_rank_is_rounded_up_as_the_kernels_pad_it(rank, key):
    assert tile_rank(rank) == key


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(500, BEST), (256, BEST), (1000, BEST), (128, None), (2048, None), (64, None), (8192, None)],
)
def test_row_of_the_bucket_then_of_its_neighbours_then_the_rule(use_table, rows, expected):
    use_table(content(row(512)))
    assert chosen(rows_per_expert=rows) == (
        expected or rule(replace(PRODUCT, rows_per_expert=rows))
    )


@pytest.mark.parametrize("bucket", [64, 8192])
def test_the_first_and_the_last_bucket_are_no_neighbours(use_table, bucket):
    """Python counts -1 from the end."""
    use_table(content(row(bucket)))
    other = 8192 if bucket == 64 else 64
    assert chosen(rows_per_expert=other) == rule(replace(PRODUCT, rows_per_expert=other))


def test_own_row_beats_neighbours_and_the_lower_neighbour_the_upper(use_table):
    use_table(content(row(256, OTHER), row(1024, BEST), row(2048, replace(BEST, num_stages=2))))
    # 512 has neighbours on both sides.
    assert chosen(rows_per_expert=512) == OTHER
    assert chosen(rows_per_expert=1024) == BEST
    assert chosen(rows_per_expert=4096).num_stages == 2


def test_where_the_rule_was_measured_to_stand_no_neighbour_is_taken(use_table):
    use_table(content(row(256), row(1024), stands=[{**KEY, "rows_per_expert": 512}]))
    assert chosen(rows_per_expert=512) == rule(PRODUCT)
    assert chosen(rows_per_expert=256) == BEST == chosen(rows_per_expert=1024)


DIFFERENT = {
    "op": "dgrad", "dtype": torch.float16, "N": 768, "K": 768, "rank": 128, "gathered": False,
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_size_takes_the_rule(use_table, name):
    use_table(content(row(512)))
    assert chosen() == BEST
    changed = replace(PRODUCT, **{name: DIFFERENT[name]})
    assert tuned.choose(changed, CPU) == rule(changed)


def test_half_or_double_the_rank_takes_the_row_and_no_adapter_any(use_table):
    use_table(content(row(512)))
    # Measured with rank 32; ranks are padded to powers of two from 16 on.
    for rank in (0, 8, 16, 17, 24, 32, 64):
        assert chosen(rank=rank) == BEST, rank
    # A padded rank of 128 is four times that of the row.
    for rank in (65, 128):
        assert chosen(rank=rank) != BEST, rank
    # The base alone is as fast as beside an adapter.
    assert chosen(rank=0, blocks=1) == BEST
    use_table(content(row(512, R=64)))
    assert chosen(rank=0) == BEST
    assert chosen(rank=16) != BEST
    assert chosen(rank=32) == BEST


def test_own_rank_comes_before_own_rows(use_table):
    """A neighbour's tile with the same rank, before the same rows with another rank."""
    use_table(content(row(1024, OTHER), row(512, R=64)))
    assert chosen() == OTHER
    assert chosen(rank=64) == BEST


def test_a_variant_that_the_rank_itself_cannot_run_gives_way_to_the_rule(use_table, monkeypatch):
    """Rows of rank 20 take 40 bytes, which TMA cannot read; those of rank 32, which the row was
    measured with, it can."""
    use_table(content(row(512)))
    monkeypatch.setattr(
        tuned, "problem", lambda variant, product, *limits: "odd" if product.rank == 20 else None
    )
    assert chosen(rank=32) == BEST
    assert chosen(rank=20) == rule(replace(PRODUCT, rank=20))


def test_the_rule_sees_the_number_of_rows_and_not_the_bucket(use_table):
    """Remembered or not: 370 and 390 rows are one bucket and two sides of the rule's own limit."""
    use_table(content(row(8192)))
    # The rule's limits are others where N / 2 is no multiple of 256. Rows around 96 and 384, where
    # the rule changes its tile, and a few hundred others.
    for narrow in (1536, 1152):
        for rows in (*range(1, 2000, 7), *range(95, 98), *range(383, 386)):
            changed = replace(PRODUCT, N=narrow, rows_per_expert=float(rows))
            assert tuned.choose(changed, CPU) == rule(changed)


def test_two_blocks_before_one(use_table):
    use_table(content(row(512, OTHER, blocks=1), row(1024)))
    assert chosen() == BEST
    assert chosen(blocks=1) == OTHER


def test_a_look_up_is_remembered(use_table, monkeypatch):
    use_table(content(row(512)))
    assert chosen(rows_per_expert=511.5) == BEST
    monkeypatch.setattr(tuned.Choices, "_look_up", lambda *_: pytest.fail("looked up again"))
    assert chosen(rows_per_expert=512.25) == BEST


# ---- which file --------------------------------------------------------------------------------


def test_file_of_the_card_ships_beside_the_module(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    name = "NVIDIA H100 80GB HBM3"
    (tmp_path / "NVIDIA_H100_80GB_HBM3.json").write_text(json.dumps(content(row(512), gpu=name)))
    assert tuned.choices_for(name).variant(PRODUCT) == BEST
    assert tuned.choices_for("NVIDIA H200").variant(PRODUCT) == rule(PRODUCT)
    monkeypatch.setenv(tuned.ENV_TABLE, "off")
    tuned.forget()
    assert tuned.choices_for(name).variant(PRODUCT) == rule(PRODUCT)


@pytest.mark.parametrize("path", sorted(tuned.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_that_ship(path, monkeypatch):
    """Each is of the card that its name says, was measured on a GPU, and its variants can run
    there, by whichever Triton is installed."""
    monkeypatch.delenv(tuned.ENV_TABLE, raising=False)
    tuned.forget()
    table = json.loads(path.read_text())
    gpu = table["gpu"]
    assert path.name == tuned.file_name(gpu) and table["measured"]["card"] == gpu
    assert not table.get("dry") and table["measured"]["driver"]
    for given in table["rows"]:
        product = Product(
            given["op"], getattr(torch, given["dtype"]), given["N"], given["K"], given["R"],
            given["gathered"], given["rows_per_expert"], given["blocks"],
        )  # fmt: skip
        variant = Variant(**given["variant"])
        assert problem(variant, product) is None
        assert tuned.choices_for(gpu).variant(product) == variant
        assert given["us"] < given["rule_us"]


def test_named_file_that_is_not_there(monkeypatch):
    monkeypatch.setenv(tuned.ENV_TABLE, "/nowhere/table.json")
    with pytest.raises(
        ValueError,
        match="MEGALORA_TUNED is '/nowhere/table.json', and there is no such file; unset it",
    ):
        chosen()


def test_environment_is_read_once(use_table, monkeypatch):
    use_table(content(row(512)))
    assert chosen() == BEST
    monkeypatch.setenv(tuned.ENV_TABLE, "off")
    assert chosen() == BEST


def test_table_in_the_folder_is_in_the_wheel(tmp_path):
    """A table that is committed and not packaged would be missed by every user, in silence."""
    from setuptools import build_meta

    source = Path(tuned.__file__).parents[1]
    for name in ("pyproject.toml", "README.md"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    package = tmp_path / "megalora_kernels"
    (package / "tuned").mkdir(parents=True)
    for path in sorted((source / "megalora_kernels").glob("*.py")):
        (package / path.name).write_bytes(path.read_bytes())
    (package / "tuned" / "GPU.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sys.argv", ["setup.py", "--quiet"])
        wheel = build_meta.build_wheel(str(tmp_path))
    # setuptools packages only files that the package's own settings name.
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert {"megalora_kernels/tuned.py", "megalora_kernels/tuned/GPU.json"} <= set(names)


# ---- the back end ------------------------------------------------------------------------------


def crossing(
    rank: int = 32, hidden: int = 2048, intermediate: int = 768, dtype: torch.dtype = torch.bfloat16
) -> float:
    return tuned.vendor_from(dtype, hidden, intermediate, rank, CPU)


def test_back_end_by_layer_and_by_the_nearest_rank(use_table):
    assert crossing() == tuned.RULE_VENDOR_FROM == 1024
    at_32 = {**LAYER, "vendor_from": 256}
    at_128 = {**LAYER, "R": 128, "vendor_from": None}
    use_table(content(layers=[at_32, at_128]))
    # Measured with ranks 32 (256 rows) and 128 (never faster); 64 is as near to both, and takes the
    # lower.
    for rank in (0, 16, 32, 33, 64):
        assert crossing(rank) == 256, rank
    for rank in (65, 128):
        assert crossing(rank) == math.inf, rank
    for other in ({"hidden": 4096}, {"intermediate": 1536}, {"dtype": torch.float16}):
        assert crossing(**other) == 1024
