"""Models, recipes and devices side by side: parameters, FLOPs, memory, time, energy and money; one plot of throughput against money or memory."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lighten import verbs
from lighten.cli.options import add_case, add_json, case_options, print_json, progress
from lighten.errors import DeviceError, OutputError
from lighten.recipe.compare import Entry
from lighten.report.compare_page import compare_picture, figures_of
from lighten.report.table import WIDTH, format_table
from lighten.report.written import write_whole

EXAMPLE = """lighten compare .models/smollm2-135m --device l4 --device rtx-4090 --device h100-sxm --phase decode --seq-len 512 --new-tokens 64
  lighten compare .models/minilm --recipe '' --recipe 'cast(bfloat16)' --batch-size 32 --json"""
IN_ROWS = ("memory", "fits", "tokens/s", "bound by", "$ a million tokens")
"""Figures of a table of many rows; --json and the page have all."""
ASIDE = 4
"""Combinations at most that stand side by side, a column each; more get a row each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a folder in Hugging Face format, a config.json, .gguf file, … or a hub id")
    add_case(parser)
    parser.add_argument("--device", action="append", metavar="NAME[:COUNT]", help="as of lighten estimate; repeatable")
    parser.add_argument("--price", metavar="USD/h", help="of one device, such as 2.10/h; with one --device")
    parser.add_argument("--recipe", action="append", metavar="TEXT|FILE", help="what the models become first; repeatable, '' is the model as it is")
    parser.add_argument("--against", choices=("money", "memory"), help="what the plot has across (default: money where all have a price)")
    parser.add_argument("--html", metavar="FILE", help="write the page: the plot and all figures")
    parser.add_argument("--plot", metavar="FILE", help="write the plot alone, as .svg; .html is the page")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    pictures = [(path, _kind_of(path, said)) for path, said in ((arguments.html, "--html"), (arguments.plot, "--plot")) if path is not None]
    devices = arguments.device or [None]
    if arguments.price is not None and (arguments.device is None or len(devices) > 1):
        raise DeviceError(f"--price={arguments.price} goes with one --device; here are {len(arguments.device or ())}.")
    entries = verbs.compare(arguments.models, devices=devices, recipes=arguments.recipe or [""], **case_options(arguments))
    for path, kind in pictures:
        write_whole(Path(path), compare_picture(entries, arguments.against, kind=kind))
        progress(f"wrote {path}")
    print_json({"entries": [entry.as_json() for entry in entries]}) if arguments.json else print(compare_text(entries))
    return 0


def _kind_of(path: str, said: str) -> str:
    kinds = {"--html": (".html",), "--plot": (".svg", ".html")}[said]
    if (kind := Path(path).suffix) not in kinds:
        raise OutputError(f"{said} {path}: write a file that ends in {' or '.join(kinds)}.")
    return kind


def compare_text(entries: Sequence[Entry]) -> str:
    """The comparison for people: a column for each combination where they are few, else a row."""
    asked = next(entry.cost.estimate.workload for entry in entries if entry.cost)
    shape = f"batch {asked.batch_size} × {asked.seq_len}" + (f" + {asked.new_tokens} new" if asked.new_tokens else "")
    names = list(dict.fromkeys(name for entry in entries for name in figures_of(entry)))
    said = [f"{asked.phase}, {shape}", ""]
    if len(entries) <= ASIDE and all(entry.cost for entry in entries):
        columns = [_name(entry, (WIDTH - 20) // len(entries) - 2) for entry in entries]
        rows = [[name, *(figures_of(entry)[name] for entry in entries)] for name in names]
        return "\n".join([*said, format_table(rows, ["", *columns])])
    shown = [name for name in names if name in IN_ROWS]
    varied = [part for part in ("model", "recipe", "device") if len({getattr(entry.choice, part) for entry in entries}) > 1]
    rows = []
    for entry in entries:
        first = ["\n".join(textwrap.wrap(getattr(entry.choice, part) or "-", 30)) for part in varied]
        rows.append([*first, *([figures_of(entry)[name] for name in shown] if entry.cost else [str(entry.failure)])])
    return "\n".join([*said, format_table(rows, [*varied, *shown])])


def _name(entry: Entry, width: int) -> str:
    """What is compared, a line each."""
    choice = entry.choice
    lines = [line for part in (choice.model, choice.recipe, choice.device) if part for line in textwrap.wrap(part, max(width, 12))]
    return "\n".join(lines)
