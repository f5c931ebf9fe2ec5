"""A user's labelled file as a task: what is asked, what is answered by which way, what it scores, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from choose_setup import write_text
from hypothesis import given
from hypothesis import strategies as st
from task_heads import LABELLED, save_reading, write_rows
from tiny_models import bert_config, llama_config, save

from lighten import verbs
from lighten.choose.constraints import parse_constraint, parse_objective
from lighten.choose.outcome import quality_metric
from lighten.errors import ConstraintError, LightenError, TaskError, TextError
from lighten.judge import metrics as metrics_module
from lighten.judge.answers import best_span
from lighten.judge.metrics import METRICS, find_metric
from lighten.judge.probe import fit_classifier, similarities
from lighten.judge.task import Task, load_task, written_rows
from lighten.judge.tokens import Tokenizer
from lighten.judge.worker import Worker
from lighten.model import read_spec
from lighten.model.text_ends import end_tokens

WORDS = ("while", "break", "assert", "true", "false", "loop", "value", "statement", "expression", "module")


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 7)) + f" {number}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("task-models")
    return {
        "classes": save_reading("bert classes", base / "classes"),
        "value": save_reading("bert classes", base / "value", num_labels=1, problem_type=None, id2label={0: "x"}, label2id={"x": 0}),
        "side by side": save_reading("bert classes", base / "sides", problem_type="multi_label_classification"),
        "answers": save_reading("bert answers", base / "answers"),
        "body": save(bert_config(), base / "body"),
        "decoder": save(llama_config(), base / "decoder"),
    }


def task_of(model: Path, path: Path, **options: Any) -> Task:
    return load_task(path, read_spec(model), model, **options)


def answered(model: Path, task: Task, folder: Path, runtime: str = "torch", built: Path | None = None) -> list[Any]:
    """What a worker says, without a process of its own."""
    worker = Worker()
    worker.load(str(built or model), str(model), runtime, {"dtype": "float32", "threads": 1})
    rows = folder / "rows.json"
    rows.write_text(json.dumps(written_rows(task) | {"ends": end_tokens(model)}))
    return worker.answer(str(rows), 0, len(task.rows), str(model), batch_size=3)["answers"]


def labelled(path: Path, labels: tuple[Any, ...] = ("good", "bad"), count: int = 16, **more: Callable[[int], Any]) -> Path:
    return write_rows(path, [
        {"text": sentence(n), **{name: say(n) for name, say in more.items()}, "label": labels[n % len(labels)]} for n in range(count)
    ])  # fmt: skip


# ---- heads ----


def module_of(model: Path) -> tuple[Any, Any]:
    spec = read_spec(model)
    return getattr(transformers, spec.architecture).from_pretrained(model).eval().requires_grad_(False), Tokenizer(model)


@pytest.mark.parametrize("pair", [False, True])
def test_a_classifier_says_what_transformers_says(models: Mapping[str, Path], tmp_path: Path, pair: bool) -> None:
    more: dict[str, Callable[[int], Any]] = {"text_pair": lambda n: sentence(n + 3)} if pair else {}
    task = task_of(models["classes"], labelled(tmp_path / "a.csv", **more))
    assert (task.way, task.kind, task.names, len(task.rows)) == ("head", "classes", ("accuracy",), 16)
    module, tokenizer = module_of(models["classes"])
    expected = []
    for row in task.rows:
        encoding = tokenizer.encode(*row.raw)
        ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
        expected.append(LABELLED["id2label"][int(module(input_ids=ids, token_type_ids=types).logits.argmax())])
    assert answered(models["classes"], task, tmp_path) == expected


def test_a_head_of_one_label_gives_values(models: Mapping[str, Path], tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", tuple(range(7)))
    task = task_of(models["value"], path, metrics=("spearman", "pearson"))
    found = answered(models["value"], task, tmp_path)
    module, tokenizer = module_of(models["value"])
    expected = [float(module(input_ids=torch.tensor([tokenizer.encode(*row.raw).ids])).logits[0, 0]) for row in task.rows]
    assert np.allclose(found, expected, atol=1e-4)
    assert set(task.scores(found)) == {"spearman", "pearson"}


@pytest.mark.parametrize("recipe", ["@ onnxruntime", "@ openvino"])
@pytest.mark.parametrize("kind", ["classes", "answers"])
def test_graphs_hold_the_head(models: Mapping[str, Path], tmp_path: Path, recipe: str, kind: str) -> None:
    verbs.compress(models[kind], recipe, tmp_path / "made")
    path = labelled(tmp_path / "a.csv", text_pair=lambda n: sentence(n + 3)) if kind == "classes" else questions(tmp_path / "a.jsonl")
    task = task_of(models[kind], path)
    runtime = recipe.removeprefix("@ ")
    assert answered(models[kind], task, tmp_path, runtime, tmp_path / "made") == answered(models[kind], task, tmp_path)


@pytest.mark.parametrize("recipe", ["quantize(dynamic) @ onnxruntime", "quantize(static) @ onnxruntime"])
def test_onnxruntimes_quantizers_take_a_head(models: Mapping[str, Path], tmp_path: Path, recipe: str) -> None:
    assert verbs.compress(models["classes"], recipe, tmp_path / "made").size_bytes


# ---- answers to questions ----


def questions(path: Path, count: int = 10) -> Path:
    rows = []
    for n in range(count):
        context = f"The {sentence(n)}.  It holds."
        answer = sentence(n).split()[2]
        said = {"text": [answer, "other"], "answer_start": [context.index(answer), 0]} if n else {"text": [], "answer_start": []}
        rows.append({"question": f"what {n}", "context": context, "answers": said})
    return write_rows(path, rows)


def test_answers_are_parts_of_their_contexts(models: Mapping[str, Path], tmp_path: Path) -> None:
    task = task_of(models["answers"], questions(tmp_path / "a.jsonl"), metrics=("squad_f1", "exact_match"))
    assert [] in task.references
    found = answered(models["answers"], task, tmp_path)
    assert all(said in row.raw[1] for said, row in zip(found, task.rows, strict=True))


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_the_best_span_is_that_of_brute_force(seed: int, length: int) -> None:
    class Encoding:
        ids = tuple(range(length + 3))
        sequence_ids = (None, 0, *[1] * length, None)
        offsets = ((0, 0), (0, 1), *[(place, place + 1) for place in range(length)], (0, 0))

    logits = np.random.default_rng(seed).normal(size=(length + 3, 2))
    context = "".join(chr(ord("A") + place) for place in range(length))
    spans = [(i, j) for i in range(2, length + 2) for j in range(i, min(i + 30, length + 2))]
    first, last = max(spans, key=lambda span: logits[span[0], 0] + logits[span[1], 1])
    assert best_span(logits, Encoding, context, may_be_empty=False) == context[first - 2 : last - 1]
    best = logits[first, 0] + logits[last, 1]
    assert (best_span(logits, Encoding, context, may_be_empty=True) == "") == (logits[0].sum() >= best)


# ---- embeddings ----


def test_a_classifier_is_fitted_on_one_half_and_scored_on_the_other(models: Mapping[str, Path], tmp_path: Path) -> None:
    task = task_of(models["body"], labelled(tmp_path / "a.csv", ("x", "y", "y"), 30))
    assert (task.way, task.kind) == ("embeddings", "classes")
    assert {row.raw for row in task.fit}.isdisjoint({row.raw for row in task.rows})
    assert (task.fitted.count("x"), task.references.count("x"), len(task.fit) + len(task.rows)) == (5, 5, 30)
    shuffled = write_rows(tmp_path / "b.csv", list(reversed([{"text": sentence(n), "label": "xyy"[n % 3]} for n in range(30)])))
    assert {row.raw for row in task_of(models["body"], shuffled).fit} == {row.raw for row in task.fit}


def test_embeddings_that_part_the_classes_score_one_and_noise_does_not() -> None:
    noise = np.random.default_rng(0)
    labels = ["x", "y"] * 20
    near = np.array([[5.0, 0.0] if label == "x" else [0.0, 5.0] for label in labels]) + 0.1 * noise.normal(size=(40, 2))
    classify = fit_classifier([near], labels)
    assert classify([3 * near]) == labels
    assert classify([noise.normal(size=(40, 2))]) != labels
    with pytest.raises(TaskError, match="the embeddings have 3 values and the original's 2, which the classifier was fitted on"):
        classify([np.ones((40, 3))])


def test_the_value_of_two_texts_is_their_cosine(models: Mapping[str, Path], tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.csv", (0.5, 2, 3, 4.5), text_pair=lambda n: sentence(n + 1))
    task = task_of(models["body"], path)
    assert (task.way, task.kind, task.names, task.fit) == ("embeddings", "values", ("spearman",), ())
    left, right = np.random.default_rng(0).normal(size=(2, 5, 4))
    expected = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(left, right, strict=True)]
    assert np.allclose(similarities([left, right]), expected)


def test_few_whole_numbers_of_pairs_are_classes(models: Mapping[str, Path], tmp_path: Path) -> None:
    assert task_of(models["body"], labelled(tmp_path / "a.csv", (0, 1), text_pair=sentence)).kind == "classes"


# ---- decoders ----


def test_a_label_is_taken_by_its_likelihood(models: Mapping[str, Path], tmp_path: Path) -> None:
    model = models["decoder"]
    task = task_of(model, labelled(tmp_path / "a.csv", ("true", "false loop", "break"), 9))
    module, tokenizer = module_of(model)

    def likelihood(text: str, label: str) -> float:
        known, whole = tokenizer.prompt(text), tokenizer.prompt(f"{text} {label}")
        logits = module(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logits[place - 1, whole[place]]) for place in range(len(known), len(whole)))

    expected = [max(task.labels, key=lambda label, text=row.raw[0]: likelihood(text, label)) for row in task.rows]
    assert answered(model, task, tmp_path) == expected


def test_what_is_written_is_what_transformers_generates(models: Mapping[str, Path], tmp_path: Path) -> None:
    model = models["decoder"]
    task = task_of(model, write_rows(tmp_path / "a.jsonl", [{"text": sentence(n), "target": "true loop"} for n in range(8)]))
    assert (task.way, task.names, task.stops_at_line) == ("writing", ("exact_match",), True)
    module, tokenizer = module_of(model)
    expected = []
    for row in task.rows:
        prompt = torch.tensor([tokenizer.prompt(row.raw[0])])
        ids = module.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=task.length, do_sample=False, pad_token_id=0)
        new = ids[0, prompt.shape[1] :].tolist()
        ended = next((place for place, token in enumerate(new) if token in end_tokens(model)), len(new))
        expected.append(tokenizer.decode(new[:ended]).split("\n")[0].strip())
    assert answered(model, task, tmp_path) == expected


def test_targets_of_several_lines_are_not_cut_at_the_first(models: Mapping[str, Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": sentence(n), "target": "one two three\nfour five six"} for n in range(8)])
    task = task_of(models["decoder"], path)
    assert (task.stops_at_line, task.names) == (False, ("rougeL",))


# ---- metrics ----

ANSWERS: dict[str, tuple[list[Any], list[Any]]] = {
    "classes": (["a", "b", "a", "c", "b", "a"], ["a", "b", "b", "c", "b", "c"]),
    "values": ([0.1, 0.4, 0.35, 0.8, 0.9], [1.0, 2.0, 3.0, 4.0, 5.0]),
    "spans": (["the cat", "dog", ""], [["cat"], ["a big dog", "hound"], []]),
    "texts": (["the cat sat on the mat now", "a dog runs in the park"], [["the cat sat on a mat now"], ["the dog ran in the park"]]),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_at_its_best_where_all_is_right_and_less_else(name: str) -> None:
    metric = METRICS[name]
    for kind in metric.kinds:
        predictions, references = ANSWERS[kind]
        right = [each[0] if each else "" for each in references] if kind in ("spans", "texts") else references
        assert metric.score(right, references).value == pytest.approx(metric.best)
        found = metric.score(predictions, references)
        assert found.value < metric.best
        assert found.standard_error is not None
        assert found.standard_error >= 0
        assert metric.score(predictions, references) == found, "a seed that is fixed"


def test_golden_figures_of_metrics() -> None:
    predictions, references = ANSWERS["classes"]
    assert METRICS["accuracy"].score(predictions, references).value == pytest.approx(4 / 6)
    # by hand: a 2·1/(3+1), b 2·2/(2+3), c 2·1/(1+2)
    assert METRICS["f1"].score(predictions, references).value == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    # by hand: "cat" and "cat", "dog" against "big dog" 2·1/3, nothing and nothing
    assert METRICS["squad_f1"].score(*ANSWERS["spans"]).value == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert METRICS["accuracy"].score(["a"] * 3 + ["b"], ["a"] * 4).standard_error == pytest.approx(math.sqrt(3 / 16 / 3))


@given(st.integers(20, 60), st.integers(0, 1000))
def test_the_bootstrap_of_a_mean_is_about_its_standard_error(count: int, seed: int) -> None:
    hits = np.random.default_rng(seed).integers(0, 10, count).tolist()
    found = metrics_module.bootstrapped(lambda said, right: float(np.mean(said)))(hits, hits)
    expected = float(np.std(hits, ddof=1)) / math.sqrt(count)
    assert found.standard_error == pytest.approx(expected, rel=0.3)


def test_a_model_that_says_the_same_of_all_has_no_correlation() -> None:
    assert METRICS["spearman"].score([1.0] * 4, [1.0, 2.0, 3.0, 4.0]).value == 0.0


def test_a_users_own_metric_is_run(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def shares(predictions, references):\n    return sum(p == r for p, r in zip(predictions, references)) / len(references)\n")
    metric = find_metric(f"{path}:shares", "classes")
    found = metric.score(*ANSWERS["classes"])
    assert (metric.name, found.value) == ("shares", pytest.approx(4 / 6))
    assert metric.digest
    path.write_text("def shares(predictions, references):\n    return 1.0 if references[0] == 'true' else 0.5\n")
    assert find_metric(f"{path}:shares", "texts").score(["x"], [["true"]]).value == 1.0


OWN = """
def fails(predictions, references):
    raise KeyError("colour")
def none(predictions, references):
    return None
def nan(predictions, references):
    return float("nan")
def accuracy(predictions, references):
    return 1.0
"""


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("own.py:fails", "metric own.py:fails failed on 6 examples (KeyError: 'colour')."),
        ("own.py:none", "metric own.py:none failed on 6 examples (TypeError: float() argument must be a string or a real number, not 'NoneType')."),
        ("own.py:nan", "metric own.py:nan gave nan on 6 examples, which nothing can be compared with."),
        ("own.py:accuracy", "metric own.py:accuracy: accuracy is the name of another figure; call the function otherwise."),
        ("own.py:missing", "metric own.py:missing: the file has no function missing; it has accuracy, fails, nan, none."),
        ("own.py:", "metric own.py:: '' is no name of a function; say FILE.py:function."),
        ("none.py:f", "metric none.py:f: no file none.py."),
        ("broken.py:f", "metric broken.py:f: running the file failed (ZeroDivisionError: division by zero)."),
        ("bleurt", "metric 'bleurt' does not exist; of classes there are accuracy, f1, matthews, or your own as FILE.py:function."),
        ("bleu", "metric bleu scores texts, and the task's answers are classes; of these: accuracy, f1, matthews."),
    ],
)
def test_metrics_that_cannot_be_taken_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, why: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(TaskError) as found:
        find_metric(said, "classes").score(*ANSWERS["classes"])
    assert str(found.value) == why


def test_a_metric_that_is_not_installed_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"metric f1 needs scikit-learn, which is not installed; pip install 'lighten\[tasks\]'"):
        find_metric("f1", "classes")


# ---- files that do not fit ----

CSV = "text,label\n"
ROWS = "".join(f"text {n},{'good' if n % 2 else 'bad'}\n" for n in range(10))


@pytest.mark.parametrize(
    ("model", "name", "content", "why"),
    [
        ("classes", "a.csv", None, "{path} cannot be read as a text: No such file or directory; give a readable .txt or .jsonl file."),
        ("classes", "a.csv", "", "{path} has 0 rows that can be scored; a score needs at least 8."),
        ("classes", "a.txt", ROWS, "{path} has no columns; labels are in a .csv, a .tsv or a .jsonl file."),
        ("classes", "a.csv", "text\n" + "word\n" * 9, "{path} line 2 has no label; a task has a column label, target or answers."),
        ("classes", "a.csv", CSV + ROWS + "x,awful\n", "{path} line 12: label 'awful' is none of the model's 3: 0 bad, 1 so so, 2 good."),
        ("classes", "a.csv", CSV + ROWS + "x,good,more\n",
         "{path} line 12 has 3 cells and the header 2; a cell with a comma or a line end is quoted."),
        ("classes",
         "a.csv", CSV + ROWS + '"x,good\n', "{path} line 12 is not of a table of the kind that the file's name says: unexpected "
         "end of data."),
        ("classes", "a.csv", CSV + ROWS + ",good\n", "{path} line 12: text is empty; leave the row out."),
        ("classes",
         "a.csv", CSV + "".join(f"{n},good\n" for n in range(9)), "{path}: every row that is scored has the label good; a score "
         "of one label says nothing."),
        ("classes", "a.jsonl", '{"text": "a", "label": 1}\n{"text": }\n',
         "{path} line 2 is not JSON: Expecting value: line 1 column 10 (char 9); each line is an object such as "
         '{{"text": "…"}}.'),
        ("classes", "a.csv",
         "text,target\n" + ROWS, "{path} asks for a text (target), which classes (BertForSequenceClassification) does not write; "
         "decoders do."),
        ("value", "a.csv", CSV + ROWS, "{path} line {line}: label '{label}' is no number."),
        ("side by side", "a.csv", CSV + ROWS, "sides (BertForSequenceClassification) gives several labels side by side, which no column says."),
        ("answers",
         "a.csv", CSV + ROWS, "{path} has labels, and answers (BertForQuestionAnswering) answers questions; it takes the columns "
         "question, context and answers."),
        ("decoder", "a.csv",
         "text,text_pair,label\n" + "a,b,c\n" * 9, "{path} has two texts (text and text_pair), and decoder (LlamaForCausalLM) "
         "reads one; put both into text, as it is to read them."),
        ("body", "a.csv", CSV + ROWS + "x,rare\n",
         "{path}: label 'rare' has one row; a classifier on embeddings is fitted on one half and scored on the other."),
        ("body", "a.csv",
         "question,context\n" + "a,b\n" * 9, "{path} asks where in a context the answer stands, which body (BertModel) has no "
         "head for."),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(
    models: Mapping[str, Path], tmp_path: Path, model: str, name: str, content: str | None, why: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises((TaskError, TextError)) as found:
        task_of(models[model], path)
    said = str(found.value)
    if "{line}" in why:
        assert said.startswith(f"{path} line ")
        assert said.endswith("is no number.")
    else:
        assert said == why.format(path=path)


def test_long_texts_are_cut_and_it_is_said(models: Mapping[str, Path], tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.csv")
    path.write_text(path.read_text() + f"{'word ' * 400},good\n")
    task = task_of(models["classes"], path)
    assert task.notes == ("1 of 17 texts are longer than 128 tokens and are cut",)
    assert len(answered(models["classes"], task, tmp_path)) == 17


def test_rows_that_compression_sees_are_not_scored(models: Mapping[str, Path], tmp_path: Path) -> None:
    task = task_of(models["classes"], labelled(tmp_path / "a.csv"), without={sentence(3), sentence(4)})
    assert task.notes == ("2 of 16 rows are not scored: compression calibrates on them",)
    assert len(task.rows) == 14


def test_another_label_or_metric_is_another_task(models: Mapping[str, Path], tmp_path: Path) -> None:
    one = task_of(models["classes"], labelled(tmp_path / "a.csv"))
    other = task_of(models["classes"], labelled(tmp_path / "b.csv", ("good", "so so")))
    again = task_of(models["classes"], labelled(tmp_path / "c.csv"), metrics=("f1",))
    assert len({one.fingerprint, other.fingerprint, again.fingerprint}) == 3


# ---- measure and choose ----


def test_figures_of_a_task_can_be_required_and_maximized() -> None:
    found = parse_constraint("accuracy>=0.98x", decoder=False, task=("accuracy",))
    assert (found.allows(0.5, 0.5), found.allows(0.48, 0.5)) == (True, False)
    assert parse_objective(None, "accuracy", decoder=False, task=("accuracy",)).cost({"quality": {"accuracy": {"value": 0.5}}}) == -0.5
    assert quality_metric(decoder=True, task=("rougeL", "bleu")) == "rougeL"
    with pytest.raises(ConstraintError, match="an encoder has no figure 'accuracy'"):
        parse_constraint("accuracy>=0.9", decoder=False)
    with pytest.raises(ConstraintError, match="beside a task say which quality: accuracy, cosine, rank_agreement, neighbour_agreement"):
        parse_constraint("quality>=0.9", decoder=False, task=("accuracy",))


def test_a_runtime_without_heads_is_refused(models: Mapping[str, Path], tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.csv")
    with pytest.raises(LightenError) as found:
        verbs.measure(models["classes"], runtime="ctranslate2", task=path)
    assert str(found.value) == (
        "runtime ctranslate2 runs BertForSequenceClassification without its head, so it gives no answers to a task; "
        "these do: torch, torch-compile, onnxruntime, openvino."
    )


def test_a_metric_without_a_task_is_refused(models: Mapping[str, Path]) -> None:
    with pytest.raises(TaskError) as found:
        verbs.measure(models["classes"], metrics=("f1",))
    assert str(found.value) == "metric f1 is of a task; name the task's file."


def test_measure_shows_a_task_beside_the_originals(models: Mapping[str, Path], tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.csv")
    verbs.compress(models["classes"], "quantize(rtn)", tmp_path / "made")
    found = verbs.measure(tmp_path / "made", text=write_text(tmp_path / "t.jsonl"), task=path, metrics=("accuracy", "f1"), threads=1, seq_len=16)
    assert set(found["original_quality"]) == {"accuracy", "f1"} < set(found["quality"])
    task = task_of(models["classes"], path)
    assert found["original_quality"]["accuracy"]["value"] == task.scores(answered(models["classes"], task, tmp_path))["accuracy"].value
    assert found["task"]["rows"] == 16


# ---- what is handed on ----


@pytest.mark.parametrize("recipe", ["@ torch", "@ onnxruntime", "@ openvino", "quantize(static) @ openvino"])
@pytest.mark.parametrize("kind", ["classes", "answers"])
def test_the_script_of_a_head_prints_its_answers(models: Mapping[str, Path], tmp_path: Path, kind: str, recipe: str) -> None:
    verbs.compress(models[kind], recipe, tmp_path / "made")
    texts = ["true loop while", "a value"] if kind == "classes" else ["what is true", "the value of a loop is true"]
    ran = subprocess.run([sys.executable, "run.py", *texts], cwd=tmp_path / "made", capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    if kind == "answers":
        assert len(lines) == 1
        assert lines[0] in texts[1]
    else:
        assert len(lines) == 2
        assert all(line.rpartition(" ")[0] in LABELLED["label2id"] for line in lines)
