"""The page of a compression: what the model became, what each step of the recipe cost and gave, and how its training went.

Of `lighten.json`, which says what the artifact is, and `run.json`, which says how the run went. One self-contained page, no script, nothing fetched.
What an older version did not write is "not known".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from lighten.report.figures import Record, clean, format_ratio, known, number
from lighten.report.step_plots import Bar, Loss, bar_plot, colours_of, loss_plot, read_loss, size_bars, time_bars
from lighten.report.svg import document, marker
from lighten.units import format_bytes, format_count, format_seconds

WIDE, ALONE, NARROW = 560.0, 1000.0, 345.0
"""Natural widths of a plot: half of the page, all of it, and a phone's."""
LOSS_HEIGHT = 260.0
WORST = 10
"""Layers that are listed: choice, what is read at a glance."""


def compression_page(manifest: Record, run: Record | None) -> str:
    """The whole page as text.

    Args:
        manifest: the content of lighten.json.
        run: of run.json; None: there is none.
    """
    steps = merged_steps(manifest, run or {})
    title = f"{_model(manifest)} · lighten compress"
    sections = (
        _head(manifest, run or {}, steps), _pictures(manifest, run or {}, steps), _table(manifest, steps), _curves(manifest), _layers(manifest),
        _components(manifest, steps), _circumstances(manifest, run),
    )  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def merged_steps(manifest: Record, run: Record) -> list[Record]:
    """Each step of the recipe with what is known of it: from the manifest, from the run, and its curve."""
    recipe = str(manifest.get("recipe") or "").rpartition(" @ ")[0]
    said = _records(manifest.get("steps")) or [{"step": part} for part in recipe.split(" | ") if part.strip()]
    took = _records(run.get("steps"))
    curves = _records(manifest.get("curves"))
    found = []
    for place, step in enumerate(said):
        own = took[place] if place < len(took) and took[place].get("step") == step.get("step") else {}
        curve = next((each for each in curves if each.get("step") == step.get("step")), None)
        curves = [each for each in curves if each is not curve]  # a step that is said twice has two
        times = own.get("predicted") if isinstance(own.get("predicted"), dict) else {}
        sizes = step.get("predicted") if isinstance(step.get("predicted"), dict) else {}
        found.append({**step, **own, "predicted": {**(sizes or {}), **(times or {})}, "curve": curve})
    return found


def _records(found: Any) -> list[Record]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _record(found: Any) -> Record:
    return found if isinstance(found, dict) else {}


def _text(content: Any) -> str:
    """Safe in the page, as text and as an attribute: every word of a user's goes through here."""
    return escape(clean(content))


def _style() -> str:
    own = (
        ".warm-up { fill: var(--faint); } .parts { max-width: 620px; } section > .note { margin-top: 8px; }\n"
        "pre + dl, .banner + dl { margin-top: 12px; }\n"
    )
    return "".join(files("lighten.report").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css")) + own


def _model(manifest: Record) -> str:
    original = manifest.get("original")
    return known(PurePath(original).name if isinstance(original, str) else None)


# ---- the answer ----


def _head(manifest: Record, run: Record, steps: Sequence[Record]) -> str:
    before, after = number(manifest, "before", "size_bytes"), number(manifest, "size_bytes")
    if before and after:
        factor = before / after
        words = f"{factor:.2f}× smaller" if factor >= 1.005 else f"{1 / factor:.2f}× bigger" if factor < 0.995 else "The same size"
        style = "good" if factor >= 1.005 else "bad" if factor < 0.995 else ""
        headline = f'<span class="{style}">{words}</span>: {_text(format_bytes(before))} → {_text(format_bytes(after))}'
    else:
        headline = f"{_text(format_bytes(after))}; the size before is not known"
    eyebrow = f"{_model(manifest)} · for {known(manifest.get('runtime'))} in {known(manifest.get('dtype'))}"
    recipe = known(manifest.get("recipe"))
    tiles = [_size_tile(manifest), _parameter_tile(manifest, steps), _time_tile(run), _memory_tile(run)]
    what = f'<p class="what"><span class="badge">recipe</span> <code>{_text(recipe)}</code></p>'
    above = f'<p class="eyebrow">{_text(eyebrow)}</p>'
    return f'<header>\n{above}\n<h1>{headline}</h1>\n{what}\n<div class="tiles">\n{"".join(tiles)}</div>\n</header>\n'


def _tile(title: str, big: str, lines: Sequence[str]) -> str:
    body = "".join(f"<p>{_text(each)}</p>" for each in lines)
    return f'<div class="tile"><h2>{_text(title)}</h2><p class="big">{_text(big)}</p>{body}</div>\n'


def _foreseen(predicted: float | None, measured: float | None, show: Callable[[float | None], str]) -> str:
    """Prediction and its ratio to what was measured."""
    ratio = predicted / measured if predicted is not None and measured else None
    return f"predicted {show(predicted)}, ratio {format_ratio(ratio)}"


def _size_tile(manifest: Record) -> str:
    size, predicted = number(manifest, "size_bytes"), number(manifest, "predicted", "size_bytes")
    return _tile("size on disk", format_bytes(size), [_foreseen(predicted, size, format_bytes)])


def _parameter_tile(manifest: Record, steps: Sequence[Record]) -> str:
    before = _record(manifest.get("before"))
    last = steps[-1] if steps else before
    lines = [f"of {format_count(number(before, 'parameters'))} before"]
    zeros, bits = number(last, "zeros"), number(last, "bits")
    lines += [f"{_share(zeros)} of them zero"] if zeros else []
    lines += [f"{bits:.3g} bits a quantized weight"] if bits is not None else []
    return _tile("parameters", format_count(number(last, "parameters")), lines)


def _time_tile(run: Record) -> str:
    resumed = ["in more than one run, by --resume"] if run.get("resumed") is True else []
    return _tile("time", format_seconds(number(run, "seconds")), ["of all steps, and of writing", *resumed])


def _memory_tile(run: Record) -> str:
    peak, predicted = number(run, "peak_memory_bytes"), number(run, "predicted", "peak_memory_bytes")
    return _tile("peak memory of the work", format_bytes(peak), [_foreseen(predicted, peak, format_bytes)])


# ---- the steps ----


def _pictures(manifest: Record, run: Record, steps: Sequence[Record]) -> str:
    sizes = size_bars(_record(manifest.get("before")), steps, measured=number(manifest, "size_bytes"))
    times = time_bars(steps, run)
    parts = []
    if len(sizes) > 1:
        note = "After each step as its shapes, zeros and codes count on disk; the original and the last one as measured."
        parts.append(_figure("Bytes after each step", sizes, note, legend=True))
    if times:
        marked = any(bar.mark is not None for bar in times)
        note = "The upright line is what was predicted before the start." if marked else "How long these steps take is not predicted."
        parts.append(_figure("What took the time", times, note, legend=False))
    return f'<section>\n<div class="two">\n{"".join(parts)}</div>\n</section>\n' if parts else ""


def _figure(title: str, bars: Sequence[Bar], note: str, *, legend: bool) -> str:
    keys = "".join(f'<li><span class="key k{colour}"></span> {_text(name)}</li>' for name, colour in colours_of(bars).items()) if legend else ""
    keys = f'<ul class="legend">{keys}</ul>' if keys else ""
    label = f"{title.lower()}: {'; '.join(f'{bar.name}: {bar.said}' for bar in bars)}"
    plots = "".join(f'<div class="{kind}">{bar_plot(bars, width=width, label=label)}</div>' for kind, width in (("wide", WIDE), ("narrow", NARROW)))
    return f'<figure><h2>{_text(title)}</h2>{keys}{plots}<p class="note">{_text(note)}</p></figure>\n'


Column = tuple[str, Callable[[Record], str], Callable[[Record], str]]
"""Its head, its figure, and what is said below it as markup."""


def _columns() -> list[Column]:
    def of(head: str, key: str, show: Callable[[float | None], str]) -> Column:
        return head, lambda step: show(number(step, key)), lambda step: _differs(step, key, show)

    return [
        of("took", "seconds", format_seconds),
        of("peak memory", "peak_memory_bytes", format_bytes),
        of("parameters", "parameters", format_count),
        of("zeros", "zeros", _share),
        ("rank", lambda step: _ranks(step.get("ranks")), lambda step: ""),
        ("bits", _bits, lambda step: ""),
        of("size", "size_bytes", format_bytes),
        ("output error", lambda step: _share(number(step, "output_error"), none="–"), lambda step: _apart(number(step, "held_out_error"))),
        ("distance", lambda step: _distance(step)[0], lambda step: _distance(step)[1]),
    ]


def _table(manifest: Record, steps: Sequence[Record]) -> str:
    before = _record(manifest.get("before"))
    rows = [dict(step) for step in steps]
    if rows and number(manifest, "size_bytes") is not None:
        rows[-1] |= {"size_bytes": number(manifest, "size_bytes"), "measured": True}
    columns = [column for column in _columns() if any(column[1](row) not in ("–", "not known") for row in rows)]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("step", *(name for name, _, _ in columns)))
    first = [_row({**before, "original": True}, columns)] if before else []
    note = (
        "In small print what was predicted before the work, where it is another figure, and predicted / measured, in red beyond "
        "0.8–1.25. Size: as shapes, zeros and codes count after the step; after the last one, that of the files. Output error: of a "
        "layer's outputs on calibration text, relative to them, the mean over the step's weights; in small print on text that was kept "
        "apart. Distance: from the original's answers on held-out text, before → after the step."
    )
    body = "".join([*first, *(_row(row, columns) for row in rows)])
    return (
        '<section>\n<h2>What each step cost and gave</h2>\n<div class="scroll"><table class="trials steps right">'
        f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n<p class="note">{note}</p>\n</section>\n'
    )


def _row(step: Record, columns: Sequence[Column]) -> str:
    original = step.get("original") is True
    name = "the original" if original else f"<code>{_text(known(step.get('step')))}</code>"
    cells = "".join(_cell("–") if original and head in ("took", "peak memory") else _cell(big(step), small(step)) for head, big, small in columns)
    return f'<tr><th scope="row" class="step">{name}</th>{cells}</tr>\n'


def _cell(big: str, small: str = "") -> str:
    """One cell; `small` is markup already."""
    below = f'<p class="small">{small}</p>' if small else ""
    return f"<td><b>{_text(big)}</b>{below}</td>"


def _differs(step: Record, key: str, show: Callable[[float | None], str]) -> str:
    """The prediction and its ratio, where it is known and another figure; of the files' size always."""
    predicted, found = number(step, "predicted", key), number(step, key)
    if predicted is None or found is None:
        return ""
    ratio = predicted / found if found else None
    always = key == "size_bytes" and step.get("measured") is True
    if not always and (show(predicted) == show(found) or format_ratio(ratio) == "1.00"):
        return ""
    off = ' class="off"' if ratio is not None and not 0.8 <= ratio <= 1.25 else ""
    return f"predicted {_text(show(predicted))}, <span{off}>{format_ratio(ratio)}</span>"


def _share(value: float | None, none: str = "not known") -> str:
    """
    >>> _share(0.2374), _share(0.0), _share(None)
    ('23.7 %', '0 %', 'not known')
    """
    return none if value is None else "0 %" if value == 0 else f"{100 * value:.3g} %"


def _ranks(ranks: Any) -> str:
    """
    >>> _ranks([96, 128]), _ranks([8, 8]), _ranks(None)
    ('96–128', '8', '–')
    """
    if not isinstance(ranks, list) or len(ranks) != 2:
        return "–"
    low, high = (known(each) for each in ranks)
    return low if low == high else f"{low}–{high}"


def _bits(step: Record) -> str:
    bits = number(step, "bits")
    return "–" if bits is None else f"{bits:.3g}"


def _apart(error: float | None) -> str:
    return "" if error is None else f"held out {_text(_share(error))}"


def _distance(step: Record) -> tuple[str, str]:
    """The held-out distance before and after; a step that trained nothing has none."""
    curve = step.get("curve")
    if not isinstance(curve, dict):
        return "–", ""
    loss = read_loss(curve)
    if loss.before is None or loss.after is None:
        return "not known", ""
    kept = "" if curve.get("kept") is not False else "not less: undone"
    return f"{loss.before:.3g} → {loss.after:.3g}", kept


# ---- training ----


def _curves(manifest: Record) -> str:
    curves = _records(manifest.get("curves"))
    if not curves:
        return ""
    width, style = (ALONE, "") if len(curves) == 1 else (WIDE, ' class="two"')
    return f"<section>\n<h2>Loss</h2>\n<div{style}>\n{''.join(_curve(curve, width) for curve in curves)}</div>\n</section>\n"


def _curve(curve: Record, wide: float) -> str:
    loss = read_loss(curve)
    drawn = [loss_plot(loss, width=width, height=LOSS_HEIGHT) for width in (wide, NARROW)]
    if drawn[0] is None or drawn[1] is None:
        plot = '<p class="note">Fewer than two steps: nothing to draw.</p>'
    else:
        plot = f'<div class="wide">{drawn[0]}</div><div class="narrow">{drawn[1]}</div>{_loss_legend(loss)}'
    caption = f"<figcaption><code>{_text(known(curve.get('step')))}</code></figcaption>"
    return f'<figure>{caption}{plot}<p class="note">{_text(_say_curve(curve, loss))}</p></figure>\n'


def _loss_legend(loss: Loss) -> str:
    icons = {"baseline": (loss.before, "held-out distance before"), "chosen": (loss.after, "after")}
    items = [
        f"<li>{document(20, 20, marker(10, 10, kind), label=word, style='icon')} {word} {value:.4g}</li>"
        for kind, (value, word) in icons.items() if value is not None
    ]  # fmt: skip
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _say_curve(curve: Record, loss: Loss) -> str:
    steps, passes = number(curve, "steps"), number(curve, "teacher_passes")
    said = ["The loss of the rows of each step, before it; with losses beside the distance it is their sum."]
    said += [f"{steps:.0f} steps, {format_count(loss.points[-1][1])} positions."] if steps is not None and loss.points else []
    said += [f"The original was asked in {passes:.0f} passes."] if passes is not None else []
    said += ["The held-out distance did not fall: all stayed as it was."] if curve.get("kept") is False else []
    return " ".join(said)


# ---- layers and components ----


def _layers(manifest: Record) -> str:
    layers = [layer for layer in _records(manifest.get("layers")) if _error(layer) is not None]
    if not layers:
        return ""
    worst = sorted(layers, key=lambda layer: -(_error(layer) or 0.0))[:WORST]
    cells = ("weight", "bits", "zeros", "error of the weight", "of its outputs", "held out")
    head = "".join(f'<th scope="col">{name}</th>' for name in cells)
    rows = "".join(_layer_row(layer) for layer in worst)
    note = f"{len(worst)} of {len(layers)} changed weights, by the error of their outputs where calibration looked at them, else by their own."
    return (
        f'<section>\n<h2>Largest errors</h2>\n<p class="note">{_text(note)}</p>\n<div class="scroll"><table class="right">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n</section>\n"
    )


def _error(layer: Record) -> float | None:
    found = number(layer, "output_error")
    return found if found is not None else number(layer, "relative_error")


def _layer_row(layer: Record) -> str:
    bits = number(layer, "bits")
    figures = [
        "–" if bits is None else f"{bits:g}", _share(number(layer, "sparsity")),
        *(_share(number(layer, key), none="–") for key in ("relative_error", "output_error", "held_out_error")),
    ]  # fmt: skip
    cells = "".join(f"<td>{_text(figure)}</td>" for figure in figures)
    return f"<tr><td><code>{_text(known(layer.get('name')))}</code></td>{cells}</tr>\n"


def _components(manifest: Record, steps: Sequence[Record]) -> str:
    before, after = (_record(_record(record).get("components")) for record in (manifest.get("before"), steps[-1] if steps else None))
    if not before or not after:
        return ""
    rows = ""
    for name in dict.fromkeys([*before, *after]):
        sizes = [number(each, name) if name in each else 0.0 for each in (before, after)]
        factor = sizes[0] / sizes[1] if sizes[0] and sizes[1] else None
        cells = "".join(f"<td>{_text(format_bytes(size))}</td>" for size in sizes)
        rows += f'<tr><th scope="row">{_text(name)}</th>{cells}<td>{"–" if factor is None else f"{factor:.2f}×"}</td></tr>\n'
    head = "".join(f'<th scope="col">{name}</th>' for name in ("weights of", "before", "after", "smaller"))
    table = f'<table class="parts right"><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>'
    return f'<section>\n<h2>Where the bytes are</h2>\n<div class="scroll">{table}</div>\n</section>\n'


# ---- the rest ----


def _circumstances(manifest: Record, run: Record | None) -> str:
    threads = known((run or {}).get("threads"))
    facts = {
        "original": known(manifest.get("original")), "its fingerprint": known(manifest.get("original_fingerprint")),
        "runtime": f"{known(manifest.get('runtime'))}, computes in {known(manifest.get('dtype'))}",
        "processor": f"{known((run or {}).get('processor'))}, {threads} threads used", "lighten": known(manifest.get("lighten")),
    }  # fmt: skip
    rows = "".join(f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items())
    said = manifest.get("notes")
    notes = "".join(f'<p class="banner warn">{_text(note)}</p>' for note in (said if isinstance(said, list) else []))
    missing = "" if run is not None else " There is no run.json, so what the steps took is not known."
    return (
        f"<section>\n<h2>How it was made</h2>\n<pre><code>{_text(known(manifest.get('recipe')))}</code></pre>\n{notes}<dl>{rows}</dl>\n"
        f'<p class="note">All figures are in lighten.json and run.json too, beside this file.{missing}</p>\n</section>\n'
    )
