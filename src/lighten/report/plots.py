"""The report's two plots: the objective against quality, and predicted against measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

from lighten.report.figures import (
    METRICS,
    OBJECTIVES,
    QUANTITIES,
    Limit,
    Quantity,
    Record,
    format_quality,
    format_ratio,
    is_baseline,
    is_measured,
    limits_on,
    number,
    objective,
    ordered_trials,
    quality_of,
    short_name,
    shortened,
    trial_name,
)
from lighten.report.svg import (
    LINE,
    Axis,
    Box,
    Wanted,
    boxes_along,
    document,
    draw_label,
    grid,
    label_box,
    line,
    marker,
    path,
    place_labels,
    rectangle,
    text,
)

OFF_SCALE = 6.0
"""A loss of quality beyond this many times the one that the reader cares about (required, or chosen) is drawn at the plot's lower edge with
its value beside it: on one linear scale with a model that broke, 0.97 and 0.99 would fall together. Chosen by looking at such plots."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A trial where it is drawn: `x`, `y` in the plot's units; `note` is what the pointer shows."""

    x: float
    y: float
    number: int
    kind: str
    name: str
    note: str
    aside: str = ""
    front: bool = False
    misses: bool = False
    whisker: tuple[float, float] | None = None


_WORDS = {"chosen": "chosen", "closest": "closest", "baseline": "original"}
_KINDS = ("chosen", "closest", "baseline", "front", "other")  # who is named and drawn on top, first to last


def trial_numbers(choice: Record) -> list[tuple[int, Record]]:
    """Every trial with the number that plots and table give it; the baseline has 0."""
    return list(enumerate(ordered_trials(choice), start=0 if choice.get("baseline") else 1))


def kind_of(choice: Record, trial: Record) -> str:
    if choice.get("chosen") is not None and trial.get("id") == choice["chosen"]:
        return "chosen"
    if choice.get("chosen") is None and choice.get("closest") and trial.get("id") == choice["closest"].get("id"):
        return "closest"
    if is_baseline(choice, trial):
        return "baseline"
    return "front" if trial.get("pareto") else "other"


def tradeoff_plot(choice: Record, *, width: float, height: float) -> str | None:
    """The objective (to the left is better, log scale) against quality (up is better); None without two figures to compare.

    Only measured trials with both figures are drawn.
    """
    quantity, metric = objective(choice), choice["quality_metric"]
    drawn = [
        (index, trial, cost, quality)
        for index, trial in trial_numbers(choice)
        if is_measured(trial) and (cost := number(trial, "measured", quantity.key)) and (quality := quality_of(choice, trial, metric)[0]) is not None
    ]
    if len(drawn) < 2:
        return None
    frame = Box(x=54, y=22, width=width - 76, height=height - 64)
    inner = Box(x=frame.x + 4, y=frame.y + 4, width=frame.width - 8, height=frame.height - 8)
    x = _log_axis([cost for _, _, cost, _ in drawn], frame.x, frame.width, falling=quantity.higher)
    y = _quality_axis(choice, [(kind_of(choice, trial), quality) for _, trial, _, quality in drawn], frame)
    bottom = frame.y + frame.height
    points = []
    for index, trial, cost, quality in drawn:
        error = quality_of(choice, trial, metric)[1]
        at = y.place(quality)
        beyond = at > bottom
        ends = [min(max(y.place(quality + sign * error), frame.y), bottom) for sign in (-1, 1)] if error and not beyond else None
        points.append(
            _Point(
                x=x.place(cost),
                y=bottom - 6 if beyond else at,
                number=index,
                kind=kind_of(choice, trial),
                name=short_name(choice, trial),
                note=_all_figures(choice, index, trial, quantity),
                aside=f"↓{format_quality(quality)}" if beyond else "",
                front=bool(trial.get("pareto")),
                misses=trial.get("meets") is False,
                whisker=(ends[0], ends[1]) if ends else None,
            )
        )
    front = _front_corners(points, frame)
    marks = [_mark_box(point) for point in points]
    limits, boxes = _limit_lines(choice, x, y, frame, [*marks, *boxes_along(front)])
    x_ticks = {value: quantity.show(value) for value in x.ticks(int(frame.width / 62))}
    y_ticks = {value: f"{value:g}" for value in y.ticks(6) if not _impossible(metric, value)}
    body = [
        grid(x, y, x_ticks, y_ticks),
        limits,
        path(front, "front-line") if front else "",
        *(line(point.x, point.whisker[0], point.x, point.whisker[1], "whisker") for point in points if point.whisker),
        _points_and_labels(points, inner, boxes, boxes_along(front), named=width > 500),
        text(frame.x, 13, f"↑ {metric} (better up)", "axis"),
        text(frame.x + frame.width, height - 6, f"← {quantity.title} (better left, log scale)", "axis", anchor="end"),
    ]
    return document(width, height, "".join(body), label=f"{quantity.title} against {metric} of {len(drawn)} measured trials", style="plot")


def _all_figures(choice: Record, index: int, trial: Record, first: Quantity) -> str:
    """What the pointer shows on a trial: its recipe, then every figure as measured and as predicted."""
    metric = choice["quality_metric"]
    lines = [f"{index}: {trial_name(choice, trial)}"]
    lines += ["fails a requirement"] if trial.get("meets") is False else []
    foreseen = number(trial, "predicted", "quality", metric, "value")
    said = "" if foreseen is None else f", predicted {format_quality(foreseen)}"
    lines.append(f"{metric}: measured {format_quality(*quality_of(choice, trial, metric))}{said}")
    for quantity in dict.fromkeys((first.key, *(each.key for each in QUANTITIES.values()))):
        shown = next(each for each in OBJECTIVES.values() if each.key == quantity)
        measured, predicted = (shown.show(number(trial, told, quantity)) for told in ("measured", "predicted"))
        lines.append(f"{shown.title}: measured {measured}, predicted {predicted}")
    return "\n".join(lines)


def prediction_plot(choice: Record, quantity: Quantity, *, size: float) -> str | None:
    """Predicted against measured on two equal log scales with the diagonal of a perfect prediction; None where no trial has both.

    Upright lines are predicted ranges, where the prediction has one.
    """
    drawn = [
        _Pair(index, trial, measured, predicted, _range_of(trial, quantity))
        for index, trial in trial_numbers(choice)
        if is_measured(trial) and (measured := number(trial, "measured", quantity.key)) and (predicted := number(trial, "predicted", quantity.key))
    ]
    if not drawn:
        return None
    axis = _log_axis([value for pair in drawn for value in pair.values], 58, size - 80)
    label = f"predicted against measured {quantity.title} of {len(drawn)} trials"
    return _scatter(choice, drawn, axis, quantity.show, label=label, size=size)


def quality_plot(choice: Record, *, size: float) -> str | None:
    """The same of quality, on linear scales; None where nobody looked at the weights of a trial before it."""
    metric, drawn = choice["quality_metric"], []
    for index, trial in trial_numbers(choice):
        measured = quality_of(choice, trial, metric)[0]
        told = [number(trial, "predicted", "quality", metric, key) for key in ("value", "low", "high")]
        if is_measured(trial) and measured is not None and told[0] is not None:
            drawn.append(_Pair(index, trial, measured, told[0], [end for end in told[1:] if end is not None]))
    if not drawn:
        return None
    values = [value for pair in drawn for value in pair.values]
    pad = 0.06 * (max(values) - min(values)) or 0.01
    axis = Axis(start=min(values) - pad, end=max(values) + pad, origin=58, length=size - 80)
    return _scatter(choice, drawn, axis, format_quality, label=f"predicted against measured {metric} of {len(drawn)} trials", size=size)


@dataclass(frozen=True)
class _Pair:
    """A trial's measured and predicted value, and the ends of the predicted range; none: no range."""

    number: int
    trial: Record
    measured: float
    predicted: float
    ends: Sequence[float]

    @property
    def values(self) -> list[float]:
        return [self.measured, self.predicted, *self.ends]


def _scatter(choice: Record, pairs: Sequence[_Pair], x: Axis, show: Callable[[float], str], *, label: str, size: float) -> str:
    """Both values on equal scales, with the diagonal of a perfect prediction and the ranges as upright lines."""
    frame = Box(x=58, y=20, width=size - 80, height=size - 68)
    y = Axis(start=x.start, end=x.end, origin=frame.y + frame.height, length=-frame.height, log=x.log)
    points = []
    for pair in pairs:
        said = f"predicted {show(pair.predicted)}, measured {show(pair.measured)}"
        said += f", ratio {format_ratio(pair.predicted / pair.measured)}" if x.log else ""
        points.append(
            _Point(
                x=x.place(pair.measured),
                y=y.place(pair.predicted),
                number=pair.number,
                kind=kind_of(choice, pair.trial),
                name="",
                note=f"{pair.number}: {trial_name(choice, pair.trial)}: {said}",
                whisker=(y.place(pair.ends[0]), y.place(pair.ends[1])) if len(pair.ends) == 2 else None,
            )
        )
    ticks = {value: show(value) if x.log else f"{value:g}" for value in x.ticks(4)}
    diagonal = [(frame.x, y.origin), (frame.x + frame.width, frame.y)]
    body = [
        grid(x, y, ticks, ticks),
        path(diagonal, "diagonal"),
        *(line(point.x, point.whisker[0], point.x, point.whisker[1], "whisker") for point in points if point.whisker),
        _points_and_labels(points, frame, [], boxes_along(diagonal), named=False),
        text(frame.x, 12, "↑ predicted", "axis"),
        text(frame.x + frame.width, size - 12, "measured →", "axis", anchor="end"),
    ]
    return document(size, size, "".join(body), label=label, style="plot square")


def _range_of(trial: Record, quantity: Quantity) -> list[float]:
    stem, _, unit = quantity.key.rpartition("_")
    ends = [number(trial, "predicted", f"{stem}_{end}_{unit}") for end in ("low", "high")]
    return [end for end in ends if end] if None not in ends and all(ends) else []


def _log_axis(values: Sequence[float], origin: float, length: float, *, falling: bool = False) -> Axis:
    """Padded by 8 % of its span at both ends, and by a tenth of the value where all are about the same; falling: the largest first."""
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.08, 1.1)
    start, end = (high * pad, low / pad) if falling else (low / pad, high * pad)
    return Axis(start=start, end=end, origin=origin, length=length, log=True)


def _impossible(metric: str, value: float) -> bool:
    """A tick beyond what the metric can reach, such as an agreement of 1.02."""
    known = METRICS.get(metric)
    if known is None or not known.ends_there or known.original is None:
        return False
    return value > known.original if known.higher else value < known.original


def _quality_axis(choice: Record, qualities: Sequence[tuple[str, float]], frame: Box) -> Axis:
    """Better is up. Bounds hold what matters (see OFF_SCALE); worse values lie below the lower edge."""
    metric = choice["quality_metric"]
    limits = [limit for _, limit in limits_on(choice, metric)]
    higher = METRICS[metric].higher if metric in METRICS else not limits or limits[0].at_least
    sign = 1 if higher else -1
    best = max(sign * value for _, value in qualities)
    losses = [best - sign * value for _, value in qualities]
    cared = [limit.value for limit in limits] + [value for kind, value in qualities if kind in ("chosen", "closest")]
    cared = [best - sign * value for value in cared]
    anchor = max([loss for loss in cared if loss > 0], default=0.0) or median(losses) or max(losses)
    worst = max([loss for loss in [*losses, *cared] if loss <= OFF_SCALE * anchor], default=0.0) or 0.01
    origin, length = frame.y + frame.height, -frame.height
    return Axis(start=sign * (best - worst * 1.15), end=sign * (best + worst * 0.12), origin=origin, length=length)


def _limit_lines(choice: Record, x: Axis, y: Axis, frame: Box, avoid: Sequence[Box]) -> tuple[str, list[Box]]:
    """The requirements on the two drawn figures, the side that fails shaded; and the boxes of their labels."""
    parts: list[str] = []
    boxes: list[Box] = []
    for axis, figure in ((y, choice["quality_metric"]), (x, objective(choice).key)):
        for words, limit in limits_on(choice, figure):
            if not min(axis.start, axis.end) < limit.value < max(axis.start, axis.end):
                continue
            at = axis.place(limit.value)
            side, ends = _failing_side(limit, axis, at, frame)
            parts += [rectangle(side, "fails"), path(ends, "limit")]
            spots = [
                (said, box)
                for said in (f"required {words}", f"required {limit.bound}")
                for box in _beside_limit(said, ends, frame)
                if frame.holds(box)
            ]
            if spots:
                said, box = min(spots, key=lambda spot: sum(spot[1].overlaps(other) for other in [*avoid, *boxes]))
                boxes.append(box)
                parts.append(text(box.x, box.y + LINE * 0.78, said, "label limit-label"))
    return "".join(parts), boxes


def _failing_side(limit: Limit, axis: Axis, at: float, frame: Box) -> tuple[Box, list[tuple[float, float]]]:
    """The part of the frame that fails a requirement, and the ends of the line that bounds it."""
    towards_start = limit.at_least == (axis.end > axis.start)
    far = axis.origin if towards_start else axis.origin + axis.length
    low, high = sorted((at, far))
    if axis.length > 0:
        return Box(x=low, y=frame.y, width=high - low, height=frame.height), [(at, frame.y), (at, frame.y + frame.height)]
    return Box(x=frame.x, y=low, width=frame.width, height=high - low), [(frame.x, at), (frame.x + frame.width, at)]


def _beside_limit(said: str, ends: Sequence[tuple[float, float]], frame: Box) -> list[Box]:
    """Where the label of a requirement may stand, the best place first: along its line, on either side."""
    (x, y), (_, end_y) = ends
    width = label_box(said, 0, 0).width
    if y != end_y:
        return [label_box(said, start, frame.y + frame.height - 18 - 16 * row) for row in range(6) for start in (x + 5, x - 5 - width)]
    room = frame.width - width - 8
    return [label_box(said, x + 4 + room * part, row) for part in (1, 0, 0.5, 0.75, 0.25) for row in (y + 3, y - 3 - LINE)]


def _front_corners(points: Sequence[_Point], frame: Box) -> list[tuple[float, float]]:
    """The Pareto front as stairs: the best quality that each cost buys."""
    front = sorted((point for point in points if point.front), key=lambda point: (point.x, -point.y))
    if not front:
        return []
    corners = [(front[0].x, frame.y + frame.height)]
    for point in front:
        corners += [(point.x, corners[-1][1]), (point.x, point.y)]
    corners.append((frame.x + frame.width, front[-1].y))
    return corners


def _mark_box(point: _Point) -> Box:
    return Box(x=point.x - 5, y=point.y - 5, width=10, height=10)


def _points_and_labels(points: Sequence[_Point], frame: Box, taken: Sequence[Box], avoid: Sequence[Box], *, named: bool) -> str:
    """Markers, the most important on top, and their labels; trials at one place share a label."""
    first = sorted(points, key=lambda point: _KINDS.index(point.kind))
    groups: list[list[_Point]] = []
    for point in first:
        near = next((group for group in groups if math.hypot(group[0].x - point.x, group[0].y - point.y) < 7), None)
        if near is None:
            groups.append([point])
        else:
            near.append(point)
    wanted = []
    for group in groups:
        lead = group[0]
        numbers = ",".join(str(point.number) for point in sorted(group, key=lambda point: point.number))
        numbers = shortened(numbers, 14)
        texts = [numbers + lead.aside, numbers + lead.aside[:1]] if lead.aside else [numbers]
        if lead.kind in _WORDS:
            texts.insert(0, f"{texts[0]} {_WORDS[lead.kind]}")
        if named and (lead.kind in _WORDS or (lead.front and not lead.aside)):
            texts[:0] = [f"{numbers}{lead.aside} {name}" for name in (lead.name, shortened(lead.name, 22))]
        wanted.append(Wanted(x=lead.x, y=lead.y, texts=texts, style=lead.kind))
    whiskers = [boxes_along([(point.x, end) for end in point.whisker]) for point in points if point.whisker]
    labels = place_labels(wanted, frame, [*taken, *map(_mark_box, points)], [*avoid, *chain(*whiskers)])
    drawn = [
        f'<a href="#trial-{point.number}" class="point">{marker(point.x, point.y, point.kind, point.note, faint=point.misses)}</a>'
        for point in reversed(first)
    ]
    return "".join([*drawn, *map(draw_label, labels)])
