"""Llama (Touvron et al. 2023, arXiv:2307.09288) as `transformers` computes it: grouped-query attention, gated MLP, RMSNorm, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import activation, check_probabilities, optional, require
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, Norm, Part

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")
FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """Parts of a Llama decoder, with its language-model head where the architecture has one."""
    c = require(config, FIELDS, "llama")
    optional(config, "max_position_embeddings")
    check_probabilities(config, ("attention_dropout", "hidden_dropout_prob"))
    prefix = "model." if architecture == "LlamaForCausalLM" else ""
    hidden = c["hidden_size"]
    table = f"{prefix}embed_tokens"
    parts: list[Part] = [Embedding(name=table, component="embedding", num_embeddings=c["vocab_size"], embedding_dim=hidden)]
    for layer in range(c["num_hidden_layers"]):
        parts += _layer(f"{prefix}layers.{layer}", c, config)
    parts.append(_norm(f"{prefix}norm", hidden))
    if architecture == "LlamaForCausalLM":
        tied = table if config.get("tie_word_embeddings", False) else None
        parts.append(Linear(name="lm_head", component="head", in_features=hidden, out_features=c["vocab_size"], tied_to=tied, rows="logits"))
    return tuple(parts)


def _norm(name: str, size: int) -> Norm:
    return Norm(name=name, component="norm", size=size, kind="rmsnorm")


def _layer(at: str, c: Mapping[str, int], config: Mapping[str, Any]) -> list[Part]:
    hidden, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv_heads = optional(config, "num_key_value_heads") or heads
    head_dim = optional(config, "head_dim") or hidden // heads
    if heads % kv_heads:
        raise ModelError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}.")
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))

    def linear(name: str, component: str, columns: int, rows: int, bias: bool) -> Linear:
        return Linear(name=f"{at}.{name}", component=component, in_features=columns, out_features=rows, bias=bias)

    def elementwise(name: str, component: str, size: int, kind: Any, flops: int) -> Elementwise:
        return Elementwise(name=f"{at}.{name}", component=component, size=size, kind=kind, flops_per_element=flops)

    q, kv = heads * head_dim, kv_heads * head_dim
    return [
        _norm(f"{at}.input_layernorm", hidden),
        linear("self_attn.q_proj", "attention", hidden, q, attention_bias),
        linear("self_attn.k_proj", "attention", hidden, kv, attention_bias),
        linear("self_attn.v_proj", "attention", hidden, kv, attention_bias),
        elementwise("self_attn.rotary", "attention", q + kv, "rotary", 3),  # x·cos + rotate(x)·sin
        Attention(
            name=f"{at}.self_attn", component="attention", causal=True,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        ),
        linear("self_attn.o_proj", "attention", q, hidden, attention_bias),
        elementwise("self_attn.add", "attention", hidden, "add", 1),
        _norm(f"{at}.post_attention_layernorm", hidden),
        linear("mlp.gate_proj", "mlp", hidden, ffn, mlp_bias),
        linear("mlp.up_proj", "mlp", hidden, ffn, mlp_bias),
        activation(f"{at}.mlp.act_fn", str(config.get("hidden_act", "silu")), ffn),
        elementwise("mlp.multiply", "mlp", ffn, "multiply", 1),
        linear("mlp.down_proj", "mlp", ffn, hidden, mlp_bias),
        elementwise("mlp.add", "mlp", hidden, "add", 1),
    ]  # fmt: skip


FAMILIES = {"llama": Family(describe=describe, architectures=ARCHITECTURES)}
