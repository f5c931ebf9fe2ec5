"""Quantized keys and values: what a config says of a cache, as `compressed-tensors` says it in `kv_cache_scheme`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighten.errors import ModelError, RecipeError
from lighten.model.spec import Attention, ModelSpec


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """Codes of 8 or 4 bits; each token's channels of a head share a scale, taken from the values when they are stored.

    Attributes:
        group_size: channels of a head that share a scale; it divides the head's size.
        symmetric: codes about 0, without a zero point.
    """

    bits: int
    group_size: int
    symmetric: bool = False

    def bytes_per_group(self, dtype_bytes: float) -> float:
        """Codes, a scale in the type of the states (`dtype_bytes`), and a zero point of one byte where there is one."""
        return self.group_size * self.bits / 8 + dtype_bytes + (0 if self.symmetric else 1)

    def scheme(self) -> dict[str, Any]:
        """The `kv_cache_scheme`."""
        return {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group", "group_size": self.group_size, "dynamic": True,
        }  # fmt: skip

    @classmethod
    def from_scheme(cls, scheme: Mapping[str, Any]) -> KVFormat:
        """The inverse.

        Raises:
            ModelError: a cache of another kind.
        """
        found = cls(bits=int(scheme.get("num_bits", 0)), group_size=int(scheme.get("group_size") or 0), symmetric=bool(scheme.get("symmetric", True)))
        if found.bits not in (4, 8) or found.group_size < 1 or any(scheme.get(key) != value for key, value in found.scheme().items()):
            raise ModelError(f"kv_cache_scheme {dict(scheme)} is not run here; caches of 8 or 4 bits with a scale for each token and group are.")
        return found


def kv_format_for(spec: ModelSpec, *, bits: int, group_size: int | None = None) -> KVFormat:
    """The format of a model's cache; without a group size, the channels of a whole head share a scale.

    Raises:
        RecipeError: a model without a cache, or groups that do not divide its heads.
    """
    heads = {size for part in spec.parts if isinstance(part, Attention) and part.cached for size in (part.head_dim, part.value_dim)}
    if not heads or any(isinstance(part, Attention) and part.latent_dim is not None for part in spec.parts):
        raise RecipeError(f"quantize(kv): {spec.name} keeps no cache of keys and values of heads.")
    common = math.gcd(*heads)
    group = group_size or common
    if common % group or (bits == 4 and common % 2):
        sizes = " and ".join(str(size) for size in sorted(heads))
        raise RecipeError(f"quantize(kv): group_size={group} does not divide heads of {sizes} channels; use a divisor of {common}.")
    return KVFormat(bits=bits, group_size=group)


def read_kv_format(config: Mapping[str, Any]) -> KVFormat | None:
    """What a model's config says of its cache; None where nothing.

    Raises:
        ModelError: a cache of a kind that is not run here.
    """
    quantization = config.get("quantization_config")
    said = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    return None if said is None else KVFormat.from_scheme(said)
