"""What the tests of `choose` share: a profile made by hand, so that no probe runs, a short text, and a worker that leaves a trace."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lighten.cli.main import main
from lighten.device import Bandwidth, Calibration, EngineProfile, Profile, Sample, save_profile
from lighten.device.probe import this_machine
from lighten.device.profile import ENGINES as ALL_ENGINES
from lighten.judge import child, latency

THREADS = 1
ENGINES = ("torch/float32", "torch/bfloat16", "onnxruntime/float32", "openvino/float32")
KINDS = ("layernorm", "rmsnorm", "gelu", "add", "rotary")

TRACED_WORKER = '''
"""The real worker, which writes down what it is asked and fails where the tests want it to."""
import json, os, sys, time
from pathlib import Path
from lighten.judge import worker

folder = Path(sys.argv[1])

class MadeUp(worker.Worker):
    """No runtime: an artifact is a copy of the weights, all run as fast and say the same."""

    def build(self, source, recipe, folder, **asked):
        from lighten.formats import files
        out = Path(folder)
        out.mkdir(parents=True)
        weights = (Path(source) / files.SAFETENSORS).read_bytes()
        (out / files.SAFETENSORS).write_bytes(weights)
        (out / "lighten.json").write_text(json.dumps({
            "lighten": "1", "recipe": recipe, "original": source, "dtype": "float32", "size_bytes": len(weights),
            "predicted": {"size_bytes": len(weights)},
        }))
        return {}

    def load(self, **asked):
        return {"seconds": 0.1}

    def describe(self):
        return {"peak_memory_bytes": 1, "precision": "float32", "version": "1"}

    def time(self, seeds, **asked):
        return {"seconds": [0.5 for _ in seeds]}

    def profile(self, **asked):
        return {"kinds": {"linear": 0.4, "between": 0.1}, "seconds": 0.5, "runs": 5}

    def embed(self, texts, out, **asked):
        import numpy as np
        np.save(out, np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32))
        return {}

def traced(kind):
    class Traced(kind):
        original = False

        def build(self, **asked):
            self.note(build=asked["recipe"])
            self.fail_at("build", asked["recipe"])
            return super().build(**asked)

        def load(self, **asked):
            self.note(load=asked["folder"])
            self.original = asked["folder"] == asked["original"]
            return super().load(**asked)

        def profile(self, **asked):
            self.note(profile=asked["folder"])
            return super().profile(**asked)

        def time(self, **asked):
            if self.original:
                self.fail_at("time the original", "")
            return super().time(**asked)

        def note(self, **asked):
            with (folder / "trace.jsonl").open("a") as file:
                file.write(json.dumps(asked) + "\\n")

        def fail_at(self, place, recipe):
            for path in folder.glob("fail-*.json"):
                wanted = json.loads(path.read_text())
                if wanted["place"] == place and wanted["recipe"] in recipe:
                    if wanted["once"]:
                        path.unlink()
                    os.abort() if wanted["how"] == "abort" else time.sleep(600)
    return Traced()

worker.die_with_parent(int(sys.argv[3]))
worker.serve(traced({"real": worker.Worker, "made-up": MadeUp}[sys.argv[2]]))
'''


def made_up_profile() -> Profile:
    """A machine of 10 GFLOP/s, in those engines alone whose time the tests want predicted."""
    linear = [
        Sample(kind="linear", rows=rows, shape=shape, seconds=1e-6 + 2 * rows * shape[0] * shape[1] / 1e10)
        for shape in ((32, 32), (64, 320))
        for rows in (1, 1024)
    ]
    attention = [Sample(kind="attention", rows=rows, shape=(16, 16, 8), seconds=1e-6 + rows * 8192 / 1e10) for rows in (4, 256)]
    other = [Sample(kind=kind, rows=rows, shape=(), seconds=1e-6 + rows / 1e9) for kind in KINDS for rows in (512, 1 << 18)]
    engines = {
        name: EngineProfile(
            name=name, version="1", precision=name.split("/")[1], samples=(*linear, *attention, *other), call_overhead_s=1e-5,
            operator_overhead_s=1e-6, calibration=Calibration(factors={}, spread=0.5, blocks=4), base_memory_bytes=250_000_000, weight_copies=1.5,
        )
        for name in ENGINES
    }  # fmt: skip
    bandwidth = (Bandwidth(working_set_bytes=1 << 20, read_bytes_per_s=1e10, copy_bytes_per_s=1e10),)
    machine = this_machine()  # a profile of another would be measured anew
    left_out = {name: "left out" for name in ALL_ENGINES if name not in engines}  # as failures, so that `choose` does not measure them
    return Profile(machine=machine, threads=THREADS, bandwidth=bandwidth, engines=engines, failures=left_out)


def write_text(path: Path) -> Path:
    """36 passages, of which the last 24 are judged by."""
    words = ("one", "two", "three", "four", "five", "six", "seven", "while", "break", "assert", "true", "false", "loop", "value")
    passages = [" ".join(words[(number * step) % len(words)] for step in range(1, 9)) + f" number {number}" for number in range(36)]
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    return path


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one run of the command gave."""

    code: int
    stdout: str
    stderr: str


def run_lighten(*arguments: object) -> Ran:
    """The command line, in this process."""
    argv = [str(argument) for argument in arguments]
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["lighten", *argv])
        code = main(argv)
    return Ran(code=code, stdout=out.getvalue(), stderr=errors.getvalue())


@dataclass(frozen=True)
class Scene:
    """A home with a profile, a text, and traced workers that measure briefly."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"

    def prepare(self, patch: pytest.MonkeyPatch, *, worker: str = "made-up") -> Scene:
        """Set it up for as long as `patch` lasts, with `real` workers, or with `made-up` ones that need no runtime and no time."""
        self.folder.mkdir(exist_ok=True)
        program = self.folder / "traced_worker.py"
        program.write_text(TRACED_WORKER)
        write_text(self.text)
        home = self.folder / "home"
        patch.setenv("LIGHTEN_HOME", str(home))
        save_profile(made_up_profile(), home / "profile.json")
        patch.setattr(child, "WORKER", (sys.executable, str(program), str(self.folder), worker))
        patch.setattr(latency, "ROUNDS", (3, 3))
        patch.setattr(latency, "SHORT_S", 0.01)
        return self

    def fail(self, place: str, recipe: str = "", *, how: str = "abort", once: bool = False) -> None:
        """Let workers fail at a place, `build` or `time the original`, of the recipes that hold a text."""
        number = len(list(self.folder.glob("fail-*.json")))
        (self.folder / f"fail-{number}.json").write_text(json.dumps({"place": place, "recipe": recipe, "how": how, "once": once}))

    def trace(self) -> list[dict[str, str]]:
        """What the workers were asked to build and to load, in order."""
        path = self.folder / "trace.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def built(self) -> list[str]:
        return [asked["build"] for asked in self.trace() if "build" in asked]

    def choose(self, model: Path, out: Path, recipes: Sequence[str], *more: object) -> Ran:
        """`lighten choose` on batches of 8 sequences of 16 tokens."""
        said = [part for recipe in recipes for part in ("--recipe", recipe)]
        sizes = ("--batch-size", 8, "--seq-len", 16, "--threads", THREADS)
        return run_lighten("choose", model, *said, *sizes, "-o", out, "--text", self.text, *more)


def read_trials(out: Path) -> list[dict[str, Any]]:
    """The trials of a folder's journal, without what else was found out."""
    path = out / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["status"] in ("measured", "failed")]
