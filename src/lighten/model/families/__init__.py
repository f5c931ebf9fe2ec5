"""The architectures that have a formula: one module a kind of model, one entry for each `model_type` in its `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.errors import UnsupportedFamily
from lighten.model.families import (
    bert,
    blip,
    chunked,
    decoders,
    encoders,
    experts,
    imagegpt,
    llama,
    pairs,
    pyramid,
    recurrent,
    seq2seq,
    speech,
    video,
    vision,
)
from lighten.model.families._config import complete
from lighten.model.families._family import Family
from lighten.model.spec import Part

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **llama.FAMILIES,
    **decoders.FAMILIES,
    **experts.FAMILIES,
    **recurrent.FAMILIES,
    **chunked.FAMILIES,
    **vision.FAMILIES,
    **speech.FAMILIES,
    **pairs.FAMILIES,
    **encoders.FAMILIES,
    **seq2seq.FAMILIES,
    **pyramid.FAMILIES,
    **video.FAMILIES,
    **blip.FAMILIES,
    **imagegpt.FAMILIES,
}
"""`model_type` → its architectures and the function that gives their parts."""


def has_formula(config: Mapping[str, Any], architecture: str) -> bool:
    """Whether a formula describes the architecture."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and architecture in (*family.architectures, *family.elsewhere)


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """The parts of a model.

    Raises:
        UnsupportedFamily: no formula for its `model_type` or its architecture.
        ModelError: the config lacks fields.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedFamily(f"model_type {family!r} has no formula; these have one: {', '.join(FAMILIES)}.", config=config)
    known = (*FAMILIES[family].architectures, *FAMILIES[family].elsewhere)
    if architecture not in known:
        raise UnsupportedFamily(f"{family} architecture {architecture!r} has no formula; these have one: {', '.join(known)}.", config=config)
    return FAMILIES[family].describe(complete(config), architecture)
