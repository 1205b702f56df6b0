"""Check what a table of measured variants may say: what is refused, and what is said then."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import triton
from megalora_kernels import tuned
from megalora_kernels.tuned_table import read_table
from megalora_kernels.variants import Variant, rule

from tests.kernels.tables import BEST, KEY, LAYER, PRODUCT, chosen, content, row

pytestmark = pytest.mark.usefixtures("no_table")


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    kept = dict(given)
    del kept[name]
    return kept


# Each changes one thing of a table that is read. To Python true is a 1, and its JSON reader takes
# NaN: a check of numbers alone would let both pass.
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
def test_refused_by_name(use_table, given, message):
    path = use_table(given)
    with pytest.raises(ValueError) as error:
        chosen()
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_variant_that_does_not_fit_this_card(use_table):
    """The same table on a card with less shared memory."""
    path = use_table(content(row(512)))
    assert read_table(path, "cpu").variants
    # 100,000 bytes are about what an RTX 4090's programs have.
    with pytest.raises(ValueError, match=r"rows\[0\].*cannot run.*tune again"):
        read_table(path, "cpu", limits=(100_000, (9, 0)))


def test_a_variant_that_only_another_triton_compiles_gives_way_to_the_rule(use_table, monkeypatch):
    """A table that ships is read by every release. Say that a tile compiles on some alone."""
    newer = replace(BEST, num_stages=2)

    def problem(variant: Variant, *_: Any) -> str | None:
        return "two stages need Triton 3.6" if variant == newer else None

    monkeypatch.setattr(tuned, "problem", problem)
    monkeypatch.setattr("megalora_kernels.tuned_table.problem", problem)
    given = content(row(512, newer), row(64))
    # Measured with another minor version: its tiles may not compile here.
    given["measured"]["triton"] = "3.0.1"
    use_table(given)
    assert chosen() == rule(PRODUCT)
    assert chosen(rows_per_expert=64) == BEST
    # The same minor version as installed: a tile that cannot run means a wrong table.
    given["measured"]["triton"] = ".".join(triton.__version__.split(".")[:2]) + ".9"
    use_table(given)
    with pytest.raises(ValueError, match="two stages need Triton 3.6; tune again"):
        chosen()
