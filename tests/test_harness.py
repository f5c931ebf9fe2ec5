"""Tasks of lm-eval: the figures are those of lm-eval's own model of transformers; and what is refused.

Faults put in by hand, each caught: a continuation scored one position too early; rows of one input mixed up; the first of several texts that end
an answer taken for the nearest; a rolling text without the mark before it; the examples before a question drawn anew each time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_heads import save_writing
from tiny_models import bert_config, save
from transformers import AutoTokenizer

from lighten import verbs
from lighten.errors import LightenError, TaskError
from lighten.judge.child import WorkerFailed
from lighten.judge.harness import Ask, resolved
from lighten.judge.task import Task, load_task
from lighten.judge.tokens import Tokenizer
from lighten.judge.worker import Worker
from lighten.model import read_spec
from lighten.model.text_ends import end_tokens

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's, and of what it reads with

WORDS = ("while", "break", "assert", "true", "false", "loop", "value", "statement")

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA, train: DATA}}
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{question}} is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
task: own_written
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["zzz", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""


def sentence(number: int, length: int = 6) -> str:
    return " ".join(WORDS[(number * step + step // 3) % len(WORDS)] for step in range(1, length + 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, and tasks beside it."""
    base = tmp_path_factory.mktemp("harness")
    save_writing(base / "model")
    rows = [
        {"question": sentence(n), "choices": [sentence(n + 1, 2), "true", sentence(n + 5, 3)], "answer": n % 3} for n in range(24)
    ]  # fmt: skip
    (base / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("rolling", ROLLING)):
        (base / f"{name}.yaml").write_text(text.replace("DATA", str(base / "data.jsonl")))
    return base


def task_of(folder: Path, name: str, **options: Any) -> Task:
    return load_task(Path(f"lm-eval:{folder / name}.yaml"), read_spec(folder / "model"), folder / "model", **options)


def their_model(folder: Path) -> Any:
    """lm-eval's own model of transformers, with the marks of the model's config."""
    from lm_eval.models.huggingface import HFLM

    config, tokenizer = read_spec(folder / "model").config, AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([config["bos_token_id"], config["eos_token_id"]])
    return HFLM(pretrained=str(folder / "model"), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1)


def asker(folder: Path, tmp_path: Path) -> Ask:
    """A worker without a process of its own."""
    worker, model = Worker(), str(folder / "model")
    worker.load(model, model, "torch", {"dtype": "float32", "threads": 1})

    def ask(way: str, rows: list[Any]) -> list[Any]:
        held = tmp_path / "rows.json"
        held.write_text(json.dumps({"way": way, "rows": rows, "ends": end_tokens(folder / "model")}))
        found: list[Any] = []
        for start in range(0, len(rows), 7):
            found += worker.answer(str(held), start, start + 7, model, batch_size=1)["answers"]
        return found

    return ask


def ours(folder: Path, task: Task, tmp_path: Path) -> dict[str, Any]:
    model = folder / "model"
    assert task.harness is not None
    return task.harness.answer(Tokenizer(model), read_spec(model), end_tokens(model), asker(folder, tmp_path))


@pytest.mark.slow
def test_figures_are_those_of_lm_evals_own_model(folder: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate

    task = task_of(folder, "choice", metrics=("acc_norm", "acc"))
    assert (task.way, task.kind, task.names) == ("lm-eval", "multiple_choice", ("acc_norm", "acc"))
    found = simple_evaluate(model=their_model(folder), tasks=[str(folder / "choice.yaml")], log_samples=False)
    told, said = ours(folder, task, tmp_path), found["results"]["own_choice"]
    for name in task.names:
        assert told[name]["value"] == said[f"{name},none"]
        assert told[name]["standard_error"] == pytest.approx(said[f"{name}_stderr,none"], rel=1e-6)
    assert 0 < told["acc"]["value"] < 1
    assert ours(folder, task, tmp_path) == told


def test_what_follows_is_as_likely_as_it_is_for_lm_eval(folder: Path, tmp_path: Path) -> None:
    """Texts of one and several tokens, some greedy, after the same and other texts, and rolling over more than a window."""
    from lm_eval.api.instance import Instance

    from lighten.judge.harness_model import HarnessModel

    model, other = folder / "model", their_model(folder)
    own = HarnessModel(Tokenizer(model), read_spec(model), end_tokens(model), asker(folder, tmp_path))
    pairs = [(sentence(n // 2), f" {sentence(n, 1 + n % 3)}") for n in range(12)] + [("", "true loop")]
    pairs += [(sentence(0), letter) for letter in "etw"]  # one pass for the three
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    for one, two in zip(own.loglikelihood(requests), other.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(two[0], abs=1e-4)
        assert one[1] == two[1]
    longer = [Instance("loglikelihood_rolling", {}, (sentence(3, 200),), 0), Instance("loglikelihood_rolling", {}, (sentence(1, 5),), 1)]
    for alone, its in zip(own.loglikelihood_rolling(longer), other.loglikelihood_rolling(longer, disable_tqdm=True), strict=True):
        assert alone == pytest.approx(its, rel=1e-5)
    for n in range(3):

        def both(until: list[str], prompt: str = sentence(n)) -> tuple[str, str]:
            asked = [Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": 16, "do_sample": False}), 0)]
            return own.generate_until(asked)[0], other.generate_until(asked, disable_tqdm=True)[0]

        whole, same = both(["never"])
        assert whole == same
        near, far = whole[2:4], next(whole[at : at + 2] for at in range(len(whole) - 2, 4, -1) if whole[at : at + 2] not in whole[:4])
        assert whole.find(near) < whole.find(far)
        assert both([far, near]) == (whole[: whole.find(near)],) * 2


@pytest.mark.slow
def test_measure_scores_an_artifact_and_its_original(folder: Path) -> None:
    asked = f"lm-eval:{folder / 'written'}.yaml"
    found = verbs.measure(folder / "model", task=asked, seq_len=8, threads=1)
    assert found["task"]["answers"] == "generate_until"
    assert found["task"]["rows"] == 24
    assert found["quality"]["exact_match"] == found["original_quality"]["exact_match"]
    assert found["quality"]["perplexity_ratio"]["value"] == pytest.approx(1.0)


def test_a_task_is_another_one_by_its_documents_and_figures(folder: Path, tmp_path: Path) -> None:
    same = [task_of(folder, "choice").fingerprint for _ in range(2)]
    assert same[0] == same[1]
    rows = (folder / "data.jsonl").read_text().replace('"answer": 2', '"answer": 0')
    (tmp_path / "data.jsonl").write_text(rows)
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("DATA", str(tmp_path / "data.jsonl")))
    changed = load_task(Path(f"lm-eval:{tmp_path / 'choice'}.yaml"), read_spec(folder / "model"), folder / "model").fingerprint
    assert len({same[0], changed, task_of(folder, "choice", metrics=("acc_norm",)).fingerprint}) == 3


def test_what_is_not_used_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lighten.judge.task.MOST_ROWS", 10)
    assert task_of(folder, "choice").notes == ("10 of 24 documents are used", "scored by acc; it also has acc_norm")


@pytest.mark.parametrize(("said", "why"), [
    ("lm-eval:no_such_task", r"lm-eval [\d.]+ has no task 'no_such_task'"),
    ("lm-eval:nowhere.yaml", r"no file nowhere\.yaml\.$"),
    ("lm-eval:arc_easy", r"its data is not on this machine"),
    ("lm-eval:mmlu", r"is a group of|its data is not on this machine"),
    ("rolling", r"has no figure of which more is better; it has word_perplexity, byte_perplexity\.$"),
    ("choice f1", r"has no figure 'f1' of which more is better; it has acc, acc_norm\.$"),
    ("choice acc acc", r"one stands there twice"),
    ("broken", r"lm-eval failed \(\w+: "),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(folder: Path, said: str, why: str) -> None:
    (folder / "broken.yaml").write_text("task: own_broken\noutput_type: [\n")
    name, *metrics = said.split()
    path = Path(name if ":" in name else f"lm-eval:{folder / name}.yaml")
    with pytest.raises(TaskError, match=why) as caught:
        load_task(path, read_spec(folder / "model"), folder / "model", metrics=tuple(metrics))
    assert "\n" not in str(caught.value)


def test_a_child_that_dies_is_no_fault_of_the_task(folder: Path) -> None:
    def ask(way: str, rows: list[Any]) -> list[Any]:
        raise WorkerFailed("it was killed")

    harness, model = task_of(folder, "choice").harness, folder / "model"
    assert harness is not None
    with pytest.raises(WorkerFailed, match=r"^it was killed$"):
        harness.answer(Tokenizer(model), read_spec(model), end_tokens(model), ask)


def test_texts_at_random_and_encoders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "random.yaml").write_text((folder / "written.yaml").read_text().replace("do_sample: false", "do_sample: true, temperature: 0.7"))
    with pytest.raises(TaskError, match="drawn at random"):
        ours(folder, task_of(folder, "random"), tmp_path)
    encoder = save(bert_config(), tmp_path / "encoder")
    with pytest.raises(TaskError, match=r"does not write; decoders do"):
        load_task(Path("lm-eval:arc_easy"), read_spec(encoder), encoder)


def test_without_lm_eval_it_is_said_what_installs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LightenError, match=r"needs lm-eval, which is not installed; pip install 'lighten\[lm-eval\]'\."):
        task_of(folder, "choice")


def test_paths_stand_for_themselves_elsewhere_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert resolved(Path("lm-eval:choice.yaml")) == Path(f"lm-eval:{folder / 'choice.yaml'}")
    assert resolved(Path("data.jsonl")) == folder / "data.jsonl"
