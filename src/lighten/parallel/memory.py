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

Held to one rank of torch 2.13's own runs under a fake process group (benchmarks/plan_truth.py, tests/test_plans.py): FSDP2 and HSDP, tensor
parallelism with and without sequence parallelism, both together, 1F1B, GPipe and interleaved stages. By the same rules, but held to no run:
zero1 and zero2, context and expert parallelism, offload, fused kernels. Not covered: memory that a collective's library takes, fragments of an
allocator, adapters over several devices.

What DTensor does and other libraries do not is in it: the gradient of an embedding that is split over the vocabulary is made whole on each rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Literal, TypeAlias

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.optimizer_state import OPTIMIZERS, Shape, scratch_bytes, state_bytes
from lighten.cost.replay.tape import Kind
from lighten.cost.tuning import memory_of
from lighten.cost.workload import Workload, check_workload
from lighten.errors import WorkloadError
from lighten.model.spec import Linear, ModelSpec, Part
from lighten.parallel.communication import expert_ranks, shards, stored_tensors
from lighten.parallel.pipeline import in_flight, passes
from lighten.parallel.plan import Plan
from lighten.parallel.rank import block_kinds, check_plan, rank_parts, rank_spec, rank_workload
from lighten.parallel.replay import Figures, Setting, Unit, figures
from lighten.units import dtype_bytes

FLOAT32 = 4
Received: TypeAlias = Literal["in_flight", "all"]
Kernels: TypeAlias = Literal["eager", "fused"]


def rank_memory(
    spec: ModelSpec, workload: Workload, plan: Plan, stage: int | None = None, *, received: Received = "in_flight", kernels: Kernels = "eager"
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
        kernels: "eager": transformers' own modules, each operator by itself; "fused": what Megatron-LM and compilers keep, where norms, gated and
            approximated activations are one kernel each, and a gathered input is gathered again in backward (held to no run).

    Raises:
        WorkloadError: the plan does not fit the model or the workload.
    """
    check_workload(spec, workload)
    check_plan(spec, workload, plan)
    if stage is None:
        found = [rank_memory(spec, workload, plan, each, received=received, kernels=kernels) for each in fullest_stages(plan)]
        return max(found, key=lambda memory: memory.peak)
    micro = rank_workload(spec, workload, plan)
    held = rank_spec(spec, plan, stage)
    if workload.phase != "train":
        return memory_of(held, micro)
    micro_batches = plan.micro_batches(workload.batch_size)
    if plan.devices == micro_batches == 1 and plan.offload == "none" and kernels == "eager":
        return memory_of(held, micro)
    if workload.lora_rank is not None:
        raise WorkloadError(f"lora_rank={workload.lora_rank} over {plan.devices} devices is not described; use one device.")
    step = _Step(spec, micro, plan, stage, micro_batches)
    step.received, step.kernels = received, kernels
    return step.memory()


def fullest_stages(plan: Plan) -> tuple[int, ...]:
    """Stages of which one is the fullest: the first has most micro-batches in flight, the last has the head, the second most blocks."""
    return tuple(sorted({0, min(1, plan.pp - 1), plan.pp - 1}))


class _Step:
    """What a training step of one rank needs."""

    def __init__(self, spec: ModelSpec, micro: Workload, plan: Plan, stage: int, micro_batches: int) -> None:
        self.spec, self.micro, self.plan, self.stage = rank_spec(spec, plan, stage), micro, plan, stage
        self.parts = rank_parts(spec, plan, stage)
        self.flying, self.micro_batches = in_flight(plan, micro_batches, stage), micro_batches
        self.received: Received = "in_flight"
        self.kernels: Kernels = "eager"
        self.found: dict[bool, Figures] = {}
        self.kinds = block_kinds(spec, windows=micro.attention == "eager")
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
        found = self.figures(summing=summing)
        fullest = found.fullest
        between = (self.plan.virtual_stages - 1) * found.hidden  # a piece's output stands beside what the next one receives
        fullest["activations"] += round(max(Fraction(0), flying - 1) * (found.saved + between)) + between + self.buffers(found.hidden, flying)
        fullest["temporary"] += found.hidden if summing and self.stage > 0 else 0  # the gradient on its way to the stage before
        return fullest

    def update(self) -> dict[Kind, int]:
        """What lives while the optimizer works."""
        found = self.figures(summing=self.micro_batches > 1)
        units = self.setting.units
        gradients = sum(unit.shard for unit in units.values()) if units else self.setting.gradient_bytes + found.more_gradients
        kept = found.inputs + self.buffers(found.hidden)
        return {"gradients": gradients, "activations": kept, "kv_cache": 0, "temporary": self.scratch()}

    def figures(self, *, summing: bool) -> Figures:
        if summing not in self.found:
            self.found[summing] = figures(self.setting, summing=summing)
        return self.found[summing]

    def buffers(self, hidden: int, flying: Fraction | None = None) -> int:
        """Of what is received for micro-batches that are not in flight, where these have some; None: none is in flight."""
        if self.received == "in_flight" or self.plan.pp == 1:
            return 0
        forward, backward = passes(self.plan, self.micro_batches, self.plan.pp - 1 - self.stage)  # what the opposite stage sends, this one receives
        held = 0 if flying is None else flying * (self.plan.virtual_stages - (self.stage == 0))
        return round((max(0, forward - held) + max(0, backward - (flying is not None))) * hidden)

    @cached_property
    def setting(self) -> Setting:
        sharing = self.plan.shard in ("zero2", "zero3")
        return Setting(
            fused=self.kernels == "fused", spec=self.spec, parts=self.parts, kinds=self.kinds, micro=self.micro, plan=self.plan, stage=self.stage,
            units=self.units() if sharing else {}, gathers=self.plan.shard == "zero3" and self.ranks > 1,
            gradient_bytes=round(sum(math.prod(shape) for shapes in self.shapes for shape in shapes) * self.element),
        )  # fmt: skip

    # ---- what stays ----

    def fixed(self) -> dict[str, int]:
        """Weights and the optimizer's state with its masters, between steps."""
        whole = sum(math.prod(shape) for shapes in self.shapes for shape in shapes)
        shared = self.shared
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
        shared = self.shared
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

    @cached_property
    def shapes(self) -> list[list[Shape]]:
        """Part → shapes of its tensors on this rank, before they are shared out; a tensor that two parts have in common stands once."""
        seen: set[str] = set()
        found: list[list[Shape]] = []
        for each in self.parts:
            tensors = {name: shape for name, shape in stored_tensors(each.part).items() if name not in seen and self.trained(each.part)}
            seen.update(tensors)
            found.append(list(tensors.values()))
        return found

    @cached_property
    def shared(self) -> list[list[Shape]]:
        """The same of the fullest rank's shards."""
        return [_shards(shapes, across) for shapes, across in zip(self.shapes, self.across(), strict=True)]

    def trained(self, part: Part) -> bool:
        return part.component != "pooler" or any(each.part.component == "head" for each in self.parts)

    def across(self) -> list[int]:
        """Part → ranks that its tensors are shared out over."""
        few = expert_ranks(self.plan, self.ranks)
        return [few if each.routed else self.ranks for each in self.parts]

    def units(self) -> dict[str, Unit]:
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
            name: Unit(
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
