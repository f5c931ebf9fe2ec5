"""Calibration inputs from a text, for steps that look at what a layer is given: rows of one length, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lighten.compress.memory_plan import WINDOW
from lighten.compress.skeleton import main_input
from lighten.compress.walk import Batch, CalibrationSource
from lighten.errors import RecipeError, TextError
from lighten.judge.text import Text
from lighten.judge.tokens import Ids, Tokenizer
from lighten.model import ModelSpec

ENCODER_LEN = 128
"""Tokens of an encoder's row: choice, passages that are searched or compared are about as long; half of the limit of MiniLM's own description."""
CHARACTERS = 8
"""Of text for each token that is wanted in a row: twice what an English token takes on average; a row that is shorter all the same is left out."""


def text_windows(source: Path, spec: ModelSpec, text: Text, *, log: Callable[[str], None] = lambda line: None) -> CalibrationSource:
    """Inputs from the calibration part of a text, in its order: a decoder reads windows of the running text, an encoder passages between its marks.

    Raises:
        RecipeError: when asked, of a model that does not read text.
        TextError: when asked, of a text without tokens.
    """

    def windows(tokens: int) -> Sequence[Batch]:
        if (main := main_input(spec.architecture)) != "input_ids":
            said = f"{spec.name} ({spec.architecture}) does not read text, which this recipe calibrates on"
            raise RecipeError(f"{said}; give --text an .npz with its {main}, or use quantize(rtn) or quantize(hqq), which look at the weights alone.")
        positions = spec.max_positions or WINDOW
        reads_on = spec.is_decoder
        rows = _running(source, text, tokens, min(WINDOW, positions)) if reads_on else _passages(source, text, tokens, min(ENCODER_LEN, positions))
        if not len(rows):
            raise TextError(f"{text.source}: its calibration part is too short for a row of this model's tokens; give a longer text.")
        log(f"calibrating on {rows.size} tokens of {text.source}, {len(rows)} rows of {rows.shape[1]}")
        return [{"input_ids": rows}]

    return windows


def _running(source: Path, text: Text, tokens: int, length: int) -> Ids:
    """[rows, length]: the passages one after another; one shorter row where there is less text than that."""
    stream = Tokenizer(source).windows(text.calibration, count=tokens, length=1).reshape(-1)
    length = min(length, len(stream))
    rows = len(stream) // length
    return stream[: rows * length].reshape(rows, length)


def _passages(source: Path, text: Text, tokens: int, length: int) -> Ids:
    """[rows, length]: passages, joined where they are short and cut where they are long, with the marks that the tokenizer puts around a text."""
    joined = list(_joined(text.calibration, CHARACTERS * length))[: -(-tokens // length)]
    found = [ids for ids, mask in Tokenizer(source).batches(joined, batch_size=1, length=length) if mask.all()]
    return np.concatenate(found) if found else np.zeros((0, length), np.int64)


def _joined(passages: Sequence[str], characters: int) -> Iterator[str]:
    together = ""
    for passage in passages:
        together = f"{together} {passage}".strip()
        if len(together) >= characters:
            yield together
            together = ""
