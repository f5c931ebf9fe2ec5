"""Pruned weights whose file holds no zeros: what `config.json` says of them, beside what it says of quantized ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.spec import Embedding, Linear, Part

SPARSITY_CONFIG = "sparsity_config"
FORMAT = "bitmask"


def is_masked(part: Part) -> bool:
    """Whether a file holds a part's weight without its zeros."""
    return isinstance(part, Linear | Embedding) and part.weight.kept is not None and part.weight.bits is None and bool(part.tensors())


def sparsity_config(parts: Iterable[Part]) -> dict[str, Any] | None:
    """What a config says of the parts' weights; None where all are stored whole."""
    kept = {part.name: part.weight.kept for part in parts if isinstance(part, Linear | Embedding) and is_masked(part)}
    return {"format": FORMAT, "kept": kept} if kept else None


def masked_parts(parts: tuple[Part, ...], said: Any, source: str) -> tuple[Part, ...]:
    """The parts with the numbers of values that a config's `sparsity_config` states.

    Raises:
        ModelError: another format, a part that the model has not, or a number that its weight cannot have.
    """
    if not isinstance(said, Mapping) or said.get("format") != FORMAT or not isinstance(said.get("kept"), Mapping):
        raise ModelError(f"{source}: its {SPARSITY_CONFIG} is not of the format {FORMAT!r}, the one that is read.")
    left = dict(said["kept"])

    def masked(part: Part) -> Part:
        if not isinstance(part, Linear | Embedding) or part.name not in left:
            return part
        kept, size = left.pop(part.name), _size(part)
        if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept <= size:
            raise ModelError(f"{source}: its {SPARSITY_CONFIG} gives {part.name} {kept!r} values; its weight has {size}.")
        return replace(part, weight=replace(part.weight, kept=kept, sparsity=1 - kept / size))

    found = tuple(masked(part) for part in parts)
    if left:
        raise ModelError(f"{source}: its {SPARSITY_CONFIG} names {sorted(left)[0]}, which the model does not have.")
    return found


def _size(part: Linear | Embedding) -> int:
    return part.in_features * part.out_features if isinstance(part, Linear) else part.num_embeddings * part.embedding_dim
