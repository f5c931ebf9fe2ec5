"""Seconds of calls on a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

MIN_RUNS, MAX_RUNS = 3, 40
CALM_RUNS = 2
"""Undisturbed runs that make a point trustworthy."""
TICK_S = 100e-6
"""Runs are timed in batches of at least this long, so that reading the clock costs nothing."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and whether the runs behind it were undisturbed."""

    seconds: float
    calm: bool


def involuntary_switches() -> int:
    """How often the system took a core away from a thread of this process so far; 0 where it does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def time_call(run: Callable[[], object], *, budget_s: float) -> Timing:
    """Seconds of one call, warmed up: the median of the runs during which the system took no core away from us.

    A disturbed run says more about the neighbours than about the call: on a shared machine with 2 cores a 256 × 256 matrix product took 14 ms
    instead of 0.2 ms. With fewer than two undisturbed runs within the budget it is the fastest run.
    """
    run()
    first, _ = _timed(run, 1)
    inner = max(round(TICK_S / max(first, 1e-8)), 1) if first < TICK_S else 1
    calm: list[float] = []
    fastest = float("inf")
    end = time.perf_counter() + budget_s
    for count in range(1, MAX_RUNS + 1):
        seconds, quiet = _timed(run, inner)
        fastest = min(fastest, seconds)
        if quiet:
            calm.append(seconds)
        if count >= MIN_RUNS and time.perf_counter() > end:
            break
    if len(calm) >= CALM_RUNS:
        return Timing(median(calm), calm=True)
    return Timing(fastest, calm=False)


def time_all(runs: Mapping[Key, Callable[[], Callable[[], object]]], *, budget_s: float, patience_s: float) -> dict[Key, Timing]:
    """Time each call, then those that were disturbed again and again, all together for at most `patience_s` longer.

    A neighbour's burst of work is over at the next round more often than at the next run.

    Args:
        runs: key → what prepares the call.
        budget_s: time for each call and round, at least `MIN_RUNS` runs.
    """
    found = {key: time_call(prepare(), budget_s=budget_s) for key, prepare in runs.items()}
    end = time.perf_counter() + patience_s
    while True:
        disturbed = [key for key, timing in found.items() if not timing.calm]
        if not disturbed:
            return found
        for key in disturbed:
            if time.perf_counter() > end:
                return found
            found[key] = _better(found[key], time_call(runs[key](), budget_s=budget_s))


def _better(one: Timing, other: Timing) -> Timing:
    if one.calm != other.calm:
        return one if one.calm else other
    return min(one, other, key=lambda timing: timing.seconds)


def _timed(run: Callable[[], object], inner: int) -> tuple[float, bool]:
    before = involuntary_switches()
    start = time.perf_counter()
    for _ in range(inner):
        run()
    seconds = (time.perf_counter() - start) / inner
    return seconds, involuntary_switches() == before
