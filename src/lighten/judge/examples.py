"""Rows of a labelled file as a model's inputs: a pair as a pair, a target as what a decoder is to write, labels beside them. No row is padded, so
that no position of padding counts anywhere; rows of one length run together.

Shape legend: S positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lighten.errors import ModelError, TextError
from lighten.judge.text import Text, first_answer
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import ModelSpec
from lighten.model.tasks import IGNORED, Task, class_of, has_head, task_of, token_types

EXAMPLE_LEN = 384
"""Tokens of a row at most: that of BERT's own training on questions with their contexts (arXiv:1810.04805, run_squad.py)."""
FOREIGN = ("mbart", "plbart", "m2m_100", "nllb-moe")
"""`model_type`s that begin a text with the mark of its language, which a file does not say."""

Row: TypeAlias = dict[str, np.ndarray[Any, Any]]


def reads_examples(spec: ModelSpec, text: Text) -> bool:
    """Whether a model takes a labelled file row by row; else it reads the rows' texts one after another."""
    task = task_of(spec)
    if task == "target":
        return any(row.columns == ("source", "target") for row in text.examples)
    return bool(text.examples) and has_head(spec) and task != "next"


def example_rows(source: Path, spec: ModelSpec, text: Text, tokens: int, labels: Sequence[Any] | None) -> Iterator[Row]:
    """[1, S] arrays by the names of the model's forward, in the file's order, of at least so many tokens together where there are as many.

    Args:
        labels: of each example, by `true_labels`; None: none are wanted.

    Raises:
        TextError: a target in another language for a model that must be told which.
    """
    task, tokenizer = task_of(spec), Tokenizer(source)
    if task == "target" and spec.config.get("model_type") in FOREIGN:
        raise TextError(
            f"{text.source} has sources and targets, and {spec.name} ({spec.architecture}) needs their languages too; give --text an .npz with its "
            "input_ids and decoder_input_ids."
        )
    length, types = min(EXAMPLE_LEN, spec.max_positions or EXAMPLE_LEN), token_types(spec)
    taken = 0
    for place, row in enumerate(text.examples):
        if taken >= tokens:
            return
        if task == "target" and len(row.texts) > 1:
            found = {"input_ids": _ids(tokenizer.encode(row.texts[0], length=length).ids)}
            found["labels"] = _ids(tokenizer.encode(row.texts[1], length=length).ids)
        else:
            encoding = tokenizer.encode(*row.texts, length=length)
            found = {"input_ids": _ids(encoding.ids)}
            if 0 < max(encoding.type_ids, default=0) < types:
                found["token_type_ids"] = _ids(encoding.type_ids)
            if labels is not None and task != "target":
                found |= _labels_of(task, labels[place], encoding)
        if found["input_ids"].shape[1] and all(value.size for value in found.values()):
            taken += sum(value.shape[1] for name, value in found.items() if name != "token_type_ids" and value.ndim > 1)
            yield found


def true_labels(spec: ModelSpec, text: Text) -> list[Any]:
    """What is true of each example: a class, a value, an answer, or nothing where a target says it.

    Raises:
        TextError: the file has none, or one that the model cannot take.
    """
    task = task_of(spec)
    column = {"classes": "label", "value": "label", "span": "answers"}.get(str(task), "target")
    rows = text.examples
    known = [{"label": row.label, "answers": row.answers, "target": "target" in row.columns or None}[column] for row in rows]
    if all(each is None for each in known):
        raise TextError(f"{text.source} has no column {column}; labels for {spec.name} ({spec.architecture}) are in it.")
    missing = next((row for row, each in zip(rows, known, strict=True) if each is None), None)
    if missing is not None:
        raise TextError(f"{missing.where} has no {column}; give each row one, or leave the row out.")
    if column == "target":
        return known
    if task == "span":
        return [first_answer(row) for row in rows]
    if task == "value":
        return [_value(row.label, row.where) for row in rows]
    return [class_of(row.label, spec.config, row.where) for row in rows]


def labelled_stream(tokenizer: Tokenizer, text: Text, *, count: int) -> tuple[list[int], list[int]]:
    """(ids, labels) of the running text that a decoder reads: tokens of targets are their own labels, all others have none."""
    ids: list[int] = []
    labels: list[int] = []
    for row in text.examples:
        encoding = tokenizer.encode(row.joined + "\n\n", marks=False)
        before = len(row.texts[0]) if row.columns == ("source", "target") else len(row.joined) + 2
        ids += encoding.ids
        after = len(row.joined)  # a last token may take the end of the line with it
        labels += [token if before < end and start < after else IGNORED for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]
        if len(ids) >= count:
            break
    return ids[:count], labels[:count]


def _labels_of(task: Task | None, label: Any, encoding: Any) -> Row:
    if task == "value":
        return {"labels": np.array([label], np.float32)}
    if task == "span":
        start, end = _span(encoding, label)
        return {"start_positions": np.array([start], np.int64), "end_positions": np.array([end], np.int64)}
    return {"labels": np.array([label], np.int64)}


def _span(encoding: Any, answer: Any) -> tuple[int, int]:
    """First and last token of an answer: the first token of all where the context has none (arXiv:1810.04805, section 4.3), `IGNORED` where the
    answer was cut off."""
    if answer.start is None:
        return 0, 0
    end = answer.start + len(answer.text)
    inside = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    spans = encoding.offsets
    found = [place for place in inside if spans[place][1] > answer.start and spans[place][0] < end]
    whole = bool(found) and spans[found[-1]][1] >= end
    return (found[0], found[-1]) if whole else (IGNORED, IGNORED)


def _value(label: Any, where: str) -> float:
    try:
        found = float(label)
    except (TypeError, ValueError):
        found = float("nan")
    if not np.isfinite(found) or isinstance(label, bool):
        raise TextError(f"{where}: label {label!r} is no number, which the model's only label is.")
    return found


def _ids(found: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.array([found], np.int64)


def require_padding(spec: ModelSpec) -> None:
    """Raises:
    ModelError: a decoder that classifies by the last token before the padding, and does not know what padding is.
    """
    if spec.is_decoder and str(spec.architecture).endswith("ForSequenceClassification") and spec.config.get("pad_token_id") is None:
        raise ModelError(
            f"{spec.name} ({spec.architecture}) classifies by the last token that is no padding, and its config.json has no pad_token_id; add it."
        )
