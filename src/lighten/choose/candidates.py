"""The recipes that `choose` tries where the user names none."""

from __future__ import annotations

from lighten.errors import RecipeError
from lighten.model.spec import Linear, ModelSpec
from lighten.recipe import Recipe, apply_recipe, parse_recipe

ENCODER = (
    "cast(bfloat16) @ torch",
    "@ torch-compile",
    "cast(bfloat16) @ torch-compile",
    "@ onnxruntime",
    "quantize(dynamic, embeddings=true) @ onnxruntime",
    "@ openvino",
    "cast(float16) @ openvino(dtype=bfloat16)",
    "quantize(static) @ openvino",
    "quantize(dynamic, embeddings=true) @ openvino(dtype=bfloat16)",
    "quantize(rtn, embeddings=true) @ openvino(dtype=bfloat16)",
    "quantize(rtn, bits=4, group_size={group}) | quantize(rtn, embeddings=true, targets=embedding) @ openvino(dtype=bfloat16)",
    "quantize(gptq, bits=4, group_size={group}, tokens=8192) | quantize(rtn, embeddings=true, targets=embedding) @ openvino(dtype=bfloat16)",
    "prune(magnitude, sparsity=0.3) | cast(float16) @ openvino(dtype=bfloat16)",
)
DECODER = (
    "cast(bfloat16) @ torch",
    "@ onnxruntime",
    "quantize(rtn, bits=4, group_size={small_group}, embeddings=true) @ onnxruntime",
    "@ openvino",
    "cast(float16) @ openvino(dtype=bfloat16)",
    "quantize(rtn, embeddings=true) @ openvino(dtype=bfloat16)",
    "quantize(rtn, symmetric=true, embeddings=true) @ openvino(dtype=bfloat16)",
    "quantize(dynamic, embeddings=true) @ openvino(dtype=bfloat16)",
    "quantize(rtn, embeddings=true) @ torch",
    "quantize(rtn, bits=4, group_size={group}) | quantize(rtn, embeddings=true, targets=embed) @ openvino(dtype=bfloat16)",
    "quantize(gptq, bits=4, group_size={group}, tokens=8192) | quantize(rtn, embeddings=true, targets=embed) @ openvino(dtype=bfloat16)",
    "quantize(gptq, bits=4, group_size={group}, tokens=8192) | quantize(rtn, embeddings=true, targets=embed) @ torch",
    'quantize(rtn, bits=4, group_size={group}, targets=self_attn) | quantize(rtn, embeddings=true, targets="mlp|embed") @ openvino(dtype=bfloat16)',
    'quantize(rtn, bits=4, group_size={small_group}, targets="gate_proj|up_proj") | '
    'quantize(rtn, embeddings=true, targets="self_attn|down_proj|embed") @ openvino(dtype=bfloat16)',
)


def default_recipes(spec: ModelSpec) -> list[Recipe]:
    """Every recipe of the list that this model can take; group sizes are the largest of 128, 96, 64, 32 (and of 32, 16) that divide all rows."""
    group, small = _group(spec, (128, 96, 64, 32, 16)), _group(spec, (32, 16))
    found = []
    for text in DECODER if spec.is_decoder else ENCODER:
        if "{" in text and (group is None or small is None):
            continue
        recipe = parse_recipe(text.format(group=group, small_group=small))
        try:
            apply_recipe(recipe, spec)
        except RecipeError:
            continue
        found.append(recipe)
    return found


def _group(spec: ModelSpec, sizes: tuple[int, ...]) -> int | None:
    columns = {part.in_features for part in spec.parts if isinstance(part, Linear) and part.component != "head"}
    return next((size for size in sizes if all(count % size == 0 for count in columns)), None)
