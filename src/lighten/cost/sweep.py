"""Many sizes at once, and the largest that fits.

Both ask for a workload's figures through one function (`compiled.Exact`), so that they are of whatever answers it: a formula, or a model
that is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lighten.cost.compiled import Axis, Costs, Exact, Figures
from lighten.cost.sizes import FARTHEST, SIZE_NAMES, Axes, SizeName
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Figures at every point: one column a figure, one row a point; the batch changes slowest, the new tokens fastest.

    Attributes:
        sizes: batch_size, seq_len and new_tokens of each point.
        figures: whole numbers, by name.
    """

    axes: Axes
    sizes: Mapping[str, NDArray[Any]]
    figures: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return self.axes.points

    def points(self) -> Iterator[dict[str, int]]:
        """Each point's sizes and figures, as Python's integers."""
        columns = {**self.sizes, **self.figures}
        for row in zip(*(column.tolist() for column in columns.values()), strict=True):
            yield dict(zip(columns, row, strict=True))

    @property
    def along(self) -> SizeName:
        """The size that a plot goes along: the length where there are several, else the size of which there are most."""
        counts = {name: len(getattr(self.axes, name)) for name in SIZE_NAMES}
        return "seq_len" if counts["seq_len"] > 1 else max(SIZE_NAMES, key=lambda name: counts[name])

    def lines(self, figure: str) -> list[Line]:
        """A figure along that size, a line for each combination of the other two."""
        along = SIZE_NAMES.index(self.along)
        shape = tuple(len(getattr(self.axes, name)) for name in SIZE_NAMES)
        places = getattr(self.axes, self.along)
        others = [name for name in SIZE_NAMES if name != self.along]
        values = np.moveaxis(self.figures[figure].reshape(shape), along, -1)
        grid = np.ndindex(*values.shape[:-1])
        return [
            Line(sizes={name: getattr(self.axes, name)[i] for name, i in zip(others, index, strict=True)},
                 points=tuple(sorted(zip(places, values[index].tolist(), strict=True))))
            for index in grid
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """A figure along one size: the other sizes, and (size, value) in order."""

    sizes: Mapping[str, int]
    points: tuple[tuple[int, int], ...]


FiguresAt: TypeAlias = Callable[[Workload, NDArray[Any], NDArray[Any]], Figures]
"""Figures of a workload at batches [b, 1] and lengths [1, n]: arrays [b, n]."""


def sweep(exact: Exact, workload: Workload, axes: Axes) -> Sweep:
    """The figures of a workload at every point, each equal to `exact` there.

    Args:
        workload: what is not swept of it holds at every point.

    Raises:
        WorkloadError: a size that the model does not take.
    """
    axis: Axis = "new_tokens" if len(axes.new_tokens) > len(axes.seq_len) else "seq_len"
    return sweep_by(lambda asked, batch, length: Costs(exact, asked, axis=axis).at(batch, length), workload, axes, axis=axis)


def sweep_by(figures_at: FiguresAt, workload: Workload, axes: Axes, *, axis: Axis = "seq_len") -> Sweep:
    """The figures of a workload at every point, from what gives them for all batches and all lengths of an axis at once."""
    others, lengths = (axes.seq_len, axes.new_tokens) if axis == "new_tokens" else (axes.new_tokens, axes.seq_len)
    batch, length = np.array(axes.batch_size)[:, None], np.array(lengths)[None, :]
    columns = [
        figures_at(replace(workload, seq_len=size) if axis == "new_tokens" else replace(workload, new_tokens=size), batch, length) for size in others
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    where = 1 if axis == "new_tokens" else 2  # [batch, seq_len, new_tokens]
    zeros = np.zeros((len(axes.batch_size), len(lengths)), dtype=np.int64)
    figures = {name: np.stack([column.get(name, zeros) for column in columns], axis=where).ravel() for name in names}
    grids = np.meshgrid(axes.batch_size, axes.seq_len, axes.new_tokens, indexing="ij")
    return Sweep(axes=axes, sizes={name: grid.ravel() for name, grid in zip(SIZE_NAMES, grids, strict=True)}, figures=figures)


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest size that fits.

    Attributes:
        name, value: which size, and how large.
        memory: bytes that there are.
        peak: bytes that it needs.
        next_peak: bytes that one more would need; None where the model takes no more.
        bound_by: what forbids one more: memory, or the model's positions.
    """

    name: SizeName
    value: int
    memory: int
    peak: int
    next_peak: int | None
    bound_by: Literal["memory", "max_position_embeddings"]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "value": self.value, "memory": self.memory, "peak": self.peak, "next_peak": self.next_peak, "bound_by": self.bound_by,
        }  # fmt: skip


def find_largest(exact: Exact, workload: Workload, name: SizeName, memory: int, *, most: int | None = None) -> Largest:
    """The largest batch or length whose peak is at most `memory`, computed directly at it and at one more.

    A larger size never needs less, so the search doubles until it does not fit, then halves.

    Args:
        most: the largest that the model takes.

    Raises:
        WorkloadError: not even 1 fits, or the memory does not depend on it.
    """
    peaks: dict[int, int] = {}

    def peak(value: int) -> int:
        if value not in peaks:
            size: dict[str, Any] = {name: value}
            peaks[value] = exact(replace(workload, **size))["peak"]
        return peaks[value]

    if peak(1) > memory:
        raise WorkloadError(f"no {name} fits: {name}=1 needs {peak(1):,} bytes, and there are {memory:,}.")
    fits, beyond = 1, 0
    while not beyond:
        tried = fits * 2 if most is None else min(fits * 2, most)
        if tried == fits:
            return Largest(name=name, value=fits, memory=memory, peak=peak(fits), next_peak=None, bound_by="max_position_embeddings")
        if tried > FARTHEST:
            raise WorkloadError(f"the memory of this workload does not grow with {name}: {name}={fits:,} needs {peak(fits):,} bytes.")
        if peak(tried) > memory:
            beyond = tried
        else:
            fits = tried
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if peak(middle) <= memory else (fits, middle)
    return Largest(name=name, value=fits, memory=memory, peak=peak(fits), next_peak=peak(beyond), bound_by="memory")


def line_names(lines: Sequence[Line]) -> list[str]:
    """What tells lines apart: the sizes that differ between them, or the batch.

    >>> line_names([Line(sizes={"batch_size": size, "new_tokens": 0}, points=()) for size in (1, 8)])
    ['batch 1', 'batch 8']
    """
    words = {"batch_size": "batch {}", "seq_len": "length {}", "new_tokens": "{} new"}
    names = list(lines[0].sizes)
    differing = [name for name in names if len({line.sizes[name] for line in lines}) > 1] or names[:1]
    return [", ".join(words[name].format(line.sizes[name]) for name in differing) for line in lines]
