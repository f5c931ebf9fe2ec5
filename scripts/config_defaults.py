"""Write the defaults and the aliases of transformers' config classes to src/lighten/model/families/defaults.json.

A `config.json` on a hub often leaves out what its class has a default for. The file lets the formulas read such a config as transformers
would, with no transformers installed. tests/test_families.py holds it against the installed one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TARGET = Path(__file__).parent.parent / "src" / "lighten" / "model" / "families" / "defaults.json"
LEFT_OUT = {
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "torchscript", "prefix", "initializer_range", "_attn_implementation_autoset",
}  # fmt: skip
"""Fields that change neither shapes nor costs."""


def defaults_of(model_type: str) -> dict[str, Any] | None:
    """Aliases (our name → its own) and default fields of one config class; None where the class cannot be made without arguments."""
    kind = CONFIG_MAPPING[model_type]
    try:
        config = kind()
        fields = config.to_dict()
    except Exception:  # noqa: BLE001 - some classes need arguments; they have no defaults to read
        return None
    kept = _kept(fields)
    other = _other_size(kind)
    blank = {name for name, value in kept.items() if getattr(kind, name, None) is None and not isinstance(value, dict)} - set(_sizes(kind))
    derived = {name for name in blank if (hasattr(kind, name) if other is None else other.get(name) != kept[name])}
    kept |= dict.fromkeys(derived)
    return {"aliases": dict(getattr(kind, "attribute_map", {})), "defaults": kept}


GROWN = {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 2}


def _sizes(kind: Any) -> dict[str, int]:
    aliases = getattr(kind, "attribute_map", {})
    return {aliases.get(name, name): factor for name, factor in GROWN.items()}


def _other_size(kind: Any) -> dict[str, Any] | None:
    """The fields of the class for a model of another size, which show what it works out from its sizes (`head_dim`, `layer_types`)."""
    config = kind()
    try:
        fields: dict[str, Any] = kind(**{name: getattr(config, name) * by for name, by in _sizes(kind).items() if hasattr(config, name)}).to_dict()
    except Exception:  # noqa: BLE001 - some classes allow few sizes; then what has no default of its own counts as worked out
        return None
    return fields


BASE = PreTrainedConfig().to_dict()


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name in LEFT_OUT or (isinstance(value, list) and len(value) > 200) or (name != "model_type" and name in BASE and value == BASE[name]):
            continue
        kept[name] = _kept(value) if isinstance(value, dict) else value
    return kept


def collect() -> dict[str, dict[str, Any]]:
    """model_type → aliases and defaults, of every type that transformers has."""
    found = {model_type: defaults_of(model_type) for model_type in sorted(CONFIG_MAPPING)}
    return {model_type: known for model_type, known in found.items() if known}


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(known, sort_keys=True, default=str)}" for name, known in collect().items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} config classes → {TARGET.name}, {TARGET.stat().st_size:,} bytes")
