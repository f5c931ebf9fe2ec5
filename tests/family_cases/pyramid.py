from __future__ import annotations

from typing import Any

LABELS = {0: "a", 1: "b", 2: "c"}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "window_size": 4}
CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 32}
PVT: dict[str, Any] = {
    "hidden_sizes": [8, 16], "depths": [1, 2], "num_attention_heads": [1, 2], "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [4, 2],
    "num_encoder_blocks": 2, "image_size": 32,
}  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "swin": [
        SWIN,
        {**SWIN, "image_size": 54, "window_size": 3, "qkv_bias": False, "mlp_ratio": 2.0, "num_channels": 1},
        {**SWIN, "encoder_stride": 8, "window_size": 2, "use_absolute_embeddings": True, "id2label": LABELS},
    ],
    "swinv2": [
        SWIN,
        {**SWIN, "window_size": 5, "image_size": 30, "qkv_bias": False, "mlp_ratio": 2.0, "id2label": LABELS},
        {**SWIN, "encoder_stride": 8, "window_size": 3},
    ],
    "donut-swin": [SWIN, {**SWIN, "window_size": 2, "qkv_bias": False, "id2label": LABELS}],
    "convnext": [CONVNEXT, {**CONVNEXT, "layer_scale_init_value": 0.0, "image_size": 36, "patch_size": 3, "id2label": LABELS}],
    "convnextv2": [CONVNEXT, {**CONVNEXT, "image_size": 36, "num_channels": 1, "patch_size": 3, "id2label": LABELS}],
    "pvt": [
        {**PVT, "sequence_reduction_ratios": [4, 1]},
        {**PVT, "sequence_reduction_ratios": [2, 1], "qkv_bias": False, "num_channels": 1, "id2label": LABELS},
    ],
    "pvt_v2": [
        {**PVT, "sr_ratios": [4, 1]},
        {**PVT, "sr_ratios": [2, 2], "patch_sizes": [7, 3], "qkv_bias": False, "id2label": LABELS},
        {**PVT, "sr_ratios": [2, 1], "linear_attention": True},
    ],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
