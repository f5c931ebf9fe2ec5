"""What is drawn of a space that is too large to be listed."""

from __future__ import annotations

import re
import sys
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.choose.sampler import best_fronts, bits_left, draw
from lighten.choose.space import Space, make_space
from lighten.errors import RecipeError
from lighten.model import read_spec
from lighten.recipe import Recipe, apply_recipe, parse_recipe

SHARES = tuple(f"prune(magnitude, sparsity=0.{tenth}, targets=layer{{}})" for tenth in range(1, 9))
LAYERS = 4


def space_of(layers: int = LAYERS) -> Space:
    """Each layer with one of eight shares of zeros."""
    return make_space([[text.format(layer) for text in SHARES] for layer in range(layers)], ["torch", "onnxruntime"])


def judge(recipe: Recipe) -> tuple[float, float]:
    """Two figures with a front of their own: the later a layer, the less its zeros cost; one runtime is slower."""
    shares = [step["sparsity"] for step in recipe.steps]
    return -sum(shares) + 0.5 * (recipe.runtime == "onnxruntime"), sum(share / (1 + place) for place, share in enumerate(shares))


def is_beaten(point, points) -> bool:
    return any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)


def test_what_is_drawn_is_nearer_to_the_front_than_what_is_picked_blindly():
    space = space_of()
    everything = [judge(recipe) for recipe in space]
    assert len(everything) == 8**LAYERS * 2
    found = [judge(recipe) for recipe in draw(space, judge, drawn=1_000, kept=60)]

    def behind(point) -> float:
        """How many of all beat it, as a share."""
        return sum(is_beaten(point, [other]) for other in everything) / len(everything)

    blind = everything[:: len(everything) // 60]
    assert sum(map(behind, found)) / len(found) < 0.01 < sum(map(behind, blind)) / len(blind)


def test_the_same_space_gives_the_same_recipes_each_once_and_no_more_than_are_kept():
    space = space_of()
    found = draw(space, judge, drawn=200, kept=20)
    assert found == draw(space, judge, drawn=200, kept=20)
    assert len(found) == len(set(found)) == 20
    assert set(found) <= set(space)


def test_what_cannot_be_done_is_not_drawn_and_recipes_of_the_file_always_are():
    own = make_space([], [], ["quantize(rtn) @ openvino"]).recipes
    space = Space(places=space_of().places, runtimes=("torch", "onnxruntime"), recipes=own)
    found = draw(space, lambda recipe: judge(recipe) if recipe.runtime == "torch" else None, drawn=100, kept=30)
    assert found[0] == own[0]
    assert {recipe.runtime for recipe in found[1:]} == {"torch"}
    with pytest.raises(RecipeError, match=r"^none of 50 combinations that were drawn of the space's 8,192 can be done\.$"):
        draw(space_of(), lambda recipe: None, drawn=50)


def test_without_optuna_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("lighten.choose.sampler.find_spec", lambda name: None)
    said = "the space has 8,192 combinations; more than 2,000 are drawn by Optuna, which is not installed; pip install 'lighten[search]'."
    with pytest.raises(RecipeError, match=f"^{re.escape(said)}$"):
        draw(space_of(), judge)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30), st.integers(1, 30))
def test_fronts_come_in_their_order(values, kept):
    recipes = [parse_recipe(f"prune(magnitude, sparsity=0.{number + 1:03})") for number in range(len(values))]
    points = dict(zip(recipes, values, strict=True))
    found = best_fronts(points, kept)
    assert len(found) == min(kept, len(points))
    assert len(set(found)) == len(found)
    left = set(recipes) - set(found)
    assert not any(is_beaten(points[one], [points[other]]) for one, other in product(found, left))


def test_bits_that_are_left_follow_widths_and_zeros(minilm):
    spec = read_spec(minilm)
    whole = bits_left(spec)
    assert whole == bits_left(apply_recipe(parse_recipe("cast(bfloat16)"), spec))
    halved = bits_left(apply_recipe(parse_recipe("prune(magnitude, sparsity=0.5)"), spec))
    eight, four = (bits_left(apply_recipe(parse_recipe(f"quantize(rtn, bits={bits}, embeddings=true)"), spec)) for bits in (8, 4))
    assert four < eight < whole
    assert eight == pytest.approx(whole / 2, rel=0.02)  # but for scales
    assert eight < halved < whole  # tables keep theirs
