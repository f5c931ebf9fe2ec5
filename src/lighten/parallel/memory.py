"""Memory of one device of a plan: what a rank of a stage holds at its fullest moment of a training step.

The pass of one micro-batch is replayed on the rank's own shapes, as `lighten.cost.memory` replays a whole model, with what a plan adds:

- tp: each branch's input is whole (gathered with sequence parallelism, and then kept for the backward pass), its output a sum over ranks;
  the head gives the rank's share of the vocabulary, and the loss is taken there (loss parallelism);
- shard="zero3": FSDP2's order of events. Each block is a unit, all outside the blocks another one, which stays gathered. A unit's weights
  are gathered into a buffer and copied out of it; in backward the next unit's buffer is there already; gradients are copied into a buffer,
  which lives until the next unit's, and a shard of their sum is kept. zero2 keeps whole weights and shards of gradients;
- pp: the activations of the other micro-batches in flight (`pipeline.in_flight`); between stages a hidden state in, its gradient out;
- cp: the rank's positions alone; keys and values of all of them while an attention works;
- micro-batches: gradients add up, so that they are there from the start, and each new one is added as soon as it is made.

Source: torch 2.13: `torch/distributed/fsdp/_fully_shard` (`FSDPParamGroup`, `foreach_all_gather`, `foreach_reduce`),
`torch/distributed/tensor`; held to them in tests/test_plans.py and benchmarks/plan_truth.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypeAlias

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.operators import Forward, rows_of
from lighten.cost.optimizer_state import OPTIMIZERS, Shape, scratch_bytes, state_bytes
from lighten.cost.passes import training_forward
from lighten.cost.replay.habits import habits
from lighten.cost.replay.kernels import INT64
from lighten.cost.replay.layout import Stream, Sublayer, reads_source
from lighten.cost.replay.tape import Kind, Storage, Tensor, _Node
from lighten.cost.tuning import _Tuned, memory_of
from lighten.cost.workload import Workload, check_workload
from lighten.errors import WorkloadError
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Norm, Part, block_name
from lighten.parallel.communication import expert_ranks, shards, stored_tensors
from lighten.parallel.pipeline import in_flight, passes
from lighten.parallel.plan import Plan
from lighten.parallel.rank import Placed, check_plan, rank_parts, rank_spec, rank_workload
from lighten.units import dtype_bytes

FLOAT32 = 4
Received: TypeAlias = Literal["in_flight", "all"]


def rank_memory(
    spec: ModelSpec, workload: Workload, plan: Plan, stage: int | None = None, *, received: Received = "in_flight"
) -> MemoryBreakdown:  # fmt: skip
    """Memory of one device: of a stage, or of the stage that needs most.

    A plan of one device and one micro-batch is `memory_of`. With `master_weights` and shard="zero3" the shards are float32 and are the masters
    (FSDP2's MixedPrecisionPolicy with float32 reduction); elsewhere masters are shared out with the optimizer's state. Gradients that are
    all-reduced lie in their buckets (`gradient_as_bucket_view`, Megatron-LM's buffer). offload="optimizer" leaves state and masters in the
    host's memory, and counts nothing of them here. Phases other than train: the rank's shapes with its share of the batch.

    Args:
        stage: of the pipeline, from 0; None: the fullest.
        received: what a stage gets from its neighbours has a buffer while it is in flight (Megatron-LM), or all micro-batches have one each, in
            both directions, all the time (torch.distributed.pipelining).

    Raises:
        WorkloadError: the plan does not fit the model or the workload.
    """
    check_workload(spec, workload)
    check_plan(spec, workload, plan)
    if stage is None:
        found = [rank_memory(spec, workload, plan, each, received=received) for each in fullest_stages(plan)]
        return max(found, key=lambda memory: memory.peak)
    micro = rank_workload(spec, workload, plan)
    held = rank_spec(spec, plan, stage)
    if workload.phase != "train":
        return memory_of(held, micro)
    micro_batches = plan.micro_batches(workload.batch_size)
    if plan.devices == micro_batches == 1 and plan.offload == "none":
        return memory_of(held, micro)
    if workload.lora_rank is not None:
        raise WorkloadError(f"lora_rank={workload.lora_rank} over {plan.devices} devices is not described; use one device.")
    return _Step(spec, micro, plan, stage, micro_batches, received).memory()


def fullest_stages(plan: Plan) -> tuple[int, ...]:
    """Stages of which one is the fullest: the first has most micro-batches in flight, the last has the head, the second most blocks."""
    return tuple(sorted({0, min(1, plan.pp - 1), plan.pp - 1}))


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Weights that FSDP2 gathers at once, in bytes.

    Attributes:
        whole: gathered weights, rows padded; gradient: their gradients in the type that is reduced, padded; shard: the rank's gradients.
    """

    names: frozenset[str]
    whole: int
    gradient: int
    shard: int


class _Step:
    """What a training step of one rank needs."""

    def __init__(self, spec: ModelSpec, micro: Workload, plan: Plan, stage: int, micro_batches: int, received: Received) -> None:
        self.spec, self.micro, self.plan, self.stage = rank_spec(spec, plan, stage), micro, plan, stage
        self.parts = rank_parts(spec, plan, stage)
        self.flying, self.micro_batches, self.received = in_flight(plan, micro_batches, stage), micro_batches, received
        self.replays: dict[bool, _Replay] = {}
        self.optimizer = str(micro.optimizer)
        self.element = dtype_bytes(micro.dtype)
        self.wide = FLOAT32 if micro.master_weights else self.element
        self.ranks = 1 if plan.shard == "none" else plan.sharing_ranks

    def memory(self) -> MemoryBreakdown:
        moments = [self.moment(flying, summing=summing) for flying, summing in self.backwards()]
        best = max((*moments, self.update()), key=lambda kinds: sum(kinds.values()))
        return MemoryBreakdown(**self.fixed(), **best)

    def backwards(self) -> list[tuple[Fraction, bool]]:
        """The fullest backward passes: micro-batches in flight, and whether there are gradients from those before."""
        first, more = (self.flying, False), self.micro_batches * self.plan.virtual_stages > self.flying * self.plan.virtual_stages
        if self.micro_batches == 1:
            return [first]
        one = Fraction(1, self.plan.virtual_stages)
        return [(self.flying, True)] if more else [first, (max(one, self.flying - one), True)]

    def moment(self, flying: Fraction, *, summing: bool) -> dict[Kind, int]:
        """What lives at the fullest moment of a micro-batch's pass, beside weights and the optimizer's state."""
        model = self.replay(summing=summing)
        fullest = dict(model.ledger.fullest)
        fullest["activations"] += round(max(Fraction(0), flying - 1) * model.saved) + self.buffers(model.hidden_bytes, flying)
        fullest["temporary"] += model.hidden_bytes if summing and self.stage > 0 else 0  # the gradient on its way to the stage before
        return fullest

    def update(self) -> dict[Kind, int]:
        """What lives while the optimizer works."""
        model = self.replay(summing=False)
        kept = model.inputs_bytes() + self.buffers(model.hidden_bytes)
        return {"gradients": model.gradient_bytes(), "activations": kept, "kv_cache": 0, "temporary": self.scratch()}

    def buffers(self, hidden: int, flying: Fraction | None = None) -> int:
        """Of what is received for micro-batches that are not in flight, where these have some; None: none is in flight."""
        if self.received == "in_flight" or self.plan.pp == 1:
            return 0
        forward, backward = passes(self.plan, self.micro_batches, self.plan.pp - 1 - self.stage)  # what the opposite stage sends, this one receives
        held = 0 if flying is None else flying * self.plan.virtual_stages
        return round((max(0, forward - held) + max(0, backward - (flying is not None))) * hidden)

    def replay(self, *, summing: bool) -> _Replay:
        if summing not in self.replays:
            self.replays[summing] = self.replayed(summing=summing)
        return self.replays[summing]

    def replayed(self, *, summing: bool) -> _Replay:
        length = self.micro.seq_len // self.plan.cp
        forward = training_forward(self.spec, replace(self.micro, seq_len=length))
        model = _Replay(self, forward, summing=summing)
        loss = model.loss()
        model.leave_root()
        model.saved = model.ledger.live["activations"] - model.inputs_bytes()
        model.hidden_bytes = 0 if self.plan.pp == 1 else model.width_bytes()
        model.backward(loss)
        model.finish()
        return model

    # ---- what stays ----

    def fixed(self) -> dict[str, int]:
        """Weights and the optimizer's state with its masters, between steps."""
        whole = sum(math.prod(shape) for shapes in self.shapes() for shape in shapes)
        shared = [_shards(shapes, across) for shapes, across in zip(self.shapes(), self.across(), strict=True)]
        mine = sum(math.prod(shape) for shapes in shared for shape in shapes)
        kept_as = "float32" if self.micro.master_weights else self.micro.dtype
        state = self.state(shared, kept_as)
        if self.plan.shard == "zero3":
            return {"weights": round(mine * self.wide), "optimizer": 0 if self.plan.offload == "optimizer" else state}
        masters = FLOAT32 * mine if self.micro.master_weights else 0
        return {"weights": round(whole * self.element), "optimizer": 0 if self.plan.offload == "optimizer" else state + masters}

    def state(self, shared: Sequence[Sequence[Shape]], dtype: str) -> int:
        hidden, others = self.split(shared)
        return state_bytes(self.optimizer, hidden, dtype, others=others)

    def scratch(self) -> int:
        """Of the optimizer, one tensor after the other; float32 gradients of one of them where it updates masters."""
        if self.plan.offload == "optimizer":
            return 0
        shared = [_shards(shapes, across) for shapes, across in zip(self.shapes(), self.across(), strict=True)]
        hidden, others = self.split(shared)
        apart = self.micro.master_weights and self.plan.shard != "zero3"
        gradient = FLOAT32 * max((math.prod(shape) for shape in (*hidden, *others)), default=0) if apart else 0
        return gradient + scratch_bytes(self.optimizer, hidden, "float32" if self.micro.master_weights else self.micro.dtype, others=others)

    def split(self, shared: Sequence[Sequence[Shape]]) -> tuple[list[Shape], list[Shape]]:
        """Hidden layers' matrices, and the rest where the optimizer leaves it to another."""
        apart = OPTIMIZERS[self.optimizer].outside is not None
        hidden: list[Shape] = []
        others: list[Shape] = []
        for each, shapes in zip(self.parts, shared, strict=True):
            inside = not apart or (isinstance(each.part, Linear) and each.part.component != "head")
            for shape in shapes:
                (hidden if inside and (not apart or len(shape) == 2) else others).append(shape)
        return hidden, others

    def shapes(self) -> list[list[Shape]]:
        """Part → shapes of its tensors on this rank, before they are shared out; a tensor that two parts have in common stands once."""
        seen: set[str] = set()
        found: list[list[Shape]] = []
        for each in self.parts:
            tensors = {name: shape for name, shape in stored_tensors(each.part).items() if name not in seen and self.trained(each.part)}
            seen.update(tensors)
            found.append(list(tensors.values()))
        return found

    def trained(self, part: Part) -> bool:
        return part.component != "pooler" or any(each.part.component == "head" for each in self.parts)

    def across(self) -> list[int]:
        """Part → ranks that its tensors are shared out over."""
        few = expert_ranks(self.plan, self.ranks)
        return [few if each.routed else self.ranks for each in self.parts]

    def units(self) -> dict[str, _Unit]:
        """Block, or "" for what stands outside → its unit."""
        found: dict[str, list[int]] = {}
        names: dict[str, set[str]] = {}
        for each in shards(self.parts, self.ranks, expert_ranks(self.plan, self.ranks)):
            sums = found.setdefault(each.name, [0, 0])
            sums[0] += each.padded
            sums[1] += each.shard
        for placed in self.parts:
            block = "" if placed.block in (None, "<", ">") else str(placed.block)
            names.setdefault(block, set()).update(_gradient_names(placed.part))
        return {
            name: _Unit(
                names=frozenset(names[name]), whole=round(padded * self.element), gradient=round(padded * self.wide), shard=round(shard * self.wide)
            )
            for name, (padded, shard) in found.items()
        }  # fmt: skip


def _gradient_names(part: Part) -> set[str]:
    if isinstance(part, Linear) and part.tied_to:
        return {*part.tensors(), f"{part.tied_to}.weight"}
    return {*part.tensors(), *stored_tensors(part)}


def _shards(shapes: Sequence[Shape], ranks: int) -> list[Shape]:
    """Shapes of the fullest rank's shards: ⌈rows / ranks⌉ rows."""
    return [(-(-shape[0] // ranks), *shape[1:]) if shape else shape for shape in shapes]


@dataclass(kw_only=True)
class _Hook(_Node):
    """An operator of the backward pass that hands on its gradient and then calls."""

    call: Callable[[], None]


class _Replay(_Tuned):
    """One micro-batch on one rank.

    Attributes:
        saved: bytes that a micro-batch holds between its forward and its backward pass.
        tables: split embeddings → elements of the whole table; twice: those whose gradient is a sum, since they are tied.
    """

    def __init__(self, step: _Step, forward: Forward, *, summing: bool) -> None:
        self.step, self.plan = step, step.plan
        self.roles: dict[str, Placed] = {each.part.name: each for each in step.parts}
        self.units = step.units() if self.plan.shard in ("zero2", "zero3") else {}
        self.gathered: dict[str, Storage] = {}
        self.buffers: dict[str, Storage] = {}
        self.reduced: dict[str, Storage] = {}
        self.reducing: Storage | None = None
        self.copied: Storage | None = None
        self.order = list(dict.fromkeys(str(each.block) for each in step.parts if each.block not in (None, "<", ">")))
        self.routing = False
        self.saved = self.hidden_bytes = 0
        self.tables: dict[str, int] = {}
        self.twice: set[str] = set()
        super().__init__(step.spec, replace(step.micro, seq_len=forward.query_len), forward)
        if self.units and summing:
            self.reduced = {name: self.hold(unit.shard, "gradients") for name, unit in self.units.items()}
        self.summing = not self.units and summing
        self.totals = self.hold(self.whole_gradients() if self.summing else 0, "gradients")

    def loss(self) -> Tensor:
        """A stage that is not the last one starts its backward pass from a gradient of what it sent, which lives as long as that."""
        if self.step.stage == self.plan.pp - 1:
            return super().loss()
        ((_, hidden),) = self.run()
        return hidden

    def embed(self, stream: Stream) -> Tensor:
        """What the first blocks read: of a later stage, what it received."""
        if self.step.stage == 0:
            return super().embed(stream)
        return self.tensor(round(self.width_bytes() / self.element))

    def headed(self, stream: Stream, hidden: Tensor) -> Tensor:
        """A stage's output, which a pipeline keeps to the end of its backward pass."""
        made = super().headed(stream, hidden)
        self.kept += [made] if self.plan.pp > 1 else []
        return made

    def width_bytes(self) -> int:
        """Of the hidden state that goes from stage to stage."""
        first = next(part for part in self.spec.parts if isinstance(part, Norm))
        return round(self.batch * self.queries * first.size * self.element) // self.split_positions

    def whole_gradients(self) -> int:
        return round(sum(math.prod(shape) for shapes in self.step.shapes() for shape in shapes) * self.element)

    def gradient_bytes(self) -> int:
        """Gradients that the optimizer finds."""
        if self.units:
            return sum(unit.shard for unit in self.units.values())
        more = sum(elements - elements // self.plan.tp for name, elements in self.tables.items() if name not in self.twice)
        return self.whole_gradients() + round(more * self.element)

    def inputs_bytes(self) -> int:
        return sum(storage.size for storage in self.inputs)

    # ---- tensor parallelism ----

    @property
    def split_positions(self) -> int:
        return self.plan.tp if self.plan.sequence_parallel else 1

    def gather(self, x: Tensor) -> Tensor:
        """What a split branch reads: all positions. Its gradient is a sum over the ranks."""
        if self.plan.tp == 1:
            return x
        if not self.plan.sequence_parallel:
            return self.record(x.view(), [x])
        whole = x.elements * self.plan.tp
        apart = self.hold(whole * x.element)  # as the collective gives it, before its pieces are put in order
        made = self.tensor(whole, x.element)
        del apart
        return self.record(made, [x], scratch=made.bytes)

    def sum_up(self, x: Tensor) -> Tensor:
        """What a split branch gives: the sum over the ranks, of the rank's own positions with sequence parallelism."""
        if self.plan.tp == 1:
            return x
        if not self.plan.sequence_parallel:
            return self.record(x.elements, [x], passes=True)
        apart = self.hold(x.bytes)
        made = self.tensor(x.elements // self.plan.tp, x.element)
        del apart
        return self.record(made, [x], scratch=x.bytes)

    def attention(self, sub: Sublayer, x: Tensor, memory: Tensor | None, after: Sequence[Part] = ()) -> tuple[Tensor, Tensor | None]:
        core = sub.core
        if memory is not None and isinstance(core, Attention) and reads_source(core):
            memory = self.gather(memory)
        return super().attention(sub, self.gather(x), memory, after)

    def mlp(self, sub: Sublayer, x: Tensor) -> Tensor:
        return super().mlp(sub, self.gather(x))

    def experts(self, sub: Sublayer, x: Tensor) -> Tensor:
        self.routing = True
        seen = replace(sub, before=self.as_experts(sub.before), after=self.as_experts(sub.after))
        made = super().experts(seen, self.gather(x))
        self.routing = False
        return self.sum_up(made)

    def as_experts(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Parts of a branch as the replay knows experts and their router: by their number in the whole model, however many the rank has."""
        return tuple(replace(part, experts=self.experts_of(part)) if isinstance(part, Linear) and self.is_routed(part) else part for part in parts)

    def experts_of(self, part: Linear) -> int:
        return part.experts * self.plan.ep

    def fused_weights(self, parts: Sequence[Linear]) -> Mapping[str, tuple[int, ...]]:
        held = super().fused_weights([replace(part, experts=part.experts // self.plan.ep) for part in parts])
        return {name: shape if shape[0] * self.plan.ep == parts[0].experts else (1, *shape) for name, shape in held.items()}

    def branch(self, sub: Sublayer, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One expert a rank is still an expert."""
        if isinstance(sub.core, Attention) or not any(self.is_routed(part) for part in (*sub.before, *sub.after)):
            return super().branch(sub, x, memory)
        out = self.experts(sub, x)
        return self.dropout(out, self.habits.hidden_dropout), None

    def is_routed(self, part: Part) -> bool:
        return part.name in self.roles and self.roles[part.name].routed

    def linear(self, part: Linear, x: Tensor) -> Tensor:
        placed = self.roles.get(part.name)
        if placed is None or self.plan.tp == 1:
            return super().linear(part, x)
        if placed.role == "vocabulary":
            x = self.gather(x)
        if not placed.seen and self.split_positions > 1:
            return self.record(x.elements // part.in_features * part.out_features, [x], [x], part=part)
        made = super().linear(part, x)
        return self.sum_up(made) if placed.role == "row" and not self.routing else made

    def embedding(self, part: Embedding, indices: Sequence[Tensor]) -> Tensor:
        """DTensor makes the gradient of a split table whole, and cuts it."""
        placed = self.roles.get(part.name)
        if placed is None or placed.role != "vocabulary" or self.plan.tp == 1:
            made = super().embedding(part, indices)
            return made if self.split_positions == 1 else self.record(made.elements // self.split_positions, [made])
        out = self.tensor(rows_of(part, self.forward) * part.embedding_dim)
        name, shape = next(iter(part.tensors().items()), ("", (0, 0)))
        self.tables[name] = math.prod(shape) * self.plan.tp
        whole = {name: (shape[0] * self.plan.tp, shape[1])} if name else {}
        return self.sum_up(self.record(out, saved=indices, part=whole))

    def cross_entropy(self, logits: Tensor, stream: Stream) -> Tensor:
        """Of a split vocabulary: each rank keeps its share of the log-probabilities, and its backward pass is one operator.

        Source: `_log_softmax` and `_nll_loss_and_log_softmax_backward` of torch/distributed/tensor/parallel/loss.py.
        """
        heads = [part for part in stream.after if part.name in self.roles and self.roles[part.name].role == "vocabulary"]
        if self.plan.tp == 1 or not heads:
            return super().cross_entropy(logits, stream)
        wide = self.cast(logits, FLOAT32) if self.spec.is_decoder and self.habits.wide_loss else logits
        narrow = wide.element < FLOAT32  # its values are computed in float32
        copy = self.hold(wide.elements * FLOAT32 if narrow else 0)
        shifted = self.hold(wide.elements * FLOAT32)
        powers = self.hold(wide.elements * FLOAT32)
        del powers
        result = self.hold(wide.elements * FLOAT32 if narrow else 0)
        found = self.tensor(wide.elements, wide.element)
        del copy, shifted, result
        self.record(found, [wide], passes=True)
        targets = self.tensor(self.batch * self.queries, INT64)
        return self.record(1, [found], [found, targets], scratch=2 * found.bytes)

    def fused(self, part: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """With context parallelism keys and values of all positions pass through."""
        passing = self.hold((k.bytes + v.bytes) * self.plan.cp if self.plan.cp > 1 else 0, "temporary")
        made = super().fused(part, q, k, v, mask)
        del passing
        return made

    # ---- FSDP2 ----

    def body(self, stream: Stream, memory: Tensor | None) -> Tensor:
        """A stream's last hidden state, each block gathered before it runs."""
        self.queries = self.length(stream)
        self.keys = self.forward.key_len if stream.rows == "token" else self.queries
        self.habits = habits(self.spec, stream.rows)
        self.enter("")
        embedded = self.embed(stream)
        self.shared = self.position_tables(stream)
        x = embedded
        given = [memory] if memory is not None and any(isinstance(part, Attention) and reads_source(part) for part in stream.parts) else []
        for parts in stream.blocks:
            name = next((found for found in map(block_name, parts) if found), "")
            self.enter(name)
            x = self.hook(x, lambda name=name: self.scatter(name))  # type: ignore[misc]
            run = self.block(parts)
            x = self.checkpoint(run, x, *given) if self.workload.recompute == "full" else run(x, *given)
            self.leave(name)
            x = self.hook(x, lambda name=name: self.return_to(name))  # type: ignore[misc]
        self.shared = []
        self.bias = {}
        x = self.sequence([part for part in stream.after if part.component == "norm"], x)
        return self.dropout(x, self.habits.last_dropout)

    def hook(self, x: Tensor, call: Callable[[], None]) -> Tensor:
        if not self.units or not self.recording:
            return x
        out = x.view()
        self.nodes.append(_Hook(outs=(out.edge,), inputs=[(x.edge, None)], call=call))
        return out

    @property
    def gathers(self) -> bool:
        return self.plan.shard == "zero3" and self.step.ranks > 1

    def enter(self, name: str) -> None:
        """Gather into a buffer, drop the one before, copy out."""
        if not self.gathers or name not in self.units or name in self.gathered:
            return
        buffer = self.hold(self.units[name].whole, "temporary")
        self.copied = None
        self.gathered[name] = self.hold(self.units[name].whole, "temporary")
        self.copied = buffer

    def leave(self, name: str) -> None:
        self.gathered.pop(name, None)

    def leave_root(self) -> None:
        """The end of the forward pass; the last block is asked for when its backward pass is near."""
        self.copied = None
        if self.gathers and self.order:
            self.prefetch(len(self.order) - 1)

    def prefetch(self, index: int) -> None:
        if index >= 0:
            self.buffers[self.order[index]] = self.hold(self.units[self.order[index]].whole, "temporary")

    def return_to(self, name: str) -> None:
        """Before a block's backward pass: its weights are copied out of their buffer, and the next ones asked for."""
        if not self.gathers or name not in self.units:
            return
        self.gathered[name] = self.hold(self.units[name].whole, "temporary")
        self.buffers.pop(name, None)
        self.prefetch(self.order.index(name) - 1)

    def scatter(self, name: str) -> None:
        """Behind a unit's backward pass: whole weights go, gradients are copied into a buffer, which lives until the next one."""
        if name not in self.units:
            return
        self.gathered.pop(name, None)
        unit = self.units[name]
        self.reducing = None
        self.reducing = self.hold(unit.gradient, "temporary")
        for each in unit.names:
            self.gradients.pop(each, None)
        shard = self.hold(unit.shard, "gradients")
        if name not in self.reduced:
            self.reduced[name] = shard

    def finish(self) -> None:
        """What stands outside the blocks comes last."""
        self.scatter("")
        self.reducing = None

    def _step(self, node: _Node) -> None:
        again = [name for name in node.weights if name in self.tables and name in self.gradients]
        if self.summing and node.weights:
            self._step_summing(node)
        elif again:
            self._step_again(node, again[0])
        else:
            super()._step(node)
        if isinstance(node, _Hook):
            node.call()

    def _step_again(self, node: _Node, name: str) -> None:
        """The second gradient of a split table that is tied: whole, then cut, then added to the first."""
        whole = self.hold(self.tables[name] * self.element, "gradients")
        node.weights = {}
        super()._step(node)
        cut = self.hold(whole.size // self.plan.tp, "gradients")
        total = self.hold(cut.size, "gradients")
        self.gradients[name] = total
        self.twice.add(name)

    def _step_summing(self, node: _Node) -> None:
        """A weight's new gradient is added to the sum and goes."""
        made = {name: self.hold(math.prod(shape) * self.element, "temporary") for name, shape in node.weights.items()}
        node.weights = {}
        super()._step(node)
        del made
