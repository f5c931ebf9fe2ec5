"""ImageGPT (Chen et al. 2020, ICML): a GPT-2 over the colours of an image's pixels, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities, optional
from lighten.model.families._tower import BlockNames, block_of, blocks, elementwise, embedding, labels_of, layernorm, linear, positive
from lighten.model.spec import Linear, Norm, Part

ARCHITECTURES = ("ImageGPTForCausalImageModeling", "ImageGPTForImageClassification", "ImageGPTModel")
NAMES = BlockNames(attention="attn", qkv="attn.c_attn", out="attn.c_proj", attention_norm="ln_1", up="mlp.c_fc", down="mlp.c_proj", mlp_norm="ln_2")


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """Parts of ImageGPT, with the head that its architecture has."""
    c = positive(config, ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"), "imagegpt")
    check_probabilities(config, ("resid_pdrop", "embd_pdrop", "attn_pdrop"))
    if config.get("add_cross_attention"):
        raise ModelError("config.json of an imagegpt model: add_cross_attention=True needs another model beside it; set it to false.")
    hidden, at = c["hidden_size"], "" if architecture == "ImageGPTModel" else "transformer."
    ffn = optional(config, "n_inner") or 4 * hidden
    shape = block_of(config, "imagegpt", act=config.get("activation_function", "quick_gelu"), ffn=ffn, causal=True, names=NAMES)
    parts: list[Part] = [
        embedding(f"{at}wte", c["vocab_size"], hidden, "token"),
        embedding(f"{at}wpe", c["max_position_embeddings"], hidden, "position"),
        elementwise(f"{at}add", hidden, "add", "embedding", "token"),
        *blocks(f"{at}h.{{}}", c["num_hidden_layers"], shape, "token"),
        layernorm(f"{at}ln_f", hidden, "token"),
    ]
    return (*(_as_stored(part) for part in parts), *_head(config, architecture, c["vocab_size"] - 1, hidden))


def _as_stored(part: Part) -> Part:
    """Its matrices lie as GPT-2's do, and its norms have neither mean nor bias."""
    if isinstance(part, Linear):
        return replace(part, transposed=True)
    return replace(part, kind="rmsnorm", bias=None) if isinstance(part, Norm) else part


def _head(config: Mapping[str, Any], architecture: str, colours: int, hidden: int) -> list[Part]:
    """Logits of the colours, without the one that starts an image, or a classifier over the mean of the pixels."""
    if architecture == "ImageGPTModel":
        return []
    if architecture == "ImageGPTForImageClassification":
        return [linear("score", hidden, labels_of(config), False, "head", "sequence")]
    if config.get("tie_word_embeddings"):
        raise ModelError("config.json of an imagegpt model: tie_word_embeddings=True ties a table to a head of one row less; set it to false.")
    return [linear("lm_head", hidden, colours, False, "head", "logits")]


FAMILIES = {"imagegpt": Family(describe=describe, architectures=ARCHITECTURES)}
