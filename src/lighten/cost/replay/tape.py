"""Storages that are counted while they live, and the operators that autograd recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lighten.model.spec import Linear, Part
from lighten.units import dtype_bytes

Kind: TypeAlias = Literal["gradients", "activations", "kv_cache", "temporary"]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Parameters' names and shapes."""


class Ledger:
    """What lives now, by kind, and what lived at the fullest moment."""

    def __init__(self) -> None:
        self.live: dict[Kind, int] = {"gradients": 0, "activations": 0, "kv_cache": 0, "temporary": 0}
        self.fullest = dict(self.live)
        self.now = self.peak = 0

    def count(self, size: int, kind: Kind) -> None:
        self.live[kind] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.fullest = self.now, dict(self.live)


class Storage:
    """Bytes that are counted until the last reference to them goes."""

    __slots__ = ("_kind", "_ledger", "size")

    def __init__(self, ledger: Ledger, size: int, kind: Kind) -> None:
        self._ledger, self.size, self._kind = ledger, size, kind
        ledger.count(size, kind)

    def __del__(self) -> None:
        self._ledger.count(-self.size, self._kind)


class Edge:
    """Where the gradient of one tensor gathers."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        self.gradient: Storage | None = None

    def add(self, gradient: Storage) -> None:
        """A second gradient is added to the first in place, and goes."""
        self.gradient = self.gradient or gradient


@dataclass(kw_only=True)
class Tensor:
    """A storage, how many elements of which size it shows, and where its gradient goes."""

    storage: Storage
    elements: int
    element: float
    edge: Edge = field(default_factory=Edge)

    @property
    def bytes(self) -> int:
        return round(self.elements * self.element)

    def view(self, elements: int | None = None) -> Tensor:
        """Another tensor on the same storage."""
        return Tensor(storage=self.storage, elements=self.elements if elements is None else elements, element=self.element)


@dataclass(kw_only=True)
class _Node:
    """One operator of the backward pass.

    Attributes:
        outs: whose gradients it takes.
        inputs: which gradients it makes, and of how many bytes; None: it hands on the one that it takes.
        saved: what it needs from the forward pass, freed when it is done.
        weights: names and shapes of the parameters whose gradients it makes.
        scratch: bytes that it needs while it works.
        recompute: the forward pass to replay first, which saves `recompute_saves` times.
    """

    outs: tuple[Edge, ...]
    inputs: list[tuple[Edge, int | None]]
    saved: tuple[Tensor, ...] = ()
    weights: Shapes = field(default_factory=dict)
    scratch: int = 0
    recompute: Callable[..., Tensor] | None = None
    recompute_saves: int = 0


class Tape:
    """Tensors of sizes alone, and the operators that autograd recorded."""

    def __init__(self, dtype: str, *, training: bool) -> None:
        self.ledger = Ledger()
        self.gradients: dict[str, Storage] = {}
        self.summed: set[str] = set()
        self.element = dtype_bytes(dtype)
        self.training = self.recording = training
        self.nodes: list[_Node] = []
        self.shared: list[Tensor] = []
        self.saves = self.last_save = 0

    def hold(self, size: float, kind: Kind = "activations") -> Storage:
        stopped = self.saves == self.last_save > 0  # in a recomputation, after its last save
        return Storage(self.ledger, 0 if stopped else round(size), kind)

    def tensor(self, elements: int, element: float | None = None) -> Tensor:
        element = element or self.element
        return Tensor(storage=self.hold(elements * element), elements=elements, element=element)

    def record(
        self, out: Tensor | int, inputs: Sequence[Tensor] = (), saved: Sequence[Tensor] = (), *,
        part: Part | Shapes | None = None, scratch: int = 0, passes: bool = False,
    ) -> Tensor:  # fmt: skip
        """Note what an operator's backward pass takes, and return `out`; a number of elements is made here, after the inputs are saved.

        Args:
            part: whose parameters' gradients it makes; or their names and shapes.
            passes: it makes no gradient but hands on the one that it takes.
        """
        self.saves += bool(saved)
        if isinstance(out, int):
            out = self.tensor(out, inputs[0].element if inputs else None)
        if self.recording:
            made = [(x.edge, None if passes else x.bytes) for x in inputs]
            weights = weights_of(part) if part is None or isinstance(part, Part) else part
            self.nodes.append(_Node(outs=(out.edge,), inputs=made, saved=tuple(saved), weights=weights, scratch=scratch))
        return out

    def split(self, x: Tensor, *shares: int) -> list[Tensor]:
        """Parts of the last dimension, on one storage; backward puts their gradients together."""
        whole = sum(shares)
        parts = [x.view(x.elements * share // whole) for share in shares]
        if self.recording:
            self.nodes.append(_Node(outs=tuple(part.edge for part in parts), inputs=[(x.edge, x.bytes)]))
        return parts

    def checkpoint(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run without a record; backward runs again with one. The inputs are kept, and what all blocks share."""
        self.recording, self.saves = False, 0
        made = run(*inputs)
        self.recording = True
        out = made.view()
        edges: list[tuple[Edge, int | None]] = [(x.edge, x.bytes) for x in inputs]
        kept = (*inputs, *self.shared)
        self.nodes.append(_Node(outs=(out.edge,), inputs=edges, saved=kept, recompute=run, recompute_saves=self.saves))
        return out

    def backward(self, loss: Tensor) -> None:
        root = loss.edge.gradient = self.hold(loss.bytes, "temporary")
        self._unwind(loss.edge)
        del root  # which the caller of autograd holds

    def _unwind(self, last: Edge) -> None:
        needed, reached = {last}, []
        while self.nodes:  # what the loss does not depend on is freed before the first gradient
            node = self.nodes.pop()
            if needed.intersection(node.outs):
                needed.update(edge for edge, _ in node.inputs)
                reached.append(node)
        del node
        for node in reached:
            (self._recompute if node.recompute else self._step)(node)

    def _step(self, node: _Node) -> None:
        gradients = [edge.gradient for edge in node.outs]
        for edge in node.outs:
            edge.gradient = None
        scratch = self.hold(node.scratch, "temporary")
        second: list[tuple[str, Storage]] = []  # of tables that are tied: a sum of two is a new tensor
        for name, shape in node.weights.items():
            made = self.hold(math.prod(shape) * self.element, "gradients")
            if name in self.gradients:
                second.append((name, made))
            else:
                self.gradients[name] = made
        passed = [gradients[0] if size is None else self.hold(size, "temporary") for _, size in node.inputs]
        node.saved = ()
        del scratch, gradients
        for (edge, _), new in zip(node.inputs, passed, strict=True):
            assert new is not None
            edge.add(new)
        _sums = [self.hold(table.size, "gradients") for name, table in second if name not in self.summed]  # a third one is added in place
        self.summed.update(name for name, _ in second)

    def _recompute(self, node: _Node) -> None:
        """Replay up to the last operator that saves something, as torch.utils.checkpoint does; nothing after that is counted."""
        assert node.recompute is not None
        count = len(node.inputs)
        inputs, self.shared = [x.view() for x in node.saved[:count]], list(node.saved[count:])
        starts = [x.edge for x in inputs]
        node.saved = ()
        self.saves, self.last_save = 0, node.recompute_saves
        last = node.recompute(*inputs).edge
        self.last_save = 0
        del inputs
        (out,) = node.outs
        last.gradient, out.gradient = out.gradient, None
        self._unwind(last)
        self.shared = []
        for (edge, _), start in zip(node.inputs, starts, strict=True):
            if start.gradient is not None:
                edge.add(start.gradient)


def weights_of(part: Part | None) -> dict[str, tuple[int, ...]]:
    """Parameters that a part computes with: its own, and the embedding's that it is tied to."""
    if part is None:
        return {}
    if isinstance(part, Linear) and part.tied_to:
        return part.tensors() | {f"{part.tied_to}.weight": (part.out_features, part.in_features)}
    return part.tensors()
