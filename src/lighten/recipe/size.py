"""Bytes on disk of a spec's artifact, part by part, for a runtime: its weights as stored, and the container's own description of them."""

from __future__ import annotations

from lighten.model.quantized import stored_tensors
from lighten.model.spec import ModelSpec, Part, part_weight_bytes
from lighten.recipe.targets import RUNTIMES

CONTAINER_BYTES = {"torch": 103, "torch-compile": 103, "onnxruntime": 3500, "openvino": 2600, "llama.cpp": 80}
CONTAINER_BASE_BYTES = {"torch": 0, "torch-compile": 0, "onnxruntime": 25_000, "openvino": 25_000, "llama.cpp": 0}
"""Bytes of description for each tensor or operator, and once: measured on exports of random models by benchmarks/container_bytes.py;
GGUF's from its layout: a name of about 25 bytes, 40 of numbers, and 16 on average to the next multiple of 32 (ggml's docs/gguf.md)."""


def artifact_size(spec: ModelSpec, runtime: str) -> int:
    """Bytes of all files of an artifact but its manifest.

    The container's description is taken as `CONTAINER_BYTES` a tensor (safetensors; a packed weight's `weight_shape` and its line in the
    config count as one too) or a tensor or operator (ONNX, OpenVINO IR).
    """
    left_out = ("pooler", "head") if RUNTIMES[runtime].exported and not spec.is_decoder else ()  # an encoder is exported without them
    parts = sum(part_size(part, spec.dtype, runtime) for part in spec.parts if part.component not in left_out)
    return parts + CONTAINER_BASE_BYTES[runtime] + spec.other_bytes


def part_size(part: Part, dtype: str, runtime: str) -> int:
    """Bytes that one part adds to an artifact; vectors (biases, norms) in `dtype`."""
    if RUNTIMES[runtime].exported:
        count = len(part.tensors()) or 1
    else:
        stored = stored_tensors(part)
        count = len(stored) + (f"{part.name}.weight_shape" in stored)
    return part_weight_bytes(part, dtype) + count * CONTAINER_BYTES[runtime]
