"""Models of images and texts, and their towers alone (CLIP: Radford et al. 2021, arXiv:2103.00020; SigLIP: Zhai et al. 2023, arXiv:2303.15343).

A model of both that compares each image of a batch with each text (`CLIPModel`) has a product that grows with the batch's square; it has
no formula here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities, optional
from lighten.model.families._tower import (
    CLIP_NAMES,
    block_of,
    blocks,
    elementwise,
    embedding,
    labels_of,
    layernorm,
    linear,
    mlp,
    positive,
    table,
)
from lighten.model.families.vision import grid_of, patch_conv
from lighten.model.spec import Attention, Part, Product

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Traits of an image tower.

    Attributes:
        class_token: a row of its own whose last state stands for the image; there is a norm before the blocks then.
        attentive: a learned query pools the rows by attention (SigLIP).
    """

    class_token: bool = True
    attentive: bool = False


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Traits of a text tower.

    Attributes:
        head: a dense layer over the last token, of `projection_size` (SigLIP).
    """

    head: bool = False


CLIP_IMAGES = Images()
SIGLIP_IMAGES = Images(class_token=False, attentive=True)
CLIP_TEXTS = Texts()
SIGLIP_TEXTS = Texts(head=True)


def image_tower(at: str, tower: Images, config: Config, family: str) -> tuple[int, list[Part]]:
    """Width of an image tower and its parts."""
    check_probabilities(config, ("attention_dropout",))
    height, width = grid_of(config, family)
    shape = block_of(config, family, names=CLIP_NAMES)
    patches, hidden = height * width, shape.hidden
    rows = patches + tower.class_token
    token: list[Part] = [table(f"{at}embeddings", {"class_embedding": (hidden,)})] if tower.class_token else []
    parts: list[Part] = [
        *token,
        patch_conv(f"{at}embeddings.patch_embedding", config, family, patches, bias=not tower.class_token),
        table(f"{at}embeddings.position_embedding", {"weight": (rows, hidden)}),
        elementwise(f"{at}embeddings.add", hidden, "add", "embedding", rows),
        *([layernorm(f"{at}pre_layrnorm", hidden, rows)] if tower.class_token else []),
        *blocks(f"{at}encoder.layers.{{}}", config["num_hidden_layers"], shape, rows),
        layernorm(f"{at}post_layernorm", hidden, "sequence" if tower.class_token else rows),
    ]
    if tower.attentive and config.get("vision_use_head", True):
        parts += _attention_pool(f"{at}head", config, family, rows)
    return hidden, parts


def _attention_pool(at: str, config: Config, family: str, rows: int) -> list[Part]:
    """One learned query attends to all rows; PyTorch keeps its three projections as one matrix."""
    shape = block_of(config, family, names=CLIP_NAMES)
    hidden = shape.hidden
    return [
        table(at, {"probe": (1, 1, hidden)}, "pooler"),
        table(f"{at}.attention", {"in_proj_weight": (3 * hidden, hidden), "in_proj_bias": (3 * hidden,)}, "pooler"),
        Product(name=f"{at}.attention.q", component="pooler", rows=1, m=1, k=hidden, n=hidden),
        Product(name=f"{at}.attention.kv", component="pooler", rows=rows, m=rows, k=hidden, n=2 * hidden),
        Attention(
            name=f"{at}.attention", component="pooler", causal=False, rows=1, keys=rows, cached=False,
            num_attention_heads=shape.heads, num_key_value_heads=shape.heads, head_dim=shape.head_dim,
        ),
        linear(f"{at}.attention.out_proj", hidden, hidden, True, "pooler", 1),
        layernorm(f"{at}.layernorm", hidden, 1, "pooler"),
        *mlp(at, shape, 1),
        elementwise(f"{at}.add", hidden, "add", "pooler", 1),
    ]  # fmt: skip


def text_tower(at: str, tower: Texts, config: Config, family: str) -> tuple[int, list[Part]]:
    """Width of a text tower and its parts. CLIP masks what follows a token, but keeps no keys and values: it never generates."""
    check_probabilities(config, ("attention_dropout",))
    c = positive(config, ("vocab_size", "max_position_embeddings"), family)
    shape = block_of(config, family, names=CLIP_NAMES)
    hidden = shape.hidden
    parts: list[Part] = [
        embedding(f"{at}embeddings.token_embedding", c["vocab_size"], hidden, "token"),
        embedding(f"{at}embeddings.position_embedding", c["max_position_embeddings"], hidden, "position"),
        elementwise(f"{at}embeddings.add", hidden, "add", "embedding", "token"),
        *blocks(f"{at}encoder.layers.{{}}", config["num_hidden_layers"], shape, "token"),
        layernorm(f"{at}final_layer_norm", hidden, "token"),
    ]
    if tower.head:
        parts.append(linear(f"{at}head", hidden, optional(config, "projection_size") or hidden, True, "pooler", "sequence"))
    return hidden, parts


def describe_images(tower: Images, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """An image tower alone, with the projection into the common space where the architecture has one."""
    if not architecture.endswith("WithProjection"):
        return tuple(image_tower("", tower, config, family)[1])
    hidden, parts = image_tower("vision_model.", tower, config, family)
    return (*parts, _projection("visual_projection", hidden, config, family))


def describe_texts(tower: Texts, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """A text tower alone, with the projection into the common space where the architecture has one."""
    if not architecture.endswith("WithProjection"):
        return tuple(text_tower("", tower, config, family)[1])
    hidden, parts = text_tower("text_model.", tower, config, family)
    return (*parts, _projection("text_projection", hidden, config, family))


def _projection(name: str, hidden: int, config: Config, family: str) -> Part:
    return linear(name, hidden, positive(config, ("projection_dim",), family)["projection_dim"], False, "head", "sequence")


def describe_classifier(tower: Images, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """A linear layer over the mean of the patches."""
    hidden, parts = image_tower("vision_model.", tower, nested(config, "vision_config", family), family)
    return (*parts, linear("classifier", hidden, labels_of(config), True, "head", "sequence"))


def nested(config: Config, name: str, family: str) -> Config:
    """A config within a config.

    Raises:
        ModelError: it is no table.
    """
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json of a {family} model: {name}={found!r} is not a table of fields.")
    return found


def _images(tower: Images, family: str, *architectures: str) -> Family:
    return Family(describe=partial(describe_images, tower, family), architectures=architectures)


def _texts(tower: Texts, family: str, *architectures: str) -> Family:
    return Family(describe=partial(describe_texts, tower, family), architectures=architectures)


def _classifiers(tower: Images, family: str, *architectures: str) -> Family:
    return Family(describe=partial(describe_classifier, tower, family), architectures=architectures)


FAMILIES: dict[str, Family] = {
    "clip": _classifiers(CLIP_IMAGES, "clip", "CLIPForImageClassification"),
    "metaclip_2": _classifiers(CLIP_IMAGES, "metaclip_2", "MetaClip2ForImageClassification"),
    "siglip": _classifiers(SIGLIP_IMAGES, "siglip", "SiglipForImageClassification"),
    "clip_vision_model": _images(CLIP_IMAGES, "clip_vision_model", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "metaclip_2_vision_model": _images(CLIP_IMAGES, "metaclip_2_vision_model", "MetaClip2VisionModel", "MetaClip2VisionModelWithProjection"),
    "chinese_clip_vision_model": _images(CLIP_IMAGES, "chinese_clip_vision_model", "ChineseCLIPVisionModel"),
    "altclip_vision_model": _images(CLIP_IMAGES, "altclip_vision_model", "AltCLIPVisionModel"),
    "siglip_vision_model": _images(SIGLIP_IMAGES, "siglip_vision_model", "SiglipVisionModel"),
    "clip_text_model": _texts(CLIP_TEXTS, "clip_text_model", "CLIPTextModel", "CLIPTextModelWithProjection"),
    "metaclip_2_text_model": _texts(CLIP_TEXTS, "metaclip_2_text_model", "MetaClip2TextModel", "MetaClip2TextModelWithProjection"),
    "siglip_text_model": _texts(SIGLIP_TEXTS, "siglip_text_model", "SiglipTextModel"),
}
