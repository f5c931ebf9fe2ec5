"""Choose by experiment: predict every candidate, try those worth trying, and answer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lighten import __version__
from lighten.choose import outcome
from lighten.choose.candidates import default_recipes
from lighten.choose.constraints import FIGURES, Constraint, check_minimize, figure_of, parse_constraint
from lighten.choose.journal import FILE, Journal
from lighten.choose.trial import Bench, Candidate, context_of, make_candidate
from lighten.cost.workload import Workload, check_workload
from lighten.device import Profile, load_profile, merge_profiles, probe, profile_path, save_profile
from lighten.device.probe import installed_engines, this_machine
from lighten.errors import ConstraintError, DeviceError, ModelError, OutputError
from lighten.formats.artifact import MANIFEST, fingerprint
from lighten.judge.child import WorkerFailed
from lighten.judge.measure import MOST_TEXTS, Judge, Limits
from lighten.judge.text import Text, load_text
from lighten.model import ModelSpec
from lighten.model.runnable import read_runnable
from lighten.recipe import Recipe
from lighten.runtimes import package_versions, require_runtime
from lighten.units import format_seconds

MARGINS = {"size": 1.1, "memory": 2.0, "latency": 2.0}
"""A prediction worse than the limit by more than this factor is believed: the trial is skipped. Sizes are predicted within a few per cent;
memory and latency are not."""
COMPILE_S = 120.0
"""What a torch.compile trial is taken to cost before one was seen: two compilations of about a minute."""
TRIAL_S = 40.0
"""What any other trial is taken to cost before one was seen."""
TIMEOUT_S = 900.0
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks `choose` for; see `lighten choose --help`."""

    model: Path
    out: Path
    workload: Workload
    require: tuple[str, ...] = ()
    minimize: str = "latency"
    budget_s: float | None = None
    text: Path | None = None
    recipes: tuple[Recipe, ...] = ()
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory_bytes: int | None = None
    command: str = "lighten choose"


def choose(request: Request, *, log: Log) -> dict[str, Any]:
    """Try recipes on a model and answer: the content of `choice.json`, which is written with `artifact/` into the output folder.

    Every finished trial is a line of `trials.jsonl` at once; run again after a kill, it goes on where it was.

    Raises:
        LightenError: a mistake in the request.
    """
    start = time.monotonic()
    spec = read_runnable(request.model)
    check_workload(spec, request.workload)
    constraints = tuple(parse_constraint(text, decoder=spec.is_decoder) for text in request.require)
    check_minimize(request.minimize)
    if not request.model.is_dir():
        raise ModelError(f"{request.model}: choose needs the model's weights; download it into a folder first.")
    text = load_text(request.text)
    require_runtime("torch")
    with _locked(request.out):
        journal = Journal(request.out)
        profile = _profile(request.threads, log)
        return _Search(request, spec, constraints, text, profile, journal, log, start).run()


class _Search:
    """One run of `choose`, from its checked request to its answer."""

    def __init__(  # noqa: PLR0913 - what `choose` has checked, once each
        self,
        request: Request,
        spec: ModelSpec,
        constraints: tuple[Constraint, ...],
        text: Text,
        profile: Profile,
        journal: Journal,
        log: Log,
        start: float,
    ) -> None:
        self.request, self.spec, self.constraints, self.text = request, spec, constraints, text
        self.profile, self.journal, self.log, self.start = profile, journal, log, start
        self.metric = outcome.quality_metric(decoder=spec.is_decoder)
        self.versions = package_versions()
        work = request.out / "work"
        limits = Limits(threads=request.threads, memory_bytes=request.memory_bytes or _most_memory(), timeout_s=TIMEOUT_S)
        self.bench = Bench(judge=Judge(request.model, spec, text, request.workload, limits, work), work=work, text=request.text)
        fingerprints = {"model": fingerprint(request.model), "text": text.fingerprint}
        self.context = context_of(request.workload, fingerprints, self.versions, request.threads)

    def run(self) -> dict[str, Any]:
        try:
            original = self._candidate(Recipe())
            baseline = self._trial(original, "the original, by torch in float32")
            if not baseline["measured"]:
                raise ModelError(f"{self.request.model}: the original itself could not be measured: {baseline['failure']}")
            trials = self._trials(baseline)
            return self._answer(baseline, trials, original)
        finally:
            self.bench.judge.close()

    def _candidate(self, recipe: Recipe) -> Candidate:
        return make_candidate(self.spec, self.request.workload, recipe, self.profile, self.context)

    def _trials(self, baseline: dict[str, Any]) -> list[dict[str, Any]]:
        """Every candidate's record, in the order of their predictions, the least of the minimized figure first."""
        recipes = self.request.recipes or default_recipes(self.spec)
        candidates = [self._candidate(recipe) for recipe in dict.fromkeys(recipes) if recipe != Recipe()]
        candidates.sort(key=lambda candidate: _order(candidate, self.request.minimize))
        skipped, todo = [], []
        for candidate in candidates:
            reason = candidate.refused or self._hopeless(candidate, baseline)
            if reason and candidate.id not in self.journal.trials:
                skipped.append(candidate.record(status="skipped", failure=reason))
            else:
                todo.append(candidate)
        left_s = format_seconds(sum(self._expected_s(c, []) for c in todo if c.id not in self.journal.trials))
        self.log(f"{len(todo)} recipes to try, {len(skipped)} skipped by prediction or for want of a runtime; about {left_s}")
        done: list[dict[str, Any]] = []
        for number, candidate in enumerate(todo, start=1):
            left = sum(self._expected_s(c, done) for c in todo[number - 1 :] if c.id not in self.journal.trials)
            if self._over_budget(candidate, done):
                done.append(
                    candidate.record(status="skipped", failure=f"not tried: the budget of {format_seconds(self.request.budget_s)} is used up")
                )
                continue
            said = f"[{number}/{len(todo)}, about {format_seconds(left)} left] {candidate.recipe}"
            done.append(self._trial(candidate, said))
        return done + skipped

    def _trial(self, candidate: Candidate, said: str) -> dict[str, Any]:
        """The record of a candidate: from the journal where it is there, else by carrying it out."""
        if found := self.journal.trials.get(candidate.id):
            self.log(f"{said}: done before")
            return found | {"predicted": candidate.predicted, "ratio": _ratio(candidate, found)}
        self.log(said)
        original = candidate.recipe == Recipe()
        record = self._original_trial(candidate) if original else self.bench.run(candidate)
        if record["measured"] or not original:  # without the original there is no trial at all: the next run measures it again
            self.journal.append(record)
        self.log(f"    {_summary(record, self.metric)}")
        return record

    def _original_trial(self, candidate: Candidate) -> dict[str, Any]:
        start = time.monotonic()
        try:
            measured = self.bench.judge.measure_original().as_json()
        except WorkerFailed as error:
            return candidate.record(status="failed", failure=str(error), seconds=time.monotonic() - start)
        return candidate.record(status="measured", measured=measured | {"speedup": 1.0}, seconds=time.monotonic() - start)

    def _hopeless(self, candidate: Candidate, baseline: dict[str, Any]) -> str | None:
        """Why a prediction rules a candidate out: it misses a limit by more than the prediction may be wrong."""
        for constraint in self.constraints:
            value = figure_of(candidate.predicted, constraint.figure) if constraint.figure in FIGURES else None
            if value is None:
                continue
            original = figure_of(baseline["measured"], constraint.figure)
            if constraint.allows(value / MARGINS[constraint.figure], original) is False:
                return f"predicted {constraint.figure} {outcome.say(constraint.figure, value)}, required {constraint.text}"
        return None

    def _over_budget(self, candidate: Candidate, done: Sequence[dict[str, Any]]) -> bool:
        if self.request.budget_s is None or candidate.id in self.journal.trials:
            return False
        return time.monotonic() - self.start + self._expected_s(candidate, done) > self.request.budget_s

    def _expected_s(self, candidate: Candidate, done: Sequence[dict[str, Any]]) -> float:
        """How long a trial will take: as those of its kind did, else a stated guess."""
        compiled = candidate.recipe.runtime == "torch-compile"
        seen = [t["seconds"] for t in done if t["status"] == "measured" and t["runtime"].startswith("torch-compile") == compiled]
        return statistics.median(seen) if seen else COMPILE_S if compiled else TRIAL_S

    def _answer(self, baseline: dict[str, Any], trials: list[dict[str, Any]], original: Candidate) -> dict[str, Any]:
        request = self.request
        timed = outcome.on_one_clock([baseline, *trials])
        judged = outcome.judge_trials(timed, timed[0], self.constraints, request.minimize, self.metric)
        baseline, trials = judged[0], judged[1:]
        chosen = outcome.choose_best(judged, request.minimize)
        self._keep_artifact(chosen)
        choice = {
            "lighten": __version__, "command": request.command,
            "model": {
                "name": self.spec.name, "family": self.spec.family, "source": str(request.model), "dtype": self.spec.dtype,
                "parameters": self.spec.total_parameters,
            },
            "workload": asdict(request.workload), "require": list(request.require), "minimize": request.minimize, "quality_metric": self.metric,
            "machine": asdict(this_machine()) | {"threads": request.threads}, "versions": _python() | self.versions,
            "text": {
                "source": self.text.source, "calibration_texts": len(self.text.calibration), "test_texts": min(len(self.text.test), MOST_TEXTS),
            },
            "seconds": round(time.monotonic() - self.start, 1), "baseline": baseline, "candidates": trials,
            "chosen": chosen["id"] if chosen else None,
            "closest": None if chosen else outcome.closest(judged, baseline, self.constraints),
            "looser": outcome.looser(judged, chosen, request.minimize, self.metric), "warnings": outcome.warnings(chosen, baseline),
            "accuracy": outcome.accuracy(judged),
        }  # fmt: skip
        write_beside(request.out / "choice.json", json.dumps(choice, indent=1) + "\n")
        shutil.rmtree(self.bench.work, ignore_errors=True)
        return choice

    def _keep_artifact(self, chosen: dict[str, Any] | None) -> None:
        """Put the chosen artifact into its place, built again where a finished run removed it; where nothing is chosen, none stays there."""
        place, gone = self.request.out / "artifact", self.bench.work / "replaced"
        if chosen and _trial_of(place) == chosen["id"]:
            return
        held = self._built(chosen) if chosen else None
        shutil.rmtree(gone, ignore_errors=True)
        if place.exists():
            self.bench.work.mkdir(exist_ok=True)
            os.replace(place, gone)  # at once, where a removal may be cut off
        if held:
            os.replace(held, place)

    def _built(self, chosen: dict[str, Any]) -> Path:
        """The folder of a trial's artifact, its manifest naming the trial.

        Raises:
            OutputError: it had to be built again, and that failed.
        """
        from lighten.recipe import parse_recipe

        held: Path = self.bench.work / "artifacts" / chosen["id"]
        if not held.exists():
            self.log("writing the chosen artifact")
            try:
                self.bench.write(parse_recipe(f"{chosen['recipe']} @ {chosen['runtime']}"), held)
            except WorkerFailed as error:
                raise OutputError(f"{self.request.out / 'artifact'} could not be written: {error}.") from error
        manifest = json.loads((held / MANIFEST).read_text())
        write_beside(held / MANIFEST, json.dumps(manifest | {"trial": chosen["id"]}, indent=1) + "\n")
        return held


def _trial_of(artifact: Path) -> str | None:
    """The id of the trial whose artifact lies in a folder; None where none does."""
    try:
        manifest = json.loads((artifact / MANIFEST).read_text())
        return str(manifest["trial"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_beside(path: Path, content: str) -> None:
    """Write a file beside its place, then rename it: whoever reads sees the old or the new one, whole.

    Raises:
        OutputError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def parse_budget(text: str) -> float:
    """Seconds of a budget such as 20min.

    Raises:
        ConstraintError: no duration, or none that is positive.
    """
    from lighten.units import TIME_UNITS, parse_quantity

    seconds = parse_quantity(text, TIME_UNITS, "budget")
    if seconds <= 0:
        raise ConstraintError(f"budget {text!r} is not positive.")
    return seconds


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The output folder, held by this process alone.

    Raises:
        OutputError: it cannot be written, is another's, or another run holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / FILE).exists() and not (out / ".lock").exists():
            raise OutputError(f"{out} is not empty and holds no earlier run of choose; name a new folder.")
        handle = os.open(out / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{out} is in use by another run of choose.") from error
        yield
    finally:
        os.close(handle)


def _profile(threads: int, log: Log) -> Profile:
    """This machine's profile; measured where there is none of as many threads, or none of a runtime that is installed."""
    try:
        known = load_profile()
    except DeviceError:
        if profile_path().exists():
            raise
        known = None
    if known is not None and known.threads != threads:
        known = None
    missing = [name for name in installed_engines() if known is None or name not in {**known.engines, **known.failures}]
    if known is not None and not missing:
        return known
    log("measuring this machine once, so that predictions are of it (lighten probe)")
    found = probe(threads=threads, log=lambda line: log(f"    {line}"), engines=missing)
    profile = found if known is None else merge_profiles(known, found)
    save_profile(profile)
    return profile


def _order(candidate: Candidate, minimize: str) -> float:
    value = figure_of(candidate.predicted, minimize)
    return float("inf") if value is None else value


def _ratio(candidate: Candidate, found: dict[str, Any]) -> dict[str, Any] | None:
    return outcome.ratios(candidate.predicted, found["measured"]) if found["measured"] else None


def _summary(record: dict[str, Any], metric: str) -> str:
    measured = record["measured"]
    if not measured:
        return f"failed: {record['failure']}"
    quality = figure_of(measured, metric)
    return (
        f"{outcome.say('size', measured['size_bytes'])}, {outcome.say('latency', measured['latency_s'])} "
        f"({measured['speedup']:.2f}x as fast), {metric} {outcome.say(metric, quality)}"
    )


def _most_memory() -> int:
    """Nine tenths of this machine's memory."""
    held = this_machine().memory_bytes
    return int(0.9 * held) if held else 2**62


def _python() -> dict[str, str]:
    import platform

    return {"python": platform.python_version()}
