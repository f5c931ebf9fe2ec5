"""Low-rank adapters (LoRA) on a frozen model, and the frozen model quantized under them (QLoRA): which tensors are trained, what all of it weighs.

A linear y = x Wᵀ with an adapter of rank r computes x Wᵀ + (x Aᵀ) Bᵀ · α / r, A of shape [r, in_features], B of shape [out_features, r].
A and B alone have gradients and optimizer state.

Source: Hu et al. 2021 (arXiv:2106.09685), as PEFT 0.21 makes them; Dettmers et al. 2023 (arXiv:2305.14314), as bitsandbytes 0.50 stores it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from lighten.cost.optimizer_state import Shape
from lighten.cost.workload import ALL_LINEAR, BASE_BITS
from lighten.errors import WorkloadError
from lighten.model.spec import Linear, ModelSpec, Part, block_name, part_weight_bytes
from lighten.units import DTYPE_BITS, dtype_bytes

NF4_BLOCK = 64
"""Values that share an absolute maximum. Source: QLoRA, section 3, "double quantization"; `quantize_4bit` of bitsandbytes/functional.py."""
ABSMAX_BLOCK = 256
"""Absolute maxima, kept in 8 bits each, that share a float32. Source: as `NF4_BLOCK`."""
NF4_CODE_BYTES = 4 * 16
NF4_FIXED_BYTES = NF4_CODE_BYTES + 4 * (1 + 256)
"""Of each weight: the 16 values of NF4; the mean of its maxima and the 256 values of their code, all float32. Source: `QuantState` there."""
ADAPTER_DTYPE = "float32"
"""Type of adapters on a 16-bit model. Source: `autocast_adapter_dtype=True`, the default of PEFT's `get_peft_model`."""


def adapted_linears(spec: ModelSpec, targets: str) -> list[Linear]:
    """The linears that get an adapter.

    Args:
        targets: last parts of module names, such as "q_proj,v_proj"; "all-linear": every linear but the last of the head.

    Leaves out those that share another's weight, which are one module with it. Experts get an adapter each, and their router one, as
    where each is a module; PEFT on transformers 5, which keeps all experts' gates and ups in one tensor, gives that one twice the rank.

    Raises:
        WorkloadError: a target that no linear has, with the names that exist.
    """
    linears = [part for part in spec.parts if isinstance(part, Linear) and part.tied_to is None]
    if targets == ALL_LINEAR:
        output = _output(spec)
        return [part for part in linears if part.name != output]
    names = [target.strip() for target in targets.split(",")]
    found = [part for part in linears if any(_ends(part, name) for name in names)]
    if missing := [name for name in names if not any(_ends(part, name) for part in found)]:
        known = sorted({part.name.rpartition(".")[2] for part in linears})
        raise WorkloadError(f"lora_targets: {spec.name} has no linear named {', '.join(missing)}; it has: {', '.join(known)}.")
    return found


def adapter_shapes(spec: ModelSpec, rank: int, targets: str) -> list[Shape]:
    """Shapes of all adapters: A and B of each adapted linear, of each of its experts.

    Raises:
        WorkloadError: a target that no linear has.
    """
    shapes: list[Shape] = []
    for part in adapted_linears(spec, targets):
        shapes += [(rank, part.in_features), (part.out_features, rank)] * part.experts
    return shapes


def adapter_parameters(spec: ModelSpec, rank: int, targets: str) -> int:
    """Trained parameters of adapters of one rank.

        Σ over adapted linears of rank · (in_features + out_features)

    Raises:
        WorkloadError: a target that no linear has.
    """
    return sum(math.prod(shape) for shape in adapter_shapes(spec, rank, targets))


def adapter_dtype(dtype: str) -> str:
    """Type of the adapters, of their gradients and of their optimizer's state on a model of type `dtype`.

    >>> adapter_dtype("bfloat16")
    'float32'
    """
    return ADAPTER_DTYPE if DTYPE_BITS[dtype] <= 16 else dtype


def frozen_bytes(spec: ModelSpec, dtype: str, base_bits: int | None, *, double_quant: bool = True) -> int:
    """Bytes of the frozen model under its adapters.

    Its linears but the last of the head take `base_bits`; embeddings, that last one, routers, norms, biases and experts, which
    `transformers` stacks in one tensor, stay in `dtype`. None: all stays in `dtype`.

    Source: `get_keys_to_not_convert` of transformers' quantizers, which leaves the head out; `prepare_model_for_kbit_training` of PEFT
    would turn what stays into float32, which is not counted.

    Raises:
        WorkloadError: bits other than 4 and 8.
    """
    if base_bits is not None and base_bits not in BASE_BITS:
        raise WorkloadError(f"base_bits={base_bits} is not known; known: {', '.join(map(str, BASE_BITS))}.")
    if base_bits is None:
        return sum(_plain_bytes(part, dtype) for part in spec.parts)
    kept = {_output(spec), *_routers(spec)}
    total = 0
    for part in spec.parts:
        if isinstance(part, Linear) and part.experts == 1 and part.name not in kept:
            total += quantized_bytes(part, dtype, base_bits, double_quant=double_quant)
        else:
            total += _plain_bytes(part, dtype)
    return total


def quantized_bytes(part: Linear, dtype: str, base_bits: int, *, double_quant: bool = True) -> int:
    """Bytes of one linear with its weight in 4 or 8 bits, its bias in `dtype`.

        4: ⌈n / 2⌉ + ⌈n / 64⌉ + 4 · ⌈⌈n / 64⌉ / 256⌉ + 1092     NF4, its absolute maxima in 8 bits with their own in float32
           ⌈n / 2⌉ + 4 · ⌈n / 64⌉ + 64                          without `double_quant`: the maxima in float32
        8: n + 4 · out_features                                  LLM.int8(), a float32 for each row

    Source: `quantize_4bit(compress_statistics=True)` and `int8_vectorwise_quant` of bitsandbytes 0.50, whose tensors' bytes were read.
    """
    total = 0
    for shape in part.tensors().values():
        count = math.prod(shape)
        if len(shape) < 2:
            total += round(count * dtype_bytes(dtype))
        elif base_bits == 8:
            total += count + 4 * part.out_features
        else:
            maxima = math.ceil(count / NF4_BLOCK)
            twice = maxima + 4 * math.ceil(maxima / ABSMAX_BLOCK) + NF4_FIXED_BYTES
            total += math.ceil(count / 2) + (twice if double_quant else 4 * maxima + NF4_CODE_BYTES)
    return total


def _plain_bytes(part: Part, dtype: str) -> int:
    if getattr(getattr(part, "weight", None), "bits", None) is not None:
        return part_weight_bytes(part, dtype)
    return round(part.parameters * dtype_bytes(dtype))


def _ends(part: Linear, target: str) -> bool:
    return part.name == target or part.name.endswith(f".{target}")


def _output(spec: ModelSpec) -> str | None:
    """Name of the linear that makes the output: the last of the head."""
    heads = [part.name for part in spec.parts if isinstance(part, Linear) and part.component == "head"]
    return heads[-1] if heads else None


def _routers(spec: ModelSpec) -> Iterator[str]:
    """Names of the linears that choose between experts: in a block with experts, those with an output for each."""
    for _, parts in groupby(spec.parts, key=block_name):
        linears = [part for part in parts if isinstance(part, Linear)]
        counts = {part.experts for part in linears if part.experts > 1}
        yield from (part.name for part in linears if part.experts == 1 and part.out_features in counts)
