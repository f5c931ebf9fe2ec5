"""Where a model comes from: a local folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from lighten.errors import ModelError
from lighten.model.hub import read_hub
from lighten.model.read import read_folder
from lighten.model.spec import ModelSpec

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def read_spec(model: str | Path) -> ModelSpec:
    """The spec of a local folder, or of a hub id when no such path exists.

    Raises:
        ModelError: no such path, no config, an unreadable header, or config and weights that contradict each other.
        UnsupportedFamily: an architecture without a formula.
    """
    path = Path(model)
    if path.is_dir():
        return read_folder(path)
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json and *.safetensors, or a hub id.")
    if isinstance(model, Path) or not _HUB_ID.match(str(model)) or str(model).startswith("."):
        raise ModelError(f"{model}: no such folder, and no hub id (owner/name) either.")
    return read_hub(str(model))
