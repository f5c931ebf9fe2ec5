"""The choice of one option for each weight, at least error under a limit on their bytes: the multiple-choice knapsack, solved exactly.

Weights are taken one after the other. Kept is every sum of bytes and error that no other sum beats in both, and that could still lead to less
error than the best choice that is known: the rest is bounded from below by the same problem with options that may be mixed, whose answer takes
the steps of steepest descent first. That bound is tight to within one weight's step, so few sums are kept.

Source: Sinha & Zoltners 1979 (The multiple-choice knapsack problem, Operations Research 27) for dominance and the mixed bound; Kellerer, Pferschy &
Pisinger 2004 (Knapsack Problems, sections 3.4 and 11.5) for lists of sums in place of a table over bytes.

Shape legend: S sums that are kept, K options of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lighten.errors import RecipeError
from lighten.model.spec import WeightFormat
from lighten.recipe.automatic import Budget

Doubles: TypeAlias = NDArray[np.float64]
Wholes: TypeAlias = NDArray[np.int64]

_ROUNDING = 1e-12
"""Sums of errors are float64: bounds that differ by less than this share of all weights' largest errors are taken as equal."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to store a weight.

    Attributes:
        bytes: that it adds to what is limited.
        error: that it adds to what is minimized, 0 or more.
    """

    format: WeightFormat
    bytes: int
    error: float


def allocate(choices: Mapping[str, Sequence[Choice]], limit_bytes: int) -> dict[str, Choice]:
    """One choice for each weight, of least summed error with at most `limit_bytes` in sum; of equal errors fewer bytes.

    The result depends on the choices alone, not on the order in which weights or their choices are given.

    Raises:
        RecipeError: not even the smallest choices fit.
    """
    least = sum(min(choice.bytes for choice in each) for each in choices.values())
    if least > limit_bytes:
        raise RecipeError(f"{len(choices)} weights cannot take {limit_bytes} bytes in sum; their smallest choices take {least}.")
    items = [_Item.of(name, each) for name, each in choices.items()]
    items.sort(key=lambda item: (-int(item.bytes[-1] - item.bytes[0]), item.name))
    return {item.name: item.choices[index] for item, index in zip(items, _solve(items, limit_bytes), strict=True)}


def choose_formats(budget: Budget, errors: Mapping[str, Sequence[float]]) -> dict[str, WeightFormat]:
    """The format of each weight of a budget, by module name.

    Args:
        errors: module → the error of each of its options, in their order.

    Raises:
        RecipeError: the narrowest options do not fit; the message says what would.
    """
    budget.require_possible("the model")
    choices = {
        name: [Choice(format=option.format, bytes=option.bytes, error=error) for option, error in zip(options, errors[name], strict=True)]
        for name, options in budget.options.items()
    }
    return {name: choice.format for name, choice in allocate(choices, budget.limit_bytes).items()}


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A weight's choices that none of its others beats in both, by rising bytes and falling error."""

    name: str
    choices: tuple[Choice, ...]
    bytes: Wholes
    errors: Doubles

    @classmethod
    def of(cls, name: str, choices: Sequence[Choice]) -> _Item:
        kept: list[Choice] = []
        for choice in sorted(choices, key=lambda each: (each.bytes, each.error)):
            if not kept or choice.error < kept[-1].error:
                kept.append(choice)
        return cls(
            name=name, choices=tuple(kept), bytes=np.array([each.bytes for each in kept], np.int64), errors=np.array([each.error for each in kept])
        )

    def steps(self) -> list[tuple[float, int, float]]:
        """(error for each byte, bytes, error) of the steps between the corners of the lower convex hull, steepest first."""
        corners = [0]
        for index in range(1, len(self.bytes)):
            while len(corners) > 1 and self._slope(corners[-2], index) <= self._slope(corners[-2], corners[-1]):
                corners.pop()
            corners.append(index)
        return [
            (self._slope(low, high), int(self.bytes[high] - self.bytes[low]), float(self.errors[high] - self.errors[low]))
            for low, high in pairwise(corners)
        ]

    def _slope(self, low: int, high: int) -> float:
        return float((self.errors[high] - self.errors[low]) / (self.bytes[high] - self.bytes[low]))


class _Bound:
    """The least error of some weights in a number of bytes, where choices may be mixed."""

    def __init__(self, items: Sequence[_Item]) -> None:
        steps = sorted(step for item in items for step in item.steps())
        self.least_bytes = sum(int(item.bytes[0]) for item in items)
        first = sum(float(item.errors[0]) for item in items)
        self._bytes = self.least_bytes + np.cumsum([0, *(size for _, size, _ in steps)], dtype=np.float64)
        self._errors = first + np.cumsum([0.0, *(error for _, _, error in steps)])

    def at(self, left: Wholes) -> Doubles:
        """[S], where `left` is at least `least_bytes`."""
        found: Doubles = np.interp(left.astype(np.float64), self._bytes, self._errors)
        return found


def _greedy(items: Sequence[_Item], limit: int) -> float:
    """The error of the choice that takes steps of the hull, steepest first, while they fit."""
    left = limit - sum(int(item.bytes[0]) for item in items)
    error = sum(float(item.errors[0]) for item in items)
    blocked: set[int] = set()
    steps = sorted((*step, place) for place, item in enumerate(items) for step in item.steps())
    for _, size, change, place in steps:
        if place in blocked or size > left:
            blocked.add(place)  # a later step of a weight starts where its earlier one ends
            continue
        left -= size
        error += change
    return error


def _solve(items: Sequence[_Item], limit: int) -> list[int]:
    """The index of each item's choice."""
    best = _greedy(items, limit) + _ROUNDING * sum(float(item.errors[0]) for item in items)
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Wholes, Wholes]] = []
    for place, item in enumerate(items):
        rest = _Bound(items[place + 1 :])
        all_sizes = (sizes[:, None] + item.bytes).reshape(-1)
        all_errors = (errors[:, None] + item.errors).reshape(-1)
        fits = np.flatnonzero(all_sizes + rest.least_bytes <= limit)
        bounds = all_errors[fits] + rest.at(limit - all_sizes[fits])
        kept = fits[bounds <= best]
        kept = kept[_undominated(all_sizes[kept], all_errors[kept])]
        trail.append((kept // len(item.bytes), kept % len(item.bytes)))
        sizes, errors = all_sizes[kept], all_errors[kept]
    found = int(np.argmin(errors))  # sizes rise, so the first of equal errors has fewest bytes
    chosen = []
    for before, which in reversed(trail):
        chosen.append(int(which[found]))
        found = int(before[found])
    return chosen[::-1]


def _undominated(sizes: Wholes, errors: Doubles) -> Wholes:
    """Places of the sums that no other beats in both, by rising size."""
    order = np.lexsort((errors, sizes))
    lowest = np.minimum.accumulate(errors[order])
    first = np.ones(len(order), bool)
    first[1:] = errors[order][1:] < lowest[:-1]
    found: Wholes = order[first]
    return found
