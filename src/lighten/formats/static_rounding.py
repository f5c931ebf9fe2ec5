"""How the inputs and weights of products are rounded to 8 bits on scales from calibration: weights by GPTQ, and another way where one scale spoils.

Each input of products with constant weights is one site.

    y = x / s,  s_j = max|x_j|^α / max|w_j|^(1 - α)            outliers move into the weights (SmoothQuant)
    ŷ = (clamp(round(y / Δ) + z, 0, 255) - z) · Δ              one scale for all, [min, max] of calibration
    Ŵ ≈ W · s                                                  8 bits by channel, GPTQ with the moments of y
    bias + mean(x Wᵀ - ŷ Ŵᵀ)                                   what rounding shifts on average

α is the one of `ALPHAS` whose product is nearest to x Wᵀ on rows that nothing was fitted to. Where a few tokens have activations far beyond all
others', one scale for all leaves nothing of the rest: a site whose product is then farther off than `SPOILED`, and less than half as far with what
its runtime has instead, is left to that.

Source: Xiao et al. 2022 (arXiv:2211.10438), eq. 4; Frantar et al. 2022 (arXiv:2210.17323); Nagel et al. 2019 (arXiv:1906.04721), section 4.2, for the
bias. Deviations: (1) channels are divided where the input is rounded, so that norms and residual sums stay as they are; (2) α by site; (3) the
mixture.

Shape legend: B batch_size, S length, T rows (tokens), I columns (input features), O rows of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.fake_quant import round_dynamic
from lighten.compress.gptq import GptqSettings, quantize_gptq
from lighten.compress.grid import QuantizedTensor
from lighten.compress.statistics import InputStatistics, Moments
from lighten.formats.settings import STATIC_GROUP
from lighten.model.spec import WeightFormat

Array: TypeAlias = np.ndarray[Any, Any]
Batch: TypeAlias = Mapping[str, Array]
Instead: TypeAlias = Callable[[Tensor], Tensor]
"""[T, I] → what a runtime makes of an input that has no static scale."""
ALPHAS = (0.75, 0.85, 1.0)
SPOILED = 3e-4
"""Squared error of a product over its square. Choice; benchmarks/static_int8.py prints what each site of a model has."""
AT_ONCE = 4
"""Sites between two looks at a graph as it is then; an encoder's block has four: choice."""
ROWS = 16_384
"""Calibration rows of a site at most, evenly spread: choice, 100 MB of an input of 1,536 columns."""
SEQUENCES = 16
"""In a batch of calibration: choice."""
HELD_OUT = 4
"""Every so many-th row judges what the others chose."""
LEAST = 1e-5
"""Maxima below it count as this much, as in `smoothquant.py`."""
FORMAT = WeightFormat(bits=8, scale_dtype="float32")
PLAIN = GptqSettings(damping=0.03, refine=0, search=False)
"""Choice: at 8 bits most of a product's error is of its inputs; by hand, on a block of MiniLM, GPTQ's other settings lowered it by 1 to 3 %."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a site is rounded.

    Attributes:
        error: squared error of its products over their square, on held-out rows.
        scales: [I] what its channels are divided by.
        low, high: of what is left; None: the input has no static scale.
        weights: by operator.
        shifts: [O] by operator: what its product is too small by on average.
    """

    error: float
    scales: Tensor
    low: float | None
    high: float | None
    weights: Mapping[str, QuantizedTensor]
    shifts: Mapping[str, Tensor]

    @property
    def is_static(self) -> bool:
        return self.low is not None


def together(batches: Sequence[Batch]) -> list[Batch]:
    """The same sequences, `SEQUENCES` in a batch beside others of about their length, padded where a mask hides it."""
    if any("attention_mask" not in batch for batch in batches):
        return list(batches)
    single = [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(len(batch["attention_mask"]))]
    single.sort(key=lambda each: len(each["attention_mask"]))
    return [_padded(single[start : start + SEQUENCES]) for start in range(0, len(single), SEQUENCES)]


def _padded(sequences: Sequence[Batch]) -> Batch:
    longest = max(len(each["attention_mask"]) for each in sequences)
    return {
        name: np.stack([np.pad(each[name], [(0, longest - len(each[name]))] + [(0, 0)] * (each[name].ndim - 1)) for each in sequences])
        for name in sequences[0]
    }  # fmt: skip


def counted_rows(values: np.ndarray[Any, Any], batch: Batch) -> Tensor:
    """[T, I] of [B, S, I], those that no mask hides; of [B, I] all."""
    mask = batch.get("attention_mask")
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return torch.from_numpy(values[mask.astype(bool)])
    return torch.from_numpy(values.reshape(-1, values.shape[-1]))


def spread(rows: Tensor) -> Tensor:
    """`ROWS` of them at most."""
    return rows if len(rows) <= ROWS else rows[torch.linspace(0, len(rows) - 1, ROWS).long()]


def choose_rounding(x: Tensor, weights: Mapping[str, Tensor], instead: Instead | None) -> Rounding:
    """The static rounding of least error; or what a runtime has instead, where that spoils too much.

    Args:
        x: [T, I].
        weights: [O, I] each.
        instead: None: the runtime has nothing for such an input.
    """
    seen = Seen.of(x)
    best = min((round_by(seen, weights, smooth_scales(seen, weights, alpha)) for alpha in ALPHAS), key=lambda found: found.error)
    if best.error <= SPOILED or instead is None:
        return best
    other = round_by(seen, weights, torch.ones(x.shape[1]), instead)
    return other if other.error < best.error / 2 else best


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What rounding needs to know of an input's rows x.

    Attributes:
        low, high: [I], of all rows.
        statistics: moments, those of the held-out rows apart.
        held_out: [T / HELD_OUT, I].
    """

    low: Tensor
    high: Tensor
    statistics: InputStatistics
    held_out: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        """
        Args:
            x: [T, I].
        """
        moments, held_out = Moments(x.shape[1]), torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
        moments.add(x[~held_out])
        moments.add(x[held_out], held_out=True)
        return cls(low=x.amin(0), high=x.amax(0), statistics=moments.finish(), held_out=x[held_out])

    def divided(self, scales: Tensor) -> Seen:
        """Of x / scales [I]."""
        own, both = self.statistics, scales[:, None] * scales
        statistics = replace(
            own, hessian=own.hessian / both, held_out=None if own.held_out is None else own.held_out / both,
            mean_abs=own.mean_abs / scales, abs_max=own.abs_max / scales,
        )  # fmt: skip
        return Seen(low=self.low / scales, high=self.high / scales, statistics=statistics, held_out=self.held_out / scales)


def smooth_scales(seen: Seen, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """[I], their geometric mean 1."""
    inputs = torch.maximum(-seen.low, seen.high).clamp(min=LEAST)
    columns = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp(min=LEAST)
    scales = inputs**alpha / columns ** (1 - alpha)
    return scales / scales.log().mean().exp()


def round_by(seen: Seen, weights: Mapping[str, Tensor], scales: Tensor, instead: Instead | None = None) -> Rounding:
    """A site rounded with given scales, or with what a runtime has instead, and how far off its products then are."""
    divided = seen.divided(scales)
    low, high = static_range(float(divided.low.min()), float(divided.high.max()))
    codes = quantize_gptq({name: weight * scales for name, weight in weights.items()}, divided.statistics, FORMAT, PLAIN)
    x = divided.held_out
    rounded = instead(x) if instead else round_static(x, low, high)
    wrong = total = 0.0
    shifts = {}
    for name, weight in weights.items():
        exact, coded = seen.held_out @ weight.T, rounded @ codes[name].dequantize().T
        wrong += float((coded - exact).square().sum())
        total += float(exact.square().sum())
        shifts[name] = (exact - coded).mean(0)
    ends = (None, None) if instead else (low, high)
    return Rounding(error=wrong / total if total else 0.0, scales=scales, low=ends[0], high=ends[1], weights=codes, shifts=shifts)


def static_range(low: float, high: float) -> tuple[float, float]:
    """The least range of 256 steps that holds all between two values and of which 0 is one."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    zero = round(-low / step)
    return -zero * step, (255 - zero) * step


def round_static(x: Tensor, low: float, high: float) -> Tensor:
    """
    >>> round_static(torch.tensor([-9.0, 0.2, 0.6]), 0.0, 255.0).tolist()
    [0.0, 0.0, 1.0]
    """
    step = (high - low) / 255
    return ((x - low) / step).round().clamp(0, 255) * step + low


def round_groups(x: Tensor) -> Tensor:
    """As runtimes round what has no static scale: a symmetric one for each row's groups of columns."""
    return round_dynamic(x[:, None], element="int", zero_points=False, group_size=STATIC_GROUP)[:, 0]


def described(found: Mapping[str, Rounding]) -> Iterator[str]:
    """A line for each site, for people."""
    for name, rounding in found.items():
        kind = "static" if rounding.is_static else f"by token, groups of {STATIC_GROUP}"
        yield f"{name}: {kind}, error {rounding.error:.1e} ({', '.join(rounding.weights)})"
