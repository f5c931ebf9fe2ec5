"""Spans of a text as further rows of distill(embeddings), and that the whole of a short text is calibrated on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_architecture import calibration, save_architecture

from lighten.compress import distill_dense
from lighten.compress.journal import Journal
from lighten.compress.spans import plan_spans, spans_of
from lighten.compress.training_time import _rows_of
from lighten.compress.walk import Checkpoint, do_recipe
from lighten.errors import RecipeError
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
    found = spans_of(marked(8, 40), {16: 20, 32: 10})
    assert [tuple(each.shape) for each in found] == [(20, 16), (10, 32)]
    for rows in found:
        assert rows[:, 0].eq(CLS).all()
        assert rows[:, -1].eq(SEP).all()
        assert rows[:, 1:-1].diff(dim=1).eq(1).all()  # across the ends of rows too
        assert len(rows.unique(dim=0)) > len(rows) / 2


def test_the_same_seed_gives_the_same_spans() -> None:
    first, same, other = (torch.cat([each.flatten() for each in spans_of(marked(8, 40), {16: 40}, seed=seed)]) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_row_that_lost_its_mark_takes_it_from_no_other() -> None:
    rows = marked(8, 40)
    rows[3] = torch.cat([rows[3][:-1], rows[3][:1]])  # filled from its start, as a row that a smaller vocabulary spells in fewer tokens
    (found,) = spans_of(rows, {20: 30})
    assert found[:, 0].eq(CLS).all()
    assert found[:, -1].eq(SEP).all()
    assert not (found[:, 1:-1] == SEP).any()


def test_no_marks_are_made_up_and_alike_rows_have_spans() -> None:
    (found,) = spans_of([torch.arange(start, start + 20) for start in (0, 100)], {5: 10})
    assert found.shape == (10, 5)
    (alike,) = spans_of([torch.arange(40)] * 3, {8: 5})
    assert alike.shape == (5, 8)
    assert spans_of([torch.arange(9)] * 3, {16: 5}) != []
    assert spans_of([torch.tensor([CLS, 9, SEP])] * 3, {2: 5, 4: 5}) == []


def test_each_length_has_as_many_tokens() -> None:
    step = parse_recipe("distill(embeddings, span_tokens=1000)").steps[0]
    assert plan_spans(step, {100: 7}, plain=True) == {16: 20, 32: 10, 64: 5}
    assert plan_spans(step, {9: 7}, plain=True) == {9: 111}
    assert plan_spans(parse_recipe("distill(embeddings, span_tokens=1000, seq_len=50)").steps[0], {50: 7}, plain=True) == {50: 20}
    assert plan_spans(parse_recipe("distill(embeddings, span_tokens=3)").steps[0], {100: 7}, plain=True) == {}
    assert plan_spans(parse_recipe("distill(embeddings, tokens=640)").steps[0], {20: 7}, plain=True) == {16: 40}
    assert plan_spans(parse_recipe("distill(logits)").steps[0], {20: 7}, plain=True) == {}


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
        passes[more], lines = report["teacher_passes"], [line for line in said if "spans of it, of" in line]
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


def test_what_is_held_out_is_in_no_span(tmp_path: Path) -> None:
    folder = save_architecture("bert", tmp_path / "model")
    ids = np.arange(10, 10 + 16 * 3)  # eight rows of six words, each word once: the last row is held out
    rows = [{"input_ids": np.array([[CLS, *ids[place * 6 : place * 6 + 6], SEP] for place in range(8)])}]
    seen: list[set[int]] = []
    record = distill_dense.record

    def spy(asking: Any, samples: Sequence[Mapping[str, torch.Tensor]], path: Path) -> Any:
        seen.extend(set(sample["input_ids"].flatten().tolist()) for sample in samples)
        return record(asking, samples, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_dense, "record", spy)
        train(folder, tmp_path / "work", ", span_tokens=400", lambda tokens: rows)
    text, spans = seen[:8], seen[8:]
    assert len(spans) == 400 // 8
    held_out = text[7] - {CLS, SEP}
    assert all(span.isdisjoint(held_out) for span in spans)
    assert set.union(*spans) >= set.union(*text[:7])


def test_predicted_rows_are_those_of_the_run(tmp_path: Path) -> None:
    folder = save_architecture("bert", tmp_path / "model")
    ids = np.random.default_rng(0).integers(4, 64, (24, 40))
    for number, (batch, more) in enumerate([
        ({"input_ids": ids}, ""), ({"input_ids": ids}, ", seq_len=10"), ({"input_ids": ids, "attention_mask": np.ones_like(ids)}, ""),
    ]):  # fmt: skip
        _, said = train(folder, tmp_path / str(number), more, lambda tokens, batch=batch: [batch])
        step = parse_recipe(f"distill(embeddings, tokens=512{more})").steps[0]
        rows, _ = _rows_of(step, read_spec(folder), [batch])
        assert any(line.startswith(f"the original answered {rows} rows") for line in said)


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
