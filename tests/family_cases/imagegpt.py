from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}

CASES: dict[str, list[dict[str, Any]]] = {
    "imagegpt": [TINY, {**TINY, "n_inner": 40, "activation_function": "gelu", "id2label": {0: "a", 1: "b", 2: "c"}}],
}
"""model_type → changes that make its config tiny."""
