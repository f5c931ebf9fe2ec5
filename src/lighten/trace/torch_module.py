"""Follow any torch module on fake tensors: a live one, or one that a factory `pkg.module:name` makes."""

from __future__ import annotations

import copy
import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from lighten.cost.workload import Workload
from lighten.errors import LightenError, ModelError, TraceError, WorkloadError
from lighten.trace.program import Program
from lighten.trace.torch_run import Batch, Run, follow_run

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


class TorchModule:
    """A module and example inputs, as `lighten.trace.program.Followed`.

    The first axis of every input is the batch; the second axis of each that is as long as the first input's is the length. A workload with
    other sizes runs on inputs with those axes changed.

    Args:
        module: it may hold real weights; they are neither read nor changed. A callable that makes the module is called under fake tensors.
        inputs: what its forward takes: a tensor, positional arguments, or keyword arguments.
    """

    phases: tuple[str, ...] = ("encode", "train")
    breaks: tuple[int, ...] = ()
    fixed_len: int | None = None

    def __init__(self, module: torch.nn.Module | Callable[[], torch.nn.Module], inputs: Inputs, *, name: str = "", source: str = "") -> None:
        self._module = module
        self._args, self._kwargs = _arguments(inputs)
        first = self._first_tensor()
        self.batch_size = int(first.shape[0]) if first.dim() else 1
        self.seq_len = int(first.shape[1]) if first.dim() > 1 else 1
        kind = type(module).__name__ if isinstance(module, torch.nn.Module) else getattr(module, "__name__", "module")
        self.name, self.architecture, self.family, self.source = name or kind, kind, "torch module", source
        types = [str(p.dtype).removeprefix("torch.") for p in module.parameters()] if isinstance(module, torch.nn.Module) else []
        self.dtype = max(set(types), key=types.count) if types else "float32"

    def _first_tensor(self) -> torch.Tensor:
        found = [each for each in tree_leaves((self._args, self._kwargs)) if isinstance(each, torch.Tensor)]
        if not found:
            raise TraceError("inputs hold no tensor; give an example of what the module's forward takes.")
        return found[0]

    @property
    def fingerprint(self) -> str | None:
        """Of its shapes and its code's names; None of one that is not made yet."""
        if not isinstance(self._module, torch.nn.Module):
            return None
        said = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in self._module.named_parameters()]) + repr(self._module)
        return hashlib.sha256(said.encode()).hexdigest()

    def follow(self, workload: Workload) -> Program:
        """Its program; see `Followed.follow`. A training step differentiates the mean of the first floating-point output."""
        if workload.phase not in self.phases:
            raise WorkloadError(f"{self.name}: phase {workload.phase} does not fit a module; its phases: {', '.join(self.phases)}.")
        run = Run(
            build=self._build, inputs=self._inputs, loss=self._loss, infer=lambda module, batch, _: _call(module, batch),
            checkpoint=getattr(self._module, "gradient_checkpointing_enable", None) and (lambda module: module.gradient_checkpointing_enable()),
        )  # fmt: skip
        return follow_run(run, workload)

    def _build(self) -> torch.nn.Module:
        if not isinstance(self._module, torch.nn.Module):
            made = self._module()
            if not isinstance(made, torch.nn.Module):
                raise ModelError(f"{self.name} made a {type(made).__name__}, not a torch module.")
            return made
        mode = _get_current_dispatch_mode_stack()[0]
        assert isinstance(mode, FakeTensorMode)
        with FakeCopyMode(mode):
            return copy.deepcopy(self._module)

    def _inputs(self, _module: torch.nn.Module, workload: Workload) -> Batch:
        resized = partial(self._resized, workload=workload)
        return {"args": tree_map(resized, self._args), "kwargs": tree_map(resized, self._kwargs)}

    def _resized(self, value: Any, *, workload: Workload) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = list(value.shape)
        if shape and shape[0] == self.batch_size:
            shape[0] = workload.batch_size
        if len(shape) > 1 and shape[1] == self.seq_len:
            shape[1] = workload.seq_len
        dtype = getattr(torch, workload.dtype) if value.is_floating_point() else value.dtype
        return torch.zeros(shape, dtype=dtype)

    def _loss(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        out = _call(module, batch)
        loss = getattr(out, "loss", None)
        if isinstance(loss, torch.Tensor):
            return loss
        floats = [each for each in tree_leaves(_plain(out)) if isinstance(each, torch.Tensor) and each.is_floating_point()]
        if not floats:
            raise TraceError(f"{self.name} gives no floating-point tensor to differentiate.")
        return floats[0].mean()


def _plain(out: Any) -> Any:
    return tuple(out.values()) if isinstance(out, Mapping) else out


def _call(module: torch.nn.Module, batch: Batch) -> Any:
    return module(*batch["args"], **batch["kwargs"])


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def from_factory(reference: str) -> TorchModule:
    """The module that `pkg.module:name` makes; the factory returns (module, inputs), and is called on fake tensors.

    The current folder is searched first, as `python -m` does. This runs the user's own code.

    Raises:
        ModelError: no such module or name, or it returns something else.
    """
    from lighten.trace.torch_run import fake_tensors

    place, _, name = reference.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"{reference}: {error}.") from error
    finally:
        sys.path.pop(0)
    try:
        with fake_tensors():
            made = factory()
    except LightenError:
        raise
    except Exception as error:  # the user's own code, whatever it raises
        raise ModelError(f"{reference} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise ModelError(f"{reference} returned a {type(made).__name__}; a factory returns (module, inputs).")
    module, inputs = made
    found = TorchModule(lambda: factory()[0], inputs, name=type(module).__name__, source=reference)
    found.architecture = type(module).__name__
    return found
