"""Read the arguments of ``megalora serve`` and ``megalora swap``."""

import sys
from typing import Any

from megalora.cli.command_parser import add_command

_ADAPTER = "an adapter, a checkpoint or a run folder, whose latest is taken; or NAME=FOLDER"


def add_serve_commands(commands: Any) -> None:
    """Add the commands to argparse's subcommands."""
    _add_serve(commands)
    _add_swap(commands)


def _add_serve(commands: Any) -> None:
    serve = add_command(
        commands,
        "serve",
        help="serve adapters with vLLM and prove that it applies them (needs make vllm)",
        example="megalora serve chats=runs/chats",
        more="Arguments after -- go to vLLM.",
    )
    serve.add_argument("adapters", nargs="*", metavar="ADAPTER", help=_ADAPTER)
    serve.add_argument(
        "--base",
        help="the base model's folder or hub name; default: the one that the adapters name",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 chooses a free one"
    )
    _add_proof(serve, "serve")
    serve.add_argument(
        "--trainer",
        metavar="URL",
        help="take adapters from the memory of the training at this address, http://HOST:PORT, or"
        " http://HOST for any port there; needs no ADAPTER, but --base",
    )
    serve.add_argument(
        "--trained-rank",
        type=int,
        default=64,
        metavar="N",
        help="with --trainer, the largest rank that it trains",
    )
    serve.add_argument(
        "--versions",
        type=int,
        default=4,
        metavar="N",
        help="with --trainer, the number of its versions that can answer at once",
    )
    # ``main`` has taken out what stands behind --, as ``options.extra``.
    serve.set_defaults(action=_serve)


def _add_swap(commands: Any) -> None:
    swap = add_command(
        commands,
        "swap",
        help="put an adapter's new version in place of the one that a running server has",
        example="megalora swap http://127.0.0.1:8000 my-adapter=runs/math",
    )
    swap.add_argument("url", metavar="URL", help="the server's address, as http://HOST:PORT")
    swap.add_argument("adapter", metavar="NAME=FOLDER", help=_ADAPTER)
    # No --base: the server knows its own.
    _add_proof(swap, "keep the new version")
    swap.set_defaults(action=_swap)


def _add_proof(command: Any, does: str) -> None:
    """Add the arguments about the proof."""
    command.add_argument(
        "--atol",
        type=float,
        default=1e-4,
        help="largest allowed difference of a log-probability, in float32",
    )
    command.add_argument(
        "--unproven",
        action="store_true",
        help=f"{does} also if an adapter does not act as it was trained",
    )


def _say(line: str) -> None:
    # At once, also into a pipe: a script waits for the line that says that it is ready.
    print(line, flush=True)


def _swap(options: Any, _: list[str]) -> None:
    # Imported here, so that --help takes no time.
    from megalora.serve.swap import swap

    code = swap(options.url, options.adapter, _say, atol=options.atol, unproven=options.unproven)
    sys.exit(code)


def _serve(options: Any, _: list[str]) -> None:
    from megalora.serve.run import serve

    code = serve(
        options.adapters,
        options.base,
        _say,
        host=options.host,
        port=options.port,
        atol=options.atol,
        unproven=options.unproven,
        extra=options.extra,
        trainer=options.trainer,
        trained_rank=options.trained_rank,
        versions=options.versions,
    )
    sys.exit(code)
