"""What an architecture's head answers: how a labelled file is read for it, and which true answers it can be trained on beside a teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from lighten.errors import TextError
from lighten.model.families._fields import label_count
from lighten.model.spec import Embedding, Linear, ModelSpec

Task = Literal["classes", "value", "span", "target", "next"]
"""`classes`: one of its labels for a whole input; `value`: a number for it; `span`: where an answer starts and ends; `target`: a text from another;
`next`: a text goes on."""
LABELS = ("labels", "start_positions", "end_positions")
"""Names of true answers in a batch, as `transformers` has them."""
IGNORED = -100
"""A label that does not count, as in `transformers` and in torch's cross-entropy."""

_OF_A_WHOLE = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")


def task_of(spec: ModelSpec) -> Task | None:
    """None where the head is of another kind, or there is none; a classifier of one label gives a value, as in `transformers`."""
    name = str(spec.architecture)
    if name.endswith(_OF_A_WHOLE):
        problem, one = spec.config.get("problem_type"), label_count(spec.config) == 1
        if problem is None:
            return "value" if one else "classes"
        if problem == "regression":
            return "value" if one else None
        return "classes" if problem == "single_label_classification" else None
    if "ForQuestionAnswering" in name:
        return "span"
    if name.endswith(("ForConditionalGeneration", "MTModel")) and spec.is_encoder_decoder:
        return "target"
    return "next" if name.endswith(("ForCausalLM", "LMHeadModel")) and spec.is_decoder else None


def vocab_size(spec: ModelSpec) -> int:
    """Rows of its largest table of tokens; 0 of a model that reads none."""
    return max((part.num_embeddings for part in spec.parts if isinstance(part, Embedding)), default=0)


def has_head(spec: ModelSpec) -> bool:
    """Whether it gives logits, and not states alone."""
    return any(isinstance(part, Linear) and part.component == "head" for part in spec.parts)


def runs_with_head(spec: ModelSpec) -> bool:
    """Whether runtimes run an encoder with its head: one that answers a question, or classifies a whole input. Other heads stay behind: what is
    run is the body."""
    name = str(spec.architecture)
    generates = spec.is_decoder or spec.is_encoder_decoder
    return name.endswith(("ForSequenceClassification", "ForQuestionAnswering")) and has_head(spec) and not generates


def token_types(spec: ModelSpec) -> int:
    """Kinds of tokens that a model tells apart: the first text's, the second's; 1: it does not."""
    return next((part.num_embeddings for part in spec.parts if isinstance(part, Embedding) and "token_type" in part.name), 1)


def takes_token_types(spec: ModelSpec) -> bool:
    """Whether what runs is told which tokens are the second text's."""
    return runs_with_head(spec) and token_types(spec) > 1


def class_name(number: int, config: Mapping[str, Any]) -> str:
    """The name of a class; its number where it has none.

    >>> class_name(1, {"id2label": {"0": "bad", "1": "good"}}), class_name(1, {})
    ('good', '1')
    """
    return {number: name for name, number in _names(config).items()}.get(number, str(number))


def class_of(label: Any, config: Mapping[str, Any], where: str) -> int:
    """The number of a class that a file names.

    Args:
        label: a name of `label2id` or `id2label`, or the number, as text too.
        where: what the error begins with.

    Raises:
        TextError: no such class.

    >>> names = {"label2id": {"bad": 0, "good": 1}, "num_labels": 2}
    >>> [class_of(label, names, "a.csv line 2") for label in ("good", "0", "1.0", 1.0)]
    [1, 0, 1, 1]
    """
    names = _names(config)
    count = label_count(config)
    if isinstance(label, str) and label in names:
        return names[label]
    number = label
    if isinstance(label, str):
        with suppress(ValueError):
            number = float(label)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
        return number
    known = ", ".join(f"{number} {name}" for name, number in sorted(names.items(), key=lambda each: each[1])[:20])
    raise TextError(f"{where}: label {label!r} is none of the model's {count}: {known or f'0 to {count - 1}'}.")


def _names(config: Mapping[str, Any]) -> dict[str, int]:
    named = {str(name): int(number) for name, number in (config.get("label2id") or {}).items()}
    return {str(name): int(number) for number, name in (config.get("id2label") or {}).items()} | named
