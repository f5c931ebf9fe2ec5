"""How a folder's embeddings are pooled, by both forms of sentence-transformers' description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import ModelError
from lighten.model.pooling import pooling, pools_first_token


def described(folder: Path, said: str) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(said)
    return folder


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True), ({"pooling_mode_mean_tokens": True}, False),
        ({"pooling_mode": "mean", "word_embedding_dimension": 8}, False), ({"pooling_mode": "cls"}, True),
    ],
)  # fmt: skip
def test_the_models_own_pooling_is_followed(tmp_path: Path, said: dict[str, Any], first: bool) -> None:
    assert not pools_first_token(tmp_path)
    assert pools_first_token(described(tmp_path, json.dumps(said))) is first


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"pooling_mode_max_tokens": True}, r"pools by max; here are mean, cls\."), ({}, r"pools by nothing known; here are mean, cls\."),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, r"pools by mean and max; here are mean, cls\."),
        ({"pooling_mode": ["cls"]}, "pools by nothing known"),
    ],
)  # fmt: skip
def test_another_pooling_is_said(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        pools_first_token(described(tmp_path, json.dumps(said)))


@pytest.mark.parametrize("said", ["{", "[]", "3"])
def test_a_description_that_cannot_be_read_is_one_line(tmp_path: Path, said: str) -> None:
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json cannot be read \(") as caught:
        pooling(described(tmp_path, said), ("mean",))
    assert "\n" not in str(caught.value)
