"""What the user asks `choose` for, checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lighten.choose.constraints import Constraint, Objective
from lighten.choose.space import Space
from lighten.choose.trial import Rates
from lighten.cost.workload import Workload
from lighten.device.probe import this_machine
from lighten.errors import ConstraintError
from lighten.judge.task import Task
from lighten.judge.text import Text
from lighten.model import ModelSpec
from lighten.recipe import Recipe

TIMEOUT_S = 900.0
"""What one answer of a worker may take."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks `choose` for; see `lighten choose --help`. Without recipes and a space, the space of the model's family is searched."""

    model: Path
    out: Path
    workload: Workload
    require: tuple[str, ...] = ()
    minimize: str | None = None
    maximize: str | None = None
    budget_s: float | None = None
    text: Path | None = None
    task: Path | None = None
    metrics: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    space: Space | None = None
    power_w: float | None = None
    usd_per_hour: float | None = None
    fresh: bool = False
    engine: str = "local"
    ray_address: str | None = None
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory_bytes: int | None = None
    command: str = "lighten choose"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that was checked, and what follows from it."""

    request: Request
    spec: ModelSpec
    constraints: tuple[Constraint, ...]
    objective: Objective
    text: Text
    task: Task | None
    start: float
    log: Log
    metric: str
    rates: Rates


def rates_of(request: Request) -> Rates:
    return Rates(tokens=request.workload.tokens, power_w=request.power_w, usd_per_hour=request.usd_per_hour)


def most_memory() -> int:
    """Nine tenths of this machine's memory."""
    held = this_machine().memory_bytes
    return int(0.9 * held) if held else 2**62


def parse_budget(text: str) -> float:
    """Seconds of a budget such as 20min.

    Raises:
        ConstraintError: no duration, or none that is positive.
    """
    from lighten.units import TIME_UNITS, parse_quantity

    seconds = parse_quantity(text, TIME_UNITS, "budget")
    if seconds <= 0:
        raise ConstraintError(f"budget {text!r} is not positive.")
    return seconds


def parse_power(text: str) -> float:
    """Watts of a power such as 65W.

    Raises:
        ConstraintError: no power, or none that is positive.

    >>> parse_power("65W")
    65.0
    """
    from lighten.units import parse_quantity

    watts = parse_quantity(text, {"W": 1.0, "kW": 1e3}, "power")
    if watts <= 0:
        raise ConstraintError(f"power {text!r} is not positive.")
    return watts
