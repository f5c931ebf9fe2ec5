"""Lion: the sign of a momentum, one state a weight.

Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2 (program 1), with β₁ = 0.9, β₂ = 0.99. Deviation: no weight decay, which a student that
starts near its end does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BETAS = (0.9, 0.99)


class Lion(Optimizer):
    """w ← w - lr · sign(β₁ m + (1 - β₁) g), then m ← β₂ m + (1 - β₂) g."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.sub_(momentum.lerp(parameter.grad, 1 - BETAS[0]).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - BETAS[1])
