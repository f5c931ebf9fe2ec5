"""BLIP (Li et al. 2022, arXiv:2201.12086): a ViT, and a BERT whose every layer attends to the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities
from lighten.model.families._tower import (
    BERT_NAMES,
    CLIP_NAMES,
    Block,
    act_fn,
    block_of,
    blocks,
    decoder_block,
    elementwise,
    embedding,
    layernorm,
    linear,
    positive,
    table,
)
from lighten.model.families.pairs import nested
from lighten.model.families.vision import grid_of, patch_conv
from lighten.model.spec import Linear, Part

Config = Mapping[str, Any]
IMAGE_NAMES = replace(CLIP_NAMES, qkv="self_attn.qkv", out="self_attn.projection")
CROSS_NAMES = replace(
    BERT_NAMES, attention="crossattention.self", q="crossattention.self.query", k="crossattention.self.key", v="crossattention.self.value",
    out="crossattention.output.dense", attention_norm="crossattention.output.LayerNorm",
)  # fmt: skip
COLOURS = 3
"""Channels of its images: transformers' `BlipVisionEmbeddings` has them as a constant."""


def describe_images(config: Config, architecture: str) -> tuple[Part, ...]:
    """The image tower alone."""
    return tuple(_images("", config)[2])


def describe(config: Config, architecture: str) -> tuple[Part, ...]:
    """An image tower, and a text model that writes about the image or matches a text with it."""
    rows, width, images = _images("vision_model.", nested(config, "vision_config", "blip"))
    text = nested(config, "text_config", "blip")
    if architecture == "BlipForConditionalGeneration":
        hidden, parts = _texts("text_decoder.bert.", text, width, rows, causal=True)
        tied = any(each.get("tie_word_embeddings", True) for each in (config, text))  # one that says so is enough
        return (*images, *parts, *_language_head("text_decoder.cls.predictions", text, hidden, tied=tied))
    hidden, parts = _texts("text_encoder.", text, width, rows, causal=False)
    size = positive(config, ("image_text_hidden_size",), "blip")["image_text_hidden_size"]
    contrast = [  # of the other way to match, which compares all images with all texts
        linear("vision_proj", width, size, True, "head", 0),
        linear("text_proj", hidden, size, True, "head", 0),
    ]
    return (*images, *parts, *contrast, linear("itm_head", hidden, 2, True, "head", "sequence"))


def _images(at: str, config: Config) -> tuple[int, int, list[Part]]:
    """Rows and width of the image tower, and its parts."""
    check_probabilities(config, ("attention_dropout",))
    height, width = grid_of(config, "blip")
    shape = block_of(config, "blip", names=IMAGE_NAMES)
    rows, hidden = height * width + 1, shape.hidden
    return rows, hidden, [
        patch_conv(f"{at}embeddings.patch_embedding", {**config, "num_channels": COLOURS}, "blip", height * width),
        table(f"{at}embeddings", {"class_embedding": (1, 1, hidden), "position_embedding": (1, rows, hidden)}),
        elementwise(f"{at}embeddings.add", hidden, "add", "embedding", rows),
        *blocks(f"{at}encoder.layers.{{}}", config["num_hidden_layers"], shape, rows),
        layernorm(f"{at}post_layernorm", hidden, rows),
    ]  # fmt: skip


def _texts(at: str, config: Config, width: int, rows: int, *, causal: bool) -> tuple[int, list[Part]]:
    """Width of the text model, and its parts: norms stand after the residual additions."""
    check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    c = positive(config, ("vocab_size", "max_position_embeddings", "num_hidden_layers"), "blip")
    shape: Block = block_of(config, "blip", names=BERT_NAMES, norm_first=False, causal=causal)
    cross = replace(shape, names=CROSS_NAMES, source_hidden=width, causal=False)
    parts: list[Part] = [
        embedding(f"{at}embeddings.word_embeddings", c["vocab_size"], shape.hidden, "token"),
        embedding(f"{at}embeddings.position_embeddings", c["max_position_embeddings"], shape.hidden, "position"),
        elementwise(f"{at}embeddings.add", shape.hidden, "add", "embedding", "token"),
        layernorm(f"{at}embeddings.LayerNorm", shape.hidden, "token"),
    ]
    for layer in range(c["num_hidden_layers"]):
        parts += decoder_block(f"{at}encoder.layer.{layer}", shape, cross, keys=rows, key_rows=rows)
    return shape.hidden, parts


def _language_head(at: str, config: Config, hidden: int, *, tied: bool) -> list[Part]:
    vocab = positive(config, ("vocab_size",), "blip")["vocab_size"]
    biases: dict[str, tuple[int, ...]] = dict.fromkeys(("bias",) if tied else ("bias", "decoder.bias"), (vocab,))
    return [
        linear(f"{at}.transform.dense", hidden, hidden, True, "head", "token"),
        act_fn(f"{at}.transform.act_fn", str(config.get("hidden_act", "gelu")), hidden, "head", "token"),
        layernorm(f"{at}.transform.LayerNorm", hidden, "token", "head"),
        Linear(
            name=f"{at}.decoder", component="head", rows="logits", in_features=hidden, out_features=vocab,
            tied_to="text_decoder.bert.embeddings.word_embeddings" if tied else None,
        ),
        table(at, biases, "head"),
    ]  # fmt: skip


FAMILIES: dict[str, Family] = {
    "blip": Family(describe=describe, architectures=("BlipForConditionalGeneration", "BlipForImageTextRetrieval")),
    "blip_vision_model": Family(describe=describe_images, architectures=("BlipVisionModel",)),
}
