"""Run a torch module through a workload on fake tensors, watched: the forward pass, a training step, the last step of a generation."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lighten.cost.operators import Op
from lighten.cost.workload import Workload
from lighten.errors import LightenError, TraceError, WorkloadError
from lighten.trace.components import component_of
from lighten.trace.program import Program, Timeline
from lighten.trace.torch_watch import Watch

Batch = dict[str, Any]

CACHES = ("past_key_values", "cache_params", "state")
"""What models call their memory of earlier tokens."""
TORCH_OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD,
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop, "adafactor": torch.optim.Adafactor,
}  # fmt: skip
"""Optimizers of `torch.optim` with their own defaults."""


@dataclass(kw_only=True)
class Run:
    """How a module is run.

    Attributes:
        build: makes the module; called under fake tensors.
        inputs: the keyword arguments of a forward pass of (batch_size, length).
        loss: from the module and its inputs, the scalar that a training step differentiates.
        infer: a forward pass without gradients.
        step: (module, context, batch_size) → the arguments of a decoding step after so many tokens, or None where it cannot generate.
        checkpoint: switches full recomputation on.
        selective: inside it, the core of attention is recomputed; None where it cannot be told apart.
        modules: tells the watch which module runs.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.nn.Module, Workload], Batch]
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    infer: Callable[[torch.nn.Module, Batch, Workload], Any]
    step: Callable[[torch.nn.Module, int, Workload], Batch] | None = None
    checkpoint: Callable[[torch.nn.Module], None] | None = None
    selective: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    modules: Callable[[Watch], contextlib.AbstractContextManager[None]] = Watch.modules


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without memory and without values: what depends on values (packed sequences, padding) takes the plain case."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_item_of_fakes())
        stack.enter_context(_quiet("torch._subclasses.fake_tensor"))  # it logs a traceback beside the error that it raises
        stack.enter_context(_quiet("transformers"))  # its advice is for those who run the model
        if importlib.util.find_spec("transformers"):
            import transformers.integrations.moe
            import transformers.masking_utils

            stack.enter_context(patch.object(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
            stack.enter_context(patch.object(transformers.integrations.moe, "_can_use_grouped_mm", _has_grouped_mm))
        yield


def _has_grouped_mm(left: torch.Tensor, _right: torch.Tensor, _offsets: torch.Tensor) -> bool:
    """PyTorch's grouped product has a fake in bfloat16 alone; other types take transformers' own, which makes the same tensors."""
    return left.dtype == torch.bfloat16


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _item_of_fakes() -> Iterator[None]:
    """What a lone truth value without a value is: yes where it says whether all of a mask is set, since inputs have no padding; else no, so that
    no layer is dropped by a random number and no rare case is taken."""
    from torch._subclasses.fake_tensor import FakeTensor

    all_of = torch.Tensor.all

    def marked(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = all_of(self, *args, **kwargs)
        found._is_whole = True  # type: ignore[attr-defined]
        return found

    def is_set(self: torch.Tensor) -> bool:
        if self.dtype == torch.bool and self.numel() == 1:
            return bool(getattr(self, "_is_whole", False))
        return bool(torch.Tensor.__bool__(self))

    with (
        patch.object(FakeTensor, "__bool__", is_set, create=True),
        patch.object(FakeTensor, "all", marked, create=True),
        patch.object(torch, "all", marked),
    ):
        yield


def follow_run(run: Run, workload: Workload, *, experts: tuple[int, int] | None = None) -> Program:
    """A module's program in a workload.

    Args:
        experts: (experts, experts of a token) where the module routes tokens.

    Raises:
        WorkloadError: phases or optimizers that this cannot follow.
        TraceError: the module failed on tensors without memory; the text says where.
    """
    if workload.phase == "train" and workload.optimizer not in TORCH_OPTIMIZERS:
        raise WorkloadError(f"optimizer {workload.optimizer} cannot be followed; followed: {', '.join(TORCH_OPTIMIZERS)}.")
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, workload.dtype))
    try:
        with fake_tensors():
            return _Follower(run, run.build(), experts).follow(workload)
    except LightenError:
        raise
    except Exception as error:  # the module's own code, whatever it raises
        raise TraceError(f"could not be followed on tensors without memory: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        torch.set_default_dtype(before)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no text"


_Followed: TypeAlias = tuple[list[tuple[Op, int]], tuple[Timeline, ...]]
"""Operators with how often they ran, and the life of storages in each run."""


@dataclass
class _Follower:
    run: Run
    module: torch.nn.Module
    experts: tuple[int, int] | None
    unknown: dict[str, int] = field(default_factory=dict)
    causal_is_known: bool = True

    def follow(self, workload: Workload) -> Program:
        phases: dict[str, Callable[[Workload], _Followed]] = {
            "train": self._train, "encode": self._forward, "prefill": self._forward, "decode": self._decode, "generate": self._generate,
        }  # fmt: skip
        ops, timelines = phases[workload.phase](workload)
        parameters = _parameters_by_component(self.module)
        kept = {id(x): x for x in [*self.module.parameters(), *self.module.buffers()]}
        return Program(
            parameters=parameters, trainable_parameters=sum(p.numel() for p in self.module.parameters() if p.requires_grad),
            active_parameters=self._active(), weight_bytes=sum(x.numel() * x.element_size() for x in kept.values()), ops=ops,
            memory=max((each.breakdown() for each in timelines), key=lambda each: each.peak), causal_is_known=self.causal_is_known,
            timelines=timelines, unknown_ops=self.unknown, layers=_layers(self.module),
        )  # fmt: skip

    def _active(self) -> int:
        total = sum(p.numel() for p in self.module.parameters())
        if self.experts is None:
            return total
        count, met = self.experts
        routed = sum(
            p.numel()
            for name, p in self.module.named_parameters()
            if re.search(r"(^|\.)experts(\.|$)", name) and (p.dim() == 3 or ".experts." in name)
        )
        return total - routed * (count - met) // count

    # ---- phases ----

    def _forward(self, workload: Workload) -> _Followed:
        self.module.eval()
        inputs = self.run.inputs(self.module, workload)
        with self._watched(inputs, workload.phase) as watch, torch.no_grad():
            out = self.run.infer(self.module, inputs, workload)
            watch.hold([x for name in CACHES if (kept := getattr(out, name, None)) is not None for x in _tensors(kept)], "kv_cache", "cache")
            del out
        return watch.operators(), (watch.timeline(),)

    def _train(self, workload: Workload) -> _Followed:
        self.module.train()
        if workload.recompute == "full":
            if self.run.checkpoint is None:
                raise WorkloadError("recompute=full: this module has no way to switch recomputation on.")
            self.run.checkpoint(self.module)
        core: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if workload.recompute == "selective":
            if self.run.selective is None:
                raise WorkloadError("recompute=selective: the core of this module's attention cannot be told apart from the rest.")
            core = self.run.selective()
        inputs = self.run.inputs(self.module, workload)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = TORCH_OPTIMIZERS[workload.optimizer or ""](trained)
        with core, torch.enable_grad(), self._watched(inputs, "forward") as watch:
            loss = self.run.loss(self.module, inputs)
            with watch.away():
                used = _leaves(loss)
                with torch.autograd._unsafe_preserve_version_counter(tuple(used)):  # type: ignore[attr-defined]
                    _make_state(optimizer, used)
                watch.hold_from_start(_state(optimizer), "optimizer", "optimizer state")
            watch.phase("backward", "temporary")
            loss.backward()  # type: ignore[no-untyped-call]
            watch.hold([p.grad for p in trained if p.grad is not None], "gradients", "gradient")
            watch.phase("optimizer", "temporary")
            with watch.uncounted(), _ones():
                optimizer.step()
                optimizer.zero_grad()
        return watch.operators(), (watch.timeline(),)

    def _decode(self, workload: Workload) -> _Followed:
        return self._steps(workload, workload.new_tokens)

    def _generate(self, workload: Workload) -> _Followed:
        first, prefill = self._forward(workload)
        steps = workload.new_tokens - 1
        if not steps:
            return first, prefill
        later, last_step = self._steps(workload, steps)
        return first + later, (*prefill, *last_step)

    def _steps(self, workload: Workload, steps: int) -> _Followed:
        """The operators of all decoding steps, and the life of storages in the last one."""
        if self.run.step is None:
            raise WorkloadError(f"phase {workload.phase}: this model has no cache to decode with.")
        self.module.eval()
        last, timelines = self._step(workload, workload.seq_len + steps)
        if steps == 1:
            return last, timelines
        first, _ = self._step(workload, workload.seq_len + 1)
        return _between(first, last, steps), timelines

    def _step(self, workload: Workload, context: int) -> _Followed:
        assert self.run.step is not None
        with torch.no_grad():
            inputs = self.run.step(self.module, context, workload)
            with self._watched(inputs, "decode") as watch:
                watch.hold([x for x in _tensors(inputs) if x.is_floating_point()], "kv_cache", "cache")
                self.run.infer(self.module, inputs, workload)
                watch.hold([x for x in _tensors(inputs) if x.is_floating_point()], "kv_cache", "cache")
        return watch.operators(), (watch.timeline(),)

    @contextlib.contextmanager
    def _watched(self, inputs: Batch, phase: str) -> Iterator[Watch]:
        watch = Watch(self.module)
        gc.disable()  # a cycle that is collected at some later moment would make the peak depend on it
        try:
            with self.run.modules(watch):
                watch.hold(self.module.parameters(), "weights", "parameter")
                watch.hold(self.module.buffers(), "weights", "buffer")
                watch.hold(_tensors(inputs), "activations", "input")
                watch.phase(phase, "activations")
                with watch:
                    yield watch
        finally:
            gc.enable()
        self.causal_is_known &= watch.causal_is_known
        for name, count in watch.unknown.items():
            self.unknown[name] = self.unknown.get(name, 0) + count


def _between(first: Sequence[tuple[Op, int]], last: Sequence[tuple[Op, int]], steps: int) -> list[tuple[Op, int]]:
    """Operators of all steps from those of the first and the last: what a step computes is linear in its context, so each end stands for half.

    The first ends' operators count ⌈steps/2⌉ times and the last ones' ⌊steps/2⌋: with an odd number a middle step is counted as a first one,
    which `Program`'s FLOPs mend by the difference.
    """
    half = steps // 2
    ops = [(op, count * (steps - half)) for op, count in first] + [(op, count * half) for op, count in last]
    if steps % 2:
        ops += _half_difference(first, last)
    return ops


def _half_difference(first: Sequence[tuple[Op, int]], last: Sequence[tuple[Op, int]]) -> list[tuple[Op, int]]:
    """Half of what the last step computes more than the first, as one operator."""
    more = {
        name: sum(getattr(op, name) * count for op, count in last) - sum(getattr(op, name) * count for op, count in first)
        for name in ("matmul_flops", "causal_flops", "other_flops", "activation_bytes")
    }
    op = Op(name="model.middle", kind="elementwise", component="attention", **{name: value // 2 for name, value in more.items()})
    return [(op, 1)]


def _leaves(loss: torch.Tensor) -> list[torch.nn.Parameter]:
    """The parameters that a loss depends on; the others get no gradient and no optimizer state."""
    found: dict[int, torch.nn.Parameter] = {}
    seen: set[Any] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        nodes.extend(inner for inner, _ in node.next_functions)
    return list(found.values())


def _make_state(optimizer: torch.optim.Optimizer, used: Sequence[torch.nn.Parameter]) -> None:
    """The state that every step after the first finds."""
    for parameter in used:
        parameter.grad = torch.zeros_like(parameter)
    with _ones():
        optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def _ones() -> Iterator[None]:
    """A number that an optimizer reads off a tensor (Adafactor's norms) is 1: no size depends on it."""
    from torch._subclasses.fake_tensor import FakeTensor

    known = torch.Tensor.item

    def item(self: torch.Tensor) -> Any:
        return 1.0 if getattr(self, "constant", None) is None else known(self)

    with patch.object(FakeTensor, "item", item, create=True):
        yield


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in tree_leaves(state) if isinstance(value, torch.Tensor)]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors in nested containers and in the caches of transformers.

    Without a function inside that refers to itself: such a cycle would keep the tensors alive while they are watched.
    """
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    left = [value]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, Mapping):
            left.extend(each.values())
        elif isinstance(each, list | tuple):
            left.extend(each)
        elif type(each).__module__.startswith("transformers") and hasattr(each, "__dict__") and not isinstance(each, torch.nn.Module):
            left.extend(vars(each).values())
    return found


def _parameters_by_component(module: torch.nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        component = component_of(name.replace("/", ".").rpartition(".")[0])  # Keras writes layer/weight
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts


def _layers(module: torch.nn.Module) -> int:
    """Members of the module lists that are longest at their depth: the numbered blocks."""
    lists = [each for each in module.modules() if isinstance(each, torch.nn.ModuleList) and len(each) > 1]
    if not lists:
        return 0
    inner = {id(part) for each in lists for member in each for part in member.modules() if isinstance(part, torch.nn.ModuleList)}
    outer = [each for each in lists if id(each) not in inner]
    return sum(len(each) for each in outer)
