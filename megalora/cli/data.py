"""Read the arguments of ``megalora data``, and show what it is asked for."""

from typing import Any

from megalora.cli.command_parser import add_command, add_config_arguments


def add_data_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    data = add_command(
        commands,
        "data",
        help="show what a run would train on: samples, loss mask, lengths, rows left out",
        example="megalora data run.yaml data.train=chats.jsonl",
        more="Every row that training would refuse is named.",
    )
    add_config_arguments(data)
    stores = data.add_mutually_exclusive_group()
    stores.add_argument(
        "--stores",
        action="store_true",
        help="list the token stores in data.cache instead: days since the last use, size, source",
    )
    stores.add_argument(
        "--remove-unused",
        type=float,
        metavar="DAYS",
        help="remove the token stores in data.cache that were not used for so many days",
    )
    data.set_defaults(action=_data)


def _data(options: Any, rest: list[str]) -> None:
    from megalora.config.file import load_config

    config = load_config(options.config, [*options.overrides, *rest])
    if options.stores or options.remove_unused is not None:
        from megalora.data.token_cache import cache_folder
        from megalora.data.unused_stores import show_stores

        # The config says nothing but where the stores are: model and data may be gone.
        show_stores(cache_folder(config.data.cache), options.remove_unused)
        return
    from megalora.preflight import check_command, check_hub_data, check_inputs, named_data

    # Prompts without completions are no samples to show.
    check_command(config, samples=False)
    check_inputs(config)
    check_hub_data(named_data(config))
    from rich.console import Console

    from megalora.data.show import show_data

    show_data(config, Console())
