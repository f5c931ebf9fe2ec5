"""More text to tune on, sampled from the original itself, where the calibration text is short.

A few hundred thousand numbers tuned on four thousand tokens fit those tokens. What the original writes after a few words of the calibration
text is text that it has an answer to, of the same kind, and nobody has to bring it.

Source: Liu et al. 2023 (arXiv:2305.17888), section 2.1, data-free distillation. Deviations: (1) texts start from the calibration text, so that
they stay in its field; (2) every token is drawn from the whole distribution, where the paper takes the first ones greedily.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lighten.compress.memory_plan import TEXTS
from lighten.compress.skeleton import Skeleton, Source


def sample_text(skeleton: Skeleton, source: Source, prefixes: Tensor, *, length: int, top_p: float = 1.0, seed: int = 0) -> Tensor:
    """[N, length] tokens: each prefix and what the original writes after it. The same seed gives the same tokens.

    Args:
        skeleton: of a decoder that can generate; loaded whole for the time, and left without weights.
        source: the original's tensors.
        prefixes: [N, P] tokens, P below `length`.
        top_p: smallest share of probability that the next token is drawn from.
    """
    new = length - prefixes.shape[1]
    module: Any = skeleton.module
    skeleton.load(module, source)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = [
                module.generate(
                    part, attention_mask=torch.ones_like(part), do_sample=True, top_p=top_p, top_k=0, use_cache=True,
                    max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
                )
                for part in torch.split(prefixes, TEXTS)
            ]  # fmt: skip
    finally:
        skeleton.drop(module)
    return torch.cat(parts)


def prefixes_of(rows: Tensor, *, count: int, length: int) -> Tensor:
    """[count, length]: starts for `sample_text`, evenly spread over rows of tokens.

    Args:
        rows: [B, S] tokens, at least `length` of them.
    """
    stream = rows.reshape(-1)
    starts = torch.linspace(0, len(stream) - length, count).long()
    return torch.stack([stream[start : start + length] for start in starts.tolist()])
