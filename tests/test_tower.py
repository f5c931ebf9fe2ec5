"""What the formulas of image and audio models refuse, and what they say then."""

from __future__ import annotations

from typing import Any

import pytest

from lighten.errors import ModelError
from lighten.model.families import describe

VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SWIN = {"model_type": "swin", "depths": [1, 1], "num_heads": [2, 4]}
WHISPER = {
    "model_type": "whisper", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
}  # fmt: skip

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "vit"}, "ViTModel", "hidden_size is missing, num_hidden_layers is missing, num_attention_heads is missing, intermediate_size is"),
    ({**VIT, "hidden_size": -32}, "ViTModel", "hidden_size=-32"),
    ({**VIT, "num_attention_heads": 5}, "ViTModel", "hidden_size=32 is not a multiple of num_attention_heads=5"),
    ({**VIT, "num_hidden_layers": 10**9}, "ViTModel", "num_hidden_layers=1000000000 is more than 10000"),
    ({**VIT, "image_size": 8}, "ViTModel", "image_size=8 is smaller than patch_size=16"),
    ({**VIT, "image_size": [8, 8, 8]}, "ViTModel", "neither a positive whole number nor two of them"),
    ({**VIT, "qkv_bias": "yes"}, "ViTModel", "qkv_bias='yes' is neither true, false nor a number"),
    ({**VIT, "hidden_act": "magic"}, "ViTModel", "'magic' is not known"),
    ({**VIT, "id2label": 3}, "ViTForImageClassification", "id2label is not a table"),
    ({**VIT, "model_type": "dinov2", "mlp_ratio": -1}, "Dinov2Model", "mlp_ratio=-1 is not a ratio"),
    ({**VIT, "model_type": "yolos", "num_detection_tokens": -1}, "YolosModel", "num_detection_tokens=-1 is not a whole number"),
    ({"model_type": "swin", "depths": 3}, "SwinModel", "needs lists of positive whole numbers; found: depths=3, num_heads is missing"),
    ({**SWIN, "depths": [2, 2, 2]}, "SwinModel", "depths, num_heads must be equally long"),
    ({**SWIN, "patch_size": 500}, "SwinModel", "image_size=224 is smaller than patch_size=500"),
    ({**SWIN, "mlp_ratio": 0}, "SwinModel", "mlp_ratio=0 is not a ratio"),
    ({**SWIN, "model_type": "swinv2", "use_absolute_embeddings": True}, "Swinv2Model", "use_absolute_embeddings=True cannot be added"),
    ({"model_type": "convnext", "num_stages": 3}, "ConvNextModel", "num_stages=3 and 4 depths"),
    ({"model_type": "convnext", "image_size": 8}, "ConvNextModel", "smaller than a kernel of 2"),
    ({"model_type": "clip", "vision_config": 3}, "CLIPForImageClassification", "vision_config=3 is not a table"),
    ({**WHISPER, "max_source_positions": 0}, "WhisperModel", "max_source_positions=0"),
    ({**WHISPER, "dropout": 2}, "WhisperModel", "dropout=2 is not a number from 0 to 1"),
    ({"model_type": "speech_to_text", "d_model": 32, "conv_kernel_sizes": []}, "Speech2TextModel", "conv_kernel_sizes=\\[\\] is not a list"),
    ({**VIT, "model_type": "audio-spectrogram-transformer", "max_length": 4}, "ASTModel", "128 × 4 is smaller than patch_size"),
    ({**VIT, "model_type": "vivit", "tubelet_size": [2, 16]}, "VivitModel", "tubelet_size=\\[2, 16\\] is not three positive whole numbers"),
    ({**VIT, "model_type": "vivit", "num_frames": 1}, "VivitModel", "1 frames of \\[224, 224\\] hold no tubelet of 2 × 16 × 16"),
    ({"model_type": "imagegpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "add_cross_attention": True},
     "ImageGPTModel", "add_cross_attention=True needs another model"),
    ({"model_type": "imagegpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "tie_word_embeddings": True},
     "ImageGPTForCausalImageModeling", "tie_word_embeddings=True ties"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "architecture", "says"), REFUSED, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_config_that_no_model_has_is_one_line(config, architecture, says):
    with pytest.raises(ModelError, match=says) as raised:
        describe(config, architecture)
    assert "\n" not in str(raised.value)
