from __future__ import annotations

from typing import Any

IMAGES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 99, "max_position_embeddings": 30,
    "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "blip": [
        {"vision_config": IMAGES, "text_config": TEXTS},
        {"vision_config": {**IMAGES, "hidden_act": "relu"}, "text_config": {**TEXTS, "num_attention_heads": 4}, "image_text_hidden_size": 20},
        {"vision_config": IMAGES, "text_config": TEXTS, "tie_word_embeddings": False},
        {"vision_config": IMAGES, "text_config": {**TEXTS, "tie_word_embeddings": False}, "tie_word_embeddings": False},
    ],
    "blip_vision_model": [IMAGES, {**IMAGES, "hidden_act": "relu", "image_size": 24}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
