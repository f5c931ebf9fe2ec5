"""Fill the table of `lighten.summary` from one forward pass on fake tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from lighten.cost.workload import Workload
from lighten.trace.program import Program
from lighten.trace.summary import Row, Summary
from lighten.trace.torch_module import Inputs, TorchModule
from lighten.units import dtype_bytes


def summarize(module: torch.nn.Module, inputs: Inputs, *, depth: int = 3) -> Summary:
    """Parameters, FLOPs and bytes of a module's submodules, `depth` levels deep, in one forward pass with `inputs`.

    Its weights are neither read nor changed: the pass runs on fake tensors.

    Raises:
        TraceError: the module fails on tensors without memory.
    """
    followed = TorchModule(module, inputs)
    batch, length = followed.batch_size, followed.seq_len
    program = followed.follow(Workload(phase="encode", batch_size=batch, seq_len=length, dtype=_dtype(followed.dtype)))
    found = by_path(program)
    rows, counted = [], set[int]()
    for name, each in module.named_modules():
        level = 0 if not name else name.count(".") + 1
        if level > depth:
            continue
        own = {id(p): p for p in each.parameters()}
        if level == depth or not list(each.children()):  # shown without what is inside it: a tied parameter is counted in the first
            own = {key: p for key, p in own.items() if key not in counted}
            counted |= own.keys()
        weights = [(p.shape, str(p.dtype).removeprefix("torch.")) for p in own.values()]
        rows.append(row_of(name, each, level, weights, found, name=name.rpartition(".")[2] or followed.name))
    return Summary(rows=tuple(rows), batch_size=batch, seq_len=length, unknown_ops=tuple(program.unknown_ops))


def _dtype(name: str) -> str:
    return name if name in ("float32", "float16", "bfloat16", "float64") else "float32"


def by_path(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs and bytes made, by the path of the module that ran the operator."""
    flops: dict[str, int] = defaultdict(int)
    for op, count in program.ops:
        flops[op.name.rpartition(".")[0]] += op.flops * count
    made: dict[str, int] = defaultdict(int)
    if program.timeline:
        for storage in program.timeline.storages:
            if storage.kind == "activations" and storage.operator != "input":
                made[storage.module] += storage.bytes
    return flops, made


def row_of(
    path: str, module: Any, depth: int, weights: Sequence[tuple[Sequence[int], str]], found: tuple[dict[str, int], dict[str, int]], *, name: str
) -> Row:  # fmt: skip
    """The row of one submodule: `weights` by shape and type, `found` what `by_path` gave."""
    flops, made = found
    sizes = [(math.prod(shape), dtype_bytes(dtype)) for shape, dtype in weights]
    return Row(
        name=name, kind=type(module).__name__, depth=depth, parameters=sum(count for count, _ in sizes),
        parameter_bytes=round(sum(count * size for count, size in sizes)), flops=_inside(flops, path), output_bytes=_inside(made, path),
    )  # fmt: skip


def _inside(by_path: dict[str, int], name: str) -> int:
    """The sum over a module and all that is inside it; everything for the model itself."""
    return sum(value for path, value in by_path.items() if not name or path == name or path.startswith(f"{name}."))
