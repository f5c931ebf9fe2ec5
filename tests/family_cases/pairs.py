from __future__ import annotations

from typing import Any

LABELS = {0: "a", 1: "b", 2: "c"}
IMAGES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 99, "max_position_embeddings": 30,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OF_IMAGES: list[dict[str, Any]] = [IMAGES, {**IMAGES, "projection_dim": 20, "num_channels": 1, "hidden_act": "relu", "image_size": 24}]
OF_TEXTS: list[dict[str, Any]] = [TEXTS, {**TEXTS, "projection_dim": 20, "hidden_act": "silu"}]
CLASSIFIERS: list[dict[str, Any]] = [{"vision_config": IMAGES}, {"vision_config": {**IMAGES, "num_attention_heads": 2}, "id2label": LABELS}]

CASES: dict[str, list[dict[str, Any]]] = {
    "clip": CLASSIFIERS,
    "metaclip_2": CLASSIFIERS,
    "siglip": [*CLASSIFIERS, {"vision_config": {**IMAGES, "vision_use_head": False}}],
    "clip_vision_model": OF_IMAGES,
    "metaclip_2_vision_model": OF_IMAGES,
    "chinese_clip_vision_model": OF_IMAGES,
    "altclip_vision_model": OF_IMAGES,
    "siglip_vision_model": [*OF_IMAGES, {**IMAGES, "vision_use_head": False}],
    "clip_text_model": OF_TEXTS,
    "metaclip_2_text_model": OF_TEXTS,
    "siglip_text_model": [TEXTS, {**TEXTS, "projection_size": 20}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
