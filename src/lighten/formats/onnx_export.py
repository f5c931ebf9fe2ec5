"""Export a model to ONNX once, and write it again with other weights as often as a recipe asks.

Encoder: (input_ids [B, S], attention_mask [B, S]) → last_hidden_state [B, S, D]; with a head that classifies also → logits [B, L], with one that
answers → start_logits and end_logits [B, S], and either takes token_type_ids [B, S] where it tells two texts apart.
Decoder: (input_ids [B, Q], attention_mask [B, P + Q], position_ids [B, Q], past.N.key and past.N.value [B, H, P, D]) → logits [B, Q, V] and
present.N.key, present.N.value [B, H, P + Q, D].
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lighten.compress.grid import Quantized
from lighten.formats.graph_inputs import DECODER_INPUTS, HIDDEN, TYPES, cache_names, encoder_inputs, encoder_outputs, kv_shape
from lighten.formats.torch_model import load_module, run_encoder
from lighten.model.spec import Linear, ModelSpec
from lighten.trace.onnx_weights import SCOPES

INLINE_BYTES = 1_800_000_000
"""Weights above this lie in a file beside the graph: a protobuf file holds less than 2 GiB (protobuf's own limit)."""

MASKED = -65504.0
"""Added to the scores of keys that are not seen: the least float16, of which the exponential is 0 in every type, and finite in all."""


def export_onnx(folder: Path, spec: ModelSpec, path: Path) -> None:
    """Write `path` with the folder's weights in float32, and beside it `path.weights.json`: which initializer holds which tensor.

    Eager attention is exported: runtimes recognise and fuse its products and softmax.
    """
    module = load_module(folder, spec, dtype="float32", attention="eager")
    wrapped, inputs, names, outputs, shapes = _decoder(module, spec) if spec.is_decoder else _encoder(module, spec)
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            wrapped, inputs, path, dynamo=True, input_names=names, output_names=outputs, dynamic_shapes=shapes,
            external_data=module.num_parameters() * 4 > INLINE_BYTES, verbose=False,
        )  # fmt: skip
    _trim(path)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(_places(path, _by_checkpoint_names(module, spec))))
    beside.replace(path.with_suffix(".weights.json"))


def is_exported(path: Path) -> bool:
    """Whether an export is there and whole: the list of its weights is written last."""
    return path.with_suffix(".weights.json").is_file()


def write_onnx(exported: Path, weights: Mapping[str, Tensor], path: Path, *, rewrite: Callable[[Any], object] | None = None) -> None:
    """Write an exported graph with the given tensors in place of those that it was exported with.

    Args:
        rewrite: changes the graph in place, when the tensors are in it.
    """
    import onnx

    model = onnx.load(exported)
    places = json.loads(exported.with_suffix(".weights.json").read_text())
    for initializer in model.graph.initializer:
        if initializer.name in places:
            name, transposed = places[initializer.name]
            value = weights[name].float().numpy()
            _replace(initializer, value.T if transposed else value)
    if rewrite is not None:
        rewrite(model)
    large = sum(len(initializer.raw_data) for initializer in model.graph.initializer) > INLINE_BYTES
    onnx.save(model, path, save_as_external_data=large, location=path.name + ".data")


def dense_weights(weights: Mapping[str, Tensor | Quantized], spec: ModelSpec) -> dict[str, Tensor]:
    """The weights as a checkpoint lays them out, quantized ones dequantized to float32."""
    turned = {f"{part.name}.weight" for part in spec.parts if isinstance(part, Linear) and part.transposed}

    def dense(name: str, weight: Tensor | Quantized) -> Tensor:
        if isinstance(weight, Tensor):
            return weight
        return weight.dequantize().T.contiguous() if name in turned else weight.dequantize()

    return {name: dense(name, weight) for name, weight in weights.items()}


def tensor_table(weights: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, bool]]:
    """Digest of a tensor's float32 bytes → (its name, the first of equals, and whether the digest is of its transpose)."""
    table: dict[str, tuple[str, bool]] = {}
    for name, tensor in weights:
        value = tensor.detach().float().numpy()
        table.setdefault(digest(value), (name, False))
        if value.ndim == 2:
            table.setdefault(digest(value.T), (name, True))
    return table


def digest(value: np.ndarray[Any, Any]) -> str:
    """A fingerprint of shape and bytes."""
    return hashlib.sha256(repr(value.shape).encode() + np.ascontiguousarray(value).tobytes()).hexdigest()


def _trim(path: Path) -> None:
    """Keep which module each node comes from, drop what else an exporter says of it: most of a graph's bytes, with paths of this machine."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for each in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        scopes = [entry for entry in each.metadata_props if entry.key == SCOPES]
        each.ClearField("metadata_props")
        each.metadata_props.extend(scopes)
        each.ClearField("doc_string")
    onnx.save(model, path)


def _by_checkpoint_names(module: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """The module's weights as the checkpoint names them: the body of a model with a task head stands there under a prefix."""
    known = {name for part in spec.parts for name in part.tensors()}
    named = ((name if name in known else f"{module.base_model_prefix}.{name}", tensor) for name, tensor in module.state_dict().items())
    return {name: tensor for name, tensor in named if name in known}


def _places(path: Path, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, bool]]:
    """Initializer → (tensor, transposed), matched by content: exporters fold transposes and rename what they fold."""
    import onnx
    from onnx import numpy_helper

    table = tensor_table(weights.items())
    base = str(path.parent)
    found = ((i.name, table.get(digest(numpy_helper.to_array(i, base)))) for i in onnx.load(path).graph.initializer if i.data_type == 1)
    return {name: place for name, place in found if place is not None}


def _replace(initializer: Any, value: np.ndarray[Any, Any]) -> None:
    from onnx import numpy_helper

    initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), initializer.name))


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module, outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        masked = torch.where(attention_mask[:, None, None] == 0, MASKED, 0.0)  # [B, 1, 1, S]; its class would look up a table for each query too
        inputs = {"input_ids": input_ids, "attention_mask": masked}
        hidden, output = run_encoder(self.model, inputs if token_type_ids is None else inputs | {TYPES: token_type_ids})
        return tuple(hidden if name == HIDDEN else output[name] for name in self.outputs)


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        from transformers import DynamicCache

        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def _encoder(module: nn.Module, spec: ModelSpec) -> tuple[Any, ...]:
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    ids = np.zeros((2, 16), np.int64)
    inputs = {name: torch.from_numpy(value) for name, value in encoder_inputs(spec, ids, np.ones_like(ids)).items()}
    shapes = {name: {0: batch, 1: length} for name in inputs}
    return _Encoder(module, encoder_outputs(spec)), tuple(inputs.values()), list(inputs), encoder_outputs(spec), shapes


def _decoder(module: nn.Module, spec: ModelSpec) -> tuple[Any, ...]:
    heads, head_dim, layers = kv_shape(spec)
    batch, auto = torch.export.Dim("batch", min=1), torch.export.Dim.AUTO
    b, q, p = 2, 3, 5  # any sizes that differ from each other and from 0 and 1, which an export takes for constants
    past = [(torch.zeros(b, heads, p, head_dim), torch.zeros(b, heads, p, head_dim)) for _ in range(layers)]
    ids = torch.zeros(b, q, dtype=torch.int64)
    inputs = (ids, torch.ones(b, p + q, dtype=torch.int64), torch.arange(p, p + q)[None].expand(b, q), past)
    shapes = {name: {0: batch, 1: auto} for name in DECODER_INPUTS} | {"past": [({0: batch, 2: auto}, {0: batch, 2: auto})] * layers}
    names = [*DECODER_INPUTS, *cache_names(layers, "past")]
    return _Decoder(module), inputs, names, ["logits", *cache_names(layers, "present")], shapes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print progress and warn about their own internals; an export that fails raises."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
