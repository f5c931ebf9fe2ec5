"""A recipe is data, read twice: its forms say the same, what cannot be is refused by name, and predicting is held against doing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import bert_config, config_of, llama_config, save

from lighten.compress.methods import METHODS
from lighten.compress.walk import Checkpoint, compress_weights
from lighten.cost.workload import Workload
from lighten.errors import RecipeError, WorkloadError
from lighten.formats.artifact import Work, write_artifact
from lighten.model import ModelSpec, read_spec
from lighten.model.families import describe
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, WeightFormat
from lighten.recipe import RUNTIMES, STEPS, Recipe, Step, apply_recipe, parse_recipe, read_recipe, size
from lighten.recipe.distill import LEARNING_RATES
from lighten.recipe.estimate import estimate
from lighten.recipe.notes import notes
from lighten.recipe.number_formats import FORMATS, dividing_group
from lighten.recipe.predict import CONTAINER_BYTES, artifact_bytes, compute_dtype
from lighten.recipe.predicted import KINDS
from lighten.recipe.recipe import format_yaml, make_recipe, make_step, parse_yaml
from lighten.recipe.steps import parse_pattern
from lighten.recipe.words import StepKind
from lighten.runtimes import MODULES

CANDIDATES: tuple[Any, ...] = (
    True, False, 1, 2, 3, 4, 8, 16, 32, 0.1, 0.25, 0.5, "row", "layer", "global", "channel", "tensor", "2:4", "1:2", "3:8",
    "fp8", "q4_k", "none", "dynamic", "auto", "even", "sensitivity",
    "70MB", "0.5 GiB", "2,4", "query|q_proj", "", "a.b", "1", "true", "1e3", "nan", " ",
    "lion", "cosine", "bfloat16", "x, y=(z) | w @ torch", "it's", 'say "x"', "line\n",
)  # fmt: skip
"""Values of every kind that an argument may have, awkward ones too; each parameter takes those that it accepts."""


def accepted(kind: StepKind, name: str) -> list[Any]:
    return [value for value in CANDIDATES if kind.parameters[name].accepts(value)]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    verb, method = draw(st.sampled_from(sorted(KINDS)))
    kind, given = KINDS[verb, method], {}
    for name, parameter in kind.parameters.items():
        values = st.sampled_from(accepted(kind, name))
        if parameter.accepts(0.3):
            values |= st.floats(0, 1, exclude_min=True).filter(parameter.accepts)
        if parameter.accepts("some words"):
            values |= st.text().filter(parameter.accepts)
        if draw(st.booleans()):
            given[name] = draw(values)
    assume(refusal(lambda: make_step(verb, method, given)) is None)
    return make_step(verb, method, given)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    runtime = draw(st.sampled_from(sorted(RUNTIMES)))
    device = draw(st.sampled_from([None, "cuda"] if RUNTIMES[runtime].cuda else [None]))
    dtype = draw(st.none() | st.sampled_from(RUNTIMES[runtime].types_on(device)))
    return Recipe(steps=tuple(draw(st.lists(steps(), max_size=3))), runtime=runtime, dtype=dtype, device=device)


def refusal(make: Callable[[], Any]) -> str | None:
    """The text of the refusal, or None where there is none."""
    try:
        make()
    except RecipeError as error:
        return str(error)
    return None


# ---- its forms ----


@given(recipes())
def test_text_and_yaml_say_the_same(made):
    assert parse_recipe(str(made)) == made
    assert parse_yaml(format_yaml(made)) == made
    assert str(parse_yaml(format_yaml(parse_recipe(str(made))))) == str(made)


@given(recipes(), st.data())
def test_a_spoiled_text_is_refused_or_says_what_it_is_taken_for(made, data):
    """No other exception, and nothing of the text that the recipe does not have."""
    text = str(made)
    place = data.draw(st.integers(0, len(text)))
    spoiled = text[:place] + data.draw(st.text("(),=|@\"' 1.a", max_size=2)) + text[place + data.draw(st.integers(0, 2)) :]
    if refusal(lambda: parse_recipe(spoiled)) is None:
        found = parse_recipe(spoiled)
        assert parse_recipe(str(found)) == found
        assert len(found.steps) == len(re.sub(r""""[^"]*"|'[^']*'""", "", spoiled).split("@")[0].split("|")) * bool(found.steps)


WORDS = st.sampled_from(["steps", "runtime", "method", "name", "prune", "magnitude", "sparsity", "torch", "dtype"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@given(JSON | st.builds(lambda step, runtime: {"steps": [step], "runtime": runtime}, JSON, JSON))
def test_any_yaml_is_a_recipe_or_refused(document):
    text = yaml.safe_dump(document)
    if refusal(lambda: parse_yaml(text)) is None:
        assert parse_yaml(format_yaml(parse_yaml(text))) == parse_yaml(text)


@given(st.text())
def test_any_text_is_a_recipe_or_refused(text):
    assert refusal(lambda: parse_recipe(text)) != ""
    assert refusal(lambda: parse_yaml(text)) != ""


def test_defaults_are_not_said_and_nothing_is_an_empty_recipe():
    assert str(parse_recipe("quantize( rtn , bits=8,symmetric=False )")) == "quantize(rtn) @ torch"
    assert str(parse_recipe("")) == "@ torch"
    assert parse_recipe(" @ openvino( dtype = bfloat16 )") == Recipe(runtime="openvino", dtype="bfloat16")
    assert parse_recipe("@ openvino").steps_text == ""


def test_yaml_takes_words_as_people_mean_them():
    """In YAML 1.1, which PyYAML reads by itself, 2:4 is 124 and 1e-3 a text."""
    said = parse_yaml("steps:\n- prune: {method: magnitude, pattern: 2:4}\n- prune: {method: magnitude, threshold: 1e-3}\nruntime: torch")
    assert said == parse_recipe("prune(magnitude, pattern=2:4) | prune(magnitude, threshold=0.001)")


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".txt", ".recipe"])
def test_a_file_says_what_its_text_says(tmp_path, suffix):
    made = parse_recipe("prune(magnitude, sparsity=0.5) | quantize(rtn, bits=4, group_size=16) @ openvino(dtype=bfloat16)")
    file = tmp_path / f"recipe{suffix}"
    file.write_text(format_yaml(made) if suffix.startswith(".y") else f"{made}\n")
    assert read_recipe(str(file)) == read_recipe(str(made)) == made


# ---- what is refused, in words ----

REFUSED = {
    "squeeze(rtn)": "step 'squeeze' does not exist; steps: cast, distill, factorize, prune, quantize, rotate, shrink.",
    "quantize(magic)": "quantize has no method 'magic'; methods: rtn, hqq, gptq, awq, smoothquant, auto, kv, dynamic, static.",
    "prune(2)": "prune has no method '2'; methods: magnitude, wanda, sparsegpt, admm.",
    "quantize(rtn, width=4)":
        "quantize(rtn) has no argument width; arguments: bits, group_size, symmetric, embeddings, targets, format, activations, "
        "symmetric_activations, activation_group_size, tokens.",
    "cast(float16, bits=4)": "cast(float16) has no argument bits; arguments: none.",
    "quantize(rtn, bits=5)": "quantize(rtn): bits=5 is not possible; bits is one of 8, 6, 4, 3, 2.",
    "quantize(rtn, bits=4.0)": "quantize(rtn): bits=4.0 is not possible; bits is one of 8, 6, 4, 3, 2.",
    "quantize(rtn, bits=true)": "quantize(rtn): bits=True is not possible; bits is one of 8, 6, 4, 3, 2.",
    "quantize(dynamic, bits=8.0)": "quantize(dynamic): bits=8.0 is not possible; bits is 8.",
    "quantize(rtn, group_size=0)": "quantize(rtn): group_size=0 is not possible; group_size is a number of columns, channel or tensor.",
    "quantize(rtn, group_size=row)": "quantize(rtn): group_size='row' is not possible; group_size is a number of columns, channel or tensor.",
    "quantize(rtn, symmetric=1)": "quantize(rtn): symmetric=1 is not possible; symmetric is true or false.",
    'quantize(rtn, targets="(")': "quantize(rtn): targets='(' is not possible; targets is a regular expression searched in module",
    "prune(magnitude, sparsity=1)": "prune(magnitude): sparsity=1 is not possible; sparsity is the share of zeros, between 0 and 1.",
    "prune(admm, sparsity=1.0)": "prune(admm): sparsity=1.0 is not possible; sparsity is the share of zeros, between 0 and 1.",
    "prune(magnitude, threshold=0)":
        "prune(magnitude): threshold=0 is not possible; threshold is a positive number; smaller weights become 0.",
    "prune(admm, pattern=2:4, allocation=sensitivity)":
        "prune(admm, pattern=2:4, allocation=sensitivity): allocation=sensitivity gives each layer a sparsity of its own; it goes with "
        "sparsity and scope=layer.",
    "prune(wanda, sparsity=0.5, allocation=sensitivity)":
        "prune(wanda, sparsity=0.5, allocation=sensitivity): allocation=sensitivity gives each layer a sparsity of its own; it goes with "
        "sparsity and scope=layer.",
    "prune(magnitude, sparsity=nan)": "prune(magnitude): sparsity=nan is not possible; sparsity is the share of zeros, between 0 and 1.",
    "prune(magnitude, threshold=-1)": "prune(magnitude): threshold=-1 is not possible; threshold is a positive number; smaller weights become 0.",
    "prune(magnitude, threshold=1e39)": "prune(magnitude): threshold=1e+39 is not possible; threshold is a positive number;",
    "prune(magnitude, pattern=4:2)": "prune(magnitude): pattern='4:2' is not possible; pattern is n:m such as 2:4, n of each m neighbours stay.",
    "prune(magnitude, sparsity=0.5, scope=tensor)": "prune(magnitude): scope='tensor' is not possible; scope is one of row, layer, global.",
    "prune(magnitude)": "prune(magnitude): give exactly one of sparsity, threshold and pattern; given: none.",
    "prune(magnitude, sparsity=0.5, pattern=2:4)":
        "prune(magnitude, sparsity=0.5, pattern=2:4): give exactly one of sparsity, threshold and pattern; given: sparsity, pattern.",
    "prune(magnitude, pattern=2:4, scope=row)":
        "prune(magnitude, pattern=2:4, scope=row): scope=row has no effect with pattern; it says over what a sparsity is counted.",
    "quantize(gptq, bits=4, format=fp8)": "quantize(gptq): bits=4 does not go with format=fp8, which has bits=8; leave it out.",
    "quantize(rtn, symmetric=false, format=nvfp4)":
        "quantize(rtn): symmetric=False does not go with format=nvfp4, which has symmetric=true; leave it out.",
    "quantize(gptq, group_size=64, activations=dynamic)":
        "quantize(gptq): group_size=64 does not go with activations=dynamic, which has group_size=channel; leave it out.",
    "quantize(rtn, activations=static, activation_group_size=64)":
        "quantize(rtn, activations=static, activation_group_size=64): activation_group_size is said of activations=dynamic.",
    "quantize(rtn, symmetric_activations=true)":
        "quantize(rtn, symmetric_activations=true): symmetric_activations is said of int8 activations=dynamic; all others are symmetric.",
    "quantize(smoothquant, activations=static, symmetric_activations=false)":
        "quantize(smoothquant, activations=static, symmetric_activations=false): symmetric_activations is said of int8 activations=dynamic; "
        "all others are symmetric.",
    "quantize(gptq, search=false, format=q4_k)":
        "quantize(gptq, format=q4_k, search=false): search=false goes with format=int; scales of q4_k are always searched.",
    "quantize(gptq, damping=0)": "quantize(gptq): damping=0 is not possible; damping is auto, or a number above 0 up to 10.",
    "quantize(awq, format=mxfp4, activations=dynamic)":
        "quantize(awq, format=mxfp4, activations=dynamic): activations=dynamic go with 8-bit weights; use format=int or format=fp8.",
    "quantize(rtn, tokens=64)":
        "quantize(rtn, tokens=64): tokens=64 has no effect; rounding to nearest needs calibration for activations=static alone.",
    "quantize(auto)": "quantize(auto): give exactly one of size<= and bits<=; given: none.",
    "quantize(auto, size<=1MB, bits<=3)": "quantize(auto, size<=1MB, bits<=3): give exactly one of size<= and bits<=; given: size, bits.",
    "quantize(auto, size=70MB)": "quantize(auto): size is written size<=value.",
    "quantize(auto, size<=70)": "quantize(auto): size=70 is not possible; size is a size such as 70MB, written size<=70MB.",
    "quantize(rtn, bits<=4)": "quantize(rtn): bits is written bits=value.",
    'quantize(auto, bits<=3, widths="3,5")': "quantize(auto): widths='3,5' is not possible; widths is widths to choose from, of 8, 6, 4, 3, 2.",
    "quantize(smoothquant, alpha=2)": "quantize(smoothquant): alpha=2 is not possible; alpha is a number from 0 to 1, or auto.",
    "distill(scales, steps=0)": "distill(scales): steps=0 is not possible; steps is a number of steps.",
    "quantize(rtn) @ tpu": "runtime 'tpu' does not exist; runtimes: torch, torch-compile, onnxruntime, openvino, llama.cpp, ctranslate2.",
    "quantize(rtn) @": "runtime '' is not of the form name(argument, key=value).",
    "@ onnxruntime(device=cuda)": "runtime onnxruntime does not run on device=cuda here; these do: torch, torch-compile.",
    "@ torch(device=tpu)": "runtime torch: device='tpu' is not possible; devices: cpu, cuda.",
    "@ torch(device=cuda, dtype=int8)":
        "runtime torch does not compute in 'int8' on device=cuda; it computes in float32, bfloat16, float16.",
    "@ torch(threads=2)": "runtime torch: no option threads; options: dtype, device, batching, speculate, draft_tokens.",
    "@ torch(bfloat16)": "runtime 'torch(bfloat16)': options are written name=value.",
    "@ torch(dtype=float32, dtype=bfloat16)": "runtime 'torch(dtype=float32, dtype=bfloat16)' says an option twice.",
    "@ torch(dtype=float16)": "runtime torch does not compute in 'float16'; it computes in float32, bfloat16.",
    "@ onnxruntime(dtype=bfloat16)": "runtime onnxruntime does not compute in 'bfloat16'; it computes in float32.",
    "@ torch @ openvino": "recipe '@ torch @ openvino' names more than one runtime; write steps @ runtime.",
    "quantize": "step 'quantize' names no method; write verb(method, key=value).",
    "quantize(bits=4)": "step 'quantize(bits=4)' names no method; write verb(method, key=value).",
    "quantize(rtn, 4)": "step 'quantize(rtn, 4)': after the method, arguments are written key=value.",
    "quantize(rtn, bits=4, bits=8)": "step 'quantize(rtn, bits=4, bits=8)' says an argument twice.",
    "quantize(rtn) |": "step '' is not of the form name(argument, key=value).",
    "quantize(rtn": "step 'quantize(rtn' is not of the form name(argument, key=value).",
    "quantize(rtn, targets=a|b)": "step 'quantize(rtn, targets=a' is not of the form name(argument, key=value).",
    "quantize(rtn, targets=a b)": "value 'a b': quote what is not a plain word or number.",
    'quantize(rtn, bits=4)" prune(magnitude, sparsity=0.5)':
        "recipe 'quantize(rtn, bits=4)\" prune(magnitude, sparsity=0.5)': the quote \" is not closed.",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_a_recipe_that_cannot_be_is_refused_in_words(text):
    with pytest.raises(RecipeError, match=f"^{re.escape(REFUSED[text])}"):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 4", "recipe: a YAML recipe has `steps` (a list) and `runtime`, nothing else."),
        ("- prune", "recipe: a YAML recipe has `steps` (a list) and `runtime`, nothing else."),
        ("step: []", "recipe: a YAML recipe has `steps` (a list) and `runtime`, nothing else."),
        ("steps: [prune]", "recipe: step 'prune' is not of the form `verb: {method: name, key: value}`."),
        ("steps: [{prune: {sparsity: 0.5}}]", "recipe: step {'prune': {'sparsity': 0.5}} is not of the form `verb: {method: name, key: value}`."),
        ("steps: [{prune: {method: magnitude, sparsity: 0.5, sparsity: 0.6}}]", "recipe: not YAML (sparsity is said twice)."),
        ("steps: [{quantize: {method: rtn, group_size: [1]}}]", "quantize(rtn): group_size=[1] is not possible; group_size is a number of columns,"),
        ("steps: [{quantize: {method: rtn, bits: '4'}}]", "quantize(rtn): bits='4' is not possible; bits is one of 8, 6, 4, 3, 2."),
        ("runtime: {name: torch, threads: 2}", "runtime torch: no option threads; options: dtype, device, batching, speculate, draft_tokens."),
        ("steps: [", "recipe: not YAML (while parsing a flow node)."),
    ],
)
def test_a_yaml_recipe_that_cannot_be_is_refused_in_words(text, message):
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}"):
        parse_yaml(text)


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"^recipe file .*none\.yaml: .*No such file"):
        read_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"^recipe file .*binary\.txt: .*can't decode"):
        read_recipe(str(tmp_path / "binary.txt"))


# ---- what a model or a runtime cannot take ----

LAYER = "encoder.layer.0.attention.self.query"
IMPOSSIBLE = {
    "quantize(rtn) | quantize(rtn, bits=4)":
        f"quantize(rtn): {LAYER} is already quantized to 8 bits; put this step before quantize, or narrow its targets.",
    "quantize(dynamic) | quantize(static)":
        f"quantize(static): {LAYER} is already quantized to 8 bits; put this step before quantize, or narrow its targets.",
    "quantize(rtn) | prune(magnitude, sparsity=0.5)":
        f"prune(magnitude): {LAYER} is already quantized to 8 bits; put this step before quantize, or narrow its targets.",
    "quantize(rtn) | cast(float16)":
        f"cast(float16): {LAYER} is already quantized to 8 bits; put this step before quantize, or narrow its targets.",
    "quantize(kv)": "quantize(kv): BertModel has no causal attention, and so no cache of keys and values.",
    "distill(scales)": "distill(scales) tunes quantized weights and BertModel has none; put it after quantize.",
    "quantize(rtn) | rotate(hadamard)":
        f"rotate(hadamard): {LAYER} is already quantized to 8 bits; put this step before quantize, or narrow its targets.",
    "quantize(gptq, format=q4_k) @ torch": f"runtime torch cannot carry {LAYER} as ggml's Q5_0; it carries ",
    "quantize(gptq, format=nvfp4) @ openvino": f"runtime openvino cannot carry {LAYER} as 4-bit floats (e2m1) by groups of 16; it carries ",
    "prune(magnitude, pattern=2:5)":
        f"pattern=2:5: 5 does not divide the 32 columns of {LAYER}.",
    "quantize(rtn, targets=nothing)":
        "targets='nothing' matches no weight of BertModel that this step changes.",
    "quantize(rtn, bits=3) @ onnxruntime":
        f"runtime onnxruntime cannot carry {LAYER} as 3-bit codes by channel; it carries float32 weights, and whole-number codes ",
    "cast(bfloat16) @ onnxruntime":
        "runtime onnxruntime cannot carry embeddings.word_embeddings as bfloat16; it carries float32 weights, and whole-number codes ",
    "quantize(rtn, symmetric=true) @ ctranslate2":
        "runtime ctranslate2 has all weights in 8 bits or none, tables too, and embeddings.word_embeddings is float32; say embeddings=true.",
    "quantize(rtn, symmetric=true, embeddings=true) @ ctranslate2":
        f"runtime ctranslate2 rounds the activations of 8-bit weights, {LAYER}'s too; say activations=dynamic, symmetric_activations=true.",
    "quantize(rtn, bits=4, symmetric=true) @ ctranslate2": f"runtime ctranslate2 cannot carry {LAYER} as 4-bit codes by channel; it carries float32 ",
    "cast(bfloat16) @ openvino":
        "runtime openvino cannot carry embeddings.word_embeddings as bfloat16; it carries float32 and float16 weights, and ",
    "quantize(rtn, bits=3) @ openvino":
        f"runtime openvino cannot carry {LAYER} as 3-bit codes by channel; it carries float32 and float16 weights, and ",
    "quantize(rtn, group_size=16) @ openvino":
        f"runtime openvino cannot carry {LAYER} as 8-bit codes by groups of 16; it carries float32 and float16 weights, and ",
    "quantize(rtn, bits=4, group_size=tensor) @ openvino":
        f"runtime openvino cannot carry {LAYER} as 4-bit codes by tensor; it carries float32 and float16 weights, and ",
    "quantize(static) @ torch":
        "runtime torch cannot carry embeddings.word_embeddings as 8-bit codes by channel with static int8 activations; it carries float32 and ",
    "quantize(dynamic) @ torch-compile":
        f"runtime torch-compile cannot carry {LAYER} as 8-bit codes by channel with dynamic int8 activations; it carries float32 and ",
}  # fmt: skip


def spec_of(architecture: str, dtype: str = "float32") -> ModelSpec:
    config = config_of(architecture)
    raw = config.to_dict()
    typed = (replace(p, weight=WeightFormat(dtype=dtype)) if isinstance(p, Linear | Embedding) else p for p in describe(raw, architecture))
    return ModelSpec(
        name=architecture, family=config.model_type, architecture=architecture, source="", dtype=dtype, config=raw, parts=tuple(typed),
    )  # fmt: skip


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_what_the_model_or_the_runtime_cannot_take_is_refused_in_words(text):
    with pytest.raises(RecipeError, match=f"^{re.escape(IMPOSSIBLE[text])}"):
        apply_recipe(parse_recipe(text), spec_of("BertModel"))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("architecture", ["BertModel", "LlamaForCausalLM"])
def test_every_step_on_every_runtime_is_carried_or_refused(runtime, architecture):
    spec = spec_of(architecture)
    for (verb, method), kind in STEPS.items():
        for options in variants(kind):
            said = refusal(lambda: apply_recipe(Recipe(steps=(make_step(verb, method, options),), runtime=runtime), spec))  # noqa: B023 - called now
            by_runtime = rf"runtime {runtime} (cannot carry \S+ as .*; it carries .*|has a cache of its own; .*"
            by_runtime += r"|has all weights in 8 bits or none, .*|rounds the activations of 8-bit weights, .*)\.$"
            own = f"cannot be made so small|put it after quantize|no causal attention|not divide heads|{NO_ANSWERS}"
            own += "|cannot go alone|leaves all|would stay|no experts|is more than the"
            refusals = rf"{by_runtime}|{verb}\({method}\b.*({own})"
            assert said is None or re.match(refusals, said)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_of_any_type_runs_everywhere_but_a_cast_is_taken_at_its_word(runtime, dtype):
    spec = spec_of("BertModel", dtype)
    changed = apply_recipe(Recipe(runtime=runtime), spec)
    kept = dtype if dtype in RUNTIMES[runtime].stored else "float32"
    assert {part.weight.dtype for part in changed.parts if isinstance(part, Linear | Embedding)} == {changed.dtype} == {kept}
    said = refusal(lambda: apply_recipe(parse_recipe(f"cast({dtype}) @ {runtime}"), spec))
    assert (said is None) == (dtype in RUNTIMES[runtime].stored)


def test_the_computing_type_is_what_is_said_or_the_weights_or_the_runtimes_own():
    spec = spec_of("BertModel")
    for text, dtype in {
        "@ torch": "float32", "@ torch(dtype=bfloat16)": "bfloat16", "cast(bfloat16) @ torch": "bfloat16", "cast(float16) @ torch": "float32",
        "cast(bfloat16) @ torch(dtype=float32)": "float32", "cast(float16) @ openvino": "float32",
    }.items():  # fmt: skip
        made = parse_recipe(text)
        assert compute_dtype(made, apply_recipe(made, spec)) == dtype


# ---- contracts over the registries ----


NO_ANSWERS = "gives logits and no embeddings|has no head that gives logits"
"""What distill says of models that answer in the other way."""
FEW: dict[str, tuple[Any, ...]] = {
    "sparsity": (0.25, 0.5), "threshold": (0.1,), "pattern": ("2:4", "3:8"), "scope": ("row", "layer", "global"),
    "bits": (8, 6, 4, 3, 2), "group_size": (16, "channel", "tensor"), "symmetric": (False, True), "embeddings": (False, True),
    "targets": ("query|q_proj",), "format": FORMATS[1:], "activations": ("dynamic", "static"), "tokens": (4096,),
    "symmetric_activations": (True, False), "activation_group_size": (96,), "self_tokens": (0,), "alpha": (0.25, "auto"),
    "size": ("1MB", 64), "widths": ("3,4,8",), "steps": (3,),
    "damping": (0.01, "auto"), "refine": (0, 2), "search": (False, True), "learning_rate": (0.01,), "ratio": (0.5, 0.9),
    "keep": (1, 300), "by": ("even", "last"), "allocation": ("sensitivity",),
    "train_tokens": (64,), "minutes": (0.01,), "optimizer": tuple(LEARNING_RATES), "schedule": ("cosine",), "batch_tokens": (48,), "seq_len": (12,),
    "dtype": ("bfloat16",), "recompute": (True,), "parallel": ("none",), "seed": (1,), "temperature": (2.0,), "top_k": (8,), "hidden": (0.5,),
    "span_tokens": (0, 96), "labels": (1,), "attention": (0.5,), "relational": (0.5,), "rank": (4,), "energy": (0.9,), "weighted": (True, False),
}  # fmt: skip
"""A few values of each parameter of the registry."""
COMBINED = ("sparsity", "threshold", "pattern", "scope", "bits", "group_size", "symmetric", "embeddings")
"""Parameters whose values are all combined; the others are said one at a time, for they multiply nothing."""


def variants(kind: StepKind) -> Iterator[dict[str, Any]]:
    """All combinations of three values each of `COMBINED` that a method without calibration takes, an optional one also left out; of another
    method, and of all other values, each alone."""
    few = {name: list(filter(p.accepts, FEW[name])) for name, p in kind.parameters.items()}
    optional = {name for name, p in kind.parameters.items() if p.default is None}
    combined = {name: [None] * (name in optional) + values[:3] for name, values in few.items() if name in COMBINED and not kind.calibrated}
    products = [{k: v for k, v in zip(combined, values, strict=True) if v is not None} for values in itertools.product(*combined.values())]
    found = [options for options in products if is_possible(kind, options)]
    yield from found
    for name in few:
        few[name] = few[name][3:] if name in combined else few[name]
        if not few[name]:
            continue
        bases = [found[-1]] if name == "targets" and found else [{}, *found[:1], {"size": "1MB"}, {"ratio": 0.5}, {"rank": 4}]
        base = next((options for options in bases if is_possible(kind, options | {name: few[name][0]})), {})
        yield from (base | {name: value} for value in few[name] if is_possible(kind, base | {name: value}))


def is_possible(kind: StepKind, options: dict[str, Any]) -> bool:
    verb, method = next(key for key, known in KINDS.items() if known is kind)
    return refusal(lambda: make_step(verb, method, options)) is None


def test_a_table_of_few_rows_is_left_as_it_is():
    spec = spec_of("BertModel")
    changed = apply_recipe(parse_recipe("quantize(rtn, embeddings=true)"), spec)
    bits = {part.name.rpartition(".")[2]: part.weight.bits for part in changed.parts if isinstance(part, Embedding)}
    assert bits == {"word_embeddings": 8, "position_embeddings": 8, "token_type_embeddings": None}
    with pytest.raises(RecipeError, match="'token_type' matches no weight of BertModel that this step changes"):
        apply_recipe(parse_recipe("quantize(rtn, embeddings=true, targets=token_type)"), spec)


def test_a_step_is_predicted_and_done_under_the_same_name():
    assert STEPS.keys() == METHODS.keys()


def test_every_runtime_has_its_row_in_every_table():
    assert RUNTIMES.keys() == MODULES.keys()
    assert CONTAINER_BYTES.keys() == RUNTIMES.keys() - {"torch", "torch-compile"}, "a folder's description is counted"
    assert size._PARTS.keys() == RUNTIMES.keys()


def test_every_parameter_can_be_said_and_every_default_is_possible():
    for kind in KINDS.values():
        for name, parameter in kind.parameters.items():
            assert accepted(kind, name), f"add a value that {name} accepts to CANDIDATES"
            assert any(parameter.accepts(value) for value in FEW[name]), f"add a value that {name} accepts to FEW"
            assert parameter.default is None or parameter.accepts(parameter.default)


def test_every_default_of_a_runtime_is_possible():
    for name, kind in RUNTIMES.items():
        assert kind.dtypes
        assert "float32" in kind.stored, "a checkpoint of another type is widened to it"
        assert {make_recipe((), name, {"dtype": dtype}).dtype for dtype in kind.dtypes} == set(kind.dtypes)


# ---- two readings: what is predicted is what is done ----


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Wide enough that the weights, not their description, make the size."""
    folder, wide = tmp_path_factory.mktemp("models"), {"hidden_size": 96, "intermediate_size": 192}
    return {
        "bert": save(bert_config(**wide), folder / "bert"),
        "llama": save(llama_config(**wide), folder / "llama"),
        "untied": save(llama_config(**wide, tie_word_embeddings=False, attention_bias=True, dtype="bfloat16"), folder / "untied"),
    }


BEFORE = dict.fromkeys([("distill", "scales"), ("distill", "qat"), ("factorize", "correction")], "quantize(rtn, bits=4, group_size=16)")
"""What a step needs before it."""


def recipe_of(step: Step) -> Recipe:
    before = parse_recipe(BEFORE.get((step.verb, step.method), ""))
    return replace(before, steps=(*before.steps, step))


def done_by_torch() -> Iterator[tuple[str, Step]]:
    """Steps that are carried out here, each on a model or on all three: where tables are quantized; of calibrated methods every fourth variant."""
    every = ("bert", "llama", "untied")
    for (verb, method), kind in STEPS.items():
        if method in ("dynamic", "static"):
            continue  # done by the runtimes: tests/test_formats.py
        for place, options in enumerate(variants(kind)):
            step = make_step(verb, method, options)
            if not kind.calibrated or place % 4 == 0:
                yield from ((model, step) for model in (every if options.get("embeddings") else every[place % 3 :][:1]))


BY_TORCH = [pytest.param(model, step, id=f"{model}-{step}") for model, step in done_by_torch()]


def windows(tokens: int) -> list[dict[str, Any]]:
    """A few short sequences, however many are asked for."""
    return [{"input_ids": np.random.default_rng(seed).integers(5, 300, (2, 24))} for seed in range(4)]


def formats(spec: ModelSpec) -> dict[str, WeightFormat]:
    """How each weight is stored. Of zeros a file says how many, and not in which pattern; codes have no element type."""
    weights = {part.name: replace(part.weight, sparsity=0.0, pattern=None) for part in spec.parts if isinstance(part, Linear | Embedding)}
    weights = {name: replace(weight, dtype="") if weight.bits else weight for name, weight in weights.items()}
    # a file's static scales are read as a layout, which counts them
    return {name: replace(weight, layout=None) if weight.activations == "static" else weight for name, weight in weights.items()}


@pytest.mark.parametrize(("model", "step"), BY_TORCH)
def test_what_a_step_does_is_what_it_predicts(model, step, models, tmp_path, monkeypatch):
    """Format and sparsity of each weight, and the bytes on disk; however long it is trained."""
    monkeypatch.setattr("lighten.recipe.distill.STEPS_WITHOUT_BUDGET", 4)
    made, spec = recipe_of(step), read_spec(models[model])
    if (said := refusal(lambda: apply_recipe(made, spec))) is not None:
        known = "runtime torch cannot carry|no causal attention|does not divide heads|cannot be made so small|has no experts|cannot go alone"
        assert re.search(f"{known}|{NO_ANSWERS}", said), said
        return
    predicted = apply_recipe(made, spec)
    try:
        artifact = write_artifact(models[model], made, tmp_path / "out", calibration=list, work=Work(windows=windows))
    except RecipeError as error:
        if step.method == "vocab":
            assert re.search("tokens are to stay, and .* must", str(error)), error  # noqa: PT017 - told from the tokenizer: tests/test_vocab.py
        else:
            assert (model, step.verb) == ("bert", "rotate"), error  # noqa: PT017 - told from the traced graph: tests/test_hadamard.py
        return
    written = read_spec(artifact.folder)
    if step["energy"]:  # whose ranks follow from the weights: tests/test_factorize.py
        assert artifact.size_bytes < 1.02 * artifact_bytes(made, predicted)
        return
    counted = step["threshold"] is not None or step["scope"] == "global" or step["allocation"] == "sensitivity"
    if counted:
        assert {name: replace(w, kept=None) for name, w in formats(written).items()} == {
            name: replace(w, kept=None) for name, w in formats(predicted).items()
        }
    elif step.method != "auto":  # whose widths are what was measured: tests/test_allocate.py
        assert formats(written) == formats(predicted)
    assert written.dtype == predicted.dtype
    assert artifact.predicted_size_bytes == artifact_bytes(made, predicted)
    near = 0.02 if step.method != "auto" else 0.2
    if step["threshold"] is None:
        assert artifact_bytes(made, predicted) == pytest.approx(artifact.size_bytes, rel=near)
    else:
        assert artifact.size_bytes <= artifact_bytes(made, predicted) * (1 + near), "how many zeros there are is not known before"
    if step.verb == "prune":
        check_zeros(step, artifact.folder, spec, predicted)


def check_zeros(step: Step, artifact: Path, spec: ModelSpec, predicted: ModelSpec) -> None:
    layers = json.loads((artifact / "lighten.json").read_text())["layers"]
    reports = {layer["name"]: layer["sparsity"] for layer in layers}
    parts = {f"{part.name}.weight": part for part in predicted.parts if isinstance(part, Linear | Embedding) and part.weight.sparsity}
    if "threshold" in dict(step.arguments):
        assert not parts, "how many zeros a threshold gives is not known before"
        return
    assert reports.keys() == parts.keys()
    count = {name: part.in_features * part.out_features for name, part in parts.items() if isinstance(part, Linear)}
    if step["scope"] == "global":
        zeros = sum(round(reports[name] * size) for name, size in count.items())
        ties = 0.0 if spec.dtype == "float32" else 0.01  # bfloat16 has 128 numbers between powers of 2: equal weights are pruned all or none
        assert zeros == pytest.approx(step["sparsity"] * sum(count.values()), abs=1, rel=ties)
    else:
        assert reports == pytest.approx({name: part.weight.sparsity for name, part in parts.items()})


def test_several_steps_are_done_in_their_order(models, tmp_path):
    text = "prune(magnitude, pattern=2:4) | cast(bfloat16) | quantize(rtn, bits=4, group_size=16, targets=mlp) | quantize(rtn, targets=self_attn)"
    made, spec = parse_recipe(text), read_spec(models["llama"])
    predicted = apply_recipe(made, spec)
    artifact = write_artifact(models["llama"], made, tmp_path / "out", calibration=list)
    assert formats(read_spec(artifact.folder)) == formats(predicted)
    found = formats(predicted)
    assert (found["model.layers.0.mlp.up_proj"].bits, found["model.layers.0.mlp.up_proj"].group_size) == (4, 16)
    assert (found["model.layers.1.self_attn.q_proj"].bits, found["model.layers.1.self_attn.q_proj"].group_size) == (8, PER_CHANNEL)
    assert (found["lm_head"].bits, found["lm_head"].dtype) == (None, "bfloat16")
    reports = [report for _, _, report in compress_weights(Checkpoint(models["llama"]), spec, made) if report and report.bits]
    assert len(reports) == 2 * 7
    assert all(report.sparsity >= 0.5 for report in reports), "zeros stay zeros through the cast and on the grid"


@given(st.integers(1, 400), st.integers(1, 300))
def test_a_group_that_does_not_divide_gives_way_to_the_best_that_does(columns, wanted):
    found = dividing_group(columns, wanted)
    smaller = [size for size in range(1, min(columns, wanted) + 1) if columns % size == 0]
    assert found in smaller
    assert found == wanted or columns % wanted
    if found != wanted:
        rank = {size: next(multiple for multiple in (32, 16, 8, 1) if size % multiple == 0) for size in smaller}
        assert (rank[found], found) == max((rank[size], size) for size in smaller)


def test_what_is_not_done_to_the_letter_is_said():
    spec, plain = spec_of("LlamaForCausalLM"), "model.layers.0.self_attn.q_proj"
    assert notes(parse_recipe("quantize(gptq, group_size=16)"), spec) == []
    assert notes(parse_recipe("quantize(gptq, targets=q_proj)"), spec) == [
        f"group_size=128 does not divide the 32 columns of {plain} and 1 other, which get groups of 32."
    ]
    assert notes(parse_recipe("quantize(rtn, format=q4_k, targets=layers.0.self_attn.q_proj) @ llama.cpp"), spec) == [
        f"blocks of 256 of format=q4_k do not divide the 32 columns of {plain}, which gets ggml's Q5_0."
    ]
    (inputs,) = notes(parse_recipe("quantize(rtn, activations=dynamic, activation_group_size=48, targets=layers.0.self_attn.q_proj)"), spec)
    assert "activation_group_size=48 does not divide the" in inputs
    assert "which gets inputs in groups of" in inputs
    (widths,) = notes(parse_recipe("quantize(auto, bits<=4, group_size=16)"), spec)
    assert widths.startswith("quantize(auto, bits<=4, group_size=16): which weight gets which width is measured")
    (untied,) = notes(parse_recipe("rotate(hadamard)"), spec)
    assert untied == "rotate(hadamard): lm_head becomes a weight of its own, for the last norm's weight is folded into it alone."


def test_a_rotated_model_stores_its_head():
    spec = spec_of("LlamaForCausalLM")
    rotated = apply_recipe(parse_recipe("rotate(hadamard)"), spec)
    assert rotated.total_parameters - spec.total_parameters == 320 * 32, "vocabulary × width of tiny_models"


def test_a_cache_of_codes_is_what_the_workload_keeps():
    assert parse_recipe("quantize(kv, bits=4)").kv_dtype == "int4"
    assert parse_recipe("quantize(rtn)").kv_dtype is None
    spec, workload = spec_of("LlamaForCausalLM"), Workload(phase="decode", batch_size=1, seq_len=64, new_tokens=8)
    whole = estimate(spec, workload).memory.kv_cache
    assert estimate(spec, workload, recipe=parse_recipe("quantize(kv)")).memory.kv_cache * 4 == whole, "int8 of float32"
    with pytest.raises(WorkloadError, match=r"^kv_dtype=float16 and the recipe's int8 are two types of one cache; leave kv_dtype out\.$"):
        estimate(spec, replace(workload, kv_dtype="float16"), recipe=parse_recipe("quantize(kv)"))


@pytest.mark.parametrize("word", FORMATS[1:])
def test_a_format_fixes_width_group_and_symmetry(word):
    step = parse_recipe(f"quantize(rtn, format={word})").steps[0]
    said = {name: step[name] for name in ("bits", "group_size", "symmetric")}
    assert make_step("quantize", "rtn", {"format": word, **said}) == step, "saying the same is no contradiction"
    assert str(step) == f"quantize(rtn, format={word})"


def test_static_activations_need_calibration_whatever_the_method():
    assert [parse_recipe(f"quantize(rtn, activations={how})").steps[0].calibrated for how in ("none", "dynamic", "static")] == [False, False, True]
    assert parse_recipe("quantize(gptq)").steps[0].calibrated


def test_words_of_a_step_are_read_as_they_are_said():
    assert parse_pattern("2:4") == (2, 4)
    spec = apply_recipe(parse_recipe("quantize(rtn, group_size=tensor, symmetric=true, embeddings=true)"), spec_of("LlamaForCausalLM"))
    weights = [part.weight for part in spec.parts if isinstance(part, Linear | Embedding)]
    assert {(weight.bits, weight.group_size, weight.symmetric) for weight in weights} == {(8, PER_TENSOR, True)}, "the tied head follows its table"
