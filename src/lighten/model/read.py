"""Read a `ModelSpec` from a local folder in Hugging Face format, a config alone, or one safetensors file. No weight is loaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.model.families import FAMILIES, describe
from lighten.model.families._config import SHAPES
from lighten.model.leftovers import left_out
from lighten.model.low_rank import CORRECTION_FILE, CORRECTION_FOLDER, config_as_stored, mark_of
from lighten.model.quantized import quantized_parts, scale_names, stored_tensors, with_stored_scales
from lighten.model.quantized.masked import SPARSITY_CONFIG, is_masked, masked_parts
from lighten.model.quantized.stored import VALUES
from lighten.model.safetensors_header import read_header
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, TensorSpec
from lighten.units import DTYPE_BITS

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "preprocessor_config.json", "processor_config.json", "normalizer.json", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm",
)  # fmt: skip
"""Files beside the weights that a runtime, a tokenizer or a processor of images and sound reads; an artifact carries them."""

OTHER_WEIGHTS = ("*.gguf", "*.onnx", "*.keras", "*.h5", "*.msgpack", "*.xml", "*.tflite")
"""Weights in formats that a folder is not read by: such a file is read, if at all, by its own path."""

MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 20_000_000, 200_000_000
"""Far above any config or index that is known (an index of 100,000 tensors takes 10 MB); a larger file is refused unread."""
MOST_NUMBERED = 10_000
"""More layers or experts than any model has."""
MOST_NESTED = 20
LARGEST_SIZE = 10**10
"""A size that no field of a model has reached; vocabularies have 10**6 entries, contexts 10**7 positions."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq|masked_bias|embeddings\.token_type_ids)$")
"""Tensors that older checkpoints saved though they are no parameters."""

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_folder(folder: Path) -> ModelSpec:
    """The spec of a folder in Hugging Face format: config.json beside one or more *.safetensors, or alone.

    Raises:
        ModelError: no config, an unreadable header, or config and weights that contradict each other.
        UnsupportedFamily: an architecture without a formula.
    """
    config = read_config(folder)
    if not _has_weights(folder):
        return config_spec(config, name=folder.resolve().name, source=str(folder))
    files = weight_files(folder)
    tensors = tuple(tensor for file in files for tensor in read_header(file))
    other = sum((folder / name).stat().st_size for name in SIDE_FILES if (folder / name).is_file())
    return make_spec(config, tensors, name=folder.resolve().name, source=str(folder), other_bytes=other)


def read_config_file(path: Path) -> ModelSpec:
    """The spec of a config alone: a model that need not exist.

    Raises:
        ModelError: no JSON object, or fields that no model can have.
        UnsupportedFamily: an architecture without a formula.
    """
    config = config_as_stored(parse_config(_limited(path, MAX_CONFIG_BYTES), str(path)))
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return config_spec(config, name=name, source=str(path))


def read_safetensors(path: Path) -> ModelSpec:
    """The spec of one safetensors file and the config.json beside it.

    Raises:
        ModelError: no config beside it, one shard of several, an unreadable header, or config and weights that contradict each other.
    """
    if not (path.parent / "config.json").is_file():
        raise ModelError(
            f"{path}: a safetensors file has names and shapes of tensors, not how they are computed with, and there is no config.json beside it; "
            "put the model's config.json there."
        )
    shards = _shards(path.parent) or set()
    if len(shards) > 1 and path.name in shards:
        raise ModelError(f"{path}: one of {len(shards)} shards of a model; give the folder, {path.parent}, to read them all.")
    return make_spec(read_config(path.parent), read_header(path), name=path.stem, source=str(path), other_bytes=0)


def config_spec(config: Mapping[str, Any], *, name: str, source: str) -> ModelSpec:
    """The spec of a model without weights, each weight in the config's `dtype` (float32 where it has none).

    Without `architectures` it is the first that its family describes; `notes` say what was taken for granted.

    Raises:
        ModelError: fields that no model can have, or a `dtype` that is not known.
        UnsupportedFamily: an architecture without a formula.
    """
    refuse_absurd(config, source)
    architecture, notes = _architecture(config)
    dtype, more = _config_dtype(config, source)
    notes += more
    parts = describe(config, architecture)
    if quantization := config.get("quantization_config"):
        try:
            parts = quantized_parts(parts, quantization, source)
        except ModelError as error:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            why = str(error).removeprefix(f"{source}: ").rstrip(".")
            notes += (f"its quantization_config ({method}) is not applied: every weight is counted as {dtype} ({why})",)
    if SPARSITY_CONFIG in config:
        parts = masked_parts(parts, config[SPARSITY_CONFIG], source)
    parts = tuple(_in_dtype(part, dtype) for part in parts)
    return ModelSpec(
        name=name,
        family=str(config.get("model_type")),
        architecture=architecture,
        source=source,
        dtype=dtype,
        config=config,
        parts=parts,
        notes=notes,
    )


def refuse_absurd(config: Mapping[str, Any], source: str) -> None:
    """Raises:
    ModelError: a number in a config, or in one nested in it, that no model can have; it would be described at great length before it failed.
    """
    wrong = [f"{key}={_short(value)} is more than {most}" for key, value in _fields(config, source) if (most := _most(key)) and _exceeds(value, most)]
    if wrong:
        raise ModelError(f"{source}: {', '.join(wrong[:5])}, which no model has.")


def _fields(config: Mapping[str, Any], source: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The fields of a config and of those nested in it."""
    if depth > MOST_NESTED:
        raise ModelError(f"{source}: nested deeper than {MOST_NESTED} levels, which no config is.")
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, source, depth + 1)
        else:
            yield key, value


def _most(key: str) -> int | None:
    """The largest number that a field can be believed to have; None where any will do."""
    if re.fullmatch(r"(num|n)_(\w+_)?(layers?|experts)|\w+_layers|n_layers?", key):
        return MOST_NUMBERED
    return LARGEST_SIZE if key in SHAPES else None


def _exceeds(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > most


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:6]}… ({len(text)} digits)"


def _architecture(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The architecture that a config names, else its family's first, and a note that says so."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0], ()
    family = FAMILIES.get(str(config.get("model_type")))
    first = family.architectures[0] if family else ""
    return first, (f"config.json names no architecture; read as {first}",)


def _config_dtype(config: Mapping[str, Any], source: str) -> tuple[str, tuple[str, ...]]:
    """The type of a config's weights, and a note where it names none."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None or named == "auto":
        return "float32", ("config.json names no dtype; weights are counted as float32",)
    dtype = str(named).removeprefix("torch.")
    known = [name for name in DTYPE_BITS if "float" in name]
    if dtype not in known:
        raise ModelError(f"{source}: dtype {named!r} is not known; known: {', '.join(known)}.")
    return dtype, ()


def _in_dtype(part: Part, dtype: str) -> Part:
    return replace(part, weight=replace(part.weight, dtype=dtype)) if isinstance(part, Linear | Embedding) and part.weight.bits is None else part


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds anything that looks like weights, in whatever format."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.safetensors.index.json", *PICKLES, *OTHER_WEIGHTS))


def _limited(path: Path, most: int) -> bytes:
    """A file's bytes.

    Raises:
        ModelError: more than `most`.
    """
    if (size := path.stat().st_size) > most:
        raise ModelError(f"{path}: {size} bytes are more than the {most} that such a file may have.")
    return path.read_bytes()


INDICES = ("model.safetensors.index.json", "sparse.safetensors.index.json")
"""Files that say which shard has which tensor: of the field's, and of weights that are stored without their zeros."""


def _shards(folder: Path) -> set[str] | None:
    """The files that a folder's index names; None without an index."""
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is None:
        return None
    shards = parse_config(_limited(index, MAX_INDEX_BYTES), str(index)).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
        raise ModelError(f"{index}: its weight_map is not a table of tensor and file names.")
    return set(shards.values())


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        ModelError: missing, or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; a model folder holds config.json and *.safetensors.")
    return config_as_stored(parse_config(_limited(path, MAX_CONFIG_BYTES), str(path)))


def parse_config(raw: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        ModelError: not one.
    """
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"{source}: not a JSON object but a {type(config).__name__}.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, else all; a correction's last.

    Raises:
        ModelError: no weights, pickled weights only, or shards that the index names and that are missing.
    """
    if (shards := _shards(folder)) is not None:
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of its shards are missing: {', '.join(missing[:3])}.")
        return sorted(folder / name for name in shards) + _corrections(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickle(p.name for pattern in PICKLES for p in folder.glob(pattern))
        others = sorted(p.name for pattern in OTHER_WEIGHTS for p in folder.glob(pattern))
        more = f"; it holds {others[0]}, which is read by its own path" if others else ""
        raise ModelError(f"{folder}: no *.safetensors beside config.json{more}.")
    return files + _corrections(folder)


def _corrections(folder: Path) -> list[Path]:
    path = folder / CORRECTION_FOLDER / CORRECTION_FILE
    return [path] if path.is_file() else []


def refuse_pickle(names: Iterable[str]) -> None:
    """Raises:
    ModelError: a pickled checkpoint is among `names`; it could run any code when read.
    """
    for name in sorted(names):
        raise ModelError(
            f"{name} is a pickle, which can run any code when read, and is refused; convert it where you trust it: "
            "AutoModel.from_pretrained(folder, weights_only=True).save_pretrained(new_folder), which writes safetensors."
        )


def make_spec(config: Mapping[str, Any], tensors: tuple[TensorSpec, ...], *, name: str, source: str, other_bytes: int) -> ModelSpec:
    """A spec from config and header, held against each other.

    Raises:
        ModelError: tensors that the config calls for are missing, have another shape, or stand there uncalled for.
    """
    refuse_absurd(config, source)
    family = config.get("model_type")
    architectures = config.get("architectures")
    if (
        isinstance(family, str)
        and family in FAMILIES
        and not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str))
    ):
        raise ModelError(f'{source}: config.json names no architecture; add for example "architectures": ["BertModel"].')
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    parts = describe(config, architecture)
    if quantization := config.get("quantization_config"):
        parts = quantized_parts(parts, quantization, source, types={tensor.name: tensor.dtype for tensor in tensors})
    if SPARSITY_CONFIG in config:
        parts = masked_parts(parts, config[SPARSITY_CONFIG], source)
    mark = mark_of(config)
    stored = tuple(
        tensor for tensor in tensors
        if not (tensor.name == "lm_head.weight" and config.get("tie_word_embeddings")) and not (tensor.name == mark and not tensor.elements)
    )  # fmt: skip
    expected = {name: shape for part in parts for name, shape in stored_tensors(part).items()}
    left = left_out(config, parts, [tensor for tensor in stored if tensor.name not in expected])
    stored = tuple(tensor for tensor in stored if tensor.name not in left.names)
    check_tensors(expected, stored, source)
    scales = scale_names(parts)
    dtypes: Counter[str] = Counter()
    for tensor in stored:
        if tensor.dtype in FLOAT_DTYPES and tensor.name not in scales:
            dtypes[tensor.dtype] += tensor.elements
    if not dtypes:
        raise ModelError(f"{source}: no tensor of a floating-point type.")
    types = {tensor.name: tensor.dtype for tensor in stored}
    parts = tuple(_as_stored(part, types) for part in parts)
    return ModelSpec(
        name=name, family=str(family), architecture=architecture, source=source, dtype=dtypes.most_common(1)[0][0],
        config=config, parts=parts, tensors=stored, other_bytes=other_bytes, notes=left.notes,
    )  # fmt: skip


def _as_stored(part: Part, types: Mapping[str, str]) -> Part:
    """The part with the type in which the checkpoint keeps its weight, or the scales of a quantized one."""
    if not isinstance(part, Linear | Embedding):
        return part
    name = (part.tied_to if isinstance(part, Linear) else None) or part.name
    if part.weight.bits is None:
        stored = f"{name}.weight"
        if {stored, f"{stored}{VALUES}"}.isdisjoint(types):  # experts: a name for each, or one tensor of another name for all
            stored = next(iter(part.tensors()))
        stored = f"{stored}{VALUES}" if is_masked(part) else stored
        return replace(part, weight=replace(part.weight, dtype=types[stored]))
    return with_stored_scales(part, types)


def check_tensors(expected: Mapping[str, tuple[int, ...]], stored: Iterable[TensorSpec], source: str) -> None:
    """Raises:
    ModelError: naming the tensors in which config and checkpoint disagree.
    """
    found = {tensor.name: tensor.shape for tensor in stored}
    wrong = [f"{name} is {list(found[name])}, the config says {list(shape)}" for name, shape in expected.items() if found.get(name, shape) != shape]
    wrong += [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not in the architecture" for name in found if name not in expected]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{source}: config and weights contradict each other: {'; '.join(wrong[:3])}{more}.")
