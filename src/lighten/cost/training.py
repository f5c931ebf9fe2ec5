"""How often a training step computes each operator: forward, backward, and forward again where its block is recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

from lighten.cost.operators import Op
from lighten.cost.replay.habits import habits
from lighten.cost.replay.layout import streams
from lighten.cost.workload import Recompute, Workload
from lighten.model.spec import Attention, Conv, Elementwise, Embedding, Linear, ModelSpec, Part

BACKWARD = 2
"""Each product of the forward pass has two in the backward pass, for its input's and its weight's gradient, of the same size each."""


def step_counts(spec: ModelSpec, recompute: Recompute) -> dict[str, int]:
    """Part → how many times the FLOPs of its forward pass one training step computes.

    Twice more for the backward pass, but for a pooler that no loss uses: without a head the loss is the mean of the last hidden state,
    as `workload_memory` has it. A convolution of pixels or frames has one product less, since its input is given. Full recomputation
    runs each numbered block once more, up to the last operator that saves something for the backward pass; a linear saves its input
    before it computes, so one that stands last is not run again, unless a dropout follows it.

    Source: `torch.utils.checkpoint.set_checkpoint_early_stop`, on by default; checked by FlopCounterMode in tests/test_model.py.
    """
    has_head = any(part.component == "head" for part in spec.parts)
    counts = {part.name: 1 + (BACKWARD if has_head or part.component != "pooler" else 0) for part in spec.parts}
    for stream in streams(spec):
        given = next((part for part in stream.before if isinstance(part, Conv | Linear)), None)
        if isinstance(given, Conv) or (given is not None and not any(isinstance(part, Embedding) for part in stream.before)):
            counts[given.name] = min(counts[given.name], BACKWARD)
    if recompute == "full":
        for stream in streams(spec):
            dropped = habits(spec, stream.rows).hidden_dropout > 0
            for block in stream.blocks:
                for part in _recomputed(block, dropped=dropped):
                    counts[part.name] += 1
    return counts


def recomputed_cores(spec: ModelSpec, workload: Workload, ops: Iterable[Op]) -> list[Op]:
    """What selective recomputation runs again of a forward pass's operators: the core of attention, none under any other.

    A kernel that does all of it runs whole; else the first of the two products runs, since the second saves its inputs before it computes.

    Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 5; checked by FlopCounterMode in tests/test_memory_families.py.
    """
    if workload.recompute != "selective":
        return []
    found = []
    for part, op in zip(spec.parts, ops, strict=True):
        if isinstance(part, Attention):
            drops = habits(spec, part.rows).attention_dropout > 0
            one_kernel = workload.attention == "flash" or (workload.attention == "sdpa" and not drops)
            found.append(op if one_kernel else _scores_alone(part, op))
    return found


def _scores_alone(part: Attention, op: Op) -> Op:
    share = Fraction(part.head_dim, part.head_dim + part.value_dim)
    return replace(op, matmul_flops=int(op.matmul_flops * share), causal_flops=int(op.causal_flops * share))


def _recomputed(parts: tuple[Part, ...], *, dropped: bool) -> tuple[Part, ...]:
    """What comes before the last that saves something: a linear saves its input, a dropout after it its noise."""
    saving = max(i for i, part in enumerate(parts) if not (isinstance(part, Elementwise) and part.kind == "add"))
    return parts[: saving + (dropped or not isinstance(parts[saving], Linear))]
