"""What each step of the chosen recipe contributed: the way to it, and the recipe without each of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lighten.choose import outcome
from lighten.choose.constraints import Constraint, Objective, figure_of
from lighten.recipe import Recipe

Record = dict[str, Any]
Role = Literal["original", "with", "without"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recipe on the way to another, or that other without something.

    Attributes:
        role: the original; one more than the variant before it (`with`); all of the recipe but one (`without`).
        step: what is more, or left out: a step, a runtime or its type.
    """

    recipe: Recipe
    role: Role
    step: str


def variants(recipe: Recipe) -> list[Variant]:
    """From the original to a recipe, one thing more at a time, the runtime first; then the recipe without each thing. No recipe comes twice.

    >>> from lighten.recipe import parse_recipe
    >>> for each in variants(parse_recipe("cast(float16) @ openvino(dtype=bfloat16)")):
    ...     print(each.role, each.step, "→", each.recipe)
    original  → @ torch
    with @ openvino → @ openvino
    with dtype=bfloat16 → @ openvino(dtype=bfloat16)
    with cast(float16) → cast(float16) @ openvino(dtype=bfloat16)
    without dtype=bfloat16 → cast(float16) @ openvino
    >>> [str(each.recipe) for each in variants(parse_recipe("@ torch(dtype=bfloat16, batching=sorted)"))][2:]
    ['@ torch(dtype=bfloat16, batching=sorted)', '@ torch(batching=sorted)']
    """
    found: dict[Recipe, Variant] = {}
    for each in (*_way(recipe), *_without(recipe)):
        found.setdefault(each.recipe, each)
    return list(found.values())


def _way(recipe: Recipe) -> Iterator[Variant]:
    yield Variant(recipe=Recipe(), role="original", step="")
    bare = Recipe(runtime=recipe.runtime, device=recipe.device)
    yield Variant(recipe=bare, role="with", step=f"@ {bare.runtime_text}")
    for said, own, _ in _settings(recipe):
        bare = replace(bare, **own)
        yield Variant(recipe=bare, role="with", step=said)
    for count, step in enumerate(recipe.steps, start=1):
        yield Variant(recipe=replace(bare, steps=recipe.steps[:count]), role="with", step=str(step))


def _without(recipe: Recipe) -> Iterator[Variant]:
    for place, step in enumerate(recipe.steps):
        rest = recipe.steps[:place] + recipe.steps[place + 1 :]
        yield Variant(recipe=replace(recipe, steps=rest), role="without", step=str(step))
    for said, _, none in _settings(recipe):
        yield Variant(recipe=replace(recipe, **none), role="without", step=said)


def _settings(recipe: Recipe) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What a recipe says of its runtime: as text, as fields, and those fields as they are where it is not said. Options are one thing: some have an
    effect together alone."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if recipe.dtype is not None:
        found.append((f"dtype={recipe.dtype}", {"dtype": recipe.dtype}, {"dtype": None}))
    if recipe.options:
        found.append((", ".join(f"{name}={value}" for name, value in recipe.options), {"options": recipe.options}, {"options": ()}))
    return found


def better_without(rows: Sequence[Record], chosen: Record, baseline: Record, constraints: Sequence[Constraint], objective: Objective) -> list[str]:
    """What to try next: variants that were not searched, meet all requirements and are better than the chosen by more than noise."""
    own, said = objective.cost(chosen["measured"]), []
    for row in rows:
        if row["id"] == chosen["id"] or not row["measured"] or not outcome.meets(row, baseline, constraints):
            continue
        if objective.cost(row["measured"]) < own - outcome.TIE * abs(own):
            values = [outcome.say(objective.figure, figure_of(each["measured"], objective.figure)) for each in (row, chosen)]
            name = f"{row['recipe']} @ {row['runtime']}".strip()
            said.append(f"{name}, which was not searched, is better than the chosen: {objective.figure} {values[0]} instead of {values[1]}")
    return said
