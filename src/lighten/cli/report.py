"""Write report.html from what `lighten choose` or `lighten compress` wrote."""

from __future__ import annotations

import argparse

from lighten import verbs
from lighten.cli.options import add_json, print_json

EXAMPLE = "lighten report chosen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what `lighten choose` or `lighten compress` wrote to")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    path = verbs.report(arguments.folder)
    print_json({"report": str(path)}) if arguments.json else print(path)
    return 0
