"""The recipes that `choose` searches: alternatives at each place and runtimes, in every combination.

places:                       # one alternative of each place; "" leaves the place out; {a|b} stands for two alternatives
  - ["", "prune(magnitude, sparsity={0.3|0.5})"]
  - ["quantize(rtn, embeddings=true)", "quantize(gptq, bits=4, group_size={32|64})"]
runtimes: ["torch", "openvino(dtype=bfloat16)"]
recipes: ["@ torch-compile"]  # these too, as they are
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lighten.errors import RecipeError
from lighten.model.spec import Linear, ModelSpec
from lighten.recipe import Recipe, parse_recipe

MOST = 10**9
"""Combinations that a space may have: more are a slip of a brace."""
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched.

    Attributes:
        places: alternatives at each place, as text; the first place's step is done first.
        runtimes: on which every combination runs.
        recipes: whole recipes beside the combinations.
    """

    places: tuple[tuple[str, ...], ...] = ()
    runtimes: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = ()

    @property
    def combinations(self) -> int:
        return len(self.recipes) + math.prod(map(len, self.places)) * len(self.runtimes)

    def __iter__(self) -> Iterator[Recipe]:
        """Every recipe, those of `recipes` first; the same one may come twice.

        Raises:
            RecipeError: a combination that is no recipe.
        """
        yield from self.recipes
        for *steps, runtime in product(*self.places, self.runtimes):
            yield self.recipe(steps, runtime)

    @staticmethod
    def recipe(steps: Sequence[str], runtime: str) -> Recipe:
        """One combination."""
        return parse_recipe(f"{' | '.join(filter(None, steps))} @ {runtime}")


def read_space(path: Path) -> Space:
    """The space that a YAML file describes.

    Raises:
        RecipeError: it cannot be read, or describes none.
    """
    import yaml

    from lighten.recipe.yaml_words import Loader

    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"space {path}: {getattr(error, 'strerror', None) or error}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"space {path}: not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(document, dict) or not document or not set(document) <= {"places", "runtimes", "recipes"}:
        raise RecipeError(f"space {path}: it has `places`, `runtimes` and `recipes`, nothing else, and at least one of them.")
    places, runtimes, recipes = (document.get(name, []) for name in ("places", "runtimes", "recipes"))
    if not isinstance(places, list) or not all(map(_is_texts, places)) or not _is_texts(runtimes, empty=True) or not _is_texts(recipes, empty=True):
        raise RecipeError(f"space {path}: places is a list of lists of steps, runtimes and recipes are lists of texts.")
    if places and not runtimes:
        raise RecipeError(f"space {path}: its places have no runtime to run on; name at least one in `runtimes`.")
    return make_space(places, runtimes, recipes)


def make_space(places: Sequence[Sequence[str]], runtimes: Sequence[str], recipes: Sequence[str] = ()) -> Space:
    """A space whose every word is known.

    Raises:
        RecipeError: a step, runtime or recipe that is none, or too many combinations.

    >>> space = make_space([["", "quantize(rtn, bits={8|4})"]], ["torch", "openvino"])
    >>> space.combinations, str(list(space)[-1])
    (6, 'quantize(rtn, bits=4) @ openvino')
    """
    spelled = tuple(tuple(each for text in place for each in spell_out(text)) for place in places)
    space = Space(
        places=spelled, runtimes=tuple(each for text in runtimes for each in spell_out(text)),
        recipes=tuple(parse_recipe(each) for text in recipes for each in spell_out(text)),
    )  # fmt: skip
    if space.combinations > MOST:
        raise RecipeError(f"the space has {space.combinations:,} combinations; {MOST:,} are the most.")
    for step in {step for place in spelled for step in place}:
        if parse_recipe(step).runtime_text != "torch" or "@" in step:
            raise RecipeError(f"step {step!r} of a place names a runtime; name it in `runtimes`.")
    for runtime in space.runtimes:
        parse_recipe(f"@ {runtime}")
    return space


def spell_out(text: str) -> list[str]:
    """
    >>> spell_out("quantize({rtn|gptq}, bits={8|4})")
    ['quantize(rtn, bits=8)', 'quantize(rtn, bits=4)', 'quantize(gptq, bits=8)', 'quantize(gptq, bits=4)']
    """
    found = _BRACES.search(text)
    if not found:
        return [text.strip()]
    return [spelled for each in found[1].split("|") for spelled in spell_out(text[: found.start()] + each.strip() + text[found.end() :])]


def _is_texts(value: Any, *, empty: bool = False) -> bool:
    return isinstance(value, list) and (empty or bool(value)) and all(isinstance(each, str) for each in value)


# ---- what is searched where the user says nothing ----

EIGHT_BITS = (
    "quantize(rtn, embeddings=true)",
    "quantize(rtn, symmetric=true, embeddings=true)",
    "quantize(dynamic, embeddings=true)",
)
SMOOTHED = "quantize(smoothquant, embeddings=true, symmetric_activations=true, tokens=4096)"
FOUR_BITS = (
    "quantize({methods}, bits=4, group_size={groups}) | quantize(rtn, embeddings=true, targets={table})",
    "quantize(rtn, bits=4, group_size={small}, embeddings=true)",
)
ALLOCATED = "quantize(auto, bits<=5, widths='4,8', group_size={small})"
"""By weight, as much as each matters; on what carries 8 bits in groups."""
MIXED_ENCODER = (
    'quantize(rtn, bits=4, group_size={small}, targets="attention") | quantize(rtn, embeddings=true, targets="intermediate|[0-9].output|embedding")',
    'quantize(rtn, bits=4, group_size={small}, targets="intermediate") | quantize(rtn, embeddings=true, targets="attention|[0-9].output|embedding")',
)
MIXED_DECODER = (
    'quantize(rtn, bits=4, group_size={small}, targets="self_attn") | quantize(rtn, embeddings=true, targets="mlp|embed")',
    'quantize(rtn, bits=4, group_size={small}, targets="gate_proj|up_proj") | quantize(rtn, embeddings=true, targets="self_attn|down_proj|embed")',
)
ENCODER = ("", "cast({bfloat16|float16})", *EIGHT_BITS, SMOOTHED, "quantize(static)", *FOUR_BITS, ALLOCATED, *MIXED_ENCODER)
DECODER = ("", "cast({bfloat16|float16})", *EIGHT_BITS, SMOOTHED, *FOUR_BITS, ALLOCATED, *MIXED_DECODER)
ENCODER_RUNTIMES = ("torch", "torch(dtype=bfloat16)", "onnxruntime", "openvino", "openvino(dtype=bfloat16)", "ctranslate2")
DECODER_RUNTIMES = ("torch", "torch(dtype=bfloat16)", "onnxruntime", "openvino", "openvino(dtype=bfloat16)", "ctranslate2")
COMPILED = ("@ torch-compile", "cast(bfloat16) @ torch-compile")
"""Compiled alone: codes are expanded there, and each shape is compiled for a minute."""
BUCKETED = ("@ torch-compile(batching=bucketed)", "cast(bfloat16) @ torch-compile(batching=bucketed)")
GGML = "quantize(rtn, format={q8_0|q6_k|q5_k|q4_k|q4_0|q3_k}, embeddings=true) @ {llama.cpp|llama.cpp(dtype=float16)}"


def default_space(spec: ModelSpec, *, own_lengths: bool = False) -> Space:
    """What fits the model's family: eight and four bits, by layer too, on every runtime. Combinations that cannot be done are still among them.

    Args:
        own_lengths: texts of different lengths are encoded: all recipes sort them, and what is compiled by shape meets few shapes.
    """
    sizes = [size for size in (128, 96, 64, 32, 16) if _divides(spec, size)]
    texts = list(DECODER if spec.is_decoder else ENCODER)
    if not sizes:
        texts = [text for text in texts if "group_size" not in text]
    groups = "|".join(str(size) for size in (sizes[:1] + [size for size in sizes[1:] if size <= 32][:1]))
    small = next((size for size in sizes if size <= 32), sizes[-1] if sizes else 0)
    named = {
        "{groups}": "{" + groups + "}", "{small}": str(small), "{methods}": "{rtn|hqq|gptq}", "{table}": "embed" if spec.is_decoder else "embedding"
    }  # fmt: skip
    for word, value in named.items():
        texts = [text.replace(word, value) for text in texts]
    runtimes: tuple[str, ...] = DECODER_RUNTIMES if spec.is_decoder else ENCODER_RUNTIMES
    compiled = COMPILED
    if own_lengths:
        runtimes, compiled = tuple(_with_option(each, "batching=sorted") for each in runtimes), BUCKETED
    return make_space([texts], runtimes, [GGML] if spec.is_decoder else compiled)


def _with_option(runtime: str, option: str) -> str:
    """
    >>> _with_option("torch", "batching=sorted"), _with_option("torch(dtype=bfloat16)", "batching=sorted")
    ('torch(batching=sorted)', 'torch(dtype=bfloat16, batching=sorted)')
    """
    return f"{runtime[:-1]}, {option})" if runtime.endswith(")") else f"{runtime}({option})"


def _divides(spec: ModelSpec, size: int) -> bool:
    """Whether groups of a size divide every linear's columns."""
    return all(part.in_features % size == 0 for part in spec.parts if isinstance(part, Linear) and part.component != "head")
