"""What all threads together read and copy, by working-set size; numpy releases the interpreter's lock inside both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lighten.device.profile import Bandwidth

WORKING_SETS = tuple(2**power for power in range(16, 29))
"""64 KiB (first-level caches) to 256 MiB (beyond any last-level cache of a desktop)."""
SECONDS, ROUNDS = 0.025, 2


def measure_bandwidth(threads: int) -> list[Bandwidth]:
    """Bandwidth at each working-set size, the set shared out among the threads; of some rounds the best, for neighbours only take from it."""
    with ThreadPoolExecutor(threads) as pool:
        rounds = [[_measure(pool, threads, size) for size in WORKING_SETS] for _ in range(ROUNDS)]
    return [_best(points) for points in zip(*rounds, strict=True)]


def _best(points: Sequence[Bandwidth]) -> Bandwidth:
    return Bandwidth(
        working_set_bytes=points[0].working_set_bytes,
        read_bytes_per_s=max(point.read_bytes_per_s for point in points),
        copy_bytes_per_s=max(point.copy_bytes_per_s for point in points),
    )


def _measure(pool: ThreadPoolExecutor, threads: int, size: int) -> Bandwidth:
    parts = [np.ones(max(size // threads // 4, 1), np.float32) for _ in range(threads)]
    halves = [(part[: len(part) // 2], part[len(part) // 2 : len(part) // 2 * 2]) for part in parts]
    return Bandwidth(
        working_set_bytes=size,
        read_bytes_per_s=sum(pool.map(_read_rate, parts)),
        copy_bytes_per_s=sum(pool.map(lambda pair: _copy_rate(*pair), halves)),
    )


def _read_rate(part: np.ndarray[Any, Any]) -> float:
    return part.nbytes / _fastest(lambda: np.dot(part, part))


def _copy_rate(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> float:
    return 2 * source.nbytes / _fastest(lambda: np.copyto(target, source))


def _fastest(run: Any) -> float:
    """Lower quartile of the seconds of one run."""
    times: list[float] = []
    run()
    end = time.perf_counter() + SECONDS
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[(len(times) - 1) // 4]
