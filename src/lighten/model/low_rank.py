"""Linears of low rank, as parts of a model and as words of its config.

A factorized linear X, y = x Wᵀ + b with W ≈ U V, is two linears in its place: `X.down` with V [rank, in_features], `X.up` with U [out_features, rank]
and the bias. So every reading of a model (FLOPs, bytes, formats) knows it. A corrected linear stays, and two linears stand beside it, `X.lora_A` and
`X.lora_B`, named as PEFT names them: y = x Ŵᵀ + b + (x Aᵀ) Bᵀ.

In memory a config says `low_rank` (module → rank) and `correction` (module → rank). `transformers` would load what it knows of a factorized model
and fill the rest with random numbers, so two things make it and others refuse: config.json names a `model_type` that no other loader has, and the
first factorized weight's own name stands in the file with no elements, which a class that is named outright finds to be of the wrong shape. A
corrected model is a whole model without its correction, and keeps its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.spec import Linear, Part, WeightFormat

RANKS, CORRECTION = "low_rank", "correction"
"""The words of a config."""
STORED_TYPE, ORIGINAL_TYPE = "lighten_low_rank", "low_rank_model_type"
"""The `model_type` of a factorized model's config.json, and the word under which that has the model's own."""
DOWN, UP = "down", "up"
CORRECTION_FOLDER = "correction"
"""Of an artifact: an adapter as PEFT reads it."""
ADAPTER_PREFIX = "base_model.model."
"""What PEFT puts before a module's name. Source: `PeftModel` wraps the model in a `LoraModel`; peft/utils/save_and_load.py."""
CORRECTION_FILE = "adapter_model.safetensors"


def pair_of(part: Linear, rank: int) -> tuple[Linear, Linear]:
    """The two linears in the place of one: x → V x → U V x."""
    plain = WeightFormat(dtype=part.weight.dtype)
    down = replace(part, name=f"{part.name}.{DOWN}", out_features=rank, bias=False, transposed=False, weight=plain)
    return down, replace(part, name=f"{part.name}.{UP}", in_features=rank, transposed=False, weight=plain)


def correction_of(part: Linear, rank: int) -> tuple[Linear, Linear]:
    """The two linears beside one."""
    plain = WeightFormat(dtype=part.weight.dtype)
    first = replace(part, name=f"{part.name}.lora_A", out_features=rank, bias=False, transposed=False, weight=plain)
    return first, replace(part, name=f"{part.name}.lora_B", in_features=rank, bias=False, transposed=False, weight=plain)


def pair_parameters(part: Linear, rank: int) -> int:
    """Elements of both factors."""
    return rank * (part.in_features + part.out_features)


def largest_rank(part: Linear) -> int:
    """The largest rank whose factors have fewer elements than the weight: the largest r < O·I / (O + I); 0 where none has."""
    return (part.in_features * part.out_features - 1) // (part.in_features + part.out_features)


def with_low_rank(parts: tuple[Part, ...], config: Mapping[str, Any], source: str = "") -> tuple[Part, ...]:
    """The parts with those that a config's `low_rank` and `correction` name exchanged, or with two more behind them.

    Raises:
        ModelError: a name that is no linear's, or no rank.
    """
    ranks, corrected = _table(config, RANKS, source), _table(config, CORRECTION, source)
    if not ranks and not corrected:
        return parts
    known = {part.name for part in parts if isinstance(part, Linear)}
    if unknown := sorted((ranks.keys() | corrected.keys()) - known):
        raise ModelError(f"{source}: its config says a rank of {unknown[0]}, which is no linear of the model.")
    return tuple(found for part in parts for found in _exchanged(part, ranks, corrected))


def _exchanged(part: Part, ranks: Mapping[str, int], corrected: Mapping[str, int]) -> Iterator[Part]:
    if isinstance(part, Linear) and part.name in ranks:
        yield from pair_of(part, ranks[part.name])
        return
    yield part
    if isinstance(part, Linear) and part.name in corrected:
        yield from correction_of(part, corrected[part.name])


def _table(config: Mapping[str, Any], word: str, source: str) -> dict[str, int]:
    found = config.get(word) or {}
    if not isinstance(found, Mapping) or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in found.values()):
        raise ModelError(f"{source}: {word} in its config is not a table of modules and ranks.")
    return dict(found)


def config_to_store(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says: of a factorized model, a type that other loaders refuse."""
    if not config.get(RANKS):
        return dict(config)
    return {**config, "model_type": STORED_TYPE, ORIGINAL_TYPE: config["model_type"]}


def config_as_stored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `config_to_store`."""
    found = dict(stored)
    if found.get("model_type") == STORED_TYPE and ORIGINAL_TYPE in found:
        found["model_type"] = found.pop(ORIGINAL_TYPE)
    return found


def has_low_rank(config: Mapping[str, Any]) -> bool:
    """Whether a model has linears that its class has not."""
    return bool(config.get(RANKS) or config.get(CORRECTION))


def mark_of(config: Mapping[str, Any]) -> str | None:
    """The name in a factorized model's file of a tensor without elements; None: not factorized."""
    return next((f"{name}.weight" for name in config.get(RANKS) or {}), None)


def is_correction(part: Part) -> bool:
    """Whether a part stands beside another linear."""
    return isinstance(part, Linear) and part.name.endswith((".lora_A", ".lora_B"))


def is_low_rank(part: Part, config: Mapping[str, Any]) -> bool:
    """Whether a part is one of two that stand for a linear, or beside one: what the model's class does not have."""
    module, _, last = part.name.rpartition(".")
    return (last in (DOWN, UP) and module in config.get(RANKS, {})) or is_correction(part)
