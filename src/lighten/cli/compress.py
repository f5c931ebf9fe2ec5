"""Carry a recipe out: a smaller model in a standard format, with lighten.json beside it."""

from __future__ import annotations

import argparse

from lighten import verbs
from lighten.cli.options import add_json, print_json, progress
from lighten.units import format_bytes

EXAMPLE = "lighten compress .models/minilm --recipe 'quantize(rtn, bits=8, embeddings=true) @ openvino' -o minilm-int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format")
    parser.add_argument("--recipe", required=True, metavar="TEXT|FILE", help="steps and runtime, as text or in a .yaml file")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new folder for the artifact")
    parser.add_argument("--text", metavar="FILE", help="calibration text: .txt or .jsonl (default: the embedded text)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    made = verbs.compress(arguments.model, arguments.recipe, arguments.output, text=arguments.text, log=progress)
    document = {
        "artifact": str(made.folder), "recipe": str(made.recipe), "runtime": made.recipe.runtime, "size_bytes": made.size_bytes,
        "predicted": {"size_bytes": made.predicted_size_bytes}, "ratio": {"size_bytes": made.predicted_size_bytes / made.size_bytes},
    }  # fmt: skip
    if arguments.json:
        print_json(document)
    else:
        ratio = made.predicted_size_bytes / made.size_bytes
        print(
            f"{made.folder}: {format_bytes(made.size_bytes)} (predicted {format_bytes(made.predicted_size_bytes)}, ratio {ratio:.3f}), {made.recipe}"
        )
    return 0
