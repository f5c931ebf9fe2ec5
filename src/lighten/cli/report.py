"""Write report.html anew from the choice.json of an earlier run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lighten import verbs
from lighten.cli.options import add_json, print_json

EXAMPLE = "lighten report chosen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what `lighten choose` wrote to")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from lighten.report import write_report

    folder = Path(arguments.folder)
    path = folder / "report.html"
    write_report(verbs.read_choice(folder), path)
    print_json({"report": str(path)}) if arguments.json else print(path)
    return 0
