"""Texts of different lengths in batches: in the order in which they come, or sorted by length, so that little is padding.

padded     batches in the order of the texts, each as wide as its longest
sorted     the same after sorting by length, the longest first; a batch that is not full is where it makes the fewest positions
bucketed   sorted, each batch as wide as the next multiple of `BUCKET`, and of one number of rows: few shapes, for what is compiled by shape
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lighten.cost.workload import Workload
from lighten.recipe.options import Batching

BUCKET = 32
"""Positions that a bucketed batch is rounded up to: four shapes up to 128 positions, each of which torch.compile takes a minute for. Choice."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Texts that are computed at once.

    Attributes:
        places: of the texts among all.
        width: positions of each row, padding among them.
        rows: as many as there are texts, or more, where the first is repeated to fill up.
    """

    places: tuple[int, ...]
    width: int
    rows: int


def make_batches(lengths: Sequence[int], batch_size: int, batching: Batching = "padded", *, most: int | None = None) -> list[Batch]:
    """Every text in one batch.

    Args:
        most: positions that the model has; a bucket is no wider.

    >>> [batch.places for batch in make_batches([3, 9, 4, 8], 2, "sorted")], [batch.places for batch in make_batches([1, 1, 2], 2, "sorted")]
    ([(1, 3), (2, 0)], [(2,), (0, 1)])
    """
    order = list(range(len(lengths)))
    if batching != "padded":
        order.sort(key=lambda place: -lengths[place])  # a stable sort: texts of one length stay in order
    found = []
    for start, end in _bounds([lengths[place] for place in order], batch_size, least=batching == "sorted"):
        places = tuple(order[start:end])
        width, rows = max(lengths[place] for place in places), len(places)
        if batching == "bucketed":
            width, rows = -(-width // BUCKET) * BUCKET, batch_size
            width = min(width, most) if most is not None else width
        found.append(Batch(places=places, width=width, rows=rows))
    return found


def _bounds(lengths: Sequence[int], batch_size: int, *, least: bool) -> list[tuple[int, int]]:
    """Where batches start and end. One that is not full is the last; or, of descending lengths, the one that makes the fewest positions."""
    full, rest = divmod(len(lengths), batch_size)
    short = full
    if least and rest:
        before = list(accumulate((batch_size * lengths[number * batch_size] for number in range(full)), initial=0))
        after = list(accumulate((batch_size * lengths[number * batch_size + rest] for number in range(full)), initial=0))
        short = min(range(full + 1), key=lambda place: before[place] + rest * lengths[place * batch_size] + after[full] - after[place])
    sizes = [batch_size] * short + [rest] * bool(rest) + [batch_size] * (full - short)
    ends = list(accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def dense_workloads(workload: Workload, batching: Batching = "padded", *, most: int | None = None) -> Counter[Workload]:
    """The workloads of one shape that a workload of different lengths is computed as, and how often; itself where all have one length."""
    if not workload.lengths:
        return Counter([workload])
    batches = make_batches(workload.lengths, workload.batch_size, batching, most=most)
    return Counter(replace(workload, batch_size=batch.rows, seq_len=batch.width, lengths=()) for batch in batches)
