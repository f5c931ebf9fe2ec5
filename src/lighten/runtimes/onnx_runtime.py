"""ONNX Runtime on the CPU: encoders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lighten.errors import RuntimeUnavailable
from lighten.formats.files import ONNX
from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Ids, Session, Setup


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setup.threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / ONNX, options, providers=["CPUExecutionProvider"])
    return _OnnxSession(session, folder / ONNX)


def _precision(path: Path) -> str:
    """`int8` where integer products do the work, by the operators of the graph."""
    import onnx

    operators = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    integer = operators["MatMulInteger"] + operators["DynamicQuantizeMatMul"]
    return "int8" if integer else "float32"


class _OnnxSession:
    """See `Session`."""

    def __init__(self, session: Any, path: Path) -> None:
        self._session = session
        self._path = path

    @property
    def precision(self) -> str:
        return _precision(self._path)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        output: Floats = self._session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})[0]
        return output

    def logits(self, input_ids: Ids) -> Floats:
        raise RuntimeUnavailable("onnxruntime does not run decoders here; openvino and torch do.")

    prefill = decode = logits
