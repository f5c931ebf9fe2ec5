"""Seconds of calls on a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from statistics import median
from typing import TypeVar

MIN_RUNS, MAX_RUNS = 2, 40
CALM_RUNS = 2
"""Undisturbed runs that make a point trustworthy."""
ONE_ROUND_S = 1.0
"""A call of this length is its own average over the machine's moods."""
TICK_S = 200e-6
"""Runs are timed in batches of at least this long, so that reading clocks costs nothing."""
MAX_WAIT_RATIO, LONG_WAIT_RATIO = 0.2, 0.03
"""Threads that waited for a core longer than this share of a short run, or of a long one, were disturbed. Seen beside one busy neighbour on
2 cores: 0.5 to 1.4; alone, threads wait only where they are woken for a short product."""
LONG_S = 0.02
"""Some ten time slices: in a run of this length the system's own threads take a core now and then, and by what is told of the waiting, it can be
taken off."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and whether the runs behind it were undisturbed."""

    seconds: float
    calm: bool


@dataclass(frozen=True)
class _Run:
    """One batch of calls: seconds of one of them. `waited_s` is None where the system does not say."""

    wall_s: float
    processor_s: float
    waited_s: float | None
    quiet: bool

    def undisturbed_s(self, threads: int) -> float:
        """What the call takes without waiting.

        A thread that waits holds all others up at the end of its product: what is left of the wall time without all waiting, and no less than
        the processor time shared out among the threads, for threads may have waited at the same moment.
        """
        if self.waited_s is None:
            return min(self.wall_s, self.processor_s / threads if self.wall_s > LONG_S else self.wall_s)
        return min(self.wall_s, max(self.wall_s - self.waited_s, self.processor_s / threads))


def involuntary_switches() -> int:
    """How often the system took a core away from a thread of this process so far; 0 where it does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def waited_s() -> float | None:
    """Seconds that the threads of this process were ready and had no core, together, so far; None where the system does not say (not Linux)."""
    stats = glob("/proc/self/task/*/schedstat")
    total = 0
    for stat in stats:
        try:
            with open(stat, encoding="ascii") as file:
                total += int(file.read().split()[1])
        except OSError:  # the thread has ended
            continue
    return total / 1e9 if stats else None


def time_call(run: Callable[[], object], *, budget_s: float, threads: int) -> Timing:
    """Seconds of one call, warmed up: the median of the runs during which no other process had a core that we wanted.

    A disturbed run says more about the neighbours than about the call: on a shared machine with 2 cores a 256 × 256 matrix product took 14 ms
    instead of 0.2 ms. With fewer than two undisturbed runs within the budget the time is the shortest that a run takes without its waiting.
    """
    run()
    first = _timed(run, 1)
    inner = max(round(TICK_S / max(first.wall_s, 1e-8)), 1)
    runs: list[_Run] = [first] if inner == 1 else []
    end = time.perf_counter() + budget_s
    while len(runs) < MIN_RUNS or (len(runs) < MAX_RUNS and time.perf_counter() < end):
        runs.append(_timed(run, inner))
    calm = [_calm_s(each) for each in runs if each.quiet]
    if len(calm) >= CALM_RUNS:
        return Timing(median(calm), calm=True)
    return Timing(min(each.undisturbed_s(threads) for each in runs), calm=False)


def time_all(runs: Mapping[Key, Callable[[], Callable[[], object]]], *, threads: int, budget_s: float, patience_s: float) -> dict[Key, Timing]:
    """Time each call in two rounds, then those that were disturbed again and again, all together for at most `patience_s` longer.

    A neighbour's burst of work is over at the next round more often than at the next run; one on the same processor outside of this virtual
    machine, which no figure in here tells of, was seen to make all calls take 1.5 times as long for some seconds: of two rounds the shorter counts.

    Args:
        runs: key → what prepares the call.
        budget_s: time for each call and round, at least `MIN_RUNS` runs; a call that takes longer than `ONE_ROUND_S` has one round.
    """
    found = {key: time_call(prepare(), budget_s=budget_s, threads=threads) for key, prepare in runs.items()}
    for key, prepare in runs.items():
        if found[key].seconds < ONE_ROUND_S:
            found[key] = _better(found[key], time_call(prepare(), budget_s=budget_s, threads=threads))
    end = time.perf_counter() + patience_s
    while True:
        disturbed = [key for key, timing in found.items() if not timing.calm]
        if not disturbed:
            return found
        for key in sorted(disturbed, key=lambda key: found[key].seconds):  # the shorter, the likelier is a moment without neighbours
            if time.perf_counter() > end:
                return found
            found[key] = _better(found[key], time_call(runs[key](), budget_s=budget_s, threads=threads))


def _better(one: Timing, other: Timing) -> Timing:
    if one.calm != other.calm:
        return one if one.calm else other
    return min(one, other, key=lambda timing: timing.seconds)


def _timed(run: Callable[[], object], inner: int) -> _Run:
    switches, before = involuntary_switches(), waited_s()
    processor = time.process_time()
    start = time.perf_counter()
    for _ in range(inner):
        run()
    wall = time.perf_counter() - start
    processor = time.process_time() - processor
    after = waited_s()
    waited = None if before is None or after is None else after - before
    quiet = _is_quiet(wall, waited, switched=involuntary_switches() != switches)
    return _Run(wall / inner, processor / inner, None if waited is None else waited / inner, quiet)


def _is_quiet(wall: float, waited: float | None, *, switched: bool) -> bool:
    if waited is None or wall < LONG_S:
        return not switched and (waited or 0.0) <= MAX_WAIT_RATIO * wall
    return waited <= LONG_WAIT_RATIO * wall


def _calm_s(run: _Run) -> float:
    """Of a long run the little waiting is taken off; of a short one it is the waking of threads, which every call pays."""
    return run.wall_s - (run.waited_s or 0.0) if run.wall_s >= LONG_S else run.wall_s
