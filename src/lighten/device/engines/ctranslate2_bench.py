"""Synthetic models in CTranslate2, which runs models and no operators: those that single operators stand for are torch's, in float32.

What its own products, fused layers and calls take beside them is what the blocks calibrate (`calibration.BORROWED_PRIOR_SPREAD`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import torch

from lighten.device.cases import DECODERS, Case, in_graphs
from lighten.device.engines.ctranslate2_load import first_tokens
from lighten.device.engines.torch_bench import TorchBench
from lighten.model.read import config_spec
from lighten.model.spec import ModelSpec

WHOLE = ("block", "decoder", "stack")
POSITIONS, VOCABULARY = 512, 64
"""A head of 64 tokens takes nothing beside the layers."""


def open_bench(engine: str, threads: int) -> CTranslate2Bench:
    return CTranslate2Bench(engine, threads)


class CTranslate2Bench(TorchBench):
    def __init__(self, engine: str, threads: int) -> None:
        super().__init__("torch/float32", threads)
        self.quantized, self.threads = engine.endswith("/int8"), threads
        self.version = ctranslate2.__version__
        self.models: dict[Case, Callable[[tuple[int, int]], Callable[[], object]]] = {}

    def cases(self, wanted: Sequence[Case]) -> list[Case]:
        return [*in_graphs(wanted), *(case for case in wanted if case.kind == "decoder" and case.shape in DECODERS)]

    def runner(self, case: Case, size: tuple[int, ...]) -> Callable[[], object]:
        if case.kind not in WHOLE:
            return super().runner(case, size)
        if case not in self.models:
            with tempfile.TemporaryDirectory(prefix="lighten-probe-") as folder:
                self.models[case] = first_tokens(self.store(case, Path(folder))[0], self.threads, decoder=case.kind == "decoder")
        batch, length = size
        return self.models[case]((batch, length))

    def store(self, case: Case, folder: Path) -> tuple[Path, int]:
        from lighten.formats.ctranslate2_model import write_ctranslate2
        from lighten.formats.files import CTRANSLATE2
        from lighten.recipe import apply_recipe, parse_recipe

        spec = synthetic_spec(case)
        random = {name: torch.randn(shape) / shape[-1] ** 0.5 for part in spec.parts for name, shape in part.tensors().items()}
        if self.quantized:
            spec = apply_recipe(parse_recipe("quantize(dynamic, embeddings=true) @ ctranslate2"), spec)
        out = folder / case.name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        write_ctranslate2(random, spec, out, out)
        return out / CTRANSLATE2, (out / CTRANSLATE2 / "model.bin").stat().st_size


def synthetic_spec(case: Case) -> ModelSpec:
    """A case as a whole model: a BERT of its layers, a Llama of a decoder's; a stack as so many layers of as wide a BERT."""
    if case.kind == "decoder":
        hidden, heads, shared, inner, layers = case.shape
        own: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": shared, "hidden_act": "silu", "rms_norm_eps": 1e-5
        }  # fmt: skip
    else:
        hidden, heads, inner, layers = case.shape if case.kind == "block" else (case.shape[0], case.shape[0] // 16, *case.shape[1:])
        own = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "type_vocab_size": 2}
    sizes = {
        "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    return config_spec(own | sizes, name="synthetic", source="the probe")
