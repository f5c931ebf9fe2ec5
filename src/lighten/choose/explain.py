"""Why the chosen is what it is: what each of its steps contributed, where its time goes and where its bytes lie, beside the original.

All of it is predicted; it is measured where the budget is not used up, and what is in the journal is not measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lighten.choose import outcome
from lighten.choose.ablation import Variant, variants
from lighten.choose.engine import Job
from lighten.choose.trial import Candidate, predict_operators
from lighten.recipe import Recipe, apply_recipe, parse_recipe
from lighten.recipe.size import component_sizes

if TYPE_CHECKING:
    from lighten.choose.search import Search

Record = dict[str, Any]


def ablate(search: Search, trials: Sequence[Record], baseline: Record, chosen: Record | None) -> list[Record]:
    """Each variant of the chosen recipe as a trial with its `role` and `step`; nothing where the original itself was chosen, or nothing was.

    Args:
        trials: as they stand in the answer, with one clock for all.
    """
    if chosen is None or chosen["id"] == baseline["id"]:
        return []
    recipe = parse_recipe(f"{chosen['recipe']} @ {chosen['runtime']}")
    rows = [(variant, _variant_record(search, variant)) for variant in variants(recipe)]
    answered = {trial["id"]: trial for trial in [baseline, *trials] if trial["measured"]}
    timed = outcome.on_one_clock([record for _, record in rows], like=list(answered.values()))
    found = []
    for (variant, _), record in zip(rows, timed, strict=True):
        record = answered.get(record["id"], record)
        meets = outcome.meets(record, baseline, search.constraints) if record["measured"] else None
        found.append(record | {"meets": meets, "role": variant.role, "step": variant.step})
    return found


def _variant_record(search: Search, variant: Variant) -> Record:
    """The raw record of a variant: from what was tried, else tried now, else what is predicted of it."""
    candidate = search.candidate(variant.recipe)
    if candidate.id in search.records:
        return search.records[candidate.id]
    if candidate.refused:
        return candidate.record(status="skipped", failure=candidate.refused)
    job = Job(kind="trial", candidate=candidate)
    if found := search.known(candidate.id):
        search.learn(job, found)
        return found
    if not search.has_time_for(job):
        return search.beliefs.corrected(candidate).record(status="skipped", failure=f"not tried: {search.out_of_time}")
    search.log(f"what a step contributed: {variant.recipe}")
    search.keep(job, search.done_now(job))
    return search.records[candidate.id]


def operator_profiles(search: Search, baseline: Record, chosen: Record | None) -> Record:
    """What the operators of the original and of the chosen take; see `_operator_profile`."""
    return {"original": _operator_profile(search, baseline), "chosen": _of_chosen(search, baseline, chosen, _operator_profile)}


def _operator_profile(search: Search, trial: Record) -> Record:
    """Seconds of one run by kind of operator: predicted, together what the trial was predicted to take, and measured, with the seconds of that run;
    `failure` says why they were not measured."""
    candidate = _candidate_of(search, trial)
    seconds, total = predict_operators(search.spec, search.request.workload, candidate.recipe, search.profile), trial["predicted"].get("latency_s")
    predicted = None
    if seconds is not None and total:
        predicted = {kind: value * total / sum(seconds.values()) for kind, value in seconds.items()}
    found = search.known(candidate.profile_id)
    job = Job(kind="profile", candidate=candidate)
    if found is None and search.has_time_for(job):
        search.log(f"where the time goes: {candidate.recipe}")
        found = search.done_now(job)
        search.write_down(found)
    told = (found or {}).get("operators") or {}
    return {
        **_named(trial), "predicted": predicted, "measured": told.get("kinds"), "measured_s": told.get("seconds"), "runs": told.get("runs"),
        "failure": found["failure"] if found else f"not measured: {search.out_of_time}",
    }  # fmt: skip


def sizes(search: Search, baseline: Record, chosen: Record | None) -> Record:
    """Bytes on disk of the original and of the chosen by component, as predicted, and what the files really take together."""
    return {"original": _sizes(search, baseline), "chosen": _of_chosen(search, baseline, chosen, _sizes)}


def _sizes(search: Search, trial: Record) -> Record:
    recipe = _candidate_of(search, trial).recipe
    found = component_sizes(apply_recipe(recipe, search.spec), recipe.runtime)
    return {**_named(trial), "predicted": found, "predicted_bytes": sum(found.values()), "measured_bytes": trial["measured"]["size_bytes"]}


def _of_chosen(search: Search, baseline: Record, chosen: Record | None, tell: Any) -> Record | None:
    """None where the original itself was chosen, or nothing was."""
    if chosen is None or chosen["id"] == baseline["id"]:
        return None
    found: Record = tell(search, chosen)
    return found


def _candidate_of(search: Search, trial: Record) -> Candidate:
    recipe = parse_recipe(f"{trial['recipe']} @ {trial['runtime']}")
    return search.candidate(Recipe() if trial["id"] == search.baseline["id"] else recipe)


def _named(trial: Record) -> Record:
    return {key: trial[key] for key in ("id", "recipe", "runtime")}
