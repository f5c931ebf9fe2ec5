"""The text that a model is calibrated on and the text that it is judged on: never the same part for both."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lighten.errors import TextError
from lighten.units import format_bytes

MIN_PASSAGES = 8
"""Fewer distinct passages than this cannot be split into two parts that mean anything: choice, 2 or 3 to calibrate and 5 to test."""

MAX_BYTES = 16_000_000
"""How much of a file is read: choice, some 3 million words, hundreds of times what one evaluation uses."""

COLUMNS = (
    ("text",), ("question", "context"), ("source", "target"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("sentence",), ("source",),
)  # fmt: skip
"""Columns of labelled files that hold what is read, the first that a row has: a text; a question with its context; a pair to translate or to shorten;
two sentences that are compared. Names as the commonest data sets have them (GLUE, MNLI, SQuAD)."""
Columns: TypeAlias = tuple[tuple[str, ...], ...]
LABEL, ANSWERS = "label", "answers"
"""Columns of what is true of a row: its class, by name or number, or its value; and the answers to its question, as texts of the context or as SQuAD
has them, {"text": […], "answer_start": […]}."""
_CALIBRATION_SHARE = 1 / 3
_MIN_CHARACTERS = 60  # of an embedded passage: shorter ones are list items such as "Added in version 3.8."; looked at by hand
_MIN_PROSE_SHARE = 0.8  # of letters and spaces: below it are code, grammar and tables; looked at by hand
_NOT_PROSE = ("::=", ">>>", "+--", "***", "====", "----")  # grammar, sessions, tables, underlined headings
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer that stands in a context.

    Attributes:
        start: of its characters in the context; None: the context does not answer.
    """

    text: str = ""
    start: int | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a labelled file.

    Attributes:
        columns: one of `COLUMNS`.
        texts: what they hold, white space as one space.
        raw: the same as the file has it.
        label: as the file has it; None: it has none.
        answers: as the file has them; None: it has none.
        context: as the file has it, which the places of answers count in.
        where: file and line, for what is said of it.
    """

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    raw: tuple[str, ...] = ()
    label: Any = None
    answers: Any = None
    context: str = ""
    where: str = ""

    @property
    def joined(self) -> str:
        return " ".join(text for text in self.texts if text)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Passages in two parts that share none.

    Attributes:
        source: where it comes from, and how much of it was read where not all was.
        calibration: passages that a compression may look at; never in `test`.
        test: passages that quality is measured on.
        fingerprint: sha256 of all passages, their columns, their labels and of how they are split: equal only where all are.
        examples: the rows of `calibration`, one each, where the file has pairs, labels or answers; else none.
    """

    source: str
    calibration: tuple[str, ...]
    test: tuple[str, ...]
    fingerprint: str
    examples: tuple[Example, ...] = ()


def load_text(path: Path | None) -> Text:
    """The calibration and the test part of the user's text, or of the one that every Python carries.

    None: the help topics in `pydoc_data.topics`, English prose of which tables, code, grammar and headings are dropped. Topics that
    share a passage are one document; whole documents go to one part, in the order of the sha256 of their names, the first third of
    the characters to calibration. The topics differ between Python versions, and so does the fingerprint.

    A `.txt` file: passages are parted by blank lines, or are its lines where it has no blank line. A `.jsonl` file: each line an object with a
    "text" or the columns of one of `COLUMNS`, and a "label" or "answers" where it has one; a `.csv` or `.tsv` file with a header: the same
    columns. As a passage a row's two texts are joined; `Text.examples` keeps them apart, with what is true of them. Repeated passages count once,
    with what the first says of them. The first third of the passages is for calibration, the rest for the test: two blocks, so that a test
    passage's neighbours are not calibrated on.

    Args:
        path: a UTF-8 file, of which at most `MAX_BYTES` are read.

    Raises:
        TextError: the file is missing, empty, of another kind, not UTF-8, or has fewer than `MIN_PASSAGES` distinct passages.
    """
    if path is None:
        return _embedded_text()
    content, source = _read(path)
    kind = path.suffix.lower()
    examples = _distinct_rows(_READERS[kind](path, content, COLUMNS)) if kind in _READERS else {}
    passages = list(examples) if kind in _READERS else _distinct(_paragraphs(content))
    if not passages:
        raise TextError(f"{path} holds no text; give a .txt file with passages of prose parted by blank lines, or a .jsonl file.")
    if len(passages) < MIN_PASSAGES:
        raise TextError(
            f"{path} is too short to be split into calibration and test: it has {len(passages)} distinct passages and at least "
            f"{MIN_PASSAGES} are needed; part the passages by blank lines, or give a longer text."
        )
    middle = round(len(passages) * _CALIBRATION_SHARE)
    return _text(source, passages[:middle], passages[middle:], examples)


def _text(source: str, calibration: Sequence[str], test: Sequence[str], rows: Mapping[str, Example] | None = None) -> Text:
    told = any(len(row.texts) > 1 or row.label is not None or row.answers is not None for row in (rows or {}).values())
    examples = tuple(rows[passage] for passage in calibration) if rows and told else ()
    said = [[row.columns, row.texts, row.label, row.answers, row.context] for row in rows.values()] if rows and told else []
    content = json.dumps([list(calibration), list(test), *([said] if said else [])]).encode()
    fingerprint = hashlib.sha256(content).hexdigest()
    return Text(source=source, calibration=tuple(calibration), test=tuple(test), fingerprint=fingerprint, examples=examples)


def _distinct_rows(rows: Iterable[Example]) -> dict[str, Example]:
    """Passage → the first row that says it."""
    found: dict[str, Example] = {}
    for row in rows:
        if row.joined:
            found.setdefault(row.joined, row)
    return found


def _distinct(passages: Iterable[str]) -> list[str]:
    """The passages with each run of white space as one space, in order, without repetitions and empty ones."""
    joined = dict.fromkeys(map(_spaced, passages))
    return [passage for passage in joined if passage]


def _paragraphs(content: str) -> list[str]:
    content = content.strip()
    return _BLANK_LINES.split(content) if _BLANK_LINES.search(content) else content.split("\n")


def _read(path: Path) -> tuple[str, str]:
    """The file's text with `\\n` line ends, and what was read, for `Text.source`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        size = path.stat().st_size
    except OSError as error:
        raise TextError(f"{path} cannot be read as a text: {error.strerror or error}; give a readable .txt or .jsonl file.") from error
    if path.suffix.lower() not in (".txt", ".jsonl", ".csv", ".tsv"):
        said = 'accepted: .txt (passages parted by blank lines), .jsonl (a "text" a line), .csv and .tsv (a column text).'
        raise TextError(f"{path} is not a text of a known kind; {said}")
    cut = len(data) > MAX_BYTES
    try:
        content = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:MAX_BYTES], final=not cut)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8.") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if not cut:
        return content, str(path)
    whole = content.rfind("\n")  # what follows the last line end is part of a line
    return content[:whole] if whole > 0 else content, f"{path} (the first {format_bytes(MAX_BYTES)} of {format_bytes(size)})"


def read_examples(path: Path, columns: Columns) -> tuple[list[Example], str]:
    """Every row of a labelled file by the first of `columns` that it has, and what was read.

    Raises:
        TextError: it cannot be read, is of another kind, or has a row without these.
    """
    content, source = _read(path)
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise TextError(f"{path} has no columns; labels are in a .csv, a .tsv or a .jsonl file.")
    return _READERS[kind](path, content, columns), source


def _json_rows(path: Path, content: str, columns: Columns = COLUMNS) -> list[Example]:
    found = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f'{where} is not JSON: {error}; each line is an object such as {{"text": "…"}}.') from error
        example = _example(row, where, columns) if isinstance(row, dict) else None
        if example is None:
            said = f"the fields {', '.join(row) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise TextError(f'{where} has no text, but {said}; each line is an object such as {{"text": "…"}}.')
        found.append(example)
    return found


def _table_rows(path: Path, content: str, columns: Columns = COLUMNS) -> list[Example]:
    rows = csv.DictReader(io.StringIO(content), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        found = [_example(row, _place(path, rows, row), columns) for row in rows]
    except csv.Error as error:
        raise TextError(f"{path} line {rows.reader.line_num} is not of a table of the kind that the file's name says: {error}.") from error
    if any(example is None for example in found):
        known = "; ".join(" and ".join(names) for names in columns)
        raise TextError(f"{path} has the columns {', '.join(rows.fieldnames or ['none'])}; a text is in one of: {known}.")
    return [example for example in found if example is not None]


def _place(path: Path, rows: csv.DictReader[str], row: Mapping[str | None, Any]) -> str:
    """Where a row stands.

    Raises:
        TextError: it has another number of cells than the header.
    """
    where = f"{path} line {rows.line_num}"
    if None in row or any(value is None for value in row.values()):
        cells = len(row.get(None) or []) + sum(value is not None for name, value in row.items() if name is not None)
        raise TextError(f"{where} has {cells} cells and the header {len(rows.fieldnames or [])}; a cell with a comma or a line end is quoted.")
    return where


def _example(row: Mapping[str, Any], where: str, columns: Columns) -> Example | None:
    """What a row says, by the first of `columns` that it has."""
    names = next((names for names in columns if all(isinstance(row.get(name), str) for name in names)), None)
    if names is None:
        return None
    label, answers = ((said.strip() or None) if isinstance(said, str) else said for said in (row.get(LABEL), row.get(ANSWERS)))
    raw = tuple(str(row[name]) for name in names)
    texts = tuple(map(_spaced, raw))
    context = raw[-1] if answers is not None else ""
    return Example(columns=names, texts=texts, raw=raw, label=label, answers=answers, context=context, where=where)


_READERS: dict[str, Callable[[Path, str, Columns], list[Example]]] = {".jsonl": _json_rows, ".csv": _table_rows, ".tsv": _table_rows}


def first_answer(row: Example) -> Answer:
    """The first of a row's answers, by its place in `texts[-1]`.

    Raises:
        TextError: it does not stand there.
    """
    said, context, where = row.answers, row.context, row.where
    if isinstance(said, str) and said.lstrip().startswith("{"):  # a cell of a table
        try:
            said = json.loads(said)
        except ValueError as error:
            raise TextError(f"{where}: its answers are not JSON ({error}).") from error
    texts, starts = (said.get("text"), said.get("answer_start")) if isinstance(said, Mapping) else (said, None)
    texts, starts = (list(each) if isinstance(each, list) else [] if each is None else [each] for each in (texts, starts))
    if not texts:
        return Answer()
    text = _spaced(str(texts[0]))
    if starts and isinstance(starts[0], int):
        before = _spaced(context[: starts[0]])
        start = len(before) + bool(before and context[starts[0] - 1 : starts[0]].isspace())
    else:
        start = _spaced(context).find(text)
    if not text or start < 0 or _spaced(context)[start : start + len(text)] != text:
        raise TextError(f"{where}: the answer {text!r} does not stand in its context{f' at character {starts[0]}' if starts else ''}.")
    return Answer(text=text, start=start)


def _spaced(text: str) -> str:
    """Each run of white space as one space."""
    return " ".join(text.split())


def _embedded_text() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("The embedded text, pydoc_data.topics, is not in this Python; give a text with --text FILE.") from error
    documents = _documents({name: _prose(topic) for name, topic in sorted(topics.items())})
    total = sum(len(passage) for passages in documents.values() for passage in passages)
    calibration: list[str] = []
    test: list[str] = []
    used = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(map(len, documents[name]))
        if used + size <= total * _CALIBRATION_SHARE:
            used += size
            calibration += documents[name]
        else:
            test += documents[name]
    if min(len(calibration), len(test)) < MIN_PASSAGES:
        raise TextError(
            f"The embedded text, pydoc_data.topics, is too short in this Python: {len(calibration) + len(test)} passages; "
            "give a text with --text FILE."
        )
    return _text("embedded: pydoc_data.topics", calibration, test)


def _prose(topic: str) -> list[str]:
    """The topic's paragraphs that are sentences, not tables, code, grammar or headings."""
    blocks = _BLANK_LINES.split(topic)
    joined = [" ".join(block.split()) for block in blocks if not any(mark in block for mark in _NOT_PROSE)]
    return [block for block in joined if len(block) >= _MIN_CHARACTERS and _prose_share(block) >= _MIN_PROSE_SHARE]


def _prose_share(passage: str) -> float:
    return sum(character.isalpha() or character == " " for character in passage) / len(passage)


def _documents(topics: dict[str, list[str]]) -> dict[str, list[str]]:
    """The passages of topics that share one, joined under the first topic's name; each passage once.

    The help topics are overlapping cuts of one manual: `while` is a section of `compound`. Parted by topic, a passage and the sentence
    that follows it would land in both parts.
    """
    owner: dict[str, str] = {}  # passage → the document that has it
    members: dict[str, list[str]] = {}  # document → its topics
    for name, passages in topics.items():
        members[name] = [name]
        for other in sorted({owner[passage] for passage in passages if passage in owner}):
            members[name] += members.pop(other)
        for topic in members[name]:
            owner.update(dict.fromkeys(topics[topic], name))
    joined = {min(names): _distinct(passage for topic in sorted(names) for passage in topics[topic]) for names in members.values()}
    return {name: passages for name, passages in joined.items() if passages}
