"""Scales that move between a block's layers before its weights are rounded: AWQ's and SmoothQuant's, over the mappings of the traced graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as AnyMapping
from typing import Any, TypeAlias

from torch import Tensor

from lighten.compress.awq import Consumer, Rounder
from lighten.compress.block import Block
from lighten.compress.mappings import Mapping, find_mappings, fold
from lighten.compress.statistics import InputStatistics
from lighten.compress.walk import DoBlock, Job

Choose: TypeAlias = Callable[[Sequence[Consumer], int], Tensor]
"""Consumers and the number of channels → the scales [C] of a mapping."""


def job_mappings(job: Job) -> tuple[Mapping, ...]:
    """The mappings of the job's model, by names of the checkpoint."""
    return find_mappings(job.graph, job.skeleton().places)


def scale_then(choose: Choose, rounder: Callable[[Job, str], Rounder], then: DoBlock, mappings: Iterable[Mapping]) -> DoBlock:
    """Scale a block by its mappings, then do the rest to it.

    Args:
        choose: the scales of one mapping.
        rounder: what the format of a weight makes of it; of a weight that stays as it is, itself.
    """
    known = tuple(mappings)

    def do(job: Job, block: Block) -> list[dict[str, Any]]:
        own = set(block.skeleton.names_in(block.unit.module))
        inside = [mapping for mapping in known if own.issuperset(mapping.names)]
        for mapping, statistics in _with_statistics(block, inside):
            consumers = [
                Consumer(end=end, weight=block.weight(end.name), statistics=statistics[end.name], round_to=rounder(job, end.name))
                for end in mapping.consumers
            ]  # fmt: skip
            scales = choose(consumers, mapping.channels)
            for name, tensor in fold(mapping, scales, {name: block.tensor(name) for name in mapping.names}).items():
                block.put(name, tensor)
        reports = then(job, block)
        for name, weight in block.results.items():
            if isinstance(weight, Tensor):  # scaled, and not rounded after that: a norm, a bias
                block.results[name] = weight.to(block.source(name).dtype)
        return reports

    return do


def _with_statistics(block: Block, mappings: Sequence[Mapping]) -> Iterable[tuple[Mapping, AnyMapping[str, InputStatistics]]]:
    """Each mapping when the inputs of all its consumers are known; a mapping with a consumer that no row reaches is left out. Scaling leaves
    what the layers compute as it is, so the inputs of later mappings are those of the scaled block too."""
    waiting = list(mappings)
    found: dict[str, InputStatistics] = {}
    for level in block.levels(frozenset(end.name for mapping in mappings for end in mapping.consumers)):
        for subset, statistics in block.statistics(level):
            found |= dict.fromkeys(subset.names, statistics)
        ready = [mapping for mapping in waiting if all(end.name in found for end in mapping.consumers)]
        for mapping in ready:
            yield mapping, found
            waiting.remove(mapping)
        needed = {end.name for mapping in waiting for end in mapping.consumers}
        found = {name: statistics for name, statistics in found.items() if name in needed}
