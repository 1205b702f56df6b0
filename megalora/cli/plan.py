"""``megalora plan`` and ``megalora bench`` on the command line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalora.paths import user_path


def add_planner_commands(commands: Any) -> None:
    """Add both to argparse's subcommands."""
    _add_plan(commands)
    _add_bench(commands)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="rank the layouts for a number of GPUs by predicted time; needs no GPU"
    )
    plan.add_argument("config", type=user_path)
    plan.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    plan.add_argument(
        "--gpu",
        default="h100",
        help="h100, h200, a100, b200, or a file that megalora bench --calibrate wrote",
    )
    plan.add_argument(
        "--gpus-per-node",
        type=int,
        help="default: 8, or as in the --gpu file",
    )
    plan.add_argument("--top", type=int, default=10, help="number of layouts to show")
    plan.add_argument(
        "--imbalance",
        type=float,
        default=1.2,
        help="assumed routing: rows of the fullest expert-parallel rank over the mean",
    )
    plan.add_argument(
        "--lora-rank",
        type=_numbers,
        default=[],
        metavar="R,...",
        help="try these lora.rank too",
    )
    plan.add_argument(
        "--out", type=user_path, metavar="FILE.yaml", help="write the best layout as a config"
    )
    plan.add_argument(
        "--figure",
        type=user_path,
        metavar="FILE.png",
        help="draw memory and time of the layouts shown",
    )
    plan.add_argument(
        "--rejected",
        type=user_path,
        metavar="FILE",
        help="write every layout that is out, with its reason",
    )
    dry = "build this rank of the config's layout on the meta device and compare its bytes"
    plan.add_argument("--dry-run", type=int, metavar="RANK", help=dry)
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.set_defaults(action=_plan)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure layouts with the real training step beside their prediction, or calibrate",
    )
    bench.add_argument("config", type=user_path, nargs="?")
    bench.add_argument("overrides", nargs="*", metavar="section.key=value")
    bench.add_argument(
        "--calibrate",
        type=user_path,
        metavar="FILE.json",
        help="measure this machine instead, for plan and bench with --gpu FILE.json",
    )
    bench.add_argument("--nproc", type=int, default=1, help="number of ranks over all nodes")
    bench.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="tp=2,ep=4",
        help="layouts to measure; keys: tp pp vpp ep etp micro recompute",
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
    bench.add_argument("--warmup", type=int, default=2)
    bench.add_argument("--timeout-minutes", type=float, default=30, help="time limit of one layout")
    bench.add_argument(
        "--budget-seconds", type=float, default=120, help="time limit of --calibrate"
    )
    bench.add_argument(
        "--out",
        type=user_path,
        default=Path("runs/bench"),
        help="folder of results; what it already holds is not measured again",
    )
    bench.set_defaults(action=_bench)


def _plan(options: Any, rest: list[str]) -> None:
    from megalora.planner.command import PlanOptions, dry_run_command, plan_command

    overrides = [*options.overrides, *rest]
    if options.dry_run is not None:
        sys.exit(
            0 if dry_run_command(options.config, overrides, options.gpus, options.dry_run) else 1
        )
    asked = PlanOptions(
        gpus=options.gpus, gpu=options.gpu, top=options.top, imbalance=options.imbalance,
        lora_ranks=options.lora_rank,
        gpus_per_node=options.gpus_per_node, out=options.out, figure=options.figure,
        rejected=options.rejected,
    )  # fmt: skip
    plan_command(options.config, overrides, asked)


def _calibrate(options: Any) -> None:
    from megalora.bench.launch import Nodes, command
    from megalora.planner.command import check_writable

    if options.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, got {options.nproc}")
    check_writable(options.calibrate)
    words = [str(options.calibrate.resolve()), f"--budget-seconds={options.budget_seconds}"]
    nodes = Nodes.of(os.environ)
    if nodes.count > 1:
        started, environment = command(
            nodes, options.nproc, words, "calibration", "megalora.bench.calibrate"
        )
        sys.exit(subprocess.run(started, env=environment).returncode)
    from megalora.launching import torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torchrun(
        [
            "--standalone",
            "--nproc-per-node",
            str(options.nproc),
            "-m",
            "megalora.bench.calibrate",
            *words,
        ]
    )


def _bench(options: Any, rest: list[str]) -> None:
    if options.calibrate:
        if options.config:
            raise ValueError(
                f"bench --calibrate measures the machine, not a config; leave {options.config} out"
            )
        _calibrate(options)
        return
    if not options.config or not options.gpu:
        raise ValueError(
            "bench needs CONFIG and --gpu (h100, h200, a100, b200, or what bench --calibrate"
            " FILE.json wrote)"
        )
    from megalora.bench.command import Asked, bench_command
    from megalora.bench.rows import BenchOptions

    layouts = [word for word in options.layouts if "." not in word.partition("=")[0]]
    late = [word for word in options.layouts if word not in layouts]  # overrides behind --layouts
    how = BenchOptions(
        steps=options.steps, warmup=options.warmup, routing=options.routing, weights=options.weights
    )
    asked = Asked(
        num_ranks=options.nproc, gpu=options.gpu, out=options.out, layouts=layouts, top=options.top,
        imbalance=options.imbalance, timeout_minutes=options.timeout_minutes,
    )  # fmt: skip
    rows = bench_command(options.config, [*options.overrides, *late, *rest], asked, how)
    sys.exit(0 if any(row.ok for row in rows) else 1)
