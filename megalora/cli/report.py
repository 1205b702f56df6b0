"""Read the arguments of ``megalora report``."""

from typing import Any

from megalora.cli.command_parser import add_command
from megalora.paths import user_path


def add_report_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    report = add_command(
        commands,
        "report",
        help="write one HTML page of runs: curves, experts, adapter, samples, config",
        example="megalora report runs/a runs/b --out page.html --no-samples",
        more="It shows up to four runs, and needs no network, script or other file: curves, tokens"
        " per expert, size of the adapter, samples, configuration.",
    )
    report.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="run folders")
    report.add_argument(
        "--out",
        type=user_path,
        metavar="FILE",
        help="the page; default: RUN/report.html, for several runs report.html here",
    )
    report.add_argument(
        "--no-samples",
        action="store_true",
        help="leave out samples of the data and answers",
    )
    report.set_defaults(action=_report)


def _report(options: Any, _: list[str]) -> None:
    from megalora.report.page import write_report

    print(f"wrote {write_report(options.runs, options.out, samples=not options.no_samples)}")
