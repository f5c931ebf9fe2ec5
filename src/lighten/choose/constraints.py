"""What the user asks for: `--require "size<=50MB"`, `--require "perplexity<=1.05x"`, `--minimize latency`, `--maximize throughput`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lighten.errors import ConstraintError
from lighten.units import SIZE_UNITS, TIME_UNITS, parse_quantity

ENERGY_UNITS = {"mJ": 1e-3, "J": 1.0, "kJ": 1e3, "Wh": 3600.0}
PLAIN = {"": 1.0}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a measurement, and of a prediction where one is made.

    Attributes:
        key: in both.
        lower: whether less is better.
        predicted: whether it is predicted.
        phases: of the workloads that have it; none: of all.
        needs: the option that it cannot be told without.
    """

    key: str
    units: dict[str, float] | dict[str, int] = field(default_factory=lambda: PLAIN)
    lower: bool = True
    predicted: bool = True
    phases: tuple[str, ...] = ()
    needs: str | None = None


FIGURES = {
    "size": Figure(key="size_bytes", units=SIZE_UNITS),
    "memory": Figure(key="peak_memory_bytes", units=SIZE_UNITS),
    "latency": Figure(key="latency_s", units=TIME_UNITS),
    "time_to_first_token": Figure(key="time_to_first_token_s", units=TIME_UNITS, phases=("generate",)),
    "energy": Figure(key="energy_j", units=ENERGY_UNITS, needs="power"),
    "cost": Figure(key="usd_per_million_tokens", needs="price"),
    "throughput": Figure(key="throughput", lower=False),
    "speedup": Figure(key="speedup", lower=False, predicted=False),
}
"""Figure → where it stands. Energy is of one run of the workload, cost in USD per million tokens."""
ENCODER_QUALITY = ("cosine", "rank_agreement", "neighbour_agreement")
DECODER_QUALITY = ("perplexity", "perplexity_ratio", "kl", "top1_agreement")
LOWER_IS_BETTER = {"perplexity", "perplexity_ratio", "kl"} | {name for name, figure in FIGURES.items() if figure.lower}

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


def parse_constraint(text: str, *, decoder: bool, task: Sequence[str] = ()) -> Constraint:
    """The constraint that a text says.

    `quality` stands for `neighbour_agreement` of an encoder, and for the original's perplexity over the candidate's of a decoder.

    Args:
        task: figures of the user's task; beside them it must be said which quality is meant.

    Raises:
        ConstraintError: another form, an unknown figure, a wrong unit, or a figure that this kind of model does not have.
    """
    found = _FORM.match(text)
    if not found:
        raise ConstraintError(f"constraint {text!r} is not of the form figure<=number or figure>=number, such as size<=50MB.")
    figure, operator, number = found[1], found[2], found[3].replace(" ", "")
    known = figures(decoder=decoder, task=task)
    if figure == "quality" and task:
        raise ConstraintError(f"constraint {text!r}: beside a task say which quality: {', '.join((*task, *_agreement(decoder)))}.")
    if figure not in known:
        kind = "a decoder" if decoder else "an encoder"
        raise ConstraintError(f"constraint {text!r}: {kind} has no figure {figure!r}; figures: {', '.join(known)}.")
    if (operator == "<=") != (figure in LOWER_IS_BETTER):
        better = "<=" if figure in LOWER_IS_BETTER else ">="
        raise ConstraintError(f"constraint {text!r} would ask for a worse {figure}; write {figure}{better}{number}.")
    relative = number.endswith("x")
    units = FIGURES[figure].units if figure in FIGURES else PLAIN
    if relative or units is PLAIN:
        limit = _plain(number.removesuffix("x"), text)
    else:
        try:
            limit = parse_quantity(number, units, figure)
        except ConstraintError as error:
            raise ConstraintError(f"constraint {text!r}, {error}") from error
    if not math.isfinite(limit):
        raise ConstraintError(f"constraint {text!r}: {number!r} is not a number that anything can be compared with.")
    if relative and limit <= 0:
        raise ConstraintError(f"constraint {text!r}: {number!r} of the original is not positive.")
    return Constraint(figure=figure, operator=operator, limit=limit, relative=relative, text=text)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The figure that the search is for."""

    figure: str
    lower: bool

    @property
    def verb(self) -> str:
        return "minimize" if self.lower else "maximize"

    def cost(self, measured: Mapping[str, Any] | None) -> float:
        """A figure of a measurement or prediction as one of which less is better; infinite where it is not known.

        >>> Objective(figure="throughput", lower=False).cost({"throughput": 3.0})
        -3.0
        """
        value = figure_of(measured or {}, self.figure)
        return math.inf if value is None else value if self.lower else -value


def parse_objective(minimize: str | None, maximize: str | None, *, decoder: bool, task: Sequence[str] = ()) -> Objective:
    """What `--minimize` or `--maximize` says; the latency where neither does.

    Raises:
        ConstraintError: both, no figure of this kind of model, or the worse end of one.

    >>> parse_objective(None, "throughput", decoder=False)
    Objective(figure='throughput', lower=False)
    """
    if minimize is not None and maximize is not None:
        raise ConstraintError(f"minimize {minimize} and maximize {maximize} are two objectives; leave one out, and require a limit of it.")
    figure, lower = (minimize or "latency", True) if maximize is None else (maximize, False)
    known = [name for name in figures(decoder=decoder, task=task) if (name in LOWER_IS_BETTER) == lower]
    if figure not in known:
        verb = "minimize" if lower else "maximize"
        raise ConstraintError(f"{verb} {figure!r} is not possible; one of {', '.join(known)}.")
    return Objective(figure=figure, lower=lower)


def check_known(names: Iterable[str], *, phase: str, given: Collection[str]) -> None:
    """Raises:
    ConstraintError: a figure that a workload of this phase does not have, or that needs an option which was not given.
    """
    for name in names:
        figure = FIGURES.get(name)
        if figure is None:
            continue
        if figure.phases and phase not in figure.phases:
            raise ConstraintError(f"{name} is a figure of phase {' or '.join(figure.phases)}, not of {phase}.")
        if figure.needs is not None and figure.needs not in given:
            raise ConstraintError(f"{name} is not known without --{figure.needs}; give it.")


def figures(*, decoder: bool, task: Sequence[str] = ()) -> tuple[str, ...]:
    """The figures that a model of this kind can be held to; those of the user's task in the place of `quality`."""
    return (*FIGURES, *(task or ("quality",)), *_agreement(decoder))


def _agreement(decoder: bool) -> tuple[str, ...]:
    return DECODER_QUALITY if decoder else ENCODER_QUALITY


def figure_of(measured: Mapping[str, Any], figure: str) -> float | None:
    """A figure of a measurement (or of a prediction) as its JSON form holds it; None where it holds none."""
    if figure in FIGURES:
        value = measured.get(FIGURES[figure].key)
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
