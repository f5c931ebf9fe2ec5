"""A decoder's cache inside of OpenVINO: one operator by layer, and the same values whatever is asked in which order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llama_config, save

from lighten.formats.artifact import write_artifact
from lighten.formats.graph_inputs import BEAMS, stateful_inputs
from lighten.formats.torch_model import load_module
from lighten.model import read_spec
from lighten.recipe import parse_recipe

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module", params=[2, 4], ids=["shared keys", "keys of each head"])
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    """A compiled artifact, and torch's model."""
    work = tmp_path_factory.mktemp("state")
    source = save(llama_config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=request.param), work / "model")
    made = write_artifact(source, parse_recipe("@ openvino"), work / "artifact", calibration=list)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    compiled = openvino.Core().compile_model(made.folder / "openvino_model.xml", "CPU", settings)
    return compiled, load_module(source, read_spec(source), dtype="float32", attention="eager")


def kinds(compiled: Any) -> Counter[str]:
    return Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops())


def test_cache_and_attention_are_one_operator_by_layer(pair):
    compiled, _ = pair
    found = kinds(compiled)
    assert found["ScaledDotProductAttention"] == 2
    assert found["Softmax"] == 0
    [attention, _] = [node for node in compiled.get_runtime_model().get_ordered_ops() if node.get_friendly_name().startswith("ScaledDot")]
    assert {value.get_node().get_friendly_name() for value in attention.input_values()} >= {BEAMS}


def test_steps_of_any_length_and_batch_give_what_torch_gives(pair):
    compiled, module = pair
    request = compiled.create_infer_request()
    for batch, steps in ((2, (5, 1, 1, 3)), (1, (1, 1)), (3, (4, 2))):
        ids = np.random.default_rng(batch).integers(5, 300, (batch, sum(steps)))
        with torch.no_grad():
            expected = module(torch.from_numpy(ids)).logits.numpy()
        request.reset_state()
        known = 0
        for new in steps:
            found = request.infer(stateful_inputs(ids[:, known : known + new], known))[0]
            np.testing.assert_allclose(found, expected[:, known : known + new], rtol=1e-3, atol=1e-4)
            known += new


def test_a_sequence_goes_on_from_the_cache_that_it_is_told(pair):
    compiled, module = pair
    request = compiled.create_infer_request()
    ids = np.random.default_rng(0).integers(5, 300, (2, 6))
    request.infer(stateful_inputs(ids[:, :4], 0))
    turned = stateful_inputs(ids[::-1, 4:], 4) | {BEAMS: np.array([1, 0], np.int32)}
    found = request.infer(turned)[0]
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).logits.numpy()[::-1, 4:]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_logits_are_those_of_the_last_tokens(pair):
    compiled, _ = pair
    request = compiled.create_infer_request()
    ids = np.random.default_rng(0).integers(5, 300, (2, 6))
    every = np.array(request.infer(stateful_inputs(ids, 0))[0])
    request.reset_state()
    found = request.infer(stateful_inputs(ids, 0, last=True))[0]
    assert found.shape == (2, 1, every.shape[2])
    np.testing.assert_allclose(found, every[:, -1:], rtol=1e-4, atol=1e-5)
