"""A pruned weight without its zeros: a bit for each weight, and the values of those whose bit is set.

In a safetensors file two tensors stand in the place of `NAME.weight`, a matrix of O rows (output features) and I columns (input features):

    NAME.weight_bitmask   uint8 [O, ⌈I / 8⌉]   row by row, the first column in the lowest bit; bits beyond the last column are 0
    NAME.weight_values    [K]                  the values of the set bits, row by row, in the type that the weight has

and `config.json` says under `sparsity_config` that the format is "bitmask" and each K. What the model keeps as [I, O] is stored as [O, I] too.
Where a weight has fewer values than K, some of its zeros are stored, the first ones. Files are named `sparse…` instead of `model…`, so that a loader
that does not know them says that it finds no weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lighten.errors import ModelError


def pack_bitmask(matrix: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(bits, values) of a matrix [O, I] with `kept` values other than 0 at most."""
    mask = matrix != 0
    spare = kept - int(mask.sum())
    assert spare >= 0, f"{-spare} values more than the step said that it leaves"
    flat = mask.reshape(-1)
    flat |= ~flat & ((~flat).cumsum(0) <= spare)
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits), matrix[mask]


def unpack_bitmask(bits: Tensor, values: Tensor, columns: int, *, name: str) -> Tensor:
    """The matrix [O, I].

    Raises:
        ModelError: there are not as many values as bits.
    """
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little")).bool()
    if int(mask.sum()) != len(values):
        raise ModelError(f"{name}: its bitmask has {int(mask.sum())} bits and there are {len(values)} values.")
    matrix = torch.zeros(mask.shape, dtype=values.dtype)
    matrix[mask] = values
    return matrix
