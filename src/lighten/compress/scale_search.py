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

_SHRINKS = {2: (0.2, 1.3), 3: (0.35, 1.1), 4: (0.5, 1.05), 6: (0.75, 1.02), 8: (0.9, 1.01)}
"""Least and largest share of the range that is tried, by bits. Measured on SmolLM2's linears: the best of 80 shares of [0.1, 2] lies within."""

_STEPS = 12
"""Shares tried. Measured there: 12, with the zero points beside and two least-squares refits, are within 1 % of 80 with all zero points."""

_REFITS = 2  # see above
_CHUNK = 1 << 16  # elements searched at once: they and two copies stay in a core's cache
_LEAST = 2.0**-24  # of |scale|: float16's smallest number


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
    plain = quantize_rtn(weight, bits=format.bits, group_size=format.group_size, symmetric=format.symmetric)
    groups = to_groups(weight.float(), format.group_size)
    weights = to_groups(importance.expand(weight.shape), format.group_size)[0]
    scale, zero = _stored(plain.scale.float(), format), torch.full(plain.scale.shape, float(2 ** (format.bits - 1)))
    if plain.zero_point is not None:
        zero = plain.zero_point.float()
    rows = max(1, _CHUNK // groups.shape[2])
    for g in range(groups.shape[1]):
        for start in range(0, len(groups), rows):
            chosen = slice(start, start + rows)
            search = _Search(groups[chosen, g].T.contiguous(), weights[g], format)
            search.consider(scale[chosen, g], zero[chosen, g])
            scale[chosen, g], zero[chosen, g] = search.run()
    codes = (groups / scale[..., None] + zero[..., None]).round_().clamp_(0, 2**format.bits - 1)
    return QuantizedTensor(
        codes=codes.to(torch.uint8).reshape(weight.shape), scale=scale.to(getattr(torch, format.scale_dtype)),
        zero_point=None if format.symmetric else zero.to(torch.uint8), bits=format.bits, group_size=format.group_size,
    )  # fmt: skip


def _stored(scale: Tensor, format: WeightFormat) -> Tensor:
    """Float32 of the nearest scale that can be stored; its sign stays."""
    return store_scale(scale.abs(), format, None).float().copysign(scale)


class _Search:
    """The best grid met so far of n rows of one group.

    Shape legend: x [C, n]; h [C]; scale, zero and error [n].
    """

    def __init__(self, x: Tensor, h: Tensor, format: WeightFormat) -> None:
        assert format.bits is not None, "a format to quantize to has a width"
        self.x, self.h = x, h if bool(h.any()) else torch.ones_like(h)
        self.format, self.top = format, 2**format.bits - 1
        self.low, self.high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
        self.scale, self.zero, self.error = torch.ones_like(self.low), torch.zeros_like(self.low), torch.full_like(self.low, torch.inf)
        self._scaled, self._levels = torch.empty_like(x), torch.empty_like(x)

    def run(self) -> tuple[Tensor, Tensor]:
        assert self.format.bits is not None, "a format to quantize to has a width"
        for share in torch.linspace(*_SHRINKS[self.format.bits], _STEPS).tolist():
            self._try_symmetric(share) if self.format.symmetric else self._try_asymmetric(share)
        for _ in range(_REFITS):
            self._refit()
        return self.scale, self.zero

    def consider(self, scale: Tensor, zero: Tensor) -> None:
        """Keep it for the rows where its error is less."""
        levels = self.levels(scale, zero)
        error = self.h @ levels.sub_(self._scaled).square_() * scale.square()
        better = error < self.error
        for kept, new in ((self.error, error), (self.scale, scale), (self.zero, zero)):
            torch.where(better, new, kept, out=kept)

    def levels(self, scale: Tensor, zero: Tensor) -> Tensor:
        """[C, n] nearest code - zero, in memory that the next call overwrites."""
        torch.div(self.x, scale, out=self._scaled)
        torch.round(self._scaled, out=self._levels)
        return self._levels.clamp_(-zero, self.top - zero)

    def _try_symmetric(self, share: float) -> None:
        extreme, middle = torch.maximum(-self.low, self.high), 2 ** (self.format.bits - 1)  # type: ignore[operator]
        for sign in (1, -1):
            self.consider(_stored(extreme * (sign * share / middle), self.format), torch.full_like(extreme, middle))

    def _try_asymmetric(self, share: float) -> None:
        scale = _stored((self.high - self.low) * (share / self.top), self.format)
        center = ((self.top - (self.high + self.low) / scale) / 2).round()
        for step in (0, 1, -1):
            self.consider(scale, (center + step).clamp(0, self.top))

    def _refit(self) -> None:
        """The scale (and zero point) that are best for the codes of the best grid."""
        codes = self.levels(self.scale, self.zero) + self.zero
        zeros = [self.zero.clone()]
        if not self.format.symmetric:
            zeros.append(self._best_zero(codes))
        for zero in zeros:
            levels = codes - zero
            scale = (self.h @ (levels * self.x)) / (self.h @ levels.square()).clamp(min=1e-30)
            self.consider(_stored(scale.where(scale.abs() > _LEAST, self.scale), self.format), zero)

    def _best_zero(self, codes: Tensor) -> Tensor:
        """-intercept / slope of the weighted regression of x on the codes, rounded."""
        total, code, x = self.h.sum(), self.h @ codes, self.h @ self.x
        spread = total * (self.h @ codes.square()) - code.square()
        slope = (total * (self.h @ (codes * self.x)) - code * x) / spread
        zero = ((code - x / slope) / total).round()
        return zero.where(zero.isfinite(), self.zero).clamp(0, self.top)
