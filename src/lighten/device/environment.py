"""The environment variables under which everything is measured: threads fixed in number and place."""

from __future__ import annotations

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def pinned_environment(threads: int, *, runtime: str) -> dict[str, str]:
    """Variables that pin a runtime's threads in a child process.

    Threads of OpenMP, which torch and CTranslate2 use, are bound to cores: unbound, two of them were seen on one core of a busy machine, where a
    product of 0.2 ms took 14 ms. ONNX Runtime and OpenVINO start their own threads, which a bound OpenMP would gather on one core: there only the
    number is fixed.
    """
    found = dict.fromkeys(THREAD_VARIABLES, str(threads))
    if runtime.startswith("torch") or runtime == "ctranslate2":
        found |= {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
    return found
