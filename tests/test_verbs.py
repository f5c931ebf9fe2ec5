"""The Python verbs are there before and after the stages of the same name are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lighten
from lighten.errors import ModelError, WorkloadError
from lighten.judge.child import WorkerFailed
from lighten.judge.measure import Judge
from lighten.runtimes import torch_eager

PROGRAM = """
import lighten
before = [callable(getattr(lighten, name)) for name in lighten.__all__[1:]]
import lighten.choose.search, lighten.compress.walk
after = [callable(getattr(lighten, name)) for name in lighten.__all__[1:]]
print(all(before), all(after), lighten.compress.walk.__name__)
"""


def test_verbs_are_callable_before_and_after_their_stages_are_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True", "lighten.compress.walk"]


def test_a_stage_that_is_called_is_its_verb(tmp_path):
    import lighten.compress.walk

    with pytest.raises(ModelError, match="no such folder"):
        lighten.compress(tmp_path / "nowhere", "@ torch", tmp_path / "out")


def test_an_unknown_verb_names_those_that_exist():
    with pytest.raises(AttributeError, match="verbs: advise, choose, compare, compress, estimate, export, measure, plan, probe, summary"):
        lighten.prune  # noqa: B018 - the access is the test


def test_what_is_measured_runs_where_its_recipe_says(tiny_bert, monkeypatch):
    asked = []

    def measure(judge, target):
        asked.append(target)
        raise WorkerFailed("enough")

    monkeypatch.setattr(torch_eager, "require_device", lambda device: None)
    monkeypatch.setattr(Judge, "measure", measure)
    for runtime in ("torch(device=cuda, dtype=float16)", "torch"):
        with pytest.raises(WorkloadError, match="could not be measured: enough"):
            lighten.measure(tiny_bert, runtime=runtime)
    assert [(target.device, target.dtype) for target in asked] == [("cuda", "float16"), ("cpu", "float32")]
