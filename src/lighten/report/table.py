"""The terminal's tables: aligned plain text, at most `WIDTH` columns."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence

from lighten.report.figures import (
    METRICS,
    QUANTITIES,
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
    number,
    objective,
    ordered_trials,
    quality_of,
    say_improvement,
    say_skipped,
    say_verdict,
    trial_name,
)

WIDTH = 110
_GAP = "  "
_NUMERIC = re.compile(r"(?:[-±~]?\d.*|not known|)", re.DOTALL)


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """An aligned table: numbers to the right, words to the left, one rule under the header.

    A cell may have several lines. A row shorter than the header lets its last cell run over the columns that it lacks.

    >>> print(format_table([["a", "1.5 MB"], ["bc", "12 MB"], ["d: it failed"]], ["name", "size"]))
    name    size
    ------------
    a     1.5 MB
    bc     12 MB
    d: it failed
    """
    full = [row for row in rows if len(row) == len(header)]
    spanning = [row[:-1] for row in rows if len(row) < len(header)]
    columns = range(len(header))
    widths = [max(_width(row[column]) for row in [header, *full, *(row for row in spanning if column < len(row))]) for column in columns]
    cells = [[row[column] for row in full] for column in columns]
    numeric = [any(column) and all(_NUMERIC.fullmatch(cell) for cell in column) for column in cells]
    lines = _row_lines(header, widths, numeric)
    lines.append("-" * (sum(widths) + len(_GAP) * (len(widths) - 1)))
    for row in rows:
        lines += _row_lines(row, widths, numeric)
    return "\n".join(lines)


def _row_lines(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    cells = [cell.split("\n") for cell in row]
    height = max((len(cell) for cell in cells), default=1)
    lines = []
    for line in range(height):
        parts = [cell[line] if line < len(cell) else "" for cell in cells]
        padded = [_pad(part, width, right) for part, width, right in zip(parts, widths, numeric, strict=False)]
        if len(row) < len(widths):
            padded[-1] = parts[-1]
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    """Columns that a terminal gives to the widest line of `text`: East Asian wide letters take two."""
    return max(sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line) for line in text.split("\n"))


def choice_table(choice: Record) -> str:
    """One line a trial, then the answer: what was chosen, whether the requirements hold, what looser quality would buy."""
    metric = textwrap.fill(choice["quality_metric"].replace("_", " "), 14)
    header = ["", "recipe @ runtime", "size", "latency (quartiles)", "faster", metric, "pred/meas\nlatency"]
    trials, skipped = folded(choice)
    figures = [_figures(choice, trial) if is_measured(trial) else [] for trial in trials]
    taken = [max(_width(row[column]) for row in [header[2:], *filter(None, figures)]) for column in range(5)]
    name_width = max(30, WIDTH - 1 - sum(taken) - 6 * len(_GAP))
    reason_width = WIDTH - 1 - name_width - 2 * len(_GAP)
    rows = []
    for trial, cells in zip(trials, figures, strict=True):
        reason = textwrap.fill(f"{trial.get('status')}: {known(trial.get('failure'))}", max(reason_width, 40))
        rows.append([_mark(choice, trial), _folded(trial_name(choice, trial), name_width), *(cells or [reason])])
    more = f"{say_skipped(skipped)}; choice.json says why of each\n" if skipped else ""
    return f"{format_table(rows, header)}\n★ chosen   · on the Pareto front\n{more}\n{_answer(choice)}"


def _mark(choice: Record, trial: Record) -> str:
    if choice.get("chosen") is not None and trial.get("id") == choice["chosen"]:
        return "★"
    return "·" if trial.get("pareto") and is_measured(trial) else ""


def _folded(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name, width, subsequent_indent="  ")) or name


def _figures(choice: Record, trial: Record) -> list[str]:
    faster = improvement(choice, trial, QUANTITIES["latency"])
    return [
        QUANTITIES["size"].show(number(trial, "measured", "size_bytes")),
        format_latency(trial),
        "not known" if faster is None else f"{faster:.2f}x",
        format_quality(*quality_of(choice, trial, choice["quality_metric"])),
        format_ratio(number(trial, "ratio", "latency_s")),
    ]


def _answer(choice: Record) -> str:
    lines = [_answer_line(choice)]
    if choice.get("stopped"):
        lines.append(f"Stopped: {clean(choice['stopped'])}.")
    if choice.get("chosen") is not None and choice.get("require"):
        lines.append(f"{say_verdict(find_trial(choice, choice['chosen']))}: {', '.join(map(clean, choice['require']))}.")
    lines += [f"Warning: {clean(warning)}." for warning in choice.get("warnings") or []]
    looser = choice.get("looser") or []
    for offer in looser:
        trial = find_trial(choice, offer.get("id"))
        name = trial_name(choice, trial) if trial else known(offer.get("id"))
        lines.append(f"Looser quality would buy: {name}: {known(offer.get('gain'))}; {known(offer.get('cost'))}.")
    if not looser and choice.get("chosen") is not None:
        lines.append(f"Looser quality would buy nothing: no measured trial has {_better(choice)}.")
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _better(choice: Record) -> str:
    return f"a {direction(choice)} {objective(choice).title}"


def _answer_line(choice: Record) -> str:
    chosen = find_trial(choice, choice.get("chosen"))
    if chosen is None:
        closest = choice.get("closest")
        trial = find_trial(choice, closest["id"]) if closest else None
        if not closest or trial is None:
            return "Nothing was chosen: no trial gave a measurement to judge by."
        misses = "; ".join(map(clean, closest.get("misses") or ["not known"]))
        return f"Nothing met the requirements. Closest: {trial_name(choice, trial)}: {misses}."
    if is_baseline(choice, chosen):
        return f"Chosen: the original itself ({trial_name(choice, chosen)}): nothing else that meets the requirements has {_better(choice)}."
    first = objective(choice)
    quantities = [first, *(quantity for quantity in QUANTITIES.values() if quantity is not first)]
    changes = []
    for quantity in quantities:
        before, after = (quantity.show(number(trial, "measured", quantity.key)) for trial in (choice["baseline"], chosen))
        changes.append(f"{say_improvement(improvement(choice, chosen, quantity), quantity)} ({before} → {after})")
    metric = choice["quality_metric"]
    compared = "" if metric not in METRICS or METRICS[metric].original is None else f" (original: {METRICS[metric].original:g})"
    quality = f"{metric} {format_quality(*quality_of(choice, chosen, metric))}{compared}"
    return f"Chosen: {trial_name(choice, chosen)}: {', '.join(changes)}, {quality}."


def prediction_table(choice: Record) -> str:
    """Predicted, measured and their ratio for size, peak memory and latency of each measured trial, then the median and the worst ratio."""
    header = ["recipe @ runtime"]
    for quantity in QUANTITIES.values():
        header += [f"{quantity.title}\npredicted", "\nmeasured", "\nratio"]
    rows = []
    for trial in filter(is_measured, ordered_trials(choice)):
        row = [_folded(trial_name(choice, trial), 30)]
        for quantity in QUANTITIES.values():
            row += [quantity.show(number(trial, part, quantity.key)) for part in ("predicted", "measured")]
            row.append(format_ratio(number(trial, "ratio", quantity.key)))
        rows.append(row)
    for which in ("median", "worst"):
        row = [f"{which} ratio"]
        for quantity in QUANTITIES.values():
            row += ["", "", format_ratio(number(choice, "accuracy", quantity.key, which))]
        rows.append(row)
    return format_table(rows, header)
