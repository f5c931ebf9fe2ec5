"""What processes that measure are started in: threads fixed in number and place, an end no later than their parent's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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


def die_with_parent(parent: int) -> None:
    """On Linux, end when the parent does, even where it was killed and this process is stopped; at once where it is dead already."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
