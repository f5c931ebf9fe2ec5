"""What a Transformer is, before any weight is loaded: its parts, their shapes, and how each weight is stored.

A `ModelSpec` is the input of every prediction. Its `parts` stand in the order in which a forward pass meets them; a recipe step
maps a spec to a spec by replacing parts (`spec.with_parts`). Names are those of the checkpoint's modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

from lighten.model.ggml_types import GGML_TYPES
from lighten.units import dtype_bytes

Rows: TypeAlias = Literal["token", "sequence", "position", "logits", "source"] | int
"""How many rows a part sees: each token, one a sequence (a pooler), each position once for all sequences, the positions that get logits,
each token of the source (an encoder-decoder's input), or so many a sequence (image patches, audio frames)."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How many chunks of `length` hold the new positions, the last one filled up, and `more`: of a recurrence that is computed in chunks.

    None where one position carries on from a state: that step is no matrix product.
    """

    length: int
    more: int = 0


Size: TypeAlias = Literal["query", "key", "source", "batch"] | int | Chunks
"""A length of a product: new positions, positions that are attended to, tokens of the source, sequences, a number of the model's, or of chunks."""

PER_CHANNEL = -1
PER_TENSOR = 0


class Layout(Protocol):
    """The tensors that a checkpoint holds in the place of one quantized weight."""

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """What follows the module's name → (shape, element type), for a weight of rows × columns = out_features × in_features."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How one weight matrix is stored and computed with.

    Attributes:
        dtype: element type where the weight is not quantized, and of nothing else.
        bits: code width where it is quantized, else None.
        group_size: columns that share a scale; `PER_CHANNEL`: a whole row; `PER_TENSOR`: the whole matrix.
        symmetric: the zero point is the middle code and is not stored.
        element: what a code is: a whole number, or a float of 8 (`e4m3`) or 4 bits (`e2m1`; Rouhani et al. 2023, arXiv:2310.10537).
        scale_dtype: element type of the scales; `uint8` is the exponent of a power of two (mxfp4).
        global_scale: one more float32 scale for the whole matrix, as nvfp4 has.
        activations: activations of 8 bits (int8; fp8 with `e4m3`) computed with it, their scale taken from each input ("dynamic") or from
            calibration ("static").
        activation_zero_points: dynamic int8 activations have a zero point for each token, so that the codes reach from its smallest value to its
            largest.
        activation_group_size: columns of an input that share one of a token's dynamic scales; None: all.
        sparsity: the share of zeros that pruning left.
        pattern: (n, m) where of each m neighbours in a row n are left: then n values and their places are what a device that skips zeros keeps.
        kept: how many weights a file stores, behind a bit for each that says which; None: all.
        ggml_type: the quantized type of ggml that it is stored in, such as `Q4_K`, which then says its bytes; `bits` is the width of its codes.
        layout: the tensors of another method's checkpoint, which then say its bytes; None: codes without gaps, scales and zero points.
    """

    dtype: str = "float32"
    bits: int | None = None
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    element: Literal["int", "e4m3", "e2m1"] = "int"
    scale_dtype: str = "float16"
    global_scale: bool = False
    activations: Literal["dynamic", "static"] | None = None
    activation_zero_points: bool = False
    activation_group_size: int | None = None
    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None
    kept: int | None = None
    ggml_type: str | None = None
    layout: Layout | None = None

    def scales(self, rows: int, columns: int) -> int:
        """Number of scales of a rows × columns weight."""
        if self.group_size == PER_TENSOR:
            return 1
        return rows * (1 if self.group_size == PER_CHANNEL else math.ceil(columns / self.group_size))

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the weight with its scales and zero points, codes packed without gaps, rounded up to whole bytes a row.

        Of n:m patterns: n values and for each its place in ⌈log2 m⌉ bits (Mishra et al. 2021, arXiv:2104.08378, section 3.1).
        """
        if self.ggml_type is not None:
            return GGML_TYPES[self.ggml_type].stored_bytes(rows, columns)
        if self.layout is not None:
            tensors = self.layout.tensors(rows, columns, self.scale_dtype).values()
            return sum(round(math.prod(shape) * dtype_bytes(dtype)) for shape, dtype in tensors)
        if self.bits is None and self.pattern is not None:
            n, m = self.pattern
            values = columns * n // m
            return rows * (round(values * dtype_bytes(self.dtype)) + math.ceil(values * (m - 1).bit_length() / 8))
        if self.bits is None:
            return round(rows * columns * dtype_bytes(self.dtype))
        scales = self.scales(rows, columns)
        zero_points = 0 if self.symmetric else math.ceil(scales * self.bits / 8)
        once = 4 if self.global_scale else 0
        return rows * math.ceil(columns * self.bits / 8) + round(scales * dtype_bytes(self.scale_dtype)) + zero_points + once

    def file_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the weight in a file: with `kept`, so many values and a bit for each weight, each row's in whole bytes."""
        if self.bits is not None or self.layout is not None:
            return self.stored_bytes(rows, columns)
        if self.kept is None:
            return round(rows * columns * dtype_bytes(self.dtype))
        return rows * math.ceil(columns / 8) + round(self.kept * dtype_bytes(self.dtype))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One module of the model.

    Attributes:
        name: the module's path in the checkpoint, such as `model.layers.0.mlp.up_proj`.
        component: what its figures are summed under: embedding, attention, mlp, norm, head, pooler.
        rows: which positions it computes.
    """

    name: str
    component: str
    rows: Rows = "token"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors of this part and their shapes; empty where it has no parameters, or shares another part's."""
        return {}

    @property
    def parameters(self) -> int:
        """Elements of its tensors."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts that it is not routed to."""
        return self.parameters


@dataclass(frozen=True, kw_only=True)
class Linear(Part):
    """y = x Wᵀ + b, W of shape [out_features, in_features].

    Attributes:
        tied_to: the part whose weight this one is (an embedding, or the same layer before).
        experts: copies of the weight, of which each row meets `experts_per_row`; `*` in the name stands for the expert's number.
        transposed: stored as [in_features, out_features], like GPT-2's Conv1D.
        over_cache: computes all cached positions again in each step (keys and values from a cached latent).
    """

    in_features: int
    out_features: int
    bias: bool = False
    tied_to: str | None = None
    weight: WeightFormat = field(default_factory=WeightFormat)
    experts: int = 1
    experts_per_row: int = 1
    transposed: bool = False
    over_cache: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        names = [self.name] if self.experts == 1 else [self.name.replace("*", str(expert)) for expert in range(self.experts)]
        weight: dict[str, tuple[int, ...]] = {} if self.tied_to else {f"{name}.weight": shape for name in names}
        return weight | ({f"{name}.bias": (self.out_features,) for name in names} if self.bias else {})

    @property
    def parameters(self) -> int:
        if type(self).tensors is not Linear.tensors:
            return super().parameters
        return self.experts * ((0 if self.tied_to else self.in_features * self.out_features) + self.bias * self.out_features)

    @property
    def active_parameters(self) -> int:
        return self.parameters * self.experts_per_row // self.experts

    def is_weight(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of its is the weight matrix, or that of all experts, and not a bias."""
        return len(shape) >= 2 and shape[-2:] in ((self.out_features, self.in_features), (self.in_features, self.out_features))

    @property
    def in_one_tensor(self) -> bool:
        """Whether the matrices of all experts are one tensor of three dimensions."""
        return any(len(shape) == 3 for shape in self.tensors().values())


@dataclass(frozen=True, kw_only=True)
class Embedding(Part):
    """A table of `num_embeddings` rows that is looked up, [num_embeddings, embedding_dim]."""

    num_embeddings: int
    embedding_dim: int
    weight: WeightFormat = field(default_factory=WeightFormat)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.num_embeddings, self.embedding_dim)}


@dataclass(frozen=True, kw_only=True)
class Norm(Part):
    """A normalization over `size` values of each row.

    Attributes:
        groups: how many groups of `size` values a row has, each normalized by itself with the same weight (the heads of a query norm).
        affine: has a weight; a bias too where `bias` says so (None: LayerNorm, GroupNorm and BatchNorm have one, RMSNorm has none).
    """

    size: int
    kind: Literal["layernorm", "rmsnorm", "groupnorm", "batchnorm"]
    groups: int = 1
    affine: bool = True
    bias: bool | None = None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        weight: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (self.size,)} if self.affine else {}
        biased = self.affine and (self.kind != "rmsnorm" if self.bias is None else self.bias)
        return weight | ({f"{self.name}.bias": (self.size,)} if biased else {})


@dataclass(frozen=True, kw_only=True)
class Attention(Part):
    """softmax(Q Kᵀ / √head_dim) V for each head; the projections are `Linear` parts of their own.

    Attributes:
        v_head_dim: width of a value head where it is not that of the keys (latent attention).
        window: keys that a query sees at most (sliding window); None: all.
        windowed_cache: a cache keeps no more than the window; False where it keeps all and masks them.
        keys: whose keys: the same sequence's ("key"), the source's ("source"), or so many a sequence.
        latent_dim: values that a latent cache keeps for each token instead of keys and values (DeepSeek-V2, arXiv:2405.04434, eq. 9).
        cached: keeps keys and values of its own; False where it reads another layer's.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    causal: bool
    v_head_dim: int | None = None
    window: int | None = None
    windowed_cache: bool = True
    keys: Size = "key"
    latent_dim: int | None = None
    cached: bool = True

    @property
    def value_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def is_cross(self) -> bool:
        """Whether its keys come from another sequence than its queries."""
        return self.keys == "source" or (isinstance(self.keys, int) and self.keys != self.rows)


@dataclass(frozen=True, kw_only=True)
class Elementwise(Part):
    """`flops_per_element` operations on each of `size` values of a row: activations, gates, residual additions, rotary embedding."""

    size: int
    kind: Literal["gelu", "silu", "relu", "tanh", "sigmoid", "softplus", "softmax", "relu2", "multiply", "add", "rotary"]
    flops_per_element: int


@dataclass(frozen=True, kw_only=True)
class Table(Part):
    """Parameters of another form than a weight matrix: a class token, relative positions, decay rates; `shapes` by their full names.

    Attributes:
        dtype: element type where it is stored in another than the model's vectors.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str | None = None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return dict(self.shapes)


@dataclass(frozen=True, kw_only=True)
class Conv(Part):
    """A convolution with `rows` outputs positions, W of shape [out_channels, in_channels / groups, *kernel]."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    groups: int = 1
    bias: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        weight = (self.out_channels, self.in_channels // self.groups, *self.kernel)
        return {f"{self.name}.weight": weight} | ({f"{self.name}.bias": (self.out_channels,)} if self.bias else {})


@dataclass(frozen=True, kw_only=True)
class Product(Part):
    """`products` matrix products m × k × n for each sequence (once for all where `rows` is "position"), of activations alone."""

    m: Size
    k: Size
    n: Size
    products: int = 1


@dataclass(frozen=True, kw_only=True)
class Scan(Part):
    """A recurrence over the positions (state-space or linear attention): `flops_per_row` operations on each row outside matrix products.

    Attributes:
        state_elements: values of the state that each sequence keeps between tokens, however long it is.
    """

    flops_per_row: int
    state_elements: int


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a checkpoint, as its header states it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as data.

    Attributes:
        name: for people.
        family: `model_type` of its config.
        architecture: the class that computes it, `BertModel` or `LlamaForCausalLM`.
        source: the folder or hub id that it was read from.
        dtype: the type of most of its checkpoint's elements.
        config: its `config.json`.
        parts: its modules in forward order.
        tensors: its checkpoint's header; None where there is no checkpoint.
        other_bytes: bytes of the files that a runtime needs beside the weights (config and tokenizer).
        notes: what reading it took for granted, one sentence each.
        vector_dtype: the type of biases and norms where it is not `dtype`, as in GGUF files.
    """

    name: str
    family: str
    architecture: str
    source: str
    dtype: str
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    tensors: tuple[TensorSpec, ...] | None = None
    other_bytes: int = 0
    notes: tuple[str, ...] = ()
    vector_dtype: str | None = None

    @cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether its decoder attends to what its encoder made of another sequence."""
        return any(isinstance(part, Attention) and part.is_cross for part in self.parts) and self._has_memory

    @cached_property
    def is_decoder(self) -> bool:
        """Whether it is a decoder alone, which generates from its own input: causal attention, or a recurrence."""
        return self._has_memory and not self.is_encoder_decoder

    @cached_property
    def _has_memory(self) -> bool:
        return any((isinstance(part, Attention) and part.causal) or isinstance(part, Scan) for part in self.parts)

    @cached_property
    def fixed_len(self) -> int | None:
        """Positions of a model whose input has but one size (the patches of an image); None where the input's length is free."""
        lengths = {part.rows for part in self.parts if not isinstance(part, Table)}
        if lengths & {"token", "logits", "source"}:
            return None
        return max((rows for rows in lengths if isinstance(rows, int)), default=None)

    @cached_property
    def layers(self) -> int:
        """Numbered blocks that mix positions; an encoder-decoder's of both."""
        return len({block_name(part) or part.name for part in self.parts if isinstance(part, Attention | Scan)})

    @property
    def max_positions(self) -> int | None:
        """Positions that its config has at most, of its text where there is more; None where it names none."""
        nested = self.config.get("text_config")
        for config in (self.config, nested if isinstance(nested, Mapping) else {}):
            for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
                if isinstance(found := config.get(name), int) and not isinstance(found, bool):
                    return found
        return None

    def with_parts(self, change: Callable[[Part], Part]) -> ModelSpec:
        """The same model, each part replaced by `change(part)`."""
        return replace(self, parts=tuple(change(part) for part in self.parts))

    def parameters(self) -> dict[str, int]:
        """Parameters by component; a tied tensor is counted where it is stored."""
        counts: dict[str, int] = {}
        for part in self.parts:
            if found := part.parameters:
                counts[part.component] = counts.get(part.component, 0) + found
        return counts

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters().values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        return sum(part.active_parameters for part in self.parts)

    def weight_bytes(self) -> int:
        """Bytes of all weights as their formats store them; biases and norms in the model's own type, or in that of its vectors."""
        return sum(part_weight_bytes(part, self.vector_dtype or self.dtype) for part in self.parts)


def block_name(part: Part) -> str | None:
    """`encoder.layer.0` of `encoder.layer.0.attention.self`; None outside the numbered blocks."""
    found = re.match(r".*?\.\d+(?=\.)", part.name)
    return found[0] if found else None


def part_weight_bytes(part: Part, dtype: str) -> int:
    """Stored bytes of one part's tensors; vectors (biases, norms) in `dtype`."""
    if isinstance(part, Linear) and part.experts > 1:
        one = replace(part, experts=1)
        return part.experts * part_weight_bytes(one, dtype) if one.parameters * part.experts == part.parameters else _tensor_bytes(part, dtype)
    return _tensor_bytes(part, dtype)


def _tensor_bytes(part: Part, dtype: str) -> int:
    total = 0
    dtype = (part.dtype if isinstance(part, Table) else None) or dtype
    for shape in part.tensors().values():
        if isinstance(part, Linear) and part.weight.layout is not None and part.is_weight(shape):
            total += math.prod(shape[:-2]) * part.weight.stored_bytes(part.out_features, part.in_features)
        elif len(shape) == 2 and isinstance(part, Linear | Embedding) and part.weight.layout is None:
            transposed = isinstance(part, Linear) and part.transposed  # groups run along the input features, however the weight lies
            total += part.weight.stored_bytes(*(reversed(shape) if transposed else shape))
        else:
            total += round(math.prod(shape) * dtype_bytes(dtype))
    return total
