"""Wanda: a weight is worth its magnitude times the root mean square of its input; the least of each row become 0, the others stay as they are.

Source: Sun et al. 2023 (arXiv:2306.11695), eq. 1.

Shape legend: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lighten.compress.masks import Keep
from lighten.compress.statistics import InputStatistics


def prune_wanda(weights: Mapping[str, Tensor], statistics: InputStatistics, keeps: Mapping[str, Keep]) -> dict[str, Tensor]:
    """All weights that share an input, [O, I] each, with their zeros. With inputs of one size it is magnitude pruning."""
    size = statistics.hessian.diagonal().sqrt()
    return {name: weight * keeps[name].mask(weight.abs() * size) for name, weight in weights.items()}
