"""Write and read a model folder: safetensors, with quantized weights packed as `compressed-tensors` does, beside config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.formats import files
from lighten.model.quantized import FORMAT, METHOD, STRATEGIES, refuse_layouts
from lighten.model.read import SIDE_FILES, read_config, weight_files
from lighten.model.spec import PER_TENSOR, Embedding, Linear, ModelSpec

STRATEGY_NAMES = {group_size: name for name, group_size in STRATEGIES.items()}


def write_folder(weights: Iterable[tuple[str, Tensor | QuantizedTensor]], spec: ModelSpec, source: Path, folder: Path) -> None:
    """Write the weights of a spec, whose parts say how each is stored, with the source's side files."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights:
        if isinstance(weight, QuantizedTensor):
            tensors |= {f"{name.removesuffix('weight')}{key}": value for key, value in pack(weight).items()}
        else:
            tensors[name] = weight.contiguous()
    save_file(tensors, folder / files.SAFETENSORS, metadata={"format": "pt"})
    (folder / files.SAFETENSORS).chmod(0o644)  # the library writes it for its owner alone
    copy_side_files(source, folder)
    config = read_config(source) | {"dtype": spec.dtype}
    config.pop("torch_dtype", None)
    if groups := quantization_groups(spec):
        config["quantization_config"] = {
            "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": [], "config_groups": groups,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and pooling description."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def quantization_groups(spec: ModelSpec) -> dict[str, Any]:
    """`config_groups`: one for each distinct format, with the modules that have it."""
    targets: dict[Any, list[str]] = {}
    for part in spec.parts:
        if isinstance(part, Linear | Embedding) and part.weight.bits is not None and part.tensors().get(f"{part.name}.weight"):
            key = (part.weight.bits, part.weight.symmetric, part.weight.group_size)
            targets.setdefault(key, []).append(part.name)
    return {f"group_{number}": _group(names, *key) for number, (key, names) in enumerate(targets.items())}


def _group(names: list[str], bits: int, symmetric: bool, group_size: int) -> dict[str, Any]:
    strategy = STRATEGY_NAMES.get(group_size, "group")
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    if strategy == "group":
        weights["group_size"] = group_size
    return {"targets": names, "weights": weights, "input_activations": None, "output_activations": None}


def pack(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand for a quantized weight, by the names of `lighten.model.quantized`."""
    by_tensor = weight.group_size == PER_TENSOR
    tensors = {
        "weight_packed": pack_codes(weight.codes, weight.bits),
        "weight_scale": weight.scale.reshape(1) if by_tensor else weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        zero = weight.zero_point
        offset = 2 ** (weight.bits - 1)
        tensors["weight_zero_point"] = (
            (zero.to(torch.int16) - offset).to(torch.int8).reshape(1) if by_tensor else pack_codes(zero.T, weight.bits).T.contiguous()
        )
    return tensors


def unpack(tensors: dict[str, Tensor], bits: int, group_size: int) -> QuantizedTensor:
    """The inverse of `pack`."""
    rows, columns = (int(n) for n in tensors["weight_shape"])
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if group_size == PER_TENSOR:
        scale = scale.reshape(1, 1)
        zero = None if zero is None else (zero.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).reshape(1, 1)
    elif zero is not None:
        zero = unpack_codes(zero.T.contiguous(), bits, rows).T.contiguous()
    return QuantizedTensor(
        codes=unpack_codes(tensors["weight_packed"], bits, columns), scale=scale, zero_point=zero, bits=bits, group_size=group_size,
    )  # fmt: skip


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[R, C] uint8 codes → [R, ceil(C · bits / 32)] int32: the codes' bits one after another, low bits first."""
    rows, columns = codes.shape
    one_by_one = np.unpackbits(np.ascontiguousarray(codes.numpy())[..., None], axis=-1, bitorder="little", count=bits).reshape(rows, -1)
    padded = np.pad(one_by_one, ((0, 0), (0, -columns * bits % 32)))
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view("<i4").astype(np.int32))


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`."""
    raw = np.ascontiguousarray(packed.numpy()).astype("<i4").view(np.uint8)
    one_by_one = np.unpackbits(raw, axis=-1, bitorder="little")[:, : columns * bits].reshape(len(raw), columns, bits)
    return torch.from_numpy(np.packbits(one_by_one, axis=-1, bitorder="little")[..., 0])


def expanded_weights(folder: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder under its module's name, packed ones dequantized to float32.

    Raises:
        ModelError: its weights are another method's codes.
    """
    refuse_layouts(spec.parts, str(folder))
    formats = {part.name: part.weight for part in spec.parts if isinstance(part, Linear | Embedding)}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            for name in sorted(names):
                module, _, kind = name.rpartition(".")
                if kind == "weight_packed":
                    weight = formats[module]
                    assert weight.bits is not None, "the spec was read from this folder's config"
                    tensors = {key: opened.get_tensor(f"{module}.{key}") for key in _PACKED if f"{module}.{key}" in names}
                    yield f"{module}.weight", unpack(tensors, weight.bits, weight.group_size).dequantize()
                elif kind not in _PACKED:
                    yield name, opened.get_tensor(name)


_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
