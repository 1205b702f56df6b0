"""The benchmark of layouts: its clock changes nothing and puts time where it belongs, its driver
survives what its runs do."""

import csv
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megalora.bench import launch
from megalora.bench.flops import flops_per_token
from megalora.bench.launch import Nodes, command, processes_of, run_to_log
from megalora.bench.outcome import status_of
from megalora.bench.results import table, write_results
from megalora.bench.routing import even_experts
from megalora.bench.rows import PARTS, BenchOptions, Measured, Predicted, Row, load_rows
from megalora.bench.runs import layout_overrides, parse_layout, run_layouts
from megalora.bench.steps import measure_layout, timed_parts, training
from megalora.bench.timers import Timeline, attach
from megalora.config import LoRAConfig, ParallelConfig, RunConfig
from megalora.config.file import load_config, save_config
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.model.attention import SDPACoreAttention
from megalora.model.dispatcher import LocalDispatcher
from megalora.model.experts import FusedExperts
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.memory import fullest_stage
from megalora.planner.weights import PlannedModel
from megalora.tiny import make_tiny
from tests.bench.made_up_clock import MadeUpClock
from tests.distributed.ranks import run_ranks
from tests.parity.everything import LORA
from tests.parity.gradients import reduced_gradients
from tests.parity.runs import make_config
from tests.waiting import time_is_up_when

# ---- inside ranks ----


def plain_and_timed(config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Losses and gradients of the same first step without and with timers, and what the timers
    say."""
    losses = []
    gradients = []
    found = {}
    clock = MadeUpClock(tick=1.0)
    for timed in (False, True):
        with training(config, options) as run:
            timeline = Timeline()
            batches = run.batches.of_step(0)
            if timed:
                attach(timeline, run.model.chunks, run.model.groups.pp.size())
            before = clock.now
            timeline.start()
            losses.append(run.stepper.train(batches, run.optimizer)[0])
            parts = timeline.seconds()
            # start's look at the clock is the beginning of the step
            wall = clock.now - before - clock.tick
            gradients.append(reduced_gradients(run.model, run.optimizer))
            found = {"parts": parts, "wall": wall, "stage": run.model.groups.pp.rank()}
    # Rank 0 alone has the whole gradients.
    same = {}
    for name, gradient in (gradients[0] or {}).items():
        same[name] = torch.equal(gradient, gradients[1][name])
    return {"losses": losses, "same": same, **found}


CASES = [
    ("tiny", 2, {"ep": 2}, "off"), ("tiny", 2, {"pp": 2, "vpp": 2}, "full"),
    ("everything", 2, {"tp": 2, "ep": 2}, "selective"),
    ("everything", 4, {"tp": 2, "pp": 2, "etp": 2}, "full"),
    ("tiny_dense", 2, {"pp": 2}, "selective"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "world", "sizes", "recompute"), CASES)
def test_timers_change_no_bit_and_add_up(
    name, world, sizes, recompute, chats, tmp_path, request
) -> None:
    base = request.getfixturevalue(name)
    lora = LORA if name == "everything" else LoRAConfig(rank=4)
    config = make_config(base, chats, tmp_path, sizes, recompute, lora=lora)
    config = replace(config, data=replace(config.data, max_length=41))
    ranks = run_ranks(plain_and_timed, world, config, BenchOptions(routing="natural"))
    assert len(ranks[0]["same"]) > 10 and all(ranks[0]["same"].values())
    for rank in ranks:
        parts = rank["parts"]
        assert rank["losses"][0] == rank["losses"][1] and math.isfinite(rank["losses"][0])
        assert tuple(parts) == PARTS and min(parts.values()) >= 0
        assert sum(parts.values()) == rank["wall"] > 0
        first = rank["stage"] == 0
        last = rank["stage"] == sizes.get("pp", 1) - 1
        # "everything" has its MoE layer first and its dense one second; a shared expert counts as
        # mlp.
        moe = name == "tiny" or (name == "everything" and first)
        assert parts["attention"] > 0 and parts["reduction"] > 0 and parts["other"] > 0
        assert (parts["experts"] > 0) == (parts["dispatch"] > 0) == moe
        assert (parts["mlp"] > 0) == (name != "tiny")
        assert (parts["head"] > 0) == last and (parts["bubble"] > 0) == ("pp" in sizes)


class Slow(torch.autograd.Function):
    """Identity that takes 2 s forward and 3 s backward by the given clock."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: MadeUpClock) -> Tensor:
        ctx.clock = clock
        clock.pass_time(2.0)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.clock.pass_time(3.0)
        return grad, None


def slowed(found: Any, clock: MadeUpClock) -> Any:
    """The result of a method with its first tensor slow."""
    if isinstance(found, tuple):
        return (Slow.apply(found[0], clock), *found[1:])
    return Slow.apply(found, clock)


def parts_when_slow(config: RunConfig, owner: Any, method: str) -> dict[str, float]:
    """The parts of one step in which time passes in one module alone; the patches end with this
    forked process."""
    clock = MadeUpClock(tick=0.0)
    original = getattr(owner, method)

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        return slowed(original(self, *args, **kwargs), clock)

    setattr(owner, method, slow)
    with training(config, BenchOptions(routing="natural")) as run:
        return timed_parts(run, 0, 1)[0]


@pytest.mark.parametrize(("recompute", "forwards"), [("off", 1), ("full", 2)])
@pytest.mark.parametrize(
    ("part", "owner", "method", "num_layers"),
    [
        ("experts", FusedExperts, "compute", 1),
        ("dispatch", LocalDispatcher, "dispatch_preprocess", 1),
        ("mlp", SharedExpertMLP, "forward", 1),
        ("attention", SDPACoreAttention, "forward", 2),
    ],
)
def test_time_goes_to_the_part_that_takes_it(
    part, owner, method, num_layers, recompute, forwards, everything, chats, tmp_path
) -> None:
    """Forward, recomputed forward and backward: 4 microbatches of 2 samples through every layer
    that has the module."""
    config = make_config(everything, chats, tmp_path, {}, recompute, lora=LORA)
    config = replace(config, data=replace(config.data, max_length=21))
    [parts] = run_ranks(parts_when_slow, 1, config, owner, method)
    added = 4 * num_layers * (2.0 * forwards + 3.0)
    assert parts == dict.fromkeys(PARTS, 0.0) | {part: added}


def test_a_part_that_was_not_entered_last_cannot_end() -> None:
    timeline = Timeline()
    timeline.start()
    timeline.enter("dispatch")
    timeline.enter("experts")
    with pytest.raises(
        RuntimeError, match=r"dispatch ends, but other > dispatch > experts is under way"
    ):
        timeline.leave("dispatch")


# ---- routing ----


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "ep", "sources"),
    [(24, 8, 3, 4, 2), (7, 12, 5, 3, 3), (5, 6, 6, 1, 1)],
)
def test_even_experts(tokens, experts, top_k, ep, sources) -> None:
    by_source = [even_experts(tokens, experts, top_k, ep, source) for source in range(sources)]
    found = torch.cat(by_source)
    for row in found.tolist():
        assert len(set(row)) == top_k, "an expert is chosen twice"
    per_expert = Counter(found.flatten().tolist())
    per_rank = Counter((found // (experts // ep)).flatten().tolist())
    # All sources together: each alone may favour some experts, if the next makes up for it.
    assert len(per_expert) == experts and max(per_expert.values()) - min(per_expert.values()) <= 1
    assert len(per_rank) == ep and max(per_rank.values()) - min(per_rank.values()) <= 1


def imbalances(config: RunConfig) -> dict[str, Any]:
    found = {}
    for routing in ("balanced", "natural"):
        with training(config, BenchOptions(routing=routing)) as run:  # type: ignore[arg-type]
            found[routing] = (timed_parts(run, 0, 1)[1], run.batches.train.source)
    return found


@pytest.mark.parametrize(("sizes", "recompute"), [({"ep": 2}, "off"), ({"tp": 2, "ep": 2}, "full")])
def test_balanced_routing_is_even_and_natural_is_not(
    sizes, recompute, everything, chats, tmp_path
) -> None:
    """The adapter's router learns in both: ``GradientCheck`` inside would stop a run whose router
    got no gradient."""
    config = make_config(everything, chats, tmp_path, sizes, recompute, lora=LORA)
    config = replace(config, data=replace(config.data, max_length=42))
    for found in run_ranks(imbalances, 2, config):
        (mean, worst), tokens = found["balanced"]
        # Rows of a rank at least: two samples of 42 tokens, top-k rows each, over two ranks.
        rows = 2 * 42 * model_shape(read_hf_config(everything)).top_k / 2
        assert 1 <= mean <= worst <= 1 + 1 / rows and tokens == "random"
        (mean, worst), tokens = found["natural"]
        assert worst >= mean > 1.02 and tokens == str(chats)


# ---- a whole measurement ----


def test_what_is_measured(tiny, chats, tmp_path) -> None:
    """Random weights on a pipeline with two chunks a stage; memory against the planner's count."""
    config = make_config(tiny, chats, tmp_path, {"pp": 2, "vpp": 2}, "selective")
    config = replace(config, data=replace(config.data, max_length=101))
    m, other = run_ranks(measure_layout, 2, config, BenchOptions(steps=2, weights="random"))
    assert isinstance(m, Measured) and other is None
    assert (
        m.weights == "random" and m.stages == [0, 1] and m.imbalance is None and m.device == "CPU"
    )
    assert m.step_seconds_min <= m.step_seconds <= m.step_seconds_max
    assert m.tokens_per_second_per_gpu == pytest.approx(8 * 101 / m.step_seconds / 2)
    assert sum(m.parts.values()) <= m.marked_step_seconds + 1e-9
    # Random weights know nothing: a loss of about log(vocabulary).
    assert abs(m.loss - math.log(model_shape(read_hf_config(tiny)).vocab)) < 2
    shape = model_shape(read_hf_config(tiny))
    flops = flops_per_token(shape, resolve(config.lora, shape), 100, "selective")
    assert m.model_tflops == pytest.approx(8 * 100 * flops.model / m.step_seconds / 2 / 1e12)
    layout = ParallelLayout(
        parallel=config.parallel, num_ranks=2, micro_batch_size=2, recompute="selective"
    )
    plan = fullest_stage(PlannedModel.of(shape, config.lora), layout, Workload.of(config))
    planned = plan.peak_bytes - plan["CUDA context, NCCL"]
    assert 0.8 * planned < max(m.peak_bytes) < 1.25 * planned


def test_flops_are_the_same_whatever_linears_are_called(tmp_path: Path) -> None:
    shape = model_shape(read_hf_config(make_tiny(tmp_path / "base", arch="mixtral")))
    like_qwen = replace(shape, model_type="qwen3_moe")
    lora = LoRAConfig(rank=4)
    for level in ("off", "selective", "full"):
        found = flops_per_token(shape, resolve(lora, shape), 64, level)
        assert found == flops_per_token(like_qwen, resolve(lora, like_qwen), 64, level)


def test_flops_by_hand(everything) -> None:
    """Layer 0: routed experts and a shared one; layer 1: dense. One linear after the other."""
    s = model_shape(read_hf_config(everything))
    q = s.num_heads * s.head_dim
    kv = s.num_kv_heads * s.head_dim
    h = s.hidden
    r = 3
    attention = [(q, h), (kv, h), (kv, h), (h, q)]
    expert = [(s.expert_intermediate, h)] * 2 + [(h, s.expert_intermediate)]
    shared = [(s.shared_intermediate, h)] * 2 + [(h, s.shared_intermediate)]
    dense = [(s.intermediate, h)] * 2 + [(h, s.intermediate)]
    layers = 2 * attention + s.top_k * expert + shared + dense + [(s.num_experts, h)]
    head = [(s.vocab, h)]

    def multiplied(linears):
        return sum(n * k for n, k in linears)

    def adapters(linears):
        return sum(r * (n + k) for n, k in linears)

    scores = 2 * 2 * 64 * q
    flops = {}
    for level in ("off", "selective", "full"):
        flops[level] = flops_per_token(s, resolve(LORA, s), 64, level)
    # Frozen weights have a forward and an input gradient, adapters a weight gradient besides; a
    # multiplication and an addition each. Scores have two products forward and four backward.
    expected = 4 * multiplied(layers + head) + 6 * adapters(layers + head) + 3 * scores
    # Norms, q and k and v's biases and the shared expert's gate are parameters too, a thousandth
    # here.
    assert (
        flops["off"].model
        == flops["full"].model
        == flops["off"].hardware
        == pytest.approx(expected, rel=0.01)
    )
    again = s.top_k * expert[:2] + shared + dense
    for level, linears in (("selective", again), ("full", layers)):
        more = flops[level].hardware - flops[level].model
        assert more == pytest.approx(
            2 * multiplied(linears) + 2 * adapters(linears) + scores, rel=0.02
        )


# ---- layouts as text ----


def test_parse_layout(tiny, chats, tmp_path) -> None:
    config = make_config(tiny, chats, tmp_path, {"ep": 2}, "selective")
    parsed = parse_layout(" tp=2, ep=4,micro=4,recompute=full", 8, config)
    assert parsed == ParallelLayout(
        parallel=ParallelConfig(tp=2, ep=4), num_ranks=8, micro_batch_size=4, recompute="full"
    )
    kept = parse_layout("tp=2", 4, config)
    assert (kept.parallel.ep, kept.micro_batch_size, kept.recompute) == (2, 2, "selective")
    save_config(config, tmp_path / "c.yaml")
    for text in ("tp=2,pp=2,vpp=2,recompute=off", "etp=2,micro=1,recompute=full"):
        layout = parse_layout(text, 8, config)
        read = load_config(tmp_path / "c.yaml", layout_overrides(layout))
        assert (read.parallel, read.train.micro_batch_size) == (
            layout.parallel,
            layout.micro_batch_size,
        )
        assert read.train.recompute == layout.recompute


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2,mirco=2", "layout 'tp=2,mirco=2': unknown key 'mirco'; did you mean micro?"),
        ("dp=2", "unknown key 'dp'; known keys: tp, pp, vpp, ep, etp, micro, recompute"),
        ("tp", "'tp' is not of the form key=value"),
        ("tp=2,tp=4", "tp is given twice"),
        ("ep=two", "ep must be a number of at least 1, got 'two'"),
        ("recompute=on", "recompute must be one of off, selective, full, got 'on'"),
        ("vpp=2", "layout 'vpp=2': parallel.vpp=2 interleaves"),
        ("ep=16", "layout 'ep=16': 8 ranks cannot hold the expert grid"),
    ],
)
def test_layouts_that_are_none(text, message, tiny, chats, tmp_path) -> None:
    with pytest.raises(ValueError) as caught:
        parse_layout(text, 8, make_config(tiny, chats, tmp_path, {}))
    assert message in str(caught.value)


def test_options_that_are_none() -> None:
    for options, message in (
        ({"steps": 0}, "--steps"),
        ({"warmup": 1}, "--warmup"),
        ({"routing": "even"}, "--routing"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchOptions(**options)  # type: ignore[arg-type]


# ---- what a run said before it ended ----

TORCHRUN = (
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"
    " \n====\nmegalora.bench.measure FAILED\n"
)


@pytest.mark.parametrize(
    ("log", "status"),
    [
        (
            "megalora: 3 ranks cannot hold it.\n  Change parallel.ep\n" + TORCHRUN,
            "refused: 3 ranks cannot hold it.",
        ),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
            + TORCHRUN,
            "out of memory",
        ),
        (
            "torch.distributed.DistBackendError: NCCL error ... Cuda failure 2 'out of memory'\n"
            + TORCHRUN,
            "out of memory",
        ),
        (TORCHRUN + "  exitcode  : -9 (pid: 12)\n", "out of memory"),
        (
            "[rank1]: Traceback (most recent call last):\n[rank1]: KeyError: 'q'\n[rank0]:"
            " RuntimeError: [gloo] Connection closed by peer\n" + TORCHRUN,
            "failed: KeyError: 'q'",
        ),
        ("[rank0]: AssertionError\n" + TORCHRUN, "failed: AssertionError"),
        ("bash: torchrun: not found\n\n", "failed: bash: torchrun: not found"),
        ("", "failed: the log is empty"),
    ],
)
def test_status(log: str, status: str) -> None:
    assert status_of(log) == status


# ---- the driver ----

MEASURED = dict(
    layout="", num_ranks=2, routing="balanced", weights="random", tokens="random",
    sequence_length=100, global_batch_size=8,
    step_seconds=0.5, step_seconds_min=0.4, step_seconds_max=0.7, tokens_per_second_per_gpu=808.0,
    model_tflops=1.5,
    hardware_tflops=2.0, parts=dict.fromkeys(PARTS, 0.06), slowest_stage=0,
    parts_mean=dict.fromkeys(PARTS, 0.06),
    parts_per_rank=[dict.fromkeys(PARTS, 0.06)] * 2, marked_step_seconds=0.54, stages=[0, 0],
    peak_bytes=[2**30, 3 * 2**30],
    reserved_bytes=None, memory_from="live tensors", imbalance=1.25, imbalance_worst=1.5, loss=7.0,
    device="CPU", versions={},
)  # fmt: skip
"""As ``measure`` writes it."""

STAND_IN = f"""
import json, os, signal, sys, time
from pathlib import Path
row = Path([a for a in sys.argv if a.startswith("--row=")][0][6:])
micro, rank = [a for a in sys.argv if a.startswith("train.micro")][0][-1], os.environ["RANK"]
(row.parent.parent / f"started-{{micro}}-{{rank}}-{{time.time_ns()}}").touch()
# Neither rank goes on before both have started: torchrun ends a rank that is still starting as
# soon as the other has failed.
this_run = os.environ["MEGALORA_BENCH_RUN"]
(row.parent.parent / f"run-{{this_run}}-{{rank}}").touch()
while len(list(row.parent.parent.glob(f"run-{{this_run}}-*"))) < 2:
    time.sleep(0.02)
if micro == "1" and rank == "0":
    row.parent.mkdir(exist_ok=True)
    row.write_text({json.dumps(MEASURED)!r})
if micro == "2" and rank == "1":
    raise KeyError("a seeded mistake")
if micro == "4" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if micro == "8":
    time.sleep(600)
"""


def predicted(config: RunConfig, num_ranks: int) -> Predicted | None:
    return (
        Predicted(0.4, 2 * 2**30, {"attention": 0.3, "other": 0.1}, "a guess")
        if num_ranks == 2
        else None
    )


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    """Ranks that take no time to start, and do what the driver must survive."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(launch, "MODULE", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def bench(config: RunConfig, tmp_path: Path, micros: list[int], **how: Any) -> list[Row]:
    save_config(config, tmp_path / "config.yaml")
    layouts = [parse_layout(f"ep=2,micro={micro}", 2, config) for micro in micros]
    how = {"say": lambda line: None, **how}
    return run_layouts(
        tmp_path / "config.yaml",
        [],
        layouts,
        num_ranks=2,
        out=tmp_path / "out",
        predict=predicted,
        **how,
    )


def test_a_run_that_fails_costs_its_row_alone(stand_in, tiny, chats, tmp_path) -> None:
    config = make_config(tiny, chats, tmp_path, {}, global_batch_size=16)
    out = tmp_path / "out"
    # The stand-in raises at 2, is killed at 4, succeeds at 1; 16 is refused before it starts.
    rows = bench(config, tmp_path, [2, 4, 1, 16])
    assert [row.status for row in rows] == [
        "failed: KeyError: 'a seeded mistake'",
        "out of memory",
        "ok",
        (
            "refused: train.global_batch_size=16 cannot be divided: micro_batch_size=16 * data"
            " parallel=2 = 32, and 16 is not a multiple of 32. Change train.global_batch_size or"
            " train.micro_batch_size."
        ),
    ]
    assert rows[2].measured == Measured(**MEASURED) and rows[2].predicted == predicted(config, 2)  # type: ignore[arg-type]
    assert "a seeded mistake" in (out / rows[0].log).read_text()
    assert not rows[3].log and rows[3].predicted is None
    assert load_rows(out / "results.json") == rows
    count = Counter(path.name.split("-")[1] for path in out.glob("started-*"))
    assert count == {"2": 2, "4": 2, "1": 2}
    said: list[str] = []
    again = bench(config, tmp_path, [1, 2], say=said.append)
    assert [row.status for row in again] == ["ok", "failed: KeyError: 'a seeded mistake'"]
    assert "measured before" in said[0]
    count = Counter(path.name.split("-")[1] for path in out.glob("started-*"))
    assert count == {"2": 4, "4": 2, "1": 2}, "what is ok is not run again, what failed is"
    assert {row.status for row in load_rows(out / "results.json")} == {row.status for row in rows}
    other = replace(config, train=replace(config.train, lr=3e-3))
    assert bench(other, tmp_path, [16])[0].key != rows[3].key, (
        "another config is another measurement"
    )


LIMIT_S = 7777
"""Of a run in tests of what happens when time is up, which ``time_is_up_when`` decides."""


def test_a_run_that_hangs_is_ended_with_all_its_ranks(
    stand_in, tiny, chats, tmp_path, monkeypatch
) -> None:
    # A token that the test knows, to look for processes by.
    monkeypatch.setattr(
        launch.uuid, "uuid4", lambda: type("Fixed", (), {"hex": f"token-{tmp_path.name}"})
    )
    started = partial((tmp_path / "out").glob, "started-8-*")
    time_is_up_when(monkeypatch, lambda: len(list(started())) == 2, LIMIT_S)
    [row] = bench(
        make_config(tiny, chats, tmp_path, {}, global_batch_size=16),
        tmp_path,
        [8],
        timeout_s=LIMIT_S,
    )
    assert row.status == "timed out" and row.measured is None
    assert processes_of(f"token-{tmp_path.name}") == []


def test_a_process_that_left_its_group_is_ended_too(tmp_path, monkeypatch) -> None:
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child',"
        " flush=True); time.sleep(600)"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}],"
        " start_new_session=True).wait()"
    )
    log = tmp_path / "log"
    time_is_up_when(monkeypatch, lambda: log.read_text() == "child\n", LIMIT_S)
    code = run_to_log(
        [sys.executable, "-c", parent], {launch.TOKEN: "left-its-group"}, log, timeout_s=LIMIT_S
    )
    assert code is None
    assert log.read_text() == "child\n" and processes_of("left-its-group") == []


def test_several_nodes(monkeypatch) -> None:
    assert Nodes.of({}) == Nodes(1, 0) == Nodes.of({"NNODES": "1"})
    assert Nodes.of({"NNODES": "4", "NODE_RANK": "3"}) == Nodes(4, 3) and not Nodes(4, 3).writes
    for environment in (
        {"NNODES": "2"},
        {"NNODES": "2", "NODE_RANK": "2"},
        {"NNODES": "two", "NODE_RANK": "0"},
    ):
        with pytest.raises(ValueError, match=r"NNODES|NODE_RANK"):
            Nodes.of(environment)
    monkeypatch.setenv("RDZV_ID", "job7")
    words, environment = command(Nodes(2, 1), 16, ["c.yaml", "--row=r"], "tp1")
    assert words == ["bash", str(launch.SCRIPT), "c.yaml", "--row=r"] and launch.SCRIPT.is_file()
    assert environment["MODULE"] == "megalora.bench.measure"
    # A rendezvous of its own for each layout, so that late ranks of the last one find no peer.
    assert environment["RDZV_ID"] == "job7-tp1"
    assert environment["NPROC_PER_NODE"] == "8"
    with pytest.raises(ValueError, match="9 ranks cannot be shared out evenly over NNODES=2"):
        command(Nodes(2, 0), 9, [], "")


@pytest.mark.slow
def test_for_real(tiny, chats, tmp_path) -> None:
    """One layout in processes of its own and one that is refused, then both again."""
    config = make_config(tiny, chats, tmp_path, {})
    config = replace(config, data=replace(config.data, max_length=41))
    options = BenchOptions(steps=1, routing="natural")
    ok, refused = bench(config, tmp_path, [2, 16], options=options)
    assert ok.status == "ok", (tmp_path / "out" / ok.log).read_text()
    assert refused.status.startswith("refused: ")
    assert ok.measured and ok.measured.weights == "real" and ok.measured.tokens == str(chats)
    assert ok.measured.imbalance and ok.measured.imbalance > 1 and len(ok.measured.peak_bytes) == 2
    written = (tmp_path / "out" / "measured").glob("*.json")
    times = {path: path.stat().st_mtime_ns for path in written}
    assert bench(config, tmp_path, [2, 16], options=options)[0] == ok
    assert times == {path: path.stat().st_mtime_ns for path in times} and len(times) == 1


# ---- the report ----


def test_report(tmp_path) -> None:
    measured = Measured(**MEASURED)  # type: ignore[arg-type]
    basis = predicted(None, 2)  # type: ignore[arg-type]
    slower = replace(
        measured,
        tokens_per_second_per_gpu=404.0,
        step_seconds=1.0,
        imbalance=None,
        imbalance_worst=None,
    )
    row = Row(
        key="a",
        layout="tp=1 ep=2 micro=1 recompute=off",
        status="ok",
        log="l",
        seconds=9,
        measured=measured,
    )
    rows = [
        replace(row, key="b", layout="tp=2 ep=1 micro=1 recompute=off", measured=slower),
        replace(
            row,
            key="c",
            layout="tp=2 ep=2 micro=8 recompute=full",
            status="out of memory",
            measured=None,
            predicted=basis,
        ),
        replace(row, predicted=basis),
    ]
    text = table(rows)
    # One line in the table of speeds, one in the table of parts.
    found = [line.split() for line in text.splitlines() if line.startswith("tp=1")]
    assert found[0][4:] == ["ok", "808", "1.50", "500.0", "400.0", "-20.0", "3.00", "2.00", "-33.3"]
    assert found[1][4:] == ["60.0"] * len(PARTS) + ["500.0", "540.0", "1.250", "1.500"]
    assert text.index("tp=1 ep=2") < text.index("tp=2 ep=1") < text.index("tp=2 ep=2"), (
        "the fastest first"
    )
    for said in ("4 P + 6 A + 6 S h d L", "predicted from a guess", "out of memory"):
        assert said in text
    paths = write_results(rows, tmp_path / "report")
    assert load_rows(paths["json"]) == rows
    again = replace(rows[1], status="timed out")
    write_results([again], tmp_path / "report")
    assert load_rows(paths["json"]) == [
        rows[0],
        again,
        rows[2],
    ], "a report of some rows loses none of the others"
    write_results(rows, tmp_path / "report")
    with paths["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["ok", "out of memory", "ok"]
    assert (lines[2]["attention_seconds"], lines[2]["predicted_attention_seconds"]) == (
        "0.06",
        "0.3",
    )
    assert lines[1]["step_seconds"] == "" and lines[1]["predicted_step_seconds"] == "0.4"
    assert lines[0]["peak_bytes"] == str(3 * 2**30)
    from matplotlib.image import imread

    picture = imread(paths["png"])
    assert picture.shape[0] > 300 and picture.shape[1] > 1000
    # Bars in the colours of measured and predicted: as many rows of pixels as bars are thick.
    for colour, least in (((0, 0x72, 0xB2), 2), ((0xBB, 0xBB, 0xBB), 2)):
        exact = (abs(picture[..., :3] * 255 - torch.tensor(colour).numpy()) < 1).all(-1)
        assert exact.any(1).sum() > 20 * least and exact.sum() > 5000
    with pytest.raises(ValueError, match="no row to report"):
        write_results([], tmp_path)


def test_a_report_without_a_single_success(tmp_path) -> None:
    row = Row(key="a", layout="tp=1", status=f"failed: {'x' * 300}", log="where.log", seconds=1)
    assert "see where.log" in table([row]) and max(map(len, table([row]).splitlines()[:3])) < 200
    assert write_results([row], tmp_path)["png"].stat().st_size > 5000
