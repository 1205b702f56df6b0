"""What ``megalora eval`` refuses before torch and ranks, and which config it takes."""

from pathlib import Path

import pytest

from megalora.config import ParallelConfig
from megalora.config.file import save_config
from megalora.evaluate.request import Request, plan_of
from tests.parity.runs import make_config
from tests.refused_commands import Said, adapter, refused

__all__ = ["adapter", "refused"]  # fixtures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tiny}", "evaluate {tiny} on what? Give --data FILE"),
        ("{tiny} --data /no/rows.jsonl", "/no/rows.jsonl: no such file"),
        ("{tiny} --data {chats} --rule best", "--rule best: not a rule"),
        ("{tiny} --data {chats} --limit 0", "--limit must be at least 1, got 0"),
        ("{tiny} --data {chats} --nproc 0", "--nproc must be at least 1, got 0"),
        ("{tiny} --data {chats} --top-k -2", "top_k must not be negative, got -2"),
        ("{tiny} --data {chats} parallel.tp=2", "1 ranks cannot hold the attention grid: tp=2"),
        ("{tiny} --data {chats} --nproc 5 parallel.ep=5", "parallel.ep=5 does not divide"),
        ("{tiny} --data {chats} paralel.tp=2", "unknown config key paralel"),
        (
            "{tiny} --data {chats} --nproc 2 parallel.pp=2 --generate",
            "generation does not run with parallel.pp=2",
        ),
        ("{adapter} --data {chats} --base /no", "--base=/no: no such folder"),
        ("{adapter} --data {chats} --out {tmp}", "{tmp} is a folder; name the file to write"),
        ("{adapter} --data {chats} --config /no.yaml", "/no.yaml: no such config file"),
    ],
)
def test_mistakes(arguments, message, tiny, adapter, chats, tmp_path, refused: Said) -> None:
    names = {"tiny": tiny, "adapter": adapter, "chats": chats, "tmp": tmp_path}
    words = [word.format(**names) for word in arguments.split()]
    assert refused("eval", *words).startswith(message.format(**names))


def test_the_run_s_config_with_a_layout_of_its_own(
    tiny: Path, adapter: Path, chats: Path, tmp_path: Path
) -> None:
    """Data is read as the run read it; the layout is that of the command line."""
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "step_000005")
    (run / "latest").write_text("step_000005\n")
    trained = make_config(tiny, chats, run, {"tp": 2, "pp": 2, "stage_layers": (1, 3)})
    save_config(trained, run / "config.yaml")
    asked = Request(target=str(run), nproc=2, overrides=["parallel.ep=2"])
    plan = plan_of(asked)
    assert (plan.base, plan.adapter) == (tiny, run / "step_000005")
    assert plan.config_file == run / "config.yaml"
    assert plan.config.parallel == ParallelConfig(ep=2)
    assert plan.config.data == trained.data
    # Other data takes the place of training's and evaluation's, and is read in the same way.
    plan = plan_of(Request(target=str(run), data=str(chats)))
    assert (plan.config.data.train, plan.config.data.eval) == (str(chats), None)
    assert plan.config.data.max_length == trained.data.max_length
    # What the ranks get is found already.
    again = plan_of(Request.from_json(plan.resolved.to_json()))
    assert again.config == plan.config
    assert again.request.target == str(run / "step_000005")
