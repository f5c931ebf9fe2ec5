"""Inputs with outliers, and linears that read them, for the tests of what moves scales between layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lighten.compress.awq import Consumer
from lighten.compress.mappings import Channels
from lighten.compress.rtn import quantize_rtn
from lighten.compress.statistics import Moments

COLUMNS = 32


def inputs(*, rows: int = 200, seed: int = 0, outliers: tuple[int, ...] = (3, 17), size: float = 30.0) -> Tensor:
    """[rows, COLUMNS] correlated rows, some columns far larger than the rest."""
    torch.manual_seed(seed)
    x = torch.randn(rows, COLUMNS) @ (torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS))
    x[:, list(outliers)] *= size
    return x


def rounder(bits: int, group_size: int, *, symmetric: bool = True) -> Callable[[Tensor], Tensor]:
    return lambda weight: quantize_rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric).dequantize()


def consumer(
    x: Tensor, *, outputs: int = 24, bits: int = 4, group_size: int = 16, held_out: Tensor | None = None, channel: Tensor | None = None, seed: int = 1
) -> Consumer:
    """A random linear that reads `x`; by default each column is a channel of its own."""
    torch.manual_seed(seed)
    moments = Moments(x.shape[-1])
    moments.add(x)
    if held_out is not None:
        moments.add(held_out, held_out=True)
    end = Channels(name=f"linear{seed}", axis=-1, channel=torch.arange(x.shape[-1]) if channel is None else channel)
    return Consumer(end=end, weight=torch.randn(outputs, x.shape[-1]), statistics=moments.finish(), round_to=rounder(bits, group_size))
