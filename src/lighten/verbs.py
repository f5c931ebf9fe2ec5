"""The verbs, as functions: what the command line does, `import lighten` does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lighten.cost.workload import Phase, Recompute, Workload, check_workload
from lighten.device.device import Device
from lighten.device.find import THIS_MACHINE, find_device, find_place
from lighten.errors import DeviceError, ModelError, RecipeError, TextError, UnsupportedFamily, WorkloadError
from lighten.model import ModelSpec
from lighten.model.runnable import read_for, read_runnable
from lighten.parallel.plan import Plan
from lighten.recipe import Recipe, apply_recipe, parse_recipe, read_recipe
from lighten.recipe.estimate import Estimate
from lighten.recipe.placement import Use, default_plan
from lighten.recipe.predict import compute_dtype
from lighten.recipe.recipe import DEFAULT_RUNTIME
from lighten.trace.open import open_live, open_model
from lighten.trace.program import Followed
from lighten.trace.summary import Summary
from lighten.units import DTYPE_BITS, SIZE_UNITS, parse_dtype, parse_quantity

if TYPE_CHECKING:
    from lighten.choose.request import Request
    from lighten.device import Profile
    from lighten.formats.artifact import Artifact
    from lighten.formats.export import Exported
    from lighten.parallel.search import Asked, Found
    from lighten.parallel.search import Goal as PlanGoal
    from lighten.recipe.advise import Advice, Goal
    from lighten.recipe.case import Case, Target
    from lighten.recipe.compare import Entry

Log = Callable[[str], None]
Method = Literal["auto", "formula", "trace"]
TIMEOUT_S = 900.0
DEFAULT_LEN = 128
"""Tokens of a sequence where nothing is asked."""


def silent(line: str) -> None:
    """Log nothing."""


def make_workload(spec: ModelSpec, *, phase: Phase | None = None, dtype: str | None = None, **asked: Any) -> Workload:
    """A workload with what fits the model where nothing was asked: an encoder encodes; a decoder, and an encoder-decoder, generates where
    `new_tokens` are asked for, else prefills; AdamW trains; the type is that of the checkpoint; an image has its model's positions.

    Raises:
        WorkloadError: impossible, or more than the model's positions.
    """
    if phase is None:
        phase = ("generate" if asked.get("new_tokens") else "prefill") if spec.is_decoder or spec.is_encoder_decoder else "encode"
    if (positions := spec.fixed_len) is not None and asked.get("seq_len") is None:
        asked["seq_len"] = positions
    if asked.get("seq_len") is None and spec.max_positions is not None:
        asked["seq_len"] = max(1, min(DEFAULT_LEN, spec.max_positions - (asked.get("new_tokens") or 0)))
    if phase == "train":
        asked["optimizer"] = asked.get("optimizer") or "adamw"
    if phase in ("decode", "generate"):
        asked["new_tokens"] = asked.get("new_tokens") or (1 if phase == "decode" else 32)
    if asked.get("kv_dtype"):
        asked["kv_dtype"] = parse_dtype(asked["kv_dtype"])
    workload = Workload(phase=phase, dtype=parse_dtype(dtype) if dtype else spec.dtype, **asked)
    check_workload(spec, workload)
    return workload


def estimate(
    model: Any, *, recipe: str | None = None, device: str | None = None, method: Method = "auto", inputs: Any = None,
    trust_remote_code: bool = False, **options: Any,
) -> Estimate:  # fmt: skip
    """What a model costs: parameters, FLOPs, memory, and with `device` the time. No weight is loaded.

    Args:
        model: a folder in Hugging Face format, a config.json, a .safetensors, .gguf, .onnx or .keras file, a hub id, `pkg.module:factory`,
            or a live torch module or Keras model.
        recipe: a recipe's text or file, read on the model's spec; it needs the formula.
        device: `this`, the machine that `lighten probe` measured; or NAME[:COUNT] of `lighten devices`, or of a TOML file.
        method: formula; trace (the model is followed on tensors without memory, which needs torch); or auto: the formula where there is one.
        inputs: of a live module: an example of what its forward takes.
        trust_remote_code: run code that the model's folder brings.
        options: phase, batch_size, seq_len, new_tokens, dtype, kv_dtype, attention, optimizer, recompute, …: the fields of `Workload`. Of devices
            of published figures also those of `Plan` (dp, tp, pp, cp, ep, shard, …; what is not given follows from the count), price, network and
            devices_per_node (what is the user's own), and stack, tokens and concurrency (`Use`).

    Raises:
        LightenError: whatever of this cannot be read or does not fit together.
    """
    from lighten.recipe.estimate import estimate as estimate_spec
    from lighten.recipe.estimate import estimate_followed

    if method not in get_args(Method):
        raise WorkloadError(f"method {method!r} is not known; known: {', '.join(get_args(Method))}.")
    spread, own = ({name: options.pop(name) for name in names & options.keys()} for names in (PLAN_OPTIONS, PLACE_OPTIONS))
    use: dict[str, Any] = {name: own.pop(name) for name in ("stack", "tokens", "concurrency", "linear_dtype") if name in own}
    where, count = find_place(device, **own) if device is not None else (None, 1)
    if not isinstance(where, Device):
        _refuse_placeless({**spread, **own, **use})
    found = _opened(model, method, inputs, trust_remote_code=trust_remote_code)
    if not isinstance(found, ModelSpec):
        if recipe:
            raise RecipeError(f"a recipe is read on a formula's spec; {found.name} is followed ({found.architecture}), so it takes no recipe.")
        if isinstance(where, Device):
            raise DeviceError(f"{found.name} is followed ({found.architecture}); on {where.name} the time of a formula's model alone is known.")
        return estimate_followed(found, followed_workload(found, **options), device=where)
    said = read_recipe(recipe) if recipe else Recipe()
    asked = make_workload(found, dtype=options.pop("dtype", None) or usual_dtype(said, apply_recipe(said, found), where), **options)
    plan = default_plan(asked, count, spread) if isinstance(where, Device) else None
    return estimate_spec(found, asked, recipe=said, device=where, plan=plan, use=Use(**use) if use else None)


PLAN_OPTIONS = frozenset(field.name for field in fields(Plan))
PLACE_OPTIONS = frozenset({"price", "network", "devices_per_node", "stack", "tokens", "concurrency", "linear_dtype"})


def case_of(spec: ModelSpec, recipe: Recipe, device: str | None, **options: Any) -> tuple[Case, Target]:
    """A model with what is asked of it, and where it runs; its type is that of the weights after the recipe where none is given.

    Args:
        options: as `estimate` takes them, without tokens and concurrency.

    Raises:
        LightenError: what is asked does not fit together.
    """
    from lighten.recipe.case import Case

    spread, own = ({name: options.pop(name) for name in names & options.keys()} for names in (PLAN_OPTIONS, PLACE_OPTIONS))
    stack = own.pop("stack", None)
    words = {name: value for name, value in options.items() if value is not None}
    target, count = find_place(device, **own) if device is not None else (None, 1)
    workload = make_workload(spec, dtype=words.pop("dtype", None) or usual_dtype(recipe, apply_recipe(recipe, spec), target), **words)
    if isinstance(target, Device):
        return Case(spec=spec, workload=workload, recipe=recipe, plan=default_plan(workload, count, spread), stack=stack), target
    _refuse_placeless({**spread, **own, "stack": stack})
    return Case(spec=spec, workload=workload, recipe=recipe), target


def usual_dtype(recipe: Recipe, changed: ModelSpec, where: Profile | Device | None) -> str:
    """The type that is computed in where none is asked for: that of the weights, but on this machine what the recipe's runtime computes them in."""
    runs_here = where is not None and not isinstance(where, Device)
    if runs_here or recipe.steps or recipe.runtime != DEFAULT_RUNTIME or changed.dtype not in HALVES:
        return compute_dtype(recipe, changed)
    return recipe.dtype or changed.dtype


HALVES = ("float16", "bfloat16")


def open_spec(model: str | Path) -> ModelSpec:
    """The spec of a model that has a formula: a recipe is read on nothing else.

    Raises:
        UnsupportedFamily: it has none.
    """
    found = open_model(model, method="formula")
    if not isinstance(found, ModelSpec):
        raise UnsupportedFamily(f"{model}: levers are read on a formula's spec; this model has none.")
    return found


def advise(
    model: str | Path, *, device: str | None = None, recipe: str | None = None, goal: Goal | None = None, draft: str | Path | None = None,
    most_loss: float | None = None, **options: Any,
) -> Advice:  # fmt: skip
    """Every lever on a model, ranked by what it gains: the answer of `lighten advise`.

    Args:
        recipe: what the model becomes first.
        goal: fits, latency, throughput or cost; None: fits where it does not fit or there is no device, else latency.
        draft: a smaller model of the same vocabulary, for speculative decoding.
        most_loss: what levers that are put together may lose, as a factor of perplexity (default 1.1).
        options: as `estimate` takes them, without tokens and concurrency.

    Raises:
        LightenError: what is asked does not fit together.
    """
    from lighten.recipe.advise import MOST_LOSS
    from lighten.recipe.advise import advise as rank

    case, target = case_of(open_spec(model), read_recipe(recipe) if recipe else Recipe(), device, **options)
    name = device and re.sub(r":\d+$", "", device)
    limit = MOST_LOSS if most_loss is None else most_loss
    return rank(case, target, goal=goal, draft=open_spec(draft) if draft else None, most_loss=limit, device=name)


def plan(model: str | Path, *, device: str, top: int = 5, **options: Any) -> Found:
    """The best of all plans that spread a training step over devices: the answer of `lighten plan`.

    Args:
        device: NAME:COUNT.
        options: batch_size (of all devices) and seq_len, and others as `plan_request` takes them.

    Raises:
        LightenError: what is asked does not fit together, or no plan fits.
    """
    from lighten.parallel.search import search_plans

    return search_plans(plan_request(model, device=device, **options), top=top)


def plan_request(
    model: str | Path, *, device: str | None, goal: PlanGoal = "time", margin: float | None = None, recompute: Recompute | None = None,
    master_weights: bool | None = None, **options: Any,
) -> Asked:  # fmt: skip
    """What a search of plans starts from.

    Args:
        margin: share of a device's memory that stays free; None: a tenth.
        recompute: None: searched.
        master_weights: None: where weights are narrower than float32.
        options: as `estimate` takes them; the sizes of a plan that are given are kept.

    Raises:
        LightenError: what is asked does not fit together.
    """
    from lighten.parallel.search import MARGIN, Asked
    from lighten.parallel.step_time import SOFTWARES, Stack

    fixed, own = ({name: options.pop(name) for name in names & options.keys()} for names in (PLAN_OPTIONS, PLACE_OPTIONS))
    stack = own.pop("stack", None)
    phase = options.pop("phase", None) or "train"
    if phase != "train":
        raise WorkloadError(f"plans of phase {phase} are not searched; use phase train, or `lighten estimate --tp N --pp N` for serving.")
    if device is None:
        raise DeviceError("--device NAME:COUNT is needed, such as h100-sxm:64; `lighten devices` lists the names.")
    if device in THIS_MACHINE:
        raise DeviceError(f"--device {device} is one machine; plans are for devices of published figures, such as h100-sxm:64.")
    if stack is not None and stack not in SOFTWARES:
        raise WorkloadError(f"--stack {stack} runs inference; kinds of software that train: {', '.join(SOFTWARES)}.")
    where, count = find_place(device, **own)
    assert isinstance(where, Device)
    spec = open_spec(model)
    dtype = parse_dtype(options.pop("dtype", None) or spec.dtype)
    narrow = DTYPE_BITS[dtype] < DTYPE_BITS["float32"]
    if master_weights is False and not narrow:
        raise WorkloadError(f"--no-master-weights has no effect with {dtype}, which is no narrower than float32.")
    masters = narrow if master_weights is None else master_weights
    workload = make_workload(spec, phase="train", dtype=dtype, master_weights=masters, **options)
    if recompute is not None:
        fixed["recompute"] = recompute
    return Asked(
        spec=spec, workload=workload, device=where, count=count, fixed=fixed, goal=goal, margin=MARGIN if margin is None else margin,
        stack=Stack(software=stack) if stack else Stack(),
    )  # fmt: skip


def compare(
    models: Sequence[str | Path], *, devices: Sequence[str | None] = (None,), recipes: Sequence[str] = ("",), **options: Any
) -> tuple[Entry, ...]:  # fmt: skip
    """Each model with each recipe on each device: the answer of `lighten compare`.

    Args:
        recipes: texts or files; "" is the model as it is.
        options: as `estimate` takes them, without tokens and concurrency.

    Raises:
        LightenError: a model or recipe that cannot be read; what does not fit a device is said in its entry.
    """
    from lighten.recipe.compare import Choice
    from lighten.recipe.compare import compare as side_by_side

    said = [None if text.strip() in ("", "none") else read_recipe(text) for text in recipes]
    choices = [
        Choice(
            model=spec.name, recipe=None if recipe is None else str(recipe).removesuffix(f"@ {DEFAULT_RUNTIME}").strip(), device=device,
            make=partial(case_of, spec, recipe or Recipe(), device, **options),
        )
        for spec in map(open_spec, models) for recipe in said for device in devices
    ]  # fmt: skip
    return side_by_side(choices)


def _refuse_placeless(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise WorkloadError(f"{option}={value} has no effect without a --device of published figures; `lighten devices` lists them.")


def _opened(model: Any, method: Method, inputs: Any, *, trust_remote_code: bool) -> ModelSpec | Followed:
    """The spec of a model, or what follows it: by `method`, and where there is no formula."""
    if not isinstance(model, str | Path):
        if method == "formula":
            raise WorkloadError("method=formula reads a config; a live model is followed: method=trace or auto.")
        return open_live(model, inputs)
    if inputs is not None:
        raise WorkloadError("inputs have no effect: they go with a live module.")
    return open_model(model, method=method, trust_remote_code=trust_remote_code)


def followed_workload(found: Followed, *, phase: Phase | None = None, dtype: str | None = None, **asked: Any) -> Workload:
    """A workload of a followed model: its first phase and its own type where nothing is asked, its only length where it has but one.

    Raises:
        WorkloadError: impossible, or without effect.
    """
    if asked.get("new_tokens") and phase is None and "generate" in found.phases:
        phase = "generate"
    phase = phase or cast(Phase, found.phases[0])
    if phase not in found.phases:
        raise WorkloadError(f"{found.name}: phase {phase} does not fit {found.architecture}; its phases: {', '.join(found.phases)}.")
    if phase == "train":
        asked["optimizer"] = asked.get("optimizer") or "adamw"
    if phase in ("decode", "generate"):
        asked["new_tokens"] = asked.get("new_tokens") or (1 if phase == "decode" else 32)
    sizes = {"batch_size": getattr(found, "batch_size", 1), "seq_len": found.fixed_len or getattr(found, "seq_len", DEFAULT_LEN)}
    for name, own in sizes.items():
        asked[name] = asked.get(name) or own
    if found.fixed_len is not None and asked["seq_len"] != found.fixed_len:
        raise WorkloadError(f"seq_len={asked['seq_len']} has no effect: {found.name} has inputs of one size, {found.fixed_len} positions.")
    return Workload(phase=phase, dtype=parse_dtype(dtype) if dtype else found.dtype, **asked)


def summary(model: Any, inputs: Any = None, *, depth: int = 3) -> Summary:
    """Parameters, FLOPs and bytes of a live torch module or Keras model by submodule; `print` shows the table.

    Args:
        inputs: an example of what its forward takes: a tensor, positional arguments or keyword arguments.
        depth: levels of submodules that have a row of their own.

    Raises:
        TraceError: it fails on tensors without memory.
    """
    from lighten.trace.open import summarize_live

    return summarize_live(model, inputs, depth=depth)


def compress(  # noqa: PLR0913 - one keyword for each option of the command
    model: str | Path, recipe: str, out: str | Path, *, text: str | Path | None = None, memory: str | int | None = None, resume: bool = False,
    log: Log = silent,
) -> Artifact:  # fmt: skip
    """Carry a recipe out and write the artifact to `out`, with `lighten.json` beside it. What is finished lies beside `out` meanwhile and outlives
    a kill; `Artifact.made` says how long it took and how much memory.

    Args:
        text: to calibrate by, where a step of the recipe looks at text: .txt, .jsonl, .csv or .tsv; an .npz of arrays for models of images or sound.
        memory: the most that the process may hold, in bytes or as text such as "4GB".
        resume: go on with an unfinished run that was begun with the same.

    Raises:
        LightenError: whatever of this cannot be read or done.
    """
    from lighten.formats.artifact import Work, write_artifact
    from lighten.judge.arrays import Inputs, load_inputs, with_labels
    from lighten.judge.calibration import text_windows
    from lighten.judge.text import load_text
    from lighten.judge.worker import calibration_batches
    from lighten.recipe.targets import RUNTIMES
    from lighten.runtimes import require_runtime

    said, source = read_recipe(recipe), _folder(model)
    limit = round(parse_quantity(memory, SIZE_UNITS, "memory")) if isinstance(memory, str) else memory
    spec = read_for(source, exported=RUNTIMES[said.runtime].exported)
    apply_recipe(said, spec)
    require_runtime(said.runtime, running=False)
    calibrated = any(step.calibrated for step in said.steps)
    chosen = Path(text) if text else None
    arrays = chosen is not None and chosen.suffix == ".npz"
    read = (
        (load_inputs(chosen, spec) if chosen and arrays else load_text(chosen)) if chosen or calibrated else None
    )  # a mistake is said before any work
    if chosen and not calibrated:
        raise TextError(f"text {chosen} has no effect: no step of {said} looks at calibration text.")
    log(f"compressing {source}: {said}")
    windows = None
    if isinstance(read, Inputs):
        windows = with_labels(read, spec, said.labels, str(chosen)).windows()
    elif read is not None:
        windows = text_windows(source, spec, read, labels=said.labels, log=log)
    work = Work(windows=windows, text=read.fingerprint if read else "", memory_bytes=limit, resume=resume, log=log)
    return write_artifact(source, said, Path(out), calibration=lambda: calibration_batches(source, chosen), work=work)


def export(source: str | Path, target: str, out: str | Path, *, log: Log = silent) -> Exported:
    """Write a model or an artifact in another format, where nothing is lost by it; it is read back and compared before this returns.

    Args:
        source: a folder of safetensors, a .gguf file, or an artifact.
        target: safetensors, compressed-tensors, gguf, onnx or openvino.
        out: a new folder, or a new file for a name that ends in .gguf.

    Raises:
        LightenError: whatever of this cannot be read, written or kept without loss.
    """
    from lighten.formats.export import export as write

    log(f"exporting {source} to {target}")
    return write(source, target, out)


def measure(  # noqa: PLR0913 - one keyword for each option of the command
    model: str | Path,
    *,
    runtime: str | None = None,
    text: str | Path | None = None,
    task: str | Path | None = None,
    metrics: Sequence[str] = (),
    threads: int | None = None,
    own_lengths: bool = False,
    profile: bool = False,
    log: Log = silent,
    **workload: Any,
) -> dict[str, Any]:
    """Run a model or an artifact beside the original, and hold it against its prediction: the document of `lighten measure --json`.

    Args:
        runtime: as a recipe names it, options too; of an artifact its own, with other options than its recipe has.
        own_lengths: encode the text's passages, each as long as it is, instead of one batch of `seq_len` tokens each.
        profile: tell too what its operators take.
        task: a labelled file, whose metrics stand in `quality` beside the agreement with the original.
        metrics: of the task, or FILE.py:function, whose file is run; none: the usual one.

    Raises:
        LightenError: whatever of this cannot be read or run.
    """
    from lighten.choose.outcome import ratios
    from lighten.choose.run import task_of_options
    from lighten.choose.trial import Rates, predict, predict_operators
    from lighten.compress.walk import check_finite
    from lighten.formats.artifact import MANIFEST, folder_bytes, read_artifact
    from lighten.judge.child import WorkerFailed
    from lighten.judge.measure import Judge, Limits, artifact_target, model_bytes, recipe_target
    from lighten.judge.measure import own_lengths as lengthen
    from lighten.judge.text import load_text
    from lighten.recipe.options import check_effect
    from lighten.recipe.targets import require_head
    from lighten.runtimes import require_runtime
    from lighten.runtimes.profiling import require_profiler

    folder = _folder(model)
    made = read_artifact(folder) if (folder / MANIFEST).is_file() else None
    said = parse_recipe(f"@ {runtime or 'torch'}")
    own = made.recipe if made else said
    if runtime and (said.runtime != own.runtime or said.dtype not in (None, own.dtype) or said.device not in (None, own.device)):
        raise WorkloadError(f"{folder} is an artifact for runtime {own.runtime}; it does not run on {said.runtime_text}.")
    recipe = replace(own, options=said.options) if runtime else own
    require_runtime(recipe.runtime, device=recipe.device)
    original = made.original if made else folder
    if not original.is_dir():
        raise ModelError(f"{folder} was made from {original}, which is not there any more; quality is measured against it.")
    spec = read_runnable(original)
    apply_recipe(recipe, spec)
    chosen = Path(text) if text else None
    judged_by = load_text(chosen)
    answered = task_of_options(Path(task) if task else None, metrics, spec, original, chosen)
    if answered is not None and answered.way == "head":
        require_head(recipe.runtime, spec)
    for note in answered.notes if answered else ():
        log(f"{task}: {note}")
    asked = make_workload(spec, dtype="float32", **workload)
    if own_lengths:
        asked = lengthen(asked, original, judged_by)
    check_effect(dict(recipe.options), asked)
    if profile:
        require_profiler(recipe, asked)
    check_finite(original)
    machine = _profile_or_none()
    cores = threads or usable_cores()
    told = None
    with tempfile.TemporaryDirectory(prefix="lighten-") as work, contextlib.ExitStack() as stack:
        if made:
            target = recipe_target(folder, recipe, dtype=made.dtype, size_bytes=folder_bytes(folder))
        elif recipe.runtime in ("torch", "torch-compile"):
            target = recipe_target(folder, recipe, dtype=compute_dtype(recipe, spec), size_bytes=model_bytes(folder))
        else:
            log(f"writing an artifact for {recipe.runtime}")
            written = compress(folder, str(recipe), Path(work) / "artifact")
            target = artifact_target(written.folder)
        limits = Limits(threads=cores, memory_bytes=2**62, timeout_s=TIMEOUT_S)
        judge = Judge(original, spec, judged_by, asked, limits, Path(work), answered)
        stack.callback(judge.close)
        log(f"measuring {folder} by {recipe.runtime_text} beside the original")
        try:
            measured = judge.measure(target).as_json()
            if profile:
                log("once more, with the runtime's profiler")
                told = judge.profile(target)
        except WorkerFailed as error:
            raise WorkloadError(f"{folder} could not be measured: {error}") from error
    predicted = predict(spec, asked, recipe, machine, Rates(tokens=asked.tokens)) if machine else predict_without_device(spec, asked, recipe)
    operators = told and {
        "predicted": predict_operators(spec, asked, recipe, machine) if machine else None, "measured": told["kinds"], "measured_s": told["seconds"],
        "runs": told["runs"],
    }  # fmt: skip
    about = {"recipe": str(recipe), "task": answered.as_json() if answered else None}
    return measured | about | {"predicted": predicted, "ratio": ratios(predicted, measured), "profile": operators}


def with_own_lengths(workload: Workload, model: str | Path, text: str | Path | None = None) -> Workload:
    """A workload of encoding the texts that a model is judged by, each as long as it is, `seq_len` tokens at most.

    Raises:
        LightenError: the phase is another, or the model's tokenizer or the text cannot be read.
    """
    from lighten.judge.measure import own_lengths
    from lighten.judge.text import load_text

    return own_lengths(workload, _folder(model), load_text(Path(text) if text else None))


def choose(request: Request, *, log: Log = silent) -> dict[str, Any]:
    """Choose by experiment and write choice.json, artifact/ and report.html: the content of choice.json.

    Raises:
        LightenError: a mistake in the request.
    """
    from lighten.choose import choose as search
    from lighten.report import write_report

    choice = search(request, log=log)
    write_report(choice, request.out / "report.html")
    return choice


def probe(*, threads: int | None = None, engines: Sequence[str] | None = None, log: Log = silent) -> Profile:
    """Measure this machine and keep its profile in the user's data folder; engines that are not asked for keep what was known of them.

    Raises:
        DeviceError: an engine that does not exist.
        OutputError: the data folder cannot be written.
    """
    from lighten.device import merge_profiles, save_profile
    from lighten.device import probe as measure_machine
    from lighten.device.profile import require_profile_folder

    require_profile_folder()
    found = measure_machine(threads=threads or usable_cores(), log=log, engines=engines)
    known = _profile_or_none()
    if engines and known and known.threads == found.threads:
        found = merge_profiles(known, found)
    save_profile(found)
    return found


def predict_without_device(spec: ModelSpec, workload: Workload, recipe: Recipe) -> dict[str, Any]:
    """The predictions that need no measured machine: the size."""
    from lighten.choose.trial import Rates, derived, predicted_per_pass
    from lighten.recipe.predict import artifact_bytes

    unknown = dict.fromkeys(("peak_memory_bytes", "latency_s", "latency_low_s", "latency_high_s", "time_to_first_token_s"))
    known = {"size_bytes": artifact_bytes(recipe, apply_recipe(recipe, spec)), "tokens_per_pass": predicted_per_pass(recipe, workload)}
    return derived({**known, **unknown}, Rates(tokens=workload.tokens))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(folder: str | Path) -> Path:
    """Write report.html in a folder that `choose` or `compress` wrote, from what lies there; where the page is.

    Raises:
        ModelError: neither wrote there, or what they wrote cannot be read.
        OutputError: the folder cannot be written.
    """
    from lighten.formats.artifact import MANIFEST, PAGE
    from lighten.report import compression_page, write_page, write_report

    folder = Path(folder)
    path = folder / PAGE
    if (folder / "choice.json").exists() or not (folder / MANIFEST).exists():
        write_report(read_choice(folder), path)
    else:
        write_page(compression_page(*read_made(folder)), path)
    return path


def read_made(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`lighten.json` of a folder that `compress` wrote, and `run.json`; None where there is none, as older versions wrote none.

    Raises:
        ModelError: one of them is not readable.
    """
    from lighten.formats.artifact import MANIFEST, RUN

    manifest, run = _document(folder / MANIFEST), _document(folder / RUN) if (folder / RUN).exists() else None
    if "recipe" not in manifest or "size_bytes" not in manifest:
        raise ModelError(f"{folder / MANIFEST} is not what `lighten compress` writes.")
    return manifest, run


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent}: no readable {path.name} ({error}).") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not what `lighten compress` writes.")
    return found


def read_choice(folder: Path) -> dict[str, Any]:
    """`choice.json` of a folder that `choose` wrote.

    Raises:
        ModelError: none there, or not readable.
    """
    path = folder / "choice.json"
    if not path.exists():
        raise ModelError(f"{folder}: neither choice.json of `lighten choose` nor lighten.json of `lighten compress` is there.")
    try:
        choice = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no readable choice.json ({error}).") from error
    if not isinstance(choice, dict) or "candidates" not in choice:
        raise ModelError(f"{path} is not what `lighten choose` writes.")
    return choice


def _folder(model: str | Path) -> Path:
    path = Path(model)
    if not path.is_dir():
        raise ModelError(f"{model}: no such folder; this command needs the model's weights: download it into a folder first.")
    return path


def _profile_or_none() -> Profile | None:
    try:
        return find_device("this")
    except DeviceError:
        return None
