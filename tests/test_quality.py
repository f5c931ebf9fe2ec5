"""Figures of quality: held to slow oracles, to closed forms, and to what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import spearmanr

from lighten.errors import ModelError, TextError
from lighten.judge import TokenScores, embedding_fidelity, kl_divergence, language_fidelity, quality, score_window, token_scores

seeds = st.integers(0, 2**32 - 1)
logits = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(2, 9)), elements=st.floats(-30, 30))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def values(scores):
    return {name: score.value for name, score in scores.items()}


# ---- embeddings ----


def slow_embedding_fidelity(reference, candidate):
    """The definitions, one text and one pair at a time."""

    def cosine(a, b):
        return a @ b / math.sqrt((a @ a) * (b @ b))

    count = len(reference)
    cosines, correlations, kept = [], [], 0
    for i in range(count):
        others = [j for j in range(count) if j != i]
        before = [cosine(reference[i], reference[j]) for j in others]
        after = [cosine(candidate[i], candidate[j]) for j in others]
        cosines.append(cosine(reference[i], candidate[i]))
        correlations.append(spearmanr(before, after).statistic)
        kept += before.index(max(before)) == after.index(max(after))
    return np.array(cosines), np.array(correlations), kept / count


@given(seeds, st.integers(3, 12), st.floats(0.01, 3))
def test_embeddings_agree_with_the_slow_definitions(seed, count, noise):
    reference = normal(seed, count, 5)
    candidate = reference + noise * normal(seed + 1, count, 5)
    cosines, correlations, kept = slow_embedding_fidelity(reference, candidate)
    found = embedding_fidelity(reference, candidate)
    assert found["cosine"].value == pytest.approx(cosines.mean())
    assert found["cosine"].standard_error == pytest.approx(cosines.std(ddof=1) / math.sqrt(count))
    assert found["rank_agreement"].value == pytest.approx(correlations.mean())
    assert found["rank_agreement"].standard_error == pytest.approx(correlations.std(ddof=1) / math.sqrt(count))
    assert found["neighbour_agreement"].value == pytest.approx(kept)
    assert found["neighbour_agreement"].standard_error == pytest.approx(math.sqrt(kept * (1 - kept) / count))


@given(seeds, st.integers(3, 20), st.integers(2, 8))
def test_the_same_embeddings_agree_in_full(seed, count, width):
    reference = normal(seed, count, width).astype(np.float32)
    assert values(embedding_fidelity(reference, reference)) == pytest.approx({"cosine": 1, "rank_agreement": 1, "neighbour_agreement": 1})


@given(seeds, st.integers(3, 20), st.integers(2, 8), st.booleans())
def test_a_rotation_keeps_ranks_and_neighbours(seed, count, width, repeated):
    """Also where texts are repeated, whose equal cosines rounding may part."""
    reference = normal(seed, count, width)
    if repeated:
        reference = np.concatenate([reference, reference])
    rotation, _ = np.linalg.qr(normal(seed + 1, width, width))
    found = values(embedding_fidelity(reference, reference @ rotation))
    assert found["rank_agreement"] == pytest.approx(1)
    assert found["neighbour_agreement"] == 1


@given(seeds, st.integers(3, 12), st.floats(-290, 290))
def test_the_scale_of_each_row_changes_nothing(seed, count, power):
    reference, candidate = normal(seed, count, 4), normal(seed + 1, count, 4)
    scale = np.exp(normal(seed + 2, count, 1)) * 10.0**power
    assert values(embedding_fidelity(reference, candidate)) == pytest.approx(values(embedding_fidelity(reference, candidate * scale)))


@given(seeds, st.integers(3, 12))
def test_the_order_of_the_texts_changes_nothing(seed, count):
    reference, candidate = normal(seed, count, 4), normal(seed + 1, count, 4)
    order = np.random.default_rng(seed).permutation(count)
    assert values(embedding_fidelity(reference, candidate)) == pytest.approx(values(embedding_fidelity(reference[order], candidate[order])))


@given(seeds, st.integers(3, 12))
def test_all_figures_are_within_their_bounds(seed, count):
    found = values(embedding_fidelity(normal(seed, count, 3), normal(seed + 1, count, 3)))
    assert -1 <= found["cosine"] <= 1
    assert -1 <= found["rank_agreement"] <= 1
    assert 0 <= found["neighbour_agreement"] <= 1


def test_opposite_embeddings_have_cosine_minus_one_and_keep_their_neighbours():
    reference = normal(0, 9, 4)
    assert values(embedding_fidelity(reference, -reference)) == pytest.approx({"cosine": -1, "rank_agreement": 1, "neighbour_agreement": 1})


def test_embeddings_of_another_width_have_no_cosine():
    reference = normal(0, 9, 4)
    wider = np.concatenate([reference, np.zeros((9, 3))], axis=1)
    assert values(embedding_fidelity(reference, wider)) == pytest.approx({"rank_agreement": 1, "neighbour_agreement": 1})


ANGLES = np.radians([0.0, 10.0, -10.0, 25.0])  # the first text has two nearest, exactly as far


@pytest.mark.parametrize(("moved", "kept"), [([0, 9, -10, 25], 1.0), ([0, 10, -9, 25], 1.0), ([0, 10, -10, 9], 0.5)])
def test_either_of_two_equal_nearest_will_do(moved, kept):
    """In the last row texts 0 and 1 get the fourth as their nearest; 1 had 0 before, and the fourth keeps 1."""
    reference = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    candidate = np.stack([np.cos(np.radians(moved)), np.sin(np.radians(moved))], axis=1)
    assert embedding_fidelity(reference, candidate)["neighbour_agreement"].value == kept


def test_what_only_rounding_parts_is_equally_near():
    angles = np.array([0, 0.5, -0.5 - 1e-14, 0.9])
    nearer_third = np.array([0, 0.5, -0.4, 0.9])
    reference, candidate = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in (angles, nearer_third))
    assert embedding_fidelity(reference, candidate)["neighbour_agreement"].value == 1


def test_a_collapsed_candidate_scores_nothing_by_its_ties():
    """All embeddings alike: ranks say 0, and only texts whose nearest was the first text (or the second, for the first) seem kept."""
    found = embedding_fidelity(normal(0, 40, 8), np.ones((40, 8)))
    assert found["rank_agreement"].value == 0
    assert found["neighbour_agreement"].value <= 0.2


def test_equal_cosines_share_their_mean_rank():
    """As in scipy.stats.rankdata, from 0."""
    assert quality._ranks(np.array([0.5, 0.1, 0.5, 0.5 + 1e-15, 0.9])).tolist() == [2, 0, 2, 2, 4]


def test_chunks_change_nothing(monkeypatch):
    reference, candidate = normal(0, 23, 4), normal(1, 23, 4)
    targets = np.random.default_rng(2).integers(0, 4, 23)
    whole = embedding_fidelity(reference, candidate), kl_divergence(reference, candidate), token_scores(candidate, targets)
    monkeypatch.setattr(quality, "_CHUNK_ELEMENTS", 50)
    assert values(embedding_fidelity(reference, candidate)) == pytest.approx(values(whole[0]))
    assert kl_divergence(reference, candidate) == pytest.approx(whole[1])
    assert token_scores(candidate, targets) == pytest.approx(whole[2])


# ---- language models ----


@given(logits, seeds)
def test_token_scores_are_the_log_softmax_of_the_targets(rows, seed):
    targets = np.random.default_rng(seed).integers(0, rows.shape[1], len(rows))
    expected = [log_softmax(row)[target] for row, target in zip(rows, targets, strict=True)]
    assert token_scores(rows, targets) == pytest.approx(np.array(expected), abs=1e-12)


@given(st.integers(2, 3000), st.floats(-100, 100))
def test_the_perplexity_of_a_uniform_model_is_its_vocabulary(vocabulary, level):
    windows = [score_window(np.full((length, vocabulary), level), np.zeros(length, dtype=int)) for length in (3, 1)]
    found = language_fidelity(windows, windows)
    assert found["perplexity"].value == pytest.approx(vocabulary)
    assert found["perplexity"].standard_error == pytest.approx(0, abs=1e-9 * vocabulary)


def test_large_logits_neither_overflow_nor_vanish():
    rows = np.array([[1e5, 0.0, -1e5], [3e4, 3e4, -3e38]], dtype=np.float32)
    assert token_scores(rows, np.array([2, 1])) == pytest.approx([-2e5, -math.log(2)])
    assert kl_divergence(rows, rows).tolist() == [0, 0]


def test_half_precision_logits_are_scored_in_float64():
    rows = normal(0, 4, 5).astype(np.float16)
    assert token_scores(rows, np.arange(4)) == pytest.approx(token_scores(rows.astype(np.float64), np.arange(4)), abs=1e-15)


@given(logits, seeds)
def test_kl_is_the_sum_over_the_vocabulary(reference, seed):
    candidate = reference + normal(seed, *reference.shape)
    expected = [rel_entr(softmax(p), softmax(q)).sum() for p, q in zip(reference, candidate, strict=True)]
    assert kl_divergence(reference, candidate) == pytest.approx(np.array(expected), rel=1e-6, abs=1e-12)


def test_kl_is_of_the_candidate_from_the_original_and_not_the_other_way():
    """By hand: 0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5) = 0.368064; the other way it is 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1) = 0.510826."""
    original, candidate = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    assert kl_divergence(original, candidate) == pytest.approx([0.368064], abs=1e-6)
    assert kl_divergence(candidate, original) == pytest.approx([0.510826], abs=1e-6)
    assert score_window(candidate, np.array([0]), original).kl == pytest.approx([0.368064], abs=1e-6)


@given(logits, st.floats(-50, 50))
def test_kl_is_zero_for_the_same_distribution_and_never_negative(rows, shift):
    assert kl_divergence(rows, rows + shift) == pytest.approx(np.zeros(len(rows)), abs=1e-12)
    assert (kl_divergence(rows, rows[::-1]) >= 0).all()


@given(logits, seeds)
def test_the_same_model_has_ratio_one(rows, seed):
    targets = np.random.default_rng(seed).integers(0, rows.shape[1], len(rows))
    window = score_window(rows, targets, rows)
    found = language_fidelity([score_window(rows, targets)] * 2, [window] * 2)
    assert values(found) == pytest.approx(
        {"perplexity": math.exp(-window.log_likelihood.mean()), "perplexity_ratio": 1, "kl": 0, "top1_agreement": 1}
    )
    assert found["perplexity_ratio"].standard_error == pytest.approx(0, abs=1e-12)


def test_any_of_two_equal_first_tokens_agrees():
    reference = np.array([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0]])
    candidate = np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    assert score_window(candidate, np.zeros(3, dtype=int), reference).top1.tolist() == [True, True, False]


def windows_of(seed, lengths):
    random = np.random.default_rng(seed)
    return [TokenScores(log_likelihood=-random.exponential(2, n), kl=random.exponential(1, n), top1=random.random(n) < 0.7) for n in lengths]


@given(seeds, st.lists(st.integers(1, 9), min_size=2, max_size=8))
def test_means_are_over_all_tokens_whatever_their_windows(seed, lengths):
    reference, candidate = windows_of(seed, lengths), windows_of(seed + 1, lengths)
    before, after = (np.concatenate([window.log_likelihood for window in windows]) for windows in (reference, candidate))
    found = values(language_fidelity(reference, candidate))
    assert found == pytest.approx(
        {
            "perplexity": math.exp(-after.mean()),
            "perplexity_ratio": math.exp(-after.mean()) / math.exp(-before.mean()),
            "kl": np.concatenate([window.kl for window in candidate]).mean(),
            "top1_agreement": np.concatenate([window.top1 for window in candidate]).mean(),
        }
    )


@given(seeds, st.integers(2, 30))
def test_windows_of_one_token_give_the_textbook_errors(seed, count):
    reference, candidate = windows_of(seed, [1] * count), windows_of(seed + 1, [1] * count)
    before, after = (np.concatenate([window.log_likelihood for window in windows]) for windows in (reference, candidate))
    found = language_fidelity(reference, candidate)

    def of_mean(sample):
        return np.std(sample, ddof=1) / math.sqrt(count)

    assert found["perplexity"].standard_error == pytest.approx(found["perplexity"].value * of_mean(after))
    assert found["perplexity_ratio"].standard_error == pytest.approx(found["perplexity_ratio"].value * of_mean(before - after))
    assert found["kl"].standard_error == pytest.approx(of_mean([window.kl[0] for window in candidate]))
    share = found["top1_agreement"].value
    assert found["top1_agreement"].standard_error == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


@pytest.mark.parametrize("repeats", [1, 7])
def test_tokens_that_repeat_within_a_window_add_no_certainty(repeats):
    windows = [TokenScores(log_likelihood=np.full(repeats, value)) for value in (-1.0, -2.0, -4.0)]
    error = language_fidelity(windows, windows)["perplexity"].standard_error
    assert error == pytest.approx(math.exp(7 / 3) * np.std([1, 2, 4], ddof=1) / math.sqrt(3))


@pytest.mark.parametrize("seed", range(5))
def test_the_ratio_lies_within_its_errors_as_often_as_it_should(seed):
    """A known truth: the difference of log-likelihood has mean 0.1 a token and a deviation that windows share."""
    random = np.random.default_rng(seed)
    inside = 0
    for _ in range(200):
        before = random.normal(-3, 1, (40, 10))
        after = before - 0.1 + random.normal(0, 0.2, (40, 1)) + random.normal(0, 0.2, (40, 10))
        found = language_fidelity(*([TokenScores(log_likelihood=row) for row in rows] for rows in (before, after)))["perplexity_ratio"]
        inside += abs(found.value - math.exp(0.1)) <= 2 * found.standard_error
    assert 0.88 <= inside / 200 <= 0.995  # 0.948 expected of Student's t with 39 degrees; 3.8 deviations of a share of 200 below it


def test_one_window_has_no_error():
    window = windows_of(0, [5])
    assert language_fidelity(window, window)["perplexity"].standard_error is None


def test_windows_that_were_not_compared_have_no_divergence():
    window = windows_of(0, [5, 5])
    bare = [TokenScores(log_likelihood=one.log_likelihood) for one in window]
    assert set(language_fidelity(bare, [window[0], bare[1]])) == {"perplexity", "perplexity_ratio"}


# ---- what is refused ----


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_counted_and_refused(broken):
    good, bad = normal(0, 6, 4), normal(0, 6, 4)
    bad[1, 2] = bad[5, 0] = broken
    message = r"2 of the {}'s 24 output values are not finite \(NaN or infinite\); its quality cannot be judged"
    with pytest.raises(ModelError, match=message.format("candidate")):
        embedding_fidelity(good, bad)
    with pytest.raises(ModelError, match=message.format("original")):
        embedding_fidelity(bad, good)
    with pytest.raises(ModelError, match=message.format("candidate")):
        kl_divergence(good, bad)
    with pytest.raises(ModelError, match=message.format("original")):
        kl_divergence(bad, good)
    with pytest.raises(ModelError, match=message.format("candidate")):
        token_scores(bad, np.zeros(6, dtype=int))


def test_embeddings_of_length_zero_are_refused():
    broken = normal(0, 6, 4)
    broken[2:4] = 0
    with pytest.raises(ModelError, match=r"2 of the candidate's 6 embeddings are all zeros and have no direction; the model is broken"):
        embedding_fidelity(normal(0, 6, 4), broken)


def test_another_number_of_embeddings_is_refused():
    with pytest.raises(ModelError, match="gave 5 embeddings where the original gave 6; give both the same texts"):
        embedding_fidelity(normal(0, 6, 4), normal(0, 5, 4))


def test_two_texts_are_too_few():
    with pytest.raises(TextError, match="needs at least 3 texts; there are 2: give a longer text"):
        embedding_fidelity(normal(0, 2, 4), normal(0, 2, 4))


def test_another_vocabulary_is_refused():
    with pytest.raises(ModelError, match=r"logits are \[3, 5\] \(positions, vocabulary\) and the original's \[3, 4\]; only models with one vocab"):
        kl_divergence(normal(0, 3, 4), normal(0, 3, 5))


@pytest.mark.parametrize(("targets", "reach"), [([0, 4], "from 0 to 4"), ([-1, 2], "from -1 to 2")])
def test_tokens_beyond_the_logits_are_refused(targets, reach):
    with pytest.raises(ModelError, match=f"tokens reach {reach} and the model gives 4 logits a position; use the tokenizer that belongs"):
        token_scores(normal(0, 2, 4), np.array(targets))


def test_another_number_of_positions_is_refused():
    with pytest.raises(ModelError, match="logits for 2 positions where 3 were asked for"):
        token_scores(normal(0, 2, 4), np.zeros(3, dtype=int))


def test_windows_that_do_not_match_are_refused():
    with pytest.raises(ModelError, match="scored on 2 windows of 5 tokens and the original on 1 of 5; give both the same text, window by window"):
        language_fidelity(windows_of(0, [5]), windows_of(0, [2, 3]))


def test_a_text_without_tokens_is_refused():
    with pytest.raises(TextError, match="no token to score: 0 were found and at least 1 is needed"):
        language_fidelity([], [])


def test_a_perplexity_beyond_numbers_is_refused():
    window = [TokenScores(log_likelihood=np.array([-1e4]))]
    with pytest.raises(ModelError, match=r"perplexity is exp\(1e\+04\), beyond what a number holds; the model is broken"):
        language_fidelity(window, window)
