"""Operators × a device's published figures → seconds: a roofline whose shares of peak and bandwidth are constants, fitted once and kept as data.

    seconds of a product = (computeᵖ + memoryᵖ)^(1/p) + operator_s
    compute = flops / (peak · share) · (1 + half_rows / m) · (1 + half_columns / k) · (1 + half_outputs / n)
            or, where that is less, flops / (rate of float32 · vector_share): few rows go through the vector units
    memory  = bytes / (bandwidth · share)

p joins the two ends of the roofline smoothly: where both bind, neither is hidden whole. m, k, n are those of one matrix: of a layer of
experts, the rows that one expert gets. The three halves are the sizes at which a product reaches half of what a large one does, `operator_s`
is what starting and draining one operator costs. The form was held against measured kernels of nine devices (bf16, fp8, nvfp4; m from 1 to
16384, n and k from 256 to 65536): 6 to 12 % median error, with its constants fitted for each device and type.
Source of those kernels: aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), systems/data, gemm_perf.

The constants lie in `rates_known/NAME.json`, one file for each kind of software, each written by a script that says which rows it was fitted
to. Nothing here knows a model or a device by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

from lighten.cost.operators import Op
from lighten.device.device import PEAK_OF, Device
from lighten.errors import DeviceError
from lighten.model.ggml_types import GGML_TYPES
from lighten.model.spec import WeightFormat
from lighten.units import DTYPE_BITS

Bound = Literal["compute", "memory", "communication", "overhead"]
BOUNDS: tuple[Bound, ...] = ("compute", "memory", "communication", "overhead")
TypeClass = Literal["bit32", "bit16", "bit8", "bit4"]
NARROW_BITS = {"float4": 4, "float6": 6, "float8": 8, "tf32": 32, "float16_acc16": 16}
"""Types of peaks that are no types of stored values, or have another name there → bits."""
CLASS_BITS = {"bit32": 32, "bit16": 16, "bit8": 8, "bit4": 4}
ATTENTION_TYPES = ("bfloat16", "float16", "tf32", "float32")
"""What scores and their sums are computed in, where the linears have a narrower type: the first of these that the device has a rate of."""
MOST_YEARS = 3
OVER_DEVICES = " over devices"
"""What follows a name of `Rates.spread` where more than one device takes part."""
RANGE_90 = 1.645
"""Standard deviations of a normal distribution to either side that hold 90 % of it."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How much of a device's published figures a kind of software reaches.

    Attributes:
        name: of its file.
        compute_share: class of type (bit32, bit16, bit8, bit4) → share of the dense peak that large products reach.
        experts_share: share of `compute_share` that products of many experts at once reach.
        half_rows, half_columns, half_outputs: m, k, n at which a product reaches half of that.
        attention_share: share of the 16-bit peak that scores and their sums reach, masked ones left out.
        vector_share: share of the rate of float32 that products of few rows reach, outside of matrix units.
        score_bytes: bytes that attention moves for each score beside its inputs and outputs: 0 where it is one kernel.
        bandwidth_share: share of the memory's bandwidth that weights and activations are read at.
        cache_share: the same for cached keys and values.
        weight_only: bits of weights that are expanded before they are multiplied → share of `bandwidth_share` that they are read at.
        weight_only_compute: share of `compute_share` that products with such weights reach.
        operator_s: seconds that each operator adds, beside its roofline.
        pointwise: how many of the norms and elementwise operators are kernels of their own (1: all, 0: all are fused into products).
        pass_s: seconds that each forward pass adds: scheduling, sampling, a launch.
        recorded_s: the same for a pass whose launches are recorded once and played, and whose scheduling goes on meanwhile.
        sequence_s: seconds that each sequence adds to a pass: its sampling and bookkeeping.
        link_share: share of a link's bandwidth that a collective reaches.
        collective_s: seconds of the smallest collective inside a node.
        far_collective_s: the same between nodes.
        hop_s: seconds from one stage of layers to the next.
        sharpness: p of the roofline's corner.
        year, progress: of the software that these rates are of, and by how much (in logs) a year of work on it raised what it computes a second.
        by_class: class of device (`device_class`) → the fields that differ there.
        spread: what is predicted → standard deviation of log(predicted / measured) on rows that were not fitted.
        sources: what it was fitted to.
        note: how, and by which script.
    """

    name: str
    compute_share: Mapping[str, float]
    attention_share: float = 0.5
    vector_share: float = 0.5
    score_bytes: float = 0.0
    bandwidth_share: float = 0.85
    cache_share: float = 0.7
    weight_only: Mapping[str, float] = field(default_factory=dict)
    weight_only_compute: float = 1.0
    experts_share: float = 0.7
    half_rows: float = 40.0
    half_columns: float = 80.0
    half_outputs: float = 80.0
    operator_s: float = 4e-6
    pointwise: float = 0.5
    pass_s: float = 0.0
    recorded_s: float = 0.0
    sequence_s: float = 0.0
    link_share: float = 0.75
    collective_s: float = 8e-6
    far_collective_s: float = 30e-6
    hop_s: float = 50e-6
    sharpness: float = 4.0
    year: float = 2025.0
    progress: float = 0.0
    by_class: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    note: str = ""

    def on(self, device: Device) -> Rates:
        """These rates with what differs on this class of device."""
        changed = self.by_class.get(device_class(device))
        return replace(self, by_class={}, **changed) if changed else self

    def in_year(self, year: float) -> Rates:
        """These rates as software of that year reaches them, where the years that the rows were from are not left far."""
        factor = math.exp(self.progress * max(-MOST_YEARS, min(MOST_YEARS / 2, year - self.year)))
        shares = {name: min(1.0, share * factor) for name, share in self.compute_share.items()}
        attention, vector = min(1.0, self.attention_share * factor), min(1.0, self.vector_share * factor)
        return replace(self, year=year, compute_share=shares, attention_share=attention, vector_share=vector)

    def weight_only_share(self, weight: WeightFormat) -> float:
        """Share of `bandwidth_share` that weights of this width are read at: that of the nearest width that is known; 1 where none is."""
        if not self.weight_only:
            return 1.0
        width = weight_bits(weight) or 16
        return self.weight_only[min(self.weight_only, key=lambda bits: abs(math.log2(float(bits) / width)))]

    def range_factor(self, what: str, *more: float, devices: int = 1) -> float:
        """What a prediction is multiplied by and divided by for its 90 % range; `more`: standard deviations of what is not known beside.

        Raises:
            DeviceError: its spread was never held against measured rows.
        """
        what = what + OVER_DEVICES if devices > 1 and what + OVER_DEVICES in self.spread else what
        if what not in self.spread:
            known = ", ".join(self.spread) or "nothing"
            raise DeviceError(f"rates {self.name}: the spread of {what} was not measured; known: {known}.")
        return math.exp(RANGE_90 * math.sqrt(self.spread[what] ** 2 + sum(value**2 for value in more)))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one device gives to one pass: operations per second of products, of attention, and outside of matrix units, bytes per second.

    Attributes:
        vector_flops_per_s: 0 where it is not known.
    """

    product_flops_per_s: float
    vector_flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    type_class: str


def device_class(device: Device) -> str:
    """The kind of memory system that software meets: stacked (HBM), graphics (GDDR), unified (one memory for all), host (a processor's own).

    Devices that are neither GPU nor processor are a class by their kind: npu, tpu, fpga, asic.
    """
    kind, memory = device.kind.lower(), (device.memory_type or "").upper()
    if kind == "cpu":
        return "host"
    if kind in ("soc", "apu") or "LPDDR" in memory or "UNIFIED" in memory:
        return "stacked" if "HBM" in memory else "unified"
    if kind == "gpu":
        return "stacked" if "HBM" in memory else "graphics"
    return kind


def type_class(dtype: str) -> TypeClass:
    """The width of a type of products, as rates are kept by.

    >>> type_class("bfloat16"), type_class("float8_e4m3fn"), type_class("float4")
    ('bit16', 'bit8', 'bit4')
    """
    name = PEAK_OF.get(dtype, dtype)
    bits = NARROW_BITS.get(name) or DTYPE_BITS[name]
    return "bit32" if bits >= 32 else "bit16" if bits >= 16 else "bit8" if bits > 4 else "bit4"


def attention_type(device: Device, dtype: str) -> str:
    """What attention is computed in: `dtype` itself unless it is narrower than 16 bits.

    Raises:
        DeviceError: no rate of a type that attention could take.
    """
    if type_class(dtype) in ("bit32", "bit16") and dtype in DTYPE_BITS:
        return dtype
    for name in ATTENTION_TYPES:
        if name in device.peak_flops_per_s:
            return name
    known = ", ".join(device.peak_flops_per_s) or "none"
    raise DeviceError(f"{device.name} has no known rate of {', '.join(ATTENTION_TYPES)} products, which attention needs; its known types: {known}.")


def limits(device: Device, dtype: str) -> Limits:
    """The published figures that bound a pass whose linears are computed in `dtype`.

    Raises:
        DeviceError: the device's rate of that type, or its bandwidth, is not known.
    """
    return Limits(
        product_flops_per_s=device.peak(dtype),
        vector_flops_per_s=device.peak_flops_per_s.get("float32", 0.0),
        attention_flops_per_s=device.peak(attention_type(device, dtype)),
        bytes_per_s=device.bandwidth(),
        type_class=type_class(dtype),
    )


def op_seconds(op: Op, device: Device, rates: Rates, *, dtype: str) -> tuple[float, Bound]:
    """Seconds of one operator whose products are computed in `dtype`, and what binds it.

    Raises:
        DeviceError: the device's rate of that type, or its bandwidth, is not known.
    """
    parts = op_parts(op, limits(device, dtype), rates.on(device))
    return sum(parts.values()), max(parts, key=lambda bound: parts[bound])


def pass_time(ops: Sequence[Op], device: Device, rates: Rates, *, dtype: str) -> dict[Bound, float]:
    """Seconds of operators one after another, by what binds each; their sum, with `rates.pass_s`, is the pass's time.

    Raises:
        DeviceError: the device's rate of that type, or its bandwidth, is not known.
    """
    bound_by, there = limits(device, dtype), rates.on(device)
    total: dict[Bound, float] = dict.fromkeys(BOUNDS, 0.0)
    total["overhead"] += there.pass_s
    for op in ops:
        for bound, seconds in op_parts(op, bound_by, there).items():
            total[bound] += seconds
    return total


def op_parts(op: Op, bound_by: Limits, rates: Rates) -> dict[Bound, float]:
    """Seconds of one operator, the roofline's under the end that binds, and what it costs beside as overhead."""
    if op.kind == "linear":
        return product_parts(op, bound_by, rates)
    if op.kind == "attention":
        compute = op.causal_flops / (bound_by.attention_flops_per_s * rates.attention_share)
        memory = op.activation_bytes / (bound_by.bytes_per_s * rates.cache_share)
        scores = scores_of(op) * rates.score_bytes / (bound_by.bytes_per_s * rates.bandwidth_share)
        return _joined(compute, memory + scores, rates, rates.operator_s)
    moved = memory_seconds(op.bytes, bound_by.bytes_per_s, rates)
    return {"memory": moved * rates.pointwise, "overhead": rates.operator_s * rates.pointwise}


def product_parts(op: Op, bound_by: Limits, rates: Rates) -> dict[Bound, float]:
    """Seconds of a linear."""
    if not op.rows:
        return {}
    share = rates.compute_share[bound_by.type_class]
    expanded = is_weight_only(op.weight, bound_by.type_class)
    read = rates.weight_only_share(op.weight) if expanded else 1.0
    if expanded:
        share *= rates.weight_only_compute
    if matrices_of(op) > 1:
        share *= rates.experts_share
    sizes = saturation(rows_of_matrix(op), op.columns, op.outputs, rates)
    compute = op.matmul_flops / (bound_by.product_flops_per_s * share) * sizes
    if bound_by.vector_flops_per_s:
        compute = min(compute, op.matmul_flops / (bound_by.vector_flops_per_s * rates.vector_share))
    moved = memory_seconds(op.weight_bytes / read + op.activation_bytes, bound_by.bytes_per_s, rates)
    return _joined(compute, moved, rates, rates.operator_s)


def saturation(rows: float, columns: float, outputs: float, rates: Rates) -> float:
    """How many times longer than at full size each operation of a product of this size takes."""
    return (1 + rates.half_rows / rows) * (1 + rates.half_columns / columns) * (1 + rates.half_outputs / outputs)


def memory_seconds(moved: float, bytes_per_s: float, rates: Rates) -> float:
    """Seconds of reading and writing so many bytes."""
    return moved / (bytes_per_s * rates.bandwidth_share)


def scores_of(op: Op) -> float:
    """Scores of an attention, masked ones too: each is 2 · head_dim operations, and as many for its share of the values."""
    return op.matmul_flops / (4 * op.outputs) if op.outputs else 0.0


def matrices_of(op: Op) -> float:
    """Matrices that a linear reads: of a layer of experts, those that are touched."""
    one = op.weight.stored_bytes(op.outputs, op.columns) if op.weight_bytes else 0
    return max(1.0, round(op.weight_bytes / one, 2)) if one else 1.0


def rows_of_matrix(op: Op) -> float:
    """Rows that one matrix of a linear meets: of a layer of experts, those of one expert that is touched at all."""
    return max(1.0, op.rows / matrices_of(op))


def is_weight_only(weight: WeightFormat, products: str) -> bool:
    """Whether its codes are expanded before they are multiplied: they are narrower than the class of type that products are computed in."""
    bits = weight_bits(weight)
    return weight.activations is None and bits is not None and bits < CLASS_BITS[products]


def weight_bits(weight: WeightFormat) -> int | None:
    """Bits of one code; None where the weight is not quantized."""
    return GGML_TYPES[weight.ggml_type].bits if weight.ggml_type is not None else weight.bits


def _joined(compute: float, memory: float, rates: Rates, more: float) -> dict[Bound, float]:
    bound: Bound = "compute" if compute > memory else "memory"
    return {bound: joined_seconds(compute, memory, rates.sharpness), "overhead": more}


def joined_seconds(compute: float, memory: float, sharpness: float) -> float:
    """Seconds where both ends of the roofline bind a little.

    >>> joined_seconds(3.0, 4.0, 2.0)
    5.0
    """
    return float((compute**sharpness + memory**sharpness) ** (1 / sharpness))


RATES_FOLDER = "rates_known"


def known_rates() -> tuple[str, ...]:
    """Names that `load_rates` takes."""
    folder = resources.files("lighten.device") / RATES_FOLDER
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


@lru_cache
def load_rates(name: str) -> Rates:
    """The constants of one kind of software.

    Raises:
        DeviceError: there is no such file; says which there are.
    """
    path = resources.files("lighten.device") / RATES_FOLDER / f"{name}.json"
    if not name.replace("-", "").replace("_", "").isalnum() or not path.is_file():
        raise DeviceError(f"no rates named {name!r} are known; known: {', '.join(known_rates())}.")
    return rates_from(json.loads(path.read_text(encoding="utf-8")))


def rates_from(document: Mapping[str, Any]) -> Rates:
    """Rates of a JSON document.

    Raises:
        DeviceError: it names fields that rates do not have, or leaves out those that they need.
    """
    names = {each.name for each in fields(Rates)}
    if strange := sorted(set(document) - names):
        raise DeviceError(f"rates have no {', '.join(strange)}; they have: {', '.join(sorted(names))}.")
    if missing := sorted({"name", "compute_share"} - set(document)):
        raise DeviceError(f"rates without {', '.join(missing)}.")
    return Rates(**{**document, "sources": tuple(document.get("sources", ()))})
