"""Why the chosen is what it is, as sections of the report: what each step contributed, where the time goes, where the bytes lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lighten.report.figures import (
    QUANTITIES,
    Quantity,
    Record,
    clean,
    format_quality,
    is_measured,
    known,
    number,
    objective,
    quality_of,
    trial_name,
)
from lighten.report.step_plots import Bar, bar_plot, colours_of
from lighten.units import format_bytes, format_seconds

WIDE, BESIDE, NARROW = 560.0, 400.0, 350.0
"""Natural widths of the bars: letters drawn for a screen would be specks on a phone, so there is one plot for each."""
_KINDS = {"norm": "norms", "activation": "activations", "between": "between operators"}
_COMPONENTS = {"norm": "norms", "files": "other files", "other": "other weights"}
"""What pieces are called where their key does not say it."""


def explanation(choice: Record) -> str:
    """The sections; nothing of what a choice of an older version does not have."""
    return _ablation(choice) + _pieces(choice)


def _text(content: Any) -> str:
    """Safe in the page, as text and as an attribute: every word of a user's goes through here."""
    return escape(clean(content))


# ---- what each step contributed ----


def _ablation(choice: Record) -> str:
    rows = [row for row in choice.get("ablation") or [] if isinstance(row, dict)]
    if not rows:
        return ""
    wanted = objective(choice)
    shown = [wanted, *(quantity for quantity in QUANTITIES.values() if quantity is not wanted)]
    head = "".join(f'<th scope="col">{_text(quantity.title)}</th>' for quantity in shown)
    body = "".join(_ablation_row(choice, row, shown) for row in rows)
    untried = sum(not is_measured(row) for row in rows)
    note = "One thing more in each row, from the original to the chosen; below, the chosen without one thing. Small: what was predicted."
    note += f" {untried} not measured: predicted figures stand in for them, in italics." if untried else ""
    bars = _ablation_bars(choice, rows, wanted)
    plots = _plots(bars, f"{wanted.title} step by step", wide=BESIDE) if bars else ""
    return (
        '<section>\n<h2>What each step contributed</h2>\n<div class="beside">\n'
        f'<div><div class="scroll"><table class="steps right"><thead><tr><th scope="col">recipe</th>{head}'
        f'<th scope="col">{_text(choice["quality_metric"])}</th></tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{_text(note)}</p></div>\n'
        f"<figure><figcaption><b>{_text(wanted.title)}</b>, the upright line as predicted</figcaption>{plots}</figure>\n</div>\n</section>\n"
    )


def _row_name(choice: Record, row: Record) -> str:
    """What a row has more, or lacks."""
    step, chosen = clean(row.get("step") or ""), row.get("id") == choice.get("chosen")
    if row.get("role") == "original":
        return "the original @ torch"
    if row.get("role") == "without":
        return f"chosen without {step}"
    return f"{step if step.startswith('@') else f'+ {step}'}{' = chosen' if chosen else ''}"


def _ablation_row(choice: Record, row: Record, shown: Sequence[Quantity]) -> str:
    style = "chosen" if row.get("id") == choice.get("chosen") else "without" if row.get("role") == "without" else ""
    cells = "".join(_figure_cell(row, quantity) for quantity in shown)
    value, error = quality_of(choice, row, choice["quality_metric"])
    said = f"<b>{_text(format_quality(value, error))}</b>" if is_measured(row) else _foreseen_quality(choice, row)
    reason = "" if is_measured(row) else f'<p class="small">{_text(known(row.get("failure")))}</p>'
    name = f"<code>{_text(_row_name(choice, row))}</code>{reason}"
    name += "" if row.get("role") == "original" else f'<p class="small">{_text(trial_name(choice, row))}</p>'
    return f'<tr class="{style}"><th scope="row" class="step">{name}</th>{cells}<td>{said}</td></tr>\n'


def _figure_cell(row: Record, quantity: Quantity) -> str:
    predicted = quantity.show(number(row, "predicted", quantity.key))
    if not is_measured(row):
        return f"<td><i>{_text(predicted)}</i></td>"
    return f'<td><b>{_text(quantity.show(number(row, "measured", quantity.key)))}</b><p class="small">{_text(predicted)}</p></td>'


def _foreseen_quality(choice: Record, row: Record) -> str:
    return f"<i>{_text(format_quality(number(row, 'predicted', 'quality', choice['quality_metric'], 'value')))}</i>"


def _ablation_bars(choice: Record, rows: Sequence[Record], quantity: Quantity) -> list[Bar]:
    bars = []
    for row in rows:
        told = "measured" if is_measured(row) else "predicted"
        value, foreseen = number(row, told, quantity.key), number(row, "predicted", quantity.key)
        if value is None or value < 0:
            continue
        said = quantity.show(value) + ("" if told == "measured" else " predicted")
        note = f"{trial_name(choice, row)}: {told} {quantity.show(value)}, predicted {quantity.show(foreseen)}"
        bars.append(Bar(name=_row_name(choice, row), parts=[(told, value)], said=said, mark=foreseen, notes={told: note}))
    return bars if len(bars) > 1 else []


# ---- where the time goes, where the bytes lie ----


def _pieces(choice: Record) -> str:
    parts = [_operators(choice), _sizes(choice)]
    return f'<section>\n<div class="two">\n{"".join(parts)}</div>\n</section>\n' if any(parts) else ""


def _seconds(value: float | None) -> str:
    """Nobody measures parts of a microsecond."""
    return "< 1 µs" if value is not None and 0 < value < 1e-6 else format_seconds(value)


def _sides(choice: Record, key: str) -> list[tuple[str, Record]]:
    """What is told of the original and of the chosen, with their names."""
    told = choice.get(key)
    found = told if isinstance(told, dict) else {}
    names = (("original", "original"), ("chosen", "chosen"))
    return [(f"{word}: {trial_name(choice, side)}", side) for part, word in names if isinstance(side := found.get(part), dict)]


def _operators(choice: Record) -> str:
    sides = _sides(choice, "profile")
    columns: list[tuple[str, Mapping[str, float]]] = []
    reasons = []
    for name, side in sides:
        for told in ("predicted", "measured"):
            values = _values(side.get(told), _KINDS)
            if values:
                columns.append((f"{name.partition(':')[0]}, {told}", values))
        if not side.get("measured"):
            reasons.append(f"Of the {name}: {known(side.get('failure'))}")
    if not columns:
        return ""
    bars = [_stacked(name, values, _seconds) for name, values in columns]
    note = (
        "Linear: products with weights; attention: the products of activations, and the softmax; between operators: what passes outside of all, "
        "such as Python. A runtime that joins operators counts them under one. Measured by the runtime's own profiler, which takes time too."
    )
    return _figure("Where the time goes", bars, [note, *reasons], _table(columns, _seconds))


def _sizes(choice: Record) -> str:
    columns, bars, notes = [], [], []
    for name, side in _sides(choice, "components"):
        values = _values(side.get("predicted"), _COMPONENTS)
        if not values:
            continue
        word, measured = name.partition(":")[0], number(side, "measured_bytes")
        columns.append((word, values))
        bar = _stacked(word, values, format_bytes)
        bars.append(Bar(name=name, parts=bar.parts, said=bar.said, mark=measured, notes=bar.notes))
        if measured:
            total = sum(values.values())
            notes.append(f"The files of the {word} take {format_bytes(measured)}: predicted {format_bytes(total)}, {total / measured - 1:+.2%}.")
    if not columns:
        return ""
    notes.append("By component as predicted; the upright line is what the files really take. Tied weights count where they are stored.")
    return _figure("Where the bytes lie", bars, notes, _table(columns, format_bytes))


def _values(told: object, names: Mapping[str, str]) -> dict[str, float]:
    """Finite pieces that are no less than nothing, by what they are called."""
    record = told if isinstance(told, dict) else {}
    found = {names.get(name, clean(name)): number(record, name) for name in record}
    return {name: value for name, value in found.items() if value is not None and value >= 0}


def _stacked(name: str, values: Mapping[str, float], show: Callable[[float | None], str]) -> Bar:
    total = sum(values.values())
    notes = {piece: f"{piece}: {show(value)}, {value / total:.0%}" if total else piece for piece, value in values.items()}
    return Bar(name=name, parts=list(values.items()), said=show(total), notes=notes)


def _table(columns: Sequence[tuple[str, Mapping[str, float]]], show: Callable[[float | None], str]) -> str:
    """A row for each piece that some column has, and their sums."""
    pieces = [piece for piece in dict.fromkeys(piece for _, values in columns for piece in values) if any(v.get(piece) for _, v in columns)]
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name, _ in columns)
    rows = [(piece, [values.get(piece) for _, values in columns]) for piece in pieces] + [("all", [sum(v.values()) for _, v in columns])]
    body = "".join(
        f'<tr><th scope="row">{_text(piece)}</th>{"".join(f"<td>{_text(show(value))}</td>" for value in values)}</tr>' for piece, values in rows
    )
    return f'<div class="scroll"><table class="right pieces"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, bars: Sequence[Bar], notes: Sequence[str], table: str) -> str:
    drawn = {name for bar in bars for name, value in bar.parts if value}
    keys = "".join(f'<li><span class="key k{colour}"></span> {_text(name)}</li>' for name, colour in colours_of(bars).items() if name in drawn)
    said = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    return f'<figure><h2>{_text(title)}</h2><ul class="legend">{keys}</ul>{_plots(bars, title)}{table}{said}</figure>\n'


def _plots(bars: Sequence[Bar], title: str, *, wide: float = WIDE) -> str:
    label = clean(f"{title}: {'; '.join(f'{bar.name}: {bar.said}' for bar in bars)}")
    return "".join(f'<div class="{kind}">{bar_plot(bars, width=width, label=label)}</div>' for kind, width in (("wide", wide), ("narrow", NARROW)))
