"""What the ranks of a plan send each other in a training step: which collectives, of how many bytes, over which link, for how long.

b sequences of a micro-batch, s positions of a rank, h hidden size, e bytes of an element, t = tp, L layers of the stage, m micro-batches

    tp   behind each branch of a block an all-reduce of b·s·h·e; before it the same in backward. With sequence parallelism (Korthikanti et
         al. 2022, arXiv:2205.05198) a reduce-scatter and an all-gather in the place of each, and one small all-reduce for each norm's weight
    cp   keys and values of the whole sequence in forward and again in backward, and the sum of their gradients
    ep   each routed row to its expert and back, in forward and backward
    pp   a micro-batch's hidden state to the next stage, its gradient to the one before
    dp   gradients and weights, as `shard` says

The sizes are those of the whole buffer: what stands before a scatter, behind a gather, or on every rank of an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from lighten.cost.replay.habits import habits
from lighten.cost.training import _recomputed
from lighten.cost.workload import Workload
from lighten.device.device import Device
from lighten.errors import WorkloadError
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, ModelSpec, Norm, Part
from lighten.parallel.pipeline import check_schedule, passes
from lighten.parallel.plan import Plan
from lighten.parallel.rank import Placed, rank_forward, rank_parts
from lighten.units import dtype_bytes

Kind: TypeAlias = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
Group: TypeAlias = Literal["tp", "cp", "pp", "dp", "ep"]
When: TypeAlias = Literal["forward", "backward", "step"]
FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Messages of one kind that a rank takes part in, `count` times a step.

    Attributes:
        bytes: of the whole buffer of one of them: before a scatter, behind a gather; of an all-to-all, what one rank sends in all.
        group: whose ranks; "dp" are those that share out weights and gradients (context-parallel ones too), or that hold copies.
        size: ranks in the group.
        stride: from one of its ranks to the next, in the order of `Plan`.
        when: in forward, in backward (recomputation too), or once behind the last micro-batch.
        overlappable: nothing that is computed next waits for it.
        of: what is sent, for people.
    """

    kind: Kind
    bytes: int
    group: Group
    size: int
    count: int
    when: When
    overlappable: bool
    stride: int = 1
    of: str = ""


def collectives(spec: ModelSpec, workload: Workload, plan: Plan, stage: int = 0) -> list[Collective]:
    """Everything that one rank of a stage sends in a training step; nothing where a plan has one device.

    shard="none": gradients are all-reduced behind the last micro-batch. zero1: reduce-scattered there, and weights gathered. zero2:
    gradients are reduce-scattered in each micro-batch's backward pass, weights gathered once a step. zero3 (FSDP2): each block's weights are
    gathered in forward and again in backward of each micro-batch, those outside the blocks once; gradients as in zero2. Shards are
    rounded up to whole rows of each tensor, as FSDP2 does. With `shard_group` the shards are then all-reduced over the copies.
    Gradients are sent in the activations' type, in float32 with `master_weights`.

    Not in it: gradient norms, the mean of the loss, the shapes that a pipeline's stages tell each other.

    Raises:
        WorkloadError: the plan does not fit the model or the workload; the phase is not train.
    """
    if workload.phase != "train":
        raise WorkloadError(f"collectives of phase {workload.phase} are not described; phase train has them.")
    forward = rank_forward(spec, workload, plan)
    micro_batches = plan.micro_batches(workload.batch_size)
    check_schedule(plan, micro_batches)
    parts = rank_parts(spec, plan, stage)
    rows = forward.batch_size * forward.query_len
    found: list[Collective] = []
    if plan.tp > 1:
        found += _tensor_parallel(spec, parts, plan, workload, rows, micro_batches)
    if plan.cp > 1:
        found += _context_parallel(parts, plan, workload, rows, micro_batches)
    if plan.ep > 1:
        found += _expert_parallel(parts, plan, workload, rows, micro_batches)
    if plan.pp > 1:
        found += _pipeline(spec, plan, workload, rows, micro_batches, stage)
    if plan.dp * plan.cp > 1:
        found += _data_parallel(parts, plan, workload, micro_batches)
    return _merged(found)


def wire_bytes(collective: Collective) -> float:
    """Bytes that each rank sends for one of them in a ring: 2 (n - 1)/n of an all-reduce's buffer, (n - 1)/n of another's; all of a message.

    >>> wire_bytes(Collective(kind="all_reduce", bytes=8, group="tp", size=4, count=1, when="forward", overlappable=False))
    12.0
    """
    if collective.kind == "send":
        return float(collective.bytes)
    return (2 if collective.kind == "all_reduce" else 1) * (collective.size - 1) / collective.size * collective.bytes


def seconds(collective: Collective, device: Device) -> float:
    """Seconds of one of them over the links that its group needs, at their full rate.

    A group within one level of links uses that one. A larger one goes over both: k of its ranks are neighbours inside a node, and each of
    these sends its 1/k of the buffer over a link of its own between nodes; the slower level decides. A link's latency, where it is known,
    counts once for each step of the ring.

    Raises:
        DeviceError: no known link joins so many.
    """
    span = collective.size * collective.stride
    link = device.link(span)
    steps = {"send": 1, "all_reduce": 2 * (collective.size - 1)}.get(collective.kind, collective.size - 1)
    inner = next((each for each in device.links if each.devices is not None and each.devices < span and each is not link), None)
    neighbours = min(collective.size, max(1, (inner.devices or 1) // collective.stride)) if inner else 1
    waiting = steps * (link.latency_s or 0.0)
    if inner is None or neighbours == 1 or collective.kind == "send":
        return wire_bytes(collective) / link.bytes_per_s + waiting
    nodes = -(-collective.size // neighbours)
    inside = wire_bytes(replace(collective, size=neighbours)) / inner.bytes_per_s
    between = wire_bytes(replace(collective, size=nodes, bytes=-(-collective.bytes // neighbours))) / link.bytes_per_s
    if collective.kind == "all_to_all":  # each rank sends to each other one: most of it leaves the node
        between = collective.bytes * (nodes - 1) / nodes / link.bytes_per_s
    return max(inside, between) + waiting


def stride(plan: Plan, group: Group) -> int:
    """From one rank of a group to its next: tensor × context × pipeline × data, innermost first.

    Of a group over context and data it is the mean distance, so that size · stride is what the group spans.
    """
    data = plan.tp * plan.pp
    return {"tp": 1, "cp": plan.tp, "ep": plan.tp if plan.cp % plan.ep == 0 else data, "pp": plan.tp * plan.cp, "dp": data}[group]


# ---- tensor parallelism ----


def _tensor_parallel(spec: ModelSpec, parts: tuple[Placed, ...], plan: Plan, workload: Workload, rows: int, m: int) -> Iterator[Collective]:
    element = dtype_bytes(workload.dtype)
    again = _again(spec, parts, workload)
    gather: Kind = "all_gather" if plan.sequence_parallel else "all_reduce"
    reduce: Kind = "reduce_scatter" if plan.sequence_parallel else "all_reduce"
    yield from _loss(spec, parts, plan, workload, rows, m)
    for i, each in enumerate(parts):
        alone = plan.sequence_parallel and not each.seen and each.role == "whole"  # its weight's gradient is of the rank's positions
        if not (each.gathers or each.reduces or alone):
            continue
        one = Collective(
            kind=reduce, bytes=round(rows * _hidden(each) * element), group="tp", size=plan.tp, count=m, when="forward", overlappable=False,
            of="activations",
        )  # fmt: skip
        backward = replace(one, when="backward", of="gradients of activations")
        if each.gathers:
            if plan.sequence_parallel:
                yield replace(one, kind=gather)
                yield from [replace(one, kind=gather, when="backward")] if i in again else []
            yield backward
        if each.reduces:
            yield one
            yield from [replace(one, when="backward")] if i in again else []
            yield from [replace(backward, kind=gather)] if plan.sequence_parallel else []
        if alone:
            for shape in each.part.tensors().values():
                yield replace(
                    one, kind="all_reduce", bytes=round(_size(shape) * element), when="backward", overlappable=True, of="gradients of norms"
                )


def _loss(spec: ModelSpec, parts: tuple[Placed, ...], plan: Plan, workload: Workload, rows: int, m: int) -> Iterator[Collective]:
    """Largest logit, sum of powers and target's log-probability of each row, where the vocabulary is split.

    Source: `_log_softmax` and `_nll_loss_forward` of torch/distributed/tensor/parallel/loss.py.
    """
    head = next((each.part for each in parts if each.role == "vocabulary" and isinstance(each.part, Linear)), None)
    if head is None:
        return
    wide = spec.is_decoder and habits(spec, head.rows).wide_loss
    for size in (FLOAT32, FLOAT32, FLOAT32 if wide else dtype_bytes(workload.dtype)):
        yield Collective(
            kind="all_reduce", bytes=round(rows * size), group="tp", size=plan.tp, count=m, when="forward", overlappable=False, of="the loss"
        )  # fmt: skip


def _hidden(each: Placed) -> int:
    """The hidden size that a branch reads or writes."""
    if isinstance(each.part, Embedding):
        return each.part.embedding_dim
    if isinstance(each.part, Linear):
        return each.part.out_features if each.role == "row" else each.part.in_features
    return 0


def _again(spec: ModelSpec, parts: tuple[Placed, ...], workload: Workload) -> frozenset[int]:
    """Parts whose forward pass recomputation runs a second time."""
    if workload.recompute != "full":
        return frozenset()
    found: set[int] = set()
    names = [name for name in dict.fromkeys(each.block for each in parts) if name not in (None, "<", ">")]
    for name in names:
        mine = [i for i, each in enumerate(parts) if each.block == name]
        dropped = habits(spec, parts[mine[0]].part.rows).hidden_dropout > 0
        found.update(mine[: len(_recomputed(tuple(parts[i].part for i in mine), dropped=dropped))])
    return frozenset(found)


# ---- context, experts, pipeline ----


def _context_parallel(parts: tuple[Placed, ...], plan: Plan, workload: Workload, rows: int, m: int) -> Iterator[Collective]:
    element = dtype_bytes(workload.dtype)
    for each in parts:
        part = each.part
        if isinstance(part, Attention):
            size = round(rows * plan.cp * part.num_key_value_heads * (part.head_dim + part.value_dim) * element)
            made = Collective(
                kind="all_gather", bytes=size, group="cp", size=plan.cp, count=m, when="forward", overlappable=True, stride=plan.tp,
                of="keys and values",
            )  # fmt: skip
            yield made
            yield replace(made, when="backward")
            yield replace(made, kind="reduce_scatter", when="backward", of="gradients of keys and values")


def _expert_parallel(parts: tuple[Placed, ...], plan: Plan, workload: Workload, rows: int, m: int) -> Iterator[Collective]:
    element = dtype_bytes(workload.dtype)
    again = workload.recompute == "full"
    for each in parts:
        part = each.part
        if isinstance(part, Linear) and each.routed and each.role == "row":
            made = Collective(
                kind="all_to_all", bytes=round(rows * part.experts_per_row * part.out_features * element), group="ep", size=plan.ep, count=2 * m,
                when="forward", overlappable=False, stride=plan.tp, of="rows for experts",
            )  # fmt: skip
            yield made
            yield replace(made, when="backward", count=(4 if again else 2) * m)


def _pipeline(spec: ModelSpec, plan: Plan, workload: Workload, rows: int, m: int, stage: int) -> list[Collective]:
    size = round(rows // (plan.tp if plan.sequence_parallel else 1) * _width(spec) * dtype_bytes(workload.dtype))
    forward, backward = passes(plan, m, stage)
    at = stride(plan, "pp")
    sent = Collective(
        kind="send", bytes=size, group="pp", size=plan.pp, count=forward, when="forward", overlappable=True, stride=at, of="activations"
    )  # fmt: skip
    found = [each for each in (sent, replace(sent, count=backward, when="backward", of="gradients of activations")) if each.count]
    tied = next((part for part in spec.parts if isinstance(part, Linear) and part.tied_to and part.component == "head"), None)
    if tied and stage in (0, plan.pp - 1):
        shared = -(-tied.out_features // plan.tp) * tied.in_features
        size, apart = round(shared * _gradient_bytes(workload)), at * (plan.pp - 1)
        of = "gradients of a tied embedding"
        found.append(replace(sent, kind="all_reduce", bytes=size, size=2, count=1, when="step", overlappable=False, stride=apart, of=of))
    return found


def _width(spec: ModelSpec) -> int:
    """Values of the hidden state that goes from block to block."""
    blocks = [part for part in spec.parts if isinstance(part, Norm | Elementwise) and (isinstance(part, Norm) or part.kind == "add")]
    return next((part.size for part in blocks if part.component != "embedding"), 0)


# ---- data parallelism ----


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Parameters of one unit that is gathered and scattered at once: a block, or all that stands outside the blocks.

    Attributes:
        name: the block's, or "".
        values: of its tensors on one rank.
        padded: the same, each tensor's rows rounded up to a multiple of the ranks that share it: what the buffers of collectives hold.
        shard: values of the fullest rank's shard.
        expert: of experts, whose gradients fewer ranks have in common.
    """

    name: str
    values: int
    padded: int
    shard: int
    expert: bool


def shards(parts: Iterable[Placed], ranks: int, expert_ranks: int) -> list[Shards]:
    """The units of a rank's parts, for a number of ranks that one copy is shared out over.

    Each tensor is divided along its first dimension into equal pieces of ⌈rows / ranks⌉ rows.

    Source: `FSDPParam._init_sharded_param` of torch 2.13 (torch/distributed/fsdp/_fully_shard/_fsdp_param.py).
    """
    found: dict[tuple[str, bool], list[int]] = {}
    seen: set[str] = set()
    for each in parts:
        expert = each.routed and expert_ranks != ranks
        across = expert_ranks if expert else ranks
        block = "" if each.block in (None, "<", ">") else str(each.block)
        sums = found.setdefault((block, expert), [0, 0, 0])
        for name, shape in stored_tensors(each.part).items():
            if name in seen:
                continue
            seen.add(name)
            size = _size(shape)
            mine = -(-shape[0] // across) * (size // shape[0]) if shape and size else size
            sums[0] += size
            sums[1] += mine * across
            sums[2] += mine
    return [
        Shards(name=name, values=values, padded=padded, shard=shard, expert=expert)
        for (name, expert), (values, padded, shard) in found.items()
        if values
    ]  # fmt: skip


def stored_tensors(part: Part) -> dict[str, tuple[int, ...]]:
    """A part's parameters as modules of transformers 5 keep them: those of all experts of a layer in one tensor."""
    if isinstance(part, Linear) and part.experts > 1 and "*" in part.name:
        shape = (part.experts, part.out_features, part.in_features)
        return {f"{part.name}.weight": shape} | ({f"{part.name}.bias": shape[:2]} if part.bias else {})
    return part.tensors() if part.parameters else {}


def expert_ranks(plan: Plan, ranks: int) -> int:
    """Ranks that share out one expert's weights, of those that share out everything else's."""
    return max(1, ranks // plan.ep)


def _gradient_bytes(workload: Workload) -> float:
    return FLOAT32 if workload.master_weights else dtype_bytes(workload.dtype)


def _data_parallel(parts: tuple[Placed, ...], plan: Plan, workload: Workload, m: int) -> Iterator[Collective]:
    every = plan.dp * plan.cp
    ranks = every if plan.shard == "none" else plan.sharing_ranks
    at = stride(plan, "dp")
    for unit in shards(parts, ranks, expert_ranks(plan, ranks)):
        group, whole = (expert_ranks(plan, ranks), every // plan.ep) if unit.expert else (ranks, every)
        apart = at * plan.ep if unit.expert else at
        one = Collective(
            kind="all_reduce", bytes=round(unit.values * _gradient_bytes(workload)), group="dp", size=whole, count=1, when="backward",
            overlappable=True, stride=apart, of="gradients",
        )  # fmt: skip
        if plan.shard == "none":
            yield from [one] if whole > 1 else []
            continue
        times = 1 if plan.shard == "zero1" else m
        if group > 1:
            yield from _sharing(plan, workload, unit, replace(one, size=group, count=times), m)
        if whole > group:
            copies = round(unit.shard * _gradient_bytes(workload))
            yield replace(one, bytes=copies, size=whole // group, count=times, stride=apart * group)


def _sharing(plan: Plan, workload: Workload, unit: Shards, one: Collective, m: int) -> Iterator[Collective]:
    weights = replace(one, kind="all_gather", bytes=round(unit.padded * dtype_bytes(workload.dtype)), count=1, when="forward", of="weights")
    if plan.shard == "zero3":
        yield replace(weights, count=m)
        if unit.name:
            yield replace(weights, count=m, when="backward")
    else:
        yield replace(weights, when="step" if plan.shard == "zero1" else "forward")
    yield replace(one, kind="reduce_scatter", bytes=round(unit.padded * _gradient_bytes(workload)))


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _merged(found: Iterable[Collective]) -> list[Collective]:
    """The same ones counted together."""
    first: dict[tuple[Any, ...], Collective] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for each in found:
        key = (each.kind, each.bytes, each.group, each.size, each.when, each.overlappable, each.stride, each.of)
        first.setdefault(key, each)
        counts[key] = counts.get(key, 0) + each.count
    return [replace(first[key], count=count) for key, count in counts.items()]
