"""Measure this machine once: one child process for each engine, so that a crash or a hang is one failed line."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.device.engines.bench import required_modules
from lighten.device.environment import pinned_environment
from lighten.device.profile import ENGINES, Bandwidth, EngineProfile, Machine, Profile, engine_from_json
from lighten.errors import DeviceError

DEFAULT_ENGINES = tuple(name for name in ENGINES if not name.startswith("torch-compile/"))
"""torch-compile costs 1 to 3 minutes of compilation for each type on 2 cores: it is measured on request alone, else not known."""
TIMEOUT_S = {"torch-compile": 600.0}
DEFAULT_TIMEOUT_S = 300.0
BUSY = 0.25
"""Above this share of disturbed points the log says that the machine was busy."""
PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "ctranslate2", "numpy")


class ChildFailed(Exception):
    """A child process crashed, hung or wrote no result; its text is the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    threads: int
    folder: Path
    log: Callable[[str], None]


def probe(*, threads: int, log: Callable[[str], None], engines: Sequence[str] | None = None) -> Profile:
    """Measure bandwidth and engines with `threads` pinned threads; by default every installed engine except torch-compile.

    Args:
        log: gets one line for each thing measured.
        engines: of `ENGINES`; one that is asked for but not installed is a failure, not silently left out.

    Raises:
        DeviceError: an unknown engine, none installed, or not at least one thread.
    """
    from lighten.device.calibration import calibrate  # imports numpy, which predictions do without

    _check(threads, engines)
    chosen = installed_engines() if engines is None else list(engines)
    if not chosen:
        raise DeviceError("no runtime is installed that could be measured; pip install 'lighten[all]', or one of torch, onnx, openvino.")
    measured: dict[str, EngineProfile] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lighten-probe-") as folder:
        run = _Run(threads=threads, folder=Path(folder), log=log)
        bandwidth = _measure_bandwidth(run)
        for number, name in enumerate(chosen, 1):
            start = time.perf_counter()
            try:
                measured[name] = calibrate(_measure_engine(run, name), bandwidth)
                line = _summary(measured[name])
            except ChildFailed as error:
                failures[name] = str(error)
                line = f"failed: {error}"
            log(f"[{number}/{len(chosen)}] {name}: {line} ({time.perf_counter() - start:.0f} s)")
    return Profile(
        machine=this_machine(), threads=threads, bandwidth=bandwidth, engines=measured, failures=failures, versions=_versions(),
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )  # fmt: skip


def installed_engines() -> list[str]:
    """The engines that are measured by default, of the runtimes that are installed."""
    return [name for name in DEFAULT_ENGINES if not _missing(name)]


def this_machine() -> Machine:
    """CPU, cores that this process may use, memory and system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpu=cpu_name(), cores=cores, memory_bytes=_memory_bytes(), os=platform.platform())


def _check(threads: int, engines: Sequence[str] | None) -> None:
    if threads < 1:
        raise DeviceError(f"threads={threads} is not positive.")
    unknown = [name for name in engines or () if name not in ENGINES]
    if unknown:
        raise DeviceError(f"no engine {', '.join(unknown)}; engines: {', '.join(ENGINES)}.")


def _missing(engine: str) -> list[str]:
    return [name for name in required_modules(engine) if importlib.util.find_spec(name) is None]


def _measure_bandwidth(run: _Run) -> tuple[Bandwidth, ...]:
    try:
        found = _child(run, "bandwidth", environment=pinned_environment(1, runtime="numpy"))
    except ChildFailed as error:
        raise DeviceError(f"memory bandwidth could not be measured: {error}") from error
    points = tuple(Bandwidth(**each) for each in found)
    run.log(f"memory: {points[0].read_bytes_per_s / 1e9:.0f} GB/s read from caches, {points[-1].read_bytes_per_s / 1e9:.0f} GB/s beyond them")
    return points


def _measure_engine(run: _Run, name: str) -> EngineProfile:
    missing = _missing(name)
    if missing:
        raise ChildFailed(f"{', '.join(missing)} not installed")
    found = _child(run, "engine", "--engine", name)
    tiny, large = found.pop("tiny"), found.pop("large")
    memory = _child(run, "memory", "--engine", name, "--tiny", tiny, "--large", large[0], "--large-bytes", str(large[1]))
    data: dict[str, Any] = {**found, **memory, "calibration": {}}
    try:
        return engine_from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ChildFailed(f"its figures make no sense ({error})") from error


def _child(run: _Run, task: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """What one child process wrote.

    Raises:
        ChildFailed: it crashed, ran out of time, or wrote nothing that can be read.
    """
    runtime = arguments[1].split("/")[0] if arguments else ""
    out, said = run.folder / "found.json", run.folder / "stderr.txt"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lighten.device.probe_child", task, "--threads", str(run.threads), "--out", str(out)]
    command += ["--parent", str(os.getpid()), *arguments]
    variables = {**os.environ, **(environment or pinned_environment(run.threads, runtime=runtime))}
    code = _wait(command, variables, said, TIMEOUT_S.get(runtime, DEFAULT_TIMEOUT_S))
    if code != 0:
        raise ChildFailed(_reason(code, said.read_text(encoding="utf-8", errors="replace")))
    try:
        return json.loads(out.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ChildFailed(f"no result ({error})") from error


def _wait(command: list[str], variables: dict[str, str], said: Path, limit_s: float) -> int:
    """Exit code of a child in a process group of its own: compilers that it started end with it."""
    with said.open("wb") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=variables, start_new_session=True)
    try:
        return child.wait(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise ChildFailed(f"no answer within {limit_s:.0f} s") from error
    finally:
        if child.poll() is None:
            _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


def _reason(code: int, stderr: str) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit code {code}"


def _summary(engine: EngineProfile) -> str:
    linears = [sample for sample in engine.samples if sample.kind == "linear"]
    best = max((2 * each.rows * each.shape[0] * each.shape[1] / each.seconds for each in linears), default=0.0)
    spread = engine.calibration.spread
    text = f"up to {best / 1e9:.0f} GFLOP/s, {engine.operator_overhead_s * 1e6:.1f} µs an operator"
    text += f", blocks within ×/÷ {2.718281828**spread:.2f}" if spread is not None else ""
    if (engine.disturbed_ratio or 0) > BUSY:
        text += f"; other processes disturbed {engine.disturbed_ratio:.0%} of its points: probe again when the machine is idle"
    return text


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # 40 ms that predictions do without

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # Windows: not known
