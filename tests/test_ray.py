"""Trials on a Ray cluster of two nodes on this machine: the same answer as here, and the same where a node is lost in the middle."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from choose_setup import THREADS, Scene, read_trials

from lighten.choose.ray_engine import Cluster, Site, kind_of
from lighten.cost import Workload
from lighten.device.probe import this_machine

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

RECIPES = tuple(f"prune(magnitude, sparsity=0.{digit}) @ torch" for digit in range(1, 7))


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path / "scene").prepare(monkeypatch)


@pytest.fixture
def cluster(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without processors and two nodes with one each, whose processes start as the scene says."""
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    found = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.workers = [found.add_node(num_cpus=1) for _ in range(2)]
    yield found
    ray.shutdown()
    found.shutdown()


def answered(scene: Scene, model: Path, out: Path, *more: object) -> dict[str, Any]:
    ran = scene.choose(model, out, RECIPES, "--minimize", "size", *more)
    assert ran.code == 0, ran.stderr
    return json.loads((out / "choice.json").read_text())


def front(choice: dict[str, Any]) -> set[str]:
    return {trial["recipe"] for trial in [choice["baseline"], *choice["candidates"]] if trial["pareto"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two searches, and five processes that import torch beside other tests
@pytest.mark.parametrize("lost", [False, True])
def test_a_cluster_gives_the_answer_of_this_machine_though_a_node_is_lost(scene, cluster, tiny_bert, tmp_path, lost):
    here = answered(scene, tiny_bert, tmp_path / "here", "--fresh")
    out = tmp_path / "there"

    def lose_one() -> None:
        while len(read_trials(out)) < 3:
            time.sleep(0.05)
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    thread = threading.Thread(target=lose_one, daemon=True)
    if lost:
        thread.start()
    there = answered(scene, tiny_bert, out, "--fresh", "--engine", "ray", "--ray-address", cluster.address)
    if lost:
        thread.join(10)
    assert sorted(trial["recipe"] for trial in read_trials(out)) == sorted(["", *(recipe.split(" @")[0] for recipe in RECIPES)])
    assert (front(there), there["elsewhere"]) == (front(here), [])
    chosen = [next(trial for trial in [choice["baseline"], *choice["candidates"]] if trial["id"] == choice["chosen"]) for choice in (here, there)]
    assert chosen[0]["recipe"] == chosen[1]["recipe"]
    nodes = {trial.get("node") for trial in read_trials(out)}
    assert len(nodes) == 2
    assert (out / "artifact" / "lighten.json").is_file()


def site(model: Path) -> Site:
    return Site(
        model=model, text=None, workload=Workload(phase="encode", batch_size=1, seq_len=8), threads=THREADS, memory_bytes=None, timeout_s=60.0,
        task=None, metrics=(),
    )  # fmt: skip


def test_a_machine_that_cannot_run_trials_is_left_out_and_said(cluster, tiny_bert, tmp_path):
    lines: list[str] = []
    with Cluster(address=cluster.address, site=site(tmp_path / "not there"), log=lines.append) as found:
        found.adopt()
        assert found.kinds() == {}
    assert sum("it offers 0 processors, and trials have 1 threads" in line for line in lines) == 1
    assert sum("not there" in line for line in lines) == 2


def test_machines_are_told_apart_by_processor_and_cores(cluster, tiny_bert):
    with Cluster(address=cluster.address, site=site(tiny_bert), log=lambda line: None) as found:
        found.adopt()
        [(kind, nodes)] = found.kinds().items()
        assert (kind, len(nodes)) == (kind_of(this_machine()), 2)


def test_without_a_cluster_there_is_one_line(scene, tiny_bert, tmp_path):
    ran = scene.choose(tiny_bert, tmp_path / "out", RECIPES[:1], "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert ran.code == 2
    assert ran.stderr.splitlines()[-1].startswith("lighten: no Ray cluster answers at 127.0.0.1:1")
