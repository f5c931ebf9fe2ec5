"""What a Transformer is, before any weight is loaded: its parts, their shapes, and how each weight is stored.

A `ModelSpec` is the input of every prediction. Its `parts` stand in the order in which a forward pass meets them; a recipe step
maps a spec to a spec by replacing parts (`spec.with_parts`). Names are those of the checkpoint's modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from lighten.units import dtype_bytes

Rows: TypeAlias = Literal["token", "sequence", "position", "logits"]
"""How many rows a part sees: each token, one a sequence (a pooler), each position once for all sequences, or the positions that get logits."""

PER_CHANNEL = -1
PER_TENSOR = 0


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How one weight matrix is stored and computed with.

    Attributes:
        dtype: element type where the weight is not quantized, and of nothing else.
        bits: code width where it is quantized, else None.
        group_size: columns that share a scale; `PER_CHANNEL`: a whole row; `PER_TENSOR`: the whole matrix.
        symmetric: the zero point is the middle code and is not stored.
        scale_dtype: element type of the scales.
        activations: int8 activations computed with it, their scale taken from each input ("dynamic") or from calibration ("static").
        sparsity: the share of zeros that pruning left. A dense layout stores them like any other weight.
    """

    dtype: str = "float32"
    bits: int | None = None
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    scale_dtype: str = "float16"
    activations: Literal["dynamic", "static"] | None = None
    sparsity: float = 0.0

    def scales(self, rows: int, columns: int) -> int:
        """Number of scales of a rows × columns weight."""
        if self.group_size == PER_TENSOR:
            return 1
        return rows * (1 if self.group_size == PER_CHANNEL else math.ceil(columns / self.group_size))

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the weight with its scales and zero points, codes packed without gaps, rounded up to whole bytes a row."""
        if self.bits is None:
            return round(rows * columns * dtype_bytes(self.dtype))
        scales = self.scales(rows, columns)
        zero_points = 0 if self.symmetric else math.ceil(scales * self.bits / 8)
        return rows * math.ceil(columns * self.bits / 8) + round(scales * dtype_bytes(self.scale_dtype)) + zero_points


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


@dataclass(frozen=True, kw_only=True)
class Linear(Part):
    """y = x Wᵀ + b, W of shape [out_features, in_features]. `tied_to` names the embedding whose weight this one is."""

    in_features: int
    out_features: int
    bias: bool = False
    tied_to: str | None = None
    weight: WeightFormat = field(default_factory=WeightFormat)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        weight: dict[str, tuple[int, ...]] = {} if self.tied_to else {f"{self.name}.weight": (self.out_features, self.in_features)}
        return weight | ({f"{self.name}.bias": (self.out_features,)} if self.bias else {})


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
    """LayerNorm or RMSNorm over `size` values of each row."""

    size: int
    kind: Literal["layernorm", "rmsnorm"]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        weight: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (self.size,)}
        return weight | ({f"{self.name}.bias": (self.size,)} if self.kind == "layernorm" else {})


@dataclass(frozen=True, kw_only=True)
class Attention(Part):
    """softmax(Q Kᵀ / √head_dim) V for each head; the projections are `Linear` parts of their own."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    causal: bool


@dataclass(frozen=True, kw_only=True)
class Elementwise(Part):
    """`flops_per_element` operations on each of `size` values of a row: activations, gates, residual additions, rotary embedding."""

    size: int
    kind: Literal["gelu", "silu", "relu", "tanh", "multiply", "add", "rotary"]
    flops_per_element: int


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

    @cached_property
    def is_decoder(self) -> bool:
        """Whether it generates: its attention is causal."""
        return any(isinstance(part, Attention) and part.causal for part in self.parts)

    @property
    def layers(self) -> int:
        return sum(isinstance(part, Attention) for part in self.parts)

    @property
    def max_positions(self) -> int | None:
        return self.config.get("max_position_embeddings")

    def with_parts(self, change: Callable[[Part], Part]) -> ModelSpec:
        """The same model, each part replaced by `change(part)`."""
        return replace(self, parts=tuple(change(part) for part in self.parts))

    def parameters(self) -> dict[str, int]:
        """Parameters by component; a tied tensor is counted where it is stored."""
        counts: dict[str, int] = {}
        for part in self.parts:
            found = sum(math.prod(shape) for shape in part.tensors().values())
            if found:
                counts[part.component] = counts.get(part.component, 0) + found
        return counts

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters().values())

    def weight_bytes(self) -> int:
        """Bytes of all weights as their formats store them; biases and norms in the model's own type."""
        return sum(part_weight_bytes(part, self.dtype) for part in self.parts)


def part_weight_bytes(part: Part, dtype: str) -> int:
    """Stored bytes of one part's tensors; vectors (biases, norms) in `dtype`."""
    total = 0
    for shape in part.tensors().values():
        if len(shape) == 2 and isinstance(part, Linear | Embedding):
            total += part.weight.stored_bytes(*shape)
        else:
            total += round(math.prod(shape) * dtype_bytes(dtype))
    return total
