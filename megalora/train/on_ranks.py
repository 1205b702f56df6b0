"""What each rank does before it trains: read the config, install the device, join the others."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.environment import set_defaults

if TYPE_CHECKING:
    from megalora.train.warm.restore import InMemory


def on_ranks(
    arguments: list[str], module: str, begin: Callable[[], Callable[..., Any]],
    in_memory: "InMemory | None" = None,
) -> None:  # fmt: skip
    """Train as ``CONFIG.yaml [section.key=value ...]`` says.

    Args:
        module: what torchrun has started, for the message.
        begin: imports what trains and returns it, a function of config, job and pulse; called when
            the device is installed.
        in_memory: what a launcher has given ranks that it has forked (``warm/parent.py``).
    """
    from megalora.config.file import load_config
    from megalora.preflight import check_command, check_paths, check_weights

    if not arguments or arguments[0] in ("-h", "--help"):
        raise ValueError(
            f"usage: torchrun --nproc-per-node N -m {module} CONFIG.yaml [section.key=value ...]"
        )
    config = load_config(arguments[0], arguments[1:])
    # Here too: on several nodes nothing else looks before the ranks start.
    config.check_training()
    check_command(config, samples=module == "megalora.rl")
    _check_snapshots(config, in_memory)
    check_paths(config)
    base = Path(config.model.path)
    # A name on the hub: the ranks download it.
    if base.is_dir():
        check_weights(base)
    set_defaults(Path(config.checkpoint.dir))  # before torch is imported
    from megalora import host

    config.check_world(host.world_size())
    host.install()
    train = begin()
    from megalora.train.lost_peer import explained
    from megalora.train.watch.pulse import Pulse
    from megalora.train.watch.watch import watching

    run = Path(config.checkpoint.dir)
    pulse = Pulse(config.train.hang_seconds)
    # Twice: a peer may be lost while ranks meet, too; and where it is lost later, the group must
    # not be left in order.
    with (
        explained(run),
        host.process_group(config.train.timeout_minutes) as met,
        watching(met, pulse, run) as alarm,
        explained(run, alarm),
    ):
        train(config, met.job, pulse=pulse, in_memory=in_memory)


def _check_snapshots(config: Any, in_memory: "InMemory | None") -> None:
    if config.checkpoint.snapshots is not None and in_memory is None:
        raise ValueError(
            "checkpoint.snapshots needs a launcher that holds them: start the run with megalora"
            " train --max-restarts N (with --nnodes and --meet on several nodes), or leave it out"
            " under torchrun, which goes on from disk"
        )
