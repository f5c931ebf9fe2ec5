"""Load and run a stored stack in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def session_options(threads: int) -> Any:
    """Pinned to `threads` threads, one operator at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


def load(engine: str, path: Path, threads: int) -> Callable[[], object]:
    session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    inputs = {given.name: np.zeros((1, given.shape[-1]), np.float32)}
    return lambda: session.run(None, inputs)
