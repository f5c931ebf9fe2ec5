"""OpenVINO by optimum-intel's exporter: stateful decoders. Run by benchmarks/runtimes.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import runtime_job

REQUIREMENTS = ("torch==2.13.0", "optimum-intel==2.2.0", "openvino==2026.4.1", "nncf==3.4.0", "tokenizers")


class OptimumIntel(runtime_job.Engine):
    """settings: weights and group_size, as `optimum-cli export openvino --weight-format` takes them; precision: f32 or bf16.

    The request is asked without the package's own loop, which is Python and slower.
    """

    PACKAGE = "optimum-intel"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        self.folder = work / "model"
        if not (self.folder / "openvino_model.bin").exists():
            build(model, self.folder, settings)
        hints = {"INFERENCE_PRECISION_HINT": settings["precision"], "INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = ov.Core().compile_model(self.folder / "openvino_model.xml", "CPU", hints)
        self.request = compiled.create_infer_request()
        self.names = {name for given in compiled.inputs for name in given.names}

    def _pass(self, ids: Any, known: int) -> Any:
        """[B, S, V], of tokens that follow as many as are known."""
        rows, length = ids.shape
        given = {
            "input_ids": ids, "attention_mask": np.ones((rows, known + length), np.int64), "beam_idx": np.arange(rows, dtype=np.int32),
            "position_ids": np.arange(known, known + length)[None].repeat(rows, 0),
        }  # fmt: skip
        return self.request.infer({name: value for name, value in given.items() if name in self.names})[0]

    def logits(self, ids: Any) -> Any:
        self.request.reset_state()
        return self._pass(ids, 0).copy()

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, float]:
        self.request.reset_state()
        start = time.perf_counter()
        last = self._pass(ids, 0)[:, -1].argmax(-1)
        first = time.perf_counter()
        for known in range(ids.shape[1], ids.shape[1] + new_tokens - 1):
            last = self._pass(last[:, None], known)[:, -1].argmax(-1)
        return first - start, time.perf_counter() - first

    def files(self) -> int:
        return runtime_job.folder_bytes(self.folder, "openvino_model.*")


def build(model: Path, folder: Path, settings: dict[str, Any]) -> None:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(model), "--task", "text-generation-with-past"]
    asked = ["--weight-format", settings["weights"], *(["--group-size", str(settings["group_size"])] if "group_size" in settings else [])]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*command, *asked, str(folder)], check=True)


if __name__ == "__main__":
    runtime_job.serve(OptimumIntel)
