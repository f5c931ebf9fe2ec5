"""Choose by experiment: check what is asked, search here or on a cluster, and answer."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lighten.choose import outcome
from lighten.choose.constraints import check_known, figures, parse_constraint, parse_objective
from lighten.choose.engine import Local
from lighten.choose.handover import hand_over
from lighten.choose.journal import FILE, Journal
from lighten.choose.request import TIMEOUT_S, Asked, Log, Request, most_memory, rates_of
from lighten.choose.search import Search
from lighten.choose.trial import Bench
from lighten.cost.workload import check_workload
from lighten.device import Profile, load_profile, merge_profiles, probe, profile_path, save_profile
from lighten.device.probe import installed_engines, this_machine
from lighten.errors import ConstraintError, DeviceError, ModelError, OutputError, TaskError
from lighten.judge.harness import resolved
from lighten.judge.measure import Judge, Limits
from lighten.judge.task import Task, load_task
from lighten.judge.text import load_text
from lighten.model import ModelSpec
from lighten.model.runnable import read_runnable
from lighten.runtimes import require_runtime


def choose(request: Request, *, log: Log) -> dict[str, Any]:
    """Try recipes on a model and answer: the content of `choice.json`, which is written with `artifact/` into the output folder.

    Every finished trial is a line of `trials.jsonl` at once; run again after a kill, it goes on where it was.

    Raises:
        LightenError: a mistake in the request.
    """
    start = time.monotonic()
    if request.ray_address is not None and request.engine != "ray":
        raise ConstraintError("--ray-address is of --engine ray; add it, or leave the address out.")
    if request.recipes and request.space is not None:
        raise ConstraintError("recipes and a space are two lists of what to try; name recipes in the space, under `recipes`.")
    spec = read_runnable(request.model)
    check_workload(spec, request.workload)
    task = read_task(request, spec)
    names = task.names if task else ()
    constraints = tuple(parse_constraint(text, decoder=spec.is_decoder, task=names) for text in request.require)
    objective = parse_objective(request.minimize, request.maximize, decoder=spec.is_decoder, task=names)
    given = {name for name, value in (("power", request.power_w), ("price", request.usd_per_hour)) if value is not None}
    check_known([objective.figure, *(constraint.figure for constraint in constraints)], phase=request.workload.phase, given=given)
    if not request.model.is_dir():
        raise ModelError(f"{request.model}: choose needs the model's weights; download it into a folder first.")
    text = load_text(request.text)
    require_runtime("torch")
    for note in task.notes if task else ():
        log(f"{request.task}: {note}")
    asked = Asked(
        request=request, spec=spec, constraints=constraints, objective=objective, text=text, task=task, start=start, log=log,
        metric=outcome.quality_metric(decoder=spec.is_decoder, task=names), rates=rates_of(request),
    )  # fmt: skip
    with _locked(request.out):
        journal = Journal(request.out)
        if request.engine == "local":
            bench = local_bench(asked)
            search = Search(asked, known_profile(request.threads, log), journal, Local(bench), this_machine())
            return hand_over(asked, bench, [search.run()])
        return _choose_on_cluster(asked, journal)


def read_task(request: Request, spec: ModelSpec) -> Task | None:
    """The request's task; None: it has none.

    Raises:
        TaskError: it does not fit the model; or metrics of no task.
    """
    return task_of_options(request.task, request.metrics, spec, request.model, request.text)


def task_of_options(path: Path | None, metrics: Sequence[str], spec: ModelSpec, model: Path, text: Path | None) -> Task | None:
    """What `--task` and `--metric` say, its rows none that the text's calibration part has.

    Raises:
        TaskError: it does not fit the model; or metrics of no task.
    """
    if path is None:
        if metrics:
            raise TaskError(f"metric {metrics[0]} is of a task; name the task's file.")
        return None
    without = frozenset(load_text(text).calibration if text else ())
    return load_task(path, spec, model, metrics=metrics, taken=figures(decoder=spec.is_decoder), without=without)


def _choose_on_cluster(asked: Asked, journal: Journal) -> dict[str, Any]:
    """The answer of the machines of a Ray cluster: that of the kind of which there are most, and what others would choose beside it.

    Raises:
        DeviceError: no cluster, or no machine that can run trials.
    """
    from lighten.choose.ray_engine import Cluster, Site

    request = asked.request
    site = Site(
        model=request.model.resolve(), text=request.text and request.text.resolve(),
        task=request.task and resolved(request.task), metrics=request.metrics, workload=request.workload, threads=request.threads,
        memory_bytes=request.memory_bytes, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    with Cluster(address=request.ray_address, site=site, log=asked.log) as cluster:
        cluster.adopt()
        kinds = sorted(cluster.kinds().items(), key=lambda item: -len(item[1]))
        if not kinds:
            raise DeviceError("no machine of the cluster can run trials; why not is said above.")
        searches = []
        for kind, nodes in kinds:
            engine = cluster.engine(kind)
            searches.append(Search(asked, engine.profile(), journal, engine, nodes[0].machine))
        with ThreadPoolExecutor(len(searches)) as pool:
            answers = list(pool.map(Search.run, searches))
        return hand_over(asked, local_bench(asked), answers)


def local_bench(asked: Asked) -> Bench:
    """Where this machine carries out trials."""
    request = asked.request
    work = request.out / "work"
    limits = Limits(threads=request.threads, memory_bytes=request.memory_bytes or most_memory(), timeout_s=TIMEOUT_S)
    return Bench(Judge(request.model, asked.spec, asked.text, request.workload, limits, work, asked.task), work, request.text)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The output folder, held by this process alone.

    Raises:
        OutputError: it cannot be written, is another's, or another run holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / FILE).exists() and not (out / ".lock").exists():
            raise OutputError(f"{out} is not empty and holds no earlier run of choose; name a new folder.")
        handle = os.open(out / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{out} is in use by another run of choose.") from error
        yield
    finally:
        os.close(handle)


def known_profile(threads: int, log: Log) -> Profile:
    """This machine's profile; measured where there is none of this processor and as many threads, or none of a runtime that is installed."""
    try:
        known = load_profile()
    except DeviceError:
        if profile_path().exists():
            raise
        known = None
    here = this_machine()
    if known is not None and (known.threads, known.machine.cpu, known.machine.cores) != (threads, here.cpu, here.cores):
        known = None
    missing = [name for name in installed_engines() if known is None or name not in {**known.engines, **known.failures}]
    if known is not None and not missing:
        return known
    log("measuring this machine once, so that predictions are of it (lighten probe)")
    found = probe(threads=threads, log=lambda line: log(f"    {line}"), engines=missing)
    profile = found if known is None else merge_profiles(known, found)
    save_profile(profile)
    return profile
