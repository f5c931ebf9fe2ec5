"""What a compression leaves of itself: steps in lighten.json, run.json, its page, and the time of training that is said before it.

Faults put in by hand, each caught: a nested step's time counted twice; the time of an ended process lost on resume; a word of the manifest's put in
the page as markup; the mean of another pass's output errors; a loss that is drawn upside down; a budget of minutes filled without the teacher's time.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_architecture import calibration, save_architecture
from choose_setup import run_lighten
from test_device import make_engine, make_profile
from test_report import Node, encoder_choice, parse

from lighten import verbs
from lighten.compress import methods, training_time
from lighten.compress.clock import Clock
from lighten.compress.distill_dense import cut_rows
from lighten.compress.journal import Journal
from lighten.compress.training_time import predict_times, predict_training
from lighten.device import save_profile
from lighten.errors import ModelError, OutputError
from lighten.formats.artifact import MANIFEST, PAGE, RUN, Work, folder_bytes, read_artifact, write_artifact
from lighten.formats.safetensors_folder import expanded_weights
from lighten.model import read_spec
from lighten.recipe import apply_recipe, parse_recipe
from lighten.recipe.predict import artifact_bytes
from lighten.report import compression_page, step_plots
from lighten.report.step_plots import Bar, bar_plot, loss_plot, read_loss, size_bars, time_bars

PIPELINE = (
    "prune(magnitude, sparsity=0.5) | shrink(ffn, ratio=0.5, tokens=64) | distill(logits, steps=6, tokens=128, batch_tokens=32) | "
    "quantize(gptq, bits=4, group_size=16, tokens=64)"
)
PLAIN = "quantize(rtn, bits=8)"


def compress(folder: Path, text: str, out: Path, **work: Any) -> Path:
    write_artifact(folder, parse_recipe(text), out, calibration=list, work=Work(windows=calibration("llama"), text="same", **work))
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_architecture("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def piped(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(llama, PIPELINE, tmp_path_factory.mktemp("page") / "piped")


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(llama, PLAIN, tmp_path_factory.mktemp("page") / "plain")


def documents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest, run = verbs.read_made(folder)
    assert run is not None
    return manifest, run


def page_of(folder: Path) -> Node:
    return parse(compression_page(*verbs.read_made(folder)))


def rows_of(page: Node) -> list[Node]:
    return list(page.one("table", "steps").one("tbody").every("tr"))


# ---- the clock ----


class Hands:
    """A clock's hands that are moved by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_what_runs_inside_counts_for_itself_alone_and_all_adds_up() -> None:
    hands = Hands()
    clock = Clock({"0": {"seconds": 10.0, "peak_bytes": 7}}, now=hands)
    hands.at += 5  # before anything is counted
    with clock.counting("1"):
        hands.at += 1
        with clock.counting("0"):
            hands.at += 2
            with clock.counting("0"):
                hands.at += 3
        hands.at += 4
        assert clock.spent()["1"]["seconds"] == 5
        hands.at += 6
    hands.at += 50
    assert {what: each["seconds"] for what, each in clock.spent().items()} == {"0": 15, "1": 11}
    assert clock.seconds == 26
    assert clock.spent()["0"]["peak_bytes"] == 7, "memory is told of the outermost alone"


def test_time_stops_where_a_step_fails() -> None:
    hands = Hands()
    clock = Clock(now=hands)

    def fail() -> None:
        hands.at += 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), clock.counting("0"):
        fail()
    hands.at += 9
    assert clock.spent()["0"]["seconds"] == 2


def test_a_damaged_clock_is_one_line(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "work", {}, resume=False) as journal:
        journal.write(0, "a", {})
    (tmp_path / "work" / "clock.json").write_text('{"0": {"sec')
    with pytest.raises(OutputError, match=r"clock\.json is damaged; delete this file and run again with --resume, which counts time anew\.$"):
        Journal.open(tmp_path / "work", {}, resume=True)


class _Ended(BaseException):
    """In the place of a kill."""


def test_seconds_of_an_ended_process_are_not_lost(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, pass_ = ("quantize", "gptq"), 3

    def ends(job: Any) -> Any:
        raise _Ended

    with monkeypatch.context() as patched:
        patched.setitem(methods.METHODS, key, ends)
        with pytest.raises(_Ended):
            compress(llama, PIPELINE, tmp_path / "out")
    before = json.loads((tmp_path / ".out.lighten-work" / "clock.json").read_text())
    compress(llama, PIPELINE, tmp_path / "out", resume=True)
    _, run = documents(tmp_path / "out")
    assert run["resumed"] is True
    for place in range(pass_):
        assert run["steps"][place]["seconds"] >= before.get(str(place), {"seconds": 0})["seconds"]
    assert run["steps"][2]["seconds"] > 0.5 * before["2"]["seconds"] > 0, "training was done by the process that ended"


def test_seconds_of_all_steps_and_of_writing_are_those_of_the_run(piped: Path) -> None:
    _, run = documents(piped)
    assert run["seconds"] == pytest.approx(run["writing_seconds"] + sum(step["seconds"] for step in run["steps"]))
    assert all(step["seconds"] > 0 for step in run["steps"])


# ---- facts ----


def test_each_step_says_what_the_recipe_up_to_it_predicts(piped: Path, llama: Path) -> None:
    manifest, _ = documents(piped)
    recipe = parse_recipe(PIPELINE)
    assert [step["step"] for step in manifest["steps"]] == [str(step) for step in recipe.steps]
    for count, step in enumerate(manifest["steps"], start=1):
        spec = apply_recipe(parse_recipe(" | ".join(map(str, recipe.steps[:count]))), read_spec(llama))
        assert step["predicted"]["parameters"] == spec.total_parameters == step["parameters"]
        assert step["predicted"]["size_bytes"] == artifact_bytes(recipe, spec)
    assert manifest["steps"][-1]["size_bytes"] == pytest.approx(manifest["size_bytes"], rel=0.03)
    assert manifest["before"]["parameters"] == read_spec(llama).total_parameters
    assert manifest["before"]["size_bytes"] == sum((llama / name).stat().st_size for name in ("model.safetensors", "config.json")) + sum(
        path.stat().st_size for path in llama.glob("generation_config.json")
    )


def test_zeros_are_those_that_lie_in_the_weights(llama: Path, tmp_path: Path) -> None:
    out = compress(llama, "prune(magnitude, sparsity=0.5)", tmp_path / "out")
    manifest, _ = documents(out)
    weights = dict(expanded_weights(out, read_spec(out)))
    zeros = sum(int((weight == 0).sum()) for name, weight in weights.items() if weight.ndim == 2)
    assert manifest["steps"][0]["zeros"] == pytest.approx(zeros / read_spec(llama).total_parameters, abs=1e-3)


def test_errors_and_distances_of_a_step_are_its_own(piped: Path) -> None:
    manifest, _ = documents(piped)
    said = [layer["output_error"] for layer in manifest["layers"] if layer.get("rows")]
    assert manifest["steps"][3]["output_error"] == pytest.approx(sum(said) / len(said))
    assert manifest["steps"][0]["output_error"] is manifest["steps"][2]["output_error"] is None
    curve = manifest["curves"][0]
    assert curve["step"] == manifest["steps"][2]["step"]
    assert f"{curve['held_out'][0]:.3g} → {curve['held_out'][1]:.3g}" in rows_of(page_of(piped))[3].text


def test_a_step_that_tunes_codes_has_its_curve_too(llama: Path, tmp_path: Path) -> None:
    manifest, _ = documents(compress(llama, "quantize(rtn, bits=4, group_size=16) | distill(scales, steps=3, tokens=64)", tmp_path / "out"))
    (curve,) = manifest["curves"]
    assert [point[0] for point in curve["curve"]] == [1, 2, 3]
    assert all(after > before for before, after in pairwise(point[1] for point in curve["curve"]))
    assert len(curve["held_out"]) == 2
    assert curve["kept"] is (curve["held_out"][1] < curve["held_out"][0])


# ---- the page ----


@pytest.mark.parametrize("which", ["piped", "plain"])
def test_the_page_shows_every_step_fetches_nothing_and_runs_nothing(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    manifest, run = documents(folder)
    page = page_of(folder)
    assert [row.one("th").text for row in rows_of(page)] == ["the original", *(step["step"] for step in manifest["steps"])]
    assert not list(page.every("script"))
    assert not list(page.every("link"))
    assert not list(page.every("img"))
    text = page.text
    assert not re.search(r"\b(None|nan|inf|null|True|False)\b", text)
    assert f"{manifest['before']['size_bytes'] / manifest['size_bytes']:.2f}× smaller" in page.one("h1").text
    assert manifest["recipe"] in page.one("p", "what").text
    for svg in page.every("svg"):
        assert svg.attributes["role"] == "img"
        assert svg.attributes["aria-label"]
    drawn = [svg for svg in page.every("svg", "plot") if "loss" in (svg.attributes["aria-label"] or "")]
    assert len(drawn) == 2 * len(manifest["curves"])
    assert ("Loss" in [heading.text for heading in page.every("h2")]) is bool(manifest["curves"])
    assert run["processor"] in text


def test_the_last_size_is_that_of_the_files_beside_its_prediction(piped: Path) -> None:
    manifest, run = copy.deepcopy(documents(piped))
    manifest["size_bytes"], manifest["steps"][-1]["predicted"]["size_bytes"] = 2_000_000, 3_000_000
    row = list(parse(compression_page(manifest, run)).one("table", "steps").every("tr"))[-1]
    assert "2 MB" in row.text
    assert "predicted 3 MB, 1.50" in row.text
    assert "1.50" in [node.text for node in row.every("span", "off")]


def test_a_time_that_was_predicted_stands_beside_the_one_that_was_measured(piped: Path) -> None:
    manifest, run = copy.deepcopy(documents(piped))
    run["steps"][2] |= {"seconds": 120.0, "predicted": {"seconds": 90.0, "low": 80.0, "high": 100.0, "steps": 6}}
    page = parse(compression_page(manifest, run))
    assert "2 min 0 s" in rows_of(page)[3].text
    assert "predicted 1 min 30 s, 0.75" in rows_of(page)[3].text
    assert any(bar.mark == 90.0 and bar.total == 120.0 for bar in time_bars([{"step": "x", **run["steps"][2]}], run))


HOSTILE = "<script>alert('1')</script>\"&amp;\x1b[2J"


def hostile(found: Any) -> Any:
    if isinstance(found, dict):
        more = {HOSTILE: 5} if "embedding" in found else {}
        return {key: hostile(value) for key, value in found.items()} | more
    if isinstance(found, list):
        return [hostile(each) for each in found]
    return f"{found} {HOSTILE}" if isinstance(found, str) else found


def test_every_word_of_the_files_is_shown_as_text(piped: Path) -> None:
    manifest, run = (hostile(document) for document in documents(piped))
    manifest["notes"] = [HOSTILE]
    page = compression_page(manifest, run)
    tree = parse(page)
    assert "<script" not in page
    assert "\x1b" not in page
    assert tree.text.count("<script>alert('1')</script>") > 10


NOTHING: list[Any] = [None, -1, "x", [5, None], [{}], {"x": 5}, float("nan"), 10**400]


@pytest.mark.parametrize("value", NOTHING, ids=range(len(NOTHING)))
def test_what_is_missing_or_of_another_kind_is_not_known(value: Any, piped: Path) -> None:
    def page(documents: list[dict[str, Any]]) -> str:
        text = parse(compression_page(*documents)).text
        assert not re.search(r"\b(None|nan|inf|null|True|False)\b|\{'x'", text)
        return text

    for place, document in enumerate(documents(piped)):
        for key in document:
            changed: list[dict[str, Any]] = copy.deepcopy(list(documents(piped)))
            changed[place][key] = value
            page(changed)
            for step in changed[place].get("steps") or [] if isinstance(changed[place].get("steps"), list) else []:
                if isinstance(step, dict):
                    step |= dict.fromkeys(step, value)
            page(changed)
            del changed[place][key]
            assert "not known" in page(changed) or key not in ("recipe", "runtime", "dtype", "original")


def test_an_artifact_of_an_older_version_has_its_page(piped: Path) -> None:
    manifest, _ = documents(piped)
    old = {key: value for key, value in manifest.items() if key not in ("steps", "before")}
    page = parse(compression_page(old, None))
    assert [row.one("th").text for row in rows_of(page)] == [step["step"] for step in manifest["steps"]]
    assert "There is no run.json" in page.text
    assert "the size before is not known" in page.one("h1").text


# ---- the command ----


def test_the_command_writes_the_page_and_the_artifact_stays_what_it_is(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    before = folder_bytes(folder), read_artifact(folder)
    ran = run_lighten("report", folder, "--json")
    assert (ran.code, json.loads(ran.stdout)) == (0, {"report": str(folder / PAGE)})
    assert parse((folder / PAGE).read_text("utf-8")).one("title").text == "llama · lighten compress"
    assert (folder_bytes(folder), read_artifact(folder)) == before
    assert run_lighten("report", folder).stdout == f"{folder / PAGE}\n"


def test_a_folder_with_a_choice_has_the_page_of_the_choice(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    (folder / "choice.json").write_text(json.dumps(encoder_choice()))
    verbs.report(folder)
    assert "lighten choose" in parse((folder / PAGE).read_text("utf-8")).one("title").text


def cut(name: str, text: str | None = None) -> Any:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text()[:100] if text is None else text)

    return change


MISTAKES: list[tuple[Any, str]] = [
    (lambda folder: (folder / MANIFEST).unlink(), r"neither choice\.json of `lighten choose` nor lighten\.json of `lighten compress` is there\.$"),
    (shutil.rmtree, r"neither choice\.json of `lighten choose` nor lighten\.json"),
    (cut(MANIFEST), r"out: no readable lighten\.json \(.+\)\.$"),
    (cut(MANIFEST, "[1]"), r"lighten\.json is not what `lighten compress` writes\.$"),
    (cut(MANIFEST, '{"recipe": "x"}'), r"lighten\.json is not what `lighten compress` writes\.$"),
    (cut(RUN), r"out: no readable run\.json \(.+\)\.$"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_a_folder_that_is_neither_or_damaged_is_one_line(change: Any, said: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    change(folder)
    with pytest.raises(ModelError, match=said):
        verbs.report(folder)
    ran = run_lighten("report", folder)
    assert ran.code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert not (folder / PAGE).exists()


def test_compress_says_each_step_and_names_the_page(llama: Path, tmp_path: Path) -> None:
    recipe = "prune(magnitude, sparsity=0.5) | quantize(rtn, bits=4)"
    ran = run_lighten("compress", llama, "--recipe", recipe, "-o", tmp_path / "out")
    lines = ran.stdout.splitlines()
    assert ran.code == 0
    assert lines[0].split() == ["step", "took", "parameters", "size", "after", "it"]
    assert [line.partition(")")[0] + ")" for line in lines[2:4]] == recipe.split(" | ")
    assert lines[-1] == f"what each step cost and gave, as a page: lighten report {tmp_path / 'out'}"
    ran = run_lighten("compress", llama, "--recipe", recipe, "-o", tmp_path / "again", "--json")
    steps = json.loads(ran.stdout)["steps"]
    assert [step["step"] for step in steps] == recipe.split(" | ")
    assert all(step["seconds"] >= 0 for step in steps)


# ---- pictures ----


def points_of(svg: Node) -> list[tuple[float, float]]:
    drawn = svg.one("path", "curve").attributes["d"] or ""
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", drawn)]


def test_a_higher_loss_is_further_up_and_later_is_further_right() -> None:
    curve = {"curve": [[1, 100, 4.0], [2, 200, 1.0], [3, 300, 2.5]], "held_out": [5.0, 2.0], "warm_up": 2}
    drawn = loss_plot(read_loss(curve), width=560, height=260)
    assert drawn is not None
    svg = parse(drawn).one("svg")
    points = points_of(svg)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert len(points) == 3
    assert points[0][1] < points[2][1] < points[1][1], "down is more in a picture"
    assert all(0 <= x <= 560 and 0 <= y <= 260 for x, y in points)
    warm = svg.one("rect", "warm-up").attributes
    assert float(warm["x"] or 0) + float(warm["width"] or 0) == pytest.approx(points[1][0], abs=0.2)
    assert [mark.one("title").text for mark in svg.every("polygon")] == ["held-out distance before: 5", "held-out distance after: 2"]


def test_one_point_is_no_curve_and_equal_losses_are_drawn() -> None:
    assert loss_plot(read_loss({"curve": [[1, 100, 4.0]]}), width=300, height=200) is None
    assert loss_plot(read_loss({"curve": [[1, 100, 0.0], [2, 200, 0.0]], "held_out": [0.0, 0.0]}), width=300, height=200) is not None
    assert read_loss({"curve": "x", "held_out": [1]}).points == []


def test_bars_are_as_long_as_their_values_and_all_is_inside() -> None:
    bars = [Bar(name="a" * 400, parts=[("x", 30.0), ("y", 10.0)], said="40"), Bar(name="b", parts=[("y", 20.0)], said="20", mark=80.0)]
    svg = parse(bar_plot(bars, width=345, label="l")).one("svg")
    widths = [float(rect.attributes["width"] or 0) for rect in svg.every("rect", "part")]
    assert widths == pytest.approx([3 * widths[1], widths[1], 2 * widths[1]], abs=0.3)
    mark = svg.one("line", "foreseen").attributes
    assert float(mark["x1"] or 0) - 2 == pytest.approx(8 * widths[1], abs=0.5)
    for words in svg.every("text"):
        assert float(words.attributes["x"] or 0) + len(words.text) * step_plots.ADVANCE <= 345


def test_pieces_of_a_size_add_up_to_it() -> None:
    before = {"size_bytes": 100, "components": {"embedding": 60, "mlp": 30}}
    after = {"step": "s", "size_bytes": 55, "components": {"embedding": 60}}
    bars = size_bars(before, [after], measured=50.0)
    assert [bar.total for bar in bars] == [100, 50]
    assert dict(bars[0].parts)[step_plots.OTHER] == 10
    assert size_bars(before, [{"step": "s"}], measured=None) == []


# ---- how long training takes, before it ----


def step_of(text: str) -> Any:
    return parse_recipe(text).steps[0]


def predicted(llama: Path, text: str, **more: Any) -> Any:
    spec = read_spec(llama)
    sizes = {"rows": 64, "length": 16} | more
    return predict_training(step_of(text), (spec, spec), make_profile(), **sizes)


def test_time_is_the_teachers_the_judging_and_as_many_steps_as_there_are(llama: Path) -> None:
    few, many = (predicted(llama, f"distill(logits, steps={steps})") for steps in (10, 110))
    assert many.seconds - few.seconds == pytest.approx(100 * few.step_s)
    assert few.seconds == pytest.approx(few.teacher_s + few.judging_s + 10 * few.step_s)
    assert few.low < few.seconds < few.high
    assert predicted(llama, "distill(logits)", rows=128).teacher_s == pytest.approx(2 * few.teacher_s)
    assert predicted(llama, "distill(logits, train_tokens=4096, batch_tokens=64)").steps == 64


def test_minutes_are_filled_with_what_the_teacher_leaves(llama: Path) -> None:
    found = predicted(llama, "distill(logits, minutes<=1)", rows=6400)
    assert found.seconds <= 60 < found.seconds + found.step_s
    assert predicted(llama, "distill(logits, minutes<=0.0001)").steps == 4, "those that are timed"


def test_texts_that_the_original_writes_take_time_of_the_budget(llama: Path) -> None:
    length = min(512, read_spec(llama).max_positions or 512)
    none, one, many = (predicted(llama, f"distill(logits, steps=6, self_tokens={count * length})") for count in (0, 1, 64))
    assert none.writing_s == 0 < one.writing_s < many.writing_s
    assert predicted(llama, f"distill(logits, steps=6, self_tokens={32 * length})").writing_s == pytest.approx(many.writing_s / 2), "32 side by side"
    assert many.seconds - none.seconds == pytest.approx(many.writing_s)
    assert "the original's own texts" in many.said(None)
    assert "the original's own texts" not in none.said(None)


def test_rows_are_counted_as_they_are_cut(llama: Path) -> None:
    """Of one length and of several, with a length of its own and with texts that the original writes."""
    shapes = [(3, 700), (2, 40), (1, 17)]
    batches = [{"input_ids": np.zeros(shape, np.int64)} for shape in shapes]
    for length in (None, 16):
        rows = list(cut_rows([{"input_ids": torch.from_numpy(batch["input_ids"])} for batch in batches], length=length, said=""))
        step = step_of("distill(logits)" if length is None else f"distill(logits, seq_len={length})")
        assert training_time._rows_of(step, read_spec(llama), batches) == (len(rows), sum(row["input_ids"].numel() for row in rows) // len(rows))
    own = min(512, read_spec(llama).max_positions or 512)
    counted = training_time._rows_of(step_of(f"distill(logits, self_tokens={5 * own})"), read_spec(llama), [{"input_ids": np.zeros((2, own))}])
    assert counted == (7, own)


def test_what_costs_more_is_predicted_to_take_longer(llama: Path) -> None:
    plain = predicted(llama, "distill(logits)")
    assert predicted(llama, "distill(logits, recompute=true)").step_s > plain.step_s
    assert predicted(llama, "distill(logits, batch_tokens=4096)").step_s > 1.5 * plain.step_s
    slow = make_profile(**{"torch/float32": make_engine(operator_overhead_s=2e-3)})
    spec = read_spec(llama)
    assert predict_training(step_of("distill(logits)"), (spec, spec), slow, rows=64, length=16).step_s > plain.step_s


def test_the_time_is_said_before_any_work_and_kept(llama: Path, tmp_path: Path) -> None:
    save_profile(make_profile())
    said: list[str] = []
    out = compress(llama, PIPELINE, tmp_path / "out", log=said.append)
    first = next(place for place, line in enumerate(said) if "predicted: about" in line)
    assert all("distance from" not in line and "shrink(ffn):" not in line for line in said[:first])
    expected = r"^distill\(logits, .*: predicted: about .*, .* to .*: the original's answers to 8 rows .*, judging .*, 6 steps of "
    assert re.search(expected, said[first])
    _, run = documents(out)
    assert run["steps"][2]["predicted"]["seconds"] > 0
    assert run["steps"][2]["predicted"]["steps"] == 6
    assert [run["steps"][place]["predicted"] for place in (0, 1, 3)] == [None] * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distill(logits)", "how long it takes is not known before: .*lighten probe"),
        ("distill(logits, dtype=bfloat16)", "how long it takes is not known before: engine torch/bfloat16 was not measured"),
        ("distill(logits, parallel=ddp)", "how long it takes is not known before: several processes share this machine"),
    ],
)
def test_a_time_that_is_not_known_is_said_so(text: str, said: str, llama: Path) -> None:
    if "bfloat16" in text:
        save_profile(make_profile())
    times, lines = predict_times(parse_recipe(text), read_spec(llama), calibration("llama"), threads=2)
    assert times == [None]
    assert len(lines) == 1
    assert re.search(said, lines[0])


def test_other_threads_than_were_measured_are_said(llama: Path) -> None:
    save_profile(make_profile())
    _, lines = predict_times(parse_recipe("distill(logits)"), read_spec(llama), calibration("llama"), threads=1)
    assert lines[0].endswith("(measured with 2 threads, this run has 1)")
