"""From trials to an answer: the Pareto front, the choice, what came closest, what is said of a choice that is worse, and the ratios."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lighten.choose import outcome
from lighten.choose.constraints import FIGURES, Objective, figure_of, parse_constraint
from lighten.choose.outcome import (
    RATIOS,
    accuracy,
    choose_best,
    closest,
    judge_trials,
    looser,
    meets,
    misses,
    on_front,
    quality_metric,
    ratios,
    say,
    warnings,
)

METRIC = "neighbour_agreement"
SIZE, LATENCY = Objective(figure="size", lower=True), Objective(figure="latency", lower=True)
GOALS = (SIZE, LATENCY, Objective(figure="memory", lower=True), Objective(figure="throughput", lower=False))


def trial(name: str, *, size: float | None = 100, memory: float | None = 200, latency: float | None = 1.0, quality: float | None = 1.0, **more: Any):
    """A measured trial; `speedup` is that over an original of one second unless it is given."""
    scores = {} if quality is None else {METRIC: {"value": quality, "standard_error": None}}
    speedup = more.pop("speedup", 1 / latency if latency else None)
    measured = {
        "size_bytes": size,
        "peak_memory_bytes": memory,
        "latency_s": latency,
        "speedup": speedup,
        "throughput": latency and 10 / latency,
        "quality": scores,
    }
    return {"id": name, "status": "measured", "predicted": {}, "measured": measured, "ratio": None, "meets": None, "pareto": False} | more


def failed(name: str) -> dict[str, Any]:
    return {"id": name, "status": "failed", "failure": "it died", "predicted": {}, "measured": None, "ratio": None, "meets": None, "pareto": False}


def required(*texts: str):
    return [parse_constraint(text, decoder=False) for text in texts]


BASELINE = trial("baseline")

few = st.integers(1, 4).map(float)  # few values, so that trials are often equal in one figure or in both
goals = st.sampled_from(GOALS)
shares = st.sampled_from([0.25, 0.5, 0.75, 1.0])
makes = st.builds(trial, st.just(""), size=few, memory=st.one_of(st.none(), few), latency=few, quality=st.one_of(st.none(), shares))
trials = st.lists(st.one_of(makes, st.just(failed(""))), max_size=8).map(lambda found: [one | {"id": str(n)} for n, one in enumerate(found)])
limits = st.lists(
    st.sampled_from(["size<=2B", "size<=0.5x", "memory<=2B", "latency<=2s", "latency<=1.5x", "quality>=0.5", "quality>=1", "speedup>=0.4x"]),
    max_size=3,
)


# ---- the front ----


def dominates(one: dict[str, Any], other: dict[str, Any], objective: Objective) -> bool:
    """The definition, figure by figure: nowhere worse, somewhere better."""
    cost = [figure_of(each["measured"], objective.figure) * (1 if objective.lower else -1) for each in (one, other)]
    quality = [figure_of(each["measured"], METRIC) for each in (one, other)]
    return cost[0] <= cost[1] and quality[0] >= quality[1] and (cost[0] < cost[1] or quality[0] > quality[1])


def is_comparable(one: dict[str, Any], objective: Objective) -> bool:
    """Whether both of its figures are known."""
    return bool(one["measured"]) and None not in (figure_of(one["measured"], METRIC), figure_of(one["measured"], objective.figure))


@given(trials, goals)
def test_on_the_front_is_who_is_dominated_by_none(found, objective):
    judged = judge_trials(found, BASELINE, [], objective, METRIC)
    comparable = [one for one in found if is_comparable(one, objective)]
    front = {one["id"] for one in comparable if not any(dominates(other, one, objective) for other in comparable)}
    assert {one["id"] for one in judged if one["pareto"]} == front


@given(trials, goals)
def test_the_front_has_the_best_of_both_figures(found, objective):
    judged = [one for one in judge_trials(found, BASELINE, [], objective, METRIC) if is_comparable(one, objective)]
    assume(judged)
    front = [one for one in judged if one["pareto"]]
    for figure, best in ((METRIC, max), (objective.figure, min if objective.lower else max)):
        values = [[figure_of(one["measured"], figure) for one in group] for group in (judged, front)]
        assert best(values[0]) == best(values[1])


def test_of_a_measure_that_should_be_low_the_front_has_the_lowest():
    def one(name, size, perplexity):
        return trial(name, size=size) | {"measured": {"size_bytes": size, "quality": {"perplexity_ratio": {"value": perplexity}}}}

    found = [one("a", 10, 1.5), one("b", 20, 1.2), one("c", 30, 1.3)]
    assert [on_front(each, found, SIZE, "perplexity_ratio") for each in found] == [True, True, False]


def test_two_that_are_equal_are_both_on_the_front():
    found = [trial("a"), trial("b")]
    assert [one["pareto"] for one in judge_trials(found, BASELINE, [], SIZE, METRIC)] == [True, True]


def test_without_a_quality_no_trial_is_on_the_front():
    unjudged, judged = trial("a", size=1, quality=None), trial("b", size=2)
    assert not on_front(unjudged, [unjudged, judged], SIZE, METRIC)
    assert on_front(judged, [unjudged, judged], SIZE, METRIC)


def test_the_figure_of_quality_by_kind_of_model():
    assert (quality_metric(decoder=False), quality_metric(decoder=True)) == ("neighbour_agreement", "perplexity_ratio")


# ---- judging and choosing ----


@given(trials, limits, goals)
def test_a_trial_meets_what_every_constraint_allows(found, texts, objective):
    constraints = required(*texts)
    for one in judge_trials(found, BASELINE, constraints, objective, METRIC):
        if not one["measured"]:
            assert one["meets"] is None
            assert one["pareto"] is False
            continue
        values = [(constraint, figure_of(one["measured"], constraint.figure)) for constraint in constraints]
        able = all(v is not None and c.allows(v, figure_of(BASELINE["measured"], c.figure)) for c, v in values)
        assert one["meets"] is able is meets(one, BASELINE, constraints) is (not misses(one, BASELINE, constraints))


@given(trials, limits, goals)
def test_judging_changes_nothing_else_and_keeps_the_order(found, texts, objective):
    before = [dict(one) for one in found]
    judged = judge_trials(found, BASELINE, required(*texts), objective, METRIC)
    assert found == before
    assert [one | {"meets": None, "pareto": False} for one in judged] == before


@given(trials, limits, goals)
def test_the_chosen_meets_everything_and_no_other_that_does_has_less(found, texts, objective):
    judged = judge_trials(found, BASELINE, required(*texts), objective, METRIC)
    able = [one for one in judged if one["meets"]]
    chosen = choose_best(judged, objective, METRIC)
    if not able:
        assert chosen is None
        return
    assert chosen in able
    assert objective.cost(chosen["measured"]) == min(objective.cost(one["measured"]) for one in able)


def test_of_equals_the_first_is_chosen_which_is_the_original():
    found = judge_trials([BASELINE, trial("other")], BASELINE, [], LATENCY, METRIC)
    assert choose_best(found, LATENCY, METRIC)["id"] == "baseline"


@pytest.mark.parametrize(("seconds", "chosen"), [(0.985, "better"), (0.96, "faster")])
def test_noise_makes_no_winner_quality_does(seconds, chosen):
    found = judge_trials([BASELINE, trial("faster", latency=seconds, quality=0.9), trial("better", quality=0.99)], BASELINE, [], LATENCY, METRIC)
    assert choose_best(found[1:], LATENCY, METRIC)["id"] == chosen


def test_sizes_are_exact_and_the_smallest_wins_by_a_byte():
    found = judge_trials([trial("small", size=99, quality=0.5), trial("large", size=100)], BASELINE, [], SIZE, METRIC)
    assert choose_best(found, SIZE, METRIC)["id"] == "small"


@pytest.mark.parametrize(("objective", "first", "second"), [(LATENCY, 1.0, 1.05), (GOALS[3], 1.0, 1.05)])
def test_what_ran_in_turn_counts_more_than_the_trials(objective, first, second):
    found = judge_trials([trial("a", latency=first), trial("b", latency=second)], BASELINE, [], objective, METRIC)
    assert choose_best(found, objective, METRIC)["id"] == "a"
    assert choose_best(found, objective, METRIC, {"b": 0.9})["id"] == "b"
    assert choose_best(found, objective, METRIC, {"b": 1.1})["id"] == "a"


def test_what_a_figure_is_not_known_of_does_not_meet_a_limit_on_it():
    found = judge_trials([trial("a", memory=None)], BASELINE, required("memory<=1TB"), SIZE, METRIC)
    assert choose_best(found, SIZE, METRIC) is None


def test_a_limit_relative_to_what_is_not_known_of_the_original_is_met_by_none():
    original = trial("baseline", memory=None)
    assert not meets(trial("a", memory=1), original, required("memory<=1x"))


# ---- the closest ----


def test_the_closest_is_the_one_whose_worst_miss_is_the_smallest():
    found = [
        trial("far in one", size=300, quality=0.99),  # misses by 2.0 of the limit
        trial("near in both", size=120, quality=0.8),  # by 0.2 and by 0.16
        trial("very near in one", size=90, quality=0.5),  # by 0.47
        failed("dead"),
    ]
    told = closest(found, BASELINE, required("size<=100B", "quality>=0.95"))
    assert told == {"id": "near in both", "misses": ["size 120 B, required size<=100B", "quality 0.800, required quality>=0.95"]}


def test_one_small_miss_does_not_make_up_for_a_large_one():
    found = [trial("small and large", size=110, quality=0.1), trial("two of middle size", size=140, quality=0.7)]
    assert closest(found, BASELINE, required("size<=100B", "quality>=1"))["id"] == "two of middle size"


@given(trials, limits)
def test_no_other_trial_misses_by_less_than_the_closest(found, texts):
    constraints = required(*texts)
    told = closest(found, BASELINE, constraints)
    measured = [one for one in found if one["measured"]]
    if not measured:
        assert told is None
        return

    def worst(one):
        away = [0.0]
        for constraint in constraints:
            value = figure_of(one["measured"], constraint.figure)
            short = None if value is None else constraint.shortfall(value, figure_of(BASELINE["measured"], constraint.figure))
            away.append(math.inf if short is None else short)
        return max(away)

    best = next(one for one in measured if one["id"] == told["id"])
    assert worst(best) == min(map(worst, measured))
    assert len(told["misses"]) == len(misses(best, BASELINE, constraints))


def test_a_figure_that_is_not_known_is_said_to_be_not_known():
    told = closest([trial("a", memory=None)], BASELINE, required("memory<=10B"))
    assert told == {"id": "a", "misses": ["memory not known, required memory<=10B"]}


def test_where_nothing_was_measured_nothing_is_closest():
    assert closest([failed("a")], BASELINE, required("size<=1B")) is None


@pytest.mark.parametrize(
    ("figure", "value", "text"),
    [("size", 90868376, "90.9 MB"), ("memory", 5, "5 B"), ("latency", 0.0123, "12.3 ms"), ("quality", 0.9714, "0.971"), ("size", None, "not known")],
)
def test_figures_are_said_for_people(figure, value, text):
    assert say(figure, value) == text


# ---- what looser quality would buy ----


@given(trials, limits, goals)
def test_looser_offers_are_the_front_below_the_chosen_cost_the_nearest_first(found, texts, objective):
    judged = judge_trials(found, BASELINE, required(*texts), objective, METRIC)
    chosen = choose_best(judged, objective, METRIC)
    offers = looser(judged, chosen, objective, METRIC)
    if chosen is None:
        assert offers == []
        return

    def cost(one):
        return objective.cost(one["measured"])

    quality = figure_of(chosen["measured"], METRIC)
    front = [one for one in judged if one["pareto"] and cost(one) < cost(chosen)]
    front = [one for one in front if quality is None or figure_of(one["measured"], METRIC) < quality]
    assert sorted(offer["id"] for offer in offers) == sorted(one["id"] for one in front)
    by_id = {one["id"]: cost(one) for one in front}
    costs = [by_id[offer["id"]] for offer in offers]
    assert costs == sorted(costs, reverse=True)


def test_an_offer_says_what_is_won_and_what_it_costs():
    found = judge_trials(
        [BASELINE, trial("small", size=20, quality=0.8), trial("tiny", size=10, quality=0.6), trial("bad", size=30, quality=0.5)],
        BASELINE, required("quality>=0.9"), SIZE, METRIC,
    )  # fmt: skip
    assert looser(found, choose_best(found, SIZE, METRIC), SIZE, METRIC) == [
        {"id": "small", "gain": "size 20 B, 5.00x better than the chosen", "cost": "neighbour_agreement 0.800 instead of 1.000"},
        {"id": "tiny", "gain": "size 10 B, 10.00x better than the chosen", "cost": "neighbour_agreement 0.600 instead of 1.000"},
    ]


# ---- never silently worse ----

WORDS = {"size": "bigger on disk", "memory": "larger in memory", "latency": "slower"}


@given(makes)
def test_whatever_is_worse_than_the_original_is_said_and_nothing_else(chosen):
    said = warnings(chosen, BASELINE)
    for figure, word in WORDS.items():
        own, original = figure_of(chosen["measured"], figure), figure_of(BASELINE["measured"], figure)
        worse = own is not None and own > original
        assert sum(word in line for line in said) == worse
    assert all(line.startswith("the chosen is ") and "than the original, " in line for line in said)


def test_how_much_worse_is_said():
    assert warnings(trial("a", size=150, memory=300, latency=4.0), BASELINE) == [
        "the chosen is bigger on disk than the original, 1.50 times",
        "the chosen is larger in memory than the original, 1.50 times",
        "the chosen is slower than the original, 4.00 times",
    ]


def test_slower_beside_the_original_counts_more_than_the_clock():
    """A trial that was timed while the machine was fast may have a shorter clock time than the original had, and still be the slower one."""
    assert warnings(trial("a", latency=0.9, speedup=0.8), BASELINE) == ["the chosen is slower than the original, 1.25 times"]
    assert warnings(trial("a", latency=1.1, speedup=1.25), BASELINE) == []


def test_nothing_is_said_of_the_original_itself_or_of_no_choice():
    assert warnings(BASELINE, BASELINE) == []
    assert warnings(None, BASELINE) == []


# ---- predicted over measured ----

figure = st.one_of(st.none(), st.floats(1e-6, 1e12))
predictions = st.fixed_dictionaries({}, optional=dict.fromkeys(RATIOS, figure))


@given(predictions, predictions)
def test_a_ratio_is_predicted_over_measured_and_not_known_where_one_is_not(predicted, measured):
    found = ratios(predicted, measured)
    assert list(found) == list(RATIOS)
    for key, ratio in found.items():
        own, true = predicted.get(key), measured.get(key)
        assert ratio == (None if own is None or true is None else own / true)


@given(st.lists(st.floats(0.01, 100), max_size=9), st.integers(0, 3))
def test_the_median_and_the_ratio_farthest_from_one(values, unknown):
    found = [trial("a", ratio={"size_bytes": value, "peak_memory_bytes": None, "latency_s": value}) for value in values]
    found += [trial("b", ratio=dict.fromkeys(RATIOS)) for _ in range(unknown)] + [failed("c")]
    told = accuracy(found, METRIC)
    assert told["peak_memory_bytes"] == {"count": 0, "median": None, "worst": None, "median_error": None, "ranged": 0, "within": 0}
    for key in ("size_bytes", "latency_s"):
        assert told[key]["count"] == len(values)
        if not values:
            assert told[key] == told["peak_memory_bytes"]
            continue
        assert told[key]["median"] == statistics.median(values)
        assert told[key]["median_error"] == statistics.median(abs(value - 1) for value in values)
        assert told[key]["worst"] in values
        assert abs(math.log(told[key]["worst"])) == pytest.approx(max(abs(math.log(value)) for value in values))


@pytest.mark.parametrize(("values", "worst"), [([0.4, 2.0], 0.4), ([0.6, 2.0], 2.0), ([1.0], 1.0)])
def test_half_is_as_far_off_as_double(values, worst):
    assert accuracy([trial("a", ratio=dict.fromkeys(RATIOS, value)) for value in values], METRIC)["size_bytes"]["worst"] == worst


def test_the_share_within_the_range_counts_those_that_have_one():
    def told(low: float | None, high: float | None, quality: float | None) -> dict[str, Any]:
        value = None if quality is None else {METRIC: {"value": quality, "low": quality - 0.01, "high": quality + 0.01}}
        return {"size_bytes": 100, "latency_low_s": low, "latency_high_s": high, "quality": value}

    found = [
        trial("in", predicted=told(0.9, 1.1, 0.99)), trial("out", predicted=told(1.1, 1.2, 0.97)), trial("none", predicted=told(None, None, None)),
    ]  # fmt: skip
    shares = accuracy([*found, failed("died")], METRIC)
    assert (shares["latency_s"]["ranged"], shares["latency_s"]["within"]) == (2, 1)
    assert (shares["size_bytes"]["ranged"], shares["size_bytes"]["within"]) == (0, 0)
    assert shares["quality"] == {
        "metric": METRIC, "count": 2, "median_error": pytest.approx(0.02), "worst_error": pytest.approx(0.03), "ranged": 2, "within": 1,
    }  # fmt: skip


def test_the_figures_with_ratios_are_those_that_are_predicted():
    follows = {"energy_j", "usd_per_million_tokens", "throughput"}  # from the latency
    assert set(RATIOS) == {figure.key for figure in FIGURES.values() if figure.predicted} - follows


def test_latencies_are_of_one_moment_though_the_machine_slows_down():
    """Three trials, the machine twice as slow in the second: two of them are twice as fast as the original, whatever the clock said."""

    def trial(own_s: float, original_s: float) -> dict[str, object]:
        measured = {"latency_s": own_s, "latency_q1_s": own_s * 0.9, "latency_q3_s": own_s * 1.1, "throughput": 8 / own_s}
        return {
            "predicted": {"latency_s": 2.0},
            "measured": measured | {"speedup": original_s / own_s, "original_latency_s": original_s},
            "ratio": {},
        }

    skipped = {"predicted": {}, "measured": None, "ratio": None}
    found = outcome.on_one_clock([trial(4.0, 4.0), trial(4.0, 8.0), trial(2.0, 4.0), skipped])
    assert [t["measured"]["latency_s"] for t in found[:3]] == [4.0, 2.0, 2.0]
    assert [t["measured"]["clock_latency_s"] for t in found[:3]] == [4.0, 4.0, 2.0]
    assert found[1]["measured"]["latency_q1_s"] == pytest.approx(1.8)
    assert found[1]["measured"]["throughput"] == pytest.approx(4.0)
    assert found[1]["ratio"]["latency_s"] == 1.0
    assert found[3] == skipped
