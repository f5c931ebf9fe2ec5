"""Seconds of calls on a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from statistics import median
from typing import TypeVar

MIN_RUNS, MAX_RUNS = 3, 40
CALM_RUNS = 2
"""Undisturbed runs that make a point trustworthy."""
TICK_S = 200e-6
"""Runs are timed in batches of at least this long, so that reading clocks costs nothing."""
MAX_WAIT_RATIO = 0.2
"""Threads that waited for a core longer than this share of a run were disturbed. Seen beside one busy neighbour on 2 cores: 0.5 to 1.4;
alone, threads wait only where they are woken for a short product."""
LONG_S = 2e-3
"""A call of this length is nearly all parallel products, so that its processor time shared out among the threads is its time."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and whether the runs behind it were undisturbed."""

    seconds: float
    calm: bool


@dataclass(frozen=True)
class _Run:
    wall_s: float
    processor_s: float
    quiet: bool


def involuntary_switches() -> int:
    """How often the system took a core away from a thread of this process so far; 0 where it does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def waited_s() -> float:
    """Seconds that the threads of this process were ready and had no core, together, so far; 0 where the system does not say (not Linux)."""
    total = 0
    for stat in glob("/proc/self/task/*/schedstat"):
        try:
            with open(stat, encoding="ascii") as file:
                total += int(file.read().split()[1])
        except OSError:  # the thread has ended
            continue
    return total / 1e9


def time_call(run: Callable[[], object], *, budget_s: float, threads: int) -> Timing:
    """Seconds of one call, warmed up: the median of the runs during which no other process had a core that we wanted.

    A disturbed run says more about the neighbours than about the call: on a shared machine with 2 cores a 256 × 256 matrix product took 14 ms
    instead of 0.2 ms. With fewer than two undisturbed runs within the budget a long call's time is the processor time that its threads
    used, shared out among them: beside busy neighbours a product whose wall time was 27 to 46 ms gave 12.6 to 13.6 ms so. A short call's is
    its fastest run.
    """
    run()
    inner = max(round(TICK_S / max(_timed(run, 1).wall_s, 1e-8)), 1)
    runs: list[_Run] = []
    end = time.perf_counter() + budget_s
    while len(runs) < MIN_RUNS or (len(runs) < MAX_RUNS and time.perf_counter() < end):
        runs.append(_timed(run, inner))
    calm = [each.wall_s for each in runs if each.quiet]
    if len(calm) >= CALM_RUNS:
        return Timing(median(calm), calm=True)
    fastest = min(each.wall_s for each in runs)
    shared = min(each.processor_s for each in runs) / threads
    return Timing(min(shared, fastest) if shared > LONG_S else fastest, calm=False)


def time_all(runs: Mapping[Key, Callable[[], Callable[[], object]]], *, threads: int, budget_s: float, patience_s: float) -> dict[Key, Timing]:
    """Time each call, then those that were disturbed again and again, all together for at most `patience_s` longer.

    A neighbour's burst of work is over at the next round more often than at the next run.

    Args:
        runs: key → what prepares the call.
        budget_s: time for each call and round, at least `MIN_RUNS` runs.
    """
    found = {key: time_call(prepare(), budget_s=budget_s, threads=threads) for key, prepare in runs.items()}
    end = time.perf_counter() + patience_s
    while True:
        disturbed = [key for key, timing in found.items() if not timing.calm]
        if not disturbed:
            return found
        for key in disturbed:
            if time.perf_counter() > end:
                return found
            found[key] = _better(found[key], time_call(runs[key](), budget_s=budget_s, threads=threads))


def _better(one: Timing, other: Timing) -> Timing:
    if one.calm != other.calm:
        return one if one.calm else other
    return min(one, other, key=lambda timing: timing.seconds)


def _timed(run: Callable[[], object], inner: int) -> _Run:
    switches, waited = involuntary_switches(), waited_s()
    processor = time.process_time()
    start = time.perf_counter()
    for _ in range(inner):
        run()
    wall = time.perf_counter() - start
    processor = time.process_time() - processor
    quiet = involuntary_switches() == switches and waited_s() - waited <= MAX_WAIT_RATIO * wall
    return _Run(wall / inner, processor / inner, quiet)
