"""Which settings of ONNX Runtime's session pay? Each beside lighten's own, in turn, on the artifacts that lighten writes; ratios above 1 are faster.

python benchmarks/onnxruntime_settings.py --model .models/minilm --shapes 1x16 1x128 32x128
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

from lighten.formats.onnx_artifact import write_onnx_artifact
from lighten.formats.onnx_export import export_onnx
from lighten.formats.safetensors_folder import read_weights
from lighten.model import read_spec
from lighten.recipe import Recipe, apply_recipe

Change = Callable[[Any], None]


def entry(name: str, value: str) -> Change:
    return lambda options: options.add_session_config_entry(name, value)


def field(name: str, value: Any) -> Change:
    return lambda options: setattr(options, name, value)


SETTINGS: dict[str, Change] = {
    "the same again": lambda options: None,
    "no spinning": entry("session.intra_op.allow_spinning", "0"),
    "denormals as zero": entry("session.set_denormal_as_zero", "1"),
    "no arena": field("enable_cpu_mem_arena", False),
    "no memory pattern": field("enable_mem_pattern", False),
    "extended optimization alone": field("graph_optimization_level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
    "approximate GELU": entry("optimization.enable_gelu_approximation", "1"),
    "bfloat16 products (Arm alone)": entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an encoder")
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "32x128"], help="batch x length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        graphs = _graphs(asked.model, Path(work))
        rows = [row for shape in asked.shapes for row in _measured(graphs, shape, asked.threads, asked.rounds)]
    for row in rows:
        print(f"{row['shape']:>8} {row['setting']:<34} {row['speed']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    print(json.dumps({"rows": rows}))


def _graphs(model: Path, work: Path) -> dict[str, Path]:
    """lighten's artifact, the same after ONNX Runtime's transformer optimizer, and in float16."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    spec, exported = read_spec(model), work / "graph.onnx"
    export_onnx(model, spec, exported)
    write_onnx_artifact(exported, dict(read_weights(model, spec)), apply_recipe(Recipe(runtime="onnxruntime"), spec), work)
    plain, fused, half = work / "model.onnx", work / "fused.onnx", work / "half.onnx"
    heads, hidden = spec.config["num_attention_heads"], spec.config["hidden_size"]
    better = optimize_model(str(plain), "bert", num_heads=heads, hidden_size=hidden, optimization_options=FusionOptions("bert"))
    better.save_model_to_file(str(fused))
    print("fused by the transformer optimizer:", better.get_fused_operator_statistics())
    better.convert_float_to_float16(keep_io_types=True)
    better.save_model_to_file(str(half))
    return {"plain": plain, "transformer optimizer": fused, "float16": half}


def _measured(graphs: dict[str, Path], shape: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    batch, length = map(int, shape.split("x"))
    ids = np.random.default_rng(0).integers(10, 1000, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def opened(path: Path, change: Change) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        change(options)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def seconds(session: Any) -> float:
        runs = max(1, 64 // (batch * length // 16))
        start = time.perf_counter()
        for _ in range(runs):
            session.run(None, inputs)
        return (time.perf_counter() - start) / runs

    changes = {name: (graphs["plain"], change) for name, change in SETTINGS.items()}
    changes |= {name: (graphs[name], SETTINGS["the same again"]) for name in ("transformer optimizer", "float16")}
    rows = []
    for name, (path, change) in changes.items():  # two sessions at a time: idle pools of others spin
        own, other = opened(graphs["plain"], SETTINGS["the same again"]), opened(path, change)
        seconds(own), seconds(other)
        found = sorted(seconds(own) / seconds(other) for _ in range(rounds))
        rows.append({"shape": shape, "setting": name, "speed": median(found), "low": found[rounds // 4], "high": found[3 * rounds // 4]})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
