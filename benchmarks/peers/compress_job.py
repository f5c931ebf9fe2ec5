"""(no program) What every compressing peer shares: its job, its clocks and memory, the counting of its bits, and its weights written densely.

A peer is one file `compress_NAME.py` that `benchmarks/compression.py` runs in an environment of its own: `python compress_NAME.py JOB.json`. It reads
the job, quantizes, saves its artifact, and only then, outside the clock, writes the dequantized weights, which one evaluator scores for everybody.
torch, safetensors and the standard library alone, for what else an environment holds is the peer's business.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "F8_E4M3": 8, "BOOL": 8}
"""Bits of an element by the dtype's name in a safetensors header. Source: the safetensors format's description, as of 0.8."""


@dataclass(frozen=True)
class Job:
    """What a peer is asked for.

    Attributes:
        model: a Hugging Face folder in dense float32.
        ids: a .npy of int64 [windows, length]: the calibration tokens, the same for all.
        artifact: where the peer saves what it makes, in its own format.
        dense: where its dequantized weights go, as one safetensors file with the original's tensor names.
        report: where its figures go.
        settings: method, bits, group_size, symmetric, and what else the method takes.
        texts: of an encoder, in place of windows: a .npz of `ids` and `mask` [texts, length] to be embedded, and `calibration_ids` and
            `calibration_mask` to calibrate on. Its embeddings go to embeddings.npy in `dense`, by the peer's own runtime.
    """

    model: str
    ids: str
    artifact: str
    dense: str
    report: str
    settings: dict[str, Any]
    texts: str | None = None


def read_job() -> Job:
    """The job of the command line."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def process_seconds() -> float:
    """Seconds since this process began, by the kernel."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


class Meter:
    """Clocks and resident memory of a peer's run; made once everything is imported and nothing is loaded."""

    def __init__(self) -> None:
        self._after_imports, self._quantize = _status("VmRSS"), 0.0
        self._figures: dict[str, Any] = {}

    @contextmanager
    def quantizing(self) -> Iterator[None]:
        """Around the quantization alone: no loading, no saving."""
        began = time.perf_counter()
        yield
        self._quantize += time.perf_counter() - began

    def saved(self) -> None:
        """The artifact lies on disk: what follows is not counted."""
        peak = _status("VmHWM")
        self._figures = {
            "quantize_s": self._quantize, "process_s": process_seconds(), "peak_rss_bytes": peak,
            "peak_above_imports_bytes": peak - self._after_imports,
        }  # fmt: skip

    def report(self, job: Job, package: str, bits: Mapping[str, Any]) -> None:
        """Write the figures, with the package's version and `counted_bits`' or `tensor_bits`' result."""
        document = self._figures | {"version": version(package), "threads": os.environ.get("OMP_NUM_THREADS")} | dict(bits)
        Path(job.report).write_text(json.dumps(document))


# ---- bits ----


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name → dtype, shape, data_offsets."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header


def tensor_bits(tensors: Iterable[tuple[str, str, int]], weights: int, code_bits: float) -> dict[str, float]:
    """Bits for each weight of the quantized linears.

    `bits`: code width + (scales · their width + zero points · their width) / weights: what the method chose. A packed tensor of zero points counts
    what is in the file; the constant zero points that some formats store with symmetric codes are named `constant` and count in `stored_bits` alone.
    `stored_bits`: every byte that the file keeps for these linears, packing and constants included.

    Args:
        tensors: (kind, dtype's name, elements) of all tensors of these linears; kind is codes, scale, zero, constant or other.
        weights: elements of the original's weights.
        code_bits: the width of a code.
    """
    sums = dict.fromkeys(("codes", "scale", "zero", "constant", "other"), 0.0)
    for kind, dtype, elements in tensors:
        sums[kind] += DTYPE_BITS[dtype] * elements
    return {"bits": code_bits + (sums["scale"] + sums["zero"]) / weights, "stored_bits": sum(sums.values()) / weights}


KINDS = {
    "weight_packed": "codes", "qweight": "codes", "weight_scale": "scale", "scales": "scale", "weight_zero_point": "zero", "qzeros": "zero",
    "weight_shape": "other", "g_idx": "other", "weight_g_idx": "other",
}  # fmt: skip
"""A tensor's last name in compressed-tensors and in GPTQ's format → what it holds."""


def counted_bits(folder: Path, linears: Mapping[str, int], *, code_bits: float, symmetric: bool) -> dict[str, float]:
    """`tensor_bits` of an artifact's safetensors files.

    Args:
        folder: the artifact.
        linears: module name → elements, of the linears that were to be quantized.
        code_bits: the width of a code.
        symmetric: zero points are constants.

    Raises:
        ValueError: a linear that was to be quantized is dense, or has no codes.
    """
    found: list[tuple[str, str, int]] = []
    packed: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            module, _, last = name.rpartition(".")
            if module not in linears or last == "bias":
                continue
            kind = KINDS.get(last)
            if last == "weight" and DTYPE_BITS[entry["dtype"]] == 8:
                kind = "codes"
            if kind is None:
                raise ValueError(f"{file}: {name} ({entry['dtype']}) is no tensor of a quantized linear; known: {', '.join(KINDS)}.")
            packed |= {module} if kind == "codes" else set()
            elements = 1
            for size in entry["shape"]:
                elements *= size
            found.append(("constant" if kind == "zero" and symmetric else kind, entry["dtype"], elements))
    if missing := sorted(set(linears) - packed):
        raise ValueError(f"{folder}: {len(missing)} of {len(linears)} linears have no codes, {missing[0]} for one.")
    return tensor_bits(found, sum(linears.values()), code_bits)


# ---- the model ----


def linears_of(model: str) -> dict[str, int]:
    """Module name → elements of the matrices inside the blocks: every 2-D weight but embeddings and the head."""
    sizes = {name: entry["shape"] for file in sorted(Path(model).glob("*.safetensors")) for name, entry in read_header(file).items()}
    return {
        name.removesuffix(".weight"): shape[0] * shape[1]
        for name, shape in sizes.items()
        if name.endswith(".weight") and len(shape) == 2 and not any(part in name for part in ("embed", "lm_head", "pooler"))
    }


def windows(job: Job) -> Any:
    """[windows, length] int64 tensor of calibration tokens."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(job.ids))


def calibration_texts(job: Job) -> list[dict[str, Any]]:
    """Of an encoder: inputs of one text each, int64 arrays [1, tokens], without padding."""
    import numpy as np

    held = np.load(job.texts or "")
    pairs = zip(held["calibration_ids"], held["calibration_mask"], strict=True)
    return [{"input_ids": ids[None, : mask.sum()], "attention_mask": mask[None, : mask.sum()]} for ids, mask in pairs]


def write_embeddings(job: Job, encode: Callable[[Any, Any], Any], *, batch_size: int = 8) -> None:
    """Embed the texts: `encode` gives the last hidden states [B, T, D] of ids and mask [B, T]; the mean over a text's tokens is its embedding."""
    import numpy as np

    held = np.load(job.texts or "")
    ids, mask = held["ids"], held["mask"]
    rows = []
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        longest = int(mask[part].sum(1).max())
        weights = mask[part, :longest, None].astype(np.float32)
        hidden = np.asarray(encode(ids[part, :longest], mask[part, :longest]), np.float32)
        rows.append((hidden * weights).sum(1) / weights.sum(1))
    Path(job.dense).mkdir(parents=True, exist_ok=True)
    np.save(Path(job.dense) / "embeddings.npy", np.concatenate(rows))


def write_dense(job: Job, tensors: Mapping[str, Any], *, smaller: bool = False) -> None:
    """Write a model's weights, names and shapes as the original's; of a tied head nothing is written where it still is the embedding.

    Args:
        smaller: shapes may differ from the original's and names may be missing.

    Raises:
        ValueError: a tensor that the original lacks, one of another shape, or one that is missing.
    """
    import torch
    from safetensors.torch import save_file

    shapes = {name: entry["shape"] for file in sorted(Path(job.model).glob("*.safetensors")) for name, entry in read_header(file).items()}
    left = (*(kind for kind in KINDS if kind != "weight"), "input_scale", "input_zero_point")  # what a reader leaves beside a dequantized weight
    table = tensors.get("model.embed_tokens.weight")
    if "lm_head.weight" in tensors and "lm_head.weight" not in shapes and table is not None:
        if torch.equal(tensors["lm_head.weight"].float(), table.float()):
            left = (*left, "lm_head.weight")
        else:  # a rotation makes the head a weight of its own
            shapes["lm_head.weight"] = list(table.shape)
    kept = {name: tensor for name, tensor in tensors.items() if name in shapes or not (name in left or name.rpartition(".")[2] in left)}
    wrong = [] if smaller else [name for name, tensor in kept.items() if shapes.get(name) != list(tensor.shape)] + sorted(set(shapes) - set(kept))
    if wrong:
        raise ValueError(f"{len(wrong)} tensors differ from the original's in name or shape, {', '.join(wrong[:3])} for some.")
    Path(job.dense).mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in kept.items()}
    save_file(plain, Path(job.dense) / "model.safetensors", metadata={"format": "pt"})


def share_of_zeros(tensors: Mapping[str, Any], linears: Mapping[str, int]) -> float:
    """Of the weights of some linears; those that are gone altogether are not counted."""
    kept = [tensors[f"{name}.weight"] for name in linears if f"{name}.weight" in tensors]
    return float(sum(int((tensor == 0).sum()) for tensor in kept) / sum(tensor.numel() for tensor in kept))


def unpack_gptq(tensors: Mapping[str, Any], bits: int) -> Any:
    """[O, I] float32 of a linear in GPTQ's format, symmetric codes.

    `qweight` [I · bits / 32, O] int32: down each column the codes' bits one after another, low bits first; `scales` [G, O]; `g_idx` [I], the group of
    an input column (absent: the groups follow each other). The zero point of symmetric codes is 2**(bits - 1), which the format's versions store in
    two ways, so that it is not read.

    Source: the packing of AutoGPTQ's QuantLinear for 2, 3, 4 and 8 bits.
    """
    import numpy as np
    import torch

    words = np.ascontiguousarray(tensors["qweight"].numpy().T).astype("<i4").view(np.uint8)
    each_bit = np.unpackbits(words, axis=1, bitorder="little")
    codes = np.packbits(each_bit.reshape(len(words), -1, bits), axis=2, bitorder="little")[..., 0]
    scales = tensors["scales"].float().T
    columns = codes.shape[1]
    group = tensors["g_idx"].long() if "g_idx" in tensors else torch.arange(columns) // (columns // scales.shape[1])
    return (torch.from_numpy(codes).float() - 2 ** (bits - 1)) * scales[:, group]


def dense_from_gptq(job: Job) -> dict[str, Any]:
    """Every tensor of an artifact in GPTQ's format, its linears dequantized.

    Raises:
        ValueError: asymmetric codes.
    """
    from safetensors import safe_open

    if not job.settings["symmetric"]:
        raise ValueError("asymmetric codes in GPTQ's format are read in two ways; ask for symmetric ones.")
    tensors: dict[str, Any] = {}
    for file in sorted(Path(job.artifact).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    packed = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    dense = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in packed or name.endswith(".bias")}
    for module in packed:
        parts = {kind: tensors[f"{module}.{kind}"] for kind in ("qweight", "scales", "g_idx") if f"{module}.{kind}" in tensors}
        dense[f"{module}.weight"] = unpack_gptq(parts, job.settings["bits"])
    return dense
