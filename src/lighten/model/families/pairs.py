"""Models of images and texts, and their towers alone (CLIP: Radford et al. 2021, arXiv:2103.00020; SigLIP: Zhai et al. 2023, arXiv:2303.15343).

A model of both compares each image of a batch with each text: a product that grows with the batch's square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lighten.errors import ModelError
from lighten.model.families import bert
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
from lighten.model.spec import Attention, Part, Product, Table

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


TextTower = Callable[[Config, str], tuple[int, list[Part]]]
"""(config of the text tower, family) → its width and its parts, named below `text_model.`."""


def _clip_texts(config: Config, family: str) -> tuple[int, list[Part]]:
    return text_tower("text_model.", CLIP_TEXTS, config, family)


def _siglip_texts(config: Config, family: str) -> tuple[int, list[Part]]:
    return text_tower("text_model.", SIGLIP_TEXTS, config, family)


def _below(at: str, parts: tuple[Part, ...]) -> list[Part]:
    """The parts of an encoder but its pooler, under another name."""
    return [replace(part, name=f"{at}{part.name}") for part in parts if part.component != "pooler"]


def _bert_texts(config: Config, family: str) -> tuple[int, list[Part]]:
    """BERT without its pooler (Chinese CLIP, arXiv:2211.01335)."""
    hidden = positive(config, ("hidden_size",), family)["hidden_size"]
    return hidden, _below("text_model.", bert.describe(config, "BertModel"))


def describe_pair(images: Images, texts: TextTower, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Both towers, their projections into the common space, and the product of each image with each text.

    SigLIP has no projections: its towers are of the same width; its logits have a bias.

    Raises:
        ModelError: towers without projections whose widths differ.
    """
    image_width, image = image_tower("vision_model.", images, nested(config, "vision_config", family), family)
    text_width, text = texts(nested(config, "text_config", family), family)
    learned: dict[str, tuple[int, ...]] = {"logit_scale": (1,), "logit_bias": (1,)} if images.attentive else {"logit_scale": ()}
    if images.attentive:
        shared = _shared_width(nested(config, "text_config", family), text_width, image_width)
    else:
        shared = positive(config, ("projection_dim",), family)["projection_dim"]
        image.append(_projection("visual_projection", image_width, config, family))
        text.append(_projection("text_projection", text_width, config, family))
    compared = Product(name="logits", component="head", rows="sequence", m=1, k=shared, n="batch")
    return (*image, *text, Table(name="logit_scale", component="head", shapes=learned), compared)


def _shared_width(texts: Config, text_width: int, image_width: int) -> int:
    width = optional(texts, "projection_size") or text_width
    if width != image_width:
        raise ModelError(f"config.json: texts come as {width} values and images as {image_width}; they must be as many to be compared.")
    return width


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


def _pairs(images: Images, texts: TextTower, family: str, *architectures: str) -> Family:
    def describe(config: Config, architecture: str) -> tuple[Part, ...]:
        if architecture.endswith("ForImageClassification"):
            return describe_classifier(images, family, config, architecture)
        return describe_pair(images, texts, family, config, architecture)

    return Family(describe=describe, architectures=architectures)


FAMILIES: dict[str, Family] = {
    "clip": _pairs(CLIP_IMAGES, _clip_texts, "clip", "CLIPModel", "CLIPForImageClassification"),
    "metaclip_2": _pairs(CLIP_IMAGES, _clip_texts, "metaclip_2", "MetaClip2Model", "MetaClip2ForImageClassification"),
    "siglip": _pairs(SIGLIP_IMAGES, _siglip_texts, "siglip", "SiglipModel", "SiglipForImageClassification"),
    "chinese_clip": _pairs(CLIP_IMAGES, _bert_texts, "chinese_clip", "ChineseCLIPModel"),
    "clip_vision_model": _images(CLIP_IMAGES, "clip_vision_model", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "metaclip_2_vision_model": _images(CLIP_IMAGES, "metaclip_2_vision_model", "MetaClip2VisionModel", "MetaClip2VisionModelWithProjection"),
    "chinese_clip_vision_model": _images(CLIP_IMAGES, "chinese_clip_vision_model", "ChineseCLIPVisionModel"),
    "altclip_vision_model": _images(CLIP_IMAGES, "altclip_vision_model", "AltCLIPVisionModel"),
    "siglip_vision_model": _images(SIGLIP_IMAGES, "siglip_vision_model", "SiglipVisionModel"),
    "clip_text_model": _texts(CLIP_TEXTS, "clip_text_model", "CLIPTextModel", "CLIPTextModelWithProjection"),
    "metaclip_2_text_model": _texts(CLIP_TEXTS, "metaclip_2_text_model", "MetaClip2TextModel", "MetaClip2TextModelWithProjection"),
    "siglip_text_model": _texts(SIGLIP_TEXTS, "siglip_text_model", "SiglipTextModel"),
}
