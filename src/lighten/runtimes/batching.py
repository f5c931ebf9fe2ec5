"""Encode texts of different lengths in batches; what comes out stands in the order of the texts, whatever the batches were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lighten.recipe.batching import make_batches
from lighten.recipe.options import Batching
from lighten.runtimes.session import Floats, Ids, Session


def encode_texts(session: Session, texts: Sequence[Ids], *, batch_size: int, batching: Batching, most: int | None = None) -> list[Floats]:
    """The last hidden states of each text, [its tokens, D], in the order in which the texts came.

    Args:
        texts: the tokens of each, [S].
        most: positions that the model has.
    """
    found = dict(encoded(session, texts, batch_size=batch_size, batching=batching, most=most))
    return [found[place] for place in range(len(texts))]


def encoded(
    session: Session, texts: Sequence[Ids], *, batch_size: int, batching: Batching, most: int | None = None
) -> Iterator[tuple[int, Floats]]:  # fmt: skip
    """The place of each text and its last hidden states, as they come."""
    for batch in make_batches([len(text) for text in texts], batch_size, batching, most=most):
        places = batch.places + batch.places[:1] * (batch.rows - len(batch.places))
        ids, mask = np.zeros((batch.rows, batch.width), np.int64), np.zeros((batch.rows, batch.width), np.int64)
        for row, place in enumerate(places):
            ids[row, : len(texts[place])], mask[row, : len(texts[place])] = texts[place], 1
        hidden = session.encode(ids, mask)
        yield from ((place, hidden[row, : len(texts[place])]) for row, place in enumerate(batch.places))
