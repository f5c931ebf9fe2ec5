"""Memory of training steps that are not plain ones: adapters on a frozen base, float32 masters, a loss without all logits at once.

The pass is replayed as `lighten.cost.memory` does it, with what differs:

- adapters: only what an adapter's gradient passes through is recorded. A frozen linear saves nothing, a frozen RMSNorm's weight nothing; an
  adapted linear saves its input in the adapter's type, and the narrow product between A and B;
- masters: the optimizer updates float32 copies; the gradient that it works on is float32 too;
- chunked and fused losses: `lighten.cost.cross_entropy` in place of logits and softmax.

Source: PEFT 0.21, `peft/tuners/lora/layer.py` (`Linear.forward`); the rest where it is defined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lighten.cost.adapters import adapted_linears, adapter_dtype, adapter_shapes, frozen_bytes
from lighten.cost.cross_entropy import LossBytes, loss_bytes
from lighten.cost.kv_cache import CacheOptions, cache_bytes
from lighten.cost.memory import MemoryBreakdown, workload_memory
from lighten.cost.operators import Forward, Op, forward_operators, rows_of
from lighten.cost.optimizer_state import OPTIMIZERS, Shape, scratch_bytes, state_bytes
from lighten.cost.passes import first_forward, step_forward, steps_after_first, training_forward
from lighten.cost.replay.model import Model
from lighten.cost.replay.tape import Edge, Shapes, Tensor
from lighten.cost.training import BACKWARD, step_counts
from lighten.cost.workload import Workload, check_workload
from lighten.errors import WorkloadError
from lighten.model.spec import Attention, Conv, Linear, ModelSpec, Norm, Part, block_name
from lighten.units import dtype_bytes

FLOAT32 = 4
ADAPTER = "lora_"
"""Begins the names of adapters' tensors."""
PLAIN: dict[str, Any] = {"master_weights": False, "lora_rank": None, "base_bits": None, "cross_entropy": "full", "kept_by": "transformers"}
"""Fields of a workload that `lighten.cost.memory` describes at these values."""


def is_plain(workload: Workload) -> bool:
    """Whether `workload_memory` describes all of it."""
    return all(getattr(workload, name) == value for name, value in PLAIN.items())


def memory_of(spec: ModelSpec, workload: Workload) -> MemoryBreakdown:
    """Memory of any workload: `workload_memory`, and with it what `is_plain` says that it leaves out.

    A cache of another keeper is `cache_bytes` at the last token, in place of the one that grows. `weights` of a frozen base are quantized
    where `base_bits` says so, with the adapters beside them; a copy that a kernel makes of one dequantized weight is not counted.

    Raises:
        WorkloadError: the phase does not fit the model, a target that no linear has, a loss that is not over a vocabulary or a cache that its
            keeper refuses.
    """
    if is_plain(workload):
        return workload_memory(spec, workload)
    check_workload(spec, workload)
    if workload.phase == "train":
        return _training(spec, workload)
    plain = workload_memory(spec, replace(workload, kept_by="transformers"))
    options = CacheOptions(source_len=workload.seq_len, prompt_len=workload.seq_len)
    steps = steps_after_first(workload)
    length = (step_forward(spec, workload, steps) if steps else first_forward(spec, workload)).key_len
    kept = cache_bytes(
        spec, batch_size=workload.batch_size, context_len=length, dtype=workload.kv_dtype or workload.dtype, kept_by=workload.kept_by, options=options
    )
    return replace(plain, kv_cache=kept)


def tuned_operators(spec: ModelSpec, workload: Workload) -> list[tuple[Op, int]]:
    """Operators of a training step and how many times their forward's FLOPs it computes, adapters among them.

    A frozen linear has one product in backward, for its input's gradient, and none where nothing before it is adapted; an adapter's A has
    one more for its own, its B two. Attention whose queries, keys and values all come from what is frozen has none; where some do, it is
    counted in full (in the first block alone).

    Source: PyTorch's autograd, which computes the gradients that are required; checked by FlopCounterMode in tests/test_tuning.py.

    Raises:
        WorkloadError: a target that no linear has.
    """
    forward = training_forward(spec, workload)
    times = step_counts(spec, workload.recompute)
    ops = forward_operators(spec, forward, workload.dtype)
    if workload.lora_rank is None:
        return [(op, times.get(op.name, 1)) for op in ops]
    model = _Tuned(spec, workload, forward)
    model.loss()
    found: list[tuple[Op, int]] = []
    for op, part in zip(ops, spec.parts, strict=True):
        forwards = times[op.name] - BACKWARD
        if isinstance(part, Linear):
            arrives = model.arriving.get(part.name, True)
            found.append((op, forwards + arrives))
            if part.name in model.adapted:
                found += _adapter_operators(part, op, workload.lora_rank, forwards, arrives=arrives)
        else:
            passed = not isinstance(part, Attention) or _reaches(spec, model, part)
            found.append((op, forwards + BACKWARD * passed))
    return found


def _adapter_operators(part: Linear, op: Op, rank: int, forwards: int, *, arrives: bool) -> list[tuple[Op, int]]:
    down, up = (2 * op.rows * rank * size for size in (part.in_features, part.out_features))
    a = Op(name=f"{part.name}.lora_A", kind="linear", component=part.component, matmul_flops=down, causal_flops=down, rows=op.rows)
    b = Op(name=f"{part.name}.lora_B", kind="linear", component=part.component, matmul_flops=up, causal_flops=up, rows=op.rows)
    return [(a, forwards + 1 + arrives), (b, forwards + BACKWARD)]


def _reaches(spec: ModelSpec, model: _Tuned, attention: Attention) -> bool:
    """Whether a gradient passes through an attention: where one of its projections' input has one, or one of them is adapted."""
    block = block_name(attention)
    own = [part.name for part in spec.parts[: spec.parts.index(attention)] if isinstance(part, Linear) and block_name(part) == block]
    return any(model.arriving.get(name, True) or name in model.adapted for name in own)


def _training(spec: ModelSpec, workload: Workload) -> MemoryBreakdown:
    model = _Tuned(spec, workload, training_forward(spec, workload))
    loss = model.loss()  # alive to the end of the step
    model.backward(loss)
    optimizer = str(workload.optimizer)
    hidden, others = model.trained(apart=OPTIMIZERS[optimizer].outside is not None)
    wide = workload.master_weights
    dtype = "float32" if wide else adapter_dtype(workload.dtype) if workload.lora_rank else workload.dtype
    scratch = scratch_bytes(optimizer, hidden, dtype, others=others)
    gradient = max((math.prod(shape) for shape in (*hidden, *others)), default=0) * FLOAT32 if wide else 0
    _update = model.hold(scratch + gradient, "temporary")
    masters = FLOAT32 * sum(math.prod(shape) for shape in (*hidden, *others)) if wide else 0
    kept = state_bytes(optimizer, hidden, dtype, others=others) + masters
    return MemoryBreakdown(weights=_weights(spec, workload), optimizer=kept, **model.ledger.fullest)


def _weights(spec: ModelSpec, workload: Workload) -> int:
    if workload.lora_rank is None:
        return round(sum(part.parameters for part in spec.parts) * dtype_bytes(workload.dtype))
    adapters = sum(math.prod(shape) for shape in adapter_shapes(spec, workload.lora_rank, workload.lora_targets))
    return frozen_bytes(spec, workload.dtype, workload.base_bits) + round(adapters * dtype_bytes(adapter_dtype(workload.dtype)))


class _Tuned(Model):
    """The replay, where some parameters get no gradient and the loss may take its logits by pieces."""

    def __init__(self, spec: ModelSpec, workload: Workload, forward: Forward) -> None:
        self.rank = workload.lora_rank
        self.adapted = {part.name for part in adapted_linears(spec, workload.lora_targets)} if self.rank else set()
        self.alive: set[Edge] = set()
        self.arriving: dict[str, bool] = {}
        super().__init__(spec, workload, forward)

    def lives(self, x: Tensor) -> bool:
        """Whether a gradient passes through a tensor. Under recomputation PEFT lets the first hidden state require one."""
        return self.rank is None or self.workload.recompute == "full" or x.edge in self.alive

    def record(
        self, out: Tensor | int, inputs: Sequence[Tensor] = (), saved: Sequence[Tensor] = (), *,
        part: Part | Shapes | None = None, scratch: int = 0, passes: bool = False,
    ) -> Tensor:  # fmt: skip
        """As the tape does it; of a frozen model, without its weights' gradients and what is saved for them alone."""
        if self.rank is None:
            return super().record(out, inputs, saved, part=part, scratch=scratch, passes=passes)
        own = isinstance(part, Mapping) and any(name.startswith(ADAPTER) for name in part)
        weighted = isinstance(part, Linear | Conv) or (isinstance(part, Norm) and part.kind == "rmsnorm")
        if weighted:
            saved, scratch = (), 0
        passing = [x for x in inputs if self.lives(x)]
        if isinstance(out, int):
            self.saves += bool(saved) and bool(own or passing)
            out = self.tensor(out, inputs[0].element if inputs else None)
            self.saves -= bool(saved) and bool(own or passing)
        if not own and not passing:
            return out
        made = super().record(out, passing, saved, part=part if own else None, scratch=scratch, passes=passes)
        self.alive.add(made.edge)
        return made

    def split(self, x: Tensor, *shares: int) -> list[Tensor]:
        recording, self.recording = self.recording, self.recording and self.lives(x)
        parts = super().split(x, *shares)
        self.recording = recording
        if self.lives(x):
            self.alive.update(part.edge for part in parts)
        return parts

    def linear(self, part: Linear, x: Tensor) -> Tensor:
        base = super().linear(part, x)
        self.arriving[part.name] = self.lives(x)
        if part.name not in self.adapted:
            return base
        assert self.rank is not None
        rows, wide = rows_of(part, self.forward), max(FLOAT32, self.element)
        times = wide / self.element  # gradients are made in the model's type, the adapters' are wider
        seen = self.record(Tensor(storage=base.storage, elements=base.elements, element=wide), [base])
        h = self.cast(x, wide)
        inner = self.tensor(rows * self.rank, wide)
        self.record(inner, [h], [h], part={f"{ADAPTER}A.{part.name}": (round(self.rank * times), part.in_features)})
        del h
        outer = self.tensor(rows * part.out_features, wide)
        self.record(outer, [inner], [inner], part={f"{ADAPTER}B.{part.name}": (part.out_features, round(self.rank * times))})
        del inner
        scaled = self.scale(outer)
        del outer
        return self.cast(self.add(seen, scaled), self.element)

    def loss(self) -> Tensor:
        if self.workload.cross_entropy == "full":
            return super().loss()
        stream, hidden = (ends := self.run())[-1]
        heads = [part for part in stream.after if isinstance(part, Linear) and part.component == "head"]
        if len(ends) > 1 or not heads or heads[-1].rows not in ("token", "logits"):
            raise WorkloadError(f"cross_entropy={self.workload.cross_entropy} needs logits at each position; {self.spec.name} has no such head.")
        before = [part for part in stream.after if part.component != "norm"]
        x = self.sequence(before[: before.index(heads[-1])], hidden)
        return self.by_pieces(heads[-1], x)

    def by_pieces(self, head: Linear, x: Tensor) -> Tensor:
        """The head and its loss in one operator."""
        rows = rows_of(head, self.forward)
        found: LossBytes = loss_bytes(
            self.workload.cross_entropy, rows=rows, vocab_size=head.out_features, hidden_size=head.in_features, dtype=self.workload.dtype
        )
        trains = self.rank is None
        names = [head.tied_to + ".weight" if head.tied_to else head.name + ".weight"]
        table = round(head.in_features * head.out_features * self.element)
        fused = self.workload.cross_entropy == "fused"
        working = self.hold(found.forward - (0 if trains or not fused else table), "temporary")
        del working
        gradient = self.tensor(x.elements) if fused else None
        if fused and trains:
            self.gradients[names[0]] = self.hold(table, "gradients")
        saved = [gradient] if gradient else [x]
        weights = dict.fromkeys(names if trains and not fused else [], (head.out_features, head.in_features))
        loss = self.tensor(1, FLOAT32)
        if self.rank is None:
            return Model.record(self, loss, [x], saved, part=weights, scratch=0 if fused else found.backward)
        return self.record(loss, [x], saved, scratch=0 if fused else found.backward)

    def trained(self, *, apart: bool) -> tuple[list[Shape], list[Shape]]:
        """Shapes of what the optimizer updates: hidden layers' matrices, and the rest where the optimizer leaves it to another."""
        if self.rank is not None:
            return adapter_shapes(self.spec, self.rank, self.workload.lora_targets), []
        hidden: list[Shape] = []
        others: list[Shape] = []
        for part in self.spec.parts:
            for name, shape in (self.stored_as.get(part.name) or part.tensors()).items():
                if name in self.gradients:
                    inside = not apart or (isinstance(part, Linear) and part.component != "head" and len(shape) == 2)
                    (hidden if inside else others).append(shape)
        return hidden, others
