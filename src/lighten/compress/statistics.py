"""What calibration saw at one distinct input of a block: second moments over its rows, in float32.

Shape legend: I columns (input features), T rows (tokens) of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Moments of one input x, over calibration rows in the state of the model that the step meets: all earlier layers changed already.

    Attributes:
        hessian: [I, I], the mean of x xᵀ over the rows that codes are chosen on (half of what the papers call the Hessian of the output error).
        held_out: [I, I], the same over rows that only judge a choice; None where there are none.
        cross: [I, I], the mean of (x of the original model) xᵀ, for feedback of earlier layers' error; None where it was not asked for.
        mean_abs: [I], the mean magnitude of each column.
        abs_max: [I], the largest magnitude of each column.
        rows: how many rows were seen in `hessian`.
        held_out_rows: how many in `held_out`.
    """

    hessian: Tensor
    held_out: Tensor | None
    cross: Tensor | None
    mean_abs: Tensor
    abs_max: Tensor
    rows: int
    held_out_rows: int = 0


class Moments:
    """Sums that become `InputStatistics`; rows are added batch by batch, none is kept."""

    def __init__(self, columns: int, *, cross: bool = False) -> None:
        self._sums: dict[str, Tensor] = {"hessian": torch.zeros(columns, columns)}
        if cross:
            self._sums["cross"] = torch.zeros(columns, columns)
        self._rows = {"hessian": 0, "held_out": 0}
        self._abs_sum, self._abs_max = torch.zeros(columns), torch.zeros(columns)

    def add(self, x: Tensor, *, original: Tensor | None = None, held_out: bool = False) -> None:
        """Count the rows of one batch.

        Args:
            x: [..., I].
            original: [..., I], the same rows in the original model.
            held_out: they only judge.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        kind = "held_out" if held_out else "hessian"
        if kind not in self._sums:
            self._sums[kind] = torch.zeros_like(self._sums["hessian"])
        with bfloat16_units(x.dtype == torch.bfloat16):
            _add_upper(self._sums[kind], rows)
        self._rows[kind] += len(rows)
        if held_out or not len(rows):
            return
        if original is not None:
            self._sums["cross"].addmm_(original.detach().reshape(rows.shape).float().T, rows)
        self._abs_sum += rows.abs().sum(0)
        self._abs_max = torch.maximum(self._abs_max, rows.abs().amax(0))

    def finish(self) -> InputStatistics:
        """The means, in the memory of the sums, which are gone then; with no row at all (an expert that no token met) all are zeros."""
        seen, judged, sums = max(self._rows["hessian"], 1), self._rows["held_out"], self._sums
        self._sums = {}
        for kind in ("hessian", "held_out"):
            if kind in sums:
                _mirror(sums[kind])
        return InputStatistics(
            hessian=sums["hessian"].div_(seen), held_out=sums["held_out"].div_(judged) if judged else None,
            cross=sums["cross"].div_(seen) if "cross" in sums else None,
            mean_abs=self._abs_sum / seen, abs_max=self._abs_max, rows=self._rows["hessian"], held_out_rows=judged,
        )  # fmt: skip


JUDGED_ROWS = 128
"""Outputs of a layer that a damping is chosen on: choice, so that trying three costs less than the solution itself."""


def some_rows(weight: Tensor) -> Tensor:
    """At most `JUDGED_ROWS` rows, evenly spread."""
    return weight[torch.linspace(0, len(weight) - 1, min(len(weight), JUDGED_ROWS)).round().long()]


_PIECE = 256  # columns of a sum that are added at once: choice, below it the products of few columns cost more than the triangle saves


def _pieces(columns: int) -> Iterator[slice]:
    return (slice(start, min(start + _PIECE, columns)) for start in range(0, columns, _PIECE))


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the pieces on and above the diagonal; the others are their mirror images."""
    for piece in _pieces(len(total)):
        total[piece, piece.start :].addmm_(rows[:, piece].T, rows[:, piece.start :])


def _mirror(total: Tensor) -> None:
    for piece in _pieces(len(total)):
        total[piece.stop :, piece] = total[piece, piece.stop :].T


@contextmanager
def bfloat16_units(wanted: bool = True) -> Iterator[None]:
    """Float32 matrices are multiplied as bfloat16 values where the machine has units for them, which takes less time
    (benchmarks/solver_choices.py). Of such values the products are exact in float32, of others to three digits."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if not wanted or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
