"""`trials.jsonl`: one line for each finished trial, a failed one too. What is there is not done again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lighten.errors import OutputError

FILE = "trials.jsonl"


class Journal:
    """The finished trials of one output folder, by id. A line that a kill cut off is no trial and is removed.

    Raises:
        OutputError: the file cannot be read, or holds what no journal holds.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.trials: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return
        whole = 0
        raw = self._path.read_bytes()
        for line in raw.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                trial = json.loads(line)
                self.trials[trial["id"]] = trial
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{self._path}: byte {whole} starts a line that is no trial; move the file away to start anew.") from error
            whole += len(line)
        if whole < len(raw):
            os.truncate(self._path, whole)

    def append(self, trial: dict[str, Any]) -> None:
        """Add a finished trial; when this returns, it outlives a kill."""
        line = (json.dumps(trial, separators=(",", ":")) + "\n").encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if written != len(line):
            raise OutputError(f"{self._path}: the disk is full.")
        self.trials[trial["id"]] = trial
