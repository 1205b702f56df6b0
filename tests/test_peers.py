"""Compare with peers at tiny sizes: every installed arm trains the same model, and no arm that does
not has a time."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bridge_model, peer_megatron, peers
from benchmarks.gpu_timing import STARTED, Budget
from benchmarks.peer_case import CPU_SHAPES, DRY_SHAPES, initial_a
from benchmarks.peer_rows import TIMES, check_losses, ratios, show, without_times
from benchmarks.peer_worker import ARMS, ArmFailed, Sample
from benchmarks.random_weights import RandomWeights
from tests.forked import forked
from tests.waiting import PATIENCE_S

# unsloth needs a GPU to be imported, so that no machine of these tests has it.
INSTALLED = [name for name in ARMS if name != "unsloth"]


def sizes_by_hand() -> dict[str, int]:
    """Adapter parameters as each library has them: an A per projection, or per fused linear."""
    c = DRY_SHAPES[0].config
    r = DRY_SHAPES[0].rank
    # Hidden size, width of an expert, outputs of q, and of k or v.
    h = 48
    inner = 40
    q = 64
    kv = 32
    experts = c["num_experts"]
    # A [r, in] and B [out, r] of a linear: r * (in + out).
    o = r * (h + q)
    down = r * (h + inner)
    fused_qkv = r * (h + q + 2 * kv)
    fused_gate_up = r * (h + 2 * inner)
    separate_qkv = r * (h + q) + 2 * r * (h + kv)
    one_layer = {
        "megalora": separate_qkv + o + experts * (2 * r * (h + inner) + down),
        "peft": separate_qkv + o + experts * (fused_gate_up + down),
        "grouped_mm composed": separate_qkv + o + experts * (fused_gate_up + down),
        "bridge per expert": fused_qkv + o + experts * (fused_gate_up + down),
        "bridge grouped": fused_qkv + o + experts * (fused_gate_up + down),
        # One adapter for all experts of a layer.
        "bridge default": fused_qkv + o + fused_gate_up + down,
    }
    # Two layers.
    return {name: 2 * count for name, count in one_layer.items()}


def compared(out: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[int, dict[str, Any]]:
    """Exit code and case of a dry run with these arms alone."""
    monkeypatch.setattr(peers, "ARMS", {name: ARMS[name] for name in names or ARMS})
    code = peers.main(["--dry", "--out", str(out)])
    return code, json.loads(out.read_text())["cases"][0]


def by_arm(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in case["rows"]}


@pytest.mark.slow
def test_all_installed_arms_train_the_same(tmp_path, monkeypatch, capsys):
    out = tmp_path / "peers.json"
    code, case = compared(out, monkeypatch)
    rows = by_arm(case)
    assert code == 0 and case["wrong"] == [] and list(rows) == list(ARMS)
    assert rows["unsloth"]["status"] == "not installed: No module named 'unsloth'"
    want = rows["megalora"]["losses"]
    assert len(want) == peers.PROOF_STEPS and want[-1] < want[0] - 0.1
    adapter_parameters = sizes_by_hand()
    for name in INSTALLED:
        assert rows[name]["status"] == "ok"
        assert rows[name]["adapter_parameters"] == adapter_parameters[name]
        losses = rows[name]["losses"]
        same = rows[name]["same_factors"]
        # All but the one with shared experts have the same factors, so that every loss agrees
        # within float32; that one starts from the same base all the same, for B is zero.
        assert same == (name != "bridge default")
        assert losses[0] == pytest.approx(want[0], rel=1e-6), name
        assert (losses == pytest.approx(want, rel=1e-6)) == same, name
        assert rows[name]["rounds"] == 3
        assert rows[name]["peak_bytes"] > rows[name]["weight_bytes"] > 0
        for measure in ("step", "step_cpu", "passes", "passes_cpu"):
            spread = rows[name]["over_megalora"][measure]
            assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
            assert name != "megalora" or spread["median"] == 1
    for row in rows.values():
        for key in row:
            assert not key.endswith("_ms"), "no absolute speed of a CPU"
    assert "times mean nothing" in capsys.readouterr().out

    # A second call has nothing to do but what is not there.
    record = json.loads(out.read_text())
    record["cases"][0]["rows"][2] = {"arm": "peft", "status": "stopped: out of time"}
    out.write_text(json.dumps(record))
    again = by_arm(compared(out, monkeypatch)[1])
    assert again["peft"]["status"] == "ok" and again["peft"]["losses"] == rows["peft"]["losses"]
    # megalora is run again too: ratios need its turns beside PEFT's.
    for name in ARMS:
        if name not in ("megalora", "peft"):
            assert again[name] == rows[name]


@pytest.mark.parametrize("difference", [pytest.param("alpha", marks=pytest.mark.slow), "routing"])
def test_an_arm_that_differs_leaves_no_times(difference, tmp_path, monkeypatch, capsys):
    """Workers are forked, so Bridge's arm gets what is changed here; megalora's does not use it."""
    if difference == "alpha":
        monkeypatch.setattr(peer_megatron, "ALPHA_OVER_RANK", 1.0)
    else:
        real = bridge_model.configure

        def other_routing(provider: Any, *others: Any) -> Any:
            provider = real(provider, *others)
            provider.moe_router_topk = 3
            return provider

        monkeypatch.setattr(bridge_model, "configure", other_routing)
    code, case = compared(tmp_path / "peers.json", monkeypatch, "megalora", "bridge per expert")
    assert code == 1
    [wrong] = case["wrong"]
    assert wrong.startswith("bridge per expert: ")
    # Other routing changes the base's loss; another alpha only what is trained.
    assert ("the base's" in wrong) == (difference == "routing")
    for row in case["rows"]:
        assert not set(TIMES) & row.keys()
    printed = capsys.readouterr().out
    assert "No times, because losses differ" in printed and "step / megalora" not in printed


def row(arm: str, losses: list[float], same: bool = True) -> dict[str, Any]:
    return {"arm": arm, "status": "ok", "losses": losses, "same_factors": same}


def test_what_losses_are_let_through():
    ours = [6.0, 5.5, 5.0]

    def wrong(losses: list[float], same: bool = True, want: list[float] = ours) -> int:
        """How many complaints there are of a peer with these losses."""
        rows = {"megalora": row("megalora", want), "peer": row("peer", losses, same)}
        return len(check_losses(rows, rows, "megalora", torch.float32))

    # Ours falls by 1.0; a peer may be off by 0.2 % of that.
    assert wrong(ours) == 0 and wrong([6.0, 5.501, 5.0]) == 0
    assert wrong([6.0, 5.5, 5.003]) == 1, "0.3 % of what the loss fell by"
    assert wrong([6.0, 5.503, 5.0]) == 1, "in any step"
    assert wrong([6.0, 5.8, 5.7], same=False) == 0, "other factors"
    assert wrong([6.001, 5.8, 5.7], same=False) == 1, "another base"
    assert wrong([6.0, 5.8, 6.1], same=False) == 1, "does not train"
    assert wrong([6.0, 5.5, math.nan]) == 1 and wrong([math.nan, 5.5, 5.0], same=False) == 1
    assert wrong([5.0, 5.5, 6.0], want=[5.0, 5.5, 6.0]) == 1, "nor does ours"


def test_ratios_are_of_one_round():
    def sample(step: float) -> Sample:
        """A round in which a step took so many seconds."""
        return Sample(passes=step / 2, step=step, passes_cpu=step / 4, step_cpu=step)

    # The machine is ten times as slow in the second and third round: that cancels.
    ours = [sample(1.0), sample(10.0), sample(10.0)]
    theirs = [sample(3.0), sample(20.0), sample(30.0)]
    # Ratios 3, 2 and 3; of the medians it would be 20 over 10.
    found = ratios(theirs, ours)
    assert found["rounds"] == 3 and found["over_megalora"]["step"]["median"] == 3.0
    case = {**CPU_SHAPES[0].sizes(), "rows_per_expert": 32, "wrong": []}
    plain = {**row("peft", [6.0, 5.0]), "adapter_parameters": 7, "note": ""}
    peer = {**plain, **found, "peak_bytes": 2**20}
    assert "peft takes 3.0 times as long: met, 3.00" in show({**case, "rows": [peer]}, dry=False)
    assert without_times([peer]) == [plain]
    slower = ratios(ours, theirs)
    assert "missed, 0.33" in show({**case, "rows": [peer | slower]}, dry=False)


def test_weights_by_published_names_are_those_that_transformers_gets():
    setup = DRY_SHAPES[0].setup(torch.device("cpu"), torch.float32)
    weights = RandomWeights(setup.config, setup.dtype, setup.device, setup.seed)
    names = list(weights)
    # Embedding, final norm and head; in each of two layers 9 tensors and those of 6 experts.
    assert len(names) == len(set(names)) == len(weights) == 3 + 2 * (9 + 3 * 6)
    stacked = weights.stacked("model.layers.1.mlp.experts.gate_up_proj")
    # transformers stacks gate over up: [6, 2 * 40, 48].
    experts = "model.layers.1.mlp.experts"
    assert torch.equal(weights[f"{experts}.4.gate_proj.weight"], stacked[4, :40])
    assert torch.equal(weights[f"{experts}.4.up_proj.weight"], stacked[4, 40:])
    assert weights[f"{experts}.2.down_proj.weight"].shape == (48, 40)
    assert torch.equal(setup.weights()[f"{experts}.4.up_proj.weight"], stacked[4, 40:]), (
        "the same in every process"
    )
    assert not torch.equal(stacked, weights.stacked("model.layers.0.mlp.experts.gate_up_proj"))
    # Rank 4, of each of 6 experts and of one linear.
    assert initial_a(setup, 0, "down").shape == (6, 4, 40)
    assert initial_a(setup, 0, "o").shape == (4, 64)


def load_bridge_lora(out: Path) -> None:
    """Import Bridge's LoRA, which looks for Transformer Engine, and note what it found."""
    from benchmarks.bridge_lora import bridge_lora

    lora = sys.modules[bridge_lora().__module__]
    found = {
        "real": hasattr(lora.LoRALinear, "adapter_forward"),
        "engine": sorted(name for name in sys.modules if name.startswith("transformer_engine")),
        "believes": sys.modules["megatron.bridge.peft.utils"].HAVE_TE,
    }
    out.write_text(json.dumps(found))


@pytest.mark.skipif("transformer_engine" in sys.modules, reason="Transformer Engine is installed")
def test_bridge_s_layers_are_its_own_and_transformer_engine_stays_missing(tmp_path):
    out = tmp_path / "found.json"
    # In another process: what Bridge imports and replaces would stay in this one.
    ((_, _, code),) = forked([("bridge", load_bridge_lora, (out,))], at_once=1)
    assert code == 0
    assert json.loads(out.read_text()) == {"real": True, "engine": [], "believes": False}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dry", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--dry", "--device", "cuda"], "--dry runs on the CPU"),
        (["--device", "cuda"], "needs a CUDA device"),
    ],
)
def test_mistakes_are_told_in_one_line(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        peers.main([*given, "--out", str(tmp_path / "peers.json")])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_another_benchmark_s_file_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "tuned.json"
    out.write_text('{"benchmark": "tune"}')
    with pytest.raises(SystemExit) as ended:
        peers.main(["--dry", "--out", str(out)])
    assert ended.value.code == 2 and "record of 'tune'" in capsys.readouterr().err
    assert out.read_text() == '{"benchmark": "tune"}'


class Said:
    """A worker whose answers are made up; ``dies`` is the command that it does not survive."""

    def __init__(self, name: str, dies: str = "") -> None:
        self.name = name
        self.dies = dies
        self.built = False
        self.asked = ""

    def tell(self, command: str, argument: Any = None) -> None:
        self.asked = command

    def hear(self) -> Any:
        if self.asked == self.dies:
            raise ArmFailed("out of memory")
        return {
            "build": {"same_factors": True}, "prove": [3.0, 2.0], "peak": 1,
            "turn": Sample(1, 1, 1, 1),
        }[self.asked]  # fmt: skip

    def ask(self, command: str, argument: Any = None) -> Any:
        self.tell(command, argument)
        return self.hear()


def test_without_the_reference_s_turns_the_others_are_run_again():
    """Its memory may have run out beside another arm's."""
    comparison = peers.Comparison(DRY_SHAPES[0], {}, 3)
    # It proves itself and dies in its first turn. Without it peft has no ratio to show.
    workers: Any = [Said("megalora", dies="turn"), Said("peft")]
    comparison.run(workers, Budget(None))
    rows = comparison.rows
    assert rows["megalora"]["status"] == "out of memory"
    assert rows["peft"]["status"] == "not reached: megalora did not take its turns"
    assert "peft" in comparison.missing()


def test_a_part_of_a_budget_counts_the_start_once(monkeypatch):
    # Of 50,000 s, 10,000 were spent before: a part is of what is left.
    monkeypatch.setenv(STARTED, str(time.time() - 10_000))
    whole = Budget(50_000)
    for part in (whole, whole.part(1)):
        assert part.left() == pytest.approx(40_000, abs=PATIENCE_S)
    assert whole.part(0.5).left() == pytest.approx(20_000, abs=PATIENCE_S)
    assert Budget(None).part(0.5).left() == math.inf
