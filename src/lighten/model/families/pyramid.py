"""Image models whose patches grow coarser and wider from stage to stage: windowed attention, reduced keys, or convolutions alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities
from lighten.model.families._tower import (
    BERT_NAMES,
    Block,
    BlockNames,
    Buffers,
    act_fn,
    attention,
    check_layers,
    divided,
    elementwise,
    labels_of,
    layernorm,
    lengths,
    linear,
    mlp,
    pair,
    positive,
    residual,
    says,
    table,
)
from lighten.model.spec import Conv, Part, Product

Config = Mapping[str, Any]


class Cells(NamedTuple):
    """Positions of an image at one stage, down and across."""

    height: int
    width: int

    @property
    def rows(self) -> int:
        return self.height * self.width

    def convolved(self, kernel: int, stride: int, padding: int = 0) -> Cells:
        """Positions that a convolution leaves.

        Raises:
            ModelError: a kernel that is larger than the image.
        """
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in self)
        if min(height, width) < 1:
            raise ModelError(f"config.json: an image of {self.height} × {self.width} positions is smaller than a kernel of {kernel}.")
        return Cells(height, width)

    def divided_up(self, size: int) -> Cells:
        """Pieces of `size` × `size` that cover it, the last ones padded."""
        return Cells(-(-self.height // size), -(-self.width // size))


def _prefix(architecture: str, base: str) -> str:
    return "" if architecture.endswith("Model") else f"{base}."


def _ratio(config: Config, name: str, family: str) -> float:
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1000:
        raise ModelError(f"config.json of a {family} model: {name}={value!r} is not a ratio of the MLP's width to the stage's.")
    return value


def _conv(name: str, cells: Cells, columns: int, outputs: int, kernel: int, groups: int = 1) -> Conv:
    square = (kernel, kernel)
    return Conv(name=name, component="embedding", rows=cells.rows, in_channels=columns, out_channels=outputs, kernel=square, groups=groups)


def _classifier(config: Config, hidden: int) -> Part:
    return linear("classifier", hidden, labels_of(config), True, "head", "sequence")


# --- Swin


@dataclass(frozen=True, kw_only=True)
class Swin:
    """Traits of a transformer over shifted windows (Swin: Liu et al. 2021, arXiv:2103.14030; Swin V2: Liu et al. 2021, arXiv:2111.09883).

    Attributes:
        second: V2: norms after attention and MLP, cosine attention with a learned scale, a key without bias, and positions by an MLP.
        final_norm: a norm after the last stage.
        saves_index: its checkpoints hold each window's index of relative positions.
    """

    base: str
    heads: tuple[str, ...]
    second: bool = False
    final_norm: bool = True
    saves_index: bool = False


def describe_swin(swin: Swin, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of a Swin Transformer with the head that its architecture has."""
    check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"))
    c = positive(config, ("embed_dim", "window_size", "num_channels", "patch_size"), family)
    stages, at = lengths(config, ("depths", "num_heads"), family), _prefix(architecture, swin.base)
    check_layers(sum(stages["depths"]))
    image, patch = Cells(*pair(config, "image_size", family)), c["patch_size"]
    if min(image) < patch:
        raise ModelError(f"config.json of a {family} model: image_size={config['image_size']} is smaller than patch_size={patch}.")
    cells = image.divided_up(patch)
    known = Cells(image.height // patch, image.width // patch)  # the patches that it has positions for, of the part that is not padded
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, c["embed_dim"])} if architecture.endswith("ForMaskedImageModeling") else {}
    if says(config, "use_absolute_embeddings"):
        if swin.second or known != cells:
            raise ModelError(
                f"config.json of a {family} model: use_absolute_embeddings={config['use_absolute_embeddings']!r} cannot be added to the patches of "
                "this image in transformers; Swin V1 takes it where image_size is a multiple of patch_size."
            )
        shapes["position_embeddings"] = (1, known.rows, c["embed_dim"])
    parts: list[Part] = [
        _conv(f"{at}embeddings.patch_embeddings.projection", cells, c["num_channels"], c["embed_dim"], patch),
        layernorm(f"{at}embeddings.norm", c["embed_dim"], cells.rows),
        *([table(f"{at}embeddings", shapes)] if shapes else []),
    ]
    hidden = c["embed_dim"]
    for stage, (depth, heads) in enumerate(zip(stages["depths"], stages["num_heads"], strict=True)):
        window = min(c["window_size"], *cells, *known) if swin.second else min(c["window_size"], *cells)
        shape = _swin_block(swin, config, family, hidden, heads)
        for layer in range(depth):
            parts += _swin_layer(f"{at}encoder.layers.{stage}.blocks.{layer}", swin, shape, cells, window, c["window_size"])
        if stage < len(stages["depths"]) - 1:
            cells, known = cells.divided_up(2), Cells(max(1, known.height // 2), max(1, known.width // 2))
            parts += _merging(f"{at}encoder.layers.{stage}.downsample", swin, hidden, cells)
            hidden *= 2
    if swin.final_norm:
        parts.append(layernorm(f"{at}layernorm", hidden, cells.rows))
    return (*parts, *_swin_head(config, architecture, family, hidden, cells))


def _swin_block(swin: Swin, config: Config, family: str, hidden: int, heads: int) -> Block:
    bias = says(config, "qkv_bias")
    names = replace(BERT_NAMES, attention_norm="layernorm_before", mlp_norm="layernorm_after")
    return Block(
        hidden=hidden, ffn=int(_ratio(config, "mlp_ratio", family) * hidden), heads=heads, kv_heads=heads, head_dim=divided(hidden, heads),
        act=str(config.get("hidden_act", "gelu")), q_bias=bias, k_bias=bias and not swin.second, v_bias=bias, names=names,
    )  # fmt: skip


def _swin_layer(at: str, swin: Swin, shape: Block, cells: Cells, window: int, full_window: int) -> list[Part]:
    padded = cells.divided_up(window).rows * window * window
    mixing = attention(at, shape, padded, keys=window * window, key_rows=padded)
    positions = _second_positions(at, shape, window) if swin.second else _positions(at, swin, shape, full_window)
    mixing[3:3] = positions
    mapping = mlp(at, shape, cells.rows)
    if not swin.second:
        return [
            *residual(at, shape, mixing, shape.names.attention_norm, cells.rows),
            *residual(at, shape, mapping, shape.names.mlp_norm, cells.rows),
        ]
    found: list[Part] = []
    for branch, name in ((mixing, shape.names.attention_norm), (mapping, shape.names.mlp_norm)):
        found += [*branch, layernorm(f"{at}.{name}", shape.hidden, cells.rows)]
        found.append(elementwise(f"{at}.{name}.add", shape.hidden, "add", branch[-1].component, cells.rows))
    return found


def _positions(at: str, swin: Swin, shape: Block, window: int) -> list[Part]:
    """One bias for each head and distance of two positions of a window."""
    name = f"{at}.attention.self"
    found: list[Part] = [table(name, {"relative_position_bias_table": ((2 * window - 1) ** 2, shape.heads)}, "attention")]
    if swin.saves_index:
        found.append(Buffers(name=name, component="attention", shapes={f"{name}.relative_position_index": (window**2, window**2)}))
    return found


POSITION_HIDDEN = 512
"""Width of the MLP that gives Swin V2's relative positions (arXiv:2111.09883, section 3.3; transformers has it as a constant too)."""


def _second_positions(at: str, shape: Block, window: int) -> list[Part]:
    """A bias for each head and distance by an MLP over the distances, once for all images."""
    name, distances = f"{at}.attention.self", (2 * window - 1) ** 2
    mlp_at = "continuous_position_bias_mlp"
    return [
        table(
            name,
            {
                "logit_scale": (shape.heads, 1, 1),
                f"{mlp_at}.0.weight": (POSITION_HIDDEN, 2),
                f"{mlp_at}.0.bias": (POSITION_HIDDEN,),
                f"{mlp_at}.2.weight": (shape.heads, POSITION_HIDDEN),
            },
            "attention",
        ),
        Product(name=f"{name}.{mlp_at}.0", component="attention", rows="position", m=distances, k=2, n=POSITION_HIDDEN),
        Product(name=f"{name}.{mlp_at}.2", component="attention", rows="position", m=distances, k=POSITION_HIDDEN, n=shape.heads),
    ]


def _merging(at: str, swin: Swin, hidden: int, cells: Cells) -> list[Part]:
    norm = layernorm(f"{at}.norm", (2 if swin.second else 4) * hidden, cells.rows)
    reduction = linear(f"{at}.reduction", 4 * hidden, 2 * hidden, False, "embedding", cells.rows)
    return [reduction, norm] if swin.second else [norm, reduction]


def _swin_head(config: Config, architecture: str, family: str, hidden: int, cells: Cells) -> list[Part]:
    if architecture.endswith("Model"):
        return []
    if architecture.endswith("ForImageClassification"):
        return [_classifier(config, hidden)]
    c = positive(config, ("encoder_stride", "num_channels"), family)
    return [replace(_conv("decoder.0", cells, hidden, c["encoder_stride"] ** 2 * c["num_channels"], 1), component="head")]


# --- ConvNeXt


def describe_convnext(second: bool, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of ConvNeXt (Liu et al. 2022, arXiv:2201.03545), or of V2 with global response norms (Woo et al. 2023, arXiv:2301.00808)."""
    check_probabilities(config, ("drop_path_rate",))
    c = positive(config, ("patch_size", "num_channels"), family)
    stages, at = lengths(config, ("hidden_sizes", "depths"), family), _prefix(architecture, family)
    if config.get("num_stages", len(stages["depths"])) != len(stages["depths"]):
        raise ModelError(f"config.json of a {family} model: num_stages={config['num_stages']} and {len(stages['depths'])} depths.")
    check_layers(sum(stages["depths"]))
    columns = stages["hidden_sizes"][0]
    cells = Cells(*pair(config, "image_size", family)).convolved(c["patch_size"], c["patch_size"])
    parts: list[Part] = [
        _conv(f"{at}embeddings.patch_embeddings", cells, c["num_channels"], columns, c["patch_size"]),
        layernorm(f"{at}embeddings.layernorm", columns, cells.rows),
    ]
    scaled = not second and says(config, "layer_scale_init_value")
    act = str(config.get("hidden_act", "gelu"))
    for stage, (hidden, depth) in enumerate(zip(stages["hidden_sizes"], stages["depths"], strict=True)):
        name = f"{at}encoder.stages.{stage}"
        if stage:
            parts.append(layernorm(f"{name}.downsampling_layer.0", columns, cells.rows))
            cells = cells.convolved(2, 2)
            parts.append(_conv(f"{name}.downsampling_layer.1", cells, columns, hidden, 2))
        for layer in range(depth):
            parts += _convnext_layer(f"{name}.layers.{layer}", hidden, cells, act, second=second, scaled=scaled)
        columns = hidden
    parts.append(layernorm(f"{at}layernorm", columns, "sequence"))
    return (*parts, *([] if architecture.endswith("Model") else [_classifier(config, columns)]))


def _convnext_layer(at: str, hidden: int, cells: Cells, act: str, *, second: bool, scaled: bool) -> list[Part]:
    rows, wide = cells.rows, 4 * hidden
    response: list[Part] = [
        table(f"{at}.grn", {"weight": (1, 1, 1, wide), "bias": (1, 1, 1, wide)}, "norm"),
        elementwise(f"{at}.grn.multiply", wide, "multiply", "norm", rows, flops=5),
    ]
    scale: list[Part] = [
        table(at, {"layer_scale_parameter": (hidden,)}, "mlp"),
        elementwise(f"{at}.scale", hidden, "multiply", "mlp", rows),
    ]
    return [
        replace(_conv(f"{at}.dwconv", cells, hidden, hidden, 7, hidden), component="mlp"),
        layernorm(f"{at}.layernorm", hidden, rows),
        linear(f"{at}.pwconv1", hidden, wide, True, "mlp", rows),
        act_fn(f"{at}.act", act, wide, "mlp", rows),
        *(response if second else []),
        linear(f"{at}.pwconv2", wide, hidden, True, "mlp", rows),
        *(scale if scaled else []),
        elementwise(f"{at}.add", hidden, "add", "mlp", rows),
    ]


# --- PVT


@dataclass(frozen=True, kw_only=True)
class PvtNames:
    """Where the checkpoint of a pyramid vision transformer keeps a stage, `{0}` its number."""

    patch: str
    norm: str
    block: str
    reduction: str
    reduced_norm: str
    names: BlockNames
    ratios: str


PVT_BLOCK = BlockNames(
    attention="attention.self", q="attention.self.query", k="attention.self.key", v="attention.self.value", attention_norm="layer_norm_1",
    up="mlp.dense1", down="mlp.dense2", mlp_norm="layer_norm_2",
)  # fmt: skip
PVT = PvtNames(
    patch="encoder.patch_embeddings.{0}.projection", norm="encoder.patch_embeddings.{0}.layer_norm", block="encoder.block.{0}", names=PVT_BLOCK,
    reduction="attention.self.sequence_reduction", reduced_norm="attention.self.layer_norm", ratios="sequence_reduction_ratios",
)  # fmt: skip
PVT_V2 = PvtNames(
    patch="encoder.layers.{0}.patch_embedding.proj", norm="encoder.layers.{0}.patch_embedding.layer_norm", block="encoder.layers.{0}.blocks",
    names=replace(PVT_BLOCK, attention="attention", q="attention.query", k="attention.key", v="attention.value", out="attention.proj"),
    reduction="attention.spatial_reduction", reduced_norm="attention.layer_norm", ratios="sr_ratios",
)  # fmt: skip
LINEAR_CELLS = Cells(7, 7)
"""Keys of PVT V2's linear attention: the image pooled to 7 × 7 (Wang et al. 2021, arXiv:2106.13797, section 3.2)."""


def describe_pvt(pvt: PvtNames, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of a pyramid vision transformer (Wang et al. 2021, arXiv:2102.12122), whose keys a convolution thins out, or of V2."""
    check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"))
    columns = positive(config, ("num_channels",), family)["num_channels"]
    stages = lengths(config, ("hidden_sizes", "depths", "num_attention_heads", "patch_sizes", "strides", "mlp_ratios", pvt.ratios), family)
    check_layers(sum(stages["depths"]))
    second, at, last = pvt is PVT_V2, _prefix(architecture, family), len(stages["depths"]) - 1
    image = cells = Cells(*pair(config, "image_size", family))
    parts: list[Part] = []
    for stage, (hidden, patch, stride) in enumerate(zip(stages["hidden_sizes"], stages["patch_sizes"], stages["strides"], strict=True)):
        cells = cells.convolved(patch, stride, patch // 2) if second else cells.convolved(stride, patch)
        parts.append(_conv(at + pvt.patch.format(stage), cells, columns, hidden, patch if second else stride))
        parts.append(layernorm(at + pvt.norm.format(stage), hidden, cells.rows))
        token = not second and stage == last
        if not second:
            side = image if stage == 0 else Cells(*(size // 2 ** (stage + 1) for size in image))
            parts += _pvt_positions(f"{at}encoder.patch_embeddings.{stage}", Cells(*(size // patch for size in side)), hidden, cells, token=token)
        shape = _pvt_block(pvt, config, hidden, stages["num_attention_heads"][stage], stages["mlp_ratios"][stage])
        reduced = _reduction(stages[pvt.ratios][stage], cells, linear_attention=second and says(config, "linear_attention"))
        for layer in range(stages["depths"][stage]):
            parts += _pvt_layer(f"{at}{pvt.block.format(stage)}.{layer}", pvt, shape, cells, reduced, token)
        if second:
            parts.append(layernorm(f"{at}encoder.layers.{stage}.layer_norm", hidden, cells.rows))
        columns = hidden
    if not second:
        parts.append(layernorm(f"{at}encoder.layer_norm", columns, cells.rows + 1))
    return (*parts, *([] if architecture.endswith("Model") else [_classifier(config, columns)]))


def _pvt_positions(at: str, known: Cells, hidden: int, cells: Cells, *, token: bool) -> list[Part]:
    shapes: dict[str, tuple[int, ...]] = {"position_embeddings": (1, known.rows + token, hidden)}
    if token:
        shapes["cls_token"] = (1, 1, hidden)
    return [table(at, shapes), elementwise(f"{at}.add", hidden, "add", "embedding", cells.rows + token)]


def _pvt_block(pvt: PvtNames, config: Config, hidden: int, heads: int, ratio: int) -> Block:
    bias = says(config, "qkv_bias")
    return Block(
        hidden=hidden, ffn=hidden * ratio, heads=heads, kv_heads=heads, head_dim=divided(hidden, heads), names=pvt.names,
        act=str(config.get("hidden_act", "gelu")), q_bias=bias, k_bias=bias, v_bias=bias,
    )  # fmt: skip


class Reduction(NamedTuple):
    """Where keys are taken from instead of all positions, and the kernel of the convolution that makes them."""

    cells: Cells
    kernel: int

    @property
    def pooled(self) -> bool:
        """Whether the image is pooled first: linear attention."""
        return self.kernel == 1


def _reduction(ratio: int, cells: Cells, *, linear_attention: bool) -> Reduction | None:
    if linear_attention:
        return Reduction(LINEAR_CELLS, 1)
    return Reduction(cells.convolved(ratio, ratio), ratio) if ratio > 1 else None


def _pvt_layer(at: str, pvt: PvtNames, shape: Block, cells: Cells, reduced: Reduction | None, token: bool) -> list[Part]:
    rows, hidden = cells.rows + token, shape.hidden
    keys, reduction = rows, list[Part]()
    if reduced is not None:
        keys = reduced.cells.rows
        reduction = [
            replace(_conv(f"{at}.{pvt.reduction}", reduced.cells, hidden, hidden, reduced.kernel), component="attention"),
            layernorm(f"{at}.{pvt.reduced_norm}", hidden, keys),
            *([act_fn(f"{at}.attention.act", "gelu", hidden, "attention", keys)] if reduced.pooled else []),
        ]
    mixing = attention(at, shape, rows, keys=keys, key_rows=keys)
    mixing[1:1] = reduction
    mapping = mlp(at, shape, rows)
    if pvt is PVT_V2:
        relu = [elementwise(f"{at}.mlp.relu", shape.ffn, "relu", "mlp", rows)] if reduced is not None and reduced.pooled else []
        depthwise = _conv(f"{at}.mlp.dwconv.dwconv", cells, shape.ffn, shape.ffn, 3, shape.ffn)
        mapping[1:1] = [*relu, replace(depthwise, component="mlp")]
    return [
        *residual(at, shape, mixing, shape.names.attention_norm, rows),
        *residual(at, shape, mapping, shape.names.mlp_norm, rows),
    ]


SWINS = {
    "swin": Swin(base="swin", heads=("SwinModel", "SwinForImageClassification", "SwinForMaskedImageModeling")),
    "swinv2": Swin(base="swinv2", heads=("Swinv2Model", "Swinv2ForImageClassification", "Swinv2ForMaskedImageModeling"), second=True),
    "donut-swin": Swin(base="donut", heads=("DonutSwinModel", "DonutSwinForImageClassification"), final_norm=False, saves_index=True),
}

FAMILIES: dict[str, Family] = {
    **{name: Family(describe=partial(describe_swin, swin, name), architectures=swin.heads) for name, swin in SWINS.items()},
    "convnext": Family(describe=partial(describe_convnext, False, "convnext"), architectures=("ConvNextModel", "ConvNextForImageClassification")),
    "convnextv2": Family(
        describe=partial(describe_convnext, True, "convnextv2"), architectures=("ConvNextV2Model", "ConvNextV2ForImageClassification")
    ),
    "pvt": Family(describe=partial(describe_pvt, PVT, "pvt"), architectures=("PvtModel", "PvtForImageClassification")),
    "pvt_v2": Family(describe=partial(describe_pvt, PVT_V2, "pvt_v2"), architectures=("PvtV2Model", "PvtV2ForImageClassification")),
}
