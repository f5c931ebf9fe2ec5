"""The quantized types of ggml: their grids, chosen by the weighted error of a layer's output, and their bytes.

A type stores a weight as code · scale + offset. In the flat types (Q8_0, Q4_0, Q5_0, Q4_1, Q5_1) each group of 32 columns has a float16 scale
(and offset). In the K types a block of 256 columns has a float16 `d` (and `dmin`), and each group of 16 or 32 columns a whole number of it:
scale = d · sub-scale, offset = -dmin · sub-minimum.

A grid is chosen first and is exactly what the file can say; then codes are chosen on it, by rounding or by GPTQ. A weight's importance is the
mean square of its input (the diagonal of the Hessian), so the sums below are the expected error of the output under uncorrelated inputs.

Shape legend: O rows (output features), I columns (input features), G groups of a row, S blocks of 256 of a row, R rows at once, n columns of a group.

Source: the block structures in ggml/src/ggml-common.h and `dequantize_row_*` in ggml/src/ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.compress.statistics import InputStatistics
from lighten.errors import RecipeError
from lighten.model.ggml_types import GGML_TYPES, exact_ggml_type
from lighten.model.spec import PER_CHANNEL, PER_TENSOR

SUPER = 256
_SMALLEST = 2.0**-24
"""The smallest positive float16. Source: IEEE 754-2019, table 3.5."""
_AT_ONCE = 2**17
"""Weights that a search works on at once: half a megabyte a temporary. Measured on 1,536 × 576: a quarter faster than the whole matrix at once."""


_NOTHING = 1e-30
"""Stands for a scale of 0, by which the choice of codes could not divide; times a code it is still nothing."""
_ROUNDS = {2: 3, 3: 2}
"""Rounds of refitting scales and refining codes after GPTQ, by bits; one of more bits. Choice, that of `quantize_gptq`."""


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
        return _times(self.d, self.scales)

    @property
    def offset(self) -> Tensor:
        """[O, G] float32: what code 0 stands for."""
        if self.layout.middle is not None:
            return -self.layout.middle * self.scale
        assert self.dmin is not None, "a type without a middle code has offsets"
        return self.dmin.float() if self.minima is None else -_times(self.dmin, self.minima)

    def value(self, codes: Tensor) -> Tensor:
        """[O, I] float32: what codes stand for, rounded where ggml rounds."""
        groups, middle = self._groups(codes.float()), self.layout.middle
        if middle is not None:
            return ((groups - middle) * self.scale[..., None]).reshape(codes.shape)
        return (groups * self.scale[..., None] + self.offset[..., None]).reshape(codes.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """[O, I] uint8: the code that stands nearest to each weight."""
        groups = self._groups(weight.float())
        return _codes(groups, self.scale, self.offset, self.levels).to(torch.uint8).reshape(weight.shape)

    def _groups(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, self.group_size)


def quantize_ggml(weight: Tensor, type_name: str, statistics: InputStatistics | None = None) -> GgmlTensor:
    """A weight in a type of ggml: scales by the inputs' importance, codes by GPTQ with the inputs' Hessian; the nearest where there are none.

    Args:
        weight: [O, I], finite; the type's block divides I (`ggml_fallback` says what stands in else).
    """
    if statistics is not None and statistics.rows:
        return quantize_ggml_together({"": weight}, type_name, statistics)[""]
    grid = fit_ggml_grid(weight, type_name)
    return pack(grid, grid.nearest(weight))


def quantize_ggml_together(weights: Mapping[str, Tensor], type_name: str, statistics: InputStatistics) -> dict[str, GgmlTensor]:
    """All weights that share an input, whose Hessian is factorized once for them; each comes out as by itself, but for the damping, which is
    chosen for all.

    Args:
        weights: [O, I] each, finite; the type's block divides I.
    """
    from lighten.compress.gptq import Grid, choose_factor, first_factor, gptq_codes, refine_codes, refit_scales

    layout, first = LAYOUTS[type_name], first_factor(statistics)
    grids = {name: fit_ggml_grid(weight, type_name, first.residual) for name, weight in weights.items()}
    scale, offset = (torch.cat([getattr(grid, kind) for grid in grids.values()]) for kind in ("scale", "offset"))
    general = Grid(scale=torch.where(scale == 0, torch.full_like(scale, _NOTHING), scale), offset=offset, levels=layout.levels)
    joined = torch.cat([weight.float() for weight in weights.values()])
    factor = choose_factor(joined, general, statistics, first=first)
    codes = gptq_codes(joined, factor, general)
    for _ in range(_ROUNDS.get(GGML_TYPES[type_name].bits or 0, 1)):
        if layout.refits:
            general = refit_scales(joined, codes, factor, general, dtype=torch.float16)
        codes = refine_codes(joined, codes, factor, general)
    sizes = [len(weight) for weight in weights.values()]
    if layout.refits:
        scales = torch.split(torch.where(scale == 0, scale, general.scale), sizes)
        grids = {name: replace(grid, d=found.half()) for (name, grid), found in zip(grids.items(), scales, strict=True)}
    return {name: pack(grid, part) for (name, grid), part in zip(grids.items(), torch.split(codes, sizes), strict=True)}


# ---- grids ----


def fit_ggml_grid(weight: Tensor, type_name: str, importance: Tensor | None = None) -> GgmlGrid:
    """The grid of a type that keeps a weight best: the least Σ importance · (weight - nearest point)² that the search below finds.

    It starts from each group's range, shrunk and stretched by steps, and takes the scale that fits each step's codes best; in the K types
    then the best `d` among several, and each sub-scale among its neighbours, codes rounded anew each time.

    Args:
        weight: [O, I], finite; the type's block divides I.
        importance: [I], not negative; None: all columns count alike.

    Raises:
        RecipeError: a type without a grid here, or blocks that do not fill the rows.
    """
    _check(type_name, weight.shape[1])
    rows, columns = weight.shape
    layout = LAYOUTS[type_name]
    counts = torch.ones(columns) if importance is None else importance.float().clamp(min=0)
    counts = counts / counts.mean().clamp(min=1e-30) + 1e-4  # an input that was never seen still counts a little
    counts = counts.reshape(1, -1, layout.group)
    step = max(1, _AT_ONCE // columns)
    pieces = [_fit(weight[start : start + step].float().reshape(-1, *counts.shape[1:]), counts, type_name) for start in range(0, rows, step)]

    def joined(name: str) -> Tensor | None:
        found = [getattr(piece, name) for piece in pieces]
        return None if found[0] is None else torch.cat(found)

    return GgmlGrid(type=type_name, d=torch.cat([piece.d for piece in pieces]), dmin=joined("dmin"), scales=joined("scales"), minima=joined("minima"))


def _check(type_name: str, columns: int) -> None:
    if type_name not in LAYOUTS:
        raise RecipeError(f"no weight is quantized to {type_name} here; these are: {', '.join(LAYOUTS)}.")
    block = GGML_TYPES[type_name].block
    if columns % block:
        raise RecipeError(f"{type_name} stores rows in blocks of {block} columns, and this weight has {columns}; take a type in blocks of 32.")


def _fit(x: Tensor, w: Tensor, type_name: str) -> GgmlGrid:
    """The grid of some rows. x: [R, G, n]; w: [1, G, n]."""
    layout = LAYOUTS[type_name]
    if layout.middle is not None:
        scale = _best_scale(x, w, layout.middle)
        return _flat(x, w, type_name, scale) if layout.scale_bits is None else _super_scales(x, w, type_name, scale)
    scale, offset = _best_affine(x, w, layout.levels, below_zero=layout.scale_bits is not None)
    return _flat_affine(x, w, type_name, scale, offset) if layout.scale_bits is None else _super_affine(x, w, type_name, scale, offset)


def _divisors(steps: float) -> list[float]:
    """Numbers of steps that a group's range is divided into: about `steps`, and more where cutting off its ends may gain."""
    most = 1.45 * steps + 0.5 if steps <= 16 else 1.05 * steps + 1
    return torch.linspace(steps - min(1.2, steps / 4), most, 18).tolist()


def _best_scale(x: Tensor, w: Tensor, middle: int) -> Tensor:
    """[R, G] the scale of either sign with the least Σ w (x - scale · code)², codes from -middle to middle - 1."""
    low, high = x.amin(-1), x.amax(-1)
    extreme = torch.where(-low >= high, low, high)
    wx = w * x
    best, gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
    signs = (-1.0, 1.0) if middle <= 16 else (-1.0,)

    def consider(scale: Tensor) -> None:
        codes = (x * _inverse(scale)[..., None]).round_().clamp_(-middle, middle - 1)
        product, square = (wx * codes).sum(-1), (w * codes * codes).sum(-1)
        found = product * product / square.clamp(min=1e-30)
        better = found > gain
        gain.copy_(torch.where(better, found, gain))
        best.copy_(torch.where(better, product / square.clamp(min=1e-30), best))

    for divisor in _divisors(middle):
        for sign in signs:
            consider(extreme * (sign / divisor))
    for _ in range(2):
        consider(best.clone())
    return best


def _best_affine(x: Tensor, w: Tensor, levels: int, *, below_zero: bool) -> tuple[Tensor, Tensor]:
    """[R, G] scale ≥ 0 and offset (at most 0 where `below_zero`) with the least Σ w (x - scale · code - offset)², codes from 0 to levels - 1.

    Tried are steps of several sizes that begin at the smallest value, end at the largest, or lie in the middle: the last alone, as many steps,
    left 4 % more error at 4 bits and 5 % at 2 (measured on a down_proj of SmolLM2 with its inputs' importance).
    """
    low, high = x.amin(-1), x.amax(-1)
    low = low.clamp(max=0) if below_zero else low
    sums = (w.sum(-1).expand_as(low), (w * x).sum(-1))
    wx, top = w * x, levels - 1
    span = high - low
    best = [torch.zeros_like(low), torch.minimum(sums[1] / sums[0], torch.zeros_like(low)) if below_zero else sums[1] / sums[0]]
    gain = best[1] * (2 * sums[1] - best[1] * sums[0])  # what an offset alone takes from Σ w x²

    def consider(scale: Tensor, offset: Tensor) -> None:
        codes = _codes(x, scale, offset, levels)
        wc = w * codes
        fitted = _line(sums, wc.sum(-1), (wc * codes).sum(-1), (wx * codes).sum(-1), below_zero=below_zero)
        better = fitted[2] > gain
        gain.copy_(torch.where(better, fitted[2], gain))
        for kept, new in zip(best, fitted, strict=False):
            kept.copy_(torch.where(better, new, kept))

    for share, most in ((0.0, top + 1.5), (0.5, 1.3 * top + 0.5), (1.0, top + 1.5)):
        for divisor in torch.linspace(top - 0.9, most, 8).tolist():
            scale = span / divisor
            consider(scale, low + (span - scale * top) * share)
    for _ in range(4):
        consider(best[0].clone(), best[1].clone())
    return best[0], best[1]


def _line(sums: tuple[Tensor, Tensor], c: Tensor, cc: Tensor, xc: Tensor, *, below_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted least squares of x ≈ scale · code + offset from its sums, and how much it takes from Σ w x²."""
    one, x = sums
    determinant = one * cc - c * c
    sound = determinant > 1e-7 * one * cc
    scale = torch.where(sound, (one * xc - c * x) / determinant.clamp(min=1e-30), torch.zeros_like(x)).clamp(min=0)
    offset = (x - scale * c) / one
    if below_zero:
        positive = offset > 0
        scale = torch.where(positive, (xc / cc.clamp(min=1e-30)).clamp(min=0), scale)
        offset = torch.where(positive, torch.zeros_like(offset), offset)
    gain = 2 * (scale * xc + offset * x) - (scale * scale * cc + 2 * scale * offset * c + offset * offset * one)
    return scale, offset, gain


def _flat(x: Tensor, w: Tensor, type_name: str, scale: Tensor) -> GgmlGrid:
    return GgmlGrid(type=type_name, d=_half(scale))


def _flat_affine(x: Tensor, w: Tensor, type_name: str, scale: Tensor, offset: Tensor) -> GgmlGrid:
    return GgmlGrid(type=type_name, d=_half(scale), dmin=_half(offset))


def _super_scales(x: Tensor, w: Tensor, type_name: str, scale: Tensor) -> GgmlGrid:
    """`d` and sub-scales of a type with a middle code, from the scales that the groups would like."""
    layout = LAYOUTS[type_name]
    low, high = layout.scale_range
    blocks = scale.reshape(len(scale), -1, SUPER // layout.group)
    weight = _curvature(x, w, scale, -(layout.middle or 0) * scale, layout.levels).reshape(blocks.shape)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    d = _best_unit(blocks, weight, [largest / (low * factor) for factor in (1.0, 0.97, 1.03, 0.94, 0.9, -0.97, -1.0, -0.9)], (low, high))
    best, least = None, torch.full(d.shape, torch.inf)
    for _ in range(2):
        d = _unit(d)
        units = d.float().repeat_interleave(blocks.shape[-1], -1)
        middle = (scale * _inverse(units)).round().clamp(low, high)
        scales, error, codes = _best_neighbour(x, w, units, middle, layout)
        found = GgmlGrid(type=type_name, d=d, scales=scales.to(torch.int16))
        error = error.reshape(blocks.shape).sum(-1)
        best, least = (found, error) if best is None else _better(best, least, found, error, blocks.shape[-1])
        whole = scales[..., None] * codes
        product, square = ((w * x * whole).sum(-1), (w * whole * whole).sum(-1))
        product, square = product.reshape(blocks.shape).sum(-1), square.reshape(blocks.shape).sum(-1)
        d, scale = torch.where(square > 0, product / square.clamp(min=1e-30), d.float()), _fitted(x, w, codes, scale)
    assert best is not None, "the loop ran"
    return best


def _best_neighbour(x: Tensor, w: Tensor, units: Tensor, middle: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Sub-scales among `middle` and its neighbours, their errors [R, G], and the codes (0 for 0) on them."""
    low, high = layout.scale_range
    half = layout.middle or 0
    best, least, kept = middle, torch.full(middle.shape, torch.inf), x
    for change in (0, -1, 1):
        scales = (middle + change).clamp(low, high)
        step = (units * scales)[..., None]
        codes = (x * _inverse(step)).round_().clamp_(-half, half - 1)
        error = (w * (x - step * codes).square_()).sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
        kept = torch.where(better[..., None], codes, kept)
    return best, least, kept


def _fitted(x: Tensor, w: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """[R, G] the scales that fit given codes best."""
    square = (w * codes * codes).sum(-1)
    return torch.where(square > 0, (w * x * codes).sum(-1) / square.clamp(min=1e-30), scale)


def _super_affine(x: Tensor, w: Tensor, type_name: str, scale: Tensor, offset: Tensor) -> GgmlGrid:
    """`d`, `dmin`, sub-scales and sub-minima, from the scales and offsets that the groups would like."""
    layout = LAYOUTS[type_name]
    _, top = layout.scale_range
    shape = (len(scale), -1, SUPER // layout.group)
    scales, minima = scale.reshape(shape), -offset.reshape(shape)
    weight = _curvature(x, w, scale, offset, layout.levels).reshape(scales.shape)
    factors = (1.0, 0.97, 1.03, 0.93, 0.88, 1.06)
    d = _best_unit(scales, weight, [scales.amax(-1) / (top * factor) for factor in factors], (0, top))
    dmin = _best_unit(minima, w.sum(-1).reshape(1, *scales.shape[1:]), [minima.amax(-1) / (top * factor) for factor in factors], (0, top))
    best, least = None, torch.full(d.shape, torch.inf)
    for _ in range(2):
        d, dmin = _unit(d), _unit(dmin)
        units = [unit.float().repeat_interleave(scales.shape[-1], -1) for unit in (d, dmin)]
        found, error, codes = _best_pair(x, w, units, (scales.flatten(1), minima.flatten(1)), layout)
        grid = GgmlGrid(type=type_name, d=d, dmin=dmin, scales=found[0].to(torch.int16), minima=found[1].to(torch.int16))
        error = error.reshape(scales.shape).sum(-1)
        best, least = (grid, error) if best is None else _better(best, least, grid, error, scales.shape[-1])
        d, dmin = _refit(x, w, codes, found, (d, dmin), scales.shape)
    assert best is not None, "the loop ran"
    return best


def _best_pair(
    x: Tensor, w: Tensor, units: list[Tensor], wanted: tuple[Tensor, Tensor], layout: Layout
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Sub-scale and sub-minimum of each group, their errors [R, G], and the codes: for three sub-scales the minimum that then fits best."""
    _, top = layout.scale_range
    start, minimum = ((value * _inverse(unit)).round().clamp(0, top) for value, unit in zip(wanted, units, strict=True))
    best, least, kept = (start, minimum), torch.full(start.shape, torch.inf), x
    total = w.sum(-1)
    for change in (0, -1, 1):
        scales = (start + change).clamp(0, top)
        step, minima, codes = units[0] * scales, minimum, x
        for refined in (False, True):
            if refined:
                minima = ((w * (step[..., None] * codes - x)).sum(-1) / total * _inverse(units[1])).round().clamp(0, top)
            offset = -units[1] * minima
            codes = _codes(x, step, offset, layout.levels)
            error = (w * (x - codes * step[..., None] - offset[..., None]).square_()).sum(-1)
            better = error < least
            best = (torch.where(better, scales, best[0]), torch.where(better, minima, best[1]))
            least, kept = torch.where(better, error, least), torch.where(better[..., None], codes, kept)
    return best, least, kept


def _refit(
    x: Tensor, w: Tensor, codes: Tensor, found: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """`d` and `dmin` that fit given codes, sub-scales and sub-minima best: x ≈ d · a - dmin · b over each block."""

    def over_blocks(values: Tensor) -> Tensor:
        return values.sum(-1).reshape(shape).sum(-1)

    a, b = found[0][..., None] * codes, found[1][..., None].expand_as(codes)
    aa, ab, bb = over_blocks(w * a * a), over_blocks(w * a * b), over_blocks(w * b * b)
    xa, xb = over_blocks(w * x * a), over_blocks(w * x * b)
    determinant = aa * bb - ab * ab
    sound = determinant > 1e-6 * aa * bb
    divisor = torch.where(sound, determinant, torch.ones_like(determinant))
    d = torch.where(sound, (xa * bb - xb * ab) / divisor, before[0].float()).clamp(min=0)
    dmin = torch.where(sound, (xa * ab - xb * aa) / divisor, before[1].float()).clamp(min=0)
    return d, dmin


def _better(best: GgmlGrid, least: Tensor, found: GgmlGrid, error: Tensor, groups: int) -> tuple[GgmlGrid, Tensor]:
    """Block by block the grid of less error. least, error: [R, S]."""
    better = error < least

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better if new.shape == better.shape else better.repeat_interleave(groups, -1), new, old)

    def chosen(name: str) -> Tensor | None:
        new = getattr(found, name)
        return None if new is None else choose(new, getattr(best, name))

    kept = GgmlGrid(type=best.type, d=choose(found.d, best.d), dmin=chosen("dmin"), scales=chosen("scales"), minima=chosen("minima"))
    return kept, torch.where(better, error, least)


def _best_unit(wanted: Tensor, weight: Tensor, candidates: list[Tensor], limits: tuple[int, int]) -> Tensor:
    """[R, S] the unit whose whole multiples come closest to the wanted values [R, S, groups], each counted by its weight."""
    best, least = candidates[0], torch.full(candidates[0].shape, torch.inf)
    for candidate in candidates:
        unit = _unit(candidate).float()[..., None]
        multiples = (wanted * _inverse(unit)).round().clamp(*limits)
        error = (weight * (wanted - multiples * unit).square()).sum(-1)
        best, least = torch.where(error < least, candidate, best), torch.minimum(least, error)
    return best


def _curvature(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """[R, G]: how fast the error grows with a change of the scale, Σ w code²."""
    return (w * _codes(x, scale, offset, levels).square()).sum(-1) + 1e-12


def _codes(x: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """[R, G, n] float: the nearest codes."""
    return ((x - offset[..., None]) * _inverse(scale)[..., None]).round_().clamp_(0, levels - 1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where it is 0, and every code then stands for the same."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / torch.where(scale == 0, torch.ones_like(scale), scale))


def _half(values: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half()


def _unit(values: Tensor) -> Tensor:
    """Float16, no smaller than its smallest number where it is not 0: sub-scales then make up for what the unit is too large."""
    tiny = (values != 0) & (values.abs() < _SMALLEST)
    return torch.where(tiny, values.sign() * _SMALLEST, _half(values).float()).half()


def _times(unit: Tensor, numbers: Tensor | None) -> Tensor:
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
