"""What a workload takes on the machine that `lighten probe` measured."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.operators import Op
from lighten.cost.training import BACKWARD
from lighten.cost.workload import OPTIMIZER_STATE, Workload
from lighten.device.profile import EngineProfile, Profile
from lighten.device.roofline import OPERATOR_KINDS, TimePrediction, predict_peak_memory, predict_time, seconds_by_kind
from lighten.errors import DeviceError
from lighten.model.spec import Linear, ModelSpec
from lighten.recipe.placement import Placed
from lighten.recipe.predict import compute_dtype, loaded_weight_bytes
from lighten.recipe.recipe import Recipe
from lighten.units import dtype_bytes

Passes = Sequence[tuple[list[Op], float]]
THIS_MACHINE = "this"


def place_on_machine(passes: Passes, spec: ModelSpec, workload: Workload, recipe: Recipe, memory: MemoryBreakdown, profile: Profile) -> Placed:
    """A recipe's model on the engine that stands for its runtime.

    Args:
        passes: forward passes, each with twice the number of times that it is run.

    Raises:
        DeviceError: that engine was not measured.
    """
    engine = _engine(engine_name(recipe, spec), profile)
    live = memory.activations + memory.temporary + memory.kv_cache
    process = predict_peak_memory(loaded_weight_bytes(recipe, spec), live, engine)
    return _placed(passes, spec.total_parameters, workload, engine, profile, memory, process, runtime=recipe.runtime_text)


def operator_seconds(passes: Passes, spec: ModelSpec, recipe: Recipe, profile: Profile) -> dict[str, float]:
    """Seconds of a workload by what its operators are; together those that it is predicted to take.

    Args:
        passes: forward passes, each with twice the number of times that it is run.

    Raises:
        DeviceError: the engine that stands for its runtime was not measured.
    """
    engine = _engine(engine_name(recipe, spec), profile)
    found = dict.fromkeys(OPERATOR_KINDS, 0.0)
    for ops, count in passes:
        for kind, seconds in seconds_by_kind(ops, engine, profile.bandwidth).items():
            found[kind] += seconds * count / 2
    return found


def place_followed(passes: Passes, parameters: int, workload: Workload, memory: MemoryBreakdown, profile: Profile) -> Placed:
    """A followed model on torch.

    Raises:
        DeviceError: torch was not measured in this type.
    """
    engine = _engine(f"torch/{workload.dtype}", profile)
    return _placed(passes, parameters, workload, engine, profile, memory, None, runtime="torch")


def _placed(  # noqa: PLR0913  one place where both ways meet
    passes: Passes, parameters: int, workload: Workload, engine: EngineProfile, profile: Profile, memory: MemoryBreakdown, process: int | None, *,
    runtime: str,
) -> Placed:  # fmt: skip
    time = _time(passes, parameters, workload, engine, profile)
    return Placed(
        device=THIS_MACHINE, count=1, memory=memory, process_bytes=process, capacity_bytes=profile.machine.memory_bytes, time=time,
        peak_flops_per_s=peak_flops_per_s(engine), label="calibrated",
        assumptions=(f"time of {runtime} from the rates that `lighten probe` measured; low to high is a 90 % range",),
    )  # fmt: skip


def engine_name(recipe: Recipe, spec: ModelSpec) -> str:
    """The measured engine that stands for a recipe's runtime: `runtime/int8` where activations are int8, else by the computing type.

    One on a device has a name of its own, which no probe measures: its time is not known.
    """
    quantized = any(isinstance(part, Linear) and part.weight.activations for part in spec.parts)
    place = f"-{recipe.device}" if recipe.device else ""
    return f"{recipe.runtime}{place}/{'int8' if quantized else compute_dtype(recipe, spec)}"


def peak_flops_per_s(engine: EngineProfile) -> float:
    """The highest rate of a matrix product that the probe saw."""
    return max(2 * s.rows * s.shape[0] * s.shape[1] / s.seconds for s in engine.samples if s.kind == "linear")


def _engine(name: str, profile: Profile) -> EngineProfile:
    if name in profile.failures:
        raise DeviceError(f"engine {name} could not be measured: {profile.failures[name]}")
    if name not in profile.engines:
        if "-cuda/" in name:
            raise DeviceError(f"engine {name}: a CUDA device is not probed; --device NAME predicts one of published figures.")
        raise DeviceError(f"engine {name} was not measured; measured: {', '.join(profile.engines)}. Run `lighten probe --engine {name}`.")
    return profile.engines[name]


def _time(passes: Passes, parameters: int, workload: Workload, engine: EngineProfile, profile: Profile) -> TimePrediction:
    predictions = [(predict_time(ops, engine, profile), count / 2) for ops, count in passes]
    factor, more = 1.0, 0.0
    if workload.phase == "train":
        if engine.name != "torch/float32":
            raise DeviceError(f"phase train is timed on engine torch/float32, not on {engine.name}.")
        factor = 1 + BACKWARD + (workload.recompute == "full")
        # the optimizer reads gradient, weight and state and writes weight and state, at the bandwidth of sets that no cache holds
        moved = (3 + 2 * OPTIMIZER_STATE[str(workload.optimizer)]) * parameters * dtype_bytes(workload.dtype)
        more = moved / profile.bandwidth[-1].copy_bytes_per_s
    longest = max(predictions, key=lambda found: found[0].seconds * found[1])[0]

    def total(values: list[float | None]) -> float | None:
        known = [value * count for value, (_, count) in zip(values, predictions, strict=True) if value is not None]
        return more + factor * sum(known) if len(known) == len(values) else None

    seconds = more + factor * sum(prediction.seconds * count for prediction, count in predictions)
    low, high = total([prediction.low for prediction, _ in predictions]), total([prediction.high for prediction, _ in predictions])
    return TimePrediction(seconds=seconds, low=low, high=high, bound_by=longest.bound_by)
