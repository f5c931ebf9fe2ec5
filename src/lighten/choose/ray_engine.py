"""Trials on the machines of a Ray cluster: one worker on each, one trial at a time there, and again elsewhere where a machine is lost.

Machines of different processors are told apart: each kind has predictions, trials and a choice of its own. A machine needs the same packages and the
model's folder at the same path.
"""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from lighten.choose.engine import Job, Record, carry_out
from lighten.choose.trial import Bench
from lighten.cost import Workload
from lighten.device import Profile
from lighten.device.probe import this_machine
from lighten.device.profile import Machine
from lighten.errors import DeviceError
from lighten.judge import child
from lighten.judge.measure import Judge, Limits
from lighten.judge.text import load_text
from lighten.model.runnable import read_runnable

START_S = 120.0
"""What a machine may take to start its worker."""
PROBE_S = 3600.0
"""What it may take to be probed."""
PATIENCE_S = 60.0
"""How long a search without a machine waits for one to come back."""
CONNECT_S = 10.0
ADOPT_S = 5.0
"""How often new machines are looked for."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a worker needs to know before it can carry out trials.

    Attributes:
        program: what runs artifacts in a process of its own, as `lighten.judge.child` starts it.
    """

    model: Path
    text: Path | None
    task: Path | None
    metrics: tuple[str, ...]
    workload: Workload
    threads: int
    memory_bytes: int | None
    timeout_s: float
    program: tuple[str, ...] = field(default_factory=lambda: child.WORKER)


class Worker:
    """Carries out jobs in a process of its own on one machine."""

    def __init__(self, site: Site) -> None:
        self._site = site
        child.WORKER = site.program
        self._folder: Path | None = None
        self._bench: Bench | None = None

    def machine(self) -> Machine:
        """Where it is.

        Raises:
            ModelError: the model is not there.
        """
        read_runnable(self._site.model)
        return this_machine()

    def profile(self) -> Profile:
        """What is known of the machine; it is probed where that is nothing."""
        from lighten.choose.run import known_profile

        return known_profile(self._site.threads, lambda line: None)

    def carry_out(self, job: Job) -> Record:
        """See `engine.carry_out`."""
        from lighten.choose.run import task_of_options

        site = self._site
        if self._bench is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lighten-trials-"))
            held = this_machine().memory_bytes
            limits = Limits(threads=site.threads, memory_bytes=site.memory_bytes or int(0.9 * (held or 2**62)), timeout_s=site.timeout_s)
            spec = read_runnable(site.model)
            task = task_of_options(site.task, site.metrics, spec, site.model, site.text)
            judge = Judge(site.model, spec, load_text(site.text), site.workload, limits, self._folder, task)
            self._bench = Bench(judge, self._folder, site.text)
        return carry_out(self._bench, job)

    def close(self) -> None:
        """End its processes and remove its files."""
        if self._bench is not None:
            self._bench.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(kw_only=True)
class _Node:
    """A machine's worker, and what it does."""

    name: str
    actor: Any
    machine: Machine
    job: Job | None = None
    answer: Any = None


@dataclass(kw_only=True)
class Cluster:
    """The machines of a Ray cluster, connected for as long as the context lasts.

    Raises:
        DeviceError: Ray is not installed, or no cluster answers.
    """

    address: str | None
    site: Site
    log: Log
    nodes: dict[str, _Node] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _looked: float = -ADOPT_S
    _lock: Lock = field(default_factory=Lock)

    def __enter__(self) -> Cluster:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise DeviceError("engine ray is not installed; pip install 'lighten[ray]'.") from error
        if self.address is not None:
            _require_answer(self.address)
        try:
            ray.init(
                address=self.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if self.address is None else None
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DeviceError(f"no Ray cluster answers at {self.address or 'this machine'} ({str(error).splitlines()[0]}).") from error
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for node in self.nodes.values():
            node.actor.close.remote()
        ray.shutdown()

    def adopt(self) -> None:
        """Start a worker on each machine that has none and enough processors; one that has not is said once."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with self._lock:
            if time.monotonic() - self._looked < ADOPT_S:
                return
            self._looked = time.monotonic()
        found: dict[str, Any]
        for found in ray.nodes():  # type: ignore[no-untyped-call]
            name = found["NodeID"]
            if not found["Alive"] or name in self.nodes or name in self._refused:
                continue
            cores = found["Resources"].get("CPU", 0)
            if cores < self.site.threads:
                self._refuse(name, f"it offers {cores:g} processors, and trials have {self.site.threads} threads")
                continue
            place = NodeAffinitySchedulingStrategy(node_id=name, soft=False)
            remote: Any = ray.remote(Worker)
            actor = remote.options(num_cpus=self.site.threads, max_restarts=0, scheduling_strategy=place).remote(self.site)
            try:
                machine: Machine = ray.get(actor.machine.remote(), timeout=START_S)
            except ray.exceptions.RayTaskError as error:
                self._refuse(name, str(error.cause).splitlines()[0])
            except ray.exceptions.RayError as error:
                self._refuse(name, f"its worker did not start ({type(error).__name__})")
            else:
                self.nodes[name] = _Node(name=name, actor=actor, machine=machine)
                self.log(f"machine {name[:8]}: {machine.cpu}, {machine.cores} cores")

    def _refuse(self, name: str, why: str) -> None:
        self._refused.add(name)
        self.log(f"machine {name[:8]} is left out: {why}")

    def kinds(self) -> dict[str, list[_Node]]:
        """The machines by kind: equal processors, as many cores."""
        found: dict[str, list[_Node]] = {}
        for node in self.nodes.values():
            found.setdefault(kind_of(node.machine), []).append(node)
        return found

    def engine(self, kind: str) -> Ray:
        """The engine of one kind of machine."""
        return Ray(self, kind)


def _require_answer(address: str) -> None:
    """Raises:
    DeviceError: not HOST:PORT, or nothing listens there; Ray itself would try for minutes.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except ValueError as error:
        raise DeviceError(f"--ray-address {address} is not HOST:PORT, such as 10.0.0.1:6379.") from error
    except OSError as error:
        raise DeviceError(f"no Ray cluster answers at {address} ({error.strerror or error}).") from error


def kind_of(machine: Machine) -> str:
    """What tells kinds of machines apart."""
    return f"{machine.cpu}, {machine.cores} cores"


class Ray:
    """Carries out jobs on all machines of one kind, one at a time on each; see `Engine`."""

    def __init__(self, cluster: Cluster, kind: str) -> None:
        self._cluster, self._kind = cluster, kind
        self._waiting: list[Job] = []

    @property
    def free(self) -> bool:
        """See `Engine`."""
        self._cluster.adopt()
        return len(self._waiting) < sum(node.job is None for node in self._nodes())

    @property
    def running(self) -> int:
        """See `Engine`."""
        return len(self._waiting) + sum(node.job is not None for node in self._nodes())

    def start(self, job: Job) -> None:
        """See `Engine`."""
        self._waiting.append(job)
        self._place()

    def finished(self) -> list[tuple[Job, Record]]:
        """See `Engine`.

        Raises:
            DeviceError: no machine is left.
        """
        import ray

        alone_since = time.monotonic()
        while True:
            self._cluster.adopt()
            self._place()
            busy = {node.answer: node for node in self._nodes() if node.job is not None}
            if not busy:
                if time.monotonic() - alone_since > PATIENCE_S:
                    raise DeviceError(f"no machine of the cluster ({self._kind}) is left; run the same command again to go on.")
                time.sleep(1.0)
                continue
            alone_since = time.monotonic()
            ready, _ = ray.wait(list(busy), timeout=ADOPT_S)
            found = [done for answer in ready if (done := self._taken(busy[answer]))]
            if found:
                return found

    def close(self) -> None:
        """See `Engine`. Workers end with the cluster's context."""

    def profile(self) -> Profile:
        """What is known of this kind of machine."""
        import ray

        profile: Profile = ray.get(next(self._nodes()).actor.profile.remote(), timeout=PROBE_S)
        return profile

    def _nodes(self) -> Iterator[_Node]:
        return (node for node in self._cluster.nodes.values() if kind_of(node.machine) == self._kind)

    def _place(self) -> None:
        """Give waiting jobs to machines that are idle and have the memory that is predicted to be needed."""
        for job in list(self._waiting):
            needed = 2 * (job.candidate.predicted.get("peak_memory_bytes") or 0)  # the original runs beside it
            idle = (node for node in self._nodes() if node.job is None)
            node = next((node for node in idle if (node.machine.memory_bytes or needed) >= needed), None)
            if node is not None:
                self._waiting.remove(job)
                node.job, node.answer = job, node.actor.carry_out.remote(job)

    def _taken(self, node: _Node) -> tuple[Job, Record] | None:
        """A finished job and its record; None where its machine was lost, and the job waits for another. What a worker raises ends the search."""
        import ray

        job, answer = node.job, node.answer
        assert job is not None, "it is busy"
        try:
            record = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            del self._cluster.nodes[node.name]
            self._waiting.insert(0, job)
            self._cluster.log(f"machine {node.name[:8]} was lost ({type(error).__name__}); its trial runs again: {job.candidate.recipe}")
            return None
        node.job = node.answer = None
        return job, record | {"node": node.name[:8]}
