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

IDS: dict[str, Any] = {"vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO = IDS | {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 8,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
BLOOM = IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}
MPT = IDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
XGLM = IDS | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 64}
FALCON = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = IDS | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [GROUPED | TIED, WIDE | BIASED | {"mlp_bias": True}, BASE | LABELS | {"hidden_act": "gelu"}],
    "iquestcoder": [GROUPED],
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
    "gpt2": [GPT, GPT | UNTIED | LABELS | {"n_inner": 24, "activation_function": "relu"}],
    "gpt_bigcode": [GPT, GPT | UNTIED | {"multi_query": False, "n_inner": 24}],
    "gpt_neo": [NEO, NEO | UNTIED | {"intermediate_size": 24, "attention_types": [[["local"], 2]]}],
    "openai-gpt": [GPT, GPT | UNTIED | {"afn": "silu"}],
    "gptj": [GPT | {"rotary_dim": 4}, GPT | TIED | {"rotary_dim": 8, "n_inner": 24}],
    "codegen": [GPT | {"rotary_dim": 4}, GPT | TIED | {"n_inner": 24, "rotary_dim": 8}],
    "gpt_neox": [BASE, BASE | TIED | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5}],
    "gpt_neox_japanese": [
        BASE | {"intermediate_multiple_size": 2, "hidden_size": 32}, BASE | UNTIED | {"hidden_act": "relu", "num_hidden_layers": 3},
    ],
    "modernbert-decoder": [
        BASE | {"num_hidden_layers": 4, "local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
        BASE | UNTIED | BIASED | LABELS | {
            "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "decoder_bias": False, "cls_token_id": 1, "sep_token_id": 2,
        },
    ],
    "bloom": [BLOOM, BLOOM | UNTIED | {"apply_residual_connection_post_layernorm": True}],
    "mpt": [MPT, MPT | UNTIED],
    "qwen": [],  # not of transformers: its published counts are in tests/test_decoders.py
    "xglm": [XGLM, XGLM | UNTIED | {"activation_function": "relu"}],
    "biogpt": [BASE, BASE | UNTIED | LABELS | {"hidden_act": "relu"}],
    "ctrl": [GPT | {"dff": 24}, GPT | UNTIED | {"dff": 40}],
    "phi": [GROUPED, BASE | {"num_key_value_heads": 4, "qk_layernorm": True} | LABELS],
    "persimmon": [BASE, BASE | TIED | {"qk_layernorm": False}],
    "starcoder2": [GROUPED, GROUPED | UNTIED | {"use_bias": False, "sliding_window": 8}],
    "cohere": [GROUPED, GROUPED | UNTIED | BIASED | {"use_qk_norm": True}],
    "cohere2": [GROUPED | {"sliding_window": 8}, GROUPED | UNTIED | BIASED | SLIDING],
    "nemotron": [GROUPED | {"head_dim": 8}, WIDE | BIASED | TIED | {"mlp_bias": True}],
    "jais2": [GROUPED, WIDE | TIED | {"attention_bias": False, "mlp_bias": False}],
    "nanochat": [GROUPED, GROUPED | TIED | BIASED],
    "gemma3_text": [WIDE | {"sliding_window": 8, "num_hidden_layers": 6}, GROUPED | UNTIED | BIASED | SLIDING | {"head_dim": 8}],
    "granite_swa": [GROUPED | {"sliding_window": 8}, GROUPED | UNTIED | BIASED | SLIDING | {"mlp_bias": True}],
    "falcon": [
        FALCON, FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True, "num_kv_heads": 4},
        FALCON | UNTIED | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 24},
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ],
    "opt": [OPT, OPT | UNTIED | {"enable_bias": False, "word_embed_proj_dim": 16, "do_layer_norm_before": False}],
    "stablelm": [GROUPED, GROUPED | TIED | {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}],
    "hyperclovax": [GROUPED | {"head_dim": 8}, WIDE | TIED | BIASED | {"mlp_bias": True, "use_post_norm": False}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
