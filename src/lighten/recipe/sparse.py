"""Weights with zeros: how many stay, what a file needs for them, and where a device skips them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lighten.device.device import Device
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, WeightFormat


def kept_weights(rows: int, columns: int, *, sparsity: float, by_row: bool, pattern: tuple[int, int] | None) -> int:
    """How many weights of a matrix stay.

    Args:
        sparsity: the share that goes.
        by_row: it is counted over each row, else over the matrix.
        pattern: (n, m): of each m neighbours in a row n stay, whatever the sparsity.

    >>> kept_weights(10, 5, sparsity=0.3, by_row=True, pattern=None), kept_weights(10, 5, sparsity=0.3, by_row=False, pattern=None)
    (30, 35)
    """
    if pattern is not None:
        return rows * columns // pattern[1] * pattern[0]
    if by_row:
        return rows * (columns - round(sparsity * columns))
    return rows * columns - round(sparsity * rows * columns)


def with_kept(weight: WeightFormat, rows: int, columns: int, kept: int) -> WeightFormat:
    """The format that stores so many weights and a bit for each, where that takes less than all of them do."""
    sparse = replace(weight, kept=kept)
    return sparse if sparse.file_bytes(rows, columns) < replace(weight, kept=None).file_bytes(rows, columns) else replace(weight, kept=None)


def with_counts(spec: ModelSpec, kept: Mapping[str, int], *, in_folder: bool) -> ModelSpec:
    """The spec whose weights keep so many values, by the name of the module; of several experts the most."""

    def counted(part: Part) -> Part:
        if not isinstance(part, Linear | Embedding) or part.name not in kept:
            return part
        rows, columns = size_of(part)
        rows = rows * part.experts if isinstance(part, Linear) and is_stacked(part) else rows
        weight = replace(part.weight, sparsity=1 - kept[part.name] / (rows * columns))
        return replace(part, weight=with_kept(weight, rows, columns, kept[part.name]) if in_folder and not is_stacked(part) else weight)

    return spec.with_parts(counted)


def is_stacked(part: Linear | Embedding) -> bool:
    """Whether a weight is one tensor with those of other experts, whose zeros a file stores."""
    return isinstance(part, Linear) and part.in_one_tensor


def size_of(part: Linear | Embedding) -> tuple[int, int]:
    """Output features and input features, or rows and columns of a table."""
    return (part.out_features, part.in_features) if isinstance(part, Linear) else (part.num_embeddings, part.embedding_dim)


def has_sparse_products(device: Device) -> bool:
    """Whether its matrix units skip the zeros of 2:4, told by the types that came with the same generation.

    Source: NVIDIA A100 whitepaper (2020): third-generation tensor cores bring bfloat16, TF32 and 2:4 at once; AMD's whitepaper of CDNA 3
    (2023): float8 and 4:2 at once. Of others no source is known here.
    """
    return {"NVIDIA": "bfloat16", "AMD": "float8"}.get(device.vendor, "") in device.peak_flops_per_s


def as_run(spec: ModelSpec, device: Any) -> ModelSpec:
    """The spec whose weights take what they take where it runs: n:m patterns without their zeros where the device skips those, else all dense.

    Args:
        device: a Device, a measured machine, or None.
    """
    if isinstance(device, Device) and has_sparse_products(device):
        return spec

    def dense(part: Part) -> Part:
        if isinstance(part, Linear | Embedding) and part.weight.pattern is not None:
            return replace(part, weight=replace(part.weight, pattern=None))
        return part

    return spec.with_parts(dense)
