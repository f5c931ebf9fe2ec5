"""Shares as areas: a rectangle for each component, within it one for each kind of module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

from lighten.report.svg import ADVANCE, Box, document, text

COMPONENTS = ("embedding", "attention", "mlp", "norm", "head", "pooler", "convolution")
HEADER = 16.0

Shares = Mapping[str, Mapping[str, int]]
"""Component → kind of module → its figure."""


def module_kind(name: str) -> str:
    """A module's name without the numbers of its layer and expert: one name for all layers.

    >>> module_kind("model.layers.11.mlp.experts.*.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def squarify(values: Sequence[float], box: Box) -> list[Box]:
    """A box for each value, largest first, of its share of the area, as near to a square as a greedy choice of rows makes it.

    Source: Bruls, Huizing, van Wijk 2000, "Squarified treemaps", algorithm of section 3.

    >>> [(b.x, b.y, b.width, b.height) for b in squarify([3, 1], Box(x=0, y=0, width=4, height=2))]
    [(0, 0, 3.0, 2.0), (3.0, 0, 1.0, 2.0)]
    """
    total = sum(values)
    if not values or total <= 0:
        return []
    scale = box.width * box.height / total
    areas = [value * scale for value in values]
    found: list[Box] = []
    while areas:
        side = min(box.width, box.height)
        count = 1
        while count < len(areas) and _worst(areas[: count + 1], side) <= _worst(areas[:count], side):
            count += 1
        row, box = _lay_row(areas[:count], box)
        found += row
        areas = areas[count:]
    return found


def _worst(areas: Sequence[float], side: float) -> float:
    """The least square one's ratio of sides, in a row along a side."""
    total = sum(areas)
    smallest = min(areas)
    return math.inf if smallest <= 0 or side <= 0 else max(side**2 * max(areas) / total**2, total**2 / (side**2 * smallest))


def _lay_row(areas: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """A row along the shorter side, and what is left of the box."""
    total, found = sum(areas), []
    if box.width >= box.height:
        thick, at = total / box.height if box.height else 0.0, box.y
        for area in areas:
            long = area / thick if thick else 0.0
            found.append(Box(x=box.x, y=at, width=thick, height=long))
            at += long
        return found, Box(x=box.x + thick, y=box.y, width=max(0.0, box.width - thick), height=box.height)
    thick, at = total / box.width if box.width else 0.0, box.x
    for area in areas:
        long = area / thick if thick else 0.0
        found.append(Box(x=at, y=box.y, width=long, height=thick))
        at += long
    return found, Box(x=box.x, y=box.y + thick, width=box.width, height=max(0.0, box.height - thick))


def treemap(shares: Shares, say: Callable[[float], str], *, width: float, height: float, label: str) -> str:
    """The plot as one SVG; each rectangle says its module, figure and share as far as there is room, and all of it under the pointer."""
    total = sum(sum(kinds.values()) for kinds in shares.values())
    groups = sorted(
        ((sum(kinds.values()), name, kinds) for name, kinds in shares.items() if sum(kinds.values())), key=lambda group: (-group[0], group[1])
    )
    boxes = squarify([size for size, _, _ in groups], Box(x=0, y=0, width=width, height=height))
    body = [_group(name, size, kinds, box, total, say) for (size, name, kinds), box in zip(groups, boxes, strict=True)]
    return document(width, height, "".join(body), label=label, style="plot")


def _group(name: str, size: int, kinds: Mapping[str, int], box: Box, total: int, say: Callable[[float], str]) -> str:
    colour = COMPONENTS.index(name) + 1 if name in COMPONENTS else 8
    words = _fitting([f"{name} {say(size)} · {size / total:.1%}", f"{name} {size / total:.1%}", name], box.width - 8)
    headed = bool(words) and box.height > 2.4 * HEADER
    inner = Box(x=box.x, y=box.y + HEADER, width=box.width, height=box.height - HEADER) if headed else box
    found = [text(box.x + 5, box.y + 12, words, "group-name")] if headed else []
    members = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    members = [(kind, value) for kind, value in members if value]
    for (kind, value), cell in zip(members, squarify([value for _, value in members], inner), strict=True):
        found.append(_cell(kind, value, cell, colour, total, say))
    return f"<g>{''.join(found)}</g>"


def _cell(kind: str, value: int, box: Box, colour: int, total: int, say: Callable[[float], str]) -> str:
    hint = f"{kind}: {say(value)}, {value / total:.2%}"
    place = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    found = [f'<rect {place} class="cell f{colour}"><title>{escape(hint)}</title></rect>']
    short = short_kind(kind)
    name = _fitting([short, ".".join(short.split(".")[-2:]), short.split(".")[-1]], box.width - 8)
    if name and box.height >= 16:
        found.append(text(box.x + 5, box.y + 12, name, "cell-name"))
        said = _fitting([f"{say(value)} · {value / total:.1%}", f"{value / total:.1%}"], (box.width - 8) * 1.1)
        if said and box.height >= 30:
            found.append(text(box.x + 5, box.y + 25, said, "cell-value"))
    return "".join(found)


def short_kind(kind: str) -> str:
    """What follows the layer's number.

    >>> short_kind("model.layers.*.mlp.up_proj")
    'mlp.up_proj'
    """
    return kind.rpartition("*.")[2] or kind


def _fitting(words: Sequence[str], width: float) -> str:
    return next((each for each in words if len(each) * ADVANCE <= width), "")
