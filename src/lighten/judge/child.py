"""Hold a worker: start it with pinned threads, ask it, and end it when it is too slow or too large. A crash there is a failure here, no more."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import psutil

import lighten.errors
from lighten.device.environment import pinned_environment
from lighten.errors import LightenError

WORKER: tuple[str, ...] = (sys.executable, "-m", "lighten.judge.worker")
WATCH_S = 0.1
GRACE_S = 10.0
"""How long a process that closed its output may take to end."""


class WorkerFailed(Exception):
    """The child crashed, hung, grew too large or could not do what it was asked; the text says which."""


class Child:
    """A worker process; a context manager.

    Args:
        runtime: whose threads are pinned.
        memory_bytes: the resident size at which it is ended.
        command: another program that answers the same questions.
    """

    def __init__(self, *, runtime: str, threads: int, memory_bytes: int, command: Sequence[str] | None = None) -> None:
        environment = os.environ | pinned_environment(threads, runtime=runtime) | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._memory_bytes = memory_bytes
        self._stopped_for: str | None = None
        self._process = subprocess.Popen(
            command or [*WORKER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
        self._errors: list[bytes] = []
        threading.Thread(target=self._drain, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, command: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            WorkerFailed: a crash, no answer in time, too much memory, or an error of the runtime.
            LightenError: a user's mistake that the worker found.
        """
        assert self._process.stdin is not None, "opened as a pipe"
        try:
            self._process.stdin.write((json.dumps({"command": command, **arguments}) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            self._fail()
        answer = self._parse(self._read_line(timeout_s))
        if "error" in answer:
            mistake = getattr(lighten.errors, answer["kind"], None)
            raise (mistake if mistake and issubclass(mistake, LightenError) else WorkerFailed)(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def pause(self) -> None:
        """Stop its threads, so that nothing of it runs while another is timed."""
        if self.alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(self._process.pid).suspend()

    def resume(self) -> None:
        """Let it run again."""
        if self.alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(self._process.pid).resume()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a question that the dead process never read
                    stream.close()

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line) if line.count(b"\n") == 1 else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._stopped_for = f"the process answered what is no answer: {line[:100].decode(errors='replace').strip()!r}"
            self._process.kill()
            self._fail()
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None, "opened as a pipe"
        deadline, line = time.monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._stopped_for = f"no answer within {timeout_s:.0f} s"
                    self._process.kill()
                    self._fail()
                piece = os.read(self._process.stdout.fileno(), 2**20)
                if not piece:
                    self._fail()
                line += piece
        return line

    def _fail(self) -> NoReturn:
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._stopped_for = "the process closed its output and did not end"
            self._process.kill()
            code = self._process.wait()
        time.sleep(WATCH_S)  # the last words of stderr
        said = b"".join(self._errors).decode(errors="replace").strip().splitlines()
        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise WorkerFailed(self._stopped_for or f"the process died ({died}){': ' + said[-1][:200] if said else ''}")

    def _drain(self) -> None:
        assert self._process.stderr is not None, "opened as a pipe"
        for line in self._process.stderr:
            self._errors = [*self._errors[-20:], line]
        self._process.stderr.close()

    def _watch(self) -> None:
        while self.alive:
            try:
                held = psutil.Process(self._process.pid).memory_info().rss
            except psutil.Error:
                return
            if held > self._memory_bytes:
                self._stopped_for = f"more than {self._memory_bytes / 1e9:.1f} GB of memory (held {held / 1e9:.1f} GB)"
                self._process.kill()
                return
            time.sleep(WATCH_S)
