"""GGUF files of tiny models, written with the `gguf` package: its own names of tensors and metadata keys, no weights but zeros."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from transformers import AutoConfig

_SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 256,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = _SIZES | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_FALCON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
}
_T5 = {"vocab_size": 96, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128}

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", "LlamaForCausalLM", _GROUPED),
    "llama-biases": ("llama", "llama", "LlamaForCausalLM", _WIDE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("llama", "mixtral", "MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "qwen2", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("qwen3", "qwen3", "Qwen3ForCausalLM", _WIDE),
    "gemma": ("gemma", "gemma", "GemmaForCausalLM", _WIDE),
    "gemma2": ("gemma2", "gemma2", "Gemma2ForCausalLM", _WIDE | {"sliding_window": 64}),
    "gemma3": ("gemma3", "gemma3_text", "Gemma3ForCausalLM", _WIDE | {"sliding_window": 64}),
    "phi2": ("phi2", "phi", "PhiForCausalLM", _GROUPED),
    "phi3": ("phi3", "phi3", "Phi3ForCausalLM", _GROUPED | {"pad_token_id": 0}),
    "gpt2": ("gpt2", "gpt2", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 256}),
    "falcon-7b": ("falcon", "falcon", "FalconForCausalLM", _FALCON | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon-40b": ("falcon", "falcon", "FalconForCausalLM", _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "stablelm": ("stablelm", "stablelm", "StableLmForCausalLM", _GROUPED | {"use_qkv_bias": True}),
    "starcoder2": ("starcoder2", "starcoder2", "Starcoder2ForCausalLM", _GROUPED),
    "qwen2moe": ("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 96}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _WIDE | _EXPERTS),
    "deepseek-v2": ("deepseek2", "deepseek_v2", "DeepseekV2ForCausalLM", _LATENT | {"n_shared_experts": 2}),
    "deepseek-v3": ("deepseek2", "deepseek_v3", "DeepseekV3ForCausalLM", _LATENT | {"n_shared_experts": 1}),
    "granite": ("granite", "granite", "GraniteForCausalLM", _GROUPED),
    "smollm3": ("smollm3", "smollm3", "SmolLM3ForCausalLM", _GROUPED | {"pad_token_id": 0}),
    "olmo": ("olmo", "olmo", "OlmoForCausalLM", _GROUPED),
    "olmo2": ("olmo2", "olmo2", "Olmo2ForCausalLM", _GROUPED),
    "olmoe": ("olmoe", "olmoe", "OlmoeForCausalLM", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "nemotron": ("nemotron", "nemotron", "NemotronForCausalLM", _GROUPED),
    "command-r": ("command-r", "cohere", "CohereForCausalLM", _GROUPED),
    "bloom": ("bloom", "bloom", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gptneox": ("gptneox", "gpt_neox", "GPTNeoXForCausalLM", _SIZES),
    "bert": ("bert", "bert", "BertModel", _SIZES),
    "t5": ("t5", "t5", "T5ForConditionalGeneration", _T5 | {"num_decoder_layers": 3}),
    "t5-gated": ("t5", "t5", "T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mamba": ("mamba", "mamba", "MambaForCausalLM", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}),
}  # fmt: skip
"""Case → (architecture of GGUF, model_type, class, config fields)."""


def write(case: str, path: Path, *, extra: dict[str, tuple[int, ...]] | None = None, without: str = "", kind: Type | None = None) -> tuple[int, int]:
    """Write a case's file; (parameters of the module that transformers builds, bytes of the tensors written).

    Args:
        extra: further tensors of float32 and their shapes.
        without: a tensor that is left out.
        kind: the type of all matrices.
    """
    arch, model_type, architecture, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        module = getattr(transformers, architecture)(config)
    writer = GGUFWriter(path, arch)
    _metadata(writer, arch, config)
    if extra:
        for name, size in extra.items():
            writer.add_tensor(name, np.zeros(size, np.float32))
    stored = sum(_put(writer, name, shape, kind) for name, shape in _tensors(case, arch, module) if name != without)
    if case == "deepseek-v3":
        stored += _put(writer, "blk.1.exp_probs_b.bias", (4,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith("pooler")), stored


def _metadata(writer: GGUFWriter, arch: str, config: Any) -> None:
    """What llama.cpp's converter writes of a config."""

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    kv_heads = 1 if arch == "falcon" and not config.new_decoder_architecture else first("num_key_value_heads", "num_kv_heads")
    experts = first("num_local_experts", "num_experts", "n_routed_experts")
    wide = (
        first("head_dim")
        if arch in ("qwen3", "gemma", "gemma2", "gemma3", "qwen3moe") or (arch == "llama" and getattr(config, "attention_bias", False))
        else None
    )
    latent = arch == "deepseek2"
    known = {
        "block_count": first("num_hidden_layers"), "embedding_length": first("hidden_size"), "context_length": 256,
        "feed_forward_length": first("intermediate_size", "n_inner", "d_ff", "ffn_hidden_size"), "attention.head_count": first("num_attention_heads"),
        "attention.head_count_kv": kv_heads, "attention.sliding_window": first("sliding_window"), "expert_count": experts,
        "expert_used_count": config.num_experts_per_tok if experts else None,
        "attention.key_length": 48 if latent else config.d_kv if arch == "t5" else wide, "attention.value_length": 32 if latent else wide,
        "expert_feed_forward_length": first("moe_intermediate_size"), "expert_shared_feed_forward_length": first("shared_expert_intermediate_size"),
        "decoder_block_count": first("num_decoder_layers"),
    }  # fmt: skip
    if latent:
        known |= {
            "attention.kv_lora_rank": 32, "attention.q_lora_rank": 64, "rope.dimension_count": 16, "leading_dense_block_count": 1,
            "expert_shared_count": config.n_shared_experts,
        }  # fmt: skip
    if arch == "mamba":
        known |= {"ssm.conv_kernel": config.conv_kernel, "ssm.inner_size": config.intermediate_size, "ssm.state_size": config.state_size,
                  "ssm.time_step_rank": config.time_step_rank}  # fmt: skip
    for key, value in known.items():
        if value is not None:
            writer.add_uint32(f"{arch}.{key}", int(value))


def _tensors(case: str, arch: str, module: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the file of a module's parameters: the pooler left out, experts' gates and ups apart, Conv1D turned."""
    names = gguf.get_tensor_name_map({name: number for number, name in MODEL_ARCH_NAMES.items()}[arch], 8)
    found = []
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if name.startswith("pooler"):
            continue
        if arch == "gpt2" and len(shape) == 2 and re.search(r"c_attn|c_proj|c_fc", name):
            shape = shape[::-1]
        if "experts.gate_up_proj" in name:
            halves = (names.get_name(name.replace("gate_up_proj", half)) + ".weight" for half in ("gate_proj", "up_proj"))
            found += [(half, (shape[0], shape[1] // 2, shape[2])) for half in halves]
            continue
        if name.endswith("experts.down_proj"):
            found.append((names.get_name(name) + ".weight", shape))
            continue
        asked = name.replace(".mlp.", ".block_sparse_moe.") if case == "mixtral" and name.endswith("mlp.gate.weight") else name
        own = next(filter(None, (names.get_name(each, (".weight", ".bias")) for each in (asked, asked.removeprefix("transformer.")))), None)
        assert own, f"the gguf package has no name for {name}"
        found.append((own, (shape[0], shape[2]) if own.endswith("ssm_conv1d.weight") else shape))
    return found


def _put(writer: GGUFWriter, name: str, shape: tuple[int, ...], asked: Type | None = None) -> int:
    """Write one tensor of zeros, in a type that its columns allow; its bytes."""
    vector = len(shape) == 1 or re.search(r"ssm_(conv1d|a|d)\b", name)
    free = Type.Q4_0 if name == "token_embd.weight" else Type.Q8_0 if shape[-1] % 32 == 0 else Type.F16
    kind = Type.F32 if vector else free if asked is None else asked
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind in (Type.F32, Type.F16):
        writer.add_tensor(name, np.zeros(shape, np.float32 if kind == Type.F32 else np.float16))
    else:
        writer.add_tensor(name, np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8), raw_dtype=kind)
    return int(np.prod(shape)) // block * size
