"""Stages of a model whose shapes a step changed: rows and columns that are left out, tensors that are left out or numbered anew, channels of zeros.

Everything is done when a tensor is asked for; nothing is held but which indices stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lighten.compress.grid import Weight
from lighten.compress.stage import Stage

Cuts = Mapping[str, tuple[tuple[int, Tensor], ...]]
"""Tensor → (axis, indices that stay, rising) of each axis that becomes smaller."""


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """Some tensors alone, of some of which some rows and columns alone.

    Attributes:
        sources: tensor → its name before.
        cuts: by the new name.
        scales: by the new name: (s, offset) of what becomes s · (w + offset) - offset.
    """

    before: Stage
    sources: Mapping[str, str]
    cuts: Cuts = field(default_factory=dict)
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.sources)

    def __getitem__(self, name: str) -> Weight:
        found = self.before[self.sources[name]]
        if name not in self.cuts and name not in self.scales:
            return found
        assert isinstance(found, Tensor), "the reading on the spec refuses other shapes of what is quantized"
        for axis, kept in self.cuts.get(name, ()):
            found = found.index_select(axis, kept)
        if name in self.scales:
            factor, offset = self.scales[name]
            found = (factor * (found.float() + offset) - offset).to(found.dtype)
        return found

    def touched(self, name: str) -> bool:
        return name in self.cuts or name in self.scales or self.before.touched(self.sources[name])

    def said(self, name: str) -> Mapping[str, Any]:
        return self.before.said(self.sources[name])

    def source(self, name: str) -> str:
        """The name that a tensor had before; one that a later step made has its own."""
        return self.sources.get(name, name)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Tensors in the shapes that they had, with zeros where rows and columns will be left out.

    Attributes:
        zeros: tensor → (axis, indices of zeros) of each axis.
    """

    before: Stage
    zeros: Cuts

    @property
    def names(self) -> list[str]:
        return self.before.names

    def __getitem__(self, name: str) -> Weight:
        found = self.before[name]
        if name not in self.zeros:
            return found
        assert isinstance(found, Tensor), "the reading on the spec refuses other shapes of what is quantized"
        for axis, gone in self.zeros[name]:
            found = found.index_fill(axis, gone, 0)
        return found

    def touched(self, name: str) -> bool:
        return self.before.touched(name)

    def said(self, name: str) -> Mapping[str, Any]:
        return self.before.said(name)


def joined(cuts: Iterable[tuple[str, int, Tensor]]) -> dict[str, tuple[tuple[int, Tensor], ...]]:
    """(tensor, axis, indices) → by tensor; of an axis that is said for each expert of a tensor, once."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, axis, indices in cuts:
        known = found.setdefault(name, {}).setdefault(axis, indices.to(torch.int64))
        assert torch.equal(known, indices), "experts in one tensor lose the same channels"
    return {name: tuple(axes.items()) for name, axes in found.items()}
