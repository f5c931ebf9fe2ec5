"""AWQ: input channels that carry large activations are scaled up before their weights are rounded, and the producer is scaled down.

For each mapping one s = mean|x|^α, normalized so that its extremes are 1/k and k; α is the value of a grid with the least output error of
all consumers, rounded in their own formats. α = 0 is on the grid, so the error on the judging rows is never larger than without scales.

Source: Lin et al. 2023 (arXiv:2306.00978), eq. 4 and 5; the grid of 20, the normalization and the clipping to at least half of a group's
range are those of its published code. Deviations: (1) the error is taken from the second moments of the input, tr(ΔW H ΔWᵀ), which is the
squared error of a linear's output over all calibration rows, and not of a block's output over a sample; (2) rows that were not used for
the means judge where there are any; (3) what a mapping is comes from the traced graph; (4) beside mean|x|^α its quotient with the
consumers' mean|w|^(1 - α) is tried (`duo`), as llm-compressor does.

Shape legend: O rows (output features), I columns (input features), C channels of a mapping, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lighten.compress.grid import to_groups
from lighten.compress.mappings import Channels, gather, spread
from lighten.compress.statistics import InputStatistics

Rounder: TypeAlias = Callable[[Tensor], Tensor]
"""[O, I] float32 → what its format makes of it, [O, I] float32."""

GRID = 20
"""Values of α, 0 to 0.95. Source: llm-awq's `auto_scale.py`."""
LEAST = 1e-4
"""Means below it count as this much. Source: the same."""
SMALLEST_RANGE, RANGES = 0.5, 10
"""Clipping keeps at least this share of a group's range, found in so many steps. Source: llm-awq's `auto_clip.py` (half of 20 steps of 5 %)."""


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear that reads the channels of a mapping.

    Attributes:
        end: its columns in the mapping.
        weight: [O, I] float32.
        statistics: of its input.
        round_to: what its format makes of a weight.
    """

    end: Channels
    weight: Tensor
    statistics: InputStatistics
    round_to: Rounder

    @property
    def judge(self) -> Tensor:
        """[I, I] the second moments by which choices are judged."""
        held_out = self.statistics.held_out
        return self.statistics.hessian if held_out is None else held_out


def search_scales(consumers: Sequence[Consumer], channels: int, *, duo: bool = True) -> Tensor:
    """[C] float32 the scales of a mapping with the least summed output error of its consumers; all 1 where no other does better.

    Args:
        channels: how many the mapping has.
        duo: try mean|x|^α / mean|w|^(1 - α) too.
    """
    best, least = torch.ones(channels), sum(scaled_error(consumer, torch.ones(channels)) for consumer in consumers)
    for scales in _candidates(consumers, channels, duo=duo):
        error = 0.0
        for consumer in consumers:
            error += scaled_error(consumer, scales)
            if error >= least:
                break
        else:
            best, least = scales, error
    return best


def scaled_error(consumer: Consumer, scales: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) of a consumer whose columns are rounded while multiplied by their channels' scales."""
    along = spread(consumer.end, scales)
    change = consumer.round_to(consumer.weight * along) / along - consumer.weight
    return float(((change @ consumer.judge) * change).sum())


def clip(weight: Tensor, *, hessian: Tensor, group_size: int, round_to: Rounder) -> Tensor:
    """[O, I] the weight with each group cut to the range, from all of it down to half, that leaves the least error of its part of the output.

    Args:
        hessian: [I, I]; only its blocks along the diagonal count, one a group.
        group_size: columns of a scale, or `PER_CHANNEL`, `PER_TENSOR`.
    """
    groups = to_groups(weight, group_size)
    extent = groups.abs().amax(-1, keepdim=True)
    best, least = groups.clone(), torch.full_like(extent, torch.inf)
    for step in range(RANGES):
        share = 1 - (1 - SMALLEST_RANGE) * step / RANGES
        cut = groups.clamp(-share * extent, share * extent)
        error = _group_errors(round_to(cut.reshape(weight.shape)) - weight, hessian, group_size).reshape(extent.shape)
        best, least = torch.where(error < least, cut, best), torch.minimum(error, least)
    return best.reshape(weight.shape)


def _candidates(consumers: Sequence[Consumer], channels: int, *, duo: bool) -> Iterator[Tensor]:
    seen = _means(consumers, channels, [consumer.statistics.mean_abs for consumer in consumers])
    weights = _means(consumers, channels, [consumer.weight.abs().mean(0) for consumer in consumers]) if duo else None
    for step in range(GRID):
        power = seen.pow(step / GRID)
        if step:
            yield _normalized(power)
        if weights is not None:
            yield _normalized(power / weights.pow(1 - step / GRID))


def _means(consumers: Sequence[Consumer], channels: int, values: Sequence[Tensor]) -> Tensor:
    """[C] the mean over consumers, each by the rows that it met; at least `LEAST`."""
    rows = [max(consumer.statistics.rows, 1) for consumer in consumers]
    parts = [gather(consumer.end, each, channels, how="mean") * count for consumer, each, count in zip(consumers, values, rows, strict=True)]
    return (torch.stack(parts).sum(0) / sum(rows)).clamp(min=LEAST)


def _normalized(scales: Tensor) -> Tensor:
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(min=LEAST)


def _group_errors(change: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """[O, G] (or [1, 1]) each group's change under its block of the second moments."""
    groups = to_groups(change, group_size)
    if groups.shape[:2] == (1, 1) and len(change) > 1:
        return ((change @ hessian) * change).sum().reshape(1, 1)
    size = groups.shape[-1]
    blocks = hessian.reshape(groups.shape[1], size, groups.shape[1], size).diagonal(dim1=0, dim2=2)  # [columns, columns, G]
    return torch.einsum("ogi,ijg,ogj->og", groups, blocks, groups)
