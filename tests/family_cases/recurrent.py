from __future__ import annotations

from typing import Any

from family_cases.experts import EXPERTS, TINY

MAMBA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
JAMBA: dict[str, Any] = EXPERTS | {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_state": 8,
    "num_hidden_layers": 3,
}
RWKV: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
CONVOLVED: dict[str, Any] = TINY | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}

CASES: dict[str, list[dict[str, Any]]] = {
    "mamba": [
        MAMBA,
        MAMBA | {"expand": 3, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_rank": 5, "tie_word_embeddings": False},
    ],
    "falcon_mamba": [MAMBA, MAMBA | {"use_bias": True, "use_conv_bias": False, "hidden_act": "gelu", "tie_word_embeddings": False}],
    "jamba": [
        JAMBA, JAMBA | {"mamba_expand": 3, "mamba_dt_rank": 6, "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
        JAMBA | {"num_experts": 1, "num_experts_per_tok": 1},
    ],
    "lfm2": [
        CONVOLVED,
        TINY | {"full_attn_idxs": [0], "conv_bias": True, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False, "conv_L_cache": 4},
        CONVOLVED | {"block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3},
    ],
    "lfm2_moe": [
        CONVOLVED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_dense_layers": 1},
        CONVOLVED | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 20, "num_dense_layers": 0, "use_expert_bias": False,
                     "conv_bias": True, "tie_word_embeddings": False},
    ],
    "recurrent_gemma": [
        TINY | {"num_hidden_layers": 3, "lru_width": 40},
        TINY | {"num_hidden_layers": 4, "block_types": ["attention", "recurrent"], "attention_window_size": 8, "attention_bias": True,
                "tie_word_embeddings": False, "num_key_value_heads": 1},
    ],
    "rwkv": [
        RWKV,
        RWKV | {"num_hidden_layers": 3, "attention_hidden_size": 40, "intermediate_size": 56, "tie_word_embeddings": True},
    ],
}  # fmt: skip
"""model_type → changes that make its config tiny, one for each variant."""
