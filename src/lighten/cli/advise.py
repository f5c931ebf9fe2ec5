"""Which lever helps most on your device: data types, quantization, pruning, caches, batches, plans; each with why and what it costs in quality."""

from __future__ import annotations

import argparse
import textwrap

from lighten import verbs
from lighten.cli.options import add_case, add_device, add_json, add_plan, case_options, positive, print_json
from lighten.recipe.advise import GOALS, MOST_LOSS, Advice, Line
from lighten.recipe.case import Cost
from lighten.recipe.quality import Quality
from lighten.report.table import WIDTH, format_table
from lighten.units import format_bytes, format_seconds

EXAMPLE = """lighten advise .models/smollm2-135m --device l4 --phase decode --seq-len 512 --new-tokens 64
  lighten advise .models/smollm2-135m --device rtx-3060 --phase train --batch-size 8 --seq-len 1024 --goal fits"""
TOP = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format, a config.json, .safetensors or .gguf file, or a hub id")
    add_case(parser)
    add_device(parser)
    add_plan(parser)
    parser.add_argument("--recipe", metavar="TEXT|FILE", help="what the model becomes first; the levers are turned after it")
    parser.add_argument(
        "--goal", metavar="GOAL", help=f"{', '.join(GOALS)} (default: fits where it does not fit or no device is named, else latency)"
    )
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model of the same vocabulary, for speculative decoding")
    parser.add_argument(
        "--most-loss", type=_factor, default=MOST_LOSS, metavar="X", help=f"of perplexity, by levers put together (default {MOST_LOSS}: 10 %% more)"
    )
    parser.add_argument("--top", type=positive, default=TOP, metavar="N", help=f"lines of the table (default {TOP}); --json has all")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    found = verbs.advise(
        arguments.model, device=arguments.device, recipe=arguments.recipe, goal=arguments.goal, draft=arguments.draft,
        most_loss=arguments.most_loss, **case_options(arguments),
    )  # fmt: skip
    print_json(found.as_json()) if arguments.json else print(advice_text(found, arguments.top))
    return 0


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no factor of loss; 1 is none, 1.1 is 10 % more perplexity")
    return value


# ---- the table ----


def advice_text(found: Advice, top: int = TOP) -> str:
    """The advice for people: what it is now, the best levers with their ratios, one line of why each, and what they give together."""
    shown = found.lines[:top]
    figures = ["memory", "FLOPs"] if found.device is None else ["memory", "fits", "a token", "latency", *(["money"] if found.baseline.usd else [])]
    header = ["#", "lever", *figures, "quality"]
    rows: list[list[str]] = []
    for rank, line in enumerate(shown, start=1):
        rows += _rows(str(rank), line, found)
    if found.together is not None:
        rows += _rows("+", found.together, found)
    said = [_headline(found), ""]
    said += [format_table(rows, header)] if rows else ["No lever gains anything here."]
    more = len(found.lines) - len(shown)
    said += [""] + ([f"  {more} more; --top {len(found.lines)} shows them."] if more > 0 else [])
    said += ["  + is several of them together." if found.together is not None else ""]
    if any(not line.lever.done for line in (*shown, *([found.together] if found.together else []))):
        said.append("  * is predicted alone: no command of lighten carries it out yet.")
    said += [f"  · {note}" for note in found.notes]
    return "\n".join(line for number, line in enumerate(said) if line or number == 1)


def _rows(rank: str, line: Line, found: Advice) -> list[list[str]]:
    text = line.lever.text(found.device or "") + ("" if line.lever.done else " *")
    figures = [_ratio(line.memory)]
    if found.device is None:
        figures.append(_ratio(line.flops))
    else:
        figures += [_fits(line.cost), _ratio(line.time), _ratio(line.latency), *([_ratio(line.money)] if found.baseline.usd else [])]
    lever = "\n".join(textwrap.wrap(text, 46, break_long_words=False, break_on_hyphens=False))
    why = textwrap.wrap(line.why, WIDTH - 6, break_on_hyphens=False)
    return [[rank, lever, *figures, _quality(line.quality)], ["", "\n".join(f"  {each}" for each in why)]]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"×{value:.2f}" if value < 99.5 else f"×{value:.0f}"


def _fits(cost: Cost) -> str:
    return {True: "yes", False: "no", None: "-"}[cost.fits]


def _quality(quality: Quality | None) -> str:
    return "not known" if quality is None else str(quality)


def _headline(found: Advice) -> str:
    case, now = found.case, found.baseline
    asked = case.workload
    shape = f"batch {asked.batch_size} × {asked.seq_len}" + (f" + {asked.new_tokens} new" if asked.new_tokens else "")
    said = f"{case.spec.name}, {asked.phase}, {shape}, {asked.dtype}"
    needs = f"needs {format_bytes(now.needed_bytes)}"
    if found.device is None:
        return f"{said}: {needs}. Goal {found.goal}: the least memory first."
    many = f" ({case.plan.devices} of them)" if case.plan.devices > 1 else ""
    of = f" of {format_bytes(now.capacity_bytes)}{'' if now.fits else ', so it does not fit'}" if now.capacity_bytes is not None else ""
    time = f"; {format_seconds(now.time.seconds)}, bound by {now.time.bound_by}" if now.time else "; time is not known"
    money = f"; ${now.usd / now.tokens * 1e6:.3g} a million tokens" if now.usd is not None else ""
    return f"{said}, on {found.device}{many}: {needs}{of}{time}{money}. Goal: {found.goal}."
