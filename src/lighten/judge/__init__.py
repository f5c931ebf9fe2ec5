"""Stage 9, measure: how good a model's output still is, on text that its compression never saw."""

from lighten.judge.quality import Score, TokenScores, embedding_fidelity, kl_divergence, language_fidelity, score_window, token_scores
from lighten.judge.text import Text, load_text

__all__ = [
    "Score",
    "Text",
    "TokenScores",
    "embedding_fidelity",
    "kl_divergence",
    "language_fidelity",
    "load_text",
    "score_window",
    "token_scores",
]
