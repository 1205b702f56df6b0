"""Read the arguments of commands for adapter folders: export, push, import, merge, inspect,
verify."""

import sys
from pathlib import Path
from typing import Any

from megalora.adapters.merge_original import is_merged_into_original
from megalora.cli.command_parser import add_command
from megalora.cli.folders import adapter_folder, check_base, check_out
from megalora.paths import user_path

ADAPTER = (
    "an adapter folder or checkpoint, or a run folder, of which the latest checkpoint is taken"
)
OUT = "the folder to write, which must be new or empty"


def add_adapter_commands(commands: Any) -> None:
    """Add the commands to argparse's subcommands."""
    _add_export(commands)
    _add_push(commands)
    _add_import(commands)
    _add_merge(commands)
    _add_inspect(commands)
    _add_verify(commands)


def _add_export(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        help="write the adapter of a checkpoint as a folder for PEFT, vLLM or SGLang",
        example="megalora export runs/chats my-adapter --for vllm",
    )
    export.add_argument("checkpoint", type=user_path, help=ADAPTER)
    export.add_argument("out", type=user_path, help=OUT)
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


def _add_push(commands: Any) -> None:
    push = add_command(
        commands,
        "push",
        help="upload an adapter with its card to the Hugging Face hub",
        example="megalora push runs/chats me/chats --base Qwen/Qwen3-30B-A3B --private",
        more="An export goes as it is, a checkpoint is exported first; training state stays here."
        " The token is that of hf auth login, or HF_TOKEN.",
    )
    push.add_argument("adapter", type=user_path, metavar="ADAPTER", help=ADAPTER)
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME, made if it does not exist")
    push.add_argument(
        "--base", help="the base model's name on the hub; default: the one that the adapter names"
    )
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to; default: the repository's main one"
    )
    push.add_argument(
        "--message", metavar="TEXT", help="message of the commit; default: Upload and the folder"
    )
    push.set_defaults(action=_push)


def _add_import(commands: Any) -> None:
    importer = add_command(
        commands,
        "import",
        help="turn a PEFT adapter made elsewhere into a checkpoint to resume from",
        example="megalora import their-adapter imported --base Qwen/Qwen3-30B-A3B",
    )
    importer.add_argument("adapter", type=user_path, help=ADAPTER)
    importer.add_argument("out", type=user_path, help=OUT)
    # Required: who made the adapter elsewhere may have written anything into it.
    importer.add_argument("--base", required=True, help="the base model's folder or hub name")
    # Versions of Unsloth differ in it, and the file does not say which one wrote it.
    importer.add_argument(
        "--lora-b-layout",
        choices=["rank_major", "grouped_by_expert"],
        help="order of B's columns in stacked experts that Unsloth saved",
    )
    importer.set_defaults(action=_import)


def _add_merge(commands: Any) -> None:
    merge = add_command(
        commands,
        "merge",
        help="add an adapter to the weights of its base",
        example="megalora merge runs/chats --base Qwen/Qwen3-30B-A3B --out merged",
        more="A report in the result says how much of each delta survived rounding.",
    )
    merge.add_argument("adapter", type=user_path, help=ADAPTER)
    # Required though the adapter names one: the result is that very base, changed.
    merge.add_argument("--base", required=True, help="the base model's folder or hub name")
    merge.add_argument("--out", required=True, type=user_path, help=OUT)
    merge.add_argument(
        "--original",
        metavar="MODEL",
        help="folder or hub name of the model that a quantised base was made from; the result is"
        " that model, changed",
    )
    merge.add_argument(
        "--requantise",
        action="store_true",
        help="write the result in the form of a quantised base (fp8, nf4), from --original, or"
        " without it from the base's decoded weights",
    )
    merge.add_argument(
        "--allow-loss",
        action="store_true",
        help="of a quantised base: write the result also where less than 0.9 of a delta survived",
    )
    merge.set_defaults(action=_merge)


def _add_inspect(commands: Any) -> None:
    inspect = add_command(
        commands,
        "inspect",
        help="show what an adapter holds: targets, ranks, experts, norms",
        example="megalora inspect runs/chats",
    )
    inspect.add_argument("adapter", type=user_path, help=ADAPTER)
    inspect.set_defaults(action=_inspect)


def _add_verify(commands: Any) -> None:
    verify = add_command(
        commands,
        "verify",
        help="compare an adapter in stock PEFT or vLLM with megalora's own model",
        example="megalora verify runs/chats --base Qwen/Qwen3-30B-A3B",
        more="Ends with exit code 1 where they differ.",
    )
    verify.add_argument("adapter", type=user_path, help=ADAPTER)
    verify.add_argument("--base", required=True, help="the base model's folder or hub name")
    verify.add_argument(
        "--engine", default="peft", choices=["peft", "vllm"], help="what to compare with"
    )
    verify.add_argument(
        "--atol",
        type=float,
        default=1e-4,
        help="largest allowed difference of a logit or log-probability, in float32",
    )
    verify.set_defaults(action=_verify)


def _export(options: Any, _: list[str]) -> None:
    source = adapter_folder(options.checkpoint)
    # Without --base the adapter names its own, which is looked up when it has been read.
    if options.base:
        check_base(options.base)
    check_out(options.out, source)
    from megalora.adapters.export import export

    written = export(
        source,
        options.out,
        engine=options.engine,
        layout=options.layout,
        drop=options.drop,
        base=options.base,
    )
    print(written.text())


def _push(options: Any, _: list[str]) -> None:
    source = adapter_folder(options.adapter)
    from megalora.adapters.push import check_push, push

    base = check_push(source, options.repo, options.base)
    print(
        push(
            source,
            options.repo,
            base,
            private=options.private,
            revision=options.revision,
            message=options.message,
        )
    )


def _import(options: Any, _: list[str]) -> None:
    source = adapter_folder(options.adapter)
    check_base(options.base)
    check_out(options.out, source)
    from megalora.adapters.resumable import import_adapter

    imported = import_adapter(source, options.out, options.base, options.lora_b_layout)
    print(imported.text())


def _merge(options: Any, _: list[str]) -> None:
    adapter = adapter_folder(options.adapter)
    check_base(options.base, weights=True)
    check_out(options.out, adapter)
    base = Path(options.base)
    # A name on the hub is looked at when its files are here.
    if base.is_dir() and not options.requantise:
        is_merged_into_original(base, options.original, adapter)
    if options.requantise:
        from megalora.adapters.merge_requantised import merge_requantised as merge
    else:
        from megalora.adapters.merge import merge

    report = merge(
        adapter, options.base, options.out, options.original, allow_loss=options.allow_loss
    )
    print(report.text())


def _inspect(options: Any, _: list[str]) -> None:
    adapter = adapter_folder(options.adapter)
    from megalora.adapters.inspect import describe

    print(describe(adapter))


def _verify(options: Any, _: list[str]) -> None:
    adapter = adapter_folder(options.adapter)
    check_base(options.base, weights=True)
    # Each needs what the other does not: vLLM's environment, or peft here.
    if options.engine == "vllm":
        from megalora.verify.vllm import verify_vllm as verify
    else:
        from megalora.verify.peft import verify_peft as verify

    report = verify(adapter, options.base, atol=options.atol)
    print(report.text())
    # So that a script can stop at an adapter that differs.
    sys.exit(0 if report.ok else 1)
