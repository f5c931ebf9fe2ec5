"""GPTQ against rounding, a closed form, brute force and the paper's own order of steps; the choice of damping; what refinement promises.

Seeded faults that these tests catch, each tried by hand: the block's own errors not passed on (`target += …` removed); the factor of the lower
triangle; the damping chosen by the error on `hessian` instead of `held_out`; a dead column that is not rounded to the nearest; a grid's groups
taken from the order of rounding instead of the columns'; refitted scales not rounded to their type; a refinement that keeps the old error.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lighten.compress.gptq import (
    DAMPINGS,
    HELD_OUT,
    Factor,
    GptqSettings,
    Grid,
    choose_factor,
    corrected,
    factorize,
    first_factor,
    gptq_codes,
    layer_error,
    quantize_gptq,
    refine_codes,
    refit_scales,
)  # fmt: skip
from lighten.compress.grid import QuantizedTensor
from lighten.compress.minifloat import quantize_float
from lighten.compress.rtn import quantize_rtn
from lighten.compress.scale_search import search_scales
from lighten.compress.statistics import InputStatistics, Moments
from lighten.errors import ModelError
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, WeightFormat

FORMATS = {
    "int8 by channel": WeightFormat(bits=8, group_size=PER_CHANNEL),
    "int6": WeightFormat(bits=6, group_size=16),
    "int4": WeightFormat(bits=4, group_size=16),
    "int4 asymmetric": WeightFormat(bits=4, group_size=16, symmetric=False),
    "int3 asymmetric": WeightFormat(bits=3, group_size=32, symmetric=False),
    "int2 asymmetric": WeightFormat(bits=2, group_size=16, symmetric=False),
    "int4 by tensor": WeightFormat(bits=4, group_size=PER_TENSOR),
    "int4, bfloat16 scales": WeightFormat(bits=4, group_size=32, scale_dtype="bfloat16"),
    "fp8 by channel": WeightFormat(bits=8, element="e4m3", scale_dtype="bfloat16"),
    "fp8 by tensor": WeightFormat(bits=8, element="e4m3", scale_dtype="float32", group_size=PER_TENSOR),
    "mxfp4": WeightFormat(bits=4, element="e2m1", scale_dtype="uint8", group_size=32),
    "nvfp4": WeightFormat(bits=4, element="e2m1", scale_dtype="float8_e4m3fn", group_size=16, global_scale=True),
}
seeds = st.integers(0, 2**31 - 1)


def inputs(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    """Correlated inputs with columns of different size, as a model's are."""
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) @ mixing * size


def statistics_of(columns: int, *, seed: int, rows: int = 300) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    x = inputs(rows, columns, generator=generator)
    moments = Moments(columns)
    moments.add(x[: rows * 3 // 4])
    moments.add(x[rows * 3 // 4 :], held_out=True)
    return moments.finish()


def random_weight(rows: int, columns: int, *, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))


def all_rows(statistics: InputStatistics) -> Tensor:
    assert statistics.held_out is not None
    return (1 - HELD_OUT) * statistics.hessian + HELD_OUT * statistics.held_out


def identity(columns: int, *, size: float = 1.0) -> Factor:
    return factorize((size, torch.eye(columns)), damping=0.01)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_without_correlation_it_is_rounding_to_the_nearest(format: WeightFormat) -> None:
    weight = random_weight(8, 64, seed=0)
    if format.element == "int":
        nearest = quantize_rtn(weight, bits=format.bits or 0, group_size=format.group_size, symmetric=format.symmetric)
    else:
        nearest = quantize_float(weight, format=format)
    grid, factor = Grid.of(nearest), identity(64, size=3.0)
    codes = gptq_codes(weight, factor, grid)
    assert torch.equal(grid.values(codes), nearest.dequantize())
    assert torch.equal(refine_codes(weight, codes, factor, grid), codes)


@given(seed=seeds)
@settings(max_examples=30)
def test_the_second_column_starts_from_the_exact_least_squares_answer(seed: int) -> None:
    """Source: Frantar et al. 2023 (arXiv:2210.17323), equation 2, for two columns: w_2 + H_12 / H_22 · (w_1 - ŵ_1)."""
    weight, hessian = random_weight(5, 2, seed=seed), statistics_of(2, seed=seed).hessian
    factor, grid = factorize((1.0, hessian), damping=0.0), Grid.of(quantize_rtn(weight, bits=4, group_size=1, symmetric=False))
    first, second = factor.order.flip(0).tolist()
    assert hessian[first, first] >= hessian[second, second]
    values = grid.values(gptq_codes(weight, factor, grid))
    rounded = quantize_on(weight, grid)
    torch.testing.assert_close(values[:, first], rounded[:, first])
    moved = weight.clone()
    damped = hessian[second, second] + factor.added[second]
    moved[:, second] += hessian[first, second] / damped * (weight - rounded)[:, first]
    step = grid.scale[:, second]
    assert ((values - moved)[:, second].abs() <= (quantize_on(moved, grid) - moved)[:, second].abs() + 1e-3 * step).all()


def quantize_on(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest values, by trying all codes."""
    tried = torch.stack([grid.values(torch.full(weight.shape, code, dtype=torch.uint8)) for code in range(16)])
    return tried.gather(0, (tried - weight).abs().argmin(0)[None])[0]


def textbook_gptq(weight: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """Algorithm 1 of the paper, column by column, with the inverse and its Cholesky factor, in double precision."""
    order = factor.order.flip(0)
    hessian = factor.hessian().double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, values = weight.double()[:, order].clone(), torch.zeros_like(weight, dtype=torch.float64)
    for i in range(len(order)):
        column = torch.zeros_like(weight)
        column[:, order[i]] = left[:, i].float()
        values[:, i] = quantize_on(column, grid)[:, order[i]].double()
        error = (left[:, i] - values[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    natural = torch.empty_like(weight)
    natural[:, order] = values.float()
    return natural


@pytest.mark.parametrize("columns", [1, 16, 96])
def test_it_gives_what_the_papers_own_steps_give(columns: int) -> None:
    weight, statistics = random_weight(6, columns, seed=3), statistics_of(columns, seed=4)
    grid = Grid.of(quantize_rtn(weight, bits=4, group_size=columns // 2 or 1, symmetric=False))
    factor = factorize((1.0, statistics.hessian), damping=0.1)
    same = (grid.values(gptq_codes(weight, factor, grid)) - textbook_gptq(weight, factor, grid)).abs() < 1e-5
    assert same.float().mean() > 0.98  # float32 and float64 part at ties, and what follows a tie differs


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_contract(format: WeightFormat) -> None:
    """Every format: better than rounding on rows it was chosen on and on others, codes of the width, scales of the type; a rerun is equal."""
    statistics = statistics_of(64, seed=5, rows=2000)
    weights = {"a": random_weight(24, 64, seed=6), "b": random_weight(8, 64, seed=7).to(torch.bfloat16)}
    found = quantize_gptq(weights, statistics, format)
    again = quantize_gptq(weights, statistics, format)
    test = inputs(2000, 64, generator=torch.Generator().manual_seed(5))[1500:]  # the held-out rows of the same distribution
    unseen = test.T @ test
    for name, weight in weights.items():
        nearest = search_scales(weight.float(), format=format)
        for hessian in (all_rows(statistics), unseen):
            ours, theirs = (layer_error(weight.float(), w.dequantize(), hessian).sum() for w in (found[name], nearest))
            assert ours < theirs
        assert found[name].scale.dtype == getattr(torch, format.scale_dtype)
        assert int(found[name].codes.max()) < 2 ** (format.bits or 0)
        assert (found[name].zero_point is None) == (format.symmetric or format.element != "int")
        assert found[name].dequantize().isfinite().all()
        assert torch.equal(found[name].codes, again[name].codes)
        assert torch.equal(found[name].scale.float(), again[name].scale.float())


def test_nvfp4s_weights_of_one_input_share_their_global_scale() -> None:
    weights = {"a": random_weight(4, 32, seed=1), "b": 5 * random_weight(4, 32, seed=2)}
    found = quantize_gptq(weights, statistics_of(32, seed=3), FORMATS["nvfp4"])
    assert found["a"].global_scale is not None
    assert found["b"].global_scale is not None
    assert torch.equal(found["a"].global_scale, found["b"].global_scale)


@given(seed=seeds, columns=st.sampled_from([4, 40]), bits=st.sampled_from([2, 4]))
@settings(max_examples=20)
def test_refining_codes_never_raises_the_error_of_a_row(seed: int, columns: int, bits: int) -> None:
    weight, statistics = random_weight(5, columns, seed=seed), statistics_of(columns, seed=seed)
    factor, grid = first_factor(statistics), Grid.of(quantize_rtn(weight, bits=bits, group_size=4, symmetric=False))
    hessian = factor.hessian()
    codes = gptq_codes(weight, factor, grid)
    before = layer_error(weight, grid.values(codes), hessian)
    for _ in range(3):
        codes = refine_codes(weight, codes, factor, grid)
        after = layer_error(weight, grid.values(codes), hessian)
        assert (after <= before * (1 + 1e-4) + 1e-6).all()
        before = after


def test_no_single_code_of_a_refined_row_could_be_better() -> None:
    weight, statistics = random_weight(3, 8, seed=8), statistics_of(8, seed=9)
    factor, grid = first_factor(statistics), Grid.of(quantize_rtn(weight, bits=2, group_size=4, symmetric=False))
    codes = refine_codes(weight, gptq_codes(weight, factor, grid), factor, grid, sweeps=20)
    least = layer_error(weight, grid.values(codes), factor.hessian())
    for column, code in product(range(8), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert (layer_error(weight, grid.values(other), factor.hessian()) >= least * (1 - 1e-5)).all()


def test_refined_gptq_is_near_the_best_of_all_codes() -> None:
    """The oracle tries all 4**6 codes of each row."""
    weight, statistics = random_weight(8, 6, seed=10), statistics_of(6, seed=11)
    factor, grid = first_factor(statistics), Grid.of(quantize_rtn(weight, bits=2, group_size=6, symmetric=False))
    tried = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8)
    hessian = factor.hessian()
    best = torch.stack([layer_error(row, grid.rows(torch.full((len(tried),), i)).values(tried), hessian).min() for i, row in enumerate(weight)])
    codes = gptq_codes(weight, factor, grid)
    plain = layer_error(weight, grid.values(codes), hessian)
    refined = layer_error(weight, grid.values(refine_codes(weight, codes, factor, grid, sweeps=5)), hessian)
    assert (refined >= best * (1 - 1e-4)).all()
    assert refined.sum() < 1.25 * best.sum()
    assert refined.sum() <= plain.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_are_the_least_squares_answer(symmetric: bool) -> None:
    weight, statistics = random_weight(5, 24, seed=12), statistics_of(24, seed=13)
    factor, start = first_factor(statistics), quantize_rtn(weight, bits=3, group_size=8, symmetric=symmetric)
    grid = Grid.of(start)
    codes = gptq_codes(weight, factor, grid)
    new = refit_scales(weight, codes, factor, grid, dtype=torch.float32)
    hessian = factor.hessian().double()
    for row in range(5):
        unscaled = (grid.values(codes)[row].reshape(3, 8) / grid.scale[row, :, None]).double()
        design = torch.block_diag(*unscaled[:, None]).T  # [I, G]
        best = torch.linalg.solve(design.T @ hessian @ design, design.T @ hessian @ weight[row].double())
        torch.testing.assert_close(new.scale[row], best.float(), rtol=1e-3, atol=1e-5)
    if not symmetric:
        assert grid.offset is not None
        assert new.offset is not None
        torch.testing.assert_close(new.offset / new.scale, grid.offset / grid.scale)


@given(seed=seeds)
@settings(max_examples=15)
def test_refitting_scales_never_raises_the_error_of_a_row_and_keeps_their_type(seed: int) -> None:
    weight, statistics = random_weight(6, 16, seed=seed), statistics_of(16, seed=seed)
    factor, grid = first_factor(statistics), Grid.of(quantize_rtn(weight, bits=8, group_size=4, symmetric=True))
    codes = gptq_codes(weight, factor, grid)
    new = refit_scales(weight, codes, factor, grid, dtype=torch.float16)
    before, after = (layer_error(weight, g.values(codes), factor.hessian()) for g in (grid, new))
    assert (after <= before * (1 + 1e-3) + 1e-9).all()
    assert torch.equal(new.scale, new.scale.half().float())


@pytest.mark.parametrize("rows", [20, 100, 4000])
def test_the_damping_is_the_one_that_is_best_on_held_out_rows(rows: int) -> None:
    """Where few rows choose, much damping keeps from following their chance; where the same rows judge, little is best."""
    weight, few = random_weight(16, 64, seed=14), statistics_of(64, seed=15, rows=rows)
    nearest = quantize_rtn(weight, bits=4, group_size=16, symmetric=True)
    codes, grid = nearest.codes, Grid.of(nearest)
    chosen = []
    for held_out in (statistics_of(64, seed=15, rows=8000).hessian, few.hessian):
        factor = choose_factor(weight, codes, grid, replace(few, held_out=held_out))
        by_hand = [factorize((1.0, few.hessian), damping=damping) for damping in DAMPINGS]
        errors = [float(layer_error(weight, grid.values(gptq_codes(weight, f, grid)), held_out).sum()) for f in by_hand]
        best = DAMPINGS[errors.index(min(errors))]
        together = factorize((1 - HELD_OUT, few.hessian), (HELD_OUT, held_out), damping=best)
        assert torch.equal(factor.unit, together.unit)
        chosen.append(best)
    assert chosen == {20: [DAMPINGS[2], DAMPINGS[0]], 100: [DAMPINGS[0], DAMPINGS[0]], 4000: [DAMPINGS[0], DAMPINGS[0]]}[rows]


def test_without_held_out_rows_the_damping_is_the_middle_one() -> None:
    statistics = replace(statistics_of(8, seed=0), held_out=None)
    weight = random_weight(4, 8, seed=0)
    nearest = quantize_rtn(weight, bits=4, group_size=8, symmetric=True)
    factor = choose_factor(weight, nearest.codes, Grid.of(nearest), statistics)
    torch.testing.assert_close(factor.added, first_factor(statistics).added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [8, 256, 600])
def test_second_moments_are_summed_in_pieces(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    moments = Moments(columns)
    for place in range(3):
        moments.add(x[place], held_out=place == 1)
    found, rows = moments.finish(), x.double()
    for hessian, some in ((found.hessian, rows[[0, 2]]), (found.held_out, rows[[1]])):
        flat = some.reshape(-1, columns)
        torch.testing.assert_close(hessian, (flat.T @ flat / len(flat)).float(), atol=1e-5, rtol=1e-5)


def test_what_is_done_beside_the_papers_algorithm_can_be_left_out() -> None:
    """Plain GPTQ, written out by its column loop: round one, take its error from the columns to come by the inverse's Cholesky factor."""
    weight, statistics = random_weight(6, 16, seed=24), replace(statistics_of(16, seed=25), held_out=statistics_of(16, seed=26).hessian)
    plain = GptqSettings(damping=0.01, refine=0, search=False)
    found = quantize_gptq({"": weight}, statistics, WeightFormat(bits=4, group_size=8), plain)[""]
    scales = quantize_rtn(weight, bits=4, group_size=8, symmetric=True).scale
    assert torch.equal(found.scale, scales)

    hessian = 0.75 * statistics.hessian + 0.25 * statistics.held_out
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True)
    damped = hessian + torch.diag(0.01 * (diagonal * diagonal.mean()).sqrt() + 1e-4 * diagonal.mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order].double()), upper=True).float()
    left, values = weight[:, order].clone(), torch.empty_like(weight)
    for i, column in enumerate(order.tolist()):
        scale = scales[:, column // 8].float()
        values[:, column] = (left[:, i] / scale).round().clamp(-8, 7) * scale
        error = (left[:, i] - values[:, column]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    torch.testing.assert_close(found.dequantize(), values)


def test_each_round_of_refining_lowers_the_error() -> None:
    weight, statistics = random_weight(16, 64, seed=27), replace(statistics_of(64, seed=28), held_out=None)
    format = WeightFormat(bits=2, group_size=16)
    made = [quantize_gptq({"": weight}, statistics, format, GptqSettings(refine=count))[""].dequantize() for count in (0, 1, 3)]
    errors = [float(layer_error(weight, value, first_factor(statistics).hessian()).sum()) for value in made]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(made[2], quantize_gptq({"": weight}, statistics, format)[""].dequantize())


def test_a_column_that_is_always_zero_is_rounded_to_the_nearest_and_moves_no_other() -> None:
    weight, statistics = random_weight(6, 16, seed=16), statistics_of(15, seed=17)
    grid = Grid.of(quantize_rtn(weight, bits=4, group_size=16, symmetric=True))
    place = torch.tensor([i for i in range(16) if i != 5])
    hessian = torch.zeros(16, 16)
    hessian[place[:, None], place] = statistics.hessian
    factor = factorize((1.0, hessian), damping=0.1)
    values = grid.values(refine_codes(weight, gptq_codes(weight, factor, grid), factor, grid))
    torch.testing.assert_close(values[:, 5], quantize_on(weight, grid)[:, 5])
    assert (values != quantize_on(weight, grid)).any()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_an_input_that_was_never_seen_leaves_rounding_to_the_nearest(format: WeightFormat) -> None:
    nothing = replace(Moments(64).finish(), held_out=torch.zeros(64, 64))
    weight = random_weight(4, 64, seed=18)
    found = quantize_gptq({"": weight}, nothing, format)[""]
    grid = Grid.of(found)
    assert torch.equal(grid.values(gptq_codes(weight, identity(64), grid)), found.dequantize())


def test_rows_do_not_see_each_other() -> None:
    weight, statistics = random_weight(40, 32, seed=19), statistics_of(32, seed=20)
    grid = Grid.of(search_scales(weight, format=FORMATS["int3 asymmetric"]))
    factor, permuted = first_factor(statistics), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    codes = refine_codes(weight, gptq_codes(weight, factor, grid), factor, grid)
    moved = grid.rows(permuted)
    again = refine_codes(weight[permuted], gptq_codes(weight[permuted], factor, moved), factor, moved)
    assert (again == codes[permuted]).float().mean() > 0.99  # matrix products of other shapes may round otherwise


def test_one_row_and_one_column() -> None:
    weight = torch.tensor([[0.3]])
    found = quantize_gptq({"": weight}, statistics_of(1, seed=1), WeightFormat(bits=4, group_size=PER_CHANNEL))[""]
    assert found.dequantize().item() == pytest.approx(0.3, rel=1e-3)


def test_a_singular_hessian_is_damped_until_it_can_be_factorized() -> None:
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(4, 16)
    factor = factorize((1.0, x.T @ x), damping=0.0)
    assert factor.unit.isfinite().all()
    assert (factor.added > 0).all()


def test_a_corrected_weight_is_the_least_squares_answer() -> None:
    """min over W* of the mean of |W x - W* x̂|² + |W* - W|² in the damping, from the rows themselves."""
    generator = torch.Generator().manual_seed(3)
    x = inputs(500, 12, generator=generator)
    changed = x + 0.3 * torch.randn(500, 12, generator=generator)
    moments, weight = Moments(12, cross=True), random_weight(5, 12, seed=3)
    moments.add(changed, original=x)
    statistics = moments.finish()
    assert statistics.cross is not None
    factor = first_factor(statistics)
    added = factor.added.sqrt().diag() * 500**0.5
    rows, wanted = torch.cat([changed, added]), torch.cat([x @ weight.T, added @ weight.T])
    best = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    torch.testing.assert_close(corrected(weight, statistics.cross, factor), best, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(corrected(weight, statistics.hessian, factor), weight)
    both = [quantize_gptq({"": weight}, s, FORMATS["int8 by channel"])[""] for s in (statistics, replace(statistics, cross=None))]
    ours, theirs = ((x @ weight.T - changed @ found.dequantize().T).square().sum() for found in both)
    assert ours < 0.95 * theirs


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(wrong: float) -> None:
    hessian = torch.eye(3)
    hessian[1, 1] = wrong
    with pytest.raises(ModelError, match="the 3 inputs of a layer hold values that are not finite"):
        factorize((1.0, hessian), damping=0.1)
    hessian = torch.eye(3)
    hessian[0, 1] = hessian[1, 0] = wrong
    with pytest.raises(ModelError, match="not finite"):
        factorize((1.0, hessian), damping=0.1)


def test_the_residual_is_what_columns_rounded_later_cannot_make_up_for() -> None:
    """Two columns: H_11 - H_12² / H_22 for the one that is rounded first, H_22 itself for the last."""
    hessian = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    factor = factorize((1.0, hessian), damping=0.0)
    torch.testing.assert_close(factor.residual, torch.tensor([4 - 1 / 2, 2.0]), rtol=2e-3, atol=0)


def test_a_grid_may_be_a_codebook_with_offsets() -> None:
    levels = torch.tensor([-1.0, -0.25, 0.1, 1.0])
    grid = Grid(scale=torch.tensor([[2.0, 1.0]]), offset=torch.tensor([[0.5, -1.0]]), levels=levels)
    weight = torch.tensor([[2.4, -1.4, -1.0, 5.0]])
    codes = gptq_codes(weight, identity(4), grid)
    assert codes.tolist() == [[3, 0, 2, 3]]
    torch.testing.assert_close(grid.values(codes), torch.tensor([[2.5, -1.5, -0.9, 0.0]]))


def test_grid_of_a_quantized_tensor_gives_its_values() -> None:
    for format in FORMATS.values():
        found: QuantizedTensor = search_scales(random_weight(4, 64, seed=21), format=format)
        torch.testing.assert_close(Grid.of(found).values(found.codes), found.dequantize(), rtol=1e-6, atol=1e-7)
