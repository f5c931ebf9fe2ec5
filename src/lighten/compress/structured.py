"""Which columns of a weight go in whole groups, and what the others become so that the output changes least.

Of W x the columns R go and K stay. With H the mean of x xᵀ, damped, what stays is the least-squares answer

    W_K + W_R H_RK H_KK⁻¹

and taking a group S away costs tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ), where W and H⁻¹ are those of what is still there.

Source: the optimal brain surgeon in blocks, ZipLM (arXiv:2302.04089, eqs. 2 and 3), SlimGPT (arXiv:2412.18110, section 3). Deviations: (1) where
many go, several are taken between two updates; (2) in the end what stays is solved for once, from the weights that were there at first.

Shape legend: O rows (output features), I columns (input features), C groups, G columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean diagonal of H, added to it. Source: GPTQ (arXiv:2210.17323, section 3.3, step 3)."""
ROUNDS = 64
"""Updates at most: choice. Each costs a copy of H⁻¹; with 384 of 1,536 columns that go, six are taken at once."""


def keep_groups(weight: Tensor, hessian: Tensor, groups: Tensor, *, count: int) -> Tensor:
    """The `count` groups that stay, rising, neither more nor fewer; of groups that cost the same the lower one stays.

    Computed in the type of the moments.

    Args:
        weight: [O, I].
        hessian: [I, I], the mean of x xᵀ.
        groups: [I] the group of each column, 0 to C - 1, each of as many columns.
    """
    columns = groups.argsort(stable=True).reshape(int(groups.max()) + 1, -1)  # [C, G]
    left = torch.arange(len(columns))
    order = columns.reshape(-1)
    value = weight.to(hessian.dtype)[:, order]
    inverse = _inverse(damped(hessian), order)
    rounds = min(ROUNDS, len(columns) - count)
    for number in range(rounds):
        taken = -(-(len(left) - count) // (rounds - number))
        last_first = _costs(value, inverse, columns.shape[1]).flip(0).argsort(stable=True)
        gone = torch.zeros(len(left), dtype=torch.bool)
        gone[len(left) - 1 - last_first[:taken]] = True
        value, inverse = _without(value, inverse, gone.repeat_interleave(columns.shape[1]))
        left = left[~gone]
    return left


def refit(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """[O, I] the weight with columns of zeros where they go, and the others as they make up for those best.

    Args:
        kept: [I] whether a column stays.
    """
    known, matrix = weight.to(hessian.dtype), damped(hessian)
    made = torch.zeros_like(known)
    across = matrix[~kept][:, kept]
    made[:, kept] = known[:, kept] + known[:, ~kept] @ torch.linalg.solve(matrix[kept][:, kept], across.T).T
    return made.to(weight.dtype)


def group_costs(weight: Tensor, hessian: Tensor, groups: Tensor) -> Tensor:
    """[C] what each group costs that goes alone, relative to the output's mean square."""
    columns = groups.argsort(stable=True).reshape(int(groups.max()) + 1, -1)
    order = columns.reshape(-1)
    value, matrix = weight.to(hessian.dtype), damped(hessian)
    whole = ((value @ matrix) * value).sum()
    return (_costs(value[:, order], _inverse(matrix, order), columns.shape[1]) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).double()


def _inverse(matrix: Tensor, order: Tensor) -> Tensor:
    """The inverse with rows and columns in another order, in as few copies as there can be."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    if torch.equal(order, torch.arange(len(order))):
        return inverse
    return inverse[order][:, order]


def damped(hessian: Tensor) -> Tensor:
    """[I, I] with something on the diagonal that keeps it invertible; the identity where nothing was seen."""
    mean = hessian.diagonal().mean()
    if not bool(mean > 0):
        return torch.eye(len(hessian), dtype=hessian.dtype)
    matrix = hessian.clone()
    matrix.diagonal().add_(DAMPING * mean)
    return matrix


def _costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """[C] of [O, C · G] and [C · G, C · G]."""
    groups = len(inverse) // size
    own = inverse.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [C, G, G]
    parts = weight.reshape(len(weight), groups, size).permute(1, 2, 0)  # [C, G, O]
    costs: Tensor = (parts * torch.linalg.solve(own, parts)).sum((1, 2))
    return costs


def _without(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and inverse of what stays, once the others are made up for."""
    across = inverse[gone][:, ~gone]
    share = torch.linalg.solve(inverse[gone][:, gone], across)
    return weight[:, ~gone] - weight[:, gone] @ share, inverse[~gone][:, ~gone].addmm_(across.T, share, alpha=-1)
