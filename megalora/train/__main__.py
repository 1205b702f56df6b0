"""``torchrun --nproc-per-node N -m megalora.train CONFIG.yaml [section.key=value ...]``"""

import sys
from pathlib import Path

from megalora.environment import set_defaults
from megalora.user_error import guarded


def main(arguments: list[str]) -> None:
    from megalora.config.file import load_config
    from megalora.preflight import check_paths, check_weights

    if not arguments or arguments[0] in ("-h", "--help"):
        raise ValueError(
            "usage: torchrun --nproc-per-node N -m megalora.train CONFIG.yaml [section.key=value"
            " ...]"
        )
    config = load_config(arguments[0], arguments[1:])
    # Here too: on several nodes nothing else looks before the ranks start.
    config.check_training()
    check_paths(config)
    base = Path(config.model.path)
    # A name on the hub: the ranks download it.
    if base.is_dir():
        check_weights(base)
    set_defaults(Path(config.checkpoint.dir))  # before torch is imported
    from megalora import host

    config.check_world(host.world_size())
    host.install()
    from megalora.train.loop import train
    from megalora.train.lost_peer import explained

    run = Path(config.checkpoint.dir)
    # Twice: a peer may be lost while ranks meet, too; and where it is lost later, the group must
    # not be left in order.
    with explained(run), host.process_group(config.train.timeout_minutes) as job, explained(run):
        train(config, job)


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
