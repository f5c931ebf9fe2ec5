"""Vision transformers over the patches of one image size, as `transformers` computes them (ViT: Dosovitskiy et al. 2020, arXiv:2010.11929).

A plain one is a `Vit`: data over one builder. Its rows are numbers, for an image has as many patches as its config says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities, optional
from lighten.model.families._tower import (
    Block,
    BlockNames,
    act_fn,
    block_of,
    blocks,
    elementwise,
    labels_of,
    layernorm,
    linear,
    pair,
    positive,
    says,
    table,
)
from lighten.model.spec import Attention, Conv, Part

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Vit:
    """A plain vision transformer. Where a value is a string, it names the field of the config that says it.

    Attributes:
        base: what a task head's checkpoint puts before the names of the model without head.
        layer: name of a block, `{}` its number.
        tokens: extra rows beside the patches: name → how many.
        mask_token: shape of a mask token but for its last dimension; `mask_when` says whether there is one, for each architecture.
        positions: learned positions of all rows; False: none, or rotary ones.
        registers_have_positions: the extra rows after the class token have learned positions of their own.
        relative: fields that say whether the layers share a table of relative positions, or have one each (BEiT).
        bias: of query, key and value.
        pooler: the model without head ends in a dense layer over the class token.
        heads: architecture → its parts after the tower.
        swiglu: width of a gated MLP that stores gate and up as one matrix (`weights_in`), where the config asks for it (DINOv2).
        msn: its task head's checkpoint leaves the base's name off the layers, as transformers 5 saves them.
    """

    base: str
    heads: Mapping[str, Callable[[Vit, Config, Grid], list[Part]]]
    layer: str = "encoder.layer.{}"
    names: BlockNames = field(default_factory=BlockNames)
    patch: str = "embeddings.patch_embeddings.projection"
    tokens: Mapping[str, int | str] = field(default_factory=lambda: {"cls_token": 1})
    positions: bool | str = True
    positioned: frozenset[str] = frozenset({"cls_token", "distillation_token", "detection_tokens"})
    mask_shape: tuple[int, ...] = (1, 1)
    mask_when: Callable[[Config, str], bool] = lambda config, architecture: False
    relative: tuple[str, str] | None = None
    bias: tuple[bool | str, bool | str, bool | str] = ("qkv_bias", "qkv_bias", "qkv_bias")
    out_bias: bool | str = True
    mlp_bias: bool | str = True
    scaled: bool | str = False
    gated: bool | str = False
    rotary: bool = False
    swiglu: str | None = None
    mlp_ratio: str | None = None
    norm: str = "layernorm"
    norm_unless: str | None = None
    kept: str | None = None
    msn: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Patches of an image, and the rows that the blocks see.

    Attributes:
        before, after: extra rows before the patches and after them.
    """

    height: int
    width: int
    rows: int
    hidden: int
    prefix: str

    @property
    def patches(self) -> int:
        return self.height * self.width


def grid_of(config: Config, family: str) -> tuple[int, int]:
    """Patches of the image, down and across.

    Raises:
        ModelError: sizes that are no positive whole numbers, or a patch that is larger than the image.
    """
    image, patch = pair(config, "image_size", family), pair(config, "patch_size", family)
    if image[0] < patch[0] or image[1] < patch[1]:
        raise ModelError(f"config.json of a {family} model: image_size={config['image_size']} is smaller than patch_size={config['patch_size']}.")
    return image[0] // patch[0], image[1] // patch[1]


def patch_conv(name: str, config: Config, family: str, patches: int, *, bias: bool = True) -> Conv:
    """The convolution that makes one row of each patch."""
    c = positive(config, ("hidden_size", "num_channels"), family)
    kernel = pair(config, "patch_size", family)
    return Conv(
        name=name, component="embedding", rows=patches, in_channels=c["num_channels"], out_channels=c["hidden_size"], kernel=kernel, bias=bias
    )


def describe_vit(vit: Vit, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of a plain vision transformer with the head that its architecture has."""
    check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate", "mask_ratio"))
    height, width = grid_of(config, family)
    shape = _block(vit, config, family)
    extra = {name: count if isinstance(count, int) else _count(config, count) for name, count in vit.tokens.items()}
    rows = height * width + sum(extra.values())
    if vit.kept is not None:
        rows = int(height * width * (1 - config.get(vit.kept, 0.0))) + sum(extra.values())
    prefix = "" if architecture.endswith("Model") else f"{vit.base}."
    grid = Grid(height=height, width=width, rows=rows, hidden=shape.hidden, prefix=prefix)
    layer = vit.layer if vit.msn or architecture.endswith("Model") else f"{prefix}{vit.layer}"
    parts: list[Part] = [
        patch_conv(f"{prefix}{vit.patch}", config, family, grid.patches),
        *_embeddings(vit, config, architecture, grid, extra),
        *_relative(vit, config, grid, shape, layer),
        *blocks(layer, config["num_hidden_layers"], shape, rows),
    ]
    if vit.relative and says(config, vit.relative[1]):
        parts = _with_relative(parts, grid, shape, layer)
    if vit.norm and not (vit.norm_unless and says(config, vit.norm_unless)):
        parts.append(layernorm(f"{prefix}{vit.norm}", shape.hidden, rows))
    return (*parts, *vit.heads[architecture](vit, config, grid))


def _count(config: Config, name: str) -> int:
    value = config.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"config.json: {name}={value!r} is not a whole number.")
    return value


def _block(vit: Vit, config: Config, family: str) -> Block:
    q, k, v = (says(config, each) for each in vit.bias)
    traits: dict[str, Any] = {
        "q_bias": q, "k_bias": k, "v_bias": v, "out_bias": says(config, vit.out_bias), "mlp_bias": says(config, vit.mlp_bias),
        "scaled": says(config, vit.scaled), "gated": says(config, vit.gated), "rotary": vit.rotary, "names": vit.names,
    }  # fmt: skip
    if vit.mlp_ratio:
        hidden, ratio = positive(config, ("hidden_size",), family)["hidden_size"], config.get(vit.mlp_ratio)
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < 1000:
            raise ModelError(f"config.json of a {family} model: {vit.mlp_ratio}={ratio!r} is not a ratio of the MLP's width to hidden_size.")
        traits["ffn"] = int(hidden * ratio)
    if vit.swiglu and says(config, vit.swiglu):
        traits["ffn"] = (int(traits["ffn"] * 2 / 3) + 7) // 8 * 8
        traits["packed"] = True
        traits["act"] = "silu"
        traits["names"] = replace(vit.names, up="mlp.weights_in", down="mlp.weights_out")
    return block_of(config, family, **traits)


def _embeddings(vit: Vit, config: Config, architecture: str, grid: Grid, extra: Mapping[str, int]) -> list[Part]:
    at, hidden = f"{grid.prefix}embeddings", grid.hidden
    shapes: dict[str, tuple[int, ...]] = {name: (1, count, hidden) for name, count in extra.items()}
    if vit.mask_when(config, architecture):
        shapes["mask_token"] = (*vit.mask_shape, hidden)
    learned = says(config, vit.positions)
    if learned:
        with_positions = sum(count for name, count in extra.items() if name in vit.positioned)
        shapes["position_embeddings"] = (1, grid.patches + with_positions, hidden)
    parts: list[Part] = [table(at, shapes)] if shapes else []
    return [*parts, elementwise(f"{at}.add", hidden, "add", "embedding", grid.patches)] if learned else parts


def _relative_table(name: str, grid: Grid, heads: int) -> Part:
    """One bias for each head and distance of two patches, and three of the class token (BEiT; Bao et al. 2021, arXiv:2106.08254)."""
    distances = (2 * grid.height - 1) * (2 * grid.width - 1) + 3
    return table(name, {"relative_position_bias_table": (distances, heads)}, "attention")


def _relative(vit: Vit, config: Config, grid: Grid, shape: Block, layer: str) -> list[Part]:
    if not (vit.relative and says(config, vit.relative[0])):
        return []
    return [_relative_table(f"{layer.split('.layer.')[0]}.relative_position_bias", grid, shape.heads)]


def _with_relative(parts: list[Part], grid: Grid, shape: Block, layer: str) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Attention):
            found.append(_relative_table(f"{part.name}.relative_position_bias", grid, shape.heads))
        found.append(part)
    return found


# --- heads


def _none(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return []


def pooler(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    size = optional(config, "pooler_output_size") or grid.hidden
    return [
        linear(f"{grid.prefix}pooler.dense", grid.hidden, size, True, "pooler", "sequence"),
        act_fn(f"{grid.prefix}pooler.activation", str(config.get("pooler_act") or "tanh"), size, "pooler", "sequence"),
    ]


def _mean_pooler(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return [layernorm(f"{grid.prefix}pooler.layernorm", grid.hidden, "sequence", "pooler")] if config.get("use_mean_pooling") else []


def _classifier(vit: Vit, config: Config, grid: Grid, *, names: tuple[str, ...] = ("classifier",), times: int = 1) -> list[Part]:
    return [linear(name, times * grid.hidden, labels_of(config), True, "head", "sequence") for name in names]


def _pooled_classifier(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return [*_mean_pooler(vit, config, grid), *_classifier(vit, config, grid)]


def _pixels(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    """A 1 × 1 convolution from each patch to its pixels, over the largest square of patches (SimMIM; Xie et al. 2021, arXiv:2111.09886)."""
    c = positive(config, ("encoder_stride", "num_channels"), vit.base)
    outputs = c["encoder_stride"] ** 2 * c["num_channels"]
    rows = math.isqrt(grid.patches) ** 2
    return [Conv(name="decoder.0", component="head", rows=rows, in_channels=grid.hidden, out_channels=outputs, kernel=(1, 1))]


def _visual_tokens(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    size = positive(config, ("vocab_size",), vit.base)["vocab_size"]
    return [
        layernorm("layernorm", grid.hidden, grid.rows, "head"),
        linear("lm_head", grid.hidden, size, True, "head", grid.patches),
    ]


def _reconstruction(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    """The decoder of a masked autoencoder sees all patches (He et al. 2021, arXiv:2111.06377)."""
    own = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size")
    sizes = positive(config, (*own, "num_channels"), vit.base)
    inner = {**config, **{name.removeprefix("decoder_"): sizes[name] for name in own}}
    patch = pair(config, "patch_size", vit.base)
    hidden, rows = sizes["decoder_hidden_size"], grid.patches + 1
    shape = block_of(inner, vit.base, **dict.fromkeys(("q_bias", "k_bias", "v_bias"), says(config, "qkv_bias")))
    return [
        linear("decoder.decoder_embed", grid.hidden, hidden, True, "head", grid.rows),
        table("decoder", {"mask_token": (1, 1, hidden), "decoder_pos_embed": (1, rows, hidden)}),
        elementwise("decoder.add", hidden, "add", "embedding", rows),
        *blocks("decoder.decoder_encoder.layer.{}", sizes["decoder_num_hidden_layers"], shape, rows),
        layernorm("decoder.decoder_norm", hidden, rows),
        linear("decoder.decoder_pred", hidden, patch[0] * patch[1] * sizes["num_channels"], True, "head", rows),
    ]


def _detector(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    """Class and box of each detection token, each by an MLP of three layers (DETR; Carion et al. 2020, arXiv:2005.12872)."""
    tokens, hidden = _count(config, "num_detection_tokens"), grid.hidden
    parts: list[Part] = []
    for name, outputs in (("class_labels_classifier", labels_of(config) + 1), ("bbox_predictor", 4)):
        for layer, size in enumerate((hidden, hidden, outputs)):
            parts.append(linear(f"{name}.layers.{layer}", hidden, size, True, "head", tokens))
            if layer < 2:
                parts.append(elementwise(f"{name}.relu{layer}", hidden, "relu", "head", tokens))
    return [*parts, elementwise("bbox_predictor.sigmoid", 4, "sigmoid", "head", tokens)]


def _mid_positions(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    """Positions added after each block but the last."""
    count = positive(config, ("num_hidden_layers",), vit.base)["num_hidden_layers"] - 1
    if not config.get("use_mid_position_embeddings", True):
        return []
    return [table(f"{grid.prefix}encoder", {"mid_position_embeddings": (count, 1, grid.rows, grid.hidden)})]


def _yolos_pooled(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return [*_mid_positions(vit, config, grid), *pooler(vit, config, grid)]


def _yolos_detector(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return [*_mid_positions(vit, config, grid), *_detector(vit, config, grid)]


def _masked(config: Config, architecture: str) -> bool:
    return architecture.endswith("ForMaskedImageModeling")


def _mask_flag(config: Config, architecture: str) -> bool:
    return bool(config.get("use_mask_token"))


DINO_NAMES = BlockNames(attention_norm="norm1", mlp_norm="norm2", up="mlp.fc1", down="mlp.fc2")
BEIT_NAMES = BlockNames(attention_scale="lambda_1", mlp_scale="lambda_2")
BEIT = {
    "tokens": {"cls_token": 1}, "positions": "use_absolute_position_embeddings", "mask_when": _mask_flag, "bias": (True, False, True),
    "relative": ("use_shared_relative_position_bias", "use_relative_position_bias"), "scaled": "layer_scale_init_value",
    "names": BEIT_NAMES, "norm_unless": "use_mean_pooling",
}  # fmt: skip
DINO = {"scaled": True, "swiglu": "use_swiglu_ffn", "mlp_ratio": "mlp_ratio", "mask_shape": (1,), "names": DINO_NAMES}

VITS: dict[str, Vit] = {
    "vit": Vit(
        base="vit", mask_when=_masked,
        heads={"ViTModel": pooler, "ViTForImageClassification": _classifier, "ViTForMaskedImageModeling": _pixels},
    ),
    "deit": Vit(
        base="deit", mask_when=_masked, tokens={"cls_token": 1, "distillation_token": 1},
        heads={
            "DeiTModel": pooler, "DeiTForImageClassification": _classifier, "DeiTForMaskedImageModeling": _pixels,
            "DeiTForImageClassificationWithTeacher": partial(_classifier, names=("cls_classifier", "distillation_classifier")),
        },
    ),
    "beit": Vit(
        base="beit", **BEIT,  # type: ignore[arg-type]
        heads={"BeitModel": _mean_pooler, "BeitForImageClassification": _pooled_classifier, "BeitForMaskedImageModeling": _visual_tokens},
    ),
    "data2vec-vision": Vit(
        base="data2vec_vision", **BEIT,  # type: ignore[arg-type]
        heads={"Data2VecVisionModel": _none, "Data2VecVisionForImageClassification": _pooled_classifier},
    ),
    "dinov2": Vit(
        base="dinov2", mask_when=_mask_flag, **DINO,  # type: ignore[arg-type]
        heads={"Dinov2Model": _none, "Dinov2ForImageClassification": partial(_classifier, times=2)},
    ),
    "dinov2_with_registers": Vit(
        base="dinov2_with_registers", mask_when=lambda config, architecture: True, tokens={"cls_token": 1, "register_tokens": "num_register_tokens"},
        **DINO,  # type: ignore[arg-type]
        heads={"Dinov2WithRegistersModel": _none, "Dinov2WithRegistersForImageClassification": partial(_classifier, times=2)},
    ),
    "dinov3_vit": Vit(
        base="dinov3_vit", layer="layer.{}", patch="embeddings.patch_embeddings", norm="norm", positions=False, rotary=True, scaled=True,
        tokens={"cls_token": 1, "register_tokens": "num_register_tokens"}, mask_when=lambda config, architecture: True,
        bias=("query_bias", "key_bias", "value_bias"), out_bias="proj_bias", mlp_bias="mlp_bias", gated="use_gated_mlp",
        names=BlockNames(
            attention="attention", q="attention.q_proj", k="attention.k_proj", v="attention.v_proj", out="attention.o_proj",
            attention_norm="norm1", mlp_norm="norm2", up="mlp.up_proj", down="mlp.down_proj",
        ),
        heads={"DINOv3ViTModel": _none},
    ),
    "ijepa": Vit(base="ijepa", tokens={}, heads={"IJepaModel": _none, "IJepaForImageClassification": _classifier}),
    "vit_mae": Vit(base="vit", kept="mask_ratio", heads={"ViTMAEModel": _none, "ViTMAEForPreTraining": _reconstruction}),
    "vit_msn": Vit(base="vit", msn=True, heads={"ViTMSNModel": _none, "ViTMSNForImageClassification": _classifier}),
    "yolos": Vit(
        base="vit", tokens={"cls_token": 1, "detection_tokens": "num_detection_tokens"},
        heads={"YolosModel": _yolos_pooled, "YolosForObjectDetection": _yolos_detector},
    ),
}  # fmt: skip


FAMILIES: dict[str, Family] = {name: Family(describe=partial(describe_vit, vit, name), architectures=tuple(vit.heads)) for name, vit in VITS.items()}
