"""Predicted against measured time of real models, engine by engine, size by size, over runs in turn.

    python benchmarks/predict_time.py --model .models/minilm .models/smollm2-135m --engine torch/float32 torch/bfloat16 --runs 5 --probe-each

Encoders encode; decoders prefill, with logits at every position and no cache, as `model(...)` computes them; with `--phase decode` each does one
step after a context of the length, with `--phase train` one step of AdamW in float32. A run takes one engine after the other: with `--probe-each`
it measures the machine anew for the engine, then all models on it, within the same minutes; otherwise predictions come from this machine's profile
(`lighten probe`, or --probe here). Nothing is fitted to the models that are measured. Each engine runs in a child process with pinned threads.
Sizes that are predicted to take longer than --limit seconds a pass, or more memory than the machine has, are left out and said.

`error` is |predicted / measured - 1|. The spread of a size is (highest - lowest) / median of what was measured in its runs, of what was predicted in
them, and of their ratio: what scatters without the model of time being at fault. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from lighten.cost.workload import Workload
from lighten.device import Profile, find_device, pinned_environment, predict_time, probe, profile_to_json, save_profile
from lighten.device.clock import time_all
from lighten.device.probe import DEFAULT_ENGINES
from lighten.errors import LightenError
from lighten.model import ModelSpec, read_spec
from lighten.recipe.estimate import estimate, forward_passes
from lighten.recipe.recipe import Recipe

BATCHES, LENGTHS = (1, 8, 32), (16, 64, 128, 256, 512)
LIMIT_S = 20.0


def main() -> None:
    args = arguments()
    sizes = [(int(b), int(s)) for b, s in (text.split("x") for text in args.size)]
    if args.child:
        print(json.dumps(measure(args.child, args.model[0], args.phase, sizes, args.threads)))
        return
    if args.probe:
        start = time.perf_counter()
        save_profile(probe(threads=args.threads or os.cpu_count() or 1, log=print, engines=args.engine or DEFAULT_ENGINES))
        print(f"probed in {time.perf_counter() - start:.0f} s")
    compare(args, sizes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders of models in Hugging Face format")
    parser.add_argument("--engine", nargs="+", default=None, help="default: every engine of the profile")
    parser.add_argument("--size", nargs="+", default=[f"{b}x{s}" for b, s in product(BATCHES, LENGTHS)], help="BATCHxLENGTH")
    parser.add_argument("--phase", choices=("forward", "decode", "train"), default="forward", help="default: encode or prefill, by the model")
    parser.add_argument("--runs", type=int, default=1, help="how often all is done, in turn")
    parser.add_argument("--threads", type=int, default=None, help="default: the profile's")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds that a pass may be predicted to take")
    parser.add_argument("--probe", action="store_true", help="measure the machine first and keep the profile")
    parser.add_argument("--probe-each", action="store_true", help="measure the machine anew in each run, and keep nothing")
    parser.add_argument("--profiles", type=Path, default=None, help="folder for the profiles of --probe-each, to look into")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, sizes: list[tuple[int, int]]) -> None:
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    left_out: set[str] = set()
    engines = args.engine or (DEFAULT_ENGINES if args.probe_each else tuple(find_device("this").engines))
    for run in range(1, args.runs + 1):
        start, first = time.perf_counter(), len(rows)
        for name in engines:
            profile = probed(args, name, run) if args.probe_each else find_device("this")
            for model in args.model:
                spec = read_spec(model)
                predicted = {size: prediction(spec, size, name, profile, args) for size in sizes}
                left_out |= {f"{spec.name} {name} {b}x{s}: {why}" for (b, s), why in predicted.items() if isinstance(why, str)}
                kept = {size: found for size, found in predicted.items() if not isinstance(found, str)}
                found = (
                    run_child(name, model, args.phase, [f"{b}x{s}" for b, s in kept], args.threads or profile.threads) if kept else {"timings": []}
                )
                if isinstance(found, str):
                    failures[f"{spec.name} {name}"] = found
                    print(f"{name}: failed: {found}")
                    continue
                for ((batch, length), each), (seconds, calm) in zip(kept.items(), found["timings"], strict=True):
                    where = {"run": run, "model": spec.name, "engine": name, "batch": batch, "length": length}
                    rows.append(row(where, each, seconds, calm))
                    print(line(rows[-1]), flush=True)
        print(f"run {run}: {text_of(summary(rows[first:]))}, in {time.perf_counter() - start:.0f} s", flush=True)
    for said in sorted(left_out):
        print(f"left out: {said}")
    found_all = {"by_engine": grouped(rows, "engine"), "by_turn": by_turn(rows), "by_model": grouped(rows, "model"), **of_sizes(rows)}
    print(table(rows))
    print("\n".join(turn_line(each) for each in by_turn(rows)))
    print(f"all {args.runs} runs: {text_of(summary(rows))}")
    print(json.dumps({"benchmark": "predict_time", **summary(rows), **found_all, "failures": failures, "left_out": sorted(left_out), "rows": rows}))


def probed(args: argparse.Namespace, engine: str, run: int) -> Profile:
    """This machine measured now, for one engine."""
    threads = args.threads or os.cpu_count() or 1
    profile = probe(threads=threads, log=lambda text: print(f"run {run}: {text}", flush=True), engines=[engine])
    if args.profiles:
        args.profiles.mkdir(parents=True, exist_ok=True)
        path = args.profiles / f"{run}-{engine.replace('/', '-')}.json"
        path.write_text(json.dumps(profile_to_json(profile)), encoding="utf-8")
    return profile


def prediction(spec: ModelSpec, size: tuple[int, int], engine: str, profile: Profile, args: argparse.Namespace) -> dict[str, Any] | str:
    """Seconds of the workload with their range, or why it is not run."""
    runtime, dtype = engine.split("/")
    if runtime in BESIDE_TORCH and (spec.is_decoder or args.phase != "forward"):
        return f"{runtime} runs encoders' forward passes here"
    if args.phase == "train" and dtype != "float32":
        return "trained in float32"
    batch, length = size
    kind = "float32" if dtype == "int8" else dtype
    phase = args.phase if args.phase != "forward" else "prefill" if spec.is_decoder else "encode"
    optimizer, new_tokens = ("adamw" if phase == "train" else None), int(phase == "decode")
    try:
        workload = Workload(phase=phase, batch_size=batch, seq_len=length, new_tokens=new_tokens, dtype=kind, optimizer=optimizer)
        if dtype == "int8":  # the engine quantizes by itself, the spec stays
            found = predict_time(forward_passes(spec, workload)[0][0], profile.engine(engine), profile)
            needed: int | None = None
        else:
            whole = estimate(spec, workload, recipe=Recipe(runtime=runtime, dtype=kind), device=profile)
            assert whole.time is not None
            found, needed = whole.time, whole.memory.peak
    except LightenError as error:
        return str(error)
    if found.seconds > args.limit:
        return f"predicted to take {found.seconds:.0f} s, longer than {args.limit:.0f} s"
    if needed and profile.machine.memory_bytes and needed > 0.8 * profile.machine.memory_bytes:
        return f"needs {needed / 1e9:.0f} GB"
    return {"predicted_s": found.seconds, "low_s": found.low, "high_s": found.high, "bound_by": found.bound_by}


def row(where: dict[str, Any], predicted: dict[str, Any], seconds: float, calm: bool) -> dict[str, Any]:
    low, high = predicted["low_s"], predicted["high_s"]
    return {
        **where, **predicted, "measured_s": seconds, "ratio": predicted["predicted_s"] / seconds,
        "inside": low is not None and high is not None and low <= seconds <= high, "calm": calm,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    low, high = (f"{1e3 * row[key]:.4g}" if row[key] else "?" for key in ("low_s", "high_s"))
    return (
        f"{row['model']} {row['engine']:<20} {row['batch']:>2} x {row['length']:<4} predicted {1e3 * row['predicted_s']:8.2f} ms ({low} to {high})"
        f" | measured {1e3 * row['measured_s']:8.2f} ms{'' if row['calm'] else ' (disturbed)'} | ratio {row['ratio']:.2f}"
        f"{'' if row['inside'] else '  outside'}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of rows, each run of each size counted by itself."""
    if not rows:
        return {"n": 0, "median_error": None, "worst_error": None, "inside": None, "disturbed": None}
    errors = [abs(row["ratio"] - 1) for row in rows]
    count = len(rows)
    inside, disturbed = sum(row["inside"] for row in rows) / count, sum(not row["calm"] for row in rows) / count
    return {"n": count, "median_error": statistics.median(errors), "worst_error": max(errors), "inside": inside, "disturbed": disturbed}


def text_of(found: dict[str, Any]) -> str:
    if not found["n"]:
        return "nothing measured"
    return (
        f"median error {found['median_error']:.1%}, worst {found['worst_error']:.1%}, {found['inside']:.0%} inside the range, "
        f"{found['disturbed']:.0%} of {found['n']} measurements disturbed"
    )


def grouped(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    return {name: summary([row for row in rows if row[key] == name]) for name in sorted({row[key] for row in rows})}


def by_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run of each engine: the median ratio, by which the machine's own speed moved between probe and measurements if all sizes moved alike, and
    the errors around it, which are the model's."""
    groups: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["engine"]), []).append(row["ratio"])
    found = []
    for (run, engine), ratios in sorted(groups.items()):
        middle = statistics.median(ratios)
        around = [abs(ratio / middle - 1) for ratio in ratios]
        found.append(
            {"run": run, "engine": engine, "ratio": middle, "n": len(ratios), "median_around": statistics.median(around), "worst_around": max(around)}
        )
    return found


def turn_line(turn: dict[str, Any]) -> str:
    around = f"median {turn['median_around']:.1%}, worst {turn['worst_around']:.1%}"
    return f"run {turn['run']} {turn['engine']:<15} median ratio {turn['ratio']:.2f}, around it: {around} (n {turn['n']})"


def of_sizes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same size in all runs: how much it scatters, and the error of the median prediction over the median measurement."""
    found = [per_size(each) for each in sizes_of(rows)]
    if not found:
        return {"spread": None, "sizes": []}
    keys = ("measured_spread", "predicted_spread", "ratio_spread")
    spread = {key: {"median": statistics.median(each[key] for each in found), "worst": max(each[key] for each in found)} for key in keys}
    errors = [abs(each["ratio"] - 1) for each in found]
    return {"spread": spread, "median_error_of_medians": statistics.median(errors), "worst_error_of_medians": max(errors), "sizes": found}


def sizes_of(rows: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["engine"], row["batch"], row["length"]), []).append(row)
    return groups.values()


def per_size(rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = {key: [row[key] for row in rows] for key in ("measured_s", "predicted_s", "ratio")}
    medians = {key: statistics.median(each) for key, each in values.items()}
    spreads = {f"{key.removesuffix('_s')}_spread": (max(each) - min(each)) / medians[key] for key, each in values.items()}
    return {
        **{key: rows[0][key] for key in ("model", "engine", "batch", "length")}, "runs": len(rows),
        "predicted_s": medians["predicted_s"], "measured_s": medians["measured_s"], "ratio": medians["predicted_s"] / medians["measured_s"],
        "lowest_ratio": min(values["ratio"]), "highest_ratio": max(values["ratio"]), **spreads,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    head = "model engine size | median predicted ms | median measured ms | ratio (of runs: lowest to highest) | spread measured, predicted"
    return "\n".join([head, *(table_line(per_size(each)) for each in sizes_of(rows))])


def table_line(size: dict[str, Any]) -> str:
    return (
        f"{size['model']} {size['engine']} {size['batch']}x{size['length']} | {1e3 * size['predicted_s']:.4g} | {1e3 * size['measured_s']:.4g} | "
        f"{size['ratio']:.2f} ({size['lowest_ratio']:.2f} to {size['highest_ratio']:.2f}) | "
        f"{size['measured_spread']:.0%}, {size['predicted_spread']:.0%}"
    )


def run_child(engine: str, model: Path, phase: str, sizes: list[str], threads: int) -> dict[str, Any] | str:
    """What `measure` found in a process of its own, or why it failed."""
    command = [sys.executable, __file__, "--child", engine, "--model", str(model), "--phase", phase, "--threads", str(threads), "--size", *sizes]
    environment = {**os.environ, **pinned_environment(threads, runtime=engine.split("/")[0])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=3600)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(engine: str, model: Path, phase: str, sizes: list[tuple[int, int]], threads: int) -> dict[str, Any]:
    """Seconds at each size, and whether no other process disturbed them."""
    import torch

    torch.set_num_threads(threads)
    runtime, kind = engine.split("/")
    with tempfile.TemporaryDirectory() as folder:
        prepare = (FORWARDS[runtime] if phase == "forward" else PHASES[phase])(model, kind, threads, Path(folder))
        runs = {size: partial(prepare, torch.randint(0, 1000, size)) for size in sizes}
        timings = time_all(runs, threads=threads, budget_s=0.2, patience_s=15.0)
    return {"timings": [(timings[size].seconds, timings[size].calm) for size in sizes]}


def load(model: Path, kind: str) -> Any:
    """The model in the class of its checkpoint, as users load it."""
    import torch
    import transformers

    architecture = json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(model, dtype=getattr(torch, kind), attn_implementation="sdpa").eval()


def torch_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    return forward_of(load(model, kind))


def compiled_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    import torch

    return forward_of(torch.compile(load(model, kind), dynamic=False))


def forward_of(module: Any) -> Callable[..., Callable[[], object]]:
    import torch

    torch.set_grad_enabled(False)
    more = {"use_cache": False} if read_spec(module.config.name_or_path).is_decoder else {}

    def prepare(ids: Any) -> Callable[[], object]:
        mask = torch.ones_like(ids)
        return lambda: module(input_ids=ids, attention_mask=mask, **more)

    return prepare


def decode_step(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    """One token after a cached context, which is cut back to its length after each step."""
    import torch

    torch.set_grad_enabled(False)
    module = load(model, kind)

    def prepare(ids: Any) -> Callable[[], object]:
        cache = module(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        mask = torch.ones(ids.shape[0], ids.shape[1] + 1, dtype=torch.int64)

        def step() -> None:
            module(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step

    return prepare


def training_step(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    """Forward, backward and AdamW, with the head's own loss, or without a head the mean of the last hidden state."""
    import torch

    module = load(model, kind).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
    more = {"use_cache": False} if read_spec(model).is_decoder else {}

    def prepare(ids: Any) -> Callable[[], object]:
        def step() -> None:
            output = module(input_ids=ids, attention_mask=torch.ones_like(ids), **more, **({"labels": ids} if more else {}))
            (output.loss if more else output.last_hidden_state.mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return prepare


PHASES = {"decode": decode_step, "train": training_step}


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
    import numpy as np
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

    def prepare(ids: Any) -> Callable[[], object]:
        inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
        return lambda: session.run(None, inputs)

    return prepare


def openvino_forward(model: Path, kind: str, threads: int, folder: Path) -> Callable[..., Callable[[], object]]:
    import numpy as np
    import openvino

    from lighten.device.engines.openvino_load import compile_options

    converted = openvino.convert_model(export(model, folder))
    if kind == "int8":
        import nncf

        random = np.random.default_rng(0)
        batches = [
            {"input_ids": random.integers(0, 1000, (4, 64)), "attention_mask": np.ones((4, 64), np.int64)} for _ in range(8)
        ]  # calibration by random ids: time does not depend on the scales
        converted = nncf.quantize(converted, nncf.Dataset(batches), subset_size=8, model_type=nncf.ModelType.TRANSFORMER)
    request = openvino.Core().compile_model(converted, "CPU", compile_options(f"openvino/{kind}", threads)).create_infer_request()

    def prepare(ids: Any) -> Callable[[], object]:
        inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
        return lambda: request.infer(inputs)

    return prepare


FORWARDS = {"torch": torch_forward, "torch-compile": compiled_forward, "onnxruntime": onnxruntime_forward, "openvino": openvino_forward}
BESIDE_TORCH = ("onnxruntime", "openvino")
"""Runtimes that run an exported encoder alone."""


if __name__ == "__main__":
    main()
