"""Keras models, live and from their files: held against PyTorch's own counter; bad files are one line."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lighten
from lighten.errors import LightenError, WorkloadError

keras = pytest.importorskip("keras", reason="needs lighten[keras]")


@pytest.fixture(scope="module")
def keras_model() -> Any:
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(100, 16)(inputs)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(2, 8)(x, x))
    x = keras.layers.Dense(4)(keras.layers.Dense(32, activation="gelu")(x))
    return keras.Model(inputs, x)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, where it saves
def test_a_keras_model_live_and_from_its_file(keras_model, tmp_path):
    keras_model.save(tmp_path / "model.keras")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        keras_model(torch.zeros(2, 12, dtype=torch.int32))
    for model in (keras_model, tmp_path / "model.keras"):
        found = lighten.estimate(model, batch_size=2, seq_len=12).as_json()
        assert found["parameters"]["total"] == keras_model.count_params()
        assert found["flops"]["matmul"] == counter.get_total_flops()
        assert found["memory"]["weights"] == 4 * keras_model.count_params()
    trained = lighten.estimate(keras_model, batch_size=2, seq_len=12, phase="train").as_json()
    assert trained["flops"]["matmul"] > 2 * counter.get_total_flops()
    assert "multi_head_attention" in str(lighten.summary(keras_model))


@pytest.mark.parametrize(("content", "text"), [
    (None, "no readable .keras file"), ({"other.json": "{}"}, "no readable .keras file"), ({"config.json": "[[["}, "no readable"),
    ({"config.json": json.dumps({"module": "os.path", "class_name": "join", "config": {}})}, "code that is not Keras' own"),
    ({"config.json": json.dumps({"module": "keras", "class_name": "NoSuch", "config": {}})}, "cannot be built from its config"),
])  # fmt: skip
def test_a_bad_keras_file_is_one_line(content, text, tmp_path):
    path = Path(tmp_path / "model.keras")
    if content is None:
        path.write_bytes(b"no zip")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in content.items():
                archive.writestr(name, value)
    with pytest.raises(LightenError, match=text) as caught:
        lighten.estimate(path)
    assert "\n" not in str(caught.value)


def test_a_workload_without_effect_on_a_fixed_input_is_refused():
    fixed = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    with pytest.raises(WorkloadError, match="has no effect"):
        lighten.estimate(fixed, seq_len=9)
