"""Spans of a text as further rows of distill(embeddings), and that the whole of a short text is calibrated on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_architecture import calibration, save_architecture

from lighten.compress.journal import Journal
from lighten.compress.spans import span_rows, spans_of
from lighten.compress.walk import Checkpoint, do_recipe
from lighten.errors import RecipeError, TextError
from lighten.judge.calibration import text_windows
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.model import read_spec
from lighten.recipe import apply_recipe, parse_recipe

CLS, SEP = 2, 3


def marked(count: int, length: int) -> list[torch.Tensor]:
    """Rows of distinct tokens between two marks."""
    words = torch.arange(10, 10 + count * (length - 2)).reshape(count, length - 2)
    return [torch.tensor([CLS, *row.tolist(), SEP]) for row in words]


def test_a_span_is_a_run_of_the_text_between_the_marks() -> None:
    found = spans_of(marked(8, 40), count=640)
    assert [tuple(each.shape) for each in found] == [(20, 16), (10, 32)]
    for rows in found:
        assert rows[:, 0].eq(CLS).all()
        assert rows[:, -1].eq(SEP).all()
        assert rows[:, 1:-1].diff(dim=1).eq(1).all()  # across the ends of rows too
        assert len(rows.unique(dim=0)) > len(rows) / 2


def test_the_same_seed_gives_the_same_spans() -> None:
    first, same, other = (torch.cat([each.flatten() for each in spans_of(marked(8, 40), count=640, seed=seed)]) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_rows_of_one_length_are_cut_to_it_and_no_marks_are_made_up() -> None:
    (found,) = spans_of([torch.arange(start, start + 20) for start in (0, 100)], count=50, length=5)
    assert found.shape == (10, 5)
    assert span_rows(50, longest=20, length=30) == {20: 2}
    assert span_rows(3, longest=20) == {}


def test_rows_that_are_alike_are_refused() -> None:
    with pytest.raises(TextError, match=r"the text's rows are all alike; give a text of more than one passage\."):
        spans_of([torch.arange(9)] * 3, count=50)


def train(folder: Path, work: Path, more: str, batches: Callable[[int], Any]) -> tuple[Mapping[str, Any], list[str]]:
    said: list[str] = []
    recipe = parse_recipe(f"prune(magnitude, sparsity=0.5) | distill(embeddings, steps=2, batch_tokens=128, tokens=512{more})")
    with Journal.open(work, {}, resume=False) as journal:
        done = do_recipe(Checkpoint(folder), read_spec(folder), recipe, folder, journal, calibration=batches, log=said.append)
        return done.curves[0], said


def test_spans_are_trained_on_unless_there_are_to_be_none(tmp_path: Path) -> None:
    folder = save_architecture("bert", tmp_path / "model")
    passes = {}
    for more in ("", ", span_tokens=0", ", span_tokens=160", ", seq_len=8"):
        report, said = train(folder, tmp_path / f"work{more}", more, calibration("bert"))
        passes[more], lines = report["teacher_passes"], [line for line in said if "spans of the text's" in line]
        assert bool(lines) == (more != ", span_tokens=0"), said
        if more == ", seq_len=8":
            assert lines[0].endswith("of 8 tokens")
    assert passes[""] > passes[", span_tokens=160"] > passes[", span_tokens=0"]


@pytest.mark.parametrize(("name", "said"), [("vit", "span_tokens are cut from text, and"), ("llama", "has no argument span_tokens")])
def test_spans_of_what_is_no_text_are_refused(tmp_path: Path, name: str, said: str) -> None:
    folder = save_architecture(name, tmp_path / "model")
    method = "embeddings" if name == "vit" else "logits"
    with pytest.raises(RecipeError, match=said):
        apply_recipe(parse_recipe(f"distill({method}, span_tokens=100)"), read_spec(folder))


def test_spans_of_one_row_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = save_architecture("bert", tmp_path / "model")
    row = [{"input_ids": np.arange(4, 20)[None]}]
    train(folder, tmp_path / "none", "", lambda tokens: row)
    with pytest.raises(RecipeError, match=r"span_tokens are cut from two or more rows of plain text; leave them out\."):
        train(folder, tmp_path / "some", ", span_tokens=64", lambda tokens: row)


def test_all_of_a_short_text_is_calibrated_on_and_few_tokens_are_of_many_passages(minilm: Path, tmp_path: Path) -> None:
    words = ["the", "old", "red", "house", "by", "the", "sea", "was", "sold", "to", "a", "young", "man"] * 10
    passages = [f"{number} {' '.join(words[number % 13 :][:60])}" for number in range(90)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    text, spec = load_text(tmp_path / "a.jsonl"), read_spec(minilm)
    count = len(Tokenizer(minilm).encode(" ".join(text.calibration), marks=False).ids)
    (batch,) = text_windows(minilm, spec, text)(1_000_000)
    rows = batch["input_ids"]
    assert rows.shape == (count // 126, 128)
    assert {int(row[0]) for row in rows} == {int(rows[0, 0])}
    assert {int(row[-1]) for row in rows} == {int(rows[0, -1])}
    (few,) = text_windows(minilm, spec, text)(256)
    assert few["input_ids"].shape == (2, 128)
    assert not np.array_equal(few["input_ids"][1], rows[1])
