"""One trial: build the artifact in one process, run it in another, beside the original. Whatever happens there is one line here."""

from __future__ import annotations

import hashlib
import json
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
from lighten.judge.measure import Judge, Target, artifact_target
from lighten.model import ModelSpec
from lighten.recipe import Recipe, apply_recipe
from lighten.recipe.estimate import Estimate, estimate
from lighten.recipe.predict import compute_dtype
from lighten.recipe.targets import RUNTIMES
from lighten.runtimes import missing_packages


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe, what it is predicted to give, and why it is not tried, where that is so already."""

    id: str
    recipe: Recipe
    predicted: dict[str, Any]
    refused: str | None = None

    def record(self, *, status: str, failure: str | None = None, measured: dict[str, Any] | None = None, seconds: float = 0.0) -> dict[str, Any]:
        """The trial's line in `trials.jsonl` and its entry in `choice.json`."""
        return {
            "id": self.id, "recipe": self.recipe.steps_text, "runtime": self.recipe.runtime_text, "status": status, "failure": failure,
            "predicted": self.predicted, "measured": measured, "ratio": ratios(self.predicted, measured) if measured else None,
            "pareto": False, "meets": None, "seconds": round(seconds, 1),
        }  # fmt: skip


def make_candidate(spec: ModelSpec, workload: Workload, recipe: Recipe, profile: Profile, context: Mapping[str, Any]) -> Candidate:
    """A recipe with its predictions; `context` is all else that a measurement depends on."""
    key = json.dumps({"recipe": str(recipe), "lighten": __version__, **context}, sort_keys=True)
    identity = hashlib.sha256(key.encode()).hexdigest()[:12]
    try:
        recipe.require_done()
        predicted = predict(spec, workload, recipe, profile)
    except RecipeError as error:
        return Candidate(id=identity, recipe=recipe, predicted={}, refused=str(error))
    missing = missing_packages(recipe.runtime)
    refused = f"not installed: {', '.join(missing)}; pip install 'lighten[{RUNTIMES[recipe.runtime].extra}]'" if missing else None
    return Candidate(id=identity, recipe=recipe, predicted=predicted, refused=refused)


def predict(spec: ModelSpec, workload: Workload, recipe: Recipe, profile: Profile) -> dict[str, Any]:
    """Size, memory and time that the recipe would give; None where this machine's profile does not tell."""
    asked = replace(workload, dtype=compute_dtype(recipe, apply_recipe(recipe, spec)))
    try:
        found: Estimate = estimate(spec, asked, recipe=recipe, device=profile)
    except DeviceError:
        found = estimate(spec, asked, recipe=recipe)
    time_ = found.time
    return {
        "size_bytes": found.size_bytes, "peak_memory_bytes": found.process_bytes, "latency_s": time_.seconds if time_ else None,
        "latency_low_s": time_.low if time_ else None, "latency_high_s": time_.high if time_ else None,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where trials are carried out: the judge, the folder for artifacts and exports, and the text that children read."""

    judge: Judge
    work: Path
    text: Path | None

    def artifact_folder(self, candidate: Candidate) -> Path:
        return self.work / "artifacts" / candidate.id

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """Build and measure; a crash, a hang or an out-of-memory becomes the record's failure."""
        start = time.monotonic()
        try:
            measured = self.judge.measure(self.build(candidate)).as_json()
        except OutputError:  # a full disk is no fault of this recipe's: the search ends, and goes on when there is room
            raise
        except (WorkerFailed, LightenError) as error:
            return candidate.record(status="failed", failure=str(error), seconds=time.monotonic() - start)
        return candidate.record(status="measured", measured=measured, seconds=time.monotonic() - start)

    def build(self, candidate: Candidate) -> Target:
        """The artifact, built if it is not there.

        Raises:
            WorkerFailed, LightenError: it cannot be built.
        """
        folder = self.artifact_folder(candidate)
        if not folder.exists():
            self.write(candidate.recipe, folder)
        return artifact_target(folder)

    def write(self, recipe: Recipe, folder: Path) -> None:
        """Build an artifact in a process of its own."""
        limits = self.judge.limits
        for left in folder.parent.glob(f".{folder.name}.*"):  # what a kill left behind
            shutil.rmtree(left, ignore_errors=True)
        with Child(runtime=recipe.runtime, threads=limits.threads, memory_bytes=limits.memory_bytes) as child:
            child.ask(
                "build", timeout_s=limits.timeout_s, source=str(self.judge.original), recipe=str(recipe), folder=str(folder),
                text=str(self.text) if self.text else None, exports=str(self.work / "exports"),
            )  # fmt: skip


def context_of(workload: Workload, fingerprints: Mapping[str, str], versions: Mapping[str, str], threads: int) -> dict[str, Any]:
    """What a measurement depends on beside the recipe."""
    return {"workload": asdict(workload), **fingerprints, "versions": dict(versions), "threads": threads}
