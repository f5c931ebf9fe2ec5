"""The recipes that `choose` searches: what a file spans, what is refused, and that the usual spaces hold what their families can do."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.choose.space import MOST, Space, default_space, make_space, read_space, spell_out
from lighten.errors import RecipeError
from lighten.model import read_spec
from lighten.recipe import apply_recipe, parse_recipe

places = st.lists(
    st.lists(st.sampled_from(["", "quantize(rtn, bits=8)", "cast(float16)", "prune(magnitude, sparsity=0.5)"]), min_size=1, max_size=3), max_size=3
)
runtimes = st.lists(st.sampled_from(["torch", "openvino(dtype=bfloat16)", "onnxruntime"]), min_size=1, max_size=3)


@given(places, runtimes)
def test_every_combination_is_there_as_often_as_it_is_spanned(places, runtimes):
    space = make_space(places, runtimes)
    found = list(space)
    assert len(found) == space.combinations == prod(map(len, places)) * len(runtimes)
    assert {recipe.runtime_text for recipe in found} == set(runtimes)
    for recipe in found:
        assert len(recipe.steps) <= len(places)
        assert parse_recipe(str(recipe)) == recipe


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1, max_size=3))
def test_braces_are_spelled_out_in_every_combination(choices):
    text = "-".join("{" + "|".join(each) + "}" for each in choices)
    found = spell_out(text)
    assert len(found) == prod(map(len, choices))
    assert all(one in each for spelled in found for one, each in zip(spelled.split("-"), choices, strict=True))


def test_a_file_says_places_runtimes_and_recipes(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        'places:\n  - ["", "prune(magnitude, sparsity={0.3|0.5})"]\n  - ["quantize(rtn, bits=8)"]\n'
        'runtimes: [torch, openvino]\nrecipes: ["@ torch-compile"]\n'
    )
    assert [str(recipe) for recipe in read_space(path)] == [
        "@ torch-compile", "quantize(rtn) @ torch", "quantize(rtn) @ openvino", "prune(magnitude, sparsity=0.3) | quantize(rtn) @ torch",
        "prune(magnitude, sparsity=0.3) | quantize(rtn) @ openvino", "prune(magnitude, sparsity=0.5) | quantize(rtn) @ torch",
        "prune(magnitude, sparsity=0.5) | quantize(rtn) @ openvino",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it has `places`, `runtimes` and `recipes`, nothing else"),
        ("[1, 2]", "it has `places`, `runtimes` and `recipes`, nothing else"),
        ("plaices: []", "it has `places`, `runtimes` and `recipes`, nothing else"),
        ("places: [torch]\nruntimes: [torch]", "places is a list of lists"),
        ("places: [[]]\nruntimes: [torch]", "places is a list of lists"),
        ("places: [[3]]\nruntimes: [torch]", "places is a list of lists"),
        ("runtimes: torch", "places is a list of lists"),
        ("places: [['']]", "no runtime to run on"),
        ("places: [['quantize(magic)']]\nruntimes: [torch]", "quantize has no method 'magic'"),
        ("places: [['@ openvino']]\nruntimes: [torch]", "names a runtime"),
        ("runtimes: [tensorrt]", "runtime 'tensorrt' does not exist"),
        ("recipes: ['quantize(']", "is not of the form"),
        ("places: {", "not YAML"),
        ("places: &a [*a]\nruntimes: [torch]", "places is a list of lists"),
    ],
)  # fmt: skip
def test_what_spans_nothing_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "space.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as found:
        read_space(path)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe\x00")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, make):
    make(tmp_path / "space.yaml")
    with pytest.raises(RecipeError, match=r"^space .*space\.yaml: "):
        read_space(tmp_path / "space.yaml")


def test_more_combinations_than_anyone_means_are_refused_before_they_are_made():
    many = "quantize(rtn, bits={" + "|".join(["8"] * 100) + "})"
    with pytest.raises(RecipeError, match=f"10,000,000,000 combinations; {MOST:,} are the most"):
        make_space([[many]] * 5, ["torch"])


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama"])
def test_the_usual_space_has_what_the_family_can_do_on_every_runtime(name, request):
    spec = read_spec(request.getfixturevalue(name))
    able = set()
    for recipe in default_space(spec):
        try:
            apply_recipe(recipe, spec)
        except RecipeError:
            continue
        able.add(recipe)
    runtimes = {recipe.runtime for recipe in able}
    assert runtimes >= {"torch", "onnxruntime", "openvino", "ctranslate2"}
    assert {"int8", "int4"} <= {f"int{step['bits']}" for recipe in able for step in recipe.steps if step["bits"]}


def test_a_model_whose_rows_no_group_divides_is_searched_without_groups(tmp_path):
    from tiny_models import bert_config, save

    spec = read_spec(save(bert_config(hidden_size=36, intermediate_size=36), tmp_path / "odd"))
    assert not any("group_size" in str(recipe) for recipe in default_space(spec))


def test_an_empty_space_has_nothing():
    assert list(Space()) == []
