"""What following a model gives: its parameters, its operators and the life of every storage, at one size. Needs no torch to be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.operators import Op
from lighten.cost.workload import Workload

KINDS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "temporary")
"""What a storage holds; the names of `MemoryBreakdown`'s parts."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One piece of memory: its bytes, what it holds, and the module and operator that made it."""

    bytes: int
    kind: str
    module: str
    operator: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Births and deaths of storages in order.

    Attributes:
        storages: every storage that lived.
        events: index of the storage that is born, or -1 - index of the one that dies.
        phases: (number of the event where it begins, name): forward, backward, optimizer, prefill, decode.
    """

    storages: Sequence[Storage]
    events: Sequence[int]
    phases: Sequence[tuple[int, str]] = ()

    def curve(self) -> list[int]:
        """Bytes that live after each event."""
        now, found = 0, []
        for event in self.events:
            now += self.storages[event].bytes if event >= 0 else -self.storages[-1 - event].bytes
            found.append(now)
        return found

    def fullest(self) -> int:
        """Number of the event after which most bytes live."""
        curve = self.curve()
        return max(range(len(curve)), key=curve.__getitem__)

    def living(self, event: int) -> list[Storage]:
        """The storages that live after an event, the largest first."""
        alive: dict[int, Storage] = {}
        for index in self.events[: event + 1]:
            if index >= 0:
                alive[index] = self.storages[index]
            else:
                del alive[-1 - index]
        return sorted(alive.values(), key=lambda storage: -storage.bytes)

    def breakdown(self) -> MemoryBreakdown:
        """Bytes at the fullest moment, by what holds them."""
        parts = dict.fromkeys(KINDS, 0)
        for storage in self.living(self.fullest()) if self.events else ():
            parts[storage.kind] += storage.bytes
        return MemoryBreakdown(**parts)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model followed through one workload.

    Attributes:
        parameters: by component.
        active_parameters: that one token meets; None: not known.
        weight_bytes: as stored.
        ops: each operator with the number of times that the workload runs it (a backward pass's operators are entries of their own).
        memory: at the fullest moment.
        timelines: the life of storages in each run (a generation's prefill and its last step are two); none where it was not followed.
        causal_is_known: whether it could be told which scores are masked; else `matmul_causal` is None.
        unknown_ops: operators whose FLOPs are not known, with how often they ran; they count 0 and are named in the estimate's warnings.
        label: how exact: exact, extrapolated.
        layers: numbered blocks.
    """

    parameters: Mapping[str, int]
    trainable_parameters: int
    active_parameters: int | None
    weight_bytes: int
    ops: Sequence[tuple[Op, int]]
    memory: MemoryBreakdown
    timelines: tuple[Timeline, ...] = ()
    causal_is_known: bool = True
    unknown_ops: Mapping[str, int] = field(default_factory=dict)
    label: str = "exact"
    layers: int = 0
    assumptions: tuple[str, ...] = ()

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def timeline(self) -> Timeline | None:
        """The one with the fullest moment, the first of equals; None where none was followed."""
        return max(self.timelines, key=lambda each: each.breakdown().peak) if self.timelines else None

    @property
    def matmul_flops(self) -> int:
        return sum(op.matmul_flops * count for op, count in self.ops)

    @property
    def matmul_causal(self) -> int | None:
        return sum(op.causal_flops * count for op, count in self.ops) if self.causal_is_known else None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an estimate says of a model that was followed: the same words as `ModelSpec`'s."""

    name: str
    family: str
    architecture: str
    source: str
    dtype: str
    layers: int
    by_component: Mapping[str, int]
    trainable_parameters: int
    active_parameters: int | None
    is_decoder: bool
    fixed_len: int | None = None
    max_positions: int | None = None

    def parameters(self) -> dict[str, int]:
        """Parameters by component."""
        return dict(self.by_component)

    @property
    def total_parameters(self) -> int:
        return sum(self.by_component.values())


class Followed(Protocol):
    """A model that can be followed: an ONNX graph, a Keras model, a torch module, a transformers class under fake tensors.

    Attributes:
        name, family, architecture, source, dtype: as `ModelSpec` has them.
        phases: the phases that it can be followed through, the default one first.
        fingerprint: what tells it from every other model, or None where that cannot be said; traces are kept under it.
        breaks: lengths from which on it runs other operators (a window that is full).
        fixed_len: the one length of its input, where that is not free.
    """

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def architecture(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def phases(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def breaks(self) -> tuple[int, ...]: ...

    @property
    def fixed_len(self) -> int | None: ...

    def follow(self, workload: Workload) -> Program:
        """The model's program in a workload.

        Raises:
            WorkloadError: a workload that it cannot be followed through.
            TraceError: it failed on the way.
        """
        ...
