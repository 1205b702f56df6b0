"""``megalora eval`` of adapters that are not ``B A`` alone, and of a moving average."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import CheckpointConfig, LoRAConfig
from megalora.evaluate.judge import judge
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


@pytest.mark.slow
def test_the_base_of_dora_is_the_base(tiny_dense: Path, chats: Path, tmp_path: Path) -> None:
    """Magnitudes of zero would make zeros of its linears."""
    lora = LoRAConfig(rank=4, alpha=12.0, use_dora=True)
    config = make_config(tiny_dense, chats, tmp_path / "run", {}, lora=lora, steps=2, lr=1e-2)
    run_ranks(train, 1, config)
    before, after = records(tmp_path / "run", "eval_loss")
    (verdict,) = run_ranks(judged, 1, Request(target=str(tmp_path / "run")))
    assert verdict.judged["adapter"].loss == pytest.approx(after, rel=1e-5)
    assert verdict.judged["base"].loss == pytest.approx(before, rel=1e-5)
    assert abs(after - before) > 1e-2
    # Without its magnitudes it would be another adapter.
    plain = replace(
        config, lora=replace(lora, use_dora=False), train=replace(config.train, steps=3),
        checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=True),
    )  # fmt: skip
    with pytest.raises(Exception, match="lora.use_dora=True, this run has False"):
        run_ranks(train, 1, plain)


@pytest.mark.slow
def test_an_average_is_judged_by_the_config_of_its_run(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = make_config(tiny, chats, tmp_path / "run", {}, steps=2, lr=1e-2, ema_decay=0.5)
    run_ranks(train, 1, config)
    plan = plan_of(Request(target=str(tmp_path / "run/step_000002/ema")))
    assert plan.config_file == tmp_path / "run/config.yaml"
    (verdict,) = run_ranks(judged, 1, plan.request)
    before, after = records(tmp_path / "run", "eval_loss")
    # Between the two ends of the run.
    assert after < verdict.judged["adapter"].loss < before
