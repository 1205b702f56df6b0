"""Push adapters to a server that speaks the hub's commit API: what arrives, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import megalora
from megalora.adapters.export import export
from megalora.adapters.files import CARD, CONFIG, PROBE, STATE_JSON, WEIGHTS
from megalora.adapters.push import left_out
from tests.adapters.adapters import train
from tests.adapters.fake_hub import FakeHub, fake_hub

# One process for all commands: each would import torch. The hub's client reads its address once.
SCRIPT = """
import contextlib, io, json, os, sys
from megalora.cli import main
said = []
for token, arguments in json.loads(sys.stdin.read()):
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main(["push", *arguments])
        except SystemExit as ended:
            code = ended.code
    said.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""
BASE = "them/base"


def pushed(
    hub: FakeHub, folder: Path, *commands: tuple[str, list[str]]
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of ``megalora push`` for each (token, arguments)."""
    root = Path(megalora.__file__).parents[1]
    # Xet's servers have a protocol of their own; without it the client uses Git LFS.
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(commands), cwd=folder, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout)]


def make_run(tiny: Path, folder: Path) -> Path:
    """A run folder with a checkpoint: an adapter, its probe, and its training state."""
    trained = train(tiny, folder / "run", rank=2, target_modules=["q_proj", "down_proj"])
    checkpoint = folder / "run/step_000007"
    checkpoint.mkdir()
    for path in trained.folder.iterdir():
        if path.is_file():
            path.rename(checkpoint / path.name)
    (checkpoint / PROBE).write_text('{"probe": 1}')
    (checkpoint / STATE_JSON).parent.mkdir()
    (checkpoint / STATE_JSON).write_text('{"secret": "path of the data"}')
    (folder / "run/latest").write_text("step_000007\n")
    return checkpoint


def test_what_is_left_out_is_named_with_the_reason(tmp_path: Path) -> None:
    for name in (CONFIG, CARD, PROBE):
        (tmp_path / name).write_text("{}")
    first = tmp_path / "adapter_model-00001-of-00002.safetensors"
    for path in (first, tmp_path / "adapter_model-00002-of-00002.safetensors"):
        save_file({"x": torch.zeros(1)}, path)
    (tmp_path / "adapter_model.safetensors.index.json").write_text("{}")
    assert left_out(tmp_path) == ""
    # Its card is an export's; a checkpoint's, which is exported, is written anew.
    (tmp_path / "logs").mkdir()
    (tmp_path / "a.txt").write_text("")
    assert left_out(tmp_path) == "left out: a.txt, logs/ (no part of an adapter)"
    (tmp_path / "training_state").mkdir()
    assert left_out(tmp_path) == (
        "left out: README.md (a card is written in its place); a.txt, logs/ (no part of an"
        " adapter); training_state/ (training state, only for resuming)"
    )
    for number in range(9):
        (tmp_path / f"b{number}.txt").write_text("")
    assert "a.txt, b0.txt, b1.txt, b2.txt, b3.txt, b4.txt, b5.txt, b6.txt, ... (no" in left_out(
        tmp_path
    )


@pytest.mark.slow
def test_push_uploads_an_export_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    checkpoint = make_run(tiny, tmp_path)
    export(checkpoint, tmp_path / "exported", base=str(tiny))
    config = json.loads((tmp_path / "exported" / CONFIG).read_text())
    config["base_model_name_or_path"] = BASE
    (tmp_path / "exported" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "exported" / CARD).write_text("# Mine\n")
    (tmp_path / "exported/notes.txt").write_text("not for others")
    shutil.copytree(tmp_path / "exported", tmp_path / "cut")
    whole = (tmp_path / "cut" / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(whole[:-8])
    base_files = {}
    for path in tiny.glob("*.json"):
        base_files[path.name] = path.read_bytes()
    run = ["run", "--base", BASE]
    with fake_hub() as hub:
        hub.add(BASE, base_files)
        hub.add("me/old", {"adapter_model.bin": b"old", PROBE: b"old", "LICENSE": b"mine"})
        answers = pushed(
            hub, tmp_path,
            ("writer", [*run[:1], "me/new", *run[1:], "--private"]),
            ("writer", ["exported", "me/old", "--revision", "v2", "--message", "Second try"]),
            ("writer", [*run[:1], "me/old", *run[1:], "--private"]),
            ("writer", [*run[:1], "you/new", *run[1:]]),
            ("reader", [*run[:1], "me/fresh", *run[1:]]),
            ("wrong", [*run[:1], "me/fresh", *run[1:]]),
            ("writer", [*run[:1], "me/down", *run[1:]]),
            ("writer", [*run[:1], "me/busy", *run[1:]]),
            ("writer", ["cut", "me/fresh"]),
            ("writer", ["exported", "me/fresh", "--base", "them/other"]),
            ("writer", ["run", "me/fresh", "--base", "them/other"]),
        )  # fmt: skip

    code, out, err = answers[0]
    # Behind it are the client's own bars.
    said = err.splitlines()[0]
    assert (code, said) == (
        0,
        "run is a run folder: taking step_000007, its latest checkpoint",
    )
    assert out.startswith("pushed run/step_000007 to ") and 'from_pretrained(base, "me/new")' in out
    # Nothing else lies in a checkpoint.
    assert "\n  left out: training_state/ (training state, only for resuming)\n" in out
    new = hub.repos["me/new"]["main"]
    assert hub.private["me/new"]
    assert {*new} == {".gitattributes", CONFIG, WEIGHTS, CARD, PROBE}
    assert json.loads(new[CONFIG])["base_model_name_or_path"] == BASE
    assert f"base_model: {BASE}\n" in new[CARD].decode()
    (tmp_path / "arrived").write_bytes(new[WEIGHTS])
    arrived = load_file(tmp_path / "arrived")
    kept = load_file(checkpoint / WEIGHTS)
    assert {*arrived} == {*kept}
    assert all(arrived[name].equal(kept[name]) for name in kept)

    # An export goes as it is, and its weights take the place of those that were there.
    assert answers[1][0] == 0
    assert 'from_pretrained(base, "me/old", revision="v2")' in answers[1][1]
    assert "\n  left out: notes.txt (no part of an adapter)\n" in answers[1][1]
    assert {*hub.repos["me/old"]["v2"]} == {"LICENSE", CONFIG, WEIGHTS, CARD, PROBE}
    assert hub.repos["me/old"]["v2"][CARD] == b"# Mine\n"
    assert hub.repos["me/old"]["v2"][WEIGHTS] == (tmp_path / "exported" / WEIGHTS).read_bytes()
    assert {*hub.repos["me/old"]["main"]} == {"adapter_model.bin", PROBE, "LICENSE"}
    # One commit each: nobody gets half of an adapter.
    assert hub.commits == [
        ("me/new", "main", "Upload step_000007"), ("me/old", "v2", "Second try")
    ]  # fmt: skip

    for answer, message in zip(
        answers[2:],
        (
            "me/old exists and is public; make it private there, or leave --private out",
            "you/new: the token may not write there; it needs the right to, and OWNER must be you",
            "me/fresh: the token may not write there",
            "me/fresh: the hub does not accept the token; run hf auth login, or set HF_TOKEN",
            "me/down: the hub cannot be reached (",
            "me/busy: the hub is down for maintenance (the hub answered 503)",
            f"cut/{WEIGHTS}",
            "exported is an export, and its card names the base them/base; export the checkpoint",
            "--base=them/other: there is no such folder, and the hub does not give it",
        ),
        strict=True,
    ):
        code, out, err = answer
        assert (code, out) == (2, ""), answer
        line = err.splitlines()[-1]
        assert line.startswith("megalora: ") and message in line, answer
        assert "Traceback" not in err and err.count("megalora: ") == 1
    # None of them has made a repository.
    assert {*hub.repos} == {BASE, "me/old", "me/new"}
