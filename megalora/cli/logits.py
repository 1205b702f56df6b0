"""Read the arguments of ``megalora logits``."""

from typing import Any

from megalora.cli.command_parser import add_command, add_config_arguments
from megalora.launching import ranks_here, torchrun
from megalora.paths import user_path


def add_logits_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    command = add_command(
        commands,
        "logits",
        help="keep a teacher's most probable tokens for the data of a config",
        example="megalora logits distill.yaml --out teacher-logits --k 64",
        more="A run with objective.teacher=FOLDER then learns from these, without the teacher in"
        " memory.",
    )
    add_config_arguments(command)
    command.add_argument(
        "--out", type=user_path, required=True, metavar="FOLDER", help="a new folder"
    )
    command.add_argument(
        "--k", type=int, default=64, help="number of tokens that are kept at each target token"
    )
    command.add_argument("--nproc", type=int, default=1, help="number of ranks, one per GPU")
    command.set_defaults(action=_logits)


def _logits(options: Any, rest: list[str]) -> None:
    from megalora.atomic_folder import check_new
    from megalora.config.file import load_config
    from megalora.preflight import check_hub_data, check_inputs, check_teacher, named_data
    from megalora.train.logits_command import LogitsRequest

    overrides = [*options.overrides, *rest]
    # Here, so that a mistake is shown before ranks start and once, not by each of them.
    config = load_config(options.config, overrides)
    config.check_world(options.nproc)
    LogitsRequest(config, options.out, options.k).check()
    check_inputs(config)
    base = user_path(config.model.path)
    check_teacher(config, base)
    check_new(options.out, base)
    check_hub_data(named_data(config))
    written = [str(options.out), str(options.k), str(options.config), *overrides]
    torchrun([*ranks_here(options.nproc), "-m", "megalora.train.logits_command", *written])
