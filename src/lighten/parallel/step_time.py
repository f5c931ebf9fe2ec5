"""A training step on devices under a plan → seconds, with a range and what binds: no model, machine or source is known here by its name.

    step = micro_batches · stage + bubble + exposed traffic of data parallelism + optimizer + a step's own overhead
    stage = products + attention + what only moves bytes + kernels' starts + exposed traffic of tensor, context and expert parallelism

`layer_pieces` gives what one layer and the ends of a model (embedding, head, loss) take on one rank; it depends on tp, cp, ep, the micro-batch,
recomputation and sequence parallelism alone. `assemble` is arithmetic on these pieces and on pp, dp, sharding and schedule, in `+ - * /`,
`minimum` and `maximum` alone, so that it takes floats and numpy's arrays alike.

Shares of published peaks, and how much of the traffic is hidden, are `TrainingRates`: constants fitted to published steps by
scripts/fit_training.py and kept as data. Shapes' effect on a product is the form of `lighten.device.datasheet`.

Left out: stragglers, checkpoints, evaluation, reading the data; a pipeline's stages of unequal devices; expert imbalance beyond what the rates'
constant has of it; what of an offloaded update computing might hide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources
from typing import Any, Literal, get_args

from lighten.cost.adapters import adapter_shapes
from lighten.cost.operators import Op, forward_operators
from lighten.cost.optimizer_state import OPTIMIZERS
from lighten.cost.passes import training_forward
from lighten.cost.workload import Workload, check_workload
from lighten.device.datasheet import RANGE_90, RATES_FOLDER, Bound, attention_type, device_class, type_class
from lighten.device.device import Device, Link
from lighten.errors import DeviceError, WorkloadError
from lighten.model.spec import Attention, Linear, ModelSpec, Part, block_name
from lighten.parallel.plan import Plan
from lighten.units import dtype_bytes

Software = Literal["fused", "compiled", "eager"]
SOFTWARES = get_args(Software)
"""How a framework runs a block: kernels written for it (Megatron-LM, Transformer Engine, MaxText), what a compiler or plain kernels under FSDP
make of it, or one kernel for each operator."""
FLASH_BACKWARD = 2.5
"""Products of a fused attention's backward pass for each of its forward pass: five for two. Source: Dao 2023 (arXiv:2307.08691), section 3.1.2."""
HOST_BYTES_PER_S = 128e9
"""What an update in a host's memory moves in a second, for all devices of the host together: 0.25 s for 10⁹ parameters of 32 bytes each.
Source: Ren et al. 2021 (arXiv:2101.06840), table 4."""
LOSS_BYTES = 12
"""Bytes that the loss moves for each logit: written and read once in 16 bits, and as float32 by softmax and its gradient."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The software that runs a step.

    Attributes:
        software: its kind; None: not known, the middle of those that are, with a wider range.
        linear_dtype: the type that products with weights run in (float8 and float4 recipes, tf32); None: the workload's.
    """

    software: Software | None = "fused"
    linear_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.software is not None and self.software not in SOFTWARES:
            raise WorkloadError(f"software={self.software!r} is not known; known: {', '.join(SOFTWARES)}.")


@dataclass(frozen=True, kw_only=True)
class TrainingRates:
    """How much of published figures training reaches.

    Attributes:
        compute_share: class of type (bit32, bit16, bit8, bit4) → share of the dense peak that large products reach on a device whose 16-bit peak
            is `REFERENCE_FLOPS_PER_S`.
        peak_slope: how that share falls with the device's 16-bit peak, as an exponent: faster devices are limited by power sooner.
        attention_share, attention_slope: the same for attention in one kernel; the slope by kind of software, as kernels written for a device keep up
            with it and others do not.
        half: sizes of a product at which it reaches half of that, for 16-bit types; `half_narrow` for narrower ones.
        bandwidth_share: share of the memory's bandwidth that is reached.
        pointwise: kind of software → how often its norms and elementwise operators move their bytes, where 1 is each once.
        software: kind of software → what its products take beside those of the best.
        kinds: class of device → the same.
        score_passes: how often attention that keeps its scores moves them, forward and backward.
        quantize_bytes: moved for each value that a product of a narrow type takes, to scale and to cast it.
        routing_passes: how often experts' inputs are moved beside their products: permuted, weighted, summed.
        expert_share: share of a product's rate that grouped products of experts reach.
        link_share, network_share: share of a link's bandwidth that collectives reach inside a node and between nodes.
        collective_s: seconds of the smallest collective.
        tp_exposed, ep_exposed, cp_exposed: share of that traffic that computing does not hide.
        dp_hidden: share of a step's computing behind which data-parallel traffic hides; dp_exposed: share of it that never does.
        operator_s: kind of software → seconds that the host takes to start what one operator is made of; it does so while others run.
        step_s: of each step, beside all else.
        spread: standard deviation of log(predicted / measured) on steps of sources that were not fitted; by what is not known, what adds to it.
    """

    name: str
    compute_share: Mapping[str, float]
    peak_slope: float = 0.07
    attention_share: float = 0.6
    attention_slope: Mapping[str, float] = field(default_factory=dict)
    half: tuple[float, float, float] = (40.0, 80.0, 80.0)
    half_narrow: tuple[float, float, float] = (150.0, 400.0, 400.0)
    bandwidth_share: float = 0.8
    pointwise: Mapping[str, float] = field(default_factory=dict)
    software: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)
    score_passes: float = 14.0
    quantize_bytes: float = 4.0
    routing_passes: float = 6.0
    expert_share: float = 0.8
    link_share: float = 0.75
    network_share: float = 0.75
    collective_s: float = 2e-5
    tp_exposed: float = 0.7
    ep_exposed: float = 0.7
    cp_exposed: float = 0.3
    dp_hidden: float = 0.7
    dp_exposed: float = 0.1
    operator_s: Mapping[str, float] = field(default_factory=dict)
    step_s: float = 0.0
    spread: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    note: str = ""

    def of_software(self, values: Mapping[str, float], software: Software | None) -> float:
        """The value of a kind of software; the middle of all where it is not known."""
        if software is not None:
            return values[software]
        return math.exp(sum(math.log(value) for value in values.values()) / len(values))


REFERENCE_FLOPS_PER_S = 312e12
"""The 16-bit peak that shares are stated for. Source: NVIDIA A100 Tensor Core GPU data sheet."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Seconds and bytes of one micro-batch on one rank, for one layer in the mean and for the ends of the model.

    Attributes:
        layer_s: one layer's forward, backward and recomputed pass: `compute_s`, `memory_s` and `overhead_s` are its parts.
        ends_s: embedding, final norm, head and loss: all of it, were it on one stage.
        layer_comm_s: exposed seconds of tensor, context and expert parallelism of one layer; `ends_comm_s` of the head.
        layers: of the whole model.
        layer_parameters: held by one rank, in the mean of the layers, and updated; `ends_parameters` those of embedding and head.
        expert_parameters: those of `layer_parameters` that are experts', which fewer ranks share out.
        value_bytes: of a weight and of a gradient, as they are sent.
        update_bytes: that the optimizer moves for each parameter.
        hidden_bytes: of the tensor that goes from one stage to the next.
        model_flops: of the whole model and micro-batch, forward and backward, masked scores left out, without what is computed again.
    """

    compute_s: float
    memory_s: float
    overhead_s: float
    ends_s: float
    layer_comm_s: float
    ends_comm_s: float
    layers: int
    layer_parameters: float
    expert_parameters: float
    ends_parameters: float
    frozen_parameters: float
    value_bytes: float
    update_bytes: float
    hidden_bytes: float
    model_flops: float

    @property
    def layer_s(self) -> float:
        return self.compute_s + self.memory_s + self.overhead_s


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What collectives of data parallelism, stages of a pipeline and the optimizer's update move in a second, and seconds of the smallest."""

    dp_bytes_per_s: Any
    expert_dp_bytes_per_s: Any
    pp_bytes_per_s: Any
    memory_bytes_per_s: Any
    collective_s: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of one step.

    Attributes:
        low, high: a 90 % range.
        bound_by: the largest of compute, memory, communication and overhead (a pipeline's idle time is overhead).
        parts: seconds by compute, memory, communication, bubble, overhead, optimizer; they add up to `seconds`.
        mfu: FLOPs of the model, masked scores and what is recomputed left out, over the peak of the type that its products run in.
    """

    seconds: float
    low: float
    high: float
    bound_by: Bound
    parts: Mapping[str, float]
    mfu: float
    tokens_per_s: float


# ---- what a layer computes ----


@dataclass(frozen=True, kw_only=True)
class Product:
    """Products of one kind with weights, of one sequence: `m` rows times a weight of `n` × `k`.

    Attributes:
        count: how many such, in all layers or in the ends together.
        splits: the side that tensor parallelism divides: "n" (columns), "k" (rows), or "" where each rank computes it whole.
        experts, chosen: experts, and how many of them a row meets.
        frozen: not trained, so that its weight has no gradient.
    """

    m: float
    k: float
    n: float
    count: float
    splits: str
    experts: int = 1
    chosen: int = 1
    frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class Core:
    """Attention of one sequence: FLOPs of its forward pass with and without masked scores, scores, and bytes of keys and values."""

    flops: float
    causal_flops: float
    scores: float
    kv_bytes: float
    count: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model computes for one sequence, in its layers or in its ends.

    Attributes:
        split_bytes: moved by elementwise operators that tensor parallelism divides; `whole_bytes`: by those that it does not.
        kernels: operators of a forward pass.
    """

    products: tuple[Product, ...]
    cores: tuple[Core, ...]
    split_bytes: float
    whole_bytes: float
    kernels: float


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model under a workload, of one sequence: its layers, its ends, and how many parameters each holds."""

    blocks: Shape
    ends: Shape
    layers: int
    hidden: int
    positions: int
    vocabulary: float
    dense_parameters: float
    expert_parameters: float
    ends_parameters: float
    trained_share: float


def outline(spec: ModelSpec, workload: Workload) -> Outline:
    """What a training step computes for one sequence, kept on the spec: a plan search asks for it again and again."""
    key = (workload.seq_len, workload.target_len, workload.dtype, workload.lora_rank, workload.lora_targets)
    kept: dict[Any, Outline] = spec.__dict__.setdefault("_training_outlines", {})
    if key not in kept:
        kept[key] = _outline(spec, workload)
    return kept[key]


def _outline(spec: ModelSpec, workload: Workload) -> Outline:
    one = replace(workload, batch_size=1)
    ops = forward_operators(spec, training_forward(spec, one), workload.dtype)
    adapted = workload.lora_rank is not None
    blocks: list[tuple[Part, Op]] = []
    ends: list[tuple[Part, Op]] = []
    for part, op in zip(spec.parts, ops, strict=True):
        (ends if block_name(part) is None else blocks).append((part, op))
    last = _last_linears(blocks)
    linears = [part for part in spec.parts if isinstance(part, Linear) and block_name(part) is not None]
    experts = sum(part.parameters for part in linears if part.experts > 1)
    in_blocks = sum(part.parameters for part, _ in blocks)
    total = spec.total_parameters
    trained = 1.0
    if adapted:
        trained = sum(math.prod(shape) for shape in adapter_shapes(spec, workload.lora_rank or 1, workload.lora_targets)) / total
    head = max((part.out_features for part in spec.parts if isinstance(part, Linear) and part.component == "head"), default=0)
    rows = max((op.rows for part, op in blocks if isinstance(part, Linear) and part.experts == 1), default=workload.seq_len)
    return Outline(
        blocks=_shape(blocks, last, workload, frozen=adapted), ends=_shape(ends, set(), workload, frozen=adapted), layers=max(1, spec.layers),
        hidden=_hidden(spec), positions=rows, vocabulary=head, dense_parameters=in_blocks - experts, expert_parameters=experts,
        ends_parameters=total - in_blocks, trained_share=trained,
    )  # fmt: skip


def _hidden(spec: ModelSpec) -> int:
    """Width of the stream between blocks: what most linears in blocks take or give."""
    widths: dict[int, int] = {}
    for part in spec.parts:
        if isinstance(part, Linear):
            for width in (part.in_features, part.out_features):
                widths[width] = widths.get(width, 0) + 1
    return max(widths, key=lambda width: widths[width], default=1)


def _last_linears(blocks: list[tuple[Part, Op]]) -> set[str]:
    """The last linear of each block's attention and MLP, whose rows tensor parallelism divides. Source: arXiv:1909.08053, section 3."""
    last: dict[tuple[str | None, str], str] = {}
    for part, _ in blocks:
        if isinstance(part, Linear) and part.out_features > 1:
            last[block_name(part), part.component] = part.name
    return set(last.values())


def _shape(found: list[tuple[Part, Op]], last: set[str], workload: Workload, *, frozen: bool) -> Shape:
    products: dict[tuple[Any, ...], float] = {}
    cores: dict[tuple[Any, ...], float] = {}
    split = whole = kernels = 0.0
    for part, op in found:
        if op.kind == "linear" and op.matmul_flops:
            experts, chosen = (part.experts, getattr(part, "routed", part.experts_per_row)) if isinstance(part, Linear) else (1, 1)
            per_row = part.experts_per_row if isinstance(part, Linear) else 1
            splits = "" if not isinstance(part, Linear) or _is_router(part) else "k" if part.name in last else "n"
            key = (op.rows / per_row, op.columns, op.outputs, splits, experts, chosen)
            products[key] = products.get(key, 0.0) + 1
            kernels += 1
        elif op.kind == "attention" and isinstance(part, Attention):
            scores = op.matmul_flops / (2 * (part.head_dim + part.value_dim))
            kv = part.num_key_value_heads * (part.head_dim + part.value_dim) * op.columns * dtype_bytes(workload.dtype)
            core = (op.matmul_flops, op.causal_flops, scores, kv)
            cores[core] = cores.get(core, 0.0) + 1
            kernels += 1
        elif op.kind in ("norm", "elementwise"):
            kernels += 1
            if op.kind == "elementwise" and part.component in ("attention", "mlp", "head") and getattr(part, "kind", "") != "add":
                split += op.bytes
            else:
                whole += op.bytes
        else:
            whole += op.activation_bytes
    return Shape(
        products=tuple(
            Product(m=m, k=k, n=n, count=count, splits=splits, experts=experts, chosen=chosen, frozen=frozen)
            for (m, k, n, splits, experts, chosen), count in products.items()
        ),
        cores=tuple(
            Core(flops=flops, causal_flops=causal, scores=scores, kv_bytes=kv, count=count) for (flops, causal, scores, kv), count in cores.items()
        ),
        split_bytes=split, whole_bytes=whole, kernels=kernels,
    )  # fmt: skip


def _is_router(part: Linear) -> bool:
    return part.out_features <= 1 or type(part).__name__ == "Router"


# ---- seconds of pieces ----


def layer_pieces(
    spec: ModelSpec, workload: Workload, plan: Plan, device: Device, *, stack: Stack | None = None, rates: TrainingRates | None = None
) -> Pieces:
    """Seconds of one micro-batch on one rank, by layer and ends; of the plan it reads tp, cp, ep, micro_batch_size and sequence_parallel.

    Raises:
        DeviceError: a figure of the device that this needs is not known.
        WorkloadError: the batch does not divide, or the workload is no training step.
    """
    stack, rates = stack or Stack(), rates or load_training_rates()
    if workload.phase != "train":
        raise WorkloadError(f"phase {workload.phase} has no training step; use phase train.")
    model, micro = outline(spec, workload), plan.micro_batch(workload.batch_size)
    work = _Work(plan=plan, micro=micro, workload=workload, device=device, stack=stack, rates=rates)
    compute, memory, overhead = work.seconds(model.blocks)
    ends = work.seconds(model.ends, is_end=True)
    logits = micro * model.positions / plan.cp * model.vocabulary / plan.tp * LOSS_BYTES * work.pointwise
    layer_comm, ends_comm = work.communication(model)
    element = dtype_bytes(workload.dtype)
    dense, experts = model.dense_parameters / plan.tp, model.expert_parameters / (plan.tp * plan.ep)
    trained = model.trained_share
    flops = sum(3 * core.causal_flops * core.count for shape in (model.blocks, model.ends) for core in shape.cores)
    flops += sum(6 * p.m * p.k * p.n * p.chosen * p.count for shape in (model.blocks, model.ends) for p in shape.products)
    stream = micro * model.positions / plan.cp * model.hidden * element / (plan.tp if plan.sequence_parallel else 1)
    return Pieces(
        compute_s=compute / model.layers, memory_s=memory / model.layers, overhead_s=overhead / model.layers,
        ends_s=sum(ends) + logits / work.bytes_per_s, layer_comm_s=layer_comm / model.layers, ends_comm_s=ends_comm, layers=model.layers,
        layer_parameters=trained * (dense + experts) / model.layers, expert_parameters=trained * experts / model.layers,
        ends_parameters=trained * model.ends_parameters / plan.tp, frozen_parameters=(1 - trained) * (dense + experts) / model.layers,
        value_bytes=dtype_bytes(workload.dtype), update_bytes=_update_bytes(workload), hidden_bytes=stream,
        model_flops=micro * flops,
    )  # fmt: skip


def _update_bytes(workload: Workload) -> float:
    """Bytes that an update moves for each parameter: gradient read, state and master read and written, the parameter written."""
    element = dtype_bytes(workload.dtype)
    state = OPTIMIZERS[str(workload.optimizer)].values
    if workload.master_weights or workload.lora_rank is not None:
        return 4 + 8 * state + 8 + element
    return 2 * element + element + 2 * state * element


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One rank's share of a micro-batch on a device, and what its software reaches there."""

    plan: Plan
    micro: int
    workload: Workload
    device: Device
    stack: Stack
    rates: TrainingRates

    @property
    def bytes_per_s(self) -> float:
        return self.device.bandwidth() * self.rates.bandwidth_share

    @property
    def pointwise(self) -> float:
        return self.rates.of_software(self.rates.pointwise, self.stack.software)

    @property
    def slow(self) -> float:
        """What the kind of software and of device take beside the best."""
        return self.rates.of_software(self.rates.software, self.stack.software) * self.rates.kinds.get(device_class(self.device), 1.0)

    @property
    def wide(self) -> str:
        """The type of products without a narrow recipe: heads, routers, attention."""
        narrow = self.stack.linear_dtype
        return narrow if narrow is not None and type_class(narrow) in ("bit32", "bit16") else self.workload.dtype

    def share(self, share: float, slope: float) -> float:
        """A share of peak on this device, which falls with its 16-bit peak."""
        peak = self.device.peak_flops_per_s.get("bfloat16") or self.device.peak_flops_per_s.get("float16") or REFERENCE_FLOPS_PER_S
        return float(share * (REFERENCE_FLOPS_PER_S / peak) ** slope)

    def seconds(self, shape: Shape, *, is_end: bool = False) -> tuple[float, float, float]:
        """Compute, memory and kernel starts of all layers or of the ends: forward, backward, and forward again where it is recomputed."""
        again = self.workload.recompute == "full" and not is_end
        compute = memory = 0.0
        for product in shape.products:
            once, casts = self._product(product, is_end=is_end)
            passes = 1 + again + (1 if product.frozen else 2)
            compute += passes * product.count * once
            memory += passes * product.count * casts
        for core in shape.cores:
            core_compute, core_memory = self._core(core, again=again or self.workload.recompute == "selective")
            compute += core.count * core_compute
            memory += core.count * core_memory
        split = self.plan.tp
        whole = self.plan.tp if self.plan.sequence_parallel else 1
        moved = (shape.split_bytes / split + shape.whole_bytes / whole) * self.micro / self.plan.cp
        memory += (3 + again) * moved * self.pointwise / self.bytes_per_s
        started = shape.kernels * (3 + again) * self.rates.of_software(self.rates.operator_s, self.stack.software)
        # kernels are started while others run: what shows is what computing does not cover
        busy = compute + memory
        overhead = started * started / (started + busy) if started else 0.0
        return compute, memory, overhead

    def _product(self, product: Product, *, is_end: bool) -> tuple[float, float]:
        """Seconds of one pass of a product on this rank, and of the casts before it."""
        plan, rates = self.plan, self.rates
        rows = product.m * self.micro / plan.cp
        k = product.k / (plan.tp if product.splits == "k" else 1)
        n = product.n / (plan.tp if product.splits == "n" else 1)
        dtype = self.wide if is_end or not product.splits else self.stack.linear_dtype or self.workload.dtype
        kind = type_class(dtype)
        narrow = kind in ("bit8", "bit4")
        computed = rows * product.chosen
        share = self.share(rates.compute_share[kind], rates.peak_slope)
        each = rows
        if product.experts > 1:
            share *= rates.expert_share
            each = max(1.0, rows * product.chosen * plan.ep / product.experts)
        half = rates.half_narrow if narrow else rates.half
        size = (1 + half[0] / each) * (1 + half[1] / k) * (1 + half[2] / n)
        seconds = 2 * computed * k * n / (self.device.peak(dtype) * share) * size * self.slow
        element = dtype_bytes(self.workload.dtype)
        held = k * n * (product.experts / plan.ep if product.experts > 1 else 1)
        moved = (computed * (k + n) + held) * element / self.bytes_per_s
        seconds = (seconds**4 + moved**4) ** 0.25
        casts = computed * k * rates.quantize_bytes * narrow
        if product.experts > 1:
            casts += computed * min(k, n) * element * rates.routing_passes / 3
        return seconds, casts / self.bytes_per_s

    def _core(self, core: Core, *, again: bool) -> tuple[float, float]:
        """Compute and memory of attention: in one kernel without masked scores, or by products that keep all scores."""
        plan, rates = self.plan, self.rates
        part = self.micro / (plan.tp * plan.cp)
        peak = self.device.peak(attention_type(self.device, self.wide))
        if self.workload.attention == "eager":
            share = self.share(rates.compute_share[type_class(self.wide)], rates.peak_slope) / 2
            moved = core.scores * dtype_bytes(self.workload.dtype) * rates.score_passes * (1 + 0.4 * again)
            return (3 + again) * core.flops * part / (peak * share) * self.slow, moved * part / self.bytes_per_s
        share = self.share(rates.attention_share, rates.of_software(rates.attention_slope, self.stack.software))
        return (1 + FLASH_BACKWARD + again) * core.causal_flops * part / (peak * share) * self.slow, 0.0

    def communication(self, model: Outline) -> tuple[float, float]:
        """Exposed seconds of tensor, context and expert parallelism in all layers, and in the head."""
        plan, rates = self.plan, self.rates
        again = self.workload.recompute == "full"
        element = dtype_bytes(self.workload.dtype)
        stream = self.micro * model.positions / plan.cp * model.hidden * element
        total = ends = 0.0
        if plan.tp > 1:
            rate = group_bytes_per_s(self.device, plan.tp, 1, rates)
            once = 2 * stream * (plan.tp - 1) / plan.tp / rate + rates.collective_s
            total += (4 + 2 * again) * model.layers * once * rates.tp_exposed
            ends += 2 * once * rates.tp_exposed
        routed = [product for product in model.blocks.products if product.experts > 1]
        if plan.ep > 1 and routed:
            layers = max(product.count for product in routed)
            sent = self.micro * routed[0].m / plan.cp * routed[0].k * element / plan.tp  # what experts take, which may be narrower than the stream
            once = all_to_all_seconds(self.device, plan.ep, plan.tp, sent, routed[0].chosen, rates)
            total += (4 + 2 * again) * layers * (once + rates.collective_s) * rates.ep_exposed
        if plan.cp > 1:
            rate = group_bytes_per_s(self.device, plan.cp, plan.tp, rates)
            kv = sum(core.kv_bytes * core.count for core in model.blocks.cores) * self.micro / plan.tp
            total += (3 + again) * kv * (plan.cp - 1) / plan.cp / rate * rates.cp_exposed
        return total, ends


# ---- links ----


def _levels(device: Device, span: int) -> tuple[Link, Link]:
    """The link that joins so many devices, and the one inside of it (itself where there is none)."""
    outer = device.link(span)
    at = device.links.index(outer)
    return device.links[max(0, at - 1)], outer


def group_bytes_per_s(device: Device, size: int, stride: int, rates: TrainingRates) -> float:
    """Bytes per second at which each member of a ring moves its share, the members `stride` devices apart.

    Inside a node that is the inner link's. Between nodes each ring crosses a node's edge once, and the members of one node share their
    network ports among as many rings: the ports' sum, no more than the inner link.

    Raises:
        DeviceError: no known link joins so many.
    """
    inner, outer = _levels(device, size * stride)
    if outer is device.links[0]:
        return outer.bytes_per_s * rates.link_share
    members = max(1.0, min(size, (inner.devices or 1) / stride))
    return min(inner.bytes_per_s * rates.link_share, outer.bytes_per_s * members * rates.network_share)


def all_to_all_seconds(device: Device, size: int, stride: int, sent_bytes: float, chosen: int, rates: TrainingRates) -> float:
    """Seconds in which each member sends each row of its tensor to the members that hold the row's `chosen` experts.

    A row crosses to another node once, however many of its experts are there, and is handed on inside. With uniform routing that is
    nodes · (1 - (1 - 1 / nodes)^chosen) nodes. Source: DeepSeek-AI 2024 (arXiv:2412.19437), section 3.2.2.

    Raises:
        DeviceError: no known link joins so many.
    """
    inner, outer = _levels(device, size * stride)
    if outer is device.links[0]:
        return sent_bytes * chosen * (size - 1) / size / (outer.bytes_per_s * rates.link_share)
    nodes = max(1.0, size / max(1.0, min(size, (inner.devices or 1) / stride)))
    reached = nodes * (1 - (1 - 1 / nodes) ** chosen) * (nodes - 1) / nodes
    inside = sent_bytes * chosen / (inner.bytes_per_s * rates.link_share)
    return max(inside, sent_bytes * reached / (outer.bytes_per_s * rates.network_share))


def traffic(plan: Plan, device: Device, rates: TrainingRates) -> Traffic:
    """The links of a plan's data-parallel groups and of its pipeline.

    Raises:
        DeviceError: no known link joins so many.
    """
    inner = plan.tp * plan.cp * plan.pp
    ranks = plan.sharing_ranks if plan.shard != "none" else plan.dp * plan.cp
    many = ranks > 1
    dp = group_bytes_per_s(device, max(1, ranks // plan.cp), inner, rates) if many else math.inf
    apart = plan.dp * plan.cp // plan.ep
    expert = group_bytes_per_s(device, apart, min(inner * plan.ep, plan.devices // apart), rates) if apart > 1 else math.inf
    stage = group_bytes_per_s(device, 2, plan.tp * plan.cp, rates) if plan.pp > 1 else math.inf
    return Traffic(
        dp_bytes_per_s=dp, expert_dp_bytes_per_s=expert, pp_bytes_per_s=stage, memory_bytes_per_s=_update_bytes_per_s(plan, device, rates),
        collective_s=rates.collective_s,
    )  # fmt: skip


def _update_bytes_per_s(plan: Plan, device: Device, rates: TrainingRates) -> float:
    """At what the optimizer moves its bytes: of the device's memory, or of its host's, which the devices of a node share."""
    if plan.offload == "none":
        return device.bandwidth() * rates.bandwidth_share
    inside = [link.devices for link in device.links[:-1] if link.devices] or [link.devices or 1 for link in device.links[:1]] or [1]
    return HOST_BYTES_PER_S / min(plan.devices, inside[-1])


# ---- the step ----


def assemble(  # noqa: PLR0913 - one argument for each size that a search varies
    pieces: Pieces, links: Traffic, rates: TrainingRates, *, pp: Any, dp: Any, ep: Any, gathers: Any, sums: Any, shards: Any, micro_batches: Any,
    virtual_stages: Any,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a step by part (compute, memory, communication, bubble, overhead, optimizer), of floats or of numpy's arrays.

        stage = layers of the fullest stage · layer + ends of the last, in the worst case
        bubble = (pp - 1) / virtual_stages · the mean stage. Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.

    Args:
        dp: ranks that gradients are summed over (dp · cp); ep: of these, the ranks that hold one copy of the experts.
        gathers: 1 where weights are gathered for each pass (ZeRO-3, FSDP), else 0.
        sums: 1 where gradients are summed after each micro-batch, for no rank holds all of them (ZeRO-2 and 3), else 0.
        shards: ranks that the optimizer's work is shared out over.
    """
    layers = pieces.layers / pp
    fullest = -(-pieces.layers // pp)
    even = fullest * pp == pieces.layers
    layer = pieces.layer_s + pieces.layer_comm_s
    ends = pieces.ends_s + pieces.ends_comm_s
    mean = layers * layer + ends / pp
    slowest = _larger(fullest * layer, mean + even * (ends - ends / pp))  # layers that divide: the last stage has the head beside its own
    waits = (slowest - mean) * micro_batches
    comm = micro_batches * (layers * pieces.layer_comm_s + pieces.ends_comm_s / pp)
    several = _smaller(pp - 1, 1)
    comm = comm + several * micro_batches * 2 * virtual_stages * (pieces.hidden_bytes / links.pp_bytes_per_s + links.collective_s)
    bubble = (pp - 1) / virtual_stages * mean + waits
    compute_s = micro_batches * (layers * pieces.compute_s + pieces.ends_s / pp)
    # data parallelism: gradients are summed, and weights gathered, once a step, or with each micro-batch
    owns = layers * (pieces.layer_parameters - pieces.expert_parameters) + pieces.ends_parameters / pp
    experts = layers * pieces.expert_parameters
    frozen = layers * pieces.frozen_parameters
    apart = dp / ep
    gathered = 2 * gathers * micro_batches + (1 - gathers)  # times that weights are: for both passes, or after the update
    summed = 1 + sums * (micro_batches - 1)
    sent = (owns * (gathered + summed) + frozen * 2 * gathers * micro_batches) * pieces.value_bytes * (dp - 1) / dp / links.dp_bytes_per_s
    sent = sent + experts * (gathered + summed) * pieces.value_bytes * (apart - 1) / apart / links.expert_dp_bytes_per_s
    behind = summed / _larger(micro_batches, 1) * compute_s  # the last micro-batch's computing, or that of all
    hidden = rates.dp_hidden * behind
    dp_comm = rates.dp_exposed * sent + (1 - rates.dp_exposed) * _larger(sent - hidden, 0)
    update = (owns / _smaller(shards, dp) + experts / _larger(_smaller(shards, dp) / ep, 1)) * pieces.update_bytes / links.memory_bytes_per_s
    return {
        "compute": compute_s, "memory": micro_batches * layers * pieces.memory_s, "communication": comm + dp_comm, "bubble": bubble,
        "overhead": micro_batches * layers * pieces.overhead_s + rates.step_s, "optimizer": update,
    }  # fmt: skip


def _larger(a: Any, b: Any) -> Any:
    """max, of floats or arrays."""
    return (a + b + abs(a - b)) / 2


def _smaller(a: Any, b: Any) -> Any:
    return (a + b - abs(a - b)) / 2


def step_time(  # noqa: PLR0913 - what and where, and three refinements
    spec: ModelSpec,
    workload: Workload,
    plan: Plan,
    device: Device,
    *,
    stack: Stack | None = None,
    rates: TrainingRates | None = None,
    unsaid: tuple[str, ...] = (),
) -> StepTime:
    """The time of one training step of `workload.batch_size` sequences on `plan.devices` devices.

    Args:
        unsaid: what is not known of the run (recompute, batch, plan, software, shape, length, power, flops, precision); each widens the range.

    Raises:
        WorkloadError: the phase is not train, a batch that does not divide, a length or a plan that the model does not take.
        DeviceError: a figure of the device that this needs is not known.
    """
    stack, rates = stack or Stack(), rates or load_training_rates()
    check_workload(spec, workload)
    if plan.pp > spec.layers:
        raise WorkloadError(f"pp={plan.pp} is more than the {spec.layers} layers of {spec.name}; use at most {spec.layers}.")
    pieces = layer_pieces(spec, workload, plan, device, stack=stack, rates=rates)
    micro_batches = plan.micro_batches(workload.batch_size)
    parts = _assembled(pieces, workload, plan, device, rates)
    seconds = sum(parts.values())
    missing = (
        unsaid + (("software",) if stack.software is None and "software" not in unsaid else ()) + (("offload",) if plan.offload != "none" else ())
    )
    factor = range_factor(rates, missing)
    by_bound: dict[Bound, float] = {
        "compute": parts["compute"], "memory": parts["memory"] + parts["optimizer"], "communication": parts["communication"],
        "overhead": parts["overhead"] + parts["bubble"],
    }  # fmt: skip
    model_flops = pieces.model_flops * micro_batches * plan.dp
    peak = device.peak(stack.linear_dtype or workload.dtype)
    return StepTime(
        seconds=seconds, low=seconds / factor, high=seconds * factor, bound_by=max(by_bound, key=lambda bound: by_bound[bound]), parts=parts,
        mfu=model_flops / seconds / peak / plan.devices, tokens_per_s=workload.tokens / seconds,
    )  # fmt: skip


def step_seconds_of(
    spec: ModelSpec, workload: Workload, plan: Plan, device: Device, *, stack: Stack, rates: TrainingRates
) -> float:  # fmt: skip
    """The seconds of `step_time` alone, without its checks: for fits, which ask for it a hundred thousand times.

    Raises:
        DeviceError, WorkloadError: a figure of the device is not known, or the batch does not divide.
    """
    pieces = layer_pieces(spec, workload, plan, device, stack=stack, rates=rates)
    return float(sum(_assembled(pieces, workload, plan, device, rates).values()))


def _assembled(pieces: Pieces, workload: Workload, plan: Plan, device: Device, rates: TrainingRates) -> dict[str, Any]:
    return assemble(
        pieces, traffic(plan, device, rates), rates, pp=plan.pp, dp=plan.dp * plan.cp, ep=plan.ep, gathers=float(plan.shard == "zero3"),
        sums=float(plan.shard in ("zero2", "zero3")), shards=plan.sharing_ranks if plan.shard != "none" else 1,
        micro_batches=plan.micro_batches(workload.batch_size), virtual_stages=plan.virtual_stages,
    )  # fmt: skip


def range_factor(rates: TrainingRates, unsaid: tuple[str, ...] = ()) -> float:
    """What a prediction is multiplied by and divided by for its 90 % range, wider for each thing that is not known of the run."""
    spreads = [rates.spread["step"], *(rates.spread[name] for name in unsaid if name in rates.spread)]
    return math.exp(RANGE_90 * math.sqrt(sum(spread**2 for spread in spreads)))


# ---- constants ----

TRAINING_RATES = "training"


@lru_cache
def load_training_rates(name: str = TRAINING_RATES) -> TrainingRates:
    """The constants of training steps.

    Raises:
        DeviceError: there is no such file.
    """
    path = resources.files("lighten.device") / RATES_FOLDER / f"{name}.json"
    if not path.is_file():
        raise DeviceError(f"no training rates named {name!r} are known; known: {TRAINING_RATES}.")
    return training_rates_from(json.loads(path.read_text(encoding="utf-8")))


def training_rates_from(document: Mapping[str, Any]) -> TrainingRates:
    """Rates of a JSON document.

    Raises:
        DeviceError: it names fields that rates do not have.
    """
    names = {each.name for each in fields(TrainingRates)}
    if strange := sorted(set(document) - names):
        raise DeviceError(f"training rates have no {', '.join(strange)}; they have: {', '.join(sorted(names))}.")
    lists = {name: tuple(document[name]) for name in ("half", "half_narrow", "sources") if name in document}
    return TrainingRates(**{**document, **lists})
