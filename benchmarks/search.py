"""Does the search find what trying everything finds, and in how much of the time?

    python benchmarks/search.py --model .models/minilm --shape encode:1x128 --minimize latency --require "neighbour_agreement>=0.97"
    python benchmarks/search.py --model .models/smollm2-135m-offgrid --shape decode:1x64+64 --minimize latency --require "perplexity_ratio<=1.03"

Every recipe of the model's usual space that can be done is tried once (hours; its trials stand in results/everything/, and what is there of this
machine is not tried again; stopped and started again, it goes on), then the space is searched anew with a budget. Both winners are compared by the
figures of the first run. Predictions are those that were made before each trial of the search; a range is one of 90 %.

Rows go to results/search.json, by model, shape and objective. The last line on stdout is one JSON object: `rows`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtimes import workload

from lighten import verbs
from lighten.choose import Request
from lighten.choose.constraints import parse_objective
from lighten.choose.journal import FILE
from lighten.choose.request import parse_budget
from lighten.choose.space import default_space
from lighten.errors import RecipeError
from lighten.model import ModelSpec
from lighten.model.runnable import read_runnable
from lighten.recipe import Recipe, apply_recipe

HERE = Path(__file__).parent
KEYS = ("latency_s", "size_bytes", "peak_memory_bytes")


def everything(spec: ModelSpec) -> tuple[Recipe, ...]:
    """The recipes of the usual space that can be done."""
    found = []
    for recipe in dict.fromkeys(default_space(spec)):
        try:
            apply_recipe(recipe, spec)
        except RecipeError:
            continue
        found.append(recipe)
    return tuple(found)


def tried(choice: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Recipe @ runtime → its trial, of those that were measured."""
    trials = [choice["baseline"], *choice["candidates"]]
    return {f"{trial['recipe']} @ {trial['runtime']}": trial for trial in trials if trial["measured"]}


def accuracy(choice: dict[str, Any]) -> dict[str, Any]:
    """Of what was predicted before it was measured: median errors, and the share of latencies within their range."""
    trials = [trial for trial in choice["candidates"] if trial["measured"]]
    errors = {key: [abs(trial["ratio"][key] - 1) for trial in trials if trial["ratio"] and trial["ratio"].get(key)] for key in KEYS}
    ranged = [trial for trial in trials if trial["predicted"].get("latency_low_s")]
    inside = [trial["predicted"]["latency_low_s"] <= trial["measured"]["latency_s"] <= trial["predicted"]["latency_high_s"] for trial in ranged]
    return {f"median_error_{key}": statistics.median(values) if values else None for key, values in errors.items()} | {
        "ranges": len(inside), "inside": sum(inside)
    }  # fmt: skip


@contextmanager
def kept_trials(out: Path, kept: Path) -> Iterator[None]:
    """The journal of the run in `out` begins with what is kept, and is kept however the run ends."""
    journal = out / FILE
    if kept.exists() and not journal.exists():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, journal)
    try:
        yield
    finally:
        if journal.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(journal, kept)


def row(arguments: argparse.Namespace, spec: ModelSpec) -> dict[str, Any]:
    def request(name: str, **more: Any) -> Request:
        return Request(
            model=arguments.model, out=arguments.work / f"{arguments.model.name}-{name}", workload=workload(arguments.shape), fresh=True,
            require=tuple(arguments.require), minimize=arguments.minimize, maximize=arguments.maximize, text=arguments.text,
            threads=arguments.threads, **more,
        )  # fmt: skip

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    shape = arguments.shape.replace(":", "-")
    wanted = request(f"everything-{shape}", recipes=everything(spec))
    with kept_trials(wanted.out, arguments.everything / f"{arguments.model.name}-{shape}.jsonl"):
        whole = verbs.choose(wanted, log=log)
    found = verbs.choose(request(f"search-{shape}-{arguments.minimize or arguments.maximize}", budget_s=parse_budget(arguments.budget)), log=log)
    objective = parse_objective(arguments.minimize, arguments.maximize, decoder=spec.is_decoder)
    by_name = tried(whole)
    names = {}
    for which, choice in (("best", whole), ("found", found)):
        names[which] = next((name for name, trial in tried(choice).items() if trial["id"] == choice["chosen"]), None)
    costs = {which: objective.cost(by_name[name]["measured"]) if name in by_name else math.nan for which, name in names.items()}
    seconds = sum(trial["seconds"] for trial in by_name.values())
    return {
        "model": arguments.model.name, "shape": arguments.shape, "objective": objective.figure, "require": arguments.require,
        "machine": whole["machine"],
        "tried_of_all": [sum(bool(trial["measured"]) for trial in found["candidates"]), len(by_name) - 1], "chosen": names,
        "found_over_best": costs["found"] / costs["best"] if objective.lower else costs["best"] / costs["found"],
        "seconds": {"everything": seconds, "search": found["seconds"]}, "share_of_time": found["seconds"] / seconds, "stopped": found["stopped"],
        **accuracy(found),
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shape", required=True, help="such as encode:32x128 or decode:8x64+64")
    parser.add_argument("--minimize")
    parser.add_argument("--maximize")
    parser.add_argument("--require", action="append", default=[])
    parser.add_argument("--budget", default="20min", help="of the search")
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file (default: the embedded text)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="keeps the folders of both runs (default: they are thrown away)")
    parser.add_argument("--everything", type=Path, default=HERE / "results" / "everything", help="where the trials of everything are kept")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "search.json")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="search-") as scratch:
        arguments.work = (arguments.work or Path(scratch)).resolve()
        own = row(arguments, read_runnable(arguments.model))
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    same = ("model", "shape", "objective")
    rows = [each for each in rows if any(each[key] != own[key] for key in same)] + [own]
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"rows": [own]}))


if __name__ == "__main__":
    main()
