"""Read the arguments of ``megalora eval``."""

from typing import Any

from megalora.cli.chat import add_sampling_arguments, given_sampling
from megalora.cli.command_parser import add_command
from megalora.launching import ranks_here, torchrun


def add_eval_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    command = add_command(
        commands,
        "eval",
        help="loss, perplexity and answers of an adapter beside its base",
        example="megalora eval runs/sft --data test.jsonl --generate --rule last-number",
        more="Both are evaluated on the same samples, under any layout. A running server can give"
        " the answers.",
    )
    command.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="an adapter or run folder, or a base model alone; with --url also a name that the"
        " server has",
    )
    command.add_argument(
        "--data", metavar="FILE", help="samples; default: those that the run evaluated on"
    )
    command.add_argument(
        "--base", help="the base model's folder or hub name; default: what the adapter names"
    )
    command.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="how data is read, and the dtype; default: config.yaml of the adapter's run",
    )
    command.add_argument(
        "--url", help="have this server answer, such as http://127.0.0.1:8000; needs --generate"
    )
    command.add_argument("--nproc", type=int, default=1, help="number of ranks, one per GPU")
    command.add_argument(
        "--generate", action="store_true", help="also answer each row's last question"
    )
    command.add_argument(
        "--rule",
        default="last-number",
        help="what makes an answer right: last-number, exact, regex:PATTERN or MODULE:FUNCTION",
    )
    command.add_argument("--limit", type=int, help="generate for so many rows, the first ones")
    command.add_argument("--out", metavar="FILE.json", help="write all numbers and answers here")
    add_sampling_arguments(command)
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options of the config, such as parallel.ep=2; megalora options lists them",
    )
    command.set_defaults(action=_eval)


def _eval(options: Any, rest: list[str]) -> None:
    from megalora.adapters.trained_on import notes_on_base
    from megalora.evaluate.request import Request, plan_of
    from megalora.paths import expand
    from megalora.preflight import check_hub_data

    request = Request(
        target=expand(options.adapter, "ADAPTER"),
        data=options.data and expand(options.data, "--data"),
        base=options.base,
        config=options.config,
        overrides=[*options.overrides, *rest],
        nproc=options.nproc,
        generate=options.generate,
        rule=options.rule,
        limit=options.limit,
        sampling=given_sampling(options),
        out=options.out and expand(options.out, "--out"),
        url=options.url,
    )
    if request.url is not None:
        # Late: httpx and transformers' tokenizers take a moment.
        from megalora.evaluate.served import evaluate_served

        evaluate_served(request, print)
        return
    # Before an adapter's files are opened: a name is cheap to look up.
    if request.data is not None:
        check_hub_data([("--data", request.data)])
    # Here, so that a mistake is shown before ranks start and once, not by each of them.
    # Ranks get what was found: they must not look for the latest checkpoint again, which may be
    # another one by then.
    plan = plan_of(request)
    check_hub_data(plan.own_sources)
    if plan.adapter is not None:
        computed = plan.config.model.weight_format
        for note in notes_on_base(plan.adapter, plan.base, computed=computed):
            print(note, flush=True)
    torchrun([*ranks_here(options.nproc), "-m", "megalora.evaluate", plan.resolved.to_json()])
