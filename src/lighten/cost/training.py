"""How often a training step computes each operator: forward, backward, and forward again where its block is recomputed."""

from __future__ import annotations

from itertools import groupby

from lighten.cost.workload import Recompute
from lighten.model.spec import Elementwise, Linear, ModelSpec, Part, block_name

BACKWARD = 2
"""Each product of the forward pass has two in the backward pass, for its input's and its weight's gradient, of the same size each."""


def step_counts(spec: ModelSpec, recompute: Recompute) -> dict[str, int]:
    """Part → how many times the FLOPs of its forward pass one training step computes.

    Twice more for the backward pass, but for a pooler that no loss uses: without a head the loss is the mean of the last hidden state,
    as `workload_memory` has it. Full recomputation runs each numbered block once more, up to the last operator that saves something for
    the backward pass; a linear saves its input before it computes, so one that stands last is not run again.

    Source: `torch.utils.checkpoint.set_checkpoint_early_stop`, on by default; checked by FlopCounterMode in tests/test_model.py.
    """
    has_head = any(part.component == "head" for part in spec.parts)
    counts = {part.name: 1 + (BACKWARD if has_head or part.component != "pooler" else 0) for part in spec.parts}
    if recompute == "full":
        for block, parts in groupby(spec.parts, key=block_name):
            for part in _recomputed(tuple(parts)) if block else ():
                counts[part.name] += 1
    return counts


def _recomputed(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    saving = max(i for i, part in enumerate(parts) if not (isinstance(part, Elementwise) and part.kind == "add"))
    return parts[: saving + (not isinstance(parts[saving], Linear))]
