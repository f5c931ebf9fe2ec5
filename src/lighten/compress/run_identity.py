"""What the bytes of a compressed model depend on: a run goes on only where all of it is as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lighten import __version__
from lighten.model.read import read_config, weight_files

FULL_BYTES = 2 * 10**9
"""Weights of up to so many bytes are read whole for their checksum: choice, 2 to 4 s of sha256 on one core."""
SAMPLES, SAMPLE_BYTES = 64, 2**20
"""Of larger ones, of each file: its size and time, its first bytes (the header) and so many pieces spread evenly over it (choice: 64 MB a file)."""


def run_identity(source: Path, recipe: str, *, text: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Everything by a name that a user knows.

    Args:
        text: fingerprint of the calibration text; "" where none is looked at.
        settings: what else was chosen for the run.
    """
    import torch
    import transformers

    return {
        "recipe": recipe, "config": _digest(json.dumps(read_config(source), sort_keys=True).encode()), "weights": weights_digest(source),
        "text": text[:16] or "none", "version of lighten": __version__, "code of lighten": _code_digest(), "version of torch": torch.__version__,
        "version of transformers": transformers.__version__, "number of threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(), **settings,
    }  # fmt: skip


def _code_digest() -> str:
    """Of the package's own modules: one that was edited since may round in another way under the same version."""
    package = Path(__file__).parent.parent
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """A checksum of a folder's weights: of all bytes where they are few, else of each file's size, time, header and of pieces of it.

    A change that keeps size and time and lies between the pieces of a large file is not seen.
    """
    paths = weight_files(folder)
    whole = sum(path.stat().st_size for path in paths) <= FULL_BYTES
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        if whole:
            _add_all(digest, path)
        else:
            _add_samples(digest, path)
    return digest.hexdigest()[:16]


def _add_all(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    state = path.stat()
    digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    step = max((state.st_size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, state.st_size)))
        for start in range(0, state.st_size, step):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))


def digest(identity: Mapping[str, str]) -> str:
    """One word for all of it."""
    return _digest(json.dumps(dict(identity), sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
