"""Read figures and words out of a choice (the content of choice.json), so that the page and the terminal say the same.

A figure that is missing, null or not finite is None here, and "not known" where it is shown.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lighten.errors import ConstraintError
from lighten.units import SIZE_UNITS, TIME_UNITS, format_bytes, format_count, format_seconds, parse_quantity

UNCHANGED = "no change"
"""The name of an empty recipe: the weights as they are, only the runtime is another."""

Record = dict[str, Any]  # a choice, a trial, or a part of one, as JSON has it


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity that is predicted and measured; less of it is better, but where `higher` says that more is."""

    key: str
    title: str
    show: Callable[[float | None], str]
    better: str
    worse: str
    higher: bool = False


QUANTITIES = {
    "size": Quantity(key="size_bytes", title="size on disk", show=format_bytes, better="smaller", worse="bigger"),
    "memory": Quantity(key="peak_memory_bytes", title="peak memory", show=format_bytes, better="less memory", worse="more memory"),
    "latency": Quantity(key="latency_s", title="latency", show=format_seconds, better="faster", worse="slower"),
}


def _plain(unit: str) -> Callable[[float | None], str]:
    return lambda value: "not known" if value is None else f"{value:.3g} {unit}"


OBJECTIVES = QUANTITIES | {
    "time_to_first_token": Quantity(key="time_to_first_token_s", title="time to first token", show=format_seconds, better="sooner", worse="later"),
    "throughput": Quantity(key="throughput", title="throughput", show=_plain("tokens/s"), better="more", worse="less", higher=True),
    "energy": Quantity(key="energy_j", title="energy", show=_plain("J"), better="less energy", worse="more energy"),
    "cost": Quantity(key="usd_per_million_tokens", title="cost", show=_plain("USD/M tokens"), better="cheaper", worse="dearer"),
}
"""What a choice can be for beside quality; the first three are shown of every trial."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measure of quality against the original.

    Attributes:
        higher: whether more is better.
        original: what the original scores against itself, by definition; None: not fixed by definition.
        ends_there: no model can score better than `original`.
        says: its value in words.
    """

    higher: bool
    original: float | None
    ends_there: bool
    says: str


METRICS = {
    "neighbour_agreement": Metric(higher=True, original=1.0, ends_there=True, says="{:.1%} of the texts keep their nearest neighbour"),
    "rank_agreement": Metric(higher=True, original=1.0, ends_there=True, says="rank agreement of similarities {:.3f}"),
    "cosine": Metric(higher=True, original=1.0, ends_there=True, says="mean cosine with the original {:.4f}"),
    "perplexity": Metric(higher=False, original=None, ends_there=False, says="perplexity {:.4g}"),
    "perplexity_ratio": Metric(higher=False, original=1.0, ends_there=False, says="perplexity {:.3f}× the original's"),
    "kl": Metric(higher=False, original=0.0, ends_there=True, says="KL divergence from the original {:.4g}"),
    "top1_agreement": Metric(higher=True, original=1.0, ends_there=True, says="{:.1%} of the next tokens are the original's"),
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A requirement that could be read.

    Attributes:
        figure: the measured figure or the metric that it limits.
        value: where the limit lies, in base units.
        bound: the limit as it was written, such as `<=50MB`.
    """

    figure: str
    at_least: bool
    value: float
    bound: str


def number(record: Any, *path: str) -> float | None:
    """The finite number under `path`, or None.

    >>> number({"measured": {"size_bytes": 5}}, "measured", "size_bytes"), number({"measured": None}, "measured", "size_bytes")
    (5.0, None)
    """
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, bool) or not isinstance(record, int | float) or not abs(record) <= sys.float_info.max:
        return None
    return float(record)


def clean(text: Any) -> str:
    """One line without control characters: a name from a user's file must move neither a terminal's cursor nor a table's columns.

    >>> clean("out of memory\\n  at layer 3\\x1b[2J")
    'out of memory at layer 3?[2J'
    """
    words = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def known(text: Any) -> str:
    """`text` in one line, or "not known" for null and nothing, and for what is neither a word nor a finite number."""
    said = isinstance(text, str | int) or (isinstance(text, float) and math.isfinite(text))
    return clean(text) if said and text != "" else "not known"


def is_measured(trial: Record) -> bool:
    return trial.get("status") == "measured" and bool(trial.get("measured"))


def ordered_trials(choice: Record) -> list[Record]:
    """Every trial: the baseline, then the measured, the best in the objective first, then the failed, then the skipped."""
    wanted = objective(choice)
    place = {"measured": 0, "failed": 1, "skipped": 2}

    def order(trial: Record) -> tuple[int, float]:
        value = number(trial, "measured", wanted.key)
        return place.get(trial.get("status", ""), 1), math.inf if value is None else -value if wanted.higher else value

    baseline = choice.get("baseline")
    return [*([baseline] if baseline else []), *sorted(choice.get("candidates") or [], key=order)]


def objective(choice: Record) -> Quantity:
    """What the choice is for; where that is quality, or the speed-up, the latency, which stands beside quality in plots and tables."""
    return OBJECTIVES.get(choice["objective"], QUANTITIES["latency"])


MANY_SKIPPED = 8
"""More trials that were not carried out than these are counted by reason, and told one by one in `choice.json` and at the page's end."""
_REASONS = (
    ("by proxy", "of too low quality by proxy"), ("no better than", "predicted to be no better"), ("predicted", "predicted to miss a limit"),
    ("budget", "for want of time"), ("not installed", "for want of a runtime"), ("", "for other reasons"),
)  # fmt: skip


def folded(choice: Record) -> tuple[list[Record], list[Record]]:
    """The trials to show one by one, and those that are skipped and too many for it; in the order of `ordered_trials`."""
    trials = ordered_trials(choice)
    skipped = [trial for trial in trials if trial.get("status") == "skipped"]
    if len(skipped) <= MANY_SKIPPED:
        return trials, []
    return [trial for trial in trials if trial.get("status") != "skipped"], skipped


def say_skipped(skipped: Sequence[Record]) -> str:
    """
    >>> say_skipped([{"failure": "predicted latency 5 ms, no better than what was measured"}, {"failure": "quality 0.8 by proxy, required 0.9"}])
    '2 not tried: 1 of too low quality by proxy, 1 predicted to be no better'
    """
    counts: dict[str, int] = {}
    for trial in skipped:
        words = next(words for sign, words in _REASONS if sign in str(trial.get("failure")))
        counts[words] = counts.get(words, 0) + 1
    order = [words for _, words in _REASONS if words in counts]
    return f"{len(skipped)} not tried: " + ", ".join(f"{counts[words]} {words}" for words in order)


def direction(choice: Record) -> str:
    """The better direction of the objective."""
    return "higher" if objective(choice).higher else "lower"


def find_trial(choice: Record, trial_id: Any) -> Record | None:
    return next((trial for trial in ordered_trials(choice) if trial.get("id") == trial_id), None) if trial_id is not None else None


def is_baseline(choice: Record, trial: Record) -> bool:
    return bool(choice.get("baseline")) and trial.get("id") == choice["baseline"].get("id")


def trial_name(choice: Record, trial: Record) -> str:
    """`recipe @ runtime`, with a word where the recipe is empty."""
    recipe = clean(trial.get("recipe") or ("original" if is_baseline(choice, trial) else UNCHANGED))
    return f"{recipe} @ {known(trial.get('runtime'))}"


def short_name(choice: Record, trial: Record, *, at_most: int = 34) -> str:
    """What tells a trial from others in a plot: each step's method and first argument, the runtime and its arguments' values.

    >>> short_name({}, {"id": 1, "recipe": "quantize(rtn, bits=8, group_size=64)", "runtime": "openvino(dtype=bfloat16)"})
    'rtn bits=8 @ openvino bfloat16'
    >>> short_name({}, {"id": 1, "recipe": "", "runtime": "torch-compile(dtype=bfloat16)"})
    'torch-compile bfloat16'
    """
    steps, runtime = trial_name(choice, trial).rsplit(" @ ", 1)
    methods = [" ".join(_arguments(step)[:2]) for step in steps.split(" | ") if step != UNCHANGED]
    runtime = " ".join([runtime.split("(")[0], *(argument.rpartition("=")[2] for argument in _arguments(runtime) if "(" in runtime)])
    return shortened(" @ ".join(filter(None, [" + ".join(methods), runtime])), at_most)


def _arguments(call: str) -> list[str]:
    inner = re.fullmatch(r"[\w.-]+\((.*)\)", call.strip())
    return [part.strip() for part in inner[1].split(",")] if inner else [call.strip()]


def shortened(text: str, at_most: int) -> str:
    return text if len(text) <= at_most else text[: at_most - 1] + "…"


def quality_of(choice: Record, trial: Record, metric: str) -> tuple[float | None, float | None]:
    """Value and standard error; the original's value is known by definition where the metric compares with it."""
    value = number(trial, "measured", "quality", metric, "value")
    error = number(trial, "measured", "quality", metric, "standard_error")
    if value is None and is_baseline(choice, trial) and metric in METRICS:
        return METRICS[metric].original, None
    return value, error


def format_quality(value: float | None, error: float | None = None) -> str:
    """
    >>> format_quality(0.9912, 0.0041), format_quality(0.99871, 0.00012), format_quality(41234.5), format_quality(None)
    ('0.991 ± 0.004', '0.9987 ± 0.0001', '41200', 'not known')
    """
    if value is None:
        return "not known"
    if abs(value) >= 10:  # a perplexity, or a model that broke
        shown = f"{float(f'{value:.3g}'):g}" if abs(value) < 1e6 else f"{value:.2e}"
        return shown if error is None else f"{shown} ± {error:.2g}"
    digits = 4 if error is not None and 0 < error < 0.0005 else 3
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def format_latency(trial: Record) -> str:
    """The measured median and, where known, its quartiles.

    >>> format_latency({"measured": {"latency_s": 0.0851, "latency_q1_s": 0.083, "latency_q3_s": 0.0882}})
    '85.1 ms (83–88.2)'
    """
    median, *quartiles = [number(trial, "measured", key) for key in ("latency_s", "latency_q1_s", "latency_q3_s")]
    if None in quartiles:
        return format_seconds(median)
    texts = [format_seconds(value) for value in (median, *quartiles)]
    if len({text.partition(" ")[2] for text in texts}) == 1:
        texts[1:] = [text.partition(" ")[0] for text in texts[1:]]
    return f"{texts[0]} ({texts[1]}–{texts[2]})"


def format_ratio(ratio: float | None) -> str:
    """
    >>> format_ratio(1.0234), format_ratio(12.34), format_ratio(0.004), format_ratio(None)
    ('1.02', '12.3', '0.004', 'not known')
    """
    if ratio is None:
        return "not known"
    return f"{ratio:.2f}" if 0.05 <= ratio < 9.995 else f"{ratio:.3g}"


def improvement(choice: Record, trial: Record, quantity: Quantity) -> float | None:
    """How many times better than the baseline; of latency the speed-up measured in one run with the baseline, where there is one."""
    speedup = number(trial, "measured", "speedup")
    if quantity.key == "latency_s" and speedup is not None:
        return speedup
    mine, original = number(trial, "measured", quantity.key), number(choice.get("baseline"), "measured", quantity.key)
    if not mine or not original:
        return None
    return mine / original if quantity.higher else original / mine


def say_improvement(factor: float | None, quantity: Quantity) -> str:
    """
    >>> say_improvement(2.4, QUANTITIES["latency"]), say_improvement(0.8, QUANTITIES["size"]), say_improvement(1.0, QUANTITIES["size"])
    ('2.40× faster', '1.25× bigger', 'same size on disk')
    """
    if factor is None:
        return f"{quantity.title} not known"
    if abs(factor - 1) < 0.005:
        return f"same {quantity.title}"
    return f"{factor:.2f}× {quantity.better}" if factor > 1 else f"{1 / factor:.2f}× {quantity.worse}"


def say_model(model: Record) -> str:
    """
    >>> say_model({"name": "MiniLM", "family": "bert", "dtype": "float32", "parameters": 22713216})
    'MiniLM: bert, 22.7 M parameters, float32'
    """
    parameters = format_count(number(model, "parameters"))
    return f"{known(model.get('name'))}: {known(model.get('family'))}, {parameters} parameters, {known(model.get('dtype'))}"


def say_text(text: Record) -> str:
    """
    >>> say_text({"source": "pydoc_data.topics", "calibration_texts": 128, "test_texts": 512})
    'pydoc_data.topics: 128 texts to calibrate, 512 others to judge'
    """
    calibration, test = known(text.get("calibration_texts")), known(text.get("test_texts"))
    return f"{known(text.get('source'))}: {calibration} texts to calibrate, {test} others to judge"


def say_quality(choice: Record, trial: Record) -> str:
    metric = choice["quality_metric"]
    value, error = quality_of(choice, trial, metric)
    if value is None:
        return f"{metric} not known"
    return METRICS[metric].says.format(value) if metric in METRICS else f"{metric} {format_quality(value, error)}"


def say_workload(workload: Record | None) -> str:
    """
    >>> say_workload({"phase": "generate", "batch_size": 1, "seq_len": 512, "new_tokens": 64, "dtype": "float32"})
    'generate 64 new tokens after 1 × 512, float32'
    """
    workload = workload or {}
    sizes = f"{known(workload.get('batch_size'))} × {known(workload.get('seq_len'))} tokens"
    if workload.get("lengths"):
        sizes = f"{len(workload['lengths'])} texts of {known(workload.get('seq_len'))} tokens at most, {known(workload.get('batch_size'))} at once"
    if workload.get("new_tokens"):
        sizes = f"{workload['new_tokens']} new tokens after {sizes.removesuffix(' tokens')}"
    return f"{known(workload.get('phase'))} {sizes}, {known(workload.get('dtype'))}"


def say_verdict(trial: Record | None) -> str:
    """
    >>> say_verdict({"meets": True}), say_verdict({"meets": None})
    ('All requirements hold', 'Not known whether the requirements hold')
    """
    meets = (trial or {}).get("meets")
    if meets is None:
        return "Not known whether the requirements hold"
    return "All requirements hold" if meets else "The requirements do not all hold"


def read_limit(requirement: str, quality_metric: str) -> Limit | None:
    """The limit that a requirement sets; None where its form is not one of those that a page can draw (it is then shown as text alone).

    Whether a trial meets it is the trial's `meets`, never decided here.

    >>> read_limit("size<=50MB", "cosine")
    Limit(figure='size_bytes', at_least=False, value=50000000.0, bound='<=50MB')
    >>> read_limit("perplexity<=1.05x", "perplexity_ratio").figure
    'perplexity_ratio'
    """
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=<|=>)\s*(.+?)\s*", requirement)
    if not found:
        return None
    name, sign, text = found.groups()
    at_least = ">" in sign
    units: dict[str, float] | dict[str, int] = {"": 1.0, "x": 1.0}
    if name in QUANTITIES:
        units = TIME_UNITS if name == "latency" else SIZE_UNITS
    try:
        value = parse_quantity(text.removesuffix("%"), units, name) * (0.01 if text.endswith("%") else 1)
    except ConstraintError:
        return None
    figures = {"quality": quality_metric} | {short: quantity.key for short, quantity in QUANTITIES.items()}
    if text.endswith("x"):
        figures["perplexity"] = "perplexity_ratio"
    return Limit(figure=figures.get(name, name), at_least=at_least, value=value, bound=sign + text)


def _of_original(choice: Record, limit: Limit | None) -> Limit | None:
    """A limit times the original's figure of a task, where it is one; None where that is not known."""
    if limit is None or not limit.bound.endswith("x") or limit.figure in METRICS:
        return limit
    original = quality_of(choice, choice.get("baseline") or {}, limit.figure)[0]
    return None if original is None else replace(limit, value=limit.value * original)


def limits_on(choice: Record, figure: str) -> list[tuple[str, Limit]]:
    """The requirements on one figure: their text and their limit."""
    read = [(clean(text), _of_original(choice, read_limit(str(text), choice["quality_metric"]))) for text in choice.get("require") or []]
    return [(text, limit) for text, limit in read if limit is not None and limit.figure == figure]


def say_measured(choice: Record, trial: Record, limit: Limit) -> str:
    """A trial's measured figure beside a limit, and whether chance could have decided."""
    for quantity in QUANTITIES.values():
        if limit.figure == quantity.key:
            return quantity.show(number(trial, "measured", quantity.key))
    if limit.figure in ("speedup", "throughput"):
        return format_quality(number(trial, "measured", limit.figure))
    value, error = quality_of(choice, trial, limit.figure)
    shown = format_quality(value, error)
    if value is None or not error or abs(value - limit.value) >= 2 * error:
        return shown
    return f"{shown}, only {abs(value - limit.value) / error:.1f} standard errors from the limit"


def within_range(choice: Record) -> tuple[int, int]:
    """Of how many trials with a predicted range of latency the measured latency lies in it: (in range, all)."""
    inside = [
        low <= value <= high
        for trial in ordered_trials(choice)
        if (low := number(trial, "predicted", "latency_low_s")) is not None
        and (high := number(trial, "predicted", "latency_high_s")) is not None
        and (value := number(trial, "measured", "latency_s")) is not None
    ]
    return sum(inside), len(inside)
