"""Load and run a stored stack in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino


def compile_options(engine: str, threads: int) -> dict[str, Any]:
    """Pinned to `threads` threads; the precision is always said, as the default is bf16 without a word where the machine has it."""
    precision = "bf16" if engine.endswith("/bfloat16") else "f32"
    return {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}


def load(engine: str, path: Path, threads: int) -> Callable[[], object]:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", compile_options(engine, threads))
    request = compiled.create_infer_request()
    width = compiled.input(0).get_partial_shape()[1].get_length()
    request.set_input_tensor(openvino.Tensor(np.zeros((1, width), np.float32)))
    return lambda: request.infer()
