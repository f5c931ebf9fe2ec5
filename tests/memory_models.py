"""Small configs with real proportions, one for each kind of model whose memory is held against a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

_NAMES = {
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "distilbert": "DistilBertForMaskedLM", "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "mixtral": "MixtralForCausalLM", "mamba": "MambaForCausalLM", "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "vit": "ViTForImageClassification", "clip": "CLIPModel", "whisper": "WhisperForConditionalGeneration",
}  # fmt: skip


def _shapes(width: int, layers: int) -> dict[str, dict[str, Any]]:
    """model_type → its config's own names for a width, with 64 values a head, and so many layers."""
    heads, ffn, vocab = width // 64, 4 * width, 60 * width
    encoder = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn}
    decoder = encoder | {"num_key_value_heads": max(1, heads // 2), "intermediate_size": 8 * width // 3, "tie_word_embeddings": True}
    both = {
        "vocab_size": vocab, "d_model": width, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads, "encoder_ffn_dim": ffn, "decoder_ffn_dim": ffn,
    }  # fmt: skip
    image = {k: v for k, v in encoder.items() if k != "vocab_size"} | {"image_size": 224, "patch_size": 16}
    return {
        "bert": encoder,
        "roberta": encoder | {"max_position_embeddings": 1026},
        "distilbert": {"vocab_size": vocab, "dim": width, "n_layers": layers, "n_heads": heads, "hidden_dim": ffn, "max_position_embeddings": 1024},
        "gpt2": {"vocab_size": vocab, "n_embd": width, "n_layer": layers, "n_head": heads},
        "opt": {
            "vocab_size": vocab,
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "ffn_dim": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        },
        "llama": decoder,
        "qwen2": decoder,
        "qwen3": decoder | {"head_dim": 64},
        "gemma": decoder | {"num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 8 * width},
        "gemma2": decoder | {"head_dim": 128, "sliding_window": 64},
        "mixtral": decoder | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 3 * width},
        "mamba": {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers},
        "t5": {
            "vocab_size": vocab,
            "d_model": width,
            "d_kv": 64,
            "d_ff": ffn,
            "num_layers": layers,
            "num_decoder_layers": layers,
            "num_heads": heads,
        },
        "bart": both,
        "vit": image,
        "clip": {
            "text_config": encoder | {"max_position_embeddings": 1024},
            "vision_config": image | {"image_size": 112},
            "projection_dim": width,
        },
        "whisper": both | {"max_source_positions": 200, "max_target_positions": 1024},
    }


NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
"""Defaults lie beyond a small vocabulary."""


def memory_config(model_type: str, *, width: int = 128, layers: int = 2, **changes: Any) -> PretrainedConfig:
    """The config of a model of one kind."""
    tokens = {} if model_type in ("vit", "clip") else dict(NO_TOKENS)
    config: PretrainedConfig = AutoConfig.for_model(model_type, **(tokens | _shapes(width, layers)[model_type] | changes))
    config.architectures = [_NAMES[model_type]]
    return config


MEMORY_MODELS: dict[str, Callable[..., PretrainedConfig]] = {name: lambda name=name, **options: memory_config(name, **options) for name in _NAMES}  # type: ignore[misc]
