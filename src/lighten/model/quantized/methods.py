"""`quantization_config` → the format of each weight, as the method's own loader in transformers reads it; and which weights it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lighten.errors import ModelError
from lighten.model.families.experts import Router, StackedExperts
from lighten.model.quantized.layouts import (
    AwqLayout,
    Bnb4Layout,
    Bnb8Layout,
    EetqLayout,
    Fp8Layout,
    GptqLayout,
    Mxfp4Layout,
    RowFp8Layout,
    TernaryLayout,
)
from lighten.model.quantized.packed import METHOD, kind_of, weight_format
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, Part, WeightFormat, block_name
from lighten.units import dtype_bytes

Config: TypeAlias = Mapping[str, Any]
Choice: TypeAlias = Callable[[Part], WeightFormat | None]
"""The format of a part's weight; None: left alone."""

FLOATS = ("float64", "float32", "float16", "bfloat16")


def quantized_parts(parts: tuple[Part, ...], quantization: Any, source: str, *, types: Mapping[str, str] | None = None) -> tuple[Part, ...]:
    """The parts with the weight formats that a config's `quantization_config` states.

    Args:
        types: element type of each tensor of the checkpoint, where there is one. A weight that it holds in a floating-point type of 16 bits
            or more is not quantized, whatever the config says; each other one is. (compressed-tensors names its targets; only they count.)

    Raises:
        ModelError: a method that is not known, or fields that cannot be read.
    """
    if not isinstance(quantization, Mapping):
        raise ModelError(f"{source}: its quantization_config is not a table.")
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in METHODS:
        raise ModelError(f"{source}: weights quantized by the method {method!r} cannot be read; these can: {', '.join(METHODS)}.")
    try:
        if types is not None and method != METHOD:
            choice = METHODS[method]({**quantization, **_EVERYWHERE}, parts)
            return tuple(_as_found(part, choice, types) for part in parts)
        choice = METHODS[method](quantization, parts)
        return tuple(_changed(part, choice(part)) for part in parts)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, re.error) as error:
        raise ModelError(f"{source}: its quantization_config cannot be read ({type(error).__name__}: {error}).") from error


def _changed(part: Part, weight: WeightFormat | None) -> Part:
    return part if weight is None or not isinstance(part, Linear | Embedding) else replace(part, weight=weight)


def _as_found(part: Part, choice: Choice, types: Mapping[str, str]) -> Part:
    """The part, quantized where the checkpoint does not hold its weight in a floating-point type."""
    if not isinstance(part, Linear):
        return part
    weights = [name for name, shape in part.tensors().items() if part.is_weight(shape)]
    if not weights or types.get(weights[0]) in FLOATS:
        return part
    return _changed(part, choice(part))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The modules that a loader leaves alone, by transformers' rules.

    Attributes:
        patterns: the names that the config lists.
        names: modules that it finds by itself: the last one, the head over the vocabulary, and those that share a weight.
    """

    patterns: tuple[str, ...]
    names: frozenset[str]

    def __contains__(self, name: object) -> bool:
        return name in self.names or any(_skips(pattern, str(name)) for pattern in self.patterns)


def _skips(pattern: str, name: str) -> bool:
    """Whether a pattern means a module: from its start to the end of a name, as an expression likewise, or as the name's end.

    Source: transformers, quantizers/quantizers_utils.py, should_convert_module.
    """
    return name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None


def kept(config: Config, parts: Iterable[Part], *fields: str, always: bool = False) -> Kept:
    """What the first of the `fields` that the config has lists; where none has, or `always`, what a loader leaves alone by itself.

    Source: transformers, quantizers/base.py, get_modules_to_not_convert and get_keys_to_not_convert.
    """
    listed = next((config[field] for field in fields if config.get(field) is not None), None)
    if listed is not None and (isinstance(listed, str) or not all(isinstance(name, str) for name in listed)):
        raise ValueError(f"{fields[0]} is not a list of names")
    names = _kept_by_itself(tuple(parts)) if always or listed is None else frozenset[str]()
    return Kept(patterns=tuple(listed or ()), names=names)


def _kept_by_itself(parts: tuple[Part, ...]) -> frozenset[str]:
    vocabularies = {part.num_embeddings for part in parts if isinstance(part, Embedding)}
    heads = {part.name for part in parts if isinstance(part, Linear) and part.component == "head" and part.out_features in vocabularies}
    last = next((part.name for part in reversed(parts) if part.tensors()), "")
    return frozenset(heads | {last})


def _linears(weight: WeightFormat, left: Kept) -> Choice:
    """Every linear that is not left alone. Routers are no linears in transformers; experts in one tensor are of another form."""

    def choice(part: Part) -> WeightFormat | None:
        return weight if _is_linear(part) and part.name not in left else None

    return choice


def _is_linear(part: Part) -> bool:
    """A linear with a weight of its own, which is no router.

    Raises:
        ValueError: experts whose weights are one tensor of three dimensions, whose layout these methods do not fix.
    """
    if isinstance(part, StackedExperts):
        raise ValueError(f"how it stores {part.tensor}, the weights of all experts, is not known")
    return isinstance(part, Linear) and not isinstance(part, Router) and not part.tied_to


def _whole(config: Config, field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}={value!r} is not a whole number")
    return value


def _bits_and_group(config: Config, widths: tuple[int, ...]) -> tuple[int, int]:
    bits, group = _whole(config, "bits"), _whole(config, "group_size", 128)
    if bits not in widths:
        raise ValueError(f"bits={bits} is none of {', '.join(map(str, widths))}")
    if group != PER_CHANNEL and group < 1:
        raise ValueError(f"group_size={group} is neither -1 nor positive")
    return bits, group


_EVERYWHERE = {
    "modules_to_not_convert": (), "ignored_layers": (), "llm_int8_skip_modules": (), "lm_head": True, "modules_in_block_to_quantize": None,
    "anywhere": True,
}  # fmt: skip
"""What a config is taken to say where a checkpoint shows which of its weights are quantized."""


def _gptq(config: Config, parts: tuple[Part, ...]) -> Choice:
    """The linears of the blocks, and the head where `lm_head` says so; `dynamic` changes some, or leaves them alone.

    Source: GPTQModel, QuantizeConfig; arXiv:2210.17323.
    """
    listed = [name for group in config.get("modules_in_block_to_quantize") or () for name in ([group] if isinstance(group, str) else group)]

    def choice(part: Part) -> WeightFormat | None:
        if not isinstance(part, Linear) or not _is_linear(part):
            return None
        inside = block_name(part) is not None and not part.name.startswith("lm_head")
        if not inside and not (config.get("anywhere") or (config.get("lm_head") and part.component == "head")):
            return None
        if listed and not any(part.name.endswith(f".{name}") for name in listed):
            return None
        own = _overridden(config, part.name)
        return None if own is None else _gptq_format(own, part)

    _bits_and_group(config, (2, 3, 4, 8))
    return choice


def _overridden(config: Config, name: str) -> Config | None:
    """The config as its `dynamic` changes it for one module; None: left alone."""
    for pattern, fields in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else {**config, **fields}
    return config


def _gptq_format(config: Config, part: Linear) -> WeightFormat | None:
    bits, group = _bits_and_group(config, (2, 3, 4, 8))
    if part.in_features % 32 or part.out_features % 32:
        return None  # its codes do not fill whole words: the method cannot pack it
    layout = GptqLayout(bits=bits, group_size=group)
    return WeightFormat(bits=bits, group_size=group, symmetric=bool(config.get("sym", True)), layout=layout)


def _awq(config: Config, parts: tuple[Part, ...]) -> Choice:
    """Source: AutoAWQ, AwqConfig; arXiv:2306.00978."""
    bits, group = _bits_and_group({"bits": config.get("w_bit", 4), "group_size": config.get("q_group_size", 128)} | dict(config), (4,))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"version={version} has another layout than gemm")
    weight = WeightFormat(bits=bits, group_size=group, symmetric=not config.get("zero_point", True), layout=AwqLayout(bits=bits, group_size=group))
    inner = _linears(weight, kept(config, parts, "modules_to_not_convert", always=not config.get("anywhere")))
    return lambda part: inner(part) if isinstance(part, Linear) and part.out_features * bits % 32 == 0 else None


def _fp8(config: Config, parts: tuple[Part, ...]) -> Choice:
    """Source: transformers, FineGrainedFP8Config."""
    block, scheme, scales = config.get("weight_block_size", (128, 128)), config.get("activation_scheme", "dynamic"), config.get("scale_fmt", "float")
    if config.get("expert_dtype", "fp8") != "fp8" or config.get("modules_to_convert"):
        raise ValueError("expert_dtype other than fp8 and modules_to_convert are not described")
    if scheme not in ("dynamic", "static") or scales not in ("float", "ue8m0"):
        raise ValueError(f"activation_scheme={scheme!r}, scale_fmt={scales!r}")
    layout = Fp8Layout(block=None if block is None else _pair(block, "weight_block_size"), static=scheme == "static")
    group = PER_TENSOR if layout.block is None else layout.block[1]
    weight = WeightFormat(bits=8, group_size=group, scale_dtype="float32" if scales == "float" else "uint8", layout=layout)
    return _linears(weight, kept(config, parts, "modules_to_not_convert", "ignored_layers"))


def _pair(value: Any, field: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(each, int) and each > 0 for each in value):
        raise ValueError(f"{field}={value!r} is not a pair of positive whole numbers")
    return value[0], value[1]


def _bitsandbytes(config: Config, parts: tuple[Part, ...]) -> Choice:
    """Source: transformers, BitsAndBytesConfig; arXiv:2208.07339, 2305.14314."""
    left = kept(config, parts, "llm_int8_skip_modules")
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        storage = str(config.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
        if dtype_bytes(storage) < 1:
            raise ValueError(f"bnb_4bit_quant_storage={storage} is less than a byte")
        layout = Bnb4Layout(double_quant=bool(config.get("bnb_4bit_use_double_quant")), storage=(storage, round(dtype_bytes(storage))))
        return _linears(WeightFormat(bits=4, group_size=64, scale_dtype="float32", layout=layout), left)
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return _linears(WeightFormat(bits=8, scale_dtype="float32", layout=Bnb8Layout()), left)
    raise ValueError("neither load_in_4bit nor load_in_8bit is set")


def _mxfp4(config: Config, parts: tuple[Part, ...]) -> Choice:
    """The experts that are kept in one tensor, GPT-OSS's.

    Source: transformers, integrations/mxfp4.py, replace_with_mxfp4_linear.
    """
    left = kept(config, parts, "modules_to_not_convert")

    def choice(part: Part) -> WeightFormat | None:
        if not isinstance(part, StackedExperts) or part.name in left:
            return None
        if part.in_features % 32:
            raise ValueError(f"{part.tensor} has {part.in_features} columns, which groups of 32 do not divide")
        return WeightFormat(bits=4, group_size=32, scale_dtype="uint8", layout=Mxfp4Layout())

    return choice


def _eetq(config: Config, parts: tuple[Part, ...]) -> Choice:
    return _linears(WeightFormat(bits=8, layout=EetqLayout()), kept(config, parts, "modules_to_not_convert"))


def _fbgemm_fp8(config: Config, parts: tuple[Part, ...]) -> Choice:
    return _linears(WeightFormat(bits=8, scale_dtype="float32", layout=RowFp8Layout()), kept(config, parts, "modules_to_not_convert"))


def _bitnet(config: Config, parts: tuple[Part, ...]) -> Choice:
    if config.get("quantization_mode", "offline") != "offline":
        return lambda part: None  # quantized anew in each pass: stored as it was
    weight = WeightFormat(bits=2, group_size=PER_TENSOR, layout=TernaryLayout())
    return _linears(weight, kept(config, parts, "modules_to_not_convert"))


def _compressed_tensors(config: Config, parts: tuple[Part, ...]) -> Choice:
    """The targets of each group but those of `ignore`: names, classes, or expressions after `re:`."""
    ignored = _targets(config.get("ignore") or [])
    groups = [(_targets(group["targets"]), str(group.get("format") or config.get("format")), group) for group in config["config_groups"].values()]

    def choice(part: Part) -> WeightFormat | None:
        if not isinstance(part, Linear | Embedding) or _matches(part, ignored):
            return None
        found = next(((kind, group) for targets, kind, group in groups if _matches(part, targets)), None)
        if found is None:
            return None
        weight = weight_format(*found, part)
        if kind_of(replace(part, weight=weight)) is None and (isinstance(part, Embedding) or not _is_linear(part)):
            raise ValueError(f"how it stores {part.name} is not known")
        return weight

    for _, kind, group in groups:  # what cannot be read is said even where it has no part
        weight_format(kind, group, Linear(name="", component="", in_features=1, out_features=1))
    return choice


def _targets(targets: Any) -> set[str]:
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("targets is not a list of names")
    for target in targets:
        if target.startswith("re:"):
            re.compile(target[3:])
    return set(targets)


def _matches(part: Linear | Embedding, targets: set[str]) -> bool:
    kind = "Embedding" if isinstance(part, Embedding) else "" if isinstance(part, Router | StackedExperts) else "Linear"
    name = part.name.replace("*", "0")  # of experts, which are stored alike, the first
    names = {name, kind}
    if isinstance(part, Linear) and part.tied_to:
        names = {part.tied_to}
    return bool(names & targets) or any(re.match(t[3:], name) for t in targets if t.startswith("re:"))


METHODS: dict[str, Callable[[Config, tuple[Part, ...]], Choice]] = {
    METHOD: _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "fbgemm_fp8": _fbgemm_fp8,
    "eetq": _eetq,
    "bitnet": _bitnet,
}
"""`quant_method` → how its config is read."""
