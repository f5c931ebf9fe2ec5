"""BERT (Devlin et al. 2018, arXiv:1810.04805) as `transformers` computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families._family import Family
from lighten.model.families._fields import activation, check_probabilities, optional, require
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, Norm, Part

HEADS = (
    "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering", "BertLMHeadModel",
)  # fmt: skip
ARCHITECTURES = ("BertModel", *HEADS)
NEXT_SENTENCE = ("BertForPreTraining", "BertForNextSentencePrediction")
"""Heads that say whether one sentence follows another."""
FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """Parts of a BERT encoder, with pooler and head where the architecture has them."""
    c = require(config, FIELDS, "bert")
    check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    if config.get("add_cross_attention"):
        raise UnsupportedFamily("bert with add_cross_attention=True has no formula; it can be traced.")
    hidden = c["hidden_size"]
    prefix = "" if architecture == "BertModel" else "bert."
    parts: list[Part] = [
        _embedding(f"{prefix}embeddings.word_embeddings", c["vocab_size"], hidden),
        _embedding(f"{prefix}embeddings.token_type_embeddings", c["type_vocab_size"], hidden),
        _embedding(f"{prefix}embeddings.position_embeddings", c["max_position_embeddings"], hidden, rows="position"),
        Elementwise(name=f"{prefix}embeddings.add", component="embedding", size=hidden, kind="add", flops_per_element=2),
        Norm(name=f"{prefix}embeddings.LayerNorm", component="norm", size=hidden, kind="layernorm"),
    ]
    for layer in range(c["num_hidden_layers"]):
        parts += _layer(f"{prefix}encoder.layer.{layer}", c, str(config.get("hidden_act", "gelu")), causal=bool(config.get("is_decoder")))
    return (*parts, *_head(architecture, prefix, c, config))


def _embedding(name: str, count: int, size: int, rows: Any = "token") -> Embedding:
    return Embedding(name=name, component="embedding", num_embeddings=count, embedding_dim=size, rows=rows)


def _linear(name: str, component: str, columns: int, outputs: int, **more: Any) -> Linear:
    return Linear(name=name, component=component, in_features=columns, out_features=outputs, bias=True, **more)


def _layer(at: str, c: Mapping[str, int], act: str, *, causal: bool) -> list[Part]:
    hidden, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    return [
        *(_linear(f"{at}.attention.self.{name}", "attention", hidden, hidden) for name in ("query", "key", "value")),
        Attention(
            name=f"{at}.attention.self", component="attention", causal=causal,
            num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        ),
        _linear(f"{at}.attention.output.dense", "attention", hidden, hidden),
        Elementwise(name=f"{at}.attention.output.add", component="attention", size=hidden, kind="add", flops_per_element=1),
        Norm(name=f"{at}.attention.output.LayerNorm", component="norm", size=hidden, kind="layernorm"),
        _linear(f"{at}.intermediate.dense", "mlp", hidden, ffn),
        activation(f"{at}.intermediate.intermediate_act_fn", act, ffn),
        _linear(f"{at}.output.dense", "mlp", ffn, hidden),
        Elementwise(name=f"{at}.output.add", component="mlp", size=hidden, kind="add", flops_per_element=1),
        Norm(name=f"{at}.output.LayerNorm", component="norm", size=hidden, kind="layernorm"),
    ]  # fmt: skip


def _head(architecture: str, prefix: str, c: Mapping[str, int], config: Mapping[str, Any]) -> list[Part]:
    hidden, labels = c["hidden_size"], _labels(config)
    pooler: list[Part] = [
        _linear(f"{prefix}pooler.dense", "pooler", hidden, hidden, rows="sequence"),
        Elementwise(name=f"{prefix}pooler.activation", component="pooler", size=hidden, kind="tanh", flops_per_element=1, rows="sequence"),
    ]
    next_sentence = _linear("cls.seq_relationship", "head", hidden, 2, rows="sequence")
    heads: dict[str, list[Part]] = {
        "BertModel": pooler,
        "BertForSequenceClassification": [*pooler, _linear("classifier", "head", hidden, labels, rows="sequence")],
        "BertForNextSentencePrediction": [*pooler, next_sentence],
        "BertForPreTraining": [*pooler, *_masked_lm(c, config), next_sentence],
        "BertForMaskedLM": _masked_lm(c, config),
        "BertLMHeadModel": [replace(part, rows="logits") for part in _masked_lm(c, config)],
        "BertForTokenClassification": [_linear("classifier", "head", hidden, labels)],
        "BertForQuestionAnswering": [_linear("qa_outputs", "head", hidden, labels)],
    }
    return heads[architecture]


def _masked_lm(c: Mapping[str, int], config: Mapping[str, Any]) -> list[Part]:
    hidden = c["hidden_size"]
    return [
        _linear("cls.predictions.transform.dense", "head", hidden, hidden),
        activation("cls.predictions.transform.transform_act_fn", str(config.get("hidden_act", "gelu")), hidden),
        Norm(name="cls.predictions.transform.LayerNorm", component="head", size=hidden, kind="layernorm"),
        _MaskedLMDecoder(
            name="cls.predictions.decoder", component="head", in_features=hidden, out_features=c["vocab_size"], bias=True,
            tied_to="bert.embeddings.word_embeddings" if config.get("tie_word_embeddings", True) else None,
        ),
    ]  # fmt: skip


class _MaskedLMDecoder(Linear):
    """A tied one keeps its bias one level up; `transformers` has one there without use where it is not tied."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        found = super().tensors()
        if self.tied_to:
            del found[f"{self.name}.bias"]
        return found | {f"{self.name.removesuffix('decoder')}bias": (self.out_features,)}


def _labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ModelError("config.json: id2label is not a table of numbers and names.")
    return optional(config, "num_labels") or len(names) or 2


FAMILIES = {"bert": Family(describe=describe, architectures=(*ARCHITECTURES, *NEXT_SENTENCE))}
