"""Where a model comes from: a local folder, a config, a file of weights, or a hub id."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lighten.errors import ModelError
from lighten.model.gguf import read_gguf
from lighten.model.gguf_header import MAGIC
from lighten.model.hub import read_hub
from lighten.model.read import read_config_file, read_folder, read_safetensors
from lighten.model.spec import ModelSpec

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_SOURCES = "a model is a folder with config.json and *.safetensors, a config.json, a .safetensors or .gguf file, or a hub id"


def read_spec(model: str | Path) -> ModelSpec:
    """The spec of a local folder or file, or of a hub id when no such path exists.

    A folder holds config.json and its weights, or config.json alone: a model that need not exist. A file is a config (`*.json`), a
    `.safetensors` with its config.json beside it, or a `.gguf`.

    Raises:
        ModelError: no such path, no config, an unreadable header, or config and weights that contradict each other.
        UnsupportedFamily: an architecture without a formula.
    """
    path = Path(model)
    try:
        if path.is_dir():
            return read_folder(path)
        if path.exists():
            return _read_file(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if isinstance(model, Path) or not _HUB_ID.match(str(model)) or str(model).startswith("."):
        raise ModelError(f"{model}: no such folder, and no hub id (owner/name) either.")
    return read_hub(str(model))


def _read_file(path: Path) -> ModelSpec:
    if path.is_file() and path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.is_file() and (path.suffix == ".gguf" or _starts_with(path, MAGIC)):
        return read_gguf(path)
    if path.is_file() and path.suffix == ".json" and (path.name == "config.json" or _is_config(path)):
        return read_config_file(path)
    graphs = {".onnx": "an ONNX graph", ".keras": "a Keras model"}
    if path.suffix in graphs:
        raise ModelError(f"{path} is {graphs[path.suffix]}, which `lighten estimate` follows operator by operator; here {_SOURCES}.")
    raise ModelError(f"{path} is a file; {_SOURCES}.")


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _is_config(path: Path) -> bool:
    """Whether a small JSON file of another name than config.json is a model's config."""
    try:
        return path.stat().st_size < 1_000_000 and "model_type" in json.loads(path.read_bytes())
    except (ValueError, RecursionError, TypeError):
        return False
