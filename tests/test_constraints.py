"""What the user may require: every figure with every unit, what holds and by how much, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lighten.choose.constraints import (
    DECODER_QUALITY,
    ENCODER_QUALITY,
    ENERGY_UNITS,
    FIGURES,
    LOWER_IS_BETTER,
    Constraint,
    check_known,
    figure_of,
    figures,
    parse_constraint,
    parse_objective,
)
from lighten.choose.request import parse_budget, parse_power
from lighten.errors import ConstraintError
from lighten.units import SIZE_UNITS, TIME_UNITS

KINDS = [(decoder, figure) for decoder in (False, True) for figure in figures(decoder=decoder)]
PLAIN = [(decoder, figure) for decoder, figure in KINDS if figure not in FIGURES or not set(FIGURES[figure].units) - {""}]
WITH_UNIT = [(name, unit) for name, figure in FIGURES.items() for unit in figure.units if unit]
UNITS = {**SIZE_UNITS, **TIME_UNITS, **ENERGY_UNITS}

positive = st.floats(1e-6, 1e9)
numbers = st.floats(-1e12, 1e12)


def sign(figure: str) -> str:
    return "<=" if figure in LOWER_IS_BETTER else ">="


def refusal(text: str, *, decoder: bool = False) -> str:
    with pytest.raises(ConstraintError) as caught:
        parse_constraint(text, decoder=decoder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is understood ----


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("figure", "unit"), WITH_UNIT)
@given(number=st.integers(1, 10**6))
def test_a_limit_with_a_unit_is_in_base_units(decoder, figure, unit, number):
    found = parse_constraint(f"{figure}<={number}{unit}", decoder=decoder)
    assert (found.figure, found.operator, found.relative) == (figure, "<=", False)
    assert found.limit == pytest.approx(number * UNITS[unit], rel=1e-12)


@pytest.mark.parametrize(("decoder", "figure"), PLAIN)
@given(number=positive)
def test_a_figure_without_a_unit_takes_a_plain_number(decoder, figure, number):
    found = parse_constraint(f"{figure}{sign(figure)}{number!r}", decoder=decoder)
    assert (found.figure, found.operator, found.limit, found.relative) == (figure, sign(figure), number, False)


@pytest.mark.parametrize(("decoder", "figure"), KINDS)
@given(number=positive)
def test_every_figure_takes_a_limit_relative_to_the_original(decoder, figure, number):
    found = parse_constraint(f"{figure}{sign(figure)}{number!r}x", decoder=decoder)
    assert (found.figure, found.operator, found.limit, found.relative) == (figure, sign(figure), number, True)


@pytest.mark.parametrize("text", ["size<=50MB", " size <= 50MB ", "size<=50 MB", "size <=50   MB"])
def test_blanks_mean_nothing_and_the_text_is_kept(text):
    found = parse_constraint(text, decoder=False)
    assert (found.figure, found.limit, found.text) == ("size", 50e6, text)


def test_the_limits_of_the_contract():
    assert parse_constraint("quality>=0.99", decoder=False).limit == 0.99
    assert parse_constraint("perplexity<=1.05x", decoder=True) == Constraint(
        figure="perplexity", operator="<=", limit=1.05, relative=True, text="perplexity<=1.05x"
    )
    assert parse_constraint("memory<=1.5GiB", decoder=True).limit == 1.5 * 2**30
    assert parse_constraint("latency<=12.5ms", decoder=False).limit == pytest.approx(0.0125)
    assert parse_constraint("speedup>=2x", decoder=False).relative


# ---- what is refused ----


@pytest.mark.parametrize("text", ["", "size", "size<50MB", "size=50MB", "size==50MB", "<=50MB", "size<=", "size<=50MB 60MB", "size<=5 0 MB"])
def test_another_form_is_refused_with_an_example(text):
    assert refusal(text) == f"constraint {text!r} is not of the form figure<=number or figure>=number, such as size<=50MB."


@pytest.mark.parametrize("figure", ["speed", "Size", "params", "perplexity", "kl", "task"])
def test_a_figure_that_an_encoder_has_not_is_refused_with_those_it_has(figure):
    assert refusal(f"{figure}<=1") == (
        f"constraint '{figure}<=1': an encoder has no figure '{figure}'; figures: size, memory, latency, time_to_first_token, energy, cost, "
        "throughput, speedup, quality, cosine, rank_agreement, neighbour_agreement."
    )


@pytest.mark.parametrize("figure", ["cosine", "neighbour_agreement", "accuracy"])
def test_a_figure_that_a_decoder_has_not_is_refused_with_those_it_has(figure):
    assert refusal(f"{figure}>=1", decoder=True) == (
        f"constraint '{figure}>=1': a decoder has no figure '{figure}'; figures: size, memory, latency, time_to_first_token, energy, cost, "
        "throughput, speedup, quality, perplexity, perplexity_ratio, kl, top1_agreement."
    )


@pytest.mark.parametrize(("decoder", "figure"), KINDS)
def test_a_limit_in_the_wrong_direction_is_refused_with_the_right_one(decoder, figure):
    number = {"size": "5MB", "memory": "5GiB", "latency": "5ms", "time_to_first_token": "5ms", "energy": "5J"}.get(figure, "5")
    right = sign(figure)
    wrong = ">=" if right == "<=" else "<="
    text = f"{figure}{wrong}{number}"
    assert refusal(text, decoder=decoder) == f"constraint {text!r} would ask for a worse {figure}; write {figure}{right}{number}."
    parse_constraint(f"{figure}{right}{number}", decoder=decoder)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("size<=50", "50"), ("size<=50ms", "50ms"), ("size<=50mb", "50mb"), ("size<=50 ms", "50ms"), ("memory<=2min", "2min"),
        ("memory<=-5MB", "-5MB"), ("latency<=5MB", "5MB"), ("latency<=5", "5"), ("latency<=5sec", "5sec"), ("size<=MB", "MB"),
        ("size<=nanMB", "nanMB"),
    ],
)  # fmt: skip
def test_a_wrong_unit_is_refused_with_the_units(text, number):
    figure = text.partition("<=")[0]
    units = TIME_UNITS if figure == "latency" else SIZE_UNITS
    assert refusal(text) == f"constraint {text!r}, {figure}: {number!r} is not a number with a unit; units of {figure}: {', '.join(units)}."


@pytest.mark.parametrize(
    ("text", "number"),
    [("quality>=high", "high"), ("quality>=99%", "99%"), ("throughput>=5ms", "5ms"), ("speedup>=2times", "2times"), ("cosine>=0,99", "0,99")],
)
def test_a_word_where_a_number_stands_is_refused(text, number):
    assert refusal(text) == f"constraint {text!r}: {number!r} is not a number."


@pytest.mark.parametrize(
    "text", ["quality>=nan", "quality>=inf", "quality>=-inf", "size<=nanx", "size<=infx", "speedup>=1e999", "size<=1e999MB", "latency<=1e999x"]
)
def test_a_limit_that_is_no_number_to_compare_with_is_refused(text):
    """Against NaN nothing holds, against an infinity all or nothing: neither is what the user means."""
    assert "is not a number" in refusal(text)


@pytest.mark.parametrize("text", ["size<=0x", "size<=-1x", "latency<=-0.5x", "throughput>=0x"])
def test_a_share_of_the_original_that_is_not_positive_is_refused(text):
    assert "is not positive" in refusal(text)


@given(st.text(max_size=30), st.booleans())
def test_any_text_is_understood_or_refused_in_one_line(text, decoder):
    try:
        found = parse_constraint(text, decoder=decoder)
    except ConstraintError as error:
        assert repr(text) in str(error)  # noqa: PT017 - both ways are right
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found.figure in figures(decoder=decoder)
        assert math.isfinite(found.limit)


@pytest.mark.parametrize(("decoder", "figure"), KINDS)
def test_every_figure_is_an_objective_in_its_better_direction_alone(decoder, figure):
    lower = figure in LOWER_IS_BETTER
    found = parse_objective(*((figure, None) if lower else (None, figure)), decoder=decoder)
    assert (found.figure, found.lower, found.verb) == (figure, lower, "minimize" if lower else "maximize")
    with pytest.raises(ConstraintError, match=f"{'maximize' if lower else 'minimize'} '{figure}' is not possible; one of "):
        parse_objective(*((None, figure) if lower else (figure, None)), decoder=decoder)


def test_without_a_word_the_latency_is_minimized():
    assert parse_objective(None, None, decoder=True).figure == "latency"


def test_two_objectives_are_refused():
    with pytest.raises(ConstraintError, match="minimize size and maximize throughput are two objectives"):
        parse_objective("size", "throughput", decoder=False)


@pytest.mark.parametrize("figure", ["speed", "size_bytes", "perplexity"])
def test_what_is_no_figure_of_an_encoder_is_no_objective(figure):
    with pytest.raises(ConstraintError, match=re.escape(f"minimize {figure!r} is not possible; one of size, memory, latency, ")):
        parse_objective(figure, None, decoder=False)


@given(st.floats(1e-6, 1e6), st.sampled_from(sorted(FIGURES)))
def test_a_better_figure_is_a_lower_cost(value, figure):
    found = parse_objective(*((figure, None) if FIGURES[figure].lower else (None, figure)), decoder=False)
    better = value / 2 if FIGURES[figure].lower else value * 2
    assert found.cost({FIGURES[figure].key: better}) < found.cost({FIGURES[figure].key: value}) < found.cost({}) == found.cost(None) == math.inf


@pytest.mark.parametrize(
    ("name", "phase", "given", "text"),
    [
        ("time_to_first_token", "encode", (), "time_to_first_token is a figure of phase generate, not of encode."),
        ("energy", "encode", ("price",), "energy is not known without --power; give it."),
        ("cost", "encode", ("power",), "cost is not known without --price; give it."),
    ],
)
def test_a_figure_that_nothing_could_tell_is_refused_at_once(name, phase, given, text):
    with pytest.raises(ConstraintError, match=re.escape(text)):
        check_known([name], phase=phase, given=given)


def test_a_figure_that_is_known_is_let_through():
    check_known(["energy", "cost", "time_to_first_token", "quality", "size"], phase="generate", given=("power", "price"))


@pytest.mark.parametrize(("text", "watts"), [("65W", 65), ("0.3kW", 300)])
def test_power(text, watts):
    assert parse_power(text) == watts


@pytest.mark.parametrize("text", ["65", "much", "0W", "-5W"])
def test_a_power_that_is_none_is_refused(text):
    with pytest.raises(ConstraintError, match=r"^power"):
        parse_power(text)


@pytest.mark.parametrize(("text", "seconds"), [("20min", 1200), ("1.5h", 5400), ("90s", 90), ("500ms", 0.5)])
def test_budget(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["20", "20MB", "soon", "", "-5min"])
def test_a_budget_that_is_no_duration_is_refused_with_the_units(text):
    with pytest.raises(ConstraintError, match=re.escape(f"budget: {text!r} is not a number with a unit; units of budget: us, ms, s, min, h.")):
        parse_budget(text)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConstraintError, match="budget '0min' is not positive"):
        parse_budget("0min")


# ---- what holds, and by how much ----


def made(figure: str, limit: float, *, relative: bool = False) -> Constraint:
    return Constraint(figure=figure, operator=sign(figure), limit=limit, relative=relative, text="")


@given(st.sampled_from(["size", "kl", "quality", "speedup"]), numbers, numbers)
def test_a_limit_allows_what_lies_on_it_or_on_its_better_side(figure, limit, value):
    allowed = value <= limit if figure in LOWER_IS_BETTER else value >= limit
    constraint = made(figure, limit)
    assert constraint.allows(value, None) is allowed
    assert constraint.allows(limit, None) is True
    assert (constraint.shortfall(value, None) <= 0) is allowed


@given(st.sampled_from(["size", "quality"]), st.floats(0.01, 100), positive, positive)
def test_a_relative_limit_is_times_the_originals(figure, factor, original, value):
    constraint = made(figure, factor, relative=True)
    assert constraint.allows(value, original) is made(figure, factor * original).allows(value, None)
    assert constraint.allows(value, None) is None
    assert constraint.shortfall(value, None) is None


@given(st.sampled_from(["size", "quality"]), positive, st.floats(0.01, 10), positive)
def test_a_shortfall_is_a_share_of_the_limit(figure, limit, miss, scale):
    assume(figure == "size" or miss < 1)
    value = limit * (1 + miss if figure == "size" else 1 - miss)
    assert made(figure, limit).shortfall(value, None) == pytest.approx(miss, rel=1e-6)
    assert made(figure, limit * scale).shortfall(value * scale, None) == pytest.approx(miss, rel=1e-6)


def test_from_a_limit_of_zero_a_shortfall_is_counted_as_it_is():
    assert made("kl", 0.0).shortfall(0.25, None) == 0.25
    assert made("kl", 0.0).allows(0.0, None) is True


@pytest.mark.parametrize("figure", ["size", "quality"])
def test_a_value_that_is_no_number_meets_nothing(figure):
    assert made(figure, 1.0).allows(math.nan, None) is False


# ---- figures of a measurement ----


def score(value: float) -> dict[str, float | None]:
    return {"value": value, "standard_error": None}


ENCODER = {
    "size_bytes": 10, "peak_memory_bytes": 20, "latency_s": 0.5, "throughput": 40.0, "speedup": 1.5,
    "quality": {"cosine": score(0.99), "rank_agreement": score(0.98), "neighbour_agreement": score(0.97)},
}  # fmt: skip
DECODER = ENCODER | {
    "quality": {"perplexity": score(12.5), "perplexity_ratio": score(1.25), "kl": score(0.2), "top1_agreement": score(0.9)}
}  # fmt: skip


@pytest.mark.parametrize(("measured", "names"), [(ENCODER, ENCODER_QUALITY), (DECODER, DECODER_QUALITY)])
def test_every_figure_is_found_in_a_measurement(measured, names):
    assert {name: figure_of(measured, name) for name in FIGURES} == {
        "size": 10, "memory": 20, "latency": 0.5, "time_to_first_token": None, "energy": None, "cost": None, "throughput": 40, "speedup": 1.5,
    }  # fmt: skip
    assert {name: figure_of(measured, name) for name in names} == {name: found["value"] for name, found in measured["quality"].items()}


def test_quality_of_an_encoder_is_its_neighbour_agreement():
    assert figure_of(ENCODER, "quality") == 0.97


def test_quality_of_a_decoder_is_the_originals_perplexity_over_its_own():
    assert figure_of(DECODER, "quality") == pytest.approx(1 / 1.25)
    assert parse_constraint("quality>=0.8", decoder=True).allows(figure_of(DECODER, "quality"), 1.0)
    assert not parse_constraint("quality>=0.81", decoder=True).allows(figure_of(DECODER, "quality"), 1.0)


@pytest.mark.parametrize(("decoder", "figure"), KINDS)
@pytest.mark.parametrize("measured", [{}, {"quality": None}, {"quality": {}}, dict.fromkeys(("size_bytes", "peak_memory_bytes", "latency_s"))])
def test_a_figure_that_is_not_there_is_not_known(decoder, figure, measured):
    assert figure_of(measured, figure) is None
