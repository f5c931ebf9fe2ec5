"""The page of `lighten compare`: what each combination takes, side by side, and throughput against money or memory.

One self-contained HTML page, or the plot alone as SVG. No script, nothing fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Literal

from lighten.errors import DeviceError
from lighten.recipe.case import Cost
from lighten.recipe.compare import Entry
from lighten.report.figures import clean, shortened
from lighten.report.svg import LINE, Axis, Box, Wanted, boxes_along, document, draw_label, grid, line, place_labels, text
from lighten.units import format_bytes, format_count, format_seconds

Against = Literal["money", "memory"]
WIDE, NARROW = (1120.0, 460.0), (350.0, 360.0)
"""Natural sizes of the plot: letters drawn for a screen would be specks on a phone."""
COLOURS = 8
NARROWEST = 1.5
"""Ratio of the ends of an axis, at least."""
ROOM = 0.07
"""Part of an axis that stays free beyond its first and last point."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    x: float
    y: float
    colour: int
    name: str
    note: str
    fits: bool


# ---- what is said of one combination ----


def figures_of(entry: Entry) -> dict[str, str]:
    """A combination's figures for people, by name; what is not known says so."""
    cost = entry.cost
    if cost is None:
        return {}
    time = cost.time
    range_ = f" ({format_seconds(time.low)} to {format_seconds(time.high)})" if time and time.low is not None and time.high is not None else ""
    return {
        "memory": format_bytes(cost.needed_bytes),
        "fits": {None: "not known", True: f"yes, of {format_bytes(cost.capacity_bytes)}", False: f"no, of {format_bytes(cost.capacity_bytes)}"}[
            cost.fits
        ],
        "time": f"{format_seconds(time.seconds)}{range_}" if time else "not known",
        "bound by": time.bound_by if time else "not known",
        "tokens/s": say_rate(cost.tokens / time.seconds) if time else "not known",
        "$ a million tokens": "not known" if cost.usd is None else f"{cost.usd / cost.tokens * 1e6:.3g}",
        "J a token, at most": "not known" if cost.joules is None else f"{cost.joules / cost.tokens:.3g}",
        "parameters": format_count(cost.estimate.spec.total_parameters),
        "FLOPs": format_count(cost.flops),
        "on disk": format_bytes(cost.estimate.size_bytes),
    }


def say_rate(tokens_per_second: float) -> str:
    """
    >>> say_rate(40521.7), say_rate(24.618)
    ('40,522', '24.62')
    """
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.4g}"


def _fits(cost: Cost) -> str:
    return "not known" if cost.fits is None else f"{'yes' if cost.fits else 'no'}, of {format_bytes(cost.capacity_bytes)}"


# ---- the plot ----


def default_against(entries: Sequence[Entry]) -> Against:
    """Money where every timed combination has a price, else memory."""
    timed = [entry for entry in entries if entry.tokens_per_second is not None]
    return "money" if timed and all(entry.usd_per_million_tokens is not None for entry in timed) else "memory"


def compare_plot(entries: Sequence[Entry], against: Against, *, width: float, height: float) -> str:
    """Throughput (up is better) against money or memory (left is better), both on log scales: a colour for each model and recipe, a name for
    each device; hollow where it does not fit.

    Raises:
        DeviceError: fewer than two combinations have both figures.
    """
    both = [(entry, _across(entry, against), entry.tokens_per_second) for entry in entries]
    drawn = [(entry, across, up) for entry, across, up in both if across is not None and up is not None]
    if len(drawn) < 2:
        what = "a price (--price)" if against == "money" else "--device"
        raise DeviceError(f"a plot of throughput against {against} needs two combinations with both figures; found {len(drawn)}; each needs {what}.")
    frame = Box(x=76, y=24, width=width - 96, height=height - 24 - 46)
    x = _log_axis([across for _, across, _ in drawn], frame.x, frame.width)
    y = _log_axis([up for _, _, up in drawn], frame.y + frame.height, -frame.height)
    kinds = _kinds(entries)
    points = [
        _Point(
            x=x.place(across), y=y.place(up), colour=1 + kinds.index(_kind(entry)) % COLOURS,
            name=shortened(entry.choice.device or "", 18 if width < WIDE[0] else 40),
            note=f"{entry.choice}: {say_rate(up)} tokens/s, {_say(against)(across)}", fits=entry.cost is not None and entry.cost.fits is not False,
        )
        for entry, across, up in drawn
    ]  # fmt: skip
    joined = _joined(drawn, points)
    x_ticks = {value: _say(against)(value) for value in x.ticks(int(frame.width / 90))}
    y_ticks = {value: say_rate(value) for value in y.ticks(int(frame.height / 40))}
    body = [
        grid(x, y, x_ticks, y_ticks), *(line(*ends, "leader") for ends in joined), *map(_mark, points), *_labels(points, frame, joined),
        text(frame.x, 14, "tokens/s (up is better, log scale)", "axis"),
        text(frame.x + frame.width, height - 6, _across_title(against, width), "axis", anchor="end"),
    ]  # fmt: skip
    return document(width, height, "".join(body), label=f"tokens per second against {against} of {len(drawn)} combinations", style="plot")


def _across(entry: Entry, against: Against) -> float | None:
    return entry.usd_per_million_tokens if against == "money" else None if entry.cost is None else float(entry.cost.needed_bytes)


def _say(against: Against) -> Callable[[float], str]:
    return format_bytes if against == "memory" else lambda value: f"${value:.3g}"


def _across_title(against: Against, width: float) -> str:
    if width < WIDE[0]:
        return "memory (left is better)" if against == "memory" else "$ a million tokens (left is better)"
    name = "memory of the fullest device" if against == "memory" else "US dollars a million tokens"
    return f"{name} (left is better, log scale)"


def _kind(entry: Entry) -> tuple[str, str | None]:
    return entry.choice.model, entry.choice.recipe


def _kinds(entries: Sequence[Entry]) -> list[tuple[str, str | None]]:
    return list(dict.fromkeys(map(_kind, entries)))


def _joined(drawn: Sequence[tuple[Entry, float, float]], points: Sequence[_Point]) -> list[tuple[float, float, float, float]]:
    """Ends of the lines from each point of a device to its next: what another model or recipe changes there."""
    by_device: dict[str | None, list[_Point]] = {}
    for (entry, _, _), point in zip(drawn, points, strict=True):
        by_device.setdefault(entry.choice.device, []).append(point)
    return [(a.x, a.y, b.x, b.y) for same in by_device.values() for a, b in pairwise(same)]


def _mark(point: _Point) -> str:
    style = f"f{point.colour}" if point.fits else f"s{point.colour}"
    fill = "" if point.fits else ' fill="none" stroke-width="2"'
    return f'<circle cx="{point.x:.1f}" cy="{point.y:.1f}" r="5" class="{style}"{fill}><title>{escape(clean(point.note))}</title></circle>'


def _labels(points: Sequence[_Point], frame: Box, joined: Sequence[tuple[float, float, float, float]]) -> list[str]:
    inner = Box(x=frame.x + 2, y=frame.y + 2, width=frame.width - 4, height=frame.height - 4)
    wanted = [Wanted(x=point.x, y=point.y, texts=[point.name, shortened(point.name, 12)], style=f"f{point.colour}") for point in points]
    marks = [Box(x=point.x - 6, y=point.y - 6, width=12, height=12) for point in points]
    lines = [box for x1, y1, x2, y2 in joined for box in boxes_along([(x1, y1), (x2, y2)])]
    return [draw_label(label) for label in place_labels(wanted, inner, marks, lines)]


def _log_axis(values: Sequence[float], origin: float, length: float) -> Axis:
    low, high = min(values), max(values)
    if high < low * NARROWEST:  # else a difference of nothing fills the plot
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(NARROWEST), middle * math.sqrt(NARROWEST)
    spread = (high / low) ** ROOM
    return Axis(start=low / spread, end=high * spread, origin=origin, length=length, log=True)


# ---- the page ----


def compare_picture(entries: Sequence[Entry], against: Against | None, *, kind: str) -> str:
    """The text of an `.html` or an `.svg` file.

    Raises:
        DeviceError: an `.svg` of fewer than two combinations with both figures.
    """
    if kind == ".html":
        return compare_page(entries, against)
    return compare_svg(entries, against or default_against(entries))


def compare_page(entries: Sequence[Entry], against: Against | None = None) -> str:
    """The whole page as text; without the plot where fewer than two combinations have a throughput and none was asked for by name."""
    timed = [entry for entry in entries if entry.tokens_per_second is not None]
    plot = _plot_section(entries, against or default_against(entries)) if against or len(timed) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(_headline(entries))} · lighten compare</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(entries)}{plot}{_table(entries)}</main>\n</body>\n</html>\n"
    )


def compare_svg(entries: Sequence[Entry], against: Against) -> str:
    """The plot alone, in light colours that need no style sheet's variables."""
    width, height = WIDE[0], WIDE[1] + 40 + LINE * len(_kinds(entries))
    placed = compare_plot(entries, against, width=WIDE[0], height=WIDE[1]).replace(
        "<svg ", f'<svg y="0" width="{WIDE[0]:.0f}" height="{WIDE[1]:.0f}" ', 1
    )
    rows = []
    for index, (model, recipe) in enumerate(_kinds(entries)):
        top = WIDE[1] + 24 + LINE * index
        rows += [f'<circle cx="84" cy="{top - 4:.1f}" r="5" class="f{1 + index % COLOURS}"/>', text(96, top, _kind_name(model, recipe), "axis")]
    style = _style() + "text { font-family: system-ui, sans-serif; }\n"
    return _without_variables(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" class="plot">'
        f'<style>{style}</style><rect width="{width:.0f}" height="{height:.0f}" fill="var(--page)"/>{placed}{"".join(rows)}</svg>\n'
    )


def _headline(entries: Sequence[Entry]) -> str:
    timed = [entry for entry in entries if entry.tokens_per_second is not None and entry.cost is not None and entry.cost.fits is not False]
    if not timed:
        return f"{len(entries)} combinations side by side"
    best = max(timed, key=lambda entry: entry.tokens_per_second or 0.0)
    return f"{say_rate(best.tokens_per_second or 0.0)} tokens/s at most, on {best.choice.device}"


def _head(entries: Sequence[Entry]) -> str:
    asked = next(entry.cost.estimate.workload for entry in entries if entry.cost)
    new = f" + {asked.new_tokens} new" if asked.new_tokens else ""
    said = f"{asked.phase}, batch {asked.batch_size} × {asked.seq_len}{new}"
    priced = [entry for entry in entries if entry.usd_per_million_tokens is not None and entry.cost is not None and entry.cost.fits is not False]
    cheapest = min(priced, key=lambda entry: entry.usd_per_million_tokens or 0.0) if priced else None
    more = f'<p class="lead">Cheapest: {_text(cheapest.choice)}, ${cheapest.usd_per_million_tokens:.3g} a million tokens.</p>\n' if cheapest else ""
    return f'<header>\n<p class="eyebrow">{_text(said)}</p>\n<h1>{_text(_headline(entries))}</h1>\n{more}</header>\n'


def _plot_section(entries: Sequence[Entry], against: Against) -> str:
    wide, narrow = (compare_plot(entries, against, width=width, height=height) for width, height in (WIDE, NARROW))
    kinds = "".join(
        f'<li><span class="swatch-box k{1 + index % COLOURS}"></span> {_text(_kind_name(*kind))}</li>' for index, kind in enumerate(_kinds(entries))
    )
    note = "Hollow: does not fit. A thin line joins what differs on one device. The pointer says the figures."
    return (
        f"<section>\n<h2>Throughput against {_text(against)}</h2>\n"
        f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>\n'
        f'<ul class="legend">{kinds}</ul>\n<p class="note">{_text(note)}</p>\n</section>\n'
    )


def _kind_name(model: str, recipe: str | None) -> str:
    return f"{clean(model)}, {clean(recipe)}" if recipe else clean(model)


def _table(entries: Sequence[Entry]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in figures_of(entry)))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("model", "recipe", "device", *names))
    rows = []
    for entry in entries:
        choice, found = entry.choice, figures_of(entry)
        first = f'<th scope="row">{_text(choice.model)}</th>'
        first += f'<td class="named"><code>{_text(choice.recipe or "")}</code></td><td class="named">{_text(choice.device or "")}</td>'
        cells = (
            "".join(f"<td>{_text(found[name])}</td>" for name in names)
            if found
            else f'<td class="named" colspan="{len(names)}">{_text(entry.failure)}</td>'
        )
        style = ' class="over"' if entry.cost is not None and entry.cost.fits is False else ""
        rows.append(f"<tr{style}>{first}{cells}</tr>\n")
    said = {assumption for entry in entries if entry.cost for assumption in entry.cost.estimate.assumptions}
    notes = " ".join(f"{each[:1].upper()}{each[1:]}." for each in sorted(said))
    return (
        f'<section>\n<h2>Side by side</h2>\n<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(rows)}'
        f'</tbody></table></div>\n<p class="note">{_text(notes)}</p>\n</section>\n'
    )


def _style() -> str:
    sheets = (files("lighten.report").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css"))
    return "".join(sheets) + NAMED


NAMED = """.numbers thead th:nth-child(-n+3), .numbers tbody th, .numbers td.named { text-align: left; }
.numbers td.named { white-space: normal; min-width: 110px; }
"""
"""A name may take several lines, a number may not."""


def _without_variables(svg: str) -> str:
    """Each colour in place of its variable, for programs that know no variables; rules for other media go."""
    svg = re.sub(r"@(?:media|page)[^{]*\{(?:[^{}]|\{[^{}]*\})*\}", "", svg)
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", svg))
    svg = re.sub(r":root \{[^}]*\}", "", svg)
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], svg)


def _text(content: object) -> str:
    return escape(clean(content))
