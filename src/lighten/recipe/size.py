"""Bytes on disk of a spec's artifact, part by part, for a runtime: its weights as stored, and the container's own description of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from lighten.model.ggml_types import exact_ggml_type
from lighten.model.low_rank import ADAPTER_PREFIX, CORRECTION, ORIGINAL_TYPE, RANKS, STORED_TYPE, mark_of
from lighten.model.quantized.masked import is_masked
from lighten.model.quantized.packed import kind_of, scheme
from lighten.model.quantized.stored import typed_tensors
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, Table, WeightFormat, part_weight_bytes
from lighten.recipe.targets import RUNTIMES, left_out
from lighten.units import dtype_bytes

CONTAINER_BYTES = {"onnxruntime": 800, "openvino": 2600, "llama.cpp": 80, "ctranslate2": 80}
CONTAINER_BASE_BYTES = {"onnxruntime": 6500, "openvino": 25_000, "llama.cpp": 0, "ctranslate2": 400}
"""Bytes of description for each tensor or operator, and once: measured on exports of random models by benchmarks/container_bytes.py;
GGUF's from its layout: a name of about 25 bytes, 40 of numbers, and 16 on average to the next multiple of 32 (ggml's docs/gguf.md)."""

_ENTRY = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
"""What the header of a safetensors file says of a tensor beside its name, type, shape and two offsets. Source: the `safetensors` package, README."""
_TYPE = 4
"""Letters of a type's name in it: `BF16`, and one less of `F16` or `I32`."""
_COUNT = len('      "": 100000,\n')
"""What it says of a pruned module beside its name; its number of values is taken to have six digits."""
_LINE = len('            "",\n')
"""What a config says of a quantized module beside its name, indented by two spaces a level."""


def artifact_size(spec: ModelSpec, runtime: str) -> int:
    """Bytes of all files of an artifact but its manifest.

    A folder's description is counted: the entries of its header, and what its config says of the weights' formats. Of ONNX, OpenVINO IR and GGUF
    it is taken as `CONTAINER_BYTES` a tensor or operator; the tokenizer in a GGUF file as many bytes as the original's files.
    """
    return sum(component_sizes(spec, runtime).values())


COMPONENTS = ("embedding", "attention", "mlp", "head", "norm")
"""What sizes are told of by name; what else a model has, a pooler, a convolution, is `other`."""


def component_sizes(spec: ModelSpec, runtime: str) -> dict[str, int]:
    """`artifact_size` by component, with what describes each; `files` is what no weight takes: tokenizer, config, what the container says."""
    found = dict.fromkeys((*COMPONENTS, "other", "files"), 0)
    for part in spec.parts:
        if not left_out(part, spec, runtime):
            found[part.component if part.component in COMPONENTS else "other"] += part_size(part, spec.dtype, runtime)
    found["files"] = spec.other_bytes + (CONTAINER_BASE_BYTES[runtime] if runtime in CONTAINER_BASE_BYTES else _formats_bytes(spec))
    found["files"] += _low_rank_bytes(spec) if not RUNTIMES[runtime].exported else 0
    return found


def part_size(part: Part, dtype: str, runtime: str) -> int:
    """Bytes that one part adds to an artifact; vectors (biases, norms) in `dtype`, in GGUF in float32."""
    return _PARTS[runtime](part, dtype) + (len(part.tensors()) or RUNTIMES[runtime].exported) * CONTAINER_BYTES.get(runtime, 0)


def _in_gguf(part: Part, dtype: str) -> int:
    """Codes in the type of ggml that holds them; those that none holds, which the runtime refuses, as they are."""
    if not isinstance(part, Linear | Embedding) or part.weight.bits is None or part.weight.ggml_type is not None:
        return part_weight_bytes(part, "float32")
    weight, columns = part.weight, part.in_features if isinstance(part, Linear) else part.embedding_dim
    held = exact_ggml_type(bits=part.weight.bits, symmetric=weight.symmetric, group_size=weight.group_size, columns=columns, element=weight.element)
    return part_weight_bytes(replace(part, weight=replace(weight, ggml_type=held)), "float32")


def _in_folder(part: Part, dtype: str) -> int:
    """Tensors as they are stored, with their entries in the header and the module's line in the config; types of ggml as a GGUF file has them."""
    if isinstance(part, Linear | Embedding) and part.weight.ggml_type is not None:
        return part_weight_bytes(part, dtype)
    quantized = isinstance(part, Linear | Embedding) and part.weight.bits is not None
    own = part.dtype if isinstance(part, Table) else None
    whole = part.weight.dtype if isinstance(part, Linear | Embedding) and not quantized else dtype
    found = 0
    for name, (shape, stored) in typed_tensors(part).items():
        found += round(math.prod(shape) * dtype_bytes(stored or own or (whole if len(shape) > 1 else dtype))) + _entry_bytes(name, shape)
    if is_masked(part):
        found += len(part.name) + _COUNT
    return found + (sum(len(name) + _LINE for name in part.tensors() if name.endswith(".weight")) if quantized else 0)


def _in_ctranslate2(part: Part, dtype: str) -> int:
    """Scales of codes in float32, tables of positions as floats, and the name of each token of the largest table."""
    if not isinstance(part, Linear | Embedding):
        return part_weight_bytes(part, "float32")
    if isinstance(part, Embedding) and "position" in part.name:
        return part_weight_bytes(replace(part, weight=WeightFormat(dtype="float32")), "float32")
    weight = part.weight if part.weight.bits is None else replace(part.weight, scale_dtype="float32")
    names = TOKEN_BYTES * part.num_embeddings if isinstance(part, Embedding) and "type" not in part.name else 0
    return part_weight_bytes(replace(part, weight=weight), "float32") + names


TOKEN_BYTES = 14
"""Of a vocabulary in JSON, a token: between MiniLM's 12.8 and SmolLM2's 16.5, whose spaces are six letters each."""

_PARTS = {
    "torch": _in_folder, "torch-compile": _in_folder, "onnxruntime": part_weight_bytes, "openvino": part_weight_bytes, "llama.cpp": _in_gguf,
    "ctranslate2": _in_ctranslate2,
}  # fmt: skip


def _entry_bytes(name: str, shape: tuple[int, ...]) -> int:
    """What a header says of a tensor; its offsets are taken to have ten digits."""
    return len(name) + _ENTRY + _TYPE + len(",".join(map(str, shape))) + 2 * 10


def _formats_bytes(spec: ModelSpec) -> int:
    """What a config says of each distinct format of quantized weights."""
    parts = [part for part in spec.parts if isinstance(part, Linear | Embedding) and part.weight.bits is not None]
    kinds = ((kind_of(part), part.weight) for part in parts if part.tensors() and part.weight.ggml_type is None)
    said = {json.dumps({"targets": [], **scheme(kind, weight)}, indent=2) for kind, weight in kinds if kind is not None}
    return sum(len(text) + 6 * (text.count("\n") + 1) + len('"group_0": ,\n') for text in said) + (_CONFIG if said else 0)


def _low_rank_bytes(spec: ModelSpec) -> int:
    """What a folder says of factors and corrections: in its config, in the header, and in the description of an adapter."""
    ranks, corrected = spec.config.get(RANKS) or {}, spec.config.get(CORRECTION) or {}
    mark = mark_of(spec.config)
    found = sum(len(json.dumps({word: said}, indent=2)) + 2 * len(said) for word, said in ((RANKS, ranks), (CORRECTION, corrected)) if said)
    found += _entry_bytes(mark, (0,)) + len(STORED_TYPE) + len(ORIGINAL_TYPE) if mark else 0
    return found + (_CONFIG + len(json.dumps(sorted(corrected), indent=2)) + 2 * len(ADAPTER_PREFIX) * len(corrected) if corrected else 0)


_CONFIG = 200
"""What a config says of quantization as a whole, in letters."""
