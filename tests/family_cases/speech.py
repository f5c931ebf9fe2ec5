from __future__ import annotations

from typing import Any

LABELS = {0: "a", 1: "b", 2: "c"}
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40, "vocab_size": 99, "max_source_positions": 20, "max_target_positions": 30, "pad_token_id": 1, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
MOONSHINE: dict[str, Any] = {
    "hidden_size": 32, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 3, "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 30,
}  # fmt: skip
AST: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8, "max_length": 64,
    "num_mel_bins": 32,
}  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "whisper": [
        {**BART, "num_mel_bins": 16},
        {
            **BART, "num_mel_bins": 8, "tie_word_embeddings": False, "use_weighted_layer_sum": True, "classifier_proj_size": 24,
            "activation_function": "relu", "id2label": LABELS,
        },
    ],
    "speech_to_text": [
        {**BART, "input_feat_per_channel": 16, "conv_channels": 24},
        {
            **BART, "input_feat_per_channel": 8, "input_channels": 2, "conv_channels": 24, "num_conv_layers": 3, "conv_kernel_sizes": [5, 3, 4],
            "max_source_positions": 41, "tie_word_embeddings": False,
        },
    ],
    "moonshine": [
        MOONSHINE,
        {**MOONSHINE, "attention_bias": True, "tie_word_embeddings": False, "pad_head_dim_to_multiple_of": 5, "encoder_hidden_act": "relu"},
    ],
    "audio-spectrogram-transformer": [AST, {**AST, "time_stride": 7, "frequency_stride": 5, "qkv_bias": False, "id2label": LABELS}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
