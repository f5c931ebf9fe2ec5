"""What a model answers to a task's rows, by its head, by how likely its words are, or in its own words; and to what lm-eval asks.

Legend: B rows of a batch, S positions, L labels, T tokens of a continuation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lighten.judge.quality import token_scores
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import ModelSpec
from lighten.model.tasks import class_name, task_of, token_types
from lighten.runtimes import Session

STEP = 64
"""Rows are padded to a multiple of so many tokens, so that a runtime sees few shapes."""
SPAN_TOKENS = 30
"""Of an answer at most. Source: `max_answer_length` of BERT's run_squad.py."""


def by_head(session: Session, spec: ModelSpec, tokenizer: Tokenizer, asked: dict[str, Any], *, batch_size: int, one_shape: bool) -> list[Any]:
    """Classes by name, values, or parts of contexts.

    Args:
        one_shape: pad all rows to one length: each shape is compiled.
    """
    encodings = [tokenizer.encode(*row, length=asked["length"]) for row in asked["rows"]]
    found: list[Any] = [None] * len(encodings)
    order = sorted(range(len(encodings)), key=lambda place: len(encodings[place].ids))
    longest = max(len(encoding.ids) for encoding in encodings)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        length = min(asked["length"], -(-(longest if one_shape else len(encodings[places[-1]].ids)) // STEP) * STEP)
        ids, mask, types = (np.zeros((batch_size, length), np.int64) for _ in range(3))
        for row in range(batch_size):
            encoding = encodings[places[row] if row < len(places) else places[0]]
            count = len(encoding.ids)
            ids[row, :count], mask[row, :count] = encoding.ids, 1
            if token_types(spec) > 1:
                types[row, :count] = encoding.type_ids
        logits = session.classify(ids, mask, types)
        for row, place in enumerate(places):
            found[place] = _said(logits[row], spec, encodings[place], asked["rows"][place], may_be_empty=asked["may_be_empty"])
    return found


def _said(logits: Any, spec: ModelSpec, encoding: Any, row: Sequence[str], *, may_be_empty: bool) -> Any:
    task = task_of(spec)
    if task == "classes":
        return class_name(int(logits.argmax()), spec.config)
    if task == "value":
        return float(logits[0])
    return best_span(logits, encoding, row[-1], may_be_empty=may_be_empty)


def best_span(logits: Any, encoding: Any, context: str, *, may_be_empty: bool) -> str:
    """The part of a context whose first and last token have the highest sum of logits; nothing where the mark before the question has a higher one.

    Args:
        logits: [S, 2], of starts and of ends.
        may_be_empty: whether no answer is one.

    Source: Devlin et al. 2018 (arXiv:1810.04805), sections 4.2 and 4.3.
    """
    inside = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    starts, ends = logits[: len(encoding.ids), 0].astype(np.float64), logits[: len(encoding.ids), 1].astype(np.float64)
    best, span = -np.inf, None
    for first in inside:
        last = first + int(ends[first : min(first + SPAN_TOKENS, inside[-1] + 1)].argmax())
        if starts[first] + ends[last] > best:
            best, span = starts[first] + ends[last], (first, last)
    if span is None or (may_be_empty and starts[0] + ends[0] >= best):
        return ""
    return context[encoding.offsets[span[0]][0] : encoding.offsets[span[1]][1]]


def by_words(session: Session, spec: ModelSpec, tokenizer: Tokenizer, asked: dict[str, Any]) -> list[str]:
    """The label whose words are the likeliest to follow the text, by the sum over their tokens; after a space where the text ends in none."""
    return [_likeliest(session, spec, tokenizer, row[0], asked["labels"]) for row in asked["rows"]]


def _likeliest(session: Session, spec: ModelSpec, tokenizer: Tokenizer, text: str, labels: Sequence[str]) -> str:
    text = text.rstrip(" ")
    known = tokenizer.prompt(text)
    space = "" if text.endswith("\n") else " "
    rows = []
    for label in labels:
        whole = tokenizer.prompt(f"{text}{space}{label}")
        same = next((place for place, pair in enumerate(zip(known, whole, strict=False)) if pair[0] != pair[1]), min(len(known), len(whole)))
        rows.append((whole[-((spec.max_positions or len(whole)) + 1) :], len(whole) - same))
    found = [likelihood for likelihood, _ in by_continuations(session, rows)]
    return labels[found.index(max(found))]


def by_continuations(session: Session, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
    """Of each row, tokens and how many of their last go on: how likely those are to follow, in nats, and whether each is the likeliest. Rows with the
    same tokens before their last take one pass."""
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    by_input: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, (tokens, _) in enumerate(rows):
        by_input[tuple(tokens[:-1])].append(place)
    for ids, places in by_input.items():
        logits = session.logits(np.array([ids], np.int64))[0]
        for place in places:
            tokens, count = rows[place]
            if count:
                last, new = logits[-count:], np.array(tokens[-count:])
                found[place] = float(token_scores(last, new).sum()), bool((last.argmax(-1) == new).all())
    return found


def by_prompts(session: Session, tokenizer: Tokenizer, rows: Sequence[tuple[Sequence[int], int, Sequence[str]]], ends: Collection[int]) -> list[str]:
    """Of each row, a prompt's tokens, how many new ones at most and texts that end it: what a decoder writes up to the first of these, the likeliest
    token at a time."""
    stops: dict[str, set[int]] = {}
    found = []
    for prompt, new, until in rows:
        for text in until:
            if text not in stops:
                stops[text] = tokenizer.tokens_with(text)
        ids = session.generate(np.array([prompt], np.int64), new, {*ends, *(token for text in until for token in stops[text])}).ids[0].tolist()
        written = tokenizer.decode(ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))])
        found.append(written[: min((at for text in until if text and (at := written.find(text)) >= 0), default=len(written))])
    return found


def by_writing(session: Session, spec: ModelSpec, tokenizer: Tokenizer, asked: dict[str, Any], ends: Sequence[int]) -> list[str]:
    """What a decoder writes after each text, the likeliest token at a time, up to a token that ends it."""
    new = asked["length"]
    stops = {*ends, *(tokenizer.tokens_with("\n") if asked["stops_at_line"] else ())}
    found = []
    for row in asked["rows"]:
        prompt = tokenizer.prompt(row[0])[-((spec.max_positions or 2**31) - new) :]
        ids = session.generate(np.array([prompt], np.int64), new, stops).ids[0].tolist()
        own = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:own])
        found.append((text.split("\n")[0] if asked["stops_at_line"] else text).strip())
    return found
