"""What a pipeline's schedule does to time and memory: how long devices wait, and how many micro-batches each one holds.

Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2; the warm-up of `forward_backward_pipelining_with_interleaving` and
`forward_backward_pipelining_without_interleaving` in Megatron-LM's `pipeline_parallel/schedules.py`; torch's `Schedule1F1B`, `ScheduleGPipe`.
"""

from __future__ import annotations

from fractions import Fraction

from lighten.errors import WorkloadError
from lighten.parallel.plan import Plan


def bubble_fraction(plan: Plan, micro_batches: int) -> float:
    """Time that a device waits, over the time that it works: (pp - 1) / (m · v), for stages that take the same time.

    The same for GPipe and 1F1B, which differ in memory alone. Transfers are not in it.

    >>> bubble_fraction(Plan(pp=4), 8)
    0.375
    """
    return (plan.pp - 1) / (micro_batches * plan.virtual_stages)


def in_flight(plan: Plan, micro_batches: int, stage: int = 0) -> Fraction:
    """Micro-batches whose activations a stage holds at its fullest, in passes through all of the rank's layers.

    GPipe holds all m; 1F1B as many as it starts before the first one comes back, pp - stage; an interleaved schedule holds
    2 · (pp - stage - 1) + (v - 1) · pp + 1 passes through one of its v pieces.

    Raises:
        WorkloadError: interleaved, with a number of micro-batches that pp does not divide.
    """
    check_schedule(plan, micro_batches)
    if plan.schedule == "gpipe":
        return Fraction(micro_batches)
    if plan.schedule == "1f1b":
        return Fraction(min(micro_batches, plan.pp - stage))
    pieces = plan.virtual_stages
    started = 2 * (plan.pp - stage - 1) + (pieces - 1) * plan.pp + 1
    return Fraction(min(micro_batches * pieces, started), pieces)


def check_schedule(plan: Plan, micro_batches: int) -> None:
    """Raises:
    WorkloadError: interleaved, with a number of micro-batches that pp does not divide (Narayanan et al. 2021, section 2.2).
    """
    if plan.schedule == "interleaved" and micro_batches % plan.pp:
        raise WorkloadError(
            f"schedule=interleaved takes micro-batches in groups of pp={plan.pp}, not {micro_batches}; change the batch or micro_batch_size."
        )


def passes(plan: Plan, micro_batches: int, stage: int) -> tuple[int, int]:
    """How many tensors a rank of a stage sends to the next one (forward) and to the one before (backward), in a step."""
    pieces = plan.virtual_stages
    forward = micro_batches * (pieces - (stage == plan.pp - 1))
    backward = micro_batches * (pieces - (stage == 0))
    return (forward, backward) if plan.pp > 1 else (0, 0)
