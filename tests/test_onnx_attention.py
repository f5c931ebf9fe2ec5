"""Attention as one operator of ONNX Runtime's: the same values, and nothing else is taken for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from tiny_models import bert_config, llama_config

from lighten.formats.onnx_attention import fuse_attention, join_products
from lighten.model import read_spec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
attention (float[B, S, 32] x, int64[B, S] attention_mask) => (float[B, S, 32] y)
<float scale = {{0.35}}, float masked = {{-65504.0}}, float seen = {{0.0}}, int64 zero = {{0}}, int64[2] axes = {{1, 2}},
 int64[4] heads = {{0, 0, 4, 8}}, int64[3] whole = {{0, 0, 32}}>
{{
    q = Mul(x, scale)
    v = Relu(x)
    q_shaped = Reshape(q, heads)
    k_shaped = Reshape(x, heads)
    v_shaped = Reshape(v, heads)
    q_heads = Transpose<perm = [0, 2, 1, 3]>(q_shaped)
    k_heads = Transpose<perm = [0, 2, 3, 1]>(k_shaped)
    v_heads = Transpose<perm = [{values}]>(v_shaped)
    mask = Unsqueeze(attention_mask, axes)
    is_padding = Equal(mask, zero)
    added = Where(is_padding, {where})
    scores = MatMul(q_heads, k_heads)
    scaled = {scaled}
    both = Add(scaled, added)
    shares = Softmax<axis = -1>(both)
    mixed = MatMul(shares, v_heads)
    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
    {y} = Reshape(turned, whole)
    {more}
}}
"""
USUAL = {"values": "0, 2, 1, 3", "where": "masked, seen", "scaled": "Mul(scores, scale)", "y": "y", "more": ""}


def graph(**changed: str) -> Any:
    model = onnx.parser.parse_model(GRAPH.format(**USUAL | changed))
    onnx.checker.check_model(model)
    return model


def run(model: Any) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(2, 6, 32)).astype(np.float32)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    found: np.ndarray[Any, Any] = session.run(None, {"x": x, "attention_mask": mask})[0]
    return found[mask.astype(bool)]


def spec_of(config: Any, tmp_path: Any) -> Any:
    config.save_pretrained(tmp_path)
    return read_spec(tmp_path)


@pytest.fixture
def spec(tmp_path):
    return spec_of(bert_config(), tmp_path)


def test_it_becomes_one_operator_with_the_same_values(spec):
    model = graph()
    expected = run(model)
    assert fuse_attention(model, spec) == 1
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds == {"Cast": 1, "Mul": 1, "Relu": 1, "MultiHeadAttention": 1}
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"values": "0, 2, 3, 1"}, {"where": "seen, masked"}, {"where": "masked, scale"},
        {"scaled": "Mul(scores, scores)"}, {"scaled": "Relu(scores)"},
        {"y": "z", "more": "rest = ReduceSum(shares, axes)\n y = Mul(z, z)"},
    ],
    ids=["values turned", "the other tokens are masked", "all tokens are changed", "a factor of its own", "no factor", "shares are read too"],
)  # fmt: skip
def test_what_has_another_form_stays_as_it_is(changed, spec):
    model = onnx.parser.parse_model(GRAPH.format(**USUAL | changed))
    before = model.SerializeToString()
    assert fuse_attention(model, spec) == 0
    assert model.SerializeToString() == before


def test_a_decoder_is_left_alone(tmp_path):
    assert fuse_attention(graph(), spec_of(llama_config(num_key_value_heads=4), tmp_path)) == 0


PRODUCTS = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
attention (float[B, S, 32] x, int64[B, S] attention_mask) => (float[B, S, 16] y)
{{
    z = Relu(x)
    padding = Cast<to = 6>(attention_mask)
    q_product = MatMul(x, wq)
    q = Add(q_product, bq)
    k_product = MatMul({keys}, wk)
    k = Add(bk, k_product)
    v_product = MatMul(x, wv)
    v = Add(v_product, {bias})
    y = com.microsoft.MultiHeadAttention<num_heads = 4, scale = 0.4, mask_filter_value = -65504.0>({inputs}, , padding)
}}
"""


def products(**changed: str) -> Any:
    model = onnx.parser.parse_model(PRODUCTS.format(**{"keys": "x", "bias": "bv", "inputs": "q, k, v"} | changed))
    random = np.random.default_rng(1)
    for name in "qkv":
        for stem, shape in (("w", (32, 16)), ("b", (16,))):
            model.graph.initializer.append(onnx.numpy_helper.from_array(random.normal(0, 0.3, shape).astype(np.float32), stem + name))
    return model


def test_query_key_and_value_of_one_input_are_one_product():
    model = products()
    expected = run(model)
    assert join_products(model) == 1
    assert Counter(node.op_type for node in model.graph.node) == {"Cast": 1, "Attention": 1}
    assert {each.name: tuple(each.dims) for each in model.graph.initializer} == {"y_joined_weight": (32, 48), "y_joined_bias": (48,)}
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [{"keys": "z"}, {"bias": "x"}, {"inputs": "q, q, v"}, {"inputs": "q, k_product, v"}])
def test_others_stay_apart(changed):
    model = products(**changed)
    assert join_products(model) == 0
    assert "MultiHeadAttention" in {node.op_type for node in model.graph.node}
