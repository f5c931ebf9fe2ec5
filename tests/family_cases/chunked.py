from __future__ import annotations

from typing import Any

from family_cases.experts import TINY
from family_cases.recurrent import MAMBA

DUAL: dict[str, Any] = TINY | {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16, "num_hidden_layers": 2,
}  # fmt: skip
DELTA: dict[str, Any] = TINY | {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 16, "head_dim": 8,
}  # fmt: skip
NEMOTRON: dict[str, Any] = {name: value for name, value in TINY.items() if name != "num_hidden_layers"} | {
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "head_dim": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24}

CASES: dict[str, list[dict[str, Any]]] = {
    "mamba2": [
        MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
        MAMBA | {"num_heads": 6, "head_dim": 16, "expand": 3, "n_groups": 1, "chunk_size": 8, "use_bias": True, "use_conv_bias": False,
                 "conv_kernel": 3, "tie_word_embeddings": True},
    ],
    "bamba": [
        DUAL | {"attn_layer_indices": [1]},
        DUAL | {"attn_layer_indices": [0], "mamba_chunk_size": 7, "mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True,
                "mlp_bias": True, "tie_word_embeddings": True},
    ],
    "falcon_h1": [
        DUAL | {"mamba_d_ssm": 64},
        DUAL | {"mamba_d_ssm": None, "mamba_rms_norm": True, "projectors_bias": True, "mamba_proj_bias": True, "attention_bias": True,
                "mlp_bias": True, "mamba_n_groups": 1, "head_dim": 16, "mamba_conv_bias": False},
    ],
    "granitemoehybrid": [
        DUAL | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 20, "layer_types": ["mamba", "attention"]},
        DUAL | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 20, "layer_types": ["attention", "mamba"],
                "attention_bias": True, "tie_word_embeddings": True},
    ],
    "nemotron_h": [
        NEMOTRON | {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
        NEMOTRON | {"layers_block_type": ["moe", "mamba"], "moe_latent_size": 12, "mlp_bias": True, "use_bias": True, "use_conv_bias": False},
    ],
    "qwen3_next": [
        DELTA | ROUTED,
        DELTA | ROUTED | {"layer_types": None, "full_attention_interval": 2, "num_hidden_layers": 3, "attention_bias": True, "mlp_only_layers": [0],
                          "linear_conv_kernel_dim": 3, "linear_num_value_heads": 2},
    ],
    "qwen3_5_text": [DELTA, DELTA | {"layer_types": ["full_attention", "linear_attention"], "attention_bias": True, "tie_word_embeddings": True}],
    "qwen3_5_moe_text": [
        DELTA | ROUTED, DELTA | ROUTED | {"num_experts_per_tok": 1, "linear_num_key_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ],
}  # fmt: skip
"""model_type → changes that make its config tiny, one for each variant."""
