"""The memory of a run over time: what lives after each event, by what holds it, and the tensors that make the fullest moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lighten.report.svg import ADVANCE, LINE, Axis, Box, document, grid, line, rectangle, text
from lighten.report.treemap import module_kind, short_kind
from lighten.trace.program import Storage, Timeline
from lighten.units import format_bytes

LIST_LINE = 22.0
STACK = ("weights", "optimizer", "gradients", "kv_cache", "activations", "temporary")
"""What is drawn, from the bottom up: what lives longest first."""


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Tensors of one kind that live at the fullest moment: those of all layers that the same operator made in the same shape."""

    kind: str
    module: str
    operator: str
    shape: tuple[int, ...]
    count: int
    bytes: int

    @property
    def maker(self) -> str:
        """The module that made them, or the operator where no module did."""
        return self.module or self.operator

    @property
    def words(self) -> str:
        """What they hold, what made them, their shape and number."""
        made = f"{self.operator} " if self.module else ""
        many = f" × {self.count:,}" if self.count > 1 else ""
        return f"{self.kind.replace('_', ' ')}: {made}{'×'.join(map(str, self.shape))}{many}"


def peak_tensors(timeline: Timeline) -> list[Tensors]:
    """What lives at the fullest moment, the most bytes first."""
    groups: dict[tuple[str, str, str, tuple[int, ...]], list[Storage]] = {}
    for storage in timeline.living(timeline.fullest()):
        groups.setdefault((storage.kind, module_kind(storage.module), storage.operator, tuple(storage.shape)), []).append(storage)
    found = [
        Tensors(kind=kind, module=module, operator=operator, shape=shape, count=len(each), bytes=sum(storage.bytes for storage in each))
        for (kind, module, operator, shape), each in groups.items()
    ]
    return sorted(found, key=lambda tensors: -tensors.bytes)


def timeline_plot(timeline: Timeline, *, width: float, height: float) -> str:
    """The plot as one SVG: areas by kind over the events, the peak marked."""
    frame = Box(x=66, y=40, width=width - 66 - 12, height=height - 40 - 34)
    first = timeline.phases[0][0] if timeline.phases else 0  # what lives before the run is there when it begins
    columns = list(_fullest_of_each(timeline, first, max(1, int(frame.width / 1.5))))
    highest = max(sum(sizes) for _, sizes in columns)
    x = Axis(start=first, end=max(first + 1, len(timeline.events) - 1), origin=frame.x, length=frame.width)
    y = Axis(start=0, end=highest * 1.06 or 1, origin=frame.y + frame.height, length=-frame.height)
    body = [grid(x, y, {value: f"{value:,.0f}" for value in x.ticks(7)}, {value: format_bytes(value) if value else "0" for value in y.ticks(6)})]
    body += _areas(columns, x, y)
    body += _phases(timeline, x, frame)
    at = timeline.fullest()
    px, py = x.place(at), y.place(highest)
    said = f"peak {format_bytes(highest)}"
    left = px + len(said) * ADVANCE + 8 > frame.x + frame.width
    body.append(line(px, py, px, frame.y + frame.height, "peak-mark"))
    body.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2" class="peak-dot"/>')
    body.append(text(px + (-7 if left else 7), py - 4, said, "peak-label", anchor="end" if left else "start"))
    body.append(text(frame.x, 13, "bytes that live", "axis"))
    body.append(text(frame.x + frame.width, height - 4, "births and deaths of tensors, in order", "axis", anchor="end"))
    return document(width, height, "".join(body), label="memory over time", style="plot")


def tensor_list(timeline: Timeline, *, width: float, height: float) -> str:
    """The tensors that make the peak as one SVG: as many lines as there is room for, and what the others are together."""
    living = peak_tensors(timeline)
    total = sum(tensors.bytes for tensors in living)
    room = int((height - 10) / LIST_LINE)
    shown = living if len(living) <= room else living[: room - 1]
    rows = [(STACK.index(each.kind) + 1, f"{short_kind(each.maker)}  {each.words}", each.bytes) for each in shown]
    if others := living[len(shown) :]:
        rows.append((8, f"{sum(each.count for each in others):,} others", sum(each.bytes for each in others)))
    letters = int((width - 150) / ADVANCE)
    body = []
    for number, (colour, words, size) in enumerate(rows):
        top = 6 + LIST_LINE * number
        body.append(rectangle(Box(x=2, y=top, width=10, height=10), f"cell f{colour}"))
        body.append(text(18, top + 9, words if len(words) <= letters else f"{words[: letters - 1]}…", "label"))
        body.append(text(width - 66, top + 9, format_bytes(size), "label", anchor="end"))
        body.append(text(width - 12, top + 9, f"{size / total:.1%}", "label", anchor="end"))
    return document(width, height, "".join(body), label="tensors that make the peak", style="plot")


def _fullest_of_each(timeline: Timeline, first: int, buckets: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(event, bytes by kind) of the fullest moment of each of as many equal stretches of the events from the first on."""
    live = dict.fromkeys(STACK, 0)
    count, now, bucket = max(1, len(timeline.events) - first), 0, 0
    best: tuple[int, int, tuple[int, ...]] | None = None
    for number, event in enumerate(timeline.events):
        storage = timeline.storages[event if event >= 0 else -1 - event]
        change = storage.bytes if event >= 0 else -storage.bytes
        live[storage.kind] += change
        now += change
        if number < first:
            continue
        if (number - first) * buckets // count > bucket and best:
            yield best[1], best[2]
            bucket, best = (number - first) * buckets // count, None
        if best is None or now > best[0]:
            best = (now, number, tuple(live.values()))
    if best:
        yield best[1], best[2]


def _areas(columns: Sequence[tuple[int, tuple[int, ...]]], x: Axis, y: Axis) -> Iterator[str]:
    below = [0] * len(columns)
    for index in range(len(STACK)):
        above = [base + sizes[index] for base, (_, sizes) in zip(below, columns, strict=True)]
        if above != below:
            upper = [(x.place(event), y.place(value)) for (event, _), value in zip(columns, above, strict=True)]
            lower = [(x.place(event), y.place(value)) for (event, _), value in zip(columns, below, strict=True)]
            corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in [*upper, *reversed(lower)])
            yield f'<polygon points="{corners}" class="area f{index + 1} s{index + 1}"/>'
            yield _kind_name(STACK[index].replace("_", " "), upper, lower)
        below = above


def _kind_name(words: str, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]]) -> str:
    """A kind's name in the middle of the longest stretch in which its area is thick enough for it; nothing where none is long enough."""
    runs: list[list[int]] = [[]]
    for column, ((_, top), (_, bottom)) in enumerate(zip(upper, lower, strict=True)):
        if bottom - top >= LINE + 2:
            runs[-1].append(column)
        elif runs[-1]:
            runs.append([])
    longest = max(runs, key=len)
    if not longest or upper[longest[-1]][0] - upper[longest[0]][0] < len(words) * ADVANCE + 8:
        return ""
    middle = longest[len(longest) // 2]
    return text(upper[middle][0], (upper[middle][1] + lower[middle][1]) / 2 + 4, words, "label kind", anchor="middle")


def _phases(timeline: Timeline, x: Axis, frame: Box) -> Iterator[str]:
    """A line where each phase begins, with its name where there is room before the next."""
    starts = [event for event, _ in timeline.phases]
    for (event, name), end in zip(timeline.phases, [*starts[1:], len(timeline.events)], strict=False):
        at, until = x.place(event), x.place(end)
        yield line(at, frame.y - 12, at, frame.y + frame.height, "phase")
        if until - at > len(name) * ADVANCE + 6:
            yield text(at + 4, frame.y - 4, name, "tick")
