"""What a checkpoint holds for each part: the tensors that stand for its quantized weights, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lighten.errors import ModelError
from lighten.model.quantized.layouts import Bnb4Layout, GptqLayout, Stored
from lighten.model.quantized.packed import packed_shapes
from lighten.model.spec import Embedding, Linear, Part, TensorSpec

DESCRIBES = re.compile(r"\.weight\.quant_state\.bitsandbytes__\w+$")
"""bitsandbytes' description of a weight, as the bytes of a JSON text."""


def stored_tensors(part: Part) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint holds for a part, packed where its weight is quantized."""
    tensors = part.tensors()
    if not isinstance(part, Linear | Embedding) or part.weight.bits is None:
        return tensors
    if part.weight.layout is None:
        return _packed(part, tensors)
    return {name: shape for name, (shape, _) in _laid_out(part, tensors).items()}


def _packed(part: Linear | Embedding, tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if name.endswith(".weight") and len(shape) == 2:
            module = name.removesuffix(".weight")
            found |= {f"{module}.{tensor}": packed for tensor, packed in packed_shapes(part.weight, *shape).items()}
        else:
            found[name] = shape
    return found


def _laid_out(part: Linear | Embedding, tensors: Mapping[str, tuple[int, ...]]) -> Stored:
    """All tensors of a part, those of its layout with their types; the others' are not asked for."""
    layout = part.weight.layout
    assert layout is not None, "asked for where a weight has a layout"
    assert isinstance(part, Linear), "embeddings are left alone by all methods that have a layout"
    found: Stored = {}
    for name, shape in tensors.items():
        if not part.is_weight(shape):
            found[name] = (shape, "")
            continue
        module = name.removesuffix(".weight")
        for suffix, (each, dtype) in layout.tensors(part.out_features, part.in_features, part.weight.scale_dtype).items():
            found[module + suffix] = ((*shape[:-2], *each), dtype)
    return found


SCALES = ("weight_scale", "scales", "weight_scale_inv", "weight_scales")
"""The last word of the tensors whose type is that of a format's scales."""


def with_stored_scales(part: Linear | Embedding, types: Mapping[str, str]) -> Linear | Embedding:
    """The part, its weight's scales in the type that the checkpoint stores them in."""
    tied_to = part.tied_to if isinstance(part, Linear) else None
    owner = replace(part, name=tied_to, tied_to=None) if tied_to and isinstance(part, Linear) else part
    for name in stored_tensors(owner):
        if name.rpartition(".")[2] in SCALES and name in types:
            return replace(part, weight=replace(part.weight, scale_dtype=types[name]))
    return part


def scale_names(parts: Iterable[Part]) -> set[str]:
    """The tensors of quantized weights that are not weights: their types say nothing of the model's own."""
    return {
        name for part in parts if isinstance(part, Linear | Embedding) and part.weight.bits is not None
        for name in stored_tensors(part) if name not in part.tensors()
    }  # fmt: skip


def quantization_leftover(parts: tuple[Part, ...], strangers: Iterable[TensorSpec]) -> set[str]:
    """Those of `strangers` that a method stores beside its weights and that hold none of the model's parameters.

    GPTQ's writers stored a bias of zeros for each linear that has none; bitsandbytes stores a description of each weight.
    """
    linears = {part.name: part.weight.layout for part in parts if isinstance(part, Linear) and part.weight.layout is not None}
    described = any(isinstance(layout, Bnb4Layout) for layout in linears.values())
    unbiased = {name for name, layout in linears.items() if isinstance(layout, GptqLayout)}

    def is_left(name: str) -> bool:
        module, _, kind = name.rpartition(".")
        return (kind == "bias" and (module in unbiased or _any_expert(module) in unbiased)) or (described and bool(DESCRIBES.search(name)))

    return {tensor.name for tensor in strangers if is_left(tensor.name)}


def refuse_layouts(parts: Iterable[Part], source: str) -> None:
    """Raises:
    ModelError: a weight that is stored by another method than lighten's own, whose codes are not read.
    """
    for part in parts:
        if isinstance(part, Linear) and part.weight.layout is not None:
            raise ModelError(
                f"{source}: {part.name} is stored as another method's {part.weight.bits}-bit codes, which can be estimated and not be read; "
                "give the model that they were made from."
            )


def _any_expert(module: str) -> str:
    return re.sub(r"(experts)\.\d+\.", r"\1.*.", module)
