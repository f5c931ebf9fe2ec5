"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lighten.errors import OutputError


def write_whole(path: Path, text: str) -> None:
    """Write a text beside the file, then rename it over the file.

    Raises:
        OutputError: the folder is missing, full or read-only; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error
