"""Low-rank factors of a weight that keep its outputs, and ranks that share a budget.

For inputs x with second moments H = E[x xᵀ] = L Lᵀ the error of a layer's output is

    E‖(W - U V) x‖² = ‖(W - U V) L‖²_F

which is least, at each rank, where U V L is the truncated singular value decomposition of W L (Eckart and Young 1936): the squares of the singular
values that are left out are what is lost. Source: SVD-LLM (arXiv:2403.07378), section 3.1, whose whitening this is; ASVD (arXiv:2312.05821) scales
channels in its place. H gets a damping, a share of its mean diagonal added to the diagonal, so that L has an inverse. With H a multiple of the
identity the result is plain SVD.

Shape legend: O rows (output features), I columns (input features), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean diagonal of H. Source: GPTQ's (arXiv:2210.17323, section 3.3); on MiniLM at half the parameters a cosine of 0.698 with 0.001
and 0.01, 0.679 with 0.1 (docs/decisions/0025-low-rank.md)."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """U V in the place of a weight.

    Attributes:
        down: V, [R, I].
        up: U, [O, R].
    """

    down: Tensor
    up: Tensor

    @property
    def bits(self) -> int:
        """Width of an element, as of a code."""
        return 8 * self.down.element_size()

    def dequantize(self) -> Tensor:
        """U V, [O, I] float32."""
        return self.up.float() @ self.down.float()


@dataclass(frozen=True, kw_only=True)
class Decomposed:
    """All of W L = P diag(singular) Qᵀ.

    Attributes:
        left: P, [O, min(O, I)].
        singular: [min(O, I)], largest first.
        right: Qᵀ L⁻¹, [min(O, I), I].
    """

    left: Tensor
    singular: Tensor
    right: Tensor

    def factors(self, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
        """The best of a rank. Both have the singular values' roots, so that neither is out of scale where it is quantized."""
        root = self.singular[:rank].sqrt()
        down, up = root[:, None] * self.right[:rank], self.left[:, :rank] * root
        return Factors(down=down.to(dtype).contiguous(), up=up.to(dtype).contiguous())


def decompose(weight: Tensor, root: Tensor | None = None) -> Decomposed:
    """The decomposition whose first ranks are the best factors.

    Args:
        weight: [O, I] float32.
        root: [I, I] float64, L of `whitening`; None: plain SVD.
    """
    if root is None:
        left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
        return Decomposed(left=left, singular=singular, right=right)
    left, singular, whitened = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, whitened, upper=False, left=False)
    return Decomposed(left=left.float(), singular=singular.float(), right=right.float())


def whitening(hessian: Tensor, *, damping: float = DAMPING) -> Tensor:
    """L, [I, I] float64, of the damped second moments [I, I] of an input; the identity where it was never other than 0."""
    moments = hessian.double()
    mean = float(moments.diagonal().mean())
    eye = torch.eye(len(moments), dtype=torch.float64)
    found: Tensor = torch.linalg.cholesky(moments + damping * mean * eye if mean > 0 else eye)
    return found


def energy_rank(singular: Tensor, share: float) -> int:
    """The least rank that keeps a share of the squared singular values; at least 1.

    Args:
        singular: largest first.

    >>> energy_rank(torch.tensor([2.0, 1.0, 1.0]), 0.83), energy_rank(torch.tensor([2.0, 1.0, 1.0]), 0.6)
    (2, 1)
    """
    kept = singular.double().square().cumsum(0)
    return min(len(singular), 1 + int((kept < share * kept[-1]).sum()))


# ranks under a budget


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What a weight's ranks are worth.

    Attributes:
        gains: of rank 1, 2, …, or of so many at once, up to the largest that it may have; none larger than the one before.
        step: parameters of one, O + I, or of so many.
    """

    gains: Sequence[float]
    step: int


def spread_ranks(spectra: Mapping[str, Spectrum], even: Mapping[str, int]) -> dict[str, int]:
    """The ranks of the largest total gain with exactly as many parameters as `even` has, each at least 1.

    Greedy: the largest gain per parameter first, which is best up to the last step. Weights whose ranks have unlike sizes leave a rest then; the last
    choices are taken back and made again so that nothing is left, exactly, as a small knapsack over the sizes. Where the sizes divide each other so
    badly that it grows too large, the budget of each size stays what `even` gives it.

    Args:
        even: ranks that show that the total can be had.
    """
    sizes = sorted({spectrum.step for spectrum in spectra.values()})
    ladders = {size: _ladder({name: each for name, each in spectra.items() if each.step == size}) for size in sizes}
    given = {size: sum(even[name] - 1 for name, each in spectra.items() if each.step == size) for size in sizes}
    total = sum(size * count for size, count in given.items())
    counts = _exact(ladders, _greedy(ladders, total), total) or given
    ranks = dict.fromkeys(spectra, 1)
    for size, count in counts.items():
        for name in ladders[size].names[:count]:
            ranks[name] += 1
    return ranks


@dataclass(frozen=True, kw_only=True)
class _Ladder:
    """The ranks beyond the first of all weights of one size, best first.

    Attributes:
        names: whose the n-th rank is.
        worth: the gain of the first n together, n from 0.
    """

    names: list[str]
    worth: np.ndarray[tuple[int], np.dtype[np.float64]]


def _ladder(spectra: Mapping[str, Spectrum]) -> _Ladder:
    steps = sorted(((-gain, name, rank) for name, each in spectra.items() for rank, gain in enumerate(each.gains[1:])), key=lambda found: found[0])
    return _Ladder(names=[name for _, name, _ in steps], worth=np.cumsum([0.0, *(-gain for gain, _, _ in steps)]))


def _greedy(ladders: Mapping[int, _Ladder], total: int) -> dict[int, int]:
    """How many ranks of each size fit, best first, until one does not."""
    order = sorted(
        ((-gain / size, size) for size, ladder in ladders.items() for gain in np.diff(ladder.worth)), key=lambda found: found[0]
    )  # fmt: skip
    counts, left = dict.fromkeys(ladders, 0), total
    for _, size in order:
        if size > left:
            break
        counts[size] += 1
        left -= size
    return counts


MOST_SUMS = 2_000_000
"""Sums that a knapsack goes through for each size: choice, some seconds. Widths of real models have large common divisors and need thousands."""


def _exact(ladders: Mapping[int, _Ladder], near: Mapping[int, int], total: int) -> dict[int, int] | None:
    """The best counts within reach of some others whose sizes sum to `total`; None where there are none, or too many to go through."""
    unit = math.gcd(*ladders)
    reach = len(ladders) * max(ladders) // unit
    low = {size: max(0, near[size] - reach) for size in ladders}
    spans = {size: min(len(ladder.names), near[size] + reach) - low[size] for size, ladder in ladders.items()}
    rest = (total - sum(size * count for size, count in low.items())) // unit
    if rest > MOST_SUMS or rest * max(spans.values()) > 100 * MOST_SUMS:
        return None
    best = np.full(rest + 1, -np.inf)
    best[0] = 0.0
    taken: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    for size, ladder in ladders.items():
        found, chosen, weight = np.full(rest + 1, -np.inf), np.zeros(rest + 1, np.int64), size // unit
        for count in range(min(spans[size], rest // weight) + 1):
            gain = ladder.worth[low[size] + count] - ladder.worth[low[size]]
            moved = best[: rest + 1 - count * weight] + gain
            better = moved > found[count * weight :]
            found[count * weight :][better] = moved[better]
            chosen[count * weight :][better] = count
        best, taken[size] = found, chosen
    if best[rest] == -np.inf:
        return None
    counts = {}
    for size in reversed(list(ladders)):
        counts[size] = low[size] + int(taken[size][rest])
        rest -= int(taken[size][rest]) * (size // unit)
    return counts
