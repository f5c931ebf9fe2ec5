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
PAIR: dict[str, Any] = {"vision_config": IMAGES, "text_config": TEXTS}
PAIRS: list[dict[str, Any]] = [
    {**PAIR, "projection_dim": 12},
    {"vision_config": {**IMAGES, "num_attention_heads": 2}, "text_config": {**TEXTS, "hidden_act": "gelu"}, "projection_dim": 36, "id2label": LABELS},
]
BERT_TEXTS: dict[str, Any] = {**TEXTS, "max_position_embeddings": 40, "type_vocab_size": 2, "pad_token_id": 0}
SAME: dict[str, Any] = {"vision_config": IMAGES, "text_config": {**TEXTS, "hidden_size": 32, "projection_size": 32}}

CASES: dict[str, list[dict[str, Any]]] = {
    "clip": PAIRS,
    "metaclip_2": PAIRS,
    "siglip": [SAME, {**SAME, "text_config": {**TEXTS, "projection_size": 32}, "id2label": LABELS}],
    "chinese_clip": [
        {"vision_config": IMAGES, "text_config": BERT_TEXTS, "projection_dim": 12},
        {"vision_config": {**IMAGES, "hidden_act": "gelu"}, "text_config": {**BERT_TEXTS, "num_hidden_layers": 1}, "projection_dim": 36},
    ],
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
