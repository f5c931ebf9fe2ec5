"""What a workload takes on devices that are known by published figures, one or many under a plan."""

from __future__ import annotations

from dataclasses import replace

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Workload
from lighten.device.bill import Bill, bill_of, training_run
from lighten.device.device import Device
from lighten.device.roofline import TimePrediction
from lighten.errors import DeviceError, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.parallel.memory import rank_memory
from lighten.parallel.plan import Plan
from lighten.parallel.serving import STACKS, Serving, inference_time, serve
from lighten.parallel.step_time import SOFTWARES, Stack, step_time
from lighten.recipe.placement import Placed, Use
from lighten.recipe.recipe import Recipe
from lighten.units import DTYPE_BITS

ONE_DEVICE = Plan()
TRAINED_BITS = 16
FOR_TRAINING = ("cp", "ep", "shard", "shard_group", "sequence_parallel", "schedule", "virtual_stages", "micro_batch_size", "offload")
"""Fields of a plan that have no effect outside training."""


def place_on_devices(  # noqa: PLR0913  what is asked, of what, and where
    spec: ModelSpec, workload: Workload, recipe: Recipe, memory: MemoryBreakdown, device: Device, *, plan: Plan, use: Use
) -> Placed:
    """A recipe's model on devices.

    Args:
        memory: of the workload on one device.

    Raises:
        DeviceError: a figure that the time needs is not known, or the recipe's runtime is of this machine alone.
        WorkloadError: a plan that does not fit the workload or the model.
    """
    if recipe.device is not None:
        raise DeviceError(f"device=cuda runs a recipe on this machine; of {device.name} the prediction needs no option of the runtime.")
    if recipe.runtime != Recipe().runtime:
        raise DeviceError(f"runtime {recipe.runtime} is timed on this machine alone; on {device.name} --stack says the kind of software.")
    timed, peak = (_trained if workload.phase == "train" else _inferred)(spec, workload, device, plan, use)
    serving = _served(spec, workload, device, plan, use)
    return Placed(
        device=device.name, count=plan.devices, memory=memory if plan == ONE_DEVICE else rank_memory(spec, workload, plan),
        capacity_bytes=device.memory_bytes, time=timed, peak_flops_per_s=None if peak is None else peak * plan.devices, label="fitted", plan=plan,
        bill=bill_of(device, plan.devices, timed.seconds, workload.tokens), run=_run(workload, device, plan, timed, use),
        serving=serving, served=bill_of(device, plan.devices, 1.0, serving.output_tokens_per_s) if serving else None,
        assumptions=_assumptions(workload, device, plan),
    )  # fmt: skip


def _trained(spec: ModelSpec, workload: Workload, device: Device, plan: Plan, use: Use) -> tuple[TimePrediction, float | None]:
    stack = use.stack
    if stack is not None and stack not in SOFTWARES:
        raise WorkloadError(f"stack={stack!r} does not train; kinds of software that do: {', '.join(SOFTWARES)}.")
    if DTYPE_BITS[workload.dtype] < TRAINED_BITS:
        raise WorkloadError(f"phase train keeps weights in 16 bits or more, not in {workload.dtype}; --linear-dtype says what their products run in.")
    software = Stack(linear_dtype=use.linear_dtype) if stack is None else Stack(software=stack, linear_dtype=use.linear_dtype)  # type: ignore[arg-type]
    found = step_time(spec, workload, plan, device, stack=software)
    time = TimePrediction(seconds=found.seconds, low=found.low, high=found.high, bound_by=found.bound_by)
    return time, device.peak(software.linear_dtype or workload.dtype)


def _inferred(spec: ModelSpec, workload: Workload, device: Device, plan: Plan, use: Use) -> tuple[TimePrediction, float | None]:
    stack = use.stack
    if use.linear_dtype is not None:
        raise WorkloadError(f"--linear-dtype has no effect in phase {workload.phase}: products run in the weights' type.")
    for name in FOR_TRAINING:
        if getattr(plan, name) != getattr(ONE_DEVICE, name):
            raise WorkloadError(f"{name}={getattr(plan, name)} has no effect in phase {workload.phase}, which takes dp, tp and pp.")
    if stack is not None and stack not in STACKS:
        raise WorkloadError(f"stack={stack!r} runs no inference; kinds of software that do: {', '.join(STACKS)}.")
    share = replace(workload, batch_size=plan.micro_batch(workload.batch_size))
    found = inference_time(spec, share, device, tp=plan.tp, pp=plan.pp, **({} if stack is None else {"stack": stack}))
    peak = device.peak(workload.dtype) if device.peak_flops_per_s else None
    return TimePrediction(seconds=found.seconds, low=found.low, high=found.high, bound_by=found.bound_by), peak


def _run(workload: Workload, device: Device, plan: Plan, time: TimePrediction, use: Use) -> Bill | None:
    if use.tokens is None:
        return None
    if workload.phase != "train":
        raise WorkloadError(f"--tokens has no effect in phase {workload.phase}: it is the length of a training run.")
    return training_run(device, plan.devices, tokens=use.tokens, tokens_per_s=workload.tokens / time.seconds)


def _served(spec: ModelSpec, workload: Workload, device: Device, plan: Plan, use: Use) -> Serving | None:
    if use.concurrency is None:
        return None
    if workload.phase != "generate":
        raise WorkloadError(f"--concurrency has no effect in phase {workload.phase}: requests are of phase generate.")
    if workload.batch_size > 1:
        raise WorkloadError(f"--batch-size {workload.batch_size} has no effect with --concurrency, which says how many requests run at once.")
    if plan.dp > 1:
        raise WorkloadError(f"--concurrency is of one copy of the model; dp={plan.dp} copies serve {plan.dp} times as much.")
    return serve(
        spec, device, input_len=workload.seq_len, output_len=workload.new_tokens, concurrency=use.concurrency or None, dtype=workload.dtype,
        kv_dtype=workload.kv_dtype, tp=plan.tp, pp=plan.pp, **({} if use.stack is None else {"stack": use.stack}),
    )  # fmt: skip


def _assumptions(workload: Workload, device: Device, plan: Plan) -> tuple[str, ...]:
    said = [f"time from the data sheet of {device.name} and the shares of it that published runs reach; low to high is a 90 % range"]
    if workload.phase == "train":
        said.append("memory is of transformers' modules under torch, whatever the stack; kernels that keep less (Megatron-LM's) need less")
    elif workload.attention == "eager":
        said.append("attention=eager changes memory alone: time is that of attention as such software computes it")
    if plan.devices > 1:
        said.append(f"memory of the fullest of {plan.devices} devices: {plan}")
    return tuple(said)
