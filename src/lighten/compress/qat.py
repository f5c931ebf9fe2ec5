"""Quantization-aware training: codes move too.

Behind each code stands a real number, and the code is the whole number nearest to it. The model computes with the codes; the gradient of a
weight is given to the number behind its code as if nothing had been rounded (the straight-through estimator), and none where the number is
beyond the grid's end. Scales and norms move as in `distill_scales.py`, down the same distance from the original.

A number moves by its gradient over the root mean square of its row's gradients, so that few codes change at a time, those that the loss asks
for most. (Steps of one size for all, by the gradient's sign, diverged where they were tried: most signs are noise.) The numbers move
inside of the backward pass, so that no gradients of weights live: a weight takes 3 bytes, 1 for the code it came with, 2 for the distance from it.

Source: Bengio et al. 2013 (arXiv:1308.3432) for the estimator; Liu et al. 2023 (arXiv:2305.17888) for training against the original's answers.
Deviations: (1) the start is what another method left, GPTQ for one; (2) the step by row, and no momentum; (3) no weight decay.

Shape legend: O rows (output features), I columns (input features), G scales of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lighten.compress.distill_scales import Task, TuneSettings, descend, start_latents
from lighten.compress.grid import Quantized, QuantizedTensor, Weight, to_groups
from lighten.compress.student import Latent, Scales, has_real_scales, scale_factor, with_scales

CODE_RATE = 0.02
"""Steps of the grid that a number moves where its gradient is its row's root mean square. Choice, by a trial
at 2 bits that benchmarks/LOG.md tells of; at 0.05 training diverged."""

_LIMIT = 4.0
"""Root mean squares that count of one gradient: choice, so that no code changes in fewer than three steps."""

_MARGIN = 0.6
"""A number begins this share of the way from its code to where the original weight lies, which counts as half a step away at most: choice, so
that what GPTQ decided is not undone by the first steps."""


class Pace:
    """How far a code's number moves in a step; shared by all weights."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


class Codes:
    """Codes and scales that move.

    Args:
        weight: whole-number codes under real scales.
        original: [O, I] what they stand for: a weight that lies between two codes can go to the other one sooner.
        keep_zeros: codes that stand for 0 stay.
    """

    def __init__(self, weight: QuantizedTensor, original: Tensor, pace: Pace, *, dtype: torch.dtype, keep_zeros: bool = False) -> None:
        self._weight, self._dtype, self._pace = weight, dtype, pace
        self._scale = weight.scales()
        self._leaf = torch.zeros_like(self._scale).requires_grad_()
        middle = torch.tensor(2.0 ** (weight.bits - 1))
        zero = middle if weight.zero_point is None else weight.zero_point.float()[..., None]
        position = (to_groups(original.float(), weight.group_size) / self._scale[..., None] + zero).reshape(weight.codes.shape)
        self._apart = (position - weight.codes).clamp_(-0.5, 0.5).mul_(_MARGIN).half()
        self._fixed = self.levels() == 0 if keep_zeros else None
        self._hold()

    def value(self) -> Tensor:
        found: Tensor = _Rounded.apply(self._moved(), self)  # type: ignore[no-untyped-call]
        return found

    def leaves(self) -> list[Tensor]:
        return [self._leaf]

    def finish(self) -> Weight:
        return with_scales(self._weight, self._moved().detach(), self.codes())

    def codes(self) -> Tensor:
        """[O, I] uint8, as they are now."""
        return (self._weight.codes + self._apart.float()).round_().clamp_(0, 2**self._weight.bits - 1).to(torch.uint8)

    def levels(self) -> Tensor:
        """[O, I] bfloat16: codes less their zero points."""
        codes = self.codes().bfloat16()
        if self._weight.zero_point is None:
            return codes.sub_(2 ** (self._weight.bits - 1))
        return (to_groups(codes, self._weight.group_size) - self._weight.zero_point.bfloat16()[..., None]).reshape(codes.shape)

    def scaled(self, scale: Tensor) -> Tensor:
        """[O, I] in the computing type."""
        return (to_groups(self.levels(), self._weight.group_size) * scale[..., None]).to(self._dtype).reshape(self._weight.codes.shape)

    def move(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """Move the numbers behind the codes one step; the gradient of the scales before."""
        size = self._weight.group_size
        of_scale = (to_groups(gradient, size) * to_groups(self.levels(), size)).sum(-1, dtype=torch.float32)
        pull = (to_groups(gradient, size) * scale.to(gradient.dtype)[..., None]).reshape(gradient.shape).bfloat16()
        size_of_row = pull.float().square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        self._apart.sub_((pull / size_of_row).clamp_(-_LIMIT, _LIMIT).half(), alpha=self._pace.rate)
        codes = self._weight.codes
        low, high = -0.5 - codes.half(), 2**self._weight.bits - 0.5 - codes.half()
        torch.clamp(self._apart, low, high, out=self._apart)  # at the end of the grid a number waits, instead of walking on without gradient
        self._hold()
        return of_scale

    def _hold(self) -> None:
        if self._fixed is not None:
            self._apart[self._fixed] = 0

    def _moved(self) -> Tensor:
        return self._scale * scale_factor(self._leaf, bits=self._weight.bits)


class _Rounded(torch.autograd.Function):
    """(rounded number - zero point) · scale, straight through in the backward pass, where the codes' numbers move."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(scale)
        return codes.scaled(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return ctx.codes.move(gradient, scale), None


def train_codes(task: Task, settings: TuneSettings, *, code_rate: float = CODE_RATE) -> dict[str, Weight]:
    """What changed: other codes and scales in the same formats, other norms. Codes of floats, and codes under 8-bit scales, stay. Nothing,
    where held-out samples gain nothing.

    Args:
        code_rate: how far, in steps of the grid, the number behind a code moves in the first step; falls linearly to 0.
    """
    pace = Pace(code_rate)
    dtype = task.skeleton.dtype

    def trained(name: str, weight: Quantized) -> Latent | None:
        if not has_real_scales(weight):
            return None
        if weight.element != "int":
            return Scales(weight, dtype=dtype)
        original = task.source(name)
        return Codes(weight, original.T if name in task.transposed else original, pace, dtype=dtype, keep_zeros=name in task.pruned)

    def before_step(left: float) -> None:
        pace.rate = code_rate * left

    return descend(task, start_latents(task, trained), settings, before_step=before_step)
