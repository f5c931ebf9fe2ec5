"""Write and read a model folder: safetensors, with quantized weights packed as `compressed-tensors` does, beside config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lighten.compress.checkpoint import Checkpoint
from lighten.compress.grid import Quantized, QuantizedTensor
from lighten.errors import ModelError, RecipeError
from lighten.formats import files
from lighten.formats.bitmask import pack_bitmask, unpack_bitmask
from lighten.formats.packing import pack, pack_codes, unpack, unpack_codes
from lighten.formats.safetensors_file import SafetensorsWriter, split, write_index
from lighten.model.low_rank import ADAPTER_PREFIX, CORRECTION, CORRECTION_FILE, CORRECTION_FOLDER, RANKS, config_to_store, is_correction, mark_of
from lighten.model.quantized import FORMAT, METHOD, MXFP4, NVFP4, TURNED, kind_of, refuse_layouts, scheme, shares_codes, typed_tensors
from lighten.model.quantized.kv import KVFormat
from lighten.model.quantized.masked import SPARSITY_CONFIG, is_masked, sparsity_config
from lighten.model.quantized.stored import BITMASK, VALUES
from lighten.model.read import SIDE_FILES, weight_files
from lighten.model.safetensors_header import read_header
from lighten.model.spec import PER_TENSOR, Embedding, Linear, ModelSpec, Part, TensorSpec, WeightFormat
from lighten.recipe.shrink import stream_width

Matrix: TypeAlias = Linear | Embedding
SHARD_BYTES = 5_000_000_000
"""Largest file of weights that is written; Hugging Face's `save_pretrained` cut at 5 GB until its version 5."""

__all__ = [
    "SHARD_BYTES", "StoredWeights", "copy_side_files", "expanded_weights", "other_loaders_refuse", "pack", "pack_codes", "quantization_config",
    "read_weights", "stored_specs", "unpack", "unpack_codes", "write_folder",
]  # fmt: skip


def write_folder(  # noqa: PLR0913 - what is written, where to, and two things that steps say beside the weights
    weights: Iterable[tuple[str, Tensor | Quantized]], spec: ModelSpec, source: Path, folder: Path, *, shard_bytes: int = SHARD_BYTES,
    kv_cache: KVFormat | None = None, side_files: Mapping[str, bytes | None] | None = None,
) -> None:  # fmt: skip
    """Write the weights of a spec, whose parts say how each is stored, with the source's side files.

    One tensor is held at a time, in whatever order they come; the same weights give the same bytes.

    Args:
        weights: by checkpoint name; dense ones as the checkpoint lays them out, quantized ones [out_features, in_features]. Names that the spec has
            not are left out: a head that is tied, and what the architecture does not use.
        shard_bytes: of data in one file at most, but for a weight that is larger by itself.
        kv_cache: what the model's cache is stored in when it runs.
        side_files: those that are not the source's, by name; None: left out.

    Raises:
        ModelError: a weight of the spec is missing among `weights`.
    """
    if adapter := adapter_config(spec):
        (folder / CORRECTION_FOLDER).mkdir()
        (folder / CORRECTION_FOLDER / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    _Folder(spec, source, folder, shard_bytes).fill(weights)
    copy_side_files(source, folder, side_files)
    _fit_pooling(folder, spec)
    config = config_to_store(spec.config) | {"dtype": spec.dtype}
    config.pop("torch_dtype", None)
    config.pop(SPARSITY_CONFIG, None)
    if quantization := quantization_config(spec, kv_cache):
        config["quantization_config"] = quantization
    if sparsity := sparsity_config(spec.parts):
        config[SPARSITY_CONFIG] = sparsity
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class _Folder:
    """The weight files of a folder while they are written."""

    def __init__(self, spec: ModelSpec, source: Path, folder: Path, shard_bytes: int) -> None:
        self._owners, self._masked = _owners(spec), masked_weights(spec)
        self._heads = [part for part in spec.parts if isinstance(part, Linear) and shares_codes(part)]
        beside = {name for part in spec.parts if is_correction(part) for name in part.tensors()}
        groups = stored_specs(spec, source)
        self._mark = mark_of(spec.config)
        marks = [[TensorSpec(name=self._mark, shape=(0,), dtype="float32")]] if self._mark else []
        shards = split([*marks, *(group for group in groups if group[0].name not in beside)], shard_bytes)
        whole = files.SPARSE if self._masked else files.SAFETENSORS
        names = [whole] if len(shards) == 1 else [files.shard(number, len(shards), whole) for number in range(1, len(shards) + 1)]
        if len(shards) > 1:
            write_index(folder, dict(zip(names, shards, strict=True)), files.index(whole))
        self._shards = {folder / name: tensors for name, tensors in zip(names, shards, strict=True)}
        self._prefixes: dict[Path, str] = {}
        if beside:
            path = folder / CORRECTION_FOLDER / CORRECTION_FILE
            self._prefixes[path] = ADAPTER_PREFIX
            self._shards[path] = [tensor for group in groups for tensor in group if tensor.name in beside]
        self._types = {tensor.name: tensor.dtype for tensors in self._shards.values() for tensor in tensors}

    def fill(self, weights: Iterable[tuple[str, Tensor | Quantized]]) -> None:
        with ExitStack() as stack:
            writers = []
            places: dict[str, tuple[SafetensorsWriter, str]] = {}
            for path, tensors in self._shards.items():
                prefix = self._prefixes.get(path, "")
                writer = SafetensorsWriter(path, [replace(tensor, name=prefix + tensor.name) for tensor in tensors])
                stack.callback(writer.close)
                writers.append(writer)
                places |= {tensor.name: (writer, prefix + tensor.name) for tensor in tensors}
            if self._mark:
                places[self._mark][0].write(self._mark, torch.empty(0))
            for name, weight in weights:
                for stored, tensor in self._stored(name, weight):
                    writer, within = places[stored]
                    writer.write(within, tensor)
            missing = sorted(name for writer in writers for name in writer.missing)
        if missing:
            raise ModelError(f"{len(missing)} tensors that the model has were not written: {', '.join(missing[:3])}.")

    def _stored(self, name: str, weight: Tensor | Quantized) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the file that one weight becomes."""
        if isinstance(weight, Tensor):
            if name in self._masked:
                yield from _apart(name, weight, self._masked[name])
            elif name in self._types and name != self._mark:
                yield name, weight.to(getattr(torch, self._types[name]))
            return
        part = self._owners.get(name)
        if part is None:
            return
        assert isinstance(weight, QuantizedTensor), "a recipe's reading on the spec refuses ggml's types here"
        kind = kind_of(part)
        assert kind is not None, "a recipe's own formats are all written"
        module = name.removesuffix(".weight")
        packed = pack(weight, kind)
        for key, tensor in packed.items():
            yield f"{module}.{key}", tensor
        for head in self._heads:
            if head.tied_to == part.name:
                yield from ((f"{head.name}.{key}", packed[key]) for key in ("weight_scale", "weight_zero_point") if key in packed)


def masked_weights(spec: ModelSpec) -> dict[str, Matrix]:
    """The part of each weight that is stored without its zeros, by its tensor's name."""
    found: dict[str, Matrix] = {}
    for part in spec.parts:
        if isinstance(part, Linear | Embedding) and is_masked(part):
            found |= {name: part for name, shape in part.tensors().items() if name.endswith(".weight") and len(shape) == 2}
    return found


def _apart(name: str, weight: Tensor, part: Matrix) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weight without its zeros."""
    assert part.weight.kept is not None, "asked for where zeros are not stored"
    matrix = weight.T.contiguous() if isinstance(part, Linear) and part.transposed else weight
    bits, values = pack_bitmask(matrix.to(getattr(torch, part.weight.dtype)), part.weight.kept)
    yield f"{name}{BITMASK}", bits
    yield f"{name}{VALUES}", values


def _owners(spec: ModelSpec) -> dict[str, Matrix]:
    """The part of each quantized weight, by its tensor's name."""
    found: dict[str, Matrix] = {}
    for part in spec.parts:
        if isinstance(part, Linear | Embedding) and part.weight.bits is not None:
            found |= {name: part for name, shape in part.tensors().items() if name.endswith(".weight") and len(shape) == 2}
    return found


def stored_specs(spec: ModelSpec, source: Path) -> list[list[TensorSpec]]:
    """The tensors that a spec's weights are stored as, in forward order; those that stand for one weight together.

    Vectors and tables keep the type that the source stores them in, but where a step changed the type of the matrices.
    """
    types = {tensor.name: tensor.dtype for file in weight_files(source) for tensor in read_header(file)}
    own = {name: dtype for part in spec.parts for name, dtype in _dense(part).items()}
    matrices = {name: dtype for part in spec.parts for name, dtype in _matrices(part).items()}
    cast = any(types.get(name, dtype) != dtype for name, dtype in matrices.items())
    groups: dict[str, dict[str, TensorSpec]] = {}
    for part in spec.parts:
        for name, (shape, dtype) in typed_tensors(part).items():
            plain = own.get(name) or (spec.dtype if cast else types.get(name, spec.dtype))
            groups.setdefault(_group_of(name), {}).setdefault(name, TensorSpec(name=name, shape=shape, dtype=dtype or plain))
    return [list(group.values()) for group in groups.values()]


def _dense(part: Part) -> dict[str, str]:
    """A part's matrices that are not quantized, with their types."""
    return {} if isinstance(part, Linear | Embedding) and part.weight.bits is not None else _matrices(part)


def _matrices(part: Part) -> dict[str, str]:
    """A part's matrices with the types that their values have, or had before they were quantized."""
    if not isinstance(part, Linear | Embedding):
        return {}
    return {name: part.weight.dtype for name, shape in part.tensors().items() if len(shape) >= 2}


_PIECES = (
    "weight_bitmask",
    "weight_values",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "input_scale",
    "weight",
)


def _group_of(name: str) -> str:
    """The module's name for what stands for its weight; the tensor's own name else."""
    module, _, last = name.rpartition(".")
    return module if last in _PIECES else name


def copy_side_files(source: Path, folder: Path, changed: Mapping[str, bytes | None] | None = None) -> None:
    """Copy config, tokenizer and pooling description.

    Args:
        changed: what steps made of some of them; None in a name's place: it is left out.
    """
    changed = changed or {}
    for name in SIDE_FILES:
        content = changed.get(name)
        if content is not None:
            (folder / name).write_bytes(content)
        elif (source / name).is_file() and name not in changed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _fit_pooling(folder: Path, spec: ModelSpec) -> None:
    """Say the model's own width in the description of how sentences are pooled."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return
    said = json.loads(path.read_text())
    width = stream_width(spec.parts)
    if said.get("word_embedding_dimension", width) != width:
        path.write_text(json.dumps(said | {"word_embedding_dimension": width}, indent=2) + "\n")


def write_dense(
    weights: Mapping[str, Tensor | Quantized], spec: ModelSpec, source: Path, folder: Path, *, side_files: Mapping[str, bytes | None] | None = None
) -> None:
    """Write a model as it is computed, all its weights dequantized to float32."""
    turned = {f"{part.name}.weight" for part in spec.parts if _is_turned(part)}

    def dense(name: str, weight: Tensor | Quantized) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.float() if weight.is_floating_point() else weight
        return weight.dequantize().T.contiguous() if name in turned else weight.dequantize()

    def plain(part: Part) -> Part:
        return replace(part, weight=WeightFormat()) if isinstance(part, Linear | Embedding) else part

    folder.mkdir(parents=True, exist_ok=True)
    made = replace(spec.with_parts(plain), dtype="float32")
    write_folder(((name, dense(name, weight)) for name, weight in weights.items()), made, source, folder, side_files=side_files)


# what the config says


def adapter_config(spec: ModelSpec) -> dict[str, Any] | None:
    """PEFT's description of a correction, `lora_alpha` such that what it adds is added once; None where there is none.

    Source: `LoraConfig` of PEFT 0.18, whose names these are: y = x Ŵᵀ + (x Aᵀ) Bᵀ · lora_alpha / r.

    Raises:
        RecipeError: corrections of more than one rank, which one adapter cannot say.
    """
    ranks: dict[str, int] = spec.config.get(CORRECTION) or {}
    if not ranks:
        return None
    if len(set(ranks.values())) > 1:
        said = ", ".join(map(str, sorted(set(ranks.values()))))
        raise RecipeError(f"factorize(correction): ranks {said} in one adapter, which says one; give all weights the same.")
    rank = next(iter(ranks.values()))
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": any(_is_turned(p) for p in spec.parts if isinstance(p, Linear) and p.name in ranks),
        "use_rslora": False, "target_modules": sorted(ranks),
    }  # fmt: skip


def quantization_config(spec: ModelSpec, kv_cache: KVFormat | None = None) -> dict[str, Any] | None:
    """The `quantization_config` of a spec's weights; None where none is quantized.

    `dequantize` asks `transformers` to expand the weights when it loads them: its other way expects zero points that are not packed, and cannot
    load an embedding that is. It reads one format alone for all weights, so it is asked for where there is but one.
    """
    groups = quantization_groups(spec)
    if not groups and kv_cache is None:
        return None
    kinds = {group["format"] for group in groups.values()}
    found: dict[str, Any] = {
        "quant_method": METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision" if kinds else "dense",
        "quantization_status": "compressed", "ignore": [], "config_groups": groups,
    }  # fmt: skip
    if kv_cache is not None:
        found["kv_cache_scheme"] = kv_cache.scheme()
    if _must_expand(spec) and len(groups) == 1:
        found["dequantize"] = True
    return found


def quantization_groups(spec: ModelSpec) -> dict[str, Any]:
    """`config_groups`: one for each distinct format, with the modules that have it; a tied head's is its embedding's."""
    targets: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for part in _quantized(spec):
        kind = kind_of(part)
        assert kind is not None, "a recipe's own formats are all written"
        said = scheme(kind, part.weight)
        if _is_turned(part):
            said["format"] = TURNED + kind
        names = [name.removesuffix(".weight") for name in part.tensors() if name.endswith(".weight")]
        names += [head.name for head in spec.parts if isinstance(head, Linear) and head.tied_to == part.name and shares_codes(head)]
        targets.setdefault(json.dumps(said, sort_keys=True), (said, []))[1].extend(names)
    return {f"group_{number}": {"targets": names, **said} for number, (said, names) in enumerate(targets.values())}


def _quantized(spec: ModelSpec) -> list[Matrix]:
    """The parts that store a quantized weight of their own."""
    found = (part for part in spec.parts if isinstance(part, Linear | Embedding) and part.weight.bits is not None)
    return list({part.name: part for part in found if any(name.endswith(".weight") for name in part.tensors())}.values())


def _must_expand(spec: ModelSpec) -> bool:
    """Whether `transformers` loads some weight in no other way, or, as 4-bit floats, runs it in bfloat16 alone."""
    return any(
        _zeros_are_packed(part) or (isinstance(part, Embedding) and not _has_weight(part)) or kind_of(part) in (NVFP4, MXFP4)
        for part in _quantized(spec)
    )  # fmt: skip


def _zeros_are_packed(part: Matrix) -> bool:
    return kind_of(part) == FORMAT and not part.weight.symmetric and part.weight.group_size != PER_TENSOR


def _has_weight(part: Matrix) -> bool:
    return f"{part.name}.weight" in typed_tensors(part)


def _is_turned(part: Part) -> bool:
    return isinstance(part, Linear) and part.transposed


def other_loaders_refuse(spec: ModelSpec) -> list[str]:
    """Why `transformers` with `compressed-tensors` (5.23, 0.20) does not load a spec's weights, a sentence each; empty where it does."""
    found = []
    if spec.config.get(RANKS):
        found.append("no other loader has linears of two factors; lighten export --to safetensors multiplies them out, ONNX and OpenVINO run them.")
    if spec.config.get(CORRECTION):
        found.append(f"the correction is an adapter in {CORRECTION_FOLDER}/, which PEFT loads beside the model; others run the model without it.")
    if any(_is_turned(part) for part in _quantized(spec)):
        found.append("compressed-tensors has no quantized Conv1D; lighten alone reads these weights.")
    parts = _quantized(spec) if len(quantization_groups(spec)) > 1 else []
    if any(isinstance(part, Embedding) and not _has_weight(part) for part in parts):
        found.append("transformers loads a packed embedding only where all quantized weights have one format; 8 bits, or one format for all, load.")
    if any(_zeros_are_packed(part) for part in parts):
        found.append("transformers loads packed zero points only where all quantized weights have one format; symmetric=true loads.")
    return found


# reading


class StoredWeights:
    """Every weight of a folder by its checkpoint name, read when it is asked for.

    Attributes:
        names: dense tensors, then quantized ones.

    Raises:
        ModelError: its weights are codes of a format that is not read.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        refuse_layouts(spec.parts, str(folder))
        self._owners, self._masked = _owners(spec), masked_weights(spec)
        self._stored = Checkpoint(folder)  # which maps one tensor at a time, however large the files are
        pieces = {piece for name, part in self._owners.items() for piece in _pieces_of(name, part)}
        pieces |= {name for part in spec.parts for name in typed_tensors(part) if part.name and name not in pieces and _is_copy(part, name)}
        pieces |= {f"{name}{piece}" for name in self._masked for piece in (BITMASK, VALUES)} | {mark_of(spec.config) or ""}
        self.names = [*sorted(set(self._stored.names) - pieces), *sorted(self._masked), *sorted(self._owners)]

    def __getitem__(self, name: str) -> Tensor | QuantizedTensor:
        """The weight as it is stored; one without zeros, with them."""
        if name in self._masked:
            part = self._masked[name]
            bits, values = (self._stored.mapped(f"{name}{piece}") for piece in (BITMASK, VALUES))
            matrix = unpack_bitmask(bits, values, part.in_features if isinstance(part, Linear) else part.embedding_dim, name=name)
            return matrix.T.contiguous() if isinstance(part, Linear) and part.transposed else matrix
        return _read_quantized(self._stored, name, self._owners[name]) if name in self._owners else self._stored.mapped(name)

    def expanded(self, name: str) -> Tensor:
        """The tensor in its checkpoint layout; a quantized one dequantized to float32."""
        weight = self[name]
        if isinstance(weight, Tensor):
            return weight
        part = self._owners[name]
        return weight.dequantize().T.contiguous() if isinstance(part, Linear) and part.transposed else weight.dequantize()


def read_weights(folder: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Every weight of a folder under its checkpoint name, as it is stored; one at a time.

    Raises:
        ModelError: its weights are codes of a format that is not read.
    """
    stored = StoredWeights(folder, spec)
    return ((name, stored[name]) for name in stored.names)


def _is_copy(part: Part, name: str) -> bool:
    """Whether a tensor only repeats an embedding's scales for the head that is tied to it."""
    return isinstance(part, Linear) and shares_codes(part) and name.rpartition(".")[2] in ("weight_scale", "weight_zero_point")


def _pieces_of(name: str, part: Matrix) -> list[str]:
    """The stored tensors that stand for one weight of a part, which may hold several (experts)."""
    module = name.removesuffix(".weight")
    own = {stored.rpartition(".")[2] for stored in typed_tensors(replace(part, tied_to=None) if isinstance(part, Linear) else part)}
    return [f"{module}.{piece}" for piece in _PIECES if piece in own]


def _read_quantized(stored: Checkpoint, name: str, part: Matrix) -> QuantizedTensor:
    kind = kind_of(part)
    assert kind is not None, "refused before"
    found = {piece.rpartition(".")[2]: stored.mapped(piece) for piece in _pieces_of(name, part) if piece in stored}
    return unpack(found, part.weight, kind)


def expanded_weights(folder: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder under its checkpoint name and in its checkpoint layout, quantized ones dequantized to float32.

    Raises:
        ModelError: its weights are codes of a format that is not read.
    """
    stored = StoredWeights(folder, spec)
    return ((name, stored.expanded(name)) for name in stored.names)
