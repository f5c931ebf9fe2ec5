"""The pictures of `lighten plan`: memory against a step's time of every plan that fits, and what takes the time of the best ones.

One self-contained HTML page, or the pictures alone in one SVG. No script, nothing fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from lighten.parallel.search import Asked, Candidate, Field, Found
from lighten.report.svg import ADVANCE, LINE, Axis, Box, Wanted, boxes_along, document, draw_label, grid, line, marker, path, place_labels, text
from lighten.units import format_bytes, format_count, format_seconds

WIDE, NARROW = (900.0, 520.0), (360.0, 340.0)
"""Natural sizes of the plot: letters drawn for a screen would be specks on a phone, so there is one plot for each."""
CELL = 6.0
"""Side of the squares that plans are counted in, in units of the plot: a hundred thousand points would hide each other."""
SLOWEST = 20.0
"""Plans that take longer than so many times the best one are not drawn."""
PARTS = ("compute", "memory", "recompute", "layer traffic", "data traffic", "stage traffic", "bubble", "overhead", "optimizer")
COLOURS = {
    "compute": 1,
    "memory": 7,
    "recompute": 5,
    "layer traffic": 2,
    "data traffic": 6,
    "stage traffic": 4,
    "bubble": 8,
    "overhead": 3,
    "optimizer": 3,
}
"""Part of the time → its colour of the style sheet."""


def plan_picture(asked: Asked, found: Found, *, kind: str) -> str:
    """The text of an `.html` or an `.svg` file."""
    return plan_page(asked, found) if kind == ".html" else plan_svg(asked, found)


def plan_page(asked: Asked, found: Found) -> str:
    """The whole page as text."""
    title = f"{asked.spec.name} on {asked.count} × {asked.device.name}"
    plots = "".join(
        f'<figure class="{kind}">{scatter_plot(found, width=width, height=height)}{parts_plot(found, width=width)}</figure>\n'
        for kind, (width, height) in (("wide", WIDE), ("narrow", NARROW))
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · lighten plan</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(asked, found)}{plots}{_table(found)}</main>\n</body>\n</html>\n"
    )


def plan_svg(asked: Asked, found: Found) -> str:
    """Both pictures, one below the other, in light colours that need no style sheet's variables."""
    width, height = WIDE
    bars = parts_plot(found, width=width)
    drop = _bars_height(found, width)
    placed = [
        scatter_plot(found, width=width, height=height).replace("<svg ", f'<svg x="20" y="44" width="{width:.0f}" height="{height:.0f}" ', 1),
        bars.replace("<svg ", f'<svg x="20" y="{height + 54:.0f}" width="{width:.0f}" height="{drop:.0f}" ', 1),
    ]
    total = (width + 40, height + drop + 70)
    style = _style() + "text { font-family: system-ui, sans-serif; } .svg-title { font-size: 17px; font-weight: 650; fill: var(--ink); }\n"
    title = text(20, 28, f"{asked.spec.name} on {asked.count} × {asked.device.name}: {found.fitting:,} of {found.searched:,} plans fit", "svg-title")
    return _without_variables(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]:.0f} {total[1]:.0f}" width="{total[0]:.0f}" height="{total[1]:.0f}">'
        f'<style>{style}</style><rect width="{total[0]:.0f}" height="{total[1]:.0f}" fill="var(--page)"/>{title}{"".join(placed)}</svg>\n'
    )


# ---- memory against time ----


def scatter_plot(found: Found, *, width: float, height: float) -> str:
    """Plans that fit, by time (to the left is better, log scale) and memory (down is better), how many there are as shades; the Pareto front."""
    seconds, memory = _fitting(found)
    best = min(each.time.seconds for each in found.best)
    frame = Box(x=62, y=26, width=width - 80, height=height - 70)
    drawn = seconds <= SLOWEST * best
    highest = max(float(seconds[drawn].max()) if drawn.any() else best, *(each.time.seconds for each in found.best))
    x = Axis(start=0.93 * min(best, float(seconds.min()) if len(seconds) else best), end=1.05 * highest, origin=frame.x, length=frame.width, log=True)
    y = Axis(start=0.0, end=1.06 * found.capacity, origin=frame.y + frame.height, length=-frame.height)
    front = _front(seconds[drawn], memory[drawn])
    stairs = [(x.place(a), y.place(b)) for a, b in _stairs(front)]
    wanted = [_wanted(rank, each, x, y) for rank, each in enumerate(found.best, start=1)]
    inner = Box(x=frame.x + 4, y=frame.y + 4, width=frame.width - 8, height=frame.height - 8)
    labels = place_labels(wanted, inner, [Box(x=each.x - 7, y=each.y - 7, width=14, height=14) for each in wanted], boxes_along(stairs))
    at = y.place(found.capacity)
    body = [
        grid(x, y, {value: format_seconds(value) for value in x.ticks(int(frame.width / 70))}, {v: format_bytes(v) for v in y.ticks(7)}),
        _cells(seconds[drawn], memory[drawn], x, y),
        line(frame.x, at, frame.x + frame.width, at, "limit"),
        text(frame.x + frame.width - 4, at - 5, f"{format_bytes(found.capacity)} may be taken", "limit-label", anchor="end"),
        _front_line(stairs, frame),
        *(marker(want.x, want.y, "chosen" if rank == 1 else "front", f"{rank}: {found.best[rank - 1].plan}") for rank, want in _backwards(wanted)),
        *map(draw_label, labels),
        text(frame.x, 14, f"↓ memory{' of the fullest device' if width > NARROW[0] else ''} (better down)", "axis"),
        text(frame.x + frame.width, height - 6, "← a step's time (better left, log scale)", "axis", anchor="end"),
    ]
    return document(width, height, "".join(body), label=f"memory against a step's time of {found.fitting} plans", style="plot")


def _front_line(stairs: Sequence[tuple[float, float]], frame: Box) -> str:
    """The Pareto front, named at its end."""
    if len(stairs) < 2:
        return ""
    x, y = stairs[-1]
    said, room = "Pareto front", frame.x + frame.width - x
    name = text(x + 6, y + 4, said, "label") if room > ADVANCE * len(said) + 8 else text(x, y + LINE, said, "label", anchor="end")
    return path(stairs, "front-line") + name


def _backwards(wanted: Sequence[Wanted]) -> list[tuple[int, Wanted]]:
    return list(enumerate(wanted, start=1))[::-1]


def _wanted(rank: int, each: Candidate, x: Axis, y: Axis) -> Wanted:
    plan = each.plan
    sizes = " ".join(f"{name}{size}" for name in ("dp", "tp", "pp", "cp", "ep") if (size := getattr(plan, name)) > 1) or "one device"
    return Wanted(
        x=x.place(each.time.seconds), y=y.place(each.memory.peak), texts=[f"{rank} {sizes}", f"{rank}"], style="chosen" if rank == 1 else "front"
    )  # fmt: skip


def _fitting(found: Found) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds and bytes of all plans that fit."""
    fields: Sequence[Field] = found.fields
    return np.concatenate([each.seconds[each.fits] for each in fields]), np.concatenate([each.bytes[each.fits] for each in fields])


def _front(seconds: NDArray[np.float64], memory: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Plans that no other one beats in both, from the fastest.

    >>> _front(np.array([3.0, 1.0, 2.0, 4.0]), np.array([5.0, 9.0, 4.0, 6.0]))
    [(1.0, 9.0), (2.0, 4.0)]
    """
    order = np.lexsort((memory, seconds))
    least = np.minimum.accumulate(memory[order]) if len(order) else memory
    before = np.concatenate([[np.inf], least[:-1]]) if len(order) else memory
    kept = order[memory[order] < before] if len(order) else order
    return [(float(seconds[row]), float(memory[row])) for row in kept]


def _stairs(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    corners: list[tuple[float, float]] = []
    for point in front:
        corners += [(point[0], corners[-1][1]), point] if corners else [point]
    return corners


def _cells(seconds: NDArray[np.float64], memory: NDArray[np.float64], x: Axis, y: Axis) -> str:
    """Squares, the darker the more plans are in them."""
    if not len(seconds):
        return ""
    across = x.origin + x.length * (np.log(seconds / x.start) / np.log(x.end / x.start))
    down = y.origin + y.length * (memory / y.end)
    places, counts = np.unique(np.stack([across // CELL, down // CELL]), axis=1, return_counts=True)
    most = float(np.log1p(counts.max()))
    shades = np.ceil(4 * np.log1p(counts) / most).astype(int)
    return "".join(
        f'<rect x="{column * CELL:.0f}" y="{row * CELL:.0f}" width="{CELL:.0f}" height="{CELL:.0f}" class="many d{shade}"/>'
        for column, row, shade in zip(*places.tolist(), shades.tolist(), strict=True)
    )


# ---- what takes the time ----

ROW = 34.0


def _bars_height(found: Found, width: float) -> float:
    return 60 + 16.0 * len(_legend_rows(_shown(found), width)) + ROW * len(found.best)


def _shown(found: Found) -> list[str]:
    """Parts that some plan spends time on."""
    return [name for name in PARTS if any(each.details.get(name, 0.0) > 0.002 * each.time.seconds for each in found.best)]


def parts_plot(found: Found, *, width: float) -> str:
    """A bar for each of the best plans: its time, by what takes it."""
    height, shown = _bars_height(found, width), _shown(found)
    above = 24 + 16.0 * len(_legend_rows(shown, width))
    frame = Box(x=62, y=above, width=width - 80, height=height - above - 26)
    longest = max(each.time.seconds for each in found.best)
    x = Axis(start=0.0, end=longest * 1.02, origin=frame.x, length=frame.width)
    body = [text(frame.x, 14, "what takes the time", "axis"), *_legend(shown, width)]
    bottom = frame.y + frame.height
    for value in x.ticks(max(2, int(frame.width / 90))):
        at = x.place(value)
        body += [line(at, frame.y, at, bottom, "grid"), text(at, bottom + 15, format_seconds(value), "tick", anchor="middle")]
    for rank, each in enumerate(found.best, start=1):
        top = frame.y + ROW * (rank - 1) + 5
        body.append(text(frame.x - 8, top + 16, str(rank), "label", anchor="end"))
        start = 0.0
        for name in shown:
            seconds = max(0.0, each.details.get(name, 0.0))
            left, right = x.place(start), x.place(start + seconds)
            body.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(0.0, right - left):.1f}" height="{ROW - 10:.0f}" class="f{COLOURS[name]} part">'
                f"<title>{escape(name)}: {format_seconds(seconds)}, {seconds / each.time.seconds:.1%}</title></rect>"
            )
            start += seconds
    return document(width, height, "".join(body), label="what takes the time of the best plans", style="plot")


def _legend_rows(names: Sequence[str], width: float) -> list[list[str]]:
    """Names in rows, as many as there is room for."""
    rows: list[list[str]] = [[]]
    room = width - 80
    for name in names:
        if rows[-1] and sum(map(_legend_width, [*rows[-1], name])) > room:
            rows.append([])
        rows[-1].append(name)
    return rows


def _legend_width(name: str) -> float:
    return 26 + ADVANCE * len(name)


def _legend(names: Sequence[str], width: float) -> list[str]:
    """Names with their colours."""
    parts = []
    for number, row in enumerate(_legend_rows(names, width)):
        at, top = 62.0, 22 + 16.0 * number
        for name in row:
            parts.append(f'<rect x="{at:.0f}" y="{top:.0f}" width="10" height="10" class="f{COLOURS[name]}"/>')
            parts.append(text(at + 14, top + LINE * 0.68, name, "label"))
            at += _legend_width(name)
    return parts


# ---- words ----


def _head(asked: Asked, found: Found) -> str:
    best = found.best[0]
    money = "not known" if best.usd is None else f"${best.usd:,.3g}"
    per = "" if best.usd is None else f"${best.usd / asked.workload.tokens * 1e6:,.3g} a million tokens"
    tiles = [
        ("a step", format_seconds(best.time.seconds), f"{format_seconds(best.time.low)} to {format_seconds(best.time.high)}, 90 %"),
        ("memory", format_bytes(best.memory.peak), f"of {format_bytes(asked.device.memory_bytes)} a device"),
        ("MFU", f"{best.time.mfu:.0%}", f"{format_count(best.time.tokens_per_s)} tokens/s"),
        ("a step's money", money, per),
    ]
    boxes = "".join(f'<div class="tile"><h2>{escape(a)}</h2><p class="big">{escape(b)}</p><p>{escape(c)}</p></div>\n' for a, b, c in tiles)
    workload = asked.workload
    shape = f"{asked.spec.name}, train, batch {workload.batch_size} × {workload.seq_len}, {workload.dtype}, {workload.optimizer}"
    said = f"{found.fitting:,} of {found.searched:,} plans fit on {asked.count} × {asked.device.name}; best by {asked.goal}"
    return (
        f'<header>\n<p class="eyebrow">{escape(shape)}</p>\n<h1>{escape(str(best.plan))}</h1>\n<p class="eyebrow">{escape(said)}</p>\n'
        f'<div class="tiles">\n{boxes}</div>\n</header>\n'
    )


def _table(found: Found) -> str:
    rows = [_row(str(rank), each) for rank, each in enumerate(found.best, start=1)]
    rows += [_row("–", found.missed)] if found.missed is not None else []
    head = "".join(f"<th>{name}</th>" for name in ("", "plan", "recompute", "memory", "a step", "MFU", "why not"))
    return f'<div class="scroll"><table class="trials"><thead><tr>{head}</tr></thead>\n<tbody>{"".join(rows)}</tbody></table></div>\n'


_REASON = ' class="reason"'


def _row(rank: str, each: Candidate) -> str:
    cells = [
        rank, str(each.plan), each.recompute, format_bytes(each.memory.peak), format_seconds(each.time.seconds), f"{each.time.mfu:.0%}",
        each.why or "the best",
    ]  # fmt: skip
    wraps = (1, len(cells) - 1)
    return "".join(["<tr>", *(f"<td{_REASON * (place in wraps)}>{escape(cell)}</td>" for place, cell in enumerate(cells)), "</tr>\n"])


def _style() -> str:
    own = (
        ".many { fill: var(--c8); } .d1 { opacity: .14; } .d2 { opacity: .26; } .d3 { opacity: .42; } .d4 { opacity: .62; }\n"
        ".part { stroke: var(--page); stroke-width: 1; } figure { margin-top: 14px; } .narrow { display: none; }\n"
        "@media (max-width: 700px) { .wide { display: none; } .narrow { display: block; } }\n"
    )
    return "".join(files("lighten.report").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css")) + own


def _without_variables(svg: str) -> str:
    """Each colour in place of its variable, for programs that know no variables; rules for other media go."""
    svg = re.sub(r"@(?:media|page)[^{]*\{(?:[^{}]|\{[^{}]*\})*\}", "", svg)
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", svg))
    svg = re.sub(r":root \{[^}]*\}", "", svg)
    return re.sub(r"var\((--[\w-]+)\)", lambda match: colours[match[1]], svg)
