"""The artifact of OpenVINO: `openvino_model.xml` and `.bin`, weights as float32, float16, 8- or 4-bit codes, or static int8 with activations.

The graph is OpenVINO's own conversion of the ONNX export. Codes and scales of a recipe are written into it as they are, in the operators that
the CPU plugin takes for compressed weights: Constant(codes) → Convert → Subtract(zero point) → Multiply(scale) → Reshape → Convert. Weights of
`quantize(dynamic)` are rounded by NNCF, those of `quantize(static)` by `openvino_static.py`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from lighten.compress.grid import Quantized, QuantizedTensor, to_groups
from lighten.errors import RecipeError
from lighten.formats import files
from lighten.formats.onnx_export import dense_weights, digest, tensor_table, write_onnx
from lighten.formats.openvino_rewrite import join_heads, scale_queries
from lighten.formats.openvino_state import keep_state
from lighten.formats.openvino_static import quantize_static, quantize_tables
from lighten.formats.static_rounding import Batch
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat
from lighten.model.tasks import runs_with_head

Array: TypeAlias = np.ndarray[Any, Any]


def write_openvino(
    exported: Path,
    weights: Mapping[str, Tensor | Quantized],
    spec: ModelSpec,
    folder: Path,
    *,
    calibration: Sequence[Batch] | None,
    keeps_last: bool = True,
) -> None:
    """Write `folder/openvino_model.xml` and its `.bin`.

    A decoder keeps its keys and values inside (a stateful model), so that no step copies them.

    Args:
        weights: by tensor name.
        calibration: inputs, where the spec has static activations.
        keeps_last: a decoder takes `logits_to_keep`, which other programs do not give.
    """
    import openvino

    plain = folder / "plain.onnx"
    values = dense_weights(weights, spec)
    write_onnx(exported, values, plain)
    with _quiet():
        model = openvino.convert_model(plain)
        if spec.is_decoder:
            keep_state(model, spec, keeps_last=keeps_last)
        by_runtime = {
            p.name: p.weight for p in spec.parts
            if isinstance(p, Linear | Embedding) and p.weight.bits and isinstance(weights.get(f"{p.name}.weight"), Tensor)
        }  # fmt: skip
        if any(weight.activations == "static" for weight in by_runtime.values()):
            if not calibration:
                raise RecipeError("quantize(static) needs calibration text, and none was given.")
            quantize_static(model, calibration)
            quantize_tables(model)
        elif by_runtime:
            model = _compress(model, values, by_runtime)
        elif not spec.is_decoder and all(isinstance(weight, Tensor) for weight in weights.values()):
            scale_queries(model)
            join_heads(model)
        _put_codes(model, {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}, values, spec)
        openvino.save_model(model, folder / files.OPENVINO, compress_to_fp16=spec.dtype == "float16")
    del model
    for path in folder.glob("plain.onnx*"):
        path.unlink()


# the recipe's own codes


def _put_codes(model: Any, weights: Mapping[str, QuantizedTensor], values: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Put codes and scales in the place of each constant that holds a quantized weight's values.

    Raises:
        RecipeError: a weight that the graph does not hold as one constant.
    """
    table = tensor_table((name, values[name]) for name in weights)
    found = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) != 2:
            continue
        place = table.get(digest(np.asarray(node.data, dtype=np.float32)))
        if place is None:
            continue
        name, turned = place
        expanded = _expanded(weights[name], turned=turned, name=node.get_friendly_name())
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(expanded.output(0))
        found.add(name)
    same = {digest(values[name].detach().float().numpy()) for name in found}
    if lost := sorted(name for name in weights.keys() - found if digest(values[name].detach().float().numpy()) not in same and _exported(name, spec)):
        raise RecipeError(f"{len(lost)} quantized weights are not in the exported graph as they are ({lost[0]}); runtime torch carries them.")


def _exported(name: str, spec: ModelSpec) -> bool:
    """An encoder is exported without its pooler and head, but where both classify or answer."""
    return runs_with_head(spec) or (not name.startswith(("pooler.", "cls.", "lm_head.", "classifier.")) and ".pooler." not in name)


def _expanded(weight: QuantizedTensor, *, turned: bool, name: str) -> Any:
    """The operators that dequantize a weight, float32 [O, I], or [I, O] where the graph holds it turned."""
    import openvino
    from openvino import opset13 as op

    groups = to_groups(weight.codes, weight.group_size).numpy()
    scale, zero = weight.scale.float().numpy()[..., None], None if weight.zero_point is None else weight.zero_point.numpy()[..., None]
    if turned and groups.shape[0] > 1:
        groups, scale = groups.transpose(1, 2, 0), scale.transpose(1, 2, 0)
        zero = None if zero is None else zero.transpose(1, 2, 0)
    shape = list(weight.codes.shape[::-1] if turned else weight.codes.shape)
    if groups.shape[0] == 1 and scale.size == 1:  # by tensor
        groups = (weight.codes.T if turned else weight.codes).numpy()
        scale, zero = scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    elif scale.shape[0 if turned else 1] == 1:  # by channel: two dimensions do
        axis = 0 if turned else 1
        groups, scale, zero = groups.squeeze(axis), scale.squeeze(axis), None if zero is None else zero.squeeze(axis)
    half = openvino.Type.f16
    value = op.convert(_codes(groups, weight, signed=zero is None), half)
    if zero is not None:
        value = op.subtract(value, op.convert(_codes(zero, weight, signed=False), half))
    value = op.multiply(value, openvino.op.Constant(np.ascontiguousarray(scale, np.float16)))
    if len(groups.shape) == 3:
        value = op.reshape(value, op.constant(np.array(shape, np.int64)), False)
    value = op.convert(value, openvino.Type.f32)
    value.set_friendly_name(f"{name}/expanded")
    return value


def _codes(codes: Array, weight: QuantizedTensor, *, signed: bool) -> Any:
    """A constant of 8- or 4-bit codes; about 0 where they are signed."""
    import openvino

    if signed:
        codes = (codes.astype(np.int16) - 2 ** (weight.bits - 1)).astype(np.int8)
    if weight.bits == 8:
        return openvino.op.Constant(np.ascontiguousarray(codes))
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(15)
    flat = np.pad(flat, (0, len(flat) % 2))
    kind = openvino.Type.i4 if signed else openvino.Type.u4
    packed = openvino.Tensor(np.ascontiguousarray(flat[0::2] | flat[1::2] << np.uint8(4)), openvino.Shape(codes.shape), kind)
    return openvino.op.Constant(packed, shared_memory=False)  # else the array's memory is read after it is gone


# the runtime's own quantizer


def _compress(model: Any, weights: Mapping[str, Tensor], formats: Mapping[str, WeightFormat]) -> Any:
    """Each distinct format in one pass of NNCF that leaves all other weights alone."""
    import nncf

    consumers = list(weight_consumers(model, weights))
    with _quiet_nncf():
        for weight in dict.fromkeys(formats.values()):
            mode = getattr(nncf.CompressWeightsMode, f"INT{weight.bits}_{'SYM' if weight.symmetric else 'ASYM'}")
            others = [node for node, tensor in consumers if formats.get(tensor.removesuffix(".weight")) != weight]
            model = nncf.compress_weights(model, mode=mode, ignored_scope=nncf.IgnoredScope(names=others, validate=False))
    return model


def weight_consumers(model: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(operator, tensor) for each operator of the graph that reads a matrix of `weights`, matched by content."""
    table = tensor_table((name, tensor) for name, tensor in weights.items() if tensor.ndim == 2)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) != 2:
            continue
        place = table.get(digest(np.asarray(node.data, dtype=np.float32)))
        if place is not None:
            yield from ((target.get_node().get_friendly_name(), place[0]) for target in node.output(0).get_target_inputs())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """OpenVINO prints progress; what fails raises."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[None]:
    """NNCF prints tables; what fails raises."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    yield
