"""From finished trials to an answer: which meet the constraints, which lie on the Pareto front, which is chosen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lighten.choose.constraints import FIGURES, LOWER_IS_BETTER, Constraint, figure_of
from lighten.units import format_bytes, format_seconds

Record = dict[str, Any]
RATIOS = ("size_bytes", "peak_memory_bytes", "latency_s")


def quality_metric(*, decoder: bool) -> str:
    """The figure of quality that plots and answers use."""
    return "perplexity_ratio" if decoder else "neighbour_agreement"


def on_one_clock(trials: Sequence[Record]) -> list[Record]:
    """The trials with their latencies as of one moment, though the machine's speed drifts from trial to trial.

        latency = the original's latency, the median over all trials that it ran beside / the trial's own speed-up

    What the clock showed stays as `clock_latency_s`; quartiles and throughput are scaled with the median.
    """
    clocks = [trial["measured"]["original_latency_s"] for trial in trials if trial["measured"] and trial["measured"].get("original_latency_s")]
    if not clocks:
        return list(trials)
    original_s = statistics.median(clocks)
    return [_scaled(trial, original_s) if trial["measured"] and trial["measured"].get("speedup") else trial for trial in trials]


def _scaled(trial: Record, original_s: float) -> Record:
    measured = trial["measured"]
    scale = original_s / measured["speedup"] / measured["latency_s"]
    latencies = {key: measured[key] * scale for key in ("latency_s", "latency_q1_s", "latency_q3_s")}
    measured = measured | latencies | {"throughput": measured["throughput"] / scale, "clock_latency_s": measured["latency_s"]}
    return trial | {"measured": measured, "ratio": ratios(trial["predicted"], measured)}


def judge_trials(trials: Sequence[Record], baseline: Record, constraints: Sequence[Constraint], minimize: str, metric: str) -> list[Record]:
    """The trials with `meets` and `pareto` filled in where something was measured."""
    measured = [trial for trial in trials if trial["measured"]]

    def judged(trial: Record) -> Record:
        if not trial["measured"]:
            return trial
        return trial | {"meets": meets(trial, baseline, constraints), "pareto": on_front(trial, measured, minimize, metric)}

    return [judged(trial) for trial in trials]


def meets(trial: Record, baseline: Record, constraints: Sequence[Constraint]) -> bool:
    """Whether a measured trial meets every constraint; a figure that is not known meets none."""
    return not misses(trial, baseline, constraints)


def misses(trial: Record, baseline: Record, constraints: Sequence[Constraint]) -> list[tuple[Constraint, float | None]]:
    """The constraints that a trial does not meet, each with its figure."""
    found = []
    for constraint in constraints:
        value = figure_of(trial["measured"], constraint.figure)
        if value is None or constraint.allows(value, figure_of(baseline["measured"], constraint.figure)) is not True:
            found.append((constraint, value))
    return found


def on_front(trial: Record, others: Sequence[Record], minimize: str, metric: str) -> bool:
    """Whether no other trial is at least as good in both the minimized figure and quality, and better in one."""
    own = _point(trial, minimize, metric)
    if own is None:
        return False
    points = [point for other in others if (point := _point(other, minimize, metric)) is not None]
    return not any(point[0] <= own[0] and point[1] <= own[1] and point != own for point in points)


def choose_best(trials: Sequence[Record], minimize: str) -> Record | None:
    """The trial that meets everything and has the least of the minimized figure."""
    able = [trial for trial in trials if trial["meets"]]
    return min(able, key=lambda trial: _cost(trial, minimize), default=None)


def closest(trials: Sequence[Record], baseline: Record, constraints: Sequence[Constraint]) -> Record | None:
    """Of the measured trials the one whose worst miss is smallest: its id and what it misses."""

    def worst(trial: Record) -> float:
        found = [
            c.shortfall(v, figure_of(baseline["measured"], c.figure)) if v is not None else None for c, v in misses(trial, baseline, constraints)
        ]
        return max((float("inf") if away is None else away for away in found), default=0.0)

    measured = [trial for trial in trials if trial["measured"]]
    if not measured:
        return None
    best = min(measured, key=worst)
    said = [f"{c.figure} {say(c.figure, value)}, required {c.text}" for c, value in misses(best, baseline, constraints)]
    return {"id": best["id"], "misses": said}


def looser(trials: Sequence[Record], chosen: Record | None, minimize: str, metric: str) -> list[Record]:
    """What the Pareto front offers beyond the chosen trial: less of the minimized figure for less quality."""
    if chosen is None:
        return []
    own = _cost(chosen, minimize)
    found = []
    for trial in sorted((t for t in trials if t["pareto"] and t["id"] != chosen["id"]), key=lambda t: _cost(t, minimize), reverse=True):
        cost = _cost(trial, minimize)
        if cost < own:
            gain = f"{minimize} {say(minimize, cost)}, {own / cost:.2f}x better than the chosen"
            quality = figure_of(trial["measured"], metric), figure_of(chosen["measured"], metric)
            found.append({"id": trial["id"], "gain": gain, "cost": f"{metric} {say(metric, quality[0])} instead of {say(metric, quality[1])}"})
    return found


def warnings(chosen: Record | None, baseline: Record) -> list[str]:
    """Where the chosen trial is worse than the original in size, memory or speed."""
    if chosen is None:
        return []
    said = []
    for figure, word in (("size", "bigger on disk"), ("memory", "larger in memory"), ("latency", "slower")):
        own, original = figure_of(chosen["measured"], figure), figure_of(baseline["measured"], figure)
        if figure == "latency" and chosen["measured"].get("speedup"):
            own, original = 1 / chosen["measured"]["speedup"], 1.0
        if own is not None and original is not None and own > original:
            said.append(f"the chosen is {word} than the original, {own / original:.2f} times")
    return said


def accuracy(trials: Sequence[Record]) -> Record:
    """Predicted over measured: how many, the median and the worst, for each figure that is predicted."""
    found = {}
    for key in RATIOS:
        ratios = [trial["ratio"][key] for trial in trials if trial["ratio"] and trial["ratio"].get(key)]
        found[key] = {
            "count": len(ratios),
            "median": statistics.median(ratios) if ratios else None,
            "worst": max(ratios, key=lambda ratio: max(ratio, 1 / ratio)) if ratios else None,
        }
    return found


def ratios(predicted: Record, measured: Record) -> Record:
    """Predicted over measured of each figure; None where one of the two is not known."""
    return {key: predicted[key] / measured[key] if predicted.get(key) and measured.get(key) else None for key in RATIOS}


def say(figure: str, value: float | None) -> str:
    """A figure for people."""
    if value is None:
        return "not known"
    if figure in ("size", "memory"):
        return format_bytes(value)
    return format_seconds(value) if figure == "latency" else f"{value:.3f}"


def _cost(trial: Record, minimize: str) -> float:
    value = figure_of(trial["measured"], minimize)
    return float("inf") if value is None else value


def _point(trial: Record, minimize: str, metric: str) -> tuple[float, float] | None:
    quality = figure_of(trial["measured"], metric)
    if quality is None or minimize not in FIGURES:
        return None
    return _cost(trial, minimize), quality if metric in LOWER_IS_BETTER else -quality
