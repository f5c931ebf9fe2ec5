"""A config as its class in transformers would read it: own names told apart from aliases, and what is left out filled in.

Source of defaults.json: scripts/config_defaults.py over transformers' config classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SHAPES = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "d_model", "d_ff", "d_kv", "num_layers",
    "n_embd", "n_layer", "n_head", "n_layers", "n_heads", "hidden_dim", "dim", "ffn_dim", "encoder_layers", "decoder_layers", "num_heads",
    "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "type_vocab_size",
    "n_positions", "attention_heads", "dff",
})  # fmt: skip
"""Fields that a class's default never fills in for a model of one's own: a size that was forgotten is an error, not a guess."""


@cache
def _lines() -> dict[str, str]:
    """model_type → its line of the file; one is parsed where it is asked for, for all of them would take longer than an estimate."""
    lines = (Path(__file__).parent / "defaults.json").read_text().splitlines()[1:-1]
    return {line[1 : line.index('"', 1)]: line for line in lines}


@cache
def _known(model_type: str) -> dict[str, Any]:
    line = _lines().get(model_type)
    return dict(json.loads("{" + line.rstrip(",") + "}")[model_type]) if line else {}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with each alias under transformers' common name too (`n_embd` as `hidden_size`), and with its class's defaults.

    Sizes are never filled in at the top level (`SHAPES`). A nested config (`text_config`) is completed by its own `model_type`; one that
    is missing altogether is its class's default, as in transformers.
    """
    return _complete(config, _known(str(config.get("model_type"))), top=True)


def _complete(config: Mapping[str, Any], known: Mapping[str, Any], *, top: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = known.get("defaults", {})
    aliases: dict[str, str] = known.get("aliases", {})
    nested = any(isinstance(value, Mapping) and "model_type" in value for value in config.values())
    filled = {name: value for name, value in defaults.items() if not top or nested or name not in SHAPES}
    filled |= config
    for name, value in list(filled.items()):
        if isinstance(value, Mapping):
            default = defaults.get(name)
            inner = str(value.get("model_type") or (default.get("model_type") if isinstance(default, Mapping) else ""))
            if known_inner := _known(inner):
                filled[name] = _complete(value, known_inner, top=False)
    for name, own in aliases.items():
        if own in filled and name not in config:
            filled[name] = filled[own]
        elif name in config and own not in config:
            filled[own] = config[name]
    return filled
