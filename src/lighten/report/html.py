"""One self-contained HTML file: the answer first, then what it rests on. No script, nothing fetched."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lighten.errors import OutputError
from lighten.report.explanation import explanation
from lighten.report.figures import (
    METRICS,
    OBJECTIVES,
    QUANTITIES,
    Quantity,
    Record,
    clean,
    direction,
    find_trial,
    folded,
    format_latency,
    format_quality,
    format_ratio,
    improvement,
    is_baseline,
    is_measured,
    known,
    limits_on,
    number,
    objective,
    ordered_trials,
    quality_of,
    read_limit,
    say_improvement,
    say_measured,
    say_model,
    say_quality,
    say_skipped,
    say_text,
    say_verdict,
    say_workload,
    trial_name,
    within_range,
)
from lighten.report.plots import kind_of, prediction_plot, quality_plot, tradeoff_plot, trial_numbers
from lighten.report.svg import document, marker
from lighten.units import format_bytes, format_seconds

WIDE, NARROW = (700.0, 420.0), (350.0, 330.0)
"""Natural sizes of the trade-off plot: letters drawn for a screen would be specks on a phone, so there is one plot for each."""


def write_report(choice: Record, path: Path) -> None:
    """The report on a choice at `path`.

    Raises:
        OutputError: the folder is missing, full or read-only; nothing is left behind.
    """
    write_page(report_page(choice), path)


def write_page(page: str, path: Path) -> None:
    """A page at `path`: whole or not at all (written beside it, then renamed).

    Raises:
        OutputError: the folder is missing, full or read-only; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise OutputError(f"{path}: the report cannot be written: {error.strerror or error}.") from error


def report_page(choice: Record) -> str:
    """The whole page as text."""
    title = _text(f"{known((choice.get('model') or {}).get('name'))} · lighten choose")
    style = "".join(files("lighten.report").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css"))
    sections = (_answer(choice), _tradeoff(choice), explanation(choice), _predictions(choice), _trials(choice), _circumstances(choice))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _text(content: Any) -> str:
    """Safe in the page, as text and as an attribute: every word of a user's goes through here."""
    return escape(clean(content))


def _answer(choice: Record) -> str:
    model = choice.get("model") or {}
    eyebrow = f"{known(model.get('name'))} · {say_workload(choice.get('workload'))} · {_wanted(choice)}"
    chosen = find_trial(choice, choice.get("chosen"))
    body = _no_answer(choice) if chosen is None else _chosen_answer(choice, chosen)
    warnings = "".join(f'<p class="banner warn"><b>Warning:</b> {_text(warning)}</p>' for warning in choice.get("warnings") or [])
    return f'<header>\n<p class="eyebrow">{_text(eyebrow)}</p>\n{body}{warnings}</header>\n'


def _wanted(choice: Record) -> str:
    """What the choice is for."""
    if choice["objective"] not in OBJECTIVES:
        return f"best {choice['objective'].replace('_', ' ')} wanted"
    return f"{'highest' if objective(choice).higher else 'lowest'} {objective(choice).title} wanted"


def _chosen_answer(choice: Record, chosen: Record) -> str:
    if is_baseline(choice, chosen):
        headline = "Keep the original: nothing else that meets the requirements is better"
    else:
        first = objective(choice)
        quantities = [first, *(QUANTITIES[name] for name in ("latency", "size") if QUANTITIES[name] is not first)]
        said = [_span_improvement(improvement(choice, chosen, quantity), quantity) for quantity in quantities]
        compared = " than the original" if "×" in said[0] else ""
        headline = f"{said[0]}{compared}, {', '.join(said[1:])}; {_text(say_quality(choice, chosen))}"
    return f"<h1>{headline}</h1>\n{_what(choice, chosen, 'Chosen')}{_tiles(choice, chosen)}{_requirements(choice, chosen)}"


def _span_improvement(factor: float | None, quantity: Quantity) -> str:
    style = "" if factor is None or abs(factor - 1) < 0.005 else "good" if factor > 1 else "bad"
    return f'<span class="{style}">{_text(say_improvement(factor, quantity))}</span>'


def _no_answer(choice: Record) -> str:
    closest = choice.get("closest") or {}
    trial = find_trial(choice, closest.get("id"))
    if trial is None:
        return '<h1 class="bad">Nothing was chosen: no trial gave a measurement to judge by</h1>\n' + _requirements(choice, None)
    misses = "; ".join(_text(miss) for miss in closest.get("misses") or ["not known"])
    return (
        f'<h1 class="bad">Nothing met the requirements</h1>\n<p class="lead">Closest: <strong>{misses}</strong></p>\n'
        f"{_what(choice, trial, 'Closest, not chosen')}{_tiles(choice, trial)}{_requirements(choice, trial)}"
    )


def _what(choice: Record, trial: Record, word: str) -> str:
    recipe = clean(trial.get("recipe") or ("the original weights" if is_baseline(choice, trial) else "no change to the weights"))
    precision = (trial.get("measured") or {}).get("precision")
    ran = f", ran in <b>{_text(precision)}</b>" if precision else ""
    return (
        f'<p class="what"><span class="badge">{word}</span> <code>{_text(recipe)}</code>'
        f" on <code>{_text(known(trial.get('runtime')))}</code>{ran}</p>\n"
    )


def _tiles(choice: Record, trial: Record) -> str:
    first = objective(choice)
    quantities = [first, *(quantity for quantity in QUANTITIES.values() if quantity is not first)]
    tiles = [_quantity_tile(choice, trial, quantity) for quantity in quantities]
    tiles.insert(1, _quality_tile(choice, trial))
    return f'<div class="tiles">\n{"".join(tiles)}</div>\n'


def _quantity_tile(choice: Record, trial: Record, quantity: Quantity) -> str:
    factor = improvement(choice, trial, quantity)
    before, after = (quantity.show(number(one, "measured", quantity.key)) for one in (choice.get("baseline"), trial))
    lines = [f"{_text(before)} → <b>{_text(after)}</b>"]
    if quantity.key == "latency_s":
        cold = number(trial, "measured", "cold_start_s")
        spread = format_latency(trial).partition(" (")[2].rstrip(")")
        lines += [f"quartiles {_text(spread)}"] if spread else []
        lines += [f"first answer after {_text(format_seconds(cold))}"] if cold is not None else []
    big = _span_improvement(factor, quantity)
    for said, shorter in ((f"same {quantity.title}", "the same"), (f"{quantity.title} not known", "not known")):  # its title stands above
        big = big.replace(said, shorter)
    return _tile(quantity.title, big, lines)


def _quality_tile(choice: Record, trial: Record) -> str:
    metric = choice["quality_metric"]
    value, error = quality_of(choice, trial, metric)
    original = METRICS[metric].original if metric in METRICS else quality_of(choice, choice.get("baseline") or {}, metric)[0]
    lines = [f"{_text(metric)}; the original: {_text(format_quality(original) if original is None else f'{original:g}')}"]
    lines += ["± is one standard error"] if error is not None else ["standard error not known"]
    return _tile("quality", _text(format_quality(value, error)), lines)


def _tile(title: str, big: str, lines: Iterable[str]) -> str:
    return f'<div class="tile"><h2>{_text(title)}</h2><p class="big">{big}</p>{"".join(f"<p>{line}</p>" for line in lines)}</div>\n'


def _requirements(choice: Record, trial: Record | None) -> str:
    required = [str(text) for text in choice.get("require") or []]
    if not required:
        return '<p class="verdict">No requirement was set.</p>\n'
    sign, style = ("✓ ", "good") if trial and trial.get("meets") else ("✗ ", "bad")
    verdict = sign + say_verdict(trial)
    items = []
    for text in required:
        limit = read_limit(text, choice["quality_metric"])
        measured = f": measured {_text(say_measured(choice, trial, limit))}" if limit and trial else ""
        items.append(f"<li><code>{_text(text)}</code>{measured}</li>")
    return f'<div class="verdict"><b class="{style}">{verdict}</b><ul>{"".join(items)}</ul></div>\n'


def _tradeoff(choice: Record) -> str:
    wide, narrow = (tradeoff_plot(choice, width=width, height=height) for width, height in (WIDE, NARROW))
    if wide is None or narrow is None:
        plot = '<p class="note">Fewer than two trials have both figures, so there is nothing to plot.</p>'
    else:
        plot = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>{_legend(choice)}'
    trials = ordered_trials(choice)
    missing = sum(not is_measured(trial) for trial in trials)
    notes = ["Numbers are those of the table below, to which each point leads, by a click or by Tab and Enter."]
    notes += ["Upright lines are ± one standard error."]
    notes += ["↓: worse than the plot's lower edge, at the value given."] if wide and "↓" in wide else []
    drawn = {text for figure in (choice["quality_metric"], objective(choice).key) for text, _ in limits_on(choice, figure)}
    others = [clean(text) for text in choice.get("require") or [] if clean(text) not in drawn]
    notes += [f"Required too, and not drawn: {', '.join(others)}."] if others else []
    notes += [f"Failed or skipped, not drawn: {missing}."] if missing else []
    note = f'<p class="note">{_text(" ".join(notes))}</p>'
    return (
        f'<section>\n<h2>{_text(objective(choice).title.capitalize())} against quality</h2>\n<div class="beside">\n'
        f"<figure>{plot}{note}</figure>\n<div>{_looser(choice)}</div>\n</div>\n</section>\n"
    )


def _legend(choice: Record) -> str:
    kinds = {kind_of(choice, trial) for trial in ordered_trials(choice) if is_measured(trial)}
    words = {"chosen": "chosen", "closest": "closest", "baseline": "original", "front": "on the Pareto front", "other": "beaten by another"}
    icons = [f"<li>{document(20, 20, marker(10, 10, kind), label=word, style='icon')} {word}</li>" for kind, word in words.items() if kind in kinds]
    if any(trial.get("meets") is False for trial in ordered_trials(choice) if is_measured(trial)):
        icons.append(f"<li>{document(20, 20, marker(10, 10, 'other', faint=True), label='grey', style='icon')} grey: fails a requirement</li>")
    required = limits_on(choice, choice["quality_metric"]) + limits_on(choice, objective(choice).key)
    if required:
        icons.append('<li><span class="swatch"></span> where the requirement fails</li>')
    return f'<ul class="legend">{"".join(icons)}</ul>'


def _looser(choice: Record) -> str:
    if choice.get("chosen") is None and not choice.get("looser"):
        advice = "Nothing as it stands. Loosen the requirements, or allow more recipes or runtimes."
        return f'<h3>What would be chosen</h3>\n<p class="note">{advice}</p>\n'
    heading = "<h3>What looser quality would buy</h3>\n"
    numbers = {trial.get("id"): index for index, trial in trial_numbers(choice)}
    rows = []
    for offer in choice.get("looser") or []:
        trial = find_trial(choice, offer.get("id"))
        name = _name_link(choice, trial, numbers) if trial else _text(known(offer.get("id")))
        rows.append(f"<tr><td>{name}</td><td>{_text(known(offer.get('gain')))}</td><td>{_text(known(offer.get('cost')))}</td></tr>")
    if not rows:
        return (
            f'{heading}<p class="note">Nothing: no measured trial of lower quality has a {direction(choice)} {_text(objective(choice).title)}.</p>\n'
        )
    head = '<tr><th scope="col">instead</th><th scope="col">gain</th><th scope="col">cost</th></tr>'
    return f'{heading}<div class="scroll"><table class="looser"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>\n'


def _name_link(choice: Record, trial: Record, numbers: dict[Any, int]) -> str:
    index = numbers[trial.get("id")]
    return f'<a href="#trial-{index}">{index}</a> <code>{_text(trial_name(choice, trial))}</code>'


def _predictions(choice: Record) -> str:
    figures = []
    first_token = OBJECTIVES["time_to_first_token"]
    quantities = [*QUANTITIES.values(), *([first_token] if number(choice, "accuracy", first_token.key, "count") else [])]
    for quantity in quantities:
        count, middle, worst = (number(choice, "accuracy", quantity.key, key) for key in ("count", "median", "worst"))
        plot = prediction_plot(choice, quantity, size=350)
        said = f"median ratio <b>{format_ratio(middle)}</b>, worst <b>{format_ratio(worst)}</b>"
        trials = f" ({count:.0f} trials)" if count is not None else ""
        drawing = plot or '<p class="note">No trial has both figures.</p>'
        figures.append(f"<figure><figcaption><b>{_text(quantity.title)}</b>: {said}{trials}</figcaption>{drawing}</figure>\n")
    if (scatter := quality_plot(choice, size=350)) is not None:
        error = number(choice, "accuracy", "quality", "median_error")
        said = f"median error <b>{_text(format_quality(error))}</b>, by a proxy or the same weights elsewhere"
        figures.append(f"<figure><figcaption><b>{_text(choice['quality_metric'])}</b>: {said}</figcaption>{scatter}</figure>\n")
    inside, ranged = within_range(choice)
    ranges = f" The measured latency lay within the predicted range in {inside} of {ranged} trials." if ranged else ""
    return (
        "<section>\n<h2>Predicted against measured</h2>\n"
        '<p class="note">Each was predicted before it was run, later ones by what earlier ones measured too. On the diagonal the prediction was '
        "right; above it, too high. "
        f'Ratio = predicted / measured.{ranges}</p>\n{_accuracy(choice)}<div class="three">\n{"".join(figures)}</div>\n</section>\n'
    )


AIM = "0.85–0.95"
"""The share of trials that ranges of 90 % should hold, but for chance."""


def _accuracy(choice: Record) -> str:
    """A row for each figure that was predicted of some trial; nothing of what a choice of an older version does not have."""
    told = choice.get("accuracy") or {}
    names = [(quantity.key, quantity.title) for quantity in (*QUANTITIES.values(), OBJECTIVES["time_to_first_token"])]
    rows = ""
    for key, title in (*names, ("quality", str(choice["quality_metric"]))):
        count, error, ranged, within = (number(told, key, name) for name in ("count", "median_error", "ranged", "within"))
        if not count or ranged is None:
            continue
        said = format_quality(error) if key == "quality" else "not known" if error is None else f"{error:.1%}"
        share = f"{within / ranged:.2f} ({within:.0f} of {ranged:.0f})" if ranged and within is not None else "no range"
        rows += f'<tr><th scope="row">{_text(title)}</th><td>{count:.0f}</td><td>{_text(said)}</td><td>{share}</td></tr>\n'
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{word}</th>' for word in ("", "trials", "median error", f"within the range, aim {AIM}"))
    return f'<div class="scroll"><table class="right accuracy"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'


def _trials(choice: Record) -> str:
    numbered = trial_numbers(choice)
    groups = "".join(f'<th scope="colgroup" colspan="3" class="group">{_text(quantity.title)}</th>' for quantity in QUANTITIES.values())
    parts = '<th scope="col" class="group">predicted</th><th scope="col">measured</th><th scope="col">ratio</th>' * len(QUANTITIES)
    head = (
        f'<tr><th scope="col" rowspan="2">#</th><th scope="col" rowspan="2">recipe @ runtime</th>'
        f'<th scope="col" rowspan="2">quality<br><small>{_text(choice["quality_metric"])}</small></th>'
        f'<th scope="col" rowspan="2">speed-up</th>{groups}</tr><tr>{parts}</tr>'
    )
    one_by_one, skipped = folded(choice)
    rows = "".join(_trial_row(choice, index, trial) for index, trial in numbered if trial in one_by_one)
    left = "".join(_trial_row(choice, index, trial) for index, trial in numbered if trial in skipped)

    def table(body: str) -> str:
        return f'<div class="scroll"><table class="trials"><thead>{head}</thead>\n<tbody>\n{body}</tbody></table></div>\n'

    count = {status: sum(trial.get("status") == status for _, trial in numbered) for status in ("measured", "failed", "skipped")}
    counted = ", ".join(f"{many} {status}" for status, many in count.items())
    return (
        f'<section>\n<h2>All {len(numbered)} trials</h2>\n<p class="note">{counted}. ★ chosen, · on the Pareto front. Latency: median, '
        "and quartiles where known; speed-up against the original, measured in one run with it. Ratio = predicted / measured, "
        "in red beyond 0.8–1.25.</p>\n"
        + table(rows)
        + (f"<details><summary>{_text(say_skipped(skipped))}</summary>\n{table(left)}</details>\n" if skipped else "")
        + "</section>\n"
    )


def _trial_row(choice: Record, index: int, trial: Record) -> str:
    kind = kind_of(choice, trial)
    measured = is_measured(trial)
    mark = "★ " if kind == "chosen" else "· " if trial.get("pareto") and measured else ""
    word = {"chosen": "chosen", "closest": "closest", "baseline": "original"}.get(kind)
    badge = f' <span class="badge">{word}</span>' if word else ""
    status = clean(trial.get("status") or "not known")
    reason = f'<td colspan="2" class="reason"><b>{_text(status)}</b>: {_text(known(trial.get("failure")))}</td>'
    name = f'<code>{_text(trial_name(choice, trial))}</code>{badge}<p class="small">{_text(_small_print(trial))}</p>'
    cells = [_quality_cell(choice, trial), _speedup_cell(choice, trial)] if measured else [reason]
    for quantity in QUANTITIES.values():
        predicted = _text(quantity.show(number(trial, "predicted", quantity.key)))
        cells.append(f'<td class="group">{predicted}{_predicted_range(trial, quantity)}</td>')
        cells += [_measured_cell(trial, quantity), _ratio_cell(trial, quantity)] if measured else [_BLANK, _BLANK]
    style = f"{_text(status)} {kind}"
    return f'<tr id="trial-{index}" class="{style}"><td>{mark}{index}</td><th scope="row">{name}</th>{"".join(cells)}</tr>\n'


_BLANK = '<td><span aria-label="not measured">–</span></td>'


def _small_print(trial: Record) -> str:
    parts = [known(trial.get("id"))]
    measured = trial.get("measured") or {}
    if measured.get("precision"):
        parts.append(f"ran in {clean(measured['precision'])}")
    for said, value in (("cold start", number(measured, "cold_start_s")), ("tried in", number(trial, "seconds"))):
        parts += [f"{said} {format_seconds(value)}"] if value is not None else []
    return " · ".join(parts)


def _quality_cell(choice: Record, trial: Record) -> str:
    metric = choice["quality_metric"]
    others = [name for name in (trial["measured"].get("quality") or {}) if name != metric]
    small = "".join(f'<p class="small">{_text(name)} {_text(format_quality(*quality_of(choice, trial, name)))}</p>' for name in others)
    return f"<td><b>{_text(format_quality(*quality_of(choice, trial, metric)))}</b>{small}</td>"


def _speedup_cell(choice: Record, trial: Record) -> str:
    factor = improvement(choice, trial, QUANTITIES["latency"])
    style = "bad" if factor is not None and factor < 0.995 else ""
    return f'<td class="{style}">{"not known" if factor is None else f"{factor:.2f}×"}</td>'


def _predicted_range(trial: Record, quantity: Quantity) -> str:
    low, high = (number(trial, "predicted", f"latency_{end}_s") for end in ("low", "high"))
    if quantity.key != "latency_s" or low is None or high is None:
        return ""
    return f'<p class="small">{_text(format_seconds(low))} – {_text(format_seconds(high))}</p>'


def _measured_cell(trial: Record, quantity: Quantity) -> str:
    spread = format_latency(trial).partition(" (")[2].rstrip(")") if quantity.key == "latency_s" else ""
    small = f'<p class="small">{_text(spread)}</p>' if spread else ""
    return f"<td><b>{_text(quantity.show(number(trial, 'measured', quantity.key)))}</b>{small}</td>"


def _ratio_cell(trial: Record, quantity: Quantity) -> str:
    ratio = number(trial, "ratio", quantity.key)
    style = "off" if ratio is not None and not 0.8 <= ratio <= 1.25 else ""
    return f'<td class="{style}">{format_ratio(ratio)}</td>'


def _circumstances(choice: Record) -> str:
    model, machine, texts = (choice.get(key) or {} for key in ("model", "machine", "text"))
    memory = format_bytes(number(machine, "memory_bytes"))
    facts = {
        "model": say_model(model),
        "read from": known(model.get("source")),
        "workload": say_workload(choice.get("workload")),
        "text": say_text(texts),
        "processor": f"{known(machine.get('cpu'))}, {known(machine.get('cores'))} cores, {known(machine.get('threads'))} threads used",
        "memory": memory,
        "system": known(machine.get("os")),
        "versions": ", ".join(f"{name} {known(version)}" for name, version in (choice.get("versions") or {}).items()) or "not known",
        "took": format_seconds(number(choice, "seconds")) + (f"; ended, for {clean(choice['stopped'])}" if choice.get("stopped") else ""),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items())
    return (
        "<section>\n<h2>Run it again</h2>\n"
        f"<pre><code>{_text(known(choice.get('command')))}</code></pre>\n"
        f"<h3>Where this was measured</h3>\n<dl>{rows}</dl>\n"
        f'<p class="note">lighten {_text(known(choice.get("lighten")))}. All figures are in choice.json too, beside this file.</p>\n'
        "</section>\n"
    )
