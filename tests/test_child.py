"""Whatever a worker does, its parent goes on with one line; and no worker outlives its parent.

The stand-in worker answers through the real loop, `lighten.judge.worker.serve`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import lighten.errors
from lighten.errors import LightenError, ModelError
from lighten.judge import child
from lighten.judge.child import Child, WorkerFailed

STAND_IN = """
import ctypes, os, signal, sys, time
from lighten import errors
from lighten.judge import worker

class StandIn:
    def echo(self, **arguments): return arguments
    def pid(self): return {"pid": os.getpid()}
    def environment(self): return {"variables": dict(os.environ)}
    def abort(self): os.abort()
    def segfault(self): ctypes.string_at(0)
    def leave(self, code): print("last words", file=sys.stderr); sys.stderr.flush(); os._exit(code)
    def hang(self): time.sleep(600)
    def grow(self, count):
        held = []
        for _ in range(count):
            held.append(bytearray(os.urandom(1) * 2**24))
            time.sleep(0.02)
        return {"grown": len(held)}
    def chat(self):
        print("a library says hello")
        os.write(1, b"and so does its C part\\n")
        return {"answer": 5}
    def rubbish(self, text): os.write(self.out, text.encode()); return {}
    def refuse(self, kind, text): raise getattr(errors, kind)(text)
    def fail(self, text): raise RuntimeError(text)
    def exhaust(self): raise MemoryError
    def mute(self):
        os.closerange(3, 256)
        time.sleep(600)
    def tick(self, path):
        while True:
            with open(path, "a") as file: file.write(".")
            time.sleep(0.01)

stand_in = StandIn()
stand_in.out = os.dup(1)
worker.die_with_parent(int(sys.argv[1]))
worker.serve(stand_in)
"""
GENEROUS = {"runtime": "torch", "threads": 1, "memory_bytes": 2**40}


def wait_for(true: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Return when `true` holds.

    Raises:
        TimeoutError: it did not in that time.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process ended, be it waited for or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker of many failures in place of the real one."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(child, "WORKER", (sys.executable, str(program)))
    return program


@pytest.fixture
def worker(stand_in: Path) -> Iterator[Child]:
    with Child(**GENEROUS) as found:
        yield found


def failure(worker: Child, command: str, *, timeout_s: float = 60.0, **arguments: object) -> str:
    with pytest.raises(WorkerFailed) as caught:
        worker.ask(command, timeout_s=timeout_s, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the good case ----


def test_it_answers_as_often_as_it_is_asked(worker):
    for number in range(3):
        arguments = {"number": number, "text": "‘Ü’\n\u2028", "nothing": None, "list": [1.5, True]}
        assert worker.ask("echo", timeout_s=60, **arguments) == arguments


def test_a_large_request_and_a_large_answer_arrive_whole(worker):
    texts = [f"{number} " * 500 for number in range(2000)]  # some 5 MB, far more than a pipe holds
    assert worker.ask("echo", timeout_s=60, texts=texts) == {"texts": texts}


def test_what_libraries_print_is_no_answer(worker):
    assert worker.ask("chat", timeout_s=60) == {"answer": 5}


@pytest.mark.parametrize(("runtime", "bound"), [("torch", True), ("torch-compile", True), ("onnxruntime", False), ("openvino", False)])
def test_threads_are_pinned_and_no_hub_is_asked(stand_in, runtime, bound):
    with Child(runtime=runtime, threads=3, memory_bytes=2**40) as worker:
        variables = worker.ask("environment", timeout_s=60)["variables"]
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert ("OMP_PROC_BIND" in variables) is bound
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_the_real_worker_starts_and_refuses_in_its_own_words(tmp_path):
    with Child(**GENEROUS) as worker, pytest.raises(ModelError, match=r"no config\.json"):
        worker.ask("load", timeout_s=60, folder=str(tmp_path), original=str(tmp_path), runtime="torch", setup={})


# ---- failures ----


@pytest.mark.parametrize(("command", "name"), [("abort", "SIGABRT"), ("segfault", "SIGSEGV")])
def test_a_crash_is_one_line_with_its_signal(worker, command, name):
    assert failure(worker, command).startswith(f"the process died ({name})")


def test_an_exit_is_one_line_with_its_code_and_last_words(worker):
    assert failure(worker, "leave", code=3) == "the process died (exit code 3): last words"


def test_a_hang_is_ended_when_its_time_is_up(worker):
    pid = worker.ask("pid", timeout_s=60)["pid"]
    start = time.monotonic()
    assert failure(worker, "hang", timeout_s=1) == "no answer within 1 s"
    assert time.monotonic() - start < 10
    assert is_gone(pid)


def test_one_that_grows_too_large_is_ended(stand_in):
    with Child(runtime="torch", threads=1, memory_bytes=400_000_000) as worker:
        worker.ask("echo", timeout_s=60)
        assert failure(worker, "grow", count=100).startswith("more than 0.4 GB of memory (held ")


def test_one_that_stays_small_enough_is_left_alone(stand_in):
    with Child(runtime="torch", threads=1, memory_bytes=2_000_000_000) as worker:
        assert worker.ask("grow", timeout_s=60, count=20) == {"grown": 20}


def test_out_of_memory_inside_is_said_and_the_worker_lives_on(worker):
    assert failure(worker, "exhaust") == "out of memory"
    assert worker.ask("echo", timeout_s=60) == {}


@pytest.mark.parametrize("text", ["hello\n", "\n", '\n{"two": "lines"}\n', "5\n", "[]\n", '{"half": \n', "Ü\n", "hello"])
def test_rubbish_where_an_answer_stands_is_a_failure(worker, text):
    """What belongs to which question is not known any more, so the worker is ended."""
    pid = worker.ask("pid", timeout_s=60)["pid"]
    assert failure(worker, "rubbish", text=text).startswith("the process answered what is no answer: ")
    assert is_gone(pid)
    failure(worker, "echo")


def test_one_that_closes_its_output_and_hangs_is_ended(worker, monkeypatch):
    monkeypatch.setattr(child, "GRACE_S", 0.5)
    pid = worker.ask("pid", timeout_s=60)["pid"]
    assert failure(worker, "mute").startswith("the process closed its output and did not end")
    assert is_gone(pid)


@pytest.mark.parametrize(
    "kind", [name for name, found in vars(lighten.errors).items() if isinstance(found, type) and issubclass(found, LightenError)]
)
def test_a_users_mistake_stays_one(worker, kind):
    with pytest.raises(LightenError, match=r"^group_size=7 does not divide it\.$") as caught:
        worker.ask("refuse", timeout_s=60, kind=kind, text="group_size=7 does not divide it.")
    assert type(caught.value).__name__ == kind
    assert worker.ask("echo", timeout_s=60) == {}


def test_any_other_error_is_one_line_with_its_kind_and_the_worker_lives_on(worker):
    assert failure(worker, "fail", text="\n  Check 'x' failed at:\nfile.cpp:12\n") == "RuntimeError: Check 'x' failed at:"
    assert failure(worker, "fail", text="") == "RuntimeError: no message"
    assert worker.ask("echo", timeout_s=60) == {}


def test_one_that_dies_between_two_questions_fails_the_second(stand_in):
    """Nothing but the failure is raised, also by what the leaving context closes."""
    with Child(**GENEROUS) as worker:
        pid = worker.ask("pid", timeout_s=60)["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: is_gone(pid))
        assert failure(worker, "echo", text="x").startswith("the process died (SIGKILL)")


def test_one_that_cannot_start_fails_the_first_question(monkeypatch):
    monkeypatch.setattr(child, "WORKER", (sys.executable, "-c", "import sys; sys.exit('no such module')"))
    with Child(**GENEROUS) as worker:
        assert failure(worker, "echo") == "the process died (exit code 1): no such module"


def test_a_dead_worker_may_be_paused_resumed_and_closed(worker):
    pid = worker.ask("pid", timeout_s=60)["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: is_gone(pid))
    assert not worker.alive
    worker.pause()
    worker.resume()
    worker.close()
    worker.close()


def test_close_ends_it_also_while_paused(stand_in):
    worker = Child(**GENEROUS)
    pid = worker.ask("pid", timeout_s=60)["pid"]
    assert worker.alive
    worker.pause()
    worker.close()
    assert is_gone(pid)
    assert not worker.alive


# ---- pausing ----


def test_a_paused_worker_does_nothing_until_it_is_resumed(worker):
    pid = worker.ask("pid", timeout_s=60)["pid"]
    worker.pause()
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    worker.resume()
    assert worker.ask("echo", timeout_s=60, number=1) == {"number": 1}


def test_every_thread_of_a_paused_worker_stands_still(worker, tmp_path):
    ticks = tmp_path / "ticks"
    ticks.touch()
    worker._process.stdin.write((json.dumps({"command": "tick", "path": str(ticks)}) + "\n").encode())
    worker._process.stdin.flush()
    wait_for(lambda: ticks.stat().st_size)
    worker.pause()
    time.sleep(0.1)
    before = ticks.stat().st_size
    time.sleep(0.2)
    assert ticks.stat().st_size == before
    worker.resume()
    wait_for(lambda: ticks.stat().st_size > before)


def test_a_question_to_a_paused_worker_runs_into_its_time(worker):
    worker.ask("echo", timeout_s=60)
    worker.pause()
    assert failure(worker, "echo", timeout_s=1) == "no answer within 1 s"


# ---- the parent's death ----

PARENT = """
import signal, sys, time
from lighten.judge import child
child.WORKER = (sys.executable, sys.argv[1])
worker = child.Child(runtime="torch", threads=1, memory_bytes=2**40)
if sys.argv[2] == "starting":
    print(worker._process.pid, flush=True)
else:
    print(worker.ask("pid", timeout_s=60)["pid"], flush=True)
if sys.argv[2] == "paused":
    worker.pause()
if sys.argv[2] == "busy":
    worker._process.stdin.write(b'{"command": "hang"}\\n')
    worker._process.stdin.flush()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["idle", "busy", "paused", "starting"])
def test_a_killed_parent_takes_its_worker_along(stand_in, state):
    with subprocess.Popen([sys.executable, "-c", PARENT, str(stand_in), state], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    wait_for(lambda: is_gone(pid))


def test_a_worker_whose_parent_died_before_it_was_ready_does_nothing(tmp_path, stand_in):
    """What was asked of it meanwhile stands in the pipe; the next run does the same work, and the two must not meet."""
    trace = tmp_path / "trace"
    program = f"""
import json, os, signal, sys
from lighten.judge import child
child.WORKER = (sys.executable, sys.argv[1])
worker = child.Child(runtime="torch", threads=1, memory_bytes=2**40)
os.kill(worker._process.pid, signal.SIGSTOP)
worker._process.stdin.write((json.dumps({{"command": "tick", "path": {str(trace)!r}}}) + "\\n").encode())
worker._process.stdin.flush()
print(worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(stand_in)], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: is_gone(pid))
    assert not trace.exists()
