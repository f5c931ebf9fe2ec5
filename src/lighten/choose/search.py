"""Search: always carry out what is believed to be the best of what may still win."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lighten.choose import explain, outcome
from lighten.choose.ablation import better_without
from lighten.choose.beliefs import Z_90, Beliefs, is_coarser
from lighten.choose.constraints import DECODER_QUALITY, ENCODER_QUALITY, FIGURES, Constraint, figure_of
from lighten.choose.engine import Engine, Job
from lighten.choose.journal import Journal
from lighten.choose.request import Asked
from lighten.choose.sampler import DRAWN, LISTED, bits_left, draw
from lighten.choose.space import Space, default_space
from lighten.choose.trial import Candidate, context_of, derived, make_candidate, with_stand_ins
from lighten.device import Profile
from lighten.device.profile import Machine, data_folder
from lighten.errors import ModelError, RecipeError
from lighten.formats.artifact import fingerprint
from lighten.recipe import Recipe, apply_recipe
from lighten.recipe.targets import require_head
from lighten.runtimes import package_versions
from lighten.units import format_seconds

EXPECTED_S = {"torch-compile": 120.0, "proxy": 10.0, "trial": 40.0, "final": 40.0, "profile": 20.0}
"""What a job is taken to cost before one of its kind was seen; a compilation takes about a minute, and a trial two of them."""
GAIN = 0.02
"""A trial that is predicted to be better by less than this share at its best is not worth its time."""
CONTENDERS = 2
NEAR = 0.06
"""So many trials whose objective is within so much of the best run in turn with it before one is chosen."""
BELIEVED = 3.0
"""Standard deviations by which a prediction has to miss a limit before the trial is left out."""
PROXIED = (*ENCODER_QUALITY, *DECODER_QUALITY)
"""Figures that a proxy tells of."""
TIMED = ("latency", "time_to_first_token", "throughput", "energy", "cost", "speedup")
"""Objectives that two artifacts can be timed for in turn."""


class Search:
    """One run of `choose`, from its checked request to its answer.

    What is carried out next is what is predicted to be best in the objective, of all that may still be better than what was measured. A candidate
    whose weights nobody has looked at gets a proxy of their quality first, where quality decides. Every measurement corrects the predictions of what
    runs alike. It ends when nothing left is predicted to be better, or the budget is used up.
    """

    def __init__(self, asked: Asked, profile: Profile, journal: Journal, engine: Engine, machine: Machine) -> None:
        self.request, self.spec, self.constraints, self.objective = asked.request, asked.spec, asked.constraints, asked.objective
        self.metric, self.rates, self.log, self.start = asked.metric, asked.rates, asked.log, asked.start
        self.profile, self.journal, self.engine, self.machine = with_stand_ins(profile), journal, engine, machine
        self.versions = package_versions()
        self.shared = Journal(data_folder(), shared=True)
        fingerprints = {"model": fingerprint(self.request.model), "text": asked.text.fingerprint, "machine": f"{machine.cpu}, {machine.cores} cores"}
        fingerprints |= {"task": asked.task.fingerprint} if asked.task else {}
        self.task = asked.task
        self.context = context_of(self.request.workload, fingerprints, self.request.threads)
        self.beliefs = Beliefs()
        self.candidates: dict[str, Candidate] = {}
        self.seen_s: dict[str, list[float]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.judges_quality = not any(c.figure not in FIGURES for c in self.constraints)
        self.stopped = ""

    def run(self) -> Answer:
        """Search, and judge what was tried."""
        try:
            original = self.candidate(Recipe())
            baseline = self._carried_out(Job(kind="original", candidate=original), "the original, by torch in float32")
            if not baseline["measured"]:
                raise ModelError(f"{self.request.model}: the original itself could not be measured: {baseline['failure']}")
            self.baseline = baseline
            return self._explained(self._search(original))
        finally:
            self.engine.close()

    def _explained(self, trials: list[dict[str, Any]]) -> Answer:
        """The answer with what explains it. A variant of the chosen that is of the space and was tried to explain it is a trial like the others,
        so that a second run, which finds it in the journal, says the same."""
        while True:
            answer = self._answer(trials, self._finals([self.baseline, *trials]))
            rows = explain.ablate(self, answer.document["candidates"], answer.baseline, answer.chosen)
            joined = [self.records.get(trial["id"], trial) for trial in trials]
            if [trial["status"] for trial in joined] == [trial["status"] for trial in trials]:
                break
            trials = joined
        baseline, chosen = answer.baseline, answer.chosen
        searched = {trial["id"] for trial in trials}
        outside = [row for row in rows if row["id"] not in searched]
        better = better_without(outside, chosen, baseline, self.constraints, self.objective) if chosen else []
        return replace(answer, document=answer.document | {
            "ablation": rows, "profile": explain.operator_profiles(self, baseline, chosen), "components": explain.sizes(self, baseline, chosen),
            "warnings": [*answer.document["warnings"], *better],
        })  # fmt: skip

    def candidate(self, recipe: Recipe) -> Candidate:
        """A recipe with its predictions on this machine."""
        found = make_candidate(self.spec, self.request.workload, recipe, self.profile, self.context, self.rates)
        if self.task is None or self.task.way != "head" or found.refused:
            return found
        try:
            require_head(recipe.runtime, self.spec)
        except RecipeError as error:
            return replace(found, refused=str(error))
        return found

    def _candidates(self) -> list[Candidate]:
        """What is searched, each once. Of a space those combinations that can be done; of recipes that were named all, and why not."""
        if self.request.recipes:
            return [self.candidate(recipe) for recipe in dict.fromkeys(self.request.recipes) if recipe != Recipe()]
        space = self.request.space or default_space(self.spec, own_lengths=bool(self.request.workload.lengths))
        found, refused = [], 0
        for recipe in dict.fromkeys(space if space.combinations <= LISTED else self._drawn(space)):
            try:
                apply_recipe(recipe, self.spec)
            except RecipeError:
                refused += 1
                continue
            found.append(self.candidate(recipe))
        if not found:
            raise RecipeError(f"none of the space's {refused} combinations can be done with {self.spec.name}.")
        if refused:
            self.log(f"{refused} of the space's {refused + len(found)} combinations cannot be done with this model on their runtime")
        return [candidate for candidate in found if candidate.recipe != Recipe()]

    def _drawn(self, space: Space) -> list[Recipe]:
        """The recipes of a space too large to be listed whose predictions are best."""

        def judge(recipe: Recipe) -> tuple[float, float] | None:
            try:
                left = bits_left(apply_recipe(recipe, self.spec))
            except RecipeError:
                return None
            cost = self.objective.cost(self.candidate(recipe).predicted) if self.objective.figure in FIGURES else 0.0
            return cost, -left

        self.log(f"the space has {space.combinations:,} combinations; {DRAWN:,} are drawn and predicted")
        found = draw(space, judge)
        self.log(f"the {len(found)} best of them are searched")
        return found

    def _search(self, original: Candidate) -> list[dict[str, Any]]:
        """Every candidate's record: what was tried first, in the order of the trials."""
        self.learn(Job(kind="original", candidate=original), self.baseline)
        pool = {candidate.id: candidate for candidate in self._candidates()}
        self.candidates = {original.id: original, **pool}
        for candidate in list(pool.values()):
            if found := self.known(candidate.proxy_id):
                self.beliefs.learn_quality(candidate, found["quality"])
            if found := self.known(candidate.id):
                self.log(f"{candidate.recipe}: done before")
                self.learn(Job(kind="trial", candidate=pool.pop(candidate.id)), found)
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
                self.keep(job, record)
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
        best = min(able, key=self._expected_cost)
        weighs_quality = not self.request.recipes and (
            self.judges_quality or any(constraint.figure not in FIGURES for constraint in self.constraints)
        )
        looked = {candidate.weights for candidate in running.values()}
        if weighs_quality and not self.beliefs.knows_quality(best):
            unknown = (candidate for candidate in able if not self.beliefs.knows_quality(candidate) and not candidate.rounds)
            best = next((candidate for candidate in unknown if is_coarser(best.recipe.steps, candidate.recipe.steps)), best)  # it speaks for both
        unseen = not best.rounds and not self.beliefs.knows_quality(best) and best.weights not in looked
        wants_proxy = weighs_quality and self._proxies_tell() and unseen
        job = Job(kind="proxy" if wants_proxy and best.proxy_id not in self.journal.trials else "trial", candidate=best)
        if not self.has_time_for(job):
            self.stopped = self.out_of_time
            return None
        return job

    def has_time_for(self, job: Job) -> bool:
        """Whether a job is expected to end within the budget."""
        return self.request.budget_s is None or time.monotonic() - self.start + self._expected_s(job) <= self.request.budget_s

    @property
    def out_of_time(self) -> str:
        """What is said where a job would end too late."""
        return f"the budget of {format_seconds(self.request.budget_s)} is used up"

    def done_now(self, job: Job) -> dict[str, Any]:
        """The record of a job that is carried out now, while nothing else runs."""
        self.engine.start(job)
        [(_, record)] = self.engine.finished()
        return record

    def _proxies_tell(self) -> bool:
        """Whether a proxy, which knows the agreement with the original alone, can rule anything out: not where a task's figures decide."""
        if self.task is None:
            return True
        return any(figure in PROXIED for figure in (self.objective.figure, *(constraint.figure for constraint in self.constraints)))

    def _expected_cost(self, candidate: Candidate) -> tuple[float, float]:
        """The objective by prediction; where that is quality, what is believed of it, and the latency."""
        predicted = self.beliefs.corrected(candidate).predicted
        if self.objective.figure in FIGURES:
            return self.objective.cost(predicted), 0.0
        quality = self.beliefs.at_best(candidate, self.metric)
        if quality is None and self.task is not None and self.metric in self.task.names:
            quality = self._hoped()
        worse = 0.0 if quality is None else quality if self.metric == "perplexity_ratio" else -quality
        return worse, predicted.get("latency_s") or math.inf

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

    def _hoped(self) -> float:
        """The best value of the metric that a candidate can hope for."""
        task = self.task
        return next((metric.best for metric in task.metrics if metric.name == self.metric), 1.0) if task else 1.0

    def _is_dominated(self, candidate: Candidate, least: float) -> bool:
        """Whether something was measured that is better in the objective, and in quality than the candidate can be."""
        quality = self.beliefs.at_best(candidate, self.metric)
        if quality is None:
            quality = self._hoped()
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

    def known(self, identity: str) -> dict[str, Any] | None:
        """What this folder's journal has of a trial or proxy; or what another run left, which is then this folder's too.

        What follows from a latency is by the power and the price of now.
        """
        found = self.journal.trials.get(identity)
        if found is None and not self.request.fresh and (found := self.shared.trials.get(identity)) is not None:
            if found["status"] == "failed":
                return None
            self.journal.append(found)
        if found is None or not found.get("measured"):
            return found
        return found | {key: derived(found[key], self.rates) for key in ("predicted", "measured")}

    def _carried_out(self, job: Job, said: str) -> dict[str, Any]:
        """The record of a job: from the journal where it is there, else by carrying it out now."""
        if found := self.known(job.candidate.id):
            self.log(f"{said}: done before")
            return found
        self.log(said)
        record = self.done_now(job)
        if record["measured"]:  # without the original there is no trial at all: the next run measures it again
            self.write_down(record)
        self.log(f"    {_summary(record, self.metric)}")
        return record

    def keep(self, job: Job, record: dict[str, Any]) -> None:
        """Write a finished job down, and learn from it."""
        if job.kind == "proxy":
            self.write_down(record)
            self.seen_s.setdefault("proxy", []).append(record["seconds"])
            self.beliefs.learn_quality(job.candidate, record["quality"])
            score = figure_of(record, self.metric)
            self.log(f"    {self.metric} {outcome.say(self.metric, score)} by proxy")
            return
        corrected = self.beliefs.corrected(job.candidate)
        record |= {"predicted": corrected.predicted, "ratio": outcome.ratios(corrected.predicted, record["measured"]) if record["measured"] else None}
        self.write_down(record)
        self.learn(job, record)
        self.log(f"    {_summary(record, self.metric)}")

    def write_down(self, record: dict[str, Any]) -> None:
        """Add a record to the journals; of a failure other runs are not told."""
        self.journal.append(record)
        if not (record["status"] == "failed" or record.get("failure")):
            self.shared.append(record)

    def learn(self, job: Job, record: dict[str, Any]) -> None:
        """Take a finished trial into what is believed."""
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
                job = Job(kind="final", candidate=self.candidates[other["id"]], beside=self.candidates[first["id"]])
                if not self.has_time_for(job):
                    break
                self.log(f"in turn: {first['recipe']} @ {first['runtime']} and {other['recipe']} @ {other['runtime']}")
                known = self.done_now(job)
                self.journal.append(known)
                self.log(f"    the second takes {known['seconds_over']:.3f} of the first's time")
            found[other["id"]] = float(known["seconds_over"])
        return found

    def _answer(self, trials: list[dict[str, Any]], finals: Mapping[str, float]) -> Answer:
        timed = outcome.on_one_clock([self.baseline, *trials])
        judged = outcome.judge_trials(timed, timed[0], self.constraints, self.objective, self.metric)
        baseline, trials = judged[0], judged[1:]
        chosen = outcome.choose_best(judged, self.objective, self.metric, finals)
        return Answer(chosen=chosen, baseline=baseline, document={
            "machine": asdict(self.machine) | {"threads": self.request.threads}, "versions": _python() | self.versions,
            "baseline": baseline, "candidates": trials, "chosen": chosen["id"] if chosen else None, "stopped": self.stopped, "finals": dict(finals),
            "closest": None if chosen else outcome.closest(judged, baseline, self.constraints),
            "looser": outcome.looser(judged, chosen, self.objective, self.metric), "warnings": outcome.warnings(chosen, baseline),
            "accuracy": outcome.accuracy(judged, self.metric),
        })  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found on one kind of machine: its part of `choice.json`."""

    chosen: dict[str, Any] | None
    baseline: dict[str, Any]
    document: dict[str, Any]


def _kind_of(job: Job) -> str:
    if job.kind in ("proxy", "final", "profile"):
        return job.kind
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


def _python() -> dict[str, str]:
    import platform

    return {"python": platform.python_version()}
