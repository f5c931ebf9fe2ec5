"""Names of the files that artifacts hold; writers and runtimes agree on them here, and neither imports the other's libraries for it."""

from __future__ import annotations

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ONNX = "model.onnx"
OPENVINO = "openvino_model.xml"
GGUF = "model.gguf"

FLOAT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""ONNX Runtime's option that keeps activations in float32 where weights are codes; by itself it rounds them to int8 in blocks.
Source: onnxruntime_session_options_config_keys.h."""


def shard(number: int, count: int) -> str:
    """The name of one of several files of weights, numbered from 1, as Hugging Face numbers them.

    >>> shard(2, 13)
    'model-00002-of-00013.safetensors'
    """
    return f"model-{number:05}-of-{count:05}.safetensors"
