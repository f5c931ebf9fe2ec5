"""Quantize a made-up checkpoint of many gigabytes in little memory, under a cap that the operating system sets.

    python benchmarks/big_checkpoint.py --gb 40 --cap 6 --work /big/disk

A Llama-shaped folder of random weights is written shard by shard, `lighten compress` runs on it in a child under RLIMIT_AS (or in a cgroup of its
own with `--by cgroup`, which needs root), and some of the artifact's weights are dequantized by this script's own few lines and held against the
original and the reports. What it wrote is removed. The last line is one JSON object; exit 1 where a run failed or a weight is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lighten.compress.checkpoint import Checkpoint

RECIPES = ("quantize(rtn, bits=4, group_size=128, symmetric=true)", "quantize(gptq, bits=4, group_size=128, symmetric=true, tokens=2048)")
STANDARD_DEVIATION = 0.02
"""Of the weights: Llama's own initializer."""
CHUNK = 2**24
"""Elements that are written at once."""
POOL = 2**25
"""Normal draws that a file's weights are taken from, each chunk from another place and at another size: drawing all takes longer."""
LARGEST_ERROR = 0.16
"""Of 4-bit codes of normal weights in groups of 128, relative: RTN on a symmetric grid has 0.12 (measured on 10⁷ draws). Where codes are chosen by
the output, this is the output's, and the weights' may be twice as large: they move with each other, the more so the fewer rows there are."""


def shapes(hidden: int, intermediate: int, layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with as many key heads as query heads, in forward order."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"{prefix}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        found |= {f"{prefix}.mlp.down_proj.weight": (hidden, intermediate)}
        found |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def split(tensors: dict[str, tuple[int, ...]], width: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Shards of at most so many bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        own = int(np.prod(shape)) * width
        if shards[-1] and size + own > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += own
    return shards


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype, rng: np.random.Generator, zeros: float) -> None:
    """A safetensors file of random weights; norms are 1, and the last rows of each matrix are a hole in the file. No tensor is held whole."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = torch.from_numpy(rng.standard_normal(POOL, np.float32)) * STANDARD_DEVIATION
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            left = int(np.prod(shape))
            end_of_tensor, holes = file.tell() + left * dtype.itemsize, 0 if "norm" in name else int(left * zeros)
            while left > holes:
                count = min(left - holes, CHUNK)
                start = int(rng.integers(POOL - count + 1))
                draw = torch.ones(count) if "norm" in name else pool[start : start + count] * rng.uniform(0.8, 1.25)
                file.write(draw.to(dtype).view(torch.uint8).numpy().data)
                left -= count
            file.seek(end_of_tensor)
        file.truncate()


def write_model(folder: Path, arguments: argparse.Namespace) -> int:
    """The folder; how many parameters it has."""
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    one = shapes(arguments.hidden, arguments.intermediate, 1, arguments.vocab)
    block = sum(int(np.prod(shape)) for name, shape in one.items() if ".layers." in name)
    outside = sum(int(np.prod(shape)) for shape in one.values()) - block
    layers = max(1, round((arguments.gb * 1e9 / dtype.itemsize - outside) / block))
    tensors = shapes(arguments.hidden, arguments.intermediate, layers, arguments.vocab)
    parts = split(tensors, dtype.itemsize, round(arguments.shard_gb * 1e9))
    names = [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    for seed, (name, part) in enumerate(zip(names, parts, strict=True)):
        write_shard(folder / name, part, dtype, np.random.default_rng(seed), arguments.zeros)
        print(f"{name} written", flush=True)
    index = {"metadata": {}, "weight_map": {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    heads = arguments.hidden // 128 or 1
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": arguments.hidden, "intermediate_size": arguments.intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": arguments.vocab, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": arguments.dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    return sum(int(np.prod(shape)) for shape in tensors.values())


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([topics["assert"], topics["booleans"]], trainer)
    path.write_text(tokenizer.to_str())


@contextmanager
def capped(by: str, cap_bytes: int) -> Iterator[Callable[[], None]]:
    """What a child does before it runs, so that the system gives it no more."""
    if by == "rlimit":
        yield lambda: resource.setrlimit(resource.RLIMIT_AS, (cap_bytes, cap_bytes))
        return
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"lighten-big-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(cap_bytes))
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def compress(model: Path, out: Path, recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command under the cap; its document, or how it failed."""
    command = [sys.executable, "-m", "lighten.cli.main", "compress", str(model), "--recipe", recipe, "-o", str(out), "--json"]
    command += ["--memory", f"{arguments.memory or arguments.cap - 0.3}GB"]
    start = time.perf_counter()
    with capped(arguments.by, round(arguments.cap * 1e9)) as limit:
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"recipe": recipe, "exit": done.returncode, "wall_s": seconds, "said": done.stderr.strip().splitlines()[-3:]}
    return {**json.loads(done.stdout), "exit": 0, "wall_s": seconds}


def verify(model: Path, out: Path, *, group: int, count: int) -> list[dict[str, Any]]:
    """Some weights, dequantized from the packed 4-bit symmetric codes here, against the original and the report."""
    before, after = Checkpoint(model), Checkpoint(out)
    reports = {layer["name"]: layer for layer in json.loads((out / "lighten.json").read_text())["layers"]}
    names = sorted(reports)
    found = []
    for name in names[:: max(1, len(names) // count)][:count]:
        module = name.removesuffix(".weight")
        packed, scale = after.mapped(f"{module}.weight_packed"), after.mapped(f"{module}.weight_scale")
        nibbles = np.ascontiguousarray(packed.numpy()).view(np.uint8)
        codes = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(len(nibbles), -1)[:, : before.spec(name).shape[1]].astype(np.float32) - 8
        value = (codes.reshape(len(codes), -1, group) * scale.float().numpy()[..., None]).reshape(codes.shape)
        original = before.mapped(name).float().numpy()
        error = float(np.linalg.norm(value - original) / np.linalg.norm(original))
        said, output = float(reports[name]["relative_error"]), reports[name].get("output_error")
        small = error < LARGEST_ERROR if output is None else output < LARGEST_ERROR and error < 2 * LARGEST_ERROR
        found.append({"name": name, "error": error, "reported": said, "output_error": output, "right": abs(error - said) < 1e-3 and small})
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="big-", dir=arguments.work) as work:
        model = Path(work) / "model"
        model.mkdir()
        free = shutil.disk_usage(work).free
        needed = arguments.gb * (1 - arguments.zeros + 3 / (8 if arguments.dtype == "float32" else 4))
        if free < needed * 1e9:
            sys.exit(f"{work} has {free / 1e9:.0f} GB free; {needed:.0f} GB are needed, fewer with --zeros")
        start = time.perf_counter()
        parameters = write_model(model, arguments)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{parameters / 1e9:.2f} G parameters, {size / 1e9:.1f} GB, written in {time.perf_counter() - start:.0f} s", flush=True)
        results = []
        for recipe in arguments.recipe or RECIPES:
            out = Path(work) / "out"
            found = compress(model, out, recipe, arguments)
            if not found["exit"]:
                found |= {"seconds_per_parameter": found["seconds"] / parameters, "verified": verify(model, out, group=128, count=arguments.verify)}
            results.append(found)
            print(json.dumps(found), flush=True)
            for left in Path(work).iterdir():
                if left != model:
                    shutil.rmtree(left)
        return {
            "parameters": parameters, "size_bytes": size, "cap_bytes": round(arguments.cap * 1e9), "by": arguments.by,
            "threads": os.environ.get("OMP_NUM_THREADS"), "results": results,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=40, help="size of the checkpoint (default 40)")
    parser.add_argument("--cap", type=float, default=6, help="GB that the system gives the child (default 6)")
    parser.add_argument("--memory", type=float, help="GB of --memory (default 0.3 below the cap)")
    parser.add_argument("--by", choices=("rlimit", "cgroup"), default="rlimit")
    parser.add_argument("--recipe", action="append", help="4 bits, symmetric, groups of 128; may be repeated (default RTN and GPTQ)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--zeros", type=float, default=0, help="share of each matrix that is zeros and takes no disk (default 0)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard-gb", type=float, default=5)
    parser.add_argument("--verify", type=int, default=8, help="weights that are dequantized and compared (default 8)")
    parser.add_argument("--work", default=".", help="a folder on a disk with twice the room")
    found = run(parser.parse_args(argv))
    print(json.dumps(found))
    good = all(result["exit"] == 0 and all(weight["right"] for weight in result["verified"]) for result in found["results"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
