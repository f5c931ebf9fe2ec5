"""More rows for an encoder, where the text is short: spans of it from random places, short ones among them.

A student that was trained on rows of 128 tokens embeds a sentence of 15 badly, and twenty thousand tokens are passed over in a minute. Spans give it
both: each length has as many tokens, each span the marks that all rows begin and end with ([CLS] and [SEP], by the rows themselves).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lighten.errors import TextError

LENGTHS = (16, 32, 64, 128)
"""Positions of a span, marks included: choice, from a question to a paragraph."""


def span_rows(count: int, *, longest: int, length: int | None = None) -> dict[int, int]:
    """Positions of a span → how many such spans, `count` tokens together as nearly as whole spans allow.

    Args:
        longest: row of the text.
        length: the only one, where a step asks for rows of one length.

    >>> span_rows(1000, longest=100), span_rows(1000, longest=100, length=50), span_rows(1000, longest=9)
    ({16: 20, 32: 10, 64: 5}, {50: 20}, {9: 111})
    """
    lengths = (min(length, longest),) if length else tuple(each for each in LENGTHS if each <= longest) or (longest,)
    return {each: count // len(lengths) // each for each in lengths if count // len(lengths) // each}


def spans_of(rows: Sequence[Tensor], *, count: int, length: int | None = None, seed: int = 0) -> list[Tensor]:
    """[N, positions] of each length: spans of the rows' running text between their marks. The same seed gives the same spans.

    Args:
        rows: [S] tokens each, two or more of them.

    Raises:
        TextError: all rows are alike.
    """
    first, last = _shared(rows), _shared([row.flip(0) for row in rows])
    inner = [row[first : len(row) - last] for row in rows]
    if not all(map(len, inner)):
        raise TextError("span_tokens: the text's rows are all alike; give a text of more than one passage.")
    stream = torch.cat(inner)
    before, after = rows[0][:first], rows[0][len(rows[0]) - last :]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for positions, many in span_rows(count, longest=max(map(len, rows)), length=length).items():
        words = max(1, positions - first - last)
        starts = torch.randint(len(stream) - words + 1, (many,), generator=generator).tolist()
        found.append(torch.stack([torch.cat([before, stream[start : start + words], after]) for start in starts]))
    return found


def _shared(rows: Sequence[Tensor]) -> int:
    """Tokens that all rows begin with."""
    shortest = min(map(len, rows))
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
    return int(same.long().cumprod(0).sum())
