"""quantize(auto): each weight's width under a limit on the artifact's size, or on the average bits of a weight.

Which weight gets which width depends on how much each of them matters, and that is measured when the recipe is done (`lighten.compress.sensitivity`,
`lighten.compress.allocate`). What is known before is the bytes of every choice. The reading on a spec is therefore a stand-in that needs no weights:
every weight at the largest width that fits, then one after the other a step wider, in forward order and tables last, while the limit holds. Both
readings stay under the limit; their sizes agree to within one weight's step, and which weight is wide is the second reading's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lighten.errors import ConstraintError, RecipeError
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, WeightFormat, part_weight_bytes
from lighten.recipe.number_formats import WIDTHS, weight_format
from lighten.recipe.size import artifact_size, part_size
from lighten.recipe.words import Arguments, Parameter, columns_of, is_number, refuse_quantized, selected_parts
from lighten.units import SIZE_UNITS, parse_quantity

RUNTIME = "torch"
"""Whose container is counted where a step is read outside a recipe."""
SPARE_BYTES = 4_096
SPARE_SHARE = 1e-4
"""What is kept free under a size limit: what a config says of each distinct format, and the index of several files. Choice: both are less."""


def _is_size(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_quantity(value, SIZE_UNITS, "size") > 0
    except ConstraintError:
        return False


def widths_of(text: str) -> tuple[int, ...]:
    """
    >>> widths_of("8,4,3")
    (3, 4, 8)
    """
    return tuple(sorted(int(word) for word in text.split(",")))


def _is_widths(value: Any) -> bool:
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else []
    known = {str(width) for width in WIDTHS}
    return bool(words) and set(words) <= known and len(set(words)) == len(words)


LIMITS = {
    "size": Parameter(accepts=_is_size, says="a size such as 70MB, written size<=70MB", at_most=True),
    "bits": Parameter(accepts=lambda v: is_number(v) and 0 < v <= 16, says="average bits of a weight, written bits<=3.5", at_most=True),
    "widths": Parameter(accepts=_is_widths, says=f"widths to choose from, of {', '.join(map(str, WIDTHS))}", default="2,3,4,6,8"),
}


def check_auto(arguments: Arguments) -> str | None:
    given = [name for name in ("size", "bits") if name in arguments]
    return None if len(given) == 1 else f"give exactly one of size<= and bits<=; given: {', '.join(given) or 'none'}."


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a weight, and the bytes that it then adds to what is limited."""

    format: WeightFormat
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is to be decided: an option for each weight, whose bytes sum to `limit_bytes` at most.

    Attributes:
        options: module name → its options, narrowest first.
        elements: of all these weights.
        fixed_bytes: of all else, which a size limit holds too.
        limit: as the recipe says it.
    """

    options: Mapping[str, tuple[Option, ...]]
    elements: int
    fixed_bytes: int
    limit_bytes: int
    limit: str

    def require_possible(self, name: str) -> None:
        """Raises:
        RecipeError: the narrowest options together are too many bytes; the message says the smallest limit that is possible.
        """
        least = sum(min(option.bytes for option in each) for each in self.options.values())
        if least > self.limit_bytes:
            raise RecipeError(f"quantize(auto, {self.limit}): {name} cannot be made so small; the least is {self._said(least)} with these widths.")

    def _said(self, least: int) -> str:
        if self.limit.startswith("bits"):
            return f"bits<={_rounded_up(8 * least / self.elements, 2)}"
        needed = (least + self.fixed_bytes + SPARE_BYTES) / (1 - SPARE_SHARE)
        unit = "MB" if needed >= SIZE_UNITS["MB"] else "KB"
        return f"size<={_rounded_up(needed / SIZE_UNITS[unit], 1)}{unit}"


def _rounded_up(value: float, digits: int) -> float:
    scale: int = 10**digits
    return math.ceil(value * scale) / scale


def budget(spec: ModelSpec, arguments: Arguments) -> Budget:
    """The choice that a quantize(auto) step leaves open on a model.

    Raises:
        RecipeError: a weight that is quantized already, or `targets` that match none.
    """
    runtime = arguments.get("runtime", RUNTIME)
    parts = selected_parts(spec, arguments)
    whole = "size" in arguments
    options = {part.name: tuple(_options(spec, part, arguments, runtime if whole else None)) for part in parts}
    elements = sum(_elements(part) for part in parts)
    if not whole:
        limit_bytes = math.floor(arguments["bits"] * elements / 8)
        return Budget(options=options, fixed_bytes=0, limit_bytes=limit_bytes, limit=f"bits<={arguments['bits']}", elements=elements)
    limit = int(parse_quantity(arguments["size"], SIZE_UNITS, "size"))
    fixed = artifact_size(spec, runtime) - sum(part_size(part, spec.dtype, runtime) for part in parts)
    left = math.floor(limit * (1 - SPARE_SHARE)) - SPARE_BYTES - fixed
    return Budget(options=options, fixed_bytes=fixed, limit_bytes=left, limit=f"size<={arguments['size']}", elements=elements)


def _options(spec: ModelSpec, part: Linear | Embedding, arguments: Arguments, runtime: str | None) -> Iterable[Option]:
    """One for each width; `runtime` None counts the weight's own bytes alone."""
    refuse_quantized(part, "quantize(auto)")
    for bits in widths_of(arguments["widths"]):
        found = weight_format({**arguments, "bits": bits}, columns_of(part), part.name, before=part.weight)
        stored = replace(part, weight=found)
        count = _weight_bytes(stored) if runtime is None else part_size(stored, spec.dtype, runtime)
        yield Option(format=found, bytes=count)


def _weight_bytes(part: Linear | Embedding) -> int:
    return part_weight_bytes(replace(part, bias=False) if isinstance(part, Linear) else part, part.weight.dtype)


def _elements(part: Linear | Embedding) -> int:
    if isinstance(part, Embedding):
        return part.num_embeddings * part.embedding_dim
    return part.experts * part.in_features * part.out_features


def with_formats(spec: ModelSpec, formats: Mapping[str, WeightFormat]) -> ModelSpec:
    """The spec with these weights' formats, by module name; a tied head takes its embedding's."""

    def changed(part: Part) -> Part:
        if not isinstance(part, Linear | Embedding):
            return part
        name = part.tied_to if isinstance(part, Linear) and part.tied_to else part.name
        return replace(part, weight=formats[name]) if name in formats else part

    return spec.with_parts(changed)


def predict_auto(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """The stand-in of this module's first lines.

    Raises:
        RecipeError: not even the smallest width fits.
    """
    found = budget(spec, arguments)
    found.require_possible(spec.name)
    tables = {part.name for part in spec.parts if isinstance(part, Embedding)}
    order = sorted(found.options, key=lambda name: name in tables)
    return with_formats(spec, {name: option.format for name, option in _filled(found, order).items()})


def _filled(found: Budget, order: list[str]) -> dict[str, Option]:
    taken = {name: options[0] for name, options in found.options.items()}
    left = found.limit_bytes - sum(option.bytes for option in taken.values())
    for level in range(1, len(next(iter(found.options.values())))):
        before = dict(taken)
        for name in order:
            wider = found.options[name][level]
            if before[name] is found.options[name][level - 1] and wider.bytes - taken[name].bytes <= left:
                left -= wider.bytes - taken[name].bytes
                taken[name] = wider
    return taken
