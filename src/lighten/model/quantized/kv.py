"""Quantized keys and values: what a config says of a cache, as `compressed-tensors` says it in `kv_cache_scheme`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighten.errors import ModelError


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

    def bytes_per_group(self) -> float:
        """Codes, a float16 scale, and a zero point of one byte where there is one."""
        return self.group_size * self.bits / 8 + 2 + (0 if self.symmetric else 1)

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
