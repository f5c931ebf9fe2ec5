"""Calibration inputs from a text, for steps that look at what a layer is given: rows of one length, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lighten.compress.memory_plan import WINDOW
from lighten.compress.skeleton import main_input
from lighten.compress.walk import Batch, CalibrationSource
from lighten.errors import RecipeError, TextError
from lighten.judge.examples import example_rows, labelled_stream, reads_examples, require_padding, true_labels
from lighten.judge.text import Text
from lighten.judge.tokens import Ids, Tokenizer
from lighten.model import ModelSpec
from lighten.model.tasks import task_of

ENCODER_LEN = 128
"""Tokens of an encoder's row: choice, passages that are searched or compared are about as long; half of the limit of MiniLM's own description."""
CHARACTERS = 8
"""Of text for each token that is wanted in a row: twice what an English token takes on average; a row that is shorter all the same is left out."""


def text_windows(
    source: Path, spec: ModelSpec, text: Text, *, labels: float | None = None, log: Callable[[str], None] = lambda line: None
) -> CalibrationSource:
    """Inputs from the calibration part of a text, in its order: a decoder reads windows of the running text, an encoder passages between its marks.
    Of a labelled file, models with a head read each row by itself: pairs as pairs, sources with their targets.

    Args:
        labels: weight of the true labels in a step that can take them; 0: they are wanted only where the file has them; None: no step takes any.

    Raises:
        TextError: labels that are asked for are not there, or not what the model takes.
        RecipeError: when asked for inputs, of a model that does not read text.
        TextError: when asked for inputs, of a text without tokens.
    """
    known = _labels(spec, text, labels, log)
    told: set[str] = set()  # several steps ask for the same, and it is said once

    def windows(tokens: int) -> Sequence[Batch]:
        if (main := main_input(spec.architecture)) != "input_ids":
            said = f"{spec.name} ({spec.architecture}) does not read text, which this recipe calibrates on"
            raise RecipeError(f"{said}; give --text an .npz with its {main}, or use quantize(rtn) or quantize(hqq), which look at the weights alone.")
        require_padding(spec)
        positions = spec.max_positions or WINDOW
        batches: list[Batch]
        if reads_examples(spec, text):
            batches = list(example_rows(source, spec, text, tokens, known))
        elif known is not None:
            batches = [_labelled(source, text, tokens, min(WINDOW, positions))]
        elif spec.is_decoder:
            batches = [{"input_ids": _running(source, text, tokens, min(WINDOW, positions))}]
        else:
            batches = [{"input_ids": _passages(source, text, tokens, min(ENCODER_LEN, positions))}]
        if not (rows := sum(len(batch["input_ids"]) for batch in batches)):
            raise TextError(f"{text.source}: its calibration part is too short for a row of this model's tokens; give a longer text.")
        lengths = sorted({batch["input_ids"].shape[1] for batch in batches})
        size = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(lengths[0])
        line = f"calibrating on {sum(batch['input_ids'].size for batch in batches)} tokens of {text.source}, {rows} rows of {size}"
        if line not in told:
            told.add(line)
            log(line)
        return batches

    return windows


def _labels(spec: ModelSpec, text: Text, weight: float | None, log: Callable[[str], None]) -> list[Any] | None:
    """Of each example; None where none are wanted, or wanted only where they are there and fit."""
    if weight is None or (not weight and not (text.examples and task_of(spec) == "classes")):
        return None
    try:
        return true_labels(spec, text)
    except TextError as error:
        if weight:
            raise
        log(f"labels are not looked at: {error}")
        return None


def _labelled(source: Path, text: Text, tokens: int, length: int) -> Batch:
    """[rows, length]: the rows' texts one after another, and which of their tokens are a target's."""
    ids, labels = labelled_stream(Tokenizer(source), text, count=tokens)
    length = max(1, min(length, len(ids)))
    rows = len(ids) // length
    return {name: np.array(found[: rows * length], np.int64).reshape(rows, length) for name, found in (("input_ids", ids), ("labels", labels))}


def _running(source: Path, text: Text, tokens: int, length: int) -> Ids:
    """[rows, length]: the passages one after another; one shorter row where there is less text than that."""
    stream = Tokenizer(source).windows(text.calibration, count=tokens, length=1).reshape(-1)
    length = min(length, len(stream))
    rows = len(stream) // length
    return stream[: rows * length].reshape(rows, length)


def _passages(source: Path, text: Text, tokens: int, length: int) -> Ids:
    """[rows, length]: passages, joined where they are short and cut where they are long, with the marks that the tokenizer puts around a text.
    Few tokens are the starts of many passages; where these are not enough, the whole text is cut."""
    tokenizer, most = Tokenizer(source), -(-tokens // length)
    starts = (tokenizer.pieces(joined, length)[:1] for joined in islice(_joined(text.calibration, CHARACTERS * length), most))
    found = [piece for pieces in starts for piece in pieces]
    if len(found) < most:
        found = tokenizer.pieces(" ".join(text.calibration), length)[:most]
    return np.array(found, np.int64).reshape(len(found), length)


def _joined(passages: Sequence[str], characters: int) -> Iterator[str]:
    together = ""
    for passage in passages:
        together = f"{together} {passage}".strip()
        if len(together) >= characters:
            yield together
            together = ""
