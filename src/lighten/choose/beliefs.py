"""What is believed of a candidate before it is tried: its predictions, corrected by what earlier trials measured, and its quality by proxy.

log(measured / predicted) of a trial = bias of its engine + bias of its kind + noise

A kind is an engine with one format of weights. Both biases have normal priors around 0 and are learned trial by trial, each from what the one above
it leaves; so the first trial of a runtime tells much of all that runs on it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lighten.choose.constraints import LOWER_IS_BETTER, Constraint
from lighten.choose.trial import Candidate, derived
from lighten.recipe.recipe import Step

NOISE = {"latency_s": 0.06, "time_to_first_token_s": 0.06, "peak_memory_bytes": 0.03}
"""Standard deviation of log(measured / predicted) of one kind, repeated: turns of a shared machine; a process's memory."""
KIND = {"latency_s": 0.1, "time_to_first_token_s": 0.1, "peak_memory_bytes": 0.05}
"""The same of kinds on one engine."""
ENGINE = {"latency_s": 0.3, "time_to_first_token_s": 0.3, "peak_memory_bytes": 0.15}
"""The same of engines, where the probe tells no range."""
SIZE = 0.005
"""The same of sizes, of which nothing is learned: they follow from the recipe, and where they are off, others are off by something else."""
_LIKE_LATENCY = dict.fromkeys(("throughput", "energy_j", "usd_per_million_tokens"), "latency_s")
Z_90 = 1.6449
"""Standard deviations on either side of a 90 % range."""
SURE = 2.0
"""Standard errors by which a proxy has to miss a limit before it is believed: a proxy is another text on another runtime."""
_STANDS_FOR = {"perplexity": ("perplexity_ratio",), "quality": ("perplexity_ratio", "neighbour_agreement")}
_HEADLINES = ("perplexity_ratio", "neighbour_agreement")
PROXY_ERROR = 0.01
"""What a proxy is off by beside its own standard error, as a share: bfloat16 and int8 kernels of the real runtime."""


@dataclass(frozen=True)
class _Normal:
    """A bias: its mean and its standard deviation."""

    mean: float
    deviation: float

    def after(self, seen: float, noise: float) -> _Normal:
        """Once more was seen.

        >>> found = _Normal(0.0, 1.0).after(1.0, 1.0)
        >>> found.mean, round(found.deviation, 3)
        (0.5, 0.707)
        """
        gain = self.deviation**2 / (self.deviation**2 + noise**2)
        return _Normal(self.mean + gain * (seen - self.mean), math.sqrt(1 - gain) * self.deviation)


class Beliefs:
    """What the trials so far say of those to come."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, str], _Normal] = {}
        self._kinds: defaultdict[tuple[str, str, str], _Normal] = defaultdict(lambda: _Normal(0.0, 0.0))
        self._quality: dict[str, dict[str, tuple[float, float]]] = {}
        self._steps: dict[str, tuple[Step, ...]] = {}

    def learn(self, candidate: Candidate, measured: Mapping[str, Any]) -> None:
        """Take in a finished trial."""
        for key, noise in NOISE.items():
            predicted, value = candidate.predicted.get(key), measured.get(key)
            if not predicted or not value:
                continue
            engine, kind = self._biases(candidate, key)
            seen = math.log(value / predicted)
            self._engines[key, candidate.engine] = engine.after(seen - kind.mean, math.hypot(noise, kind.deviation))
            engine = self._engines[key, candidate.engine]
            self._kinds[key, candidate.engine, candidate.kind] = kind.after(seen - engine.mean, math.hypot(noise, engine.deviation))
        if quality := measured.get("quality"):
            self.learn_quality(candidate, quality)

    def learn_quality(self, candidate: Candidate, quality: Mapping[str, Any]) -> None:
        """Take in the quality of weights, by proxy or on a runtime; the better of two is kept: what holds one back may be its runtime."""
        weights = candidate.weights
        if not weights:
            return
        self._steps[weights] = candidate.recipe.steps
        found = {name: (score["value"], math.hypot(score["standard_error"] or 0.0, PROXY_ERROR * score["value"])) for name, score in quality.items()}
        known = self._quality.get(weights)
        if known is None:
            self._quality[weights] = found
            return
        better = all(_better(name, found[name][0], known[name][0]) for name in _HEADLINES if name in found and name in known)
        self._quality[weights] = known | found if better else found | known  # a task's figures, which a proxy has not, stay either way

    def knows_quality(self, candidate: Candidate) -> bool:
        return not candidate.weights or candidate.weights in self._quality

    def corrected(self, candidate: Candidate) -> Candidate:
        """The candidate with its predictions times what their engine and kind are off by, and the 90 % ranges that are left."""
        predicted = dict(candidate.predicted)
        for key, noise in NOISE.items():
            if not predicted.get(key):
                continue
            engine, kind = self._biases(candidate, key)
            middle = predicted[key] * math.exp(engine.mean + kind.mean)
            spread = Z_90 * math.sqrt(noise**2 + kind.deviation**2 + engine.deviation**2)
            predicted[key] = middle if isinstance(predicted[key], float) else round(middle)
            predicted |= _range(key, middle, spread)
        if predicted.get("size_bytes"):
            predicted |= _range("size_bytes", predicted["size_bytes"], Z_90 * SIZE)
        return replace(candidate, predicted=derived(predicted, candidate.rates) | {"quality": self._expected_quality(candidate)})

    def _expected_quality(self, candidate: Candidate) -> dict[str, Any] | None:
        """Each metric with its 90 % range, as the proxy or the same weights elsewhere had it; None: nobody has looked at these weights.

        A perplexity is of one text, and a proxy's is of another: its ratio to the original's stands for it.
        """
        known = self._quality.get(candidate.weights)
        if known is None:
            return None
        return {
            name: {"value": value, "low": value - Z_90 * error, "high": value + Z_90 * error}
            for name, (value, error) in known.items() if name != "perplexity"
        }  # fmt: skip

    def ends(self, candidate: Candidate, key: str, deviations: float) -> tuple[float, float] | None:
        """A figure so many standard deviations below and above what is predicted; None: no prediction."""
        value, timed = self.corrected(candidate).predicted.get(key), _LIKE_LATENCY.get(key, key)
        if value is None or timed not in (*NOISE, "size_bytes"):
            return None
        if timed == "size_bytes":
            return value * math.exp(-deviations * SIZE), value * math.exp(deviations * SIZE)
        engine, kind = self._biases(candidate, timed)
        spread = math.exp(deviations * math.sqrt(NOISE[timed] ** 2 + kind.deviation**2 + engine.deviation**2))
        return value / spread, value * spread

    def misses(self, candidate: Candidate, constraint: Constraint, original: float | None) -> str | None:
        """Why the quality that is believed rules a candidate out; None: it does not. What is coarser is no better."""
        own = [candidate.weights] if candidate.weights in self._quality else []
        finer = [] if own or candidate.rounds else [weights for weights, steps in self._steps.items() if is_coarser(candidate.recipe.steps, steps)]
        return next((reason for weights in own + finer if (reason := self._misses(self._quality[weights], constraint, original))), None)

    def _misses(self, known: Mapping[str, tuple[float, float]], constraint: Constraint, original: float | None) -> str | None:
        metric = next((name for name in _STANDS_FOR.get(constraint.figure, (constraint.figure,)) if name in known), None)
        if metric is None or (constraint.figure == "perplexity" and original is None):
            return None
        ends = known[metric][0], self._best_of(metric, known[metric])
        value, at_best = (self._seen_as(constraint.figure, metric, number, original) for number in ends)
        if constraint.allows(at_best, original) is not False:
            return None
        return f"{constraint.figure} {value:.3f} by proxy, required {constraint.text}"

    def at_best(self, candidate: Candidate, metric: str) -> float | None:
        """The best that a metric of quality is believed to be; None: not known."""
        known = self._quality.get(candidate.weights, {}).get(metric)
        return None if known is None else self._best_of(metric, known)

    @staticmethod
    def _best_of(metric: str, known: tuple[float, float]) -> float:
        value, error = known
        return value - SURE * error if metric in LOWER_IS_BETTER else value + SURE * error

    @staticmethod
    def _seen_as(figure: str, metric: str, value: float, original: float | None) -> float:
        """What a ratio of perplexities says of a figure: a proxy's own perplexity is one of another text."""
        if figure == "perplexity" and original is not None:
            return value * original
        return 1 / value if (figure, metric) == ("quality", "perplexity_ratio") else value

    def _biases(self, candidate: Candidate, key: str) -> tuple[_Normal, _Normal]:
        if (key, candidate.engine) not in self._engines:
            low, high = (candidate.predicted.get(f"{key.removesuffix('_s')}_{end}_s") for end in ("low", "high"))
            told = math.log(high / low) / 2 / Z_90 if key == "latency_s" and low and high else ENGINE[key]
            self._engines[key, candidate.engine] = _Normal(0.0, max(told, KIND[key]))
        place = (key, candidate.engine, candidate.kind)
        if place not in self._kinds:
            self._kinds[place] = _Normal(0.0, KIND[key])
        return self._engines[key, candidate.engine], self._kinds[place]


def _range(key: str, middle: float, spread: float) -> dict[str, float]:
    """The ends of a figure's range.

    >>> _range("latency_s", 1.0, 0.0)
    {'latency_low_s': 1.0, 'latency_high_s': 1.0}
    """
    stem, _, unit = key.rpartition("_")
    return {f"{stem}_low_{unit}": middle * math.exp(-spread), f"{stem}_high_{unit}": middle * math.exp(spread)}


def is_coarser(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether steps are those of others but for fewer bits or larger groups.

    >>> from lighten.recipe import parse_recipe
    >>> one, other = (parse_recipe(f"quantize(rtn, bits=4, group_size={size})").steps for size in (64, 32))
    >>> is_coarser(one, other), is_coarser(other, one), is_coarser(one, one)
    (True, False, False)
    """
    if len(steps) != len(others) or [(a.verb, a.method) for a in steps] != [(b.verb, b.method) for b in others]:
        return False
    coarser = False
    for step, other in zip(steps, others, strict=True):
        mine, theirs = (dict[str, Any](each.arguments) for each in (step, other))
        if mine.keys() != theirs.keys() or any(mine[name] != theirs[name] for name in mine if name not in ("bits", "group_size")):
            return False
        bits = mine.get("bits", 0), theirs.get("bits", 0)
        columns = _columns(mine.get("group_size")), _columns(theirs.get("group_size"))
        if bits[0] > bits[1] or columns[0] < columns[1]:
            return False
        coarser |= bits[0] < bits[1] or columns[0] > columns[1]
    return coarser


def _columns(group_size: Any) -> float:
    """Columns of a group; by channel and by tensor: more than any."""
    return float(group_size) if isinstance(group_size, int | float) else math.inf


def _better(name: str, one: float, other: float) -> bool:
    return one <= other if name in LOWER_IS_BETTER else one >= other
