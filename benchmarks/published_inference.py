"""Published rows of inference as cases of the tool's own types, and their grades: decode, prefill, serving, and whether the model fits.

What a row's columns mean is told by general words alone (its metric, its framework, its format): no model, device or source is known by name
here. What it leaves out is named in `unsaid`, and each such thing widens the range of what is predicted for it.

    decode    decode_tok_s, else batch / tpot_ms: tokens of all sequences a second, once prompts are read
    prefill   prefill_tok_s, else batch · input_len / ttft_ms, of a single or static batch
    serving   total_output_tok_s: batching in flight at a load that fills the devices, or a static batch from its prompts to its last token
    fits      a row that was measured did fit into its devices' memory
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from published_rows import Grade, LeftOut, NotGradable, Row, count_of, number, spec_of_row

from lighten.device.catalog import match_device
from lighten.device.datasheet import Limits, Rates, load_rates
from lighten.device.device import Device, Link
from lighten.errors import DeviceError, LightenError
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, WeightFormat
from lighten.parallel.serving import (
    STACKS,
    Deployment,
    Stack,
    Types,
    Work,
    decode_work,
    flight_work,
    largest_concurrency,
    limits_on,
    memory_alone,
    memory_needed,
    prefill_work,
    static_work,
    work_parts,
)

Kind = Literal["decode", "prefill", "serving"]
STACK_WORDS: tuple[tuple[str, str], ...] = (
    (r"llama\.?cpp|ollama|ggml|gguf|ctransformers|kobold|llamafile|lm.?studio|whisper\.cpp", "ggml"),
    (r"exllama|tinychat|autoawq|\bmlc|mlx|gpt-?fast|marlin|turboderp", "local"),
    (r"neuron|tensorrt|trt|vllm|sglang|lmdeploy|turbomind|fastertransformer|ctranslate|deepspeed|\btgi\b|text-generation-inference|lightllm|optimum.?nvidia"
     r"|triton|nim\b|max(text|engine)|jetstream|openvino|rtp|fastgen|mii", "engine"),
    (r"transformers|hugging|\bhf\b|litgpt|lightning|pytorch|\btorch\b|onnx|bitsandbytes|gptq|peft|eager|megatron|keras|jax", "eager"),
)  # fmt: skip
"""Words of a framework's name → the kind of software that it is, the first that matches."""
EMPTY_CONTEXT = r"\btg\b|\btg ?\d|empty c(on)?te?xt|short c(on)?te?xt|empty ctx|short ctx"
"""Words of a metric or note that say that generation was timed from an empty context."""
DOUBT = r"\bexclude\b|anomal"
DEFAULT_CONTEXT = 256
"""Tokens in the cache where a row says nothing of lengths: a chat's question and half its answer. The range is widened for it."""
DEFAULT_NEW = 128
KINDS: tuple[Kind, ...] = ("decode", "prefill", "serving")
FLIGHT = r"in-?flight|continuous|saturat|max batch|offline|concurren|online|server"
UNSAID_SPREAD = {"software": 0.15, "length": 0.06, "device": 0.15, "shape": 0.15, "bits": 0.10, "batch": 0.2, "computes": 0.1, "plan": 0.15}
"""What a row leaves out → standard deviations of log speed by which its range is widened: by how much each moved these predictions."""


@dataclass(frozen=True)
class AverageBits:
    """The layout of a weight of which the mean width alone is known, its scales included."""

    bits: float

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"weight": ((rows, math.ceil(columns * self.bits / 8)), "uint8")}


@dataclass(frozen=True, kw_only=True)
class InferenceCase:
    """A row of inference as the tool's own types.

    Attributes:
        context: tokens in the cache before the first new one that is timed.
        truths: kind → tokens a second.
        unsaid: what the row leaves out: software, length, device, shape, bits, batch.
        year: of the software, where its name says it.
        flash: it says that attention is one kernel.
        doubtful: its own note says that its figure is not what the device gives; graded, but not fitted.
    """

    id: str
    source: str
    spec: ModelSpec
    device: Device
    devices: int
    tp: int
    pp: int
    stack: Stack
    batch: int | None
    input_len: int | None
    output_len: int | None
    context: int
    dtype: str
    product_dtype: str
    kv_dtype: str
    in_flight: bool
    truths: dict[Kind, float]
    unsaid: tuple[str, ...]
    doubtful: bool = False
    flash: bool = False
    year: float | None = None

    @property
    def parallelism(self) -> str:
        return f"tp{self.tp} pp{self.pp}"


def stack_of_row(row: Row) -> tuple[Stack, tuple[str, ...]]:
    """The kind of software that a framework's name means; "software" is unsaid where it does not tell."""
    text = (row.get("framework") or "").lower()
    for pattern, name in STACK_WORDS:
        if re.search(pattern, text):
            stack = STACKS[name]
            return (replace(stack, split="gather") if "row split" in text else stack), ()
    return STACKS["engine"], ("software",)


MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def year_of(text: str) -> float | None:
    """The year in a framework's name, with its month where it has one.

    >>> year_of("llama.cpp Dec-2023"), year_of("runtime 2026-03"), year_of("b1234")
    (2023.92, 2026.17, None)
    """
    found = re.search(r"(?:\b([a-z]{3})[a-z]*[- ])?\b(20[12]\d)(?:-(\d\d))?\b", text.lower())
    if not found:
        return None
    month = MONTHS.index(found[1]) if found[1] in MONTHS else int(found[3]) - 1 if found[3] and 1 <= int(found[3]) <= 12 else 6
    return round(int(found[2]) + month / 12, 2)


def device_of_inference_row(row: Row) -> tuple[Device, tuple[str, ...]]:
    """The device that a row ran on: of the catalogue, with the row's own bandwidth; else what the row's columns say of it alone.

    Raises:
        NotGradable: the catalogue has none such and the row gives no bandwidth.
    """
    bandwidth, memory = number(row, "device_mem_bw_gbs"), number(row, "device_mem_gb")
    found = _match(row["hardware"], memory and memory * 2**30, bandwidth and bandwidth * 1e9)
    if found is None or found.bandwidth_bytes_per_s is None:
        if not bandwidth:
            raise NotGradable(f"device {row['hardware']!r} is not in the catalogue, and the row gives no bandwidth")
        base = found or Device(name="row", full_name=row["hardware"], vendor="", kind=kind_of_hardware(row["hardware"]))
        own = memory * 2**30 if memory else None
        return replace(base, bandwidth_bytes_per_s=bandwidth * 1e9, memory_bytes=round(own) if own else base.memory_bytes), ("device",)
    if not bandwidth:
        return found, ()
    share = bandwidth * 1e9 / found.bandwidth_bytes_per_s
    if share < 0.6 and abs(1 / share - round(1 / share)) < 0.05:  # the row counts parts of a chip, such as its cores
        return part_of(found, round(1 / share)), ()
    return replace(found, bandwidth_bytes_per_s=bandwidth * 1e9), ()


@cache
def _match(text: str, memory_bytes: float | None, bandwidth_bytes_per_s: float | None) -> Device | None:
    return match_device(text, memory_bytes=memory_bytes, bandwidth_bytes_per_s=bandwidth_bytes_per_s)


def part_of(device: Device, parts: int) -> Device:
    """One of equal parts of a chip."""
    return replace(
        device, bandwidth_bytes_per_s=device.bandwidth() / parts, memory_bytes=device.memory_bytes and device.memory_bytes // parts,
        peak_flops_per_s={name: rate / parts for name, rate in device.peak_flops_per_s.items()},
        links=tuple(
            Link(name=link.name, bytes_per_s=link.bytes_per_s / parts, devices=link.devices and link.devices * parts, latency_s=link.latency_s)
            for link in device.links
        ),
    )  # fmt: skip


def kind_of_hardware(text: str) -> str:
    lowered = text.lower()
    if re.search(r"\[cpu\]|xeon|epyc|ryzen|core i\d|cortex|risc-?v|graviton|ampere", lowered) and "[gpu]" not in lowered:
        return "cpu"
    return "soc" if re.search(r"apple|\bm\d\b|jetson|snapdragon|orin|soc", lowered) else "gpu"


# ---- weights ----


def bits_of_row(row: Row) -> tuple[float, tuple[str, ...]]:
    """Mean bits of a quantized weight, or of every weight.

    Raises:
        NotGradable: the row does not say.
    """
    bits = number(row, "weight_bits")
    if not bits:
        raise NotGradable("the row does not give the bits of its weights")
    return bits, ("bits",) if "default" in (row.get("weight_format") or "").lower() else ()


def with_weights(spec: ModelSpec, row: Row, dtype: str, stack: Stack) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model with its weights as the row stores them: everything in a GGUF file, else the linears of the layers, the rest in `dtype`."""
    bits, unsaid = bits_of_row(row)
    key = id(spec), bits, (row.get("weight_format") or "").lower(), number(row, "model_file_gib"), dtype, stack.name
    if key not in _STORED:
        _STORED[key] = spec, _stored(spec, *key[1:])
    return _STORED[key][1], unsaid


_STORED: dict[tuple[object, ...], tuple[ModelSpec, ModelSpec]] = {}
"""A model and a storage → the model (kept, so that its id stays its own) and the model so stored."""


def _stored(spec: ModelSpec, bits: float, text: str, file_gib: float | None, dtype: str, stack: str) -> ModelSpec:
    plain = {16: dtype if dtype != "float32" else "float16", 32: "float32"}.get(round(bits) if bits in (16, 32) else 0)
    if plain is not None:
        return spec.with_parts(lambda part: _formatted(part, WeightFormat(dtype=plain)))
    rest = WeightFormat(dtype=dtype if dtype != "float32" else "float16")
    mixture = any(isinstance(part, Linear) and part.experts > 1 for part in spec.parts)
    ggml = stack == "ggml"
    if "mxfp4" in text and mixture:  # the experts alone are in it; ggml keeps the rest in 8 bits
        rest = quantized(8.5) if ggml else rest
        return spec.with_parts(lambda part: _formatted(part, quantized(bits) if isinstance(part, Linear) and part.experts > 1 else rest))
    if ggml and file_gib:
        bits = fitted_bits(spec, file_gib * 2**30, bits)
    codes = quantized(bits)
    return spec.with_parts(lambda part: _formatted(part, codes if ggml or (isinstance(part, Linear) and part.component != "head") else rest))


def fitted_bits(spec: ModelSpec, file_bytes: float, bits: float) -> float:
    """Mean bits with which all matrices fill the file; the stated ones where the file is not of this model."""
    matrices = sum(part.parameters for part in spec.parts if isinstance(part, Linear | Embedding))
    own = 8 * file_bytes / matrices if matrices else bits
    return own if abs(own / bits - 1) < 0.15 else bits


def quantized(bits: float) -> WeightFormat:
    return WeightFormat(bits=max(1, math.floor(bits)), layout=AverageBits(bits))


def _formatted(part: Part, weight: WeightFormat) -> Part:
    if isinstance(part, Embedding) and isinstance(weight.layout, AverageBits):  # a table has no layout of its own; its width is the nearest whole one
        return replace(part, weight=WeightFormat(bits=max(1, round(weight.layout.bits))))
    return replace(part, weight=weight) if isinstance(part, Linear | Embedding) else part


def types_of_row(row: Row, device: Device, stack: Stack) -> tuple[str, str, str]:
    """Type of activations, of products with narrow weights, and of the cache; none that the device has no rate of, where it has any."""
    bits = number(row, "weight_bits") or 16
    text = (row.get("weight_format") or "").lower()
    order = ("float32",) if bits == 32 else ("float16", "bfloat16", "float32") if device.kind == "cpu" else ("float16", "bfloat16")
    wide = next((name for name in order if name in device.peak_flops_per_s), order[0])
    products = wide
    if stack.name == "engine":
        if "fp8" in text and "float8" in device.peak_flops_per_s:
            products = "float8"
        elif re.search(r"fp4", text) and "float4" in device.peak_flops_per_s:
            products = "float4"
        elif re.search(r"w8a8|smooth", text) and "int8" in device.peak_flops_per_s:
            products = "int8"
    kept = (row.get("kv_dtype") or ("fp8" if products == "float8" else "")).lower()  # engines keep the cache as narrow as the weights
    cache = "float8_e4m3fn" if re.search(r"fp8|f8", kept) else "int8" if "8" in kept else "float32" if wide == "float32" else "float16"
    return wide, products, cache


# ---- cases ----


def inference_case(row: Row) -> InferenceCase:
    """A row of inference.csv as the tool's own types.

    Raises:
        NotGradable, LeftOut, LightenError: what is missing, or does not fit together.
    """
    stack, no_software = stack_of_row(row)
    device, no_device = device_of_inference_row(row)
    spec, no_shape = _spec_of(row)
    dtype, products, kept = types_of_row(row, device, stack)
    spec, no_bits = with_weights(spec, row, dtype, stack)
    devices = count_of(row, "n_devices") or 1
    tp, pp = _spread(row, devices, stack)
    input_len, output_len = count_of(row, "input_len"), count_of(row, "output_len")
    batch = count_of(row, "batch_or_concurrency")
    kind = (row.get("batch_kind") or "").lower()
    in_flight = bool(re.search(FLIGHT, kind))
    if "static" in kind and stack.records:  # a session of its own, as engines ran it before they batched in flight
        stack = replace(stack, records=False)
    words = f"{row.get('metric', '')} {row.get('note', '')}".lower()
    empty = bool(re.search(EMPTY_CONTEXT, words))
    context = 0 if empty else input_len if input_len is not None else DEFAULT_CONTEXT
    unsaid = (*no_software, *no_device, *(("shape",) if no_shape else ()), *no_bits)
    if (input_len is None and not empty) or output_len is None:
        unsaid += ("length",)
    truths = truths_of_row(row, batch, input_len, output_len, in_flight)
    if not truths:
        raise NotGradable("the row gives no speed that is predicted (decode, prefill or serving)")
    return InferenceCase(
        id=row["id"], source=row.get("source_repo_or_doc") or "not said", spec=spec, device=device, devices=devices, tp=tp, pp=pp, stack=stack,
        batch=batch, input_len=input_len, output_len=output_len, context=context, dtype=dtype, product_dtype=products, kv_dtype=kept,
        in_flight=in_flight, truths=truths, unsaid=unsaid, doubtful=bool(re.search(DOUBT, row.get("note", "").lower())),
        year=year_of(row.get("framework") or ""),
        flash=bool(re.search(r"flash|\bfa\b|-fa\b", f"{words} {row.get('framework', '').lower()}")),
    )  # fmt: skip


def _spec_of(row: Row) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model of a row; where `ffn` is not the width of its experts, that which its parameters leave for them."""
    spec, unsaid = spec_of_row(row)
    total, experts, layers, hidden = (number(row, name) for name in ("params_total", "n_experts", "layers", "hidden"))
    if not (total and experts and layers and hidden) or row.get("moe_ffn") or abs(spec.total_parameters / total - 1) < FAR:
        return spec, unsaid
    width = max(1, round(total / (layers * experts * 3 * hidden) / 128)) * 128
    other, more = spec_of_row({**row, "moe_ffn": str(width)})
    nearer = abs(other.total_parameters / total - 1) < abs(spec.total_parameters / total - 1)
    return (other, more) if nearer else (spec, unsaid)


FAR = 0.1
"""How far a mixture's parameters may be from the published ones before its experts are taken to have another width than `ffn`."""


def _spread(row: Row, devices: int, stack: Stack) -> tuple[int, int]:
    """Tensor and pipeline parallelism: as said; else by layers where the software does so by default, else by tensors."""
    tp, pp = count_of(row, "tp"), count_of(row, "pp")
    if tp is None and pp is None:
        return (1, devices) if stack.name in ("ggml", "local", "eager") else (devices, 1)
    if tp is None:
        return max(1, devices // (pp or 1)), pp or 1
    return tp, pp if pp is not None else max(1, devices // tp)


def truths_of_row(row: Row, batch: int | None, input_len: int | None, output_len: int | None, in_flight: bool) -> dict[Kind, float]:
    """The speeds that a row gives, in tokens a second of all sequences."""
    found: dict[Kind, float] = {}
    decode, per_token = number(row, "decode_tok_s"), number(row, "tpot_ms")
    if decode:
        found["decode"] = decode
    elif per_token and not in_flight:
        found["decode"] = (batch or 1) / (per_token / 1e3)
    prefill, first = number(row, "prefill_tok_s"), number(row, "ttft_ms")
    if prefill:
        found["prefill"] = prefill
    elif first and input_len and not in_flight:
        found["prefill"] = (batch or 1) * input_len / (first / 1e3)
    total, latency = number(row, "total_output_tok_s"), number(row, "latency_ms")
    if total:
        found["serving"] = total
    elif latency and output_len:
        found["serving"] = (batch or 1) * output_len / (latency / 1e3)
    return found


def deployment_of(case: InferenceCase) -> Deployment:
    types = Types(activations=case.dtype, products=case.product_dtype, cache=case.kv_dtype)
    return Deployment(types=types, stack=case.stack, tp=case.tp, pp=case.pp)


def work_of(case: InferenceCase, kind: Kind) -> Work:
    """The passes whose tokens over seconds are the row's speed.

    Raises:
        NotGradable: the memory that limits a full load is not known.
    """
    deployment, batch = deployment_of(case), case.batch or 1
    input_len, output_len = case.input_len or DEFAULT_CONTEXT, case.output_len or DEFAULT_NEW
    if kind == "decode":
        return decode_work(case.spec, batch, case.context, output_len, deployment)
    if kind == "prefill":
        return prefill_work(case.spec, batch, input_len, deployment)
    if not case.in_flight:
        return static_work(case.spec, batch, input_len, output_len, deployment)
    if case.device.memory_bytes is None:
        raise NotGradable(f"the memory of {case.device.full_name} is not known, so how many requests fit is not either")
    most = largest_concurrency(case.spec, case.device, input_len + output_len, deployment)
    return flight_work(case.spec, min(case.batch or most, most) if most else case.batch or 1, input_len, output_len, deployment)


def limits_of(case: InferenceCase, kind: Kind) -> tuple[Limits, Limits]:
    """The device's published figures; of decoding one stream, the bandwidth alone where no rate of any product is known.

    Raises:
        DeviceError: a figure that is needed is not known.
    """
    device = case.device
    try:
        return limits_on(device, deployment_of(case))
    except DeviceError:
        if kind != "decode" or (case.batch or 1) > 1:
            raise
        return memory_alone(device, deployment_of(case))


# ---- grades ----


def grade_inference(rows: Sequence[Row], *, file: str = "", rates: Mapping[str, Rates] | None = None, fitted: bool | None = None) -> list[Grade]:
    """The grades of rows with the columns of inference.csv, in tokens a second.

    Args:
        rates: kind of software → constants; where it has none, those that are kept.
        fitted: whether the constants were fitted to these rows; None: where they name the row's source.
    """
    return [grade for row in rows for grade in _grades(row, file, rates or {}, fitted)]


def _grades(row: Row, file: str, rates: Mapping[str, Rates], fitted: bool | None) -> Iterator[Grade]:
    source = row.get("source_repo_or_doc") or "not said"
    about: dict[str, Any] = {
        "id": row.get("id", ""), "file": file, "source": source, "framework": row.get("framework", ""), "device": row.get("hardware", ""),
        "parallelism": "not said", "fitted": bool(fitted),
    }  # fmt: skip
    try:
        case = inference_case(row)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one row, it is counted and the others are graded
        yield Grade(kind="inference", **about, left_out=_reason(error))
        return
    used = rates.get(case.stack.name) or load_rates(case.stack.name)
    about |= {"parallelism": case.parallelism, "fitted": source in used.sources if fitted is None else fitted}
    for kind in (*case.truths, "fits"):
        try:
            found = _fits(row, case) if kind == "fits" else predicted_speed(case, kind, used)  # type: ignore[arg-type]
            yield Grade(kind=kind, **about, **found)
        except Exception as error:  # noqa: BLE001
            yield Grade(kind=kind, **about, left_out=_reason(error))


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    known = isinstance(error, LeftOut | LightenError)
    return text if known else f"a row that could not be read: {type(error).__name__}: {text}"


def predicted_speed(case: InferenceCase, kind: Kind, rates: Rates) -> dict[str, float]:
    """What is predicted for a figure of a row, with its 90 % range, wider for each thing that the row does not say."""
    work = work_of(case, kind)
    there = rates.on(case.device)
    if case.year is not None:
        there = there.in_year(case.year)
    if case.flash:
        there = replace(there, score_bytes=0.0)
    speed = work.tokens / sum(work_parts(work, case.device, there, limits_of(case, kind)).values())
    factor = rates.range_factor(kind, *(UNSAID_SPREAD[what] for what in case.unsaid), devices=case.tp * case.pp)
    return {"predicted": speed, "low": speed / factor, "high": speed * factor, "truth": case.truths[kind]}


HOST_TOO = r"ollama|lm.?studio|offload"
"""Software that moves what does not fit to the host's memory by itself, so that a row does not say whether it fitted."""


def _fits(row: Row, case: InferenceCase) -> dict[str, float]:
    """Whether one sequence of the row's length fits: weights, cache and activations within the memory. A row that was measured did."""
    if case.device.memory_bytes is None:
        raise NotGradable("the memory of the device is not known")
    if re.search(HOST_TOO, f"{row.get('framework', '')} {row.get('note', '')}".lower()):
        raise NotGradable("its software moves what does not fit to the host by itself")
    length = (case.input_len or DEFAULT_CONTEXT) + (case.output_len or 1)
    batch = 1 if case.in_flight else case.batch or 1
    needed = memory_needed(case.spec, batch, length, deployment_of(case))
    outcome = (row.get("measured") or "measured").lower()
    return {"predicted": float(needed <= case.device.memory_bytes), "truth": float("oom" not in outcome and "out of memory" not in outcome)}
