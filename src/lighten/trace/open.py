"""Open a model from wherever it is: as a spec, where a formula describes it, else as something that is followed operator by operator."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lighten.errors import ModelError, TraceError, UnsupportedFamily, WorkloadError
from lighten.model.source import read_spec
from lighten.model.spec import ModelSpec
from lighten.trace.program import Followed
from lighten.trace.summary import Summary

_FACTORY = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")

SOURCES = (
    "a folder with config.json (and its *.safetensors)", "a config.json", "a .safetensors with its config.json beside it", "a .gguf file",
    "an .onnx file", "a .keras file", "package.module:factory, a function that gives a torch module", "a hub id (owner/name)",
)  # fmt: skip


NEEDS_TORCH = "needs torch and transformers: pip install 'lighten[torch]'"


def open_model(model: str | Path, *, method: str = "auto", trust_remote_code: bool = False) -> ModelSpec | Followed:
    """What `read_model` gives; where there is no formula, or `method` is trace, what follows the config's class in transformers.

    Args:
        method: formula never follows; trace always does; auto takes the formula where there is one.
        trust_remote_code: run the code that a model's folder brings.

    Raises:
        ModelError: it cannot be read. WorkloadError: a method that it does not have. TraceError: torch or transformers is not installed.
    """
    try:
        found = read_model(model)
    except UnsupportedFamily as error:
        if method == "formula" or error.config is None:
            raise
        if not _has_transformers():
            from lighten.trace.known import find_known

            if known := find_known(error.config, str(model), Path(model).name):
                return known
            raise UnsupportedFamily(f"{error} Following it instead {NEEDS_TORCH}.") from error
        return _transformers_model(error.config, model, None, trust_remote_code=trust_remote_code)
    if not isinstance(found, ModelSpec):
        if method == "formula":
            raise WorkloadError(f"method=formula reads a config; {model} is followed: method=trace or auto.")
        return found
    if method != "trace":
        return found
    if not _has_transformers():
        raise TraceError(f"method=trace {NEEDS_TORCH}.")
    return _transformers_model(found.config, model, found, trust_remote_code=trust_remote_code)


def _transformers_model(config: Mapping[str, Any], model: str | Path, spec: ModelSpec | None, *, trust_remote_code: bool) -> Followed:
    from lighten.trace.torch_model import TransformersModel

    path = Path(model)
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    return TransformersModel(
        config, spec.architecture if spec else None, name=spec.name if spec else folder.resolve().name if folder else str(model),
        source=str(model), dtype=spec.dtype if spec else None, folder=folder, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _has_transformers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def open_live(model: Any, inputs: Any) -> Followed:
    """A torch module or Keras model that lives in this process.

    Raises:
        ModelError: something else. TraceError: a torch module without example inputs.
    """
    if live_kind(model) == "keras":
        from lighten.trace.keras_model import KerasModel

        return KerasModel(model)
    if inputs is None:
        raise TraceError(f"{type(model).__name__}: give inputs=…, an example of what its forward takes.")
    from lighten.trace.torch_module import TorchModule

    return TorchModule(model, inputs)


def live_kind(model: Any) -> str:
    """`keras` or `torch`; a library that the model's maker did not import is not imported to tell.

    Raises:
        ModelError: neither.
    """
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.Model):
        return "keras"
    if torch is not None and isinstance(model, torch.nn.Module):
        return "torch"
    raise ModelError(f"a {type(model).__name__} is no model; a model is {'; '.join(SOURCES)}; or a live torch module or Keras model.")


def summarize_live(model: Any, inputs: Any, *, depth: int) -> Summary:
    """See `lighten.summary`."""
    if live_kind(model) == "keras":
        from lighten.trace.keras_model import KerasModel

        if inputs is not None:
            raise TraceError("inputs have no effect on a Keras model, which knows the shapes of its own.")
        return KerasModel(model).summarize(depth=depth)
    if inputs is None:
        raise TraceError(f"{type(model).__name__}: give inputs=…, an example of what its forward takes.")
    from lighten.trace.torch_summary import summarize

    return summarize(model, inputs, depth=depth)


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
    if (text and path.exists()) or not isinstance(source, str):
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
    from lighten.trace.keras_model import read_keras

    return read_keras(path)


def _from_factory(text: str) -> Followed:
    try:
        from lighten.trace import torch_module
    except ImportError as error:
        raise ModelError(f"{text}: a torch module cannot be followed ({error}); pip install 'lighten[torch]'.") from error
    found: Followed = torch_module.from_factory(text)
    return found
