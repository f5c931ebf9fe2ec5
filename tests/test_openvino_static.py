"""Static int8 for OpenVINO: the graph computes what was chosen, and what is chosen is right for the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lighten.compress.rtn import quantize_rtn
from lighten.formats.openvino_static import find_sites, quantize_static, quantize_tables
from lighten.formats.settings import openvino_settings
from lighten.formats.static_rounding import Rounding, Seen, choose_rounding, round_by, round_groups, round_static, static_range, together
from lighten.recipe.words import FEW_ROWS

openvino = pytest.importorskip("openvino")
from openvino import opset13 as op  # noqa: E402 - where it is installed

COLUMNS, OUTPUTS = 128, 48


def inputs(rows: int = 400, seed: int = 0) -> Tensor:
    """Channels of sizes that differ by a hundred."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, COLUMNS, generator=random) * torch.logspace(-1, 1, COLUMNS)


def weights(count: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {f"product {number}": torch.randn(OUTPUTS, COLUMNS, generator=random) / COLUMNS**0.5 for number in range(count)}


def constant(values: Any) -> Any:
    return openvino.op.Constant(np.ascontiguousarray(np.asarray(values, np.float32)))


def graph(*, norm: bool, bias: bool, transposed: bool) -> Any:
    """x → (x · weight + bias) → two products, one with a bias behind it, the other with its table the other way round."""
    x = op.parameter([-1, -1, COLUMNS], np.float32, name="x")
    before = op.add(op.multiply(x, constant(np.linspace(0.5, 2, COLUMNS))), constant(np.linspace(-1, 1, COLUMNS))) if norm else op.sigmoid(x)
    first, second = weights(2).values()
    one = op.matmul(before, constant(first if transposed else first.T), False, transposed)
    other = op.matmul(before, constant(second.T), False, False)
    one.set_friendly_name("one")
    other.set_friendly_name("other")
    ends = [op.add(one, constant(np.arange(OUTPUTS) / 7)) if bias else one, op.abs(other)]
    return openvino.Model([op.result(end) for end in [*ends, before]], [x], "two products")


def run(model: Any, x: Tensor) -> list[np.ndarray[Any, Any]]:
    compiled = openvino.Core().compile_model(model, "CPU", openvino_settings("float32", activations="static", decoder=False))
    found = compiled({"x": x[None].numpy()})
    return [np.array(found[place][0]) for place in range(len(found))]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_graph_computes_what_was_chosen(norm, bias, transposed):
    model, x = graph(norm=norm, bias=bias, transposed=transposed), inputs()
    exact = run(model, x)
    assert [set(site.operators) for site in find_sites(model)] == [{"one", "other"}]
    [rounding] = quantize_static(model, [{"x": x[None].numpy()}]).values()
    assert rounding.is_static
    found = run(model, x)
    before = torch.from_numpy(exact[2])
    rounded = round_static(before / rounding.scales, rounding.low, rounding.high)
    one, other = ((rounded @ rounding.weights[name].dequantize().T + rounding.shifts[name]).numpy() for name in ("one", "other"))
    wanted = [one + (np.arange(OUTPUTS) / 7 if bias else 0), np.abs(other)]
    for got, want in zip(found[:2], wanted, strict=True):
        assert np.abs(got - want).max() < 0.01 * np.abs(want).max()  # a value between two steps may go to the other
    for got, want in zip(found[:2], exact[:2], strict=True):
        assert np.square(got - want).sum() < 1e-3 * np.square(want).sum()
    assert np.array_equal(found[2], exact[2])  # what others read of the input is not rounded


def test_a_residual_sum_is_a_bias_of_no_product():
    x = op.parameter([-1, -1, COLUMNS], np.float32, name="x")
    weight = weights()["product 0"]
    product = op.matmul(x, constant(weight.T), False, False)
    model = openvino.Model([op.result(op.add(product, op.matmul(x, constant(weight.T), False, False)))], [x], "sum of two")
    exact = run(model, inputs())
    quantize_static(model, [{"x": inputs()[None].numpy()}])
    [found] = run(model, inputs())
    assert np.square(found - exact[0]).sum() < 1e-3 * np.square(exact[0]).sum()


def test_rows_that_are_masked_do_not_count():
    model = graph(norm=True, bias=True, transposed=False)
    x = inputs()
    padded = torch.cat([x, torch.full((50, COLUMNS), 1e4)])
    mask = np.concatenate([np.ones(400, np.int64), np.zeros(50, np.int64)])
    [plain] = quantize_static(graph(norm=True, bias=True, transposed=False), [{"x": x[None].numpy()}]).values()
    [found] = quantize_static(model, [{"x": padded[None].numpy(), "attention_mask": mask[None]}]).values()
    assert (found.low, found.high) == (plain.low, plain.high)


def test_sequences_are_looked_at_together_and_none_is_lost():
    lengths = [5, 9, 1, *range(2, 40)]
    single = [{"input_ids": np.full((1, n), n), "attention_mask": np.ones((1, n), np.int64)} for n in lengths]
    made = together(single)
    assert len(made) < len(single) / 8
    rows = [row[kept] for each in made for row, kept in zip(each["input_ids"], each["attention_mask"].astype(bool), strict=True)]
    assert sorted((len(row), set(row)) for row in rows) == sorted((n, {n}) for n in lengths)
    bare = [{"pixels": np.zeros((1, 3))}]
    assert together(bare) == bare


def test_a_few_huge_rows_are_rounded_by_row():
    x = inputs()
    x[::97] = x[::97] * 300
    assert not choose_rounding(x, weights(3), round_groups).is_static
    assert choose_rounding(inputs(), weights(3), round_groups).is_static


def test_weights_by_moments_beat_the_nearest_ones():
    x, weight = inputs() @ torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(2)), weights()
    found: Rounding = round_by(Seen.of(x), weight, torch.ones(COLUMNS))
    judged = torch.arange(len(x)) % 4 == 3
    nearest = quantize_rtn(weight["product 0"], bits=8, group_size=-1, symmetric=True).dequantize()
    rounded = round_static(x, found.low or 0.0, found.high or 0.0)
    error = float(((rounded @ nearest.T - x @ weight["product 0"].T)[judged]).square().sum() / (x @ weight["product 0"].T)[judged].square().sum())
    assert found.error < error


def test_nothing_is_shifted_on_average():
    x = inputs()
    found = round_by(Seen.of(x), weights(2), torch.full((COLUMNS,), 2.0))
    judged = Seen.of(x).held_out
    rounded = round_static(judged / 2, found.low or 0.0, found.high or 0.0)
    for name, weight in weights(2).items():
        left = (judged @ weight.T - rounded @ found.weights[name].dequantize().T - found.shifts[name]).mean(0)
        torch.testing.assert_close(left, torch.zeros(OUTPUTS), atol=1e-5, rtol=0)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
def test_a_range_holds_its_values_and_zero_is_one_of_its_steps(values):
    x = torch.tensor(values)
    low, high = static_range(min(values), max(values))
    step = (high - low) / 255
    assert low <= 0 <= high
    assert round(-low / step) == pytest.approx(-low / step, abs=1e-3)
    assert (round_static(x, low, high) - x).abs().max() <= 1.01 * step + 1e-30  # the zero point moves both ends by half a step at most
    assert float(round_static(torch.zeros(1), low, high)) == pytest.approx(0.0, abs=step / 100)


def test_groups_of_a_row_have_scales_of_their_own():
    x = torch.cat([torch.full((2, 128), 1e-3), torch.full((2, 128), 1e3)], 1)
    torch.testing.assert_close(round_groups(x), x, rtol=0.01, atol=0)


def test_tables_become_codes():
    ids = op.parameter([-1], np.int64, name="ids")
    table = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    model = openvino.Model([op.result(op.gather(constant(table), ids, op.constant(0, np.int64)))], [ids], "table")
    quantize_tables(model)
    stored = {node.get_element_type().to_string() for node in model.get_ordered_ops() if node.get_type_name() == "Constant" and node.data.size > 50}
    assert stored == {"i8"}
    compiled = openvino.Core().compile_model(model, "CPU")
    found = compiled({"ids": np.arange(50)})[0]
    assert np.abs(found - table.numpy()).max() <= float(table.abs().max()) / 127


def test_a_table_of_few_rows_stays_as_it_is():
    ids = op.parameter([-1], np.int64, name="ids")
    table = torch.randn(FEW_ROWS, 32, generator=torch.Generator().manual_seed(3))
    model = openvino.Model([op.result(op.gather(constant(table), ids, op.constant(0, np.int64)))], [ids], "table")
    quantize_tables(model)
    assert np.array_equal(openvino.Core().compile_model(model, "CPU")({"ids": np.arange(FEW_ROWS)})[0], table.numpy())
