"""ONNX Runtime's own file (`.ort`), which its packages for phones and small boards load without reading ONNX.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html; settings as in
`onnxruntime/tools/convert_onnx_models_to_ort.py`: optimized once, here, without what only x86 has.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import OutputError, RecipeError
from lighten.formats import files
from lighten.formats.settings import onnxruntime_settings

X86_ALONE = ("NchwcTransformer",)
LARGEST_BYTES = 2**31
"""Of a flatbuffer, whose offsets are 32 bits with a sign (FlatBuffers, `FLATBUFFERS_MAX_BUFFER_SIZE`)."""
DIFFERENCE = 1e-4
"""Relative difference of outputs above which a file is not what it was made from: both run the same kernels."""


def write_ort(graph: Path, folder: Path, *, dynamic: bool) -> float:
    """Write a graph into a folder as ONNX Runtime's own file; the relative difference of their outputs.

    Args:
        dynamic: whether activations of weights that are codes are rounded to int8.

    Raises:
        RecipeError: a graph that is too large for such a file.
        OutputError: the file computes something else.
    """
    import onnxruntime

    size = sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
    if size >= LARGEST_BYTES:
        raise RecipeError(f"{graph} has {size:,} bytes, and a .ort file has at most {LARGEST_BYTES:,}; quantize it, or take it to onnx.")
    out = folder / files.ORT
    options = _options(dynamic=dynamic)
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(X86_ALONE))
    expected, found = (_output(path, dynamic=dynamic) for path in (graph, out))
    difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not difference < DIFFERENCE:
        raise OutputError(f"{out} computes something else than {graph}: {difference:.2g} off.")
    return difference


def stored_types(graph: Path) -> dict[str, int]:
    """How many matrices of a graph are stored in each type."""
    import onnx

    found = [each for each in onnx.load(graph, load_external_data=False).graph.initializer if len(each.dims) > 1]
    return dict(Counter(onnx.TensorProto.DataType.Name(each.data_type).lower() for each in found))


def _options(*, dynamic: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in onnxruntime_settings(dynamic=dynamic).items():
        options.add_session_config_entry(name, value)
    return options


def _output(path: Path, *, dynamic: bool) -> Any:
    """Of two random sequences."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, _options(dynamic=dynamic), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(1, 100, (2, 9))
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(9), (2, 1))}
    empty = {each.name: np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32) for each in session.get_inputs() if each.name not in known}
    return session.run(None, {each.name: (known | empty)[each.name] for each in session.get_inputs()})[0]
