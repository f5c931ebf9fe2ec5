"""Measured seconds of single operators, and what lies between the measured sizes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache

from lighten.device.profile import Bandwidth, Sample

NEARNESS = 3
"""Power of the distance (in doublings of each side) in the inverse-distance weights: high enough that the nearest shapes decide
(Shepard 1968, doi:10.1145/800186.810616, uses 2 on the plane)."""


class Curve:
    """Seconds over rows at one shape: straight lines between the measured points in log-log, never falling.

    Beyond the last point seconds grow in proportion to rows; below the first they stay. At a measured point the result is
    what was measured, unless fewer rows took longer, which is noise.
    """

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        ordered = sorted(points)
        self._rows = [math.log(rows) for rows, _ in ordered]
        self._seconds: list[float] = []
        for _, seconds in ordered:
            self._seconds.append(max([math.log(seconds), *self._seconds[-1:]]))

    def log_seconds(self, rows: float) -> float:
        at = math.log(rows)
        right = bisect_right(self._rows, at)
        if right == 0:
            return self._seconds[0]
        if right == len(self._rows):
            return self._seconds[-1] + at - self._rows[-1]
        low, high = self._rows[right - 1], self._rows[right]
        share = (at - low) / (high - low)
        return self._seconds[right - 1] * (1 - share) + self._seconds[right] * share


class RateTable:
    """Seconds of one kind of operator at any rows and shape.

    At a measured shape its curve. Elsewhere, at each measured number of rows, the seconds of the measured shapes, each scaled by a power of the
    ratio of the work (the product of the shape's sides), averaged in log with inverse-distance weights; between them a curve. The power, between
    0 (a product so small that starting it is all) and 1 (in proportion), is the least-squares slope of the measured shapes, near ones first, at those
    rows. No shape is faster, for its work, than the fastest that was measured at as many rows.

    Attributes:
        rows: the numbers of rows at which some shape was measured, in order.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        points: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for sample in samples:
            points.setdefault(sample.shape, []).append((sample.rows, sample.seconds))
        self._curves = {shape: Curve(each) for shape, each in points.items()}
        self.rows = sorted({rows for each in points.values() for rows, _ in each})
        self._between: dict[tuple[int, ...], Curve] = {}

    def seconds(self, rows: float, shape: tuple[int, ...]) -> float:
        return math.exp(self._curve(shape).log_seconds(rows))

    def _curve(self, shape: tuple[int, ...]) -> Curve:
        if shape in self._curves:
            return self._curves[shape]
        if shape not in self._between:
            self._between[shape] = Curve((rows, math.exp(self._interpolated(rows, shape))) for rows in self.rows)
        return self._between[shape]

    def _interpolated(self, rows: int, shape: tuple[int, ...]) -> float:
        """Log seconds."""
        work = _log_work(shape)
        points = [
            (_log_work(known) - work, curve.log_seconds(rows), 1 / _distance(shape, known) ** NEARNESS) for known, curve in self._curves.items()
        ]
        power = _slope(points)
        total = sum(weight * (seconds - power * more) for more, seconds, weight in points)
        return max(total / sum(weight for _, _, weight in points), min(seconds - more for more, seconds, _ in points))


@lru_cache(maxsize=16)
def rate_tables(samples: tuple[Sample, ...]) -> dict[str, RateTable]:
    """Kind of operator → its table."""
    kinds: dict[str, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    return {kind: RateTable(each) for kind, each in kinds.items()}


def bandwidth_at(points: Sequence[Bandwidth], working_set_bytes: float) -> tuple[float, float]:
    """Read and copy bandwidth where threads cycle through so many bytes: straight lines in log-log, level beyond the ends.

    Returns:
        bytes per second read; bytes per second copied, both directions counted.
    """
    at = math.log(max(working_set_bytes, 1.0))
    ordered = sorted(points, key=lambda point: point.working_set_bytes)
    right = bisect_right([math.log(point.working_set_bytes) for point in ordered], at)
    low, high = ordered[max(right - 1, 0)], ordered[min(right, len(ordered) - 1)]
    if low is high:
        return low.read_bytes_per_s, low.copy_bytes_per_s
    share = (at - math.log(low.working_set_bytes)) / (math.log(high.working_set_bytes) - math.log(low.working_set_bytes))
    share = min(max(share, 0.0), 1.0)
    return (
        low.read_bytes_per_s ** (1 - share) * high.read_bytes_per_s**share,
        low.copy_bytes_per_s ** (1 - share) * high.copy_bytes_per_s**share,
    )


def _log_work(shape: tuple[int, ...]) -> float:
    return sum(math.log(side) for side in shape)


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    return math.hypot(*(math.log2(a / b) for a, b in zip(one, other, strict=True)))


def _slope(points: Sequence[tuple[float, float, float]]) -> float:
    """Weighted least-squares slope of (x, y, weight), between 0 and 1; 1 where all x are equal."""
    total = sum(weight for _, _, weight in points)
    middle = sum(weight * x for x, _, weight in points) / total
    scatter = sum(weight * (x - middle) ** 2 for x, _, weight in points)
    if scatter < 1e-9:
        return 1.0
    return min(max(sum(weight * (x - middle) * y for x, y, weight in points) / scatter, 0.0), 1.0)
