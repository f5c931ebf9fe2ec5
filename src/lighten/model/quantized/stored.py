"""What a checkpoint holds for each part: the tensors that stand for its quantized weights, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lighten.errors import ModelError
from lighten.model.quantized.layouts import Bnb4Layout, GptqLayout, Stored
from lighten.model.quantized.packed import kind_of, shares_codes, weight_tensors
from lighten.model.spec import Embedding, Linear, Part, TensorSpec

DESCRIBES = re.compile(r"\.weight\.quant_state\.bitsandbytes__\w+$")
"""bitsandbytes' description of a weight, as the bytes of a JSON text."""

BITMASK, VALUES = "_bitmask", "_values"
"""What follows the name of a weight that is stored without its zeros."""


def stored_tensors(part: Part) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint holds for a part, packed where its weight is quantized."""
    return {name: shape for name, (shape, _) in typed_tensors(part).items()}


def typed_tensors(part: Part) -> Stored:
    """The same with the types of those that stand for a quantized weight; "" for the others."""
    tensors: Stored = {name: (shape, "") for name, shape in part.tensors().items()}
    if not isinstance(part, Linear | Embedding) or (part.weight.bits is None and part.weight.kept is None):
        return tensors
    found: Stored = {}
    for name, (shape, _) in tensors.items():
        if part.weight.kept is not None and part.weight.bits is None and name.endswith(".weight") and len(shape) == 2:
            found |= {f"{name}{suffix}": each for suffix, each in _masked(part, part.weight.kept).items()}
            continue
        if not _is_codes(part, name, shape):
            found[name] = (shape, "")
            continue
        module = name.removesuffix(".weight")
        found |= {f"{module}{suffix}": ((*shape[:-2], *each), dtype) for suffix, (each, dtype) in _codes(part).items()}
    if shares_codes(part):
        found |= {f"{part.name}{suffix}": each for suffix, each in _codes(part).items() if suffix in (".weight_scale", ".weight_zero_point")}
    return found


def _masked(part: Linear | Embedding, kept: int) -> Stored:
    """What follows a pruned weight's name: a bit for each weight, each row's in whole bytes, and the values of those that are left."""
    rows, columns = (part.out_features, part.in_features) if isinstance(part, Linear) else (part.num_embeddings, part.embedding_dim)
    return {BITMASK: ((rows, -(-columns // 8)), "uint8"), VALUES: ((kept,), part.weight.dtype)}


def _is_codes(part: Linear | Embedding, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the quantized weight."""
    if isinstance(part, Linear) and part.weight.layout is not None and kind_of(part) is None:
        return part.is_weight(shape)
    return name.endswith(".weight") and len(shape) == 2


def _codes(part: Linear | Embedding) -> Stored:
    """What follows the module's name → (shape, type), for its quantized weight."""
    linear = isinstance(part, Linear)
    rows, columns = (part.out_features, part.in_features) if isinstance(part, Linear) else (part.num_embeddings, part.embedding_dim)
    kind = kind_of(part)
    if kind is None:
        assert linear, "embeddings are left alone by all methods that have a layout of their own"
        assert part.weight.layout is not None, "what has no layout is stored as lighten writes it"
        return part.weight.layout.tensors(rows, columns, part.weight.scale_dtype)
    return {f".{name}": each for name, each in weight_tensors(kind, part.weight, rows, columns).items()}


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
    ModelError: a weight that is stored in a format whose codes are not read.
    """
    for part in parts:
        if isinstance(part, Linear) and part.weight.bits is not None and kind_of(part) is None:
            raise ModelError(
                f"{source}: {part.name} is stored as another method's {part.weight.bits}-bit codes, which can be estimated and not be read; "
                "give the model that they were made from."
            )


def _any_expert(module: str) -> str:
    return re.sub(r"(experts)\.\d+\.", r"\1.*.", module)
