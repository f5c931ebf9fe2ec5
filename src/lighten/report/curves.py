"""Figures against a size, on two log scales: a line for each batch, with what forbids and what changes the slope marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lighten.cost.sweep import Line, line_names
from lighten.report.svg import ADVANCE, LINE, Axis, Box, boxes_along, document, grid, label_box, line, path, rectangle, text

MOST_LINES = 6
"""Lines at most in one plot: more cannot be told apart by colour."""
NARROWEST = 1.5
"""Ratio of the ends of an axis, at least."""
MOST_DOTS = 32
"""Points at most of a line that are marked."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What one plot shows.

    Attributes:
        title: the figure, above the vertical axis.
        along: the size, under the horizontal axis.
        say: a value for people.
        limit: a value that must not be exceeded.
        mark: (size, what happens there).
    """

    title: str
    along: str
    lines: Sequence[Line]
    say: Callable[[float], str]
    limit: int | None = None
    mark: tuple[int, str] | None = None


def shown_lines(lines: Sequence[Line]) -> list[Line]:
    """At most `MOST_LINES` of the lines, the first and the last among them."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (MOST_LINES - 1))] for index in range(MOST_LINES)]


def curve_plot(curves: Curves, *, width: float, height: float) -> str:
    """The plot as one SVG."""
    lines = shown_lines(curves.lines)
    names = line_names(lines)
    right = 12 + ADVANCE * max(len(name) for name in names)
    frame = Box(x=62, y=26, width=width - 62 - right, height=height - 26 - 44)
    sizes = [size for each in lines for size, _ in each.points]
    values = [value for each in lines for _, value in each.points if value > 0]
    x = _log_axis(sizes, frame.x, frame.width, room=0.0)
    y = _log_axis([*values, *([curves.limit] if curves.limit else [])], frame.y + frame.height, -frame.height, room=0.06)
    x_ticks = {float(value): _size(value) for value in _spread(sorted(set(sizes)), x, 46.0)}
    y_ticks = {value: curves.say(value) for value in y.ticks(int(frame.height / 38))}
    drawn = [[(x.place(size), y.place(value)) for size, value in each.points if value > 0] for each in lines]
    avoid = [box for points in drawn for box in boxes_along(points)]
    body = [grid(x, y, x_ticks, y_ticks), _limit(curves, y, frame, avoid), _mark(curves, x, frame, avoid)]
    for index, points in enumerate(drawn, start=1):
        body.append(path(points, f"curve s{index}") if len(points) > 1 else "")
        body += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" class="dot f{index}"/>' for px, py in points if len(points) <= MOST_DOTS]
    body += _names(names, [points[-1][1] for points in drawn], frame)
    body.append(text(frame.x, 13, f"{curves.title} (log scale)", "axis"))
    body.append(text(frame.x + frame.width, height - 6, f"{curves.along} (log scale)", "axis", anchor="end"))
    return document(width, height, "".join(body), label=f"{curves.title} against {curves.along}", style="plot")


def _names(names: Sequence[str], ends: Sequence[float], frame: Box) -> Iterator[str]:
    """Each line's name at its end, to the right of the plot, one below the other where ends are near."""
    order = sorted(range(len(names)), key=lambda index: ends[index])
    lowest = frame.y + frame.height - LINE * (len(order) - 1)
    above = -LINE
    for rank, index in enumerate(order):
        above = max(above + LINE, min(ends[index], lowest + LINE * rank))
        yield text(frame.x + frame.width + 7, above + 4, names[index], f"label f{index + 1}")


def _limit(curves: Curves, y: Axis, frame: Box, avoid: list[Box]) -> str:
    """The limit with what lies beyond it."""
    if not curves.limit:
        return ""
    at, said = y.place(curves.limit), curves.say(curves.limit)
    beyond = Box(x=frame.x, y=frame.y, width=frame.width, height=max(0.0, at - frame.y))
    avoid.append(label_box(said, frame.x + 5, at - 15))
    line_at = line(frame.x, at, frame.x + frame.width, at, "limit")
    return rectangle(beyond, "fails") + line_at + text(frame.x + 5, at - 4, said, "limit-label")


def _mark(curves: Curves, x: Axis, frame: Box, avoid: list[Box]) -> str:
    """The size at which something happens, where it lies in the plot; said where it covers least."""
    if curves.mark is None or not x.start <= curves.mark[0] <= x.end:
        return ""
    at, words = x.place(curves.mark[0]), f"{curves.mark[1]} {curves.mark[0]:,}"
    width = len(words) * ADVANCE
    spots = []
    for step in range(12):
        top = frame.y + frame.height - LINE - 3 - step * (frame.height - LINE - 6) / 11
        spots += [
            label_box(words, left, top)
            for left in (at - 5 - width, at + 5, at - width / 2)
            if left >= frame.x and left + width <= frame.x + frame.width
        ]
    if not spots:
        return line(at, frame.y, at, frame.y + frame.height, "crossover")
    best = min(spots, key=lambda spot: sum(spot.overlaps(box) for box in avoid))
    avoid.append(best)
    return line(at, frame.y, at, frame.y + frame.height, "crossover") + text(best.x, best.y + LINE * 0.78, words, "label crossover-label")


def _log_axis(values: Sequence[float], origin: float, length: float, *, room: float) -> Axis:
    low, high = min(values), max(values)
    if high < low * NARROWEST:  # else a change of nothing fills the plot, and all its ticks say the same
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(NARROWEST), middle * math.sqrt(NARROWEST)
    spread = (high / low) ** room
    return Axis(start=low / spread, end=high * spread, origin=origin, length=length, log=True)


def _spread(sizes: Sequence[int], axis: Axis, apart: float) -> list[int]:
    """Of the sizes in order, the first, and each that is far enough from the last one taken."""
    found: list[int] = []
    for size in sizes:
        if not found or axis.place(size) - axis.place(found[-1]) >= apart:
            found.append(size)
    return found


def _size(value: int) -> str:
    """
    >>> _size(512), _size(131072), _size(1000)
    ('512', '128 Ki', '1000')
    """
    return f"{value >> 10} Ki" if value >= 4096 and value % 1024 == 0 else str(value)
