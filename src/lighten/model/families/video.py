"""Video transformers: a ViT over tubelets, pieces of a few frames each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._tower import labels_of, layernorm, linear, pair, positive, says, table
from lighten.model.families.vision import Grid, Vit, describe_vit, pooler
from lighten.model.spec import Attention, Conv, Part

Config = Mapping[str, Any]


def describe_video(vit: Vit, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of a ViT whose patches are tubelets: `describe_vit`, as if the frames stood one above the other."""
    frames, depth, (height, width) = _tubelets(config, family)
    image = pair(config, "image_size", family)
    count = frames // depth
    if not count or image[0] < height:
        raise ModelError(f"config.json of a {family} model: {frames} frames of {list(image)} hold no tubelet of {depth} × {height} × {width}.")
    as_image = {**config, "image_size": (image[0] // height * height * count, image[1]), "patch_size": (height, width)}
    parts = describe_vit(vit, family, as_image, architecture)
    return tuple(replace(part, kernel=(depth, *part.kernel)) if isinstance(part, Conv) else part for part in parts)


def _tubelets(config: Config, family: str) -> tuple[int, int, tuple[int, int]]:
    """Frames of a video, and the frames, height and width of a tubelet; ViViT has one field for all three."""
    frames, size = positive(config, ("num_frames",), family)["num_frames"], config.get("tubelet_size")
    if not isinstance(size, list | tuple):
        return frames, positive(config, ("tubelet_size",), family)["tubelet_size"], pair(config, "patch_size", family)
    if len(size) != 3 or not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in size):
        raise ModelError(f"config.json of a {family} model: tubelet_size={size!r} is not three positive whole numbers.")
    return frames, size[0], (size[1], size[2])


def describe_videomae(vit: Vit, family: str, config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of VideoMAE (Tong et al. 2022, arXiv:2203.12602), which keeps the biases of queries and values beside their matrices."""
    parts = describe_video(vit, family, config, architecture)
    if not says(config, "qkv_bias" if "qkv_bias" in config else "qv_bias"):  # the older name has the last word, as in transformers
        return parts
    hidden = config["hidden_size"]
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Attention):
            found.append(table(part.name, {"q_bias": (hidden,), "v_bias": (hidden,)}, "attention"))
        found.append(part)
    return tuple(found)


def _nothing(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return []


def _classifier(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return [linear("classifier", grid.hidden, labels_of(config), True, "head", "sequence")]


def _mean_classifier(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    norm: list[Part] = [layernorm("fc_norm", grid.hidden, "sequence", "head")] if says(config, "use_mean_pooling") else []
    return [*norm, *_classifier(vit, config, grid)]


VIVIT = Vit(base="vivit", heads={"VivitModel": pooler, "VivitForVideoClassification": _classifier})
"""Arnab et al. 2021, arXiv:2103.15691."""
VIDEOMAE = Vit(
    base="videomae", tokens={}, positions=False, bias=(False, False, False), norm_unless="use_mean_pooling",
    heads={"VideoMAEModel": _nothing, "VideoMAEForVideoClassification": _mean_classifier},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "vivit": Family(describe=partial(describe_video, VIVIT, "vivit"), architectures=tuple(VIVIT.heads)),
    "videomae": Family(describe=partial(describe_videomae, VIDEOMAE, "videomae"), architectures=tuple(VIDEOMAE.heads)),
}
