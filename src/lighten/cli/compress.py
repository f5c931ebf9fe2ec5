"""Carry a recipe out: a smaller model in a standard format, with lighten.json beside it."""

from __future__ import annotations

import argparse
import os

from lighten import verbs
from lighten.cli.options import add_json, print_json, progress
from lighten.errors import RecipeError
from lighten.recipe import read_recipe
from lighten.report import format_table, merged_steps
from lighten.units import format_bytes, format_count, format_seconds

EXAMPLE = "lighten compress .models/minilm --recipe 'quantize(rtn, bits=8, embeddings=true) @ openvino' -o minilm-int8"

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch's launcher sets for each process that it starts. Source: docs.pytorch.org, torchrun, "Environment Variables"."""


STEP_KEYS = ("step", "seconds", "parameters", "size_bytes")
"""What is said of each step; all there is of it is in lighten.json and run.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format")
    parser.add_argument("--recipe", required=True, metavar="TEXT|FILE", help="steps and runtime, as text or in a .yaml file")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new folder for the artifact")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="calibration text: .txt, .jsonl, .csv or .tsv (default: the embedded text); .npz of arrays for a model of images or sound",
    )
    parser.add_argument("--memory", metavar="SIZE", help="the most that the process may hold, such as 4GB; refused at once where it does not do")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run, which lies beside DIR")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if all(name in os.environ for name in LAUNCHED):
        said = read_recipe(arguments.recipe)
        if all(step["parallel"] in (None, "none") for step in said.steps):
            raise RecipeError(f"processes were started together and no step of {said} is spread over them; say parallel=ddp or parallel=fsdp in it.")
        from lighten.compress.processes import work_together

        return work_together(lambda: _compress(arguments))
    return _compress(arguments)


def _compress(arguments: argparse.Namespace) -> int:
    made = verbs.compress(
        arguments.model, arguments.recipe, arguments.output, text=arguments.text, memory=arguments.memory, resume=arguments.resume, log=progress,
    )  # fmt: skip
    manifest, run = verbs.read_made(made.folder)
    steps = [{key: step.get(key) for key in STEP_KEYS} for step in merged_steps(manifest, run or {})]
    size, how = made.size_bytes, made.made
    predicted, ratio = {"size_bytes": made.predicted_size_bytes}, {"size_bytes": made.predicted_size_bytes / size}
    if how is not None:
        predicted["peak_memory_bytes"] = how.predicted_peak_bytes
        ratio |= {"peak_memory_bytes": how.predicted_peak_bytes / how.peak_bytes} if how.peak_bytes else {}
    document = {
        "artifact": str(made.folder), "recipe": str(made.recipe), "runtime": made.recipe.runtime, "size_bytes": size,
        "seconds": how and how.seconds, "peak_memory_bytes": how and how.peak_bytes, "predicted": predicted, "ratio": ratio, "steps": steps,
    }  # fmt: skip
    if arguments.json:
        print_json(document)
        return 0
    if steps:
        rows = [
            [str(step["step"]), format_seconds(step["seconds"]), format_count(step["parameters"]), format_bytes(step["size_bytes"])] for step in steps
        ]
        print(format_table(rows, ["step", "took", "parameters", "size after it"]))
    said = f"predicted {format_bytes(made.predicted_size_bytes)}, ratio {ratio['size_bytes']:.3f}"
    print(f"{made.folder}: {format_bytes(size)} ({said}), {made.recipe}")
    if how is not None and how.peak_bytes:
        said = f"{format_bytes(how.peak_bytes)} (predicted {format_bytes(how.predicted_peak_bytes)}, ratio {ratio['peak_memory_bytes']:.3f})"
        print(f"{format_seconds(how.seconds)}, peak memory {said}")
    print(f"what each step cost and gave, as a page: lighten report {made.folder}")
    return 0
