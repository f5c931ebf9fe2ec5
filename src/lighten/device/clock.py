"""Seconds of a call on a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median


def involuntary_switches() -> int:
    """How often the system took a core away from a thread of this process so far; 0 where it does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass
class Clock:
    """Times calls, and runs those again that were disturbed.

    A run during which the system took a core away from us is disturbed: it says more about the neighbours than about the call. On a shared
    machine with 2 cores such runs of a 256 × 256 matrix product took 14 ms instead of 0.2 ms. The result is the median of the undisturbed
    runs; where there are fewer than two even after `patience_s`, the fastest run, and the point is counted in `disturbed`.

    Attributes:
        point_s: time given to each point; a short one is run often, a long one `min_runs` times.
        patience_s: time that all points together may take beyond that, waiting for undisturbed runs.
        tick_s: runs are timed in batches of at least this long, so that reading the clock costs nothing.
    """

    point_s: float = 0.03
    patience_s: float = 6.0
    tick_s: float = 100e-6
    min_runs: int = 3
    max_runs: int = 40
    max_extension: float = 12.0
    points: int = field(default=0, init=False)
    disturbed: int = field(default=0, init=False)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one call, warmed up."""
        run()
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        inner = round(self.tick_s / max(first, 1e-8)) if first < self.tick_s else 1
        calm, all_runs = self._collect(run, max(inner, 1), max(self.point_s, self.min_runs * first))
        self.points += 1
        if len(calm) >= 2:
            return median(calm)
        self.disturbed += 1
        return min(all_runs)

    def _collect(self, run: Callable[[], object], inner: int, budget_s: float) -> tuple[list[float], list[float]]:
        calm: list[float] = []
        all_runs: list[float] = []
        start = time.perf_counter()
        while True:
            seconds, quiet = _timed(run, inner)
            all_runs.append(seconds)
            if quiet:
                calm.append(seconds)
            spent = time.perf_counter() - start
            enough = len(all_runs) >= self.min_runs and (spent >= budget_s or len(all_runs) >= self.max_runs)
            if enough and (len(calm) >= 2 or spent - budget_s > min(self.patience_s, self.max_extension * budget_s)):
                self.patience_s -= max(spent - budget_s, 0.0)
                return calm, all_runs


def _timed(run: Callable[[], object], inner: int) -> tuple[float, bool]:
    before = involuntary_switches()
    start = time.perf_counter()
    for _ in range(inner):
        run()
    seconds = (time.perf_counter() - start) / inner
    return seconds, involuntary_switches() == before
