"""Do other people's loaders compute from our artifacts what we compute? Each artifact is run by its own runtime and held to our evaluation.

Ours is the original class in torch, float32, with the dequantized weights put into it (`formats.torch_model.load_module`).
Theirs: `transformers` with the `compressed-tensors` package on the same folder, and OpenVINO and ONNX Runtime on graphs that hold the same codes.
Said for each: the largest difference of a logit (of an encoder's hidden state), its size relative to all of them, and both perplexities.

    python benchmarks/loaders.py --model .models/smollm2-135m-offgrid
    python benchmarks/loaders.py --model .models/minilm --recipe "quantize(rtn, bits=4, group_size=64, embeddings=true)"

Transformers, compressed-tensors, OpenVINO and ONNX Runtime are to be installed; a loader that refuses is said, with its own words.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lighten.errors import LightenError
from lighten.formats.artifact import write_artifact
from lighten.formats.safetensors_folder import other_loaders_refuse
from lighten.formats.torch_model import load_module
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.model import read_spec
from lighten.recipe import apply_recipe, parse_recipe
from lighten.runtimes import MODULES, missing_packages
from lighten.runtimes.session import Setup

Tokens = tuple[NDArray[np.int64], NDArray[np.int64]]
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]

RECIPES = (
    "quantize(rtn, bits=4, group_size=64, symmetric=true) | quantize(rtn, bits=8, symmetric=true, embeddings=true, targets='embed')",
    "quantize(rtn, bits=4, group_size=64)",
    "quantize(rtn, bits=8)",
    "quantize(rtn, activations=dynamic)",
    "quantize(rtn, format=fp8)",
    "quantize(rtn, format=mxfp4)",
    "quantize(rtn, format=nvfp4)",
)
"""4-bit with an 8-bit table, with zero points, 8 bits, 8-bit activations, and the three float formats."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One loader on one artifact.

    Attributes:
        refused: why it did not run.
    """

    recipe: str
    loader: str
    seconds: float | None = None
    largest_difference: float | None = None
    relative_difference: float | None = None
    perplexity: float | None = None
    our_perplexity: float | None = None
    refused: str | None = None

    def line(self) -> str:
        if self.refused is not None:
            return f"{self.loader:13} refused: {self.refused}"
        perplexity = "" if self.perplexity is None else f", perplexity {self.perplexity:.4f} (ours {self.our_perplexity:.4f})"
        return f"{self.loader:13} max |Δ| {self.largest_difference:.2e}, relative {self.relative_difference:.2e}{perplexity}, {self.seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2-135m-offgrid"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rows", type=int, default=2, help="windows of text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--recipe", action="append", help="steps without a runtime; may be said several times")
    parser.add_argument("--loader", action="append", choices=LOADERS, help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")
    tokens = windows(asked.model, asked.text, rows=asked.rows, length=asked.seq_len)
    found: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, recipe in enumerate(asked.recipe or RECIPES):
            print(recipe, flush=True)
            for each in compare(
                asked.model, recipe, Path(folder) / str(number), tokens, loaders=asked.loader or list(LOADERS), threads=asked.threads
            ):
                print("   ", each.line(), flush=True)
                found.append(each)
    print(json.dumps({"model": str(asked.model), "tokens": tokens[0].size, "compared": [vars(each) for each in found]}))


def windows(model: Path, text: Path | None, *, rows: int, length: int) -> Tokens:
    """Tokens of the text's test part, and their mask."""
    spec = read_spec(model)
    if spec.is_decoder:
        ids = Tokenizer(model).windows(load_text(text).test, count=rows, length=length)
        return ids, np.ones_like(ids)
    return next(iter(Tokenizer(model).batches(load_text(text).test, batch_size=rows, length=min(length, spec.max_positions or length))))


def compare(model: Path, recipe: str, folder: Path, tokens: Tokens, *, loaders: list[str], threads: int) -> Iterator[Compared]:
    """Each loader on the artifact of a recipe."""
    ids, mask = tokens
    spec = read_spec(model)
    packed = write_artifact(model, parse_recipe(recipe), folder / "torch", calibration=list).folder
    module = load_module(packed, read_spec(packed), dtype="float32", attention="eager")
    ours = run_module(module, decoder=spec.is_decoder)(ids, mask)
    del module
    for name in loaders:
        start = time.perf_counter()
        try:
            theirs = LOADERS[name](model, recipe, packed, folder, threads)(ids, mask)
        except (LightenError, RuntimeError, AttributeError, ValueError) as error:
            yield Compared(recipe=recipe, loader=name, refused=str(error).splitlines()[0][:200])
            continue
        counted = mask.astype(bool)
        difference = (theirs - ours)[counted]
        yield Compared(
            recipe=recipe, loader=name, seconds=time.perf_counter() - start, largest_difference=float(np.abs(difference).max()),
            relative_difference=float(np.linalg.norm(difference) / np.linalg.norm(ours[counted])),
            perplexity=perplexity(theirs, ids) if spec.is_decoder else None, our_perplexity=perplexity(ours, ids) if spec.is_decoder else None,
        )  # fmt: skip


def perplexity(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> float:
    scores = torch.from_numpy(logits[:, :-1]).double().log_softmax(-1)
    return math.exp(-float(scores.gather(-1, torch.from_numpy(ids[:, 1:, None])).mean()))


def run_module(module: Any, *, decoder: bool) -> Run:
    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            output = module(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        found: NDArray[np.float32] = (output.logits if decoder else output.last_hidden_state).float().numpy()
        return found

    return run


def by_transformers(model: Path, recipe: str, packed: Path, folder: Path, threads: int) -> Run:
    """The folder as `transformers` loads it by itself, with the `compressed-tensors` package."""
    import transformers

    transformers.logging.set_verbosity_error()
    spec = read_spec(packed)
    if refused := other_loaders_refuse(apply_recipe(parse_recipe(recipe), read_spec(model))):
        raise LightenError(refused[0])
    kind = transformers.AutoModelForCausalLM if spec.is_decoder else transformers.AutoModel
    return run_module(kind.from_pretrained(packed, dtype=torch.float32, attn_implementation="eager"), decoder=spec.is_decoder)


def by_runtime(name: str) -> Callable[[Path, str, Path, Path, int], Run]:
    def load(model: Path, recipe: str, packed: Path, folder: Path, threads: int) -> Run:
        if missing := missing_packages(name):
            raise LightenError(f"not installed: {', '.join(missing)}.")
        said = parse_recipe(f"{recipe} @ {name}")
        made = write_artifact(model, said, folder / name, calibration=list, exports=folder.parent / "exports")
        spec = read_spec(model)
        session = MODULES[name].load(made.folder, spec, Setup(dtype="float32", threads=threads))
        return (lambda ids, mask: session.logits(ids)) if spec.is_decoder else session.encode

    return load


LOADERS: dict[str, Callable[[Path, str, Path, Path, int], Run]] = {
    "transformers": by_transformers, "openvino": by_runtime("openvino"), "onnxruntime": by_runtime("onnxruntime"),
}  # fmt: skip
"""Name → what runs an artifact."""

if __name__ == "__main__":
    main()
