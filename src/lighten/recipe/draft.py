"""Speculative decoding: a draft proposes tokens, the model checks all of them in one pass and keeps those that it would have said itself.

Legend, as in the paper: α share of proposals that are accepted, γ proposals a round. What comes out has the model's own distribution.

Source: Leviathan et al. 2022 (arXiv:2211.17192).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Workload
from lighten.device.roofline import TimePrediction
from lighten.errors import LightenError, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.recipe.acceptance import ACCEPTED, expected_tokens
from lighten.recipe.case import Case, Cost, Target, cost_of, priced
from lighten.recipe.options import PHASES, misfit
from lighten.recipe.predict import compute_dtype
from lighten.recipe.recipe import Recipe

MOST_PROPOSED = 10
"""γ at most; the paper's best are 3 to 7."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """A model with a draft.

    Attributes:
        proposed: γ, the best for the middle acceptance.
        speedup: how many times faster each token comes, at the three acceptances.
    """

    cost: Cost
    proposed: int
    speedup: tuple[float, float, float]


def check_draft(spec: ModelSpec, draft: ModelSpec, workload: Workload) -> None:
    """Raises:
    WorkloadError: the phase does not decode, the draft is no decoder, not smaller, or speaks other tokens.
    """
    if workload.phase not in PHASES:
        raise WorkloadError(f"a draft has no effect in phase {workload.phase}; it has one in: {', '.join(PHASES)}.")
    if not draft.is_decoder or not spec.is_decoder:
        other = draft if not draft.is_decoder else spec
        raise WorkloadError(f"draft {draft.name}: {other.name} is no decoder alone; a draft and its model both have to be.")
    if problem := misfit(draft, spec):
        raise WorkloadError(f"draft {draft.name} {problem}")


def speculate(case: Case, target: Target, draft: ModelSpec, *, plain: Cost | None = None) -> Speculation:
    """What a case takes with a draft beside it, at the best number of proposals.

        round(γ) = γ · draft's step + check(γ)        seconds of a token = round(γ) / expected tokens(α, γ)

    Checking γ + 1 tokens takes at least a step (the weights and the cache are read once), and at least what γ + 1 times as many sequences
    without a context take (the products). Both models' prefills come before. Deviations: acceptances of all tokens are taken for
    independent and equal, as the paper does; a batch's sequences do not wait for each other's rejected tokens.

    Raises:
        LightenError: the draft does not fit, or no time is known on the target.
    """
    check_draft(case.spec, draft, case.workload)
    if case.recipe.speculation is not None:
        raise WorkloadError(f"draft {draft.name}: the recipe speculates already (@ {case.recipe.runtime_text}); leave one of them out.")
    beside = _beside(case, draft)
    alone = plain or cost_of(case, target)
    other = cost_of(beside, target)
    if alone.time is None or other.time is None:
        raise WorkloadError(f"draft {draft.name}: no time is known without a device; use --device.")
    step, draft_step = _step_s(case, target), _step_s(beside, target)
    rounds = {count: count * draft_step + _check_s(case, target, step, count) for count in range(1, MOST_PROPOSED + 1)}
    best = min(rounds, key=lambda count: rounds[count] / expected_tokens(ACCEPTED[1], count))
    first = [_first_s(one, target) for one in (case, beside)]
    tokens = alone.estimate.workload.new_tokens - (case.workload.phase == "generate")

    def seconds(accepted: float) -> float:
        return sum(first) + tokens * rounds[best] / expected_tokens(accepted, best)

    slow, middle, fast = (seconds(accepted) for accepted in ACCEPTED)
    spread = _spread(alone.time)
    time = replace(alone.time, seconds=middle, low=fast * spread[0], high=slow * spread[1])
    cost = replace(alone, memory=_sum(alone.memory, other.memory), needed_bytes=alone.needed_bytes + other.memory.peak, time=time)
    speedup = (alone.time.seconds / slow, alone.time.seconds / middle, alone.time.seconds / fast)
    return Speculation(cost=priced(cost, target), proposed=best, speedup=speedup)


def _beside(case: Case, draft: ModelSpec) -> Case:
    recipe = Recipe(runtime=case.recipe.runtime, dtype=case.recipe.dtype, device=case.recipe.device)
    return replace(case, spec=draft, recipe=recipe, workload=replace(case.workload, dtype=compute_dtype(recipe, draft)))


def _seconds(case: Case, target: Target, **changes: object) -> float:
    found = cost_of(replace(case, workload=replace(case.workload, **changes)), target).time  # type: ignore[arg-type]
    if found is None:
        raise LightenError(f"{case.spec.name}: no time is known of phase {case.workload.phase}.")
    return found.seconds


def _step_s(case: Case, target: Target) -> float:
    """One decoding step in the middle of the new tokens."""
    middle = case.workload.seq_len + case.workload.new_tokens // 2
    return _seconds(case, target, phase="decode", seq_len=middle, new_tokens=1)


def _first_s(case: Case, target: Target) -> float:
    """The prefill of a generation; nothing where a decoding alone is asked for."""
    return _seconds(case, target, new_tokens=1) if case.workload.phase == "generate" else 0.0


def _check_s(case: Case, target: Target, step: float, proposed: int) -> float:
    """One pass of the model over the proposals of all sequences."""
    products = _seconds(case, target, phase="decode", batch_size=case.workload.batch_size * (proposed + 1), seq_len=1, new_tokens=1)
    return max(step, products)


def _spread(time: TimePrediction) -> tuple[float, float]:
    """Low and high of a prediction over its middle; 1 where they are not known."""
    return (time.low or time.seconds) / time.seconds, (time.high or time.seconds) / time.seconds


def _sum(one: MemoryBreakdown, other: MemoryBreakdown) -> MemoryBreakdown:
    def added(name: str) -> int | None:
        both = [value for value in (getattr(one, name), getattr(other, name)) if value is not None]
        return sum(both) if both else None

    return MemoryBreakdown(**{name: added(name) for name in MemoryBreakdown.__dataclass_fields__})  # type: ignore[arg-type]
