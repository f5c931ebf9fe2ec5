"""What runtimes are told beside the model, so that they compute what was asked for and nothing else: in sessions and in artifacts' scripts."""

from __future__ import annotations

OPENVINO_HINTS = {"float32": "f32", "bfloat16": "bf16"}
DYNAMIC_GROUP = 32
"""Columns of an activation that share a scale in OpenVINO; its own default on CPUs."""
STATIC_GROUP = 128
"""The same, of ONNX Runtime too, of the few products of `quantize(static)` that are rounded dynamically: less exact than 32 columns, and faster."""


GROUPS = {None: 0, "dynamic": DYNAMIC_GROUP, "static": STATIC_GROUP}
"""How activations are rounded → columns that share a dynamic scale."""


def openvino_settings(dtype: str, *, activations: str | None, decoder: bool) -> dict[str, str | int]:
    """Every property that OpenVINO would choose by itself, but for threads: precision, cache type, dynamic quantization of activations.

    >>> openvino_settings("bfloat16", activations=None, decoder=True)["KV_CACHE_PRECISION"]
    'bf16'
    """
    hint = OPENVINO_HINTS[dtype]
    cache: dict[str, str | int] = {"KV_CACHE_PRECISION": hint} if decoder else {}
    return {
        "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUPS[activations], **cache
    }  # fmt: skip


def onnxruntime_settings(*, dynamic: bool) -> dict[str, str]:
    """Entries of ONNX Runtime's session: activations stay in float32 where weights are codes; by itself it rounds them to int8 in blocks.

    Source: onnxruntime_session_options_config_keys.h.
    """
    return {} if dynamic else {"session.qdq_matmulnbits_accuracy_level": "1"}
