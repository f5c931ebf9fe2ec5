"""The pictures of `lighten estimate`: memory and FLOPs against a size, what has the parameters and FLOPs, and the memory of a run over time.

One self-contained HTML page, or the pictures alone in one SVG. No script, nothing fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files

from lighten.cost.operators import Op
from lighten.cost.sweep import Sweep
from lighten.cost.training import step_counts
from lighten.cost.workload import Workload
from lighten.model.spec import ModelSpec
from lighten.recipe.estimate import Estimate, forward_passes
from lighten.report.curves import MOST_LINES, Curves, curve_plot
from lighten.report.figures import clean
from lighten.report.svg import text
from lighten.report.timeline import STACK, Tensors, peak_tensors, tensor_list, timeline_plot
from lighten.report.treemap import Shares, module_kind, treemap
from lighten.trace.program import Timeline
from lighten.units import format_bytes, format_count

WIDE, NARROW = (580.0, 380.0), (350.0, 320.0)
"""Natural sizes of the curves: letters drawn for a screen would be specks on a phone, so there is one plot for each."""
MAP_WIDE, MAP_THIRD, MAP_NARROW = (580.0, 360.0), (380.0, 360.0), (350.0, 420.0)
TIME_WIDE, TIME_NARROW = (640.0, 420.0), (350.0, 320.0)
TABLE_ROWS = 120
TENSOR_ROWS = 14
ALONG = {"seq_len": "length", "batch_size": "batch size", "new_tokens": "new tokens"}

Draw = Callable[[float, float], str]


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """What is drawn.

    Attributes:
        estimate: at the first of the sweep's sizes.
        sweep: figures along a size.
        crossover: the length at which attention's square overtakes all other products.
        memory: bytes that there are.
        timeline: of the estimate's run, where it was followed.
    """

    estimate: Estimate
    sweep: Sweep
    crossover: int | None = None
    memory: int | None = None
    timeline: Timeline | None = None


def sweep_picture(pictured: Pictured, *, kind: str) -> str:
    """The text of an `.html` or an `.svg` file."""
    return sweep_page(pictured) if kind == ".html" else sweep_svg(pictured)


def sweep_page(pictured: Pictured) -> str:
    """The whole page as text."""
    spec = pictured.estimate.spec
    sections = (_head(pictured), _curves(pictured), _maps(pictured), _time(pictured), _points(pictured))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(spec.name)} · lighten estimate</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def sweep_svg(pictured: Pictured) -> str:
    """The pictures two by two, in light colours that need no style sheet's variables."""
    pictures = _pictures(pictured)
    width = 2 * WIDE[0] + 60
    body = [text(20, 32, _headline(pictured), "svg-title")]
    top = 66.0
    for pair in (pictures[index : index + 2] for index in range(0, len(pictures), 2)):
        for left, (title, (w, h), draw) in zip((20.0, WIDE[0] + 40), pair, strict=False):
            placed = draw(w, h).replace("<svg ", f'<svg x="{left:.0f}" y="{top + 12:.0f}" width="{w:.0f}" height="{h:.0f}" ', 1)
            body += [text(left, top, title, "svg-heading"), placed]
        top += max(h for _, (_, h), _ in pair) + 56
    style = _style() + "text { font-family: system-ui, sans-serif; } .svg-title { font-size: 20px; font-weight: 650; fill: var(--ink); }\n"
    style += ".svg-heading { font-size: 14px; font-weight: 600; fill: var(--ink); }\n"
    return _without_variables(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top:.0f}" width="{width:.0f}" height="{top:.0f}">'
        f'<style>{style}</style><rect width="{width:.0f}" height="{top:.0f}" fill="var(--page)"/>{"".join(body)}</svg>\n'
    )


def _style() -> str:
    return "".join(files("lighten.report").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css"))


def _without_variables(svg: str) -> str:
    """Each colour in place of its variable, for programs that know no variables; rules for other media go."""
    svg = re.sub(r"@(?:media|page)[^{]*\{(?:[^{}]|\{[^{}]*\})*\}", "", svg)
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", svg))
    svg = re.sub(r":root \{[^}]*\}", "", svg)
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], svg)


def _text(content: object) -> str:
    return escape(clean(content))


# ---- what the page says ----


def _headline(pictured: Pictured) -> str:
    spec, sweep = pictured.estimate.spec, pictured.sweep
    peaks = sweep.figures["peak"].tolist()
    low, high, parameters = (
        say.replace(" ", "\u00a0") for say in (*map(format_bytes, (min(peaks), max(peaks))), format_count(spec.total_parameters))
    )
    memory = low if low == high else f"{low} to {high}"
    return f"{clean(spec.name)}: {parameters} parameters, {memory} at the fullest moment"


def _head(pictured: Pictured) -> str:
    found = pictured.estimate
    asked = found.workload
    said = [asked.phase, asked.dtype, f"{asked.attention} attention"]
    said += [f"{asked.optimizer}, recompute {asked.recompute}"] if asked.optimizer else []
    tiles = [
        ("parameters", format_count(found.spec.total_parameters), f"{found.spec.total_parameters:,}"),
        ("at " + say_size(asked), format_count(found.total_flops) + "FLOP", f"{sum(found.matmul.values()):,} in matrix products"),
        ("memory there", format_bytes(found.memory.peak), f"{found.memory.peak:,} bytes at the peak"),
        _last_tile(pictured),
    ]  # fmt: skip
    boxes = "".join(f'<div class="tile"><h2>{_text(a)}</h2><p class="big">{_text(b)}</p><p>{_text(c)}</p></div>\n' for a, b, c in tiles)
    return (
        f'<header>\n<p class="eyebrow">{_text(found.spec.architecture)} · {_text(", ".join(said))}</p>\n<h1>{escape(_headline(pictured))}</h1>\n'
        f'<div class="tiles">\n{boxes}</div>\n</header>\n'
    )


def _last_tile(pictured: Pictured) -> tuple[str, str, str]:
    """Where attention leads; how the figures were found, where that is not known."""
    if not isinstance(pictured.estimate.spec, ModelSpec):
        return (
            "how found",
            pictured.estimate.method,
            ", ".join(f"{name} {label}" for name, label in pictured.estimate.labels.items() if name != "time"),
        )
    if pictured.crossover is None:
        return "attention's square", "never leads", "at no length most FLOPs"
    return "attention's square", f"from {pictured.crossover:,}", "length from which it takes more FLOPs than other products"


def say_size(workload: Workload) -> str:
    new = f" + {workload.new_tokens} new" if workload.new_tokens else ""
    return f"batch {workload.batch_size} × {workload.seq_len}{new}"


def _pictures(pictured: Pictured) -> list[tuple[str, tuple[float, float], Draw]]:
    """Every picture: its title, natural size and drawing."""
    found = [(title, WIDE, draw) for title, draw in _curve_drawings(pictured)] + [(title, MAP_WIDE, draw) for title, draw in _map_drawings(pictured)]
    if pictured.timeline and pictured.timeline.events:
        timeline = pictured.timeline
        found.append((f"Memory over time, {say_size(pictured.estimate.workload)}", WIDE, lambda w, h: timeline_plot(timeline, width=w, height=h)))
        found.append(("What makes the peak", WIDE, lambda w, h: tensor_list(timeline, width=w, height=h)))
    return found


def _curve_drawings(pictured: Pictured) -> list[tuple[str, Draw]]:
    sweep = pictured.sweep
    if len({size for size, _ in sweep.lines("peak")[0].points}) < 2:
        return []
    along = ALONG[sweep.along]
    mark = (pictured.crossover, "attention's square leads from") if pictured.crossover is not None and sweep.along == "seq_len" else None

    def drawing(curves: Curves) -> Draw:
        return lambda width, height: curve_plot(curves, width=width, height=height)

    peak = Curves(title="memory at the peak", along=along, lines=sweep.lines("peak"), say=format_bytes, limit=pictured.memory, mark=mark)
    flops = Curves(title="FLOPs", along=along, lines=sweep.lines("flops"), say=format_count, mark=mark)
    return [(f"Memory against {along}", drawing(peak)), (f"FLOPs against {along}", drawing(flops))]


def _map_drawings(pictured: Pictured) -> list[tuple[str, Draw]]:
    found = pictured.estimate
    first, last = found.workload, max(pictured.sweep.points(), key=lambda point: point["flops"])

    def drawing(shares: Shares, label: str) -> Draw:
        return lambda width, height: treemap(shares, format_count, width=width, height=height, label=label)

    def of_flops(shares: Shares, workload: Workload) -> tuple[str, Draw]:
        total = sum(sum(kinds.values()) for kinds in shares.values())
        return f"FLOPs at {say_size(workload)}: {format_count(total)}", drawing(shares, "FLOPs by module")

    parameters = drawing(parameter_shares(found), "parameters by module")
    drawings = [(f"Parameters: {format_count(found.spec.total_parameters)}", parameters), of_flops(flop_shares(found), first)]
    if isinstance(found.spec, ModelSpec) and (last["seq_len"] > first.seq_len or last["batch_size"] > first.batch_size):
        workload = _resized(first, last)
        drawings.append(of_flops(_forward_shares(found.spec, workload), workload))
    return drawings


def _resized(workload: Workload, point: dict[str, int]) -> Workload:
    return replace(workload, batch_size=point["batch_size"], seq_len=point["seq_len"], new_tokens=point["new_tokens"])


def parameter_shares(estimate: Estimate) -> Shares:
    """Parameters by component and kind of module, a tied tensor where it is stored; by component alone where modules are not known."""
    if not isinstance(estimate.spec, ModelSpec):
        return {component: {component: count} for component, count in estimate.spec.parameters().items()}
    found: dict[str, dict[str, int]] = {}
    for part in estimate.spec.parts:
        _count(found, part.component, module_kind(part.name), part.parameters)
    return found


def flop_shares(estimate: Estimate) -> Shares:
    """FLOPs of the workload's matrix products by component and kind of module."""
    if estimate.program is None:
        assert isinstance(estimate.spec, ModelSpec)
        return _forward_shares(estimate.spec, estimate.workload)
    found: dict[str, dict[str, int]] = {}
    for op, count in estimate.program.ops:
        _count(found, op.component, _module_of(op), op.matmul_flops * count)
    return found


def _module_of(op: Op) -> str:
    """The kind of module of a followed operator, whose name is its module's, `backward` in the backward pass, and its own."""
    return module_kind(op.name.rpartition(".")[0].removesuffix(".backward") or op.name)


def _forward_shares(spec: ModelSpec, workload: Workload) -> Shares:
    times = step_counts(spec, workload.recompute) if workload.phase == "train" else {}
    found: dict[str, dict[str, int]] = {}
    for ops, count in forward_passes(spec, workload):
        for op in ops:
            _count(found, op.component, _product_name(op), op.matmul_flops * count * times.get(op.name, 1))
    return {component: {kind: value // 2 for kind, value in kinds.items()} for component, kinds in found.items()}


def _product_name(op: Op) -> str:
    return f"{module_kind(op.name)}.scores·values" if op.kind == "attention" else module_kind(op.name)


def _count(found: dict[str, dict[str, int]], component: str, kind: str, value: int) -> None:
    if value:
        kinds = found.setdefault(component, {})
        kinds[kind] = kinds.get(kind, 0) + value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(title: str, draw: Draw, wide: tuple[float, float], narrow: tuple[float, float]) -> str:
    return (
        f'<figure><figcaption><b>{_text(title)}</b></figcaption><div class="wide">{draw(*wide)}</div>'
        f'<div class="narrow">{draw(*narrow)}</div></figure>\n'
    )


def _curves(pictured: Pictured) -> str:
    drawings = _curve_drawings(pictured)
    if not drawings:
        return ""
    figures = "".join(_figure(title, draw, WIDE, NARROW) for title, draw in drawings)
    notes = []
    lines = pictured.sweep.lines("peak")
    if len(lines) > MOST_LINES:
        notes.append(f"{MOST_LINES} of {len(lines)} lines are drawn; the others lie between them.")
    if pictured.memory is not None:
        fitting = sum(peak <= pictured.memory for peak in pictured.sweep.figures["peak"].tolist())
        notes.append(f"{fitting:,} of {len(pictured.sweep):,} points fit into {format_bytes(pictured.memory)}.")
    longest = max(pictured.sweep.axes.seq_len)
    if pictured.crossover is not None and pictured.sweep.along == "seq_len" and pictured.crossover > longest:
        notes.append(f"Attention's square takes most FLOPs from length {pictured.crossover:,}, beyond the plot.")
    note = f'<p class="note">{_text(" ".join(notes))}</p>\n' if notes else ""
    return f'<section>\n<h2>Against {ALONG[pictured.sweep.along]}</h2>\n<div class="two">\n{figures}</div>\n{note}</section>\n'


def _maps(pictured: Pictured) -> str:
    drawings = _map_drawings(pictured)
    wide, columns = (MAP_THIRD, "three") if len(drawings) > 2 else (MAP_WIDE, "two")
    figures = "".join(_figure(title, draw, wide, MAP_NARROW) for title, draw in drawings)
    note = "Area is share, FLOPs those of matrix products; one rectangle for a module of all layers, said in full under the pointer."
    body = f'<div class="{columns}">\n{figures}</div>\n<p class="note">{note}</p>\n'
    return f"<section>\n<h2>What has the parameters and the FLOPs</h2>\n{body}</section>\n"


def _time(pictured: Pictured) -> str:
    timeline = pictured.timeline
    if timeline is None or not timeline.events:
        return ""
    figure = _figure(say_size(pictured.estimate.workload), lambda w, h: timeline_plot(timeline, width=w, height=h), TIME_WIDE, TIME_NARROW)
    living = peak_tensors(timeline)
    held = {tensors.kind for tensors in living} | {storage.kind for storage in timeline.storages}
    legend = "".join(
        f'<li><span class="swatch-box k{index}"></span> {_text(_words(kind))}</li>' for index, kind in enumerate(STACK, start=1) if kind in held
    )
    return (
        f'<section>\n<h2>Memory over time</h2>\n<div class="timeline">\n<div>{figure}<ul class="legend">{legend}</ul></div>\n'
        f"<div><h3>What makes the peak</h3>\n{_tensor_table(living)}</div>\n</div>\n</section>\n"
    )


def _tensor_table(living: Iterable[Tensors]) -> str:
    living = list(living)
    total = sum(tensors.bytes for tensors in living)
    rows = []
    for tensors in living[:TENSOR_ROWS]:
        name = f'<code>{_text(tensors.maker).replace(".", ".<wbr>")}</code><p class="small">{_text(tensors.words)}</p>'
        swatch = f'<span class="swatch-box k{STACK.index(tensors.kind) + 1}"></span>' if tensors.kind in STACK else ""
        share = f"<td>{_text(format_bytes(tensors.bytes))}</td><td>{tensors.bytes / total:.1%}</td>"
        rows.append(f"<tr><td>{swatch}</td><td>{name}</td>{share}</tr>")
    others = living[TENSOR_ROWS:]
    if others:
        count, rest = sum(tensors.count for tensors in others), sum(tensors.bytes for tensors in others)
        rows.append(f"<tr><td></td><td>{count:,} others</td><td>{_text(format_bytes(rest))}</td><td>{rest / total:.1%}</td></tr>")
    head = '<tr><th></th><th scope="col">made by</th><th scope="col">bytes</th><th scope="col">share</th></tr>'
    return f'<div class="scroll"><table class="tensors"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _points(pictured: Pictured) -> str:
    sweep = pictured.sweep
    parts = [name for name in ("weights", "gradients", "optimizer", "activations", "kv_cache", "temporary") if sweep.figures[name].any()]
    new = bool(sweep.sizes["new_tokens"].any())
    names = [
        "batch",
        "length",
        *(["new"] if new else []),
        "FLOPs",
        "in products",
        "without masked",
        "peak",
        *(_words(part) for part in parts),
    ]
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    rows = []
    for count, point in enumerate(sweep.points()):
        if count >= TABLE_ROWS:
            break
        over = pictured.memory is not None and point["peak"] > pictured.memory
        cells = [f"{point['batch_size']:,}", f"{point['seq_len']:,}", *([f"{point['new_tokens']:,}"] if new else [])]
        cells += [format_count(point.get(name)) for name in ("flops", "matmul", "matmul_causal")] + [format_bytes(point["peak"])]
        cells += [format_bytes(point[name]) for name in parts]
        style = ' class="over"' if over else ""
        rows.append(f"<tr{style}>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>\n")
    notes = ["In red: more than there is."] if pictured.memory is not None else []
    notes += [f"The first {TABLE_ROWS} of {len(sweep):,} points; --csv and --json have all."] if len(sweep) > TABLE_ROWS else []
    notes += [line[:1].upper() + line[1:] + "." for line in pictured.estimate.assumptions]
    return (
        f"<section>\n<h2>{len(sweep):,} {'point' if len(sweep) == 1 else 'points'}</h2>\n"
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{"".join(rows)}</tbody></table></div>\n<p class="note">{_text(" ".join(notes))}</p>\n</section>\n'
    )
