"""Calibration inputs from a file of arrays, for models that read images or sound: what a forward takes, by its names."""

from __future__ import annotations

import hashlib
import inspect
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lighten.compress.skeleton import main_input
from lighten.compress.walk import Batch, CalibrationSource
from lighten.errors import TextError
from lighten.model import ModelSpec
from lighten.model.tasks import IGNORED, Task, class_of, task_of, vocab_size

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Samples of a model's inputs.

    Attributes:
        arrays: [samples, ...] each, by the names that the model's forward has for them.
        fingerprint: sha256 of all of it.
    """

    arrays: Arrays
    fingerprint: str

    def windows(self) -> CalibrationSource:
        """All samples, however many tokens are asked for: what counts as one is the model's concern."""
        batch: Batch = dict(self.arrays)
        return lambda tokens: [batch]


def load_inputs(path: Path, spec: ModelSpec) -> Inputs:
    """The arrays of an .npz file.

    Raises:
        TextError: not readable, arrays that disagree, are empty or hold values that are not finite, or not what the model takes.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file):
            pass  # an archive at all; what numpy opens that is none stays open
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TextError(f"{path} cannot be read as arrays (.npz): {str(error).splitlines()[0]}.") from error
    taken, main = _forward(spec)
    if unknown := sorted(set(arrays) - set(taken)):
        raise TextError(f"{path} holds {', '.join(unknown)}, which {spec.architecture} does not take; it takes {', '.join(taken)}.")
    if main not in arrays:
        raise TextError(f"{path} lacks {main}, the input of {spec.architecture}; it holds {', '.join(arrays) or 'nothing'}.")
    samples = {name: value.shape[0] if value.ndim else 0 for name, value in arrays.items()}
    if len(set(samples.values())) > 1 or not samples[main]:
        said = ", ".join(f"{name} {count}" for name, count in samples.items())
        raise TextError(f"{path}: each array needs the same number of samples along its first axis, at least 1; they have {said}.")
    for name, value in arrays.items():
        if value.dtype.kind not in "fiu" or (value.dtype.kind == "f" and not np.isfinite(value).all()):
            raise TextError(f"{path}: {name} holds values that are not finite numbers.")
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(f"{name}{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return Inputs(arrays=arrays, fingerprint=digest.hexdigest())


def with_labels(inputs: Inputs, spec: ModelSpec, weight: float | None, source: str) -> Inputs:
    """The same, its labels known to be what the model's head takes; a value of each sample as float32 [samples].

    Raises:
        TextError: labels that a step asks for are not among the arrays, have another shape or type, or are none that the model has.
    """
    task, arrays = task_of(spec), inputs.arrays
    names = ("start_positions", "end_positions") if task == "span" else ("labels",)
    if missing := [name for name in names if name not in arrays and weight]:
        raise TextError(f"{source} lacks {' and '.join(missing)}, which labels={weight} asks for; it holds {', '.join(arrays)}.")
    for name in (name for name in names if name in arrays):
        found = arrays[name]
        if task == "value":
            if found.size != len(found):
                raise TextError(f"{source}: labels are one number for each sample; they have the shape {list(found.shape)}.")
            return replace(inputs, arrays={**arrays, name: found.reshape(-1).astype(np.float32)})
        _require_whole(task, name, arrays, spec, source)
    return inputs


def _require_whole(task: Task | None, name: str, arrays: Arrays, spec: ModelSpec, source: str) -> None:
    """Classes, places or tokens: of a shape that fits, and each one that there is.

    Raises:
        TextError: not so.
    """
    found, tokens = arrays[name], arrays.get("input_ids")
    if task in ("classes", "span"):
        wanted, fits = "one whole number for each sample", found.ndim == 1
    elif task == "next" and tokens is not None:
        wanted, fits = f"one whole number for each token, {list(tokens.shape)}", found.shape == tokens.shape
    elif task == "target":
        wanted, fits = "whole numbers of [samples, tokens]", found.ndim == 2
    else:
        return
    if not fits or found.dtype.kind not in "iu":
        raise TextError(f"{source}: {name} are {wanted}; they have the shape {list(found.shape)} and type {found.dtype}.")
    if task == "classes":
        for place in (int(found.argmin()), int(found.argmax())):
            class_of(int(found[place]), spec.config, f"{source}: sample {place + 1}")
        return
    count = tokens.shape[1] if task == "span" and tokens is not None else vocab_size(spec)
    known = found[found != IGNORED]
    if known.size and count and not 0 <= int(known.min()) <= int(known.max()) < count:
        raise TextError(
            f"{source}: {name} are from 0 to {count - 1}, or {IGNORED} where nothing is known; they go from {known.min()} to {known.max()}."
        )


def _forward(spec: ModelSpec) -> tuple[list[str], str]:
    """Names that the model's forward takes, and its main one."""
    import transformers

    main = main_input(spec.architecture)
    if main is None:
        raise TextError(f"transformers has no class {spec.architecture}; its inputs are not known.")
    taken = inspect.signature(getattr(transformers, str(spec.architecture)).forward).parameters
    return [name for name in taken if name not in ("self", "kwargs")], main
