"""torch's profiler: an operator is what the module is that called it; one that no such module called is told by its own name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lighten.model.spec import ModelSpec
from lighten.runtimes import torch_eager
from lighten.runtimes.session import Setup

_MARK = "lighten:"
_NAMES = {
    "scaled_dot_product": "attention", "bmm": "attention", "baddbmm": "attention", "softmax": "attention", "matmul": "attention",
    "linear": "linear", "addmm": "linear", "::mm": "linear", "layer_norm": "norm", "rms_norm": "norm", "gelu": "activation", "silu": "activation",
    "relu": "activation", "tanh": "activation", "embedding": "embedding",
}  # fmt: skip
"""Words in the names of operators outside of modules that tell; products of two activations are those of attention."""


class TorchRecorder:
    """See `Recorder`."""

    def __init__(self, folder: Path, spec: ModelSpec, setup: Setup) -> None:
        session = torch_eager.load(folder, spec, setup)
        assert isinstance(session, torch_eager.TorchSession), "torch_eager loads nothing else"
        self.session = session
        self._profiler: Any = None
        self._stretches: list[dict[str, float]] = []
        for module in session.module.modules():
            kind = _kind_of_module(module)
            if kind is not None:
                _mark(module, kind)

    def start(self) -> None:
        """See `Recorder`."""
        import torch

        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profiler.start()

    def stop(self) -> None:
        """See `Recorder`."""
        self._profiler.stop()
        found: dict[str, float] = {}
        for kind, seconds in _operators(self._profiler.events()):
            found[kind] = found.get(kind, 0.0) + seconds
        self._stretches.append(found)
        self._profiler = None

    def taken(self) -> list[dict[str, float]]:
        """See `Recorder`."""
        return self._stretches


def _kind_of_module(module: Any) -> str | None:
    """What a module without submodules is; None where its class does not tell."""
    if any(True for _ in module.children()):
        return None
    name, place = type(module).__name__, type(module).__module__
    if "Linear" in name or name == "Conv1D":
        return "linear"
    if "Norm" in name:
        return "norm"
    if "Embedding" in name and "Rotary" not in name:
        return "embedding"
    if place in ("torch.nn.modules.activation", "transformers.activations"):
        return "activation"
    return None


def _mark(module: Any, kind: str) -> None:
    """Let the profiler see when the module begins and ends."""
    import torch

    open_ranges: list[Any] = []

    def begin(*_: Any) -> None:
        span: Any = torch.profiler.record_function(_MARK + kind)
        span.__enter__()
        open_ranges.append(span)

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def _operators(events: Any) -> Iterator[tuple[str, float]]:
    """(kind, own seconds) of each operator: the kind of the outermost that encloses it and has one."""
    kinds: dict[int, str | None] = {}

    def kind_of(event: Any) -> str | None:
        if event.id not in kinds:
            above = kind_of(event.cpu_parent) if event.cpu_parent is not None else None
            kinds[event.id] = above or _kind_of_name(event.name)
        return kinds[event.id]

    for event in events:
        if "::" in event.name and not event.name.startswith(_MARK):
            yield kind_of(event) or "other", event.self_cpu_time_total * 1e-6


def _kind_of_name(name: str) -> str | None:
    if name.startswith(_MARK):
        return name.removeprefix(_MARK)
    return next((kind for word, kind in _NAMES.items() if word in name), None)
