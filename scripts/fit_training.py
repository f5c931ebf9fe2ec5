"""Fit the constants of training steps to published ones, and say how far they are on sources and devices that were left out.

    python scripts/fit_training.py --rows FILE… [--write] [--quick]

A case is a row of training as the tool's own types (benchmarks/published_rows.py) with its published seconds. Constants are fitted as
multipliers of `PRIOR`, in logarithms, by robust least squares (Huber weights on log(predicted / published)); each has a prior spread, and a
source of n rows counts as √n, so that none outvotes the others. Then each source, and each device, is left out in turn and predicted by what
the others say; from these errors comes the range: a spread of its own for a step, and one more for each thing that rows do not say.

`--write` keeps the constants in src/lighten/device/rates_known/training.json. `--quick` leaves nothing out, and keeps the spreads as they are.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "benchmarks"))

from published_rows import LeftOut, Row, TrainingCase, read_rows, step_seconds, training_case  # noqa: E402

from lighten.device.datasheet import RANGE_90  # noqa: E402
from lighten.errors import LightenError  # noqa: E402
from lighten.parallel.step_time import Stack, TrainingRates, step_seconds_of, training_rates_from  # noqa: E402

Array = NDArray[np.float64]
KEPT = HERE.parent / "src/lighten/device/rates_known/training.json"
PRIOR: dict[str, Any] = json.loads((HERE / "fit_training_prior.json").read_text())
"""Constants before any published step is seen, each with its reason in `why` beside it, and the spread of its logarithm that is believed."""
NOISE = 0.12
"""Error of log(seconds) beyond which a row is trusted less: the goal that the fit is held to."""
STEPS, LARGEST_STEP = 8, 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row with its published seconds and what it leaves out."""

    row: Row
    source: str
    device: str
    case: TrainingCase
    seconds: float
    unsaid: tuple[str, ...]


def cases_of(rows: Sequence[Row]) -> tuple[list[Case], Counter[str]]:
    """The rows that give a time, and how many do not, by reason."""
    found: list[Case] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        try:
            found.append(case_of(row))
        except (LeftOut, LightenError) as error:
            left_out[str(error)[:100]] += 1
    return found, left_out


def case_of(row: Row) -> Case:
    """A row as a case.

    Raises:
        LeftOut, LightenError: no time, or not enough to predict one.
    """
    if row.get("measured", "measured") != "measured":
        raise LeftOut(f"{row['measured']}: no time")
    case = training_case(row)
    seconds, unsaid = step_seconds(row, case)
    if seconds <= 0:
        raise LeftOut("the published time is 0")
    return Case(
        row=row,
        source=row.get("source_repo_or_doc") or "not said",
        device=case.device.name,
        case=case,
        seconds=seconds,
        unsaid=(*case.unsaid, *unsaid),
    )


def predict(case: TrainingCase, rates: TrainingRates) -> float:
    """Predicted seconds of a case's step."""
    stack = Stack(software=case.software, linear_dtype=case.linear_dtype)  # type: ignore[arg-type]
    return step_seconds_of(case.spec, case.workload, case.plan, case.device, stack=stack, rates=rates)


def fitted_names() -> list[tuple[str, float]]:
    """Constants that are fitted, by their path, with the prior spread of their logarithm."""
    return [(name, spread) for name, spread in PRIOR["spreads"].items() if spread]


def rates_at(multipliers: Array) -> TrainingRates:
    """The prior's constants, each times the exponential of its entry."""
    return training_rates_from(document_at(multipliers))


def document_at(multipliers: Array) -> dict[str, Any]:
    """The same as a document of JSON."""
    document = copy.deepcopy(PRIOR["rates"])
    for (name, _), value in zip(fitted_names(), multipliers, strict=True):
        *path, last = name.split(".")
        at = document
        for key in path:
            at = at[key]
        at[last] = [each * math.exp(value) for each in at[last]] if isinstance(at[last], list) else at[last] * math.exp(value)
    return document


def fit(cases: Sequence[Case], *, start: Array | None = None) -> Array:
    """Logarithms of multipliers of the prior's constants that fit the cases best."""
    names = fitted_names()
    believed = np.array([spread for _, spread in names])
    unique, weights, seconds = _grouped(cases)
    at = np.zeros(len(names)) if start is None else start.copy()

    def errors(multipliers: Array) -> Array:
        rates = rates_at(multipliers)
        return np.array([math.log(predict(case, rates)) for case in unique]) - seconds

    now = errors(at)
    for _ in range(STEPS):
        slopes = np.empty((len(unique), len(names)))
        for i in range(len(names)):
            moved = at.copy()
            moved[i] += 0.05
            slopes[:, i] = (errors(moved) - now) / 0.05
        trust = weights / NOISE**2 / np.maximum(1, np.abs(now) / NOISE)
        curvature = slopes.T @ (slopes * trust[:, None]) + np.diag(1 / believed**2)
        step = np.linalg.solve(curvature, -(slopes.T @ (trust * now)) - at / believed**2)
        step = np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        at = at + step
        now = errors(at)
        if float(np.abs(step).max()) < 0.01:
            break
    return at


def _grouped(cases: Sequence[Case]) -> tuple[list[TrainingCase], Array, Array]:
    """Cases that predict alike as one: with the sum of their weights and the weighted mean of their logarithms of seconds."""
    sizes = Counter(case.source for case in cases)
    groups: defaultdict[Any, list[Case]] = defaultdict(list)
    for case in cases:
        one = case.case
        groups[id(one.spec), one.workload, one.plan, one.device.name, one.device.links, one.linear_dtype, one.software, case.source].append(case)
    unique = [group[0].case for group in groups.values()]
    weights = np.array([len(group) / math.sqrt(sizes[group[0].source]) for group in groups.values()])
    seconds = np.array([float(np.median([math.log(case.seconds) for case in group])) for group in groups.values()])
    return unique, weights, seconds


def left_out(cases: Sequence[Case], key: Callable[[Case], str], start: Array) -> dict[int, float]:
    """Index of a case → log(predicted / published) by constants that were fitted without all cases of its kind."""
    found: dict[int, float] = {}
    for name in sorted({key(case) for case in cases}):
        rates = rates_at(fit([case for case in cases if key(case) != name], start=start))
        found |= {i: math.log(predict(case.case, rates) / case.seconds) for i, case in enumerate(cases) if key(case) == name}
    return found


NOT_SEEN = {"offload": 0.3}
"""What adds to the spread, and no row has: a host's speed is not the device's."""
UNSAID = ("recompute", "batch", "plan", "software", "shape", "length", "precision", "network", "schedule", "power", "flops")


def spreads(cases: Sequence[Case], errors: Sequence[float], coverage: float = 0.9) -> dict[str, float]:
    """A standard deviation for every step, and one more for each thing that a row does not say, that together hold 90 % of the errors.

    Squares of errors, large ones cut, are explained by what is missing, by least squares with no negative part; then all are scaled so that
    the share of rows inside their range, each source weighted by √n, is as asked for.
    """
    sizes = Counter(case.source for case in cases)
    weights = np.array([1 / math.sqrt(sizes[case.source]) for case in cases])
    values = np.abs(np.array(errors))
    columns = np.array([[1.0, *(float(name in case.unsaid) for name in UNSAID)] for case in cases])
    squares = np.minimum(values, 5 * np.median(values)) ** 2
    prior = np.array([0.12**2, *([0.1**2] * len(UNSAID))])
    parts = prior.copy()
    strength = 3.0
    for _ in range(200):  # coordinate descent, each part not below half of its prior's spread
        for i in range(len(parts)):
            rest = squares - columns @ parts + columns[:, i] * parts[i]
            top = float((weights * columns[:, i]) @ rest) + strength * prior[i]
            parts[i] = max(0.25 * prior[i], top / (float(weights @ columns[:, i]) + strength))
    sd = np.sqrt(columns @ parts)
    ratio = values / (RANGE_90 * sd)
    order = np.argsort(ratio)
    total = np.cumsum(np.ones_like(weights)[order]) / len(weights)
    scale = float(ratio[order][np.searchsorted(total, coverage)])
    return {name: round(math.sqrt(part) * scale, 4) for name, part in zip(("step", *UNSAID), parts, strict=True)} | NOT_SEEN


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile of |predicted / published - 1|, and how many there are."""
    off = np.abs(np.expm1(np.array(list(errors))))
    return {"median_error": round(float(np.median(off)), 4), "p90_error": round(float(np.quantile(off, 0.9)), 4), "n": len(off)}


def show(title: str, cases: Sequence[Case], errors: dict[int, float], key: Callable[[Case], str]) -> None:
    print(f"\n{title}")
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for i, case in enumerate(cases):
        groups[key(case)].append(errors[i])
    for name, values in sorted(groups.items()):
        found = summary(values)
        ends = f"p90 {found['p90_error']:6.1%}  bias {np.median(values):+.2f}"
        print(f"  {name[:60]:60s} {found['n']:4d} rows  median {found['median_error']:6.1%}  {ends}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="files with the columns of training.csv")
    parser.add_argument("--write", action="store_true", help="keep the constants")
    parser.add_argument("--quick", action="store_true", help="leave nothing out")
    given = parser.parse_args()
    cases, skipped = cases_of([row for path in given.rows for row in read_rows(path)])
    for reason, count in skipped.most_common():
        print(f"  left out {count:4d}: {reason}")
    best = fit(cases)
    document = document_at(best)
    rates = rates_at(best)
    fitted = {i: math.log(predict(case.case, rates) / case.seconds) for i, case in enumerate(cases)}
    for (name, _), value in zip(fitted_names(), best, strict=True):
        print(f"  {name:24s} × {math.exp(value):.3f}")
    show("fitted, by source", cases, fitted, lambda case: case.source)
    figures: dict[str, Any] = {"fitted": summary(list(fitted.values()))}
    spread = json.loads(KEPT.read_text()).get("spread", {}) if KEPT.exists() else {}
    if not given.quick:
        by_source = left_out(cases, lambda case: case.source, best)
        show("each source left out", cases, by_source, lambda case: case.source)
        by_device = left_out(cases, lambda case: case.device, best)
        show("each device left out", cases, by_device, lambda case: case.device)
        figures |= {"source_left_out": summary(list(by_source.values())), "device_left_out": summary(list(by_device.values()))}
        spread = spreads(cases, [by_source[i] for i in range(len(cases))])
    document |= {
        "spread": spread,
        "sources": [f"{source}: {count} rows" for source, count in sorted(Counter(case.source for case in cases).items())],
        "note": "scripts/fit_training.py over published training steps; priors: scripts/fit_training_prior.json",
    }
    if given.write:
        KEPT.write_text(json.dumps(_rounded(document), indent=1) + "\n")
        print(f"\nkept in {KEPT.name}")
    print(json.dumps(figures))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
