"""The quantized types of ggml: the values that they can say, and their bytes.

A type stores a weight as code · scale + offset. In the flat types (Q8_0, Q4_0, Q5_0, Q4_1, Q5_1) each group of 32 columns has a float16 scale
(and offset). In the K types a block of 256 columns has a float16 `d` (and `dmin`), and each group of 16 or 32 columns a whole number of it:
scale = d · sub-scale, offset = -dmin · sub-minimum.

A grid is exactly what the file can say; `ggml_search` chooses one, and codes on it.

Shape legend: O rows (output features), I columns (input features), G groups of a row, S blocks of 256 of a row, R rows at once, n columns of a group.

Source: the block structures in ggml/src/ggml-common.h and `dequantize_row_*` in ggml/src/ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.errors import RecipeError
from lighten.model.ggml_types import GGML_TYPES, exact_ggml_type
from lighten.model.spec import PER_CHANNEL, PER_TENSOR

SUPER = 256


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a type can say.

    Attributes:
        group: columns of a scale.
        levels: codes are 0 to levels - 1.
        middle: the code that stands for 0; None where each group has an offset of its own.
        scale_bits: width of a sub-scale; None in the flat types. Signed where there is a `middle`.
    """

    group: int
    levels: int
    middle: int | None
    scale_bits: int | None = None

    @property
    def refits(self) -> bool:
        """Whether each group's scale is a number of its own, to which all its values are in proportion."""
        return self.scale_bits is None and self.middle is not None

    @property
    def scale_range(self) -> tuple[int, int]:
        """Smallest and largest sub-scale."""
        bits = self.scale_bits or 0
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.middle is not None else (0, 2**bits - 1)


LAYOUTS = {
    "Q8_0": Layout(group=32, levels=256, middle=128), "Q6_K": Layout(group=16, levels=64, middle=32, scale_bits=8),
    "Q5_K": Layout(group=32, levels=32, middle=None, scale_bits=6), "Q5_1": Layout(group=32, levels=32, middle=None),
    "Q5_0": Layout(group=32, levels=32, middle=16), "Q4_K": Layout(group=32, levels=16, middle=None, scale_bits=6),
    "Q4_1": Layout(group=32, levels=16, middle=None), "Q4_0": Layout(group=32, levels=16, middle=8),
    "Q3_K": Layout(group=16, levels=8, middle=4, scale_bits=6), "Q2_K": Layout(group=16, levels=4, middle=None, scale_bits=4),
}  # fmt: skip
"""Type → what it can say. Source: ggml/src/ggml-common.h of llama.cpp."""


@dataclass(frozen=True, kw_only=True)
class GgmlTensor:
    """A weight as ggml stores it: `blocks` is [O, bytes of a row] uint8."""

    type: str
    blocks: Tensor

    @property
    def bits(self) -> int:
        """Width of a code."""
        return GGML_TYPES[self.type].bits or 0

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        kind = GGML_TYPES[self.type]
        return len(self.blocks), self.blocks.shape[1] // kind.bytes * kind.block

    def dequantize(self) -> Tensor:
        """[O, I] float32, bit for bit what ggml computes."""
        if self.type == "MXFP4":
            return _floats(self).dequantize()
        grid, codes = unpack(self)
        return grid.value(codes)


@dataclass(frozen=True, kw_only=True)
class GgmlGrid:
    """The points that a weight's codes stand for, as the file says them.

    Attributes:
        d: float16, [O, G] in the flat types, [O, S] in the K types.
        dmin: the same of the offsets: value + dmin in the flat types, value - dmin · minimum in the K types; None with a middle code.
        scales: [O, G] int16 sub-scales; None in the flat types.
        minima: [O, G] int16 sub-minima.
    """

    type: str
    d: Tensor
    dmin: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.type]

    @property
    def levels(self) -> int:
        """Codes are 0 to levels - 1."""
        return self.layout.levels

    @property
    def group_size(self) -> int:
        return self.layout.group

    @property
    def scale(self) -> Tensor:
        """[O, G] float32."""
        return times(self.d, self.scales)

    @property
    def offset(self) -> Tensor:
        """[O, G] float32: what code 0 stands for."""
        if self.layout.middle is not None:
            return -self.layout.middle * self.scale
        assert self.dmin is not None, "a type without a middle code has offsets"
        return self.dmin.float() if self.minima is None else -times(self.dmin, self.minima)

    def value(self, codes: Tensor) -> Tensor:
        """[O, I] float32: what codes stand for, rounded where ggml rounds."""
        groups, middle = self._groups(codes.float()), self.layout.middle
        if middle is not None:
            return ((groups - middle) * self.scale[..., None]).reshape(codes.shape)
        return (groups * self.scale[..., None] + self.offset[..., None]).reshape(codes.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """[O, I] uint8: the code that stands nearest to each weight."""
        groups = self._groups(weight.float())
        return nearest_codes(groups, self.scale, self.offset, self.levels).to(torch.uint8).reshape(weight.shape)

    def _groups(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, self.group_size)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where it is 0, and every code then stands for the same."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / torch.where(scale == 0, torch.ones_like(scale), scale))


def nearest_codes(x: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """[R, G, n] float: the nearest codes."""
    return ((x - offset[..., None]) * inverse(scale)[..., None]).round_().clamp_(0, levels - 1)


def times(unit: Tensor, numbers: Tensor | None) -> Tensor:
    """[O, G] float32: a block's unit times its groups' whole numbers, which is exact."""
    return unit.float() if numbers is None else unit.float().repeat_interleave(numbers.shape[1] // unit.shape[1], 1) * numbers.float()


# ---- bytes ----


def pack(grid: GgmlGrid, codes: Tensor) -> GgmlTensor:
    """The bytes of codes [O, I] uint8 on a grid."""
    block = GGML_TYPES[grid.type].block
    rows = len(codes)
    parts = _PACKERS[grid.type](grid, codes.reshape(rows, -1, block))
    return GgmlTensor(type=grid.type, blocks=torch.cat(parts, -1).reshape(rows, -1).contiguous())


def unpack(weight: GgmlTensor) -> tuple[GgmlGrid, Tensor]:
    """The grid and the codes [O, I] uint8 of some bytes: the inverse of `pack`.

    Raises:
        RecipeError: a type without a grid here.
    """
    if weight.type not in LAYOUTS:
        raise RecipeError(f"weights in {weight.type} are not read here; these are: {', '.join(LAYOUTS)}.")
    blocks = weight.blocks.reshape(len(weight.blocks), -1, GGML_TYPES[weight.type].bytes)
    grid, codes = _UNPACKERS[weight.type](weight.type, blocks)
    return grid, codes.reshape(len(weight.blocks), -1)


def _bytes(values: Tensor) -> Tensor:
    """[..., k] of float16 as [..., 2k] uint8, little endian."""
    return values.half().contiguous().view(torch.uint8)


def _halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """[O, blocks · count] float16 from its bytes."""
    return blocks[..., start : start + 2 * count].contiguous().view(torch.float16).flatten(1)


def _cut(values: Tensor, *shape: int) -> Tensor:
    """[..., n] → [..., *shape]."""
    return values.reshape(*values.shape[:-1], *shape)


def _join(pieces: Tensor, bits: int) -> Tensor:
    """[..., k, m] small numbers → [..., m] bytes, the k of them at one place side by side, the first in the low bits."""
    shifts = torch.arange(pieces.shape[-2], dtype=torch.uint8)[:, None] * bits
    return (pieces.to(torch.uint8) << shifts).sum(-2, dtype=torch.int64).to(torch.uint8)


def _split(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `_join`: [..., m] → [..., count, m]."""
    shifts = torch.arange(count, dtype=torch.uint8)[:, None] * bits
    pieces: Tensor = (packed[..., None, :] >> shifts) & (2**bits - 1)
    return pieces


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """The low four bits: of each 2 · run values the second half above the first. [..., n] → [..., n / 2]."""
    return _join(_cut(codes & 15, -1, 2, run), 4).flatten(-2)


def _from_nibbles(packed: Tensor, run: int) -> Tensor:
    return _split(_cut(packed, -1, run), 2, 4).flatten(-3)


def _crumbs(codes: Tensor) -> Tensor:
    """Two bits of each value, four values to a byte, 32 apart. [..., 256] → [..., 64]."""
    return _join(_cut(codes, -1, 4, 32), 2).flatten(-2)


def _from_crumbs(packed: Tensor) -> Tensor:
    return _split(_cut(packed, -1, 32), 4, 2).flatten(-3)


def _single(codes: Tensor) -> Tensor:
    """One bit of each value, eight values to a byte: 32 apart in blocks of 256, side by side in blocks of 32."""
    pieces = _cut(codes, 8, 32) if codes.shape[-1] == SUPER else _cut(codes, 4, 8).mT
    return _join(pieces, 1)


def _from_single(packed: Tensor) -> Tensor:
    pieces = _split(packed, 8, 1)
    return (pieces if packed.shape[-1] == 32 else pieces.mT).flatten(-2)


def _by_block(grid: GgmlGrid, values: Tensor | None) -> Tensor:
    """[O, G] → [O, S, groups of a block]."""
    assert values is not None, "a K type has them"
    return values.reshape(len(values), -1, SUPER // grid.group_size)


def _pack_8(grid: GgmlGrid, codes: Tensor) -> list[Tensor]:
    return [_bytes(grid.d[..., None]), codes ^ 128]  # (code - 128) as two's complement


def _unpack_8(name: str, blocks: Tensor) -> tuple[GgmlGrid, Tensor]:
    return GgmlGrid(type=name, d=_halves(blocks, 0)), blocks[..., 2:] ^ 128


def _pack_flat(grid: GgmlGrid, codes: Tensor) -> list[Tensor]:
    header = [_bytes(value[..., None]) for value in (grid.d, grid.dmin) if value is not None]
    fifth = [_single(codes >> 4)] if grid.levels == 32 else []
    return [*header, *fifth, _nibbles(codes, 16)]


def _unpack_flat(name: str, blocks: Tensor) -> tuple[GgmlGrid, Tensor]:
    affine, fifth = LAYOUTS[name].middle is None, LAYOUTS[name].levels == 32
    start = 4 if affine else 2
    grid = GgmlGrid(type=name, d=_halves(blocks, 0), dmin=_halves(blocks, 2) if affine else None)
    codes = _from_nibbles(blocks[..., start + 4 * fifth :], 16)
    return grid, codes | (_from_single(blocks[..., start : start + 4]) << 4) if fifth else codes


def _pack_45k(grid: GgmlGrid, codes: Tensor) -> list[Tensor]:
    assert grid.dmin is not None, "Q4_K and Q5_K have offsets"
    scales, minima = (_by_block(grid, values).to(torch.uint8) for values in (grid.scales, grid.minima))
    header = [_bytes(grid.d[..., None]), _bytes(grid.dmin[..., None])]
    low = [values[..., :4] | (values[..., 4:] >> 4) << 6 for values in (scales, minima)]
    last = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return [*header, *low, last, *([_single(codes >> 4)] if grid.levels == 32 else []), _nibbles(codes, 32)]


def _unpack_45k(name: str, blocks: Tensor) -> tuple[GgmlGrid, Tensor]:
    low, last = (blocks[..., 4:8], blocks[..., 8:12]), blocks[..., 12:16]
    scales = torch.cat([low[0] & 63, (last & 15) | (low[0] >> 6) << 4], -1)
    minima = torch.cat([low[1] & 63, (last >> 4) | (low[1] >> 6) << 4], -1)
    grid = GgmlGrid(type=name, d=_halves(blocks, 0), dmin=_halves(blocks, 2), scales=scales.short().flatten(1), minima=minima.short().flatten(1))
    if LAYOUTS[name].levels == 16:
        return grid, _from_nibbles(blocks[..., 16:], 32)
    return grid, _from_nibbles(blocks[..., 48:], 32) | _from_single(blocks[..., 16:48]) << 4


def _pack_6k(grid: GgmlGrid, codes: Tensor) -> list[Tensor]:
    scales = _by_block(grid, grid.scales).to(torch.int8).contiguous().view(torch.uint8)
    return [_nibbles(codes, 64), _crumbs(codes >> 4), scales, _bytes(grid.d[..., None])]


def _unpack_6k(name: str, blocks: Tensor) -> tuple[GgmlGrid, Tensor]:
    scales = blocks[..., 192:208].contiguous().view(torch.int8).short().flatten(1)
    return GgmlGrid(type=name, d=_halves(blocks, 208), scales=scales), _from_nibbles(blocks[..., :128], 64) | _from_crumbs(blocks[..., 128:192]) << 4


def _pack_3k(grid: GgmlGrid, codes: Tensor) -> list[Tensor]:
    scales = (_by_block(grid, grid.scales) + 32).to(torch.uint8)
    high = _join(_cut(scales >> 4, 4, 4), 2)
    return [_single(codes >> 2), _crumbs(codes & 3), _nibbles(scales, 8), high, _bytes(grid.d[..., None])]


def _unpack_3k(name: str, blocks: Tensor) -> tuple[GgmlGrid, Tensor]:
    scales = _from_nibbles(blocks[..., 96:104], 8) | _split(blocks[..., 104:108], 4, 2).flatten(-2) << 4
    grid = GgmlGrid(type=name, d=_halves(blocks, 108), scales=(scales.short() - 32).flatten(1))
    return grid, _from_crumbs(blocks[..., 32:96]) | _from_single(blocks[..., :32]) << 2


def _pack_2k(grid: GgmlGrid, codes: Tensor) -> list[Tensor]:
    assert grid.dmin is not None, "Q2_K has offsets"
    scales, minima = (_by_block(grid, values).to(torch.uint8) for values in (grid.scales, grid.minima))
    return [scales | minima << 4, _crumbs(codes), _bytes(grid.d[..., None]), _bytes(grid.dmin[..., None])]


def _unpack_2k(name: str, blocks: Tensor) -> tuple[GgmlGrid, Tensor]:
    both = blocks[..., :16].flatten(1)
    grid = GgmlGrid(type=name, d=_halves(blocks, 80), dmin=_halves(blocks, 82), scales=(both & 15).short(), minima=(both >> 4).short())
    return grid, _from_crumbs(blocks[..., 16:80])


_PACKERS: dict[str, Callable[[GgmlGrid, Tensor], list[Tensor]]] = {
    "Q8_0": _pack_8, **dict.fromkeys(("Q4_0", "Q5_0", "Q4_1", "Q5_1"), _pack_flat), "Q6_K": _pack_6k,
    **dict.fromkeys(("Q5_K", "Q4_K"), _pack_45k), "Q3_K": _pack_3k, "Q2_K": _pack_2k,
}  # fmt: skip
_UNPACKERS: dict[str, Callable[[str, Tensor], tuple[GgmlGrid, Tensor]]] = {
    "Q8_0": _unpack_8, **dict.fromkeys(("Q4_0", "Q5_0", "Q4_1", "Q5_1"), _unpack_flat), "Q6_K": _unpack_6k,
    **dict.fromkeys(("Q5_K", "Q4_K"), _unpack_45k), "Q3_K": _unpack_3k, "Q2_K": _unpack_2k,
}  # fmt: skip


# ---- without loss, from and to this package's own codes ----


def as_ggml(weight: QuantizedTensor) -> GgmlTensor:
    """The same values in the smallest type that holds them (`exact_ggml_type`).

    Raises:
        RecipeError: no type does, or a scale is no float16.
    """
    columns = weight.codes.shape[1]
    name = exact_ggml_type(
        bits=weight.bits, symmetric=weight.zero_point is None, group_size=weight.group_size, columns=columns, element=weight.element
    )
    if name is None or weight.global_scale is not None:
        raise RecipeError(
            f"{weight.bits}-bit codes of {weight.element} in groups of {weight.group_size} over {columns} columns have no type of ggml that holds "
            "them without loss; whole numbers do, of at most 6 bits or symmetric, in groups of a multiple of 32."
        )
    if name == "MXFP4":
        parts = [weight.scale[..., None], _nibbles(weight.codes.reshape(len(weight.codes), -1, 32), 16)]
        return GgmlTensor(type=name, blocks=torch.cat(parts, -1).reshape(len(weight.codes), -1))
    scale = weight.scale.half()
    if not torch.equal(scale.to(weight.scale.dtype), weight.scale):
        raise RecipeError(f"its scales of {weight.scale.dtype} are no float16, which types of ggml store; quantize with float16 scales.")
    middle = torch.tensor(2 ** (weight.bits - 1), dtype=torch.int16)
    zero = middle if weight.zero_point is None else _spread(weight.zero_point, weight.group_size, weight.codes.shape).short()
    grid = GgmlGrid(type=name, d=_spread(scale, weight.group_size, weight.codes.shape)[:, ::32])
    return pack(grid, (weight.codes.short() - zero + (grid.layout.middle or 0)).to(torch.uint8))


def _floats(weight: GgmlTensor) -> QuantizedTensor:
    """MXFP4 as 4-bit floats in groups of 32."""
    blocks = weight.blocks.reshape(len(weight.blocks), -1, GGML_TYPES["MXFP4"].bytes)
    codes = _from_nibbles(blocks[..., 1:], 16).flatten(1)
    return QuantizedTensor(codes=codes, scale=blocks[..., 0], zero_point=None, bits=4, group_size=32, element="e2m1")


def from_ggml(weight: GgmlTensor) -> QuantizedTensor:
    """The same values as symmetric whole-number codes in groups of 32; of Q4_0 and Q8_0.

    Raises:
        RecipeError: another type, whose scales have a form of their own.
    """
    if weight.type not in ("Q4_0", "Q8_0"):
        raise RecipeError(f"{weight.type} has no equal among symmetric codes of 4 and 8 bits in groups of 32; Q4_0 and Q8_0 have.")
    grid, codes = unpack(weight)
    return QuantizedTensor(codes=codes, scale=grid.d, zero_point=None, bits=weight.bits, group_size=grid.group_size)


def _spread(values: Tensor, group_size: int, shape: torch.Size) -> Tensor:
    """[O, G] → [O, I]: each group's value at each of its columns."""
    if group_size in (PER_CHANNEL, PER_TENSOR):
        return values.reshape(-1, 1).expand(shape)
    return values.repeat_interleave(group_size, 1)
