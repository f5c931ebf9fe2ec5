"""The best plans of a training step on so many devices: time and memory of every plan at once, and why the next ones are worse.

Time is `step_time`'s own arithmetic on columns, so that both give the same seconds. Memory is `footprint.plan_bytes`, which decides what is
worth a look; what is shown fits by `rank_memory`, plan by plan. Of plans that differ in nothing but how they use one grid (dp, tp, pp, cp, ep)
the best one is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from heapq import merge
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Recompute, Workload, check_workload
from lighten.device.bill import cost_usd
from lighten.device.device import Device
from lighten.errors import DeviceError, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.parallel.columns import Columns, all_plans, divisors
from lighten.parallel.footprint import plan_bytes, unique_rows
from lighten.parallel.memory import rank_memory
from lighten.parallel.plan import SHARDS, Plan
from lighten.parallel.step_time import (
    Pieces,
    Stack,
    StepTime,
    Traffic,
    TrainingRates,
    assemble,
    layer_pieces,
    load_training_rates,
    step_time,
    traffic,
)
from lighten.units import format_bytes

Floats: TypeAlias = NDArray[np.float64]
Goal: TypeAlias = Literal["time", "money", "memory"]
GOALS: tuple[Goal, ...] = get_args(Goal)
MARGIN = 0.1
"""Share of a device's memory that is left to the driver, communication buffers and the allocator's gaps: what torch keeps beside tensors was
4 to 10 % of a device in the published runs that name both, and no formula here has it."""
UNSURE = 0.15
"""How far `plan_bytes` may be above the memory that there is before a plan is not asked about: more than its distance from `rank_memory`."""
MOST_ASKED = 200
"""Plans at most whose memory is replayed in a search."""
FEW = 5
"""Plans that lack memory which are looked at."""
WORTH_SAYING = 0.005
"""Of the best plan's time: smaller differences are not told."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan with what it costs.

    Attributes:
        details: seconds by what takes them, finer than the time's own parts; they add up to its seconds.
        usd: of one step; None: no price is known.
        why: what makes it worse than the best one, for people; "" of the best.
    """

    plan: Plan
    recompute: Recompute
    memory: MemoryBreakdown
    time: StepTime
    details: Mapping[str, float]
    usd: float | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gives.

    Attributes:
        best: the best plans of different grids, best first.
        missed: the fastest plan that needs more memory than there is, where it is faster than the best.
        capacity: bytes of a device that a plan may take.
        searched, fitting: plans, and how many of them fit by `plan_bytes`.
        fields: all plans, their seconds and bytes, by number of devices.
    """

    best: tuple[Candidate, ...]
    missed: Candidate | None
    capacity: float
    searched: int
    fitting: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is searched for.

    Attributes:
        workload: of the whole batch; its `recompute` is searched unless `fixed` has one.
        fixed: what is decided of the plan.
        margin: share of a device's memory that stays free.
    """

    spec: ModelSpec
    workload: Workload
    device: Device
    count: int
    fixed: Mapping[str, Any]
    goal: Goal = "time"
    margin: float = MARGIN
    stack: Stack = field(default_factory=Stack)

    @property
    def capacity(self) -> float:
        if self.device.memory_bytes is None:
            raise DeviceError(f"{self.device.name}: its memory is not known, so that no plan can be said to fit; a TOML file of yours may say it.")
        return self.device.memory_bytes * (1 - self.margin)


def search_plans(asked: Asked, *, top: int = 5, accept: Callable[[Plan, Recompute], bool] | None = None) -> Found:
    """The best plans for a training step.

    Args:
        top: how many.
        accept: what is shown beside fitting, such as that a framework can express it.

    Raises:
        WorkloadError: no training step; nothing can be divided so; nothing fits, with what is nearest.
        DeviceError: a figure of the device that this needs is not known.
    """
    _check(asked)
    counts = divisors(asked.count) if asked.goal == "money" else [asked.count]
    searched = [each for each in (_field(asked, count) for count in counts) if each is not None]
    if not searched:
        all_plans(asked.spec, asked.workload, asked.device, asked.count, asked.fixed)  # says why
    best: list[Candidate] = []
    for one, row in merge(*(each.fitting_rows(accept) for each in searched), key=lambda pair: pair[0].value[pair[1]]):
        best.append(one.candidate(row, best[0] if best else None))
        if len(best) == top:
            break
    if not best:
        raise WorkloadError(_nothing_fits(asked, searched, narrowed=accept is not None))
    return Found(
        best=tuple(best), missed=_missed(searched, best[0], asked), capacity=asked.capacity, searched=sum(map(len, searched)),
        fitting=sum(int(each.fits.sum()) for each in searched), fields=tuple(searched),
    )  # fmt: skip


def _check(asked: Asked) -> None:
    if asked.workload.phase != "train":
        raise WorkloadError(f"plans of phase {asked.workload.phase} are not searched; use phase train, or estimate --tp N --pp N for serving.")
    if asked.goal not in GOALS:
        raise WorkloadError(f"goal {asked.goal!r} is not known; known: {', '.join(GOALS)}.")
    if not 0 <= asked.margin < 1:
        raise WorkloadError(f"memory margin {asked.margin} is no share of a device's memory; use 0 to 0.99.")
    check_workload(asked.spec, asked.workload)


def _field(asked: Asked, count: int) -> Field | None:
    """All plans of so many devices; None where there is none, of fewer devices than were asked for."""
    try:
        columns = all_plans(asked.spec, asked.workload, asked.device, count, asked.fixed)
    except WorkloadError:
        if count == asked.count:
            raise
        return None
    return Field(asked=asked, count=count, columns=columns)


# ---- all plans at once ----


@dataclass(frozen=True)
class Field:
    """Every plan of a number of devices, with time and memory."""

    asked: Asked
    count: int
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns)

    @cached_property
    def parts(self) -> Mapping[str, Floats]:
        """Seconds of each plan by part."""
        asked = self.asked
        return plan_seconds(self.columns, asked.spec, asked.workload, asked.device, asked.stack)

    @cached_property
    def seconds(self) -> Floats:
        total: Floats = np.add.reduce(list(self.parts.values()))
        return total

    @cached_property
    def bytes(self) -> Floats:
        return plan_bytes(self.columns, self.asked.spec, self.asked.workload)

    @cached_property
    def fits(self) -> NDArray[np.bool_]:
        return self.bytes <= self.asked.capacity

    @cached_property
    def value(self) -> Floats:
        """What is made small: seconds, device-seconds (a device's price is the same in all plans), bytes."""
        return {"time": self.seconds, "money": self.seconds * self.count, "memory": self.bytes}[self.asked.goal]

    def order(self) -> NDArray[np.int64]:
        """Rows from the best; what is alike is ordered by time, then memory."""
        return np.lexsort((self.bytes, self.seconds, self.value))

    def grid(self, row: int) -> tuple[int, ...]:
        c = self.columns
        return tuple(int(each[row]) for each in (c.dp, c.tp, c.pp, c.cp, c.ep))

    def fitting_rows(self, accept: Callable[[Plan, Recompute], bool] | None) -> Iterator[tuple[Field, int]]:
        """Rows that fit by `rank_memory`, the best of each grid, from the best."""
        seen: set[tuple[int, ...]] = set()
        left = MOST_ASKED
        for row in self.order().tolist():
            if self.bytes[row] > self.asked.capacity * (1 + UNSURE) or self.grid(row) in seen:
                continue
            plan, recompute = self.columns.plan(row), self.columns.recompute_of(row)
            if accept is not None and not accept(plan, recompute):
                continue
            left -= 1
            if self.memory(row).peak <= self.asked.capacity:
                seen.add(self.grid(row))
                yield self, row
            if not left:
                return

    def workload(self, row: int) -> Workload:
        return replace(self.asked.workload, recompute=self.columns.recompute_of(row))

    def memory(self, row: int) -> MemoryBreakdown:
        return rank_memory(self.asked.spec, self.workload(row), self.columns.plan(row))

    def candidate(self, row: int, best: Candidate | None) -> Candidate:
        """A row in full."""
        asked, plan, workload = self.asked, self.columns.plan(row), self.workload(row)
        time = step_time(asked.spec, workload, plan, asked.device, stack=asked.stack)
        found = Candidate(
            plan=plan, recompute=workload.recompute, memory=self.memory(row), time=time,
            details=time_details(asked.spec, workload, plan, asked.device, asked.stack),
            usd=cost_usd(asked.device, self.count, time.seconds),
        )  # fmt: skip
        return found if best is None else replace(found, why=why_worse(found, best, asked))


def plan_seconds(columns: Columns, spec: ModelSpec, workload: Workload, device: Device, stack: Stack) -> dict[str, Floats]:
    """Seconds of a step of each plan, by part; the same that `step_time` gives for each."""
    rates = load_training_rates()
    c = columns
    _, first, index = _unique(c.tp, c.cp, c.ep, c.micro_batch_size, c.recompute, c.sequence_parallel)
    pieces = _gathered(
        [layer_pieces(spec, replace(workload, recompute=c.recompute_of(row)), c.plan(row), device, stack=stack, rates=rates) for row in first], index
    )
    _, first, index = _unique(c.tp, c.cp, c.pp, c.ep, c.shard == 0, c.shard_group, c.offload)
    links = _gathered_links([traffic(c.plan(row), device, rates) for row in first], index)
    return assemble(
        pieces, links, rates, pp=c.pp.astype(np.float64), dp=(c.dp * c.cp).astype(np.float64), ep=c.ep.astype(np.float64),
        gathers=(c.shard == SHARDS.index("zero3")).astype(np.float64), sums=(c.shard >= SHARDS.index("zero2")).astype(np.float64),
        shards=np.where(c.shard == 0, 1, c.sharing_ranks).astype(np.float64),
        micro_batches=workload.batch_size // c.dp // c.micro_batch_size, virtual_stages=c.virtual_stages,
    )  # fmt: skip


def _unique(*columns: NDArray[Any]) -> tuple[NDArray[np.int64], list[int], NDArray[np.int64]]:
    """Different rows of some columns, the first row of each, and which each row is."""
    rows, index = unique_rows(*(column.astype(np.int64) for column in columns))
    first = np.full(len(rows), -1, dtype=np.int64)
    first[index[::-1]] = np.arange(len(index))[::-1]
    return rows, first.tolist(), index


def _gathered(found: Sequence[Pieces], index: NDArray[np.int64]) -> Pieces:
    """Pieces whose fields are columns; a field that is the same in all stays a number."""
    columns: dict[str, Any] = {}
    for each in fields(Pieces):
        values = np.array([getattr(one, each.name) for one in found])
        columns[each.name] = values[0] if (values == values[0]).all() else values[index]
    return Pieces(**columns)


def _gathered_links(found: Sequence[Traffic], index: NDArray[np.int64]) -> Traffic:
    columns: dict[str, Any] = {each.name: np.array([getattr(one, each.name) for one in found])[index] for each in fields(Traffic)}
    return Traffic(**columns)


# ---- why ----


def time_details(spec: ModelSpec, workload: Workload, plan: Plan, device: Device, stack: Stack) -> dict[str, float]:
    """Seconds of a step by what takes them: the parts of `step_time`, with recomputing and the kinds of traffic apart."""
    rates = load_training_rates()
    pieces = layer_pieces(spec, workload, plan, device, stack=stack, rates=rates)
    links = traffic(plan, device, rates)
    whole = _assembled(pieces, links, plan, workload, rates)
    silent = _assembled(replace(pieces, layer_comm_s=0.0, ends_comm_s=0.0), links, plan, workload, rates)
    apart = replace(links, dp_bytes_per_s=math.inf, expert_dp_bytes_per_s=math.inf)
    data = whole["communication"] - _assembled(pieces, apart, plan, workload, rates)["communication"]
    inside = whole["communication"] - silent["communication"]
    found = {"compute": whole["compute"], "memory": whole["memory"]}
    if workload.recompute != "none":
        plain = layer_pieces(spec, replace(workload, recompute="none"), plan, device, stack=stack, rates=rates)
        once = _assembled(replace(plain, layer_comm_s=pieces.layer_comm_s, ends_comm_s=pieces.ends_comm_s), links, plan, workload, rates)
        found = {name: once[name] for name in found}
        found["recompute"] = sum(whole[name] - once[name] for name in ("compute", "memory"))
    return found | {
        "layer traffic": inside, "data traffic": data, "stage traffic": whole["communication"] - inside - data, "bubble": whole["bubble"],
        "overhead": whole["overhead"], "optimizer": whole["optimizer"],
    }  # fmt: skip


def _assembled(pieces: Pieces, links: Traffic, plan: Plan, workload: Workload, rates: TrainingRates) -> dict[str, float]:
    return assemble(
        pieces, links, rates, pp=plan.pp, dp=plan.dp * plan.cp, ep=plan.ep, gathers=float(plan.shard == "zero3"),
        sums=float(plan.shard in ("zero2", "zero3")), shards=plan.sharing_ranks if plan.shard != "none" else 1,
        micro_batches=plan.micro_batches(workload.batch_size), virtual_stages=plan.virtual_stages,
    )  # fmt: skip


def why_worse(candidate: Candidate, best: Candidate, asked: Asked) -> str:
    """What makes a plan worse than the best one: its largest disadvantages by the goal, in percent of the best one's, or bytes."""
    if asked.goal == "memory":
        return f"{format_bytes(candidate.memory.peak - best.memory.peak)} more memory"
    scale = candidate.plan.devices / best.plan.devices if asked.goal == "money" else 1.0
    more = {name: seconds * scale - best.details.get(name, 0.0) for name, seconds in candidate.details.items()}
    worst = sorted(((gap / best.time.seconds, name) for name, gap in more.items()), reverse=True)
    said = [f"{_name(name, candidate.plan, asked.device)} +{100 * gap:.1f} %" for gap, name in worst[:2] if gap >= WORTH_SAYING]
    if said:
        return ", ".join(said)
    return "as good, in other parts" if candidate.memory.peak <= best.memory.peak else f"as fast, {_more_memory(candidate, best)}"


def _more_memory(candidate: Candidate, best: Candidate) -> str:
    return f"{format_bytes(candidate.memory.peak - best.memory.peak)} more memory"


def _name(detail: str, plan: Plan, device: Device) -> str:
    """A part of the time in words; traffic with the link that it goes over."""
    match detail:
        case "layer traffic":
            kinds = [word for word, size in (("tensor", plan.tp), ("context", plan.cp), ("expert", plan.ep)) if size > 1]
            span = plan.tp * plan.cp * (plan.ep if plan.ep > plan.cp else 1)
            return f"{'/'.join(kinds) or 'layer'} traffic over {_link(device, min(span, plan.devices))}"
        case "data traffic":
            return f"data-parallel traffic over {_link(device, plan.devices)}"
        case "compute":
            return "smaller products"
        case "memory":
            return "moving activations"
        case "overhead":
            return "kernel starts"
        case "stage traffic":
            return "traffic between stages"
        case "recompute":
            return "recomputing"
        case "optimizer":
            return "optimizer"
    return detail


def _link(device: Device, devices: int) -> str:
    return device.link(devices).name.partition(",")[0]


def _missed(searched: Sequence[Field], best: Candidate, asked: Asked) -> Candidate | None:
    """Of the plans that would be faster, were there more memory, the one that lacks least; where the goal is time."""
    if asked.goal != "time":
        return None
    one = searched[0]
    faster = np.flatnonzero((one.seconds < (1 - WORTH_SAYING) * best.time.seconds) & (one.bytes > asked.capacity))
    for row in faster[np.argsort(one.bytes[faster], kind="stable")][:FEW].tolist():
        if one.memory(row).peak > asked.capacity:
            found = one.candidate(row, None)
            lacks, gain = format_bytes(found.memory.peak - asked.capacity), 1 - found.time.seconds / best.time.seconds
            return replace(found, why=f"{lacks} more than a device has, else {100 * gain:.1f} % faster")
    return None


def _nothing_fits(asked: Asked, searched: Sequence[Field], *, narrowed: bool) -> str:
    one = max(searched, key=lambda each: each.count)
    row = int(one.bytes.argmin())
    needed = one.memory(row).peak
    what = (
        f"none of {sum(map(len, searched)):,} plans fits {asked.spec.name} into {format_bytes(asked.capacity)} of {one.count} × {asked.device.name} "
        f"(a margin of {asked.margin:.0%} is left)"
    )
    if needed <= asked.capacity:
        return f"{what} {'as asked' if narrowed else 'of those that were looked at'}; one that fits is {one.columns.plan(row)}."
    again = "" if one.columns.recompute_of(row) == "none" else f" recompute={one.columns.recompute_of(row)}"
    nearest = f"nearest is {one.columns.plan(row)}{again} with {format_bytes(needed)}, {format_bytes(needed - asked.capacity)} too much"
    return f"{what}; {nearest}; more devices, or a smaller batch or length, would need less."
