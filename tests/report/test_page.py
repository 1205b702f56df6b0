"""Read the report page back: every curve with its values, nothing from outside, nothing of a run's
text as markup, and runs of which parts are missing."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megalora.report.adapter_norms import measure
from megalora.report.heat_map import levels_of
from megalora.report.page import CHARTS, page, write_report
from megalora.report.records import read_run
from tests.command_outcome import outcome
from tests.report.reading import (
    Element,
    cells_of,
    curves_of,
    one_that_begins,
    read_page,
    texts,
)
from tests.report.run_folders import HOSTILE, counts, factors, make_run, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


def shown(*folders: Path) -> Element:
    return read_page(page(list(map(read_run, folders))))


def charts(root: Element) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of each chart -> its curves."""
    found = {}
    for figure in root.all("figure", "chart"):
        title = figure.all("h3")[0].text
        found[title] = curves_of(figure)
    return found


def values_of(key: str, shift: float = 0.0) -> list[tuple[float, float]]:
    points = []
    for row in rows(shift=shift):
        if key in row:
            points.append((row["step"], row[key]))
    return points


def test_every_quantity_is_there_with_its_values(run: Path) -> None:
    found = charts(shown(run))
    assert found.keys() == dict(CHARTS).keys()
    for title, key in CHARTS:
        curves = found[title]
        wanted = {f"mine: {key}": values_of(key)}
        if evaluated := values_of(f"eval_{key}"):
            wanted[f"mine: eval_{key}"] = evaluated
        assert curves.keys() == wanted.keys()
        for label, points in wanted.items():
            values = np.array(points)[:, 1]
            spread = values.max() - values.min()
            # Places have two digits: a hundredth of a unit of 170 units or more.
            np.testing.assert_allclose(
                curves[label], points, atol=2e-3 * max(spread, 1e-3), rtol=2e-3
            )


def test_runs_lie_over_each_other(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", shift=1.0)
    root = shown(run, other)
    loss = charts(root)["Loss (nats per target token, or per pair)"]
    np.testing.assert_allclose(loss["mine: loss"], values_of("loss"), atol=0.02)
    np.testing.assert_allclose(loss["other: loss"], values_of("loss", 1.0), atol=0.02)
    figure = root.all("figure", "chart")[0]
    # A colour and dashes of its own for each run, and a key.
    assert {line.attributes["class"] for line in figure.all("polyline")} == {
        "line s0", "line s0 pale", "line s1", "line s1 pale",
    }  # fmt: skip
    assert [key.text.strip() for key in root.all("p", "key")[0].all("span")] == ["mine", "other"]
    # What differs in their configs stands by itself, and what does not is left out.
    differs = one_that_begins(root, "table", "differs")
    assert "train.lr0.00011.0001" in differs.text and "lora.rank" not in differs.text


def test_a_long_series_keeps_its_peaks(run: Path, tmp_path: Path) -> None:
    """2,000 steps are drawn as means over a band from the least to the largest."""
    folder = shutil.copytree(run, tmp_path / "long")
    lines = []
    for step in range(1, 2001):
        lines.append(json.dumps({"step": step, "loss": 100.0 if step == 1234 else 1.0 + step % 2}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    figure = shown(folder).all("figure", "chart")[0]
    [curve] = curves_of(figure).values()
    assert len(curve) <= 300
    values = np.array(curve)[:, 1]
    # The mean of all steps: the last stretch may be shorter than the others.
    assert values.mean() == pytest.approx(1.5 + 98.5 / 2000, rel=0.02)
    [band] = figure.all("polygon", "band")
    highest = min(float(pair.split(",")[1]) for pair in band.attributes["points"].split())
    assert highest == 10.0  # the top of the picture
    # Larger values stand higher: SVG's y axis points down.
    heights = [float(tick.attributes["y"]) for tick in figure.all("text", "y")]
    assert heights == sorted(heights, reverse=True) and len(heights) > 2
    assert "100" in figure.all("table")[0].text


def test_the_map_of_experts_has_their_loads(run: Path) -> None:
    root = shown(run)
    [figure] = [f for f in root.all("figure", "heat") if "equal share" in f.all("h3")[0].text]
    assert figure.all("h3")[0].text == "Tokens over an equal share, steps 2 to 4"
    total = counts(2) + counts(4)
    loads = total / total.mean(1, keepdims=True)
    # Colours by how many of the bounds 0.1, 0.25, 0.5, 0.75, 1.25, 1.5, 2, 3 are reached.
    expected = [[4, 4, 4, 4], [6, 5, 4, 0]]
    assert np.allclose(loads[1], [20 / 11.25, 15 / 11.25, 10 / 11.25, 0])
    cells = np.full((2, 4), -1)
    for path in figure.all("path"):
        level = int(path.attributes["class"].removeprefix("h"))
        pieces = re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.attributes["d"])
        for column, row, width in pieces:
            cells[int(row), int(column) : int(column) + int(width)] = level
    assert cells.tolist() == expected
    p = np.array([20, 15, 10]) / 45
    entropy = -(p * np.log(p)).sum() / math.log(4)
    [table] = [t for t in root.all("table") if "busiest" in t.text]
    assert cells_of(table)[1:] == [
        ["1", "1.0000", "0.0%", "0 (1.00 shares)"],
        ["3", f"{entropy:.4f}", "25.0%", "0 (1.78 shares)"],
    ]


def test_answers_of_the_first_and_the_last_steps(run: Path) -> None:
    section = one_that_begins(shown(run), "section", "Answers while")
    assert "3 steps between are in answers.jsonl alone" in section.text
    first, second = section.all("table")
    steps = (0, 4, 5, 6, 7, 8)
    expected = [[f"step {step}", f"said {step} fine"] for step in steps]
    assert cells_of(first) == [*expected, ["in the data", "right fine"]]
    assert cells_of(second) == [[f"step {step}", f"other {step}"] for step in steps]
    # They are left out with the samples of the data.
    assert "Answers while" not in page([read_run(run)], samples=False)


def test_norms_are_those_of_the_products(run: Path) -> None:
    found = measure(run / "step_000006", json.loads((run / "manifest.json").read_text()))
    tensors = factors()

    def norm(module: str, scale: float) -> float:
        name = f"base_model.model.model.layers.3.{module}"
        a = tensors[f"{name}.lora_A.weight"].double()
        b = tensors[f"{name}.lora_B.weight"].double()
        return torch.linalg.matrix_norm(scale * (b @ a)).item()

    assert found.layers == [3] and found.projections == ["q_proj"]
    # The manifest's scale where it has one, else alpha / r.
    np.testing.assert_allclose(found.dense, [[norm("self_attn.q_proj", 6 / 2)]])
    # Two projections of one expert: squares add up.
    first = math.hypot(norm("mlp.experts.0.gate_proj", 0.5), norm("mlp.experts.0.up_proj", 3.0))
    third = norm("mlp.experts.2.gate_proj", 0.5)
    np.testing.assert_allclose(found.experts, [[first, np.nan, third]])
    assert found.expert_layers == [3] and found.left_out == 0


def test_magnitudes_take_no_norms_away(run: Path, tmp_path: Path) -> None:
    """Of DoRA, whose linears have three tensors."""
    manifest = json.loads((run / "manifest.json").read_text())
    before = measure(run / "step_000006", manifest)
    tensors = factors()
    for name in list(tensors):
        if name.endswith(".lora_B.weight"):
            magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[magnitude] = torch.ones(len(tensors[name]))
    shutil.copytree(run / "step_000006", tmp_path / "step")
    save_file(tensors, tmp_path / "step" / "adapter_model.safetensors")
    after = measure(tmp_path / "step", manifest)
    np.testing.assert_array_equal(after.dense, before.dense)
    np.testing.assert_array_equal(after.experts, before.experts)
    assert after.left_out == before.left_out == 0


def test_nothing_comes_from_outside(run: Path) -> None:
    text = page([read_run(run)])
    root = read_page(text)
    for tag in ("script", "link", "iframe", "img", "object", "embed", "form", "base"):
        assert not root.all(tag), tag
    # No attribute and no rule of the style sheet names another file.
    for forbidden in ("http", "//", "url(", "@import", "src=", "href=", "srcset", "javascript:"):
        assert forbidden not in text.replace("http-equiv", ""), forbidden
    assert "default-src 'none'" in text


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    """Hostile text as values and keys of the config, a sample, the device and the folder's name."""
    name = "x<b>&'\"y"
    folder = make_run(tmp_path / name, hostile=HOSTILE)
    harmless = shown(make_run(tmp_path / "plain"))
    root = shown(folder)

    def tags(element: Element) -> list[str]:
        found = []
        for child in element.children:
            found += [child.tag, *tags(child)]
        return found

    # The same elements as with harmless text, in the same order.
    assert tags(root) == tags(harmless)
    sample = root.all("pre")[0].text
    assert sample.startswith(f"a question {HOSTILE}")
    assert HOSTILE in root.text and root.all("title")[0].text.endswith(name)
    assert root.all("mark")[0].text == "an answer"


def test_runs_with_hostile_options(tmp_path: Path) -> None:
    """Keys and values that differ between runs stand in a table of their own."""
    one = make_run(tmp_path / "one", hostile=HOSTILE)
    root = shown(one, make_run(tmp_path / "two"))
    differs = one_that_begins(root, "table", "differs")
    assert f"{HOSTILE}.key" in differs.text
    assert not root.all("script") and not root.all("b") and not root.all("img")


def test_a_value_on_an_edge_has_reached_it() -> None:
    values = np.array([[0.0, 0.1, 0.2, np.nan]])
    assert levels_of(values, [0.1, 0.2]).tolist() == [[0, 1, 2, -1]]


def test_a_phone_can_show_it(run: Path) -> None:
    text = page([read_run(run)])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    # Pictures scale with the screen, and no width is fixed above that of a phone.
    for width in re.findall(r"width:\s*(\d+)px", text):
        assert int(width) <= 360
    for svg in read_page(text).all("svg"):
        assert "width" not in svg.attributes
        assert float(svg.attributes["viewbox"].split()[2]) <= 360
    # Tables and long lines scroll or wrap by themselves.
    assert ".wide { overflow-x: auto; }" in text and "overflow-wrap: anywhere" in text
    assert "prefers-color-scheme: dark" in text


PARTS = [
    "config.yaml", "manifest.json", "environment.json", "samples.json", "expert_tokens.bin",
    "answers.jsonl", "latest", "step_000006",
]  # fmt: skip


@pytest.mark.parametrize("missing", PARTS)
def test_a_run_without_some_records_is_shown(missing: str, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "part")
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    root = shown(folder)
    assert len(charts(root)) == len(CHARTS)
    heats = [figure.all("h3")[0].text for figure in root.all("figure", "heat")]
    expected = {"expert_tokens.bin": ["Experts", "Other linears"], "step_000006": heats[:1]}
    if missing in expected:
        assert heats == expected[missing]
    else:
        assert len(heats) == 3


@pytest.mark.parametrize("damaged", PARTS[:6])
def test_a_damaged_part_is_named(damaged: str, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "part")
    (folder / damaged).write_bytes(b"\x00[\xff")
    assert damaged in shown(folder).all("ul")[-1].text


def test_a_dense_run_without_evaluations(tmp_path: Path) -> None:
    """Nothing but losses: one chart, and no section without something in it."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    root = shown(folder)
    assert charts(root).keys() == {"Loss (nats per target token, or per pair)"}
    assert texts(root.all("h2")) == ["Summary", "Curves", "What is missing"]
    # A run that was killed before its first step.
    (folder / "metrics.jsonl").write_text("")
    assert not charts(shown(folder))


def test_steps_done_twice_and_values_that_are_none(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "resumed")
    more = [
        {"step": 2, "loss": 7.0}, {"step": 1, "loss": True}, {"step": 3, "loss": "4"},
    ]  # fmt: skip
    text = (folder / "metrics.jsonl").read_text()
    lines = map(json.dumps, more)
    text += "\n".join([*lines, '{"step": 4, "loss": NaN}', "not JSON", '{"step": 5, "lo'])
    (folder / "metrics.jsonl").write_text(text)
    root = shown(folder)
    curve = charts(root)["Loss (nats per target token, or per pair)"]["resumed: loss"]
    # As it was the last time; other values stay what they were.
    wanted = [(step, 7.0 if step == 2 else value) for step, value in values_of("loss")]
    np.testing.assert_allclose(curve, wanted, atol=0.02)
    said = root.all("ul")[-1].text
    assert "metrics.jsonl: 4 lines or values could not be read" in said
    assert "1 values were not finite" in said


def test_the_command_writes_the_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    assert outcome(capsys, "report", run, "--out", out) == (0, f"wrote {out}\n", "")
    assert "a question fine" in out.read_text()
    assert outcome(capsys, "report", run, "--out", out, "--no-samples")[0] == 0
    assert "a question fine" not in out.read_text()
    assert write_report([run], None) == run / "report.html"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "{tmp}/none is not a folder; name a run folder, such as runs/default"),
        (["{tmp}"], "{tmp} is not a run folder: it has no metrics.jsonl"),
        (
            ["{run}/step_000006"],
            "{run}/step_000006 is not a run folder: it has no metrics.jsonl; did you mean {run}?",
        ),
        (["{run}", "{run}"], "the same run folder is named twice"),
        (["{run}"] * 5, "a page shows 4 runs at most"),
        (["{run}", "--out", "{tmp}"], "{tmp} is a folder; name the file to write"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = {"tmp": tmp_path, "run": run}
    given = [argument.format(**names) for argument in arguments]
    code, out, err = outcome(capsys, "report", *given)
    assert code == 2 and not out
    assert message.format(**names) in err and err.count("\n") == 1


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it(width: int, run: Path, tmp_path: Path) -> None:
    """In a picture of the page as wide as the screen, nothing reaches its right border."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")
    out = tmp_path / "page.html"
    write_report([run], out)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--window-size={width},900",
        f"--screenshot={tmp_path}/page.png", f"--user-data-dir={tmp_path}/profile",
        out.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    from PIL import Image

    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == width
    # Something is drawn, in more colours than text has, and the page's margin is left free.
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (pixels[:, -4:] == pixels[0, -1]).all()
