"""SmoothQuant's scales.

Seeded faults, each caught: the exponents are exchanged; the maximum of one consumer alone is taken; static activations are simulated with
a scale for each row; the activations are multiplied by the scales instead of divided.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from equivalence_setup import COLUMNS, consumer, inputs, rounder
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.compress.fake_quant import round_dynamic
from lighten.compress.mappings import Channels
from lighten.compress.smoothquant import simulated_error, smooth_scales
from lighten.model.spec import PER_CHANNEL

ROUNDED = {"dynamic": partial(round_dynamic, element="int", zero_points=False), "static": None}


def linears(count: int = 1, **options):
    x = inputs(**options)
    return x, [replace(consumer(x, seed=each + 1), round_to=rounder(8, PER_CHANNEL)) for each in range(count)]


def test_scales_are_equation_4():
    x = torch.tensor([[16.0, -0.5], [-2.0, 1.0]])
    first = replace(consumer(x), weight=torch.tensor([[0.5, -4.0], [-1.0, 2.0]]))
    second = replace(consumer(x), weight=torch.tensor([[1.0, 1.0]]))
    assert smooth_scales([first, second], 2, alpha=0.5).tolist() == pytest.approx([4.0, 0.5])  # √(16/1), √(1/4)
    assert smooth_scales([second, first], 2, alpha=0.5).tolist() == pytest.approx([4.0, 0.5])
    assert smooth_scales([second], 2, alpha=0.5).tolist() == pytest.approx([4.0, 1.0])
    assert smooth_scales([first], 2, alpha=0.75).tolist() == pytest.approx([8.0, 4**-0.25])


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_the_ends_of_alpha_make_one_side_even(seed):
    x, (linear,) = linears(seed=seed)
    torch.testing.assert_close((x / smooth_scales([linear], COLUMNS, alpha=1.0)).abs().amax(0), torch.ones(COLUMNS))
    torch.testing.assert_close((linear.weight * smooth_scales([linear], COLUMNS, alpha=0.0)).abs().amax(0), torch.ones(COLUMNS))


def test_query_heads_of_one_value_share_its_scale():
    x, (linear,) = linears()
    end = Channels(name="o", axis=-1, channel=torch.arange(COLUMNS) % (COLUMNS // 2))
    scales = smooth_scales([replace(linear, end=end)], COLUMNS // 2, alpha=1.0)
    torch.testing.assert_close(scales, torch.maximum(*x.abs().amax(0).chunk(2)))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothing_outliers_lowers_the_simulated_error(activations):
    x, both = linears(2)
    scales = smooth_scales(both, COLUMNS, alpha=0.5)

    def error(tried: torch.Tensor) -> float:
        return sum(simulated_error(linear, tried, x, round_inputs=ROUNDED[activations]) for linear in both)

    assert error(scales) < 0.5 * error(torch.ones(COLUMNS))
    auto = smooth_scales(both, COLUMNS, alpha="auto", round_inputs=ROUNDED[activations], rows=x)
    assert error(auto) <= min(error(scales), error(torch.ones(COLUMNS)))


def test_auto_without_rows_is_near_auto_with_them():
    x, both = linears(2)
    drawn = smooth_scales(both, COLUMNS, alpha="auto", round_inputs=ROUNDED["dynamic"])
    seen = smooth_scales(both, COLUMNS, alpha="auto", round_inputs=ROUNDED["dynamic"], rows=x)
    assert torch.equal(drawn, smooth_scales(both, COLUMNS, alpha="auto", round_inputs=ROUNDED["dynamic"]))

    def error(tried: torch.Tensor) -> float:
        return sum(simulated_error(linear, tried, x, round_inputs=ROUNDED["dynamic"]) for linear in both)

    assert error(drawn) < 1.2 * error(seen)
    assert error(drawn) < 0.5 * error(torch.ones(COLUMNS))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_simulation_is_whole_numbers_times_scales(activations):
    """Against int8 arithmetic done by hand, row by row."""
    x, (linear,) = linears()
    x = x[:5]
    scales = torch.linspace(0.5, 4, COLUMNS)
    weight = linear.round_to(linear.weight * scales)
    total = 0.0
    for row in x:
        smoothed = row / scales
        step = smoothed.abs().max() / 127.5 if activations == "dynamic" else (linear.statistics.abs_max / scales).max() / 127
        codes = torch.tensor([max(-128, min(127, round(float(value / step)))) for value in smoothed])
        total += float((weight @ (codes * step) - linear.weight @ row).square().sum())
    assert simulated_error(linear, scales, x, round_inputs=ROUNDED[activations]) == pytest.approx(total, rel=1e-3)


def test_auto_bears_an_input_of_few_rows_and_columns_that_are_always_zero():
    x = inputs(rows=2, size=1e4)
    x[:, 7] = 0
    linear = replace(consumer(x), round_to=rounder(8, PER_CHANNEL))
    scales = smooth_scales([linear], COLUMNS, alpha="auto")
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert torch.isfinite(smooth_scales([consumer(torch.zeros(0, COLUMNS))], COLUMNS, alpha="auto")).all()
