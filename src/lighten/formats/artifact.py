"""Build an artifact: a model folder and a recipe → a folder that one runtime runs, with `lighten.json` that says what it is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten import __version__
from lighten.compress.grid import QuantizedTensor
from lighten.compress.walk import Checkpoint, LayerReport, compress_weights
from lighten.errors import ModelError, OutputError
from lighten.formats.onnx_artifact import write_onnx_artifact
from lighten.formats.onnx_export import export_onnx, is_exported
from lighten.formats.openvino_ir import Batch, write_openvino
from lighten.formats.safetensors_folder import copy_side_files, write_folder
from lighten.model import ModelSpec
from lighten.model.read import read_config, weight_files
from lighten.model.runnable import read_runnable
from lighten.recipe import Recipe, apply_recipe, parse_recipe
from lighten.recipe.predict import artifact_bytes, compute_dtype
from lighten.units import format_bytes

MANIFEST = "lighten.json"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder that `write_artifact` made.

    Attributes:
        original: the folder of the model that it was made from.
        dtype: the type that its runtime is asked to compute in.
    """

    folder: Path
    recipe: Recipe
    original: Path
    dtype: str
    predicted_size_bytes: int
    size_bytes: int


def write_artifact(
    source: Path, recipe: Recipe, folder: Path, *, calibration: Callable[[], Sequence[Batch]], exports: Path | None = None
) -> Artifact:
    """Carry out the recipe and write the artifact, beside its place first and then renamed into it.

    Args:
        calibration: gives calibration inputs; called only where a step needs them.
        exports: a folder that keeps the model's ONNX export for further recipes.

    Raises:
        RecipeError: a step that this model or runtime cannot take.
        ModelError: an unreadable checkpoint, or values that are not finite.
        OutputError: `folder` cannot be written, or is there already.
    """
    spec = read_runnable(source)
    predicted = apply_recipe(recipe, spec)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty; name a new folder, or remove it.")
    plan = _Plan(source=source, spec=spec, predicted=predicted, recipe=recipe, calibration=calibration, exports=exports)
    with writing_beside(folder) as beside:
        _check_space(plan, beside)
        layers = _write(plan, beside)
        size = folder_bytes(beside)
        manifest = {
            "lighten": __version__, "recipe": str(recipe), "runtime": recipe.runtime, "dtype": compute_dtype(recipe, predicted),
            "original": str(source.resolve()), "original_fingerprint": fingerprint(source), "size_bytes": size,
            "predicted": {"size_bytes": artifact_bytes(recipe, predicted)}, "layers": [asdict(layer) for layer in layers],
        }  # fmt: skip
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return read_artifact(folder)


def read_artifact(folder: Path) -> Artifact:
    """The artifact in a folder.

    Raises:
        ModelError: no manifest there, or one that cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return Artifact(
            folder=folder, recipe=parse_recipe(manifest["recipe"]), original=Path(manifest["original"]), dtype=manifest["dtype"],
            predicted_size_bytes=manifest["predicted"]["size_bytes"], size_bytes=manifest["size_bytes"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: no readable {MANIFEST} ({type(error).__name__}: {error}).") from error


def folder_bytes(folder: Path) -> int:
    """Bytes of all files but the manifest, which no runtime reads."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def fingerprint(folder: Path) -> str:
    """A digest of a model folder's config and weights; files that did not change are told by size and time, not read."""
    config = json.dumps(read_config(folder), sort_keys=True)
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)]
    return hashlib.sha256(f"{config}{states}".encode()).hexdigest()[:16]


@contextmanager
def writing_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, renamed to it at the end; removed where anything fails.

    Raises:
        OutputError: no such place, read-only, or full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.") from error
    try:
        yield beside
        beside.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(beside, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise OutputError(f"{folder} cannot be written: {error.strerror}.") from error
        raise
    except Exception as error:
        if "No space left" in str(error):  # libraries wrap the system's error in their own
            raise OutputError(f"{folder} cannot be written: no space left on device.") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be written: a recipe on a model, and where inputs come from."""

    source: Path
    spec: ModelSpec
    predicted: ModelSpec
    recipe: Recipe
    calibration: Callable[[], Sequence[Batch]]
    exports: Path | None


def _write(plan: _Plan, folder: Path) -> list[LayerReport]:
    """Fill `folder` with everything but the manifest."""
    layers: list[LayerReport] = []
    weights = _reported(compress_weights(Checkpoint(plan.source), plan.spec, plan.recipe), layers)
    if plan.recipe.runtime in ("torch", "torch-compile"):
        write_folder(weights, plan.predicted, plan.source, folder)
        return layers
    values = {name: weight.dequantize() if isinstance(weight, QuantizedTensor) else weight for name, weight in weights}
    exported = (plan.exports or folder) / f"{fingerprint(plan.source)}.onnx"
    if not is_exported(exported):
        exported.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(plan.source, plan.spec, exported)
    if plan.recipe.runtime == "onnxruntime":
        write_onnx_artifact(exported, values, plan.predicted, folder)
    else:
        needs = any(step.kind.calibrated for step in plan.recipe.steps)
        write_openvino(exported, values, plan.predicted, folder, calibration=plan.calibration() if needs else None)
    for path in folder.glob(f"{exported.stem}*"):
        path.unlink()
    copy_side_files(plan.source, folder)
    return layers


def _check_space(plan: _Plan, folder: Path) -> None:
    """Raises:
    OutputError: the disk has less room than the work takes: the artifact, and for an exported one two copies of the float32 weights.
    """
    copies = 0 if plan.recipe.runtime in ("torch", "torch-compile") else 2
    needed = artifact_bytes(plan.recipe, plan.predicted) + copies * 4 * plan.spec.total_parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"{folder.parent} has {format_bytes(free)} free; writing this artifact takes {format_bytes(needed)}.")


def _reported(
    walked: Iterator[tuple[str, Tensor | QuantizedTensor, LayerReport | None]], layers: list[LayerReport]
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    for name, weight, report in walked:
        if report is not None:
            layers.append(report)
        yield name, weight
