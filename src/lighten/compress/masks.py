"""Which weights a pruning step keeps, given what each is worth: exact counts, and ties go to the lower index, so that a rerun gives the same mask.

Shape legend: O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lighten.recipe.sparse import kept_weights

COMPARED = 8
"""Neighbours that are ranked by comparing each two; more are sorted. Choice: 8 x 8 comparisons take less time than a stable sort."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How many weights of a matrix stay, and over what they are counted.

    Attributes:
        sparsity: the share that goes; of a pattern, of which it is 1 - n/m, it says nothing more.
        scope: what the share is of: each row, or the whole matrix.
        pattern: (n, m): of each m neighbours in a row n stay; m divides I.
    """

    sparsity: float = 0.0
    scope: Literal["row", "layer"] = "layer"
    pattern: tuple[int, int] | None = None

    def count(self, rows: int, columns: int) -> int:
        """How many weights of a matrix stay."""
        return kept_weights(rows, columns, sparsity=self.sparsity, by_row=self.scope == "row", pattern=self.pattern)

    def mask(self, score: Tensor) -> Tensor:
        """[O, I] bool: the weights of highest score, exactly `count` of them."""
        rows, columns = score.shape
        if self.pattern is not None:
            kept, of = self.pattern
            return _of_neighbours(score.reshape(-1, of), kept).reshape(score.shape)
        if self.scope == "row":
            return keep_largest(score, count=self.count(1, columns))
        return keep_largest(score.reshape(1, -1), count=self.count(rows, columns)).reshape(score.shape)


def keep_largest(score: Tensor, *, count: int) -> Tensor:
    """[O, I] bool: each row's `count` highest scores, neither more nor fewer. Ties go to the lower column, so a rerun gives the same mask."""
    columns = score.shape[1]
    if count == 0 or count == columns:
        return torch.full_like(score, bool(count), dtype=torch.bool)
    least = score.kthvalue(columns - count + 1, dim=1, keepdim=True).values
    above, equal = score > least, score == least
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _of_neighbours(score: Tensor, kept: int) -> Tensor:
    """[N, m] bool: the `kept` highest of each row."""
    of = score.shape[1]
    if of > COMPARED:
        best_first = score.argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, best_first[:, :kept], True)
    before = torch.zeros_like(score, dtype=torch.int8)
    for i in range(of):
        for j in range(of):
            if i != j:
                before[:, i] += (score[:, j] >= score[:, i]) if j < i else (score[:, j] > score[:, i])
    return before < kept
