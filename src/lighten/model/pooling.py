"""How a folder's sentence embeddings are pooled, as sentence-transformers' `1_Pooling/config.json` says it."""

from __future__ import annotations

import json
from pathlib import Path

from lighten.errors import ModelError

FLAGS = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
}  # fmt: skip
"""Key of the older form, one for each kind → the newer form's word."""


def pooling(folder: Path, known: tuple[str, ...]) -> str:
    """One of the known kinds; `mean` where the folder says nothing.

    Raises:
        ModelError: the file cannot be read, or says another kind, or several.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        said = json.loads(path.read_text())
        found = [word for key, word in FLAGS.items() if said.get(key) is True]
        found += [word for word in [said.get("pooling_mode")] if isinstance(word, str) and word not in found]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read ({str(error).splitlines()[0]}).") from error
    if len(found) != 1 or found[0] not in known:
        raise ModelError(f"{path} pools by {' and '.join(found) or 'nothing known'}; here are {', '.join(known)}.")
    return found[0]


def pools_first_token(folder: Path) -> bool:
    """Whether a sentence embedding is the first token's state; else the mean.

    Raises:
        ModelError: another kind, or not readable.
    """
    return pooling(folder, ("mean", "cls")) == "cls"
