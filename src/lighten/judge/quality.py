"""How close a candidate's output is to its original's, each figure with its standard error. numpy alone.

Legend: N texts, D values of an embedding, T positions of a window, V tokens of the vocabulary.

Standard errors treat the texts (embeddings) and the windows (language models) as independent draws. Passages of one document are not
quite, so the true errors are somewhat larger. Tokens of one window are not treated as independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lighten.errors import ModelError, TextError

Floats: TypeAlias = NDArray[np.floating[Any]]
Doubles: TypeAlias = NDArray[np.float64]

_CHUNK_ELEMENTS = 2**22  # of float64 at once: 32 MiB an array, whatever the vocabulary; choice
_TIE = 1e-12  # two cosines closer than this are one: float64 products round by some 1e-15, models by 1e-7


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure of quality. `standard_error` is None where one text or window is all there is."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What one window of text leaves of its logits.

    Attributes:
        log_likelihood: [T], natural logarithm of the probability that was given to the true next token.
        kl: [T], nats that the candidate is off from the original at each position; None where nothing was compared (the original itself).
        top1: [T], whether the candidate's likeliest token is the original's; None likewise.
    """

    log_likelihood: Doubles
    kl: Doubles | None = None
    top1: NDArray[np.bool_] | None = None


# ---- encoders ----


def embedding_fidelity(reference: Floats, candidate: Floats) -> dict[str, Score]:
    """How well the candidate's embeddings keep the original's: 1 for each figure where they are the same up to each row's scale.

    - `cosine`: the mean over texts of cos(reference_i, candidate_i). Absent where the two have different widths: no such angle exists.
      It flatters, since all embeddings of a model often lie in one cone.
    - `rank_agreement`: the mean over texts of Spearman's correlation between the text's cosines to all other texts, before and after.
      Equal cosines share their mean rank. Where all of a text's cosines are equal the correlation is not defined: it counts as 1 if that
      is so before and after, else as 0.
    - `neighbour_agreement`: the share of texts whose nearest other text is the same. Where the original has several nearest, each will
      do; where the candidate has, its first counts.

    The last two do not change when all embeddings are rotated together.
    Standard errors: sample deviation / √N; for the share √(p(1-p)/N), which is 0 at p = 1 however few the texts.

    Args:
        reference: [N, D], the original's.
        candidate: [N, D'], the same texts in the same order.

    Raises:
        ModelError: an output that is not finite, an embedding of length 0, or another number of texts.
        TextError: fewer than 3 texts: a rank correlation needs 2 others.

    Source: Spearman 1904, ties by mean ranks as in scipy.stats.spearmanr, which the tests hold it to.

    >>> same = np.eye(4) + 0.1 * np.arange(16).reshape(4, 4)
    >>> {name: round(score.value, 9) for name, score in embedding_fidelity(same, 3 * same).items()}
    {'cosine': 1.0, 'rank_agreement': 1.0, 'neighbour_agreement': 1.0}
    """
    if len(reference) != len(candidate):
        raise ModelError(f"The candidate gave {len(candidate)} embeddings where the original gave {len(reference)}; give both the same texts.")
    if len(reference) < 3:
        raise TextError(f"Comparing embeddings needs at least 3 texts; there are {len(reference)}: give a longer text.")
    before, after = _unit_rows(reference, "original"), _unit_rows(candidate, "candidate")
    count = len(before)
    correlations = np.empty(count)
    kept = np.empty(count, dtype=bool)
    for rows in _chunks(count, count):
        old, new = before[rows] @ before.T, after[rows] @ after.T
        for offset, text in enumerate(range(rows.start, rows.stop)):
            old_row, new_row = np.delete(old[offset], text), np.delete(new[offset], text)  # a text is not its own neighbour
            correlations[text] = _correlation(_ranks(old_row), _ranks(new_row))
            nearest = int(np.argmax(new_row >= new_row.max() - _TIE))
            kept[text] = old_row[nearest] >= old_row.max() - _TIE
    scores = {"rank_agreement": _mean(correlations), "neighbour_agreement": _share(kept)}
    if before.shape[1] != after.shape[1]:
        return scores
    return {"cosine": _mean(np.clip((before * after).sum(axis=1), -1.0, 1.0))} | scores


def _unit_rows(embeddings: Floats, whose: str) -> Doubles:
    _check_finite(embeddings, whose)
    rows = embeddings.astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if zeros := int((largest == 0).sum()):
        raise ModelError(f"{zeros} of the {whose}'s {len(rows)} embeddings are all zeros and have no direction; the model is broken.")
    rows /= largest  # so that no square overflows or vanishes
    unit: Doubles = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _ranks(values: Doubles) -> Doubles:
    """Ranks from 0, equal values sharing their mean rank; values closer than `_TIE` to the next are equal."""
    order = np.argsort(values, kind="stable")
    starts = np.concatenate([[True], np.diff(values[order]) > _TIE])
    group = np.cumsum(starts) - 1
    sizes = np.bincount(group)
    mean_rank = np.cumsum(sizes) - (sizes + 1) / 2
    ranks = np.empty(len(values))
    ranks[order] = mean_rank[group]
    return ranks


def _correlation(left: Doubles, right: Doubles) -> float:
    """Pearson's correlation; where a side is constant 1 if both are, else 0."""
    left, right = left - left.mean(), right - right.mean()
    scale = math.sqrt(float(left @ left) * float(right @ right))
    if scale == 0:
        return float(not left.any() and not right.any())
    return min(1.0, max(-1.0, float(left @ right) / scale))


# ---- language models ----


def score_window(logits: Floats, targets: NDArray[np.integer[Any]], reference_logits: Floats | None = None) -> TokenScores:
    """One window's scores; with the original's logits also the divergence from it and the agreement of the likeliest token.

    The likeliest tokens agree where the candidate's first choice has the original's highest logit: in half precision several often have.

    Args:
        logits: [T, V].
        targets: [T], the token that truly follows each position: for a window of ids, `logits[:-1]` and `ids[1:]`.
        reference_logits: [T, V], the original's on the same window.

    Raises:
        ModelError: logits that are not finite, or of another shape than the original's or the targets'.
    """
    log_likelihood = token_scores(logits, targets)
    if reference_logits is None:
        return TokenScores(log_likelihood=log_likelihood)
    kl = kl_divergence(reference_logits, logits)
    chosen = reference_logits[np.arange(len(logits)), logits.argmax(axis=1)]
    return TokenScores(log_likelihood=log_likelihood, kl=kl, top1=chosen == reference_logits.max(axis=1))


def token_scores(logits: Floats, targets: NDArray[np.integer[Any]]) -> Doubles:
    """Natural logarithm of the probability of each target.

        logits[t, targets[t]] - log Σ_v exp(logits[t, v]),   in float64, the row's maximum taken out first

    Args:
        logits: [T, V], any float type.
        targets: [T], in [0, V).

    Returns:
        [T], at most 0.

    Raises:
        ModelError: logits that are not finite, or that do not cover the targets.

    >>> np.exp(token_scores(np.zeros((1, 8)), np.array([3]))).round(12).tolist()
    [0.125]
    """
    if len(logits) != len(targets):
        raise ModelError(f"The model gave logits for {len(logits)} positions where {len(targets)} were asked for.")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ModelError(
            f"The text's tokens reach from {targets.min()} to {targets.max()} and the model gives {logits.shape[1]} logits a position; "
            "use the tokenizer that belongs to the model."
        )
    _check_finite(logits, "candidate")
    scores = np.empty(len(logits))
    for rows in _chunks(*logits.shape):
        scores[rows] = _log_softmax(logits[rows])[np.arange(rows.stop - rows.start), targets[rows]]
    return scores


def kl_divergence(reference_logits: Floats, candidate_logits: Floats) -> Doubles:
    """Nats that are lost at each position where the candidate's distribution q stands in for the original's p.

        KL(p ‖ q) = Σ_v p_v (log p_v - log q_v),   p and q the softmax of the logits

    Args:
        reference_logits, candidate_logits: [T, V] both.

    Returns:
        [T], at least 0 (what rounding leaves below is 0).

    Raises:
        ModelError: logits that are not finite, or of different shapes.

    Source: Kullback & Leibler 1951, eq. 2.4.

    >>> kl_divergence(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])).round(6).tolist()  # 0.5 ln 2 + 0.5 ln(2/3)
    [0.143841]
    """
    if reference_logits.shape != candidate_logits.shape:
        raise ModelError(
            f"The candidate's logits are {list(candidate_logits.shape)} (positions, vocabulary) and the original's "
            f"{list(reference_logits.shape)}; only models with one vocabulary can be compared token by token."
        )
    _check_finite(reference_logits, "original")
    _check_finite(candidate_logits, "candidate")
    divergence = np.empty(len(reference_logits))
    for rows in _chunks(*reference_logits.shape):
        p, q = _log_softmax(reference_logits[rows]), _log_softmax(candidate_logits[rows])
        divergence[rows] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(divergence, 0.0)


def language_fidelity(reference: Sequence[TokenScores], candidate: Sequence[TokenScores]) -> dict[str, Score]:
    """How well the candidate predicts the text, alone and beside the original, over all tokens of all windows.

    - `perplexity`: exp(-mean log-likelihood), of the candidate.
    - `perplexity_ratio`: the candidate's / the original's = exp(mean of the difference token by token).
    - `kl`: the mean of KL(original ‖ candidate), nats. Absent where a window was not compared, and so is the next.
    - `top1_agreement`: the share of positions whose likeliest token is the original's.

    Standard errors of the means m = Σ_w s_w / Σ_w n_w over windows of n_w tokens that sum to s_w:

        √( W/(W-1) · Σ_w (s_w - m n_w)² ) / Σ_w n_w,

    sample deviation / √N where each window has one token. Windows are independent draws here, tokens of one window need not be. The
    ratio's is taken from the paired differences. exp(m) has the error exp(m) · error(m) (delta method).

    Args:
        reference: one entry a window, of the original.
        candidate: of the same windows in the same order.

    Raises:
        ModelError: windows that do not match, or a perplexity beyond what a number holds.
        TextError: no token at all.

    Source: Cochran 1977, Sampling Techniques, eq. 6.13 (ratio estimate, without the finite-population factor); perplexity as in
    Jelinek et al. 1977 (J. Acoust. Soc. Am. 62, S63).

    >>> window = TokenScores(log_likelihood=np.log([0.25, 0.25]), kl=np.zeros(2), top1=np.ones(2, dtype=bool))
    >>> {name: round(score.value, 9) for name, score in language_fidelity([window], [window]).items()}
    {'perplexity': 4.0, 'perplexity_ratio': 1.0, 'kl': 0.0, 'top1_agreement': 1.0}
    """
    lengths = [[len(window.log_likelihood) for window in windows] for windows in (reference, candidate)]
    if lengths[0] != lengths[1]:
        raise ModelError(
            f"The candidate was scored on {len(candidate)} windows of {sum(lengths[1])} tokens and the original on {len(reference)} of "
            f"{sum(lengths[0])}; give both the same text, window by window."
        )
    if not sum(lengths[0]):
        raise TextError("The text has no token to score: 0 were found and at least 1 is needed; give a longer text.")
    loss = [-window.log_likelihood for window in candidate]
    lost = [before.log_likelihood - after.log_likelihood for before, after in zip(reference, candidate, strict=True)]
    scores = {
        "perplexity": _exponential(_window_mean(loss), "perplexity"),
        "perplexity_ratio": _exponential(_window_mean(lost), "perplexity ratio"),
    }
    kl = [window.kl for window in candidate if window.kl is not None]
    top1 = [window.top1.astype(np.float64) for window in candidate if window.top1 is not None]
    if len(kl) == len(top1) == len(candidate):
        scores |= {"kl": _window_mean(kl), "top1_agreement": _window_mean(top1)}
    return scores


def _log_softmax(logits: Floats) -> Doubles:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _window_mean(windows: Sequence[Doubles]) -> Score:
    sums = np.array([window.sum() for window in windows])
    counts = np.array([len(window) for window in windows], dtype=np.float64)
    total, used = counts.sum(), int((counts > 0).sum())
    mean = float(sums.sum() / total)
    if used < 2:
        return Score(value=mean, standard_error=None)
    spread = float(((sums - mean * counts) ** 2).sum())
    return Score(value=mean, standard_error=math.sqrt(used / (used - 1) * spread) / float(total))


def _exponential(score: Score, what: str) -> Score:
    try:
        value = math.exp(score.value)
    except OverflowError as error:
        raise ModelError(f"The candidate's {what} is exp({score.value:.4g}), beyond what a number holds; the model is broken.") from error
    return Score(value=value, standard_error=None if score.standard_error is None else value * score.standard_error)


# ---- both ----


def _mean(values: Doubles) -> Score:
    return Score(value=float(values.mean()), standard_error=float(values.std(ddof=1)) / math.sqrt(len(values)))


def _share(hits: NDArray[np.bool_]) -> Score:
    share = float(hits.mean())
    return Score(value=share, standard_error=math.sqrt(share * (1 - share) / len(hits)))


def _check_finite(values: Floats, whose: str) -> None:
    bad = sum(int(np.count_nonzero(~np.isfinite(values[rows]))) for rows in _chunks(*values.shape))
    if bad:
        raise ModelError(f"{bad:,} of the {whose}'s {values.size:,} output values are not finite (NaN or infinite); its quality cannot be judged.")


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold at most `_CHUNK_ELEMENTS`, at least one row each."""
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
