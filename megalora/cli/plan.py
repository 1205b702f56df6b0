"""Read the arguments of ``megalora plan``."""

import sys
from typing import Any

from megalora.cli.command_parser import add_command, add_config_arguments
from megalora.paths import user_path


def add_plan_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    plan = add_command(
        commands,
        "plan",
        help="rank the layouts for a number of GPUs by predicted time; needs no GPU",
        example="megalora plan run.yaml --gpus 8 --out planned.yaml",
    )
    add_config_arguments(plan)
    plan.add_argument(
        "--gpus",
        type=_numbers,
        required=True,
        metavar="N,...",
        help="number of GPUs; several, as in 8,16,32, are compared",
    )
    add_gpu_arguments(plan)
    plan.add_argument("--top", type=int, default=10, help="number of layouts to show")
    _add_assumptions(plan)
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
    # Instead of the table: a proof that what the table says of weights is what a rank builds.
    dry = "build this rank of the config's layout on the meta device and compare its bytes"
    plan.add_argument("--dry-run", type=int, metavar="RANK", help=dry)
    plan.set_defaults(action=_plan)


def add_gpu_arguments(parser: Any) -> None:
    """Options that name the GPUs to plan for."""
    parser.add_argument(
        "--gpu",
        default="h100",
        help="h100, h200, h20, a100, a100-40gb, b200, b300, gb200, l40s, rtx4090, mi300x, or a file"
        " that megalora bench --calibrate wrote",
    )
    parser.add_argument("--gpus-per-node", type=int, help="default: 8, or as in the --gpu file")


def _add_assumptions(plan: Any) -> None:
    """Options that say what a config does not."""
    plan.add_argument(
        "--imbalance",
        type=float,
        default=1.2,
        help="assumed routing: rows of the fullest expert-parallel rank over the mean",
    )
    plan.add_argument(
        "--mean-length",
        type=float,
        metavar="TOKENS",
        help="mean length of a sample (of both sequences of a pair), to plan packed rows; default:"
        " that of data.train if it and the tokenizer are on this machine, else data.max_length for"
        " each sequence",
    )
    plan.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="samples of the data, for GPU-hours; default: those of data.train if it is here",
    )
    plan.add_argument(
        "--lora-rank",
        type=_numbers,
        default=[],
        metavar="R,...",
        help="try these lora.rank too, a table each",
    )


def _numbers(text: str) -> list[int]:
    """Numbers of a list such as 8,16; argparse reports a ``ValueError`` with the option's name."""
    return [int(word) for word in text.split(",")]


def _plan(options: Any, rest: list[str]) -> None:
    overrides = [*options.overrides, *rest]
    # Not ``if options.dry_run``: 0 is a rank, too.
    if options.dry_run is not None:
        from megalora.planner.dry_run_command import dry_run_command

        is_equal = dry_run_command(options.config, overrides, options.gpus, options.dry_run)
        sys.exit(0 if is_equal else 1)
    from megalora.planner.command import plan_command
    from megalora.planner.question import PlanOptions

    asked = PlanOptions(
        gpus=options.gpus, gpu=options.gpu, top=options.top, imbalance=options.imbalance,
        lora_ranks=options.lora_rank, mean_length=options.mean_length, samples=options.samples,
        gpus_per_node=options.gpus_per_node, out=options.out, figure=options.figure,
        rejected=options.rejected,
    )  # fmt: skip
    plan_command(options.config, overrides, asked)
