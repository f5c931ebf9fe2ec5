"""ONNX Runtime's profiler, which writes a file of what each node of the optimized graph took."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lighten.model.spec import ModelSpec
from lighten.runtimes import onnx_runtime
from lighten.runtimes.session import Setup

_KINDS = {
    "Gemm": "linear", "MatMulNBits": "linear", "MatMulInteger": "linear", "MatMulIntegerToFloat": "linear", "DynamicQuantizeMatMul": "linear",
    "QLinearMatMul": "linear", "QGemm": "linear", "FusedGemm": "linear", "Conv": "linear", "FusedConv": "linear",
    "Softmax": "attention", "Attention": "attention", "MultiHeadAttention": "attention", "GroupQueryAttention": "attention",
    "QAttention": "attention", "LayerNormalization": "norm", "SkipLayerNormalization": "norm", "SimplifiedLayerNormalization": "norm",
    "SkipSimplifiedLayerNormalization": "norm", "RMSNormalization": "norm", "Gelu": "activation", "BiasGelu": "activation",
    "FastGelu": "activation", "QuickGelu": "activation", "Erf": "activation", "Tanh": "activation", "Sigmoid": "activation",
    "Relu": "activation", "Pow": "norm", "ReduceMean": "norm", "Sqrt": "norm", "Reciprocal": "norm", "Silu": "activation",
    "Swish": "activation", "GatherBlockQuantized": "embedding",
}  # fmt: skip
"""Operator of the optimized graph → its kind, where that says all. Roots and means are of an RMSNorm in pieces, whose products are `other`."""


class OnnxRecorder:
    """See `Recorder`. Every call of the session is in the file; which belong to a stretch is known by counting them."""

    def __init__(self, folder: Path, spec: ModelSpec, setup: Setup) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="lighten-profile-")
        session = onnx_runtime.load(folder, spec, setup, profile=Path(self._place.name) / "run")
        session.session = self._counted = _Counted(session.session)
        self.session = session
        self._stretches: list[tuple[int, int]] = []
        self._from = 0

    def start(self) -> None:
        """See `Recorder`."""
        self._from = self._counted.calls

    def stop(self) -> None:
        """See `Recorder`."""
        self._stretches.append((self._from, self._counted.calls))

    def taken(self) -> list[dict[str, float]]:
        """See `Recorder`."""
        with self._place:
            events = json.loads(Path(self._counted.end_profiling()).read_text())
        calls = list(_calls(events))
        return [_sum(calls[begin:end]) for begin, end in self._stretches]


class _Counted:
    """A session of ONNX Runtime that counts its calls."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.calls = 0

    def run(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._session.run(*arguments)

    def run_with_iobinding(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._session.run_with_iobinding(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _calls(events: Sequence[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """Seconds by kind of each call, in order: a node's line is written when it ends, a call's after those of its nodes."""
    found: dict[str, float] = {}
    for event in events:
        if event["name"] == "model_run":
            yield found
            found = {}
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = _kind(event["args"])
            found[kind] = found.get(kind, 0.0) + event["dur"] * 1e-6


def _kind(told: dict[str, Any]) -> str:
    """What a node is: a product is linear where one side is a weight, which is counted as a parameter or was packed away, else attention's."""
    operator, packed = told["op_name"], len(told.get("input_type_shape", ())) < 2
    if operator in ("MatMul", "FusedMatMul"):
        return "linear" if packed or int(told.get("parameter_size", 0)) > 0 else "attention"
    if operator == "Gather":
        shapes = [shape for kinds in told.get("output_type_shape", ()) for kind, shape in kinds.items() if kind.startswith("float")]
        return "embedding" if shapes and int(told.get("parameter_size", 0)) > 0 else "other"
    return _KINDS.get(operator, "other")


def _sum(calls: Sequence[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for call in calls:
        for kind, seconds in call.items():
            found[kind] = found.get(kind, 0.0) + seconds
    return found
