"""The table of measured variants: what a file may say, and which variant and back end are taken
from it."""

import json
import math
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from megalora_kernels import tuned
from megalora_kernels.tuned_table import MEASURED, read_table
from megalora_kernels.variants import Product, Variant, problem, rule, tile_rank

CPU = torch.device("cpu")
BEST = Variant(128, 256, 64, 8, 3, weight="tma")
OTHER = Variant(64, 128, 64, 4, 3)
PRODUCT = Product(
    "forward", torch.bfloat16, N=1536, K=2048, rank=32, gathered=True, rows_per_expert=512, blocks=2
)
KEY = {
    "op": "forward",
    "dtype": "bfloat16",
    "N": 1536,
    "K": 2048,
    "R": 32,
    "blocks": 2,
    "gathered": True,
}
LAYER = {"dtype": "bfloat16", "hidden": 2048, "intermediate": 768, "R": 32}


def row(bucket: int = 512, variant: Any = BEST, **changed: Any) -> dict[str, Any]:
    times = {"us": 611.0, "rule_us": 702.0, "spread": 0.01}
    given = asdict(variant) if isinstance(variant, Variant) else variant
    return {**KEY, "rows_per_expert": bucket, "variant": given, **times, **changed}


def content(
    *rows: dict[str, Any], stands: Any = (), layers: Any = (), **changed: Any
) -> dict[str, Any]:
    measured = {**dict.fromkeys(MEASURED, "a test"), "triton": triton.__version__}
    parts = {"rows": list(rows), "rule_stands": list(stands), "layers": list(layers)}
    return {"gpu": "cpu", "measured": measured, **parts, **changed}


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Writes a table and lets MEGALORA_TUNED name it."""
    path = tmp_path / "table.json"

    def write(given: Any) -> Path:
        # Text is written as it is, for files that are no JSON.
        path.write_text(
            given if isinstance(given, str) else json.dumps(given), errors="surrogateescape"
        )
        monkeypatch.setenv(tuned.ENV_TABLE, str(path))
        # A table is read once per process.
        tuned.forget()
        return path

    yield write
    tuned.forget()


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    monkeypatch.delenv(tuned.ENV_TABLE, raising=False)
    tuned.forget()


def chosen(**changed: Any) -> Variant:
    return tuned.choose(replace(PRODUCT, **changed), CPU)


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
def test_row_of_the_bucket_then_of_its_neighbours_then_the_rule(use, rows, expected):
    use(content(row(512)))
    assert chosen(rows_per_expert=rows) == (
        expected or rule(replace(PRODUCT, rows_per_expert=rows))
    )


@pytest.mark.parametrize("bucket", [64, 8192])
def test_the_first_and_the_last_bucket_are_no_neighbours(use, bucket):
    """Python counts -1 from the end."""
    use(content(row(bucket)))
    other = 8192 if bucket == 64 else 64
    assert chosen(rows_per_expert=other) == rule(replace(PRODUCT, rows_per_expert=other))


def test_own_row_beats_neighbours_and_the_lower_neighbour_the_upper(use):
    use(content(row(256, OTHER), row(1024, BEST), row(2048, replace(BEST, num_stages=2))))
    # 512 has neighbours on both sides.
    assert chosen(rows_per_expert=512) == OTHER
    assert chosen(rows_per_expert=1024) == BEST
    assert chosen(rows_per_expert=4096).num_stages == 2


def test_where_the_rule_was_measured_to_stand_no_neighbour_is_taken(use):
    use(content(row(256), row(1024), stands=[{**KEY, "rows_per_expert": 512}]))
    assert chosen(rows_per_expert=512) == rule(PRODUCT)
    assert chosen(rows_per_expert=256) == BEST == chosen(rows_per_expert=1024)


DIFFERENT = {
    "op": "dgrad", "dtype": torch.float16, "N": 768, "K": 768, "rank": 128, "gathered": False,
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_size_takes_the_rule(use, name):
    use(content(row(512)))
    assert chosen() == BEST
    changed = replace(PRODUCT, **{name: DIFFERENT[name]})
    assert tuned.choose(changed, CPU) == rule(changed)


def test_half_or_double_the_rank_takes_the_row_and_no_adapter_any(use):
    use(content(row(512)))
    # Measured with rank 32; ranks are padded to powers of two from 16 on.
    for rank in (0, 8, 16, 17, 24, 32, 64):
        assert chosen(rank=rank) == BEST, rank
    for rank in (65, 128):
        assert chosen(rank=rank) != BEST, rank
    assert chosen(rank=0, blocks=1) == BEST  # the base alone is as fast as beside an adapter
    use(content(row(512, R=64)))
    assert chosen(rank=0) == BEST
    assert chosen(rank=16) != BEST
    assert chosen(rank=32) == BEST


def test_own_rank_comes_before_own_rows(use):
    """A neighbour's tile with the same rank, before the same rows with another rank."""
    use(content(row(1024, OTHER), row(512, R=64)))
    assert chosen() == OTHER
    assert chosen(rank=64) == BEST


def test_a_variant_that_the_rank_itself_cannot_run_gives_way_to_the_rule(use, monkeypatch):
    """Rows of rank 20 take 40 bytes, which TMA cannot read; those of rank 32, which the row was
    measured with, it can."""
    use(content(row(512)))
    monkeypatch.setattr(
        tuned, "problem", lambda variant, product, *limits: "odd" if product.rank == 20 else None
    )
    assert chosen(rank=32) == BEST
    assert chosen(rank=20) == rule(replace(PRODUCT, rank=20))


def test_the_rule_sees_the_number_of_rows_and_not_the_bucket(use):
    """Remembered or not: 370 and 390 rows are one bucket and two sides of the rule's own limit."""
    use(content(row(8192)))
    for narrow in (1536, 1152):  # the rule's limits are others where N / 2 is no multiple of 256
        for rows in (*range(1, 2000, 7), *range(95, 98), *range(383, 386)):
            changed = replace(PRODUCT, N=narrow, rows_per_expert=float(rows))
            assert tuned.choose(changed, CPU) == rule(changed)


def test_two_blocks_before_one(use):
    use(content(row(512, OTHER, blocks=1), row(1024)))
    assert chosen() == BEST
    assert chosen(blocks=1) == OTHER


def test_a_look_up_is_remembered(use, monkeypatch):
    use(content(row(512)))
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


def test_environment_is_read_once(use, monkeypatch):
    use(content(row(512)))
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
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert {"megalora_kernels/tuned.py", "megalora_kernels/tuned/GPU.json"} <= set(names)


# ---- what a file may say -----------------------------------------------------------------------


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "no text": ("\udcff", "not valid JSON"),
    "no list of rows": (content() | {"rows": None}, "rows is NoneType, want a list"),
    "no list of layers": (content() | {"layers": {}}, "layers is dict, want a list"),
    "dtype of no kind": (content(row(dtype=[])), "rows[0]: dtype is []"),
    "a list": ([], "want one JSON object, got list"),
    "another card": (content(gpu="NVIDIA H200"),
                     "measured on 'NVIDIA H200', but this is 'cpu'; set MEGALORA_TUNED=off"),
    "unknown part": (content(tiles=[]), "unknown field 'tiles'; known are gpu, measured"),
    "missing part": (without(content(), "rule_stands"),
                     "no field 'rule_stands'; want gpu, measured"),
    "measured": (content(measured={"date": "today"}), "measured: no field 'commit'"),
    "unknown field": (content(row(block=3)), "rows[0]: unknown field 'block'"),
    "missing field": (content(row(), without(row(256), "gathered")),
                      "rows[1]: no field 'gathered'"),
    "op": (content(row(op="fwd")), "rows[0]: op is 'fwd'"),
    "dtype": (content(row(dtype="float64")), "rows[0]: dtype is 'float64'"),
    "size": (content(row(N=True)), "rows[0]: N is True"),
    "size zero": (content(row(K=0)), "rows[0]: K is 0"),
    "rank": (content(row(R=24)), "rows[0]: R is 24"),
    "gathered": (content(row(gathered=1)), "rows[0]: gathered is 1"),
    "bucket": (content(row(500)), "rows[0]: rows_per_expert is 500"),
    "time": (content(row(us=math.nan)), "rows[0]: us is nan"),
    "spread": (content(row(spread=None)), "rows[0]: spread is None"),
    "no variant": (content(row(variant=None)), "rows[0]: variant is None"),
    "variant's unknown field": (content(row(variant={**asdict(BEST), "group": 8})),
                                "rows[0]: variant: unknown field 'group'"),
    "variant's missing field": (content(row(variant=without(asdict(BEST), "num_warps"))),
                                "rows[0]: variant: no field 'num_warps'"),
    "variant's operand": (content(row(variant={**asdict(BEST), "weight": "gather"})),
                          "rows[0]: variant: weight is 'gather'"),
    "variant's switch": (content(row(variant={**asdict(BEST), "persistent": 0})),
                         "rows[0]: variant: persistent is 0"),
    "variant's size": (content(row(variant={**asdict(BEST), "block_m": 0})),
                       "rows[0]: variant: block_m is 0"),
    "cannot run": (content(row(variant={**asdict(BEST), "rows": "tma"})),
                   "rows[0]: Variant(block_m=128"),
    "blocks": (content(row(blocks=0)), "rows[0]: blocks is 0"),
    "two rows": (content(row(), row(us=1.0)), "rows[1]: a second row for Key(op='forward'"),
    "a row and the rule": (content(row(), stands=[{**KEY, "rows_per_expert": 512}]),
                           "rule_stands[0]: a second row for Key("),
    "rule with a variant": (content(stands=[row()]), "rule_stands[0]: unknown field 'variant'"),
    "layer": (content(layers=[LAYER]), "layers[0]: no field 'vendor_from'"),
    "layer's number": (content(layers=[{**LAYER, "vendor_from": -1}]),
                       "layers[0]: vendor_from is -1"),
    "two layers": (content(layers=[{**LAYER, "vendor_from": 1}, {**LAYER, "vendor_from": 2}]),
                   "layers[1]: a second row for LayerKey("),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(use, given, message):
    path = use(given)
    with pytest.raises(ValueError) as error:
        chosen()
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_variant_that_does_not_fit_this_card(use):
    """The same table on a card with less shared memory."""
    path = use(content(row(512)))
    assert read_table(path, "cpu").variants
    with pytest.raises(ValueError, match=r"rows\[0\].*cannot run.*tune again"):
        read_table(path, "cpu", limits=(100_000, (9, 0)))


def test_a_variant_that_only_another_triton_compiles_gives_way_to_the_rule(use, monkeypatch):
    """A table that ships is read by every release. Say that a tile compiles on some alone."""
    newer = replace(BEST, num_stages=2)

    def problem(variant: Variant, *_: Any) -> str | None:
        return "two stages need Triton 3.6" if variant == newer else None

    monkeypatch.setattr(tuned, "problem", problem)
    monkeypatch.setattr("megalora_kernels.tuned_table.problem", problem)
    given = content(row(512, newer), row(64))
    given["measured"]["triton"] = "3.0.1"
    use(given)
    assert chosen() == rule(PRODUCT)
    assert chosen(rows_per_expert=64) == BEST
    given["measured"]["triton"] = ".".join(triton.__version__.split(".")[:2]) + ".9"
    use(given)
    with pytest.raises(ValueError, match="two stages need Triton 3.6; tune again"):
        chosen()


# ---- the back end ------------------------------------------------------------------------------


def crossing(
    rank: int = 32, hidden: int = 2048, intermediate: int = 768, dtype: torch.dtype = torch.bfloat16
) -> float:
    return tuned.vendor_from(dtype, hidden, intermediate, rank, CPU)


def test_back_end_by_layer_and_by_the_nearest_rank(use):
    assert crossing() == tuned.RULE_VENDOR_FROM == 1024
    use(content(layers=[{**LAYER, "vendor_from": 256}, {**LAYER, "R": 128, "vendor_from": None}]))
    assert [crossing(rank) for rank in (0, 16, 32, 33, 64, 65, 128)] == [
        256,
        256,
        256,
        256,
        256,
        math.inf,
        math.inf,
    ]
    for other in ({"hidden": 4096}, {"intermediate": 1536}, {"dtype": torch.float16}):
        assert crossing(**other) == 1024
