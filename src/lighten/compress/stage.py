"""The tensors of a model as the steps of a recipe leave them, one stage after another; nothing is held but what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from lighten.compress.checkpoint import Checkpoint
from lighten.compress.clock import Clock
from lighten.compress.grid import Weight
from lighten.compress.journal import Finished, Journal

Change: TypeAlias = Callable[[str, Tensor], Weight]
"""(name, tensor as stored) → what becomes of it."""


class Stage(Protocol):
    """The tensors after some steps."""

    @property
    def names(self) -> list[str]:
        """All tensors, in the order in which they are written."""
        ...

    def __getitem__(self, name: str) -> Weight: ...

    def touched(self, name: str) -> bool:
        """Whether a step changed it."""
        ...

    def said(self, name: str) -> Mapping[str, Any]:
        """What the steps reported of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Original:
    """The checkpoint itself."""

    checkpoint: Checkpoint

    @property
    def names(self) -> list[str]:
        return self.checkpoint.names

    def __getitem__(self, name: str) -> Weight:
        return self.checkpoint[name]

    def touched(self, name: str) -> bool:
        return False

    def said(self, name: str) -> Mapping[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Some tensors go through a function of each by itself, when they are asked for."""

    before: Stage
    selected: frozenset[str]
    change: Change

    @property
    def names(self) -> list[str]:
        return self.before.names

    def __getitem__(self, name: str) -> Weight:
        found = self.before[name]
        if name not in self.selected:
            return found
        assert isinstance(found, Tensor), "the reading on the spec refuses a step after quantize"
        return self.change(name, found)

    def touched(self, name: str) -> bool:
        return name in self.selected or self.before.touched(name)

    def said(self, name: str) -> Mapping[str, Any]:
        return self.before.said(name)


class Renewal(Protocol):
    """A change of many tensors that reads other tensors beside the one that it makes."""

    @property
    def changes(self) -> Mapping[str, Any]: ...

    def names(self, names: Iterable[str]) -> list[str]: ...

    def tensor(self, name: str, get: Callable[[str], Tensor]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """Tensors made from those before, when they are asked for."""

    before: Stage
    renewal: Renewal

    @property
    def names(self) -> list[str]:
        return self.renewal.names(self.before.names)

    def __getitem__(self, name: str) -> Weight:
        return self.renewal.tensor(name, self._dense)

    def touched(self, name: str) -> bool:
        return name in self.renewal.changes or self.before.touched(name)

    def said(self, name: str) -> Mapping[str, Any]:
        return self.before.said(name)

    def _dense(self, name: str) -> Tensor:
        found = self.before[name]
        assert isinstance(found, Tensor), "the reading on the spec refuses this step after quantize"
        return found


@dataclass(kw_only=True)
class Journaled:
    """Some tensors lie finished in a journal.

    Attributes:
        blocks: tensor → the block of the journal that has it.
    """

    before: Stage
    journal: Journal
    pass_index: int
    blocks: Mapping[str, str]
    _last: tuple[str, Finished] | None = field(default=None, repr=False)

    @property
    def names(self) -> list[str]:
        known = self.before.names
        return known + sorted(set(self.blocks) - set(known))

    def __getitem__(self, name: str) -> Weight:
        return self._block(name).weights[name] if name in self.blocks else self.before[name]

    def touched(self, name: str) -> bool:
        return name in self.blocks or self.before.touched(name)

    def said(self, name: str) -> Mapping[str, Any]:
        if name not in self.blocks:
            return self.before.said(name)
        own = next((report for report in self._block(name).reports if report.get("name") == name), {})
        return {**self.before.said(name), **own}

    def _block(self, name: str) -> Finished:
        block = self.blocks[name]
        if self._last is None or self._last[0] != block:
            self._last = (block, self.journal.read(self.pass_index, block))
        return self._last[1]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A stage whose tensors, when they are asked for, take the time of the step that made it.

    Attributes:
        what: the step, for the clock.
    """

    before: Stage
    clock: Clock
    what: str

    @property
    def names(self) -> list[str]:
        return self.before.names

    def __getitem__(self, name: str) -> Weight:
        with self.clock.counting(self.what):
            return self.before[name]

    def touched(self, name: str) -> bool:
        return self.before.touched(name)

    def said(self, name: str) -> Mapping[str, Any]:
        return self.before.said(name)


def rebased(stage: Stage, before: Stage, other: Stage) -> Stage:
    """What a step makes of other tensors than those that it was given: rows and columns go where they went, what it wrote down stays.

    Args:
        before: what it was given.
        other: what stands in that place.
    """
    above: Any = stage
    return other if stage is before else replace(above, before=rebased(above.before, before, other))


def origin_of(stage: Stage, name: str, *, whole: bool = False) -> str:
    """The name that a tensor has in the checkpoint, where steps gave tensors other names.

    Args:
        whole: of a factor or a correction, the weight that it is a part of.
    """
    below: Any = stage
    while not isinstance(below, Original):
        if hasattr(below, "source"):
            name = below.source(name)
        elif whole and hasattr(below, "whole"):
            name = below.whole(name)
        below = below.before
    return name
