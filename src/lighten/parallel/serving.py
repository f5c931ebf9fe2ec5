"""Seconds of prefill, decode, generation and encoding on one or more devices, and what a server of many requests at once gives.

Everything is a weighted sum of forward passes (`Work`), so that the same passes are timed with other rates without building them again:

    prefill   the prompt in chunks, key positions growing; stages of layers work on different chunks at once where the software does that
    decode    steps at a growing context, whose cost is linear in it: the first and the last step, each half
    serving   in the steady state of batching in flight, each step carries one token of each of C requests and the C / output_len prompts
              that take the places of requests that end: weights are read once for all of them (Yu et al. 2022, Orca; chunked prefill:
              Agrawal et al. 2023, arXiv:2308.16369)

Ranges are 90 % of what the error was on published rows whose source was not fitted.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from lighten.cost.kv_cache import cache_bytes
from lighten.cost.operators import Forward
from lighten.cost.passes import first_forward, step_forward, steps_after_first
from lighten.cost.workload import Workload, check_workload
from lighten.device.datasheet import BOUNDS, Bound, Limits, Rates, load_rates, type_class
from lighten.device.device import Device
from lighten.errors import DeviceError, WorkloadError
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Part, WeightFormat
from lighten.parallel.device_pass import DevicePass, Keep, Split, check_split, device_pass, is_narrow, pass_parts, wide_and_narrow
from lighten.units import DTYPE_BITS, dtype_bytes, format_bytes


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A kind of inference software: what it reaches (its rates), and how it spreads and batches.

    Attributes:
        name: also of its rates.
        split: how tensor parallelism shares out a layer.
        chunk: tokens of a prompt that are computed in one pass; None: all.
        pipelines: stages of layers work on different chunks of a prompt at once.
        short_sums: float16 products are summed up in float16 where the device does that faster.
        integer_products: codes of weights are multiplied as int8, where the device has a rate of it, with activations rounded to int8.
        max_batch, max_tokens: sequences of a step, and tokens of a step, at most.
        records: launches of a pass are recorded once and played.
        micro_batches: stages of layers work on different parts of a batch at once.
        memory_share: of what weights and activations leave of the memory, what it gives to the cache.
    """

    name: str
    split: Split = "reduce"
    chunk: int | None = None
    pipelines: bool = False
    records: bool = False
    micro_batches: bool = False
    short_sums: bool = False
    integer_products: bool = False
    max_batch: int = 2048
    max_tokens: int = 8192
    memory_share: float = 0.9


STACKS = {
    "engine": Stack(name="engine", records=True, micro_batches=True),
    "ggml": Stack(name="ggml", chunk=512, pipelines=True, short_sums=True, integer_products=True),
    "local": Stack(name="local", short_sums=True),
    "eager": Stack(name="eager"),
}
"""engine: written or compiled kernels for whole blocks and batching in flight (TensorRT-LLM, vLLM, SGLang, FasterTransformer); ggml: llama.cpp
and what is built on it; local: quantized kernels under a light loop for one user (ExLlama, TinyChat, MLX); eager: operators run one by one
from Python (transformers).
Source of the limits: TensorRT-LLM 0.17 and 1.0, docs/source/performance (max_batch_size 2048, max_num_tokens 8192, 0.9 of free memory);
llama.cpp, common/common.h (n_ubatch 512) and pull request 6017 (stages work on micro-batches at once)."""
OVERLAP = 0.85
"""Share of a pipeline's ideal gain that stages of layers reach: they are not equally long, and wait for each other. Source: llama.cpp's F16 prefill
of 4,096 tokens on 2, 4 and 8 RTX 4090 against one (XiongjieDai/GPU-Benchmarks-on-LLM-Inference, May 2024): 0.84, 0.87 and 0.79."""
SHORT_SUMS = "float16_acc16"
"""The device's rate of float16 products whose sums are float16 too."""
ACTIVATION_COPIES = 6
"""Tensors of a token's hidden size that live at once in a pass: the residual, its norm, queries, keys, values and the attention's output."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Passes, each with how often it runs, that together make `tokens`."""

    passes: tuple[tuple[float, DevicePass], ...]
    tokens: float
    pp: int = 1


@dataclass(frozen=True, kw_only=True)
class Types:
    """Types of activations, of products with weights of less than 16 bits, and of the cache."""

    activations: str
    products: str
    cache: str


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How one copy of a model is run: its types, the tp · pp devices that share it, the kind of software."""

    types: Types
    stack: Stack
    tp: int = 1
    pp: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def parts_of(self, batch: int) -> int:
        """Parts of a batch that stages of layers work on at once: one for each stage, where the software does that and the batch has so many."""
        return min(self.pp, batch) if self.stack.micro_batches else 1

    def device_pass(self, spec: ModelSpec, forward: Forward, keep: Keep = "all") -> DevicePass:
        """A forward pass of one of the devices."""
        types = self.types
        work = device_pass(spec, forward, dtype=types.activations, kv_dtype=types.cache, tp=self.tp, split=self.stack.split, keep=keep)
        return replace(work, recorded=self.stack.records)


@dataclass(frozen=True, kw_only=True)
class InferenceTime:
    """Seconds of a workload; `low` to `high` holds the truth 9 times in 10 on published rows whose source was not fitted.

    Attributes:
        prefill_s, step_s: of the prompt, and of one decoding step in the middle; None where the phase has none.
        by_bound: seconds by what binds.
    """

    phase: str
    seconds: float
    low: float
    high: float
    bound_by: Bound
    tokens_per_second: float
    prefill_s: float | None
    step_s: float | None
    by_bound: dict[Bound, float]
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Its fields in base units."""
        return {**asdict(self), "assumptions": list(self.assumptions)}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server of one copy of the model at a steady load of `concurrency` requests.

    Attributes:
        concurrency: requests in flight.
        largest_concurrency: that fit into memory and the software's limits.
        ttft_s: from a free place to the first token; waiting for a place is not in it.
        tpot_s: between two tokens of one request.
        requests_per_s, output_tokens_per_s, total_tokens_per_s: of all requests; total counts prompts too.
        low, high: what speeds are multiplied by for their 90 % range; times are divided by it.
        weight_bytes, cache_bytes_per_sequence: of all devices together, at full length.
    """

    concurrency: int
    largest_concurrency: int
    ttft_s: float
    tpot_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    low: float
    high: float
    bound_by: Bound
    by_bound: dict[Bound, float]
    devices: int
    weight_bytes: int
    cache_bytes_per_sequence: int
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Its fields in base units, with the range of the output's speed."""
        return {
            **asdict(self), "assumptions": list(self.assumptions),
            "output_tokens_per_s_low": self.output_tokens_per_s * self.low, "output_tokens_per_s_high": self.output_tokens_per_s * self.high,
        }  # fmt: skip


# ---- what is asked ----


def inference_time(
    spec: ModelSpec, workload: Workload, device: Device, *, tp: int = 1, pp: int = 1, stack: str = "engine"
) -> InferenceTime:  # fmt: skip
    """Seconds of an inference workload, as one static batch, on tp · pp devices.

    Args:
        stack: of `STACKS`: the kind of software that runs it.

    Raises:
        WorkloadError: the phase is train, does not fit the model, or the model cannot be shared out so.
        DeviceError: the device's rate of the type, its bandwidth or its links are not known.
    """
    if workload.phase == "train":
        raise WorkloadError("phase train is no inference; ask for its step time instead.")
    check_workload(spec, workload)
    check_split(spec, tp=tp, pp=pp)
    spec = loaded(spec, workload.dtype)
    deployment = Deployment(types=types_of(spec, workload.dtype, workload.kv_dtype), stack=stack_named(stack), tp=tp, pp=pp)
    alone = not device.peak_flops_per_s and workload.phase == "decode" and workload.batch_size == 1
    rates = load_rates(deployment.stack.name).on(device)
    limits = memory_alone(device, deployment) if alone else limits_on(device, deployment)
    first, later = _phases(spec, workload, deployment)
    prefill = work_parts(first, device, rates, limits) if first else None
    decode = work_parts(later, device, rates, limits) if later else None
    total = {bound: (prefill or {}).get(bound, 0.0) + (decode or {}).get(bound, 0.0) for bound in BOUNDS}
    seconds = sum(total.values())
    least = sum(least_seconds(work, limits) for work in (first, later) if work)
    factor = rates.range_factor("serving" if first and later else "decode" if later else "prefill", devices=tp * pp)
    return InferenceTime(
        phase=workload.phase, seconds=seconds, low=max(seconds / factor, min(seconds, least)), high=seconds * factor, bound_by=_binding(total),
        tokens_per_second=workload.tokens / seconds, prefill_s=sum(prefill.values()) if prefill else None,
        step_s=sum(decode.values()) / steps_after_first(workload) if decode else None, by_bound=total,
        assumptions=(*_assumptions(deployment, device), *((MEMORY_ALONE,) if alone else ())),
    )  # fmt: skip


MEMORY_ALONE = "no rate of its products is published: one stream is timed by its memory alone"


def serve(  # noqa: PLR0913 - a public call whose options are all given by name
    spec: ModelSpec, device: Device, *, input_len: int, output_len: int, concurrency: int | None = None, dtype: str = "bfloat16",
    kv_dtype: str | None = None, tp: int = 1, pp: int = 1, stack: str = "engine",
) -> Serving:  # fmt: skip
    """Batching in flight at a steady load: `concurrency` requests of `input_len` tokens in and `output_len` out on tp · pp devices.

    Args:
        concurrency: requests in flight; None: as many as fit into 0.9 of the memory that weights and activations leave.

    Raises:
        WorkloadError: not a decoder, lengths or a concurrency that are not positive, or more than fit.
        DeviceError: a figure of the device is not known, or not one request fits.
    """
    if not spec.is_decoder:
        raise WorkloadError(f"{spec.name} is no decoder; a server of requests needs one that generates. Use phase encode for its time.")
    if input_len < 1 or output_len < 1 or (concurrency is not None and concurrency < 1):
        raise WorkloadError(f"input_len={input_len}, output_len={output_len}, concurrency={concurrency}: all have to be positive.")
    check_split(spec, tp=tp, pp=pp)
    spec = loaded(spec, dtype)
    deployment = Deployment(types=types_of(spec, dtype, kv_dtype), stack=stack_named(stack), tp=tp, pp=pp)
    length = input_len + output_len
    most = _at_least_one(spec, device, length, deployment)
    if concurrency is not None and concurrency > most:
        raise WorkloadError(f"concurrency={concurrency}: no more than {most} requests of {length} tokens fit on {deployment.devices} {device.name}.")
    held = concurrency or most
    rates, limits = _known_of(device, deployment)
    step = work_parts(flight_work(spec, held, input_len, output_len, deployment), device, rates, limits)
    first = work_parts(prefill_work(spec, 1, input_len, deployment), device, rates, limits)
    tpot, factor = sum(step.values()), rates.range_factor("serving", devices=tp * pp)
    return Serving(
        concurrency=held, largest_concurrency=most, ttft_s=sum(first.values()) + tpot, tpot_s=tpot, requests_per_s=held / tpot / output_len,
        output_tokens_per_s=held / tpot, total_tokens_per_s=held / tpot * length / output_len, low=1 / factor, high=factor,
        bound_by=_binding(step), by_bound=step, devices=deployment.devices, weight_bytes=spec.weight_bytes(),
        cache_bytes_per_sequence=cache_bytes(spec, batch_size=1, context_len=length, dtype=deployment.types.cache, kept_by="vllm"),
        assumptions=_assumptions(deployment, device),
    )  # fmt: skip


def _at_least_one(spec: ModelSpec, device: Device, length: int, deployment: Deployment) -> int:
    most = largest_concurrency(spec, device, length, deployment)
    if most < 1:
        needed = format_bytes(memory_needed(spec, 1, length, deployment))
        raise DeviceError(
            f"{spec.name} with one request of {length} tokens needs {needed} on each of {deployment.devices} {device.name}, which has "
            f"{format_bytes(device.memory_bytes)}; use more devices, fewer bits or shorter requests."
        )
    return most


def _known_of(device: Device, deployment: Deployment) -> tuple[Rates, tuple[Limits, Limits]]:
    return load_rates(deployment.stack.name).on(device), limits_on(device, deployment)


def memory_alone(device: Device, deployment: Deployment) -> tuple[Limits, Limits]:
    """Limits of a device of which no rate of products is published, for one stream, whose steps its memory binds.

    Raises:
        DeviceError: its bandwidth is not known.
    """
    one = Limits(
        product_flops_per_s=math.inf, vector_flops_per_s=0.0, attention_flops_per_s=math.inf, bytes_per_s=device.bandwidth(),
        type_class=type_class(deployment.types.activations),
    )  # fmt: skip
    return one, one


def limits_on(device: Device, deployment: Deployment) -> tuple[Limits, Limits]:
    """The device's figures for products of weights of at least 16 bits and of narrower ones, in the types that the software computes them in.

    Raises:
        DeviceError: the device's rate of one of them, or its bandwidth, is not known.
    """
    types, stack = deployment.types, deployment.stack
    wide = SHORT_SUMS if stack.short_sums and types.activations == "float16" and SHORT_SUMS in device.peak_flops_per_s else types.activations
    narrow = wide if types.products == types.activations else types.products
    if stack.integer_products and types.products == types.activations and "int8" in device.peak_flops_per_s:
        narrow = "int8"
    return wide_and_narrow(device, wide, narrow)


def stack_named(name: str) -> Stack:
    """Raises:
    DeviceError: there is no such kind of software.
    """
    if name not in STACKS:
        raise DeviceError(f"no kind of inference software is called {name!r}; known: {', '.join(STACKS)}.")
    return STACKS[name]


# ---- types ----


def loaded(spec: ModelSpec, dtype: str) -> ModelSpec:
    """The model with its plain weights in the type that it is computed in; weights of less than 16 bits stay as they are."""

    def change(part: Part) -> Part:
        if not isinstance(part, Linear | Embedding):
            return part
        weight = part.weight
        plain = weight.bits is None and weight.ggml_type is None and weight.layout is None and DTYPE_BITS[weight.dtype] >= 16
        return replace(part, weight=WeightFormat(dtype=dtype, sparsity=weight.sparsity)) if plain else part

    return replace(spec.with_parts(change), dtype=dtype)


def types_of(spec: ModelSpec, dtype: str, kv_dtype: str | None = None) -> Types:
    """What a model is computed in: products in 8 bits where its weights are float8, or its activations int8."""
    weights = [part.weight for part in spec.parts if isinstance(part, Linear)]
    if any(weight.activations for weight in weights):
        products = "int8"
    elif any(weight.bits is None and weight.ggml_type is None and weight.dtype.startswith("float8") for weight in weights):
        products = "float8_e4m3fn"
    else:
        products = dtype
    return Types(activations=dtype, products=products, cache=kv_dtype or dtype)


# ---- passes ----


def prefill_work(spec: ModelSpec, batch: int, input_len: int, deployment: Deployment, *, all_logits: bool = False) -> Work:
    """The passes of `batch` prompts; all sequences' chunks of one position are one pass."""
    stack, pp = deployment.stack, deployment.pp
    parts = deployment.parts_of(batch)
    chunk = min(input_len, stack.chunk or input_len)
    chunks = math.ceil(input_len / chunk)
    pieces = parts * (chunks if stack.pipelines else 1)
    ideal = (pieces + pp - 1) / (pp * pieces)
    share = OVERLAP * ideal + (1 - OVERLAP) if pieces > 1 else 1.0
    ends = (
        deployment.device_pass(spec, Forward(batch_size=round(batch / parts), query_len=chunk, key_len=last, last_logits_only=not all_logits))
        for last in ((chunk,) if chunks == 1 else (chunk, input_len))
    )
    many = parts * input_len / chunk / min(chunks, 2)  # the last chunk may be a part of one
    return Work(passes=tuple((many * share, each) for each in ends), tokens=batch * input_len, pp=pp)


def decode_work(spec: ModelSpec, batch: int, context: int, new_tokens: int, deployment: Deployment) -> Work:
    """The passes of `new_tokens` steps that follow `context` cached tokens; stages that work on parts of the batch are all busy."""
    part = round(batch / deployment.parts_of(batch))
    ends = (Forward(batch_size=part, query_len=1, key_len=context + step, last_logits_only=True) for step in (1, new_tokens))
    passes = tuple((new_tokens / 2, deployment.device_pass(spec, each)) for each in ends)
    return Work(passes=passes, tokens=batch * new_tokens, pp=deployment.pp)


def static_work(spec: ModelSpec, batch: int, input_len: int, output_len: int, deployment: Deployment) -> Work:
    """The passes of a static batch from its prompts to its last token; the prompts' pass gives the first."""
    passes = prefill_work(spec, batch, input_len, deployment).passes
    if output_len > 1:
        passes += decode_work(spec, batch, input_len, output_len - 1, deployment).passes
    return Work(passes=passes, tokens=batch * output_len, pp=deployment.pp)


def flight_work(spec: ModelSpec, concurrency: int, input_len: int, output_len: int, deployment: Deployment) -> Work:
    """One step of the steady state, which gives each of `concurrency` requests a token; each stage of layers holds 1/pp of them at a time."""
    pp = deployment.pp
    held = max(1, round(concurrency / pp))
    entering = held / output_len
    rows = max(1, round(held + entering * input_len))
    step = Forward(batch_size=held, query_len=1, key_len=input_len + max(1, output_len // 2), last_logits_only=True)
    prompt = Forward(batch_size=1, query_len=input_len, key_len=input_len, last_logits_only=True)
    together = deployment.device_pass(spec, replace(step, batch_size=rows, key_len=1), "products")
    entered = deployment.device_pass(spec, prompt, "attention").ops
    ops = (
        *together.ops, *deployment.device_pass(spec, step, "attention").ops, *deployment.device_pass(spec, step, "logits").ops,
        *((op, count * entering) for op, count in entered),
    )  # fmt: skip
    return Work(passes=((1.0, replace(together, ops=ops, sequences=held)),), tokens=held * pp, pp=pp)


def work_parts(work: Work, device: Device, rates: Rates, limits: tuple[Limits, Limits]) -> dict[Bound, float]:
    """Seconds of all its passes, by what binds; `rates` as they are on this device."""
    total: dict[Bound, float] = dict.fromkeys(BOUNDS, 0.0)
    for count, each in work.passes:
        for bound, seconds in pass_parts(each, device, rates, limits, pp=work.pp).items():
            total[bound] += count * seconds
    return total


def least_seconds(work: Work, limits: tuple[Limits, Limits]) -> float:
    """What no software can be faster than: products at the published peak, or weights at the published bandwidth, whichever takes longer.

    Weights of less than `CACHED_BYTES` may stay in a cache, whose bandwidth is not known.
    """
    total = 0.0
    for count, each in work.passes:
        compute = sum(many * op.causal_flops / limits[is_narrow(op)].product_flops_per_s for op, many in each.ops)
        weights = sum(many * op.weight_bytes for op, many in each.ops)
        total += count * max(compute, weights / limits[0].bytes_per_s if weights > CACHED_BYTES else 0.0)
    return total


CACHED_BYTES = 2**30
"""Weights that are larger pass through memory each time: no accelerator has a cache of that size."""


# ---- memory ----


def largest_concurrency(spec: ModelSpec, device: Device, context_len: int, deployment: Deployment) -> int:
    """Requests of `context_len` tokens that fit beside the weights, and into the software's limit; 0 where not one does.

    Raises:
        DeviceError: the device's memory is not known.
    """
    if device.memory_bytes is None:
        raise DeviceError(f"{device.name}: its memory is not known, so how many requests fit is not either; describe it in a device file.")
    full = math.ceil(deployment.stack.max_tokens / context_len)  # from here on a pass has as many tokens as it may: activations grow no more
    one, two = (memory_needed(spec, batch, context_len, deployment) for batch in (full, full + 1))
    each = max(1, two - one)
    return int(min(deployment.stack.max_batch, max(0, deployment.stack.memory_share * (device.memory_bytes - one + full * each) // each)))


def memory_needed(spec: ModelSpec, batch: int, context_len: int, deployment: Deployment) -> int:
    """Bytes on one of the devices: its share of the weights and of the cache, and the activations of one pass."""
    heads = [part.num_key_value_heads for part in spec.parts if isinstance(part, Attention) and part.latent_dim is None]
    copies = max([max(1.0, deployment.tp / count) for count in heads], default=float(deployment.tp))  # a latent has no heads to share out
    cache = cache_bytes(spec, batch_size=batch, context_len=context_len, dtype=deployment.types.cache, kept_by="vllm")
    tokens = min(batch * context_len, deployment.stack.max_tokens)
    shared = (spec.weight_bytes() + cache * copies) / deployment.devices
    return math.ceil(shared + _activation_bytes(spec, tokens, batch, deployment))


def _activation_bytes(spec: ModelSpec, tokens: int, batch: int, deployment: Deployment) -> float:
    linears = [part for part in spec.parts if isinstance(part, Linear)]
    hidden = max((min(part.in_features, part.out_features) for part in linears), default=0)
    widest = max((max(part.in_features, part.out_features) for part in linears if part.component != "head"), default=0)
    logits = max((part.out_features for part in linears if part.component == "head"), default=0)
    values = tokens * (ACTIVATION_COPIES * hidden + 2 * widest / deployment.tp)
    return values * dtype_bytes(deployment.types.activations) + batch * logits / deployment.tp * 4


# ---- phases and words ----


def _phases(spec: ModelSpec, workload: Workload, deployment: Deployment) -> tuple[Work | None, Work | None]:
    first = later = None
    if workload.phase != "decode":
        forward = first_forward(spec, workload)
        if spec.is_decoder:
            all_logits = not forward.last_logits_only
            first = prefill_work(spec, workload.batch_size, forward.query_len, deployment, all_logits=all_logits)
        else:
            first = Work(passes=((1.0, deployment.device_pass(spec, forward)),), tokens=workload.tokens, pp=deployment.pp)
    if steps := steps_after_first(workload):
        ends = (deployment.device_pass(spec, step_forward(spec, workload, step)) for step in (1, steps))
        later = Work(passes=tuple((steps / 2, each) for each in ends), tokens=workload.batch_size * steps, pp=deployment.pp)
    return first, later


def _binding(parts: dict[Bound, float]) -> Bound:
    return max(parts, key=lambda bound: parts[bound])


def _assumptions(deployment: Deployment, device: Device) -> tuple[str, ...]:
    types, stack = deployment.types, deployment.stack
    narrow = (f"products of narrow weights are computed in {types.products}",) if types.products != types.activations else ()
    many = (f"{deployment.devices} devices hold one copy of the model",) if deployment.devices > 1 else ()
    return (
        f"time from published figures of {device.name} and what software of kind {stack.name} reaches of them on published rows",
        "low to high is a 90 % range, of the errors on rows whose source was not fitted", *narrow, *many,
    )  # fmt: skip
