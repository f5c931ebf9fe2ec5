"""Pruning as one problem: the matrix with so many zeros whose outputs are nearest to the original's, by the alternating direction method of
multipliers, and then the best values of what stays.

    least  tr (W - Ŵ) H (W - Ŵ)ᵀ   where Ŵ has the zeros that are asked for,   H = the mean of x xᵀ, damped

X follows the outputs, Z has the zeros, U is what they disagree by, and the penalty ρ rises until they agree:

    X ← (W H + ρ (Z - U)) (H + ρ)⁻¹,   Z ← the largest of X + U,   U ← U + X - Z

Columns are scaled so that H has ones on its diagonal: then what Z keeps of X + U are Wanda's largest. On the zeros that are found, conjugate
gradients give the values of least error. One eigendecomposition of H serves all ρ and all dampings, for both are multiples of the identity.

Source: Boža 2024 (arXiv:2401.02938) for ADMM with fixed zeros and the scaling; Meng et al. 2024 (arXiv:2406.07831, ALPS) for choosing the zeros by
it under a rising ρ, and for conjugate gradients at the end. Deviations: (1) the damping is chosen on held-out rows; (2) ρ rises by one
factor in every round.

Shape legend: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.compress.gptq import HELD_OUT, layer_error
from lighten.compress.masks import Keep
from lighten.compress.statistics import InputStatistics, bfloat16_units, some_rows

DAMPINGS = (0.03, 0.1, 0.3)
"""Shares of H_ii that are tried as damping: choice (benchmarks/solver_choices.py)."""
ROUNDS, FIRST_PENALTY, GROWTH = 24, 0.03, 1.2
"""Rounds, the first ρ beside a diagonal of ones, and what it rises by: choice, twice as many rounds lower the error by less than 1 %
(benchmarks/solver_choices.py)."""
GRADIENT_STEPS = 10
"""Of conjugate gradients: choice, as above."""
_FLOOR = 1e-4  # of the mean of H_ii, added to each: an input that is always 0 has none of its own


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """H scaled to a diagonal of ones: S⁻¹ H S⁻¹ = Q diag(λ) Qᵀ.

    Attributes:
        scale: [I] the roots of H_ii.
        scaled: [I, I].
        values, vectors: [I] λ, [I, I] Q.
    """

    scale: Tensor
    scaled: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> Spectrum:
        diagonal = hessian.diagonal()
        floor = _FLOOR * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        scale = (diagonal + floor).sqrt()
        scaled = hessian / scale[:, None] / scale
        scaled.diagonal().fill_(1.0)
        values, vectors = torch.linalg.eigh(scaled)
        return cls(scale=scale, scaled=scaled, values=values.clamp(min=0), vectors=vectors)

    def pruned(self, weight: Tensor, keep: Keep, *, damping: float) -> Tensor:
        """[O, I] the weight with its zeros, and with the values that make up for them."""
        target = weight * self.scale
        with bfloat16_units():  # the same zeros but for some near ties, and the values are solved for in float32
            mask = self._choose(target, keep, damping)
        return self._solve(target, mask, damping) / self.scale

    def refitted(self, weight: Tensor, mask: Tensor, *, damping: float) -> Tensor:
        """[O, I] the best values where the mask is, zeros elsewhere."""
        return self._solve(weight * self.scale, mask, damping) / self.scale

    def _choose(self, target: Tensor, keep: Keep, damping: float) -> Tensor:
        values, vectors = self.values + damping, self.vectors
        pull = (target @ vectors) * values
        z, u, penalty = target, torch.zeros_like(target), FIRST_PENALTY
        mask = torch.ones_like(target, dtype=torch.bool)
        for _ in range(ROUNDS):
            x = ((pull + penalty * ((z - u) @ vectors)) / (values + penalty)) @ vectors.T
            x += u
            mask = keep.mask(x.abs())
            z = x * mask
            u = (x - z) / GROWTH  # the multiplier is ρU, which a new ρ leaves as it is
            penalty *= GROWTH
        return mask

    def _solve(self, target: Tensor, mask: Tensor, damping: float) -> Tensor:
        """The values on the mask with (target - z)(H + damping) = 0 there, by conjugate gradients from the target's own."""

        def times(direction: Tensor) -> Tensor:
            return torch.addmm(damping * direction, direction, self.scaled) * mask

        z = target * mask
        left = times(target - z)
        step, size = left, left.square().sum(1, keepdim=True)
        for _ in range(GRADIENT_STEPS):
            seen = times(step)
            length = size / (step * seen).sum(1, keepdim=True).clamp(min=1e-30)
            z, left = z + length * step, left - length * seen
            before, size = size, left.square().sum(1, keepdim=True)
            step = left + size / before.clamp(min=1e-30) * step
        return z


def prune_admm(
    weights: Mapping[str, Tensor], statistics: InputStatistics, keeps: Mapping[str, Keep], damping: float | None = None
) -> dict[str, Tensor]:
    """All weights that share an input, [O, I] each: exactly `keep.count` of each stay.

    Args:
        damping: a share of each H_ii; None: that of `DAMPINGS` with the least error on held-out rows, of some outputs.
    """
    hessian, held_out = statistics.hessian, statistics.held_out
    if damping is None and held_out is not None:
        spectrum, some = Spectrum.of(hessian), {name: some_rows(weight) for name, weight in weights.items()}

        def error(share: float) -> float:
            return sum(
                float(layer_error(weight, spectrum.pruned(weight, keeps[name], damping=share), held_out).sum()) for name, weight in some.items()
            )

        damping = min(DAMPINGS, key=error)
    spectrum = Spectrum.of(hessian if held_out is None else torch.lerp(hessian, held_out, HELD_OUT))
    damping = DAMPINGS[1] if damping is None else damping
    return {name: spectrum.pruned(weight, keeps[name], damping=damping) for name, weight in weights.items()}
