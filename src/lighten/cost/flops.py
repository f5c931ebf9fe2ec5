"""FLOPs of a whole workload from a spec: one pass, one training step, or all steps of a generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lighten.cost.operators import Forward, Op, forward_operators
from lighten.cost.passes import first_forward, step_forward, steps_after_first, training_forward
from lighten.cost.training import recomputed_cores, step_counts
from lighten.cost.tuning import tuned_operators
from lighten.cost.workload import Recompute, Workload
from lighten.model.spec import Attention, ModelSpec, Part


def workload_flops(spec: ModelSpec, workload: Workload) -> dict[str, int]:
    """FLOPs of the whole workload: one pass, one training step, or all new tokens, each step with its own context.

    `total_flops`, `matmul`, `matmul_causal` and `matmul/COMPONENT`.
    """
    training = workload.phase == "train"
    if workload.lora_rank is not None:
        found: dict[str, int] = {"total_flops": 0, "matmul": 0, "matmul_causal": 0}
        for op, count in tuned_operators(spec, workload):
            _add(found, _pass_flops([op], {op.name: count}))
        return found
    kinds, times = _kinds(spec, workload.recompute if training else None)
    found = dict.fromkeys(("total_flops", "matmul", "matmul_causal"), 0)

    def flops_of(forward: Forward) -> dict[str, int]:
        return _pass_flops(forward_operators(kinds, forward, workload.dtype), times)

    if workload.phase != "decode":
        _add(found, flops_of(training_forward(spec, workload) if training else first_forward(spec, workload)))
    if workload.recompute == "selective":
        again = recomputed_cores(spec, workload, forward_operators(spec, training_forward(spec, workload), workload.dtype))
        _add(found, _pass_flops(again, Counter(op.name for op in again)))
    steps = steps_after_first(workload)
    context = step_forward(spec, workload, 0).key_len
    borders = [window - context for window in _windows(spec)]
    for run in _linear_runs(lambda step: flops_of(step_forward(spec, workload, step)), 1, steps, borders):
        _add(found, run)
    return found


def _kinds(spec: ModelSpec, recompute: Recompute | None) -> tuple[ModelSpec, dict[str, int]]:
    """The spec with one part of each kind, and how often its FLOPs count: in every layer, and in a training step (`recompute`) forward and backward.

    Parts are of one kind where they differ in nothing but their names and count as often each. Kept with the spec.
    """
    cache: dict[Recompute | None, tuple[ModelSpec, dict[str, int]]] = spec.__dict__.setdefault("_part_kinds", {})
    if recompute not in cache:
        steps = {} if recompute is None else step_counts(spec, recompute)
        first: dict[tuple[str, int], Part] = {}
        times: dict[str, int] = {}
        for part in spec.parts:
            each = steps.get(part.name, 1)
            kept = first.setdefault((repr(replace(part, name="")), each), replace(part, name=str(len(first))))  # two parts can have one name
            times[kept.name] = times.get(kept.name, 0) + each
        cache[recompute] = replace(spec, parts=tuple(first.values())), times
    return cache[recompute]


def _pass_flops(ops: Iterable[Op], times: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for op in ops:
        count = times[op.name]
        figures = {"total_flops": op.flops, "matmul": op.matmul_flops, "matmul_causal": op.causal_flops}
        if op.matmul_flops:
            figures[f"matmul/{op.component}"] = op.matmul_flops
        _add(found, {name: count * value for name, value in figures.items()})
    return found


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0) + value


def _linear_runs(step: Callable[[int], dict[str, int]], first: int, last: int, borders: Sequence[int]) -> Iterator[dict[str, int]]:
    """Sums of `step` over first, …, last: at once where it is linear, else in two parts, cut at a border where there is one.

    A run is taken for linear where its ends and its middle are: a step's FLOPs bend at a window's length alone, and `borders` has those.
    """
    if last < first:
        return
    cut = next((border for border in borders if first <= border < last), None)
    if cut is None:
        count, middle = last - first + 1, (first + last) // 2
        low, high = step(first), step(last)
        at_middle = step(middle) if count > 2 else low
        rise = {name: high[name] - low[name] for name in low}
        if count <= 2 or all((at_middle[name] - low[name]) * (last - first) == rise[name] * (middle - first) for name in low):
            yield {name: count * (low[name] + high[name]) // 2 for name in low} if count > 1 else low
            return
        cut = middle
    yield from _linear_runs(step, first, cut, borders)
    yield from _linear_runs(step, cut + 1, last, borders)


def _windows(spec: ModelSpec) -> list[int]:
    """Lengths at which some layer's window is full, in order."""
    return sorted({part.window for part in spec.parts if isinstance(part, Attention) and part.window})
