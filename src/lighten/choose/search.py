"""Choose by experiment: predict every candidate, try those worth trying, and answer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lighten import __version__
from lighten.choose import outcome
from lighten.choose.beliefs import Z_90, Beliefs
from lighten.choose.constraints import FIGURES, Constraint, Objective, check_known, figure_of, parse_constraint, parse_objective
from lighten.choose.engine import Engine, Job, Local
from lighten.choose.journal import FILE, Journal
from lighten.choose.space import Space, default_space
from lighten.choose.trial import Bench, Candidate, Rates, context_of, make_candidate, with_stand_ins
from lighten.cost.workload import Workload, check_workload
from lighten.device import Profile, load_profile, merge_profiles, probe, profile_path, save_profile
from lighten.device.probe import installed_engines, this_machine
from lighten.device.profile import data_folder
from lighten.errors import ConstraintError, DeviceError, ModelError, OutputError, RecipeError
from lighten.formats.artifact import MANIFEST, fingerprint
from lighten.formats.deploy import write_card
from lighten.judge.child import WorkerFailed
from lighten.judge.latency import time_beside
from lighten.judge.measure import MOST_TEXTS, Judge, Limits, artifact_target
from lighten.judge.text import Text, load_text
from lighten.model import ModelSpec
from lighten.model.runnable import read_runnable
from lighten.recipe import Recipe, apply_recipe
from lighten.runtimes import package_versions, require_runtime
from lighten.units import format_seconds

EXPECTED_S = {"torch-compile": 120.0, "proxy": 10.0, "trial": 40.0, "final": 40.0}
"""What a job is taken to cost before one of its kind was seen; a compilation takes about a minute, and a trial two of them."""
GAIN = 0.02
"""A trial that is predicted to be better by less than this share at its best is not worth its time."""
CONTENDERS = 2
NEAR = 0.06
"""So many trials whose objective is within so much of the best run in turn with it before one is chosen."""
BELIEVED = 3.0
"""Standard deviations by which a prediction has to miss a limit before the trial is left out."""
TIMEOUT_S = 900.0
TIMED = ("latency", "time_to_first_token", "throughput", "energy", "cost", "speedup")
"""Objectives that two artifacts can be timed for in turn."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks `choose` for; see `lighten choose --help`. Without recipes and a space, the space of the model's family is searched."""

    model: Path
    out: Path
    workload: Workload
    require: tuple[str, ...] = ()
    minimize: str | None = None
    maximize: str | None = None
    budget_s: float | None = None
    text: Path | None = None
    recipes: tuple[Recipe, ...] = ()
    space: Space | None = None
    power_w: float | None = None
    usd_per_hour: float | None = None
    fresh: bool = False
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
    objective = parse_objective(request.minimize, request.maximize, decoder=spec.is_decoder)
    given = {name for name, value in (("power", request.power_w), ("price", request.usd_per_hour)) if value is not None}
    check_known([objective.figure, *(constraint.figure for constraint in constraints)], phase=request.workload.phase, given=given)
    if not request.model.is_dir():
        raise ModelError(f"{request.model}: choose needs the model's weights; download it into a folder first.")
    text = load_text(request.text)
    require_runtime("torch")
    with _locked(request.out):
        journal = Journal(request.out)
        profile = _profile(request.threads, log)
        return _Search(request, spec, constraints, objective, text, profile, journal, log, start).run()


class _Search:
    """One run of `choose`, from its checked request to its answer.

    What is carried out next is what is predicted to be best in the objective, of all that may still be better than what was measured. A candidate
    whose weights nobody has looked at gets a proxy of their quality first, where quality decides. Every measurement corrects the predictions of what
    runs alike. It ends when nothing left is predicted to be better, or the budget is used up.
    """

    def __init__(  # noqa: PLR0913 - what `choose` has checked, once each
        self,
        request: Request,
        spec: ModelSpec,
        constraints: tuple[Constraint, ...],
        objective: Objective,
        text: Text,
        profile: Profile,
        journal: Journal,
        log: Log,
        start: float,
    ) -> None:
        self.request, self.spec, self.constraints, self.objective, self.text = request, spec, constraints, objective, text
        self.profile, self.journal, self.log, self.start = with_stand_ins(profile), journal, log, start
        self.metric = outcome.quality_metric(decoder=spec.is_decoder)
        self.versions = package_versions()
        work = request.out / "work"
        limits = Limits(threads=request.threads, memory_bytes=request.memory_bytes or _most_memory(), timeout_s=TIMEOUT_S)
        self.bench = Bench(Judge(request.model, spec, text, request.workload, limits, work), work, request.text)
        self.engine: Engine = Local(self.bench)
        self.shared = Journal(data_folder(), shared=True)
        machine = {key: value for key, value in asdict(this_machine()).items() if key != "memory_bytes"}
        fingerprints = {"model": fingerprint(request.model), "text": text.fingerprint, "machine": json.dumps(machine)}
        self.context = context_of(request.workload, fingerprints, self.versions, request.threads)
        self.rates = Rates(tokens=request.workload.tokens, power_w=request.power_w, usd_per_hour=request.usd_per_hour)
        self.beliefs = Beliefs()
        self.seen_s: dict[str, list[float]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.judges_quality = not any(c.figure not in FIGURES for c in constraints)
        self.stopped = ""

    def run(self) -> dict[str, Any]:
        try:
            original = self._candidate(Recipe())
            baseline = self._carried_out(Job(kind="original", candidate=original), "the original, by torch in float32")
            if not baseline["measured"]:
                raise ModelError(f"{self.request.model}: the original itself could not be measured: {baseline['failure']}")
            self.baseline = baseline
            trials = self._search(original)
            finals = self._finals([baseline, *trials])
            return self._answer(trials, original, finals)
        finally:
            self.engine.close()

    def _candidate(self, recipe: Recipe) -> Candidate:
        return make_candidate(self.spec, self.request.workload, recipe, self.profile, self.context, self.rates)

    def _candidates(self) -> list[Candidate]:
        """What is searched, each once. Of a space those combinations that can be done; of recipes that were named all, and why not."""
        if self.request.recipes:
            return [self._candidate(recipe) for recipe in dict.fromkeys(self.request.recipes) if recipe != Recipe()]
        space = self.request.space or default_space(self.spec)
        found, refused = [], 0
        for recipe in dict.fromkeys(space):
            try:
                apply_recipe(recipe, self.spec)
            except RecipeError:
                refused += 1
                continue
            found.append(self._candidate(recipe))
        if not found:
            raise RecipeError(f"none of the space's {refused} combinations can be done with {self.spec.name}.")
        if refused:
            self.log(f"{refused} of the space's {refused + len(found)} combinations cannot be done with this model on their runtime")
        return [candidate for candidate in found if candidate.recipe != Recipe()]

    def _search(self, original: Candidate) -> list[dict[str, Any]]:
        """Every candidate's record: what was tried first, in the order of the trials."""
        self._learn(Job(kind="original", candidate=original), self.baseline)
        pool = {candidate.id: candidate for candidate in self._candidates()}
        for candidate in list(pool.values()):
            if found := self._known(candidate.proxy_id):
                self.beliefs.learn_quality(candidate.weights, found["quality"])
            if found := self._known(candidate.id):
                self.log(f"{candidate.recipe}: done before")
                self._learn(Job(kind="trial", candidate=pool.pop(candidate.id)), found)
        refused = [
            pool.pop(candidate.id).record(status="skipped", failure=candidate.refused) for candidate in list(pool.values()) if candidate.refused
        ]
        self.log(f"{len(pool)} recipes that can be tried, {len(self.records) - 1} tried before, {len(refused)} cannot run here")
        running: dict[str, Candidate] = {}
        while True:
            while self.engine.free and (job := self._next(pool, running)):
                self.log(f"[{self._progress(pool, running)}] {'proxy of ' if job.kind == 'proxy' else ''}{job.candidate.recipe}")
                running[job.candidate.id] = job.candidate
                self.engine.start(job)
            if not self.engine.running:
                break
            for job, record in self.engine.finished():
                del running[job.candidate.id]
                if job.kind == "trial":
                    del pool[job.candidate.id]
                self._keep(job, record)
        self.log(f"stopped: {self.stopped}")
        untried = [self.beliefs.corrected(candidate).record(status="skipped", failure=self._why_not(candidate)) for candidate in pool.values()]
        order = {identity: place for place, identity in enumerate(self.journal.trials)}
        tried = sorted((record for record in self.records.values() if record["id"] != original.id), key=lambda record: order[record["id"]])
        return tried + sorted(untried, key=lambda record: self.objective.cost(record["predicted"])) + refused

    def _next(self, pool: Mapping[str, Candidate], running: Mapping[str, Candidate]) -> Job | None:
        """What to carry out now: of all that may be better than what was measured, the best by prediction. None: nothing, `stopped` says why."""
        able = [candidate for candidate in pool.values() if candidate.id not in running and self._ruled_out(candidate) is None]
        if not able:
            self.stopped = "everything was tried" if not pool else "nothing that is left is predicted to be better than what was measured"
            return None
        best = min(able, key=lambda candidate: self.objective.cost(self.beliefs.corrected(candidate).predicted))
        weighs_quality = not self.request.recipes and (
            self.judges_quality or any(constraint.figure not in FIGURES for constraint in self.constraints)
        )
        looked = {candidate.weights for candidate in running.values()}
        wants_proxy = weighs_quality and not best.rounds and not self.beliefs.knows_quality(best) and best.weights not in looked
        job = Job(kind="proxy" if wants_proxy and best.proxy_id not in self.journal.trials else "trial", candidate=best)
        if self.request.budget_s is not None and time.monotonic() - self.start + self._expected_s(job) > self.request.budget_s:
            self.stopped = f"the budget of {format_seconds(self.request.budget_s)} is used up"
            return None
        return job

    def _ruled_out(self, candidate: Candidate) -> str | None:
        """Why a candidate is not worth a trial, as far as is known; None: it is."""
        for constraint in self.constraints:
            if reason := self._misses(candidate, constraint):
                return reason
        best = self._best()
        if best is None or self.request.recipes:  # whoever names recipes wants to know of each
            return None
        least = self._at_best(candidate)
        own = self.objective.cost(best["measured"])
        if least is None or least < own - GAIN * abs(own):
            return None
        if self.judges_quality and not self._is_dominated(candidate, least):
            return None
        value = figure_of(self.beliefs.corrected(candidate).predicted, self.objective.figure)
        return f"predicted {self.objective.figure} {outcome.say(self.objective.figure, value)}, no better than what was measured"

    def _best(self) -> dict[str, Any] | None:
        """Of what meets all requirements so far the best in the objective."""
        able = [record for record in self.records.values() if record["measured"] and outcome.meets(record, self.baseline, self.constraints)]
        return min(able, key=lambda record: self.objective.cost(record["measured"]), default=None)

    def _at_best(self, candidate: Candidate, deviations: float = Z_90) -> float | None:
        """The objective as a cost at the good end of what is believed; None: not known."""
        found = self.beliefs.ends(candidate, FIGURES[self.objective.figure].key, deviations) if self.objective.figure in FIGURES else None
        if found is None:
            quality = self.beliefs.at_best(candidate, self.objective.figure)
            return None if quality is None else quality if self.objective.lower else -quality
        return found[0] if self.objective.lower else -found[1]

    def _is_dominated(self, candidate: Candidate, least: float) -> bool:
        """Whether something was measured that is better in the objective, and in quality than the candidate can be."""
        quality = self.beliefs.at_best(candidate, self.metric)
        if quality is None:
            quality = 1.0  # of every metric the best that a candidate can hope for
        quality = quality if self.metric == "perplexity_ratio" else -quality
        points = [
            point for record in self.records.values() if record["measured"] and (point := outcome.point_of(record, self.objective, self.metric))
        ]
        return any(cost <= least and worse <= quality + GAIN for cost, worse in points)

    def _misses(self, candidate: Candidate, constraint: Constraint) -> str | None:
        """Why a prediction or a proxy rules a candidate out: it misses a limit by more than it may be wrong."""
        original = figure_of(self.baseline["measured"], constraint.figure)
        if constraint.figure not in FIGURES:
            return self.beliefs.misses(candidate, constraint, original)
        ends = self.beliefs.ends(candidate, FIGURES[constraint.figure].key, BELIEVED)
        if ends is None or constraint.allows(ends[0] if constraint.operator == "<=" else ends[1], original) is not False:
            return None
        value = figure_of(self.beliefs.corrected(candidate).predicted, constraint.figure)
        return f"predicted {constraint.figure} {outcome.say(constraint.figure, value)}, required {constraint.text}"

    def _why_not(self, candidate: Candidate) -> str:
        return self._ruled_out(candidate) or f"not tried: {self.stopped}"

    def _known(self, identity: str) -> dict[str, Any] | None:
        """What this folder's journal has of a trial or proxy; or what another run left, which is then this folder's too."""
        if found := self.journal.trials.get(identity):
            return found
        found = None if self.request.fresh else self.shared.trials.get(identity)
        if found is not None and found["status"] != "failed":
            self.journal.append(found)
            return found
        return None

    def _carried_out(self, job: Job, said: str) -> dict[str, Any]:
        """The record of a job: from the journal where it is there, else by carrying it out now."""
        if found := self._known(job.candidate.id):
            self.log(f"{said}: done before")
            return found
        self.log(said)
        self.engine.start(job)
        [(_, record)] = self.engine.finished()
        if record["measured"]:  # without the original there is no trial at all: the next run measures it again
            self._append(record)
        self.log(f"    {_summary(record, self.metric)}")
        return record

    def _keep(self, job: Job, record: dict[str, Any]) -> None:
        """Write a finished job down, and learn from it."""
        if job.kind == "proxy":
            self._append(record)
            self.seen_s.setdefault("proxy", []).append(record["seconds"])
            self.beliefs.learn_quality(job.candidate.weights, record["quality"])
            score = figure_of(record, self.metric)
            self.log(f"    {self.metric} {outcome.say(self.metric, score)} by proxy")
            return
        corrected = self.beliefs.corrected(job.candidate)
        record |= {"predicted": corrected.predicted, "ratio": outcome.ratios(corrected.predicted, record["measured"]) if record["measured"] else None}
        self._append(record)
        self._learn(job, record)
        self.log(f"    {_summary(record, self.metric)}")

    def _append(self, record: dict[str, Any]) -> None:
        self.journal.append(record)
        if record["status"] != "failed":
            self.shared.append(record)

    def _learn(self, job: Job, record: dict[str, Any]) -> None:
        self.records[record["id"]] = record
        if record["measured"]:
            self.beliefs.learn(job.candidate, record["measured"])
            self.seen_s.setdefault(_kind_of(job), []).append(record["seconds"])

    def _expected_s(self, job: Job) -> float:
        """How long a job will take: as those of its kind did, else a stated guess."""
        kind = _kind_of(job)
        seen = self.seen_s.get(kind)
        return statistics.median(seen) if seen else EXPECTED_S[kind]

    def _progress(self, pool: Mapping[str, Candidate], running: Mapping[str, Candidate]) -> str:
        """Tried, running, left, and for how long."""
        left = [candidate for candidate in pool.values() if candidate.id not in running and self._ruled_out(candidate) is None]
        seconds = sum(self._expected_s(Job(kind="trial", candidate=candidate)) for candidate in left)
        if self.request.budget_s is not None:
            seconds = min(seconds, self.request.budget_s - (time.monotonic() - self.start))
        measured = [record for record in self.records.values() if record["measured"]]
        front = sum(outcome.on_front(record, measured, self.objective, self.metric) for record in measured)
        counts = f"{len(self.records) - 1} tried, {len(running) + 1} running, {len(left) - 1} left, {front} on the front"
        return f"{counts}, at most {format_seconds(max(seconds, 0.0))}"

    def _finals(self, trials: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Id → seconds over those of the best trial, of those so near to it that their trials do not tell which is better; measured in turn now."""
        judged = outcome.judge_trials(outcome.on_one_clock(trials), trials[0], self.constraints, self.objective, self.metric)
        able = sorted((trial for trial in judged if trial["meets"]), key=lambda trial: self.objective.cost(trial["measured"]))
        if self.objective.figure not in TIMED or len(able) < 2:
            return {}
        first, found = able[0], {}
        least = self.objective.cost(first["measured"])
        for other in able[1 : 1 + CONTENDERS]:
            if self.objective.cost(other["measured"]) > least + NEAR * abs(least):
                break
            identity = f"final-{other['id']}-{first['id']}"
            if (known := self.journal.trials.get(identity)) is None:
                if self.request.budget_s is not None and time.monotonic() - self.start + EXPECTED_S["final"] > self.request.budget_s:
                    break
                self.log(f"in turn: {first['recipe']} @ {first['runtime']} and {other['recipe']} @ {other['runtime']}")
                known = {"id": identity, "status": "final", "seconds_over": self._in_turn(first, other)}
                self.journal.append(known)
                self.log(f"    the second takes {known['seconds_over']:.3f} of the first's time")
            found[other["id"]] = float(known["seconds_over"])
        return found

    def _in_turn(self, first: dict[str, Any], other: dict[str, Any]) -> float:
        """Seconds of one trial's artifact over those of another, in turn."""
        judge = self.bench.judge
        targets = [
            judge.original_target() if record["id"] == self.baseline["id"] else artifact_target(self._built(record)) for record in (first, other)
        ]
        with judge.child(targets[0]) as best, judge.child(targets[1]) as beside:
            judge.load(best, targets[0])
            best.pause()
            judge.load(beside, targets[1])
            beside.pause()
            best.resume()
            speedup = time_beside(best, beside, self.request.workload, timeout_s=TIMEOUT_S, warm=False).speedup
        assert speedup is not None, "the other ran beside it"
        return speedup

    def _answer(self, trials: list[dict[str, Any]], original: Candidate, finals: Mapping[str, float]) -> dict[str, Any]:
        request, objective = self.request, self.objective
        timed = outcome.on_one_clock([self.baseline, *trials])
        judged = outcome.judge_trials(timed, timed[0], self.constraints, objective, self.metric)
        baseline, trials = judged[0], judged[1:]
        chosen = outcome.choose_best(judged, objective, self.metric, finals)
        self._keep_artifact(chosen)
        choice = {
            "lighten": __version__, "command": request.command,
            "model": {
                "name": self.spec.name, "family": self.spec.family, "source": str(request.model), "dtype": self.spec.dtype,
                "parameters": self.spec.total_parameters,
            },
            "workload": asdict(request.workload), "require": list(request.require), "objective": objective.figure, "goal": objective.verb,
            "quality_metric": self.metric,
            "machine": asdict(this_machine()) | {"threads": request.threads}, "versions": _python() | self.versions,
            "text": {
                "source": self.text.source, "calibration_texts": len(self.text.calibration), "test_texts": min(len(self.text.test), MOST_TEXTS),
            },
            "seconds": round(time.monotonic() - self.start, 1), "baseline": baseline, "candidates": trials,
            "chosen": chosen["id"] if chosen else None, "stopped": self.stopped, "finals": dict(finals),
            "closest": None if chosen else outcome.closest(judged, baseline, self.constraints),
            "looser": outcome.looser(judged, chosen, objective, self.metric), "warnings": outcome.warnings(chosen, baseline),
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
        recipe = parse_recipe(manifest["recipe"])
        measured = chosen | {"original": self.baseline["measured"], "workload": asdict(self.request.workload)}
        write_card(held, recipe, apply_recipe(recipe, self.spec), self.request.model, manifest, measured)
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


def parse_power(text: str) -> float:
    """Watts of a power such as 65W.

    Raises:
        ConstraintError: no power, or none that is positive.

    >>> parse_power("65W")
    65.0
    """
    from lighten.units import parse_quantity

    watts = parse_quantity(text, {"W": 1.0, "kW": 1e3}, "power")
    if watts <= 0:
        raise ConstraintError(f"power {text!r} is not positive.")
    return watts


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


def _kind_of(job: Job) -> str:
    if job.kind == "proxy":
        return "proxy"
    return "torch-compile" if job.candidate.recipe.runtime == "torch-compile" else "trial"


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
