"""Synthetic models in CTranslate2, which runs models and no operators: those that single operators stand for are torch's, in float32.

What its own products, fused layers and calls take beside them is what the blocks calibrate (`calibration.BORROWED_PRIOR_SPREAD`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighten.device.cases import Case, in_graphs
from lighten.device.engines.torch_bench import TorchBench

WHOLE = ("block", "decoder", "stack")
POSITIONS, VOCABULARY = 512, 64
"""A head of 64 tokens takes nothing beside the layers."""


def open_bench(engine: str, threads: int) -> CTranslate2Bench:
    return CTranslate2Bench(engine, threads)


class CTranslate2Bench(TorchBench):
    def __init__(self, engine: str, threads: int) -> None:
        super().__init__("torch/float32", threads)
        import ctranslate2  # after torch: each has an OpenMP of its own, and where this one's came first, torch's threads shared one core

        self.quantized, self.threads = engine.endswith("/int8"), threads
        self.version = ctranslate2.__version__
        self.models: dict[Case, Callable[[tuple[int, int]], Callable[[], object]]] = {}

    def cases(self, wanted: Sequence[Case]) -> list[Case]:
        return [*in_graphs(wanted), *(case for case in wanted if case.kind == "decoder")]

    def runner(self, case: Case, size: tuple[int, ...]) -> Callable[[], object]:
        if case.kind not in WHOLE:
            return super().runner(case, size)
        if case not in self.models:
            from lighten.device.engines.ctranslate2_load import first_tokens

            with tempfile.TemporaryDirectory(prefix="lighten-probe-") as folder:
                self.models[case] = first_tokens(self.store(case, Path(folder))[0], self.threads, decoder=case.kind == "decoder")
        batch, length = size
        return self.models[case]((batch, length))

    def store(self, case: Case, folder: Path) -> tuple[Path, int]:
        model = _decoder(*case.shape) if case.kind == "decoder" else _encoder(*_encoder_shape(case))
        model.register_vocabulary([f"<{token}>" for token in range(VOCABULARY)])
        model.config.unk_token = model.config.bos_token = model.config.eos_token = "<0>"
        model.validate()
        model.optimize("int8" if self.quantized else None)
        path = folder / case.name
        shutil.rmtree(path, ignore_errors=True)  # of another engine
        path.mkdir()
        model.save(str(path))
        return path, (path / "model.bin").stat().st_size


def _encoder_shape(case: Case) -> tuple[int, int, int, int]:
    """(hidden, heads, intermediate, layers); a stack as so many layers of its width."""
    if case.kind == "block":
        hidden, heads, inner, layers = case.shape
        return hidden, heads, inner, layers
    width, inner, pairs = case.shape
    return width, width // 16, inner, pairs


def _encoder(hidden: int, heads: int, inner: int, layers: int) -> Any:
    """BERT's layers after a table of tokens and one of positions."""
    from ctranslate2.specs.common_spec import Activation
    from ctranslate2.specs.transformer_spec import TransformerEncoderModelSpec, TransformerEncoderSpec

    encoder = TransformerEncoderSpec(layers, heads, pre_norm=False, activation=Activation.GELU, layernorm_embedding=True)
    encoder.scale_embeddings = False
    _put(encoder.embeddings[0], VOCABULARY, hidden)
    encoder.position_encodings.encodings = _random(POSITIONS, hidden)
    _norm(encoder.layernorm_embedding, hidden, bias=True)
    for layer in encoder.layer:
        _put(layer.self_attention.linear[0], 3 * hidden, hidden, bias=True)
        _put(layer.self_attention.linear[1], hidden, hidden, bias=True)
        _put(layer.ffn.linear_0, inner, hidden, bias=True)
        _put(layer.ffn.linear_1, hidden, inner, bias=True)
        for norm in (layer.self_attention.layer_norm, layer.ffn.layer_norm):
            _norm(norm, hidden, bias=True)
    return TransformerEncoderModelSpec(encoder, pooling_layer=False)


def _decoder(hidden: int, heads: int, shared: int, inner: int, layers: int) -> Any:
    """Llama's layers, with a head of as few tokens as the table has."""
    from ctranslate2.specs.common_spec import Activation
    from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

    model = TransformerDecoderModelSpec.from_config(
        layers, heads, activation=Activation.SWISH, pre_norm=True, ffn_glu=True, rms_norm=True, rotary_dim=0, rotary_interleave=False,
        rotary_base=10_000.0, num_heads_kv=None if shared == heads else shared,
    )  # fmt: skip
    decoder, keys = model.decoder, hidden // heads * shared
    decoder.scale_embeddings = False
    _put(decoder.embeddings, VOCABULARY, hidden)
    _put(decoder.projection, VOCABULARY, hidden)
    _norm(decoder.layer_norm, hidden)
    for layer in decoder.layer:
        _put(layer.self_attention.linear[0], hidden + 2 * keys, hidden)
        _put(layer.self_attention.linear[1], hidden, hidden)
        _put(layer.ffn.linear_0, inner, hidden)
        _put(layer.ffn.linear_0_noact, inner, hidden)
        _put(layer.ffn.linear_1, hidden, inner)
        for norm in (layer.self_attention.layer_norm, layer.ffn.layer_norm):
            _norm(norm, hidden)
    return model


def _random(*shape: int) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
    return values


def _put(layer: Any, outputs: int, columns: int, *, bias: bool = False) -> None:
    layer.weight = _random(outputs, columns)
    if bias:
        layer.bias = np.zeros(outputs, np.float32)


def _norm(layer: Any, size: int, *, bias: bool = False) -> None:
    layer.gamma = np.ones(size, np.float32)
    if bias:
        layer.beta = np.zeros(size, np.float32)
