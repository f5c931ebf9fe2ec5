"""Tiny encoder-decoders of T5's and BART's kin."""

from __future__ import annotations

from typing import Any

T5: dict[str, Any] = {
    "vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
T5_CASES: list[dict[str, Any]] = [
    T5 | {"feed_forward_proj": "relu"},
    T5 | {
        "num_decoder_layers": 3, "d_kv": 6, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 16, "tie_word_embeddings": False,
    },
    T5 | {"num_decoder_layers": 1, "feed_forward_proj": "gated-silu", "num_heads": 2},
]  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 320, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
UNTIED: dict[str, Any] = BART | {
    "tie_word_embeddings": False, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 8,
    "decoder_ffn_dim": 40, "activation_function": "relu",
}  # fmt: skip
BOTH = [BART, UNTIED]

CASES: dict[str, list[dict[str, Any]]] = {
    "pegasus": BOTH,
    "marian": [*BOTH, UNTIED | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 200}],
    "blenderbot": BOTH,
    "blenderbot-small": BOTH,
    "m2m_100": BOTH,
}  # fmt: skip
"""model_type → changes that make its config tiny."""

NEEDS_VALUES: dict[str, list[dict[str, Any]]] = {
    "t5": T5_CASES,
    "mt5": T5_CASES,
    "umt5": T5_CASES,
    "bart": BOTH,
    "mvp": BOTH,
    "plbart": BOTH,
    "mbart": BOTH,
    "switch_transformers": [
        T5 | {"num_experts": 4, "num_layers": 4, "num_decoder_layers": 3, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 3},
        T5 | {"num_experts": 3, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 1, "router_bias": True, "dense_act_fn": "gelu"},
    ],
}  # fmt: skip
"""Classifiers look for the end of each sequence, experts for their tokens: tests/test_encoders.py runs these models on real tensors."""
CASES |= {model_type: [] for model_type in NEEDS_VALUES}
