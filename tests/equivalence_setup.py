"""Tiny models of many families, and linears whose inputs have outliers, for the tests of what changes a model without changing its function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lighten.compress.awq import Consumer
from lighten.compress.mappings import Channels
from lighten.compress.rtn import quantize_rtn
from lighten.compress.statistics import Moments

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 0,
}  # fmt: skip
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 16, "patch_size": 8}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64}

DEEPSEEK = BASE | {
    "num_key_value_heads": 4, "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip

LLAMA_LIKE = [
    "input_layernorm > q_proj k_proj v_proj", "v_proj > o_proj", "post_attention_layernorm > gate_proj up_proj", "up_proj > down_proj",
]  # fmt: skip
GEMMA_LIKE = ["input_layernorm > q_proj k_proj v_proj", "v_proj > o_proj", "pre_feedforward_layernorm > gate_proj up_proj", "up_proj > down_proj"]
T5_ATTENTION = ["SelfAttention.v > SelfAttention.o", "EncDecAttention.v > EncDecAttention.o"]
BART_VALUES = ["self_attn.v_proj > self_attn.out_proj", "encoder_attn.v_proj > encoder_attn.out_proj"]

FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}, [*LLAMA_LIKE, "norm > lm_head"]),
    "llama tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, [*LLAMA_LIKE, "norm > lm_head"]),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 12}, [*LLAMA_LIKE, "norm > lm_head"]),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}, GEMMA_LIKE),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": False}, [*GEMMA_LIKE, "norm > lm_head"]),
    "mistral": ("MistralForCausalLM", GROUPED, [*LLAMA_LIKE, "norm > lm_head"]),
    "phi": ("PhiForCausalLM", GROUPED, ["input_layernorm > q_proj k_proj v_proj fc1", "v_proj > dense", "final_layernorm > lm_head"]),
    "phi3": (
        "Phi3ForCausalLM", GROUPED,
        ["input_layernorm > qkv_proj", "qkv_proj > o_proj", "post_attention_layernorm > gate_up_proj", "gate_up_proj > down_proj", "norm > lm_head"],
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, ["ln_1 > c_attn", "c_attn > c_proj", "ln_2 > c_fc"]),
    "gpt2 relu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu"}, ["ln_1 > c_attn", "c_attn > c_proj", "ln_2 > c_fc", "c_fc > c_proj"]),
    "gpt_neox": (
        "GPTNeoXForCausalLM", BASE,
        ["input_layernorm > query_key_value", "query_key_value > dense", "post_attention_layernorm > dense_h_to_4h", "final_layer_norm > lm_head"],
    ),
    "mixtral": (
        "MixtralForCausalLM", GROUPED | MOE,
        [*LLAMA_LIKE[:2], "post_attention_layernorm > gate gate_up_proj gate_up_proj gate_up_proj", "gate_up_proj > down_proj", "norm > lm_head"],
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM", DEEPSEEK,
        [
            "input_layernorm > q_a_proj kv_a_proj_with_mqa", "q_a_layernorm > q_b_proj", "kv_a_layernorm > kv_b_proj", "kv_b_proj > o_proj",
            "post_attention_layernorm > gate_proj up_proj", "up_proj > down_proj", "gate_up_proj > down_proj", "norm > lm_head",
            "post_attention_layernorm > gate gate_up_proj gate_up_proj gate_up_proj gate_proj up_proj",
        ],
    ),
    "mamba": ("MambaForCausalLM", MAMBA, ["norm > in_proj", "x_proj > dt_proj", "x_proj D > out_proj"]),
    "bert": ("BertModel", BASE, ["self.value > output.dense"]),
    "roberta": ("RobertaModel", BASE, ["self.value > output.dense"]),
    "distilbert": ("DistilBertModel", DISTIL, ["v_lin > out_lin"]),
    "t5": ("T5ForConditionalGeneration", T5, [*T5_ATTENTION, "wi > wo", "layer_norm > q", "layer_norm > wi", "layer_norm > q k v"]),
    "t5 gated": (
        "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"},
        [*T5_ATTENTION, "wi_1 > wo", "layer_norm > q", "layer_norm > wi_0 wi_1", "layer_norm > q k v"],
    ),
    "bart": ("BartForConditionalGeneration", BART, BART_VALUES),
    "vit": ("ViTModel", VIT, ["layernorm_before > q_proj k_proj v_proj", "v_proj > o_proj", "layernorm_after > fc1"]),
    "whisper": (
        "WhisperForConditionalGeneration", WHISPER,
        [*BART_VALUES, "self_attn_layer_norm > q_proj k_proj v_proj", "encoder_attn_layer_norm > q_proj", "final_layer_norm > fc1"],
    ),
}  # fmt: skip
"""Family → its class, a tiny config, and every mapping that it has, by the last names of the modules."""


def config_of(family: str) -> tuple[Any, str]:
    architecture, fields, _ = FAMILIES[family]
    config = getattr(transformers, architecture).config_class(**fields)
    config.architectures = [architecture]
    return config, architecture


def module_of(family: str, *, dtype: torch.dtype = torch.float64) -> Any:
    """A module of random weights, norms far from 1 and biases far from 0."""
    config, architecture = config_of(family)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    torch.manual_seed(0)
    module = getattr(transformers, architecture)(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return module


def outputs(module: Any) -> list[torch.Tensor]:
    takes = inspect.signature(module.forward).parameters
    torch.manual_seed(1)
    dtype = next(module.parameters()).dtype
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    inputs |= {name: torch.randint(3, 60, (2, length)) for name, length in (("input_ids", 7), ("decoder_input_ids", 5)) if name in takes}
    shapes = {"pixel_values": (2, 3, 16, 16), "input_features": (2, 8, 32)}
    inputs |= {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items() if name in takes}
    with torch.no_grad():
        out = module(**inputs)
    return [leaf for leaf in tree_leaves(tuple(out.values())) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest change of an output, relative to its largest value."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


COLUMNS = 32


def inputs(*, rows: int = 200, seed: int = 0, outliers: tuple[int, ...] = (3, 17), size: float = 30.0) -> Tensor:
    """[rows, COLUMNS] correlated rows, some columns far larger than the rest."""
    torch.manual_seed(seed)
    x = torch.randn(rows, COLUMNS) @ (torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS))
    x[:, list(outliers)] *= size
    return x


def rounder(bits: int, group_size: int, *, symmetric: bool = True) -> Callable[[Tensor], Tensor]:
    return lambda weight: quantize_rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric).dequantize()


def consumer(
    x: Tensor, *, outputs: int = 24, bits: int = 4, group_size: int = 16, held_out: Tensor | None = None, channel: Tensor | None = None, seed: int = 1
) -> Consumer:
    """A random linear that reads `x`; by default each column is a channel of its own."""
    torch.manual_seed(seed)
    moments = Moments(x.shape[-1])
    moments.add(x)
    if held_out is not None:
        moments.add(held_out, held_out=True)
    end = Channels(name=f"linear{seed}", axis=-1, channel=torch.arange(x.shape[-1]) if channel is None else channel)
    return Consumer(end=end, weight=torch.randn(outputs, x.shape[-1]), statistics=moments.finish(), round_to=rounder(bits, group_size))
