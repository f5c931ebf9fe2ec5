"""The two parts of a text share nothing, are the same each time, and what is no text is refused in words."""

from __future__ import annotations

import csv
import io
import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.errors import TextError
from lighten.judge import load_text, text

PASSAGES = [f"Passage {number} is about the number {number}." for number in range(30)]
passages = st.lists(st.text("abc déß.", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=40)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- the embedded text ----


def test_embedded_parts_share_no_passage_and_repeat_none():
    found = load_text(None)
    everything = found.calibration + found.test
    assert len(set(everything)) == len(everything)


def test_embedded_text_is_enough_and_its_third_calibrates():
    found = load_text(None)
    characters = [sum(map(len, part)) for part in (found.calibration, found.test)]
    assert len(found.test) >= 500
    assert 0.28 <= characters[0] / sum(characters) <= 1 / 3


def test_embedded_text_is_prose():
    for passage in (*load_text(None).calibration, *load_text(None).test):
        assert len(passage) >= 60
        assert passage == " ".join(passage.split())
        assert not any(mark in passage for mark in ("+---", "::=", ">>>", "****", "===="))


def test_embedded_text_is_the_same_each_time_and_says_where_it_is_from():
    assert load_text(None) == load_text(None)
    assert load_text(None).source == "embedded: pydoc_data.topics"


def test_no_topic_is_in_both_parts():
    """Also not by way of another topic that has the same passage, as `while` is a section of `compound`."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    found = load_text(None)
    calibration, test = set(found.calibration), set(found.test)
    for topic in topics.values():
        own = {" ".join(block.split()) for block in topic.split("\n\n")}
        assert not (own & calibration and own & test)


def test_topics_that_share_a_passage_are_one_document():
    documents = text._documents({"a": ["1", "2"], "b": ["3"], "c": ["4"], "d": ["2", "3", "5"], "e": []})
    assert documents == {"a": ["1", "2", "3", "5"], "c": ["4"]}


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("0123456789"), unique=True, max_size=4)))
def test_documents_lose_no_passage_and_part_no_topic(topics):
    documents = text._documents(dict(sorted(topics.items())))
    everything = [passage for passages in documents.values() for passage in passages]
    assert sorted(everything) == sorted({passage for passages in topics.values() for passage in passages})
    for passages in topics.values():
        assert sum(not set(passages).isdisjoint(document) for document in documents.values()) == bool(passages)


def test_a_python_without_its_topics_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match=r"embedded text, pydoc_data.topics, is not in this Python; give a text with --text FILE"):
        load_text(None)


def test_a_python_with_empty_topics_is_told(monkeypatch):
    from pydoc_data import topics

    monkeypatch.setattr(topics, "topics", {"a": "x" * 99})
    with pytest.raises(TextError, match=r"too short in this Python: 1 passages; give a text"):
        load_text(None)


# ---- a user's file ----


def test_paragraphs_are_joined_and_split_into_two_blocks(tmp_path):
    content = "\n \n".join(passage.replace(" about ", "\n  about\t") for passage in PASSAGES)
    found = load_text(write(tmp_path, "a.txt", content))
    assert found.calibration == tuple(PASSAGES[:10])
    assert found.test == tuple(PASSAGES[10:])
    assert found.source == str(tmp_path / "a.txt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_without_blank_lines_is_read_by_lines(tmp_path, end):
    found = load_text(write(tmp_path, "a.TXT", end.join(PASSAGES) + end * 3))
    assert found.calibration + found.test == tuple(PASSAGES)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_give_their_text(tmp_path, end):
    lines = [json.dumps({"id": 1, "text": passage}, ensure_ascii=number % 2 == 0) for number, passage in enumerate(PASSAGES)]
    found = load_text(write(tmp_path, "a.jsonl", (end * 2).join(lines)))
    assert found.calibration + found.test == tuple(PASSAGES)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize(
    ("names", "others"), [(("text",), ("label",)), (("question", "context"), ("answers",)), (("source", "target"), ()), (("sentence",), ("label",))]
)
def test_labelled_files_give_the_texts_of_their_columns_and_leave_labels_alone(tmp_path, suffix, names, others):
    rows = [{name: f"{passage}, in {name}" for name in names} | dict.fromkeys(others, "1") for passage in PASSAGES]
    if suffix == "jsonl":
        content = "\n".join(map(json.dumps, rows))
    else:
        file = io.StringIO()
        table = csv.DictWriter(file, [*others, *names], delimiter="\t" if suffix == "tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        content = file.getvalue()
    found = load_text(write(tmp_path, f"a.{suffix}", content))
    assert found.calibration + found.test == tuple(" ".join(row[name] for name in names) for row in rows)


def test_a_table_without_a_text_says_which_columns_it_has(tmp_path):
    with pytest.raises(TextError, match=r"has the columns id, label; a text is in one of: text; question and context; source and target"):
        load_text(write(tmp_path, "a.csv", "id,label\n" + "1,2\n" * 9))


def test_a_json_text_keeps_its_blank_lines_in_one_passage(tmp_path):
    lines = [json.dumps({"text": f"{passage}\n\nAnd more."}) for passage in PASSAGES]
    assert load_text(write(tmp_path, "a.jsonl", "\n".join(lines))).calibration[0] == f"{PASSAGES[0]} And more."


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert load_text(write(tmp_path, "a.txt", b"\xef\xbb\xbf" + "\n\n".join(PASSAGES).encode())).calibration[0] == PASSAGES[0]


@given(passages)
def test_any_paragraphs_are_split_without_overlap_or_loss(tmp_path_factory, passages):
    path = write(tmp_path_factory.mktemp("text"), "a.txt", "\n\n".join(passages) + "\n\n")
    distinct = list(dict.fromkeys(" ".join(passage.split()) for passage in passages))
    if len(distinct) < 8:
        with pytest.raises(TextError, match="too short"):
            load_text(path)
        return
    found = load_text(path)
    assert not set(found.calibration) & set(found.test)
    assert [*found.calibration, *found.test] == distinct
    assert len(found.calibration) >= 2
    assert len(found.test) > len(found.calibration)
    assert found == load_text(path)


def test_the_fingerprint_changes_with_content_and_order_and_not_with_the_path(tmp_path):
    first, same, reordered, other = (
        load_text(write(tmp_path, name, "\n\n".join(content))).fingerprint
        for name, content in [("a.txt", PASSAGES), ("b.txt", PASSAGES), ("c.txt", PASSAGES[::-1]), ("d.txt", [*PASSAGES, "One more."])]
    )
    assert first == same
    assert len({first, reordered, other}) == 3
    assert len(first) == 64


@pytest.mark.parametrize("cut", range(100, 110))
def test_a_long_file_is_cut_at_a_line_and_says_so(tmp_path, monkeypatch, cut):
    """Also where the cut falls into a letter of two bytes."""
    monkeypatch.setattr(text, "MAX_BYTES", cut)
    found = load_text(write(tmp_path, "a.txt", "\n".join(f"{number:02} éé" for number in range(50))))
    read = found.calibration + found.test
    assert read == tuple(f"{number:02} éé" for number in range(len(read)))
    assert cut - 8 - 1 <= len("\n".join(read).encode()) <= cut
    assert found.source == f"{tmp_path / 'a.txt'} (the first {cut} B of 399 B)"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", "x", r"a\.pdf is not a text of a known kind; accepted: \.txt \(passages parted by blank lines\), \.jsonl"),
        ("a.txt", "", r"a\.txt holds no text; give a \.txt file with passages"),
        ("a.txt", " \n\t\n\n", r"a\.txt holds no text"),
        ("a.jsonl", "\n", r"a\.jsonl holds no text"),
        (
            "a.txt",
            "Only one line of text.",
            r"too short .* has 1 distinct passages and at least 8 are needed; part the passages by blank lines",
        ),
        ("a.txt", "again\n\n" * 50, r"has 1 distinct passages"),
        ("a.txt", "\n\n".join(PASSAGES[:7]), r"has 7 distinct passages"),
        ("a.txt", "\n\n".join(PASSAGES).encode("utf-16"), r"a\.txt is not UTF-8 \(byte 0 is 0xff\); save it as UTF-8"),
        ("a.txt", "abc é".encode("latin-1"), r"not UTF-8 \(byte 4 is 0xe9\)"),
        ("a.jsonl", '{"text": "a"}\nnot json', r'line 2 is not JSON: .*; each line is an object such as \{"text": "…"\}'),
        ("a.jsonl", "[" * 100_000, r"line 1 is not JSON"),
        ("a.jsonl", '{"title": "a", "body": "b"}', r"line 1 has no text, but the fields title, body; each line is an object"),
        ("a.jsonl", '{"text": null}', r"line 1 has no text, but the fields text;"),
        ("a.jsonl", "{}", r"has no text, but the fields none;"),
        ("a.jsonl", '["a"]', r"has no text, but a list;"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    with pytest.raises(TextError, match=message) as caught:
        load_text(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"no-such\.txt cannot be read as a text: No such file or directory; give a readable \.txt or \.jsonl file"):
        load_text(tmp_path / "no-such.txt")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(TextError, match="cannot be read as a text: Is a directory"):
        load_text(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_refused(tmp_path):
    path = write(tmp_path, "a.txt", "x")
    path.chmod(0)
    with pytest.raises(TextError, match="Permission denied"):
        load_text(path)
