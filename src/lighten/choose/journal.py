"""`trials.jsonl`: one line for each finished trial, a failed one too, and for what else was found out. What is there is not done again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lighten.errors import OutputError

FILE = "trials.jsonl"


class Journal:
    """The finished trials of one output folder, by id. A line that a kill cut off is no trial and is removed.

    Args:
        shared: of the folder where all runs of this user leave theirs; a line that another is just writing is left alone.

    Raises:
        OutputError: the file cannot be read, or holds what no journal holds.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self._path = folder / FILE
        self.trials: dict[str, dict[str, Any]] = {}
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"{self._path} cannot be read: {error.strerror}.") from error
        *lines, torn = raw.split(b"\n")
        start = 0
        for line in lines:
            try:
                trial = _trial(line)
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{self._path}: byte {start} starts a line that is no trial; move the file away to start anew.") from error
            self.trials[trial["id"]] = trial
            start += len(line) + 1
        if torn and not shared:
            os.truncate(self._path, start)

    def append(self, trial: dict[str, Any]) -> None:
        """Add a finished trial; when this returns, it outlives a kill.

        Raises:
            OutputError: it cannot be written.
        """
        line = (json.dumps(trial, separators=(",", ":")) + "\n").encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                written = os.write(handle, line)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}.") from error
        if written != len(line):
            raise OutputError(f"{self._path}: the disk is full.")
        self.trials[trial["id"]] = trial


def _trial(line: bytes) -> dict[str, Any]:
    trial: dict[str, Any] = json.loads(line)
    if not isinstance(trial["id"], str):
        raise TypeError(f"id {trial['id']!r}")
    return trial
