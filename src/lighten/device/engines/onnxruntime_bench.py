"""The micro-models in ONNX Runtime, in floats or dynamically quantized per channel."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from lighten.device.cases import Case, in_graphs
from lighten.device.engines.graph import feed, onnx_model
from lighten.device.engines.onnxruntime_load import session_options

QUANTIZED = ("linear", "block", "stack")


def open_bench(engine: str, threads: int) -> OnnxRuntimeBench:
    return OnnxRuntimeBench(engine, threads)


class OnnxRuntimeBench:
    def __init__(self, engine: str, threads: int) -> None:
        self.int8 = engine.endswith("/int8")
        self.precision = "float32"
        self.version = onnxruntime.__version__
        self.threads = threads
        self.sessions: dict[Case, Any] = {}
        logging.getLogger().setLevel(logging.ERROR)  # the quantizer asks for a pre-processing that changes nothing here

    def cases(self, wanted: Sequence[Case]) -> list[Case]:
        return in_graphs(wanted)

    def prepare(self, cases: Sequence[Case]) -> None:
        """Nothing: each is built when it is first run."""

    def runner(self, case: Case, size: tuple[int, ...]) -> Callable[[], object]:
        if case not in self.sessions:
            self.sessions[case] = onnxruntime.InferenceSession(
                self._model(case).SerializeToString(), session_options(self.threads), providers=["CPUExecutionProvider"]
            )
        session, inputs = self.sessions[case], feed(case, size)
        return lambda: session.run(None, inputs)

    def store(self, case: Case, folder: Path) -> tuple[Path, int]:
        path = folder / f"{case.name}.onnx"
        onnx.save(self._model(case), path)
        return path, path.stat().st_size

    def _model(self, case: Case) -> onnx.ModelProto:
        model = onnx_model([case], runtime="onnxruntime")
        return _quantized(model) if self.int8 and case.kind in QUANTIZED else model


def _quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(path)
