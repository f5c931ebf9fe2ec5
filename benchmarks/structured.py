"""Smaller models, recovered: what is lost, how large the rest is, and is it as much faster as was predicted?

    python benchmarks/structured.py --model .models/minilm --minutes 10
    python benchmarks/structured.py --model .models/smollm2-135m-offgrid --minutes 30

Each recipe makes a smaller model of the given one and trains it against the original's answers, for `--minutes` at most. What it leaves is a plain
folder, which is then run by torch, ONNX Runtime and OpenVINO, in turn with the original by the same runtime, `--rounds` times; figures are medians.

A row's figures
    parameters, size_bytes   of the model, and over the original's
    quality                  perplexity over the original's, of a decoder; the share of texts that keep their nearest neighbour, of an encoder
    speedup                  by runtime: the original's latency over the smaller one's, measured; predicted; and the second over the first

Rows that `--out` has already are not measured again, unless `--rerun`; a smaller model that `--work` has already is not made again. The last line on
stdout is one JSON object: `rows`, and `error`, the median of |predicted / measured - 1| over all speed-ups.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNTIMES = ("torch", "onnxruntime", "openvino")
SHOWN = ("perplexity_ratio", "kl", "neighbour_agreement", "cosine")
"""Qualities in the table."""
RECOVER_ENCODER = "distill(embeddings, minutes<={minutes}, tokens=200000, hidden=1.0, dtype=bfloat16)"
RECOVER_DECODER = "distill(logits, minutes<={minutes}, tokens=200000, self_tokens=65536, batch_tokens=1024, dtype=bfloat16)"
ENCODER = {
    "30 % fewer: neurons, blocks": f"shrink(ffn, ratio=0.7) | shrink(layers, keep=4) | {RECOVER_ENCODER}",
    "student of 3 blocks": f"shrink(layers, keep=3) | {RECOVER_ENCODER}",
    "30 % fewer: neurons, words": f"shrink(ffn, ratio=0.5) | {RECOVER_ENCODER} | shrink(vocab, ratio=0.31)",
}
DECODER = {
    "25 % fewer: neurons": f"shrink(ffn, ratio=0.43) | {RECOVER_DECODER}",
    "25 % fewer: neurons, blocks": f"shrink(ffn, ratio=0.3) | shrink(layers, keep=26) | {RECOVER_DECODER}",
}
"""Name → recipe."""


def run(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """What a command of lighten prints as JSON."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-m", "lighten", *arguments, "--json"], capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no output"])[-1])
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def measure(words: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """A folder by its own runtime, or by one that the words name."""
    shape = ["--batch-size", str(arguments.batch_size), "--seq-len", str(arguments.seq_len), "--phase", "prefill" if arguments.decoder else "encode"]
    return run(["measure", *words, *shape], arguments.threads)


def for_runtime(made: Path, runtime: str, arguments: argparse.Namespace) -> Path:
    """The smaller model as an artifact for a runtime, its weights as they are."""
    if runtime == "torch":
        return made
    folder = made.with_name(f"{made.name}-{runtime}")
    if not folder.exists():
        run(["compress", str(made), "--recipe", f"@ {runtime}", "-o", str(folder)], arguments.threads)
    return folder


def with_minutes(recipe: str, arguments: argparse.Namespace) -> str:
    return recipe.replace("{minutes}", f"{arguments.minutes:g}")


def small_model(recipe: str, arguments: argparse.Namespace, work: Path) -> Path:
    """The folder that the recipe leaves, with the seconds that it took beside it; made where `work` does not have it."""
    folder = work / f"{arguments.model.name}-{hashlib.sha256(f'{recipe} {arguments.text}'.encode()).hexdigest()[:12]}"
    if not (seconds := folder.with_suffix(".seconds")).exists():
        text = ["--text", str(arguments.text)] if arguments.text else []
        began = time.perf_counter()
        run(["compress", str(arguments.model), "--recipe", recipe, "-o", str(folder), *text], arguments.threads)
        seconds.write_text(str(time.perf_counter() - began))
    return folder


def row(name: str, recipe: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    made = small_model(with_minutes(recipe, arguments), arguments, work)
    speedups: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    for runtime in RUNTIMES:
        found: dict[str, list[dict[str, Any]]] = {"original": [], "small": []}
        small = for_runtime(made, runtime, arguments)
        for _ in range(arguments.rounds):
            found["original"].append(measure([str(arguments.model), "--runtime", runtime], arguments))
            found["small"].append(measure([str(small)], arguments))
        latency = {which: statistics.median(each["latency_s"] for each in rows) for which, rows in found.items()}
        predicted = {which: statistics.median(each["predicted"]["latency_s"] for each in rows) for which, rows in found.items()}
        measured, expected = latency["original"] / latency["small"], predicted["original"] / predicted["small"]
        speedups[runtime] = {"measured": measured, "predicted": expected, "ratio": expected / measured}
        quality = quality or found["small"][0]["quality"]
    whole, left = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (arguments.model, made))
    return {
        "name": name, "recipe": recipe, "model": arguments.model.name, "seconds": float(made.with_suffix(".seconds").read_text()),
        "size_bytes": left, "size_share": left / whole, "quality": quality, "speedup": speedups,
        "threads": arguments.threads, "minutes": arguments.minutes,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for each in rows:
        if "failure" in each:
            lines.append(f"{each['name']:36} {each['failure']}")
            continue
        said = "  ".join(f"{runtime} {found['measured']:.2f}x (pred. {found['predicted']:.2f}x)" for runtime, found in each["speedup"].items())
        kept = ", ".join(f"{key} {value['value']:.4f}" for key, value in each["quality"].items() if key in SHOWN)
        lines.append(f"{each['name']:36} {each['size_bytes'] / 1e6:6.1f} MB ({each['size_share']:.3f})  {kept}  {said}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".models/minilm"))
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file (default: the embedded text)")
    parser.add_argument("--recipe", action="append", help="instead of the list")
    parser.add_argument("--minutes", type=float, default=10, help="of training, at most")
    parser.add_argument("--rounds", type=int, default=3, help="in turn")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="keeps the smaller models (default: they are thrown away)")
    parser.add_argument("--make", action="store_true", help="make the smaller models in --work, and time nothing: that wants a quiet machine")
    parser.add_argument("--rerun", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "structured.json")
    found = parser.parse_args(arguments)
    if found.make and not found.work:
        parser.error("--make leaves what it makes in --work, which is missing.")
    found.decoder = "CausalLM" in json.loads((found.model / "config.json").read_text())["architectures"][0]
    return found


def main() -> None:
    arguments = parse()
    cases = {recipe: recipe for recipe in arguments.recipe} if arguments.recipe else DECODER if arguments.decoder else ENCODER
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.make:
        for recipe in cases.values():
            small_model(with_minutes(recipe, arguments), arguments, arguments.work)
        return
    for name, recipe in cases.items():
        known = [each for each in rows if (each["model"], each["recipe"]) == (arguments.model.name, recipe)]
        if known and not arguments.rerun:
            continue
        with tempfile.TemporaryDirectory(prefix="structured-") as scratch:
            try:
                made = row(name, recipe, arguments, arguments.work or Path(scratch))
            except RuntimeError as error:
                made = {"name": name, "recipe": recipe, "model": arguments.model.name, "failure": str(error)}
        rows = [each for each in rows if each not in known] + [made]
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(table([made]), file=sys.stderr, flush=True)
    own = [each for each in rows if each["model"] == arguments.model.name]
    print(table(own))
    errors = [abs(found["ratio"] - 1) for each in own for found in each.get("speedup", {}).values()]
    print(json.dumps({"rows": own, "error": statistics.median(errors) if errors else None}))


if __name__ == "__main__":
    main()
