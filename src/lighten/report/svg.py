"""Small pieces of SVG as text: axes, markers, and labels that never overlap.

A plot is in its own units: x to the right, y down, one unit is one CSS pixel at its natural width. Colours are classes, so that the page's
style sheet gives both the light and the dark ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

FONT = 11.0
ADVANCE = 0.61 * FONT
"""Width of one letter of a label. Labels are monospaced so that it is known without a browser: 0.602 em in DejaVu Sans Mono and Menlo,
0.600 in Courier New and Liberation Mono, 0.550 in Consolas (the fonts' own advance widths)."""
LINE = 1.25 * FONT


@dataclass(frozen=True, kw_only=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        return self.x < other.x + other.width and other.x < self.x + self.width and self.y < other.y + other.height and other.y < self.y + self.height

    def holds(self, other: Box) -> bool:
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From values to units. `start` is the value at pixel `origin`, `end` the one at `origin + length` (a negative length runs up)."""

    start: float
    end: float
    origin: float
    length: float
    log: bool = False

    def place(self, value: float) -> float:
        start, end, value = (math.log(v) if self.log else v for v in (self.start, self.end, value))
        return self.origin + self.length * (value - start) / (end - start)

    def ticks(self, at_most: int) -> list[float]:
        low, high = sorted((self.start, self.end))
        return log_ticks(low, high, at_most) if self.log else linear_ticks(low, high, at_most)


def linear_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the bounds.

    >>> linear_ticks(0.88, 1.004, 7)
    [0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0]
    """
    step = 10.0 ** math.floor(math.log10((high - low) / at_most))
    while math.floor(high / step) - math.ceil(low / step - 1e-9) + 1 > at_most:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Round values within the bounds, no two nearer on a log scale than its `at_most`th part.

    >>> log_ticks(0.03, 0.6, 5)
    [0.05, 0.1, 0.2, 0.5]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [value for decade in decades for step in steps if low <= (value := float(f"{step}e{decade}")) <= high]
        if all(math.log(after / before) >= math.log(high / low) / at_most for before, after in pairwise(ticks)):
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / at_most)]
    return ticks if len(ticks) > 1 else linear_ticks(low, high, at_most)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A label to place: where its point is, and its text from the one that says most to the one that takes least room."""

    x: float
    y: float
    texts: Sequence[str]
    style: str = ""


@dataclass(frozen=True, kw_only=True)
class Placed:
    text: str
    box: Box
    wanted: Wanted
    rank: int = 0

    @property
    def leader(self) -> list[tuple[float, float]]:
        """The ends of the line from the point to the text; empty where they are so near that none is needed."""
        x, y = self.wanted.x, self.wanted.y
        near = (min(max(x, self.box.x), self.box.x + self.box.width), min(max(y, self.box.y), self.box.y + self.box.height))
        return [(x, y), near] if math.dist(near, (x, y)) > 14 else []


def label_box(words: str, x: float, y: float) -> Box:
    """The box of a label whose top left corner is at x, y."""
    return Box(x=x, y=y, width=len(words) * ADVANCE, height=LINE)


def place_labels(wanted: Sequence[Wanted], frame: Box, taken: Sequence[Box], avoid: Sequence[Box] = ()) -> list[Placed]:
    """A place near its point for each label, inside the frame, over no other label and nothing `taken`; over `avoid` only if need be.

    The first come first; a text without room beside its point gives way to its next shorter one, and a label without any is left out.
    """
    full, lines = list(taken), list(avoid)
    placed: list[Placed] = []
    for want in wanted:
        others = [label.box for label in placed]
        spots = [spot for words in want.texts for spot in _spots(words, want) if frame.holds(spot.box) and not _hits([spot.box], full)]
        spots = [spot for spot in spots if not _hits(boxes_along(spot.leader), others)]
        if spots:
            # a shorter text beside its point says more than a longer one at the end of a line; and one ring of 8 places
            # further out is better than across a line
            best = min(spots, key=lambda spot: (bool(spot.leader), want.texts.index(spot.text), spot.rank + 9 * _hits([spot.box], lines)))
            placed.append(best)
            full.append(best.box)
            lines += boxes_along(best.leader)
    return placed


def _hits(boxes: Sequence[Box], others: Sequence[Box]) -> int:
    return sum(box.overlaps(other) for box in boxes for other in others)


def _spots(words: str, want: Wanted) -> list[Placed]:
    box = label_box(words, 0, 0)
    width, height = box.width, box.height
    spots: list[Placed] = []
    for gap in (9, 18, 30, 45, 62):
        across, up = want.x - width / 2, want.y - height / 2
        right, left, above, below = want.x + gap, want.x - gap - width, want.y - gap - height + 2, want.y + gap - 2
        corners = [(right, up), (left, up), (across, above), (across, below), (right, above), (right, below), (left, above), (left, below)]
        spots += [Placed(text=words, box=label_box(words, x, y), wanted=want, rank=len(spots) + turn) for turn, (x, y) in enumerate(corners)]
    return spots


def draw_label(label: Placed) -> str:
    """The text, and a thin line to its point where the two are apart."""
    leader = path(label.leader, "leader") if label.leader else ""
    return leader + text(label.box.x, label.box.y + LINE * 0.78, label.text, f"label {label.wanted.style}".strip())


def text(x: float, y: float, content: str, style: str, *, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{place}{turn}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def path(points: Sequence[tuple[float, float]], style: str) -> str:
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" class="{style}"/>'


def rectangle(box: Box, style: str) -> str:
    return f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" class="{style}"/>'


def boxes_along(points: Sequence[tuple[float, float]], *, every: float = 8.0) -> list[Box]:
    """Small boxes that cover a line through `points`, for labels to avoid it."""
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(points):
        steps = max(1, math.ceil(math.hypot(x2 - x1, y2 - y1) / every))
        parts = [step / steps for step in range(steps + 1)]
        boxes += [Box(x=x1 + (x2 - x1) * part - 1, y=y1 + (y2 - y1) * part - 1, width=2, height=2) for part in parts]
    return boxes


def marker(x: float, y: float, kind: str, note: str = "", *, faint: bool = False) -> str:
    """A point: its kind decides shape and colour, so that neither is needed alone; `note` shows when the pointer rests on it."""
    style = f"mark {kind} faint" if faint else f"mark {kind}"
    hint = f"<title>{escape(note)}</title>" if note else ""
    if kind in _SHAPES:
        corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _SHAPES[kind])
        return f'<polygon points="{corners}" class="{style}">{hint}</polygon>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4.5 if kind == "front" else 3.8}" class="{style}">{hint}</circle>'


def _star(outer: float) -> list[tuple[float, float]]:
    corners = [(outer if index % 2 == 0 else outer * 0.45, math.pi * (index / 5 - 0.5)) for index in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


_SHAPES = {
    "chosen": _star(9.0),
    "baseline": [(0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0)],
    "closest": [(0.0, -6.0), (6.0, 5.0), (-6.0, 5.0)],
}


def grid(x: Axis, y: Axis, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str]) -> str:
    """The grid's lines with what is said at them, below and to the left."""
    left, bottom = x.origin, y.origin
    parts = []
    for value, said in x_ticks.items():
        at = x.place(value)
        parts += [line(at, bottom, at, bottom + y.length, "grid"), text(at, bottom + 15, said, "tick", anchor="middle")]
    for value, said in y_ticks.items():
        at = y.place(value)
        parts += [line(left, at, left + x.length, at, "grid"), text(left - 6, at + 4, said, "tick", anchor="end")]
    return "".join(parts)


def document(width: float, height: float, body: str, *, label: str, style: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" class="{style}" role="img" aria-label="{escape(label)}">{body}</svg>'
