"""What a GGUF file says of each architecture that is written here: its name, its metadata, and what is done to its tensors.

llama.cpp computes an architecture in one way, without asking a config for its activation, its windows or its scales. A model that is computed
in another way is refused; written all the same it would give other outputs without a word.

Source: the `conversion` package of llama.cpp (what a converter writes and permutes) and src/models/*.cpp there (what is computed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lighten.model.families._config import complete
from lighten.model.spec import ModelSpec

Config: TypeAlias = Mapping[str, Any]
Metadata: TypeAlias = dict[str, int | float | bool | str]

SILU, GELU, TANH_GELU = ("silu", "swish"), ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one `model_type` is written.

    Attributes:
        name: `general.architecture`.
        activations: values of `hidden_act` that llama.cpp's own activation stands for.
        more: metadata behind the architecture's name, beside what all have.
        refuse: what of a config llama.cpp would compute differently; "" where nothing is.
        orders: end of a module's name → the order in which its rows are stored.
        plus_one: norms are stored with 1 added, as they multiply.
        left_out: components that the file does not hold.
        rotary: positions are rotated; the metadata says how.
    """

    name: str
    activations: tuple[str, ...]
    more: Callable[[Config], Metadata] = lambda config: {}
    refuse: Callable[[Config], str] = lambda config: ""
    orders: Mapping[str, Callable[[Config, int], Tensor]] = field(default_factory=dict)
    plus_one: bool = False
    left_out: tuple[str, ...] = ()
    rotary: bool = True


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Config, kind: str = "full_attention") -> Config:
    """The rotary parameters, whichever way the config says them; of one kind of layer where there are several."""
    found = config.get("rope_parameters")
    if isinstance(found, Mapping):
        inner = found.get(kind, found)
        return inner if isinstance(inner, Mapping) else found
    return {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}


def halves_interleaved(heads: int, rows: int) -> Tensor:
    """The rows of each head's two halves in turns: llama.cpp rotates neighbours, transformers a row and the one half a head below."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def _by_heads(config: Config, rows: int) -> Tensor:
    return halves_interleaved(int(config["num_attention_heads"]), rows)


def _by_kv_heads(config: Config, rows: int) -> Tensor:
    return halves_interleaved(int(config.get("num_key_value_heads") or config["num_attention_heads"]), rows)


def _queries_first(config: Config, rows: int) -> Tensor:
    """All queries, all keys, all values, of rows that have the three of each head together (GPT-NeoX)."""
    return torch.arange(rows).reshape(int(config["num_attention_heads"]), 3, -1).transpose(0, 1).reshape(-1)


_ROTATED = {"q_proj": _by_heads, "k_proj": _by_kv_heads}


def _rms(config: Config) -> Metadata:
    return {"attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"])}


def _layer_norm(*names: str) -> Callable[[Config], Metadata]:
    return lambda config: {"attention.layer_norm_epsilon": float(next(config[name] for name in names if config.get(name) is not None))}


def _experts(config: Config) -> Metadata:
    count = config.get("num_local_experts") or config.get("num_experts")
    found: Metadata = {"expert_count": int(count or 0), "expert_used_count": int(config["num_experts_per_tok"])} if count else {}
    if width := config.get("moe_intermediate_size"):
        found["expert_feed_forward_length"] = int(width)
    if shared := config.get("shared_expert_intermediate_size"):
        found["expert_shared_feed_forward_length"] = int(shared)
    return found


def _join(*parts: Callable[[Config], Metadata]) -> Callable[[Config], Metadata]:
    return lambda config: {key: value for part in parts for key, value in part(config).items()}


def _partial_rotary(config: Config) -> Metadata:
    share = rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    return {"rope.dimension_count": int(share * head_dim(config))}


def _is_windowed(config: Config) -> bool:
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True) and window is not None and window < (config.get("max_position_embeddings") or 0)
    kinds = config.get("layer_types")
    return bool(used and (kinds is None or "sliding_attention" in kinds))


def _windowed(config: Config) -> str:
    return "its layers attend to a sliding window" if _is_windowed(config) else ""


def _gemma2(config: Config) -> Metadata:
    found: Metadata = {"attention.sliding_window": int(config["sliding_window"])}
    for name, key in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping")):
        if config.get(name):
            found[key] = float(config[name])
    return found


def _gemma_refused(config: Config, *, every: int, larger: int) -> str:
    """Queries are scaled by the head's width, but in the one size (`larger` layers) that llama.cpp scales by hidden_size / heads; each `every`th
    layer attends to all."""
    scalar = config.get("query_pre_attn_scalar") or head_dim(config)
    layers = int(config["num_hidden_layers"])
    expected = config["hidden_size"] / config["num_attention_heads"] if layers == larger else head_dim(config)
    if scalar != expected:
        return f"query_pre_attn_scalar={scalar} where llama.cpp takes {expected:g}"
    kinds = config.get("layer_types") or []
    if any((kind == "full_attention") != ((layer + 1) % every == 0) for layer, kind in enumerate(kinds)):
        return f"its layer_types are not {every - 1} of sliding to one of full attention"
    return ""


def _gemma3(config: Config) -> Metadata:
    local = rope(config, "sliding_attention").get("rope_theta") if "rope_parameters" in config else config.get("rope_local_base_freq")
    found = _gemma2(config)
    return found | ({"rope.freq_base_swa": float(local)} if local else {})


def _phi3_refused(config: Config) -> str:
    factor = rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return "" if factor == 1.0 else "it rotates a part of each head"


def _bert_refused(config: Config) -> str:
    kind = config.get("position_embedding_type", "absolute")
    return "" if kind in (None, "absolute") else f"position_embedding_type={kind}"


def _normalized(config: Config, *, by_llama_cpp: bool) -> str:
    given = bool(config.get("norm_topk_prob"))
    return "" if given == by_llama_cpp else f"norm_topk_prob={str(given).lower()} where llama.cpp takes {str(by_llama_cpp).lower()}"


def _granite(config: Config) -> Metadata:
    return {
        "embedding_scale": float(config["embedding_multiplier"]), "residual_scale": float(config["residual_multiplier"]),
        "attention.scale": float(config["attention_multiplier"]), "logit_scale": float(config["logits_scaling"]),
    }  # fmt: skip


def _smollm3_refused(config: Config) -> str:
    kept = config.get("no_rope_layers") or [(layer + 1) % 4 != 0 for layer in range(int(config["num_hidden_layers"]))]
    wrong = any(bool(rotated) != ((layer + 1) % 4 != 0) for layer, rotated in enumerate(kept))
    return "its no_rope_layers are not each fourth one" if wrong else _windowed(config)


def _stablelm(config: Config) -> Metadata:
    return {"use_parallel_residual": bool(config["use_parallel_residual"])}


def _qk_layernorm(config: Config) -> str:
    return "qk_layernorm=true" if config.get("qk_layernorm") else ""


_LLAMA = Architecture(name="llama", activations=SILU, more=_join(_rms, _experts), orders=_ROTATED)
ARCHITECTURES = {
    "llama": _LLAMA, "mistral": _LLAMA, "mixtral": _LLAMA,
    "qwen2": Architecture(name="qwen2", activations=SILU, more=_rms, refuse=_windowed),
    "qwen3": Architecture(name="qwen3", activations=SILU, more=_rms, refuse=_windowed),
    "qwen2_moe": Architecture(
        name="qwen2moe", activations=SILU, more=_join(_rms, _experts),
        refuse=lambda config: _windowed(config) or _normalized(config, by_llama_cpp=False),
    ),
    "qwen3_moe": Architecture(
        name="qwen3moe", activations=SILU, more=_join(_rms, _experts),
        refuse=lambda config: _windowed(config) or _normalized(config, by_llama_cpp=True),
    ),
    "gemma": Architecture(name="gemma", activations=GELU, more=_rms, plus_one=True),
    "gemma2": Architecture(
        name="gemma2", activations=TANH_GELU, more=_join(_rms, _gemma2), plus_one=True,
        refuse=lambda config: _gemma_refused(config, every=2, larger=46),
    ),
    "gemma3_text": Architecture(
        name="gemma3", activations=TANH_GELU, more=_join(_rms, _gemma3), plus_one=True,
        refuse=lambda config: _gemma_refused(config, every=6, larger=62),
    ),
    "phi": Architecture(
        name="phi2", activations=TANH_GELU, more=_join(_layer_norm("layer_norm_eps"), _partial_rotary), refuse=_qk_layernorm,
    ),
    "phi3": Architecture(
        name="phi3", activations=SILU, refuse=_phi3_refused,
        more=_join(_rms, lambda config: {"attention.sliding_window": int(config.get("sliding_window") or 0)}),
    ),
    "gpt2": Architecture(name="gpt2", activations=TANH_GELU, more=_layer_norm("layer_norm_epsilon"), rotary=False),
    "gpt_neox": Architecture(
        name="gptneox", activations=GELU, orders={"query_key_value": _queries_first},
        more=_join(_layer_norm("layer_norm_eps"), _partial_rotary, _stablelm),
    ),
    "starcoder2": Architecture(name="starcoder2", activations=TANH_GELU, more=_layer_norm("norm_epsilon"), refuse=_windowed),
    "stablelm": Architecture(
        name="stablelm", activations=SILU, more=_join(_layer_norm("layer_norm_eps"), _partial_rotary, _stablelm), refuse=_qk_layernorm,
    ),
    "granite": Architecture(name="granite", activations=SILU, more=_join(_rms, _granite), orders=_ROTATED),
    "smollm3": Architecture(name="smollm3", activations=SILU, more=_rms, orders=_ROTATED, refuse=_smollm3_refused),
    "olmo2": Architecture(name="olmo2", activations=SILU, more=_rms),
    "bert": Architecture(
        name="bert", activations=GELU, rotary=False, left_out=("pooler",), refuse=_bert_refused,
        more=_join(_layer_norm("layer_norm_eps"), lambda config: {"attention.causal": False, "token_type_count": int(config["type_vocab_size"])}),
    ),
}  # fmt: skip
"""`model_type` → how it is written."""

CLASSES = {"bert": ("BertModel",)}
"""`model_type` → the classes that are written, where they are not the causal language models; others' heads have no place in the file."""


def refusal(spec: ModelSpec) -> str:
    """Why a model's architecture is not written; "" where it is."""
    architecture = ARCHITECTURES.get(spec.family)
    if architecture is None:
        return f"model_type {spec.family!r} is not written; these are: {', '.join(ARCHITECTURES)}"
    allowed = CLASSES.get(spec.family)
    if (spec.architecture not in allowed) if allowed else not spec.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return f"{spec.architecture} is not written; of {spec.family} {' and '.join(allowed or ('its causal language model',))} is"
    config = complete(spec.config)
    activation = config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function")
    if activation not in architecture.activations:
        return f"its activation is {activation}, and llama.cpp computes {spec.family} with {architecture.activations[0]}"
    if architecture.rotary and (problem := _rope_refused(config)):
        return problem
    return architecture.refuse(config)


def _rope_refused(config: Config) -> str:
    kind = rope(config).get("rope_type") or rope(config).get("type") or "default"
    able = ("default", "linear", "llama3", "yarn")
    return "" if kind in able else f"its positions are rotated by rope_type {kind!r}; these are written: {', '.join(able)}"


def metadata(spec: ModelSpec) -> Metadata:
    """The entries behind the architecture's name, without it."""
    config, architecture = complete(spec.config), ARCHITECTURES[spec.family]
    heads = int(config["num_attention_heads"])
    found: Metadata = {
        "block_count": int(config["num_hidden_layers"]), "context_length": _context(config, architecture),
        "embedding_length": int(config["hidden_size"]), "feed_forward_length": int(config.get("intermediate_size") or 4 * config["hidden_size"]),
        "attention.head_count": heads, "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "vocab_size": int(config["vocab_size"]),
    }  # fmt: skip
    if architecture.rotary:
        width = head_dim(config)
        found |= {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width} | _rope(config)
    return found | architecture.more(config)


def _context(config: Config, architecture: Architecture) -> int:
    """Positions that the file promises: within a window that llama.cpp does not know, for there its outputs are the model's."""
    longest = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    return min(longest, int(config["sliding_window"])) if architecture is _LLAMA and _is_windowed(config) else longest


def _rope(config: Config) -> Metadata:
    given = rope(config)
    found: Metadata = {}
    if given.get("rope_theta"):
        found["rope.freq_base"] = float(given["rope_theta"])
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(given["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(given["original_max_position_embeddings"])
        for name, key in (("attention_factor", "attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if given.get(name) is not None:
                found[f"rope.scaling.{key}"] = float(given[name])
    return found


def rope_factors(spec: ModelSpec) -> Tensor | None:
    """What Llama 3 divides each pair's frequency by, which the file stores as a tensor; None for others.

    Source: transformers' `_compute_llama3_parameters`, the inverse frequencies before over after.
    """
    config = complete(spec.config)
    given = rope(config)
    if not ARCHITECTURES[spec.family].rotary or (given.get("rope_type") or given.get("type")) != "llama3":
        return None
    width = head_dim(config)
    wavelengths = 2 * math.pi * float(given["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    original, factor = float(given["original_max_position_embeddings"]), float(given["factor"])
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > original / low, torch.full_like(between, factor), between)
    return torch.where(wavelengths < original / high, torch.ones_like(between), factors)
