"""The artifact of CTranslate2: `ctranslate2/model.bin` with its config and vocabulary, in float32 or in 8-bit codes by channel.

CTranslate2 has no graph: a model is a tree of named variables for layers that it knows, and a weight is either float or int8 throughout, with
activations rounded to int8 by token. Its file says weight = code / weight_scale, with codes about 0; query, key and value are one product. A
table and the head that shares it are stored once.

Source: the `ctranslate2` package, `specs/transformer_spec.py` and `specs/model_spec.py` (4.8).

Shape legend: O rows (output features), I columns (input features), V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.grid import Quantized, QuantizedTensor
from lighten.errors import RecipeError
from lighten.formats.files import CTRANSLATE2
from lighten.model.spec import Embedding, Linear, ModelSpec

Weights: TypeAlias = Mapping[str, Tensor | Quantized]

ACTIVATIONS = {
    "relu": "RELU", "gelu": "GELU", "gelu_new": "GELUTanh", "gelu_pytorch_tanh": "GELUTanh", "quick_gelu": "GELUSigmoid", "silu": "SWISH",
    "swish": "SWISH", "tanh": "Tanh",
}  # fmt: skip
"""Hugging Face's name of an activation → its name in `ctranslate2.specs.common_spec.Activation`."""


def refuse_ctranslate2(spec: ModelSpec) -> None:
    """Raises:
    RecipeError: what CTranslate2's layers cannot say of this model.
    """
    config = spec.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if spec.is_decoder and kind != "default":
        raise RecipeError(
            f"runtime ctranslate2 is written without scaled rotary positions, and {spec.name} has {kind!r}; openvino or torch have them."
        )
    if (activation := str(config["hidden_act"])) not in ACTIVATIONS:
        raise RecipeError(f"runtime ctranslate2 has no activation {activation!r}; it has: {', '.join(ACTIVATIONS)}.")
    if not spec.is_decoder and config.get("position_embedding_type", "absolute") != "absolute":
        raise RecipeError(f"runtime ctranslate2 has absolute positions for encoders, and {spec.name} has {config['position_embedding_type']!r}.")


def write_ctranslate2(weights: Weights, spec: ModelSpec, source: Path, folder: Path) -> None:
    """Write `folder/ctranslate2/`. What the recipe left to the runtime (`quantize(dynamic)`) CTranslate2's own quantizer rounds.

    Args:
        weights: by tensor name.
        source: a folder with the tokenizer, whose tokens name the vocabulary's.
    """
    model = _decoder(weights, spec) if spec.is_decoder else _encoder(weights, spec)
    tokens = vocabulary(source, int(spec.config["vocab_size"]))
    model.register_vocabulary(tokens)
    model.config.unk_token = tokens[0]
    model.config.bos_token = _token(tokens, spec.config.get("bos_token_id"))
    model.config.eos_token = _token(tokens, spec.config.get("eos_token_id"))
    model.validate()
    parts = [part for part in spec.parts if isinstance(part, Linear | Embedding) and part.weight.bits and part.tensors()]
    by_runtime = bool(parts) and all(isinstance(weights[f"{part.name}.weight"], Tensor) for part in parts)
    model.optimize("int8" if by_runtime else None)
    out = folder / CTRANSLATE2
    out.mkdir()
    model.save(str(out))


def vocabulary(source: Path, count: int) -> list[str]:
    """A name for each of `count` tokens, all different: the tokenizer's where there is one and it has one."""
    path, named = source / "tokenizer.json", dict[int, str]()
    if path.is_file():
        said = json.loads(path.read_text())
        held = said.get("model", {}).get("vocab", {})
        named = {place: text for text, place in held.items()} if isinstance(held, dict) else {place: text for place, (text, _) in enumerate(held)}
        named |= {added["id"]: added["content"] for added in said.get("added_tokens", [])}
    return [named.get(place, f"<unused_{place}>") for place in range(count)]


def _token(tokens: Sequence[str], place: Any) -> str:
    place = place[0] if isinstance(place, list) else place
    return tokens[place] if isinstance(place, int) and 0 <= place < len(tokens) else tokens[0]


def _decoder(weights: Weights, spec: ModelSpec) -> Any:
    """A Llama model as CTranslate2 says it."""
    from ctranslate2.specs import transformer_spec
    from ctranslate2.specs.common_spec import Activation

    config = spec.config
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    model = transformer_spec.TransformerDecoderModelSpec.from_config(
        int(config["num_hidden_layers"]), heads, activation=Activation[ACTIVATIONS[config["hidden_act"]]], pre_norm=True, ffn_glu=True, rms_norm=True,
        rotary_dim=0, rotary_interleave=False, rotary_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        num_heads_kv=None if shared == heads else shared, head_dim=None if head_dim * heads == config["hidden_size"] else head_dim,
    )  # fmt: skip
    model.config.layer_norm_epsilon = float(config["rms_norm_eps"])
    decoder = model.decoder
    decoder.scale_embeddings = False
    put = _Putter(weights)
    put.matrix(decoder.embeddings, "model.embed_tokens")
    put.norm(decoder.layer_norm, "model.norm")
    put.linear(decoder.projection, "lm_head" if "lm_head.weight" in weights else "model.embed_tokens")
    for number, layer in enumerate(decoder.layer):
        at = f"model.layers.{number}"
        put.norm(layer.self_attention.layer_norm, f"{at}.input_layernorm")
        put.linear(layer.self_attention.linear[0], *(f"{at}.self_attn.{name}_proj" for name in "qkv"))
        put.linear(layer.self_attention.linear[1], f"{at}.self_attn.o_proj")
        put.norm(layer.ffn.layer_norm, f"{at}.post_attention_layernorm")
        put.linear(layer.ffn.linear_0, f"{at}.mlp.gate_proj")
        put.linear(layer.ffn.linear_0_noact, f"{at}.mlp.up_proj")
        put.linear(layer.ffn.linear_1, f"{at}.mlp.down_proj")
    return model


def _encoder(weights: Weights, spec: ModelSpec) -> Any:
    """The body of a BERT model as CTranslate2 says it."""
    from ctranslate2.specs import transformer_spec
    from ctranslate2.specs.common_spec import Activation, EmbeddingsMerge

    config = spec.config
    activation = Activation[ACTIVATIONS[config["hidden_act"]]]
    encoder = transformer_spec.TransformerEncoderSpec(
        int(config["num_hidden_layers"]), int(config["num_attention_heads"]), pre_norm=False, activation=activation, layernorm_embedding=True,
        num_source_embeddings=2, embeddings_merge=EmbeddingsMerge.ADD,
    )  # fmt: skip
    encoder.scale_embeddings = False
    model = transformer_spec.TransformerEncoderModelSpec(encoder, pooling_layer=False)
    model.config.layer_norm_epsilon = float(config["layer_norm_eps"])
    body = next(name for name in weights if name.endswith("embeddings.word_embeddings.weight")).removesuffix("embeddings.word_embeddings.weight")
    put = _Putter(weights)
    put.matrix(encoder.embeddings[0], f"{body}embeddings.word_embeddings")
    kinds = put.floats(f"{body}embeddings.token_type_embeddings.weight")
    encoder.embeddings[1].weight = kinds - kinds[0]  # of which the first is exact in 8 bits too: all tokens of one text have it
    encoder.position_encodings.encodings = put.floats(f"{body}embeddings.position_embeddings.weight") + kinds[0]
    put.norm(encoder.layernorm_embedding, f"{body}embeddings.LayerNorm")
    for number, layer in enumerate(encoder.layer):
        at = f"{body}encoder.layer.{number}"
        put.linear(layer.self_attention.linear[0], *(f"{at}.attention.self.{name}" for name in ("query", "key", "value")))
        put.linear(layer.self_attention.linear[1], f"{at}.attention.output.dense")
        put.norm(layer.self_attention.layer_norm, f"{at}.attention.output.LayerNorm")
        put.linear(layer.ffn.linear_0, f"{at}.intermediate.dense")
        put.linear(layer.ffn.linear_1, f"{at}.output.dense")
        put.norm(layer.ffn.layer_norm, f"{at}.output.LayerNorm")
    return model


class _Putter:
    """Puts weights into the variables of CTranslate2's layers."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def matrix(self, layer: Any, *names: str) -> None:
        """[O, I] of each name, one below the other."""
        found = [self._weights[f"{name}.weight"] for name in names]
        if all(isinstance(weight, QuantizedTensor) for weight in found):
            layer.weight = np.concatenate([(weight.codes.numpy().astype(np.int16) - 128).astype(np.int8) for weight in found])  # type: ignore[union-attr]
            layer.weight_scale = np.concatenate([1 / weight.scales().numpy().reshape(-1) for weight in found])  # type: ignore[union-attr]
        else:
            layer.weight = np.concatenate([_floats(weight) for weight in found])

    def linear(self, layer: Any, *names: str) -> None:
        self.matrix(layer, *names)
        biases = [self._weights.get(f"{name}.bias") for name in names]
        if any(bias is not None for bias in biases):
            layer.bias = np.concatenate([np.zeros(len(self.floats(f"{name}.weight")), np.float32) if bias is None else _floats(bias)
                                         for name, bias in zip(names, biases, strict=True)])  # fmt: skip

    def norm(self, layer: Any, name: str) -> None:
        layer.gamma = self.floats(f"{name}.weight")
        if f"{name}.bias" in self._weights:
            layer.beta = self.floats(f"{name}.bias")

    def floats(self, name: str) -> np.ndarray[Any, Any]:
        return _floats(self._weights[name])


def _floats(weight: Tensor | Quantized) -> np.ndarray[Any, Any]:
    value: np.ndarray[Any, Any] = (weight if isinstance(weight, Tensor) else weight.dequantize()).detach().to(torch.float32).numpy()
    return value
