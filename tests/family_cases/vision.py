from __future__ import annotations

from typing import Any

LABELS = {0: "a", 1: "b", 2: "c"}
VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8,
}  # fmt: skip
DINO: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
BEIT: list[dict[str, Any]] = [
    {**VIT, "image_size": 24},
    {**VIT, "use_relative_position_bias": True, "use_mean_pooling": False},
    {
        **VIT, "use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0,
        "use_mask_token": True,
    },
]  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "vit": [
        VIT,
        {**VIT, "qkv_bias": False, "num_channels": 1, "encoder_stride": 8, "pooler_output_size": 24, "hidden_act": "relu", "id2label": LABELS},
    ],
    "deit": [VIT, {**VIT, "qkv_bias": False, "patch_size": 16, "id2label": LABELS}],
    "beit": [{**each, "vocab_size": 100} for each in BEIT],
    "data2vec-vision": BEIT,
    "dinov2": [DINO, {**DINO, "use_swiglu_ffn": True, "mlp_ratio": 3, "qkv_bias": False, "use_mask_token": False}],
    "dinov2_with_registers": [DINO, {**DINO, "use_swiglu_ffn": True, "num_register_tokens": 2, "id2label": LABELS}],
    "dinov3_vit": [VIT, {**VIT, "use_gated_mlp": True, "num_register_tokens": 4, "key_bias": True, "query_bias": False, "mlp_bias": False}],
    "ijepa": [VIT, {**VIT, "qkv_bias": False, "image_size": 24, "id2label": LABELS}],
    "vit_mae": [
        {**VIT, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3, "decoder_intermediate_size": 40},
        {
            **VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 20,
            "mask_ratio": 0.4, "qkv_bias": False,
        },
    ],
    "vit_msn": [VIT, {**VIT, "qkv_bias": False, "id2label": LABELS}],
    "yolos": [{**VIT, "image_size": [24, 40]}, {**VIT, "image_size": [32, 32], "num_detection_tokens": 7, "use_mid_position_embeddings": False}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
