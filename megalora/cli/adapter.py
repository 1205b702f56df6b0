"""Read the arguments of commands for adapter folders: export, import, merge, inspect, verify."""

import sys
from typing import Any

from megalora.paths import user_path


def add_adapter_commands(commands: Any) -> None:
    """Add the commands to argparse's subcommands."""
    _add_export(commands)
    _add_import(commands)
    _add_merge(commands)
    _add_inspect(commands)
    _add_verify(commands)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="write the adapter of a checkpoint as a folder for PEFT, vLLM or SGLang"
    )
    export.add_argument("checkpoint", type=user_path, help="a checkpoint, or any adapter folder")
    export.add_argument("out", type=user_path)
    export.add_argument(
        "--for",
        # ``for`` is a keyword of Python, which no attribute may be called.
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


def _add_import(commands: Any) -> None:
    importer = commands.add_parser(
        "import", help="turn a PEFT adapter made elsewhere into a checkpoint to resume from"
    )
    importer.add_argument("adapter", type=user_path)
    importer.add_argument("out", type=user_path)
    importer.add_argument("--base", required=True, help="the base model's folder or hub name")
    # Versions of Unsloth differ in it, and the file does not say which one wrote it.
    importer.add_argument(
        "--lora-b-layout",
        choices=["rank_major", "grouped_by_expert"],
        help="order of B's columns in stacked experts that Unsloth saved",
    )
    importer.set_defaults(action=_import)


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser("merge", help="add an adapter to the weights of its base")
    merge.add_argument("adapter", type=user_path)
    merge.add_argument("--base", required=True, help="the base model's folder or hub name")
    merge.add_argument("--out", required=True, type=user_path)
    merge.set_defaults(action=_merge)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect", help="show what an adapter holds: targets, ranks, experts, norms"
    )
    inspect.add_argument("adapter", type=user_path)
    inspect.set_defaults(action=_inspect)


def _add_verify(commands: Any) -> None:
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

    imported = import_adapter(options.adapter, options.out, options.base, options.lora_b_layout)
    print(imported.text())


def _merge(options: Any, _: list[str]) -> None:
    from megalora.adapters.merge import merge

    print(merge(options.adapter, options.base, options.out).text())


def _inspect(options: Any, _: list[str]) -> None:
    from megalora.adapters.inspect import describe

    print(describe(options.adapter))


def _verify(options: Any, _: list[str]) -> None:
    # Each needs what the other does not: vLLM's environment, or peft here.
    if options.engine == "vllm":
        from megalora.verify.vllm import verify_vllm as verify
    else:
        from megalora.verify.peft import verify_peft as verify

    report = verify(options.adapter, options.base, atol=options.atol)
    print(report.text())
    # So that a script can stop at an adapter that differs.
    sys.exit(0 if report.ok else 1)
