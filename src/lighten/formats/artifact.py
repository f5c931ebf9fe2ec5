"""Build an artifact: a model folder and a recipe → a folder that one runtime runs, with `lighten.json` that says what it is.

All work is done in a folder beside the artifact's place (`compress.journal`), which is renamed at the end: a run that is killed goes on where
it was, and ends in the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lighten import __version__
from lighten.compress.clock import WRITING
from lighten.compress.grid import Weight
from lighten.compress.journal import Journal, sync, work_folder
from lighten.compress.memory_plan import MemoryPlan, import_class, keeping_limit, peak_rss_bytes, plan_memory, reset_peak, rss_bytes
from lighten.compress.run_identity import digest, run_identity
from lighten.compress.skeleton import main_input
from lighten.compress.training_time import TrainingTime, predict_times
from lighten.compress.walk import CalibrationSource, Checkpoint, Done, LayerReport, do_recipe
from lighten.errors import ConstraintError, ModelError, OutputError, RecipeError
from lighten.formats import files
from lighten.formats.deploy import copy_licenses, is_about, write_card, write_script
from lighten.formats.onnx_artifact import write_onnx_artifact
from lighten.formats.onnx_export import dense_weights, export_onnx, is_exported
from lighten.formats.openvino_ir import write_openvino
from lighten.formats.safetensors_folder import copy_side_files, other_loaders_refuse, write_dense, write_folder
from lighten.formats.static_rounding import Batch
from lighten.formats.step_facts import facts_before, facts_of_steps, run_facts
from lighten.formats.verify import Witness, verify_folder, verify_graph
from lighten.model import ModelSpec
from lighten.model.quantized.kv import KVFormat, kv_format_for
from lighten.model.read import read_config, weight_files
from lighten.model.runnable import read_for
from lighten.recipe import Recipe, apply_recipe, parse_recipe
from lighten.recipe.notes import notes
from lighten.recipe.predict import artifact_bytes, compute_dtype
from lighten.recipe.targets import RUNTIMES
from lighten.units import format_bytes

MANIFEST, RUN, PAGE = "lighten.json", "run.json", "report.html"
"""What the artifact is, in the same bytes whenever it is made; how the run went that made it; the page of both, which `lighten report` writes."""
OWN_TYPE = "the model's own"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder that `write_artifact` made.

    Attributes:
        original: the folder of the model that it was made from.
        dtype: the type that its runtime is asked to compute in.
        made: how the run that wrote it went; None where it was read.
    """

    folder: Path
    recipe: Recipe
    original: Path
    dtype: str
    predicted_size_bytes: int
    size_bytes: int
    made: Made | None = None


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a run went.

    Attributes:
        predicted_peak_bytes, peak_bytes: memory of the whole process; the measured one None where the system does not tell.
    """

    seconds: float
    predicted_peak_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Work:
    """How a recipe is to be carried out.

    Attributes:
        windows: gives calibration inputs of about so many tokens, for steps that look at what a layer is given.
        text: fingerprint of the text that they come from.
        memory_bytes: the most that the process may hold.
        resume: go on with an unfinished run.
    """

    windows: CalibrationSource | None = None
    text: str = ""
    memory_bytes: int | None = None
    resume: bool = False
    log: Callable[[str], None] = lambda line: None


def write_artifact(
    source: Path, recipe: Recipe, folder: Path, *, calibration: Callable[[], Sequence[Batch]], exports: Path | None = None, work: Work | None = None
) -> Artifact:
    """Carry out the recipe and write the artifact, beside its place first and then renamed into it.

    Args:
        calibration: gives calibration inputs to a runtime's own quantizer; called only where a step needs them.
        exports: a folder that keeps the model's ONNX export for further recipes.

    Raises:
        RecipeError: a step that this model or runtime cannot take.
        ConstraintError: the memory that is allowed does not do.
        ModelError: an unreadable checkpoint, or values that are not finite.
        OutputError: `folder` cannot be written, or is there already; or a run that cannot be gone on with.
    """
    start = time.perf_counter()
    work = work or Work()
    spec = read_for(source, exported=RUNTIMES[recipe.runtime].exported)
    plan = _Plan(
        source=source, spec=spec, predicted=apply_recipe(recipe, spec), recipe=recipe, calibration=calibration, exports=exports, work=work,
    )  # fmt: skip
    if not work.resume:
        _refuse_occupied(folder)
    _refuse(plan)
    for note in _notes(plan):
        work.log(note)
    times = _times(plan)
    reset_peak()
    memory = _memory(plan, folder)
    settings = {"sequences at once": str(memory.batch_rows), "type that calibration computes in": memory.compute_dtype or OWN_TYPE}
    identity = run_identity(source, str(recipe), text=work.text if _calibrated(recipe) else "", settings=settings)
    if work.resume and not work_folder(folder).is_dir() and _run_of(folder) == digest(identity):
        work.log(f"{folder} is finished already")
        return read_artifact(folder)
    with _working(folder, identity, work) as journal:
        if not (journal.assembled and _run_of(folder) == digest(identity)):
            _refuse_occupied(folder)
        if not journal.assembled:
            _check_space(plan, journal)
            with keeping_limit(work.memory_bytes):
                _assemble(plan, memory, journal, identity)
            _write_run(plan, memory, journal, times)
            journal.mark("assembled")
        _move(journal, folder)
    peaks = [peak for peak in (peak_rss_bytes(), journal.clock.peak_bytes) if peak is not None]
    made = Made(seconds=time.perf_counter() - start, predicted_peak_bytes=memory.peak_bytes, peak_bytes=max(peaks, default=None))
    return replace(read_artifact(folder), made=made)


def _refuse_occupied(folder: Path) -> None:
    """Raises:
    OutputError: something is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty; name a new folder, or remove it.")


def _run_of(folder: Path) -> str | None:
    """The digest of what the artifact in a folder was begun with; None where there is none."""
    try:
        return str(json.loads((folder / MANIFEST).read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _assemble(plan: _Plan, memory: MemoryPlan, journal: Journal, identity: Mapping[str, str]) -> None:
    """Fill the journal's artifact folder, so that it outlives a loss of power."""
    folder = journal.artifact
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    layers: list[LayerReport] = []
    done = do_recipe(
        Checkpoint(plan.source), plan.spec, plan.recipe, plan.source, journal, calibration=plan.work.windows, batch_rows=memory.batch_rows,
        buffer_bytes=memory.buffer_bytes, blocks_once=memory.blocks_once, compute_dtype=memory.compute_dtype, log=plan.work.log,
    )  # fmt: skip
    with journal.clock.counting(WRITING):
        _write(plan, memory, done, _reported(done, layers), journal)
    manifest = {
        "lighten": __version__, "recipe": str(plan.recipe), "runtime": plan.recipe.runtime, "dtype": compute_dtype(plan.recipe, plan.predicted),
        "original": str(plan.source.resolve()), "original_fingerprint": fingerprint(plan.source), "run": digest(identity),
        "size_bytes": folder_bytes(folder),
        "predicted": {"size_bytes": artifact_bytes(plan.recipe, plan.predicted)}, "notes": _notes(plan),
        "before": facts_before(plan.spec, plan.recipe, plan.source),
        "steps": list(facts_of_steps(plan.spec, plan.recipe, done.specs, journal)),
        "layers": [{key: value for key, value in asdict(layer).items() if value is not None or key == "bits"} for layer in layers],
        "curves": list(done.curves),
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    copy_licenses(plan.source, folder)
    write_script(folder, plan.recipe, done.spec, plan.source)
    write_card(folder, plan.recipe, done.spec, plan.source, manifest)
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _times(plan: _Plan) -> list[TrainingTime | None]:
    """What each step is predicted to take, said before any work; None where that is not known."""
    found, said = predict_times(plan.recipe, plan.spec, plan.work.windows, threads=torch.get_num_threads())
    for line in said:
        plan.work.log(line)
    return found


def _write_run(plan: _Plan, memory: MemoryPlan, journal: Journal, times: Sequence[TrainingTime | None]) -> None:
    """How the run went, beside the manifest."""
    run = run_facts(plan.recipe, journal, times, predicted_peak_bytes=memory.peak_bytes)
    path = journal.artifact / RUN
    path.write_text(json.dumps(run, indent=1) + "\n")
    sync(path)
    sync(journal.artifact)


def _notes(plan: _Plan) -> list[str]:
    """What is done otherwise than the recipe says, and which loaders refuse the result."""
    found = notes(plan.recipe, plan.spec)
    if plan.recipe.runtime == "llama.cpp":
        from lighten.formats.gguf_file import gguf_notes

        return [*found, *gguf_notes(plan.predicted, plan.source)]
    return found if RUNTIMES[plan.recipe.runtime].exported else [*found, *other_loaders_refuse(plan.predicted)]


def _refuse(plan: _Plan) -> None:
    """Raises:
    RecipeError: what its runtime's format cannot hold of this model.
    """
    if plan.recipe.runtime == "llama.cpp":
        from lighten.formats.gguf_file import refuse_gguf

        if any((step.verb, step.method) == ("shrink", "vocab") for step in plan.recipe.steps):
            raise RecipeError(
                "shrink(vocab) is written for torch, onnxruntime and openvino; lighten export --to gguf writes a GGUF file of the result."
            )
        if any(step.verb == "factorize" for step in plan.recipe.steps):
            raise RecipeError("llama.cpp has no linears of two factors; factorize for torch, onnxruntime or openvino.")

        refuse_gguf(plan.predicted, plan.source)
    if plan.recipe.runtime == "ctranslate2":
        from lighten.formats.ctranslate2_model import refuse_ctranslate2

        refuse_ctranslate2(plan.predicted)
    if plan.recipe.runtime in ("onnxruntime", "openvino") and any(step.verb == "rotate" for step in plan.recipe.steps):
        raise RecipeError(f"rotate unties the head, and the graph of {plan.recipe.runtime} keeps it tied; rotate for torch or llama.cpp.")


def _move(journal: Journal, folder: Path) -> None:
    """Give the artifact its name. A run that was killed in the middle of this finds the artifact there, and only tidies up."""
    if journal.artifact.is_dir():
        if folder.is_dir():
            folder.rmdir()
        os.replace(journal.artifact, folder)
        sync(folder.parent)
    journal.discard()


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
    """Bytes of all files but the manifest, the run's own, the page and what is for people, which no runtime reads."""
    own = {folder / name for name in (MANIFEST, RUN, PAGE)}
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path not in own and not is_about(path, folder))


def fingerprint(folder: Path) -> str:
    """A digest of a model folder's config and weights; files that did not change are told by size and time, not read."""
    config = json.dumps(read_config(folder), sort_keys=True)
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)]
    return hashlib.sha256(f"{config}{states}".encode()).hexdigest()[:16]


@contextmanager
def _working(folder: Path, identity: Mapping[str, str], work: Work) -> Iterator[Journal]:
    """The journal of the run that writes `folder`. Where anything fails it stays if a block was finished, else nothing does.

    Raises:
        OutputError: no such place, read-only, or full; or a run that cannot be gone on with.
    """
    with Journal.open(work_folder(folder), identity, resume=work.resume, out=folder, log=work.log) as journal:
        try:
            yield journal
        except BaseException as error:
            kept = f"What is finished stays in {journal.folder}: the same command with --resume goes on." if journal.worth_keeping() else ""
            if not kept:
                journal.discard()
            if (why := _refused(error)) is not None:
                raise OutputError(f"{folder} cannot be written: {why}. {kept}".strip()) from error
            if isinstance(error, OutputError | ConstraintError) and kept and "--resume" not in str(error):
                raise type(error)(f"{error} {kept}") from error
            if kept:
                work.log(kept)
            raise


def _refused(error: BaseException) -> str | None:
    """Why a place cannot be written, where that is what an error says."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) else None
    wrapped = isinstance(error, Exception) and not isinstance(error, OutputError) and "No space left" in str(error)
    return "no space left on device" if wrapped else None  # libraries wrap the system's error in their own


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be written: a recipe on a model, and where inputs come from."""

    source: Path
    spec: ModelSpec
    predicted: ModelSpec
    recipe: Recipe
    calibration: Callable[[], Sequence[Batch]]
    exports: Path | None
    work: Work


def _calibrated(recipe: Recipe) -> bool:
    return any(step.calibrated for step in recipe.steps)


def _memory(plan: _Plan, folder: Path) -> MemoryPlan:
    """How the run keeps to its memory; one that is gone on with, as it was begun."""
    import_class(plan.spec.architecture)
    for name in RUNTIMES[plan.recipe.runtime].builds:
        import_module(name)
    begun = Journal.identity_in(work_folder(folder)) if plan.work.resume else {}
    rows, dtype = begun.get("sequences at once"), begun.get("type that calibration computes in")
    fixed = (int(rows), None if dtype == OWN_TYPE else dtype) if rows is not None and rows.isdigit() else None
    return plan_memory(plan.spec, plan.recipe, base_bytes=rss_bytes() or 0, limit_bytes=plan.work.memory_bytes, fixed=fixed)


def _write(plan: _Plan, memory: MemoryPlan, done: Done, weights: Iterator[tuple[str, Weight]], journal: Journal) -> None:
    """Fill the journal's artifact folder with everything but the manifest."""
    folder = journal.artifact
    if plan.recipe.runtime == "llama.cpp":
        from lighten.formats.gguf_file import verify_gguf, write_gguf

        verify_gguf(folder / files.GGUF, write_gguf(weights, done.spec, plan.source, folder / files.GGUF))
    elif not RUNTIMES[plan.recipe.runtime].exported:
        witness = Witness(done.spec, plan.source)
        write_folder(witness.watch(weights), done.spec, plan.source, folder, kv_cache=_kv_format(plan.recipe, done.spec), side_files=done.side_files)
        _verify_folder(plan, memory, folder, witness)
    else:
        _write_exported(plan, dict(weights), done, journal.scratch, folder)


def _verify_folder(plan: _Plan, memory: MemoryPlan, folder: Path, witness: Witness) -> None:
    """Read an artifact of safetensors back, and run it where memory allows and a text is what it takes."""
    reads_text = main_input(plan.spec.architecture) == "input_ids"
    if not (memory.runs_result and reads_text):
        why = "its weights take more memory than there is" if reads_text else "a text is not what it takes"
        plan.work.log(f"reading the artifact back, tensor by tensor; it is not run: {why}")
    verified = verify_folder(folder, witness, compare_output=memory.runs_result and reads_text)
    if verified.output_error is not None:
        plan.work.log(f"read back: {verified.tensors} tensors are those that were written; its output differs by {verified.output_error:.1e}")


def _write_exported(plan: _Plan, weights: Mapping[str, Weight], done: Done, scratch: Path, folder: Path) -> None:
    """Write a model for its runtime with new weights. Where a step changed its own form, it is exported in that form, for this recipe alone.

    Args:
        done: whose weights these are.
    """
    spec, source, exported = done.spec, plan.source, (plan.exports or folder) / f"{fingerprint(plan.source)}.onnx"
    reformed = dict(spec.config) != dict(plan.spec.config)
    if reformed:
        source = scratch / "reformed"
        write_dense(weights, spec, plan.source, source, side_files=done.side_files)
        exported = source / "model.onnx"
    runtime = plan.recipe.runtime
    if runtime != "ctranslate2" and not is_exported(exported):
        exported.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(source, read_for(source, exported=True) if reformed else plan.spec, exported)
    if runtime == "ctranslate2":
        from lighten.formats.ctranslate2_model import write_ctranslate2

        write_ctranslate2(weights, spec, source, folder)
    else:
        write: Callable[..., None] = write_onnx_artifact if runtime == "onnxruntime" else write_openvino
        write(exported, weights, spec, folder, calibration=plan.calibration() if _calibrated(plan.recipe) else None)
    for path in folder.glob(f"{exported.stem}*") if exported.parent == folder else ():
        path.unlink()
    copy_side_files(source, folder)
    verify_graph(folder, runtime, source, spec, dense_weights(weights, spec))


def _kv_format(recipe: Recipe, spec: ModelSpec) -> KVFormat | None:
    """What the recipe says of the cache."""
    said = [step for step in recipe.steps if (step.verb, step.method) == ("quantize", "kv")]
    return kv_format_for(spec, bits=said[-1]["bits"], group_size=said[-1]["group_size"]) if said else None


def _check_space(plan: _Plan, journal: Journal) -> None:
    """Raises:
    OutputError: the disk has less room than the work takes: the artifact, and for an exported one two copies of the float32 weights; what each
        step that walks the blocks keeps until the end takes as much as the artifact.
    """
    copies = 2 if RUNTIMES[plan.recipe.runtime].exported else 0
    passes = sum(step.calibrated for step in plan.recipe.steps) if not copies else 0
    needed = (1 + passes) * artifact_bytes(plan.recipe, plan.predicted) + copies * 4 * plan.spec.total_parameters
    free = shutil.disk_usage(journal.folder).free + journal.kept_bytes()
    if free < needed:
        raise OutputError(f"{journal.folder.parent} has {format_bytes(free)} free; writing this artifact takes {format_bytes(needed)}.")


def _reported(done: Done, layers: list[LayerReport]) -> Iterator[tuple[str, Weight]]:
    for name, weight, report in done.weights:
        if report is not None:
            layers.append(report)
        yield name, weight
