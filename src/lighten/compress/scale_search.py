"""Scales (and zero points) of least error in the layer's output, instead of those that span each group.

The error of a group's rounding is weighted by how large its columns' inputs are: Σ_i h_i (w_i - ŵ_i)², h the diagonal of the mean of x xᵀ.
Scales are rounded to the type that they are stored in before codes are chosen on them.

Source: for the search over shrunk ranges, Frantar et al.'s own code of GPTQ (arXiv:2210.17323); for weighting it by the inputs, llama.cpp's
importance matrix; for the least-squares scale of given codes, llama.cpp's k-quants.

Shape legend: O rows, I columns, G groups of a row, C columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor, to_groups
from lighten.compress.minifloat import quantize_float, store_scale
from lighten.compress.rtn import quantize_rtn
from lighten.model.spec import WeightFormat

_SHRINKS = {2: (0.2, 1.3), 3: (0.35, 1.2), 4: (0.5, 1.14), 6: (0.75, 1.03), 8: (0.9, 1.008)}
"""Least and largest share of the range that is tried, by bits: choice, from clipping much where codes are few to a symmetric grid that clips
neither end."""

_STEPS = 12
"""Shares tried. Choice: with two least-squares refits the error is within 0.3 % of that of 80 shares and four refits; with 6 shares, or 12 and no
refit, it is 1 % larger at 4 bits (symmetric grids, benchmarks/solver_choices.py)."""

_REFITS = 2
_CHUNK = 1 << 17  # elements searched at once: they and two copies stay in a core's cache


def search_scales(weight: Tensor, *, format: WeightFormat, importance: Tensor | None = None, global_scale: Tensor | None = None) -> QuantizedTensor:
    """The nearest codes on the grid of least weighted squared error that the search meets; never worse than round-to-nearest's grid.

    Tried are shares of the group's range with the zero points that center it and their neighbours (symmetric: with either sign), then
    the least-squares scale and zero point of the codes found.

    Args:
        weight: [O, I], finite; the format's group divides I.
        importance: [I], at least 0; None: all columns weigh the same. A group whose columns all weigh 0 is searched unweighted.
        global_scale: nvfp4's, where several weights share one.
    """
    importance = torch.ones(weight.shape[1]) if importance is None else importance.float()
    if format.element != "int":
        return quantize_float(weight, format=format, importance=importance, global_scale=global_scale)
    assert format.bits is not None, "a format to quantize to has a width"
    middle, top = 2 ** (format.bits - 1), 2**format.bits - 1
    scale, zero = _plain_grid(weight, format)
    groups = to_groups(weight.float(), format.group_size)
    weights = to_groups(importance.expand(weight.shape), format.group_size)[0]
    rows = min(len(groups), max(1, _CHUNK // groups.shape[2]))
    together = max(1, _CHUNK // (groups.shape[2] * max(rows, 1)))
    for first in range(0, groups.shape[1], together):
        some = slice(first, first + together)
        for start in range(0, len(groups), rows):
            chosen = slice(start, start + rows)
            search = _Search(groups[chosen, some].permute(1, 2, 0).contiguous(), weights[some], format)
            found = search.run(scale[chosen, some].T.contiguous(), zero[chosen, some].T.contiguous())
            scale[chosen, some], zero[chosen, some] = (each.T for each in found)
    if format.symmetric:  # the range [1 - middle, middle] is that of a negative scale
        scale, zero = torch.where(zero < middle, -scale, scale), torch.full_like(zero, middle)
    codes = (groups / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, top)
    return QuantizedTensor(
        codes=codes.to(torch.uint8).reshape(weight.shape), scale=scale.to(getattr(torch, format.scale_dtype)),
        zero_point=None if format.symmetric else zero.to(torch.uint8), bits=format.bits, group_size=format.group_size,
    )  # fmt: skip


def _plain_grid(weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """[O, G] positive scale and zero point of round-to-nearest's grid."""
    assert format.bits is not None, "a format to quantize to has a width"
    plain = quantize_rtn(weight, bits=format.bits, group_size=format.group_size, symmetric=format.symmetric)
    scale = plain.scale.float()
    zero = 2 ** (format.bits - 1) - (scale < 0).float() if plain.zero_point is None else plain.zero_point.float()
    return _stored(scale.abs(), format), zero


def _stored(scale: Tensor, format: WeightFormat) -> Tensor:
    """Float32 of the nearest scale that can be stored."""
    return store_scale(scale, format, None).float()


class _Search:
    """The best grid of n rows of K groups.

    A symmetric grid is searched as one whose zero point is the middle code or the one below it, which is a negative scale's.

    Shape legend: x [K, C, n]; h [K, 1, C]; scale, zero and error [K, n]; Z zero points [Z, K, n].
    """

    def __init__(self, x: Tensor, h: Tensor, format: WeightFormat) -> None:
        assert format.bits is not None, "a format to quantize to has a width"
        self.x, self.h = x, torch.where((h != 0).any(1, keepdim=True), h, torch.ones_like(h))[:, None]
        self.format, self.bits, self.top = format, format.bits, 2**format.bits - 1
        self._scaled, self._rounded, self._levels = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        self._error = torch.full_like(x[:, 0], torch.inf)

    def run(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale and zero point, or the given ones where none is better."""
        self._scale, self._zero = scale.clone(), zero.clone()
        self._consider(scale, zero[None])
        low, high = self.x.amin(1).clamp(max=0), self.x.amax(1).clamp(min=0)
        middle = torch.full_like(zero, 2 ** (self.bits - 1))
        span = torch.maximum(-low, high) / middle if self.format.symmetric else (high - low) / self.top
        for tried in _stored(torch.linspace(*_SHRINKS[self.bits], _STEPS)[:, None, None] * span, self.format):
            center = middle if self.format.symmetric else ((self.top - (high + low) / tried) / 2).round()
            beside = (0, -1) if self.format.symmetric else (0, 1, -1)
            self._consider(tried, torch.stack([center + step for step in beside]).clamp_(0, self.top))
        for _ in range(_REFITS):
            self._refit()
        return self._scale, self._zero

    def _consider(self, scale: Tensor, zeros: Tensor) -> None:
        """Keep the best of the zero points for the rows where its error is less than the best one's so far."""
        torch.div(self.x, scale[:, None], out=self._scaled)
        torch.round(self._scaled, out=self._rounded)
        errors = torch.stack([self._weighted(self._clipped(zero).sub_(self._scaled).square_()) for zero in zeros])
        error, place = errors.min(0)
        error *= scale.square()
        better = error < self._error
        zero = zeros.gather(0, place[None])[0]
        for kept, new in ((self._error, error), (self._scale, scale), (self._zero, zero)):
            torch.where(better, new, kept, out=kept)

    def _weighted(self, values: Tensor) -> Tensor:
        """[K, n] Σ_c h_c values_c."""
        return torch.bmm(self.h, values)[:, 0]

    def _clipped(self, zero: Tensor) -> Tensor:
        """[K, C, n] codes less their zero point, in memory that the next call overwrites."""
        return torch.clamp(self._rounded, -zero[:, None], self.top - zero[:, None], out=self._levels)

    def _refit(self) -> None:
        """Try the scale (and zero point) that are best for the codes of the best grid."""
        torch.round(torch.div(self.x, self._scale[:, None], out=self._scaled), out=self._rounded)
        codes = self._clipped(self._zero) + self._zero[:, None]
        zeros = [self._zero.clone()] if self.format.symmetric else [self._zero.clone(), self._best_zero(codes)]
        for zero in zeros:
            levels = codes - zero[:, None]
            scale = self._weighted(levels * self.x) / self._weighted(levels.square_()).clamp(min=1e-30)
            self._consider(_stored(torch.where(scale > 0, scale, self._scale), self.format), zero[None])

    def _best_zero(self, codes: Tensor) -> Tensor:
        """-intercept / slope of the weighted regression of x on the codes, rounded."""
        total, code, x = self.h.sum(2), self._weighted(codes), self._weighted(self.x)
        spread = total * self._weighted(codes.square()) - code.square()
        slope = (total * self._weighted(codes * self.x) - code * x) / spread
        zero = ((code - x / slope) / total).round()
        return torch.where(zero.isfinite(), zero, self._zero).clamp(0, self.top)
