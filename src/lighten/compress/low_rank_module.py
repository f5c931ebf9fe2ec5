"""A module's linears exchanged for two of low rank, or with two more beside them, as a config says.

Shape legend: O rows (output features), I columns (input features), R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import UnsupportedFamily
from lighten.model.low_rank import CORRECTION, RANKS


class LowRank(nn.Module):
    """y = U (V x) + b in the place of a linear."""

    def __init__(self, columns: int, rows: int, rank: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.down = nn.Linear(columns, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, rows, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(self.down(x))
        return found

    @property
    def weight(self) -> Tensor:
        """U V, [O, I], for code that looks at a linear's weight; not a product that a walk over the model's inputs would take for one with them."""
        return torch.einsum("or,ri->oi", self.up.weight, self.down.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias


def put_low_rank(module: Any, config: Mapping[str, Any]) -> None:
    """Change a module, of which no weight is looked at: new linears have memory where the old ones have it, and no values that mean anything.

    Names in the config are the checkpoint's; those that the module has no part of, such as a head that it is built without, are passed over.

    Raises:
        UnsupportedFamily: a weight that the class keeps in one tensor with others.
    """
    for name, rank in config.get(RANKS, {}).items():
        if (path := _path_of(module, name)) is not None:
            old = module.get_submodule(path)
            rows, columns = _shape(old)
            with torch.device(old.weight.device):
                module.set_submodule(path, LowRank(columns, rows, rank, bias=old.bias is not None, dtype=old.weight.dtype).eval())
    for name, rank in config.get(CORRECTION, {}).items():
        if (path := _path_of(module, name)) is not None:
            old = module.get_submodule(path)
            rows, columns = _shape(old)
            with torch.device(old.weight.device):
                old.lora_A = nn.Linear(columns, rank, bias=False, dtype=old.weight.dtype)
                old.lora_B = nn.Linear(rank, rows, bias=False, dtype=old.weight.dtype)
            old.register_forward_hook(_corrected)


def _corrected(linear: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    found: Tensor = output + linear.lora_B(linear.lora_A(inputs[0]))
    return found


def _path_of(module: Any, name: str) -> str | None:
    """Where the linear of a checkpoint's name is in a module.

    Raises:
        UnsupportedFamily: in one tensor with others.
    """
    from lighten.compress.skeleton import find_places

    try:
        place = find_places(module, {f"{name}.weight": (1, 1)}).get(f"{name}.weight")
    except (UnsupportedFamily, RuntimeError, ValueError) as error:
        raise UnsupportedFamily(f"{name} cannot be factorized: {type(module).__name__} keeps it in one tensor with others.") from error
    if place is None:
        return None
    if place.region is not None or not place.key.endswith(".weight"):
        raise UnsupportedFamily(f"{name} cannot be factorized: {type(module).__name__} keeps it in one tensor with others.")
    return place.key.removesuffix(".weight")


def _shape(linear: Any) -> tuple[int, int]:
    """(O, I) of a linear, or of a Conv1D, which stores its transpose."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)
