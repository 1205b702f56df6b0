"""Run the GPU benchmarks as scripts on a CPU: what they write and refuse, and that training arms
train the same thing."""

import argparse
import itertools
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_grouped_lora,
    bench_train_gpu,
    goals,
    gpu_machine,
)
from benchmarks.compare import Row
from benchmarks.expert_case import SIZES, Sizes
from benchmarks.gpu_timing import STARTED, Budget, Stats, earlier, save
from benchmarks.linear_case import LinearSpec
from benchmarks.train_arms import (
    KernelExperts,
    Setup,
    Training,
    adapted,
    base_model,
    training,
    with_experts,
)
from benchmarks.train_case import TINY_MODEL, adapter_parameters
from tests.arms_to_time import without_triton
from tests.forked import forked
from tests.named_tensors import only_parts
from tests.waiting import PATIENCE_S

CPU = torch.device("cpu")
TINY = Sizes("tiny", hidden=48, inner=40, num_experts=8, top_k=3)
SETUP = Setup(TINY_MODEL, rank=8, num_tokens=32, device=CPU, dtype=torch.float32)


@pytest.mark.slow
def test_bench_writes_what_it_found_and_what_it_left_out(tmp_path, monkeypatch, capsys):
    tiny = LinearSpec("tiny peft", 64, 4, 40, 48, 8)
    monkeypatch.setitem(SIZES, "tiny", TINY)
    for name in ("our_arms", "our_linear_arms"):
        every_arm = getattr(bench_grouped_lora, name)

        def some_arms(case, every_arm=every_arm):
            return without_triton(every_arm(case))

        monkeypatch.setattr(bench_grouped_lora, name, some_arms)
    args = argparse.Namespace(
        model="tiny", tokens=[32], experts=[8, 4], ranks=[8], routing=["balanced", "zipf"],
        crossing=[8],
        dry=False, out=tmp_path / "r.json"
    )  # fmt: skip
    bench = bench_grouped_lora.Bench(
        CPU, torch.float32, repeats=2, budget=Budget(None), compiled=False, peft_case=tiny
    )
    assert bench_grouped_lora.run(bench, args) == 0
    record = json.loads(args.out.read_text())
    # Four layers (two numbers of experts, two routings), two linears, PEFT's, two crossings.
    assert len(record["seconds"]) == 9 and record["failures"] == record["not_reached"] == []
    arms = {row["arm"] for row in record["rows"]}
    assert arms >= {"ours auto", "split eager", "peft stock", "base loop"}
    assert record["versions"]["torch"] == torch.__version__
    # What is not installed is named with no version, so that its absence is on record.
    assert record["versions"]["unsloth"] is None
    # Asked for 8 rows per expert. With top 3 whole tokens make 63 rows for 8 experts, 30 for 4.
    assert [(p["experts"], p["rows"]) for p in record["crossing"]] == [(8, 7), (4, 7)]
    assert record["settings"]["model"] == "tiny"
    # A budget of nothing: every case is named as not reached, and that is no failure.
    late = bench_grouped_lora.Bench(CPU, torch.float32, repeats=2, budget=Budget(0), compiled=False)
    args.out = tmp_path / "late.json"
    assert bench_grouped_lora.run(late, args) == 0
    assert len(json.loads(args.out.read_text())["not_reached"]) == 9
    assert "out of time before 9 cases" in capsys.readouterr().out


def test_a_budget_runs_from_the_start_of_the_script(monkeypatch):
    """Imports are over before a script can make a budget; gpu_all.sh tells when it was started."""
    # PATIENCE_S is more than any machine takes between two of these lines.
    assert Budget(10_000).left() == pytest.approx(10_000, abs=PATIENCE_S)
    monkeypatch.setenv(STARTED, str(time.time() - 3000))
    assert Budget(10_000).left() == pytest.approx(7000, abs=PATIENCE_S)
    assert Budget(None).left() == float("inf")
    assert gpu_machine.STARTED == STARTED


def test_a_second_call_of_the_bench_goes_on_with_its_own_record(tmp_path, monkeypatch):
    """What was measured stays, bit for bit; only what was not reached is run."""
    args = argparse.Namespace(dry=True, out=tmp_path / "r.json", crossing=[])
    ran = []

    def plan(bench, args):
        for label in ("first", "second"):
            yield label, partial(ran.append, label)

    def a_bench():
        return bench_grouped_lora.Bench(
            CPU, torch.float32, repeats=1, budget=Budget(None), compiled=False
        )

    monkeypatch.setattr(bench_grouped_lora, "plan", plan)
    # One row of each kind that a record has, of the first case alone.
    first = a_bench()
    forward = Stats(1.0, 1.0, 1.0, 1.0)
    train = Stats(2.0, 1.0, 3.0, 1.0)
    timed = Row("first", "ours auto", "ours", forward=forward, train=train)
    first.report.rows = [timed]
    first.report.verdicts = [goals.Verdict.of(goals.TRAIN, "first", 1.2)]
    first.report.crossing = [goals.Crossing(8, 7, 1.0, None)]
    first.report.seconds = {"first": 1.0}
    settings = bench_grouped_lora._settings(args)
    save(args.out, "grouped_lora", CPU, settings=settings, **first.report.content())
    second = a_bench()
    assert bench_grouped_lora.run(second, args) == 0 and ran == ["second"]
    assert second.report.rows == [timed] and second.report.crossing == first.report.crossing
    assert second.report.verdicts == first.report.verdicts
    # Without the tuned table other kernels run: nothing of the record holds for them.
    monkeypatch.setenv("MEGALORA_TUNED", "off")
    third = a_bench()
    assert bench_grouped_lora.run(third, args) == 0 and ran == ["second", "first", "second"]


def test_a_record_is_continued_only_where_it_was_measured_alike(tmp_path, capsys):
    path = tmp_path / "r.json"
    assert earlier(path, "x", CPU, {}) is None
    save(path, "x", CPU, settings={"sizes": (1, 2)}, rows=[1])
    found = earlier(path, "x", CPU, {"sizes": (1, 2)})
    assert found is not None and found["rows"] == [1]
    assert earlier(path, "x", CPU, {"sizes": (1, 3)}) is None
    assert "another settings" in capsys.readouterr().out
    # Another GPU, other code, or so long ago that clocks and drivers may differ.
    for changed in ({"device": "another"}, {"commit": "0"}, {"when": "2026-01-01T00:00:00+00:00"}):
        path.write_text(json.dumps({**found, **changed}))
        assert earlier(path, "x", CPU, {"sizes": (1, 2)}) is None, changed
    with pytest.raises(ValueError, match="is a record of 'x', not of 'y'"):
        earlier(path, "y", CPU, {})
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        earlier(path, "x", CPU, {})


@pytest.mark.parametrize("script", [bench_grouped_lora, bench_train_gpu])
def test_without_a_gpu_scripts_say_so_in_one_line(script, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(["--budget-seconds", "1"])
    said = capsys.readouterr()
    assert left.value.code == 2
    assert said.err.count("\n") == 1 and "needs a CUDA device" in said.err
    assert not said.out


def test_our_experts_train_as_peft_s_do():
    """The same loss and the same gradients from the same factors in the same model."""
    theirs = adapted(
        base_model(SETUP), SETUP, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    )
    ours = with_experts(SETUP, KernelExperts, joined=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        # Attention has the same names in both; experts are copied below.
        ours.load_state_dict(only_parts("self_attn")(theirs.state_dict()), strict=False)
    # PEFT adapts both parameters of a fused module, with one wrapper around the other: the inner
    # one's is gate_up, the outer one's down. It stacks 8 experts in A [8 r, in] and interleaves
    # them in B [out, r 8], where expert is the fastest index; ours are A [8, r, in] and B [8, out,
    # r].
    pairs = []
    for their_block, our_block in zip(blocks(theirs), blocks(ours), strict=True):
        kernel = our_block.experts
        for a, b, wrapper in (
            (kernel.a1, kernel.b1, their_block.experts.base_layer),
            (kernel.a2, kernel.b2, their_block.experts),
        ):
            their_a = wrapper.lora_A.default.weight
            their_b = wrapper.lora_B.default.weight
            a.data.copy_(their_a.unflatten(0, (8, -1)))
            b.data.copy_(their_b.unflatten(1, (-1, 8)).permute(2, 0, 1))
            pairs.append((a, their_a, b, their_b))
    their_loss = float(training(theirs, SETUP, "", True).forward_backward())
    our_loss = float(training(ours, SETUP, "", True).forward_backward())
    # Rounding of float32 in sums of another order, as in the gradients below.
    assert their_loss == pytest.approx(our_loss, rel=1e-5)
    for a, their_a, b, their_b in pairs:
        torch.testing.assert_close(a.grad.flatten(0, 1), their_a.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            b.grad.permute(1, 2, 0).flatten(1), their_b.grad, rtol=1e-3, atol=1e-6
        )
    # Attention lies before the experts: its gradients show what backward hands on.
    num_compared = 0
    for name, parameter in theirs.named_parameters():
        if "q_proj.lora_A" in name:
            our_grad = ours.get_parameter(name).grad
            torch.testing.assert_close(our_grad, parameter.grad, rtol=1e-3, atol=1e-6)
            num_compared += 1
    assert num_compared == len(blocks(ours))


def blocks(model: torch.nn.Module) -> list:
    """MoE blocks of a model of transformers, in order, whatever wraps the model."""
    return [m for m in model.modules() if type(m).__name__ == "Qwen3MoeSparseMoeBlock"]


def train_in_a_process(name: str, out: Path) -> None:
    """Train one arm in bfloat16, as on a GPU."""
    setup = replace(SETUP, dtype=torch.bfloat16)
    out.write_text(json.dumps(bench_train_gpu.train(name, setup, steps=2)))


def test_our_experts_take_float32_as_a_gemm_under_autocast_does():
    """What CUDA's norms return under autocast; a CPU's return bfloat16, so no dry run shows it."""
    setup = replace(SETUP, dtype=torch.bfloat16)
    experts = blocks(with_experts(setup, KernelExperts, joined=False))[0].experts
    x_TH = torch.randn(setup.num_tokens, TINY_MODEL["hidden_size"])
    # Each token goes to two different experts of eight.
    experts_TK = torch.rand(setup.num_tokens, 8).argsort(dim=1)[:, :2]
    probs_TK = torch.rand(setup.num_tokens, 2)
    y_TH = experts(x_TH, experts_TK, probs_TK)
    assert y_TH.dtype == torch.bfloat16 and y_TH.any()
    assert torch.equal(y_TH, experts(x_TH.bfloat16(), experts_TK, probs_TK))


def test_a_dry_run_tries_every_arm_that_a_gpu_will():
    args = argparse.Namespace(dry=True)
    tried = {bench_train_gpu.ARMS[name] for name, _ in bench_train_gpu.arms_to_run(CPU, args)}
    # unsloth is installed on no machine that makes dry runs.
    assert tried == set(bench_train_gpu.ARMS.values()) - {bench_train_gpu.ARMS["unsloth"]}


def test_training_arms_train(tmp_path):
    files = {}
    for name in ("megalora", "one of 8 ranks", "kernels", "unsloth"):
        files[name] = tmp_path / f"{name}.json"
    # Each in a process of its own, as the benchmark runs them.
    jobs = [(name, train_in_a_process, (name, file)) for name, file in files.items()]
    for name, _, code in forked(jobs, at_once=2):
        assert code == 0, name
    rows = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert rows["unsloth"]["status"] == "not installed: No module named 'unsloth'"
    for name in ("megalora", "one of 8 ranks", "kernels"):
        assert rows[name]["status"] == "ok" and rows[name]["loss"][1] < rows[name]["loss"][0]
        # 32 tokens a step.
        assert rows[name]["tokens_per_s"] == pytest.approx(32 / rows[name]["step_ms"] * 1e3)
    assert rows["megalora"]["adapter_parameters"] == adapter_parameters(TINY_MODEL, 8)
    # A row for PEFT that takes twice as long: the column of ratios must say 2.00.
    peft = {**rows["megalora"], "arm": "peft", "step_ms": 2 * rows["megalora"]["step_ms"]}
    table = bench_train_gpu.show([*rows.values(), peft])
    assert "2.00" in table and "unsloth: not installed" in table


def test_a_step_that_does_not_train_has_no_speed(monkeypatch):
    losses = itertools.count(0.0)
    rising = Training(lambda: torch.tensor(next(losses)), lambda: None, 1, "rises")
    found = bench_train_gpu.measure_steps(rising, CPU, steps=2)
    assert found["status"] == "wrong: the loss went from 0.000 to 3.000"
