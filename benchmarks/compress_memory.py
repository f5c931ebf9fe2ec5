"""How much memory does `lighten compress` say that it needs, and how much does it take, method by method?

    python benchmarks/compress_memory.py --model .models/smollm2-135m-offgrid .models/minilm

Each recipe is a process of its own, with few tokens and steps, which change time and not memory; what it predicts is held against the highest
resident size that the system counted for it. With `--under` it is run again with `--memory` set to what was predicted, and has to end in
the same weights. The last line is one JSON object; exit 1 where a run failed, or took more than was predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROUNDED = "quantize(rtn, bits=4, group_size=64)"
DECODER = (
    "cast(bfloat16) | quantize(gptq, bits=4, group_size=64, tokens=4096)",
    "cast(bfloat16) | rotate(hadamard) | quantize(gptq, bits=4, group_size=64, tokens=4096)",
    "cast(bfloat16) | quantize(awq, bits=4, group_size=64, tokens=4096)",
    "quantize(smoothquant, activations=dynamic, tokens=4096)",
    "cast(bfloat16) | quantize(auto, size<=80MB, tokens=2048)",
    f"cast(bfloat16) | {ROUNDED} | distill(scales, steps=2, tokens=2048)",
    f"cast(bfloat16) | {ROUNDED} | distill(qat, steps=2, tokens=2048)",
    f"cast(bfloat16) | {ROUNDED} | distill(scales, steps=2, tokens=2048, self_tokens=2048)",
)
EITHER = (
    "quantize(rtn, bits=8, embeddings=true)",
    "quantize(hqq, bits=4)",
    "quantize(gptq, bits=4, group_size=64, tokens=4096)",
    f"{ROUNDED} @ openvino",
    f"{ROUNDED} @ onnxruntime",
    "quantize(gptq, format=q4_k, tokens=4096) @ llama.cpp",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run; bytes.

    Attributes:
        refused: why it did not run, in its own words.
        under: it ended in a limit of what was predicted. None: not tried.
    """

    model: str
    recipe: str
    predicted: int | None = None
    measured: int | None = None
    refused: str | None = None
    under: bool | None = None

    def line(self) -> str:
        if self.predicted is None or self.measured is None:
            return f"{self.recipe:110} refused: {self.refused}"
        under = "" if self.under is None else "   kept as a limit" if self.under else "   NOT kept as a limit"
        share = self.measured / self.predicted
        return f"{self.recipe:110} {self.predicted / 1e9:.2f} GB predicted, {self.measured / 1e9:.2f} measured ({share:.2f}){under}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A `lighten compress` that ended: its document, or its last line; and the most that the system counted for it."""

    document: dict[str, Any] | None
    said: str
    bytes: int


def compress(model: Path, recipe: str, out: Path, threads: int, *more: str) -> Ended:
    command = [sys.executable, "-m", "lighten.cli.main", "compress", str(model), "--recipe", recipe, "-o", str(out), "--json", *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    last = (texts[1].strip().splitlines() or ["no output"])[-1][:200]
    return Ended(document=None if child.returncode else json.loads(texts[0]), said=last, bytes=used.ru_maxrss * 1024)


def measure(model: Path, recipe: str, *, threads: int, under: bool) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        done = compress(model, recipe, Path(folder) / "out", threads)
        if done.document is None:
            return Measured(model=model.name, recipe=recipe, refused=done.said)
        predicted = round(done.document["predicted"]["peak_memory_bytes"])
        kept = None
        if under:
            again = compress(model, recipe, Path(folder) / "again", threads, "--memory", f"{predicted}B")
            kept = again.document is not None and weights_of(Path(folder) / "out") == weights_of(Path(folder) / "again")
            if again.document is None:
                print(again.said, file=sys.stderr)
        return Measured(model=model.name, recipe=recipe, predicted=predicted, measured=done.bytes, under=kept)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf", ".onnx", ".bin", ".data")}


def all_of(arguments: argparse.Namespace) -> Iterator[Measured]:
    for model in arguments.model:
        decoder = "CausalLM" in json.loads((model / "config.json").read_text())["architectures"][0]
        print(model.name, flush=True)
        for recipe in arguments.recipe or (*EITHER, *(DECODER if decoder else ())):
            found = measure(model, recipe, threads=arguments.threads, under=arguments.under)
            print(found.line(), flush=True)
            yield found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", default=[Path(".models/smollm2-135m-offgrid")])
    parser.add_argument("--recipe", action="append", help="instead of the list; may be repeated")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--under", action="store_true", help="run again with the prediction as --memory")
    found = list(all_of(parser.parse_args()))
    print(json.dumps([asdict(each) for each in found]))
    return 1 if any(each.predicted is None or each.under is False or (each.measured or 0) > each.predicted for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
