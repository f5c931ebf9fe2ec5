"""More rows where a text is short: spans of it from random places, short ones among them.

A student that was trained on rows of 128 tokens embeds a sentence of 15 badly, and twenty thousand tokens are passed over in a minute. Spans give it
both: each length has as many tokens, and each span the marks that the rows begin and end with ([CLS] and [SEP]).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lighten.errors import RecipeError
from lighten.recipe import Step
from lighten.recipe.distill import span_tokens

LENGTHS = (16, 32, 64, 128)
"""Positions of a span, marks included: choice, from a question to a paragraph."""
MARKS = 2
"""Tokens at most that a tokenizer puts before a text, or behind it: XLNet's <sep> and <cls>."""


def plan_spans(step: Step, rows: Mapping[int, int], *, plain: bool) -> dict[int, int]:
    """Positions of a span → how many such spans a step trains on beside its rows; each length has as many tokens, as whole spans allow.

    Args:
        rows: positions of a row → how many the text has, cut as they are trained on.
        plain: they are tokens of a text and nothing else.

    Raises:
        RecipeError: spans are asked for, and there is no text to cut them from.
    """
    count = span_tokens(dict(step.arguments)) if step.method == "embeddings" else 0
    if not plain or sum(rows.values()) < 2:
        if step["span_tokens"]:
            raise RecipeError(f"distill({step.method}): span_tokens are cut from two or more rows of plain text; leave them out.")
        return {}
    lengths = (step["seq_len"],) if step["seq_len"] else tuple(each for each in LENGTHS if each <= max(rows)) or (max(rows),)
    return {each: many for each in lengths if (many := count // len(lengths) // each)}


def spans_of(rows: Sequence[Tensor], plan: Mapping[int, int], *, seed: int = 0) -> list[Tensor]:
    """[N, positions] of each length: spans of the rows' running text between their marks, of which it has enough. The same seed gives the same spans.

    Args:
        rows: [S] tokens each.
    """
    before, after = _mark(rows), _mark([row.flip(0) for row in rows]).flip(0)
    stream = torch.cat([_between(row, before, after) for row in rows])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for positions, many in plan.items():
        words = positions - len(before) - len(after)
        if 0 < words <= len(stream):
            starts = torch.randint(len(stream) - words + 1, (many,), generator=generator).tolist()
            found.append(torch.stack([torch.cat([before, stream[start : start + words], after]) for start in starts]))
    return found


def is_plain(batches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all of it is tokens, without masks, kinds or labels."""
    return all(set(batch) == {"input_ids"} for batch in batches)


def _mark(rows: Sequence[Tensor]) -> Tensor:
    """Tokens that more than half of the rows begin with."""
    for length in range(MARKS, 0, -1):
        (begin, count), *_ = Counter(tuple(row[:length].tolist()) for row in rows).most_common(1)
        if 2 * count > len(rows):
            return torch.tensor(begin, dtype=rows[0].dtype)
    return rows[0][:0]


def _between(row: Tensor, before: Tensor, after: Tensor) -> Tensor:
    if len(before) and torch.equal(row[: len(before)], before):
        row = row[len(before) :]
    return row[: len(row) - len(after)] if len(after) and torch.equal(row[len(row) - len(after) :], after) else row
