"""Which fields of a config.json have to change so that it describes a model of other shapes, found by trial.

Families name the same size differently (`intermediate_size`, `n_inner`, `encoder_ffn_dim` and `decoder_ffn_dim`), or take it from another field.
No table says so here: fields that hold the old size are set to the new one, alone, in pairs and in threes, until the family's own formula gives
the wanted parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain, combinations, product
from typing import Any, TypeAlias

from lighten.errors import LightenError
from lighten.model.families import describe
from lighten.model.families._config import complete
from lighten.model.spec import ModelSpec, Part

MOST_FIELDS = 3
"""Fields that change at once: choice, no model of those that are described needs more (a width, its heads, and what was derived from the width)."""
Move: TypeAlias = tuple[tuple[str, ...], int]
"""Where a field lies in the config, through those nested in it, and its new value."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a changed config has to describe.

    Attributes:
        changes: old size → new size, of the fields that may change.
        explicit: sizes that a field without a value may be given, where they followed from another field before.
        fits: whether parts are the wanted ones.
    """

    changes: Mapping[int, int]
    explicit: tuple[int, ...]
    fits: Callable[[tuple[Part, ...]], bool]


def find_config(config: Mapping[str, Any], architecture: str, wanted: Wanted) -> tuple[dict[str, Any], tuple[Part, ...]] | None:
    """The config with the fewest changed fields that describes the wanted parts, and those parts; None: there is none.

    Fields that have the old size come first, then those among which one had no value.
    """
    sized = list(_sized(config, wanted.changes))
    empty = list(product(_empty(config), wanted.explicit))
    alone = chain.from_iterable(combinations(sized, count) for count in range(1, MOST_FIELDS + 1))
    completed = ((*some, one) for count in range(MOST_FIELDS) for some in combinations(sized, count) for one in empty)
    for moves in chain(alone, completed):
        changed = with_fields(config, moves)
        parts = parts_of(changed, architecture)
        if parts is not None and wanted.fits(parts):
            return changed, parts
    return None


def parts_of(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...] | None:
    """What a config describes; None: nothing, for its fields do not go together."""
    try:
        return describe(config, architecture)
    except (LightenError, ArithmeticError, ValueError, LookupError):  # a formula on sizes that it was not made for
        return None


def with_fields(config: Mapping[str, Any], moves: tuple[Move, ...]) -> dict[str, Any]:
    """A config with other values in some fields."""
    changed = dict(config)
    for (name, *inner), value in moves:
        changed[name] = with_fields(changed[name], ((tuple(inner), value),)) if inner else value
    return changed


def _sized(config: Mapping[str, Any], changes: Mapping[int, int], above: tuple[str, ...] = ()) -> Iterator[Move]:
    """Fields that hold one of the old sizes."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sized(value, changes, (*above, name))
        elif isinstance(value, int) and not isinstance(value, bool) and value in changes:
            yield (*above, name), changes[value]


def _empty(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Fields without a value: null, or left out and null by default; nested ones too."""
    known = complete(config)
    found = [(name,) for name, value in known.items() if value is None]
    inner = (((name, *path) for path in _empty(value)) for name, value in config.items() if isinstance(value, Mapping) and "model_type" in value)
    return [*found, *chain.from_iterable(inner)]


def carried(spec: ModelSpec, base: tuple[Part, ...], parts: tuple[Part, ...], origin: Callable[[str], str]) -> tuple[Part, ...]:
    """The parts of a changed config with all that earlier steps did to those of the spec: formats, windows.

    Args:
        base: the parts of the spec's own config.
        parts: those of the changed one.
        origin: the name that a part of `parts` had in `base`.
    """
    before = {_key(part, index): (part, now) for index, (part, now) in _numbered(base, spec.parts)}
    found = []
    for index, (part, _) in _numbered(parts, parts):
        described, now = before[_key(replace(part, name=origin(part.name)), index)]  # the wanted parts have their like in the base
        changed = {each.name: new for each in fields(part) if (new := getattr(part, each.name)) != getattr(described, each.name)}
        found.append(replace(now, **changed))
    return tuple(found)


def _numbered(parts: tuple[Part, ...], beside: tuple[Part, ...]) -> Iterator[tuple[int, tuple[Part, Part]]]:
    """Each part with how many of its kind and name came before it."""
    seen: dict[tuple[type, str], int] = {}
    for part, other in zip(parts, beside, strict=True):
        number = seen[type(part), part.name] = seen.get((type(part), part.name), -1) + 1
        yield number, (part, other)


def _key(part: Part, number: int) -> tuple[type, str, int]:
    return type(part), part.name, number
