"""Read a `ModelSpec` from a local folder in Hugging Face format. No weight is loaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.model.families import FAMILIES, describe
from lighten.model.quantized import quantized_parts, stored_tensors
from lighten.model.safetensors_header import read_header
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, TensorSpec

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json",
)  # fmt: skip
"""Files beside the weights that a runtime or tokenizer reads; an artifact carries them."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq|masked_bias|embeddings\.token_type_ids)$")
"""Tensors that older checkpoints saved though they are no parameters."""

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_folder(folder: Path) -> ModelSpec:
    """The spec of a folder in Hugging Face format: config.json beside one or more *.safetensors.

    Raises:
        ModelError: no config, an unreadable header, or config and weights that contradict each other.
        UnsupportedFamily: an architecture without a formula.
    """
    config = read_config(folder)
    files = weight_files(folder)
    tensors = tuple(tensor for file in files for tensor in read_header(file))
    other = sum((folder / name).stat().st_size for name in SIDE_FILES if (folder / name).is_file())
    return make_spec(config, tensors, name=folder.resolve().name, source=str(folder), other_bytes=other)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        ModelError: missing, or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; a model folder holds config.json and *.safetensors.")
    return parse_config(path.read_bytes(), str(path))


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
    """The safetensors files of a folder: those that its index names, else all.

    Raises:
        ModelError: no weights, pickled weights only, or shards that the index names and that are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = parse_config(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
            raise ModelError(f"{index}: its weight_map is not a table of tensor and file names.")
        missing = sorted({name for name in shards.values() if not (folder / name).is_file()})
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of its shards are missing: {', '.join(missing[:3])}.")
        return sorted({folder / name for name in shards.values()})
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickle(p.name for pattern in PICKLES for p in folder.glob(pattern))
        raise ModelError(f"{folder}: no *.safetensors beside config.json.")
    return files


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
        parts = quantized_parts(parts, quantization, source)
    stored = tuple(tensor for tensor in tensors if not BUFFERS.search(tensor.name))
    stored = tuple(tensor for tensor in stored if not (tensor.name == "lm_head.weight" and config.get("tie_word_embeddings")))
    check_tensors({name: shape for part in parts for name, shape in stored_tensors(part).items()}, stored, source)
    dtypes: Counter[str] = Counter()
    for tensor in stored:
        if tensor.dtype in FLOAT_DTYPES and not tensor.name.endswith(".weight_scale"):
            dtypes[tensor.dtype] += tensor.elements
    if not dtypes:
        raise ModelError(f"{source}: no tensor of a floating-point type.")
    types = {tensor.name: tensor.dtype for tensor in stored}
    parts = tuple(_as_stored(part, types) for part in parts)
    return ModelSpec(
        name=name, family=str(family), architecture=architecture, source=source, dtype=dtypes.most_common(1)[0][0],
        config=config, parts=parts, tensors=stored, other_bytes=other_bytes,
    )  # fmt: skip


def _as_stored(part: Part, types: Mapping[str, str]) -> Part:
    """The part with the type in which the checkpoint keeps its weight, or the scales of a quantized one."""
    if not isinstance(part, Linear | Embedding):
        return part
    name = (part.tied_to if isinstance(part, Linear) else None) or part.name
    if part.weight.bits is None:
        stored = f"{name}.weight"
        if stored not in types:  # experts: a name for each, or one tensor of another name for all
            stored = next(iter(part.tensors()))
        return replace(part, weight=replace(part.weight, dtype=types[stored]))
    return replace(part, weight=replace(part.weight, scale_dtype=types[f"{name}.weight_scale"]))


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
