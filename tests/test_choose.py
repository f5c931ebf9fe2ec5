"""`choose` from the command line to its files, on tiny models: real runtimes, real workers, a profile made by hand."""

from __future__ import annotations

import fcntl
import html
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choose_setup import THREADS, Ran, Scene, read_trials
from safetensors.torch import load_file
from tiny_models import bert_config, save
from transformers import AutoModel

import lighten.runtimes
from lighten import verbs
from lighten.choose import Request, handover, outcome, run
from lighten.choose import trial as trial_module
from lighten.choose.outcome import RATIOS
from lighten.choose.search import Search
from lighten.cost import Workload
from lighten.device.roofline import OPERATOR_KINDS
from lighten.errors import ModelError
from lighten.formats.artifact import folder_bytes, read_artifact
from lighten.model import read_spec
from lighten.recipe import parse_recipe
from lighten.recipe.size import COMPONENTS
from lighten.runtimes.profiling import require_profiler

BF16, ONNX, OPENVINO = "cast(bfloat16) @ torch", "@ onnxruntime", "quantize(rtn, embeddings=true) @ openvino"
CRASH, REFUSED = "prune(magnitude, sparsity=0.77) @ torch", "quantize(rtn, bits=2) @ openvino"
RECIPES = (BF16, ONNX, OPENVINO, CRASH, REFUSED)
FILES = {".lock", "artifact", "choice.json", "report.html", "trials.jsonl"}
MODEL_KEYS = {"name", "family", "source", "dtype", "parameters"}
PREDICTED = {
    "size_bytes", "peak_memory_bytes", "latency_s", "latency_low_s", "latency_high_s", "time_to_first_token_s", "throughput", "energy_j",
    "usd_per_million_tokens", "tokens_per_pass",
}  # fmt: skip
CORRECTED = {"quality", "size_low_bytes", "size_high_bytes", "peak_memory_low_bytes", "peak_memory_high_bytes"}
MEASURED = {
    "size_bytes", "peak_memory_bytes", "latency_s", "latency_q1_s", "latency_q3_s", "throughput", "speedup", "cold_start_s", "precision",
    "runtime_version", "quality",
}  # fmt: skip
CHOICE = {
    "lighten", "command", "model", "workload", "require", "objective", "goal", "quality_metric", "machine", "versions", "text", "task", "seconds",
    "baseline", "candidates", "chosen", "stopped", "finals", "elsewhere", "closest", "looser", "warnings", "accuracy",
    "ablation", "profile", "components",
}  # fmt: skip
TRIAL = {"id", "recipe", "runtime", "status", "failure", "predicted", "measured", "ratio", "pareto", "meets", "seconds"}


@dataclass(frozen=True)
class Finished:
    """A run that came to its end, to look at or to go on from."""

    scene: Scene
    model: Path
    out: Path
    ran: Ran

    @property
    def choice(self) -> dict[str, Any]:
        return json.loads((self.out / "choice.json").read_text())

    def again(self, *more: object, recipes: tuple[str, ...] = RECIPES) -> Ran:
        return self.scene.choose(self.model, self.out, recipes, *more)


def trials_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice["baseline"], *choice["candidates"]]


def find(choice: dict[str, Any], recipe: str) -> dict[str, Any]:
    return next(trial for trial in choice["candidates"] if f"{trial['recipe']} @ {trial['runtime']}".strip() == recipe)


def mistake(ran: Ran) -> str:
    """The one line of a run that was refused."""
    assert ran.code == 2
    assert ran.stdout == ""
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("lighten: ")
    return last.removeprefix("lighten: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Finished]:
    """A whole run on a tiny BERT. Only to look at: who changes its folder takes `copied`."""
    with pytest.MonkeyPatch.context() as patch:
        scene = Scene(tmp_path_factory.mktemp("choose")).prepare(patch, worker="real")
        scene.fail("build", "sparsity=0.77")
        out = scene.folder / "out"
        ran = scene.choose(tiny_bert, out, RECIPES, "--minimize", "size", "--json")
        yield Finished(scene, tiny_bert, out, ran)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """The same, free to be changed, with nothing traced yet. What goes on from here is done by made-up workers: no runtime is loaded."""
    scene = Scene(tmp_path / "scene").prepare(monkeypatch)
    shutil.copytree(finished.out, scene.folder / "out")
    return Finished(scene, finished.model, scene.folder / "out", finished.ran)


# ---- a whole run ----


def test_it_succeeds_and_prints_the_content_of_choice_json_and_nothing_else(finished):
    assert finished.ran.code == 0
    assert json.loads(finished.ran.stdout) == finished.choice


def test_it_leaves_its_results_and_nothing_else(finished):
    assert {path.name for path in finished.out.iterdir()} == FILES


def test_choice_json_has_the_keys_of_the_contract(finished):
    choice = finished.choice
    assert set(choice) == CHOICE
    assert set(choice["model"]) == MODEL_KEYS
    assert choice["workload"]["batch_size"] == 8
    assert choice["machine"]["threads"] == THREADS
    assert {"python", "torch", "openvino", "onnxruntime"} <= set(choice["versions"])
    assert choice["text"] == {"source": str(finished.scene.text), "calibration_texts": 12, "test_texts": 24}
    assert choice["command"].startswith("lighten choose ")
    for trial in trials_of(choice):
        assert set(trial) == TRIAL
        assert not trial["predicted"] or set(trial["predicted"]) - CORRECTED == PREDICTED
        if trial["status"] == "measured":
            assert set(trial["measured"]) >= MEASURED
            assert set(trial["ratio"]) == set(RATIOS)
            assert (trial["failure"], type(trial["meets"]), type(trial["pareto"])) == (None, bool, bool)
        else:
            assert trial["status"] in ("failed", "skipped")
            assert (trial["measured"], trial["ratio"], trial["meets"], trial["pareto"]) == (None, None, None, False)
            assert trial["failure"]


def test_every_number_in_choice_json_is_one(finished):
    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from numbers(part)
        elif isinstance(value, int | float):
            yield value

    assert all(math.isfinite(number) for number in numbers(finished.choice))


def test_what_was_tried_failed_and_skipped(finished):
    choice = finished.choice
    assert {recipe: find(choice, recipe)["status"] for recipe in RECIPES} == {
        BF16: "measured", ONNX: "measured", OPENVINO: "measured", CRASH: "failed", REFUSED: "skipped",
    }  # fmt: skip
    assert find(choice, CRASH)["failure"].startswith("the process died (SIGABRT)")
    assert "runtime openvino cannot carry" in find(choice, REFUSED)["failure"]
    assert choice["baseline"]["status"] == "measured"


def test_one_line_a_trial_in_the_journal(finished):
    lines = read_trials(finished.out)
    tried = [trial["id"] for trial in trials_of(finished.choice) if trial["status"] != "skipped"]
    assert sorted(line["id"] for line in lines) == sorted(tried)
    assert lines[0]["id"] == finished.choice["baseline"]["id"]


def test_the_least_predicted_is_tried_first(finished):
    order = [line["predicted"]["size_bytes"] for line in read_trials(finished.out)[1:]]
    assert order == sorted(order)


def test_each_artifact_was_built_once_by_a_worker(finished):
    assert sorted(finished.scene.built()) == sorted([BF16, ONNX, OPENVINO, CRASH])


def test_measured_figures_fit_each_other(finished):
    choice = finished.choice
    assert choice["baseline"]["measured"]["speedup"] == 1.0
    for trial in trials_of(choice):
        measured = trial["measured"]
        if not measured:
            continue
        assert 0 < measured["latency_q1_s"] <= measured["latency_s"] <= measured["latency_q3_s"]
        assert measured["throughput"] == pytest.approx(8 * 16 / measured["latency_s"])
        assert measured["latency_s"] == pytest.approx(choice["baseline"]["measured"]["latency_s"] / measured["speedup"])
        for key, ratio in trial["ratio"].items():
            assert ratio == (trial["predicted"][key] / measured[key] if trial["predicted"][key] else None)
        assert measured["peak_memory_bytes"] > 10_000_000


def test_what_runs_in_float32_agrees_with_the_original_in_full(finished):
    for trial in (finished.choice["baseline"], find(finished.choice, ONNX)):
        assert trial["measured"]["precision"] == "float32"
        assert trial["measured"]["quality"]["cosine"]["value"] == pytest.approx(1, abs=1e-5)
        assert trial["measured"]["quality"]["neighbour_agreement"]["value"] == 1.0
    assert find(finished.choice, BF16)["measured"]["precision"] == "bfloat16"


def test_the_chosen_is_the_smallest(finished):
    choice = finished.choice
    sizes = {trial["id"]: trial["measured"]["size_bytes"] for trial in trials_of(choice) if trial["measured"]}
    assert choice["chosen"] == min(sizes, key=sizes.__getitem__) == find(choice, BF16)["id"]
    assert choice["closest"] is None


def test_the_artifact_is_the_chosen_recipe_and_loads(finished):
    place = finished.out / "artifact"
    made = read_artifact(place)
    assert str(made.recipe) == BF16
    assert made.original == finished.model.resolve()
    assert folder_bytes(place) == find(finished.choice, BF16)["measured"]["size_bytes"]
    original, loaded = AutoModel.from_pretrained(finished.model), AutoModel.from_pretrained(place)
    stored = load_file(place / "model.safetensors")
    for name, weight in original.state_dict().items():
        assert stored[name].dtype.is_floating_point
        assert (stored[name] == weight.bfloat16()).all()
        assert (loaded.state_dict()[name] == weight.bfloat16()).all()


def test_the_way_to_the_chosen_is_told_by_the_same_trials(finished):
    choice = finished.choice
    rows = [(row["role"], row["step"], row["id"]) for row in choice["ablation"]]
    assert rows == [("original", "", choice["baseline"]["id"]), ("with", "cast(bfloat16)", choice["chosen"])]
    for row, trial in zip(choice["ablation"], (choice["baseline"], find(choice, BF16)), strict=True):
        assert {key: row[key] for key in TRIAL} == trial


def test_what_operators_take_adds_up_to_a_run_which_takes_about_as_long_as_the_trials_did(finished):
    """Real torch, profiled: another measurement of the same workload; where the model is tiny, a busy machine makes it tens of times slower."""
    choice = finished.choice
    for side, trial in (("original", choice["baseline"]), ("chosen", find(choice, BF16))):
        told = choice["profile"][side]
        assert (told["id"], told["failure"], set(told["measured"])) == (trial["id"], None, set(OPERATOR_KINDS))
        assert sum(told["measured"].values()) == pytest.approx(told["measured_s"])
        assert 0.01 * trial["measured"]["latency_s"] < told["measured_s"] < 100 * trial["measured"]["latency_s"]
        assert min(told["measured"][kind] for kind in ("linear", "attention", "norm", "activation", "embedding")) > 0
    assert sum(choice["profile"]["original"]["predicted"].values()) == pytest.approx(choice["baseline"]["predicted"]["latency_s"])


def test_components_add_up_to_the_artifact_and_are_those_of_its_tensors(finished):
    choice, spec = finished.choice, read_spec(finished.model)
    for side in choice["components"].values():
        assert sum(side["predicted"].values()) == side["predicted_bytes"]
        assert side["predicted_bytes"] == pytest.approx(side["measured_bytes"], rel=0.01)
    stored = load_file(finished.out / "artifact" / "model.safetensors")
    found: dict[str, int] = {}
    for part in spec.parts:
        for name in part.tensors():
            kind = part.component if part.component in COMPONENTS else "other"
            found[kind] = found.get(kind, 0) + stored[name].nbytes
    told = choice["components"]["chosen"]["predicted"]
    for kind, held in found.items():  # beside its bytes each tensor has an entry in the header, of less than 200
        assert held < told[kind] < held + 200 * len(stored)
    assert set(found) == {kind for kind, held in told.items() if held} - {"files"}


def test_the_report_is_one_page_with_the_answer_and_the_failures(finished):
    page = (finished.out / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    for text in (BF16.split(" @")[0], "the process died (SIGABRT)", "cannot carry"):
        assert text in page


def test_progress_says_what_is_tried_and_how_much_is_left(finished):
    lines = finished.ran.stderr.splitlines()
    assert "the original, by torch in float32" in lines
    assert "4 recipes that can be tried, 0 tried before, 1 cannot run here" in lines
    for tried in range(4):
        assert any(re.match(rf"\[{tried} tried, 1 running, {3 - tried} left, \d on the front, at most .+\] .*@ ", line) for line in lines)
    assert lines[-3:] == ["stopped: everything was tried", "where the time goes: @ torch", f"where the time goes: {BF16}"]
    assert any(line.startswith("    failed: the process died (SIGABRT)") for line in lines)


# ---- going on ----


def test_a_second_run_repeats_nothing_and_says_the_same(copied):
    artifact = (copied.out / "artifact" / "model.safetensors").stat()
    journal, before = (copied.out / "trials.jsonl").read_bytes(), copied.choice
    ran = copied.again("--minimize", "size")
    assert ran.code == 0
    assert copied.scene.trace() == []
    assert ran.stderr.count(": done before") == 5
    assert (copied.out / "trials.jsonl").read_bytes() == journal
    changing = {"seconds": 0, "command": "", "text": {}}
    assert copied.choice | changing == before | changing
    assert (copied.out / "artifact" / "model.safetensors").stat().st_ino == artifact.st_ino
    assert {path.name for path in copied.out.iterdir()} == FILES


@pytest.mark.parametrize("step", ["artifact", "choice.json", "report.html", "artifact half moved"])
def test_a_run_that_was_cut_off_while_it_answered_is_finished_without_a_new_trial(copied, step):
    journal = (copied.out / "trials.jsonl").read_bytes()
    if step == "artifact half moved":
        (copied.out / "artifact" / "lighten.json").unlink()
    elif step == "artifact":
        shutil.rmtree(copied.out / "artifact")
    else:
        (copied.out / step).unlink()
    ran = copied.again("--minimize", "size")
    assert ran.code == 0
    assert copied.scene.built() == ([BF16] if "artifact" in step else [])
    assert (copied.out / "trials.jsonl").read_bytes() == journal
    assert str(read_artifact(copied.out / "artifact").recipe) == BF16
    assert {path.name for path in copied.out.iterdir()} == FILES


def test_an_interrupt_ends_it_with_one_line_and_what_is_finished_stays(copied, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(handover, "write_beside", interrupt)
        ran = copied.again("--minimize", "size")
    assert ran.code == 130
    assert ran.stderr.endswith("lighten: interrupted\n")
    assert copied.again("--minimize", "size").code == 0


def test_another_requirement_is_answered_from_the_same_trials(copied):
    """Another trial is chosen, so another artifact takes the place; nothing is measured again."""
    ran = copied.again("--minimize", "size", "--require", "neighbour_agreement>=1", recipes=(ONNX,))
    assert ran.code == 0
    assert copied.choice["chosen"] in (copied.choice["baseline"]["id"], find(copied.choice, ONNX)["id"])
    assert [asked for asked in copied.scene.trace() if "load" in asked] == []
    made = read_artifact(copied.out / "artifact")
    assert str(made.recipe) in ("@ torch", ONNX)


def test_a_model_that_changed_is_tried_anew_and_its_artifact_is_its_own(copied, tmp_path):
    model = save(bert_config(num_hidden_layers=1), tmp_path / "model")
    changed = Finished(copied.scene, model, copied.out, copied.ran)
    before = len(read_trials(copied.out))
    assert changed.again("--minimize", "size", recipes=(BF16,)).code == 0
    assert changed.choice["chosen"] == find(changed.choice, BF16)["id"] != json.loads(copied.ran.stdout)["chosen"]
    assert len(read_trials(copied.out)) == before + 2
    assert read_artifact(copied.out / "artifact").original == model


# ---- answers that are no success ----


def test_where_nothing_meets_the_closest_is_said_and_the_report_is_written(copied):
    (copied.out / "report.html").unlink()
    ran = copied.again("--minimize", "size", "--require", "size<=1KB")
    choice = copied.choice
    assert ran.code == 1
    assert choice["chosen"] is None
    smallest = find(choice, BF16)
    assert choice["closest"]["id"] == smallest["id"]
    assert re.fullmatch(r"size [\d.]+ kB, required size<=1KB", choice["closest"]["misses"][0])
    said = " ".join(ran.stdout.split())
    assert "Nothing met the requirements. Closest: " in said
    assert choice["closest"]["misses"][0] in said
    assert choice["closest"]["misses"][0] in html.unescape((copied.out / "report.html").read_text())
    assert not (copied.out / "artifact").exists()


def test_where_nothing_is_better_the_original_is_chosen_and_that_is_said(copied):
    ran = copied.again("--minimize", "size", recipes=(CRASH, REFUSED))
    assert ran.code == 0
    assert copied.choice["chosen"] == copied.choice["baseline"]["id"]
    assert "Chosen: the original itself" in ran.stdout
    assert str(read_artifact(copied.out / "artifact").recipe) == "@ torch"
    assert copied.scene.built() == ["@ torch"]
    original, kept = load_file(copied.model / "model.safetensors"), load_file(copied.out / "artifact" / "model.safetensors")
    assert original.keys() == kept.keys()
    assert all((kept[name] == weight).all() for name, weight in original.items())


def test_a_choice_that_is_bigger_or_slower_than_the_original_says_so(copied):
    lines = read_trials(copied.out)
    for line in lines:
        if line["recipe"] == "cast(bfloat16)":
            line["measured"] |= {"peak_memory_bytes": 1, "size_bytes": 10**9, "speedup": 0.5}
    (copied.out / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = copied.again("--minimize", "memory")
    assert ran.code == 0
    assert copied.choice["chosen"] == find(copied.choice, BF16)["id"]
    assert [warning.split(",")[0] for warning in copied.choice["warnings"]] == [
        "the chosen is bigger on disk than the original", "the chosen is slower than the original",
    ]  # fmt: skip
    assert "Warning: the chosen is slower than the original, 2.00 times." in ran.stdout
    assert "the chosen is slower than the original" in (copied.out / "report.html").read_text()


# ---- what is not tried ----


def test_a_runtime_that_is_not_installed_is_listed_with_the_extra(copied, monkeypatch):
    monkeypatch.setattr("lighten.runtimes.find_spec", lambda name: None if name in ("openvino", "nncf") else object())
    ran = copied.again("--minimize", "size", recipes=(BF16, "@ openvino"))
    assert ran.code == 0
    skipped = find(copied.choice, "@ openvino")
    assert (skipped["status"], skipped["failure"]) == ("skipped", "not installed: openvino, nncf; pip install 'lighten[openvino]'")
    assert "pip install 'lighten[openvino]'" in " ".join(ran.stdout.split())
    assert skipped["predicted"]["size_bytes"] > 0


def test_a_recipe_that_cannot_meet_a_limit_is_skipped_with_its_prediction(copied):
    assert copied.again("--minimize", "size", "--require", "size<=20KB", recipes=(BF16, "@ openvino")).code == 1
    assert re.fullmatch(r"predicted size [\d.]+ kB, required size<=20KB", find(copied.choice, "@ openvino")["failure"])
    assert find(copied.choice, BF16)["status"] == "measured"
    assert copied.scene.trace() == []


@pytest.mark.parametrize(("factor", "tried"), [(0.99, True), (0.97, False)])
def test_a_prediction_is_believed_only_beyond_its_margin(copied, factor, tried):
    recipe = "prune(magnitude, sparsity=0.5) @ torch"
    copied.scene.fail("build", "sparsity=0.5")
    copied.again("--minimize", "size", "--budget", "1s", recipes=(recipe,))
    predicted = find(copied.choice, recipe)["predicted"]["size_bytes"]
    copied.again("--minimize", "size", "--require", f"size<={round(predicted * factor)}B", recipes=(recipe,))
    assert find(copied.choice, recipe)["status"] == ("failed" if tried else "skipped")


def test_when_the_budget_is_used_up_the_rest_is_listed_and_tried_another_time(copied):
    before = read_trials(copied.out)
    ran = copied.again("--minimize", "size", "--budget", "1s", recipes=(BF16, "@ openvino"))
    assert ran.code == 0
    left = find(copied.choice, "@ openvino")
    assert (left["status"], left["failure"]) == ("skipped", "not tried: the budget of 1 s is used up")
    assert copied.choice["chosen"] == find(copied.choice, BF16)["id"]
    assert read_trials(copied.out) == before
    assert copied.scene.trace() == []


# ---- searching a space ----


SPACE = """
places:
  - ["", "quantize(rtn, bits={8|4|2}, embeddings=true)"]
runtimes: [torch, openvino]
"""


def searched(copied: Finished, tmp_path: Path, *options: object) -> tuple[Ran, dict[str, Any]]:
    """A search of a small space into a folder of its own."""
    (tmp_path / "space.yaml").write_text(SPACE)
    out = tmp_path / f"searched-{len(list(tmp_path.iterdir()))}"
    ran = copied.scene.choose(copied.model, out, (), "--space", tmp_path / "space.yaml", *options)
    return ran, json.loads((out / "choice.json").read_text()) if ran.code != 2 else {}


def test_a_space_is_searched_from_the_best_on_and_what_cannot_win_is_not_tried(copied, tmp_path):
    """Made-up workers write every artifact as large as the original, so nothing that was measured is smaller than what is predicted."""
    ran, choice = searched(copied, tmp_path, "--minimize", "latency", "--require", "neighbour_agreement>=0.5", "--fresh")
    assert ran.code == 0
    assert choice["stopped"] in ("everything was tried", "nothing that is left is predicted to be better than what was measured")
    assert "1 of the space's 8 combinations cannot be done with this model on their runtime" in ran.stderr  # 2 bits by channel @ openvino
    said = [trial["failure"] for trial in choice["candidates"] if trial["status"] == "skipped"]
    assert all("no better than what was measured" in reason for reason in said)


def test_proxies_are_made_once_for_all_runtimes_and_kept(copied, tmp_path):
    ran, _ = searched(copied, tmp_path, "--minimize", "size", "--require", "neighbour_agreement>=0.5", "--fresh")
    assert ran.code == 0
    built = [recipe for recipe in copied.scene.built() if "@ torch(dtype=float32)" in recipe]
    assert len(built) == len(set(built)) > 0
    assert "by proxy" in ran.stderr
    again, _ = searched(copied, tmp_path, "--minimize", "size", "--require", "neighbour_agreement>=0.5")
    assert again.code == 0
    assert copied.scene.built().count(built[0]) == 1  # taken over from the first run, as its trials are


@pytest.mark.parametrize(("package", "anew"), [("onnxruntime", {ONNX}), ("numpy", {BF16, ONNX}), ("ctranslate2", set())])
def test_a_package_of_another_version_has_what_it_runs_measured_anew(copied, monkeypatch, package, anew):
    of = lighten.runtimes.version
    monkeypatch.setattr(lighten.runtimes, "version", lambda name: "0.0" if name == package else of(name))
    before = len(read_trials(copied.out))
    assert copied.again("--minimize", "size", recipes=(BF16, ONNX)).code == 0
    new = [
        f"{trial['recipe']} @ {trial['runtime']}".strip()
        for trial in read_trials(copied.out)[before:]
        if trial["id"] != copied.choice["baseline"]["id"]
    ]
    assert set(new) == anew


def test_fresh_measures_anew(copied, tmp_path):
    searched(copied, tmp_path, "--minimize", "size", "--fresh")
    before = len(copied.scene.built())
    searched(copied, tmp_path, "--minimize", "size")
    assert len(copied.scene.built()) <= before + 1  # the chosen artifact
    searched(copied, tmp_path, "--minimize", "size", "--fresh")
    assert len(copied.scene.built()) > before + 1


def test_a_space_of_which_nothing_can_be_done_is_refused(copied, tmp_path):
    (tmp_path / "space.yaml").write_text('places: [["quantize(kv, bits=8)"]]\nruntimes: [openvino]\n')
    ran = copied.scene.choose(copied.model, tmp_path / "out", (), "--space", tmp_path / "space.yaml")
    assert "none of the space's 1 combinations can be done with tiny-bert" in mistake(ran)


def test_recipes_and_a_space_are_refused_together(copied, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    ran = copied.scene.choose(copied.model, tmp_path / "out", (BF16,), "--space", tmp_path / "space.yaml")
    assert "recipes and a space are two lists" in mistake(ran)


@pytest.mark.parametrize(
    ("goal", "figure"), [("--maximize", "throughput"), ("--minimize", "energy"), ("--minimize", "cost"), ("--maximize", "quality")]
)
def test_every_kind_of_objective_gives_an_answer_and_a_page(copied, goal, figure):
    ran = copied.again(goal, figure, "--power", "65W", "--price", "0.4/h")
    assert ran.code == 0, ran.stderr
    choice = copied.choice
    assert (choice["objective"], choice["goal"]) == (figure, goal.removeprefix("--"))
    assert choice["chosen"]
    assert figure.replace("_", " ") in (copied.out / "report.html").read_text()


def test_energy_and_cost_follow_from_the_latency(copied):
    copied.again("--minimize", "energy", "--power", "50W", "--price", "0.36/h", "--fresh")
    for trial in trials_of(copied.choice):
        if trial["measured"]:
            seconds = trial["measured"]["latency_s"]
            assert trial["measured"]["energy_j"] == pytest.approx(50 * seconds)
            assert trial["measured"]["usd_per_million_tokens"] == pytest.approx(0.36 / 3600 * seconds / 128 * 1e6)


# ---- what explains the answer ----

TWO_STEPS = "prune(magnitude, sparsity=0.5) | cast(bfloat16) @ torch(dtype=bfloat16)"
VARIANTS = [
    "prune(magnitude, sparsity=0.5) @ torch(dtype=bfloat16)", "@ torch(dtype=bfloat16)", "cast(bfloat16) @ torch(dtype=bfloat16)",
    "prune(magnitude, sparsity=0.5) | cast(bfloat16) @ torch",
]  # fmt: skip


@pytest.fixture
def winner_of_two_steps(copied, monkeypatch, tmp_path) -> Finished:
    """Where a recipe of two steps wins, whatever was measured."""
    monkeypatch.setattr(outcome, "choose_best", lambda judged, *_: next(trial for trial in judged if " | " in trial["recipe"]))
    return Finished(copied.scene, copied.model, tmp_path / "two", copied.ran)


def test_each_step_is_left_out_once_in_trials_of_their_own(winner_of_two_steps):
    ran = winner_of_two_steps.again("--minimize", "size", recipes=(TWO_STEPS,))
    assert ran.code == 0, ran.stderr
    choice = winner_of_two_steps.choice
    assert [trial["recipe"] for trial in choice["candidates"]] == [TWO_STEPS.split(" @")[0]]
    assert [(row["role"], row["step"]) for row in choice["ablation"]] == [
        ("original", ""), ("with", "dtype=bfloat16"), ("with", "prune(magnitude, sparsity=0.5)"), ("with", "cast(bfloat16)"),
        ("without", "prune(magnitude, sparsity=0.5)"), ("without", "dtype=bfloat16"),
    ]  # fmt: skip
    assert all(row["status"] == "measured" for row in choice["ablation"])
    assert sorted(winner_of_two_steps.scene.built()) == sorted([TWO_STEPS, *VARIANTS])
    again = winner_of_two_steps.again("--minimize", "size", recipes=(TWO_STEPS,))
    assert again.code == 0
    assert len(winner_of_two_steps.scene.built()) == 5
    assert winner_of_two_steps.choice["ablation"] == choice["ablation"]
    assert winner_of_two_steps.choice["profile"] == choice["profile"]


def test_without_time_what_steps_contributed_is_predicted_and_marked(winner_of_two_steps, monkeypatch):
    monkeypatch.setattr(Search, "has_time_for", lambda self, job: job.kind == "trial" and str(job.candidate.recipe) == TWO_STEPS)
    assert winner_of_two_steps.again("--minimize", "size", "--budget", "1h", recipes=(TWO_STEPS,)).code == 0
    choice = winner_of_two_steps.choice
    untried = [row for row in choice["ablation"] if row["status"] == "skipped"]
    assert len(untried) == 4
    assert {row["failure"] for row in untried} == {"not tried: the budget of 1 h 0 min is used up"}
    assert all(row["predicted"]["size_bytes"] > 0 and row["measured"] is None for row in untried)
    told = choice["profile"]["chosen"]
    assert (told["measured"], told["failure"]) == (None, "not measured: the budget of 1 h 0 min is used up")
    assert sum(choice["components"]["chosen"]["predicted"].values()) > 0
    assert [asked for asked in winner_of_two_steps.scene.trace() if "profile" in asked] == []


def test_what_a_runtime_does_not_tell_is_said(copied, monkeypatch):
    said = "runtime llama.cpp does not tell what its operators take: it has no profiler of operators; these do: torch, onnxruntime, openvino."
    monkeypatch.setattr(trial_module, "require_profiler", lambda recipe, workload: require_profiler(replace(recipe, runtime="llama.cpp"), workload))
    fresh = Finished(copied.scene, copied.model, copied.scene.folder / "fresh", copied.ran)
    assert fresh.again("--minimize", "size", "--fresh", recipes=(BF16,)).code == 0
    told = fresh.choice["profile"]["original"]
    assert (told["measured"], told["measured_s"], told["failure"]) == (None, None, said)
    assert sum(told["predicted"].values()) == pytest.approx(fresh.choice["baseline"]["predicted"]["latency_s"])
    assert f"Of the original: original @ torch: {said}" in html.unescape((fresh.out / "report.html").read_text())


# ---- trials that fail ----


def test_a_hang_is_one_failed_line_and_is_not_tried_again(copied, monkeypatch):
    monkeypatch.setattr(run, "TIMEOUT_S", 2.0)
    copied.scene.fail("build", "sparsity=0.5", how="hang")
    recipes = ("prune(magnitude, sparsity=0.5) @ torch", BF16)
    assert copied.again("--minimize", "size", recipes=recipes).code == 0
    assert find(copied.choice, recipes[0])["failure"] == "no answer within 2 s"
    assert read_trials(copied.out)[-1]["failure"] == "no answer within 2 s"
    assert copied.again("--minimize", "size", recipes=recipes).code == 0
    assert copied.scene.built() == ["prune(magnitude, sparsity=0.5) @ torch"]


def request(copied: Finished, *recipes: str, **more: Any) -> Request:
    workload = Workload(phase="encode", batch_size=8, seq_len=16)
    return Request(
        model=copied.model, out=copied.out, workload=workload, text=copied.scene.text, minimize="size", threads=THREADS,
        recipes=tuple(map(parse_recipe, recipes)), **more,
    )  # fmt: skip


def test_too_much_memory_is_one_failed_line(copied):
    choice = verbs.choose(request(copied, "prune(magnitude, sparsity=0.5) @ torch", BF16, memory_bytes=10_000_000))
    assert re.match(r"more than 0\.0 GB of memory", find(choice, "prune(magnitude, sparsity=0.5) @ torch")["failure"])
    assert find(choice, BF16)["status"] == "measured"


def test_an_original_that_cannot_be_measured_is_said_and_measured_again_the_next_time(copied, tmp_path):
    fresh = Finished(copied.scene, copied.model, tmp_path / "fresh", copied.ran)
    with pytest.raises(ModelError, match=r"the original itself could not be measured: more than 0\.0 GB of memory"):
        verbs.choose(request(fresh, BF16, memory_bytes=10_000_000))
    assert read_trials(fresh.out) == []


def test_where_the_original_dies_beside_a_trial_the_next_trial_has_a_new_one(copied):
    recipes = ("prune(magnitude, sparsity=0.5) @ torch", "prune(magnitude, sparsity=0.6) @ torch")
    copied.scene.fail("time the original", once=True)
    assert copied.again("--minimize", "size", recipes=recipes).code == 0
    first, second = (find(copied.choice, recipe) for recipe in recipes)
    if first["status"] == "measured":
        first, second = second, first
    assert first["failure"].startswith("the original beside it: the process died (SIGABRT)")
    assert second["status"] == "measured"


def test_a_chosen_artifact_that_cannot_be_written_again_is_one_line(copied):
    shutil.rmtree(copied.out / "artifact")
    copied.scene.fail("build", "cast(bfloat16)")
    assert mistake(copied.again("--minimize", "size")).startswith(f"{copied.out / 'artifact'} could not be written: the process died (SIGABRT)")


# ---- requests that are refused ----


def test_an_unknown_runtime_is_refused_with_those_that_exist(copied):
    assert (
        mistake(copied.again(recipes=("@ tensorrt",)))
        == "runtime 'tensorrt' does not exist; runtimes: torch, torch-compile, onnxruntime, openvino, llama.cpp, ctranslate2."
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--require", "size<=50ms"), "constraint 'size<=50ms', size: '50ms' is not a number with a unit"),
        (("--require", "perplexity<=1.05x"), "an encoder has no figure 'perplexity'"),
        (("--minimize", "quality"), "minimize 'quality' is not possible; one of size, memory, latency, time_to_first_token, energy, cost."),
        (("--budget", "20"), "budget: '20' is not a number with a unit"),
        (("--maximize", "size"), "maximize 'size' is not possible; one of throughput, speedup, quality, cosine"),
        (("--minimize", "energy"), "energy is not known without --power; give it."),
        (("--require", "cost<=1"), "cost is not known without --price; give it."),
        (("--require", "time_to_first_token<=1s"), "time_to_first_token is a figure of phase generate, not of encode."),
        (("--power", "65"), "power: '65' is not a number with a unit"),
        (("--power", "0W"), "power '0W' is not positive."),
        (("--price", "cheap"), "is no price of one device"),
        (("--space", "no-such-space.yaml"), "space no-such-space.yaml: No such file or directory."),
        (("--ray-address", "127.0.0.1:1"), "--ray-address is of --engine ray"),
        (("--phase", "prefill"), "is an encoder; phase prefill needs a decoder"),
        (("--seq-len", "4096"), "max_position_embeddings=128"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_written(finished, tmp_path, monkeypatch, options, text):
    ran = Scene(finished.scene.folder).choose(finished.model, tmp_path / "out", (BF16,), *options)
    assert text in mistake(ran)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(copied, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("all of it")
    ran = copied.scene.choose(copied.model, foreign, (BF16,))
    assert mistake(ran) == f"{foreign} is not empty and holds no earlier run of choose; name a new folder."
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_a_file_where_the_folder_should_be_is_refused(copied, tmp_path):
    (tmp_path / "file").write_text("")
    assert mistake(copied.scene.choose(copied.model, tmp_path / "file", (BF16,))) == f"{tmp_path / 'file'} cannot be written: File exists."
    assert "cannot be written: Not a directory" in mistake(copied.scene.choose(copied.model, tmp_path / "file" / "deeper", (BF16,)))


def test_a_journal_that_is_none_is_refused_and_left_as_it_is(copied):
    (copied.out / "trials.jsonl").write_text("my notes\n")
    assert "starts a line that is no trial" in mistake(copied.again())
    assert (copied.out / "trials.jsonl").read_text() == "my notes\n"


def test_two_runs_in_one_folder_are_refused(copied):
    handle = os.open(copied.out / ".lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert mistake(copied.again()) == f"{copied.out} is in use by another run of choose."
    finally:
        os.close(handle)
    assert copied.again("--minimize", "size").code == 0


def test_a_damaged_profile_is_said_and_not_measured_over(copied):
    (copied.scene.folder / "home" / "profile.json").write_text("{")
    assert "run `lighten probe` again" in mistake(copied.again())


# ---- decoders ----


def test_a_decoder(tmp_path, tiny_llama, monkeypatch):
    scene = Scene(tmp_path / "scene").prepare(monkeypatch, worker="real")
    codes, plain = "quantize(rtn, embeddings=true) @ torch", "cast(float16) @ torch"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The loop number {n} breaks while its value {n * n} is true, and else it goes on to {n + 1}." for n in range(120)))
    options = ("--require", "perplexity<=1.05x", "--minimize", "size", "--text", text)
    ran = scene.choose(tiny_llama, tmp_path / "out", (codes, plain), *options)
    assert ran.code == 0, ran.stderr
    choice = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert choice["workload"]["phase"] == "prefill"
    assert choice["quality_metric"] == "perplexity_ratio"
    assert [trial["status"] for trial in trials_of(choice)] == ["measured"] * 3
    original = choice["baseline"]["measured"]["quality"]
    assert original["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-4)
    assert original["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert original["top1_agreement"]["value"] == 1.0
    same, smaller = find(choice, plain)["measured"], find(choice, codes)["measured"]
    assert same["quality"]["perplexity"]["value"] == pytest.approx(original["perplexity"]["value"], rel=1e-3)
    assert smaller["size_bytes"] < choice["baseline"]["measured"]["size_bytes"]
    assert smaller["quality"]["perplexity_ratio"]["value"] == pytest.approx(
        smaller["quality"]["perplexity"]["value"] / original["perplexity"]["value"], rel=1e-4
    )
    assert np.isfinite(smaller["quality"]["kl"]["value"])
    assert choice["chosen"] == find(choice, codes)["id"]
    assert str(read_artifact(tmp_path / "out" / "artifact").recipe) == codes
