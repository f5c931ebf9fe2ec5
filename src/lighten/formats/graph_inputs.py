"""Names and shapes of what an exported graph takes and gives. Needs no torch: the processes that run graphs read it.

Shape legend: B sequences, P positions known, Q new tokens, H key/value heads, D head size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lighten.model.spec import Attention, ModelSpec

ENCODER_INPUTS = ("input_ids", "attention_mask")
DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")


def cache_names(layers: int, stem: str) -> list[str]:
    """Names of the cached keys and values, as inputs (`past`) or outputs (`present`)."""
    return [f"{stem}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def kv_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Key/value heads, head size and layers of a decoder whose layers are alike."""
    attention = [part for part in spec.parts if isinstance(part, Attention)]
    return attention[0].num_key_value_heads, attention[0].head_dim, len(attention)


def decoder_inputs(input_ids: NDArray[np.int64], past: int) -> dict[str, NDArray[np.int64]]:
    """What goes into a decoder beside its cache: [B, Q] tokens after `past` others, none of them padding."""
    batch, new = input_ids.shape
    positions = np.tile(np.arange(past, past + new), (batch, 1))
    return dict(zip(DECODER_INPUTS, (input_ids, np.ones((batch, past + new), np.int64), positions), strict=True))


def empty_cache(spec: ModelSpec, batch: int) -> dict[str, NDArray[np.float32]]:
    """Keys and values of no positions, by the names of a decoder's inputs."""
    heads, head_dim, layers = kv_shape(spec)
    return dict.fromkeys(cache_names(layers, "past"), np.zeros((batch, heads, 0, head_dim), np.float32))
