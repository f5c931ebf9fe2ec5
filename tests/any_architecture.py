"""Tiny random models of sixteen architectures, each with inputs to calibrate by: the contract of every method that changes weights runs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB, LENGTH = 64, 16
TEXT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
GQA: dict[str, Any] = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
BERT: dict[str, Any] = TEXT | {"max_position_embeddings": 64}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA | {"tie_word_embeddings": True}),
    "qwen": ("Qwen3Config", "Qwen3ForCausalLM", GQA | {"head_dim": 16}),
    "gemma": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        GQA | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", GQA | {"head_dim": 16, "sliding_window": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", GQA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", BERT),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "mamba": (
        "MambaConfig", "MambaForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 16},
    ),
    "bert": ("BertConfig", "BertModel", BERT),
    "roberta": ("RobertaConfig", "RobertaModel", BERT | {"pad_token_id": 1}),
    "distilbert": (
        "DistilBertConfig", "DistilBertModel",
        {"vocab_size": VOCAB, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
    ),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "d_ff": 128, "decoder_start_token_id": 0},
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ | {"max_position_embeddings": 64}),
    "vit": (
        "ViTConfig", "ViTModel",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 16, "patch_size": 4},
    ),
    "whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        SEQ2SEQ | {
            "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 3, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "begin_suppress_tokens": None, "suppress_tokens": None,
        },
    ),
}  # fmt: skip
"""The issue's list: name → config class, model class, sizes."""

FUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama4": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        GQA | {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 16, "pad_token_id": 0},
    ),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        GQA | {
            "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip
"""Experts of a layer in one tensor."""


def save_architecture(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A model folder of random weights, spread widely enough that tokens differ."""
    config_class, model_class, sizes = (ARCHITECTURES | FUSED)[name]
    config = getattr(transformers, config_class)(architectures=[model_class], **(sizes | changes))
    config.initializer_range = 0.15
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def calibration(name: str, rows: int = 8) -> Callable[[int], list[dict[str, np.ndarray[Any, Any]]]]:
    """Random inputs of the kind that an architecture takes."""
    draw = np.random.default_rng(7)
    if name == "vit":
        batch: dict[str, Any] = {"pixel_values": draw.standard_normal((rows, 3, 16, 16)).astype(np.float32)}
    elif name == "whisper":
        batch = {
            "input_features": draw.standard_normal((rows, 16, 32)).astype(np.float32),
            "decoder_input_ids": draw.integers(4, VOCAB, (rows, LENGTH)),
        }
    else:
        batch = {"input_ids": draw.integers(4, VOCAB, (rows, LENGTH))}
    return lambda tokens: [batch]
