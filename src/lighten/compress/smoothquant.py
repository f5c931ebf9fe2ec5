"""SmoothQuant: outliers of the activations move into the weights, so that both fit 8 bits.

    s_j = max|x_j|^α / max|w_j|^(1 - α)

Source: Xiao et al. 2022 (arXiv:2211.10438), eq. 4. Deviations: (1) the maximum of |w_j| is taken over all consumers of a mapping, as its
published code does for the three projections of attention; (2) `alpha="auto"` takes for each mapping the α whose simulated output, 8-bit
activations times 8-bit weights, is nearest to the exact one.

Shape legend: T rows (tokens), O rows of a weight, I columns, C channels of a mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lighten.compress.awq import Consumer
from lighten.compress.fake_quant import STATIC_LARGEST, fake_quantize
from lighten.compress.mappings import gather, spread

RoundInputs: TypeAlias = Callable[[Tensor], Tensor]
"""[B, S, I] → the same, rounded by grids of each token."""

ALPHAS = tuple(step / 20 for step in range(20))
"""What "auto" tries, beside no smoothing at all."""
LEAST = 1e-5
"""Maxima below it count as this much. Source: the published code's `smooth.py`."""
ROWS, OUTPUTS = 256, 256
"""Tokens, and at most so many outputs of a consumer, of a simulation: choice."""
DAMPING = 1e-4
"""Share of each second moment that is added to it, so that moments of few rows, summed in float32, have a root: choice."""


def smooth_scales(
    consumers: Sequence[Consumer], channels: int, *, alpha: float | Literal["auto"], round_inputs: RoundInputs | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[C] float32 the scales of a mapping.

    Args:
        alpha: how much of the difficulty moves from the activations to the weights, 0 to 1.
        round_inputs: how "auto" rounds activations; None: by one scale for all.
        rows: [T, I] inputs of the consumers, all the same, to simulate on; None: drawn from a normal distribution with the second moments seen.
    """
    if alpha != "auto":
        return _scales(consumers, channels, alpha)
    drawn: dict[int, Tensor] = {}
    for consumer in consumers:
        if id(consumer.judge) not in drawn:
            drawn[id(consumer.judge)] = _rows(consumer.judge) if rows is None else rows
    steps = [-(-len(consumer.weight) // OUTPUTS) for consumer in consumers]
    sampled = [replace(consumer, weight=consumer.weight[::step]) for consumer, step in zip(consumers, steps, strict=True)]

    def error(scales: Tensor) -> float:
        errors = [simulated_error(consumer, scales, drawn[id(consumer.judge)], round_inputs=round_inputs) for consumer in sampled]
        return sum(step * each for step, each in zip(steps, errors, strict=True))

    return min(_tried(consumers, channels), key=error)


def simulated_error(consumer: Consumer, scales: Tensor, rows: Tensor, *, round_inputs: RoundInputs | None = None) -> float:
    """The squared error of a consumer's output over some rows, its weights rounded by `round_to` and its inputs to 8 bits after smoothing.

    Args:
        scales: [C].
        rows: [T, I], before smoothing.
    """
    along = spread(consumer.end, scales)
    smoothed = rows / along
    if round_inputs is not None:
        rounded = round_inputs(smoothed[:, None])[:, 0]
    else:
        scale = ((consumer.statistics.abs_max / along).max() / STATIC_LARGEST["int"]).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = fake_quantize(smoothed, scale, element="int")
    change = rounded @ consumer.round_to(consumer.weight * along).T - rows @ consumer.weight.T
    return float(change.square().sum())


def _tried(consumers: Sequence[Consumer], channels: int) -> Iterator[Tensor]:
    yield torch.ones(channels)
    yield from map(partial(_scales, consumers, channels), ALPHAS)


def _scales(consumers: Sequence[Consumer], channels: int, alpha: float) -> Tensor:
    inputs = [gather(consumer.end, consumer.statistics.abs_max, channels, how="amax") for consumer in consumers]
    weights = [gather(consumer.end, consumer.weight.abs().amax(0), channels, how="amax") for consumer in consumers]
    x, w = (torch.stack(each).amax(0).clamp(min=LEAST) for each in (inputs, weights))
    return (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=LEAST)


def _rows(moments: Tensor) -> Tensor:
    """[T, I] rows of a normal distribution with these second moments [I, I]; the same each time."""
    size = moments.diagonal().clamp(min=torch.finfo(torch.float32).tiny).double().sqrt()
    even = moments.double() / (size[:, None] * size) + DAMPING * torch.eye(len(moments), dtype=torch.float64)
    drawn = torch.randn(ROWS, len(moments), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root: Tensor = torch.linalg.cholesky(even)
    return (drawn @ root.T * size).float()
