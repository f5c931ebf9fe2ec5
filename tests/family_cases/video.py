from __future__ import annotations

from typing import Any

LABELS = {0: "a", 1: "b", 2: "c"}
VIDEO: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 24, "num_frames": 4,
}  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "vivit": [
        {**VIDEO, "tubelet_size": [2, 8, 8]},
        {**VIDEO, "tubelet_size": [1, 12, 12], "qkv_bias": False, "num_channels": 1, "id2label": LABELS},
    ],
    "videomae": [
        {**VIDEO, "patch_size": 8},
        {**VIDEO, "patch_size": 12, "tubelet_size": 3, "num_frames": 6, "use_mean_pooling": False, "qv_bias": False, "id2label": LABELS},
    ],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
