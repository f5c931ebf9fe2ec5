"""The fastest artifact of every runtime, beside the peers' own: how fast, how large, how near to the original?

    python benchmarks/runtimes.py --model .models/minilm --environments ENVS
    python benchmarks/runtimes.py --model .models/smollm2-135m-offgrid --environments ENVS

Ours are recipes, written by `lighten compress`; a peer's model is built by the peer's own exporter in an environment of its own
(`peers/runtime_NAME.py`). Each runs in a process with pinned threads, in turn with the original by torch in float32, on tokens that neither had
before; a figure of speed is the median ratio of those turns. Quality is that of the first shape, by one evaluator: the share of texts that keep
their nearest neighbour, or perplexity over the original's. Last, ours that is fastest runs in turn with each of the peers' three fastest.

Rows that `--out` has already are not measured again, unless `--rerun`; an engine that fails leaves a row that says why. The last line on stdout is
one JSON object: `rows`, and by shape `best`: our fastest, the peer that is hardest to beat, and seconds of ours over its; these stand in
runtimes_finals.json beside `--out` too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import interpreter

from lighten.cost import Workload
from lighten.device.environment import pinned_environment
from lighten.errors import LightenError
from lighten.formats.artifact import Work, write_artifact
from lighten.judge.calibration import text_windows
from lighten.judge.child import Child, WorkerFailed
from lighten.judge.latency import time_beside
from lighten.judge.measure import Judge, Limits, Target, artifact_target
from lighten.judge.text import load_text
from lighten.judge.worker import calibration_batches
from lighten.model.runnable import read_runnable
from lighten.recipe import parse_recipe

HERE = Path(__file__).parent
SHAPES = {
    "encoder": ("encode:1x128", "encode:1x16", "encode:1x512", "encode:32x128"), "decoder": ("prefill:1x512", "decode:1x64+64", "decode:8x64+64"),
}  # fmt: skip
"""phase:batch x length + new tokens; the first is that of quality."""
OURS = {
    "encoder": (
        "@ torch",
        "@ torch(dtype=bfloat16)",
        "cast(bfloat16) @ torch-compile",
        "@ onnxruntime",
        "quantize(dynamic, embeddings=true) @ onnxruntime",
        "quantize(static) @ onnxruntime",
        "@ openvino(dtype=bfloat16)",
        "quantize(dynamic, embeddings=true) @ openvino(dtype=bfloat16)",
        "quantize(static) @ openvino",
        "quantize(static) @ openvino(dtype=bfloat16)",
        "quantize(dynamic, embeddings=true) @ ctranslate2",
    ),
    "decoder": (
        "@ torch(dtype=bfloat16)",
        "@ onnxruntime",
        "@ openvino(dtype=bfloat16)",
        "cast(float16) @ openvino(dtype=bfloat16)",
        "quantize(dynamic, embeddings=true) @ openvino(dtype=bfloat16)",
        "quantize(rtn, embeddings=true) @ openvino(dtype=bfloat16)",
        "quantize(rtn, bits=4, group_size=32) | quantize(rtn, embeddings=true, targets=embed) @ openvino(dtype=bfloat16)",
        "quantize(dynamic, embeddings=true) @ ctranslate2",
        "quantize(smoothquant, symmetric_activations=true, embeddings=true, tokens=4096) @ ctranslate2",
        "quantize(rtn, embeddings=true, format=q8_0) @ llama.cpp",
        "quantize(gptq, embeddings=true, format=q8_0) @ llama.cpp",
        "quantize(gptq, embeddings=true, format=q8_0) @ llama.cpp(dtype=float16)",
        "quantize(gptq, embeddings=true, format=q4_0) @ llama.cpp(dtype=float16)",
    ),
}
PEERS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "encoder": (
        ("torch", {"dtype": "float32", "compiled": False}),
        ("torch", {"dtype": "bfloat16", "compiled": False}),
        ("torch", {"dtype": "bfloat16", "compiled": True}),
        ("torch", {"dtype": "float32", "compiled": True, "quantization": "int8-dynamic"}),
        ("onnxruntime", {"int8": False}),
        ("onnxruntime", {"int8": True}),
        ("openvino", {"int8": False, "precision": "bf16"}),
        ("openvino", {"int8": True, "precision": "bf16"}),
        ("openvino", {"int8": True, "precision": "f32"}),
        ("ctranslate2", {"quantization": "float32"}),
        ("ctranslate2", {"quantization": "int8"}),
    ),
    "decoder": (
        ("torch", {"dtype": "bfloat16", "compiled": False}),
        ("torch", {"dtype": "bfloat16", "compiled": False, "quantization": "int8-weights"}),
        ("onnxruntime-genai", {"precision": "fp32"}),
        ("onnxruntime-genai", {"precision": "int4"}),
        ("optimum-intel", {"weights": "fp16", "precision": "bf16"}),
        ("optimum-intel", {"weights": "int8", "precision": "bf16"}),
        ("optimum-intel", {"weights": "int4", "group_size": 64, "precision": "bf16"}),
        ("ctranslate2", {"quantization": "float32"}),
        ("ctranslate2", {"quantization": "int8"}),
        ("llama-cpp", {"type": "F16"}),
        ("llama-cpp", {"type": "Q8_0"}),
        ("llama-cpp", {"type": "Q4_K_M"}),
    ),
}
FINALS = 5
CONTENDERS = 3
"""Peers that our fastest runs in turn with: single rows are off by what else the machine did."""
SHOWN = ("neighbour_agreement", "cosine", "perplexity_ratio")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A recipe of ours, or a peer and its settings."""

    recipe: str | None = None
    peer: str | None = None
    settings: str = ""

    @property
    def name(self) -> str:
        return self.recipe or f"{self.peer} {', '.join(f'{key}={value}' for key, value in json.loads(self.settings).items())}"

    @property
    def key(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]


def workload(shape: str) -> Workload:
    """
    >>> workload("decode:8x64+32").new_tokens
    32
    """
    phase, _, sizes = shape.partition(":")
    sizes, _, more = sizes.partition("+")
    batch, length = (int(each) for each in sizes.split("x"))
    return Workload(phase=phase, batch_size=batch, seq_len=length, new_tokens=int(more or 0))  # type: ignore[arg-type]


class Bench(Judge):
    """Measures ours and the peers' alike."""

    peers: dict[Path, tuple[Engine, Path]]
    """Where a peer's model is built → the peer, and its Python."""
    peer_bytes: int | None = None
    """What the peer that was measured last says of its files."""
    judged = True
    """Whether quality is looked at."""

    def child(self, target: Target) -> Child:
        if target.folder not in self.peers:
            return super().child(target)
        engine, python = self.peers[target.folder]
        pinned = pinned_environment(self.limits.threads, runtime=str(engine.peer)) | {"PYTHONPATH": ""}
        command = ["env", *(f"{name}={value}" for name, value in pinned.items()), str(python), str(script_of(str(engine.peer)))]
        return Child(runtime=str(engine.peer), threads=self.limits.threads, memory_bytes=self.limits.memory_bytes, command=command)

    def load(self, child: Child, target: Target) -> dict[str, Any]:
        if target.folder not in self.peers:
            return super().load(child, target)
        settings = json.loads(self.peers[target.folder][0].settings)
        return child.ask("load", timeout_s=self.limits.timeout_s, model=str(self.original), work=str(target.folder), settings=settings)

    def quality(self, child: Child, target: Target) -> dict[str, Any]:
        if target.folder in self.peers:
            self.peer_bytes = child.ask("describe", timeout_s=self.limits.timeout_s)["size_bytes"]
        return super().quality(child, target) if self.judged else {}


def script_of(peer: str) -> Path:
    return HERE / "peers" / f"runtime_{peer.replace('-', '_')}.py"


def engines(arguments: argparse.Namespace) -> list[Engine]:
    kind = arguments.kind
    found = [Engine(recipe=recipe) for recipe in arguments.recipe or OURS[kind]]
    return found + [
        Engine(peer=peer, settings=json.dumps(settings)) for peer, settings in PEERS[kind] if arguments.peers is None or peer in arguments.peers
    ]


def target_of(engine: Engine, bench: Bench, arguments: argparse.Namespace) -> Target:
    """The artifact of a recipe, made where it is missing; or where a peer builds."""
    folder = arguments.work / f"{arguments.model.name}-{engine.key}"
    if engine.recipe is not None:
        if not folder.exists():

            def calibration() -> Any:
                return calibration_batches(arguments.model, arguments.text)

            text = load_text(arguments.text)
            work = Work(windows=text_windows(arguments.model, bench.spec, text), text=text.fingerprint)
            write_artifact(
                arguments.model, parse_recipe(engine.recipe), folder, calibration=calibration, exports=arguments.work / "exports", work=work
            )
        return artifact_target(folder)
    bench.peers[folder] = (engine, interpreter(script_of(str(engine.peer)), arguments.environments / f"runtime-{engine.peer}"))
    return Target(folder=folder, runtime=str(engine.peer), dtype="", size_bytes=0)


def measured(engine: Engine, shape: str, bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    said = {"engine": engine.name, "ours": engine.recipe is not None, "model": arguments.model.name, "shape": shape, "threads": arguments.threads}
    try:
        found = bench.measure(target_of(engine, bench, arguments)).as_json()
    except (LightenError, WorkerFailed) as error:
        return said | {"failure": str(error)}
    if not said["ours"]:
        found["size_bytes"] = bench.peer_bytes
    return said | found


def finals(
    rows: Sequence[dict[str, Any]], shape: str, bench: Bench, by_name: dict[str, Engine], arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """Our fastest in turn with each of the peers' fastest, in new processes each time: one process may be a fifth slower than the next. What is told
    is the peer that is hardest to beat."""
    of_shape = sorted((row for row in rows if row["shape"] == shape and row.get("speedup")), key=lambda row: -row["speedup"])
    ours, theirs = ([row for row in of_shape if row["ours"] == own] for own in (True, False))
    if not ours or not theirs:
        return None
    found = []
    for other in theirs[:CONTENDERS]:
        targets = [target_of(by_name[row["engine"]], bench, arguments) for row in (ours[0], other)]
        ratios = [_seconds_over(targets[0], targets[1], shape, bench) for _ in range(FINALS)]
        found.append({"ours": ours[0]["engine"], "theirs": other["engine"], "seconds_over_theirs": statistics.median(ratios), "ratios": ratios})
    return max(found, key=lambda final: float(final["seconds_over_theirs"])) | {"beside": found}


def _seconds_over(own: Target, other: Target, shape: str, bench: Bench) -> float:
    with bench.child(own) as first, bench.child(other) as second:
        bench.load(first, own)
        first.pause()
        bench.load(second, other)
        second.pause()
        first.resume()
        beside = time_beside(first, second, workload(shape), timeout_s=bench.limits.timeout_s, warm=False)
    assert beside.speedup is not None, "the other ran beside it"
    return 1 / beside.speedup


def line(row: dict[str, Any]) -> str:
    if "failure" in row:
        return f"{row['shape']:15} {row['engine'][:88]:88} {row['failure'][:120]}"
    kept = ", ".join(f"{name} {row['quality'][name]['value']:.4f}" for name in SHOWN if name in row["quality"])
    return f"{row['shape']:15} {row['engine'][:88]:88} {row['speedup']:6.2f}x  {row['size_bytes'] / 1e6:6.1f} MB  {kept}"


def _keep(path: Path, final: dict[str, Any]) -> None:
    """In the place of the last final of the same model and shape."""
    known = json.loads(path.read_text()) if path.exists() else []
    kept = [each for each in known if (each["model"], each["shape"]) != (final["model"], final["shape"])]
    path.write_text(json.dumps([*kept, final], indent=1) + "\n")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--environments", type=Path, help="where the peers' environments are, or are made (default: ours alone)")
    parser.add_argument("--peers", type=lambda text: text.split(","), help="of those that there are")
    parser.add_argument("--recipe", action="append", help="of ours, instead of the list")
    parser.add_argument("--shape", action="append", help="such as encode:32x128 or decode:8x64+64, instead of the list")
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file (default: the embedded text)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="keeps artifacts and peers' models (default: they are thrown away)")
    parser.add_argument("--rerun", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "runtimes.json")
    arguments = parser.parse_args(given)
    if arguments.environments is None:
        arguments.peers = []
    with tempfile.TemporaryDirectory(prefix="runtimes-") as scratch:
        arguments.work = (arguments.work or Path(scratch)).resolve()
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    spec = read_runnable(arguments.model)
    arguments.kind = "decoder" if spec.is_decoder else "encoder"
    listed = engines(arguments)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    limits = Limits(threads=arguments.threads, memory_bytes=16 * 2**30, timeout_s=1200)
    best = {}
    for number, shape in enumerate(arguments.shape or SHAPES[arguments.kind]):
        bench = Bench(arguments.model, spec, load_text(arguments.text), workload(shape), limits, arguments.work / "judge")
        bench.peers, bench.judged = {}, number == 0
        for engine in listed:
            same = [row for row in rows if (row["model"], row["engine"], row["shape"]) == (arguments.model.name, engine.name, shape)]
            if not same or arguments.rerun:
                rows = [row for row in rows if row not in same] + [measured(engine, shape, bench, arguments)]
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
                print(line(rows[-1]), file=sys.stderr, flush=True)
        named = {engine.name for engine in listed}
        own = [row for row in rows if row["model"] == arguments.model.name and row["engine"] in named]
        if found := finals(own, shape, bench, {engine.name: engine for engine in listed}, arguments):
            best[shape] = found
            _keep(arguments.out.with_name("runtimes_finals.json"), {"model": arguments.model.name, "shape": shape, **found})
            print(f"{shape:15} ours over theirs, in turn: {found['seconds_over_theirs']:.3f} ({found['ours']} | {found['theirs']})", file=sys.stderr)
        bench.close()
    print(json.dumps({"rows": [row for row in rows if row["model"] == arguments.model.name], "best": best}))


if __name__ == "__main__":
    main()
