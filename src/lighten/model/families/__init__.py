"""The architectures that have a formula: one module a family, one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lighten.errors import UnsupportedFamily
from lighten.model.families import bert, llama
from lighten.model.spec import Part

Describe = Callable[[Mapping[str, Any], str], tuple[Part, ...]]

FAMILIES: dict[str, Describe] = {"bert": bert.describe, "llama": llama.describe}
"""`model_type` → the function that gives the parts of (config, architecture), with the names that `architecture` gives its modules."""

ARCHITECTURES: dict[str, tuple[str, ...]] = {"bert": bert.ARCHITECTURES, "llama": llama.ARCHITECTURES}


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """The parts of a model.

    Raises:
        UnsupportedFamily: no formula for its `model_type` or its architecture.
        ModelError: the config lacks fields.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedFamily(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}.")
    if architecture not in ARCHITECTURES[family]:
        raise UnsupportedFamily(f"{family} architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES[family])}.")
    return FAMILIES[family](config, architecture)
