"""What a lever costs in quality: a range of published ratios to the uncompressed model, nothing, or not known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from lighten.model.ggml_types import RECIPE_TYPES
from lighten.model.spec import Attention, ModelSpec
from lighten.recipe.recipe import Step

Measure = Literal["same", "baseline", "perplexity_ratio", "score_ratio"]
UNMEASURED = ("same", "baseline")
COARSEST_GROUP = 128
"""Columns at most of what the published rows call groups (scripts/quality_ranges.py)."""
FARTHEST = 2.0
"""A published range is told of models up to so many times smaller or larger than those it was seen on, for small models lose more: of 2:4 by
Wanda, Llama-2 of 7 B loses a factor of 2.15 in perplexity, of 13 B 1.81, of 70 B 1.65 (locuslab/wanda, README)."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A range of the figure after over the figure before.

    Attributes:
        measure: perplexity_ratio (1 is lossless, more is worse), score_ratio (1 is lossless, less is worse), same (the same function is computed),
            baseline (16-bit weights, against which the published ratios are taken).
        rows: how many published figures it was seen in.
        recalled: how many of them were written down from memory.
    """

    measure: Measure
    low: float = 1.0
    high: float = 1.0
    rows: int = 0
    recalled: int = 0
    sources: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The worst of the range as a factor of loss, 1 where nothing is lost.

        >>> Quality(measure="score_ratio", low=0.5, high=0.9).worst
        2.0
        """
        return 1 / self.low if self.measure == "score_ratio" else self.high

    def __str__(self) -> str:
        """
        >>> str(Quality(measure="perplexity_ratio", low=1.02, high=1.07, rows=7)), str(SAME)
        ('perplexity ×1.02-1.07', 'same')

        A single published row is no range, and is said to be one.
        """
        if self.measure in UNMEASURED:
            return {"same": "same", "baseline": "16 bit"}[self.measure]
        name = self.measure.partition("_")[0]
        ends = list(dict.fromkeys(_digits(value) for value in (self.low, self.high)))
        return f"{name} ×{'-'.join(ends)}" + (" (1 row)" if self.rows == 1 else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure, "low": self.low, "high": self.high, "rows": self.rows, "recalled": self.recalled, "sources": list(self.sources)
        }  # fmt: skip


SAME = Quality(measure="same")
BASELINE = Quality(measure="baseline")


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 2 else f"{value:.4f}" if abs(value - 1) < 0.005 and value != 1 else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One entry of quality_ranges.json."""

    method: str
    bits: int | None
    grouping: str | None
    pattern: str | None
    parameters: tuple[int, int] | None
    quality: Quality

    def is_of(self, spec: ModelSpec) -> bool:
        """Whether it was seen on models like this one: decoders with attention, of about its size."""
        if self.parameters is None or not spec.is_decoder or not any(isinstance(part, Attention) for part in spec.parts):
            return False
        least, most = self.parameters
        return least / FARTHEST <= spec.total_parameters <= most * FARTHEST


@cache
def published() -> tuple[Published, ...]:
    """The published ranges. Source: scripts/quality_ranges.py, which names its rows."""
    document = json.loads((resources.files("lighten.recipe") / "quality_ranges.json").read_text(encoding="utf-8"))
    return tuple(_entry(each) for each in document["ranges"])


def _entry(each: dict[str, Any]) -> Published:
    quality = Quality(
        measure=each["measure"], low=each["low"], high=each["high"], rows=each["n"], recalled=each["recalled"], sources=tuple(each["sources"])
    )
    sizes = tuple(each["parameters"]) if each["parameters"] else None
    return Published(**{name: each[name] for name in ("method", "bits", "grouping", "pattern")}, parameters=sizes, quality=quality)


def quality_of_step(step: Step, spec: ModelSpec) -> Quality | None:
    """What a step costs a model like `spec`; None: not known, for no comparable row is of its method, width or pattern, or of such a model."""
    arguments: dict[str, Any] = dict(step.arguments)
    if arguments.get("targets") or arguments.get("embeddings"):
        return None  # the rows are of all linears, and of them alone
    if step.verb == "prune":
        pattern = arguments.get("pattern") or (None if "sparsity" not in arguments else str(float(arguments["sparsity"])))
        return _widest(spec, step.method, pattern=pattern) if pattern else None
    return _quality_of_quantizing(step, spec, arguments) if step.verb == "quantize" else None


UNPUBLISHED = ("smoothquant", "auto", "dynamic", "static")
"""Methods of `quantize` without a comparable row: int8 activations, and widths that depend on the model."""


def _quality_of_quantizing(step: Step, spec: ModelSpec, arguments: dict[str, Any]) -> Quality | None:
    if step.method == "kv":
        return quality_of_cache(f"int{arguments['bits']}", spec)
    if step.method in UNPUBLISHED or arguments.get("activations", "none") != "none":
        return None
    word = arguments.get("format", "int")
    if word == "int":
        return _widest(spec, step.method, bits=arguments["bits"], grouping=_grouping(arguments.get("group_size")))
    if step.method != "rtn" or word not in RECIPE_TYPES:
        return None  # no comparable row of these floats, nor of other methods on ggml's grids
    if word.endswith("_k"):
        return _widest(spec, "k-quant", bits=arguments["bits"])
    return _widest(spec, "rtn", bits=arguments["bits"], grouping="group")


def quality_of_cache(dtype: str, spec: ModelSpec) -> Quality | None:
    """What cached keys and values in an integer type cost; None: not known."""
    return _widest(spec, "kv_cache", bits=int(dtype.removeprefix("int"))) if dtype.removeprefix("int").isdigit() else None


def together(parts: Iterable[Quality | None]) -> Quality | None:
    """The product of the parts' ranges, as if losses multiplied: nobody measured them together. None where one part is not known, or where
    perplexities would have to be multiplied with scores."""
    found: Quality | None = SAME
    for part in parts:
        found = _both(found, part)
    return found


def _both(one: Quality | None, other: Quality | None) -> Quality | None:
    if one is None or other is None:
        return None
    measures = {one.measure, other.measure} - set(UNMEASURED)
    if len(measures) > 1:
        return None
    plain: Measure = "baseline" if "baseline" in (one.measure, other.measure) else "same"
    return Quality(
        measure=measures.pop() if measures else plain, low=one.low * other.low, high=one.high * other.high,
        rows=min(filter(None, (one.rows, other.rows)), default=0), recalled=max(one.recalled, other.recalled),
        sources=tuple(dict.fromkeys((*one.sources, *other.sources))),
    )  # fmt: skip


def _grouping(group_size: Any) -> str | None:
    if isinstance(group_size, str):
        return group_size
    return None if group_size is None else "group" if group_size <= COARSEST_GROUP else f"group of {group_size}"


def _widest(spec: ModelSpec, method: str, *, bits: int | None = None, grouping: str | None = None, pattern: str | None = None) -> Quality | None:
    """The range of the rows of a method, perplexities before scores; a row that does not say its grouping counts for every one."""
    for measure in ("perplexity_ratio", "score_ratio"):
        found = [
            each.quality for each in published()
            if each.method == method and each.bits == bits and each.pattern == pattern and each.grouping in (None, grouping)
            and each.quality.measure == measure and each.is_of(spec)
        ]  # fmt: skip
        if found:
            return Quality(
                measure=found[0].measure, low=min(each.low for each in found), high=max(each.high for each in found),
                rows=sum(each.rows for each in found), recalled=sum(each.recalled for each in found),
                sources=tuple(sorted({source for each in found for source in each.sources})),
            )  # fmt: skip
    return None
