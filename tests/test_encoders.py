"""Encoders and encoder-decoders that the oracle cannot follow on tensors without values, and what their configs are refused for."""

from __future__ import annotations

import contextlib
from typing import Any

import family_truth
import pytest
from family_cases import encoders, seq2seq
from test_families import test_a_formula_is_what_transformers_builds_and_saves as contract

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families import FAMILIES, describe

EACH = [
    pytest.param(name, architecture, changes, id=f"{architecture}-{index}")
    for name, variants in (encoders.NEEDS_VALUES | seq2seq.NEEDS_VALUES).items()
    for architecture in FAMILIES[name].architectures for index, changes in enumerate(variants)
]  # fmt: skip


@pytest.fixture
def real_tensors(monkeypatch):
    """Tensors with values and without gradients: the counter of FLOPs fails on a table that is a module's argument and wants a gradient."""
    build = family_truth.build
    monkeypatch.setattr(family_truth, "fake_tensors", contextlib.nullcontext)
    monkeypatch.setattr(family_truth, "build", lambda config, architecture: build(config, architecture).requires_grad_(False))


@pytest.mark.usefixtures("real_tensors")
@pytest.mark.parametrize(("model_type", "architecture", "changes"), EACH)
def test_a_formula_is_what_transformers_builds_runs_and_saves(model_type, architecture, changes, tmp_path):
    contract(model_type, architecture, changes, tmp_path)


BERT: dict[str, Any] = {
    "model_type": "roberta", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
T5: dict[str, Any] = {"model_type": "t5", **seq2seq.T5}
BART: dict[str, Any] = {"model_type": "bart", **seq2seq.BART}


@pytest.mark.parametrize(
    ("config", "architecture", "error", "says"),
    [
        ({"model_type": "roberta"}, "RobertaModel", ModelError, "vocab_size is missing, hidden_size is missing, num_hidden_layers is missing"),
        (BERT | {"hidden_size": -32}, "RobertaModel", ModelError, "hidden_size=-32"),
        (BERT | {"num_attention_heads": 5}, "RobertaModel", ModelError, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        (BERT | {"num_hidden_layers": 10**9}, "RobertaModel", ModelError, "is more than 10000"),
        (BERT | {"hidden_act": "swish2"}, "RobertaModel", ModelError, "hidden_act 'swish2' is not known"),
        (BERT | {"add_cross_attention": True}, "RobertaModel", UnsupportedFamily, "add_cross_attention=True has no formula"),
        (BERT | {"id2label": ["a"]}, "RobertaForTokenClassification", ModelError, "id2label"),
        (BERT | {"model_type": "deberta", "type_vocab_size": -1}, "DebertaModel", ModelError, "type_vocab_size"),
        (BERT | {"model_type": "modernbert", "layer_types": ["full_attention"]}, "ModernBertModel", ModelError, "layer_types"),
        (BERT | {"model_type": "albert", "embedding_size": 16, "num_hidden_groups": 3}, "AlbertModel", UnsupportedFamily, "num_hidden_groups=3"),
        ({"model_type": "t5"}, "T5Model", ModelError, "d_ff is missing"),
        (T5 | {"feed_forward_proj": "gated-gelu-new"}, "T5Model", ModelError, "feed_forward_proj='gated-gelu-new'"),
        (T5 | {"num_decoder_layers": 0}, "T5Model", ModelError, "num_decoder_layers=0"),
        ({"model_type": "bart"}, "BartModel", ModelError, "decoder_layers is missing"),
        (BART | {"decoder_attention_heads": 5}, "BartModel", ModelError, "d_model=32 is not a multiple of decoder_attention_heads=5"),
        (BART | {"encoder_layers": 10**9}, "BartModel", ModelError, "is more than 10000"),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(config, architecture, error, says):
    with pytest.raises(error) as found:
        describe(config, architecture)
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_a_t5_without_num_decoder_layers_has_as_many_as_its_encoder():
    """transformers: `num_decoder_layers` defaults to `num_layers`."""
    parts = describe(T5 | {"num_layers": 3}, "T5Model")
    assert {part.name.split(".")[2] for part in parts if part.name.startswith("decoder.block.")} == {"0", "1", "2"}
