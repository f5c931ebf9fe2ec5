"""Every plan that spreads a training step over so many devices, as columns of numbers: what is valid, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lighten.cost.workload import RECOMPUTES, Recompute, Workload
from lighten.device.device import Device
from lighten.errors import WorkloadError
from lighten.model.spec import Linear, ModelSpec, Scan
from lighten.parallel.plan import OFFLOADS, SHARDS, Plan
from lighten.parallel.rank import block_names, rank_spec

Ints: TypeAlias = NDArray[np.int64]

MOST_TOKENS, LEAST_TOKENS = 65_536, 256
"""Tokens of a rank in one forward pass that a search goes to, beyond one sequence: products are at their full rate long before. And the fewest
positions that it cuts a sequence into. What is asked for (`--micro-batch-size`, `--cp`) may go beyond both."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Plans as columns, one row a plan. Words are their places in `SHARDS`, `RECOMPUTES` and `OFFLOADS`; a `shard_group` of 0 is all ranks."""

    dp: Ints
    tp: Ints
    pp: Ints
    cp: Ints
    ep: Ints
    shard: Ints
    shard_group: Ints
    recompute: Ints
    micro_batch_size: Ints
    virtual_stages: Ints
    sequence_parallel: Ints
    offload: Ints

    def __len__(self) -> int:
        return len(self.dp)

    def take(self, rows: NDArray[Any]) -> Columns:
        """Some of the rows."""
        return Columns(**{name: getattr(self, name)[rows] for name in NAMES})

    def plan(self, row: int) -> Plan:
        """The plan of a row."""
        value = {name: int(getattr(self, name)[row]) for name in NAMES}
        return Plan(
            **{name: value[name] for name in ("dp", "tp", "pp", "cp", "ep", "virtual_stages", "micro_batch_size")},
            shard=SHARDS[value["shard"]], shard_group=value["shard_group"] or None, sequence_parallel=bool(value["sequence_parallel"]),
            schedule="interleaved" if value["virtual_stages"] > 1 else "1f1b", offload=OFFLOADS[value["offload"]],
        )  # fmt: skip

    def recompute_of(self, row: int) -> Recompute:
        found: Recompute = RECOMPUTES[int(self.recompute[row])]
        return found

    @cached_property
    def sharing_ranks(self) -> Ints:
        """Ranks that one copy of the shared-out state lies on."""
        return np.where(self.shard_group == 0, self.dp * self.cp, self.shard_group)


NAMES = tuple(each.name for each in fields(Columns))
_NO_ROWS: Ints = np.empty((0, len(NAMES)), np.int64)
SEARCHED = (*NAMES, "schedule")
"""What a user can decide."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What the user decides: fields of a plan, by name, and `recompute`; the rest is searched."""

    values: Mapping[str, Any] = field(default_factory=dict)

    def among(self, name: str, found: Iterable[Any]) -> list[Any]:
        """The one value that is asked for; all that are possible where none is."""
        return [self.values[name]] if name in self.values else list(found)

    def allows_pieces(self, pieces: int) -> bool:
        """Whether a stage may have so many virtual stages, by the schedule that is asked for."""
        return self.values.get("schedule") in (None, "interleaved" if pieces > 1 else "1f1b")


def all_plans(spec: ModelSpec, workload: Workload, device: Device, count: int, fixed: Mapping[str, Any] | None = None) -> Columns:
    """Every plan of `count` devices that fits the model and the batch.

    Sizes are the divisors that heads, widths, experts, blocks, positions and the batch allow. Groups of sharing ranks are all ranks, and what
    fills a level of links, once and eight times. Forward passes are of one sequence or of `MOST_TOKENS` tokens of a rank at most.

    Args:
        fixed: fields of the plan (and `recompute`) that are decided.

    Raises:
        WorkloadError: no plan: what is decided does not multiply out, or nothing divides; says what would.
    """
    asked = Fixed(values=fixed or {})
    _check_fixed(spec, workload, count, asked)
    grids = list(_grids(spec, workload, count, asked))
    if not grids:
        raise WorkloadError(_why_none(spec, workload, count, asked))
    rows = np.concatenate([_NO_ROWS, *(_rows(workload, device, grid, asked) for grid in grids)])
    if not len(rows):
        raise WorkloadError(_conflict(workload, count, grids, asked))
    return Columns(**{name: np.ascontiguousarray(rows[:, place]) for place, name in enumerate(NAMES)})


def divisors(count: int) -> list[int]:
    """
    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [each for each in range(1, int(count**0.5) + 1) if count % each == 0]
    return low + [count // each for each in reversed(low) if each * each != count]


@dataclass(frozen=True, kw_only=True)
class _Grid:
    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    blocks: int


def _grids(spec: ModelSpec, workload: Workload, count: int, asked: Fixed) -> Iterator[_Grid]:
    """Sizes whose product is the number of devices."""
    tps = [tp for tp in asked.among("tp", divisors(count)) if _works(spec, Plan(tp=tp))]
    blocks = len(block_names(spec))
    pps = [pp for pp in asked.among("pp", divisors(count)) if pp == 1 or (pp <= blocks and _works(spec, Plan(pp=pp)))]
    eps = [ep for ep in asked.among("ep", divisors(_experts(spec))) if _works(spec, Plan(dp=ep, ep=ep))]
    for tp in tps:
        for pp in pps:
            if count % (tp * pp):
                continue
            for cp in asked.among("cp", [cp for cp in divisors(count // tp // pp) if cp == 1 or workload.seq_len >= cp * LEAST_TOKENS]):
                if count % (tp * pp * cp) or not _cuts_sequence(spec, workload, cp):
                    continue
                dp = count // (tp * pp * cp)
                if workload.batch_size % dp or dp not in asked.among("dp", [dp]):
                    continue
                yield from (_Grid(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, blocks=blocks) for ep in eps if (dp * cp) % ep == 0)


def _works(spec: ModelSpec, plan: Plan) -> bool:
    try:
        rank_spec(spec, plan)
    except WorkloadError:
        return False
    return True


def _experts(spec: ModelSpec) -> int:
    return max((part.experts for part in spec.parts if isinstance(part, Linear)), default=1)


def _cuts_sequence(spec: ModelSpec, workload: Workload, cp: int) -> bool:
    """Each rank takes two equal pieces of a sequence, of both ends, so that masked scores are spread evenly."""
    one_sequence = not spec.is_encoder_decoder and spec.fixed_len is None and not any(isinstance(part, Scan) for part in spec.parts)
    return cp == 1 or (one_sequence and workload.seq_len % (2 * cp) == 0)


def _rows(workload: Workload, device: Device, grid: _Grid, asked: Fixed) -> NDArray[np.int64]:
    """All plans of a grid, a row each, in the order of `NAMES`."""
    share = workload.batch_size // grid.dp
    most = max(1, MOST_TOKENS * grid.cp // workload.seq_len)
    micros = asked.among("micro_batch_size", [micro for micro in divisors(share) if micro <= most])
    pipes = [(micro, v) for micro in micros if share % micro == 0 for v in _virtual_stages(grid, share // micro, asked)]
    shares = list(_shardings(device, grid, asked))
    recomputes = [RECOMPUTES.index(word) for word in asked.among("recompute", RECOMPUTES)]
    splits = [int(sp) for sp in asked.among("sequence_parallel", (False, True)) if _splits(workload, grid, bool(sp))]
    if not (pipes and shares and splits):
        return _NO_ROWS
    lengths = [len(pipes), len(shares), len(recomputes), len(splits)]
    pipe, sharing, again, split = (index.ravel() for index in np.indices(lengths))
    micro_v, triple = np.array(pipes), np.array(shares)
    columns = {
        "micro_batch_size": micro_v[pipe, 0], "virtual_stages": micro_v[pipe, 1], "shard": triple[sharing, 0], "shard_group": triple[sharing, 1],
        "offload": triple[sharing, 2], "recompute": np.array(recomputes)[again], "sequence_parallel": np.array(splits)[split],
    }  # fmt: skip
    sizes = {name: np.full(len(pipe), getattr(grid, name)) for name in ("dp", "tp", "pp", "cp", "ep")}
    return np.stack([(columns | sizes)[name] for name in NAMES], axis=1)


def _virtual_stages(grid: _Grid, micro_batches: int, asked: Fixed) -> list[int]:
    """Pieces a stage may have: each of them has a block; interleaved pipelines take micro-batches in groups of pp."""
    most = grid.blocks // grid.pp if grid.pp > 1 and micro_batches % grid.pp == 0 else 1
    return [v for v in asked.among("virtual_stages", _doubled(most)) if 1 <= v <= most and asked.allows_pieces(v)]


def _doubled(most: int) -> list[int]:
    """
    >>> _doubled(7)
    [1, 2, 4, 7]
    """
    doubled = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return doubled if doubled[-1] == most else [*doubled, most]


def _splits(workload: Workload, grid: _Grid, split: bool) -> bool:
    return not split or (grid.tp > 1 and (workload.seq_len // grid.cp) % grid.tp == 0)


def _shardings(device: Device, grid: _Grid, asked: Fixed) -> Iterator[tuple[int, int, int]]:
    """Which state is shared out, over which groups, and what of it lies in the host's memory."""
    ranks = grid.dp * grid.cp
    offloads = [OFFLOADS.index(word) for word in asked.among("offload", OFFLOADS)]
    for word in asked.among("shard", SHARDS if ranks > 1 else SHARDS[:1]):
        groups = [0] if word == "none" else [0, *_groups(device, grid, ranks)]
        if word == "none" and "shard_group" in asked.values:
            continue
        for group in asked.among("shard_group", groups):
            if not group or ranks % group == 0:
                yield from ((SHARDS.index(word), group, offload) for offload in offloads)


def _groups(device: Device, grid: _Grid, ranks: int) -> list[int]:
    found = {link.devices // grid.tp * times for link in device.links if link.devices and link.devices % grid.tp == 0 for times in (1, 8)}
    return sorted(group for group in found if 1 < group < ranks and ranks % group == 0)


# ---- what is said where there is none ----


def _check_fixed(spec: ModelSpec, workload: Workload, count: int, asked: Fixed) -> None:
    """Raises:
    WorkloadError: what is decided cannot be, whatever the rest is.
    """
    unknown = [name for name in asked.values if name not in SEARCHED]
    if unknown:
        raise WorkloadError(f"{', '.join(unknown)}: no part of a plan; parts: {', '.join(SEARCHED)}.")
    if asked.values.get("schedule") == "gpipe":
        raise WorkloadError("schedule=gpipe is 1f1b with more memory, so that no search is needed; it has 1f1b and interleaved.")
    sizes = {name: asked.values[name] for name in ("dp", "tp", "pp", "cp") if name in asked.values}
    for name in ("dp", "tp", "pp", "cp", "ep", "micro_batch_size", "virtual_stages", "shard_group"):
        if name in asked.values and asked.values[name] < 1:
            raise WorkloadError(f"{name}={asked.values[name]} is not positive.")
    given, said = math.prod(sizes.values()), " · ".join(f"{name}={size}" for name, size in sizes.items())
    if (len(sizes) == 4 and given != count) or count % given:
        verb = "is not" if len(sizes) == 4 else "does not divide"
        total = f" = {given}" if len(sizes) > 1 else ""
        raise WorkloadError(f"{said}{total} {verb} the number of devices, {count}; {_sizes_that_divide(count)}.")
    if "tp" in asked.values:
        rank_spec(spec, Plan(tp=asked.values["tp"]))
    if "pp" in asked.values:
        rank_spec(spec, Plan(pp=asked.values["pp"]))
    if "ep" in asked.values:
        rank_spec(spec, Plan(dp=asked.values["ep"], ep=asked.values["ep"]))
    if "cp" in asked.values and not _cuts_sequence(spec, workload, asked.values["cp"]):
        raise WorkloadError(f"cp={asked.values['cp']} has to divide seq_len={workload.seq_len} into pairs of equal pieces; use a smaller cp.")
    if "dp" in asked.values and workload.batch_size % asked.values["dp"]:
        raise WorkloadError(f"dp={asked.values['dp']} does not divide the batch of {workload.batch_size} sequences.")


def _sizes_that_divide(count: int) -> str:
    return f"sizes of {count} are {', '.join(map(str, divisors(count)))}"


def _conflict(workload: Workload, count: int, grids: Sequence[_Grid], asked: Fixed) -> str:
    """Why no plan of these sizes has all that is decided."""
    v = asked.values
    said = ", ".join(f"{name}={value}" for name, value in v.items())
    shares = sorted({workload.batch_size // grid.dp for grid in grids})
    ranks = sorted({grid.dp * grid.cp for grid in grids})
    reasons = []
    if v.get("sequence_parallel") and all(grid.tp == 1 for grid in grids):
        reasons.append("sequence_parallel needs tp above 1, which the model or the number of devices does not allow")
    if v.get("shard", "") == "none" and "shard_group" in v:
        reasons.append("shard_group needs shard zero1, zero2 or zero3")
    if "shard_group" in v and all(each % v["shard_group"] for each in ranks):
        reasons.append(f"shard_group={v['shard_group']} divides none of the possible dp · cp: {_few(ranks)}")
    if "micro_batch_size" in v and all(share % v["micro_batch_size"] for share in shares):
        reasons.append(f"micro_batch_size={v['micro_batch_size']} divides none of the possible shares of the batch: {_few(shares)}")
    if not reasons and {"virtual_stages", "schedule"} & v.keys():
        reasons.append("interleaved pipelines need pp above 1, at most blocks / pp virtual stages (1F1B has 1), and micro-batches in groups of pp")
    return f"no plan of {count} devices has {said}: {'; '.join(reasons) or 'decide less of it'}."


def _few(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (" …" if len(values) > 8 else "")


def _why_none(spec: ModelSpec, workload: Workload, count: int, asked: Fixed) -> str:
    said = ", ".join(f"{name}={value}" for name, value in asked.values.items())
    nearest = next((fewer for fewer in range(count - 1, 0, -1) if next(_grids(spec, workload, fewer, asked), None)), None)
    tps = ", ".join(str(tp) for tp in range(1, 129) if _works(spec, Plan(tp=tp)))
    what = (
        f"no plan{f' with {said}' if said else ''} puts {spec.name} ({len(block_names(spec))} blocks; tp may be {tps}) and a batch of "
        f"{workload.batch_size} × {workload.seq_len} on {count} devices"
    )
    return f"{what}; the next smaller number that works is {nearest}." if nearest else f"{what}; decide less of the plan."
