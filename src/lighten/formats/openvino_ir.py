"""The artifact of OpenVINO: `openvino_model.xml` and `.bin`, weights as float32, float16, 8- or 4-bit codes, or static int8 with activations.

The graph is OpenVINO's own conversion of the ONNX export; codes are NNCF's. NNCF rounds to the same grid as `quantize_rtn`, whose result
it is given, so it finds the same codes again; tests/test_formats.py holds it to that.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lighten.errors import RecipeError
from lighten.formats import files
from lighten.formats.onnx_export import cache_names, digest, kv_shape, tensor_table, write_onnx
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat

Batch = Mapping[str, np.ndarray[Any, Any]]


def write_openvino(exported: Path, weights: Mapping[str, Tensor], spec: ModelSpec, folder: Path, *, calibration: Sequence[Batch] | None) -> None:
    """Write `folder/openvino_model.xml` and its `.bin`.

    A decoder keeps its keys and values inside (a stateful model), so that no step copies them.

    Args:
        weights: by tensor name; quantized ones dequantized.
        calibration: inputs, where the spec has static activations.
    """
    import openvino

    plain = folder / "plain.onnx"
    write_onnx(exported, weights, plain)
    with _quiet():
        model = openvino.convert_model(plain)
        if spec.is_decoder:
            _keep_state(model, spec)
        formats = {p.name: p.weight for p in spec.parts if isinstance(p, Linear | Embedding) and p.weight.bits and f"{p.name}.weight" in p.tensors()}
        if any(weight.activations == "static" for weight in formats.values()):
            model = _quantize_static(model, calibration)
        elif formats:
            model = _compress(model, weights, formats)
        openvino.save_model(model, folder / files.OPENVINO, compress_to_fp16=spec.dtype == "float16")
    del model
    for path in folder.glob("plain.onnx*"):
        path.unlink()


def _keep_state(model: Any, spec: ModelSpec) -> None:
    from openvino._offline_transformations import apply_make_stateful_transformation

    layers = kv_shape(spec)[2]
    apply_make_stateful_transformation(model, dict(zip(cache_names(layers, "past"), cache_names(layers, "present"), strict=True)))


def _quantize_static(model: Any, calibration: Sequence[Batch] | None) -> Any:
    import nncf

    if not calibration:
        raise RecipeError("quantize(static) needs calibration text, and none was given.")
    data = nncf.Dataset([dict(batch) for batch in calibration])
    return nncf.quantize(model, data, subset_size=len(calibration), model_type=nncf.ModelType.TRANSFORMER)


def _compress(model: Any, weights: Mapping[str, Tensor], formats: Mapping[str, WeightFormat]) -> Any:
    """Each distinct format in one pass of NNCF that leaves all other weights alone."""
    import nncf

    consumers = list(weight_consumers(model, weights))
    for weight in dict.fromkeys(formats.values()):
        mode = getattr(nncf.CompressWeightsMode, f"INT{weight.bits}_{'SYM' if weight.symmetric else 'ASYM'}")
        others = [node for node, tensor in consumers if formats.get(tensor.removesuffix(".weight")) != weight]
        options = {"group_size": weight.group_size, "ratio": 1.0, "all_layers": True} if weight.bits == 4 else {}
        model = nncf.compress_weights(model, mode=mode, ignored_scope=nncf.IgnoredScope(names=others, validate=False), **options)
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
    """NNCF prints tables and progress; what fails raises."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
