"""From finished trials to an answer: which meet the constraints, which lie on the Pareto front, which is chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lighten.choose.constraints import FIGURES, LOWER_IS_BETTER, Constraint, Objective, figure_of
from lighten.units import format_bytes, format_seconds

Record = dict[str, Any]
RATIOS = ("size_bytes", "peak_memory_bytes", "latency_s", "time_to_first_token_s")
TIE = 0.03
"""Two trials whose objectives differ by less are told apart by quality; not sizes, which are exact."""


def quality_metric(*, decoder: bool, task: Sequence[str] = ()) -> str:
    """The figure of quality that plots and answers use: the first of the user's task, where there is one."""
    if task:
        return task[0]
    return "perplexity_ratio" if decoder else "neighbour_agreement"


def on_one_clock(trials: Sequence[Record], *, like: Sequence[Record] | None = None) -> list[Record]:
    """The trials with their latencies as of one moment, though the machine's speed drifts from trial to trial.

        latency = the original's latency, the median over all trials that it ran beside / the trial's own speed-up

    What the clock showed stays as `clock_latency_s`; quartiles and throughput are scaled with the median.

    Args:
        like: the trials whose moment it is, where that is not their own.
    """
    beside = (trial["measured"] for trial in (trials if like is None else like) if trial["measured"])
    clocks = [measured["original_latency_s"] for measured in beside if measured.get("original_latency_s")]
    if not clocks:
        return list(trials)
    original_s = statistics.median(clocks)
    return [_scaled(trial, original_s) if trial["measured"] and trial["measured"].get("speedup") else trial for trial in trials]


def _scaled(trial: Record, original_s: float) -> Record:
    measured = trial["measured"]
    scale = original_s / measured["speedup"] / measured["latency_s"]
    times = ("latency_s", "latency_q1_s", "latency_q3_s", "time_to_first_token_s", "energy_j", "usd_per_million_tokens")
    scaled = {key: measured[key] * scale for key in times if measured.get(key) is not None}
    measured = measured | scaled | {"throughput": measured["throughput"] / scale, "clock_latency_s": measured["latency_s"]}
    return trial | {"measured": measured, "ratio": ratios(trial["predicted"], measured)}


def judge_trials(trials: Sequence[Record], baseline: Record, constraints: Sequence[Constraint], objective: Objective, metric: str) -> list[Record]:
    """The trials with `meets` and `pareto` filled in where something was measured."""
    measured = [trial for trial in trials if trial["measured"]]

    def judged(trial: Record) -> Record:
        if not trial["measured"]:
            return trial
        return trial | {"meets": meets(trial, baseline, constraints), "pareto": on_front(trial, measured, objective, metric)}

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


def on_front(trial: Record, others: Sequence[Record], objective: Objective, metric: str) -> bool:
    """Whether no other trial is at least as good in both the objective and quality, and better in one."""
    own = point_of(trial, objective, metric)
    if own is None:
        return False
    points = [point for other in others if (point := point_of(other, objective, metric)) is not None]
    return not any(point[0] <= own[0] and point[1] <= own[1] and point != own for point in points)


def choose_best(trials: Sequence[Record], objective: Objective, metric: str, finals: Mapping[str, float] = MappingProxyType({})) -> Record | None:
    """The trial that meets everything and is best in the objective; of those within `TIE` of it the one of best quality, then the smallest.

    Args:
        finals: id → seconds over those of the best, where the two ran in turn; they replace what the trials showed.
    """
    able = [trial for trial in trials if trial["meets"]]
    if not able:
        return None
    best = min(able, key=lambda trial: objective.cost(trial["measured"]))
    least = objective.cost(best["measured"])

    def cost(trial: Record) -> float:
        factor = finals.get(trial["id"])
        if factor is None:
            return objective.cost(trial["measured"])
        return least * factor if objective.lower else least / factor

    winner = min(map(cost, able))
    near = 0.0 if objective.figure == "size" else TIE * abs(winner)
    tied = [trial for trial in able if cost(trial) <= winner + near]

    def order(trial: Record) -> tuple[float, float, float]:
        quality = figure_of(trial["measured"], metric)
        worse = math.inf if quality is None else quality if metric in LOWER_IS_BETTER else -quality
        return worse, trial["measured"]["size_bytes"], cost(trial)

    return min(tied, key=order)


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


def looser(trials: Sequence[Record], chosen: Record | None, objective: Objective, metric: str) -> list[Record]:
    """What the Pareto front offers beyond the chosen trial: a better objective for less quality."""
    if chosen is None or objective.figure not in FIGURES:
        return []
    found = []
    own = figure_of(chosen["measured"], objective.figure)
    for trial in sorted((t for t in trials if t["pareto"] and t["id"] != chosen["id"]), key=lambda t: objective.cost(t["measured"]), reverse=True):
        value = figure_of(trial["measured"], objective.figure)
        if value and objective.cost(trial["measured"]) < objective.cost(chosen["measured"]) and _is_worse(trial, chosen, metric):
            better = f"{own / value if objective.lower else value / own:.2f}x better than the chosen" if own else "of the chosen not known"
            gain = f"{objective.figure} {say(objective.figure, value)}, {better}"
            quality = figure_of(trial["measured"], metric), figure_of(chosen["measured"], metric)
            found.append({"id": trial["id"], "gain": gain, "cost": f"{metric} {say(metric, quality[0])} instead of {say(metric, quality[1])}"})
    return found


def _is_worse(trial: Record, other: Record, metric: str) -> bool:
    """Whether a trial has less quality; where finals turned two trials around, the one that lost may have more."""
    own, its = (figure_of(one["measured"], metric) for one in (trial, other))
    return own is None or its is None or (own > its if metric in LOWER_IS_BETTER else own < its)


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


def accuracy(trials: Sequence[Record], metric: str) -> Record:
    """How good the predictions were, of each figure that is predicted: of how many trials, predicted over measured at the median and at worst, the
    median of how far that is from 1, and of how many with a range the measured lies in it. Of quality the error is the difference."""
    found: Record = {}
    for key in RATIOS:
        ratios = [trial["ratio"][key] for trial in trials if trial["ratio"] and trial["ratio"].get(key)]
        inside = [hit for trial in trials if (hit := _within(_range(trial, key), trial, key)) is not None]
        found[key] = {
            "count": len(ratios),
            "median": statistics.median(ratios) if ratios else None,
            "worst": max(ratios, key=lambda ratio: max(ratio, 1 / ratio)) if ratios else None,
            "median_error": statistics.median(abs(ratio - 1) for ratio in ratios) if ratios else None,
            "ranged": len(inside), "within": sum(inside),
        }  # fmt: skip
    pairs = [pair for trial in trials if (pair := _quality_pair(trial, metric)) is not None]
    errors = [abs(told["value"] - value) for told, value in pairs]
    found["quality"] = {
        "metric": metric, "count": len(pairs),
        "median_error": statistics.median(errors) if errors else None, "worst_error": max(errors, default=None),
        "ranged": len(pairs), "within": sum(told["low"] <= value <= told["high"] for told, value in pairs),
    }  # fmt: skip
    return found


def _range(trial: Record, key: str) -> tuple[float, float] | None:
    """Both ends of what was predicted of a figure."""
    stem, _, unit = key.rpartition("_")
    low, high = (trial["predicted"].get(f"{stem}_{end}_{unit}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _within(ends: tuple[float, float] | None, trial: Record, key: str) -> bool | None:
    value = (trial["measured"] or {}).get(key)
    return None if ends is None or value is None else bool(ends[0] <= value <= ends[1])


def _quality_pair(trial: Record, metric: str) -> tuple[Record, float] | None:
    """What was predicted of a trial's quality, and the measured value."""
    told = (trial["predicted"].get("quality") or {}).get(metric)
    value = figure_of(trial["measured"] or {}, metric)
    return None if told is None or value is None else (told, value)


def ratios(predicted: Record, measured: Record) -> Record:
    """Predicted over measured of each figure; None where one of the two is not known."""
    return {key: predicted[key] / measured[key] if predicted.get(key) and measured.get(key) else None for key in RATIOS}


def say(figure: str, value: float | None) -> str:
    """A figure for people."""
    if value is None:
        return "not known"
    if figure in ("size", "memory"):
        return format_bytes(value)
    if figure in ("latency", "time_to_first_token"):
        return format_seconds(value)
    unit = {"energy": " J", "cost": " USD per million tokens", "throughput": " tokens/s"}.get(figure)
    return f"{value:.3f}" if unit is None else f"{value:.4g}{unit}"


def point_of(trial: Record, objective: Objective, metric: str) -> tuple[float, float] | None:
    """A measured trial as (objective, quality), less of both better; None where one of the two is not known."""
    quality, cost = figure_of(trial["measured"], metric), objective.cost(trial["measured"])
    if quality is None or math.isinf(cost):
        return None
    return cost, quality if metric in LOWER_IS_BETTER else -quality
