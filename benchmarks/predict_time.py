"""Predicted against measured time of real encoders, engine by engine, batch by batch.

    python benchmarks/predict_time.py --model .models/minilm

Predictions come from this machine's profile (`lighten probe`, or --probe here); nothing is fitted to the models that are measured. Each engine
runs in a child process with pinned threads; a run during which other processes took cores away is measured again. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lighten.cost.operators import Forward, forward_operators
from lighten.device import find_device, pinned_environment, predict_time, probe, save_profile
from lighten.device.clock import time_all
from lighten.device.probe import DEFAULT_ENGINES
from lighten.model import read_spec

SIZES = ((1, 16), (1, 128), (1, 512), (8, 32), (8, 128), (32, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders of encoders in Hugging Face format")
    parser.add_argument("--engine", nargs="+", default=None, help="default: every engine of the profile")
    parser.add_argument("--size", nargs="+", default=[f"{b}x{s}" for b, s in SIZES], help="BATCHxLENGTH")
    parser.add_argument("--threads", type=int, default=None, help="default: the profile's")
    parser.add_argument("--probe", action="store_true", help="measure the machine first and keep the profile")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [(int(b), int(s)) for b, s in (text.split("x") for text in args.size)]
    if args.child:
        print(json.dumps(measure(args.child, args.model[0], sizes, args.threads)))
        return
    if args.probe:
        start = time.perf_counter()
        save_profile(probe(threads=args.threads or os.cpu_count() or 1, log=print, engines=args.engine or DEFAULT_ENGINES))
        print(f"probed in {time.perf_counter() - start:.0f} s")
    compare(args, sizes)


def compare(args: argparse.Namespace, sizes: list[tuple[int, int]]) -> None:
    profile = find_device("this")
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for model in args.model:
        spec = read_spec(model)
        for name in args.engine or profile.engines:
            engine = profile.engine(name)
            found = run_child(name, model, args.size, args.threads or profile.threads)
            if isinstance(found, str):
                failures[name] = found
                print(f"{name}: failed: {found}")
                continue
            for (batch, length), seconds in zip(sizes, found["seconds"], strict=True):
                ops = forward_operators(spec, Forward(batch_size=batch, query_len=length, key_len=length), engine.activation_dtype)
                predicted = predict_time(ops, engine, profile)
                inside = predicted.low is not None and predicted.high is not None and predicted.low <= seconds <= predicted.high
                rows.append(
                    {"model": spec.name, "engine": name, "batch": batch, "length": length, "predicted_s": predicted.seconds, "low_s": predicted.low,
                     "high_s": predicted.high, "measured_s": seconds, "ratio": predicted.seconds / seconds, "inside": inside}
                )  # fmt: skip
                print(line(rows[-1]), flush=True)
            print(f"{name}: {found['disturbed']} of {len(sizes)} sizes disturbed by other processes")
    print(json.dumps({"benchmark": "predict_time", **summary(rows), "failures": failures, "rows": rows}))


def line(row: dict[str, Any]) -> str:
    low, high = (f"{1e3 * row[key]:.4g}" if row[key] else "?" for key in ("low_s", "high_s"))
    return (
        f"{row['model']} {row['engine']:<20} {row['batch']:>2} x {row['length']:<4} predicted {1e3 * row['predicted_s']:8.2f} ms ({low} to {high})"
        f" | measured {1e3 * row['measured_s']:8.2f} ms | ratio {row['ratio']:.2f}{'' if row['inside'] else '  outside'}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(math.log(row["ratio"])) for row in rows]
    if not errors:
        return {"median_abs_log_ratio": None, "worst_abs_log_ratio": None, "inside": None, "by_engine": {}}
    engines = {row["engine"] for row in rows}
    by_engine = {name: statistics.median(abs(math.log(row["ratio"])) for row in rows if row["engine"] == name) for name in sorted(engines)}
    inside = sum(row["inside"] for row in rows) / len(rows)
    return {"median_abs_log_ratio": statistics.median(errors), "worst_abs_log_ratio": max(errors), "inside": inside, "by_engine": by_engine}


def run_child(engine: str, model: Path, sizes: list[str], threads: int) -> dict[str, Any] | str:
    """What `measure` found in a process of its own, or why it failed."""
    command = [sys.executable, __file__, "--child", engine, "--model", str(model), "--threads", str(threads), "--size", *sizes]
    environment = {**os.environ, **pinned_environment(threads, runtime=engine.split("/")[0])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(engine: str, model: Path, sizes: list[tuple[int, int]], threads: int) -> dict[str, Any]:
    """Seconds of one forward pass at each size."""
    import torch

    torch.set_num_threads(threads)
    runtime, kind = engine.split("/")
    with tempfile.TemporaryDirectory() as folder:
        forward = FORWARDS[runtime](model, kind, threads, Path(folder))
        inputs = {size: torch.randint(0, 1000, size) for size in sizes}
        runs = {size: partial(forward, ids, torch.ones_like(ids)) for size, ids in inputs.items()}
        timings = time_all(runs, threads=threads, budget_s=0.2, patience_s=15.0)
    return {"seconds": [timings[size].seconds for size in sizes], "disturbed": sum(not timing.calm for timing in timings.values())}


def torch_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    import torch
    from transformers import AutoModel

    torch.set_grad_enabled(False)
    module = AutoModel.from_pretrained(model, dtype=getattr(torch, kind), attn_implementation="sdpa").eval()
    return lambda ids, mask: lambda: module(input_ids=ids, attention_mask=mask)


def compiled_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    import torch
    from transformers import AutoModel

    torch.set_grad_enabled(False)
    module = torch.compile(AutoModel.from_pretrained(model, dtype=getattr(torch, kind), attn_implementation="sdpa").eval(), dynamic=False)
    return lambda ids, mask: lambda: module(input_ids=ids, attention_mask=mask)


def export(model: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.zeros(2, 16, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2)}
    names = ["input_ids", "attention_mask"]
    path = folder / "model.onnx"
    torch.onnx.export(
        Encoder(), (ids, torch.ones_like(ids)), path, dynamo=True, input_names=names, dynamic_shapes=dict.fromkeys(names, axes),
        external_data=False, verbose=False,
    )  # fmt: skip
    return path


def onnxruntime_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from lighten.device.engines.onnxruntime_load import session_options

    path = export(model, folder)
    if kind == "int8":
        quant_pre_process(str(path), str(folder / "shaped.onnx"), skip_symbolic_shape=True)
        path = folder / "int8.onnx"
        quantize_dynamic(
            str(folder / "shaped.onnx"), str(path), per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
        )
    session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])

    def prepare(ids: Any, mask: Any) -> Callable[[], object]:
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return lambda: session.run(None, inputs)

    return prepare


def openvino_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    import openvino

    from lighten.device.engines.openvino_load import compile_options

    converted = openvino.convert_model(export(model, folder))
    if kind == "int8":
        import nncf
        import numpy as np

        random = np.random.default_rng(0)
        batches = [
            {"input_ids": random.integers(0, 1000, (4, 64)), "attention_mask": np.ones((4, 64), np.int64)} for _ in range(8)
        ]  # calibration by random ids: time does not depend on the scales
        converted = nncf.quantize(converted, nncf.Dataset(batches), subset_size=8, model_type=nncf.ModelType.TRANSFORMER)
    request = openvino.Core().compile_model(converted, "CPU", compile_options(f"openvino/{kind}", threads)).create_infer_request()

    def prepare(ids: Any, mask: Any) -> Callable[[], object]:
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return lambda: request.infer(inputs)

    return prepare


FORWARDS = {"torch": torch_forward, "torch-compile": compiled_forward, "onnxruntime": onnxruntime_forward, "openvino": openvino_forward}


if __name__ == "__main__":
    main()
