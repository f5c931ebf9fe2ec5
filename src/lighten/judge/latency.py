"""Time two workers in turn, so that a machine that changes its speed changes it for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lighten.cost import Workload
from lighten.judge.child import Child
from lighten.runtimes.session import Accepted

WARM_UP_RUNS = 2
ROUNDS = (5, 25)
BUDGET_S = 12.0
SHORT_S = 0.1
"""A run shorter than this is preceded, in each turn, by one that is not counted: the other worker had the caches."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of one workload: the median and the quartiles of `samples`.

    Attributes:
        speedup: the median over rounds of baseline seconds / own seconds; None where nothing ran beside it.
        baseline_s: the baseline's own median in these rounds; None likewise.
        first_s: median seconds until a generation's first token; None of other workloads.
        accepted: of all counted runs together, where it speculates; None: it does not.
    """

    samples: tuple[float, ...]
    speedup: float | None
    baseline_s: float | None = None
    first_s: float | None = None
    accepted: Accepted | None = None

    @property
    def quartiles(self) -> tuple[float, float, float]:
        first, median, third = np.percentile(self.samples, (25, 50, 75))
        return float(first), float(median), float(third)


def time_beside(
    candidate: Child, baseline: Child | None, workload: Workload, *, timeout_s: float, warm: bool, prompts: Path | None = None
) -> Latency:  # fmt: skip
    """The candidate's latency, its runs in turn with the baseline's, each worker stopped while the other runs.

    Args:
        prompts: an .npy of [N, S] tokens of real text that the runs go on with; None: random ones.
        warm: whether the baseline has been warmed up in this process already.
    """
    runner = _Runner(workload, timeout_s, prompts)
    first = runner.turn(candidate, WARM_UP_RUNS)
    candidate_s = min(first)
    baseline_s = 0.0
    if baseline is not None:
        candidate.pause()
        baseline.resume()
        baseline_s = min(runner.turn(baseline, 1 if warm else WARM_UP_RUNS))
        baseline.pause()
        candidate.resume()
    rounds = min(max(ROUNDS[0], int(BUDGET_S / (candidate_s + baseline_s))), ROUNDS[1])
    samples, beside, firsts = [], [], []
    accepted: list[Accepted] = []
    for _ in range(rounds):
        own = runner.counted(candidate, candidate_s)
        samples.append(own)
        firsts += runner.firsts
        accepted += runner.accepted
        if baseline is not None:
            candidate.pause()
            baseline.resume()
            beside.append(runner.counted(baseline, baseline_s))
            baseline.pause()
            candidate.resume()
    first_s = _median(firsts) if firsts else None
    if not beside:
        return Latency(samples=tuple(samples), speedup=None, first_s=first_s, accepted=together(accepted))
    ratios = [other / own for other, own in zip(beside, samples, strict=True)]
    return Latency(samples=tuple(samples), speedup=_median(ratios), baseline_s=_median(beside), first_s=first_s, accepted=together(accepted))


def together(runs: Sequence[Accepted]) -> Accepted | None:
    """Several generations as one; None where none speculated."""
    if not runs:
        return None
    return Accepted(**{field.name: sum(getattr(run, field.name) for run in runs) for field in fields(Accepted)})


class _Runner:
    """Asks for runs, each on tokens that no run had before; of a text that is too short for that, on its prompts again."""

    def __init__(self, workload: Workload, timeout_s: float, prompts: Path | None) -> None:
        self._asked: dict[str, Any] = {key: getattr(workload, key) for key in ("phase", "batch_size", "seq_len", "new_tokens")}
        if workload.lengths:
            self._asked["lengths"] = workload.lengths
        if prompts is not None:
            self._asked["prompts"] = str(prompts)
        self._timeout_s = timeout_s
        self._seed = 0
        self.firsts: list[float] = []
        """Seconds until the first token, of the last turn's runs."""
        self.accepted: list[Accepted] = []
        """How proposals went, of the last turn's runs."""

    def turn(self, child: Child, runs: int) -> list[float]:
        seeds = list(range(self._seed, self._seed + runs))
        self._seed += runs
        answer: dict[str, Any] = child.ask("time", timeout_s=self._timeout_s, seeds=seeds, **self._asked)
        seconds: list[float] = answer["seconds"]
        self.firsts = answer.get("first_seconds", [])
        self.accepted = [Accepted(**found) for found in answer.get("accepted", [])]
        return seconds

    def counted(self, child: Child, expected_s: float) -> float:
        """The median of one turn, which is one run, or several where a run is short."""
        if expected_s >= SHORT_S:
            return self.turn(child, 1)[0]
        runs = min(20, math.ceil(SHORT_S / max(expected_s, 1e-6)))
        return _median(self.turn(child, runs + 1)[1:])


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
