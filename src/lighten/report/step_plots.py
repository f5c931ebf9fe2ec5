"""The pictures of a compression: bytes after each step, what took the time, and the loss curves of the steps that trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from lighten.report.figures import Record, clean, number, shortened
from lighten.report.svg import ADVANCE, LINE, Axis, Box, document, grid, line, marker, path, rectangle, text
from lighten.units import format_bytes, format_count, format_seconds

ROW, BAR = 36.0, 14.0
"""Height of a bar with its words above it, and of the bar alone, in units of the plot."""
COLOURS = 8
"""Colours of the style sheet, `f1` on."""
OTHER = "other files"
"""What is in the size and in no component: the tokenizer, the config, and what a file says of itself."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row.

    Attributes:
        parts: (name, value) of the pieces, from the left.
        mark: where a line across the bar stands; None: nowhere.
        notes: name of a piece → what the pointer shows on it, where that is more than its name.
    """

    name: str
    parts: Sequence[tuple[str, float]]
    said: str
    mark: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(value for _, value in self.parts)


def colours_of(bars: Sequence[Bar]) -> dict[str, int]:
    """A colour of the style sheet for each name of a piece, in the order in which they come."""
    names = dict.fromkeys(name for bar in bars for name, _ in bar.parts)
    return {name: 1 + place % COLOURS for place, name in enumerate(names)}


def bar_plot(bars: Sequence[Bar], *, width: float, label: str) -> str:
    """A row for each bar: its words, and below them the pieces with what they add up to at their end."""
    room = 10 + ADVANCE * max(len(bar.said) for bar in bars)
    longest = max(max(bar.total, bar.mark or 0.0) for bar in bars) or 1.0
    x = Axis(start=0.0, end=longest, origin=2.0, length=width - 4 - room)
    colours, body = colours_of(bars), []
    for row, bar in enumerate(bars):
        top, start = row * ROW, 0.0
        body.append(text(2, top + LINE, shortened(bar.name, int((width - 4) / ADVANCE)), "label"))
        for name, value in bar.parts:
            left, right = x.place(start), x.place(start + value)
            place = f'x="{left:.1f}" y="{top + LINE + 4:.1f}" width="{right - left:.1f}" height="{BAR:.0f}"'
            body.append(f'<rect {place} class="f{colours[name]} part"><title>{escape(bar.notes.get(name, name))}</title></rect>')
            start += value
        if bar.mark is not None:
            body.append(line(x.place(bar.mark), top + LINE + 1, x.place(bar.mark), top + LINE + BAR + 7, "foreseen"))
        end = x.place(max(bar.total, bar.mark or 0.0))
        body.append(text(end + 6, top + LINE + BAR, bar.said, "label"))
    return document(width, ROW * len(bars) + 6, "".join(body), label=label, style="plot")


def size_bars(before: Record, steps: Sequence[Record], *, measured: float | None) -> list[Bar]:
    """The original and the model after each step, by component; the last as it was measured. Nothing where a size is not known."""
    rows = [("original", before, number(before, "size_bytes"))]
    rows += [(clean(step.get("step")), step, number(step, "size_bytes")) for step in steps]
    rows[-1] = (*rows[-1][:2], measured if measured is not None and len(rows) > 1 else rows[-1][2])
    if any(size is None or size < 0 for _, _, size in rows):
        return []
    return [
        Bar(name=name, parts=_pieces(record.get("components"), size), said=format_bytes(size)) for name, record, size in rows if size is not None
    ]  # fmt: skip


def _pieces(components: object, size: float) -> list[tuple[str, float]]:
    """Bytes by component that add up to a size: what no component has is of other files; where they have more, all are scaled."""
    known = components if isinstance(components, Mapping) else {}
    found = {clean(name): value for name in known if (value := number(dict(known), name)) is not None and value > 0}
    total = sum(found.values())
    if total > size:
        return [(name, value * size / total) for name, value in found.items()]
    return [*found.items(), (OTHER, size - total)]


def time_bars(steps: Sequence[Record], run: Record) -> list[Bar]:
    """Seconds of each step and of writing, with a line where the prediction was; nothing where none is known."""
    rows = [(clean(step.get("step")), number(step, "seconds"), number(step, "predicted", "seconds")) for step in steps]
    rows.append(("writing and reading back", number(run, "writing_seconds"), None))
    return [
        Bar(name=name, parts=[("seconds", seconds)], said=_say_time(seconds, foreseen), mark=foreseen)
        for name, seconds, foreseen in rows if seconds is not None and seconds >= 0
    ]  # fmt: skip


def _say_time(seconds: float, foreseen: float | None) -> str:
    return format_seconds(seconds) + ("" if foreseen is None else f", predicted {format_seconds(foreseen)}")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How a training went: points of (step, positions so far, loss), and distances on what was held out."""

    points: Sequence[tuple[float, float, float]]
    warm_up: float | None
    before: float | None
    after: float | None


def read_loss(curve: Record) -> Loss:
    """What a curve of lighten.json says; what is no number is left out."""
    points = []
    for point in curve.get("curve") or [] if isinstance(curve.get("curve"), list) else []:
        found = [number({"value": value}, "value") for value in point] if isinstance(point, list) else []
        if len(found) == 3 and None not in found:
            points.append((found[0] or 0.0, found[1] or 0.0, found[2] or 0.0))
    held = curve.get("held_out")
    ends = [number({"value": value}, "value") for value in held] if isinstance(held, list) else []
    before, after = ends if len(ends) == 2 else (None, None)
    return Loss(points=points, warm_up=number(curve, "warm_up"), before=before, after=after)


def loss_plot(loss: Loss, *, width: float, height: float) -> str | None:
    """The loss against positions, the warm-up shaded, with the held-out distance before and after; None of fewer than two points."""
    if len(loss.points) < 2:
        return None
    frame = Box(x=54, y=24, width=width - 54 - 16, height=height - 24 - 44)
    last = loss.points[-1][1]
    ends = [value for value in (loss.before, loss.after) if value is not None]
    highest = max([value for _, _, value in loss.points] + ends)
    lowest = min(0.0, *(value for _, _, value in loss.points), *ends)
    x = Axis(start=0.0, end=max(last, 1.0), origin=frame.x, length=frame.width)
    y = Axis(start=lowest, end=lowest + 1.06 * max(highest - lowest, 1e-9), origin=frame.y + frame.height, length=-frame.height)
    x_ticks = {value: format_count(value) for value in x.ticks(max(2, int(frame.width / 80)))}
    y_ticks = {value: f"{value:.3g}" for value in y.ticks(max(2, int(frame.height / 38)))}
    body = [_warm_up(loss, x, frame), grid(x, y, x_ticks, y_ticks), path([(x.place(a), y.place(b)) for _, a, b in loss.points], "curve s1")]
    for value, at, kind, word in ((loss.before, 0.0, "baseline", "before"), (loss.after, x.end, "chosen", "after")):
        if value is not None:
            body.append(marker(x.place(at), y.place(value), kind, f"held-out distance {word}: {value:.4g}"))
    body += [
        text(frame.x, 13, "loss", "axis"), text(frame.x + frame.width, height - 6, "positions trained on", "axis", anchor="end"),
    ]  # fmt: skip
    return document(width, height, "".join(body), label=f"loss against positions trained on, {len(loss.points)} points", style="plot")


def _warm_up(loss: Loss, x: Axis, frame: Box) -> str:
    """Where the learning rate rises, as far as a point says where that ends."""
    end = next((at for step, at, _ in loss.points if loss.warm_up is not None and step >= loss.warm_up), None)
    if end is None:
        return ""
    right = x.place(min(end, x.end))
    inside = right - frame.x > ADVANCE * 8 + 6
    place = (frame.x + 4, "start") if inside else (right + 4, "start")
    return rectangle(Box(x=frame.x, y=frame.y, width=right - frame.x, height=frame.height), "warm-up") + text(
        place[0], frame.y + frame.height - 5, "warm-up", "label", anchor=place[1]
    )
