"""The ``megalora`` command: reads arguments, calls the library, turns a user's mistake into one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    guarded(_run, sys.argv[1:] if arguments is None else arguments)


def guarded(action: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run ``action``; a ``ValueError`` is the user's to mend, so it is shown without a traceback, by one rank."""
    try:
        action(arguments)
    except ValueError as error:
        if os.environ.get("MEGALORA_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"megalora: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    options, rest = _parser().parse_known_args(arguments)
    unknown = [a for a in rest if options.command != "train" or a.startswith("-")]
    if unknown:
        raise ValueError(
            f"megalora {options.command}: unknown argument {unknown[0]!r}; see megalora {options.command} --help"
        )
    options.action(options, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megalora", description="LoRA for mixture-of-experts models on Megatron-Core."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    tiny = commands.add_parser("tiny", help="make a tiny random base model with tokenizer and chat template")
    tiny.add_argument("out", type=Path)
    tiny.add_argument("--arch", default="qwen3_moe", help="qwen3_moe or qwen3")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    tiny.set_defaults(action=_tiny)

    train = commands.add_parser("train", help="fine-tune; starts torchrun on this machine")
    train.add_argument("config", type=Path)
    train.add_argument("--nproc", type=int, default=1, help="ranks to start")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.set_defaults(action=_train)

    export = commands.add_parser("export", help="take the PEFT adapter out of a checkpoint")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("out", type=Path)
    export.set_defaults(action=_export)

    verify = commands.add_parser("verify", help="compare an adapter in stock PEFT with megalora's own model")
    verify.add_argument("adapter", type=Path)
    verify.add_argument("--base", required=True, help="the base model's folder or hub name")
    verify.add_argument("--engine", default="peft", choices=["peft"])
    verify.add_argument("--atol", type=float, default=1e-4, help="largest difference of a logit, fp32")
    verify.set_defaults(action=_verify)

    inspect = commands.add_parser("inspect", help="say what is in an adapter")
    inspect.add_argument("adapter", type=Path)
    inspect.set_defaults(action=_inspect)
    return parser


def _tiny(options: Any, _: list[str]) -> None:
    from megalora.tiny import make_tiny

    print(f"wrote {make_tiny(options.out, arch=options.arch, seed=options.seed, dtype=options.dtype)}")


def _train(options: Any, rest: list[str]) -> None:
    from megalora.config import load_config

    overrides = [*options.overrides, *rest]
    load_config(options.config, overrides).check_world(options.nproc)  # mistakes show before ranks start
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.nproc), "-m", "megalora.train"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.execv(sys.executable, [sys.executable, "-m", *command, str(options.config), *overrides])


def _export(options: Any, _: list[str]) -> None:
    from megalora.bridge.peft import copy_adapter

    copy_adapter(options.checkpoint, options.out)
    print(f"wrote {options.out}; PeftModel.from_pretrained(base, {str(options.out)!r}) loads it")


def _verify(options: Any, _: list[str]) -> None:
    from megalora.bridge.verify import verify_peft

    report = verify_peft(options.adapter, options.base, atol=options.atol)
    print(report.text())
    sys.exit(0 if report.ok else 1)


def _inspect(options: Any, _: list[str]) -> None:
    from megalora.bridge.inspect import describe

    print(describe(options.adapter))


if __name__ == "__main__":
    main()
