"""Which lever helps most: every lever read on the model as `lighten estimate` would read it, ranked by what it gains.

A gain is a ratio, after over before: below 1 is less. Time, money and FLOPs are of a token of the workload, so that batches of different sizes
compare; latency is of the whole workload.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lighten.cost.memory import MemoryBreakdown
from lighten.errors import LightenError, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.recipe.acceptance import ACCEPTED
from lighten.recipe.case import Case, Cost, Target, cost_of, device_name
from lighten.recipe.draft import Speculation, check_draft, speculate
from lighten.recipe.levers import LEVERS, STEP_ORDER, Lever, Unfit, compatible, propose
from lighten.recipe.quality import SAME, UNMEASURED, Quality, together
from lighten.recipe.recipe import parse_recipe
from lighten.units import format_bytes

Goal = Literal["fits", "latency", "throughput", "cost"]
GOALS = get_args(Goal)
EFFECT = 0.005
"""Least share by which a figure has to fall for a lever to be shown."""
MOST_LOSS = 1.1
"""What levers that are put together may lose by default: a factor of 1.1 in perplexity. Published 4-bit weights with groups lose less, 3-bit ones
more (quality_ranges.json)."""
MOST_BATCH = 1 << 14
WORST = float("inf")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A lever, or several together, and what it gives.

    Attributes:
        levers: one, or those that are put together.
        lever: the same as one.
        memory, flops, time, latency, money: after over before; None where one of them is not known.
        why: one sentence: what it does, what binds, and what of that it relieves.
    """

    levers: tuple[Lever, ...]
    lever: Lever
    cost: Cost
    quality: Quality | None
    why: str
    memory: float
    flops: float
    time: float | None
    latency: float | None
    money: float | None
    speculation: Speculation | None = None

    def as_json(self, device: str) -> dict[str, Any]:
        spoken = self.speculation
        return {
            "levers": [each.name for each in self.levers], "text": self.lever.text(device), "kind": self.lever.kind,
            "recipe": self.lever.recipe or None, "flags": list(self.lever.flags(device)), "done": self.lever.done,
            "gain": {name: getattr(self, name) for name in ("memory", "time", "latency", "money", "flops")},
            "quality": None if self.quality is None else self.quality.as_json(), "why": self.why,
            "draft": None if spoken is None else {"proposed": spoken.proposed, "accepted": list(ACCEPTED), "speedup": list(spoken.speedup)},
            **self.cost.as_json(),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer of `lighten advise`; `as_json` gives its document.

    Attributes:
        device: as `--device` takes it, without a count.
        lines: best first.
        together: the best levers that go together; None where there are not two.
        left_out: lever → why it is not among them.
    """

    case: Case
    device: str | None
    goal: Goal
    baseline: Cost
    lines: tuple[Line, ...]
    together: Line | None
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        spec, asked, device = self.case.spec, self.case.workload, self.device or ""
        return {
            "model": {"name": spec.name, "family": spec.family, "source": spec.source, "dtype": spec.dtype, "layers": spec.layers},
            "workload": {name: getattr(asked, name) for name in ("phase", "batch_size", "seq_len", "new_tokens", "dtype", "kv_dtype", "optimizer")},
            "recipe": str(self.case.recipe), "device": self.device, "goal": self.goal, "baseline": self.baseline.as_json(),
            "lines": [{"rank": rank, **line.as_json(device)} for rank, line in enumerate(self.lines, start=1)],
            "together": None if self.together is None else self.together.as_json(device),
            "left_out": [{"lever": text, "why": why} for text, why in self.left_out], "notes": list(self.notes),
        }  # fmt: skip


def advise(
    case: Case, target: Target = None, *, goal: Goal | None = None, draft: ModelSpec | None = None, most_loss: float = MOST_LOSS,
    device: str | None = None,
) -> Advice:  # fmt: skip
    """Every lever on a case, ranked.

    Args:
        target: a device of published figures, which the case's plan counts; a machine that was probed; None: memory and FLOPs alone.
        goal: fits (what makes it fit on as many devices, least loss of quality first, then least time; where it fits, least memory), latency (of
            the workload), throughput (time of a token), cost (money of a token, or without a price the time of all devices). None: fits where
            it does not fit or there is no device, else latency.
        draft: a smaller model of the same vocabulary, for speculative decoding.
        most_loss: what levers that are put together may lose in quality, as a factor of perplexity.
        device: how `--device` named it, without a count; None: its own name.

    Raises:
        WorkloadError: the goal is not known or needs a device, or the draft does not fit the model.
        LightenError: the case itself cannot be estimated.
    """
    if goal is not None and goal not in GOALS:
        raise WorkloadError(f"goal {goal!r} is not known; goals: {', '.join(GOALS)}.")
    if target is None and goal not in (None, "fits"):
        raise WorkloadError(f"goal {goal} needs a device: without --device memory and FLOPs alone are known, by which goal fits ranks.")
    if draft is not None:
        check_draft(case.spec, draft, case.workload)
        if target is None:
            raise WorkloadError(f"draft {draft.name}: its gain is one of time, which is known on a device alone; use --device.")
    baseline = cost_of(case, target)
    search = _Search(
        case=case, target=target, baseline=baseline, goal=goal or default_goal(baseline), left_out={}, device=device or device_name(target) or ""
    )
    lines = sorted(search.lines(draft), key=search.order)
    return Advice(
        case=case, device=search.device or None, goal=search.goal, baseline=baseline, lines=tuple(lines),
        together=search.together(lines, most_loss, draft),
        left_out=tuple(search.left_out.items()), notes=tuple(search.notes()),
    )  # fmt: skip


def default_goal(baseline: Cost) -> Goal:
    return "latency" if baseline.time is not None and baseline.fits is not False else "fits"


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What levers are held against."""

    case: Case
    target: Target
    baseline: Cost
    goal: Goal
    left_out: dict[str, str]
    device: str

    # ---- lines ----

    def lines(self, draft: ModelSpec | None) -> Iterator[Line]:
        """Each lever that gains something; of the plans over one number of devices the best alone."""
        plans: dict[int, Line] = {}
        for lever in (*propose(self.case, self.target), *self._batches()):
            if isinstance(lever, Unfit):
                self.left_out[lever.text] = lever.why
                continue
            if (line := self._tried(lever)) is None:
                continue
            if lever.name != "plan":
                yield line
            elif (best := plans.get(line.cost.devices)) is None or self.order(line) < self.order(best):
                plans[line.cost.devices] = line
        yield from plans.values()
        if draft is not None:
            yield self._speculated(draft)

    def _tried(self, lever: Lever) -> Line | None:
        try:
            cost = cost_of(lever.on(self.case), self.target)
        except LightenError as error:
            self.left_out[lever.text(self.device)] = str(error)
            return None
        line = self.line((lever,), lever, cost, lever.quality)
        if not gains(line):
            self.left_out[lever.text(self.device)] = "gains nothing here"
            return None
        return line

    def line(self, levers: Sequence[Lever], lever: Lever, cost: Cost, quality: Quality | None, speculation: Speculation | None = None) -> Line:
        before = self.baseline
        how = LEVERS[levers[0].name].how if speculation is None else _speculating(speculation)
        how = how if len(levers) == 1 else f"{len(levers)} levers at once"
        return Line(
            levers=tuple(levers), lever=lever, cost=cost, quality=quality, why=explain(how, before, cost), speculation=speculation,
            memory=cost.needed_bytes / before.needed_bytes, flops=cost.flops / cost.tokens / (before.flops / before.tokens),
            time=_ratio(cost.seconds_per_token, before.seconds_per_token), latency=_ratio(cost.seconds, before.seconds),
            money=_ratio(cost.usd_per_token, before.usd_per_token),
        )  # fmt: skip

    def _speculated(self, draft: ModelSpec) -> Line:
        found = speculate(self.case, self.target, draft, plain=self.baseline)
        lever = _draft_lever(draft)
        return self.line((lever,), lever, found.cost, SAME, found)

    # ---- batches ----

    def _batches(self) -> Iterator[Lever]:
        """The largest batch that fits, and the smallest of its powers of two at which memory binds no more."""
        if self.case.workload.phase not in LEVERS["batch"].phases or self.baseline.capacity_bytes is None:
            return
        largest = self._largest_batch()
        if largest is None:
            self.left_out["--batch-size"] = "not even one sequence fits"
            return
        now, unit = self.case.workload.batch_size, self.case.plan.dp
        sizes = {largest}
        if self.baseline.time is not None and self.baseline.time.bound_by == "memory":
            doubled = (unit << power for power in range(MOST_BATCH.bit_length()) if now < unit << power < largest)
            sizes |= set(next(([size] for size in doubled if (time := self._with_batch(size).time) and time.bound_by != "memory"), []))
        yield from (Lever(name="batch", workload={"batch_size": size}, quality=SAME) for size in sorted(sizes - {now}))

    def _with_batch(self, size: int) -> Cost:
        return cost_of(replace(self.case, workload=replace(self.case.workload, batch_size=size)), self.target)

    def _largest_batch(self) -> int | None:
        """In steps of the data-parallel ranks, `MOST_BATCH` of them at most; None where none fits.

        Memory grows nearly evenly with the batch, so each guess is where the line through the last two sizes meets the capacity.
        """
        unit, capacity = self.case.plan.dp, self.baseline.capacity_bytes or 0
        needs = {size: self._with_batch(size * unit).needed_bytes for size in (1, 2)}
        if needs[1] > capacity:
            return None
        fits, beyond = (2 if needs[2] <= capacity else 1), MOST_BATCH + 1 if needs[2] <= capacity else 2
        slope = max(1.0, needs[2] - needs[1])
        while beyond - fits > 1:
            guess = min(max(int(fits + (capacity - needs[fits]) / slope), fits + 1), beyond - 1)
            needs[guess] = self._with_batch(guess * unit).needed_bytes
            slope = max(1.0, (needs[guess] - needs[fits]) / (guess - fits))
            fits, beyond = (guess, beyond) if needs[guess] <= capacity else (fits, guess)
        return fits * unit

    # ---- order ----

    def order(self, line: Line) -> tuple[float, ...]:
        """Smaller is better: by the goal first, then by memory and quality."""
        return (*self.score(line.cost, line.quality), loss(line.quality))

    def score(self, cost: Cost, quality: Quality | None) -> tuple[float, ...]:
        """What the goal asks for of a cost. What does not fit comes last, whatever the goal."""
        misfit = float(cost.fits is False)
        if self.goal == "fits":
            more = float(cost.devices > self.baseline.devices)
            if self.baseline.fits is not False:
                return misfit, more, cost.needed_bytes
            return misfit, more, loss(quality), cost.needed_bytes if misfit else cost.seconds_per_token or 0.0
        values: dict[str, float | None] = {
            "latency": cost.seconds, "throughput": cost.seconds_per_token,
            "cost": cost.usd_per_token if self.baseline.usd is not None else cost.device_seconds_per_token,
        }  # fmt: skip
        found = values[self.goal]
        return (misfit, WORST if found is None else found, cost.needed_bytes)

    # ---- together ----

    def together(self, lines: Sequence[Line], most_loss: float, draft: ModelSpec | None = None) -> Line | None:
        """The levers that improve the goal when they are added one after the other, best first, within the loss of quality that is allowed;
        a draft, which costs none, after all others.

        On as many devices as there are, unless nothing fits there.
        """
        taken: list[Lever] = []
        best, quality = self.baseline, SAME
        here = any(line.cost.fits is not False and line.cost.devices == self.baseline.devices for line in lines) or self.baseline.fits is not False
        for line in lines:
            lever = line.lever
            if line.speculation or not all(compatible(lever, other) for other in taken):
                continue
            if here and line.cost.devices != self.baseline.devices:
                continue
            joined = together([quality, line.quality])
            if joined is None or joined.worst > most_loss:
                continue
            cost = self._joined_cost([*taken, lever])
            if cost is not None and self.score(cost, SAME) < self.score(best, SAME):
                taken, best, quality = [*taken, lever], cost, joined
        spoken = self._speculated_with(taken, draft) if draft is not None and taken else None
        if spoken is not None and draft is not None and self.score(spoken.cost, SAME) < self.score(best, SAME):
            lever = _draft_lever(draft)
            return self.line([*taken, lever], replace(join(taken), draft=lever.draft), spoken.cost, quality, spoken)
        return self.line(taken, join(taken), best, quality) if len(taken) > 1 else None

    def _speculated_with(self, levers: Sequence[Lever], draft: ModelSpec) -> Speculation | None:
        try:
            return speculate(join(levers).on(self.case), self.target, draft)
        except LightenError as error:
            self.left_out[f"{join(levers).text()} --draft {draft.name}"] = str(error)
            return None

    def _joined_cost(self, levers: Sequence[Lever]) -> Cost | None:
        try:
            return cost_of(join(levers).on(self.case), self.target)
        except LightenError as error:
            self.left_out[join(levers).text(self.device)] = str(error)
            return None

    def notes(self) -> Iterator[str]:
        yield "a ratio is after over before; time and money are of one token, latency of the whole workload"
        yield "quality is a range of published ratios of like models, and of each lever alone; together they are multiplied"
        if self.baseline.fits is False:
            yield "as it is it does not fit: its time is what it would be with more memory"
        if self.goal == "cost" and self.baseline.usd is None:
            yield "no price is known: ranked by the time of all devices; --price gives one"


def join(levers: Sequence[Lever]) -> Lever:
    """Several levers as one: steps in the order in which a recipe takes them."""
    steps = sorted(
        (str(step) for each in levers for step in parse_recipe(each.steps).steps), key=lambda text: STEP_ORDER.index(text.partition("(")[0])
    )
    runtimes = [each.runtime for each in levers if each.runtime]
    return Lever(
        name="together", steps=" | ".join(steps), runtime=runtimes[-1] if runtimes else None,
        workload={name: value for each in levers for name, value in each.workload.items()},
        plan={name: value for each in levers for name, value in each.plan.items()},
    )  # fmt: skip


def _draft_lever(draft: ModelSpec) -> Lever:
    return Lever(name="draft", draft=draft.source or draft.name, quality=SAME)


def gains(line: Line) -> bool:
    """Whether anything falls by more than `EFFECT`."""
    return any(value is not None and value < 1 - EFFECT for value in (line.memory, line.flops, line.time, line.latency, line.money))


def loss(quality: Quality | None) -> float:
    """What levers are ordered by, the least loss first; one that is not known comes last."""
    if quality is None:
        return WORST
    return 1.0 if quality.measure in UNMEASURED else quality.worst


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after / before


# ---- why ----

PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "activations": "activations", "kv_cache": "cache",
    "temporary": "working memory",
}  # fmt: skip


def explain(how: str, before: Cost, after: Cost) -> str:
    """One sentence of why, from the figures of both.

    What takes less memory, the part that falls most; then the time: what bound it, and what of that is relieved; or that it stays, or grows.
    """
    said = [how]
    if part := _fallen(before.memory, after.memory):
        now, then = getattr(before.memory, part), getattr(after.memory, part)
        said.append(f"{format_bytes(then)} of {PARTS[part]} instead of {format_bytes(now)}")
    if before.time is not None and after.time is not None:
        said.append(_of_time(before, after))
    return f"{said[0]}: {'; '.join(said[1:])}." if len(said) > 1 else f"{how}."


def _speculating(found: Speculation) -> str:
    return f"a draft proposes {found.proposed} tokens and one pass checks them ({ACCEPTED[0]:.0%} to {ACCEPTED[-1]:.0%} accepted)"


def _of_time(before: Cost, after: Cost) -> str:
    assert before.time is not None
    assert after.time is not None
    bound, then = before.time.bound_by, after.time.bound_by
    ratio = (after.seconds_per_token or 0) / (before.seconds_per_token or 1)
    if ratio > 1 + EFFECT:
        return f"a token takes {ratio - 1:.0%} longer, bound by {then}"
    if ratio > 1 - EFFECT:
        return f"time stays, bound by {bound}"
    relieved = {"memory": _moved(before, after), "compute": _computed(before, after)}.get(bound, "")
    return f"a token takes {1 - ratio:.0%} less time: it was bound by {bound}{relieved}{'' if then == bound else f', then by {then}'}"


def _moved(before: Cost, after: Cost) -> str:
    """What of the memory's traffic is relieved."""
    return ", which moves less" if _fallen(before.memory, after.memory) else ""


def _computed(before: Cost, after: Cost) -> str:
    """What of the products is relieved."""
    share = after.flops / after.tokens / (before.flops / before.tokens)
    return f", of which {share:.0%} is left" if share < 1 - EFFECT else ""


def _fallen(before: MemoryBreakdown, after: MemoryBreakdown) -> str | None:
    """The part that falls most; None where none falls by more than `EFFECT` of the whole."""
    falls = {part: (getattr(before, part) or 0) - (getattr(after, part) or 0) for part in PARTS}
    most = max(falls, key=lambda part: falls[part])
    return most if falls[most] > EFFECT * before.peak else None
