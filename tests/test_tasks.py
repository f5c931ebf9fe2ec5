"""Task heads through all steps, and a user's labelled file: pairs, targets, labels and answers as `transformers` reads them.

Faults put in by hand, each caught: a second text joined to the first in place of a pair; targets that are not shifted; a decoder's labels not moved
to the position before; labels left out of the fingerprint; a class's name not looked up; an answer's last token one too far; rows of unlike length in
one batch; positions of Marian trained though no checkpoint keeps them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from task_heads import HEADS, LABELLED, SIDE_FILES, inputs, pair_tokenizer, save_head, save_reading, save_writing, target_tokenizer, write_rows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import lighten
from lighten.compress import training
from lighten.compress.answers import find_kind
from lighten.compress.distances import label_distance
from lighten.compress.distill_dense import cut_rows
from lighten.compress.distill_scales import cut, split
from lighten.compress.journal import Journal
from lighten.compress.pupil import Objective, Pupil
from lighten.compress.skeleton import Skeleton
from lighten.compress.walk import Run, inputs_of
from lighten.errors import LightenError, ModelError, RecipeError, TextError
from lighten.formats.artifact import Work, write_artifact
from lighten.formats.export import export
from lighten.formats.safetensors_folder import StoredWeights
from lighten.judge.arrays import load_inputs, with_labels
from lighten.judge.calibration import text_windows
from lighten.judge.text import load_text
from lighten.model.source import read_spec
from lighten.model.tasks import task_of
from lighten.recipe import apply_recipe, parse_recipe

TRAIN = "batch_tokens=64, learning_rate=0.001"
SINGLE = (
    "prune(wanda, sparsity=0.5)", "shrink(ffn, ratio=0.5)", "shrink(layers, ratio=0.5)", "factorize(svd, ratio=0.5)",
    f"distill(logits, steps=2, {TRAIN})", "quantize(rtn, bits=8)",
)  # fmt: skip
PIPELINE = f"prune(admm, sparsity=0.3) | shrink(ffn, ratio=0.5) | distill(logits, steps=12, {TRAIN}) | quantize(rtn, bits=8)"
WORDS = ("the", "statement", "value", "of", "an", "expression", "is", "while", "loop", "when", "it", "in", "list", "name", "and", "or", "class")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    base = tmp_path_factory.mktemp("heads")
    return {name: save_head(name, base / name.replace(" ", "-")) for name in HEADS}


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    base = tmp_path_factory.mktemp("reading")
    names = ("bert classes", "bert answers", "distilbert classes", "llama classes", "t5", "bart")
    return {name: save_reading(name, base / name.replace(" ", "-")) for name in names} | {"llama": save_writing(base / "llama")}


def compress(source: Path, recipe: str, out: Path, calibration: Any) -> Any:
    return write_artifact(source, parse_recipe(recipe), out, calibration=list, work=Work(windows=calibration))


def answers(module: Any, batch: Mapping[str, Any]) -> list[Tensor]:
    """All that a head puts out."""
    given = inputs_of(module, {name: torch.as_tensor(value) for name, value in batch.items()})
    with torch.no_grad():
        found = module(**given)
    return [found[name].float() for name in ("logits", "start_logits", "end_logits") if name in found]


def own_module(folder: Path) -> Any:
    """An artifact as lighten reads it."""
    spec = read_spec(folder)
    stored = StoredWeights(folder, spec)
    skeleton = Skeleton(spec.config, {name: shape for part in spec.parts for name, shape in part.tensors().items()}, dtype=torch.float32)
    skeleton.load(skeleton.module, stored.expanded)
    return skeleton.module


def loaded(folder: Path, kind: str) -> Any:
    """A dense folder as transformers loads it: with every weight from it, and none left over."""
    module, said = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, attn_implementation="sdpa")
    assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return module.eval()


def sentence(number: int, length: int = 9) -> str:
    draw = np.random.default_rng(number)
    return " ".join(draw.choice(WORDS, length + number % 3))


# ---- heads through the steps ----


@pytest.mark.parametrize("recipe", [*SINGLE, PIPELINE])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_goes_through_a_step_and_is_loaded_and_used_by_transformers(
    folders: Mapping[str, Path], tmp_path: Path, name: str, recipe: str
) -> None:
    calibration = inputs(name)
    artifact = compress(folders[name], recipe, tmp_path / "out", calibration)
    folder = artifact.folder
    if recipe.startswith(("prune", "factorize", "quantize")):
        folder = tmp_path / "dense"
        export(artifact.folder, "safetensors", folder)
    module, (batch,) = loaded(folder, HEADS[name][1]), calibration(0)
    found, own = answers(module, batch), answers(own_module(artifact.folder), batch)
    assert found
    for one, other in zip(found, own, strict=True):
        assert torch.allclose(one, other, atol=2e-4, rtol=1e-3), recipe
    for which in {artifact.folder, folder}:
        before, after = (json.loads((each / "config.json").read_text()) for each in (folders[name], which))
        kept = {"id2label", "label2id", "problem_type", "architectures", "decoder_start_token_id", "pad_token_id"} & before.keys()
        assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
        assert all((which / file).read_bytes() == (folders[name] / file).read_bytes() for file in SIDE_FILES)


@pytest.mark.parametrize("name", HEADS)
def test_distilled_answers_come_closer_to_the_originals(folders: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    """Held to the logits that transformers gives of the original."""
    pruned, trained = (
        "prune(magnitude, sparsity=0.3)",
        "prune(magnitude, sparsity=0.3) | distill(logits, steps=24, batch_tokens=512, learning_rate=0.0003)",
    )
    modules = []
    for place, recipe in enumerate((pruned, trained)):
        artifact = compress(folders[name], recipe, tmp_path / str(place), inputs(name, 256))
        modules.append(own_module(artifact.folder))
    kept = json.loads((tmp_path / "1" / "lighten.json").read_text())["curves"][0]
    assert kept["kept"]
    (batch,) = inputs(name, 256)(0)
    truth = answers(loaded(folders[name], HEADS[name][1]), batch)
    near = [
        sum(
            float(torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum"))
            for a, b in zip(answers(module, batch), truth, strict=True)
        )
        for module in modules
    ]
    assert near[1] < near[0]


@pytest.mark.parametrize("recipe", ["quantize(rtn, bits=4) | distill(scales, steps=8)", "quantize(auto, bits<=4)"])
@pytest.mark.parametrize("name", ["bert answers", "distilbert answers"])
def test_steps_that_ask_the_whole_model_take_the_two_logits_of_an_extractive_reader(
    folders: Mapping[str, Path], tmp_path: Path, name: str, recipe: str
) -> None:
    assert compress(folders[name], recipe, tmp_path / "out", inputs(name)).size_bytes > 0


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_heads_of_values_and_of_labels_side_by_side_are_trained_too(tmp_path: Path, problem: str) -> None:
    """A softmax over one value is 1 whatever it is, and labels that hold side by side do not sum to 1."""
    labels = {"num_labels": 1, "id2label": {0: "v"}, "label2id": {"v": 0}} if problem == "regression" else {}
    source = save_head("bert classes", tmp_path / "model", problem_type=problem, **labels)
    recipe = f"prune(magnitude, sparsity=0.7) | distill(logits, steps=12, {TRAIN})"
    artifact = compress(source, recipe, tmp_path / "out", inputs("bert", 32))
    curve = json.loads((artifact.folder / "lighten.json").read_text())["curves"][0]
    before, after = curve["held_out"]
    assert curve["kept"]
    assert before > after > 0
    if problem == "regression":
        with pytest.raises(RecipeError, match="temperature and top_k are for logits of a choice, and model gives values; leave them out"):
            compress(source, "distill(logits, steps=1, top_k=2)", tmp_path / "other", inputs("bert"))


def test_the_distance_of_labels_side_by_side_is_that_of_their_sigmoids(tmp_path: Path) -> None:
    source = save_head("bert classes", tmp_path / "model", problem_type="multi_label_classification")
    module = loaded(source, "BertForSequenceClassification")
    sample = {"input_ids": torch.tensor([[5, 9, 7]])}
    objective = Objective(kind="logits")
    theirs = torch.tensor([[0.3, -1.0, 2.0]])
    pair = torch.stack([torch.zeros_like(theirs), theirs], -1)
    _, near, _ = Pupil(module, objective)(sample, {"logits": pair})
    p, q = theirs.sigmoid(), answers(module, sample)[0].sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(near) == pytest.approx(float(expected), rel=1e-4)


def test_marians_positions_are_computed_and_not_trained(folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folders["marian"] / "config.json").read_text())
    skeleton = Skeleton(
        config, {name: shape for part in read_spec(folders["marian"]).parts for name, shape in part.tensors().items()}, dtype=torch.float32
    )
    table = skeleton.module.model.encoder.embed_positions.weight
    assert float(table[3, 0]) == pytest.approx(math.sin(3), abs=1e-6)
    old = tmp_path / "old"
    shutil.copytree(folders["marian"], old)  # as checkpoints of 2020 are: with the tables
    from safetensors.torch import load_file, save_file

    tensors = load_file(old / "model.safetensors")
    save_file(
        tensors | {f"model.{side}.embed_positions.weight": table.detach().clone() for side in ("encoder", "decoder")}, old / "model.safetensors"
    )
    trained: list[Any] = []
    real = training.make_optimizer
    monkeypatch.setattr(training, "make_optimizer", lambda name, parameters: trained.extend(parameters) or real(name, parameters))
    artifact = compress(old, f"distill(logits, steps=2, {TRAIN})", tmp_path / "out", inputs("marian"))
    stored = {place.key for place in skeleton.places.values()} & dict(skeleton.module.named_parameters()).keys()
    assert len(trained) == len(stored)
    (batch,) = inputs("marian")(0)
    assert torch.allclose(answers(loaded(artifact.folder, "MarianMTModel"), batch)[0], answers(own_module(artifact.folder), batch)[0], atol=1e-5)


# ---- labelled files ----


def pairs(path: Path, count: int = 48, **more: Any) -> Path:
    rows = [{"sentence1": sentence(n), "sentence2": sentence(999 + n)} | {k: v[n % len(v)] for k, v in more.items()} for n in range(count)]
    return write_rows(path, rows)


def questions(path: Path) -> Path:
    rows = []
    for n in range(48):
        context = "  " + sentence(n, 14).replace(" ", "  ", 3)
        at = context.index(" ", 12) + 1
        at += len(context[at:]) - len(context[at:].lstrip())
        rows.append({"question": sentence(200 + n, 4), "context": context, "answers": {"text": [context[at:][:14].rstrip()], "answer_start": [at]}})
    rows[1]["answers"] = {"text": [], "answer_start": []}
    return write_rows(path, rows)


def translations(path: Path) -> Path:
    return write_rows(path, [{"source": sentence(n), "target": sentence(300 + n, 5)} for n in range(48)])


def batches(folder: Path, file: Path, *, labels: float | None = None, tokens: int = 10_000) -> list[Mapping[str, Any]]:
    spec = read_spec(folder)
    return list(text_windows(folder, spec, load_text(file), labels=labels)(tokens))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_two_sentences_are_read_as_a_pair_with_the_model_s_own_marks_and_kinds(reading: Mapping[str, Path], tmp_path: Path, suffix: str) -> None:
    file = pairs(tmp_path / f"a.{suffix}", label=["good", "bad"])
    text = load_text(file)
    found = batches(reading["bert classes"], file, labels=1.0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pair_tokenizer())
    assert len(found) == len(text.examples) == 16
    for batch, row in zip(found, text.examples, strict=True):
        truth = tokenizer(*row.texts, return_token_type_ids=True)
        assert batch["input_ids"][0].tolist() == truth["input_ids"]
        assert batch["token_type_ids"][0].tolist() == truth["token_type_ids"]
        assert 1 in truth["token_type_ids"]
    assert [int(batch["labels"][0]) for batch in found[:4]] == [2, 0, 2, 0]
    assert all(
        "token_type_ids" not in inputs_of_folder(reading["distilbert classes"], batch) for batch in batches(reading["distilbert classes"], file)
    )


def inputs_of_folder(folder: Path, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    module = loaded(folder, json.loads((folder / "config.json").read_text())["architectures"][0])
    return inputs_of(module, {name: torch.as_tensor(value) for name, value in batch.items()})


def test_a_long_context_is_cut_and_its_question_is_not(reading: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"question": sentence(n, 5), "context": " ".join(sentence(m) for m in range(n, n + 40)), "answers": sentence(n + 39)} for n in range(24)]
    found = batches(reading["bert answers"], write_rows(tmp_path / "a.jsonl", rows), labels=1.0)
    for batch, row in zip(found, rows, strict=False):
        ids = batch["input_ids"][0].tolist()
        question = pair_tokenizer().encode(row["question"]).ids
        assert ids[: len(question)] == question
        assert len(ids) == 128  # the model's positions
        assert batch["start_positions"].tolist() == [-100]  # what was cut off has no place


def test_answers_become_their_first_and_last_token(reading: Mapping[str, Path], tmp_path: Path) -> None:
    file = questions(tmp_path / "a.jsonl")
    text, found = load_text(file), batches(reading["bert answers"], file, labels=1.0)
    tokenizer = pair_tokenizer()
    for place, (batch, row) in enumerate(zip(found, text.examples, strict=True)):
        start, end = int(batch["start_positions"][0]), int(batch["end_positions"][0])
        if place == 1:
            assert (start, end) == (0, 0)
            continue
        encoding = tokenizer.encode(*row.texts)
        said = row.texts[1][encoding.offsets[start][0] : encoding.offsets[end][1]]
        answer = " ".join(row.answers["text"][0].split())
        assert said.startswith(answer)
        assert start <= end
        assert len(said) - len(answer) < 8  # no more than the rest of a word


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_targets_are_shifted_as_the_architecture_shifts_its_labels(reading: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    """The decoder's input that the class makes of the same labels in its own forward."""
    file = translations(tmp_path / "a.tsv")
    text, found = load_text(file), batches(reading[name], file)
    module = loaded(reading[name], HEADS[name][1])
    tokenizer = target_tokenizer()
    assert len(found) == 16
    for batch, row in zip(found, text.examples, strict=True):
        assert batch["input_ids"][0].tolist() == tokenizer.encode(row.texts[0]).ids
        assert batch["labels"][0].tolist() == tokenizer.encode(row.texts[1]).ids
        given = inputs_of(module, {key: torch.as_tensor(value) for key, value in batch.items()})
        assert given["decoder_input_ids"][0].tolist() == [0, *batch["labels"][0].tolist()[:-1]]
        assert "labels" not in given
    with torch.no_grad():
        assert torch.equal(module(**given).logits, module(input_ids=given["input_ids"], labels=torch.as_tensor(batch["labels"])).logits)


def test_a_decoder_s_targets_are_labels_of_the_running_text(reading: Mapping[str, Path], tmp_path: Path) -> None:
    file = translations(tmp_path / "a.jsonl")
    plain, labelled = batches(reading["llama"], file), batches(reading["llama"], file, labels=1.0)
    assert np.array_equal(plain[0]["input_ids"], labelled[0]["input_ids"])
    assert set(plain[0]) == {"input_ids"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(reading["llama"] / "tokenizer.json"))
    ids, labels = labelled[0]["input_ids"][0], labelled[0]["labels"][0]
    said = tokenizer.decode(ids[labels != -100])
    row = load_text(file).examples[0]
    assert said.startswith(f" {row.texts[1]}")
    assert row.texts[0] not in said
    assert np.array_equal(ids[labels != -100], labels[labels != -100])


@pytest.mark.parametrize(
    ("name", "write"),
    [("bert classes", lambda path: pairs(path, label=["good", "so so", "bad"])), ("bert answers", questions), ("t5", translations),
     ("bart", translations), ("llama", translations), ("llama classes", lambda path: pairs(path, label=[0, 1, 2]))],
)  # fmt: skip
def test_the_loss_of_labels_is_the_one_that_transformers_gives(reading: Mapping[str, Path], tmp_path: Path, name: str, write: Any) -> None:
    """With a teacher that answers as the student does, all that is left is the labels' part: the class's own loss, as a sum over all answers."""
    architecture = json.loads((reading[name] / "config.json").read_text())["architectures"][0]
    module = loaded(reading[name], architecture)
    batch = {key: torch.as_tensor(value) for key, value in batches(reading[name], write(tmp_path / "a.jsonl"), labels=1.0)[0].items()}
    labels = {key: value for key, value in batch.items() if key in ("labels", "start_positions", "end_positions")}
    given = inputs_of(module, batch)
    kind, answer = find_kind(module, given, Objective(kind="logits"))
    with torch.no_grad():
        own = module(**given)
    target = (
        {"states": getattr(module, module.base_model_prefix)(**given).last_hidden_state.detach()} if kind == "head"
        else {"logits": torch.stack([own.start_logits, own.end_logits], 1) if "start_logits" in own else own.logits}
    )  # fmt: skip

    class Head:
        def logits(self, states: Tensor) -> Tensor:
            from lighten.compress.pupil import type_of
            from lighten.compress.teacher import through_head

            return through_head(module, getattr(module, module.base_model_prefix), type_of(answer), states).detach()

    for weight in (0.5, 2.0):
        objective = Objective(kind=kind, answer=answer, labels=weight, shifted=name == "llama")
        module.zero_grad()
        loss, near, _ = Pupil(module, objective, head=Head())({**given, **labels}, target)  # type: ignore[arg-type]
        loss.backward()
        gradients = {key: value.grad.clone() for key, value in module.named_parameters() if value.grad is not None}
        module.zero_grad()
        truth = module(**{key: value for key, value in given.items() if key != "decoder_input_ids"}, **labels).loss
        share = float((batch["labels"][:, 1:] != -100).float().sum() / batch["labels"].numel()) if name == "llama" else 1.0
        assert 0 < share <= 1
        assert loss.item() == pytest.approx(weight * truth.item() * share, rel=1e-4)
        assert near.item() == pytest.approx(loss.item(), rel=1e-6)
        (weight * share * truth).backward()
        for key, value in module.named_parameters():
            if value.grad is not None and key in gradients:
                assert torch.allclose(gradients[key], value.grad, atol=1e-4), key


def test_what_has_no_label_has_no_distance_from_it() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, -100, 0, -100])
    expected = -(logits[0].log_softmax(-1)[2] + logits[2].log_softmax(-1)[0])
    assert float(label_distance(logits, labels)) == pytest.approx(float(expected), rel=1e-5)
    assert float(label_distance(logits, torch.full((4,), -100))) == 0
    values = torch.tensor([[1.0], [5.0]])
    assert float(label_distance(values, torch.tensor([3.0, float("nan")]))) == 4


def test_rows_of_one_length_run_together_and_none_is_lost(reading: Mapping[str, Path], tmp_path: Path) -> None:
    found = batches(reading["bert classes"], pairs(tmp_path / "a.csv"))
    with Journal.open(tmp_path / "work", {}, resume=False) as journal:
        run = Run(folder=tmp_path, spec=read_spec(reading["bert classes"]), original=None, journal=journal, calibration=lambda n: found, log=print)  # type: ignore[arg-type]
        together = run.batches(10_000)
    assert 1 < len(together) < len(found)
    assert max(len(batch["input_ids"]) for batch in together) > 1
    rows = sorted(tuple(row.tolist()) for batch in together for row in batch["input_ids"])
    assert rows == sorted(tuple(batch["input_ids"][0].tolist()) for batch in found)
    assert all(batch.keys() == {"input_ids", "token_type_ids"} for batch in together)


@pytest.mark.parametrize("weight", [0, 4])
def test_training_on_classes_tells_the_accuracy_before_and_after(reading: Mapping[str, Path], tmp_path: Path, weight: float) -> None:
    """Both counted again on the held-out rows, by the artifacts with and without the training."""
    source = reading["bert classes"]
    file = pairs(tmp_path / "a.tsv", count=300, label=["good", "so so", "bad", "good"])
    lines: list[str] = []
    pruned, train = "prune(magnitude, sparsity=0.6)", f"distill(logits, steps=16, batch_tokens=512, learning_rate=0.0005, labels={weight})"
    lighten.compress(source, pruned, tmp_path / "before")
    artifact = lighten.compress(source, f"{pruned} | {train}", tmp_path / "after", text=file, log=lines.append)
    (report,) = json.loads((artifact.folder / "lighten.json").read_text())["curves"]
    assert report["kept"]
    assert str(parse_recipe(report["step"])) == str(parse_recipe(train))
    assert sum("of the classes right" in line for line in lines) == 2
    found = batches(source, file, labels=weight)
    with Journal.open(tmp_path / "work", {}, resume=False) as journal:
        run = Run(folder=source, spec=read_spec(source), original=None, journal=journal, calibration=lambda n: found, log=print)  # type: ignore[arg-type]
        rows = list(cut_rows(run.batches(10_000), length=None, said=""))
    judged = split(len(rows))[1][:32]
    assert len(judged) == 12
    for place, folder in enumerate((tmp_path / "before", artifact.folder)):
        module = own_module(folder)
        right = [int(answers(module, rows[row])[0].argmax()) == int(rows[row]["labels"]) for row in judged]
        assert report["accuracy"][place] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(("name", "write"), [("bert answers", questions), ("t5", translations), ("llama", translations)])
def test_labels_of_answers_and_targets_are_trained_on(reading: Mapping[str, Path], tmp_path: Path, name: str, write: Any) -> None:
    recipe = "prune(magnitude, sparsity=0.5) | distill(logits, steps=8, batch_tokens=128, learning_rate=0.001, labels={})"
    reports = []
    for weight in (0, 1):
        folder = lighten.compress(reading[name], recipe.format(weight), tmp_path / str(weight), text=write(tmp_path / "a.jsonl")).folder
        (report,) = json.loads((folder / "lighten.json").read_text())["curves"]
        reports.append(report)
        assert "accuracy" not in report
        assert report["kept"]
    assert reports[1]["held_out"][0] > reports[0]["held_out"][0] + 0.3  # the labels' part of a random model: some nats of each label


def test_labels_of_arrays_are_trained_on_too(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (batch,) = inputs("vit classes", 32)(0)
    path = tmp_path / "a.npz"
    np.savez(path, **batch, labels=np.arange(32) % 3)
    artifact = lighten.compress(folders["vit classes"], f"distill(logits, steps=4, {TRAIN}, labels=1)", tmp_path / "out", text=path)
    assert len(json.loads((artifact.folder / "lighten.json").read_text())["curves"][0]["accuracy"]) == 2
    spec = read_spec(folders["vit classes"])
    np.savez(path, **batch)
    with pytest.raises(TextError, match=r"a\.npz lacks labels, which labels=1 asks for; it holds pixel_values\."):
        with_labels(load_inputs(path, spec), spec, 1, str(path))
    np.savez(path, **batch, labels=np.arange(32))
    with pytest.raises(TextError, match=r"sample 32: label 31 is none of the model's 3: 0 bad, 1 so so, 2 good\."):
        with_labels(load_inputs(path, spec), spec, 0, str(path))
    np.savez(path, **batch, labels=np.ones((32, 2), np.int64))
    with pytest.raises(TextError, match=r"labels are one whole number for each sample; they have the shape \[32, 2\]"):
        with_labels(load_inputs(path, spec), spec, 0, str(path))


VALUE = {"num_labels": 1, "id2label": {0: "v"}, "label2id": {"v": 0}, "problem_type": "regression"}


def test_values_are_trained_on_and_are_no_classes(tmp_path: Path) -> None:
    folder = save_reading("bert classes", tmp_path / "model", **VALUE)
    recipe = "prune(magnitude, sparsity=0.5) | distill(logits, steps=40, batch_tokens=256, learning_rate=0.01, labels=1)"
    text = pairs(tmp_path / "a.csv", label=[0.5, 2, "3.25"])
    assert {float(batch["labels"][0]) for batch in batches(folder, text, labels=1.0)} <= {0.5, 2.0, 3.25}
    artifact = lighten.compress(folder, recipe, tmp_path / "out", text=text)
    (report,) = json.loads((artifact.folder / "lighten.json").read_text())["curves"]
    assert report["held_out"][1] < report["held_out"][0] - 0.2, report
    assert "accuracy" not in report
    with pytest.raises(TextError, match=r"label 'much' is no number, which the model's only label is\."):
        batches(folder, pairs(tmp_path / "b.csv", label=["much", 1]), labels=1.0)
    ids = np.random.default_rng(0).integers(10, 60, (16, 12))
    np.savez(tmp_path / "a.npz", input_ids=ids, labels=np.arange(16)[:, None] % 5)
    (report,) = json.loads((lighten.compress(folder, recipe, tmp_path / "arrays", text=tmp_path / "a.npz").folder / "lighten.json").read_text())[
        "curves"
    ]
    assert "accuracy" not in report


@pytest.mark.parametrize(
    ("name", "labels", "said"),
    [
        ("llama", {"labels": np.zeros(8, int)}, r"labels are one whole number for each token, \[8, 12\]; they have the shape \[8\]"),
        ("llama", {"labels": np.full((8, 12), 5000)}, r"labels are from 0 to \d+, or -100 where nothing is known; they go from 5000 to 5000\."),
        ("bert answers", {"start_positions": np.full(8, 12), "end_positions": np.zeros(8, int)}, r"start_positions are from 0 to 11, or -100"),
        ("bert answers", {"start_positions": np.zeros(8), "end_positions": np.zeros(8, int)}, r"start_positions are one whole number for each"),
        ("bert value", {"labels": np.zeros((8, 2))}, r"labels are one number for each sample; they have the shape \[8, 2\]\."),
        ("t5", {"labels": np.zeros(8, int)}, r"labels are whole numbers of \[samples, tokens\]; they have the shape \[8\]"),
    ],
)  # fmt: skip
def test_labels_of_arrays_that_do_not_fit_are_said_before_any_work(
    reading: Mapping[str, Path], tmp_path: Path, name: str, labels: dict[str, Any], said: str
) -> None:
    folder = save_reading("bert classes", tmp_path / "model", **VALUE) if name == "bert value" else reading[name]
    np.savez(tmp_path / "a.npz", input_ids=np.ones((8, 12), int), **labels)
    with pytest.raises(TextError, match=said):
        lighten.compress(folder, "distill(logits, steps=1, labels=1)", tmp_path / "out", text=tmp_path / "a.npz")


def test_labels_that_no_token_has_are_said(reading: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"the {sentence(number)}", "answers": "the"} for number in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LightenError, match=r"labels=1 asks for what is true of the rows, and they have no labels\."):
        lighten.compress(reading["bert answers"], "distill(logits, steps=1, labels=1)", tmp_path / "out", text=tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["llama", "bert answers"])
def test_labels_that_name_tokens_do_not_follow_a_smaller_vocabulary(reading: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    text = (translations if name == "llama" else questions)(tmp_path / "a.jsonl")
    with pytest.raises(RecipeError, match=r"labels name tokens or their places, which shrink\(vocab\) changes; put it after this step\."):
        lighten.compress(reading[name], "shrink(vocab, ratio=0.2) | distill(logits, steps=1, labels=1)", tmp_path / "out", text=text)


def test_an_image_counts_as_its_patches(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (batch,) = inputs("vit classes", 32)(0)
    np.savez(tmp_path / "a.npz", **batch)
    patches = read_spec(folders["vit classes"]).fixed_len
    assert patches
    assert patches > 2
    recipe = f"distill(logits, steps=2, batch_tokens={3 * patches}, learning_rate=0.001)"
    artifact = lighten.compress(folders["vit classes"], recipe, tmp_path / "out", text=tmp_path / "a.npz")
    (report,) = json.loads((artifact.folder / "lighten.json").read_text())["curves"]
    assert [point[1] for point in report["curve"]] == [3 * patches, 6 * patches]
    rows = {name: torch.from_numpy(value) for name, value in batch.items()}
    assert [len(part["pixel_values"]) for part in cut([rows], step_tokens=12 * patches, window=8, fixed_len=patches)] == [12, 12, 8]


def test_another_label_is_another_text(tmp_path: Path) -> None:
    plain, one, other = (load_text(pairs(tmp_path / "a.csv", **more)) for more in ({}, {"label": [0, 1]}, {"label": [1, 0]}))
    assert plain.calibration == one.calibration == other.calibration
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    renamed = write_rows(tmp_path / "b.jsonl", [{"source": row.texts[0], "target": row.texts[1]} for row in plain.examples])
    again = write_rows(tmp_path / "c.jsonl", [{"sentence1": row.texts[0], "sentence2": row.texts[1]} for row in plain.examples])
    assert load_text(renamed).calibration == load_text(again).calibration
    assert load_text(renamed).fingerprint != load_text(again).fingerprint


def test_a_text_with_two_labels_counts_once_with_the_first(tmp_path: Path) -> None:
    rows = [{"text": sentence(n), "label": label} for n in range(30) for label in ("good", "bad")]
    text = load_text(write_rows(tmp_path / "a.jsonl", rows))
    assert len(text.examples) == 10
    assert {row.label for row in text.examples} == {"good"}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["good", "great"], r"line 2: label 'great' is none of the model's 3: 0 bad, 1 so so, 2 good\.$"),
        ([0, 3], r"line 2: label 3 is none of the model's 3: 0 bad"),
        ([0, -1], r"line 2: label -1 is none of"),
        ([0, "7"], r"line 2: label '7' is none of"),
        ([0, True], r"line 2: label True is none of"),
        ([0, [1]], r"line 2: label \[1\] is none of"),
        ([0, 0.5], r"line 2: label 0\.5 is none of"),
        ([0, None], r"line 2 has no label; give each row one, or leave the row out\.$"),
        ([0, ""], r"line 2 has no label"),
        ([None], r"has no column label; labels for bert-classes \(BertForSequenceClassification\) are in it\.$"),
    ],
)
def test_wrong_labels_are_said_before_any_work(reading: Mapping[str, Path], tmp_path: Path, labels: list[Any], said: str) -> None:
    file = pairs(tmp_path / "a.jsonl", label=labels)
    with pytest.raises(TextError, match=said) as caught:
        lighten.compress(reading["bert classes"], "distill(logits, steps=1, labels=1)", tmp_path / "out", text=file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_labels_that_nobody_asks_for_need_not_fit(reading: Mapping[str, Path], tmp_path: Path) -> None:
    file, lines = pairs(tmp_path / "a.jsonl", label=["elsewhere"]), []
    artifact = lighten.compress(reading["bert classes"], f"distill(logits, steps=1, {TRAIN})", tmp_path / "out", text=file, log=lines.append)
    assert "accuracy" not in json.loads((artifact.folder / "lighten.json").read_text())["curves"][0]
    assert [line for line in lines if line.startswith("labels are not looked at: ")]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("bert answers", {"question": "the value", "context": "the name"}, r"no column answers; labels for bert-answers \(BertFor"),
        (
            "bert answers", {"question": "the value", "context": "the name", "answers": "class"},
            r"line 1: the answer 'class' does not stand in its context\.",
        ),
        (
            "bert answers", {"question": "the value", "context": "the name", "answers": {"text": ["name"], "answer_start": [1]}},
            r"the answer 'name' does not stand in its context at character 1\.",
        ),
        ("t5", {"text": "the value"}, r"has no column target; labels for t5 \(T5ForConditionalGeneration\)"),
        ("llama", {"text": "the value"}, r"has no column target; labels for llama \(LlamaForCausalLM\)"),
    ],
)  # fmt: skip
def test_a_file_without_what_is_true_is_refused(reading: Mapping[str, Path], tmp_path: Path, name: str, rows: dict[str, Any], said: str) -> None:
    first = next(iter(rows))
    file = write_rows(tmp_path / "a.jsonl", [rows | {first: f"{rows[first]} {n}"} for n in range(30)])
    with pytest.raises(TextError, match=said):
        lighten.compress(reading[name], "distill(logits, steps=1, labels=1)", tmp_path / "out", text=file)


def test_the_embedded_text_has_no_labels(reading: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"embedded: pydoc_data\.topics has no column label"):
        lighten.compress(reading["bert classes"], "distill(logits, steps=1, labels=1)", tmp_path / "out")


@pytest.mark.parametrize("name", ["bert tokens"])
def test_heads_that_take_no_labels_refuse_them_on_the_spec(folders: Mapping[str, Path], name: str) -> None:
    spec = read_spec(folders[name])
    with pytest.raises(
        RecipeError, match=r"labels=1 is for classes, values, answers to questions and texts that are written, and .* gives none of them"
    ):
        apply_recipe(parse_recipe("distill(logits, labels=1)"), spec)


def test_a_decoder_that_classifies_must_know_its_padding(reading: Mapping[str, Path], tmp_path: Path) -> None:
    folder = save_reading("llama classes", tmp_path / "model", pad_token_id=None)
    with pytest.raises(ModelError, match=r"classifies by the last token that is no padding, and its config.json has no pad_token_id; add it\."):
        batches(folder, pairs(tmp_path / "a.csv"))


def test_a_model_of_many_languages_is_not_given_a_target_without_its_language(tmp_path: Path, reading: Mapping[str, Path]) -> None:
    folder = tmp_path / "mbart"
    transformers.MBartForConditionalGeneration._from_config(
        transformers.MBartConfig(
            architectures=["MBartForConditionalGeneration"], vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        )
    ).save_pretrained(folder)  # fmt: skip
    shutil.copy(reading["t5"] / "tokenizer.json", folder)
    with pytest.raises(TextError, match=r"needs their languages too; give --text an \.npz with its input_ids and decoder_input_ids\."):
        batches(folder, translations(tmp_path / "a.tsv"))


@pytest.mark.parametrize(("name", "task"), [
    ("bert classes", "classes"), ("bert answers", "span"), ("bert tokens", None), ("llama classes", "classes"), ("t5", "target"),
    ("marian", "target"), ("vit classes", "classes"), ("whisper", "target"),
])  # fmt: skip
def test_a_head_s_task_follows_from_its_name(folders: Mapping[str, Path], name: str, task: str | None) -> None:
    assert task_of(read_spec(folders[name])) == task


def test_classes_by_name_are_the_config_s(tmp_path: Path) -> None:
    from lighten.model.tasks import class_of

    assert [class_of(name, LABELLED, "") for name in ("good", "bad", "so so", "1", 1, 2.0)] == [2, 0, 1, 1, 1, 2]
    assert class_of("b", {"id2label": {"0": "a", "1": "b"}}, "") == 1
    with pytest.raises(LightenError, match=r"here: label 5 is none of the model's 2: 0 to 1\."):
        class_of(5, {"num_labels": 2}, "here")
