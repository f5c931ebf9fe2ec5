"""An artifact can be handed on: its script runs by its runtime alone and says what the session says, its card has the figures, the license stays."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import bert_config, llama_config, save

from lighten.formats.artifact import folder_bytes, read_artifact, write_artifact
from lighten.formats.deploy import CARD, ORIGINAL_CARD, SCRIPT, license_of, write_card
from lighten.judge.tokens import Tokenizer
from lighten.model import read_spec
from lighten.recipe import parse_recipe
from lighten.recipe.predict import apply_recipe
from lighten.runtimes import Setup, open_session

ENCODERS = ("@ torch", "@ onnxruntime", "@ openvino", "@ ctranslate2")
DECODERS = ("cast(bfloat16) @ torch", "quantize(rtn, bits=4, group_size=16, embeddings=true) @ onnxruntime", "@ openvino", "@ ctranslate2")
NEEDS = {"torch": {"torch", "transformers"}, "onnxruntime": {"onnxruntime"}, "openvino": {"openvino"}, "ctranslate2": {"ctranslate2"}}
TEXTS = ("one two three", "while true break the loop of value seven")
OWN_CARD = "---\nlicense: apache-2.0\n---\n# The original\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder and a tiny decoder, each with a card and a license."""
    folder = tmp_path_factory.mktemp("originals")
    found = {"encoder": save(bert_config(), folder / "encoder"), "decoder": save(llama_config(), folder / "decoder")}
    for path in found.values():
        (path / CARD).write_text(OWN_CARD)
        (path / "LICENSE").write_text("do as you please")
    return found


def run(folder: Path, *texts: str) -> str:
    """What the script prints, from another place and without lighten."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", str(folder / SCRIPT), *texts]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder.parent, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def imported(folder: Path) -> set[str]:
    """The packages that a script imports."""
    tree = ast.parse((folder / SCRIPT).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("recipe", ENCODERS)
@pytest.mark.parametrize("pooled_by", ["mean", "cls"])
def test_the_script_of_an_encoder_prints_its_embeddings(originals, tmp_path, recipe, pooled_by):
    if pooled_by == "cls" and recipe != "@ onnxruntime":
        pytest.skip("one runtime does for the second kind")
    source = tmp_path / "source"
    shutil.copytree(originals["encoder"], source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooled_by}_token{'s' if pooled_by == 'mean' else ''}": True}))
    made = write_artifact(source, parse_recipe(recipe), tmp_path / "made", calibration=list)
    rows = np.array([[float(value) for value in line.split()] for line in run(made.folder, *TEXTS).splitlines()])
    session = open_session("torch", source, read_spec(source), Setup(dtype="float32", threads=1))
    expected = []
    for text in TEXTS:
        [(ids, mask)] = list(Tokenizer(source).batches([text], batch_size=1, length=32))
        hidden = session.encode(ids, mask)
        pooled = hidden[0, 0] if pooled_by == "cls" else (hidden[0] * mask[0][:, None]).sum(0) / mask.sum()
        expected.append(pooled / np.linalg.norm(pooled))
    assert rows == pytest.approx(np.array(expected), abs=2e-3)
    assert imported(made.folder) <= NEEDS[made.recipe.runtime] | {"sys", "pathlib", "numpy", "tokenizers"}


@pytest.mark.parametrize("recipe", DECODERS)
def test_the_script_of_a_decoder_goes_on_with_a_text(originals, tmp_path, recipe):
    source = originals["decoder"]
    made = write_artifact(source, parse_recipe(recipe), tmp_path / "made", calibration=list)
    written = run(made.folder, TEXTS[0])
    assert all(word in written for word in TEXTS[0].split())
    assert len(written.split()) > len(TEXTS[0].split())
    assert imported(made.folder) <= NEEDS[made.recipe.runtime] | {"sys", "pathlib", "numpy", "tokenizers"}


def test_what_is_for_people_lies_there_and_does_not_count_as_size(originals, tmp_path):
    made = write_artifact(originals["encoder"], parse_recipe("@ torch"), tmp_path / "made", calibration=list)
    for name in (SCRIPT, CARD, "LICENSE"):
        assert (made.folder / name).is_file()
    assert (made.folder / ORIGINAL_CARD).read_text() == OWN_CARD
    before = folder_bytes(made.folder)
    for name in (SCRIPT, CARD, "LICENSE", ORIGINAL_CARD):
        (made.folder / name).unlink()
    assert folder_bytes(made.folder) == before == made.size_bytes


def test_the_card_says_what_it_is_what_it_takes_and_under_which_license(originals, tmp_path):
    recipe = parse_recipe("quantize(rtn) @ torch")
    made = write_artifact(originals["encoder"], recipe, tmp_path / "made", calibration=list)
    card = (made.folder / CARD).read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: encoder\n")
    for said in (str(recipe), "| size | ", "Run it: `python run.py`", "The original's license is apache-2.0", ORIGINAL_CARD):
        assert said in card
    manifest = json.loads((made.folder / "lighten.json").read_text())
    asked = {"phase": "encode", "batch_size": 2, "seq_len": 16, "new_tokens": 0}
    figures = {"size_bytes": 1_000_000, "peak_memory_bytes": 2_000_000, "latency_s": 0.5}
    measured = {
        "predicted": figures, "original": figures | {"latency_s": 1.5}, "workload": asked,
        "measured": figures | {"quality": {"cosine": {"value": 0.99, "standard_error": 0.001}}},
    }  # fmt: skip
    write_card(made.folder, recipe, apply_recipe(recipe, read_spec(originals["encoder"])), originals["encoder"], manifest, measured)
    card = (made.folder / CARD).read_text()
    for said in ("| latency | 500 ms | 500 ms | 1.5 s |", "| cosine |  | 0.99 ± 0.001 |", "encode, 2 × 16 tokens"):
        assert said in card


@pytest.mark.parametrize("card", ["# no front matter", "---\ntags: [a]\n---\n", "---\nlicense: apache-2.0", ""])
def test_a_card_that_names_no_license_gives_none(tmp_path, card):
    (tmp_path / CARD).write_text(card)
    assert license_of(tmp_path) is None


def test_without_a_tokenizer_there_is_no_script(originals, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(originals["encoder"], source)
    (source / "tokenizer.json").unlink()
    made = write_artifact(source, parse_recipe("@ torch"), tmp_path / "made", calibration=list)
    assert not (made.folder / SCRIPT).exists()
    assert "run.py" not in (made.folder / CARD).read_text()
    assert read_artifact(made.folder).size_bytes == folder_bytes(made.folder)
