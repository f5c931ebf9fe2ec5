"""How many zeros each weight gets where a model is to have so many in all: more where they cost less, as a few backward passes tell it.

Setting weights to 0 costs, to second order, in proportion to Σ w² G² over them (`sensitivity.py`); of each weight the cheapest go first. Its cost at
some shares is the choice of a knapsack, solved exactly (`allocate.py`). What a solver makes up for afterwards is taken to be the same share
everywhere.

Source: LeCun et al. 1990 (Optimal Brain Damage), eq. 4 for the cost; the knapsack in place of one threshold is ours.

Shape legend: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lighten.compress.allocate import Choice, allocate
from lighten.compress.sensitivity import Sensitivity
from lighten.model.spec import WeightFormat

STEP, REACH = 0.05, 0.3
"""Shares that are tried lie so far apart, and at most so far from the one that all have on average: choice; a weight that lost nearly all would leave
what second order says."""
_ROWS = 512  # rows whose costs are sorted: choice, as in `sensitivity.py`


def choose_kept(
    sizes: Mapping[str, int], sparsity: float, seen: Mapping[str, Sensitivity], weights: Mapping[str, Sequence[str]], read: Callable[[str], Tensor]
) -> dict[str, int]:
    """How many weights of each matrix stay, by module: `Σ size - round(sparsity · Σ size)` in all.

    Args:
        sizes: module → elements of one of its matrices, of which it has one for each expert.
        weights: module → the names of its matrices, as `seen` has them.
        read: name → [O, I].
    """
    elements = {module: size * len(weights[module]) for module, size in sizes.items()}
    kept = sum(elements.values()) - round(sparsity * sum(elements.values()))
    shares = _shares(sparsity)
    choices: dict[str, list[Choice]] = {}
    for module, size in sizes.items():
        costs = sum((_costs(read(name), seen[name], shares) for name in weights[module]), torch.zeros(len(shares)))
        choices[module] = [
            Choice(format=WeightFormat(sparsity=share), bytes=(size - round(share * size)) * len(weights[module]), error=float(cost))
            for share, cost in zip(shares, costs, strict=True)
        ]
    chosen = {module: choice.bytes // len(weights[module]) for module, choice in allocate(choices, kept).items()}
    return _exactly(chosen, {module: len(names) for module, names in weights.items()}, sizes, kept)


def _shares(sparsity: float) -> list[float]:
    levels = [round(level * STEP, 6) for level in range(1, round(1 / STEP))]
    return sorted({sparsity, *(share for share in levels if abs(share - sparsity) <= REACH + 1e-9)})


def _costs(weight: Tensor, seen: Sensitivity, shares: Sequence[float]) -> Tensor:
    """[shares] the divergence, a position, where so many of the weight's elements become 0."""
    rows = weight[:: -(-len(weight) // _ROWS)].float()
    cheapest = (rows.square() * seen.importance).reshape(-1).sort().values.double().cumsum(0)
    places = torch.tensor([max(0, round(share * len(cheapest)) - 1) for share in shares])
    return (cheapest[places] * (seen.probe_error * len(weight) / len(rows) / max(seen.probe_square, 1e-300))).float()


def _exactly(chosen: Mapping[str, int], copies: Mapping[str, int], sizes: Mapping[str, int], kept: int) -> dict[str, int]:
    """What the knapsack left over, given to the largest matrices that have room for it; fewer than a matrix has copies may remain."""
    found, left = dict(chosen), kept - sum(chosen[module] * copies[module] for module in chosen)
    for module in sorted(found, key=lambda module: (-sizes[module], module)):
        more = min(left // copies[module], sizes[module] - found[module])
        found[module] += more
        left -= more * copies[module]
    return found
