"""Our GGUF files in llama.cpp: agreement with our own evaluation, and perplexity beside llama.cpp's own quantizer at the same size.

    python benchmarks/gguf_llama_cpp.py --model .models/smollm2-135m-offgrid --types q8_0 q4_k q4_0 q3_k
    python benchmarks/gguf_llama_cpp.py --architectures          # every architecture that is written, on tiny random models

Three parts, each by its own option or all:

- `--architectures`: each case of tests/test_gguf_write.py is written in float32 and run by llama.cpp; its outputs beside transformers'.
- `--floats`: the model in F32, F16 and BF16; llama.cpp's logits beside torch's of the same weights.
- `--types`: the model in types of ggml by `quantize(METHOD, format=TYPE, embeddings=true)`; llama.cpp's perplexity beside torch's of the same file
  dequantized, and beside llama.cpp's own quantizer in the same type (`pure`, so that every matrix has it or its fallback), without an importance
  matrix and with one from the same calibration tokens, all of them.

llama.cpp runs in another process with the interpreter of `--python`; without it an environment is made under `--work`, where llama-cpp-python is
built from source (about 10 minutes on 2 cores). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
PACKAGES = ["numpy", "pyyaml", "huggingface_hub", "platformdirs", "llama-cpp-python"]
FILE_TYPES = {"q8_0": 7, "q6_k": 18, "q5_k": 16, "q4_k": 14, "q4_0": 2, "q3_k": 11, "q2_k": 10}
"""Recipe word → llama_ftype of llama.cpp's quantizer, the variant without mixtures (_S)."""


_AS_CHILD = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs this file without its folder on the path, where its own name would stand before the package's."""


# ---- in the process that has llama.cpp ----


def child(job: dict[str, Any]) -> dict[str, Any]:
    return {"quantize": child_quantize, "tokenize": child_tokenize, "run": child_run}[job["do"]](job)


def child_tokenize(job: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's tokens of each text, with the marks around it."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    vocabulary = llama_cpp.llama_model_get_vocab(llama_cpp.llama_model_load_from_file(job["file"].encode(), parameters))
    found = []
    for text in json.loads(Path(job["texts"]).read_text()):
        raw = text.encode()
        tokens = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), tokens, len(tokens), True, False)
        found.append(list(tokens[:count]))
    return {"tokens": found}


def child_run(job: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the first row to a file, and the mean negative log-likelihood of each row."""
    from lighten.runtimes import llama_cpp
    from lighten.runtimes.session import Setup

    spec: Any = SimpleNamespace(is_decoder=job["decoder"])
    session = llama_cpp.load(Path(job["file"]), spec, Setup(dtype="float32", threads=job["threads"]))
    ids = np.load(job["ids"])
    losses = []
    start = time.perf_counter()
    for row, window in enumerate(ids):
        out = session.logits(window[None])[0] if job["decoder"] else session.encode(window[None], np.ones_like(window[None]))[0]
        if row == 0:
            np.save(job["out"], out)
        losses.append(loss(out, window) if job["decoder"] else 0.0)
    return {"losses": losses, "precision": session.precision, "version": llama_cpp.version(), "seconds": time.perf_counter() - start}


def child_quantize(job: dict[str, Any]) -> dict[str, Any]:
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure, parameters.nthread = job["file_type"], True, job["threads"]
    if job["importance"]:
        entries = list(np.load(job["importance"]).items())
        array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
        for place, (name, values) in enumerate(entries):
            array[place].name, array[place].size = name.encode(), values.size
            array[place].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = array
    code = llama_cpp.llama_model_quantize(job["file"].encode(), job["out"].encode(), ctypes.byref(parameters))
    return {"code": code}


def loss(logits: Any, window: Any) -> float:
    """The mean negative log-likelihood of a window's tokens but the first, in nats."""
    rows = logits[:-1].astype(np.float64)
    top = rows.max(-1)
    normal = top + np.log(np.exp(rows - top[:, None]).sum(-1))
    return float((normal - rows[np.arange(len(rows)), window[1:]]).mean())


# ---- in this one ----


class Bench:
    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.python = arguments.python or self._environment()

    def _environment(self) -> str:
        folder = self.work / "llama-cpp"
        if not (folder / "bin" / "python").exists():
            print(f"building llama-cpp-python in {folder}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "install", "-q", *PACKAGES], check=True)
        return str(folder / "bin" / "python")

    def ask(self, **job: Any) -> dict[str, Any]:
        """What the other process answers; it may die of an instruction that this machine has not."""
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        command = [self.python, "-c", _AS_CHILD, __file__, "--child", json.dumps(job | {"threads": self.arguments.threads})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llama.cpp ended with {done.returncode}: {done.stderr[-500:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def run(self, file: Path, ids: Any, *, decoder: bool = True) -> tuple[dict[str, Any], Any]:
        np.save(self.work / "ids.npy", ids)
        found = self.ask(do="run", file=str(file), ids=str(self.work / "ids.npy"), out=str(self.work / "out.npy"), decoder=decoder)
        return found, np.load(self.work / "out.npy")


def architectures(bench: Bench) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    import test_gguf_write
    import torch
    import transformers

    found = {}
    for case, (_, architecture, _) in test_gguf_write.CASES.items():
        folder = test_gguf_write.saved(case, bench.work / "tiny" / case)
        path = test_gguf_write.written(folder, folder / "model.gguf")
        ids = np.random.default_rng(0).integers(3, 96, (1, 48))
        decoder = architecture != "BertModel"
        with torch.inference_mode():
            output = getattr(transformers, architecture).from_pretrained(folder).eval()(torch.from_numpy(ids))
        expected = (output.logits if decoder else output.last_hidden_state)[0].float().numpy()
        _, given = bench.run(path, ids, decoder=decoder)
        off = np.abs(given - expected)
        found[case] = {"max_difference": float(off.max()), "mean_difference": float(off.mean()), "deviation": float(expected.std())}
        print(f"{case:12} max |Δ| {off.max():.1e}   mean |Δ| {off.mean():.1e}   of outputs with deviation {expected.std():.2f}", flush=True)
    return found


class Model:
    """A model, its test windows, and its evaluation by torch."""

    def __init__(self, bench: Bench) -> None:
        import torch

        from lighten.judge.text import load_text
        from lighten.judge.tokens import Tokenizer
        from lighten.model import read_spec

        torch.set_num_threads(bench.arguments.threads)
        self.bench, self.folder = bench, Path(bench.arguments.model)
        self.spec = read_spec(self.folder)
        self.text = load_text(Path(bench.arguments.text) if bench.arguments.text else None)
        count, length = bench.arguments.windows, bench.arguments.length
        self.ids = Tokenizer(self.folder).windows(self.text.test, count=count, length=length)

    def module(self) -> Any:
        import torch
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def torch_losses(self, module: Any) -> tuple[list[float], Any]:
        import torch

        losses, first = [], None
        with torch.inference_mode():
            for window in self.ids:
                logits = module(torch.from_numpy(window[None])).logits[0].numpy()
                first = logits if first is None else first
                losses.append(loss(logits, window))
        return losses, first

    def of_file(self, path: Path) -> Any:
        """The module with the weights of a GGUF file, dequantized by the `gguf` package, in this model's order."""
        import gguf
        import torch

        from lighten.formats.gguf_file import lay_out

        module = self.module()
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        own = dict(module.named_parameters())
        for name, slot in lay_out(self.spec).slots.items():
            tensor = read[slot.placed.name]
            value = torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type))
            target = own[name] if name in own else own[name.removeprefix("model.")]
            rows = value if slot.order is None else torch.empty_like(value).index_copy_(0, slot.order, value)
            target.data.copy_(rows.reshape(target.shape))
        return module

    def importance(self) -> Path:
        """Mean squares of each linear's input over all calibration tokens, as llama.cpp's quantizer takes them."""
        import torch

        from lighten.formats.gguf_file import lay_out
        from lighten.judge.calibration import text_windows

        module, sums, counts = self.module(), {}, {}
        slots = lay_out(self.spec).slots

        def watch(name: str) -> Any:
            def hook(_: Any, inputs: tuple[Any, ...]) -> None:
                rows = inputs[0].reshape(-1, inputs[0].shape[-1])
                sums[name] = sums.get(name, 0) + rows.square().sum(0)
                counts[name] = counts.get(name, 0) + len(rows)

            return hook

        for name, inner in module.named_modules():
            if isinstance(inner, torch.nn.Linear) and f"{name}.weight" in slots:
                inner.register_forward_pre_hook(watch(slots[f"{name}.weight"].placed.name))
        with torch.inference_mode():
            for batch in text_windows(self.folder, self.spec, self.text)(self.bench.arguments.tokens):
                for row in batch["input_ids"]:
                    module(torch.from_numpy(np.asarray(row)[None]))
        path = self.bench.work / "importance.npz"
        np.savez(path, **{name: (total / counts[name]).numpy().astype(np.float32) for name, total in sums.items()})
        return path

    def write(self, recipe: str, path: Path) -> float:
        """Carry a recipe out and write its GGUF file; seconds."""
        from lighten.compress.journal import Journal
        from lighten.compress.walk import Checkpoint, do_recipe
        from lighten.formats.gguf_file import write_gguf
        from lighten.judge.calibration import text_windows
        from lighten.recipe import parse_recipe

        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.bench.work) as work, Journal.open(Path(work) / "journal", {}, resume=False) as journal:
            windows = text_windows(self.folder, self.spec, self.text)
            done = do_recipe(Checkpoint(self.folder), self.spec, parse_recipe(recipe), self.folder, journal, calibration=windows)
            write_gguf(((name, weight) for name, weight, _ in done.weights), done.spec, self.folder, path)
        return time.perf_counter() - start


def tokenized(model: Model, path: Path) -> float:
    """The share of passages that llama.cpp and transformers make the same tokens of."""
    import transformers

    texts = list(model.text.test[:60])
    (model.bench.work / "texts.json").write_text(json.dumps(texts))
    found = model.bench.ask(do="tokenize", file=str(path), texts=str(model.bench.work / "texts.json"))["tokens"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    return float(np.mean([tokenizer.encode(text) == tokens for text, tokens in zip(texts, found, strict=True)]))


def perplexity(losses: list[float]) -> float:
    return float(np.exp(np.mean(losses)))


def agreement(model: Model, path: Path) -> dict[str, Any]:
    """One file by llama.cpp, and the same weights by torch."""
    found, logits = model.bench.run(path, model.ids)
    losses, expected = model.torch_losses(model.of_file(path))
    off = np.abs(logits - expected)
    return {
        "bytes": path.stat().st_size, "perplexity": perplexity(found["losses"]), "torch_perplexity": perplexity(losses),
        "max_difference": float(off.max()), "mean_difference": float(off.mean()), "deviation": float(expected.std()), "version": found["version"],
    }  # fmt: skip


def show(name: str, row: dict[str, Any]) -> None:
    same = f"   same tokens {row['same_tokens']:.0%}" if "same_tokens" in row else ""
    by_torch = (
        f"torch {row['torch_perplexity']:.3f}   |Δlogit| mean {row['mean_difference']:.1e} max {row['max_difference']:.1e}"
        if "torch_perplexity" in row
        else ""
    )
    print(f"{name:28} {row['bytes'] / 1e6:8.1f} MB   perplexity {row['perplexity']:9.3f}   {by_torch}{same}", flush=True)


def floats(model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    for dtype, name in (("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")):
        path = model.bench.work / f"{name}.gguf"
        model.write(f"cast({dtype})", path)
        yield name, agreement(model, path) | {"same_tokens": tokenized(model, path)}
        path.unlink()


def types(model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    bench, arguments = model.bench, model.bench.arguments
    source = bench.work / "source.gguf"
    model.write("cast(float32)", source)
    importance = model.importance()
    for word in arguments.types:
        ours = bench.work / f"ours-{word}.gguf"
        tokens = "" if arguments.method in ("rtn", "hqq") else f", tokens={arguments.tokens}"
        seconds = model.write(f"quantize({arguments.method}, format={word}, embeddings=true{tokens})", ours)
        yield f"{word} ours", agreement(model, ours) | {"seconds": seconds}
        for name, matrix in (("llama.cpp", None), ("llama.cpp + importance", importance)):
            theirs = bench.work / f"theirs-{word}.gguf"
            bench.ask(do="quantize", file=str(source), out=str(theirs), file_type=FILE_TYPES[word], importance=str(matrix) if matrix else None)
            found, _ = bench.run(theirs, model.ids)
            yield f"{word} {name}", {"bytes": theirs.stat().st_size, "perplexity": perplexity(found["losses"])}
        if not arguments.keep:
            ours.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="a folder of a decoder")
    parser.add_argument("--python", metavar="PATH", help="an interpreter that has llama-cpp-python (default: an environment is made)")
    parser.add_argument("--types", nargs="*", default=[], choices=FILE_TYPES)
    parser.add_argument("--method", default="gptq", help="of quantize (default gptq)")
    parser.add_argument("--floats", action="store_true")
    parser.add_argument("--architectures", action="store_true")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration (default 4096)")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="leave our files in --work")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(arguments.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench, found = Bench(arguments, work), {}
        if arguments.architectures:
            found["architectures"] = architectures(bench)
        if arguments.floats or arguments.types:
            model = Model(bench)
            rows: dict[str, Any] = {}
            for wanted, part in ((arguments.floats, floats), (arguments.types, types)):
                for name, row in part(model) if wanted else ():
                    rows[name] = row
                    show(name, row)
            found |= {"model": str(arguments.model), "windows": list(model.ids.shape), "tokens": arguments.tokens, "files": rows}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
