"""One forward pass as inference software runs it on one of the devices that share a model: its operators, its collectives, its seconds.

Operators are those of the whole model (`lighten.cost.operators`), changed where inference software does less work than the model's own code:

- experts: the number that a batch is expected to touch under uniform routing, E · (1 - (1 - k/E)^tokens), not all that it could touch;
- latent attention: a step reads the cached latent once for all heads, its up-projections folded into the query and the output
  (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), instead of expanding all cached positions again;
- the cache's own type, where it is narrower than that of the activations.

Of `tp` devices each has 1/tp of every product but the router's, of the heads, and of the cache as far as there are key heads to share out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from lighten.cost.operators import Forward, Op, forward_operators
from lighten.device.datasheet import BOUNDS, Bound, Limits, Rates, attention_type, op_parts, type_class
from lighten.device.device import Device
from lighten.errors import WorkloadError
from lighten.model.spec import Attention, Elementwise, Linear, ModelSpec, Part
from lighten.units import DTYPE_BITS, dtype_bytes

Split = Literal["reduce", "gather"]
"""How a layer is shared out: column after row, summed up twice a layer (Megatron-LM, arXiv:1909.08053); or each product for itself, its input
sent to all and its output gathered (llama.cpp's row split)."""
Keep = Literal["all", "attention", "logits", "products"]
"""Operators of a pass: attention; those of positions that get logits; the rest."""
ROUTER_OUTPUTS = 512
"""A linear of no more outputs, before experts, is their router, which each device computes for itself. The largest published routers have 512."""
GATHERED_BYTES = 8
"""Bytes of a value that a row split sends: ggml keeps activations between operators in float32, and they go out through the host and in again."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """`count` exchanges of `size_bytes` each: of an all-reduce the summed tensor, of a gather what one device receives and sends."""

    kind: Split
    size_bytes: float
    count: int


@dataclass(frozen=True, kw_only=True)
class DevicePass:
    """What one of `tp` devices does in a pass over all layers.

    Attributes:
        ops: operators with how often each occurs.
        sequences: that get a token from it.
        recorded: its launches are recorded once and played (CUDA graphs), and its scheduling goes on meanwhile.
        boundary_bytes: of the activations that go from one stage of layers to the next.
    """

    ops: tuple[tuple[Op, float], ...]
    collectives: tuple[Collective, ...]
    sequences: int
    boundary_bytes: float
    tp: int
    recorded: bool = False


def device_pass(  # noqa: PLR0913 - a public call whose options are all given by name
    spec: ModelSpec, forward: Forward, *, dtype: str, kv_dtype: str | None = None, tp: int = 1, split: Split = "reduce", keep: Keep = "all"
) -> DevicePass:  # fmt: skip
    """The pass of one of `tp` devices, activations in `dtype`, the cache in `kv_dtype`; `keep` leaves out operators, not collectives."""
    once = folded(spec)
    mixture = any(isinstance(part, Linear) and part.experts > 1 for part in once.spec.parts)
    ops: list[tuple[Op, float]] = []
    sent, products = 0.0, 0
    for part, op, times in zip(once.spec.parts, forward_operators(once.spec, forward, dtype), once.times, strict=True):
        changed = _as_engines_do(part, op, forward, dtype, kv_dtype or dtype)
        if changed.kind == "linear" and changed.rows and tp > 1:
            sent += times * changed.rows * (changed.columns * (tp - 1) + changed.outputs * (tp - 1) / tp) * GATHERED_BYTES
            products += times
        if keep in ("all", _sort_of(part, op)):
            ops.append((_one_of(changed, part, tp, mixture), times))
    hidden_bytes = forward.batch_size * forward.query_len * _width(once.spec) * dtype_bytes(dtype)
    return DevicePass(
        ops=tuple(ops), collectives=_collectives(spec, hidden_bytes, sent, products, tp, split), sequences=forward.batch_size,
        boundary_bytes=hidden_bytes, tp=tp,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A model with each of its different parts once, and how many times it has that part."""

    spec: ModelSpec
    times: tuple[int, ...]


_FOLDED: dict[int, tuple[ModelSpec, Folded]] = {}
_MOST_FOLDED = 64


def folded(spec: ModelSpec) -> Folded:
    """The model with equal parts counted: layers repeat, so that a pass over their operators is a hundred times shorter."""
    if (found := _FOLDED.get(id(spec))) and found[0] is spec:
        return found[1]
    counts: dict[str, tuple[Part, int]] = {}
    for part in spec.parts:
        key = f"{type(part).__name__} {[value for name, value in vars(part).items() if name != 'name']}"
        counts[key] = (counts[key][0] if key in counts else part, counts.get(key, (part, 0))[1] + 1)
    made = Folded(spec=replace(spec, parts=tuple(part for part, _ in counts.values())), times=tuple(times for _, times in counts.values()))
    if len(_FOLDED) >= _MOST_FOLDED:
        _FOLDED.clear()
    _FOLDED[id(spec)] = spec, made
    return made


def _sort_of(part: Part, op: Op) -> Keep:
    return "attention" if op.kind == "attention" else "logits" if part.rows == "logits" else "products"


def check_split(spec: ModelSpec, *, tp: int, pp: int) -> None:
    """Raises:
    WorkloadError: heads that `tp` does not divide, or fewer layers than stages.
    """
    if tp < 1 or pp < 1:
        raise WorkloadError(f"tp={tp}, pp={pp}: both have to be positive.")
    for part in spec.parts:
        if isinstance(part, Attention) and part.num_attention_heads % tp:
            heads = part.num_attention_heads
            fitting = ", ".join(str(size) for size in range(1, min(heads, 64) + 1) if heads % size == 0)
            raise WorkloadError(f"tp={tp} does not divide the {heads} attention heads of {spec.name}; use one of {fitting}.")
    if pp > spec.layers:
        raise WorkloadError(f"pp={pp}: {spec.name} has {spec.layers} layers; use no more stages than layers.")


def expected_experts(experts: int, chosen: int, tokens: float) -> float:
    """Experts that some of `tokens` are routed to, each to `chosen` of `experts` at random.

    >>> round(expected_experts(8, 2, 1), 9), round(expected_experts(8, 2, 4), 3), round(expected_experts(128, 8, 1000), 3)
    (2.0, 5.469, 128.0)
    """
    return float(experts * (1 - (1 - chosen / experts) ** tokens))


def pass_parts(
    work: DevicePass, device: Device, rates: Rates, limits: tuple[Limits, Limits], *, pp: int = 1
) -> dict[Bound, float]:  # fmt: skip
    """Seconds of a pass through all `pp` stages, one after another, by what binds; `rates` as they are on this device.

    Args:
        limits: for products of weights of 16 bits and more, and for those of narrower weights (`wide_and_narrow`).
    """
    total: dict[Bound, float] = dict.fromkeys(BOUNDS, 0.0)
    for op, count in work.ops:
        for bound, seconds in op_parts(op, limits[is_narrow(op)], rates).items():
            total[bound] += count * seconds
    total["communication"] = sum(each.count * collective_seconds(each, work.tp, device, rates) for each in work.collectives)
    if pp > 1:
        link = device.link(work.tp * pp)
        total["communication"] += (pp - 1) * (rates.hop_s + work.boundary_bytes / (link.bytes_per_s * rates.link_share))
    total["overhead"] += (rates.recorded_s if work.recorded else rates.pass_s) + rates.sequence_s * work.sequences
    return total


def wide_and_narrow(device: Device, dtype: str, product_dtype: str) -> tuple[Limits, Limits]:
    """Limits of products of weights of at least 16 bits, and of narrower ones, which are computed in `product_dtype`.

    Raises:
        DeviceError: the device's rate of one of them, or its bandwidth, is not known.
    """
    attention = device.peak(attention_type(device, dtype))
    vector = device.peak_flops_per_s.get("float32", 0.0)
    wide, narrow = (
        Limits(
            product_flops_per_s=device.peak(kind), vector_flops_per_s=vector, attention_flops_per_s=attention, bytes_per_s=device.bandwidth(),
            type_class=type_class(kind),
        )
        for kind in (dtype, product_dtype)
    )  # fmt: skip
    return wide, narrow


def is_narrow(op: Op) -> bool:
    """Whether a product's weights are stored in less than 16 bits."""
    weight = op.weight
    return (
        op.kind == "linear" and bool(op.weight_bytes) and (weight.bits is not None or weight.ggml_type is not None or DTYPE_BITS[weight.dtype] < 16)
    )


def collective_seconds(exchange: Collective, devices: int, device: Device, rates: Rates) -> float:
    """Seconds of one exchange between neighbouring devices.

    Raises:
        DeviceError: no known link joins so many devices.
    """
    terms = exchange_terms(exchange, devices, device)
    wire = (terms["near_wire"] + terms["far_wire"]) / rates.link_share
    return wire + terms["near"] * rates.collective_s + terms["far"] * rates.far_collective_s


def exchange_terms(exchange: Collective, devices: int, device: Device) -> dict[str, float]:
    """What one exchange costs, before any rate: latencies inside a node and between nodes, counted, and seconds on the wire of each at full speed.

    An all-reduce over several nodes is one inside each, and one of each device's share between nodes. The latency of more devices grows as
    the logarithm of their number, 1 for two.

    Raises:
        DeviceError: no known link joins so many devices.
    """
    if devices == 1:
        return {"near": 0.0, "near_wire": 0.0, "far": 0.0, "far_wire": 0.0}
    if exchange.kind == "gather":
        return {"near": devices - 1.0, "near_wire": exchange.size_bytes / device.link(devices).bytes_per_s, "far": 0.0, "far_wire": 0.0}
    inner = device.link(2)
    inside = 1 if device.devices_per_node == 1 else min(devices, inner.devices or devices)
    nodes = math.ceil(devices / inside)
    near = {"near": math.log2(2 * inside) / 2 if inside > 1 else 0.0, "near_wire": _ring(exchange.size_bytes, inside) / inner.bytes_per_s}
    if nodes == 1:
        return {**near, "far": 0.0, "far_wire": 0.0}
    far_wire = _ring(exchange.size_bytes / inside, nodes) / device.link(devices).bytes_per_s
    return {**near, "far": math.log2(2 * nodes) / 2, "far_wire": far_wire}


def _ring(size_bytes: float, devices: int) -> float:
    return 2 * (devices - 1) / devices * size_bytes


def _as_engines_do(part: Part, op: Op, forward: Forward, dtype: str, kv_dtype: str) -> Op:
    if isinstance(part, Linear):
        if part.over_cache and forward.query_len < forward.key_len:
            return _over_new(op, forward)
        if part.experts > 1 and op.rows:
            touched = expected_experts(part.experts, part.experts_per_row, op.rows / part.experts_per_row)
            return replace(op, weight_bytes=round(touched * part.weight.stored_bytes(part.out_features, part.in_features)))
    if isinstance(part, Attention) and op.rows:
        return _cached(part, op, forward, dtype, kv_dtype)
    return op


def _over_new(op: Op, forward: Forward) -> Op:
    """An up-projection of the latent, folded into what the new positions alone compute."""
    share = forward.query_len / forward.key_len
    return replace(
        op, rows=round(op.rows * share), matmul_flops=round(op.matmul_flops * share), causal_flops=round(op.causal_flops * share),
        activation_bytes=round(op.activation_bytes * share),
    )  # fmt: skip


def _cached(part: Attention, op: Op, forward: Forward, dtype: str, kv_dtype: str) -> Op:
    element, kept = dtype_bytes(dtype), dtype_bytes(kv_dtype)
    batch, keys = forward.batch_size, op.columns
    if part.latent_dim is not None and op.rows < keys:
        heads = part.num_attention_heads
        moved = batch * (keys * part.latent_dim * kept + 2 * heads * op.rows * part.latent_dim * element)
        flops = 4 * batch * heads * op.rows * keys * part.latent_dim
        return replace(op, matmul_flops=flops, causal_flops=flops, activation_bytes=round(moved))
    values = batch * part.num_key_value_heads * keys * (part.head_dim + part.value_dim)
    return replace(op, activation_bytes=round(op.activation_bytes - values * (element - kept)))


def _one_of(op: Op, part: Part, tp: int, mixture: bool) -> Op:
    """One device's share of an operator."""
    if tp == 1 or not op.rows:
        return op
    if isinstance(part, Attention):
        groups = math.ceil(part.num_key_value_heads / tp) / part.num_key_value_heads  # key heads are copied where there are too few
        own = 1 / tp if part.latent_dim is None else 1.0
        share = max(own, groups) if part.latent_dim is None else 1.0
        return replace(
            op, matmul_flops=round(op.matmul_flops / tp), causal_flops=round(op.causal_flops / tp), products=math.ceil(op.products / tp),
            activation_bytes=round(op.activation_bytes * share),
        )  # fmt: skip
    if isinstance(part, Elementwise) and part.kind != "add":  # between a column's and a row's split; sums of whole positions are not
        return replace(op, activation_bytes=round(op.activation_bytes / tp), other_flops=round(op.other_flops / tp))
    if not isinstance(part, Linear) or (mixture and part.experts == 1 and part.out_features <= ROUTER_OUTPUTS):
        return op
    outputs = max(1, round(op.outputs / tp)) if op.outputs >= op.columns else op.outputs
    columns = op.columns if op.outputs >= op.columns else max(1, round(op.columns / tp))
    return replace(
        op, matmul_flops=round(op.matmul_flops / tp), causal_flops=round(op.causal_flops / tp), weight_bytes=round(op.weight_bytes / tp),
        activation_bytes=round(op.rows * (columns + outputs) * op.activation_bytes / max(1, op.rows * (op.columns + op.outputs))),
        columns=columns, outputs=outputs,
    )  # fmt: skip


def _collectives(spec: ModelSpec, hidden_bytes: float, sent: float, products: int, tp: int, split: Split) -> tuple[Collective, ...]:
    if tp == 1:
        return ()
    if split == "gather":
        return (Collective(kind="gather", size_bytes=sent / max(1, products), count=products),)
    return (Collective(kind="reduce", size_bytes=hidden_bytes, count=2 * spec.layers),)


def _width(spec: ModelSpec) -> int:
    """Values of one position between layers: what most norms and the first linears take in."""
    inputs = Counter(part.in_features for part in spec.parts if isinstance(part, Linear))
    return inputs.most_common(1)[0][0] if inputs else 0
