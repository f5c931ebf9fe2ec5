"""`lighten estimate` at many sizes, and the largest that fits: parse, ask, print."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.cli.estimate import estimate_at, estimate_text
from lighten.cli.options import print_json, progress
from lighten.cost.compiled import Exact, Figures, crossover_seq_len, known_parts
from lighten.cost.sizes import SIZE_NAMES, Axes, SizeName
from lighten.cost.sweep import FiguresAt, Largest, Sweep, find_largest, sweep, sweep_by
from lighten.cost.workload import Workload
from lighten.errors import OutputError, TraceError, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.recipe.estimate import Estimate, estimate
from lighten.units import SIZE_UNITS, format_bytes, format_count, format_seconds, parse_quantity

POINT_FIELDS = (
    "batch_size", "seq_len", "new_tokens", "flops", "matmul", "matmul_causal", "peak", "weights", "gradients", "optimizer", "activations", "kv_cache",
    "temporary", "overhead", "fits", "seconds",
)  # fmt: skip
"""What a point of a sweep says, in --json and in --csv."""
PARTS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "temporary")
TABLE_ROWS = 200
"""Rows at most that are printed for people; the others are in --csv and --json."""
PLOT_LENGTHS = (16, 131072)
"""Without a range of its own, a plot goes by doubling from the first of these to the model's positions, or to the second."""

FOLLOWED = 12
"""Points of a followed model that are followed one by one: about as many as fitting follows."""

Point = dict[str, Any]
Sizes = dict[str, tuple[int, ...]]


def figures(found: Estimate) -> dict[str, int]:
    """The figures of an estimate that a sweep has."""
    causal = {} if found.matmul_causal is None else {"matmul_causal": found.matmul_causal}
    flops = {"flops": found.total_flops, "matmul": sum(found.matmul.values())}
    return flops | causal | {"peak": found.memory.peak} | known_parts(found.memory)


def at_sizes(found: Estimate, arguments: argparse.Namespace) -> Exact:
    """Figures of the same model at other sizes: of its spec as the recipe left it, which is read once, or of following it again."""
    spec = found.spec
    if isinstance(spec, ModelSpec):
        return lambda workload: figures(estimate(spec, workload))
    return lambda workload: figures(estimate_at(arguments, {name: getattr(workload, name) for name in SIZE_NAMES}))


def crossover(found: Estimate) -> int | None:
    """The length from which attention's square leads; None where it never does, or the model's formula is not known."""
    return crossover_seq_len(found.spec) if isinstance(found.spec, ModelSpec) else None


def run_sweep(arguments: argparse.Namespace, sizes: Sizes) -> int:
    many = any(len(values) > 1 for values in sizes.values())
    if not many and arguments.csv:
        raise WorkloadError("--csv has no effect at one size; give several, such as --seq-len 128:4096:*2.")
    if not many and arguments.memory and not arguments.plot:
        raise WorkloadError("--memory has no effect at one size without --max or --plot.")
    plot = plot_path(arguments.plot) if arguments.plot else None
    memory = memory_bytes(arguments.memory) if arguments.memory else None
    asked = Axes(**sizes)
    found = estimate_at(arguments, {name: values[0] for name, values in sizes.items()})
    own: Sizes = {name: (getattr(found.workload, name),) for name in SIZE_NAMES if name not in sizes}
    axes = replace(asked, **own)
    if many:
        _check_last(arguments, sizes)
        swept, label = sweep_model(arguments, found, axes)
        points = list(_points(arguments, swept, memory))
        if arguments.csv:
            write_text(Path(arguments.csv), csv_text(points))
        _print_sweep(arguments, found, swept, points, memory, label)
    else:
        swept, _ = sweep_model(arguments, found, replace(axes, seq_len=plot_lengths(found)))
        print_json(found.as_json()) if arguments.json else print(estimate_text(found))
    if plot:
        from lighten.report.sweep_page import Pictured, sweep_picture

        timeline = found.program.timeline if found.program else None
        pictured = Pictured(estimate=found, sweep=swept, crossover=crossover(found), memory=memory, timeline=timeline)
        write_text(plot, sweep_picture(pictured, kind=plot.suffix))
    return 0


def sweep_model(arguments: argparse.Namespace, found: Estimate, axes: Axes) -> tuple[Sweep, str]:
    """The figures at every point, and how they were found: as those of one point, or extrapolated from a model followed at a few sizes."""
    label = found.labels.get("memory", found.method)
    if isinstance(found.spec, ModelSpec) or axes.points <= FOLLOWED:
        return sweep(at_sizes(found, arguments), found.workload, axes), label
    try:
        return sweep_by(_followed_figures(arguments, axes), found.workload, axes), "extrapolated"
    except TraceError as error:
        progress(f"{error} Each size is followed by itself.")
        return sweep(at_sizes(found, arguments), found.workload, axes), label


def _followed_figures(arguments: argparse.Namespace, axes: Axes) -> FiguresAt:
    from lighten.trace.fit import fit
    from lighten.trace.open import open_model

    followed = open_model(arguments.model, method=arguments.method, trust_remote_code=arguments.trust_remote_code)
    assert not isinstance(followed, ModelSpec)
    model = followed

    def figures_at(workload: Workload, batch: NDArray[Any], length: NDArray[Any]) -> Figures:
        ends = ((min(sizes), max(sizes)) for sizes in (axes.batch_size, axes.seq_len))
        fitted = fit(model, workload, batches=next(ends), lengths=next(ends))
        shape = np.broadcast_shapes(batch.shape, length.shape)
        found = {name: values.reshape(shape) for name, values in fitted.at(batch, length).items() if "/" not in name}
        return {"flops": found.pop("total_flops"), **found}

    return figures_at


def _check_last(arguments: argparse.Namespace, sizes: Sizes) -> None:
    """A length that the model does not take is refused before the others are computed; to follow a model there takes no longer than elsewhere."""
    estimate_at(arguments, {name: max(values) for name, values in sizes.items()})


def _points(arguments: argparse.Namespace, swept: Sweep, memory: int | None) -> Iterator[Point]:
    for point in swept.points():
        sizes = {name: point[name] for name in ("batch_size", "seq_len", "new_tokens")}
        time = estimate_at(arguments, sizes).time if arguments.device else None
        more: Point = {"fits": None if memory is None else point["peak"] <= memory, "seconds": time.seconds if time else None}
        merged = point | more
        yield {name: merged.get(name) for name in POINT_FIELDS}


def sweep_document(found: Estimate, swept: Sweep, points: list[Point], memory: int | None, label: str) -> dict[str, Any]:
    """The document of a sweep with --json."""
    one = found.as_json()
    return {
        "model": one["model"], "workload": {name: value for name, value in one["workload"].items() if name not in swept.sizes},
        "method": one["method"], "labels": one["labels"] | {"flops": label, "memory": label} if label == "extrapolated" else one["labels"],
        "parameters": one["parameters"], "memory_bytes": memory, "crossover_seq_len": crossover(found), "points": points,
        "assumptions": one["assumptions"], "warnings": one["warnings"],
    }  # fmt: skip


def _print_sweep(arguments: argparse.Namespace, found: Estimate, swept: Sweep, points: list[Point], memory: int | None, label: str) -> None:
    if not arguments.json:
        print(sweep_text(found, swept, points, memory))
    elif len(points) <= TABLE_ROWS:
        print_json(sweep_document(found, swept, points, memory, label))
    else:
        print(json.dumps(sweep_document(found, swept, points, memory, label), allow_nan=False))


def sweep_text(found: Estimate, swept: Sweep, points: list[Point], memory: int | None) -> str:
    """A row for each point, the columns that say something."""
    from lighten.report.table import format_table

    shown = points[:TABLE_ROWS]
    parts = [name for name in PARTS if any(point.get(name) for point in shown)]
    new_tokens = any(point["new_tokens"] for point in shown)
    header = ["batch", "length", *(["new"] if new_tokens else []), "FLOPs", "in products", "peak", *(name.replace("_", " ") for name in parts)]
    header += ["fits"] if memory is not None else []
    header += ["time"] if any(point["seconds"] is not None for point in shown) else []
    rows = []
    for point in shown:
        row = [str(point["batch_size"]), str(point["seq_len"]), *([str(point["new_tokens"])] if new_tokens else [])]
        row += [format_count(point["flops"]), format_count(point["matmul"]), format_bytes(point["peak"])]
        row += [format_bytes(point[name]) for name in parts]
        row += [{True: "yes", False: "no"}[point["fits"]]] if memory is not None else []
        row += [format_seconds(point["seconds"])] if "time" in header else []
        rows.append(row)
    spec, asked = found.spec, found.workload
    lines = [
        f"{spec.name} ({spec.architecture}, {spec.layers} layers), {asked.phase}, {asked.dtype}, {len(swept):,} points",
        "",
        format_table(rows, header),
        "",
    ]
    if len(points) > len(shown):
        lines.append(f"  … {len(points) - len(shown):,} points more: --csv FILE or --json has all")
    overtaken = crossover(found)
    if overtaken is not None:
        lines.append(f"  attention's square overtakes all other products at length {overtaken:,}")
    return "\n".join([*lines, *(f"  · {line}" for line in found.assumptions)])


def csv_text(points: list[Point]) -> str:
    """A line for each point under the names of `--json`; what is not known is empty."""
    said = io.StringIO()
    writer = csv.writer(said, lineterminator="\n")
    writer.writerow(points[0])
    writer.writerows([str(value).lower() if isinstance(value, bool) else value for value in point.values()] for point in points)
    return said.getvalue()


def run_largest(arguments: argparse.Namespace, sizes: Sizes) -> int:
    name: SizeName = arguments.max.replace("-", "_")
    if not arguments.memory:
        raise WorkloadError(f"--max {arguments.max} needs --memory, such as --memory 24GB.")
    several = [each for each, values in sizes.items() if len(values) > 1]
    if several or arguments.csv or arguments.plot:
        raise WorkloadError(f"--max finds one size; {', '.join(several) or '--csv or --plot'} asks for many: leave one of them out.")
    memory = memory_bytes(arguments.memory)
    asked = {each: values[0] for each, values in sizes.items()}
    found = estimate_at(arguments, asked | {name: 1})
    largest = find_largest(at_sizes(found, arguments), found.workload, name, memory, most=_most(found, name))
    found = estimate_at(arguments, asked | {name: largest.value})
    if arguments.json:
        print_json(found.as_json() | {"max": largest.as_json()})
    else:
        print(f"{largest_text(largest, found)}\n\n{estimate_text(found)}")
    return 0


def max_positions(found: Estimate) -> int | None:
    return found.spec.max_positions if isinstance(found.spec, ModelSpec) else None


def _most(found: Estimate, name: SizeName) -> int | None:
    """The longest that the model's positions leave room for."""
    positions, asked = max_positions(found), found.workload
    if positions is None or name == "batch_size":
        return None
    return positions - (asked.new_tokens if name == "seq_len" else asked.seq_len)


def largest_text(largest: Largest, found: Estimate) -> str:
    """What fits, what one more would need, and what fills the memory."""
    name = largest.name.replace("_", "-")
    parts = sorted(((value, part) for part, value in known_parts(found.memory).items() if value), reverse=True)
    filled = ", ".join(f"{part.replace('_', ' ')} {value / largest.peak:.0%}" for value, part in parts[:3])
    if largest.next_peak is None:
        more = f"the model takes no more: max_position_embeddings={max_positions(found)}"
    else:
        more = f"{largest.value + 1:,} would need {largest.next_peak:,} bytes"
    return f"{name} {largest.value:,} fits: {largest.peak:,} of {largest.memory:,} bytes ({filled}); {more}"


def plot_lengths(found: Estimate) -> tuple[int, ...]:
    """Lengths by doubling, up to the model's positions."""
    if not isinstance(found.spec, ModelSpec) or found.spec.fixed_len is not None:  # to follow a model again takes seconds a length
        return (found.workload.seq_len,)
    first, last = PLOT_LENGTHS
    last = (found.spec.max_positions or last) - found.workload.new_tokens
    doubled = [first << step for step in range(40) if first << step <= last]
    return tuple(sorted({*doubled, last, found.workload.seq_len}))


def plot_path(text: str) -> Path:
    """Raises:
    OutputError: neither an .html nor an .svg file.
    """
    path = Path(text)
    if path.suffix not in (".html", ".svg"):
        raise OutputError(f"--plot {text}: a plot is written as .html or .svg.")
    return path


def memory_bytes(text: str) -> int:
    """Whole bytes of a size such as `24GB`.

    Raises:
        ConstraintError: not a size.
    """
    return int(parse_quantity(text, SIZE_UNITS, "memory"))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: the folder is missing, full or read-only; nothing is left behind.
    """
    from lighten.report.written import write_whole

    write_whole(path, text)
