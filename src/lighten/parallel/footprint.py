"""Memory of many plans at once: what `rank_memory` replays for one plan, as arithmetic on columns.

A rank holds weights, gradients and state, whose shards follow from shapes alone, and activations, which grow with blocks, positions and
micro-batches in flight. How, is measured on replays of two and three blocks for each way to cut a block (tp, ep, recomputation, sequence
parallelism); what lies between is taken as straight lines:

    each = saved · blocks + entry            what a micro-batch keeps for its backward pass
    (in flight - 1) · each + max(each + passing, floor)

where saved, entry and passing grow with the positions of a rank, and a floor does not (a table's gradient).

    pp=1     blocks of all of the model, embedding and head
    pp>1     the first stage (embedding, most micro-batches in flight), the second (most blocks), the last (head)

With sharded gradients or weights, FSDP2's buffers are added at its three fullest moments: at the loss, in a block's backward pass, and at the
end, when what stands outside the blocks is scattered. Blocks count as the mean of all blocks. It is held to `rank_memory` in
tests/test_search.py: a search ranks by it, and shows nothing that `rank_memory` itself was not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lighten.cost.optimizer_state import scratch_bytes, state_bytes
from lighten.cost.replay.layout import streams
from lighten.cost.workload import RECOMPUTES, Workload
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Norm, Part, block_name
from lighten.parallel.columns import Columns
from lighten.parallel.communication import stored_tensors
from lighten.parallel.memory import rank_memory
from lighten.parallel.plan import OFFLOADS, SHARDS, Plan
from lighten.parallel.rank import block_names, rank_parts, stage_blocks
from lighten.units import dtype_bytes

Floats: TypeAlias = NDArray[np.float64]
Stage: TypeAlias = Literal["only", "first", "second", "last"]
FLOAT32 = 4
BLOCKS, MANY = 2, 64
"""Blocks of a stage that a replay has (one more tells what each block adds), and sequences of its micro-batch: so many that activations decide."""
PLACES: dict[Stage, tuple[int, ...]] = {"only": (0, 1, 2), "first": (0, 1), "second": (1,), "last": (1, 2, 3)}
"""Kind of stage → what it holds: 0 what stands before the blocks, 1 blocks, 2 what stands behind them, 3 the weight of its own that a tied head has
on another stage than its embedding."""
LINE = ("entry", "passing", "floor")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a kind of stage needs beside its blocks, in bytes.

    Attributes:
        entry: kept of each sequence in flight.
        passing: of each sequence, at the fullest moment beside what is kept.
        floor: of what is kept and passes, at least.
    """

    entry: float
    passing: float
    floor: float


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Activations and what comes and goes, of one way to cut a block; `saved`: bytes that a block keeps of one sequence."""

    saved: float
    stages: Mapping[Stage, Line]

    def mixed(self, other: Lines, share: float) -> Lines:
        """Between two, `share` of the other one."""
        stages: dict[Stage, Line] = {
            stage: Line(**{name: (1 - share) * getattr(line, name) + share * getattr(other.stages[stage], name) for name in LINE})
            for stage, line in self.stages.items()
        }
        return Lines(saved=(1 - share) * self.saved + share * other.saved, stages=stages)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """One rank's tensors, those of all blocks together.

    Attributes:
        rows, rest: first dimension, and product of the others.
        place: as in `PLACES`; slot: 0 before, the block's number from 1, then behind, then a tied head's own.
        routed: an expert's; hidden: a matrix of a hidden layer.
        slots: how many there are.
        table: values that the gradient of a vocabulary's table has more than the rank's share: DTensor sums up whole ones.
    """

    rows: Floats
    rest: Floats
    place: NDArray[np.int64]
    slot: NDArray[np.int64]
    routed: NDArray[np.bool_]
    hidden: NDArray[np.bool_]
    slots: int
    table: float

    def values(self, ranks: int, few: int) -> Floats:
        """Values of the fullest rank's shards where `ranks` share them, experts `few`, by slot."""
        across = np.where(self.routed, few, ranks)
        return self._sums(np.ceil(self.rows / across) * self.rest)

    def padded(self, ranks: int, few: int) -> Floats:
        """The same, gathered: rows rounded up to what the ranks divide."""
        across = np.where(self.routed, few, ranks)
        return self._sums(np.ceil(self.rows / across) * across * self.rest)

    def _sums(self, sizes: Floats) -> Floats:
        found: Floats = np.bincount(self.slot, weights=sizes, minlength=self.slots).astype(np.float64)
        return found

    @cached_property
    def kinds(self) -> list[tuple[int, int, int, int, int]]:
        """Different tensors: rows, rest, place, whether an expert's, whether a hidden layer's matrix."""
        found = np.unique(np.stack([self.rows, self.rest, self.place, self.routed, self.hidden]).astype(np.int64), axis=1)
        return [(rows, rest, place, routed, hidden) for rows, rest, place, routed, hidden in found.T.tolist()]

    def shapes(self, ranks: int, few: int, places: Sequence[int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Different shapes of shards, matrices of hidden layers and others."""
        found = {
            (-(-rows // (few if routed else ranks)), rest, hidden) for rows, rest, place, routed, hidden in self.kinds if place in places
        }  # fmt: skip
        return [(a, b) for a, b, inside in sorted(found) if inside], [(a, b) for a, b, inside in sorted(found) if not inside]


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Values that a kind of stage holds, by plan: as one rank's, as its shards, gathered outside the blocks, and gathered of its largest block."""

    whole: Floats
    shard: Floats
    outside: Floats
    block: Floats


def plan_bytes(columns: Columns, spec: ModelSpec, workload: Workload) -> Floats:
    """Bytes of the fullest device of each plan, but for the runtime's own."""
    found = _Memory(columns, spec, workload)
    stages: tuple[Stage, ...] = ("only",) if int(columns.pp.max()) == 1 else ("only", "first", "second", "last")
    most: Floats = np.maximum.reduce([found.stage(stage) for stage in stages])
    return most


class _Memory:
    """What all stages of all plans have in common."""

    def __init__(self, columns: Columns, spec: ModelSpec, workload: Workload) -> None:
        self.columns, self.spec, self.workload = columns, spec, workload
        self.element = dtype_bytes(workload.dtype)
        self.wide = FLOAT32 if workload.master_weights else self.element
        self.micro_batches = workload.batch_size // columns.dp // columns.micro_batch_size
        self.positions = columns.micro_batch_size / columns.cp
        self.ranks = np.where(columns.shard == 0, 1, columns.sharing_ranks)
        self.blocks = len(block_names(spec))
        self.lines, self.cut = self._lines()
        pieces, self.pieces = unique_rows(columns.pp, columns.virtual_stages)
        self.cuts = [_stage_blocks(self.blocks, pp, v) for pp, v in pieces.tolist()]
        self._share()

    def stage(self, stage: Stage) -> Floats:
        """Bytes of one kind of stage; 0 where a plan has none."""
        c, held = self.columns, self._held(stage)
        full_shards, host = c.shard == SHARDS.index("zero3"), c.offload == OFFLOADS.index("optimizer")
        sharded = c.shard >= SHARDS.index("zero2")
        gradients = (held.whole + self.table * (0 in PLACES[stage])) * self.element  # those of split tables are whole ones
        moving = np.where(sharded, self._units(stage, held), self._plain(stage, held.whole * self.element, gradients))
        kept = np.where(sharded, held.shard * self.wide, gradients) + np.where(host, 0.0, self.scratch[stage])
        weights = np.where(full_shards, held.shard * self.wide, held.whole * self.element)
        masters = np.where(full_shards, 0.0, FLOAT32 * held.shard * self.workload.master_weights)
        state = np.where(host, 0.0, held.shard * self.state + masters)
        present = (c.pp == 1) if stage == "only" else (c.pp > 1)
        total: Floats = np.where(present, weights + state + np.maximum(moving, kept), 0.0)
        return total

    def _plain(self, stage: Stage, totals: Floats, gradients: Floats) -> Floats:
        """Gradients of the micro-batches before are there from the start, but for the first one; or they come as activations go."""
        each, passing, floor = self.growth(stage)
        flying = self.flying(stage)
        own = np.maximum(each + passing, floor)
        first = (flying - 1) * each + own
        later = np.maximum(np.where(self.in_turn(flying), flying - 1, flying - 1 - 1 / self.columns.virtual_stages), 0.0) * each + own + totals
        ends = np.maximum(passing, floor) + gradients
        return np.where(self.micro_batches > 1, np.where(self.in_turn(flying), later, np.maximum(first, later)), np.maximum(first, ends))

    def in_turn(self, flying: Floats) -> NDArray[np.bool_]:
        """Whether there are more micro-batches than are in flight at once, so that the fullest moments find gradients of those before."""
        found: NDArray[np.bool_] = self.micro_batches > flying
        return found

    def _units(self, stage: Stage, held: _Held) -> Floats:
        """FSDP2's three fullest moments: at the loss, in a block's backward pass, and at the end."""
        each, passing, _ = self.growth(stage)
        others = (self.flying(stage) - 1) * each
        shard, outside, block = held.shard, held.outside, held.block
        gathered = ((self.columns.shard == SHARDS.index("zero3")) & (self.ranks > 1)) * self.element
        before = shard * self.wide * self.in_turn(self.flying(stage))
        head = outside * self.element * (stage in ("only", "last"))
        grown = others + each + passing + before
        at_loss = grown + gathered * (outside + block)
        in_block = grown + gathered * (outside + 2 * block) + block * (self.element + self.wide) + head
        table = self.table * self.element * (0 in PLACES[stage])
        at_end = others + gathered * outside + outside * (self.element + self.wide) + table + shard * self.wide
        most: Floats = np.maximum.reduce([at_loss, in_block, at_end])
        return most

    # ---- activations ----

    def stage_layers(self, stage: Stage) -> Floats:
        """Blocks of the stage of each plan."""
        layers: Floats = np.array([len(cut[stage]) for cut in self.cuts], dtype=np.float64)[self.pieces]
        return layers

    def flying(self, stage: Stage) -> Floats:
        """Micro-batches in flight, as `pipeline.in_flight` has it."""
        c = self.columns
        number = c.pp - 1 if stage == "last" else np.minimum(int(stage == "second"), c.pp - 1)
        single = np.minimum(self.micro_batches, c.pp - number)
        started = 2 * (c.pp - number - 1) + (c.virtual_stages - 1) * c.pp + 1
        several = np.minimum(self.micro_batches * c.virtual_stages, started) / c.virtual_stages
        flying: Floats = np.where(c.virtual_stages > 1, several, single)
        return flying

    def growth(self, stage: Stage) -> tuple[Floats, Floats, Floats]:
        """What a micro-batch keeps, what comes and goes beside it, and the least of both."""
        saved = np.array([each.saved for each in self.lines])[self.cut]
        lines = [each.stages.get(stage, Line(entry=0.0, passing=0.0, floor=0.0)) for each in self.lines]
        entry, passing, floor = (np.array([getattr(line, name) for line in lines])[self.cut] for name in LINE)
        each = (saved * self.stage_layers(stage) / len(streams(self.spec)) + entry) * self.positions + self.between()
        return each, passing * self.positions + self.context(), floor

    def between(self) -> Floats:
        """Hidden states between the pieces of a stage: one's output stands beside what the next one received."""
        c = self.columns
        width = next((part.size for part in self.spec.parts if isinstance(part, Norm)), 0)
        hidden = width * self.workload.seq_len * self.element * self.positions / np.where(c.sequence_parallel == 1, c.tp, 1)
        found: Floats = (c.virtual_stages - 1) * hidden
        return found

    def context(self) -> Floats:
        """Keys and values of a whole sequence, which pass in backward too where attention is computed again."""
        c = self.columns
        widths = [part.num_key_value_heads * (part.head_dim + part.value_dim) for part in self.spec.parts if isinstance(part, Attention)]
        bytes_ = max(widths, default=0) * self.workload.seq_len * self.element
        found: Floats = np.where((c.cp > 1) & (c.recompute > 0), c.micro_batch_size * bytes_ / c.tp, 0.0)
        return found

    def _lines(self) -> tuple[list[Lines], NDArray[np.int64]]:
        """Lines for each (tp, ep, recomputation, sequence parallelism): experts on 1/ep of the ranks are between the fewest and the most."""
        c = self.columns
        rows, cut = unique_rows(c.tp, c.recompute, c.sequence_parallel, c.ep)
        piped = bool((c.pp > 1).any())
        few, many = int(c.ep.min()), int(c.ep.max())

        def measured(tp: int, again: int, split: int, ep: int) -> Lines:
            workload = replace(self.workload, recompute=RECOMPUTES[again], batch_size=1)
            plan = Plan(dp=ep, tp=tp, ep=ep, sequence_parallel=bool(split))
            kept: dict[Any, Lines] = self.spec.__dict__.setdefault("_plan_lines", {})
            if (workload, plan, piped) not in kept:
                kept[workload, plan, piped] = _measured(self.spec, workload, plan, piped=piped)
            return kept[workload, plan, piped]

        def lines_of(tp: int, again: int, split: int, ep: int) -> Lines:
            if ep in (few, many):
                return measured(tp, again, split, ep)
            share = (1 / few - 1 / ep) / (1 / few - 1 / many)
            return measured(tp, again, split, few).mixed(measured(tp, again, split, many), share)

        return [lines_of(*row) for row in rows.tolist()], cut

    # ---- weights, gradients, state ----

    def _share(self) -> None:
        """Values by slot of each (tp, ep, ranks), and what the optimizer needs of them."""
        c = self.columns
        rows, self.share = unique_rows(c.tp, c.ep, self.ranks)
        tensors: dict[tuple[int, int], Tensors] = self.spec.__dict__.setdefault("_plan_tensors", {})
        for tp, ep in {(tp, ep) for tp, ep, _ in rows.tolist()} - tensors.keys():
            tensors[tp, ep] = rank_tensors(self.spec, tp=tp, ep=ep)
        each = [(tensors[tp, ep], ranks, max(1, ranks // ep)) for tp, ep, ranks in rows.tolist()]
        self.whole = np.array([one.values(1, 1) for one, _, _ in each])
        self.shard = np.array([one.values(ranks, few) for one, ranks, few in each])
        self.padded = np.array([one.padded(ranks, few) for one, ranks, few in each])
        self.table = np.array([one.table for one, _, _ in each])[self.share]
        self.scratch = {
            stage: np.array([self._scratch(*one.shapes(ranks, few, places)) for one, ranks, few in each])[self.share]
            for stage, places in PLACES.items()
        }
        hidden, others = each[0][0].shapes(1, 1, PLACES["only"])
        kept = "float32" if self.workload.master_weights else self.workload.dtype
        self.state = state_bytes(str(self.workload.optimizer), hidden, kept, others=others) / sum(a * b for a, b in (*hidden, *others))

    def _scratch(self, hidden: list[tuple[int, ...]], others: list[tuple[int, ...]]) -> float:
        """Of the update, and of the float32 gradient that masters take."""
        masters = self.workload.master_weights
        gradient = FLOAT32 * max((math.prod(shape) for shape in (*hidden, *others)), default=0) if masters else 0
        return gradient + scratch_bytes(str(self.workload.optimizer), hidden, "float32" if masters else self.workload.dtype, others=others)

    def _held(self, stage: Stage) -> _Held:
        slots = {0: [0], 1: [], 2: [self.blocks + 1], 3: [self.blocks + 2]}
        ends = [slot for place in PLACES[stage] for slot in slots[place]]
        holds = np.zeros((self.blocks + 3, len(self.cuts)))
        holds[ends] = 1
        for number, cut in enumerate(self.cuts):
            holds[[block + 1 for block in cut[stage]], number] = 1
        largest = np.stack([self.padded[:, [block + 1 for block in cut[stage]]].max(axis=1) for cut in self.cuts], axis=1)
        return _Held(
            whole=(self.whole @ holds)[self.share, self.pieces], shard=(self.shard @ holds)[self.share, self.pieces],
            outside=self.padded[:, ends].sum(axis=1)[self.share], block=largest[self.share, self.pieces],
        )  # fmt: skip


def unique_rows(*columns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different rows of some columns, and which of them each row is.

    >>> rows, index = unique_rows(np.array([4, 2, 4]), np.array([1, 7, 1]))
    >>> rows.tolist(), index.tolist()
    ([[2, 7], [4, 1]], [1, 0, 1])
    """
    key = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        key = key * (int(column.max()) + 1) + column
    _, first, index = np.unique(key, return_index=True, return_inverse=True)
    return np.stack([column[first] for column in columns], axis=1), index


def rank_tensors(spec: ModelSpec, *, tp: int, ep: int) -> Tensors:
    """Tensors of one rank that holds all blocks."""
    numbers = {name: number for number, name in enumerate(block_names(spec), start=1)}
    behind = len(numbers) + 1
    found: list[tuple[int, int, int, int, bool, bool]] = []
    seen: set[str] = set()
    table = 0.0
    for each in rank_parts(spec, Plan(dp=ep, tp=tp, ep=ep)):
        part = each.part
        if isinstance(part, Embedding) and each.role == "vocabulary":
            table += (tp - 1) * part.parameters
        inside = isinstance(part, Linear) and part.component != "head"
        place = {"<": 0, ">": 2}.get(str(each.block), 1)
        slot = {0: 0, 2: behind}.get(place, numbers.get(str(each.block), 1))
        for name, shape in stored_tensors(part).items():
            if name not in seen:
                seen.add(name)
                found.append((shape[0] if shape else 1, math.prod(shape[1:]), place, slot, each.routed, inside and len(shape) == 2))
        if isinstance(part, Linear) and part.tied_to and place == 2:
            found.append((part.out_features, part.in_features, 3, behind + 1, False, False))
    rows, rest, places, slots, routed, hidden = (np.array(column) for column in zip(*found, strict=True))
    return Tensors(
        rows=rows.astype(np.float64), rest=rest.astype(np.float64), place=places, slot=slots, routed=routed, hidden=hidden, slots=behind + 2,
        table=table,
    )  # fmt: skip


def _stage_blocks(blocks: int, pp: int, virtual_stages: int) -> dict[Stage, list[int]]:
    """Blocks of the kinds of stages, by number."""
    plan = Plan(pp=pp, virtual_stages=virtual_stages, schedule="interleaved" if virtual_stages > 1 else "1f1b")
    held = [[block for piece in pieces for block in piece] for pieces in stage_blocks(blocks, plan)]
    return {"only": held[0], "first": held[0], "second": held[min(1, pp - 1)], "last": held[-1]}


def _measured(spec: ModelSpec, workload: Workload, plan: Plan, *, piped: bool) -> Lines:
    """Lines through replays of a few blocks."""
    few, more = (_Probe(shortened(spec, blocks), workload, replace(plan, dp=2 * plan.dp), 0) for blocks in (BLOCKS, BLOCKS + 1))
    whole = few.bytes(MANY, 1) / MANY
    saved = more.bytes(MANY, 1) / MANY - whole
    only = Line(entry=0.0, passing=whole - BLOCKS * saved, floor=few.floor(BLOCKS * saved))
    stages: dict[Stage, Line] = {"only": only, "last": only}
    if piped:
        first, second, last = (_Probe(shortened(spec, 4 * BLOCKS), workload, replace(plan, pp=4, schedule="gpipe"), stage) for stage in (0, 1, 3))
        stages["first"] = first.line(saved)
        stages["second"] = replace(stages["first"], floor=second.floor(stages["first"].entry + BLOCKS * saved))
        stages["last"] = last.line(saved)
    return Lines(saved=saved, stages=stages)


@dataclass(frozen=True)
class _Probe:
    """A stage of a few blocks, of which replays are asked for."""

    spec: ModelSpec
    workload: Workload
    plan: Plan
    stage: int

    def bytes(self, micro: int, micro_batches: int) -> float:
        """Activations and what comes and goes at the fullest moment, without the optimizer's own."""
        asked = replace(self.workload, batch_size=micro_batches * micro * self.plan.dp, optimizer="sgd")
        memory = rank_memory(self.spec, asked, replace(self.plan, micro_batch_size=micro), self.stage)
        return float(memory.activations + memory.temporary)

    def line(self, saved: float) -> Line:
        """The line of a pipeline's stage, which holds all micro-batches (GPipe)."""
        one = self.bytes(MANY, 1) / MANY
        each = self.bytes(MANY, 2) / MANY - one
        return Line(entry=each - BLOCKS * saved, passing=one - each, floor=self.floor(each))

    def floor(self, each: float) -> float:
        """What does not grow with positions, of one micro-batch of several: where there are few of them, it decides.

        Args:
            each: that a micro-batch keeps of a sequence.
        """
        cut = _cut(self.workload, self.spec, self.plan)
        short = replace(self, workload=replace(self.workload, seq_len=self.workload.seq_len // cut))
        others = 1 if self.plan.pp > 1 else 0
        return max(0.0, short.bytes(1, 2) - others * each / cut)


def _cut(workload: Workload, spec: ModelSpec, plan: Plan) -> int:
    """A number that cuts a sequence into few positions, which still divide over tensor-parallel ranks; 1 of a model of one length."""
    if spec.fixed_len is not None:
        return 1
    return next((cut for cut in (64, 32, 16, 8, 4, 2) if workload.seq_len % (cut * plan.tp) == 0), 1)


def shortened(spec: ModelSpec, blocks: int) -> ModelSpec:
    """The model with so many blocks of each stream, those in its middle; kept with the spec."""
    kept: dict[int, ModelSpec] = spec.__dict__.setdefault("_shortened", {})
    if blocks not in kept:
        kept[blocks] = replace(spec, parts=tuple(_short_parts(spec, blocks)), tensors=None)
    return kept[blocks]


def _short_parts(spec: ModelSpec, blocks: int) -> Iterable[Part]:
    for stream in streams(spec):
        yield from stream.before
        start = max(0, (len(stream.blocks) - blocks) // 2)
        chosen = [stream.blocks[(start + i) % len(stream.blocks)] for i in range(blocks)]
        for number, block in enumerate(chosen):
            yield from (_renamed(part, number) for part in block) if len(stream.blocks) < blocks else block
        yield from stream.after


def _renamed(part: Part, number: int) -> Part:
    """A copy of a block where a model has fewer than a replay needs."""
    name = block_name(part)
    return part if name is None else replace(part, name=f"{name.rpartition('.')[0]}.{number}{part.name[len(name) :]}")
