"""Two workers timed in turn: on made-up workers whose speed is known, so that medians and ratios are too. No clock is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.cost import Workload
from lighten.judge.child import WorkerFailed
from lighten.judge.latency import BUDGET_S, ROUNDS, SHORT_S, WARM_UP_RUNS, Latency, time_beside

WORKLOAD = Workload(phase="generate", batch_size=3, seq_len=17, new_tokens=5)


class Machine:
    """What all workers share: the time that has passed, and who was asked for what."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.children: list[MadeUp] = []
        self.turns: list[tuple[str, list[int]]] = []


class MadeUp:
    """A worker of known speed.

    Args:
        seconds: of one run, by the machine's time.
        cold: what the first run of a turn takes beside that, in shares of it.
    """

    def __init__(self, machine: Machine, name: str, seconds: Callable[[float], float], *, paused: bool = False, cold: float = 0.0) -> None:
        self.machine, self.name, self.seconds, self.paused, self.cold = machine, name, seconds, paused, cold
        self.asked: list[dict[str, Any]] = []
        self.dies_at: int | None = None
        machine.children.append(self)

    def ask(self, command: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        assert command == "time"
        assert not self.paused, f"{self.name} was asked while it was paused"
        assert all(other.paused for other in self.machine.children if other is not self), f"something else ran while {self.name} was timed"
        if self.dies_at == len(self.asked):
            raise WorkerFailed("it died")
        self.asked.append(arguments | {"timeout_s": timeout_s})
        self.machine.turns.append((self.name, arguments["seeds"]))
        found = []
        for run, _ in enumerate(arguments["seeds"]):
            found.append(self.seconds(self.machine.now_s) * (1 + self.cold * (run == 0)))
            self.machine.now_s += found[-1]
        return {"seconds": found}

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


def steady(seconds: float) -> Callable[[float], float]:
    return lambda now_s: seconds


def pair(candidate: Callable[[float], float], baseline: Callable[[float], float], **more: float) -> tuple[Machine, MadeUp, MadeUp]:
    """A candidate that runs and an original that is paused, as `Judge` holds them."""
    machine = Machine()
    return machine, MadeUp(machine, "candidate", candidate, **more), MadeUp(machine, "baseline", baseline, paused=True, **more)


def timed(candidate: MadeUp, baseline: MadeUp | None, *, warm: bool = False, timeout_s: float = 60.0) -> Latency:
    return time_beside(candidate, baseline, WORKLOAD, timeout_s=timeout_s, warm=warm)


seconds = st.floats(1e-5, 100)


@given(seconds, seconds)
def test_median_and_ratio_of_steady_workers_are_theirs(own, original):
    _, candidate, baseline = pair(steady(own), steady(original))
    found = timed(candidate, baseline)
    assert found.quartiles == pytest.approx((own, own, own))
    assert found.speedup == pytest.approx(original / own)


@given(seconds, st.one_of(st.none(), seconds), st.booleans())
def test_rounds_are_bounded_and_as_many_as_fit_the_budget(own, original, warm):
    machine, candidate, baseline = pair(steady(own), steady(original or 1.0))
    rounds = len(timed(candidate, baseline if original else None, warm=warm).samples)
    assert ROUNDS[0] <= rounds <= ROUNDS[1]
    together = own + (original or 0.0)
    assert rounds == ROUNDS[0] or rounds * together <= BUDGET_S * (1 + 1e-9)
    assert rounds == ROUNDS[1] or (rounds + 1) * together >= BUDGET_S * (1 - 1e-9)
    # a turn is one run, or short ones up to SHORT_S with one more than is counted and one more for rounding up
    assert machine.now_s <= (ROUNDS[1] + 1) * (3 + 3) * max(own, original or 0.0, SHORT_S) + 2 * WARM_UP_RUNS * together


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("own", "original"), [(0.5, 1.0), (0.001, 0.004), (0.001, 2.0), (2.0, 0.001)])
def test_they_take_turns_and_no_run_meets_another(own, original, warm):
    """`MadeUp.ask` holds that nothing else runs meanwhile."""
    machine, candidate, baseline = pair(steady(own), steady(original))
    timed(candidate, baseline, warm=warm)
    names = [name for name, _ in machine.turns]
    assert names[0] == "candidate"
    assert all(one != other for one, other in pairwise(names))
    assert len(candidate.asked) == len(baseline.asked)


def test_at_the_end_the_original_is_paused_and_the_candidate_is_not():
    _, candidate, baseline = pair(steady(1.0), steady(2.0))
    timed(candidate, baseline)
    assert (candidate.paused, baseline.paused) == (False, True)


def test_where_the_candidate_dies_the_original_is_left_paused():
    for turn in range(4):
        _, candidate, baseline = pair(steady(1.0), steady(2.0))
        candidate.dies_at = turn
        with pytest.raises(WorkerFailed, match="it died"):
            timed(candidate, baseline)
        assert baseline.paused


@pytest.mark.parametrize(("warm", "runs"), [(False, WARM_UP_RUNS), (True, 1)])
def test_warm_up_runs_are_not_counted(warm, runs):
    """Whatever the first runs take: a compilation, say."""

    def first_slow() -> Callable[[float], float]:
        left = [50.0]
        return lambda now_s: left.pop() if left else 1.0

    machine, candidate, baseline = pair(first_slow(), first_slow())
    found = timed(candidate, baseline, warm=warm)
    assert [len(seeds) for _, seeds in machine.turns[:2]] == [WARM_UP_RUNS, runs]
    assert set(found.samples) == {1.0}
    assert found.speedup == 1.0


@given(st.floats(1e-4, SHORT_S / 3), st.floats(0.1, 20))
def test_of_short_runs_the_first_of_each_turn_is_not_counted(own, cold):
    """The other worker had the caches."""
    _, candidate, baseline = pair(steady(own), steady(2 * own), cold=cold)
    found = timed(candidate, baseline)
    assert found.quartiles == pytest.approx((own, own, own))
    assert found.speedup == pytest.approx(2)


def test_a_turn_of_short_runs_is_the_median_of_those_after_the_first():
    def three(now_s: float) -> float:
        return next(runs)

    runs = iter([0.06, 0.06] + [0.5, 0.06, 0.08] * ROUNDS[1])
    machine = Machine()
    assert timed(MadeUp(machine, "candidate", three), None).samples == (0.07,) * ROUNDS[1]


@pytest.mark.parametrize(("own", "counted"), [(SHORT_S, 1), (SHORT_S * 1.5, 1), (SHORT_S / 2, 2), (SHORT_S / 7.5, 8), (SHORT_S / 1000, 20)])
def test_a_turn_lasts_long_enough_to_be_timed(own, counted):
    _, candidate, baseline = pair(steady(own), steady(own))
    timed(candidate, baseline)
    assert {len(asked["seeds"]) for asked in candidate.asked[1:]} == {counted + (own < SHORT_S)}


def test_a_machine_that_slows_down_changes_the_ratio_of_no_pair():
    """It gets three times slower over the measurement: both clocks triple, and the ratio stays within what one round drifts."""

    def drifting(seconds: float) -> Callable[[float], float]:
        return lambda now_s: seconds * (1 + 2 * min(now_s / 40, 1))

    _, candidate, baseline = pair(drifting(0.2), drifting(0.6))
    found = timed(candidate, baseline)
    assert max(found.samples) / min(found.samples) > 1.5
    assert found.speedup == pytest.approx(3, rel=0.05)


def test_one_disturbed_round_changes_neither_median():
    def disturbed(seconds: float, at: int) -> Callable[[float], float]:
        runs = iter(range(10**6))
        return lambda now_s: seconds * (30 if next(runs) == at else 1)

    _, candidate, baseline = pair(disturbed(0.4, 5), disturbed(0.8, 7))
    found = timed(candidate, baseline)
    assert found.quartiles[1] == 0.4
    assert found.speedup == 2.0


def test_every_run_has_tokens_that_no_run_had_before():
    machine, candidate, baseline = pair(steady(0.03), steady(0.2))
    timed(candidate, baseline)
    seeds = [seed for _, found in machine.turns for seed in found]
    assert len(seeds) == len(set(seeds))


def test_the_workload_and_the_time_limit_are_passed_on():
    _, candidate, baseline = pair(steady(1.0), steady(1.0))
    timed(candidate, baseline, timeout_s=7.0)
    for asked in candidate.asked + baseline.asked:
        assert {key: asked[key] for key in ("phase", "batch_size", "seq_len", "new_tokens", "timeout_s")} == {
            "phase": "generate", "batch_size": 3, "seq_len": 17, "new_tokens": 5, "timeout_s": 7.0,
        }  # fmt: skip


def test_without_an_original_there_is_no_ratio_and_no_pause():
    machine = Machine()
    candidate = MadeUp(machine, "candidate", steady(1.0))
    found = timed(candidate, None)
    assert found.speedup is None
    assert found.samples == (1.0,) * math.floor(BUDGET_S)
    assert not candidate.paused


@given(st.lists(seconds, min_size=1, max_size=30))
def test_quartiles_are_in_order_and_within_the_samples(samples):
    first, median, third = Latency(samples=tuple(samples), speedup=None).quartiles
    assert min(samples) <= first <= median <= third <= max(samples)
