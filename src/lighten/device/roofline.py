"""Operators × a measured engine → seconds, with a range and what binds.

    seconds = Σ over classes c of factor[c] · seconds[c]

    linear     Σ over linears of their measured seconds, weights warm in the caches
    weights    what it adds that a pass reads each weight once, and not again before all others: for each linear what was measured to be added
               where weights come from memory, times the share of this model's weights that no cache holds. Where that was not measured, bytes of
               all weights over the bandwidth at that working set; the factor then says how much of it kernels fail to hide behind the products
    attention  Σ of max(measured seconds, bytes over bandwidth)
    pointwise  the same for norms, activation functions, sums and gathers
    fresh      what products and attention pay for writing an output into memory that the system has yet to give (large outputs)
    overhead   operators · what an operator adds
    overhead_rms  the same of models with RMSNorm, where decoders were measured: `transformers`' newer code, without dropout and biases, runs
               through less Python for an operator than what has LayerNorm
    call       what a pass costs before its first operator

Measured seconds are interpolated between this engine's measured operators of the same kind (`rates.py`). The factors come from synthetic
blocks that were measured whole (`calibration.py`); the range is what those blocks scattered by.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lighten.cost.operators import NORM_FLOPS, Op
from lighten.device.cases import COLD_ELEMENTS
from lighten.device.profile import Bandwidth, EngineProfile, Profile
from lighten.device.rates import RateTable, bandwidth_at, rate_tables
from lighten.errors import DeviceError
from lighten.units import dtype_bytes

Bound = Literal["compute", "memory", "communication", "overhead"]

ROTARY_FLOPS = 3
"""Operations an element of a rotary embedding (x·cos + rotate(x)·sin), by which it is told from an activation function (1)."""
EXPANDING = ("torch", "torch-compile")
"""Runtimes that expand weight-only quantized weights when they load them: smaller on disk, not in memory."""
BEYOND = 0.5
"""32 MB for bf16 and 64 MB for fp32: what processors of a few cores keep in no cache."""
CLASSES = ("linear", "weights", "attention", "pointwise", "fresh", "overhead", "overhead_rms", "call")
OPERATOR_KINDS = ("linear", "attention", "norm", "activation", "embedding", "other", "between")
"""What operators are, for people: the products of attention with their softmax are attention, its projections linear; other are sums, gates, rotary
embeddings and what moves tensors; between is what passes outside of all operators."""
_KIND_OF_SAMPLE = {
    "linear": "linear", "attention": "attention", "layernorm": "norm", "rmsnorm": "norm", "gelu": "activation", "gather": "embedding", "": "between",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TimePrediction:
    """Seconds of one forward pass; `low` to `high` holds the truth 9 times in 10 on the probe's own blocks; None: scatter not known."""

    seconds: float
    low: float | None
    high: float | None
    bound_by: Bound


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Uncalibrated seconds of a forward pass by class and by what binds."""

    seconds: dict[tuple[str, Bound], float]

    @property
    def by_class(self) -> dict[str, float]:
        return {name: sum(value for (each, _), value in self.seconds.items() if each == name) for name in CLASSES}

    def by_bound(self, factors: Mapping[str, float]) -> dict[Bound, float]:
        """Calibrated seconds by what binds."""
        found: dict[Bound, float] = {"compute": 0.0, "memory": 0.0, "communication": 0.0, "overhead": 0.0}
        for (name, bound), value in self.seconds.items():
            found[bound] += factors.get(name, 1.0) * value
        return found


@dataclass(frozen=True)
class _Shape:
    """What an operator's time depends on; equal ones are computed once."""

    kind: str
    rows: int
    shape: tuple[int, ...]
    weight_bytes: int
    activation_bytes: int
    output_bytes: int = 0


def predict_time(ops: Sequence[Op], engine: EngineProfile, profile: Profile) -> TimePrediction:
    """Seconds of one forward pass made of `ops`, on one engine of a measured machine.

    Attention is computed in full where it is causal, as the CPU kernels of all engines do. Linears quantized in their weights alone
    (bits set, activations None) compute in the engine's type; they read the bytes of their codes where the runtime keeps codes.

    Raises:
        DeviceError: the engine was probed without a kind of operator that is needed.
    """
    parts = sum_parts(ops, engine, profile.bandwidth)
    by_bound = parts.by_bound(engine.calibration.factors)
    seconds = sum(by_bound.values())
    bound: Bound = max(by_bound, key=lambda name: by_bound[name])
    spread = engine.calibration.spread
    if spread is None:
        return TimePrediction(seconds=seconds, low=None, high=None, bound_by=bound)
    return TimePrediction(seconds=seconds, low=seconds * math.exp(-spread), high=seconds * math.exp(spread), bound_by=bound)


def sum_parts(ops: Sequence[Op], engine: EngineProfile, bandwidth: Sequence[Bandwidth]) -> Parts:
    """The operators' measured seconds summed by class, before calibration; those of no rows (an encoder whose output is cached) are not run."""
    found: dict[tuple[str, Bound], float] = defaultdict(float)
    for _, name, bound, seconds in _contributions(ops, engine, bandwidth):
        found[name, bound] += seconds
    return Parts(seconds=dict(found))


def seconds_by_kind(ops: Sequence[Op], engine: EngineProfile, bandwidth: Sequence[Bandwidth]) -> dict[str, float]:
    """Seconds of one forward pass by what its operators are, as `OPERATOR_KINDS` names them; together those of `predict_time`."""
    found, factors = dict.fromkeys(OPERATOR_KINDS, 0.0), engine.calibration.factors
    for kind, name, _, seconds in _contributions(ops, engine, bandwidth):
        found[_KIND_OF_SAMPLE.get(kind, "other")] += factors.get(name, 1.0) * seconds
    return found


def _contributions(ops: Sequence[Op], engine: EngineProfile, bandwidth: Sequence[Bandwidth]) -> Iterator[tuple[str, str, Bound, float]]:
    """(kind of sample, empty of what lies between operators; class; what binds; seconds before calibration)."""
    ops = [op for op in ops if op.rows or (op.kind == "gather" and op.bytes)]
    tables = rate_tables(engine.samples)
    shapes = Counter(_shape(op, engine) for op in ops)
    weight_bytes = sum(shape.weight_bytes * count for shape, count in shapes.items())
    read, cold = bandwidth_at(bandwidth, weight_bytes)[0], _cold_share(bandwidth, weight_bytes, engine)
    for shape, count in shapes.items():
        compute = _compute_seconds(shape, tables, engine)
        memory = shape.activation_bytes / bandwidth_at(bandwidth, shape.activation_bytes)[1]
        yield shape.kind, _class(shape.kind), "memory" if memory > compute else "compute", count * max(compute, memory)
        added = _added_by_cold_weights(shape, tables)
        yield shape.kind, "weights", "memory", count * (shape.weight_bytes / read if added is None else cold * added)
        if "fresh" in tables:
            yield shape.kind, "fresh", "memory", count * _seconds_of_new_memory(shape.output_bytes, tables["fresh"])
    share = _rms_share(ops) if any(block.num_key_value_heads for block in engine.blocks) else 0.0
    yield "", "overhead", "overhead", (1 - share) * len(ops) * engine.operator_overhead_s
    yield "", "overhead_rms", "overhead", share * len(ops) * engine.operator_overhead_s
    yield "", "call", "overhead", engine.call_overhead_s


def predict_peak_memory(weights_bytes: int, activation_bytes: int, engine: EngineProfile) -> int | None:
    """Peak resident bytes of a fresh process that loads and runs a model; None where the probe could not measure memory.

        base_memory_bytes + weights_bytes · weight_copies + activation_bytes

    Args:
        weights_bytes: as this engine's artifact stores them.
        activation_bytes: live at once at the peak.
    """
    if engine.base_memory_bytes is None or engine.weight_copies is None:
        return None
    return round(engine.base_memory_bytes + weights_bytes * engine.weight_copies + activation_bytes)


def _compute_seconds(shape: _Shape, tables: dict[str, RateTable], engine: EngineProfile) -> float:
    if shape.kind == "gather":
        return 0.0
    if shape.kind not in tables:
        raise DeviceError(f"engine {engine.name} was measured without {shape.kind}; measured: {', '.join(tables)}. Run `lighten probe` again.")
    return tables[shape.kind].seconds(shape.rows, shape.shape)


def _rms_share(ops: Sequence[Op]) -> float:
    """The share of norms that are RMSNorm."""
    kinds = [_sample_kind(op) for op in ops if op.kind == "norm"]
    return kinds.count("rmsnorm") / len(kinds) if kinds else 0.0


def _cold_share(bandwidth: Sequence[Bandwidth], weight_bytes: int, engine: EngineProfile) -> float:
    """How much of the way from caches to the memory behind the `cold` samples a working set is, by the seconds that reading a byte takes.

    Those of the memory are the fewest of all sets from `BEYOND` of the cold one: neighbours make them more, nothing makes them fewer.
    """
    cold_bytes = COLD_ELEMENTS * dtype_bytes(engine.dtype)
    if weight_bytes >= cold_bytes:
        return 1.0
    beyond = [point.read_bytes_per_s for point in bandwidth if point.working_set_bytes >= BEYOND * cold_bytes]
    memory = max([bandwidth_at(bandwidth, cold_bytes)[0], *beyond])
    fastest = max(point.read_bytes_per_s for point in bandwidth)
    here, cold = (1 / rate - 1 / fastest for rate in (bandwidth_at(bandwidth, weight_bytes)[0], memory))
    return min(here / cold, 1.0) if cold > 0 else 0.0


def _added_by_cold_weights(shape: _Shape, tables: dict[str, RateTable]) -> float | None:
    """Seconds that a linear takes longer with its weight in memory. None: not measured.

    They do not grow with rows: the same bytes arrive beside more computation. What a measurement says beyond that is noise of two long ones.
    """
    if shape.kind != "linear" or "cold" not in tables:
        return None
    cold, warm = tables["cold"], tables["linear"]
    fewer = [rows for rows in cold.rows if rows <= shape.rows] or cold.rows[:1]
    return max(min(cold.seconds(rows, shape.shape) - warm.seconds(rows, shape.shape) for rows in fewer), 0.0) if shape.weight_bytes else 0.0


def _seconds_of_new_memory(output_bytes: int, table: RateTable) -> float:
    """What an output costs by being new; those smaller than all that was measured are taken for memory that was used before."""
    return table.seconds(output_bytes, ()) if output_bytes >= table.rows[0] else 0.0


def _shape(op: Op, engine: EngineProfile) -> _Shape:
    kind, element = _sample_kind(op), dtype_bytes(engine.activation_dtype)
    if kind == "linear":
        resident = round(op.columns * op.outputs * dtype_bytes(engine.dtype))
        weights = resident if engine.runtime in EXPANDING else min(op.weight_bytes, resident)
        return _Shape("linear", op.rows, (op.columns, op.outputs), weights, op.activation_bytes, round(op.rows * op.outputs * element))
    if kind == "attention":
        written = round(op.products * op.rows * op.outputs * element)
        return _Shape("attention", op.products, (op.rows, op.columns, op.outputs), 0, op.activation_bytes, written)
    if kind == "gather":
        return _Shape("gather", 0, (), op.weight_bytes, op.activation_bytes)
    elements = op.rows * op.columns or max(round(op.activation_bytes / (3 * element)), 1)  # a scan tells its bytes alone
    return _Shape(kind, elements, (), 0, op.activation_bytes)


def _sample_kind(op: Op) -> str:
    """The measured kind that stands for an operator.

    A sum or product moves three operands, an activation function two; a scan is taken for sums that move its bytes. All activation functions are
    taken for GELU: one transcendental function an element.
    """
    if op.kind == "norm":
        return "layernorm" if op.other_flops >= NORM_FLOPS["layernorm"] * op.rows * op.columns else "rmsnorm"
    if op.kind != "elementwise":
        return op.kind
    elements = op.rows * op.columns
    if not elements:
        return "add"
    if op.other_flops == ROTARY_FLOPS * elements:
        return "rotary"
    return "add" if op.activation_bytes % (3 * elements) == 0 else "gelu"


def _class(kind: str) -> str:
    return kind if kind in ("linear", "attention") else "pointwise"
