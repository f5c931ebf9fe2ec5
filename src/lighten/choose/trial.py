"""One trial: build the artifact in one process, run it in another, beside the original. Whatever happens there is one line here."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lighten import __version__
from lighten.choose.outcome import ratios
from lighten.cost import Workload
from lighten.device.profile import Profile
from lighten.errors import DeviceError, LightenError, OutputError, RecipeError
from lighten.judge.child import Child, WorkerFailed
from lighten.judge.latency import time_beside
from lighten.judge.measure import Judge, Target, artifact_target
from lighten.model import ModelSpec
from lighten.model.spec import Linear
from lighten.recipe import Recipe, apply_recipe
from lighten.recipe.estimate import Estimate, batch_passes, estimate
from lighten.recipe.on_machine import engine_name, operator_seconds
from lighten.recipe.predict import compute_dtype
from lighten.recipe.speculated import tokens_per_pass
from lighten.recipe.targets import RUNTIMES
from lighten.runtimes import missing_packages, package_versions
from lighten.runtimes.profiling import require_profiler

STAND_INS = {
    "torch-compile/float32": "torch/float32", "torch-compile/bfloat16": "torch/bfloat16", "ctranslate2/float32": "onnxruntime/float32",
    "ctranslate2/int8": "onnxruntime/int8", "torch/int8": "torch/float32",
}  # fmt: skip
"""Engines that nobody probed → those that their time is guessed by until a trial tells."""
GUESS = math.log(2.5)
"""Half width of such a guess's 90 % range, as a logarithm."""


def with_stand_ins(profile: Profile) -> Profile:
    """The profile with a guess for each engine that was not probed and has a stand-in."""
    guessed = {
        name: replace(
            profile.engines[other], name=name, calibration=replace(profile.engines[other].calibration, spread=GUESS), base_memory_bytes=None
        )
        for name, other in STAND_INS.items() if name not in profile.engines and other in profile.engines
    }  # fmt: skip
    failures = {name: reason for name, reason in profile.failures.items() if name not in guessed}
    return replace(profile, engines={**profile.engines, **guessed}, failures=failures)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What turns seconds into other figures.

    Attributes:
        tokens: of one run of the workload.
        power_w: what the machine draws; None: not known, and so is energy.
        usd_per_hour: what the machine costs; None: not known, and so is cost.
    """

    tokens: int
    power_w: float | None = None
    usd_per_hour: float | None = None


def derived(figures: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """A prediction or measurement with the figures that follow from its latency: throughput, energy at the given power, cost at the given price.

    >>> derived({"latency_s": 2.0}, Rates(tokens=100, power_w=30.0, usd_per_hour=0.36))["usd_per_million_tokens"]
    2.0
    """
    seconds = figures.get("latency_s")
    if seconds is None:
        return {**figures, "throughput": None, "energy_j": None, "usd_per_million_tokens": None}
    return {
        **figures, "throughput": rates.tokens / seconds, "energy_j": None if rates.power_w is None else rates.power_w * seconds,
        "usd_per_million_tokens": None if rates.usd_per_hour is None else rates.usd_per_hour / 3600 * seconds / rates.tokens * 1e6,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe, what it is predicted to give, and why it is not tried, where that is so already.

    Attributes:
        engine: the measured engine that its time is predicted by, how it rounds activations, and options that change what is computed when.
        kind: what its weights are stored in.
        weights: what it computes, whatever the runtime: the steps, with the runtime where that rounds activations in its own way.
        rounds: whether it does.
    """

    id: str
    recipe: Recipe
    predicted: dict[str, Any]
    rates: Rates
    context: str = ""
    engine: str = ""
    kind: str = ""
    weights: str = ""
    rounds: bool = False
    refused: str | None = None

    @property
    def proxy_id(self) -> str:
        """Of the proxy that stands for its weights on every runtime."""
        return f"proxy-{hashlib.sha256(f'{self.context} {self.weights}'.encode()).hexdigest()[:12]}"

    @property
    def profile_id(self) -> str:
        """Of what its operators take."""
        return f"profile-{self.id}"

    def record(self, *, status: str, failure: str | None = None, measured: dict[str, Any] | None = None, seconds: float = 0.0) -> dict[str, Any]:
        """The trial's line in `trials.jsonl` and its entry in `choice.json`."""
        return {
            "id": self.id, "recipe": self.recipe.steps_text, "runtime": self.recipe.runtime_text, "status": status, "failure": failure,
            "predicted": self.predicted, "measured": measured, "ratio": ratios(self.predicted, measured) if measured else None,
            "pareto": False, "meets": None, "seconds": round(seconds, 1),
        }  # fmt: skip


def make_candidate(spec: ModelSpec, workload: Workload, recipe: Recipe, profile: Profile, context: Mapping[str, Any], rates: Rates) -> Candidate:
    """A recipe with its predictions; `context` is what else a measurement depends on, beside the packages of the recipe's runtime."""
    said = json.dumps({"lighten": __version__, **context}, sort_keys=True)
    packages = json.dumps(package_versions(recipe.runtime), sort_keys=True)
    identity = hashlib.sha256(f"{said} {packages} {recipe}".encode()).hexdigest()[:12]
    try:
        recipe.require_done()
        changed = apply_recipe(recipe, spec)
        predicted = predict(spec, workload, recipe, profile, rates)
    except RecipeError as error:
        return Candidate(id=identity, recipe=recipe, predicted={}, rates=rates, refused=str(error))
    missing = missing_packages(recipe.runtime)
    refused = f"not installed: {', '.join(missing)}; pip install 'lighten[{RUNTIMES[recipe.runtime].extra}]'" if missing else None
    linears = [part.weight for part in changed.parts if isinstance(part, Linear)]
    rounding = next((weight.activations for weight in linears if weight.activations), None)
    return Candidate(
        id=identity, recipe=recipe, predicted=predicted, rates=rates, refused=refused, context=said,
        engine=" ".join(filter(None, [engine_name(recipe, changed), rounding, *(f"{name}={value}" for name, value in recipe.options)])),
        kind=" ".join(sorted({str(weight.bits or weight.dtype) for weight in linears})),
        weights=f"{recipe.steps_text} @ {recipe.runtime}" if rounding else recipe.steps_text, rounds=rounding is not None,
    )  # fmt: skip


def predict_operators(spec: ModelSpec, workload: Workload, recipe: Recipe, profile: Profile) -> dict[str, float] | None:
    """Seconds by kind of operator that the recipe would take; None where this machine's profile does not tell."""
    changed = apply_recipe(recipe, spec)
    asked = replace(workload, dtype=compute_dtype(recipe, changed))
    try:
        return operator_seconds(batch_passes(changed, asked, recipe.batching), changed, recipe, profile)
    except DeviceError:
        return None


def predict(spec: ModelSpec, workload: Workload, recipe: Recipe, profile: Profile, rates: Rates) -> dict[str, Any]:
    """Size, memory and time that the recipe would give; None where this machine's profile does not tell."""
    asked = replace(workload, dtype=compute_dtype(recipe, apply_recipe(recipe, spec)))
    first_s = None
    try:
        found: Estimate = estimate(spec, asked, recipe=recipe, device=profile)
        if workload.phase == "generate":  # the first of the new tokens comes from the prompt's pass
            plain = replace(recipe, options=())  # nothing is proposed before there is a token
            first = estimate(spec, replace(asked, new_tokens=1), recipe=plain, device=profile).time
            first_s = first.seconds if first else None
    except DeviceError:
        found = estimate(spec, asked, recipe=recipe)
    time_ = found.time
    return derived({
        "size_bytes": found.size_bytes, "peak_memory_bytes": found.process_bytes, "latency_s": time_.seconds if time_ else None,
        "latency_low_s": time_.low if time_ else None, "latency_high_s": time_.high if time_ else None, "time_to_first_token_s": first_s,
        "tokens_per_pass": predicted_per_pass(recipe, workload),
    }, rates)  # fmt: skip


def predicted_per_pass(recipe: Recipe, workload: Workload) -> float | None:
    """Tokens that a sequence gets from a pass of the model, where it speculates; None: it does not."""
    said = recipe.speculation
    return None if said is None else tokens_per_pass(said, workload.batch_size)[1]


class Bench:
    """Where trials are carried out.

    Args:
        work: for artifacts and exports.
        text: the file that children read; None: the embedded text.
    """

    def __init__(self, judge: Judge, work: Path, text: Path | None) -> None:
        self.judge, self.work, self.text = judge, work, text
        self._proxies: Child | None = None

    def close(self) -> None:
        """End the processes that outlive a trial."""
        self.judge.close()
        if self._proxies is not None:
            self._proxies.close()
            self._proxies = None

    def artifact_folder(self, candidate: Candidate) -> Path:
        return self.work / "artifacts" / candidate.id

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """Build and measure; a crash, a hang or an out-of-memory becomes the record's failure."""
        start = time.monotonic()
        try:
            found = self.judge.measure(self.build(candidate)).as_json()
        except OutputError:  # a full disk is no fault of this recipe's: the search ends, and goes on when there is room
            raise
        except (WorkerFailed, LightenError) as error:
            return candidate.record(status="failed", failure=str(error), seconds=time.monotonic() - start)
        return candidate.record(status="measured", measured=derived(found, candidate.rates), seconds=time.monotonic() - start)

    def original(self, candidate: Candidate) -> dict[str, Any]:
        """Measure the original itself."""
        start = time.monotonic()
        try:
            found = self.judge.measure_original().as_json() | {"speedup": 1.0}
        except WorkerFailed as error:
            return candidate.record(status="failed", failure=str(error), seconds=time.monotonic() - start)
        return candidate.record(status="measured", measured=derived(found, candidate.rates), seconds=time.monotonic() - start)

    def proxy(self, candidate: Candidate) -> dict[str, Any]:
        """The quality of a candidate's weights on a little calibration text, by torch in float32, whatever its runtime. What fails is not known."""
        start, quality = time.monotonic(), {}
        folder = self.work / f"proxy-{candidate.id}"
        try:
            if self._proxies is None or not self._proxies.alive:
                limits = self.judge.limits
                self._proxies = Child(runtime="torch", threads=limits.threads, memory_bytes=limits.memory_bytes)
            self._proxies.resume()
            self.write(Recipe(steps=candidate.recipe.steps, runtime="torch", dtype="float32"), folder, self._proxies)
            target = artifact_target(folder)
            self.judge.load(self._proxies, target)
            scores = self.judge.quality(self._proxies, target, self.judge.small)
            quality = {name: asdict(score) for name, score in scores.items()}
        except OutputError:
            raise
        except (WorkerFailed, LightenError):
            pass
        finally:
            if self._proxies is not None:
                self._proxies.pause()
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.monotonic() - start, 1)
        return {"id": candidate.proxy_id, "status": "proxy", "weights": candidate.weights, "quality": quality, "seconds": seconds}

    def final(self, candidate: Candidate, beside: Candidate) -> dict[str, Any]:
        """Seconds of a candidate over those of another, the two in turn."""
        targets = [self._target(one) for one in (beside, candidate)]
        with self.judge.child(targets[0]) as other, self.judge.child(targets[1]) as own:
            self.judge.load(other, targets[0])
            other.pause()
            self.judge.load(own, targets[1])
            own.pause()
            other.resume()
            ratio = time_beside(
                other, own, self.judge.workload, timeout_s=self.judge.limits.timeout_s, warm=False, prompts=self.judge.prompts(*targets)
            ).speedup
        return {"id": f"final-{candidate.id}-{beside.id}", "status": "final", "seconds_over": ratio}

    def profile(self, candidate: Candidate) -> dict[str, Any]:
        """What the operators of one run take; why not where nobody knows."""
        start = time.monotonic()
        record: dict[str, Any] = {"id": candidate.profile_id, "status": "profile", "failure": None, "operators": None}
        try:
            require_profiler(candidate.recipe, self.judge.workload)
            record["operators"] = self.judge.profile(self._target(candidate))
        except OutputError:
            raise
        except (WorkerFailed, LightenError) as error:
            record["failure"] = str(error)
        return record | {"seconds": round(time.monotonic() - start, 1)}

    def _target(self, candidate: Candidate) -> Target:
        return self.judge.original_target() if candidate.recipe == Recipe() else self.build(candidate)

    def build(self, candidate: Candidate) -> Target:
        """The artifact, built if it is not there.

        Raises:
            WorkerFailed, LightenError: it cannot be built.
        """
        folder = self.artifact_folder(candidate)
        if not folder.exists():
            self.write(candidate.recipe, folder)
        return artifact_target(folder)

    def write(self, recipe: Recipe, folder: Path, child: Child | None = None) -> None:
        """Build an artifact in a process of its own, or in that of `child`."""
        limits = self.judge.limits
        for left in folder.parent.glob(f".{folder.name}.*"):  # what a kill left behind
            shutil.rmtree(left, ignore_errors=True)
        if child is None:
            with Child(runtime=recipe.runtime, threads=limits.threads, memory_bytes=limits.memory_bytes) as own:
                self.write(recipe, folder, own)
            return
        child.ask(
            "build", timeout_s=limits.timeout_s, source=str(self.judge.original), recipe=str(recipe), folder=str(folder),
            text=str(self.text) if self.text else None, exports=str(self.work / "exports"),
        )  # fmt: skip


def context_of(workload: Workload, fingerprints: Mapping[str, str], threads: int) -> dict[str, Any]:
    """What a measurement depends on beside the recipe and its runtime."""
    return {"workload": asdict(workload), **fingerprints, "versions": package_versions("torch"), "threads": threads}
