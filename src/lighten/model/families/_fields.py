"""What the families' descriptions share: reading config fields, and the activation functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lighten.errors import ModelError
from lighten.model.spec import Elementwise

ACTIVATIONS: dict[str, tuple[Any, int]] = {
    "gelu": ("gelu", 1), "gelu_new": ("gelu", 1), "gelu_pytorch_tanh": ("gelu", 1), "relu": ("relu", 1), "silu": ("silu", 1), "swish": ("silu", 1),
    "gelu_fast": ("gelu", 1), "gelu_python": ("gelu", 1), "gelu_python_tanh": ("gelu", 1), "gelu_accurate": ("gelu", 1), "gelu_10": ("gelu", 3),
    "quick_gelu": ("silu", 3), "tanh": ("tanh", 1), "sigmoid": ("sigmoid", 1), "relu2": ("relu2", 2), "relu6": ("relu", 2), "mish": ("silu", 3),
    "xielu": ("silu", 8),
}  # fmt: skip
"""`hidden_act` → (kind, FLOPs an element). A transcendental function counts as one operation, as profilers count it."""


MOST_LAYERS = 10_000
"""More layers than any model has: a config that claims more is refused before a description of each is made."""


def require(config: Mapping[str, Any], names: Iterable[str], family: str) -> dict[str, int]:
    """The named fields, each a positive whole number.

    Raises:
        ModelError: naming all fields that are missing or not positive whole numbers.
    """
    wrong = [n for n in names if not _is_positive(config.get(n))]
    if wrong:
        found = ", ".join(f"{name}={config[name]!r}" if name in config else f"{name} is missing" for name in wrong)
        raise ModelError(f"config.json of a {family} model needs positive whole numbers; found: {found}.")
    chosen = {name: config[name] for name in names}
    if chosen["num_hidden_layers"] > MOST_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers={chosen['num_hidden_layers']} is more than {MOST_LAYERS}.")
    heads = chosen["num_attention_heads"]
    if chosen["hidden_size"] % heads and not optional(config, "head_dim"):
        raise ModelError(f"config.json: hidden_size={chosen['hidden_size']} is not a multiple of num_attention_heads={heads}.")
    return chosen


def optional(config: Mapping[str, Any], name: str) -> int | None:
    """A field that may be missing or null, else is a positive whole number.

    Raises:
        ModelError: neither.
    """
    value: int | None = config.get(name)
    if value is not None and not _is_positive(value):
        raise ModelError(f"config.json: {name}={value!r} is not a positive whole number.")
    return value


def check_probabilities(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises:
    ModelError: a field that is there and is not a number from 0 to 1.
    """
    for name in names:
        value = config.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ModelError(f"config.json: {name}={value!r} is not a number from 0 to 1.")


def label_count(config: Mapping[str, Any]) -> int:
    """Classes of a classifier: `num_labels`, or as many as `id2label` names, else 2.

    Raises:
        ModelError: an `id2label` that is no table, or a `num_labels` that is no positive whole number.
    """
    names = config.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ModelError("config.json: id2label is not a table of numbers and names.")
    return optional(config, "num_labels") or len(names) or 2


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def activation(name: str, act: str, size: int) -> Elementwise:
    """The activation function of an MLP.

    Raises:
        ModelError: a function that is not known.
    """
    if act not in ACTIVATIONS:
        raise ModelError(f"hidden_act {act!r} is not known; known: {', '.join(ACTIVATIONS)}.")
    kind, flops = ACTIVATIONS[act]
    return Elementwise(name=name, component="mlp", size=size, kind=kind, flops_per_element=flops)
