"""One unit of a model under calibration: its weights in memory, what its linears are given, and a place for what becomes of them.

Shape legend: O rows (output features), I columns (input features).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lighten.compress.grid import Weight
from lighten.compress.skeleton import Skeleton, Source, Unit
from lighten.compress.statistics import InputStatistics, Moments
from lighten.compress.suspend import Forwards

HESSIAN_BYTES = 2**30
"""Second moments that are gathered in one run of a block: choice; more experts than fit are gathered in several runs."""

_PRODUCTS: dict[Any, tuple[int, int]] = {
    nn.functional.linear: (0, 1), torch.addmm: (1, 2), torch.matmul: (0, 1), torch.Tensor.matmul: (0, 1), torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
}  # fmt: skip
"""Functions that multiply by a matrix of weights → the places of input and weight among their arguments."""


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Weights of a unit that are given one and the same input, by their names in the checkpoint."""

    names: tuple[str, ...]
    columns: int


@dataclass(kw_only=True)
class Block:
    """A unit that all calibration forwards wait before, with its weights loaded.

    Attributes:
        wanted: names of the weights that the step changes, in this unit.
        transposed: names of the weights that the checkpoint stores as [I, O].
        held_out: which batches only judge.
        routed: which of the weights a batch meets depends on the batch.
        at_once: what all batches hold inside of the unit fits in memory together.
        known_levels: of units like this one, which are found once.
        gone_on: the forwards went through the unit already.
        results: what became of each tensor that was put.
    """

    unit: Unit
    skeleton: Skeleton
    forwards: Forwards
    source: Source
    wanted: frozenset[str]
    transposed: frozenset[str]
    held_out: Sequence[bool]
    routed: bool = False
    at_once: bool = False
    known_levels: dict[Any, list[list[Subset]]] = field(default_factory=dict)
    gone_on: bool = False
    results: dict[str, Weight] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.unit.name

    def tensor(self, name: str) -> Tensor:
        """A tensor of the unit in float32 as it is now, in the checkpoint's orientation."""
        found = self.results.get(name)
        return (self.source(name) if found is None else _value(found)).float()

    def weight(self, name: str) -> Tensor:
        """[O, I] float32, as it is now."""
        found = self.tensor(name)
        return found.T.contiguous() if name in self.transposed else found

    def put(self, name: str, weight: Weight) -> None:
        """Record what becomes of a tensor, and run with it from here on.

        Args:
            weight: codes of [O, I], or a tensor in the checkpoint's orientation.
        """
        self.results[name] = weight
        value = _value(weight)
        self.skeleton.view(name).copy_(value.T if name in self.transposed and not isinstance(weight, Tensor) else value)

    def levels(self, names: frozenset[str] | None = None) -> list[list[Subset]]:
        """Weights by the input that they share, in the order in which a forward pass meets them; the subsets of one level, such as the experts
        of a layer, do not depend on each other. Weights that no calibration row reaches are left out.

        Args:
            names: of the weights; None: those that are wanted.
        """
        names = self.wanted if names is None else names
        if self.routed:
            return self._find_levels(names)
        prefix = _module_of(names)
        kind = (type(self.unit.module), *sorted((name.removeprefix(prefix), self.skeleton.view(name).shape) for name in names))
        if kind not in self.known_levels:
            self.known_levels[kind] = _renamed(self._find_levels(names), lambda name: name.removeprefix(prefix))
        return _renamed(self.known_levels[kind], lambda name: prefix + name)

    def _find_levels(self, names: frozenset[str]) -> list[list[Subset]]:
        met: dict[str, Subset] = {}
        for index in range(len(self.held_out)):
            for subset in self._met_by(index, names):
                met.setdefault(subset.names[0], subset)
            if names <= {name for subset in met.values() for name in subset.names}:
                break
        levels: dict[str, list[Subset]] = {}
        for subset in met.values():
            levels.setdefault(re.sub(r"\.\d+\.", ".*.", subset.names[0].removeprefix(self.name)), []).append(subset)
        return list(levels.values())

    def in_turn(self) -> Iterator[tuple[Subset, InputStatistics]]:
        """Each subset of the wanted weights and what its input is, with all weights before it as they were put. Where memory allows the unit is run
        once, and the forwards wait before the next one in the end."""
        levels = self.levels()
        if self.routed or not self.at_once:
            for level in levels:
                yield from self.statistics(level)
            return
        subsets = {name: subset for level in levels for subset in level for name in subset.names}
        left = set(subsets)
        watch = partial(_Watch, self._table(left))
        for stops in self.forwards.go_on_by_products(watch, left.__contains__):
            subset = subsets[stops[0].names[0]]
            moments = Moments(subset.columns)
            for stop, held_out in zip(stops, self.held_out, strict=True):
                moments.add(stop.x, held_out=held_out)
            yield subset, moments.finish()
            left.difference_update(subset.names)
        self.gone_on = True

    def statistics(self, subsets: Sequence[Subset]) -> Iterator[tuple[Subset, InputStatistics]]:
        """What each subset's input is over the calibration rows, in the state that the unit is in when it is asked for."""
        waiting = list(subsets)
        while waiting:
            taken, size = [waiting.pop(0)], 0
            while waiting and (size := size + 8 * waiting[0].columns ** 2) <= HESSIAN_BYTES:
                taken.append(waiting.pop(0))
            moments = {subset.names[0]: Moments(subset.columns) for subset in taken}
            for index, held_out in enumerate(self.held_out):
                self._run(index, {name: _adding(total, held_out) for name, total in moments.items()})
            for subset in taken:
                yield subset, moments.pop(subset.names[0]).finish()

    def outputs(self) -> Iterator[Any]:
        """What the unit gives for each batch, as it is now."""
        for index in range(len(self.held_out)):
            yield self.forwards.trial(index)

    def _met_by(self, index: int, names: frozenset[str]) -> Iterator[Subset]:
        """The subsets that one batch's forward meets."""
        seen: dict[tuple[int, ...], tuple[Tensor, list[str]]] = {}

        def meet(x: Tensor, found: Sequence[str]) -> None:
            key = (x.data_ptr(), x.storage_offset(), x._version, *x.shape)
            seen.setdefault(key, (x, []))[1].extend(found)  # holding x keeps its address from being used again

        with _Watch(self._table(names), meet):
            self.forwards.trial(index)
        for x, found in seen.values():
            yield Subset(names=tuple(dict.fromkeys(found)), columns=x.shape[-1])

    def _run(self, index: int, listeners: Mapping[str, Callable[[Tensor], None]]) -> None:
        """One batch through the unit, as far as the last of some weights that it meets."""
        left = set(listeners)
        experts = len(left) > 1

        def meet(x: Tensor, names: Sequence[str]) -> None:
            for name in names:
                if name in left:
                    listeners[name](x)
                    left.discard(name)
            if not left and not experts:
                raise _Enough

        with _Watch(self._table(listeners), meet), contextlib.suppress(_Enough):
            self.forwards.trial(index)

    def _table(self, names: Iterable[str]) -> dict[int, list[tuple[str, int, int]]]:
        """Storage → (name, first and last element) of the weights that lie in it."""
        table: dict[int, list[tuple[str, int, int]]] = {}
        for name in sorted(names):
            view = self.skeleton.view(name)
            table.setdefault(view.untyped_storage().data_ptr(), []).append((name, *_span(view)))
        return table


class _Enough(Exception):
    """The rest of a unit need not be run."""


class _Watch(TorchFunctionMode):
    """Tells of each product with a weight of a table: its input, and the names of the weights that lie in the factor."""

    def __init__(self, table: Mapping[int, list[tuple[str, int, int]]], meet: Callable[[Tensor, Sequence[str]], None]) -> None:
        super().__init__()
        self._table, self._meet = table, meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = _PRODUCTS.get(func)
        if places is not None:
            x = args[places[0]] if len(args) > places[0] else kwargs.get("input")
            weight = args[places[1]] if len(args) > places[1] else kwargs.get("weight")
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                if names := self._names(weight):
                    self._meet(x, names)
                elif func is not nn.functional.linear and (names := self._names(x)):
                    self._meet(weight.transpose(-1, -2), names)  # W xᵀ, as Mamba's
        return func(*args, **kwargs)

    def _names(self, weight: Tensor) -> list[str]:
        """The wanted weights that lie in a factor."""
        found = self._table.get(weight.untyped_storage().data_ptr())
        if found is None:
            return []
        low, high = _span(weight)
        return [name for name, first, last in found if low <= first and last <= high]


def _module_of(names: Iterable[str]) -> str:
    """What the names of a unit's tensors begin with alike, up to a dot."""
    paths = [name.split(".")[:-1] for name in names]
    return "".join(f"{pieces[0]}." for pieces in takewhile(lambda pieces: len(set(pieces)) == 1, zip(*paths, strict=False)))


def _renamed(levels: Sequence[Sequence[Subset]], rename: Callable[[str], str]) -> list[list[Subset]]:
    return [[replace(subset, names=tuple(map(rename, subset.names))) for subset in level] for level in levels]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last element in its storage."""
    first = int(tensor.storage_offset())
    return first, first + sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _adding(total: Moments, held_out: bool) -> Callable[[Tensor], None]:
    return lambda x: total.add(x, held_out=held_out)


def _value(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()
