"""Tiny decoders: each family with what its config can change about it."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 12, "num_key_value_heads": 1}
BIASED = {"attention_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LABELS = {"num_labels": 5}

CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [GROUPED | TIED, WIDE | BIASED | {"mlp_bias": True}, BASE | LABELS | {"hidden_act": "gelu"}],
    "internlm3": [GROUPED, WIDE | BIASED | {"mlp_bias": True}],
    "mistral": [GROUPED | {"sliding_window": 8}, WIDE | TIED | {"sliding_window": None}],
    "ministral": [GROUPED | SLIDING | {"head_dim": 8}, WIDE | TIED],
    "ministral3": [GROUPED | {"head_dim": 8}, WIDE | TIED | {"sliding_window": 8}],
    "qwen2": [GROUPED, GROUPED | TIED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}],
    "qwen3": [WIDE, WIDE | BIASED | TIED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}],
    "gemma": [WIDE, GROUPED | BIASED | UNTIED | {"head_dim": 8}],
    "gemma2": [WIDE | {"sliding_window": 8}, GROUPED | BIASED | UNTIED | {"head_dim": 8, "final_logit_softcapping": None}],
    "vaultgemma": [WIDE | {"sliding_window": 8}, GROUPED | BIASED | {"head_dim": 8}],
    "phi3": [GROUPED, BASE | TIED | {"sliding_window": 8}],
    "smollm3": [GROUPED, GROUPED | BIASED | UNTIED | {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [0, 1], "mlp_bias": True}],
    "granite": [GROUPED, GROUPED | BIASED | TIED | {"mlp_bias": True}],
    "cwm": [GROUPED | {"head_dim": 8, "sliding_window": 8}, WIDE | TIED],
    "helium": [BASE | {"num_key_value_heads": 4, "head_dim": 8}, GROUPED | BIASED | TIED | {"mlp_bias": True, "head_dim": 8}],
    "ernie4_5": [WIDE, GROUPED | UNTIED | {"use_bias": True, "head_dim": 8}],
    "seed_oss": [WIDE, GROUPED | TIED | {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 8}],
    "hunyuan_v1_dense": [GROUPED | {"head_dim": 8}, WIDE | BIASED | TIED],
    "arcee": [GROUPED | {"head_dim": 8}, WIDE | BIASED | TIED | {"mlp_bias": True}],
    "apertus": [GROUPED, GROUPED | BIASED | TIED],
    "bitnet": [GROUPED, GROUPED | BIASED | TIED],
    "olmo": [GROUPED, BASE | BIASED | TIED | {"clip_qkv": 4.0}],
    "olmo2": [GROUPED, BASE | BIASED | TIED],
    "olmo3": [GROUPED | {"sliding_window": 8}, BASE | BIASED | TIED | SLIDING],
    "exaone4": [GROUPED | {"sliding_window": 8}, BASE | TIED | SLIDING | {"num_key_value_heads": 4}],
    "glm": [GROUPED | {"head_dim": 8}, WIDE | TIED | {"attention_bias": False}],
    "glm4": [GROUPED | {"head_dim": 8}, WIDE | TIED | {"attention_bias": False}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
