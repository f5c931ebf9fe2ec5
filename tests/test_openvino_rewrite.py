"""Rewrites of OpenVINO graphs: fewer operators, the same values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lighten.formats.openvino_rewrite import bias_of, divide_source, find_products, join_heads, scale_queries, weight_of

openvino = pytest.importorskip("openvino")
from openvino import opset13 as op  # noqa: E402 - where it is installed

HEADS, WIDTH, COLUMNS = 3, 8, 24
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 5, COLUMNS)).astype(np.float32)


def constant(*shape: int) -> Any:
    return openvino.op.Constant(RANDOM.normal(size=shape).astype(np.float32))


def linear(x: Any, *, turned: bool = False, bias: bool = True) -> Any:
    product = op.matmul(x, constant(COLUMNS, COLUMNS), False, turned)
    return op.add(product, constant(COLUMNS)) if bias else product


def heads(x: Any, order: tuple[int, ...] = (0, 2, 1, 3)) -> Any:
    shaped = op.reshape(x, op.constant([0, 0, HEADS, WIDTH], np.int64), True)
    return op.transpose(shaped, op.constant(list(order), np.int64))


def attention(*, turned: bool = False, bias: bool = True, shared: bool = False, keys_turned: bool = False) -> Any:
    """x → softmax(q kᵀ) v → a last product; where it is shared, the values are read by something else too."""
    x = op.parameter([-1, -1, COLUMNS], np.float32, name="x")
    q, k, v = (linear(x, turned=turned, bias=bias) for _ in range(3))
    keys = heads(k, (0, 2, 3, 1) if keys_turned else (0, 2, 1, 3))
    scores = op.multiply(op.matmul(heads(q), keys, False, not keys_turned), openvino.op.Constant(np.float32([WIDTH**-0.5])))
    mixed = op.matmul(op.softmax(scores, -1), heads(v), False, False)
    joined = op.reshape(op.transpose(mixed, op.constant([0, 2, 1, 3], np.int64)), op.constant([0, 0, COLUMNS], np.int64), True)
    joined.set_friendly_name("mixed")
    last = linear(joined)
    return openvino.Model([op.result(last), *([op.result(v)] if shared else [])], [x], "attention")


def run(model: Any) -> np.ndarray[Any, Any]:
    return np.array(openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": X})[0])


def mixed_of(model: Any) -> Any:
    """The input of the last product."""
    return next(node for node in model.get_ordered_ops() if node.get_friendly_name() == "mixed").output(0)


@pytest.mark.parametrize("turned", [False, True])
def test_products_of_one_input_become_one(turned):
    model = attention(turned=turned)
    exact = run(model)
    assert join_heads(model) == 1
    assert [weight_of(node).shape for node in find_products(model)] == [(3 * COLUMNS, COLUMNS), (COLUMNS, COLUMNS)]
    np.testing.assert_allclose(run(model), exact, rtol=1e-3, atol=1e-4)


def test_keys_may_be_turned_already():
    model = attention(keys_turned=True)
    exact = run(model)
    assert join_heads(model) == 1
    np.testing.assert_allclose(run(model), exact, rtol=1e-3, atol=1e-4)


def test_products_without_biases_stay_apart():
    model = attention(bias=False)
    assert join_heads(model) == 0
    assert len(find_products(model)) == 4


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_what_divides_mixed_heads_goes_into_their_values(joined, turned):
    model = attention(turned=turned)
    if joined:
        join_heads(model)
    count, scales = len(model.get_ordered_ops()), RANDOM.uniform(0.5, 4, COLUMNS).astype(np.float32)
    exact = run(openvino.Model([op.result(mixed_of(model))], model.get_parameters(), "before"))
    divided = divide_source(mixed_of(model), scales)
    assert divided is not None
    assert len(model.get_ordered_ops()) == count
    np.testing.assert_allclose(run(openvino.Model([op.result(divided)], model.get_parameters(), "after")), exact / scales, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("joined", [False, True])
def test_scores_are_scaled_where_queries_come_from(joined):
    model = attention()
    exact = run(model)
    assert scale_queries(model) == 1
    assert not any(node.get_type_name() == "Multiply" for node in model.get_ordered_ops())
    if joined:
        assert join_heads(model) == 1
    np.testing.assert_allclose(run(model), exact, rtol=1e-3, atol=1e-4)


def test_scores_of_queries_without_biases_stay_as_they_are():
    model = attention(bias=False)
    exact = run(model)
    assert scale_queries(model) == 0
    assert np.array_equal(run(model), exact)


@pytest.mark.parametrize("model", [attention(bias=False), attention(shared=True)], ids=["no bias", "read by others"])
def test_values_that_cannot_be_divided_are_left_alone(model):
    exact = run(model)
    assert divide_source(mixed_of(model), np.full(COLUMNS, 2, np.float32)) is None
    assert np.array_equal(run(model), exact)


def test_a_bias_is_a_constant_that_alone_follows():
    x = op.parameter([-1, -1, COLUMNS], np.float32, name="x")
    plain, biased, twice = linear(x, bias=False), linear(x), linear(x)
    product = twice.input_value(0).get_node()
    model = openvino.Model([op.result(each) for each in (op.add(plain, x), biased, op.add(twice, op.abs(product)))], [x], "sums")
    assert len(find_products(model)) == 3
    assert [bias_of(each) is not None for each in (plain, biased.input_value(0).get_node(), product)] == [False, True, False]
