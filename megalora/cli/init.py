"""Read the arguments of ``megalora init``."""

from pathlib import Path
from typing import Any

from megalora.cli.command_parser import add_command
from megalora.cli.plan import add_gpu_arguments
from megalora.paths import user_path


def add_init_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    init = add_command(
        commands,
        "init",
        help="write a commented config for a model, data and a number of GPUs",
        example="megalora init --model Qwen/Qwen3-30B-A3B --data chats.jsonl --gpus 8",
        more="The planner chooses layout, microbatch and recomputation, unless you give one of"
        " them; lengths of samples come from data on this machine. Without --model or --data you"
        " get a template with places to fill in.",
    )
    init.add_argument(
        "--model",
        metavar="M",
        help="base model, as model.path: a folder, or a name that the planner knows",
    )
    init.add_argument(
        "--data", metavar="D", help="training data, as data.train: a file, or a hub data set"
    )
    init.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs")
    add_gpu_arguments(init)
    init.add_argument(
        "--out",
        type=user_path,
        default=Path("run.yaml"),
        metavar="FILE.yaml",
        help="the file to write, which must be new",
    )
    init.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options in place of the usual values; megalora options lists them",
    )
    init.set_defaults(action=_init)


def _init(options: Any, rest: list[str]) -> None:
    from megalora.paths import expand
    from megalora.planner.init_command import InitOptions, init_command

    asked = InitOptions(
        # None, where it is not given, is no text to expand.
        model=None if options.model is None else expand(options.model, "--model"),
        data=None if options.data is None else expand(options.data, "--data"),
        gpus=options.gpus,
        gpu=options.gpu,
        gpus_per_node=options.gpus_per_node,
        out=options.out,
    )
    init_command(asked, [*options.overrides, *rest])
