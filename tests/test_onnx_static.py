"""Static int8 for ONNX Runtime: the graph computes what was chosen, in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_openvino_static import COLUMNS, OUTPUTS, inputs, weights

from lighten.formats.onnx_static import quantize_static
from lighten.formats.static_rounding import Rounding, round_groups, round_static
from lighten.recipe.words import FEW_ROWS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - where it is installed

HEADS = 4
BIAS = np.arange(OUTPUTS, dtype=np.float32) / 7


def model_of(nodes: list[Any], constants: dict[str, Any], outs: list[str]) -> Any:
    """A graph of x [1, S, I]."""
    held = [numpy_helper.from_array(np.ascontiguousarray(np.asarray(value, None)), name) for name, value in constants.items()]
    shapes = {"x": [1, None, COLUMNS], "attention_mask": ["b", "s"]}
    asked = [name for name in shapes if any(name in node.input for node in nodes)]
    kinds = {"x": TensorProto.FLOAT, "attention_mask": TensorProto.INT64}
    graph = helper.make_graph(
        nodes, "made", [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in asked],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outs], held,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def two_products(*, bias: bool) -> Any:
    """x → two products, one of them with a bias behind it, on its left or none."""
    first, second = (weight.T.numpy() for weight in weights(2).values())
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("MatMul", ["y", "first"], ["one"])]
    nodes += [helper.make_node("Add", ["bias", "one"], ["sum"])] if bias else []
    nodes += [helper.make_node("MatMul", ["y", "second"], ["two"]), helper.make_node("Abs", ["two"], ["other"])]
    return model_of(nodes, {"first": first, "second": second, "bias": BIAS}, ["sum" if bias else "one", "other"])


def run(model: Any, **given: Any) -> list[Any]:
    return list(onnxruntime.InferenceSession(model.SerializeToString()).run(None, given))


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("bias", [True, False])
def test_the_graph_computes_what_was_chosen(bias: bool, tmp_path: Path) -> None:
    model, x = two_products(bias=bias), inputs()
    exact = run(model, x=x[None].numpy())
    [rounding] = quantize_static(model, [{"x": x[None].numpy()}], tmp_path).values()
    assert rounding.is_static
    assert kinds(model).count("MatMulIntegerToFloat") == 2
    assert "Add" not in kinds(model)
    found = run(model, x=x[None].numpy())
    rounded = round_static(x / rounding.scales, rounding.low or 0.0, rounding.high or 0.0)
    one, two = (rounded @ rounding.weights[name].dequantize().T + rounding.shifts[name] for name in ("one", "two"))
    expected = [one + torch.from_numpy(BIAS) if bias else one, two.abs()]
    for got, wanted, true in zip(found, expected, exact, strict=True):
        assert np.abs(got[0] - wanted.numpy()).max() < 1e-3 * np.abs(true).max()  # a value between two steps may be rounded either way
        assert np.square(got - true).sum() < 1e-3 * np.square(true).sum()
    assert list(tmp_path.iterdir()) == []


def test_what_one_scale_spoils_is_rounded_by_token(tmp_path: Path) -> None:
    model, x = two_products(bias=True), inputs()
    x[::97] = x[::97] * 300
    [rounding] = quantize_static(model, [{"x": x[None].numpy()}], tmp_path).values()
    assert not rounding.is_static
    assert kinds(model).count("MatMulNBits") == 2
    found = run(model, x=x[None].numpy())[0][0]
    wanted = round_groups(x) @ rounding.weights["one"].dequantize().T + rounding.shifts["one"] + torch.from_numpy(BIAS)
    error = np.square(found - wanted.numpy()).sum(1) / np.square(wanted.numpy()).sum(1)
    assert error.max() < 1e-3
    assert rounding.error < 3e-4


def attention(*, alike: bool = True, read_twice: bool = False) -> Any:
    """x → q, k, v → attention; or with keys of another input."""
    random = np.random.default_rng(0)
    constants = {f"w{name}": random.normal(0, 0.1, (COLUMNS, OUTPUTS)).astype(np.float32) for name in "qkv"}
    constants |= {f"b{name}": random.normal(size=OUTPUTS).astype(np.float32) for name in "qkv"}
    nodes = [helper.make_node("Cast", ["attention_mask"], ["padding"], to=TensorProto.INT32), helper.make_node("Identity", ["x"], ["y"])]
    nodes += [helper.make_node("Abs", ["x"], ["z"])]
    for name in "qkv":
        source = "y" if alike or name != "k" else "z"
        nodes += [helper.make_node("MatMul", [source, f"w{name}"], [f"p{name}"]), helper.make_node("Add", [f"p{name}", f"b{name}"], [name])]
    nodes.append(
        helper.make_node("MultiHeadAttention", ["q", "k", "v", "", "padding"], ["mixed"], domain="com.microsoft", num_heads=HEADS, scale=0.3)
    )
    nodes.append(helper.make_node("MatMul", ["mixed", "wo"], ["out"]))
    constants["wo"] = random.normal(0, 0.3, (OUTPUTS, 16)).astype(np.float32) * np.logspace(-1, 1, OUTPUTS, dtype=np.float32)[:, None]
    return model_of(nodes, constants, ["out", "mixed"] if read_twice else ["out"])


@pytest.mark.parametrize("alike", [True, False])
def test_query_key_and_value_of_one_input_are_one_product(alike: bool, tmp_path: Path) -> None:
    model, x = attention(alike=alike), inputs(24)[None].numpy() / 3
    mask = np.ones((1, 24), np.int64)
    mask[0, 20:] = 0
    given = {"x": x, "attention_mask": mask}
    [exact] = run(model, **given)
    found: dict[str, Rounding] = quantize_static(model, [given], tmp_path)
    assert all(rounding.is_static for rounding in found.values())
    assert float(found["mixed"].scales.max() / found["mixed"].scales.min()) > 2
    assert kinds(model).count("Mul") == len(found) - 1  # what attention mixes is divided in the scales of the values
    assert ("QAttention" in kinds(model)) == alike
    assert ("MultiHeadAttention" in kinds(model)) != alike
    assert kinds(model).count("MatMulIntegerToFloat") == (1 if alike else 4)
    [close] = run(model, **given)
    assert np.square(close - exact)[0, :20].sum() < 1e-3 * np.square(exact)[0, :20].sum()


def test_what_attention_mixes_is_divided_by_itself_where_something_else_reads_it(tmp_path: Path) -> None:
    model, x = attention(read_twice=True), inputs(24)[None].numpy() / 3
    given = {"x": x, "attention_mask": np.ones((1, 24), np.int64)}
    exact = run(model, **given)
    assert kinds(model).count("Mul") == 0
    quantize_static(model, [given], tmp_path)
    assert kinds(model).count("Mul") == 2
    for close, true in zip(run(model, **given), exact, strict=True):
        assert np.square(close - true).sum() < 2e-3 * np.square(true).sum()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_heads_are_in_integers_too(transposed: bool, bias: bool, tmp_path: Path) -> None:
    weight = weights()["product 0"].numpy()
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "w", *(["bias"] if bias else [])], ["out"], transB=int(transposed)),
    ]
    model = model_of(nodes, {"w": weight if transposed else weight.T, "bias": BIAS, "axes": np.array([1])}, ["out"])
    batches = [{"x": inputs(9, seed)[None].numpy()} for seed in range(64)]
    exact = [run(model, **batch)[0] for batch in batches]
    assert list(quantize_static(model, batches, tmp_path)) == ["pooled"]
    assert "MatMulIntegerToFloat" in kinds(model)
    assert "Gemm" not in kinds(model)
    found = [run(model, **batch)[0] for batch in batches]
    assert np.square(np.array(found) - np.array(exact)).sum() < 1e-3 * np.square(exact).sum()


@pytest.mark.parametrize("rows", [50, FEW_ROWS])
def test_tables_of_more_than_a_few_rows_become_codes(rows: int, tmp_path: Path) -> None:
    table = np.random.default_rng(3).normal(size=(rows, 32)).astype(np.float32)
    nodes = [helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64), helper.make_node("Gather", ["table", "ids"], ["out"])]
    model = model_of(nodes, {"table": table}, ["out"])
    quantize_static(model, [], tmp_path)
    types = {TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer if np.prod(each.dims) > rows}
    assert types == ({"INT8"} if rows > FEW_ROWS else {"FLOAT"})
    ids = np.resize(np.arange(rows), (1, 1, COLUMNS)).astype(np.float32)
    error = np.abs(run(model, x=ids)[0] - table[ids.astype(int)]).max()
    assert error <= (np.abs(table).max() / 127 if rows > FEW_ROWS else 0)
