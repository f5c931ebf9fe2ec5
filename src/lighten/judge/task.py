"""The user's own labelled file as a task: what a model is asked, what is true, and which way a model of its kind answers.

- An encoder with a head answers by it: a class, a value, or a part of a context.
- An encoder without one gives embeddings. Classes are read off them by a logistic regression that was fitted on the original's embeddings of one
  half of the file; the other half is scored. The value of two texts is the cosine of theirs.
- A decoder says of each label how likely it goes on, and writes where a target is asked for.
- What lm-eval asks it answers as lm-eval says (`judge/harness.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lighten.errors import TaskError
from lighten.judge.harness import PREFIX, Harness, load_harness
from lighten.judge.metrics import Kind, Metric, find_metric, require_package
from lighten.judge.quality import Score
from lighten.judge.text import Columns, Example, first_answer, read_examples
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import ModelSpec
from lighten.model.tasks import class_name, class_of, runs_with_head, task_of
from lighten.model.text_ends import longest_text

Way = Literal["head", "embeddings", "words", "writing", "lm-eval"]
"""How a model answers; see above."""

COLUMNS: Columns = (
    ("question", "context"), ("text", "text_pair"), ("text", "target"), ("source", "target"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("text",), ("sentence",),
)  # fmt: skip
"""Columns that hold what a model is asked, the first that a row has."""
_TARGETS = (("text", "target"), ("source", "target"))

MOST_ROWS = 1000
MOST_WRITTEN = 200
"""Rows that are scored at most; of tasks where a text is written. Those of the lowest sha256 of what they say: the same in every run."""
MOST_NEW_TOKENS = 256
_SLACK = 1.25
"""New tokens of a writer: so many times those of the longest target, and at most `MOST_NEW_TOKENS`."""
FEWEST = 8
"""Rows that a score needs: choice; the standard error of an accuracy of one half is then 0.18."""
_FEW_WORDS = 5
"""Targets of at most so many words are held to by exact_match, longer ones by rougeL."""
_FEW_VALUES = 10
"""Numbers as labels of pairs are values where there are more different ones than this, or one of them has a fraction."""
_MOST_LABELS = 50
_HEAD_LEN = 512
"""Tokens that a model with a head reads at most: BERT's own training (arXiv:1810.04805)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked and what is true.

    Attributes:
        rows: that are scored; none of lm-eval's, which holds them itself.
        references: what is true of each, in the form that the metrics take.
        fit: of embeddings, the rows that a classifier is fitted on.
        fitted: their classes.
        labels: names of the classes.
        metrics: the first is the one that plots and choices use.
        length: tokens of a row that an encoder reads at most, or tokens that a decoder writes.
        stops_at_line: whether what is written ends at a line end.
        fingerprint: of all of it.
        notes: what was left out or cut.
        harness: lm-eval's task, where it is one.
    """

    source: str
    kind: Kind | str
    way: Way
    rows: tuple[Example, ...]
    references: tuple[Any, ...]
    metrics: tuple[Metric, ...]
    length: int
    fit: tuple[Example, ...] = ()
    fitted: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    stops_at_line: bool = True
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    harness: Harness | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Figures that it gives."""
        return tuple(metric.name for metric in self.metrics)

    def as_json(self) -> dict[str, Any]:
        """Its entry in documents."""
        return {
            "source": self.source, "answers": self.kind, "by": self.way, "metrics": list(self.names),
            "rows": self.harness.documents if self.harness else len(self.rows),
            "fitted_rows": len(self.fit), "notes": list(self.notes),
        }  # fmt: skip

    def scores(self, predictions: Any) -> dict[str, Score]:
        """Every metric of a model's answers.

        Raises:
            TaskError: a user's metric failed.
        """
        return {metric.name: metric.score(predictions, self.references) for metric in self.metrics}


def load_task(
    path: Path, spec: ModelSpec, folder: Path, *, metrics: Sequence[str] = (), taken: Collection[str] = (), without: Collection[str] = ()
) -> Task:
    """A labelled file, or a task of lm-eval, as a task of a model.

    Args:
        folder: of the model, for its tokenizer.
        metrics: names, or FILE.py:function; none: the usual one of the answers.
        taken: names of other figures.
        without: passages that compression calibrates on, which are not scored.

    Raises:
        TextError: the file cannot be read, or a row has no such columns.
        TaskError: the rows are too few, or ask for what the model does not answer; a metric that does not fit.
    """
    if str(path).startswith(PREFIX):
        harness, digest, left_out = load_harness(str(path), spec, metrics=metrics, taken=taken, most=MOST_ROWS, most_written=MOST_WRITTEN)
        return Task(
            source=str(path), kind=harness.task.OUTPUT_TYPE, way="lm-eval", rows=(), references=(), metrics=harness.metrics, length=0,
            fingerprint=digest, notes=left_out, harness=harness,
        )  # fmt: skip
    rows, source = read_examples(path, COLUMNS)
    for row in rows:
        if not all(text for text in row.texts[: 1 if row.columns in _TARGETS else None]):
            raise TaskError(f"{row.where}: {row.columns[0]} is empty; leave the row out.")
    notes = []
    fair = [row for row in rows if row.joined not in without and row.texts[0] not in without]
    if len(fair) < len(rows):
        notes.append(f"{len(rows) - len(fair)} of {len(rows)} rows are not scored: compression calibrates on them")
    if len(fair) < FEWEST:
        raise TaskError(f"{path} has {len(fair)} rows that can be scored; a score needs at least {FEWEST}.")
    if others := {row.columns for row in fair} - {fair[0].columns}:
        other = next(row for row in fair if row.columns in others)
        first = f"{fair[0].where} {' and '.join(fair[0].columns)}"
        raise TaskError(f"{other.where} has {' and '.join(other.columns)}, and {first}; one file is one task.")
    way, kind = _way(fair, spec)
    most = MOST_WRITTEN if way == "writing" else MOST_ROWS
    picked = sorted(fair, key=_digest)[: most * (2 if (way, kind) == ("embeddings", "classes") else 1)]
    if len(picked) < len(fair):
        notes.append(f"{len(picked)} of {len(fair)} rows are used")
    found = _answers(picked, spec, kind, way)
    fit: list[Example] = []
    fitted: list[str] = []
    if (way, kind) == ("embeddings", "classes"):
        require_package("sklearn", "a classifier on embeddings")
        fit, fitted, picked, found = _halves(picked, found, path)
    _check(found, kind, path)
    scored = tuple(find_metric(name, kind, tuple(taken)) for name in metrics or (_usual(kind, found),))
    if len({metric.name for metric in scored}) < len(scored):
        raise TaskError(f"metrics {', '.join(metrics)}: one stands there twice.")
    length, said = _length(picked + fit, found, spec, folder, way)
    labels = tuple(sorted(set(found) | set(fitted))) if kind == "classes" else ()
    if way == "words" and len(labels) > _MOST_LABELS:
        raise TaskError(f"{path} has {len(labels)} labels, each of which would be tried as the next words; {_MOST_LABELS} are the most.")
    content = [[row.raw for row in picked + fit], found, fitted, [(metric.name, metric.digest) for metric in scored], way, length]
    return Task(
        source=source, kind=kind, way=way, rows=tuple(picked), references=tuple(found), metrics=scored, length=length, fit=tuple(fit),
        fitted=tuple(fitted), labels=labels, fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16], notes=tuple(notes + said),
        stops_at_line=not any("\n" in row.raw[1].strip() for row in picked if way == "writing"),
    )  # fmt: skip


def written_rows(task: Task) -> dict[str, Any]:
    """What a worker needs to answer."""
    return {
        "way": task.way, "kind": task.kind, "rows": [list(row.raw) for row in task.rows], "labels": list(task.labels), "length": task.length,
        "stops_at_line": task.stops_at_line, "may_be_empty": task.kind == "spans" and not all(task.references),
    }  # fmt: skip


def _digest(row: Example) -> bytes:
    return hashlib.sha256(json.dumps([row.raw, str(row.label)]).encode()).digest()


def _way(rows: Sequence[Example], spec: ModelSpec) -> tuple[Way, Kind]:
    """How a model answers such rows, and in what.

    Raises:
        TaskError: it does not.
    """
    columns, asked, model = rows[0].columns, rows[0].where.rpartition(" line ")[0], f"{spec.name} ({spec.architecture})"
    head = task_of(spec) if runs_with_head(spec) else None
    if columns in _TARGETS:
        if not spec.is_decoder:
            raise TaskError(f"{asked} asks for a text ({columns[1]}), which {model} does not write; decoders do.")
        return "writing", "texts"
    if columns == ("question", "context"):
        if head != "span":
            able = "; a decoder takes both as text, and the answer as target" if spec.is_decoder else ""
            raise TaskError(f"{asked} asks where in a context the answer stands, which {model} has no head for{able}.")
        return "head", "spans"
    if missing := next((row for row in rows if row.label is None), None):
        raise TaskError(f"{missing.where} has no label; a task has a column label, target or answers.")
    if spec.is_decoder:
        if len(columns) > 1:
            raise TaskError(f"{asked} has two texts ({' and '.join(columns)}), and {model} reads one; put both into text, as it is to read them.")
        return "words", "classes"
    if head == "span":
        raise TaskError(f"{asked} has labels, and {model} answers questions; it takes the columns question, context and answers.")
    if runs_with_head(spec):
        if head is None:
            raise TaskError(f"{model} gives several labels side by side, which no column says.")
        return "head", "classes" if head == "classes" else "values"
    numbers = [_number(row.label) for row in rows]
    known = {number for number in numbers if number is not None}
    if len(columns) > 1 and None not in numbers and (len(known) > _FEW_VALUES or any(not number.is_integer() for number in known)):
        return "embeddings", "values"
    return "embeddings", "classes"


def _answers(rows: Sequence[Example], spec: ModelSpec, kind: Kind, way: Way) -> list[Any]:
    """What is true of each row."""
    if kind == "texts":
        return [[row.raw[1].strip()] for row in rows]
    if kind == "spans":
        return [_accepted(row) for row in rows]
    if kind == "values":
        for row in rows:
            if (number := _number(row.label)) is None or not math.isfinite(number):
                raise TaskError(f"{row.where}: label {row.label!r} is no number.")
        return [_number(row.label) for row in rows]
    if way == "head":
        return [class_name(class_of(row.label, spec.config, row.where), spec.config) for row in rows]
    return [str(row.label) for row in rows]


def _accepted(row: Example) -> list[str]:
    """The answers of a row that count as right; none: its context does not answer.

    Raises:
        TaskError: it has no column answers.
        TextError: an answer that does not stand in its context.
    """
    if row.answers is None:
        raise TaskError(f"{row.where} has no answers.")
    first = first_answer(row)
    if first.start is None:
        return []
    said = json.loads(row.answers) if isinstance(row.answers, str) and row.answers.lstrip().startswith("{") else row.answers
    texts = said.get("text") if isinstance(said, dict) else said
    return [str(each) for each in texts] if isinstance(texts, list) else [str(texts)]


def _check(found: Sequence[Any], kind: Kind, path: Path) -> None:
    """Raises:
    TaskError: all rows say the same.
    """
    if kind in ("classes", "values") and len(set(found)) < 2:
        raise TaskError(f"{path}: every row that is scored has the label {found[0]}; a score of one label says nothing.")


def _halves(rows: Sequence[Example], found: Sequence[str], path: Path) -> tuple[list[Example], list[str], list[Example], list[str]]:
    """Of each class every other row, in the order of their digests, to fit a classifier on, and the rest to score.

    Raises:
        TaskError: a class of one row.
    """
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(found):
        places[label].append(place)
    if rare := next((label for label, held in places.items() if len(held) < 2), None):
        raise TaskError(f"{path}: label {rare!r} has one row; a classifier on embeddings is fitted on one half and scored on the other.")
    fit = {place for held in places.values() for place in held[::2]}
    inside, outside = sorted(fit), [place for place in range(len(rows)) if place not in fit]
    (fitted, known), (scored, true) = (([rows[place] for place in part], [found[place] for place in part]) for part in (inside, outside))
    return fitted, known, scored, true


def _usual(kind: Kind, found: Sequence[Any]) -> str:
    """The metric of such answers where none is named."""
    if kind == "texts":
        return "exact_match" if all(len(each[0].split()) <= _FEW_WORDS for each in found) else "rougeL"
    return {"classes": "accuracy", "values": "spearman", "spans": "squad_f1"}[kind]


def _length(rows: Sequence[Example], found: Sequence[Any], spec: ModelSpec, folder: Path, way: Way) -> tuple[int, list[str]]:
    """Tokens that are read or written at most, and what is cut by that."""
    tokenizer = Tokenizer(folder)
    if way == "writing":
        longest = max(len(tokenizer.encode(each[0], marks=False).ids) for each in found)
        new = min(MOST_NEW_TOKENS, math.ceil(_SLACK * longest), (spec.max_positions or MOST_NEW_TOKENS) // 2)
    else:
        new = 0
    if way == "head":
        limit, read = min(_HEAD_LEN, spec.max_positions or _HEAD_LEN), [len(tokenizer.encode(*row.raw).ids) for row in rows]
    elif way == "embeddings":
        limit, read = longest_text(folder, spec), [len(tokenizer.encode(text).ids) for row in rows for text in row.texts]
    else:
        limit, read = (spec.max_positions or 2**31) - new, [len(tokenizer.prompt(row.raw[0])) for row in rows]
    cut = sum(count > limit for count in read)
    said = [f"{cut} of {len(read)} texts are longer than {limit} tokens and are cut"] if cut else []
    return new if way == "writing" else min(limit, max(read)), said


def _number(label: Any) -> float | None:
    if isinstance(label, bool):
        return None
    try:
        return float(label)
    except (TypeError, ValueError):
        return None
