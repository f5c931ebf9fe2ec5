"""AWQ's scales and clipping.

Seeded faults, each caught: the error is judged on the calibration rows though others were held out; scales are not divided
out of the rounded weight; clipping judges a group by another group's moments.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equivalence_setup import COLUMNS, consumer, inputs, rounder
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.compress.awq import clip, scaled_error, search_scales
from lighten.compress.mappings import Channels, Mapping, fold
from lighten.model.spec import PER_CHANNEL, PER_TENSOR


def output_error(x: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """The mean over rows of the squared error of a linear's output, the slow way."""
    return float(((x @ rounded.T - x @ exact.T) ** 2).sum(-1).mean())


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4, 8]), size=st.sampled_from([1.0, 10.0, 100.0]))
def test_scales_are_never_worse_than_none_on_the_judging_rows(seed, bits, size):
    linears = [consumer(inputs(seed=seed, size=size), bits=bits, seed=seed + each) for each in range(2)]
    scales = search_scales(linears, COLUMNS)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    plain = sum(scaled_error(linear, torch.ones(COLUMNS)) for linear in linears)
    assert sum(scaled_error(linear, scales) for linear in linears) <= plain


def test_outliers_get_larger_scales_and_the_error_falls():
    x = inputs()
    linear = consumer(x)
    scales = search_scales([linear], COLUMNS)
    assert scales[[3, 17]].min() > 2 * scales.median()
    assert scaled_error(linear, scales) < 0.5 * scaled_error(linear, torch.ones(COLUMNS))


def test_the_error_is_that_of_the_output_over_all_rows():
    x = inputs()
    linear = consumer(x)
    scales = torch.linspace(0.5, 2, COLUMNS)
    rounded = linear.round_to(linear.weight * scales) / scales
    assert scaled_error(linear, scales) == pytest.approx(output_error(x, linear.weight, rounded), rel=1e-4)


def test_the_search_finds_the_best_exponent_of_its_grid():
    """Against every candidate of eq. 4 by hand, on rows and not on moments."""
    x = inputs()
    linear = consumer(x)

    def error(scales: torch.Tensor) -> float:
        return output_error(x, linear.weight, linear.round_to(linear.weight * scales) / scales)

    tried = [x.abs().mean(0) ** (step / 20) for step in range(20)]
    best = min(error(scales / (scales.max() * scales.min()).sqrt()) for scales in tried)
    found = search_scales([linear], COLUMNS, duo=False)
    assert error(found) == pytest.approx(best, rel=1e-3)
    assert (found.max() * found.min()).item() == pytest.approx(1, rel=1e-4)


def test_rows_that_were_held_out_judge():
    """Calibration rows have outliers in other columns than the rows that judge."""
    seen, judged = inputs(outliers=(0,), size=50), inputs(outliers=(9,), size=50, seed=5)
    linear = consumer(seen, held_out=judged)
    scales = search_scales([linear], COLUMNS)
    plain = torch.ones(COLUMNS)
    assert scaled_error(linear, scales) <= scaled_error(linear, plain)
    assert scaled_error(linear, scales) == pytest.approx(
        output_error(judged, linear.weight, linear.round_to(linear.weight * scales) / scales), rel=1e-3
    )


def test_query_heads_of_one_value_share_its_scale():
    heads = torch.arange(COLUMNS // 2).reshape(2, -1).repeat_interleave(2, dim=0).reshape(-1)
    linear = consumer(inputs(), channel=heads)
    scales = search_scales([linear], COLUMNS // 2)
    assert scales.shape == (COLUMNS // 2,)
    mapping = Mapping(
        kind="linear", channels=COLUMNS // 2, consumers=(linear.end,), producers=(Channels(name="v", axis=-2, channel=torch.arange(COLUMNS // 2)),)
    )
    value = torch.randn(COLUMNS // 2, 8)
    folded = fold(mapping, scales, {"v": value, linear.end.name: linear.weight})
    exact, made = linear.weight @ value[heads], folded[linear.end.name] @ folded["v"][heads]
    torch.testing.assert_close(made, exact, rtol=1e-3, atol=1e-3)


def test_a_fused_projections_other_columns_stay():
    channel = torch.where(torch.arange(COLUMNS) < 8, torch.arange(COLUMNS), torch.full((), -1))
    linear = consumer(inputs(), channel=channel)
    assert search_scales([linear], 8).shape == (8,)


def test_an_input_that_was_never_seen_has_no_say():
    met, unmet = consumer(inputs()), consumer(torch.zeros(0, COLUMNS), seed=2)
    torch.testing.assert_close(search_scales([met, unmet], COLUMNS, duo=False), search_scales([met], COLUMNS, duo=False), rtol=0.05, atol=0.01)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), group_size=st.sampled_from([8, 16, PER_CHANNEL]))
def test_clipping_is_never_worse_under_its_groups_moments(seed, bits, group_size):
    torch.manual_seed(seed)
    weight, x = torch.randn(6, COLUMNS) ** 3, inputs(seed=seed)
    hessian = x.T @ x / len(x)
    size = COLUMNS if group_size == PER_CHANNEL else group_size
    mask = torch.block_diag(*[torch.ones(size, size)] * (COLUMNS // size))
    round_to = rounder(bits, group_size)
    cut = clip(weight, hessian=hessian, group_size=group_size, round_to=round_to)
    assert (cut.abs() <= weight.abs()).all()

    def errors(changed: torch.Tensor) -> torch.Tensor:
        change = round_to(changed) - weight
        return ((change @ (hessian * mask)) * change).sum(-1)

    assert (errors(cut) <= errors(weight) * (1 + 1e-4) + 1e-4).all()


def test_clipping_helps_a_group_with_one_large_weight():
    weight = torch.cat([torch.full((1, 15), 0.1), torch.tensor([[1.0]])], dim=1)
    hessian = torch.diag(torch.tensor([1.0] * 15 + [1e-4]))
    cut = clip(weight, hessian=hessian, group_size=16, round_to=rounder(3, 16))
    assert cut[0, -1] == pytest.approx(0.55)  # the narrowest of ten steps
    assert torch.equal(cut[:, :15], weight[:, :15])


def test_clipping_by_tensor_has_one_range():
    torch.manual_seed(0)
    weight = torch.randn(4, COLUMNS) ** 3
    cut = clip(weight, hessian=torch.eye(COLUMNS), group_size=PER_TENSOR, round_to=rounder(3, PER_TENSOR))
    where = cut != weight
    assert len({round(float(value), 5) for value in cut[where].abs()}) <= 1


def test_a_rounder_that_changes_nothing_wants_no_scales():
    linear = replace(consumer(inputs()), round_to=lambda weight: weight)
    assert scaled_error(linear, search_scales([linear], COLUMNS)) == pytest.approx(0, abs=1e-6)
