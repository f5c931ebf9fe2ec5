"""Follow a run of PyTorch: every operator with its FLOPs, bytes and module, and the birth and death of every storage.

A storage is counted from the operator that makes it to the death of its last tensor, as an allocator sees it; what a kernel takes and
frees inside itself is not seen. An operator of the backward pass is given the module of the forward operator that recorded it, found by
autograd's sequence numbers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lighten.cost.operators import Op
from lighten.trace.components import component_of
from lighten.trace.program import Storage, Timeline
from lighten.trace.torch_flops import Counted, count_operator


@dataclass(kw_only=True)
class _Life:
    """A storage that lives or lived; its kind may be learned later (a gradient is known when its parameter holds it)."""

    bytes: int
    kind: str
    module: str
    operator: str
    shape: tuple[int, ...]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what runs inside it.

    Attributes:
        lives, events, phases: what becomes a `Timeline`.
        unknown: operators whose FLOPs are not known → how often they ran.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lives: list[_Life] = []
        self.events: list[int] = []
        self.phases: list[tuple[int, str]] = []
        self.unknown: Counter[str] = Counter()
        self._counts: dict[tuple[str, str, Counted], int] = defaultdict(int)
        self._names = {id(each): name for name, each in module.named_modules()}
        self._root = module
        self._stack: list[str] = []
        self._module_of: dict[int, str] = {}  # autograd's sequence number → module
        self._replaced: set[int] = set()
        self._index: dict[int, int] = {}  # storage → its place in `lives`
        self._kind = "activations"
        self._counting = True

    # ---- what the run says of itself ----

    def phase(self, name: str, kind: str) -> None:
        """From here on: a phase of the run, and what its new storages hold."""
        self.phases.append((len(self.events), name))
        self._kind = kind

    def hold(self, tensors: Iterable[torch.Tensor], kind: str, label: str) -> None:
        """Count tensors that were made before, or say what those that live hold."""
        for tensor in tensors:
            self._born(tensor, label, kind)
            self.lives[self._index[tensor.untyped_storage()._cdata]].kind = kind

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Operators that are no part of the workload; storages are still followed."""
        self._counting = False
        yield
        self._counting = True

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """What runs here is neither counted nor followed; what was there before may die."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def hold_from_start(self, tensors: Iterable[torch.Tensor], kind: str, label: str) -> None:
        """Count tensors as if they had lived before the first operator."""
        later, self.events = self.events, []
        self.hold(tensors, kind, label)
        self.phases = [(event + len(self.events), name) for event, name in self.phases]
        self.events += later

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """Know which module runs.

        Not by PyTorch's hooks: where a recomputation is stopped early by an exception, those keep its frames, and the tensors in them, alive.
        """
        original, watch = torch.nn.Module.__call__, self

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            watch._stack.append(watch._names.get(id(module), watch._stack[-1] if watch._stack else ""))
            try:
                return original(module, *args, **kwargs)
            finally:
                watch._stack.pop()

        with patch.object(torch.nn.Module, "__call__", call):
            yield

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """A module of this name runs."""
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()

    # ---- operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        module = self._module()
        result = func(*args, **kwargs)
        node = torch._C._current_autograd_node()
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        if in_backward and func is torch.ops.aten.add.Tensor and isinstance(args[0], torch.Tensor):
            self._add_in_place(args[0])
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        new = [self._born(tensor, func.__name__, self._kind, module) for tensor in made]
        if self._counting and (any(new) or func._schema.is_mutable):
            counted = count_operator(func, args, kwargs, result)
            if counted is None:
                self.unknown[str(func)] += 1
            else:
                self._counts[module, "backward" if node is not None else "", counted] += 1
        return result

    def _module(self) -> str:
        node = torch._C._current_autograd_node()
        if self._stack or node is None:
            name = self._stack[-1] if self._stack else ""
            self._module_of[torch._C._autograd._get_sequence_nr() - 1] = name
            return name
        return self._module_of.get(node._sequence_nr(), "")

    @property
    def causal_is_known(self) -> bool:
        """Whether it can be told how much of attention is masked."""
        return all(counted.causal_flops is not None for module, _, counted in self._counts if component_of(module) == "attention")

    def operators(self) -> list[tuple[Op, int]]:
        """Each operator that ran, with how often."""
        return [(_operator(module, part, counted), count) for (module, part, counted), count in self._counts.items()]

    # ---- storages ----

    def _born(self, tensor: torch.Tensor, operator: str, kind: str, module: str = "") -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._index or key in self._replaced:
            return False
        index = self._index[key] = len(self.lives)
        self.lives.append(_Life(bytes=storage.nbytes(), kind=kind, module=module, operator=operator, shape=tuple(tensor.shape)))
        self.events.append(index)
        weakref.finalize(storage, self._died, key)
        return True

    def _died(self, key: int) -> None:
        self._replaced.discard(key)
        index = self._index.pop(key, None)
        if index is not None:
            self.events.append(-1 - index)

    def _add_in_place(self, gradient: torch.Tensor) -> None:
        """Let a sum of gradients take the place of the earlier one.

        Autograd adds in place where it alone holds the earlier gradient and its storage, but never while a dispatch mode looks on
        (`can_accumulate_inplace` of torch/csrc/autograd/input_buffer.cpp): without this the observer would count what it causes.
        A sum of a recomputed forward pass is none of these: there gradients are recorded.
        """
        key = gradient.untyped_storage()._cdata
        if torch._C._storage_Use_Count(key) == 1:  # the gradient's
            self._died(key)
            self._replaced.add(key)  # it lives a little longer, uncounted

    def timeline(self) -> Timeline:
        """What lived, in order."""
        lives = [Storage(bytes=life.bytes, kind=life.kind, module=life.module, operator=life.operator, shape=life.shape) for life in self.lives]
        return Timeline(storages=lives, events=tuple(self.events), phases=tuple(self.phases))


def _operator(module: str, part: str, counted: Counted) -> Op:
    name = f"{module or 'model'}{'.' + part if part else ''}.{counted.name}"
    return Op(
        name=name, kind=counted.kind, component=component_of(module), matmul_flops=counted.matmul_flops,
        causal_flops=counted.matmul_flops if counted.causal_flops is None else counted.causal_flops,
        other_flops=counted.other_flops, weight_bytes=counted.weight_bytes, activation_bytes=counted.activation_bytes,
        rows=counted.rows, columns=counted.columns, outputs=counted.outputs, products=counted.products,
    )  # fmt: skip
