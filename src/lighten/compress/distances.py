"""How far a student's answers, states and attention are from its teacher's: pure functions that gradients flow through.

Shape legend: N positions that count, V vocabulary, K largest logits that are kept, B texts, S positions, D width, R relation heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lighten.model.tasks import IGNORED as IGNORED_LABEL

LEAST = -80.0
"""Of a logarithm whose inverse float32 holds (e⁸⁸ is its largest number, IEEE 754); choice: a little less."""
IGNORED = -1e30
"""A logit that stands for probability 0: finite, so that 0 times it is 0."""


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """The largest logits of each position, and what all of them sum to.

    Attributes:
        values: [N, K] float32, over the temperature.
        ids: [N, K] int32.
        log_sum: [N] float32, logarithm of the sum of the exponentials of all V logits over the temperature.
    """

    values: Tensor
    ids: Tensor
    log_sum: Tensor


def keep_top(logits: Tensor, *, count: int, temperature: float) -> TopLogits:
    """The `count` largest of [N, V] logits."""
    scaled = logits.float() / temperature
    values, ids = scaled.topk(min(count, scaled.shape[-1]), dim=-1)
    return TopLogits(values=values, ids=ids.to(torch.int32), log_sum=scaled.logsumexp(-1))


def divergence(target: Tensor | TopLogits, logits: Tensor, *, temperature: float) -> Tensor:
    """Sum over positions of T² KL(softmax(z / T) ‖ softmax(z' / T)), z the teacher's logits, z' the student's.

    The squared temperature keeps gradients at one size whatever T is. Of `TopLogits` the divergence is that of K tokens and one bucket of all others;
    with K = V it is the whole one.

    Args:
        target: [N, V] logits of the teacher, or the largest of them at the same temperature.
        logits: [N, V].

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2 and 2.1.
    """
    found: Tensor = _Divergence.apply(logits, target, temperature)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """The gradient in the logits is made beside the loss: T (softmax(z' / T) - p), with no more copies of the logits than that takes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor | TopLogits, temperature: float) -> Tensor:
        ours = torch.log_softmax(logits.float() / temperature, -1)
        loss, gradient = _of_all(target, ours, temperature) if isinstance(target, Tensor) else _of_top(target, ours)
        ctx.save_for_backward(gradient.mul_(temperature).to(logits.dtype))
        return loss * temperature**2

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * pull, None, None


def _of_all(target: Tensor, ours: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum of the divergences, and softmax less the teacher's share; `ours` is used up."""
    log_share = torch.log_softmax(target.float() / temperature, -1)
    share = log_share.exp()
    loss = (log_share - ours).mul_(share).sum()
    return loss, ours.exp_().sub_(share)


def _of_top(target: TopLogits, ours: Tensor) -> tuple[Tensor, Tensor]:
    """The same of K tokens and the bucket of the rest: within the bucket the student keeps its own proportions."""
    ids = target.ids.long()
    log_share = target.values - target.log_sum[:, None]
    share = log_share.exp()
    loss = (share * (log_share - ours.gather(-1, ids))).sum()
    gradient = ours.exp()
    factor = torch.ones_like(target.log_sum)
    if ids.shape[-1] < ours.shape[-1]:
        left = (1 - share.sum(-1)).clamp(min=0)
        ours_left = ours.scatter(-1, ids, IGNORED).logsumexp(-1).clamp(min=LEAST)
        loss = loss + (torch.xlogy(left, left) - left * ours_left).sum()
        factor = 1 - left * (-ours_left).exp()
    top = gradient.gather(-1, ids) - share
    return loss, gradient.mul_(factor[:, None]).scatter_(-1, ids, top)


def label_distance(answer: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions of the cross-entropy of [N, V] logits in what is true; of [N, 1] values their squared error. What has no label has none.

    Args:
        labels: [N], whole numbers, `IGNORED` where there is none; numbers of values, not a number where there is none.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2: the second objective, at temperature 1.
    """
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(answer.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    known = ~labels.isnan()
    return (answer.float().squeeze(-1)[known] - labels[known]).square().sum()


def state_distance(original: Tensor, ours: Tensor, counts: Tensor, *, size: float) -> Tensor:
    """Squared error of states [B, S, D] relative to the teacher's size, over the positions that count.

    Source: Jiao et al. 2019 (arXiv:1909.10351), equation 3. Deviation: relative to the teacher's size, which grows from layer to layer.

    Args:
        counts: [B, S].
        size: mean square of the teacher's states of this layer over the whole text, so that units add up to the same whatever is in them.
    """
    return (ours[counts].float() - original[counts].float()).square().mean() / max(size, 1e-12)


def relation_distance(original: Tensor, ours: Tensor, counts: Tensor, *, heads: int, causal: bool) -> Tensor:
    """KL of how positions relate to each other: softmax of their scaled products, mean over relation heads and positions that count.

    The widths may differ, and so may the heads of attention: [B, S, D] is cut anew into `heads` pieces.

    Source: Wang et al. 2020 (arXiv:2002.10957), equations 7 to 9, values; in its second version (arXiv:2012.15828), equations 3 and 4, queries and
    keys too, under relation heads. Deviation: a causal model's positions relate to those before them alone.
    """
    length = original.shape[1]
    visible = counts[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool).tril()

    def relations(vectors: Tensor) -> Tensor:
        pieces = vectors.float().reshape(*vectors.shape[:2], heads, -1).transpose(1, 2)  # [B, R, S, D / R]
        products = pieces @ pieces.transpose(-1, -2) / math.sqrt(pieces.shape[-1])
        return torch.log_softmax(products.masked_fill(~visible, IGNORED), -1)

    theirs = relations(original)
    each = (theirs.exp() * (theirs - relations(ours))).sum(-1).mean(1)  # [B, S]
    return each[counts].mean()


def pooled(states: Tensor, counts: Tensor, *, first_token: bool) -> Tensor:
    """[B, D]: the first position's state, or the mean over the positions that count."""
    if first_token:
        return states[:, 0]
    weights = counts.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def cosine_distance(original: Tensor, ours: Tensor) -> Tensor:
    """1 - cosine of [B, D] embeddings, mean over the texts."""
    return (1 - nn.functional.cosine_similarity(original.float(), ours.float(), dim=-1)).mean()


def relational_distance(original: Tensor, ours: Tensor) -> Tensor:
    """Huber loss of how far each two texts' embeddings are apart, in units of the mean of all pairs; 0 of fewer than three texts, whose only distance
    is that unit. [B, D] each, of any two widths.

    Source: Park et al. 2019 (arXiv:1904.05068), equations 3 to 5, distance-wise. Deviation: embeddings of length 1, for they are compared by cosine.
    """
    if len(original) <= 2:
        return ours.sum() * 0.0
    return nn.functional.smooth_l1_loss(_distances(ours), _distances(original))


def _distances(vectors: Tensor) -> Tensor:
    """[pairs] over their mean."""
    vectors = nn.functional.normalize(vectors.float(), dim=-1)
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    found = (vectors[first] - vectors[second]).square().sum(-1).clamp(min=1e-12).sqrt()
    return found / found.mean()


def common_heads(first: int, second: int, *, at_most: int) -> int:
    """The most relation heads that cut both widths into equal pieces.

    >>> common_heads(384, 128, at_most=12), common_heads(96, 64, at_most=12)
    (8, 8)
    """
    return next(count for count in range(at_most, 0, -1) if first % count == 0 and second % count == 0)
