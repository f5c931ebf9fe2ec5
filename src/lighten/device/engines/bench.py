"""What each runtime gives the probe: micro-models that run, and stored ones that load."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from lighten.device.cases import Case


class Bench(Protocol):
    """One engine inside its own child process."""

    version: str
    precision: str

    def cases(self, wanted: Sequence[Case]) -> list[Case]:
        """Those of the wanted micro-models that this engine measures."""

    def prepare(self, cases: Sequence[Case]) -> None:
        """Build all micro-models that need building together."""

    def runner(self, case: Case, size: tuple[int, ...]) -> Callable[[], object]:
        """One forward pass of a micro-model at one size, inputs ready."""

    def store(self, case: Case, folder: Path) -> tuple[Path, int]:
        """Write a micro-model as this engine's artifacts are written; its path and the bytes of its weights."""


BENCHES = {
    "torch": "torch_bench", "torch-compile": "torch_bench", "onnxruntime": "onnxruntime_bench", "openvino": "openvino_bench",
    "ctranslate2": "ctranslate2_bench",
}  # fmt: skip
_TORCH = ("torch", "transformers", "safetensors")
MODULES = {
    "torch": _TORCH, "torch-compile": _TORCH, "onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"),
    "ctranslate2": (*_TORCH, "ctranslate2"),
}  # fmt: skip
"""Runtime → the modules that its probe imports; openvino/int8 needs nncf too."""


def required_modules(engine: str) -> tuple[str, ...]:
    """What must be installed to measure an engine."""
    return MODULES[engine.split("/")[0]] + (("nncf",) if engine == "openvino/int8" else ())


def open_bench(engine: str, threads: int) -> Bench:
    """The engine's bench; imports its runtime."""
    module = importlib.import_module(f"lighten.device.engines.{BENCHES[engine.split('/')[0]]}")
    return cast(Bench, module.open_bench(engine, threads))


def open_loader(engine: str) -> Callable[[str, Path, int], Callable[[], object]]:
    """The engine's `load(engine, path, threads)`, which gives one forward pass of a stored stack; imports its runtime and nothing else."""
    module = importlib.import_module(f"lighten.device.engines.{BENCHES[engine.split('/')[0]].replace('_bench', '_load')}")
    return cast(Callable[[str, Path, int], Callable[[], object]], module.load)
