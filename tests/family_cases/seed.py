from __future__ import annotations

from typing import Any

CASES: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {
            "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "max_position_embeddings": 64,
        }
    ],
}  # fmt: skip
"""model_type → changes that make its config tiny."""
