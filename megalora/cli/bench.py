"""Read the arguments of ``megalora bench``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalora.cli.command_parser import add_command, add_config_arguments
from megalora.paths import prepare_file, user_path


def add_bench_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    bench = add_command(
        commands,
        "bench",
        help="measure layouts with the real training step beside their prediction, or calibrate",
        example="megalora bench run.yaml --nproc 8 --gpu h100 --layouts ep=8 tp=2,ep=4;"
        " megalora bench run.yaml --calibrate machine.json --nproc 8",
    )
    # --calibrate measures a machine; it needs no config.
    add_config_arguments(bench, nargs="?")
    _add_calibration(bench)
    # Over all nodes, unlike train's, which starts ranks on this machine alone.
    bench.add_argument("--nproc", type=int, default=1, help="number of ranks over all nodes")
    bench.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="tp=2,ep=4",
        help="layouts to measure; keys: tp cp pp vpp ep etp micro recompute",
    )
    bench.add_argument("--top", type=int, metavar="K", help="the K layouts that plan ranks first")
    bench.add_argument(
        "--gpu", help="rates for predictions: h100, h200, a100, b200, or a file of --calibrate"
    )
    bench.add_argument("--routing", default="balanced", help="balanced or natural")
    bench.add_argument(
        "--weights", default="auto", help="random, real, or auto: real where model.path has them"
    )
    bench.add_argument(
        "--imbalance", type=float, default=1.2, help="imbalance of natural routing, for predictions"
    )
    bench.add_argument("--steps", type=int, default=5, help="timed steps, after --warmup")
    bench.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    bench.add_argument("--timeout-minutes", type=float, default=30, help="time limit of one layout")
    bench.add_argument(
        "--out",
        type=user_path,
        default=Path("runs/bench"),
        help="folder of results; what it already holds is not measured again",
    )
    bench.set_defaults(action=_bench)


def _add_calibration(bench: argparse.ArgumentParser) -> None:
    """Add the options of measuring a machine."""
    bench.add_argument(
        "--calibrate",
        type=user_path,
        metavar="FILE.json",
        help="measure this machine instead, for plan and bench with --gpu FILE.json: the sizes that"
        " the plan of CONFIG on --nproc ranks asks for, or without CONFIG a grid of usual sizes",
    )
    bench.add_argument(
        "--budget-seconds", type=float, default=120, help="time limit of --calibrate"
    )


def _calibrate(options: Any, overrides: list[str]) -> None:
    """Start the ranks that measure this machine, or this node's share of them."""
    from megalora.bench.launch import Nodes, command

    if options.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, got {options.nproc}")
    prepare_file(options.calibrate)
    words = [str(options.calibrate.resolve()), f"--budget-seconds={options.budget_seconds}"]
    if options.config:
        _check_plannable(options.config, overrides)
        # Overrides beside the file: argparse takes positional words in one place only.
        words[1:1] = overrides
        words += [f"--config={options.config.resolve()}", f"--imbalance={options.imbalance}"]
    nodes = Nodes.of(os.environ)
    if nodes.count > 1:
        # Through the launch script, which finds the other nodes.
        started, environment = command(
            nodes, options.nproc, words, "calibration", "megalora.bench.calibrate"
        )
        sys.exit(subprocess.run(started, env=environment).returncode)
    from megalora.launching import ranks_here, torchrun

    torchrun([*ranks_here(options.nproc), "-m", "megalora.bench.calibrate", *words])


def _check_plannable(path: Path, overrides: list[str]) -> None:
    """Raise ``ValueError`` for a config that cannot be planned, before ranks start."""
    from megalora.config.file import load_config
    from megalora.planner.models import shape_in
    from megalora.planner.weights import PlannedModel

    config = load_config(path, overrides)
    PlannedModel.of(shape_in(config), config.lora)


def _bench(options: Any, rest: list[str]) -> None:
    # Two commands in one: of a machine, and of a config's layouts.
    if options.calibrate:
        _calibrate(options, [*options.overrides, *rest])
        return
    if not options.config or not options.gpu:
        raise ValueError(
            "bench needs CONFIG and --gpu (h100, h200, a100, b200, or what bench --calibrate"
            " FILE.json wrote)"
        )
    from megalora.bench.command import Asked, bench_command
    from megalora.bench.rows import BenchOptions

    layouts: list[str] = []
    overrides = [*options.overrides]
    for word in options.layouts:
        # --layouts takes all words that follow, overrides such as train.lr=1e-4 among them.
        key = word.partition("=")[0]
        if "." in key:
            overrides.append(word)
        else:
            layouts.append(word)
    overrides += rest
    how = BenchOptions(
        steps=options.steps, warmup=options.warmup, routing=options.routing, weights=options.weights
    )
    asked = Asked(
        num_ranks=options.nproc, gpu=options.gpu, out=options.out, layouts=layouts, top=options.top,
        imbalance=options.imbalance, timeout_minutes=options.timeout_minutes,
    )  # fmt: skip
    rows = bench_command(options.config, overrides, asked, how)
    # A layout that fails is a result; a benchmark of which all fail is an error.
    sys.exit(0 if any(row.ok for row in rows) else 1)
