"""The command ``megalora rl``."""

import os
from typing import Any

from megalora.cli.command_parser import add_command, add_config_arguments
from megalora.launching import ranks_here, torchrun


def add_rl_command(commands: Any) -> None:
    rl = add_command(
        commands,
        "rl",
        help="learn from rewards: sample completions, judge them, train on them, again and again",
        example="megalora rl run.yaml --nproc 8 train.lr=2e-5",
        more="The config needs objective.name=grpo and rl.rewards; see docs/rl.md. Each checkpoint"
        " in checkpoint.dir is an adapter that PEFT loads, rollouts/ beside them is what was"
        " sampled.",
    )
    add_config_arguments(rl)
    add_rank_arguments(rl)
    rl.set_defaults(action=_rl)


def add_rank_arguments(parser: Any) -> None:
    """How many ranks to start here, and how often again."""
    parser.add_argument(
        "--nproc", type=int, default=1, help="number of ranks to start, one per GPU"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        help="number of times that ranks start again and resume after one has failed",
    )


def start_ranks(options: Any, rest: list[str], module: str) -> None:
    """Check a run's config and start its ranks under torchrun.

    With ``megalora.rl`` what judges is looked at, too.

    Args:
        rest: ``section.key=value`` that stood behind other arguments.
        module: what each rank runs.
    """
    overrides = [*options.overrides, *rest]
    snapshots = None
    # Here, so that a mistake is shown before ranks start and once, not by each of them.
    if module == "megalora.rl":
        from megalora.rl.preflight import check_sampled_run

        check_sampled_run(options.config, overrides, options.nproc, options.nproc)
    else:
        from megalora.preflight import check_run

        config = check_run(options.config, overrides, options.nproc)
        snapshots = config.checkpoint.snapshots
    # Seconds to save after SIGTERM; torchrun's own default kills after 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts must not be negative, got {options.max_restarts}")
    if snapshots is not None:
        _start_warm(options, overrides)
    ranks = [*ranks_here(options.nproc), "--max-restarts", str(options.max_restarts)]
    torchrun([*ranks, "-m", module, str(options.config), *overrides])


def _start_warm(options: Any, overrides: list[str]) -> None:
    """Fork ranks here, which start again from snapshots in memory; never returns."""
    if options.max_restarts == 0:
        raise ValueError(
            "checkpoint.snapshots is what ranks start again from: say how often they may, with"
            " --max-restarts N, or leave it out"
        )
    ranks_here(options.nproc)
    from megalora.train.warm.parent import train_warm

    train_warm([str(options.config), *overrides], options.nproc, options.max_restarts)


def _rl(options: Any, rest: list[str]) -> None:
    start_ranks(options, rest, "megalora.rl")
