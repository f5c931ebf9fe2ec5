"""The artifact of CTranslate2: its bytes as predicted, its codes the recipe's, what it cannot say refused. What it computes: test_runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_models import bert_config, llama_config, save

from lighten.errors import RecipeError
from lighten.formats.artifact import write_artifact
from lighten.formats.ctranslate2_model import _encoder as encoder_model
from lighten.formats.ctranslate2_model import vocabulary
from lighten.model import read_spec
from lighten.recipe import parse_recipe

INT8 = "quantize(rtn, symmetric=true, embeddings=true, activations=dynamic, symmetric_activations=true) @ ctranslate2"
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
SIZES = {"vocab_size": 4000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("recipe", ["@ ctranslate2", "quantize(dynamic, embeddings=true) @ ctranslate2", INT8])
@pytest.mark.parametrize(("config", "more"), [
    (bert_config, {}), (llama_config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    (llama_config, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
], ids=["bert", "tied", "untied"])  # fmt: skip
def test_it_has_the_bytes_that_were_predicted(config, more, recipe, tmp_path):
    made = write_artifact(save(config(**SIZES, **more), tmp_path / "model"), parse_recipe(recipe), tmp_path / "out", calibration=list)
    assert made.predicted_size_bytes == pytest.approx(made.size_bytes, rel=0.02)


def test_its_tokens_have_the_tokenizers_names_and_all_differ(tmp_path):
    held = {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [{"id": 3, "content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    assert vocabulary(tmp_path, 5) == ["a", "<unused_1>", "b", "<s>", "<unused_4>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["x", -1.0], ["y", -2.0]]}}))
    assert vocabulary(tmp_path, 2) == ["x", "y"]
    assert vocabulary(tmp_path / "none", 2) == ["<unused_0>", "<unused_1>"]


@pytest.mark.parametrize(("config", "says"), [
    ({"rope_parameters": LINEAR}, "without scaled rotary positions, and model has 'linear'"),
    ({"hidden_act": "relu6"}, "has no activation 'relu6'"),
])  # fmt: skip
def test_what_it_cannot_say_is_refused_before_any_work(config: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=says):
        write_artifact(save(llama_config(**config), tmp_path / "model"), parse_recipe("@ ctranslate2"), tmp_path / "out", calibration=list)
    assert not (tmp_path / "out").exists()


def test_its_codes_are_the_recipes(tmp_path):
    """The bytes of one product's codes stand in the file as they were chosen, about 0."""
    source = save(llama_config(num_hidden_layers=1), tmp_path / "model")
    made = write_artifact(source, parse_recipe(INT8), tmp_path / "out", calibration=list)
    from lighten.compress.rtn import quantize_rtn
    from lighten.compress.walk import Checkpoint

    chosen = quantize_rtn(Checkpoint(source)["model.layers.0.mlp.down_proj.weight"], bits=8, group_size=-1, symmetric=True)
    codes = (chosen.codes.numpy().astype(np.int16) - 128).astype(np.int8)
    assert codes.tobytes() in (made.folder / "ctranslate2" / "model.bin").read_bytes()


def test_the_kind_of_a_token_is_exact_in_8_bits(tmp_path):
    """All tokens of a text have the first row of the table of kinds: it is added to the positions, which stay floats, and 0 in what is rounded."""
    source = save(bert_config(), tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    positions, kinds = (weights[f"embeddings.{name}_embeddings.weight"].numpy() for name in ("position", "token_type"))
    written = encoder_model(weights, read_spec(source)).encoder
    found = written.embeddings[1].weight
    assert not found[0].any()
    for kind in (0, 1):
        np.testing.assert_allclose(written.position_encodings.encodings + found[kind], positions + kinds[kind], atol=1e-6)
