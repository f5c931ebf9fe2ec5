"""What is believed of a candidate before it is tried: predictions corrected by trials, ranges that hold the truth, quality by proxy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lighten.choose.beliefs import Z_90, Beliefs
from lighten.choose.constraints import parse_constraint
from lighten.choose.trial import Candidate, Rates, derived
from lighten.recipe import parse_recipe

RATES = Rates(tokens=128, power_w=50.0, usd_per_hour=0.36)
LIMIT = parse_constraint("neighbour_agreement>=0.97", decoder=False)


def candidate(
    recipe: str = "@ openvino", *, engine: str = "openvino/bfloat16", kind: str = "8", latency: float = 0.01, weights: str | None = None
) -> Candidate:
    said = parse_recipe(recipe)
    predicted = derived({"size_bytes": 1000, "peak_memory_bytes": 10**9, "latency_s": latency, "latency_low_s": None, "latency_high_s": None}, RATES)
    return Candidate(
        id=recipe, recipe=said, predicted=predicted, rates=RATES, engine=engine, kind=kind, weights=said.steps_text if weights is None else weights
    )  # fmt: skip


def score(value: float, error: float = 0.005) -> dict[str, dict[str, float]]:
    return {"neighbour_agreement": {"value": value, "standard_error": error}}


def test_before_any_trial_nothing_is_corrected():
    assert Beliefs().corrected(candidate()).predicted["latency_s"] == pytest.approx(0.01)


def test_one_trial_corrects_what_runs_on_its_engine_and_leaves_others():
    beliefs = Beliefs()
    beliefs.learn(candidate(), {"latency_s": 0.02, "peak_memory_bytes": 10**9})
    same, kin, other = candidate(), candidate(kind="4"), candidate(engine="torch/float32")
    corrected = [beliefs.corrected(one).predicted["latency_s"] for one in (same, kin, other)]
    assert 0.018 < corrected[0] < 0.02
    assert 0.015 < corrected[1] < corrected[0]
    assert corrected[2] == pytest.approx(0.01)


def test_what_follows_from_the_latency_is_corrected_with_it():
    beliefs = Beliefs()
    beliefs.learn(candidate(), {"latency_s": 0.02})
    found = beliefs.corrected(candidate()).predicted
    assert found["throughput"] == pytest.approx(128 / found["latency_s"])
    assert found["energy_j"] == pytest.approx(50 * found["latency_s"])
    assert found["usd_per_million_tokens"] == pytest.approx(0.36 / 3600 * found["latency_s"] / 128 * 1e6)
    for key in ("throughput", "energy_j"):
        low, high = beliefs.ends(candidate(), key, Z_90)
        assert low < found[key] < high


def test_every_trial_narrows_the_range():
    beliefs = Beliefs()
    widths = []
    for _ in range(4):
        low, high = beliefs.ends(candidate(), "latency_s", Z_90)
        widths.append(high / low)
        beliefs.learn(candidate(), {"latency_s": 0.01})
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1.4 < 2 < widths[0]


def test_ranges_hold_nine_in_ten_of_what_the_model_of_errors_makes():
    """Machines drawn from the priors: an engine's error, a kind's, and noise; each trial predicted before it is measured."""
    random, inside, count = np.random.default_rng(0), 0, 0
    for _ in range(200):
        beliefs, engine, kinds = Beliefs(), random.normal(0, 0.3), random.normal(0, 0.1, 3)
        for _ in range(8):
            kind = random.integers(3)
            one = candidate(kind=str(kind))
            low, high = beliefs.ends(one, "latency_s", Z_90)
            truth = 0.01 * math.exp(engine + kinds[kind] + random.normal(0, 0.06))
            inside, count = inside + (low <= truth <= high), count + 1
            beliefs.learn(one, {"latency_s": truth})
    assert 0.85 <= inside / count <= 0.95


def test_sizes_are_believed_as_they_are_predicted():
    beliefs = Beliefs()
    beliefs.learn(candidate(), {"size_bytes": 2000, "latency_s": 0.01})
    assert beliefs.corrected(candidate()).predicted["size_bytes"] == 1000


def test_a_proxy_rules_out_all_that_has_those_weights_and_nothing_else():
    beliefs = Beliefs()
    beliefs.learn_quality(candidate("quantize(rtn, bits=4) @ torch"), score(0.8))
    bad, good = candidate("quantize(rtn, bits=4) @ openvino"), candidate("quantize(rtn, bits=8) @ openvino")
    assert beliefs.misses(bad, LIMIT, None) == "neighbour_agreement 0.800 by proxy, required neighbour_agreement>=0.97"
    assert beliefs.misses(good, LIMIT, None) is None
    assert beliefs.knows_quality(bad)
    assert not beliefs.knows_quality(good)
    assert beliefs.knows_quality(candidate())  # no step changes nothing


@pytest.mark.parametrize(("value", "error", "ruled_out"), [(0.96, 0.02, False), (0.96, 0.001, False), (0.93, 0.02, False), (0.9, 0.005, True)])
def test_a_proxy_within_its_error_of_the_limit_rules_nothing_out(value, error, ruled_out):
    beliefs = Beliefs()
    beliefs.learn_quality(candidate("quantize(rtn) @ torch"), score(value, error))
    assert (beliefs.misses(candidate("quantize(rtn) @ torch"), LIMIT, None) is not None) == ruled_out


def test_what_is_coarser_than_what_was_too_bad_is_ruled_out_with_it():
    beliefs = Beliefs()
    beliefs.learn_quality(candidate("quantize(rtn, bits=4, group_size=32) @ torch"), score(0.8))
    coarser = ("quantize(rtn, bits=4, group_size=128)", "quantize(rtn, bits=3, group_size=32)", "quantize(rtn, bits=2)")
    others = (
        "quantize(rtn, bits=4, group_size=16)",
        "quantize(rtn, bits=8, group_size=128)",
        "quantize(hqq, bits=4, group_size=128)",
        "quantize(rtn)",
    )
    assert all(beliefs.misses(candidate(f"{steps} @ openvino"), LIMIT, None) for steps in coarser)
    assert not any(beliefs.misses(candidate(f"{steps} @ openvino"), LIMIT, None) for steps in others)


def test_a_bad_run_on_one_runtime_does_not_speak_against_the_weights():
    beliefs = Beliefs()
    beliefs.learn_quality(candidate("quantize(rtn) @ torch"), score(0.99))
    beliefs.learn_quality(candidate("quantize(rtn) @ torch"), score(0.5))
    assert beliefs.misses(candidate("quantize(rtn) @ torch"), LIMIT, None) is None


@pytest.mark.parametrize(
    ("text", "ratio", "ruled_out"), [("perplexity<=1.05x", 1.2, True), ("perplexity<=30", 1.4, True), ("perplexity<=30", 1.2, False)]
)
def test_a_limit_on_perplexity_is_held_against_the_ratio_since_a_proxy_reads_another_text(text, ratio, ruled_out):
    beliefs = Beliefs()
    scores = {"perplexity": {"value": 5.0, "standard_error": 0.1}, "perplexity_ratio": {"value": ratio, "standard_error": 0.01}}
    beliefs.learn_quality(candidate("quantize(rtn) @ torch"), scores)
    reason = beliefs.misses(candidate("quantize(rtn) @ torch"), parse_constraint(text, decoder=True), 23.0)
    assert (reason is not None) == ruled_out


def test_quality_stands_for_perplexity_of_a_decoder():
    beliefs, limit = Beliefs(), parse_constraint("quality>=0.95", decoder=True)
    beliefs.learn_quality(candidate("quantize(rtn) @ torch"), {"perplexity_ratio": {"value": 1.5, "standard_error": 0.01}})
    assert beliefs.misses(candidate("quantize(rtn) @ torch"), limit, 1.0) == "quality 0.667 by proxy, required quality>=0.95"
