"""ModelSpec × forward pass → operators: what is computed, how much of it, and which bytes move.

Shape legend: B batch_size, Q query positions, K key positions, I in_features, O out_features, H heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lighten.model.spec import (
    Attention,
    Chunks,
    Conv,
    Elementwise,
    Embedding,
    Linear,
    ModelSpec,
    Norm,
    Part,
    Product,
    Scan,
    Size,
    Table,
    WeightFormat,
)
from lighten.units import dtype_bytes

OpKind = Literal["linear", "attention", "norm", "elementwise", "gather"]

NORM_FLOPS = {"layernorm": 8, "rmsnorm": 4, "groupnorm": 8, "batchnorm": 4}
"""Operations on each element: mean, difference, square, mean, scale, weight, bias, and the root's share; without mean and bias for RMSNorm
(Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""
SOFTMAX_FLOPS = 5
"""Operations on each score: scale or mask, maximum, difference, exponential, sum and division, counted as profilers count them (maximum as 0)."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward pass: `query_len` new positions of each of `batch_size` sequences against `key_len` keys.

    Attributes:
        source_len: tokens of the source of an encoder-decoder.
        encodes: the source is encoded in this pass; False where a cache has its keys and values.
    """

    batch_size: int
    query_len: int
    key_len: int
    last_logits_only: bool = False
    source_len: int = 0
    encodes: bool = True


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
    if isinstance(part.rows, int):
        return forward.batch_size * part.rows * forward.encodes
    if part.rows == "source":
        return forward.batch_size * forward.source_len * forward.encodes
    if part.rows == "sequence":
        return forward.batch_size
    if isinstance(part, Linear) and part.over_cache:
        return forward.batch_size * forward.key_len
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
                elements = rows * part.size * part.groups
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
            case Conv():
                yield _conv(part, rows, element)
            case Product():
                yield _product(part, forward, element)
            case Scan():
                moved = round(rows * part.flops_per_row * element)
                yield Op(
                    name=part.name,
                    kind="elementwise",
                    component=part.component,
                    other_flops=rows * part.flops_per_row,
                    activation_bytes=moved,
                    rows=rows,
                )
            case Table():
                read = round(part.parameters * element)
                yield Op(name=part.name, kind="gather", component=part.component, weight_bytes=read)


def _linear(part: Linear, rows: int, element: float) -> Op:
    met = rows * part.experts_per_row
    flops = 2 * met * part.in_features * part.out_features
    touched = min(part.experts, met) if part.experts > 1 else 1  # weights of the experts that some row is routed to, at most
    return Op(
        name=part.name, kind="linear", component=part.component, matmul_flops=flops, causal_flops=flops,
        other_flops=met * part.out_features if part.bias else 0,
        weight_bytes=touched * part.weight.stored_bytes(part.out_features, part.in_features),
        activation_bytes=round(met * (part.in_features + part.out_features) * element),
        rows=met, columns=part.in_features, outputs=part.out_features, weight=part.weight,
    )  # fmt: skip


def _conv(part: Conv, rows: int, element: float) -> Op:
    inner = part.in_channels // part.groups * math.prod(part.kernel)
    flops = 2 * rows * inner * part.out_channels
    return Op(
        name=part.name, kind="linear", component=part.component, matmul_flops=flops, causal_flops=flops,
        other_flops=rows * part.out_channels if part.bias else 0, weight_bytes=round(inner * part.out_channels * element),
        activation_bytes=round(rows * (inner + part.out_channels) * element), rows=rows, columns=inner, outputs=part.out_channels,
    )  # fmt: skip


def _product(part: Product, forward: Forward, element: float) -> Op:
    m, k, n = (_length(size, forward) for size in (part.m, part.k, part.n))
    times = part.products * (1 if part.rows == "position" else forward.batch_size)
    if (part.rows == "source" or isinstance(part.rows, int)) and not forward.encodes:
        times = 0
    flops = 2 * times * m * k * n
    return Op(
        name=part.name, kind="linear", component=part.component, matmul_flops=flops, causal_flops=flops,
        activation_bytes=round(times * (m * k + k * n + m * n) * element), rows=times * m, columns=k, outputs=n,
    )  # fmt: skip


def _length(size: Size, forward: Forward) -> int:
    if isinstance(size, int):
        return size
    if isinstance(size, Chunks):
        continues = forward.query_len == 1 < forward.key_len
        return 0 if continues else math.ceil(forward.query_len / size.length) + size.more
    return {"query": forward.query_len, "key": forward.key_len, "source": forward.source_len, "batch": forward.batch_size}[size]


def _attention(part: Attention, forward: Forward, element: float) -> Op:
    b, heads, d, v = forward.batch_size, part.num_attention_heads, part.head_dim, part.value_dim
    inside = part.rows == "source" or isinstance(part.rows, int)  # of an encoder: each of its positions sees each of them
    k = _length(part.keys, forward)
    q = k if part.rows == "source" else part.rows if isinstance(part.rows, int) else forward.query_len
    if inside and not forward.encodes:
        q = k = 0
    if part.window is not None and part.windowed_cache and q < k and not inside:  # a step: its cache holds no more
        k = min(k, part.window - 1 + q)
    # the query at position p of the last q sees the keys up to its own position, and no further back than the window
    pairs = q * k - q * (q - 1) // 2 if part.causal else q * k
    if part.causal and part.window is not None and part.window < k:
        first = min(q, max(0, part.window - (k - q)))  # queries that see less than a full window
        pairs = sum_of_run(k - q + 1, first) + (q - first) * part.window
    values = b * (heads * q * (d + v) + part.num_key_value_heads * k * (d + v))
    return Op(
        name=part.name, kind="attention", component=part.component,
        matmul_flops=2 * b * heads * q * k * (d + v), causal_flops=2 * b * heads * pairs * (d + v),
        other_flops=b * heads * q * k * SOFTMAX_FLOPS, activation_bytes=round(values * element), rows=q, columns=k, outputs=d, products=b * heads,
    )  # fmt: skip


def sum_of_run(first: int, count: int) -> int:
    """first + (first + 1) + …, `count` of them."""
    return count * first + count * (count - 1) // 2
