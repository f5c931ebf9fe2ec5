"""factorize: weights exchanged for factors of low rank, or corrected by them, block by block.

Ranks that share a budget are chosen after a look at all weights with the model as it is; then the walk begins anew, each block with the factorized
blocks before it in place.

Shape legend: O rows (output features), I columns (input features), R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lighten.compress.block import Block
from lighten.compress.grid import Weight
from lighten.compress.journal import Journal
from lighten.compress.lowrank import Decomposed, Factors, Spectrum, decompose, energy_rank, spread_ranks, whitening
from lighten.compress.stage import Journaled, Stage
from lighten.compress.statistics import InputStatistics
from lighten.compress.walk import Job, walk_blocks
from lighten.model.low_rank import DOWN, UP, largest_rank, pair_parameters
from lighten.model.spec import Linear, ModelSpec
from lighten.recipe.factorize import corrected_parts, low_rank_parts, rank_units, spread_evenly, with_ranks

Done = tuple[dict[str, Weight], list[dict[str, Any]]]
Errors = Callable[[Tensor, Tensor, InputStatistics], Mapping[str, float]]
"""([O, I] before, [O, I] after, what the input is) → the errors of the output, by the names of a report."""

RANKS_BLOCK, LOOK = "ranks", "look"
FIRST, SECOND = "lora_A", "lora_B"


# ---- in the place of a weight ----


@dataclass(frozen=True, kw_only=True)
class Split:
    """Factors as two tensors of their own, and the bias by its new name."""

    before: Stage
    modules: frozenset[str]

    @cached_property
    def _from(self) -> dict[str, str]:
        """New name → the old one."""
        known = set(self.before.names)
        weights = {f"{module}.{part}.weight": f"{module}.weight" for module in sorted(self.modules) for part in (DOWN, UP)}
        return weights | {f"{module}.{UP}.bias": f"{module}.bias" for module in sorted(self.modules) if f"{module}.bias" in known}

    @property
    def names(self) -> list[str]:
        gone: dict[str, list[str]] = {}
        for new, old in self._from.items():
            gone.setdefault(old, []).append(new)
        return [each for name in self.before.names for each in gone.get(name, [name])]

    def __getitem__(self, name: str) -> Weight:
        if name not in self._from:
            return self.before[name]
        found = self.before[self._from[name]]
        if not isinstance(found, Factors):
            return found
        return found.down if name.endswith(f".{DOWN}.weight") else found.up

    def touched(self, name: str) -> bool:
        return self.before.touched(self._from.get(name, name))

    def said(self, name: str) -> Mapping[str, Any]:
        return self.before.said(self._from.get(name, name))

    def whole(self, name: str) -> str:
        """The tensor that a factor was taken from."""
        return self._from.get(name, name)


def factorize_svd(errors: Errors) -> Callable[[Job], tuple[Stage, ModelSpec]]:
    def method(job: Job) -> tuple[Stage, ModelSpec]:
        if job.step["ratio"]:
            job = replace(job, after=with_ranks(job.before, _spread(job)))
        if job.step["weighted"]:
            stage, _ = walk_blocks(job, lambda job, block: _factorize_block(job, block, errors))
        else:
            stage = _by_itself(job)
        journal = job.run.journal
        said = [report for block in journal.blocks(job.number) for report in journal.read(job.number, block).reports]
        chosen = {report["name"]: report["rank"] for report in said if report.get("rank")}
        ranks = {name: chosen[f"{name}.weight"] for name in _linears(job) if f"{name}.weight" in chosen}
        return Split(before=stage, modules=frozenset(ranks)), with_ranks(job.before, ranks)

    return method


def _linears(job: Job) -> dict[str, Linear]:
    """The linears that may be exchanged, by name."""
    return {part.name: part for part in low_rank_parts(job.before, dict(job.step.arguments))}


def _factorize_block(job: Job, block: Block, errors: Errors) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    for subset, statistics in block.in_turn():
        root = whitening(statistics.hessian) if statistics.rows else None
        for name in subset.names:
            before = block.weight(name)
            weight, report = _chosen(job, name, decompose(before, root))
            block.put(name, block.source(name) if weight is None else weight)
            value = before if weight is None else weight.dequantize()
            reports.append({**report, "rows": statistics.rows, **errors(before, value, statistics)})
    return reports + _put_alone(job, block)


def _put_alone(job: Job, block: Block) -> list[dict[str, Any]]:
    """Do what no calibration row reached."""
    weights, reports = factorize_alone(job, block.wanted - block.results.keys())
    for name, weight in weights.items():
        block.put(name, weight)
    return reports


def _chosen(job: Job, name: str, found: Decomposed) -> tuple[Factors | None, dict[str, Any]]:
    """A weight's factors, or None where it stays as it is, and what is said of it."""
    part = _linears(job).get(name.removesuffix(".weight"))
    if part is None:
        return None, {"name": name}
    if job.step["energy"]:
        rank, most = energy_rank(found.singular, job.step["energy"]), largest_rank(part)
        if rank > most:
            job.run.log(f"{part.name} stays whole: energy={job.step['energy']} takes rank {rank}, and its factors are smaller up to {most}")
            return None, {"name": name}
    else:
        rank = next(each.out_features for each in job.after.parts if isinstance(each, Linear) and each.name == f"{part.name}.{DOWN}")
    dtype: torch.dtype = getattr(torch, part.weight.dtype)
    return found.factors(rank, dtype), {"name": name, "rank": rank}


def _by_itself(job: Job) -> Stage:
    """Each weight without a look at its inputs."""
    journal = job.run.journal
    for name in sorted(job.names):
        if not journal.has(job.number, name):
            journal.write(job.number, name, *factorize_alone(job, [name]))
    return Journaled(before=job.stage, journal=journal, pass_index=job.number, blocks={name: name for name in job.names})


def factorize_alone(job: Job, names: Iterable[str]) -> Done:
    """Weights that no calibration row reaches, by plain SVD: exchanged, looked at, or corrected, as the job has it."""
    weights: dict[str, Weight] = {}
    reports: list[dict[str, Any]] = []
    for name in sorted(names):
        if isinstance(job, _Correcting):
            weights |= job.factors(name, job.lost(name, job.value(_corrected(name)))[1], None)
            report: dict[str, Any] = {"name": _second(name)}
        elif isinstance(job, _Looking):
            report = _worth(name, decompose(job.matrix(name, job.value(name)).float()))
        else:
            factors, report = _chosen(job, name, decompose(job.matrix(name, job.value(name)).float()))
            weights[name] = job.value(name) if factors is None else factors
        reports.append({**report, "rows": 0} if job.step.calibrated else report)
    return weights, reports


# ---- ranks that share a budget ----


class _Looking(Job):
    """A walk that changes nothing and tells what each weight's ranks are worth."""


def _spread(job: Job) -> dict[str, int]:
    """The rank of each linear under the step's ratio, chosen once in a run."""
    journal = job.run.journal
    if not journal.has(job.number, RANKS_BLOCK):
        linears = _linears(job)
        job.run.log("looking at what each rank of each weight is worth")
        gains = {report["name"].removesuffix(".weight"): report["gains"] for report in _look(job) if "gains" in report}
        parts, ratio = list(linears.values()), job.step["ratio"]
        units, even = rank_units(parts, ratio), spread_evenly(parts, ratio)
        spectra = {name: _in_units(gains[name], part, units[name]) for name, part in linears.items()}
        counts = spread_ranks(spectra, {name: rank // units[name] for name, rank in even.items()})
        ranks = {name: units[name] * count for name, count in counts.items()}
        journal.write(job.number, RANKS_BLOCK, {}, [{"ranks": ranks}])
    found: dict[str, int] = journal.read(job.number, RANKS_BLOCK).reports[0]["ranks"]
    return found


def _in_units(gains: Sequence[float], part: Linear, unit: int) -> Spectrum:
    """What so many ranks at once are worth, as often as the weight has room for them."""
    worth = [sum(gains[start : start + unit]) for start in range(0, largest_rank(part) // unit * unit, unit)]
    return Spectrum(gains=worth, step=pair_parameters(part, unit))


def _look(job: Job) -> Sequence[Mapping[str, Any]]:
    """What each weight's ranks are worth, of all weights in their turn."""
    looking = _Looking(**{each.name: getattr(job, each.name) for each in fields(Job)})
    if not job.step["weighted"]:
        return factorize_alone(looking, job.names)[1]
    with Journal.open(job.run.journal.scratch / f"{LOOK}-{job.number}", {}, resume=False) as journal:
        walk_blocks(replace(looking, run=replace(job.run, journal=journal)), _look_at_block)
        found = [report for block in journal.blocks(job.number) for report in journal.read(job.number, block).reports]
        journal.discard()
        return found


def _look_at_block(job: Job, block: Block) -> list[dict[str, Any]]:
    reports = []
    for subset, statistics in block.in_turn():
        root = whitening(statistics.hessian) if statistics.rows else None
        reports += [_worth(name, decompose(block.weight(name), root)) for name in subset.names]
    seen = {report["name"] for report in reports}
    return reports + factorize_alone(job, block.wanted - seen)[1]


def _worth(name: str, found: Decomposed) -> dict[str, Any]:
    """The share of a weight's output that each rank makes. Shares and not sizes: a layer of small outputs may matter as much as one of large."""
    gains = found.singular.double().square()
    return {"name": name, "gains": (gains / gains.sum().clamp(min=1e-300)).tolist()}


# ---- beside a quantized weight ----


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Tensors that a step adds, zeros before it is done."""

    before: Stage
    added: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        return [*self.before.names, *self.added]

    def __getitem__(self, name: str) -> Weight:
        return self.added[name] if name in self.added else self.before[name]

    def touched(self, name: str) -> bool:
        return name in self.added or self.before.touched(name)

    def said(self, name: str) -> Mapping[str, Any]:
        return {} if name in self.added else self.before.said(name)

    def whole(self, name: str) -> str:
        """The weight that a tensor stands beside."""
        return f"{name.rpartition('.lora_')[0]}.weight" if name in self.added else name


@dataclass(frozen=True, kw_only=True)
class _Correcting(Job):
    """A walk over the first of each two linears that stand beside a weight: what it is given, the weight is given.

    Attributes:
        modules: the linears that are corrected.
    """

    modules: tuple[str, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(f"{module}.{FIRST}.weight" for module in self.modules)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Rows of each first linear, by its weight's name."""
        return {f"{part.name}.weight": part.out_features for part in self.before.parts if isinstance(part, Linear)}

    def lost(self, name: str, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """[O, I] float32 of a weight before it was quantized, and what quantizing lost of it.

        Args:
            name: of the first linear's weight.
            quantized: what is computed with, in the checkpoint's orientation.
        """
        weight = _corrected(name)
        found = self.dense[weight]
        assert isinstance(found, Tensor), "taken before anything was quantized"
        original = self.matrix(weight, found).float()
        return original, original - self.matrix(weight, quantized).float()

    def factors(self, name: str, lost: Tensor, root: Tensor | None) -> dict[str, Tensor]:
        """Both linears' weights, in the type of the weight that they correct."""
        dtype = next(part.weight.dtype for part in self.before.parts if isinstance(part, Linear) and f"{part.name}.weight" == name)
        found = decompose(lost, root).factors(self.ranks[name], getattr(torch, dtype))
        return {name: found.down, _second(name): found.up}


def _corrected(name: str) -> str:
    """The weight that `X.lora_A.weight` corrects."""
    return f"{name.removesuffix(f'.{FIRST}.weight')}.weight"


def _second(name: str) -> str:
    """`X.lora_B.weight` of `X.lora_A.weight`."""
    return f"{name.removesuffix(f'.{FIRST}.weight')}.{SECOND}.weight"


def factorize_correction(errors: Errors) -> Callable[[Job], tuple[Stage, ModelSpec]]:
    def method(job: Job) -> tuple[Stage, ModelSpec]:
        modules = tuple(part.name for part in corrected_parts(job.before, dict(job.step.arguments)))
        added = {
            name: torch.zeros(shape, dtype=getattr(torch, part.weight.dtype))
            for part in job.after.parts if isinstance(part, Linear) and part.name.rpartition(".")[0] in modules
            for name, shape in part.tensors().items()
        }  # fmt: skip
        given = {each.name: getattr(job, each.name) for each in fields(Job)}
        stage = Beside(before=job.stage, added=added)
        correcting = _Correcting(**{**given, "before": job.after, "stage": stage, "modules": modules})
        return walk_blocks(correcting, lambda job, block: _correct_block(job, block, errors))

    return method


def _correct_block(job: Job, block: Block, errors: Errors) -> list[dict[str, Any]]:
    assert isinstance(job, _Correcting), "the walk hands on the job that it was given"
    reports: list[dict[str, Any]] = []
    for subset, statistics in block.in_turn():
        root = whitening(statistics.hessian) if statistics.rows else None
        for name in subset.names:
            original, lost = job.lost(name, block.tensor(_corrected(name)))
            factors = job.factors(name, lost, root)
            for each, weight in factors.items():
                block.put(each, weight)
            before = errors(original, original - lost, statistics)
            left = lost - factors[_second(name)].float() @ factors[name].float()
            after = errors(original, original - left, statistics)
            reports.append({"name": _second(name), "rows": statistics.rows, "before": before, **after})
    if reports:
        without = sum(report["before"]["output_error"] for report in reports) / len(reports)
        with_it = sum(report["output_error"] for report in reports) / len(reports)
        job.run.log(f"{block.name}: error of the outputs {without:.4f} without the correction, {with_it:.4f} with it")
    return reports + _put_alone(job, block)
