"""What a user of embeddings would lose: answers that are read off them.

Legend: N texts, D values of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lighten.errors import TaskError
from lighten.judge.quality import Floats

ITERATIONS = 2000
"""Of the logistic regression at most; scikit-learn's 100 do not always suffice."""


def features(embeddings: Sequence[Floats]) -> Floats:
    """[N, D] of one text: its embedding at length 1; of two [N, 2D]: |u - v| and u · v by element.

    Source: Conneau et al. 2017 (arXiv:1705.02364), section 3.3, without u and v themselves.
    """
    units = [_unit(each) for each in embeddings]
    return units[0] if len(units) == 1 else np.concatenate([np.abs(units[0] - units[1]), units[0] * units[1]], 1)


def fit_classifier(embeddings: Sequence[Floats], labels: Sequence[str]) -> Callable[[Sequence[Floats]], list[str]]:
    """Embeddings → classes, by scikit-learn's logistic regression with its own settings."""
    from sklearn.linear_model import LogisticRegression

    known = features(embeddings)
    model = LogisticRegression(max_iter=ITERATIONS).fit(known, list(labels))

    def classify(own: Sequence[Floats]) -> list[str]:
        asked = features(own)
        if asked.shape[1] != known.shape[1]:
            raise TaskError(
                f"the embeddings have {own[0].shape[1]} values and the original's {embeddings[0].shape[1]}, which the classifier was fitted on."
            )
        return [str(each) for each in model.predict(asked)]

    return classify


def similarities(embeddings: Sequence[Floats]) -> list[float]:
    """The cosine of each pair."""
    found: Any = (_unit(embeddings[0]) * _unit(embeddings[1])).sum(1)
    return [float(each) for each in found]


def _unit(rows: Floats) -> Floats:
    wide = rows.astype(np.float64)
    found: Floats = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    return found
