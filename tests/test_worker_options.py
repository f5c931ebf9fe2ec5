"""A child that batches and speculates, asked in this process: real texts and prompts, nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from choose_setup import Scene, run_lighten
from tiny_models import bert_config, llama_config, save

from lighten.choose.space import default_space
from lighten.cost import Workload
from lighten.formats.artifact import write_artifact
from lighten.formats.deploy import CARD
from lighten.judge.measure import own_lengths
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.judge.worker import Worker
from lighten.model import read_spec
from lighten.recipe import apply_recipe, parse_recipe

TEXTS = ["one two three", "while", "true false break the loop of values and assert seven", "two", "five loops break"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("models")
    return {"bert": save(bert_config(), work / "bert"), "llama": save(llama_config(max_position_embeddings=64), work / "llama")}


def worker(folder: Path, **setup: object) -> Worker:
    found = Worker()
    found.load(str(folder), str(folder), "torch", {"dtype": "float32", "threads": 1, "activations": None, **setup})
    return found


def test_embeddings_are_the_same_whatever_the_batches_are(models, tmp_path):
    found = {}
    for name, own, batching in (("dense", False, "padded"), ("padded", True, "padded"), ("sorted", True, "sorted"), ("bucketed", True, "bucketed")):
        out = tmp_path / f"{name}.npy"
        asked = {"tokenizer": str(models["bert"]), "batch_size": 2, "seq_len": 32, "out": str(out), "own_lengths": own}
        worker(models["bert"], batching=batching).embed(TEXTS, **asked)
        found[name] = np.load(out)
    for name in ("padded", "sorted", "bucketed"):
        np.testing.assert_allclose(found[name], found["dense"], atol=1e-5)


def test_texts_of_their_own_lengths_are_timed_in_the_recipes_batches(models, monkeypatch):
    child, shapes = worker(models["bert"], batching="sorted"), []
    session = child.session
    encode = type(session).encode
    monkeypatch.setattr(type(session), "encode", lambda self, ids, mask: shapes.append((ids.shape, mask.sum())) or encode(self, ids, mask))
    answer = child.time("encode", 2, 32, 0, [1, 2], lengths=[3, 20, 4])
    assert len(answer["seconds"]) == 2
    assert shapes == [((1, 20), 20), ((2, 4), 7)] * 2


def test_prompts_of_a_text_are_gone_on_with_and_what_was_accepted_is_told(models, tmp_path, monkeypatch):
    windows = np.arange(5, 5 + 3 * 8).reshape(3, 8)
    np.save(tmp_path / "prompts.npy", windows)
    child, seen = worker(models["llama"], speculation={"draft": "prompt-lookup", "tokens": 3}), []
    session = child.session
    generate = type(session).generate
    monkeypatch.setattr(type(session), "generate", lambda self, ids, new: seen.append(ids.tolist()) or generate(self, ids, new))
    answer = child.time("decode", 1, 8, 10, [1, 3], prompts=str(tmp_path / "prompts.npy"))
    assert seen == [[windows[1].tolist()], [windows[0].tolist()]], "seed by seed, and from the start again"
    assert [found["tokens"] for found in answer["accepted"]] == [10, 10]
    assert worker(models["llama"]).time("decode", 1, 8, 2, [0])["accepted"] == []


def test_lengths_are_those_of_the_texts_tokens_cut_to_the_longest(models, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} number {number}"}) + "\n" for number, text in enumerate(TEXTS * 3)))
    text, reader = load_text(path), Tokenizer(models["bert"])
    found = own_lengths(Workload(phase="encode", batch_size=2, seq_len=9), models["bert"], text)
    assert found.lengths == tuple(min(9, len(reader.encode(one).ids)) for one in text.test)
    assert len(set(found.lengths)) > 1


def test_the_usual_space_sorts_where_texts_have_lengths_and_nothing_speculates(models):
    spec = read_spec(models["bert"])
    ways = {recipe.runtime: recipe.batching for recipe in default_space(spec, own_lengths=True)}
    assert ways.pop("torch-compile") == "bucketed"
    assert set(ways.values()) == {"sorted"}
    assert not any(recipe.options for recipe in default_space(spec))
    assert len(list(default_space(spec, own_lengths=True))) == len(list(default_space(spec)))
    assert not any(recipe.speculation for recipe in default_space(read_spec(models["llama"])))


def test_the_card_says_what_the_script_does_without(models, tmp_path):
    made = write_artifact(models["llama"], parse_recipe("@ torch(speculate=prompt-lookup)"), tmp_path / "made", calibration=list).folder
    assert "`run.py` gives the same without speculate=prompt-lookup: figures" in (made / CARD).read_text()
    plain = write_artifact(models["llama"], parse_recipe("@ torch"), tmp_path / "plain", calibration=list).folder
    assert "gives the same without" not in (plain / CARD).read_text()


def test_an_artifact_is_measured_with_the_options_of_its_recipe_or_with_others(models, tmp_path, monkeypatch):
    """Through the command, with real children: what was accepted, on which prompts; an artifact of one type is not run in another."""
    scene = Scene(tmp_path / "scene").prepare(monkeypatch, worker="real")
    made = write_artifact(models["llama"], parse_recipe("@ torch(speculate=prompt-lookup)"), tmp_path / "made", calibration=list).folder
    asked = ("--phase", "decode", "--seq-len", 8, "--new-tokens", 6, "--threads", 1, "--json")
    monkeypatch.setattr("lighten.judge.measure.WINDOW_TOKENS", 16)
    ran = run_lighten("measure", made, *asked)
    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["recipe"] == "@ torch(speculate=prompt-lookup)"
    assert found["prompts"] == "text"
    assert 1 <= found["tokens_per_pass"] <= 5
    assert 0 <= found["accepted"] <= 1
    assert found["predicted"]["tokens_per_pass"] == pytest.approx(1.65, abs=0.01)
    refused = run_lighten("measure", made, "--runtime", "torch(dtype=bfloat16)", *asked)
    assert refused.code == 2
    assert "is an artifact for runtime torch; it does not run on torch(dtype=bfloat16)." in refused.stderr
    texts = run_lighten(
        "measure", models["bert"], "--lengths", "text", "--runtime", "torch(batching=sorted)", "--text", scene.text, "--batch-size", 4,
        "--seq-len", 16, "--threads", 1,
    )  # fmt: skip
    assert texts.code == 0, texts.stderr
    assert "texts/s, each of its own length" in texts.stdout


def test_an_unlike_recipe_checks_alike(models):
    """An option changes no shape and no byte."""
    spec = read_spec(models["llama"])
    assert apply_recipe(parse_recipe("@ torch(speculate=prompt-lookup)"), spec) == apply_recipe(parse_recipe("@ torch"), spec)
