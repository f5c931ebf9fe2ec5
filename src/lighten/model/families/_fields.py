"""What the families' descriptions share: reading config fields, and the activation functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lighten.errors import ModelError
from lighten.model.spec import Elementwise

ACTIVATIONS: dict[str, tuple[Any, int]] = {
    "gelu": ("gelu", 1), "gelu_new": ("gelu", 1), "gelu_pytorch_tanh": ("gelu", 1), "relu": ("relu", 1), "silu": ("silu", 1), "swish": ("silu", 1),
}  # fmt: skip
"""`hidden_act` → (kind, FLOPs an element). A transcendental function counts as one operation, as profilers count it."""


def require(config: Mapping[str, Any], names: Iterable[str], family: str) -> dict[str, int]:
    """The named fields, each a positive whole number.

    Raises:
        ModelError: naming all fields that are missing or not positive whole numbers.
    """
    wrong = [n for n in names if not isinstance(config.get(n), int) or isinstance(config.get(n), bool) or config[n] <= 0]
    if wrong:
        found = ", ".join(f"{name}={config[name]!r}" if name in config else f"{name} is missing" for name in wrong)
        raise ModelError(f"config.json of a {family} model needs positive whole numbers; found: {found}.")
    chosen = {name: config[name] for name in names}
    heads = chosen["num_attention_heads"]
    if chosen["hidden_size"] % heads and not config.get("head_dim"):
        raise ModelError(f"config.json: hidden_size={chosen['hidden_size']} is not a multiple of num_attention_heads={heads}.")
    return chosen


def activation(name: str, act: str, size: int) -> Elementwise:
    """The activation function of an MLP.

    Raises:
        ModelError: a function that is not known.
    """
    if act not in ACTIVATIONS:
        raise ModelError(f"hidden_act {act!r} is not known; known: {', '.join(ACTIVATIONS)}.")
    kind, flops = ACTIVATIONS[act]
    return Elementwise(name=name, component="mlp", size=size, kind=kind, flops_per_element=flops)
