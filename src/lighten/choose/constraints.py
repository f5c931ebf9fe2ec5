"""What the user asks for: `--require "size<=50MB"`, `--require "perplexity<=1.05x"`, `--minimize latency`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighten.errors import ConstraintError
from lighten.units import SIZE_UNITS, TIME_UNITS, parse_quantity

FIGURES: dict[str, tuple[str, dict[str, int] | dict[str, float]]] = {
    "size": ("size_bytes", SIZE_UNITS),
    "memory": ("peak_memory_bytes", SIZE_UNITS),
    "latency": ("latency_s", TIME_UNITS),
}
"""Figure → (its key in a measurement, its units). Smaller is better."""
RATES = {"throughput": "throughput", "speedup": "speedup"}
ENCODER_QUALITY = ("cosine", "rank_agreement", "neighbour_agreement")
DECODER_QUALITY = ("perplexity", "perplexity_ratio", "kl", "top1_agreement")
LOWER_IS_BETTER = {"size", "memory", "latency", "perplexity", "perplexity_ratio", "kl"}
MINIMIZABLE = tuple(FIGURES)

_FORM = re.compile(r"^\s*([A-Za-z_0-9]+)\s*(<=|>=)\s*(\S+(?:\s*[A-Za-z]+)?)\s*$")


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """`figure` at most or at least `limit`, in base units, or times the original's where `relative`."""

    figure: str
    operator: str
    limit: float
    relative: bool
    text: str

    def allows(self, value: float, original: float | None) -> bool | None:
        """Whether a value meets it; None where the original's figure that it is relative to is not known."""
        shortfall = self.shortfall(value, original)
        return None if shortfall is None else shortfall <= 0

    def shortfall(self, value: float, original: float | None) -> float | None:
        """By how much a value misses the limit, as a share of the limit; 0 or less: it does not."""
        limit = self.limit * (original if self.relative and original is not None else 1.0)
        if self.relative and original is None:
            return None
        away = value - limit if self.operator == "<=" else limit - value
        return away / abs(limit) if limit else away


def parse_constraint(text: str, *, decoder: bool) -> Constraint:
    """The constraint that a text says.

    `quality` stands for `neighbour_agreement` of an encoder, and for the original's perplexity over the candidate's of a decoder.

    Raises:
        ConstraintError: another form, an unknown figure, a wrong unit, or a figure that this kind of model does not have.
    """
    found = _FORM.match(text)
    if not found:
        raise ConstraintError(f"constraint {text!r} is not of the form figure<=number or figure>=number, such as size<=50MB.")
    figure, operator, number = found[1], found[2], found[3].replace(" ", "")
    known = figures(decoder=decoder)
    if figure not in known:
        kind = "a decoder" if decoder else "an encoder"
        raise ConstraintError(f"constraint {text!r}: {kind} has no figure {figure!r}; figures: {', '.join(known)}.")
    if (operator == "<=") != (figure in LOWER_IS_BETTER):
        better = "<=" if figure in LOWER_IS_BETTER else ">="
        raise ConstraintError(f"constraint {text!r} would ask for a worse {figure}; write {figure}{better}{number}.")
    relative = number.endswith("x")
    if relative or figure not in FIGURES:
        limit = _plain(number.removesuffix("x"), text)
    else:
        try:
            limit = parse_quantity(number, FIGURES[figure][1], figure)
        except ConstraintError as error:
            raise ConstraintError(f"constraint {text!r}, {error}") from error
    if not math.isfinite(limit):
        raise ConstraintError(f"constraint {text!r}: {number!r} is not a number that anything can be compared with.")
    if relative and limit <= 0:
        raise ConstraintError(f"constraint {text!r}: {number!r} of the original is not positive.")
    return Constraint(figure=figure, operator=operator, limit=limit, relative=relative, text=text)


def figures(*, decoder: bool) -> tuple[str, ...]:
    """The figures that a model of this kind can be held to."""
    return (*FIGURES, *RATES, "quality", *(DECODER_QUALITY if decoder else ENCODER_QUALITY))


def check_minimize(figure: str) -> str:
    """Raises:
    ConstraintError: not a figure to minimize.
    """
    if figure not in MINIMIZABLE:
        raise ConstraintError(f"minimize {figure!r} is not possible; one of {', '.join(MINIMIZABLE)}.")
    return figure


def figure_of(measured: Mapping[str, Any], figure: str) -> float | None:
    """A figure of a measurement (or of a prediction) as its JSON form holds it; None where it holds none."""
    if figure in FIGURES or figure in RATES:
        value = measured.get(FIGURES[figure][0] if figure in FIGURES else RATES[figure])
        return None if value is None else float(value)
    quality: Mapping[str, Any] = measured.get("quality") or {}
    if figure == "quality":
        if "perplexity_ratio" in quality:
            return 1 / float(quality["perplexity_ratio"]["value"])
        figure = "neighbour_agreement"
    return float(quality[figure]["value"]) if figure in quality else None


def _plain(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ConstraintError(f"constraint {text!r}: {number!r} is not a number.") from None
