"""Open a model from wherever it is: as a spec, where a formula describes it, else as something that is followed operator by operator."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.model.source import read_spec
from lighten.model.spec import ModelSpec
from lighten.trace.program import Followed

_FACTORY = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")

SOURCES = (
    "a folder with config.json (and its *.safetensors)", "a config.json", "a .safetensors with its config.json beside it", "a .gguf file",
    "an .onnx file", "a .keras file", "package.module:factory, a function that gives a torch module", "a hub id (owner/name)",
)  # fmt: skip


def read_model(source: str | Path) -> ModelSpec | Followed:
    """What a source holds: a `ModelSpec`, or what can be followed.

    | source | gives |
    |---|---|
    | a folder, a config, a `.safetensors`, a `.gguf`, a hub id | `ModelSpec` |
    | an `.onnx` file | `lighten.trace.onnx_graph.OnnxGraph` |
    | a `.keras` file | `lighten.trace.keras_model.KerasModel` |
    | `package.module:factory` | the torch module that the factory makes; see `lighten.trace.torch_module` |

    Raises:
        ModelError: none of these, or one that cannot be read.
        UnsupportedFamily: a config whose architecture has no formula.
        RuntimeUnavailable: the package that reads it is not installed.
    """
    path, text = Path(source), str(source)
    if path.is_file() and path.suffix in (".onnx", ".keras"):
        return _followed_file(path)
    if path.exists() or not isinstance(source, str):
        return read_spec(path)
    if path.suffix in (".onnx", ".keras", ".gguf", ".safetensors", ".json"):
        raise ModelError(f"{text}: no such file. A model is {'; '.join(SOURCES)}.")
    if _FACTORY.match(text):
        return _from_factory(text)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text):
        return read_spec(text)
    raise ModelError(f"{text}: no such folder or file, and no name of a model either. A model is {'; '.join(SOURCES)}.")


def _followed_file(path: Path) -> Followed:
    if path.suffix == ".onnx":
        from lighten.trace.onnx_graph import OnnxGraph

        return OnnxGraph(path)
    try:
        keras_model: Any = importlib.import_module("lighten.trace.keras_model")
    except ImportError as error:
        raise ModelError(f"{path}: a Keras model cannot be read ({error}); export it to ONNX, which can.") from error
    found: Followed = keras_model.KerasModel(path)
    return found


def _from_factory(text: str) -> Followed:
    try:
        from lighten.trace import torch_module
    except ImportError as error:
        raise ModelError(f"{text}: a torch module cannot be followed ({error}); pip install 'lighten[torch]'.") from error
    found: Followed = torch_module.from_factory(text)
    return found
