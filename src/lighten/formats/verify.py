"""Every artifact is loaded back and compared before it is called done: tensor by tensor, and by what it puts out.

Tensors: while weights go to the writer, a digest of each is kept; the files are read with the same code that loads an artifact, and give the
same digests. No tensor is held twice, and one at a time.

Output: a small seeded input goes through the artifact, and through the original class with the dequantized weights put into it. The relative
error ‖y' - y‖ / ‖y‖ (Frobenius) of what they put out stays below a limit of the format (`TOLERANCES`).

Legend: B batch_size, S length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lighten.compress.grid import Quantized, QuantizedTensor
from lighten.compress.memory_plan import release_free, run_dtype
from lighten.errors import OutputError
from lighten.formats import files
from lighten.formats.graph_inputs import HIDDEN, LOGITS, decoder_inputs, empty_cache, encoder_inputs, encoder_outputs, stateful_inputs
from lighten.formats.safetensors_folder import StoredWeights, masked_weights, read_weights, stored_specs
from lighten.formats.settings import onnxruntime_settings
from lighten.model.read import read_folder
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.recipe.targets import RUNTIMES

Floats = NDArray[np.float32]

TOLERANCES = {"exact": 1e-5, "rounded": 1e-2, "float32": 1e-3, "float16": 1e-2, "int8": 0.25}
"""Largest relative error of the output. "exact": the same values in the same class and type; "rounded": the same with activations of 8 bits,
which a last bit of a sum may move to the next code; "float32": another runtime's order of sums;
"float16": weights that are stored in float16; "int8": activations of 8 bits that a runtime rounds in its own way, which moves
all-MiniLM-L6-v2 by 0.06 to 0.12 and random models of two layers by up to 0.15 (measured by tests/test_formats.py)."""
LENGTH = 16
"""Tokens of the seeded input, or the model's longest."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was compared.

    Attributes:
        tensors: read back and equal.
        output_error: relative error of the output; None where it was not compared.
        tolerance: what it was held to.
    """

    tensors: int
    output_error: float | None = None
    tolerance: float | None = None


class Witness:
    """Digests of the weights on their way to the writer of a folder."""

    def __init__(self, spec: ModelSpec, source: Path) -> None:
        self._types = {tensor.name: tensor.dtype for group in stored_specs(spec, source) for tensor in group}
        self._types |= {name: part.weight.dtype for name, part in masked_weights(spec).items()}
        self._quantized = {name for part in spec.parts if isinstance(part, Linear | Embedding) and part.weight.bits for name in part.tensors()}
        self.digests: dict[str, bytes] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor | Quantized]]) -> Iterator[tuple[str, Tensor | Quantized]]:
        """The same weights, each seen as it passes."""
        for name, weight in weights:
            if isinstance(weight, Tensor):
                if name in self._types:
                    self.digests[name] = digest_of(weight.to(getattr(torch, self._types[name])))
            elif name in self._quantized:
                self.digests[name] = digest_of(weight)
            yield name, weight


def digest_of(weight: Tensor | Quantized) -> bytes:
    """A fingerprint of type, shape and values; of codes and grid where a weight is quantized."""
    found = hashlib.blake2b(digest_size=16)
    pieces: Iterable[Tensor | None] = (weight,) if isinstance(weight, Tensor) else ()
    if isinstance(weight, QuantizedTensor):
        found.update(f"{weight.bits} {weight.group_size} {weight.element}".encode())
        pieces = (weight.codes, weight.scale, weight.zero_point, weight.global_scale, weight.input_scale)
    for piece in pieces:
        found.update(b"none" if piece is None else f"{piece.dtype} {tuple(piece.shape)}".encode())
        if piece is not None and piece.numel():
            found.update(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def verify_folder(folder: Path, witness: Witness, *, compare_output: bool = True) -> Verified:
    """Hold a folder of safetensors to what was given to its writer.

    Args:
        compare_output: the model fits in memory in its own type.

    Raises:
        OutputError: they differ; the folder is removed.
    """
    spec = read_folder(folder)
    found = {name: digest_of(weight) for name, weight in read_weights(folder, spec)}
    different = sorted(name for name in witness.digests.keys() | found.keys() if witness.digests.get(name) != found.get(name))
    if different:
        _refuse(folder, f"{len(different)} of {len(found)} tensors read back are not those that were written: {', '.join(different[:3])}")
    if not compare_output:
        return Verified(tensors=len(found))
    rounds = any(isinstance(part, Linear) and part.weight.activations for part in spec.parts)
    return _judged(folder, len(found), _folder_error(folder, spec), TOLERANCES["rounded" if rounds else "exact"])


def verify_graph(folder: Path, runtime: str, source: Path, spec: ModelSpec, values: Mapping[str, Tensor]) -> Verified:
    """Hold an exported graph to the original class with the same weights.

    Args:
        runtime: `onnxruntime` or `openvino`.
        spec: the model as it was predicted, whose weights are the artifact's.
        values: the weights, dequantized, as the checkpoint lays them out.

    Raises:
        OutputError: they differ by more than the format allows; the folder is removed.
    """
    from lighten.formats.torch_model import load_module

    ids, mask = seeded_input(spec)
    module = load_module(source, read_folder(source), dtype="float32", attention="eager")
    _fill(module, values)
    expected = _outputs_of(module, spec, ids, mask) if RUNTIMES[runtime].heads else [_run_body(module, spec, ids, mask)]
    del module
    found = GRAPHS[runtime](folder, spec, ids, mask)
    kept = mask.astype(bool)  # what a runtime leaves in the place of padding is its own affair
    errors = [relative_error(*(each[kept] if each.shape[:2] == kept.shape else each for each in pair)) for pair in zip(found, expected, strict=True)]
    return _judged(folder, 0, max(errors), _tolerance(spec))


def seeded_input(spec: ModelSpec) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[2, S] tokens and their mask, which leaves the last token of an encoder's second sequence out."""
    length = max(2, min(LENGTH, spec.max_positions or LENGTH))
    ids = np.random.default_rng(0).integers(5, int(spec.config["vocab_size"]), (2, length))
    mask = np.ones_like(ids)
    if not spec.is_decoder:
        mask[1, -1] = 0
    return ids, mask


def relative_error(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def _tolerance(spec: ModelSpec) -> float:
    weights = [part.weight for part in spec.parts if isinstance(part, Linear | Embedding)]
    if any(weight.activations for weight in weights):
        return TOLERANCES["int8"]
    return TOLERANCES["float16" if spec.dtype == "float16" else "float32"]


def _judged(folder: Path, tensors: int, error: float, tolerance: float) -> Verified:
    if not error <= tolerance:
        _refuse(folder, f"its output differs from that of the same weights in the original class by {error:.3g} of its size, above {tolerance:g}")
    return Verified(tensors=tensors, output_error=error, tolerance=tolerance)


def _refuse(folder: Path, why: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    raise OutputError(f"{folder} was written and does not agree with the weights that it was made from: {why}; it is removed. This is a bug.")


def _folder_error(folder: Path, spec: ModelSpec) -> float:
    """How far the loaded artifact is from its class with each tensor put to its place, both in the artifact's own type."""
    from lighten.formats.torch_model import load_any

    ids, mask = seeded_input(spec)
    dtype = run_dtype(spec)
    expected = _run_by_unit(folder, spec, getattr(torch, dtype), ids, mask)
    release_free()
    return relative_error(_run_module(load_any(folder, spec, dtype=dtype), spec, ids, mask), expected)


def _run_by_unit(folder: Path, spec: ModelSpec, dtype: torch.dtype, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
    """What a folder's class puts out, with the weights of one unit in memory at a time."""
    from lighten.compress.fake_quant import simulate_activations
    from lighten.compress.skeleton import Skeleton
    from lighten.formats.torch_model import input_scales

    stored = StoredWeights(folder, spec)
    skeleton = Skeleton(spec.config, {name: shape for part in spec.parts for name, shape in part.tensors().items()}, dtype=dtype)
    skeleton.module.set_attn_implementation("eager")
    simulate_activations(skeleton.module, spec, input_scales(folder, spec))
    for module in skeleton.outside():
        skeleton.load_own(module, stored.expanded)
    for unit in skeleton.units:
        unit.module.register_forward_pre_hook(lambda module, inputs: skeleton.load(module, stored.expanded), prepend=True)
        unit.module.register_forward_hook(lambda module, inputs, output: skeleton.drop(module))
    return _run_module(skeleton.module, spec, ids, mask)


def _fill(module: Any, values: Mapping[str, Tensor]) -> None:
    """Put weights into a module, each to the place that its name means."""
    from lighten.compress.skeleton import find_places

    state = module.state_dict()
    for name, place in find_places(module, {name: tuple(value.shape) for name, value in values.items()}).items():
        place.of(state[place.key]).copy_(values[name])


def _run_module(module: Any, spec: ModelSpec, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
    """[B, S, V] logits of a decoder, [B, S, D] hidden states of an encoder, or what comes first of another class."""
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if spec.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        output = module(**inputs)
    first = output["last_hidden_state"] if "last_hidden_state" in output else output["logits"] if "logits" in output else output[0]
    result: Floats = first.float().numpy()
    return result


def _outputs_of(module: Any, spec: ModelSpec, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[Floats]:
    """What the graph of a module puts out."""
    if spec.is_decoder:
        return [_run_module(module, spec, ids, mask)]
    from lighten.formats.torch_model import run_encoder

    inputs = {name: torch.from_numpy(value) for name, value in encoder_inputs(spec, ids, mask).items()}
    with torch.inference_mode():
        hidden, output = run_encoder(module, inputs)
    return [(hidden if name == HIDDEN else output[name]).float().numpy() for name in encoder_outputs(spec)]


def _run_body(module: Any, spec: ModelSpec, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
    return _run_module(module if spec.is_decoder else module.base_model, spec, ids, mask)


def _run_onnx(folder: Path, spec: ModelSpec, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[Floats]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in onnxruntime_settings(dynamic=False).items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(folder / files.ONNX, options, providers=["CPUExecutionProvider"])
    inputs = decoder_inputs(ids, 0) | empty_cache(spec, len(ids)) if spec.is_decoder else encoder_inputs(spec, ids, mask)
    output: list[Floats] = session.run([LOGITS] if spec.is_decoder else encoder_outputs(spec), inputs)
    return output


def _run_openvino(folder: Path, spec: ModelSpec, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[Floats]:
    import openvino

    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_NUM_THREADS": 1}
    if spec.is_decoder:
        properties["KV_CACHE_PRECISION"] = "f32"
    compiled = openvino.Core().compile_model(folder / files.OPENVINO, "CPU", properties)
    inputs, taken = stateful_inputs(ids, 0) if spec.is_decoder else encoder_inputs(spec, ids, mask), {each.get_any_name() for each in compiled.inputs}
    found = compiled({name: value for name, value in inputs.items() if name in taken})
    return [np.array(found[place]) for place in range(1 if spec.is_decoder else len(encoder_outputs(spec)))]


def _run_ctranslate2(folder: Path, spec: ModelSpec, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[Floats]:
    import ctranslate2

    kind = ctranslate2.Generator if spec.is_decoder else ctranslate2.Encoder
    model = kind(str(folder / files.CTRANSLATE2), device="cpu", inter_threads=1, intra_threads=1)
    views = [ctranslate2.StorageView.from_array(np.ascontiguousarray(value, np.int32)) for value in (ids, mask.sum(1))]
    if spec.is_decoder:
        return [np.array(model.forward_batch(*views))]
    return [np.array(model.forward_batch(*views, token_type_ids=np.zeros_like(ids).tolist()).last_hidden_state)]


GRAPHS = {"onnxruntime": _run_onnx, "openvino": _run_openvino, "ctranslate2": _run_ctranslate2}
"""Runtime → what it puts out for an exported artifact."""
