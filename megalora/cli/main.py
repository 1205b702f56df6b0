"""Run the ``megalora`` command: read arguments, call the library, and turn a user's mistake into
one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from megalora.cli.adapter import add_adapter_commands
from megalora.cli.bench import add_bench_command
from megalora.cli.chat import add_chat_command
from megalora.cli.command_parser import OneLineParser, add_command, add_config_arguments
from megalora.cli.data import add_data_command
from megalora.cli.evaluate import add_eval_command
from megalora.cli.init import add_init_command
from megalora.cli.logits import add_logits_command
from megalora.cli.options import add_options_command
from megalora.cli.plan import add_plan_command
from megalora.cli.report import add_report_command
from megalora.cli.rl import add_node_arguments, add_rank_arguments, add_rl_command, start_ranks
from megalora.cli.serve import add_serve_commands
from megalora.model.families import FAMILIES
from megalora.paths import user_path
from megalora.user_error import guarded

PIPE_CLOSED = 141
"""Exit code of a process that SIGPIPE ended, as shells have it."""
WITH_OVERRIDES = ("init", "train", "rl", "data", "plan", "bench", "eval", "logits")
"""Commands that take ``section.key=value``."""


def main(arguments: list[str] | None = None) -> None:
    try:
        guarded(_run, sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        # The reader, such as head, has seen enough; the interpreter must not flush into the pipe as
        # it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)


def _run(arguments: list[str]) -> None:
    """Parse the arguments and call the command."""
    # What follows -- belongs to vLLM, and must not be read here.
    end = len(arguments)
    if arguments[:1] == ["serve"] and "--" in arguments:
        end = arguments.index("--")
    options, rest = _parser().parse_known_args(arguments[:end])
    options.extra = arguments[end + 1 :]
    for argument in rest:
        # argparse does not take overrides that stand behind options.
        if options.command in WITH_OVERRIDES and not argument.startswith("-"):
            continue
        hint = "; vLLM's own arguments come after --" if options.command == "serve" else ""
        raise ValueError(
            f"megalora {options.command}: unknown argument {argument!r}; see megalora"
            f" {options.command} --help{hint}"
        )
    options.action(options, rest)


def _parser() -> argparse.ArgumentParser:
    # Parsers of commands are of the same class.
    parser = OneLineParser(
        prog="megalora",
        description="LoRA for mixture-of-experts models on Megatron-Core.",
        epilog="megalora COMMAND --help explains a command; example: megalora train run.yaml"
        " --nproc 8",
    )
    parser.add_argument("--version", action=_ShowVersions)
    commands = parser.add_subparsers(dest="command", required=True)

    _add_tiny(commands)
    add_init_command(commands)
    _add_train(commands)
    add_rl_command(commands)
    # Each of them imports what it calls only when it is called, so that --help takes no time.
    add_data_command(commands)
    add_options_command(commands)
    add_plan_command(commands)
    add_bench_command(commands)
    add_adapter_commands(commands)
    add_serve_commands(commands)
    add_chat_command(commands)
    add_report_command(commands)
    add_eval_command(commands)
    add_logits_command(commands)
    return parser


def _add_tiny(commands: Any) -> None:
    tiny = add_command(
        commands,
        "tiny",
        help="make a tiny random base model with tokenizer and chat template",
        example="megalora tiny runs/tiny --arch mixtral",
        more="It has 4 MB and stands in for a real model where nothing is to be learned from it.",
    )
    tiny.add_argument("out", type=user_path, help="its folder, which must be new or empty")
    tiny.add_argument("--arch", default="qwen3_moe", choices=list(FAMILIES), help="its family")
    tiny.add_argument("--seed", type=int, default=0, help="seed of its weights")
    tiny.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of its weights"
    )
    tiny.set_defaults(action=_tiny)


def _add_train(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        help="fine-tune adapters: start torchrun with --nproc ranks on this machine",
        example="megalora train run.yaml --nproc 8 train.lr=2e-4",
        more="Each checkpoint in checkpoint.dir is an adapter that PEFT loads. For several nodes"
        " see docs/launch.md.",
    )
    add_config_arguments(train)
    add_rank_arguments(train)
    add_node_arguments(train)
    train.set_defaults(action=_train)


class _ShowVersions(argparse.Action):
    """Print the versions that are installed, and end (``--version``)."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings, dest, nargs=0, help="versions of megalora and of what it computes with"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Only now: it asks git and reads the packages' metadata.
        from megalora.versions import version_text

        print(version_text())
        parser.exit()


def _tiny(options: Any, _: list[str]) -> None:
    from megalora.tiny_folder import check_not_in_use

    arguments = {"arch": options.arch, "seed": options.seed, "dtype": options.dtype}
    check_not_in_use(options.out, {**arguments, "overrides": {}})
    # Imports torch and transformers, which takes seconds; no other command should wait for that.
    from megalora.tiny import make_tiny

    out = make_tiny(options.out, arch=options.arch, seed=options.seed, dtype=options.dtype)
    print(f"wrote {out}")


def _train(options: Any, rest: list[str]) -> None:
    start_ranks(options, rest, "megalora.train")


if __name__ == "__main__":
    main()
