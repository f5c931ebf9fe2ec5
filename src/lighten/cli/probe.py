"""Measure this machine once, so that predictions are of it."""

from __future__ import annotations

import argparse

from lighten import verbs
from lighten.cli.options import add_json, positive, print_json, progress
from lighten.device.profile import ENGINES, profile_path, profile_to_json

EXAMPLE = "lighten probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores that this process may use")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only this one, beside what is known already; repeatable")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    found = verbs.probe(threads=arguments.threads, engines=arguments.engine, log=progress)
    if arguments.json:
        print_json(profile_to_json(found))
    else:
        print(f"{found.machine.cpu}, {found.threads} threads: {len(found.engines)} engines measured, {len(found.failures)} failed; {profile_path()}")
    return 0
