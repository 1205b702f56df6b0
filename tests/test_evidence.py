"""docs/evidence.md is what the program writes, and records of a GPU fill the columns that are empty
now."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import evidence, tile_model
from benchmarks.evidence import PAGE, filled
from benchmarks.evidence_records import NOT_MEASURED, Results
from tests.pretended.test_launches import CEILINGS

# What every record says of the machine.
GPU = {
    "device": "NVIDIA H200", "processors": 132, "commit": "0123456789", "dry": False,
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}  # fmt: skip


def results(folder: Path, **records: dict) -> Results:
    """A folder of results with these records, each as of ``GPU`` unless it says otherwise."""
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps({**GPU, **record}))
    return Results(folder)


def table(page: str, name: str) -> str:
    """The text between a table's two markers."""
    return page.split(f"<!-- table: {name} -->\n")[1].split("<!-- end -->")[0]


def cells(page: str, name: str, first: str) -> list[str]:
    """The cells of the row that begins so."""
    for line in table(page, name).splitlines():
        if line.startswith(f"| {first} |"):
            return [cell.strip() for cell in line.strip("|").split("|")]
    raise AssertionError(f"the table {name} has no row {first}")


def test_the_page_is_what_the_program_writes(capsys):
    assert evidence.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_found_and_written_anew(tmp_path, capsys):
    page = tmp_path / "evidence.md"
    # A number that somebody has changed by hand.
    page.write_text(PAGE.read_text().replace("| 790 TFLOP/s |", "| 989 TFLOP/s |"))
    given = ["--page", str(page)]
    assert evidence.main([*given, "--check"]) == 1 and "is stale" in capsys.readouterr().err
    assert "989 TFLOP/s" in page.read_text(), "--check writes nothing"
    assert evidence.main(given) == 0 and page.read_text() == PAGE.read_text()
    assert evidence.main([*given, "--check"]) == 0


def test_a_page_with_other_tables_is_refused(tmp_path, capsys):
    page = tmp_path / "evidence.md"
    page.write_text(PAGE.read_text().replace("<!-- table: tiles -->", "<!-- table: tails -->"))
    with pytest.raises(SystemExit) as left:
        evidence.main(["--page", str(page)])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "'tails'" in said and "'tiles'" in said
    with pytest.raises(SystemExit):
        evidence.main(["--results", str(tmp_path / "nowhere")])
    assert "there is no such folder of results" in capsys.readouterr().err


def test_records_of_a_gpu_fill_the_columns(tmp_path):
    anchors = [
        {"anchor": "copy of 1 GiB", "value": 4.21, "verdict": "as expected"},
        {"anchor": "L2 reads of 24 MiB", "value": 5.1, "verdict": "below: x"},
    ]
    point = {"rule": "r", "best": "b", "second_us": {"r": [750.4, 0.01], "b": [700.6, 0.01]}}
    page = filled(
        PAGE.read_text(),
        results(
            tmp_path,
            gpu_anchors={"rows": anchors},
            gpu_tuned={"sweep": {"points": {"30b gate_up forward 128 x 512": point}}},
        ),
    )
    assert "Measured on NVIDIA H200 (torch 2.11.0, triton 3.6.0, commit 0123456)." in table(
        page, "anchors"
    )
    assert cells(page, "anchors", "copy of 1 GiB")[-2:] == ["4.21", "as expected"]
    # An anchor below what was expected is a measurement all the same.
    assert cells(page, "constants", "L2")[-1] == "5.1"
    assert cells(page, "constants", "multiprocessors")[-1] == "132"
    # The bandwidth of an H200 says nothing of an H100's.
    assert cells(page, "constants", "HBM, H100")[-1] == "not yet"
    assert cells(page, "constants", "HBM, H200")[-1] == "4.21"
    # Microseconds of the rule's variant and of the best, rounded.
    assert cells(page, "tiles", "gate_up forward, 128 × 512")[-2:] == ["750", "701"]
    assert cells(page, "tiles", "down forward, 128 × 512")[-2:] == ["not yet", "not yet"]
    assert NOT_MEASURED in table(page, "layers"), "of that there is no record"


def row(arm: str, forward_ms: float, train_ms: float) -> dict:
    """One arm of the layer with 16 of 128 experts, as on one of 8 ranks."""
    case = "30b tokens=8192 experts=16/128 r=16 balanced"
    return {
        "case": case,
        "arm": arm,
        "forward": {"median_ms": forward_ms},
        "train": {"median_ms": train_ms},
    }


def test_ratios_are_to_the_base_of_the_same_back_end(tmp_path):
    rows = [
        row("base triton", 2.0, 5.0),
        row("base grouped_mm", 1.0, 2.0),
        row("split eager", 4.0, 12.0),
        row("ours triton", 2.2, 6.0),
        row("ours grouped_mm joined", 1.02, 2.2),
    ]
    goals = []
    for value, verdict in ((1.05, "good"), (1.25, "miss"), (None, "miss")):
        goals.append({"goal": "forward over the base", "value": value, "verdict": verdict})
    page = filled(PAGE.read_text(), results(tmp_path, gpu_kernels={"rows": rows, "goals": goals}))
    found = []
    for line in table(page, "layers").splitlines():
        if "one of 8" in line and "| 1 |" in line:
            *_, untuned, with_a_table, _ = line.split("|")
            assert with_a_table.strip() == "not yet", "not tuned"
            found.append(untuned.strip())
    # Forward and training over the base, and the split arm over ours: 1.02 / 1, 2.2 / 2, 12 / 2.2;
    # 2.2 / 2, 6 / 5, 12 / 6.
    assert found == ["1.02 / 1.10 / 5.45", "1.10 / 1.20 / 2.00"]
    # One verdict of three is good; the one without a value counts as missed.
    assert cells(page, "goals", "forward over the base")[-2:] == ["1.05 to 1.25", "1 of 3"]


# The three places where records of the benchmarks say that they mean nothing.
@pytest.mark.parametrize(
    "made", [{"dry": True}, {"device": "CPU (x86_64)"}, {"settings": {"dry": True}}]
)
def test_a_dry_run_is_no_measurement(made, tmp_path):
    rows = [{"anchor": "copy of 1 GiB", "value": 0.01, "verdict": "dry: means nothing"}]
    page = filled(PAGE.read_text(), results(tmp_path, gpu_anchors={"rows": rows, **made}))
    assert cells(page, "anchors", "copy of 1 GiB")[-2:] == ["not yet", "not yet"]


def test_peers_of_a_cpu(tmp_path):
    step = {"median": 1.734, "p10": 1.6, "p90": 1.91}
    bridge = {"arm": "bridge per expert", "status": "ok", "same_factors": True}
    bridge["over_megalora"] = {"step": step}
    unsloth = {"arm": "unsloth", "status": "not installed: unsloth"}
    # Ratios of a CPU are shown: the comparison was made there on purpose, in its own record.
    cases = [{"shape": "small", "rows": [bridge, unsloth]}]
    found = results(tmp_path, peers_cpu={"device": "CPU (x86_64)", "cases": cases})
    page = filled(PAGE.read_text(), found)
    assert "| small | bridge per expert | 1.73 (1.60 to 1.91) | yes |" in table(page, "peers")
    assert "| small | unsloth | not installed: unsloth | no |" in table(page, "peers")


def test_compiled_limits_are_ranges_over_products(tmp_path):
    def row(triton: str, **more) -> dict:
        """A product compiled for an H100: the variant, then what the compiler made of it."""
        product = {"capability": 90, "triton": triton, "product": "down", "refused": None}
        variant = {"variant": "128 x 256 x 64", "num_warps": 8, "num_stages": 4}
        loads = {"weight": "tma", "rows": "tma", "persistent": True}
        made = {"registers": 240, "spilled": 0, "shared": 196736, "per_sm": 1, "loop": 90}
        return {**product, **variant, **loads, **made, **more}

    old = [
        row("3.6.0"),
        row("3.6.0", registers=251, loop=88),
        # What must not count: a variant that is refused, another GPU, a kernel that is no product,
        # and one that ended its compiler.
        row("3.6.0", registers=9, refused="too big"),
        row("3.6.0", registers=9, capability=100),
        {"kernel": "_swiglu_kernel", "capability": 90},
        {**row("3.6.0"), "error": "ended by SIGABRT"},
    ]
    new = [row("3.7.1", rows="pointers", persistent=False)]
    for name, rows in (("compiled_36", old), ("compiled_37", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = table(filled(PAGE.read_text(), Results(tmp_path)), "compiled")
    assert "| variant | Triton 3.6.0 | Triton 3.7.1 |" in found
    # Registers, bytes spilled, shared memory, programs of an SM, instructions of the loop.
    first, second = found.strip().splitlines()[-2:]
    assert first == (
        "| 128 x 256 x 64 w8 s4 w tma, x tma, persistent"
        " | 240 to 251 / 0 / 196736 / 1 / 88 to 90 | - / - / - / - / - |"
    )
    assert second.startswith("| 128 x 256 x 64 w8 s4 w tma, x pointers |")
    assert second.endswith("| 240 / 0 / 196736 / 1 / 90 |")


def test_launches_of_a_layer(tmp_path):
    # The page shows what tests/pretended allows at most: kernels of each phase, and the host's
    # operations that adapters add.
    now = [CEILINGS[f"layer triton ep8 {which}"] for which in evidence.COUNTED]
    page = PAGE.read_text()
    expected = [*(str(kernels) for kernels, _ in now), str(now[2][1] + now[3][1])]
    assert cells(page, "launches", "layer triton ep8")[1:] == expected
    phases = {"forward": {"per_layer": 8}, "backward": {"per_layer": 17}}
    rows = [
        {"arm": "megalora", "layers": 4, "profile": {"phases": phases}},
        {"arm": "peft", "layers": 4},
    ]
    measured = filled(page, results(tmp_path, gpu_model={"rows": rows}))
    assert cells(measured, "launches", "measured: megalora, 4 layers")[3:5] == ["8", "17"]


def test_a_changed_model_makes_the_page_stale(monkeypatch, tmp_path):
    shutil.copy(PAGE, tmp_path / "evidence.md")
    # Any constant of the model: times in the tables depend on all of them.
    monkeypatch.setattr(tile_model, "VISIBLE_PERSISTENT", 0.1)
    assert evidence.main(["--check", "--page", str(tmp_path / "evidence.md")]) == 1
