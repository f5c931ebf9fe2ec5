"""Where trials are carried out: here, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lighten.choose.trial import Bench, Candidate

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to carry out: measure the original, find a cheap proxy of a candidate's quality, try it, run it in turn with another, or find out
    what its operators take."""

    kind: Literal["original", "proxy", "trial", "final", "profile"]
    candidate: Candidate
    beside: Candidate | None = None


class Engine(Protocol):
    """Carries out jobs, some at once where it has the room."""

    @property
    def free(self) -> bool:
        """Whether one more job can start now."""

    @property
    def running(self) -> int:
        """Jobs that were started and not yet given back."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def finished(self) -> list[tuple[Job, Record]]:
        """At least one job that has ended, and its record; waits for it."""

    def close(self) -> None:
        """End what runs."""


class Local:
    """In processes of this machine, one job at a time: two would disturb each other's times."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._jobs: list[Job] = []

    @property
    def free(self) -> bool:
        """See `Engine`."""
        return not self._jobs

    @property
    def running(self) -> int:
        """See `Engine`."""
        return len(self._jobs)

    def start(self, job: Job) -> None:
        """See `Engine`. It is carried out when its record is asked for."""
        self._jobs.append(job)

    def finished(self) -> list[tuple[Job, Record]]:
        """See `Engine`."""
        job = self._jobs[0]
        record = carry_out(self._bench, job)
        self._jobs.clear()
        return [(job, record)]

    def close(self) -> None:
        """See `Engine`."""
        self._bench.close()


def carry_out(bench: Bench, job: Job) -> Record:
    """A job's record; what goes wrong there is in it."""
    if job.beside is not None:
        return bench.final(job.candidate, job.beside)
    done: dict[str, Callable[[Candidate], Record]] = {
        "original": bench.original, "proxy": bench.proxy, "trial": bench.run, "profile": bench.profile,
    }  # fmt: skip
    return done[job.kind](job.candidate)
