"""OpenVINO's counters: what each node of the executed graph takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.model.spec import ModelSpec
from lighten.runtimes import openvino_runtime
from lighten.runtimes.session import Setup

_KINDS = {
    "GatherCompressed": "embedding", "LLMMLP": "linear", "QKVProjection": "linear", "Convolution": "linear",
    "MatMul": "attention", "Softmax": "attention", "ScaledDotProductAttention": "attention", "ScaledDotProductAttentionWithKVCache": "attention",
    "MHA": "attention", "MVN": "norm", "RMS": "norm", "RMSNorm": "norm", "Gelu": "activation", "Swish": "activation", "Tanh": "activation",
    "Sigmoid": "activation", "Relu": "activation",
}  # fmt: skip
"""Type of a node of the executed graph → its kind. A product with a weight is a FullyConnected there, so what is left as a MatMul is attention's."""
_WORDS = ("softmax", "scaled_dot_product")
"""In the names of what a node was made of: one that joins these is attention's."""


class OpenVINORecorder:
    """See `Recorder`. A counter tells the mean of all calls so far; times their number it is a sum, of which a stretch is a difference."""

    def __init__(self, folder: Path, spec: ModelSpec, setup: Setup) -> None:
        session = openvino_runtime.load(folder, spec, setup, profile=True)
        session.request = self._request = _Counted(session.request)
        self.session = session
        self._attention = _attention_nodes(session.compiled)
        self._before: dict[str, float] = {}
        self._stretches: list[dict[str, float]] = []

    def start(self) -> None:
        """See `Recorder`."""
        self._before = self._sums()

    def stop(self) -> None:
        """See `Recorder`."""
        self._stretches.append({kind: seconds - self._before.get(kind, 0.0) for kind, seconds in self._sums().items()})

    def taken(self) -> list[dict[str, float]]:
        """See `Recorder`."""
        return self._stretches

    def _sums(self) -> dict[str, float]:
        """Seconds by kind of all calls so far."""
        found: dict[str, float] = {}
        for node in self._request.get_profiling_info() if self._request.calls else ():
            kind = self._kind(node)
            found[kind] = found.get(kind, 0.0) + node.real_time.total_seconds() * self._request.calls
        return found

    def _kind(self, node: Any) -> str:
        if node.node_name in self._attention:
            return "attention"
        if node.node_type == "Gather":  # of ids and shapes too, which are whole numbers
            return "other" if any(f"_{kind}" in node.exec_type for kind in ("i32", "i64", "I8")) else "embedding"
        if node.node_type.startswith("FullyConnected"):  # of codes too: FullyConnectedCompressed, FullyConnectedQuantized
            return "linear"
        return _KINDS.get(node.node_type, "other")


class _Counted:
    """A request of OpenVINO that counts its calls."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.calls = 0

    def infer(self, inputs: Any) -> Any:
        self.calls += 1
        return self._request.infer(inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _attention_nodes(compiled: Any) -> frozenset[str]:
    """Names of the nodes that join a softmax with the products around it."""
    joined = (
        (node.get_friendly_name(), openvino_runtime.told(node, "originalLayersNames")) for node in compiled.get_runtime_model().get_ordered_ops()
    )
    return frozenset(name for name, made_of in joined if any(word in made_of for word in _WORDS))
