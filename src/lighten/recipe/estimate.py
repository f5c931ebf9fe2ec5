"""What a model costs under a recipe and a workload: parameters, FLOPs, memory, and on a measured device the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lighten.cost.adapters import adapter_parameters
from lighten.cost.flops import workload_flops
from lighten.cost.memory import HELD_TO_RUNS, MemoryBreakdown
from lighten.cost.operators import Op, forward_operators
from lighten.cost.passes import first_forward, step_forward, steps_after_first, training_forward
from lighten.cost.training import BACKWARD
from lighten.cost.tuning import is_plain, memory_of
from lighten.cost.workload import OPTIMIZER_STATE, Workload, check_workload
from lighten.device.profile import EngineProfile, Profile
from lighten.device.roofline import TimePrediction, predict_peak_memory, predict_time
from lighten.errors import DeviceError, WorkloadError
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.recipe.predict import apply_recipe, artifact_bytes, compute_dtype, loaded_weight_bytes
from lighten.recipe.recipe import Recipe
from lighten.trace.allocator import simulate
from lighten.trace.cache import follow_once
from lighten.trace.program import Facts, Followed, Program
from lighten.units import dtype_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The answer of `lighten estimate`; `as_json` gives the contract's form.

    Attributes:
        spec: the model as the recipe leaves it, or what is known of one that was followed.
        method: formula or trace.
        labels: figure → how it was found: exact, extrapolated, formula or calibrated.
        program: what following the model gave; None by formula.
        flops: by component: matrix products, the same without masked scores, and everything.
        time: None without a device.
        size_bytes: of the artifact on disk.
        process_bytes: peak resident size of a process that runs it; None where the device's probe does not tell.
    """

    spec: ModelSpec | Facts
    workload: Workload
    matmul: dict[str, int]
    matmul_causal: int | None
    total_flops: int
    memory: MemoryBreakdown
    size_bytes: int
    device: str | None
    time: TimePrediction | None
    mfu: float | None
    process_bytes: int | None
    free_bytes: int | None
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    method: str = "formula"
    labels: Mapping[str, str] = field(default_factory=dict)
    program: Program | None = None

    @property
    def reserved_bytes(self) -> int | None:
        """What CUDA's caching allocator would hold for these tensors; None where their births and deaths were not followed.

        Simulated on the run's storages as a CPU makes them; workspaces of CUDA's kernels and its context are not in it.
        """
        runs = self.program.timelines if self.program else ()
        return max((simulate(run).reserved for run in runs), default=None)

    def as_json(self) -> dict[str, Any]:
        """The document of `lighten estimate --json`."""
        spec, workload, by_component = self.spec, self.workload, self.spec.parameters()
        return {
            "model": {"name": spec.name, "family": spec.family, "source": spec.source, "dtype": spec.dtype, "layers": spec.layers},
            "workload": {
                "phase": workload.phase, "batch_size": workload.batch_size, "seq_len": workload.seq_len, "new_tokens": workload.new_tokens,
                "dtype": workload.dtype, "kv_dtype": workload.kv_dtype or (workload.dtype if spec.is_decoder else None),
                "attention": workload.attention, "optimizer": workload.optimizer, "recompute": workload.recompute,
                "target_len": workload.target_len, "master_weights": workload.master_weights, "lora_rank": workload.lora_rank,
                "lora_targets": workload.lora_targets if workload.lora_rank is not None else None, "base_bits": workload.base_bits,
                "cross_entropy": workload.cross_entropy if workload.phase == "train" else None,
                "cache": workload.kept_by if workload.phase in ("decode", "generate") else None,
            },
            "method": self.method, "labels": dict(self.labels),
            "parameters": {
                "total": spec.total_parameters, "active": spec.active_parameters, "trainable": self.trainable_parameters,
                "embedding": by_component.get("embedding", 0), "by_component": by_component,
            },
            "flops": {
                "total": self.total_flops, "matmul": sum(self.matmul.values()), "matmul_causal": self.matmul_causal, "by_component": self.matmul,
            },
            "memory": {"peak": self.memory.peak, **asdict(self.memory), "reserved": self.reserved_bytes, "resident": self.process_bytes},
            "size_bytes": self.size_bytes,
            "time": self._time_json(),
            "fits": [] if self.device is None else [{"device": self.device, "count": 1, "free": self.free_bytes}],
            "assumptions": list(self.assumptions), "warnings": list(self.warnings),
        }  # fmt: skip

    @property
    def trainable_parameters(self) -> int:
        """Parameters that a training step changes: with adapters theirs alone, which are not in the model's total."""
        if isinstance(self.spec, Facts):
            return self.spec.trainable_parameters
        if self.workload.lora_rank is not None:
            return adapter_parameters(self.spec, self.workload.lora_rank, self.workload.lora_targets)
        return self.spec.total_parameters

    def _time_json(self) -> dict[str, Any] | None:
        if self.time is None:
            return None
        return {
            "seconds": self.time.seconds, "low": self.time.low, "high": self.time.high, "bound_by": self.time.bound_by,
            "tokens_per_second": self.workload.tokens / self.time.seconds, "mfu": self.mfu,
        }  # fmt: skip


def estimate(
    spec: ModelSpec, workload: Workload, *, recipe: Recipe | None = None, device: str | None = None, profile: Profile | None = None
) -> Estimate:
    """Parameters, FLOPs and memory of a workload on a model as the recipe leaves it, and on a measured device its time.

    Raises:
        WorkloadError, RecipeError, DeviceError: what is asked does not fit the model, the runtime or the device.
    """
    recipe = recipe or Recipe()
    check_workload(spec, workload)
    changed = apply_recipe(recipe, spec)
    if workload.phase == "train" and any(isinstance(p, Linear | Embedding) and p.weight.bits for p in changed.parts):
        raise WorkloadError("phase train of quantized weights is not supported: codes have no gradient; train first, then quantize.")
    passes = forward_passes(changed, workload)
    flops = workload_flops(changed, workload)
    matmul = {name.partition("/")[2]: value for name, value in flops.items() if name.startswith("matmul/")}
    memory = memory_of(changed, workload)
    engine = _engine(recipe, changed, profile) if profile else None
    time = _time(passes, changed.total_parameters, workload, engine, profile) if engine and profile else None
    process = (
        predict_peak_memory(loaded_weight_bytes(recipe, changed), memory.activations + memory.temporary + memory.kv_cache, engine) if engine else None
    )
    machine_bytes = profile.machine.memory_bytes if profile else None
    needed = process or memory.peak
    return Estimate(
        spec=changed, workload=workload, matmul=matmul, matmul_causal=flops["matmul_causal"],
        total_flops=flops["total_flops"], memory=memory, size_bytes=artifact_bytes(recipe, changed), device=device,
        time=time, mfu=sum(matmul.values()) / time.seconds / peak_flops_per_s(engine) if engine and time else None, process_bytes=process,
        free_bytes=machine_bytes - needed if machine_bytes is not None else None,
        assumptions=(*_assumptions(workload, recipe, device), *_of_memory(changed), *changed.notes),
        warnings=_warnings(machine_bytes, needed), labels=FORMULA_LABELS,
    )  # fmt: skip


FORMULA_LABELS = {"parameters": "exact", "flops": "formula", "memory": "formula", "time": "calibrated"}


def estimate_followed(followed: Followed, workload: Workload, *, device: str | None = None, profile: Profile | None = None) -> Estimate:
    """Parameters, FLOPs and memory of a workload on a model that is followed operator by operator, and on a measured device its time.

    Raises:
        WorkloadError, TraceError, DeviceError: what is asked does not fit the model or the device.
    """
    if not is_plain(workload) or workload.kv_dtype not in (None, workload.dtype):
        raise WorkloadError(
            "a model is followed as it runs: adapters, masters, other losses, other caches and a kv_dtype of its own are known by formula alone."
        )
    program = follow_once(followed, workload)
    facts = Facts(
        name=followed.name, family=followed.family, architecture=followed.architecture, source=followed.source, dtype=followed.dtype,
        layers=program.layers, by_component=program.parameters, trainable_parameters=program.trainable_parameters,
        active_parameters=program.active_parameters, is_decoder="generate" in followed.phases,
    )  # fmt: skip
    matmul: dict[str, int] = {}
    for op, count in program.ops:
        if op.matmul_flops:
            matmul[op.component] = matmul.get(op.component, 0) + count * op.matmul_flops
    engine = _engine_of(f"torch/{workload.dtype}", profile) if profile else None
    time = None
    if engine and profile:
        passes = [([op for op, count in program.ops if ".backward." not in op.name for _ in range(count)], 2)]
        time = _time(passes, program.total_parameters, workload, engine, profile)
    machine_bytes = profile.machine.memory_bytes if profile else None
    needed = program.memory.peak
    said = [line for line in _assumptions(workload, Recipe(), device) if program.causal_is_known or "matmul_causal" not in line]
    if not program.causal_is_known:
        said.append("a multiply-add is 2 FLOPs; how much of attention is masked cannot be told from eager products, so matmul_causal is not known")
    unknown = ", ".join(f"{name} ({count} times)" for name, count in program.unknown_ops.items())
    warnings = (*_warnings(machine_bytes, needed), *((f"FLOPs not known, counted as 0: {unknown}",) if unknown else ()))
    return Estimate(
        spec=facts, workload=workload, matmul=matmul, matmul_causal=program.matmul_causal,
        total_flops=sum(count * op.flops for op, count in program.ops), memory=program.memory, size_bytes=program.weight_bytes, device=device,
        time=time, mfu=sum(matmul.values()) / time.seconds / peak_flops_per_s(engine) if engine and time else None, process_bytes=None,
        free_bytes=machine_bytes - needed if machine_bytes is not None else None, assumptions=(*said, *program.assumptions), warnings=warnings,
        method="trace", labels=dict.fromkeys(("parameters", "flops", "memory"), program.label) | {"time": "calibrated"}, program=program,
    )  # fmt: skip


def forward_passes(spec: ModelSpec, workload: Workload) -> list[tuple[list[Op], int]]:
    """The forward passes of a workload, each with twice the number of times that it is run.

    FLOPs and bytes of a decoding step are linear in its context, so the first and the last step, each counted half as often as there are
    steps, give the exact sum; twice the number keeps it whole.
    """
    passes: list[tuple[list[Op], int]] = []
    if workload.phase != "decode":
        first = training_forward(spec, workload) if workload.phase == "train" else first_forward(spec, workload)
        passes.append((forward_operators(spec, first, workload.dtype), 2))
    if steps := steps_after_first(workload):
        ends = (step_forward(spec, workload, step) for step in (1, steps))
        passes.extend((forward_operators(spec, forward, workload.dtype), steps) for forward in ends)
    return passes


def engine_name(recipe: Recipe, spec: ModelSpec) -> str:
    """The measured engine that stands for a recipe's runtime: `runtime/int8` where activations are int8, else by the computing type."""
    quantized = any(isinstance(part, Linear) and part.weight.activations for part in spec.parts)
    return f"{recipe.runtime}/{'int8' if quantized else compute_dtype(recipe, spec)}"


def peak_flops_per_s(engine: EngineProfile) -> float:
    """The highest rate of a matrix product that the probe saw."""
    return max(2 * s.rows * s.shape[0] * s.shape[1] / s.seconds for s in engine.samples if s.kind == "linear")


def _engine(recipe: Recipe, spec: ModelSpec, profile: Profile) -> EngineProfile:
    return _engine_of(engine_name(recipe, spec), profile)


def _engine_of(name: str, profile: Profile) -> EngineProfile:
    if name in profile.failures:
        raise DeviceError(f"engine {name} could not be measured: {profile.failures[name]}")
    if name not in profile.engines:
        raise DeviceError(f"engine {name} was not measured; measured: {', '.join(profile.engines)}. Run `lighten probe --engine {name}`.")
    return profile.engines[name]


def _time(passes: Sequence[tuple[list[Op], int]], parameters: int, workload: Workload, engine: EngineProfile, profile: Profile) -> TimePrediction:
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


def _assumptions(workload: Workload, recipe: Recipe, device: str | None) -> tuple[str, ...]:
    said = ["a multiply-add is 2 FLOPs; causal attention is counted in full, matmul_causal leaves out the masked scores"]
    if workload.phase == "prefill":
        said.append("logits at every position, as model(...) computes them")
    if workload.phase == "generate":
        said.append("logits at the last prompt position alone; the prefill gives the first new token")
    if workload.phase == "train":
        said.append("the loss is the head's, without a head the mean of the last hidden state; the optimizer's own FLOPs are left out")
    if recipe.runtime in ("torch", "torch-compile") and "quantize" in recipe.steps_text:
        said.append(f"{recipe.runtime} expands codes when it loads them: smaller on disk, not in memory")
    if device:
        said.append(f"time of {recipe.runtime_text} from the rates that `lighten probe` measured; low to high is a 90 % range")
    return tuple(said)


def _of_memory(spec: ModelSpec) -> tuple[str, ...]:
    if spec.family in HELD_TO_RUNS:
        return ()
    return (f"memory of {spec.family} is replayed by the rules of other families and was held against no run; --method trace follows it",)


def _warnings(machine_bytes: int | None, needed: int) -> tuple[str, ...]:
    if machine_bytes is not None and needed > machine_bytes:
        return (f"needs {needed} bytes, the device has {machine_bytes}",)
    return ()
