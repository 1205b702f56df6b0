"""Read the arguments of ``megalora chat``."""

from dataclasses import fields
from typing import Any

from megalora.cli.command_parser import add_command

SAMPLING = {
    "temperature": (float, "what logits are divided by; 0 takes the most probable token"),
    "top-p": (float, "draw from the most probable tokens of this probability together"),
    "top-k": (int, "draw from so many most probable tokens; 0 for all"),
    "seed": (int, "seed of the draws"),
    "max-new-tokens": (int, "length of an answer, at most"),
}


def add_chat_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    chat = add_command(
        commands,
        "chat",
        help="talk to an adapter and to its base",
        example="megalora chat runs/sft --prompt 'What is 12 + 30?' --by both",
        more="Uses the base's chat template, and computes with transformers and PEFT on this"
        " machine, or asks a running server.",
    )
    chat.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="an adapter or run folder, or a base model; with --url a name that the server has",
    )
    chat.add_argument(
        "--base", help="the base model's folder or hub name; default: what the adapter names"
    )
    chat.add_argument("--url", help="ask this server, such as http://127.0.0.1:8000")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this, and end")
    chat.add_argument("--system", metavar="TEXT", default="", help="a system message")
    chat.add_argument("--by", choices=["adapter", "base", "both"], help="who answers first")
    chat.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="dtype of the weights; default: that of the base's files",
    )
    add_sampling_arguments(chat)
    chat.set_defaults(action=_chat)


def add_sampling_arguments(parser: Any) -> None:
    """Options that say how tokens are chosen; what is not given is the model's default."""
    for name, (kind, text) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help=text)


def given_sampling(options: Any) -> dict[str, Any]:
    """Fields of ``Sampling`` that the user has given."""
    # Late: --help of other commands need not import it.
    from megalora.generate.options import Sampling

    # None marks what was not given: a model, or a server, has its own defaults.
    given: dict[str, Any] = {}
    for field in fields(Sampling):
        value = getattr(options, field.name)
        if value is not None:
            given[field.name] = value
    return given


def _chat(options: Any, _: list[str]) -> None:
    from megalora.chat.command import ChatOptions, chat
    from megalora.paths import expand

    asked = ChatOptions(
        base=options.base,
        url=options.url,
        prompt=options.prompt,
        system=options.system,
        by=options.by,
        dtype=options.dtype,
        sampling=given_sampling(options),
    )
    chat(expand(options.adapter, "ADAPTER"), asked)
