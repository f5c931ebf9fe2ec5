"""Which values of ggml's types a weight takes: grids chosen by the weighted error of a layer's output, and codes by rounding or by GPTQ.

A weight's importance is the mean square of its input (the diagonal of the Hessian), so the sums below are the expected error of the output under
uncorrelated inputs.

Shape legend: O rows (output features), I columns (input features), G groups of a row, S blocks of 256 of a row, R rows at once, n columns of a group.

Source: for the least-squares scale of given codes, llama.cpp's k-quants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lighten.compress.ggml import LAYOUTS, SUPER, GgmlGrid, GgmlTensor, Layout, inverse, nearest_codes, pack
from lighten.compress.statistics import InputStatistics
from lighten.errors import RecipeError
from lighten.model.ggml_types import GGML_TYPES

if TYPE_CHECKING:
    from lighten.compress.gptq import GptqSettings

_SMALLEST = 2.0**-24
"""The smallest positive float16. Source: IEEE 754-2019, table 3.5."""
_AT_ONCE = 2**17
"""Weights that a search works on at once: half a megabyte a temporary. Choice: temporaries stay in a core's cache."""


_NOTHING = 1e-30
"""Stands for a scale of 0, by which the choice of codes could not divide; times a code it is still nothing."""


def quantize_ggml(weight: Tensor, type_name: str, statistics: InputStatistics | None = None) -> GgmlTensor:
    """A weight in a type of ggml: scales by the inputs' importance, codes by GPTQ with the inputs' Hessian; the nearest where there are none.

    Args:
        weight: [O, I], finite; the type's block divides I (`ggml_fallback` says what stands in else).
    """
    if statistics is not None and statistics.rows:
        return quantize_ggml_together({"": weight}, type_name, statistics)[""]
    grid = fit_ggml_grid(weight, type_name)
    return pack(grid, grid.nearest(weight))


def quantize_ggml_together(
    weights: Mapping[str, Tensor], type_name: str, statistics: InputStatistics, settings: GptqSettings | None = None
) -> dict[str, GgmlTensor]:
    """All weights that share an input, whose Hessian is factorized once for them; each comes out as by itself, but for the damping, which is
    chosen for all.

    Args:
        weights: [O, I] each, finite; the type's block divides I.
    """
    from lighten.compress.gptq import DEFAULT, Grid, choose_factor, first_factor, gptq_codes, refine_codes, refit_scales

    settings = settings or DEFAULT
    layout, first = LAYOUTS[type_name], first_factor(statistics, settings.damping)
    grids = {name: fit_ggml_grid(weight, type_name, first.residual) for name, weight in weights.items()}
    scale, offset = (torch.cat([getattr(grid, kind) for grid in grids.values()]) for kind in ("scale", "offset"))
    general = Grid(scale=torch.where(scale == 0, torch.full_like(scale, _NOTHING), scale), offset=offset, levels=layout.levels)
    joined = torch.cat([weight.float() for weight in weights.values()])
    if settings.keep_zeros and layout.middle is not None:  # with minima 0 is seldom on the grid
        general = replace(general, zeros=joined == 0)
    nearest = torch.cat([grid.nearest(weight) for grid, weight in zip(grids.values(), weights.values(), strict=True)])
    factor = first if settings.damping is not None else choose_factor(joined, nearest, general, statistics, first=first)
    codes = gptq_codes(joined, factor, general)
    for _ in range(settings.rounds(GGML_TYPES[type_name].bits)):
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
        codes = (x * inverse(scale)[..., None]).round_().clamp_(-middle, middle - 1)
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

    Tried are steps of several sizes that begin at the smallest value, end at the largest, or lie in the middle.
    """
    low, high = x.amin(-1), x.amax(-1)
    low = low.clamp(max=0) if below_zero else low
    sums = (w.sum(-1).expand_as(low), (w * x).sum(-1))
    wx, top = w * x, levels - 1
    span = high - low
    best = [torch.zeros_like(low), torch.minimum(sums[1] / sums[0], torch.zeros_like(low)) if below_zero else sums[1] / sums[0]]
    gain = best[1] * (2 * sums[1] - best[1] * sums[0])  # what an offset alone takes from Σ w x²

    def consider(scale: Tensor, offset: Tensor) -> None:
        codes = nearest_codes(x, scale, offset, levels)
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
        middle = (scale * inverse(units)).round().clamp(low, high)
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
        codes = (x * inverse(step)).round_().clamp_(-half, half - 1)
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
    start, minimum = ((value * inverse(unit)).round().clamp(0, top) for value, unit in zip(wanted, units, strict=True))
    best, least, kept = (start, minimum), torch.full(start.shape, torch.inf), x
    total = w.sum(-1)
    for change in (0, -1, 1):
        scales = (start + change).clamp(0, top)
        step, minima, codes = units[0] * scales, minimum, x
        for refined in (False, True):
            if refined:
                minima = ((w * (step[..., None] * codes - x)).sum(-1) / total * inverse(units[1])).round().clamp(0, top)
            offset = -units[1] * minima
            codes = nearest_codes(x, step, offset, layout.levels)
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
        multiples = (wanted * inverse(unit)).round().clamp(*limits)
        error = (weight * (wanted - multiples * unit).square()).sum(-1)
        best, least = torch.where(error < least, candidate, best), torch.minimum(least, error)
    return best


def _curvature(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """[R, G]: how fast the error grows with a change of the scale, Σ w code²."""
    return (w * nearest_codes(x, scale, offset, levels).square()).sum(-1) + 1e-12


def _half(values: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half()


def _unit(values: Tensor) -> Tensor:
    """Float16, no smaller than its smallest number where it is not 0: sub-scales then make up for what the unit is too large."""
    tiny = (values != 0) & (values.abs() < _SMALLEST)
    return torch.where(tiny, values.sign() * _SMALLEST, _half(values).float()).half()
