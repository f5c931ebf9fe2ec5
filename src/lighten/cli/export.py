"""Write a model or an artifact in another format, where nothing is lost by it."""

from __future__ import annotations

import argparse

from lighten import verbs
from lighten.cli.options import add_json, print_json, progress
from lighten.units import format_bytes

EXAMPLE = "lighten export .models/smollm2-135m --to gguf -o smollm2.gguf"
TARGETS = ("safetensors", "compressed-tensors", "gguf", "onnx", "openvino", "ort")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL|ARTIFACT", help="a folder of safetensors, or a .gguf file; for ort an artifact for onnxruntime too")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the format to write")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="a new folder, or with --to gguf a new .gguf file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    made = verbs.export(arguments.source, arguments.to, arguments.output, log=progress)
    document = {
        "output": str(made.path), "from": made.source, "to": made.target, "size_bytes": made.size_bytes, "types": dict(made.types),
        "compared": {"tensors": made.tensors, "output_error": made.output_error}, "notes": list(made.notes),
    }  # fmt: skip
    if arguments.json:
        print_json(document)
        return 0
    types = ", ".join(f"{count} × {name}" for name, count in made.types.items())
    print(f"{made.path}: {format_bytes(made.size_bytes)}, matrices {types}; {_compared(made.tensors, made.output_error)}")
    for note in made.notes:
        print(f"note: {note}")
    return 0


def _compared(tensors: int, output_error: float | None) -> str:
    """What was loaded back."""
    parts = [f"{tensors} tensors read back equal"] if tensors else []
    if output_error is not None:
        parts.append(f"its output is {output_error:.2g} off")
    return " and ".join(parts)
