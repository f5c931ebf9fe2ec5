"""How far is the predicted memory from what lives in a run? Formula and trace over the storages of real CPU steps, by model; resident apart.

python benchmarks/memory_truth.py --models bert gpt2 llama --sizes 4x256 --optimizers adamw

The truth is the highest sum of live storages' bytes (`LiveBytes` of tests/live_bytes.py) in a run of transformers' own classes with random
weights: the second training step, a prefill, the fuller of a generation's passes, the last decoding step. Resident memory is the highest
resident set of a process that does the same without an observer, less what it had before the model was built.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import transformers
from family_truth import spec_of
from live_bytes import run_untracked, track
from memory_models import MEMORY_MODELS

from lighten.cost.memory import workload_memory
from lighten.cost.workload import Workload
from lighten.errors import LightenError
from lighten.model.families import has_formula

NEEDS_VALUES = ("mixtral", "vit")
MIB = 2**20


def workloads(sizes: list[str], optimizers: list[str], *, decoder: bool) -> Iterator[Workload]:
    """The grid of one model: training by optimizer, attention and recomputation; inference by phase and attention."""
    phases: list[dict[str, Any]] = [{"phase": "prefill"}, {"phase": "generate", "new_tokens": 8}, {"phase": "decode", "new_tokens": 8}]
    for size, attention in itertools.product(sizes, ("eager", "sdpa")):
        batch, length = map(int, size.split("x"))
        common: dict[str, Any] = {"batch_size": batch, "seq_len": length, "attention": attention}
        for optimizer, recompute in itertools.product(optimizers, ("none", "full")):
            yield Workload(phase="train", optimizer=optimizer, recompute=recompute, **common)  # type: ignore[arg-type]
        for phase in phases if decoder else [{"phase": "encode"}]:
            yield Workload(**phase, **common)


def tracer() -> Callable[[Any, Workload], int] | None:
    """What follows a model on fake tensors; None where this version has none."""
    try:
        from lighten.trace.torch_model import TransformersModel
    except ImportError:
        return None
    return lambda config, workload: TransformersModel(config).follow(workload).memory.peak


def row(name: str, workload: Workload, trace: Callable[[Any, Workload], int] | None, options: argparse.Namespace) -> dict[str, Any]:
    """One model in one workload: bytes true, predicted by formula and by trace, resident."""
    config = MEMORY_MODELS[name](width=options.width, layers=options.layers)
    architecture = config.architectures[0]
    found: dict[str, Any] = {"model": name, **{k: v for k, v in asdict(workload).items() if k in SHOWN}}
    if has_formula(config.to_dict(), architecture):
        found["formula"] = workload_memory(spec_of(config, architecture), workload).peak
    if trace:
        with contextlib.suppress(LightenError):
            found["trace"] = trace(MEMORY_MODELS[name](width=options.width, layers=options.layers), workload)
    fake = options.fake and name not in NEEDS_VALUES and workload.optimizer != "adafactor"
    found["true"] = track(config, workload, fake=fake).peak
    if options.resident:
        found["resident"] = resident_bytes(name, workload, options)
    return found


SHOWN = ("phase", "batch_size", "seq_len", "attention", "optimizer", "recompute")


def resident_bytes(name: str, workload: Workload, options: argparse.Namespace) -> int:
    """Growth of a child process's highest resident set over the model's building and run."""
    asked = json.dumps({"model": name, "width": options.width, "layers": options.layers, "workload": asdict(workload)})
    done = subprocess.run([sys.executable, __file__, "--child", asked], capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def child(asked: dict[str, Any]) -> int:
    """Run one workload without an observer and return by how many bytes the highest resident set grew. Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten (proc(5))
    before = _status("VmRSS")
    run_untracked(MEMORY_MODELS[asked["model"]](width=asked["width"], layers=asked["layers"]), Workload(**asked["workload"]))
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def summary(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Median and worst distance of a prediction's ratio to the truth from 1."""
    ratios = [row[key] / row["true"] for row in rows if key in row]
    away = [abs(ratio - 1) for ratio in ratios]
    if not ratios:
        return {"count": 0}
    return {
        "count": len(ratios), "median": round(statistics.median(away), 6), "worst": round(max(away), 6),
        "least": round(min(ratios), 6), "most": round(max(ratios), 6),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> None:
    """One line a model: workloads, median and worst ratio of each prediction."""
    keys = [key for key in ("formula", "trace", "resident") if any(key in row for row in rows)]
    print(f"{'model':12}{'runs':>5}  " + "  ".join(f"{key + ' median':>16}{'worst':>9}" for key in keys))
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        cells = [summary(mine, key) for key in keys]
        print(f"{name:12}{len(mine):5}  " + "  ".join(f"{c['median']:16.4%}{c['worst']:9.2%}" if c["count"] else f"{'-':>16}{'-':>9}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MEMORY_MODELS), default=list(MEMORY_MODELS))
    parser.add_argument("--sizes", nargs="+", default=["1x64", "4x256"], help="batch x length")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd", "adafactor"])
    parser.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--fake", action="store_true", help="truth on fake tensors where the model allows it: the same bytes, faster")
    parser.add_argument("--no-trace", action="store_true", help="leave the trace out")
    parser.add_argument("--resident", action="store_true", help="measure resident memory too, a process each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if options.child:
        print(child(json.loads(options.child)))
        return
    trace, rows, start = None if options.no_trace else tracer(), [], time.perf_counter()
    for name in options.models:
        config = MEMORY_MODELS[name](width=options.width, layers=options.layers)
        spec = spec_of(config, config.architectures[0]) if has_formula(config.to_dict(), config.architectures[0]) else None
        positions = spec.fixed_len if spec else None
        decoder = bool(spec and (spec.is_decoder or spec.is_encoder_decoder))
        sizes = [f"{size.split('x')[0]}x{positions}" for size in options.sizes] if positions else options.sizes
        for workload in workloads(sizes, options.optimizers, decoder=decoder):
            rows.append(row(name, workload, trace, options))
            last = rows[-1]
            ratios = " ".join(f"{key} {last[key] / last['true']:.4f}" for key in ("formula", "trace", "resident") if key in last)
            print(f"{name:12}{' '.join(str(last[k]) for k in SHOWN):48}{last['true'] / MIB:10.2f} MiB  {ratios}", flush=True)
    table(rows)
    found = {key: summary(rows, key) for key in ("formula", "trace", "resident")}
    versions = {"torch": __import__("torch").__version__, "transformers": transformers.__version__}
    print(json.dumps({"runs": len(rows), "models": options.models, "seconds": round(time.perf_counter() - start, 1), **found, "versions": versions}))


if __name__ == "__main__":
    main()
