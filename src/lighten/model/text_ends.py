"""Where a text ends: how long a model reads, and the tokens after which it has nothing more to say."""

from __future__ import annotations

import json
from pathlib import Path

from lighten.model.read import read_config
from lighten.model.spec import ModelSpec


def longest_text(folder: Path, spec: ModelSpec) -> int:
    """Tokens of a text that an encoder reads: what it was trained to embed, where its folder says so."""
    try:
        said = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    except (OSError, ValueError, KeyError, TypeError):
        said = None
    return min(int(said or spec.max_positions or 512), spec.max_positions or 512)


def end_tokens(folder: Path) -> list[int]:
    """Tokens that end a text."""
    try:
        said = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        said = None
    said = said if said is not None else read_config(folder).get("eos_token_id")
    return [] if said is None else [said] if isinstance(said, int) else list(said)
