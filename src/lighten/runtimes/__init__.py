"""Stage 8: run it. One contract, one module a runtime, each imported only when it is used."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lighten.errors import RuntimeUnavailable
from lighten.model.spec import ModelSpec
from lighten.recipe.targets import RUNTIMES
from lighten.runtimes import ctranslate2_runtime, llama_cpp, onnx_runtime, openvino_runtime, torch_compile, torch_eager
from lighten.runtimes.session import Checked, Runtime, Session, Setup
from lighten.runtimes.speculate import speculating

MODULES: dict[str, Runtime] = {
    "torch": torch_eager, "torch-compile": torch_compile, "onnxruntime": onnx_runtime, "openvino": openvino_runtime,
    "llama.cpp": llama_cpp, "ctranslate2": ctranslate2_runtime,
}  # fmt: skip
"""Runtime → its module, by the names that recipes use."""


def missing_packages(runtime: str, *, running: bool = True) -> list[str]:
    """Packages that a runtime needs and that are not installed; none is imported to find out.

    Args:
        running: to run its artifacts, not to build them alone.
    """
    wanted = RUNTIMES[runtime].builds + (RUNTIMES[runtime].runs if running else ())
    return [name for name in wanted if find_spec(name) is None]


def require_runtime(runtime: str, *, running: bool = True, device: str | None = None) -> None:
    """Raises:
    RuntimeUnavailable: no such runtime, or not installed, with the extra that installs it; no such device here.
    """
    if runtime not in MODULES:
        raise RuntimeUnavailable(f"runtime {runtime!r} does not exist; runtimes: {', '.join(MODULES)}.")
    if missing := missing_packages(runtime, running=running):
        extra = RUNTIMES[runtime].extra
        raise RuntimeUnavailable(f"runtime {runtime} is not installed (no {', '.join(missing)}); pip install 'lighten[{extra}]'.")
    if device is not None:
        torch_eager.require_device(device)


def open_session(runtime: str, folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """What a folder holds, loaded by a runtime and held to the contract.

    Raises:
        RuntimeUnavailable: the folder holds nothing that the runtime runs.
    """
    load = MODULES[runtime].load
    session = load(folder, spec, setup)
    if setup.speculation is not None:
        session = speculating(session, setup.speculation, setup, load)
    return Checked(session, spec)


_OF_ALL = ("torch", "transformers", "numpy")
"""Packages that every measurement depends on, by the original that is timed beside it."""
_OF_SOME = ("onnx", "onnxruntime", "openvino", "nncf", "llama_cpp_python", "ctranslate2")


def package_versions(runtime: str | None = None) -> dict[str, str]:
    """Versions of what measurements depend on, of the packages that are installed.

    Args:
        runtime: of those that its artifacts depend on alone.
    """
    kinds = RUNTIMES.values() if runtime is None else [RUNTIMES[runtime]]
    own = {name for kind in kinds for name in (*kind.builds, *kind.runs)}
    found = {}
    for name in (*_OF_ALL, *(name for name in _OF_SOME if name.removesuffix("_python") in own)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


__all__ = ["MODULES", "Runtime", "Session", "Setup", "missing_packages", "open_session", "package_versions", "require_runtime"]
