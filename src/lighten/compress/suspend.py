"""Forward passes that wait at each unit of a model until they are told to go on.

A calibration pass has to stop before a block, see the block run, have its weights changed, and then go on through the changed block. Each
batch's forward is a coroutine that is suspended inside the model's own code, so that what a block is given (masks, positions, an encoder's
output, another block's by-products) need not be known to anybody: it stays where the model keeps it. The tensors that wait are parked in a
buffer of bounded memory.

Source: the stop-and-go is that of GPTQ's reference code (arXiv:2210.17323), which runs block after block on stored inputs of one architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lighten.compress.activations import Parked, SpillBuffer
from lighten.compress.skeleton import Unit
from lighten.errors import ModelError

NOT_CALIBRATED = "Such a model cannot be calibrated block by block; quantize(rtn) and quantize(hqq) look at the weights alone."
Batch: TypeAlias = Mapping[str, Tensor]
Meet: TypeAlias = Callable[[Tensor, Sequence[str]], None]
"""Is told of a product's input and of the names of the weights that it is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class Met:
    """Where a forward stands inside of a unit.

    Attributes:
        x: [..., I] what the product is given.
        names: of the weights.
    """

    x: Tensor
    names: tuple[str, ...]


@dataclass(kw_only=True)
class _Waiting:
    """One forward that stands before a unit."""

    unit: Unit
    run: Callable[[], Any]
    tensors: list[Tensor]
    parked: Parked


@dataclass(kw_only=True)
class Forwards:
    """The forwards of several batches, all before the same unit.

    Attributes:
        at: the unit that all wait before; None: all have ended.
    """

    module: nn.Module
    units: Sequence[Unit]
    batches: Sequence[Batch]
    buffer: SpillBuffer
    at: Unit | None = None
    _own: set[int] = field(default_factory=set)
    _lets: list[Any] = field(default_factory=list)
    _waiting: list[_Waiting] = field(default_factory=list)
    _watching: Callable[[], AbstractContextManager[object]] = nullcontext

    @contextmanager
    def running(self) -> Iterator[Forwards]:
        """Start all forwards up to their first unit; end them where the block is left."""
        self._own = {tensor.untyped_storage().data_ptr() for tensor in [*self.module.buffers(), *self.module.parameters()] if not tensor.is_meta}
        with torch.no_grad():  # grad mode is the thread's, which all forwards share
            try:
                for unit in self.units:
                    unit.module.forward = self._stopped(unit)
                self._lets = [greenlet(self._forward) for _ in self.batches]
                self._waiting = [self._switch(index, batch) for index, batch in enumerate(self.batches)]
                self._arrive()
                yield self
            finally:
                for let in self._lets:
                    if not let.dead:
                        let.throw(GreenletExit)
                self._lets, self._waiting, self.at = [], [], None
                for unit in self.units:
                    unit.module.__dict__.pop("forward", None)

    def trial(self, index: int) -> Any:
        """Run the unit on one batch and keep the forward before it; what the unit gives."""
        waiting = self._waiting[index]
        with self._restored(waiting):
            return waiting.run()

    def go_on(self) -> None:
        """Take all forwards through the unit as it is now, and to the next."""
        for index, waiting in enumerate(self._waiting):
            self.buffer.restore(waiting.parked)
            self._waiting[index] = self._switch(index, True)
        self._arrive()

    def go_on_by_products(self, watch: Callable[[Meet], AbstractContextManager[object]], wanted: Callable[[str], bool]) -> Iterator[list[Met]]:
        """Take all forwards through the unit, once, with a stop before each product with a weight that is still wanted there: each batch's at the
        same, in which the weights may be changed. All that they hold stays in memory meanwhile.

        Args:
            watch: inside, `Meet` is called before each product with a weight of the unit.

        Raises:
            ModelError: they met different weights, as those of different experts.
        """

        def meet(x: Tensor, names: Sequence[str]) -> None:
            if met := tuple(name for name in names if wanted(name)):
                walker = getcurrent().parent
                assert walker is not None, "forwards run in greenlets of their own"
                walker.switch(Met(x=x, names=met))

        self._watching = lambda: watch(meet)
        try:
            for waiting in self._waiting:
                self.buffer.restore(waiting.parked)
            stops = [self._switch(index, True) for index in range(len(self._waiting))]
            while any(isinstance(stop, Met) for stop in stops):
                met = {stop.names if isinstance(stop, Met) else () for stop in stops}
                if len(met) > 1:
                    first, second, *_ = sorted(" and ".join(names) or "none" for names in met)
                    raise ModelError(f"Which weights a text meets depends on the text: one met {first}, another {second}. {NOT_CALIBRATED}")
                yield stops
                stops = [self._switch(index, True) for index in range(len(stops))]
            self._waiting = stops
            self._arrive()
        finally:
            self._watching = nullcontext

    @contextmanager
    def _restored(self, waiting: _Waiting) -> Iterator[None]:
        self.buffer.restore(waiting.parked)
        try:
            yield
        finally:
            waiting.parked = self.buffer.park(waiting.tensors)

    def _arrive(self) -> None:
        places = {waiting.unit.name if waiting else "its end" for waiting in self._waiting}
        if len(places) > 1:
            raise ModelError(
                f"Which blocks a text goes through depends on the text: some have come to {' and some to '.join(sorted(places))}. {NOT_CALIBRATED}"
            )
        self.at = self._waiting[0].unit if self._waiting[0] else None

    def _switch(self, index: int, what: Any) -> Any:
        found = self._lets[index].switch(what)
        return None if self._lets[index].dead else found

    def _forward(self, batch: Batch) -> None:
        self.module(**batch)

    def _stopped(self, unit: Unit) -> Callable[..., Any]:
        original = type(unit.module).forward.__get__(unit.module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                copied = tree_map(_copied, (args, kwargs))  # a unit that writes into its input would spoil the next run
                return original(*copied[0], **copied[1])

            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            tensors = [leaf for leaf in leaves if leaf.untyped_storage().data_ptr() not in self._own]  # a module's buffer is in use elsewhere
            walker = getcurrent().parent
            assert walker is not None, "forwards run in greenlets of their own"
            walker.switch(_Waiting(unit=unit, run=run, tensors=tensors, parked=self.buffer.park(tensors)))
            with self._watching():
                return original(*args, **kwargs)

        return forward


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
