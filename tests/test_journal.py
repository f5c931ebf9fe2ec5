"""The journal outlives a kill at any byte, and takes nobody else's file for its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.choose.journal import FILE, Journal
from lighten.errors import OutputError

TRIALS: list[dict[str, Any]] = [
    {"id": "a1", "recipe": 'quantize(rtn, targets="mlp|head")', "status": "measured", "measured": {"latency_s": 0.25, "quality": {}}},
    {"id": "b2", "recipe": "", "status": "failed", "failure": "it died:\n ‘Ü’ \u2028 \x1b[2J", "measured": None},
    {"id": "c3", "recipe": "prune(magnitude, sparsity=0.5)", "status": "measured", "measured": {"latency_s": 1e-9, "quality": None}},
]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def written(folder: Path, trials: list[dict[str, Any]]) -> bytes:
    journal = Journal(folder)
    for trial in trials:
        journal.append(trial)
    return (folder / FILE).read_bytes()


def test_a_new_folder_has_no_trials_and_gets_no_file(tmp_path):
    assert Journal(tmp_path).trials == {}
    assert list(tmp_path.iterdir()) == []


def test_what_was_appended_is_there_at_once_and_in_the_next_run(tmp_path):
    journal = Journal(tmp_path)
    for count, trial in enumerate(TRIALS, start=1):
        journal.append(trial)
        assert list(journal.trials.values()) == TRIALS[:count]
        assert list(Journal(tmp_path).trials.values()) == TRIALS[:count]


def test_one_line_a_trial(tmp_path):
    lines = written(tmp_path, TRIALS).decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == TRIALS
    assert lines[-1] == ""


@given(contents=st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=4))
def test_whatever_a_trial_holds_comes_back(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("journal")
    trials = [content | {"id": str(number)} for number, content in enumerate(contents)]
    journal = Journal(folder)
    for trial in trials:
        journal.append(trial)
    assert list(Journal(folder).trials.values()) == trials


def test_a_kill_at_any_byte_loses_at_most_the_last_line(tmp_path):
    """Every prefix of the file is what a kill may leave: the whole lines of it are found, the rest is gone, and the journal goes on."""
    raw = written(tmp_path, TRIALS)
    for length in range(len(raw) + 1):
        (tmp_path / FILE).write_bytes(raw[:length])
        whole = raw[:length].count(b"\n")
        journal = Journal(tmp_path)
        assert list(journal.trials.values()) == TRIALS[:whole]
        assert (tmp_path / FILE).read_bytes() == raw[: raw[:length].rfind(b"\n") + 1]
        for trial in TRIALS[whole:]:
            journal.append(trial)
        assert (tmp_path / FILE).read_bytes() == raw


@pytest.mark.parametrize(
    "line", ["hello", "{}", "[]", "5", "null", '"id"', '{"id": []}', '{"id": 5}', "{'id': 'a'}", "", "\r", "\x00\xff", '{"id": "a"']
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_line_that_is_no_trial_is_refused_with_its_place_and_left_as_it_is(tmp_path, line, place):
    raw = written(tmp_path, TRIALS)
    lines = raw.splitlines(keepends=True)
    lines.insert(place, line.encode("latin-1") + b"\n")
    (tmp_path / FILE).write_bytes(b"".join(lines))
    with pytest.raises(OutputError) as caught:
        Journal(tmp_path)
    start = sum(map(len, lines[:place]))
    assert str(caught.value) == f"{tmp_path / FILE}: byte {start} starts a line that is no trial; move the file away to start anew."
    assert (tmp_path / FILE).read_bytes() == b"".join(lines)


def test_a_carriage_return_ends_no_line(tmp_path):
    """What an editor may leave between two values of a line is blank to JSON; the trials after it are not cut off."""
    raw = written(tmp_path, TRIALS)
    (tmp_path / FILE).write_bytes(raw.replace(b',"recipe"', b',\r"recipe"').replace(b"\n", b"\r\n"))
    assert list(Journal(tmp_path).trials.values()) == TRIALS


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(OutputError, match=f"{FILE} cannot be read: Is a directory"):
        Journal(tmp_path)


def test_a_full_disk_is_said_and_what_was_written_of_the_line_is_removed_by_the_next_run(tmp_path, monkeypatch):
    raw = written(tmp_path, TRIALS[:2])
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[: len(line) // 2]))
    journal = Journal(tmp_path)
    with pytest.raises(OutputError, match="the disk is full"):
        journal.append(TRIALS[2])
    assert "c3" not in journal.trials
    assert list(Journal(tmp_path).trials.values()) == TRIALS[:2]
    assert (tmp_path / FILE).read_bytes() == raw


def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(handle: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OutputError, match=f"{FILE} cannot be written: No space left on device."):
        Journal(tmp_path).append(TRIALS[0])


def test_a_finished_append_outlives_a_kill(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from lighten.choose.journal import Journal
journal = Journal(Path({str(tmp_path)!r}))
for number in range(5):
    journal.append({{"id": str(number)}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert list(Journal(tmp_path).trials) == ["0", "1", "2", "3", "4"]
