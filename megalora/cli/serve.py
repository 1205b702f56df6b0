"""Read the arguments of ``megalora serve``."""

import sys
from typing import Any


def add_serve_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    serve = commands.add_parser(
        "serve",
        help="serve adapters with vLLM and prove that it applies them (needs make vllm)",
        epilog="arguments after -- go to vLLM",
    )
    serve.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder, or NAME=FOLDER")
    serve.add_argument("--base", required=True, help="the base model's folder or hub name")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 chooses a free one"
    )
    serve.add_argument(
        "--atol",
        type=float,
        default=1e-4,
        help="largest allowed difference of a log-probability, in float32",
    )
    serve.add_argument(
        "--unproven",
        action="store_true",
        help="serve also if an adapter does not act as it was trained",
    )
    # ``main`` has taken out what stands behind --, as ``options.extra``.
    serve.set_defaults(action=_serve)


def _serve(options: Any, _: list[str]) -> None:
    from megalora.serve.run import serve

    def say(line: str) -> None:
        # At once, also into a pipe: a script waits for the line that says that it is ready.
        print(line, flush=True)

    code = serve(
        options.adapters,
        options.base,
        say,
        host=options.host,
        port=options.port,
        atol=options.atol,
        unproven=options.unproven,
        extra=options.extra,
    )
    sys.exit(code)
