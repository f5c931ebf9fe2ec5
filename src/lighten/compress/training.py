"""Training of a whole model's dense weights, in one process or in several that were started together.

Every process has a `Trainer`; the first one says what is done next, and the others follow it by `help_training`. A step's rows are parted into units,
which the processes take in turn, so that a step is the same sum whatever their number. Gradients are clipped to a norm of 1.

Shape legend: B rows of a unit, S positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lighten.compress.lion import Lion
from lighten.compress.memory_plan import reusing_memory
from lighten.compress.processes import Team
from lighten.compress.pupil import Objective, Pupil, Target, TeacherHead, has_classes, stacks_of
from lighten.compress.skeleton import Skeleton, Source
from lighten.compress.teacher import Sample

LARGEST_NORM = 1.0
"""Of a step's gradients: choice, the commonest of published trainings (arXiv:2005.14165, appendix B)."""
BETAS = (0.9, 0.95)
"""Of Adam's two moments (arXiv:2005.14165, appendix B); short runs want a short memory."""
MOMENTUM = 0.9
"""Of SGD (Sutskever et al. 2013, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows that are computed together, and what the teacher answered to them.

    Attributes:
        weight: the unit's share of the mean over all that a step compares; 0 of one that only keeps a process in step with the others.
    """

    sample: Sample
    target: Target
    weight: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a process needs to build its part of a training.

    Attributes:
        config, shapes: of the student, and of the teacher, whose head may be needed.
        held: names of tensors whose zeros stay zeros.
        widths: (the student's, the teacher's) width of what is compared by a projection.
        words: the tokens whose logits are compared, by the teacher's ids; empty: all.
        routed: which weights a unit meets depends on it.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    teacher_config: Mapping[str, Any]
    teacher_shapes: Mapping[str, tuple[int, ...]]
    objective: Objective
    needs_head: bool
    held: frozenset[str]
    widths: Mapping[str, tuple[int, int]]
    optimizer: str
    parallel: str
    dtype: str
    recompute: bool
    embeddings: bool
    seed: int
    words: tuple[int, ...]
    routed: bool


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How a student does on rows that it is not trained on.

    Attributes:
        distance: from the teacher's answers and, by their weight, from the labels.
        accuracy: share of the rows whose class is known that get it; None where of none it is.
    """

    distance: float
    accuracy: float | None


State = dict[str, Tensor]
"""`weight:NAME` and `state:NAME:FIELD` of each trained parameter, whole."""


class Trainer:
    """One process's part of a training.

    Args:
        source, teacher_source: tensors of student and teacher, of the first process; None of the others, which get theirs from it.
    """

    def __init__(self, setup: Setup, team: Team, source: Source | None = None, teacher_source: Source | None = None) -> None:
        self.setup, self._team = setup, team
        self.skeleton = Skeleton(setup.config, dict(setup.shapes), dtype=torch.float32)
        self.skeleton.load(self.skeleton.module, source or _empty(setup.shapes))
        head = None
        if setup.needs_head:
            teacher = Skeleton(setup.teacher_config, dict(setup.teacher_shapes), dtype=torch.float32)
            head = TeacherHead(teacher, teacher_source or _empty(setup.teacher_shapes), setup.objective.answer, setup.words)
            for tensor in head.tensors:
                team.spread(tensor.data)
        self._train_some(self.skeleton.module)
        blocks = [name for names in stacks_of(self.skeleton).values() for name in names]
        self.pupil = Pupil(
            self.skeleton.module, setup.objective, head=head, widths=setup.widths, dtype=getattr(torch, setup.dtype),
            recompute=blocks if setup.recompute else (), seed=setup.seed,
        )  # fmt: skip
        for tensor in [*self.pupil.parameters(), *self.pupil.buffers()]:
            if not tensor.is_meta:
                team.spread(tensor.data)
        masks = self._masks()
        self._spread(blocks)
        self._named = {name: parameter for name, parameter in self.pupil.named_parameters() if parameter.requires_grad}
        self._held = {name: _like(mask, self._named[name]) for name, mask in masks.items() if name in self._named and not mask.all()}
        self._optimizer = make_optimizer(setup.optimizer, list(self._named.values()))

    def step(self, units: Sequence[Unit], rate: float) -> tuple[float, float]:
        """Move the weights by one step; (loss, distance) of the whole step before it.

        Args:
            units: this process's; all processes have the same number.
            rate: learning rate.
        """
        if self.setup.parallel == "ddp" and self._wrapped is self.pupil:
            self._copy_to_all(units[0])
        total, near = 0.0, 0.0
        for place, unit in enumerate(units):
            with self._in_step_alone(last=place == len(units) - 1):
                loss, distance, _ = self._wrapped(unit.sample, unit.target)
                (loss * (unit.weight * self._team.size)).backward()  # the wrappers take the mean over processes
            total, near = total + unit.weight * float(loss.detach()), near + unit.weight * float(distance)
        for name, mask in self._held.items():
            gradient = self._named[name].grad
            if gradient is not None:
                _local(gradient).mul_(mask)  # neither the norm nor a moment counts what cannot move, and zeros stay exactly zero
        nn.utils.clip_grad_norm_(self._named.values(), LARGEST_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for name, mask in self._held.items():
            _local(self._named[name].data).mul_(mask)
        found = self._team.sum([total, near])
        return found[0], found[1]

    def judge(self, units: Sequence[Unit]) -> Judged:
        """Over all processes' units, as the weights are."""
        distance, right, rows = 0.0, 0.0, 0.0
        with torch.no_grad():
            for unit in units:
                _, near, hits = self.pupil(unit.sample, unit.target)
                distance += unit.weight * float(near)
                if unit.weight and has_classes(unit.sample):
                    right, rows = right + float(hits), rows + len(unit.sample["labels"])
        distance, right, rows = self._team.sum([distance, right, rows])
        return Judged(distance=distance, accuracy=right / rows if rows else None)

    def state(self) -> State:
        """Weights and the optimizer's memory, whole; in all processes at once."""
        found: State = {}
        for name, parameter in self._named.items():
            found[f"weight:{name}"] = _whole(parameter.data)
            for field, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"state:{name}:{field}"] = _whole(value)
        return found

    def restore(self, state: State | None) -> None:
        """Go on from a state of the first process; in all processes at once."""
        names = self._team.tell(None if state is None else [(key, value.shape, value.dtype) for key, value in state.items()])
        for key, shape, dtype in names:
            value = state[key].clone() if state is not None else torch.empty(shape, dtype=dtype)
            self._team.spread(value)
            kind, name, *field = key.split(":")
            parameter = self._named[name]
            if kind == "weight":
                _local(parameter.data).copy_(_like(value, parameter))
            else:
                own = _as(value, parameter) if value.shape == parameter.shape else value
                self._optimizer.state[parameter][field[0]] = own

    def weights(self) -> dict[str, Tensor]:
        """What became of each tensor of the checkpoint that was trained, in its orientation; in all processes at once."""
        trained = {id(parameter) for parameter in self._named.values()}
        found: dict[str, Tensor] = {}
        by_key: dict[str, list[str]] = {}
        for name, place in self.skeleton.places.items():
            by_key.setdefault(place.key, []).append(name)
        for key, names in by_key.items():
            parameter = self.skeleton.value(key)
            if id(parameter) in trained:
                value = _whole(parameter.detach())
                found |= {name: self.skeleton.places[name].of(value).clone() for name in names}
        return found

    def _train_some(self, module: nn.Module) -> None:
        """Let gradients reach every weight of the checkpoint that is in memory, tables only where that is asked for."""
        stored = {id(self.skeleton.value(place.key)) for place in self.skeleton.places.values()}
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        for parameter in module.parameters():
            wanted = id(parameter) in stored and (self.setup.embeddings or id(parameter) not in tables)
            parameter.requires_grad_(wanted and parameter.is_floating_point() and not parameter.is_meta)

    def _masks(self) -> dict[str, Tensor]:
        """Name in the pupil → where a parameter may move."""
        names = {id(parameter): name for name, parameter in self.pupil.named_parameters()}
        found: dict[str, Tensor] = {}
        for held in sorted(self.setup.held & self.skeleton.places.keys()):
            place = self.skeleton.places[held]
            parameter = self.skeleton.value(place.key)
            if id(parameter) in names:
                mask = found.setdefault(names[id(parameter)], torch.ones(parameter.shape, dtype=torch.bool))
                place.of(mask).copy_(place.of(parameter.detach()) != 0)
        return found

    def _spread(self, blocks: Sequence[str]) -> None:
        """Wrap the pupil where each process is to hold a part of every block."""
        self._wrapped: nn.Module = self.pupil
        if self.setup.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (self._team.size,))
            missing = {parameter for parameter in self.pupil.parameters() if parameter.is_meta}
            for module in [*(self.skeleton.module.get_submodule(name) for name in blocks), self.pupil]:
                fully_shard(module, mesh=mesh, ignored_params=missing)

    def _copy_to_all(self, unit: Unit) -> None:
        """Wrap the pupil in torch's DDP, which must be told whether a pass may miss a weight: a unit is tried."""
        loss, _, _ = self.pupil(unit.sample, unit.target)
        loss.backward()
        missed = self._team.sum([float(any(parameter.grad is None for parameter in self._named.values()))])[0] > 0
        self._optimizer.zero_grad(set_to_none=True)
        kind: Any = nn.parallel.DistributedDataParallel
        kind._set_params_and_buffers_to_ignore_for_model(self.pupil, [name for name, found in self.pupil.named_parameters() if found.is_meta])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` has another name from torch 2.13 on
            self._wrapped = kind(self.pupil, find_unused_parameters=missed or self.setup.routed, broadcast_buffers=False, init_sync=False)

    def _in_step_alone(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over processes after the last unit alone."""
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and not last:
            return self._wrapped.no_sync()
        return nullcontext()


def make_optimizer(name: str, parameters: Sequence[Tensor]) -> Optimizer:
    """The learning rate is set at each step."""
    if name == "lion":
        return Lion(parameters, lr=0.0)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=0.0)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=0.0, betas=BETAS, fused=True)


def rate_at(step: int, *, steps: int, warm_up: int, schedule: str) -> float:
    """Share of the learning rate: rises over the warm-up, then falls to 0 in a line or by half a cosine (arXiv:1608.03983, equation 5).

    >>> [rate_at(step, steps=6, warm_up=2, schedule="linear") for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warm_up:
        return (step + 1) / warm_up
    gone = (step - warm_up) / max(1, steps - warm_up)
    return 1 - gone if schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2


class Leader:
    """The first process's trainer, which the others' follow: each call is done by all.

    Args:
        trainer: of this process.
    """

    def __init__(self, trainer: Trainer, team: Team) -> None:
        self._trainer, self._team = trainer, team

    @classmethod
    def begin(cls, setup: Setup, team: Team, source: Source, teacher_source: Source) -> Leader:
        """Build the trainers of all processes."""
        team.tell(setup) if team.size > 1 else None
        return cls(Trainer(setup, team, source, teacher_source), team)

    def step(self, units: Sequence[Unit], rate: float) -> tuple[float, float]:
        return self._trainer.step(self._say("step", units, rate)[0], rate)

    def judge(self, units: Sequence[Unit]) -> Judged:
        return self._trainer.judge(self._say("judge", units)[0])

    def state(self) -> State:
        self._say("state", ())
        return self._trainer.state()

    def restore(self, state: State) -> None:
        self._say("restore", ())
        self._trainer.restore(state)

    def weights(self) -> dict[str, Tensor]:
        self._say("weights", ())
        return self._trainer.weights()

    def end(self) -> None:
        self._say("end", ())

    def _say(self, what: str, units: Sequence[Unit], *more: Any) -> tuple[Any, ...]:
        """Tell all processes what is next, and each its units; this process's."""
        size = self._team.size
        found = self._team.share([(what, part, *more) for part in in_turn(units, size)])
        return tuple(found[1:])


def in_turn(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """Each process's units, the same number of each: where there are too few, some compute a unit that counts nothing.

    >>> from dataclasses import replace
    >>> unit = Unit(sample={}, target={}, weight=1.0)
    >>> [[unit.weight for unit in own] for own in in_turn([unit] * 3, 2)]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    most = -(-len(units) // size)
    for rank in range(size):
        own = list(units[rank::size])
        yield own + [replace(unit, weight=0.0) for unit in units[: most - len(own)]]


def help_training(team: Team, setup: Setup) -> None:
    """Follow the first process through one training."""
    with reusing_memory():
        trainer = Trainer(setup, team)
        while (said := team.share(None))[0] != "end":
            what, units, *more = said
            if what == "step":
                trainer.step(units, *more)
            elif what == "judge":
                trainer.judge(units)
            elif what == "restore":
                trainer.restore(None)
            elif what == "state":
                trainer.state()
            else:
                trainer.weights()


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> Source:
    return lambda name: torch.empty(tuple(shapes[name]))


def _is_cut(tensor: Tensor) -> bool:
    """Whether each process has a part of it."""
    return dist.is_available() and hasattr(tensor, "full_tensor")


def _whole(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.full_tensor() if _is_cut(tensor) else tensor.detach()  # type: ignore[attr-defined]
    return found


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if _is_cut(tensor) else tensor  # type: ignore[attr-defined]
    return found


def _as(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as a parameter is spread over the processes."""
    if not _is_cut(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor."""
    return _local(_as(value, parameter))
