"""OpenVINO's counters: what each node of the executed graph took in the last call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lighten.model.spec import ModelSpec
from lighten.runtimes import openvino_runtime
from lighten.runtimes.session import Setup, Stepping

_KINDS = {
    "FullyConnected": "linear", "FullyConnectedQuantized": "linear", "LLMMLP": "linear", "QKVProjection": "linear", "Convolution": "linear",
    "MatMul": "attention", "Softmax": "attention", "ScaledDotProductAttention": "attention", "ScaledDotProductAttentionWithKVCache": "attention",
    "MHA": "attention", "MVN": "norm", "RMS": "norm", "RMSNorm": "norm", "Gelu": "activation", "Swish": "activation", "Tanh": "activation",
    "Sigmoid": "activation", "Relu": "activation",
}  # fmt: skip
"""Type of a node of the executed graph → its kind. A product with a weight is a FullyConnected there, so what is left as a MatMul is attention's."""
_WORDS = ("softmax", "scaled_dot_product")
"""In the names of what a node was made of: one that joins these is attention's."""


class OpenVINORecorder:
    """See `Recorder`."""

    def __init__(self, folder: Path, spec: ModelSpec, setup: Setup) -> None:
        session = openvino_runtime.load(folder, spec, setup, profile=True)
        session.request = self._request = _Told(session.request, _attention_nodes(session.compiled))
        self.session: Stepping = session
        self._stretches: list[dict[str, float]] = []

    @property
    def spent_s(self) -> float:
        """See `Recorder`."""
        return self._request.spent_s

    def start(self) -> None:
        """See `Recorder`."""
        self._request.found = {}

    def stop(self) -> None:
        """See `Recorder`."""
        self._stretches.append(self._request.found or {})
        self._request.found = None

    def taken(self) -> list[dict[str, float]]:
        """See `Recorder`."""
        return self._stretches


class _Told:
    """A request of OpenVINO that sums what the nodes of each call took while `found` is there."""

    def __init__(self, request: Any, attention: frozenset[str]) -> None:
        self._request, self._attention = request, attention
        self.found: dict[str, float] | None = None
        self.spent_s = 0.0

    def infer(self, inputs: Any) -> Any:
        outputs = self._request.infer(inputs)
        if self.found is not None:
            start = time.perf_counter()
            for node in self._request.get_profiling_info():
                kind = self._kind(node)
                self.found[kind] = self.found.get(kind, 0.0) + node.real_time.total_seconds()
            self.spent_s += time.perf_counter() - start
        return outputs

    def _kind(self, node: Any) -> str:
        if node.node_name in self._attention:
            return "attention"
        if node.node_type == "Gather":  # of ids and shapes too, which are whole numbers
            return "other" if any(f"_{kind}" in node.exec_type for kind in ("i32", "i64", "I8")) else "embedding"
        return _KINDS.get(node.node_type, "other")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _attention_nodes(compiled: Any) -> frozenset[str]:
    """Names of the nodes that join a softmax with the products around it."""
    joined = ((node.get_friendly_name(), openvino_runtime.told(node, "originalLayersNames")) for node in compiled.get_runtime_model().get_ordered_ops())
    return frozenset(name for name, made_of in joined if any(word in made_of for word in _WORDS))
