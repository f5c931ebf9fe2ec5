"""SIGKILL in the middle of `choose`, at five moments, and SIGINT once: what was finished stays, and nothing else does."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from choose_setup import THREADS, made_up_profile, read_trials, write_text

from lighten.device import save_profile

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_choose.py"
RECIPES = ("cast(bfloat16) @ torch", "@ onnxruntime", "quantize(rtn, bits=2) @ openvino")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_choose", SCRIPT)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_choose"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kill_choose = load_script()


@pytest.fixture
def options(tmp_path: Path, user_home: Path) -> list[str]:
    """Of a short run; the user's data folder has a profile, so that no probe runs."""
    save_profile(made_up_profile(), user_home / "profile.json")
    text = write_text(tmp_path / "text.jsonl")
    said = [part for recipe in RECIPES for part in ("--recipe", recipe)]
    return [*said, "--text", str(text), "--batch-size", "8", "--seq-len", "16", "--threads", str(THREADS)]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # six runs of it, each of which imports torch
def test_five_kills_repeat_lose_and_leave_nothing(tmp_path, tiny_bert, options):
    out = tmp_path / "out"
    found = kill_choose.kill_and_finish(kill_choose.choose_command(tiny_bert, out, options), out, log=print)
    assert {kill["moment"]: kill["reached"] for kill in found["kills"]} == dict.fromkeys(
        ("start", "baseline", "build", "measurement", "append"), True
    )
    assert [kill["finished_before"] for kill in found["kills"]] == [0, 0, 1, 1, 2]
    assert (found["repeated"], found["lost"], found["doubled"], found["orphans"], found["left_over"]) == ([], 0, [], 0, [])
    assert (found["complete"], found["problem"], found["exit_code"]) == (True, None, 0)
    assert (found["trials"], found["measured"]) == (3, 3)
    choice = json.loads((out / "choice.json").read_text())
    assert sorted(trial["status"] for trial in choice["candidates"]) == ["measured", "measured", "skipped"]
    assert read_trials(out)[0]["id"] == choice["baseline"]["id"]


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_one_line_and_takes_the_workers_along(tmp_path, tiny_bert, options):
    """As a terminal sends it: to the workers too."""
    out = tmp_path / "out"
    run = kill_choose.Run(kill_choose.choose_command(tiny_bert, out, options), out)
    workers = run.end_at(kill_choose.in_the_baseline, signal.SIGINT, group=True)
    assert run.wait() == 130
    assert run.lines[-1] == "lighten: interrupted"
    assert not any("Traceback" in line for line in run.lines)
    assert len(workers) == 2
    assert kill_choose.still_there(workers) == []
    assert read_trials(out) == []


def test_what_the_script_finds_missing(tmp_path):
    """The script itself can tell a run that is not whole."""
    trial = {"id": "a", "recipe": "", "runtime": "torch", "status": "measured"}
    assert "choice.json" in kill_choose.incomplete(tmp_path, [trial])
    choice = {"baseline": trial, "candidates": [], "chosen": "a", "ablation": []}
    (tmp_path / "choice.json").write_text(json.dumps(choice))
    assert "report.html" in kill_choose.incomplete(tmp_path, [trial])
    (tmp_path / "report.html").write_text("<html>")
    assert kill_choose.incomplete(tmp_path, [trial]) == "report.html is cut off"
    (tmp_path / "report.html").write_text("<html></html>\n")
    assert kill_choose.incomplete(tmp_path, [trial, trial | {"id": "b"}]) == "choice.json and trials.jsonl have different trials"
    assert kill_choose.incomplete(tmp_path, [trial]) == "artifact/ is not the chosen"
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "lighten.json").write_text('{"recipe": "@ openvino"}')
    assert kill_choose.incomplete(tmp_path, [trial]) == "artifact/ is not the chosen"
    (tmp_path / "artifact" / "lighten.json").write_text('{"recipe": "@ torch"}')
    assert kill_choose.incomplete(tmp_path, [trial]) is None
    (tmp_path / "choice.json").write_text(json.dumps(choice | {"chosen": None}))
    assert kill_choose.incomplete(tmp_path, [trial]) is None


def test_what_the_script_takes_for_repeated(tmp_path):
    finished = [{"id": "a", "recipe": "", "runtime": "torch"}, {"id": "b", "recipe": "cast(bfloat16)", "runtime": "torch"}]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in finished) + '{"id": "cut o')
    lines = [
        "the original, by torch in float32: done before", "[1/3, about 1 min left] cast(bfloat16) @ torch: done before",
        "[2/3, about 1 min left] @ onnxruntime", "    1.2 MB",
    ]  # fmt: skip
    program = f"import sys; sys.stderr.write({chr(10).join(lines)!r} + chr(10))"
    run = kill_choose.Run([sys.executable, "-c", program], tmp_path)
    assert run.wait() == 0
    assert run.finished_before == finished
    assert run.repeated() == []
    program = program.replace(": done before", "")
    run = kill_choose.Run([sys.executable, "-c", program], tmp_path)
    run.wait()
    assert run.repeated() == ["cast(bfloat16) @ torch", "@ torch"]
