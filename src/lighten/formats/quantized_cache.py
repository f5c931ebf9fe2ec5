"""A cache of keys and values that stores codes: what attention reads is dequantized, layer by layer, when it is read.

Each token's channels of a head share a scale, and a zero point where the grid is not symmetric, in groups of `group_size`; both are taken from
the values when they come in, so nothing is calibrated and no token is coded twice.

    value ≈ (code - zero_point) · scale,   scale = (max - min) / (2**bits - 1) over the group and 0

Shape legend: B batch_size, H key/value heads, S tokens, D channels of a head, G groups of a head.
Source: Liu et al. 2024 (KIVI, arXiv:2402.02750), section 3, for codes by token; keys are coded by token here too, as a cache that grows by single
tokens can be without a remainder in full precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lighten.errors import RecipeError
from lighten.model.quantized.kv import KVFormat


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Coded keys, or values.

    Attributes:
        packed: [B, H, S, D · bits / 8] uint8; two codes a byte where they have 4 bits, the even channel below.
        scale: [B, H, S, G] in the type of the states.
        zero_point: [B, H, S, G] uint8; None on a symmetric grid.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    kv: KVFormat

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.packed, self.scale, self.zero_point) if tensor is not None)

    def last(self, tokens: int) -> Codes:
        """Of the newest tokens alone."""
        return self._each(lambda tensor: tensor[:, :, max(tensor.shape[2] - tokens, 0) :].clone())

    def sequences(self, index: Tensor) -> Codes:
        return self._each(lambda tensor: tensor.index_select(0, index))

    def then(self, newer: Codes) -> Codes:
        """With the tokens that came after."""
        zero = None if self.zero_point is None or newer.zero_point is None else torch.cat([self.zero_point, newer.zero_point], dim=2)
        return Codes(
            packed=torch.cat([self.packed, newer.packed], dim=2), scale=torch.cat([self.scale, newer.scale], dim=2), zero_point=zero, kv=self.kv
        )

    def decode(self, dtype: torch.dtype) -> Tensor:
        """[B, H, S, D]."""
        packed = self.packed
        codes = packed if self.kv.bits == 8 else torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        middle: int = 2 ** (self.kv.bits - 1)
        zero = middle if self.zero_point is None else self.zero_point[..., None].float()
        return ((_groups(codes, self.kv) - zero) * self.scale[..., None].float()).flatten(-2).to(dtype)

    def _each(self, change: Any) -> Codes:
        zero = None if self.zero_point is None else change(self.zero_point)
        return Codes(packed=change(self.packed), scale=change(self.scale), zero_point=zero, kv=self.kv)


def encode(states: Tensor, kv: KVFormat) -> Codes:
    """[B, H, S, D] keys or values, coded."""
    groups = _groups(states, kv)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top, middle = 2**kv.bits - 1, 2 ** (kv.bits - 1)
    spread = 2 * torch.maximum(-low, high) if kv.symmetric else high - low
    scale = (spread / top).to(states.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.full_like(low, middle) if kv.symmetric else (-low / scale.float()).round().clamp(0, top)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top).to(torch.uint8).flatten(-2)
    packed = codes if kv.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    return Codes(packed=packed, scale=scale, zero_point=None if kv.symmetric else zero.to(torch.uint8), kv=kv)


def _groups(states: Tensor, kv: KVFormat) -> Tensor:
    """[B, H, S, D] → [B, H, S, G, channels of a group] float32."""
    return states.float().reshape(*states.shape[:-1], -1, kv.group_size)


class _CodedLayer:
    """What both kinds of layers share: codes instead of keys and values."""

    kv: KVFormat
    coded: tuple[Codes, Codes] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.coded is None else sum(each.nbytes for each in self.coded)

    def _extend(self, states: tuple[Tensor, Tensor], *, keep: int | None) -> tuple[Tensor, Tensor]:
        """Add new states; all that attention may read now, old and new. `keep`: tokens that stay for the next step at most."""
        new = tuple(encode(each, self.kv) for each in states)
        both = new if self.coded is None else tuple(old.then(each) for old, each in zip(self.coded, new, strict=True))
        stays = both if keep is None else tuple(each.last(keep) for each in both)
        self.coded = (stays[0], stays[1])
        return both[0].decode(states[0].dtype), both[1].decode(states[1].dtype)


class CodedLayer(_CodedLayer, DynamicLayer):
    """All tokens of one layer."""

    is_croppable = False

    def __init__(self, kv: KVFormat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kv, self.length = kv, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        return self._extend((key_states, value_states), keep=None)

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.coded, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.coded is not None:
            self.coded = (self.coded[0].sequences(beam_idx), self.coded[1].sequences(beam_idx))


class CodedWindowLayer(_CodedLayer, DynamicSlidingWindowLayer):
    """The newest tokens of one layer, as many as its window needs."""

    is_croppable = False

    def __init__(self, kv: KVFormat, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)  # type: ignore[no-untyped-call]
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return self._extend((key_states, value_states), keep=self.sliding_window - 1)

    def reset(self) -> None:
        super().reset()
        self.coded = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.coded is not None:
            self.coded = (self.coded[0].sequences(beam_idx), self.coded[1].sequences(beam_idx))


def coded_cache(config: Any, kv: KVFormat) -> Cache:
    """An empty cache for a model of this config, whose layers of keys and values store codes; states of recurrences stay as they are.

    Raises:
        RecipeError: a layer that keeps something else beside keys and values.
    """
    cache = DynamicCache(config=config)
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = CodedLayer(kv)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[place] = CodedWindowLayer(kv, layer.sliding_window)
        elif isinstance(layer, DynamicLayer):
            raise RecipeError(f"quantize(kv): layer {place} keeps a {type(layer).__name__}, which is not quantized here.")
    return cache


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache of either kind holds now."""
    found = 0
    for layer in cache.layers:
        if isinstance(layer, _CodedLayer):
            found += layer.nbytes
        elif getattr(layer, "is_initialized", False):
            found += sum(tensor.nbytes for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)) if tensor is not None)
    return found
