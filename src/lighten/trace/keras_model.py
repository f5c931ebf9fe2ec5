"""Follow a Keras 3 model on its torch backend: a live one, or a `.keras` file, of which the config alone is read.

The model is built anew from its config on fake tensors, so that weights are neither read nor changed, and run once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from lighten.cost.workload import Workload
from lighten.errors import ModelError, TraceError, WorkloadError
from lighten.trace.program import Program
from lighten.trace.summary import Summary

if TYPE_CHECKING:
    from lighten.trace.torch_watch import Watch

MAX_CONFIG_BYTES = 64 * 2**20
OWN_MODULES = ("keras", "builtins")
"""Where a file's classes may come from; others would be the file's choice of code to run."""


def require_keras() -> Any:
    """The keras module on its torch backend.

    Raises:
        TraceError: not installed, or on another backend.
    """
    if importlib.util.find_spec("keras") is None or importlib.util.find_spec("torch") is None:
        raise TraceError("a Keras model is followed by keras on torch: pip install 'lighten[keras]'.")
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if keras.backend.backend() != "torch":
        raise TraceError(f"keras runs on backend {keras.backend.backend()}; a model is followed on torch: set KERAS_BACKEND=torch.")
    return keras


def read_keras(path: Path) -> KerasModel:
    """The model of a `.keras` file, its weights unread.

    Raises:
        ModelError: no such file, no Keras archive, or one whose classes are not Keras' own.
    """
    require_keras()
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("config.json").file_size
            if size > MAX_CONFIG_BYTES:
                raise ModelError(f"{path}: its config.json has {size} bytes, more than the {MAX_CONFIG_BYTES} that one may have.")
            config = json.loads(archive.read("config.json"))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: no readable .keras file ({type(error).__name__}: {error}).") from error
    foreign = sorted(set(_modules(config, path)))
    if foreign:
        raise ModelError(f"{path}: its classes come from {', '.join(foreign[:3])}, code that is not Keras' own and is not run from a file.")
    return KerasModel(config, name=path.stem, source=str(path))


def _modules(value: Any, path: Path, depth: int = 0) -> Iterator[str]:
    if depth > 200:
        raise ModelError(f"{path}: its config is nested deeper than any model's.")
    if isinstance(value, dict):
        named = value.get("module")
        if isinstance(named, str) and named.split(".")[0] not in OWN_MODULES:
            yield named
        for inner in value.values():
            yield from _modules(inner, path, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _modules(inner, path, depth + 1)


class KerasModel:
    """A Keras model as `lighten.trace.program.Followed`. The first axis of its inputs is the batch; a free second axis is the length.

    Args:
        model: a live model, or the content of a file's config.json.

    Raises:
        TraceError: keras is not on its torch backend, or the model has no inputs of known shape.
    """

    phases: tuple[str, ...] = ("encode", "train")
    breaks: tuple[int, ...] = ()

    def __init__(self, model: Any, *, name: str = "", source: str = "") -> None:
        keras = require_keras()
        live = isinstance(model, keras.Model)
        self._objects = {type(each).__name__: type(each) for each in model._flatten_layers()} if live else {}
        try:
            self._config = keras.saving.serialize_keras_object(model) if live else model
            plain = self._build_plain()
        except ModelError:
            raise
        except Exception as error:  # each layer's own code, whatever it raises
            raise TraceError(f"{name or type(model).__name__} cannot be built from its config: {type(error).__name__}: {_line(error)}") from error
        if not isinstance(plain, keras.Model) or not getattr(plain, "inputs", None):
            raise TraceError(f"{name or type(model).__name__} has no inputs of known shape; build it by keras.Model(inputs, outputs).")
        self._shapes = [(tuple(each.shape), str(each.dtype)) for each in plain.inputs]
        first = self._shapes[0][0]
        free = any(size is None for shape, _ in self._shapes for size in shape[1:])
        self.fixed_len = None if free else first[1] if len(first) > 1 else 1
        self.name, self.source = name or str(plain.name), source
        self.architecture, self.family = type(plain).__name__, "keras"
        self.dtype = str(plain.compute_dtype)

    @property
    def fingerprint(self) -> str:
        """Of its config."""
        return hashlib.sha256(json.dumps(self._config, sort_keys=True, default=str).encode()).hexdigest()

    def follow(self, workload: Workload) -> Program:
        """Its program; see `Followed.follow`. A training step differentiates the mean of the first output."""
        import torch

        from lighten.trace.torch_run import Run, follow_run

        if workload.phase not in self.phases:
            raise WorkloadError(f"{self.name}: phase {workload.phase} does not fit a Keras model; its phases: {', '.join(self.phases)}.")

        def loss(module: Any, batch: dict[str, Any]) -> torch.Tensor:
            out = module(batch["inputs"], training=True)
            first: torch.Tensor = next(iter(out.values())) if isinstance(out, dict) else out[0] if isinstance(out, list | tuple) else out
            return first.mean()

        run = Run(
            build=self._build, inputs=lambda _, asked: {"inputs": self._inputs(asked)}, loss=loss,
            infer=lambda module, batch, _: module(batch["inputs"], training=False), modules=keras_calls,
        )  # fmt: skip
        return follow_run(run, workload)

    def summarize(self, *, depth: int) -> Summary:
        """Its table by layer, of one forward pass of a single input."""
        from lighten.trace.torch_summary import by_path, row_of

        workload = Workload(phase="encode", seq_len=self.fixed_len or 128, dtype=self.dtype)
        program = self.follow(workload)
        flops, made = by_path(program)
        plain = self._build_plain()
        rows = [row_of("", plain, 0, [(v.shape, v.dtype) for v in plain.weights], (flops, made), name=self.name)]
        for layer in plain._flatten_layers(include_self=False):
            path = _path(layer)
            if path.count(".") < depth:
                weights = [(v.shape, v.dtype) for v in layer.weights]
                rows.append(row_of(path, layer, path.count(".") + 1, weights, (flops, made), name=layer.name))
        return Summary(rows=tuple(rows), batch_size=1, seq_len=workload.seq_len, unknown_ops=tuple(program.unknown_ops))

    def _build(self) -> Any:
        import torch

        with patch("keras.src.backend.torch.random.torch_seed_generator", lambda seed: torch.Generator()):
            return self._build_plain()

    def _build_plain(self) -> Any:
        import keras

        from lighten.trace.torch_run import fake_tensors

        if _is_fake():
            return keras.saving.deserialize_keras_object(copy.deepcopy(self._config), custom_objects=self._objects, safe_mode=True)
        with fake_tensors():
            return self._build()

    def _inputs(self, workload: Workload) -> Any:
        import torch

        made = []
        for shape, dtype in self._shapes:
            sizes = [workload.batch_size, *(workload.seq_len if size is None else size for size in shape[1:])]
            made.append(torch.zeros(sizes, dtype=getattr(torch, dtype)))
        return made[0] if len(made) == 1 else made


def _is_fake() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


@contextlib.contextmanager
def keras_calls(watch: Watch) -> Iterator[None]:
    """Tell which layer runs: Keras calls its layers by a method of its own, which no hook of torch sees."""
    import keras

    original = keras.Layer.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with watch.inside(_path(self)):
            return original(self, *args, **kwargs)

    with patch.object(keras.Layer, "__call__", call):
        yield


def _path(layer: Any) -> str:
    return str(getattr(layer, "path", None) or layer.name).replace("/", ".")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no text"
