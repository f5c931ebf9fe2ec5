"""Write a GGUF file that llama.cpp loads: metadata and tokenizer, then each tensor at its place as it comes, never two at once.

A tensor is named as `lighten.model.gguf` reads it. Vectors (norms, biases) are float32, as llama.cpp computes with them; each matrix is of the type
that its part of the spec says, and codes of this package go into the type that holds them exactly.

Shape legend: O rows (output features), I columns (input features).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.ggml import GgmlTensor, as_ggml
from lighten.compress.grid import Quantized, QuantizedTensor
from lighten.errors import ModelError, OutputError, RecipeError
from lighten.formats.gguf_families import ARCHITECTURES, metadata, refusal, rope_factors
from lighten.formats.gguf_tokenizer import add_tokenizer, read_tokenizer
from lighten.model.families._config import complete
from lighten.model.ggml_types import GGML_TYPES, PLAIN, exact_ggml_type
from lighten.model.gguf import TRANSLATIONS, gguf_names
from lighten.model.gguf_header import read_gguf_header
from lighten.model.pooling import pooling
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, WeightFormat

Weight: TypeAlias = Tensor | Quantized
_TYPES = {dtype: name for name, dtype in PLAIN.items()}
_WIDE = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Matrices that are float32 where they are not quantized. Source: `prepare_tensors` in conversion/base.py of llama.cpp."""

_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32,
    "MXFP4": 38,
}  # fmt: skip
"""Type of most elements → `general.file_type`. Source: `llama_ftype` in include/llama.h of llama.cpp."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor of the file: its name there, shape (the slowest dimension first) and type of ggml."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def row_bytes(self) -> int:
        return GGML_TYPES[self.type].stored_bytes(1, self.shape[-1])

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a tensor of the checkpoint goes.

    Attributes:
        rows: of the file's tensor, counted over all its experts.
        order: the checkpoint's rows in the order of the file; None: their own.
        transposed: the checkpoint has [I, O].
        plus_one: 1 is added.
    """

    placed: Placed
    rows: range
    order: Tensor | None
    transposed: bool
    plus_one: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All of a file: its tensors in their order, and where each tensor of the checkpoint goes."""

    tensors: tuple[Placed, ...]
    slots: dict[str, Slot]

    @property
    def data_bytes(self) -> int:
        return sum(-(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a file was filled with: where each tensor of the checkpoint went, and a fingerprint of its values."""

    slots: dict[str, Slot]
    digests: dict[str, bytes]

    def __len__(self) -> int:
        return len(self.slots)


_ALIGNMENT = 32
"""Of each tensor's bytes. Source: `GGUF_DEFAULT_ALIGNMENT` in ggml/include/gguf.h."""


def refuse_gguf(spec: ModelSpec, source: Path) -> None:
    """Raises:
    RecipeError: an architecture, or a format of a weight, that is not written.
    ModelError: a tokenizer that llama.cpp does not have.
    """
    lay_out(spec)
    read_tokenizer(source, int(complete(spec.config)["vocab_size"]))


def gguf_notes(spec: ModelSpec, source: Path) -> list[str]:
    """What a file of this model lacks, a sentence each."""
    found = []
    promised, longest = metadata(spec)["context_length"], spec.max_positions or 0
    if int(promised) < longest:
        found.append(
            f"llama.cpp does not know this architecture's sliding window: the file promises {promised} positions of {longest}, those within it"
        )
    if left_out := ARCHITECTURES[spec.family].left_out:
        found.append(f"GGUF files of {spec.family} have no {' and no '.join(left_out)}")
    if not (source / "tokenizer.json").is_file():
        found.append("the folder has no tokenizer.json, so the file is without a tokenizer: llama.cpp takes tokens, not text")
    return found


def write_gguf(weights: Iterable[tuple[str, Weight]], spec: ModelSpec, source: Path, path: Path) -> Written:
    """Write the file; what `verify_gguf` holds it to.

    Args:
        weights: by the checkpoint's names, in any order, each asked for once the one before is written; what the file has no place for (a tied
            head, a pooler) is passed over. A quantized weight is [O, I] whatever the checkpoint's own orientation.
        spec: whose parts say how each weight is stored.
        source: the folder that holds the tokenizer.

    Raises:
        RecipeError: as `refuse_gguf`; or a weight that is not as its part says.
        ModelError: as `refuse_gguf`; or weights that are missing.
    """
    layout = lay_out(spec)
    start = _write_head(layout, spec, source, path)
    places = {tensor.name: start + tensor.offset for tensor in read_gguf_header(path).tensors}
    missing, digests = set(layout.slots), {}
    with path.open("r+b") as file:
        factors = rope_factors(spec)
        if factors is not None:
            file.seek(places["rope_freqs.weight"])
            file.write(factors.numpy().tobytes())
        for name, weight in weights:
            if (slot := layout.slots.get(name)) is None:
                continue
            if name not in missing:
                raise ModelError(f"{path}: the weight {name} came twice.")
            missing.discard(name)
            file.seek(places[slot.placed.name] + slot.rows.start * slot.placed.row_bytes)
            stored = _stored(name, weight, slot)
            file.write(_bytes(stored))
            digests[name] = _digest(stored)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(f"{path}: {len(missing)} weights are missing, such as {some}; nothing of the file can be used.")
    return Written(slots=layout.slots, digests=digests)


def stored_type(weight: WeightFormat, columns: int) -> str:
    """The type of ggml for a matrix of a format.

    Raises:
        RecipeError: none holds it.
    """
    if weight.ggml_type is not None:
        return weight.ggml_type
    if weight.bits is None and weight.dtype in ("float32", "float16", "bfloat16"):
        return _TYPES[weight.dtype]
    found = None
    if weight.bits is not None and not weight.global_scale and weight.layout is None and weight.activations is None:
        found = exact_ggml_type(
            bits=weight.bits, symmetric=weight.symmetric, group_size=weight.group_size, columns=columns, element=weight.element,
        )  # fmt: skip
    if found is None:
        raise RecipeError(
            f"no type of ggml holds {weight.bits or weight.dtype}-bit codes ({weight.element}, groups of {weight.group_size} over {columns} columns, "
            f"activations {weight.activations or 'none'}); use a type of ggml such as format=q4_k, or symmetric codes in groups of a multiple of 32."
        )
    return found


def lay_out(spec: ModelSpec) -> Layout:
    """The tensors of a model's file.

    Raises:
        RecipeError: an architecture, or a format of a weight, that is not written.
    """
    if problem := refusal(spec):
        raise RecipeError(f"{spec.name} cannot be written as a GGUF file: {problem}.")
    architecture, config = ARCHITECTURES[spec.family], complete(spec.config)
    tensors: dict[str, Placed] = {}
    slots: dict[str, Slot] = {}
    if (factors := rope_factors(spec)) is not None:
        tensors["rope_freqs.weight"] = Placed(name="rope_freqs.weight", shape=tuple(factors.shape), type="F32")
    for part in spec.parts:
        if part.component in architecture.left_out:
            continue
        for name, shape in part.tensors().items():
            placed, expert = _place(spec, part, name, shape)
            tensors.setdefault(placed.name, placed)
            module, _, _ = name.rpartition(".")
            order = architecture.orders.get(module.rsplit(".", 1)[-1])
            rows = placed.shape[-2] if len(placed.shape) > 1 else 1
            slots[name] = Slot(
                placed=placed, rows=range(expert * rows, (expert + 1) * rows), order=order(config, shape[0]) if order else None,
                transposed=isinstance(part, Linear) and part.transposed and len(shape) == 2,
                plus_one=architecture.plus_one and name.endswith("norm.weight"),
            )  # fmt: skip
    return Layout(tensors=tuple(tensors.values()), slots=slots)


def _place(spec: ModelSpec, part: Part, name: str, shape: tuple[int, ...]) -> tuple[Placed, int]:
    """The file's tensor that a tensor of the checkpoint goes into, and which of its experts it is."""
    starred = re.escape(part.name).replace(r"\*", r"(\d+)")
    found = re.match(starred, name) if "*" in part.name else None
    module, _, leaf = (name if found is None else part.name + name[found.end() :]).rpartition(".")
    names = gguf_names(module, leaf, TRANSLATIONS[ARCHITECTURES[spec.family].name].names)
    if len(shape) > 2 or leaf not in ("weight", "bias") or not names or len(names[0]) != 1:
        raise RecipeError(f"{spec.name} cannot be written as a GGUF file: {name} of shape {list(shape)} has no place in it.")
    target = names[0][0]
    if isinstance(part, Linear) and part.transposed and len(shape) == 2:
        shape = shape[::-1]
    kind = "F32"
    if len(shape) == 2 and isinstance(part, Linear | Embedding):
        kind = stored_type(part.weight, shape[-1])
        kind = "F32" if kind in ("F16", "BF16") and target.endswith(_WIDE) else kind
    experts = part.experts if isinstance(part, Linear) and found is not None else 1
    stacked = (experts, *shape) if experts > 1 else shape
    return Placed(name=target, shape=stacked, type=kind), int(found[1]) if found else 0


def _write_head(layout: Layout, spec: ModelSpec, source: Path, path: Path) -> int:
    """Write all but the tensors' bytes, for which room is made; the place of their beginning."""
    import gguf

    name = ARCHITECTURES[spec.family].name
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(spec.name)
    counts = Counter({tensor.type: 0 for tensor in layout.tensors})
    for tensor in layout.tensors:
        counts[tensor.type] += tensor.bytes
    writer.add_file_type(_FILE_TYPES[counts.most_common(1)[0][0]])
    if set(counts) - set(PLAIN):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata(spec).items():
        _add(writer, f"tokenizer.ggml.{key}" if key == "token_type_count" else f"{name}.{key}", value)
    if name == "bert":
        _add_pooling(writer, name, source)
    vocab_size = int(complete(spec.config)["vocab_size"])
    tokenizer = read_tokenizer(source, vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, source)
    for tensor in layout.tensors:
        kind = gguf.GGMLQuantizationType(GGML_TYPES[tensor.type].number)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "the header was written"
    start = -(-writer.fout[0].tell() // _ALIGNMENT) * _ALIGNMENT
    writer.close()
    path.chmod(0o644)
    os.truncate(path, start + layout.data_bytes)
    return start


def _add(writer: Any, key: str, value: float | bool | str) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_pooling(writer: Any, name: str, source: Path) -> None:
    """How sentence embeddings are pooled, where the folder says so; llama.cpp pools none else."""
    if (source / "1_Pooling" / "config.json").is_file():
        kinds = {"mean": 1, "cls": 2, "lasttoken": 3}
        writer.add_uint32(f"{name}.pooling_type", kinds[pooling(source, tuple(kinds))])


def _stored(name: str, weight: Weight, slot: Slot) -> Tensor | GgmlTensor:
    """One tensor as the file has it, rows in the file's order.

    Raises:
        RecipeError: the weight is not of the type that its part says.
    """
    kind, columns = slot.placed.type, slot.placed.shape[-1]
    if isinstance(weight, Tensor):
        value = weight.T if slot.transposed else weight
        value = value.float() + 1 if slot.plus_one else value
        value = value if slot.order is None else value[slot.order]
        return _plain(name, value.contiguous(), kind, slot)
    if isinstance(weight, QuantizedTensor):
        weight = as_ggml(weight)
    if not isinstance(weight, GgmlTensor) or weight.type != kind or weight.shape != (len(slot.rows), columns):
        given = f"{weight.type} {list(weight.shape)}" if isinstance(weight, GgmlTensor) else type(weight).__name__
        raise RecipeError(f"{name} came as {given}; its place in the file is {kind} {[len(slot.rows), columns]}.")
    return weight if slot.order is None else GgmlTensor(type=kind, blocks=weight.blocks[slot.order])


def _plain(name: str, value: Tensor, kind: str, slot: Slot) -> Tensor:
    expected = (len(slot.rows), slot.placed.shape[-1]) if len(slot.placed.shape) > 1 else slot.placed.shape
    if kind not in ("F32", "F16", "BF16") or tuple(value.shape) != tuple(expected):
        raise RecipeError(f"{name} came as {value.dtype} {list(value.shape)}; its place in the file is {kind} {list(expected)}.")
    dtype: torch.dtype = getattr(torch, PLAIN[kind])
    stored = value.to(dtype)
    if value.dtype != dtype and kind != "F32" and not torch.equal(stored.float(), value.float()):
        raise RecipeError(
            f"{name} came as {value.dtype}, which {PLAIN[kind]} does not hold without loss; cast({PLAIN[kind]}) says that it may be lost."
        )
    return stored


def _bytes(stored: Tensor | GgmlTensor) -> bytes:
    raw = stored.blocks if isinstance(stored, GgmlTensor) else stored
    return raw.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- read back ----


def _digest(stored: Tensor | GgmlTensor) -> bytes:
    """A fingerprint of a tensor's values as float32, some rows at a time."""
    if isinstance(stored, Tensor):
        rows = stored.reshape(-1, stored.shape[-1])
        return _digest_of(rows[start:end].float() for start, end in _some(len(rows), rows.shape[1]))
    some = _some(*stored.shape)
    return _digest_of(GgmlTensor(type=stored.type, blocks=stored.blocks[start:end]).dequantize() for start, end in some)


def _digest_of(values: Iterable[Tensor]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        found.update(value.contiguous().numpy().data)
    return found.digest()


def _some(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of runs of rows that hold about four million values."""
    step = max(1, 2**22 // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def verify_gguf(path: Path, written: Written) -> None:
    """Hold a file to what was written: each value as the `gguf` package dequantizes it, bit for bit.

    Raises:
        OutputError: a value differs, or a tensor is not there.
    """
    import gguf

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, slot in written.slots.items():
        tensor = read.get(slot.placed.name)
        if tensor is None or _digest_of(_values(tensor, slot)) != written.digests[name]:
            raise OutputError(f"{path}: {slot.placed.name} does not read back as {name} was written; the file is damaged, write it again.")


def _values(tensor: Any, slot: Slot) -> Iterator[Tensor]:
    """Some rows at a time of a tensor that the `gguf` package reads."""
    import gguf

    data = tensor.data.reshape(-1, tensor.data.shape[-1])[slot.rows.start : slot.rows.stop]
    for start, end in _some(len(data), slot.placed.shape[-1]):
        yield torch.from_numpy(gguf.quants.dequantize(np.array(data[start:end]), tensor.tensor_type)).float()
