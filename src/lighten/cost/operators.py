"""ModelSpec × forward pass → operators: what is computed, how much of it, and which bytes move.

Shape legend: B batch_size, Q query positions, K key positions, I in_features, O out_features, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lighten.model.spec import Attention, Elementwise, Embedding, Linear, ModelSpec, Norm, Part, WeightFormat
from lighten.units import dtype_bytes

OpKind = Literal["linear", "attention", "norm", "elementwise", "gather"]

NORM_FLOPS = {"layernorm": 8, "rmsnorm": 4}
"""Operations on each element: mean, difference, square, mean, scale, weight, bias, and the root's share; without mean and bias for RMSNorm
(Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""
SOFTMAX_FLOPS = 5
"""Operations on each score: scale or mask, maximum, difference, exponential, sum and division, counted as profilers count them (maximum as 0)."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward pass: `query_len` new positions of each of `batch_size` sequences against `key_len` keys."""

    batch_size: int
    query_len: int
    key_len: int
    last_logits_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator of a forward pass.

    Attributes:
        matmul_flops: 2 per multiply-add of matrix products, attention in full.
        causal_flops: what `matmul_flops` is when masked scores are not computed.
        other_flops: everything else.
        weight_bytes: of the weights read, as stored.
        activation_bytes: read and written, each once.
        rows, columns, outputs: m, k, n of the product, for a linear.
        weight: how the weight is stored, for a linear or gather.
        products: heads × batch, for attention.
    """

    name: str
    kind: OpKind
    component: str
    matmul_flops: int = 0
    causal_flops: int = 0
    other_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    rows: int = 0
    columns: int = 0
    outputs: int = 0
    products: int = 0
    weight: WeightFormat = field(default_factory=WeightFormat)

    @property
    def flops(self) -> int:
        return self.matmul_flops + self.other_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


def forward_operators(spec: ModelSpec, forward: Forward, dtype: str) -> list[Op]:
    """The operators of one forward pass in order, activations in `dtype`."""
    return list(_operators(spec.parts, forward, dtype_bytes(dtype)))


def rows_of(part: Part, forward: Forward) -> int:
    """How many rows a part computes in a forward pass."""
    if part.rows == "sequence":
        return forward.batch_size
    if part.rows == "position":
        return forward.query_len
    if part.rows == "logits" and forward.last_logits_only:
        return forward.batch_size
    return forward.batch_size * forward.query_len


def _operators(parts: tuple[Part, ...], forward: Forward, element: float) -> Iterator[Op]:
    for part in parts:
        rows = rows_of(part, forward)
        match part:
            case Linear():
                yield _linear(part, rows, element)
            case Attention():
                yield _attention(part, forward, element)
            case Embedding():
                moved = round(rows * part.embedding_dim * element)
                read = round(moved / element * (part.weight.bits or 8 * element) / 8)
                yield Op(name=part.name, kind="gather", component=part.component, weight_bytes=read, activation_bytes=moved, weight=part.weight)
            case Norm():
                elements = rows * part.size
                yield Op(
                    name=part.name, kind="norm", component=part.component, other_flops=elements * NORM_FLOPS[part.kind],
                    activation_bytes=round(2 * elements * element), rows=rows, columns=part.size,
                )  # fmt: skip
            case Elementwise():
                elements = rows * part.size
                operands = 3 if part.kind in ("add", "multiply") else 2
                yield Op(
                    name=part.name, kind="elementwise", component=part.component, other_flops=elements * part.flops_per_element,
                    activation_bytes=round(operands * elements * element), rows=rows, columns=part.size,
                )  # fmt: skip


def _linear(part: Linear, rows: int, element: float) -> Op:
    flops = 2 * rows * part.in_features * part.out_features
    return Op(
        name=part.name, kind="linear", component=part.component, matmul_flops=flops, causal_flops=flops,
        other_flops=rows * part.out_features if part.bias else 0,
        weight_bytes=part.weight.stored_bytes(part.out_features, part.in_features),
        activation_bytes=round(rows * (part.in_features + part.out_features) * element),
        rows=rows, columns=part.in_features, outputs=part.out_features, weight=part.weight,
    )  # fmt: skip


def _attention(part: Attention, forward: Forward, element: float) -> Op:
    b, q, k = forward.batch_size, forward.query_len, forward.key_len
    heads, d = part.num_attention_heads, part.head_dim
    # the query at position p of the last q sees the keys up to its own position
    pairs = q * k - q * (q - 1) // 2 if part.causal else q * k
    values = b * d * (2 * heads * q + 2 * part.num_key_value_heads * k)
    return Op(
        name=part.name, kind="attention", component=part.component, matmul_flops=4 * b * heads * q * k * d, causal_flops=4 * b * heads * pairs * d,
        other_flops=b * heads * q * k * SOFTMAX_FLOPS, activation_bytes=round(values * element), rows=q, columns=k, outputs=d, products=b * heads,
    )  # fmt: skip
