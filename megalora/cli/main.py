"""The ``megalora`` command: reads arguments, calls the library, turns a user's mistake into one
line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from megalora.cli.plan import add_planner_commands
from megalora.launching import torchrun
from megalora.model.families import FAMILIES
from megalora.paths import user_path
from megalora.user_error import guarded

PIPE_CLOSED = 141
"""As a shell says of a process that SIGPIPE ended."""


def main(arguments: list[str] | None = None) -> None:
    try:
        guarded(_run, sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        # The reader, such as head, has seen enough; the interpreter must not flush into the pipe as
        # it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)


def _run(arguments: list[str]) -> None:
    end = arguments.index("--") if "--" in arguments and arguments[0] == "serve" else len(arguments)
    options, rest = _parser().parse_known_args(arguments[:end])
    options.extra = arguments[end + 1 :]
    unknown = [
        a
        for a in rest
        if options.command not in ("train", "data", "plan", "bench") or a.startswith("-")
    ]
    if unknown:
        hint = "; vLLM's own arguments come after --" if options.command == "serve" else ""
        raise ValueError(
            f"megalora {options.command}: unknown argument {unknown[0]!r}; see megalora"
            f" {options.command} --help{hint}"
        )
    options.action(options, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megalora", description="LoRA for mixture-of-experts models on Megatron-Core."
    )
    parser.add_argument("--version", action=_ShowVersions)
    commands = parser.add_subparsers(dest="command", required=True)

    tiny = commands.add_parser(
        "tiny", help="make a tiny random base model with tokenizer and chat template"
    )
    tiny.add_argument("out", type=user_path)
    tiny.add_argument("--arch", default="qwen3_moe", help=f"its family: {', '.join(FAMILIES)}")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    tiny.set_defaults(action=_tiny)

    train = commands.add_parser(
        "train", help="fine-tune adapters: start torchrun with --nproc ranks on this machine"
    )
    train.add_argument("config", type=user_path)
    train.add_argument("--nproc", type=int, default=1, help="number of ranks to start, one per GPU")
    train.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        help="number of times that ranks start again and resume after one has failed",
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.set_defaults(action=_train)

    data = commands.add_parser(
        "data", help="show what a run would train on: samples, loss mask, lengths, rows left out"
    )
    data.add_argument("config", type=user_path)
    data.add_argument("overrides", nargs="*", metavar="section.key=value")
    data.set_defaults(action=_data)

    add_planner_commands(commands)
    _add_file_commands(commands)
    _add_engine_commands(commands)
    return parser


class _ShowVersions(argparse.Action):
    """``--version``: print what is installed, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings, dest, nargs=0, help="versions of megalora and of what it computes with"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from megalora.bench.versions import version_text

        print(version_text())
        parser.exit()


def _add_file_commands(commands: Any) -> None:
    """What reads and writes adapter folders."""
    export = commands.add_parser(
        "export", help="write the adapter of a checkpoint as a folder for PEFT, vLLM or SGLang"
    )
    export.add_argument("checkpoint", type=user_path, help="a checkpoint, or any adapter folder")
    export.add_argument("out", type=user_path)
    export.add_argument(
        "--for",
        dest="engine",
        choices=["peft", "vllm", "sglang"],
        help="engine that will load the adapter; refuse what this engine would not honour",
    )
    export.add_argument(
        "--layout",
        choices=["per_expert", "stacked", "shared_outer"],
        help="names and shapes of the experts' tensors in the file",
    )
    export.add_argument(
        "--drop",
        nargs="+",
        default=[],
        metavar="NAME",
        help="trained projections to leave out, such as gate (the router)",
    )
    export.add_argument(
        "--base",
        help="the base model's folder or hub name; default: the one that the adapter names",
    )
    export.set_defaults(action=_export)

    importer = commands.add_parser(
        "import", help="turn a PEFT adapter made elsewhere into a checkpoint to resume from"
    )
    importer.add_argument("adapter", type=user_path)
    importer.add_argument("out", type=user_path)
    importer.add_argument("--base", required=True, help="the base model's folder or hub name")
    importer.add_argument(
        "--lora-b-layout",
        choices=["rank_major", "grouped_by_expert"],
        help="order of B's columns in stacked experts that Unsloth saved",
    )
    importer.set_defaults(action=_import)

    merge = commands.add_parser("merge", help="add an adapter to the weights of its base")
    merge.add_argument("adapter", type=user_path)
    merge.add_argument("--base", required=True, help="the base model's folder or hub name")
    merge.add_argument("--out", required=True, type=user_path)
    merge.set_defaults(action=_merge)

    inspect = commands.add_parser(
        "inspect", help="show what an adapter holds: targets, ranks, experts, norms"
    )
    inspect.add_argument("adapter", type=user_path)
    inspect.set_defaults(action=_inspect)


def _add_engine_commands(commands: Any) -> None:
    """What runs an adapter in another engine."""
    verify = commands.add_parser(
        "verify", help="compare an adapter in stock PEFT or vLLM with megalora's own model"
    )
    verify.add_argument("adapter", type=user_path)
    verify.add_argument("--base", required=True, help="the base model's folder or hub name")
    verify.add_argument("--engine", default="peft", choices=["peft", "vllm"])
    verify.add_argument(
        "--atol",
        type=float,
        default=1e-4,
        help="largest allowed difference of a logit or log-probability, in float32",
    )
    verify.set_defaults(action=_verify)

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
    serve.set_defaults(action=_serve)


def _tiny(options: Any, _: list[str]) -> None:
    from megalora.tiny import make_tiny

    print(
        f"wrote {make_tiny(options.out, arch=options.arch, seed=options.seed, dtype=options.dtype)}"
    )


def _train(options: Any, rest: list[str]) -> None:
    from megalora.preflight import check_run

    overrides = [*options.overrides, *rest]
    check_run(options.config, overrides, options.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Seconds to save after SIGTERM; torchrun's own default kills after 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts must not be negative, got {options.max_restarts}")
    ranks = ["--standalone", "--nproc-per-node", str(options.nproc)]
    ranks += ["--max-restarts", str(options.max_restarts)]
    torchrun([*ranks, "-m", "megalora.train", str(options.config), *overrides])


def _data(options: Any, rest: list[str]) -> None:
    from rich.console import Console

    from megalora.config.file import load_config
    from megalora.data.show import show_data

    show_data(load_config(options.config, [*options.overrides, *rest]), Console())


def _export(options: Any, _: list[str]) -> None:
    from megalora.adapters.export import export

    written = export(
        options.checkpoint,
        options.out,
        engine=options.engine,
        layout=options.layout,
        drop=options.drop,
        base=options.base,
    )
    print(written.text())


def _import(options: Any, _: list[str]) -> None:
    from megalora.adapters.resumable import import_adapter

    print(import_adapter(options.adapter, options.out, options.base, options.lora_b_layout).text())


def _verify(options: Any, _: list[str]) -> None:
    if options.engine == "vllm":
        from megalora.verify.vllm import verify_vllm as verify
    else:
        from megalora.verify.peft import verify_peft as verify

    report = verify(options.adapter, options.base, atol=options.atol)
    print(report.text())
    sys.exit(0 if report.ok else 1)


def _merge(options: Any, _: list[str]) -> None:
    from megalora.adapters.merge import merge

    print(merge(options.adapter, options.base, options.out).text())


def _serve(options: Any, _: list[str]) -> None:
    from megalora.serve.run import serve

    code = serve(
        options.adapters, options.base, lambda line: print(line, flush=True), host=options.host,
        port=options.port,
        atol=options.atol, unproven=options.unproven, extra=options.extra,
    )  # fmt: skip
    sys.exit(code)


def _inspect(options: Any, _: list[str]) -> None:
    from megalora.adapters.inspect import describe

    print(describe(options.adapter))


if __name__ == "__main__":
    main()
