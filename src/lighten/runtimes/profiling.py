"""Where the time of a run goes, as a runtime's own profiler tells: seconds by what operators are, for as many stretches of runs as are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lighten.cost import Workload
from lighten.device.roofline import OPERATOR_KINDS
from lighten.errors import RuntimeUnavailable
from lighten.model.spec import ModelSpec
from lighten.recipe import Recipe
from lighten.runtimes import profile_onnx, profile_openvino, profile_torch
from lighten.runtimes.session import Floats, Ids, Session, Setup

BETWEEN = OPERATOR_KINDS[-1]
WARM_UP_RUNS = 2
RUNS = 5
LONG_S = 5.0
"""Stretches in all of runs that take long: the profilers write down each operator."""


class SteppedSession(Session, Protocol):
    """A session whose cache is fed one token at a time; see `Stepping`."""

    def prefill(self, input_ids: Ids) -> Floats:
        """Start a generation."""
        ...

    def decode(self, input_ids: Ids) -> Floats:
        """One more step of it."""
        ...


class Recorder(Protocol):
    """A session whose operators are timed."""

    @property
    def session(self) -> SteppedSession:
        """To run; it is not held to the contract of what is too long or empty."""
        ...

    def start(self) -> None:
        """A stretch begins."""

    def stop(self) -> None:
        """It ends."""

    def taken(self) -> list[dict[str, float]]:
        """Seconds by kind of each stretch, without what lies between operators. The last thing that is asked."""


PROFILERS: dict[str, Callable[[Path, ModelSpec, Setup], Recorder]] = {
    "torch": profile_torch.TorchRecorder, "onnxruntime": profile_onnx.OnnxRecorder, "openvino": profile_openvino.OpenVINORecorder,
}  # fmt: skip
"""Runtime → what loads a folder with its profiler on."""
UNTOLD = {
    "torch-compile": "its kernels join operators of several kinds", "llama.cpp": "it has no profiler of operators",
    "ctranslate2": "its package has no profiler",
}  # fmt: skip
"""Runtime → why nobody knows what its operators take."""


@dataclass(frozen=True, kw_only=True)
class OperatorProfile:
    """What one run of a workload took, by kind of operator.

    Attributes:
        kinds: `OPERATOR_KINDS` → seconds; together those of the run.
        seconds: of the run, with the profiler on.
        runs: of which it is the middle one.
    """

    kinds: dict[str, float]
    seconds: float
    runs: int


def profile_runs(recorder: Recorder, phase: str, new_tokens: int, tokens: Sequence[Ids]) -> OperatorProfile:
    """Where the time of the middle one of some runs goes; the first ones of `tokens`, [B, S] each, warm up."""
    walls: list[float] = []
    for number, ids in enumerate(tokens):
        warm = number < WARM_UP_RUNS
        seconds = _run(recorder, phase, ids, new_tokens, recorded=not warm)
        if not warm:
            walls.append(seconds)
            if sum(walls) > LONG_S:
                break
    middle = sorted(range(len(walls)), key=walls.__getitem__)[len(walls) // 2]
    told = recorder.taken()[middle]
    kinds = {kind: told.get(kind, 0.0) for kind in OPERATOR_KINDS}
    kinds[BETWEEN] = max(walls[middle] - sum(kinds.values()), 0.0)
    return OperatorProfile(kinds=kinds, seconds=sum(kinds.values()), runs=len(walls))


def _run(recorder: Recorder, phase: str, ids: Ids, new_tokens: int, *, recorded: bool) -> float:
    """Seconds of one run, as `judge` counts them: of `decode` without the prompt and the token that it gives."""
    session, token = recorder.session, ids
    if phase == "decode":
        token = session.prefill(ids).argmax(-1)[:, None]
    if recorded:
        recorder.start()
    start = time.perf_counter()
    if phase == "encode":
        session.encode(ids, np.ones_like(ids))
    elif phase == "prefill":
        session.logits(ids)
    elif phase == "generate":
        session.generate(ids, new_tokens)
    else:
        for _ in range(new_tokens):
            token = session.decode(token).argmax(-1)[:, None]
    seconds = time.perf_counter() - start
    if recorded:
        recorder.stop()
    return seconds


def require_profiler(recipe: Recipe, workload: Workload) -> None:
    """Raises:
    RuntimeUnavailable: what a run of the recipe takes is not told by operator: its runtime has no profiler, or none of a device; or a run is more
        than the passes that are profiled.
    """
    if recipe.runtime not in PROFILERS:
        known = ", ".join(PROFILERS)
        raise RuntimeUnavailable(f"runtime {recipe.runtime} does not tell what its operators take: {UNTOLD[recipe.runtime]}; these do: {known}.")
    if recipe.device is not None:
        raise RuntimeUnavailable(f"what operators take on device={recipe.device} is not told; it is on the CPU.")
    if recipe.speculation is not None:
        raise RuntimeUnavailable("what operators take is told of plain decoding; leave speculate out.")
    if workload.lengths:
        raise RuntimeUnavailable("what operators take is told of one batch of one length; leave --lengths text out.")


def open_recorder(runtime: str, folder: Path, spec: ModelSpec, setup: Setup) -> Recorder:
    """What a folder holds, loaded with the profiler on of a runtime of `PROFILERS`.

    Raises:
        RuntimeUnavailable: the folder holds nothing that it runs.
    """
    return PROFILERS[runtime](folder, spec, setup)
