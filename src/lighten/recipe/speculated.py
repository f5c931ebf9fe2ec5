"""What speculative decoding on this machine takes, before anything is measured: rounds of a pass over γ + 1 tokens, and what proposes them.

Legend: α share of proposals that are accepted, γ proposals a round, B sequences.

    rounds  = new tokens / expected tokens(α^B, γ)        all B sequences go on by as many tokens as the shortest of them accepts
    seconds = rounds · (pass over γ + 1 tokens + γ · draft's step) + prefills

Copied proposals cost nothing. Every pass is taken for one over γ + 1 tokens at the
middle of the new tokens' context. Source of the expectation: Leviathan et al. 2022 (arXiv:2211.17192), equation 1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.operators import Forward, forward_operators
from lighten.cost.passes import first_forward, steps_after_first
from lighten.cost.workload import Workload
from lighten.device.profile import Profile
from lighten.device.roofline import TimePrediction
from lighten.model.spec import ModelSpec
from lighten.recipe.acceptance import ACCEPTED, LOOKUP_ACCEPTED, expected_tokens
from lighten.recipe.on_machine import Passes, place_on_machine
from lighten.recipe.options import Speculation, draft_spec
from lighten.recipe.placement import Placed
from lighten.recipe.predict import loaded_weight_bytes
from lighten.recipe.recipe import Recipe


def accepted_of(said: Speculation) -> tuple[float, float, float]:
    """α, low, middle and high, before it is measured."""
    return ACCEPTED if said.is_model else LOOKUP_ACCEPTED


def tokens_per_pass(said: Speculation, batch_size: int) -> tuple[float, float, float]:
    """Tokens that every sequence of a batch gets from a pass of the model, at the three acceptances."""
    low, middle, high = (expected_tokens(accepted**batch_size, said.tokens) for accepted in accepted_of(said))
    return low, middle, high


def place_speculating(spec: ModelSpec, workload: Workload, recipe: Recipe, memory: MemoryBreakdown, profile: Profile) -> Placed:
    """A recipe's model that speculates, on the engine that stands for its runtime: the time at the middle acceptance, its range from the low one's
    slowest to the high one's fastest.

    Raises:
        DeviceError: that engine was not measured.
    """
    said = recipe.speculation
    assert said is not None, "asked for where a recipe speculates"
    plain = replace(recipe, options=())
    draft = draft_spec(Path(said.draft)) if said.is_model else None
    ends = tokens_per_pass(said, workload.batch_size)
    slow, placed, fast = (_placed(spec, draft, workload, plain, memory, profile, said, tokens) for tokens in ends)
    time = replace(_time(placed), low=_time(fast).low, high=_time(slow).high)
    process = placed.process_bytes
    if process is not None and draft is not None:
        process += loaded_weight_bytes(plain, draft)
    low, middle, high = accepted_of(said)
    why = "as the paper's drafts have it" if said.is_model else "what a text repeats is known when it is measured"
    assumed = f"speculate={said.draft}: {middle:.0%} of proposals are taken to be accepted, {low:.0%} to {high:.0%} for the range ({why})"
    more = "FLOPs and memory are those of decoding without proposals" + (", but for the draft's weights in the process" if said.is_model else "")
    return replace(placed, time=time, process_bytes=process, assumptions=(*placed.assumptions, assumed, more))


def _placed(  # noqa: PLR0913  what is asked, and of what
    spec: ModelSpec, draft: ModelSpec | None, workload: Workload, recipe: Recipe, memory: MemoryBreakdown, profile: Profile, said: Speculation,
    tokens: float,
) -> Placed:  # fmt: skip
    rounds = steps_after_first(workload) / tokens
    found = place_on_machine(_passes(spec, workload, said.tokens + 1, rounds), spec, workload, recipe, memory, profile)
    if draft is None:
        return found
    beside = place_on_machine(_passes(draft, workload, 1, said.tokens * rounds), draft, workload, recipe, memory, profile)
    return replace(found, time=_sum(_time(found), _time(beside)))


def _time(placed: Placed) -> TimePrediction:
    assert placed.time is not None, "a measured engine tells a time"
    return placed.time


def _passes(spec: ModelSpec, workload: Workload, tokens: int, count: float) -> Passes:
    """The prefill of a generation, and so many passes over some tokens."""
    middle = workload.seq_len + workload.new_tokens // 2
    step = Forward(batch_size=workload.batch_size, query_len=tokens, key_len=middle + tokens, last_logits_only=tokens == 1)
    passes = [(forward_operators(spec, step, workload.dtype), 2 * count)]
    if workload.phase == "generate":
        passes.insert(0, (forward_operators(spec, first_forward(spec, workload), workload.dtype), 2))
    return passes


def _sum(one: TimePrediction, other: TimePrediction) -> TimePrediction:
    def added(name: str) -> float | None:
        values = (getattr(one, name), getattr(other, name))
        return None if None in values else sum(values)

    return replace(one, seconds=one.seconds + other.seconds, low=added("low"), high=added("high"))
