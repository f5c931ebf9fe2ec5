"""What each step of a run took: its seconds, and the most memory that the process held meanwhile; kept through an end and a resumption.

A step that is done when its tensors are asked for takes its time inside of a later one: what runs inside counts for itself, and not for what is
around it, so that the seconds of all steps add up to the run's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lighten.compress.memory_plan import peak_rss_bytes, reset_peak

WRITING = "writing"
"""What comes after the last step: the artifact is written, and read back."""


class Clock:
    """Counts what runs inside of `counting`.

    Args:
        before: what processes that ended before this one counted, as `spent` gave it.
        now: seconds from some moment on.
    """

    def __init__(self, before: Mapping[str, Mapping[str, Any]] | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seconds = {what: float(said["seconds"]) for what, said in (before or {}).items()}
        self._peaks: dict[str, int] = {what: said["peak_bytes"] for what, said in (before or {}).items() if said["peak_bytes"] is not None}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """Count what is done inside for `what`; what is around it waits. Memory is told apart for the outermost alone."""
        self._turn()
        if not self._running:
            reset_peak()
        self._running.append(what)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def spent(self) -> dict[str, dict[str, Any]]:
        """What → `seconds` and `peak_bytes` so far; the latter None where it only ran inside of others, or where the system does not tell."""
        self._turn()
        return {what: {"seconds": seconds, "peak_bytes": self._peaks.get(what)} for what, seconds in self._seconds.items()}

    @property
    def seconds(self) -> float:
        """Of all together, those of ended processes too."""
        self._turn()
        return sum(self._seconds.values())

    @property
    def peak_bytes(self) -> int | None:
        """The most of all; None where the system does not tell."""
        return max(self._peaks.values(), default=None)

    def _turn(self) -> None:
        now = self._now()
        if self._running:
            self._seconds[self._running[-1]] = self._seconds.get(self._running[-1], 0.0) + now - self._since
            if (peak := peak_rss_bytes() if len(self._running) == 1 else None) is not None:
                self._peaks[self._running[0]] = max(peak, self._peaks.get(self._running[0], 0))
        self._since = now
