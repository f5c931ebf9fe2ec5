from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT: dict[str, Any] = TINY | {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10, "head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROUTED: dict[str, Any] = TINY | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
LOCAL: dict[str, Any] = TINY | {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: dict[str, Any] = TINY | {"num_experts": 4, "num_experts_per_tok": 2}

ERNIE: dict[str, Any] = TINY | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 20}

INDEXED: dict[str, Any] = LATENT | {"index_n_heads": 3, "index_head_dim": 16}

CASES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [LOCAL, LOCAL | {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 8, "num_experts_per_tok": 1}],
    "qwen2_moe": [
        EXPERTS | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 24},
        EXPERTS | {"num_hidden_layers": 3, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24, "qkv_bias": False,
                   "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "hidden_act": "gelu"},
    ],
    "qwen3_moe": [
        EXPERTS | {"moe_intermediate_size": 20, "head_dim": 16},
        EXPERTS | {"moe_intermediate_size": 20, "head_dim": 8, "attention_bias": True, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ],
    "olmoe": [EXPERTS | {"num_key_value_heads": 4}, EXPERTS | {"attention_bias": True, "tie_word_embeddings": True}],
    "flex_olmo": [EXPERTS, EXPERTS | {"attention_bias": True, "num_key_value_heads": 1}],
    "deepseek_v2": [
        LATENT | {"first_k_dense_replace": 1},
        LATENT | {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3, "first_k_dense_replace": 1,
                  "n_shared_experts": 3},
    ],
    "deepseek_v3": [
        LATENT | {"first_k_dense_replace": 1},
        LATENT | {"first_k_dense_replace": 0, "q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2, "tie_word_embeddings": True},
    ],
    "glm4_moe": [
        ROUTED | {"first_k_dense_replace": 1},
        ROUTED | {"first_k_dense_replace": 0, "attention_bias": True, "use_qk_norm": True, "n_shared_experts": 2},
    ],
    "glm4_moe_lite": [LATENT, LATENT | {"mlp_layer_types": ["sparse", "dense"], "attention_bias": True, "q_lora_rank": None}],
    "dots1": [
        ROUTED | {"first_k_dense_replace": 1, "n_shared_experts": 1},
        ROUTED | {"first_k_dense_replace": 1, "n_shared_experts": 2, "attention_bias": True, "sliding_window": 8, "max_window_layers": 1},
    ],
    "gpt_oss": [LOCAL | {"head_dim": 8}, LOCAL | {"head_dim": 16, "sliding_window": 8, "attention_bias": False, "num_hidden_layers": 3}],
    "granitemoeshared": [LOCAL | {"shared_intermediate_size": 20}, LOCAL | {"shared_intermediate_size": 0, "attention_bias": True}],
    "phimoe": [LOCAL, LOCAL | {"attention_bias": True, "lm_head_bias": True, "sliding_window": 8}],
    "llama4_text": [
        LOCAL | {"head_dim": 8, "intermediate_size_mlp": 40, "num_experts_per_tok": 1},
        LOCAL | {"head_dim": 8, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_bias": True,
                 "use_qk_norm": False, "attention_chunk_size": 8, "num_hidden_layers": 3},
    ],
    "minimax_m2": [LOCAL | {"head_dim": 16}, LOCAL | {"head_dim": 8, "tie_word_embeddings": True}],
    "ernie4_5_moe": [
        ERNIE,
        ERNIE | {"num_hidden_layers": 4, "moe_layer_interval": 2, "moe_layer_end_index": 2, "moe_num_shared_experts": 0, "use_bias": True,
                 "tie_word_embeddings": False},
    ],
    "afmoe": [
        EXPERTS | {"moe_intermediate_size": 20, "num_dense_layers": 1, "head_dim": 8},
        EXPERTS | {"moe_intermediate_size": 20, "num_dense_layers": 0, "head_dim": 16, "num_shared_experts": 1, "attention_bias": True,
                   "global_attn_every_n_layers": 2, "sliding_window": 8, "num_hidden_layers": 3},
    ],
    "solar_open": [ROUTED, ROUTED | {"attention_bias": True, "n_shared_experts": 2, "tie_word_embeddings": True}],
    "exaone_moe": [
        EXPERTS | {"moe_intermediate_size": 20, "head_dim": 8, "first_k_dense_replace": 1},
        EXPERTS | {"moe_intermediate_size": 20, "head_dim": 16, "first_k_dense_replace": 0, "num_shared_experts": 2, "sliding_window": 8,
                   "sliding_window_pattern": 2},
    ],
    "hunyuan_v1_moe": [
        EXPERTS | {"moe_topk": 2, "head_dim": 8}, EXPERTS | {"moe_topk": [1, 1], "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ],
    "mellum": [
        EXPERTS | {"moe_intermediate_size": 20, "head_dim": 8},
        EXPERTS | {"moe_intermediate_size": 20, "head_dim": 16, "attention_bias": True, "mlp_layer_types": ["sparse", "dense"],
                   "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ],
    "hy_v3": [
        LOCAL | {"moe_intermediate_size": 20, "head_dim": 8},
        LOCAL | {"moe_intermediate_size": 20, "head_dim": 8, "attention_bias": True, "mlp_bias": True, "mlp_layer_types": ["sparse", "dense"]},
    ],
    "granitemoe_swa": [
        LOCAL,
        LOCAL | {"attention_bias": True, "tie_word_embeddings": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ],
    "deepseek_v32": [
        INDEXED | {"mlp_layer_types": ["dense", "sparse"]},
        INDEXED | {"mlp_layer_types": ["sparse", "sparse"], "attention_bias": True, "n_shared_experts": 2, "tie_word_embeddings": True},
    ],
    "axk1": [LATENT, LATENT | {"mlp_layer_types": ["sparse", "dense"], "n_shared_experts": 2, "attention_bias": True}],
    "mimo_v2_flash": [
        ROUTED | {"v_head_dim": 10, "sliding_window": 8},
        ROUTED | {"v_head_dim": 6, "sliding_window": 8, "num_key_value_heads": 1, "attention_bias": True, "mlp_layer_types": ["sparse", "sparse"],
                  "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
    ],
    "minicpm3": [LATENT, LATENT | {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": False}],
    "youtu": [LATENT, LATENT | {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": False}],
    "granitemoe": [LOCAL, LOCAL | {"attention_bias": True, "tie_word_embeddings": True}],
}  # fmt: skip
"""model_type → changes that make its config tiny, one for each variant."""
