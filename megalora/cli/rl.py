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
    # Ranks that have servers are started on several nodes by launch/torchrun_node.sh.
    rl.set_defaults(action=_rl, nnodes=1, meet=None)


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


def add_node_arguments(parser: Any) -> None:
    """Where other nodes are met."""
    parser.add_argument(
        "--nnodes",
        type=int,
        default=1,
        help="number of nodes that train, with --nproc ranks each; further nodes that start the"
        " same command wait as spares. Needs checkpoint.snapshots",
    )
    parser.add_argument(
        "--meet",
        metavar="HOST:PORT",
        help="one of the nodes, as the others reach it, and a free port there; the same on all",
    )
    parser.add_argument(
        "--node-wait",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="how long nodes wait for each other, and for a spare to take the place of a lost one",
    )


def start_ranks(options: Any, rest: list[str], module: str) -> None:
    """Check a run's config and start its ranks under torchrun.

    With ``megalora.rl`` what judges is looked at, too.

    Args:
        rest: ``section.key=value`` that stood behind other arguments.
        module: what each rank runs.
    """
    overrides = [*options.overrides, *rest]
    config = None
    snapshots = None
    # Here, so that a mistake is shown before ranks start and once, not by each of them.
    if module == "megalora.rl":
        from megalora.rl.preflight import check_sampled_run

        check_sampled_run(options.config, overrides, options.nproc, options.nproc)
    else:
        from megalora.preflight import check_run

        config = check_run(options.config, overrides, options.nproc * max(1, options.nnodes))
        snapshots = config.checkpoint.snapshots
    # Seconds to save after SIGTERM; torchrun's own default kills after 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts must not be negative, got {options.max_restarts}")
    if snapshots is not None and snapshots.replicate and options.nnodes == 1:
        raise ValueError(
            f"checkpoint.snapshots.replicate={snapshots.replicate} sends snapshots to another node,"
            " and there is one: give --nnodes and --meet, or leave it out"
        )
    if options.nnodes != 1 or options.meet is not None:
        _start_together(options, overrides, config)
    if snapshots is not None:
        _start_warm(options, overrides)
    ranks = [*ranks_here(options.nproc), "--max-restarts", str(options.max_restarts)]
    torchrun([*ranks, "-m", module, str(options.config), *overrides])


def _start_together(options: Any, overrides: list[str], config: Any) -> None:
    """Fork ranks here together with other nodes; never returns."""
    if config is None or config.checkpoint.snapshots is None:
        raise ValueError(
            "--nnodes and --meet are for runs with checkpoint.snapshots; without it start"
            " launch/torchrun_node.sh on every node"
        )
    if options.nnodes < 2 or options.meet is None:
        raise ValueError(
            f"--nnodes {options.nnodes} and --meet {options.meet}: several nodes need both, the"
            " number of those that train and HOST:PORT of one of them"
        )
    if not options.node_wait > 0:
        raise ValueError(f"--node-wait must be more than 0 seconds, got {options.node_wait:g}")
    from megalora.config.file import flat_options
    from megalora.train.warm.together import Together, meeting_place, take_token
    from megalora.versions import installed

    started = {
        **flat_options(config),
        "--nproc": options.nproc, "--nnodes": options.nnodes,
        "--max-restarts": options.max_restarts, "version of torch": installed("torch"),
    }  # fmt: skip
    host, port = meeting_place(options.meet)
    together = Together(
        options.nnodes, host, port, take_token(), options.node_wait,
        config.checkpoint.snapshots.replicate, started,
    )  # fmt: skip
    _start_warm(options, overrides, together)


def _start_warm(options: Any, overrides: list[str], together: Any = None) -> None:
    """Fork ranks here, which start again from snapshots in memory; never returns."""
    if options.max_restarts == 0:
        raise ValueError(
            "checkpoint.snapshots is what ranks start again from: say how often they may, with"
            " --max-restarts N, or leave it out"
        )
    ranks_here(options.nproc)
    from megalora.train.warm.launcher import train_warm

    arguments = [str(options.config), *overrides]
    train_warm(arguments, options.nproc, options.max_restarts, together)


def _rl(options: Any, rest: list[str]) -> None:
    start_ranks(options, rest, "megalora.rl")
