"""Draws from a space that is too large to be listed: Optuna's NSGA-II over its places, by predictions alone.

Two figures are weighed, both known without weights: the objective as predicted, and the bits of the original's weights that are left. What is drawn
is searched like any other space; the quality of two recipes that leave equally many bits is told by proxies and trials.

Source: Deb et al. 2002 (NSGA-II), as `optuna.samplers.NSGAIISampler` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeAlias

from lighten.choose.space import Space
from lighten.errors import RecipeError
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.recipe import Recipe

Point: TypeAlias = tuple[float, ...]
LISTED = 2_000
"""Combinations up to which every one is predicted, some 10 ms each: choice."""
DRAWN = 2_000
"""Combinations that are predicted of a larger space."""
KEPT = 300
"""Of them so many are searched, the best fronts first: hours of trials."""
WHOLE_BITS = 16
"""A weight of more bits keeps no more of a function than one of as many: bfloat16 is what models are trained in."""


def bits_left(spec: ModelSpec) -> float:
    """Bits that the weights of linears and tables have, zeros counted as none."""
    total = 0.0
    for part in spec.parts:
        if isinstance(part, Linear | Embedding) and part.tensors():
            rows, columns = (part.out_features, part.in_features) if isinstance(part, Linear) else (part.num_embeddings, part.embedding_dim)
            copies = part.experts if isinstance(part, Linear) else 1
            elements = rows * columns
            stored = min(8 * part.weight.stored_bytes(rows, columns), WHOLE_BITS * elements) if part.weight.bits else WHOLE_BITS * elements
            total += copies * stored * (1 - part.weight.sparsity)
    return total


def draw(space: Space, judge: Callable[[Recipe], Point | None], *, drawn: int = DRAWN, kept: int = KEPT) -> list[Recipe]:
    """Recipes of a space that no other that was drawn beats in every figure, then those that only these beat, and so on: at most `kept`. Its own
    `recipes` come first, and do not count. The same space and predictions give the same ones.

    Args:
        judge: figures of a recipe, less of each better; None: it cannot be done.

    Raises:
        RecipeError: Optuna is not installed, or nothing that was drawn can be done.
    """
    if find_spec("optuna") is None:
        raise RecipeError(
            f"the space has {space.combinations:,} combinations; more than {LISTED:,} are drawn by Optuna, which is not installed; "
            "pip install 'lighten[search]'."
        )
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.NSGAIISampler(seed=0))
    points: dict[Recipe, Point] = {}
    failed: set[Recipe] = set()
    for _ in range(drawn):
        trial = study.ask()
        steps = [place[trial.suggest_int(f"place {number}", 0, len(place) - 1)] for number, place in enumerate(space.places)]
        recipe = space.recipe(steps, space.runtimes[trial.suggest_int("runtime", 0, len(space.runtimes) - 1)])
        if recipe not in points and recipe not in failed:
            if (found := judge(recipe)) is None:
                failed.add(recipe)
            else:
                points[recipe] = found
        if recipe in points:
            study.tell(trial, points[recipe])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    if not points and not space.recipes:
        raise RecipeError(f"none of {drawn:,} combinations that were drawn of the space's {space.combinations:,} can be done.")
    return list(dict.fromkeys([*space.recipes, *best_fronts(points, kept)]))


def best_fronts(points: dict[Recipe, Point], kept: int) -> list[Recipe]:
    """Front by front, at most `kept`; each in the order of its first figure."""
    left, found = sorted(points, key=lambda recipe: points[recipe]), list[Recipe]()
    while left and len(found) < kept:
        front = [one for one in left if not any(_beats(points[other], points[one]) for other in left)]
        found += front
        left = [one for one in left if one not in set(front)]
    return found[:kept]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
