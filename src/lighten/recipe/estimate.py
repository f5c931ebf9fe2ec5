"""What a model costs under a recipe and a workload: parameters, FLOPs, memory, and on a measured device the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lighten.cost.adapters import adapter_parameters
from lighten.cost.flops import workload_flops
from lighten.cost.memory import HELD_TO_RUNS, MemoryBreakdown
from lighten.cost.operators import Op, forward_operators
from lighten.cost.passes import first_forward, step_forward, steps_after_first, training_forward
from lighten.cost.tuning import is_plain, memory_of
from lighten.cost.workload import Workload, check_workload
from lighten.device.device import Device
from lighten.device.profile import Profile
from lighten.device.roofline import TimePrediction
from lighten.errors import DeviceError, WorkloadError
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.parallel.plan import Plan
from lighten.recipe.batching import dense_workloads
from lighten.recipe.notes import notes
from lighten.recipe.on_machine import Passes, place_followed, place_on_machine
from lighten.recipe.options import Batching, check_effect
from lighten.recipe.placement import Placed, Use
from lighten.recipe.predict import apply_recipe, artifact_bytes
from lighten.recipe.recipe import Recipe
from lighten.recipe.sparse import as_run
from lighten.recipe.speculated import place_speculating
from lighten.trace.allocator import simulate
from lighten.trace.cache import follow_once
from lighten.trace.program import Facts, Followed, Program
from lighten.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The answer of `lighten estimate`; `as_json` gives the contract's form.

    Attributes:
        spec: the model as the recipe leaves it, or what is known of one that was followed.
        method: formula or trace.
        labels: figure → how it was found: exact, extrapolated, formula or calibrated.
        program: what following the model gave; None by formula.
        flops: by component: matrix products, the same without masked scores, and everything.
        memory: of the fullest device.
        size_bytes: of the artifact on disk.
        placed: on the device that was asked for; None without one.
    """

    spec: ModelSpec | Facts
    workload: Workload
    matmul: dict[str, int]
    matmul_causal: int | None
    total_flops: int
    memory: MemoryBreakdown
    size_bytes: int
    placed: Placed | None
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    method: str = "formula"
    labels: Mapping[str, str] = field(default_factory=dict)
    program: Program | None = None

    @property
    def time(self) -> TimePrediction | None:
        """Of the whole workload; None without a device."""
        return self.placed.time if self.placed else None

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak that goes into the model's own matrix products, without masked scores and what is computed again."""
        if self.placed is None or self.placed.time is None or self.placed.peak_flops_per_s is None:
            return None
        matmul, spec = self.matmul_causal, self.spec
        if self.workload.lengths:
            return None  # what is padding is no work of the model's
        if isinstance(spec, ModelSpec):
            matmul = workload_flops(_once(spec), replace(self.workload, recompute="none"))["matmul_causal"]
        elif self.workload.recompute != "none" or matmul is None:
            return None
        return matmul / self.placed.time.seconds / self.placed.peak_flops_per_s

    @property
    def process_bytes(self) -> int | None:
        """Peak resident size of a process that runs it; None without a device whose probe tells."""
        return self.placed.process_bytes if self.placed else None

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
            "fits": [] if self.placed is None else [{"device": self.placed.device, "count": self.placed.count, "free": self.placed.free_bytes}],
            **(self.placed.as_json() if self.placed else dict.fromkeys(("plan", "bill", "run", "serving"))),
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
    spec: ModelSpec, workload: Workload, *, recipe: Recipe | None = None, device: Profile | Device | None = None, plan: Plan | None = None,
    use: Use | None = None,
) -> Estimate:  # fmt: skip
    """Parameters, FLOPs and memory of a workload on a model as the recipe leaves it, and on a device its time.

    Args:
        device: a machine that was probed, or one of published figures.
        plan, use: of a device of published figures: how the workload is spread over several, and what else is asked of them.

    Raises:
        WorkloadError, RecipeError, DeviceError: what is asked does not fit the model, the runtime or the device.
    """
    recipe = recipe or Recipe()
    workload = _with_cache(workload, recipe)
    check_workload(spec, workload)
    changed = as_run(apply_recipe(recipe, spec), device)
    if workload.phase == "train" and any(isinstance(p, Linear | Embedding) and p.weight.bits for p in changed.parts):
        raise WorkloadError("phase train of quantized weights is not supported: codes have no gradient; train first, then quantize.")
    check_effect(dict(recipe.options), workload)
    dense = dense_workloads(workload, recipe.batching, most=spec.max_positions)
    flops: Counter[str] = Counter()
    for each, count in dense.items():
        flops.update({name: count * value for name, value in workload_flops(changed, each).items()})
    memory = max((memory_of(changed, each) for each in dense), key=lambda found: found.peak)
    placed = _placed(changed, workload, recipe, memory, device, plan, use)
    return Estimate(
        spec=changed, workload=workload, matmul={name.partition("/")[2]: value for name, value in flops.items() if name.startswith("matmul/")},
        matmul_causal=flops["matmul_causal"], total_flops=flops["total_flops"], memory=placed.memory if placed else memory,
        size_bytes=artifact_bytes(recipe, changed), placed=placed,
        assumptions=(*notes(recipe, spec), *_assumptions(workload, recipe, placed), *_of_memory(changed), *changed.notes),
        warnings=_warnings(placed), labels=FORMULA_LABELS | _time_label(placed),
    )  # fmt: skip


def _with_cache(workload: Workload, recipe: Recipe) -> Workload:
    """The workload with the cache that the recipe stores, where it keeps one.

    Raises:
        WorkloadError: it asks for another.
    """
    if recipe.kv_dtype is None or workload.phase not in ("decode", "generate"):
        return workload
    if workload.kv_dtype not in (None, recipe.kv_dtype):
        raise WorkloadError(f"kv_dtype={workload.kv_dtype} and the recipe's {recipe.kv_dtype} are two types of one cache; leave kv_dtype out.")
    return replace(workload, kv_dtype=recipe.kv_dtype)


def _placed(  # noqa: PLR0913  what is asked, and of what
    spec: ModelSpec,
    workload: Workload,
    recipe: Recipe,
    memory: MemoryBreakdown,
    device: Profile | Device | None,
    plan: Plan | None,
    use: Use | None,
) -> Placed | None:
    if isinstance(device, Device):
        if recipe.options or workload.lengths:
            said = recipe.runtime_text if recipe.options else "lengths of texts"
            raise DeviceError(f"{said} is timed on this machine alone (--device this); `lighten advise --draft` reads a draft on {device.name}.")
        from lighten.recipe.on_devices import place_on_devices

        return place_on_devices(spec, workload, recipe, memory, device, plan=plan or Plan(), use=use or Use())
    if use is not None or (plan or Plan()).devices > 1:
        raise DeviceError(
            "a plan and what else is asked of it are of devices with published figures, which `lighten devices` lists; this machine is one."
        )
    if device is None:
        return None
    if recipe.speculation is not None:
        return place_speculating(spec, workload, recipe, memory, device)
    return place_on_machine(batch_passes(spec, workload, recipe.batching), spec, workload, recipe, memory, device)


def _once(spec: ModelSpec) -> ModelSpec:
    """The model whose keys and values from a cached latent are not made again at each step, as software with latent attention of its own runs it."""
    if not any(isinstance(part, Linear) and part.over_cache for part in spec.parts):
        return spec
    return spec.with_parts(lambda part: replace(part, over_cache=False) if isinstance(part, Linear) and part.over_cache else part)


FORMULA_LABELS = {"parameters": "exact", "flops": "formula", "memory": "formula"}


def estimate_followed(followed: Followed, workload: Workload, *, device: Profile | None = None) -> Estimate:
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
    placed = None
    if device:
        passes = [([op for op, count in program.ops if ".backward." not in op.name for _ in range(count)], 2)]
        placed = place_followed(passes, program.total_parameters, workload, program.memory, device)
    said = [line for line in _assumptions(workload, Recipe(), placed) if program.causal_is_known or "matmul_causal" not in line]
    if not program.causal_is_known:
        said.append("a multiply-add is 2 FLOPs; how much of attention is masked cannot be told from eager products, so matmul_causal is not known")
    unknown = ", ".join(f"{name} ({count} times)" for name, count in program.unknown_ops.items())
    warnings = (*_warnings(placed), *((f"FLOPs not known, counted as 0: {unknown}",) if unknown else ()))
    return Estimate(
        spec=facts, workload=workload, matmul=matmul, matmul_causal=program.matmul_causal,
        total_flops=sum(count * op.flops for op, count in program.ops), memory=program.memory, size_bytes=program.weight_bytes, placed=placed,
        assumptions=(*said, *program.assumptions), warnings=warnings, method="trace",
        labels=dict.fromkeys(("parameters", "flops", "memory"), program.label) | _time_label(placed), program=program,
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


def batch_passes(spec: ModelSpec, workload: Workload, batching: Batching) -> Passes:
    """The forward passes of all batches of a workload; of one whose texts have one length they are its own."""
    dense = dense_workloads(workload, batching, most=spec.max_positions)
    return [(ops, count * times) for each, count in dense.items() for ops, times in forward_passes(spec, each)]


def _assumptions(workload: Workload, recipe: Recipe, placed: Placed | None) -> tuple[str, ...]:
    said = ["a multiply-add is 2 FLOPs; causal attention is counted in full, matmul_causal leaves out the masked scores"]
    if workload.phase == "prefill":
        said.append("logits at every position, as model(...) computes them")
    if workload.phase == "generate":
        said.append("logits at the last prompt position alone; the prefill gives the first new token")
    if workload.lengths:
        said.append(f"{len(workload.lengths)} texts of {sum(workload.lengths):,} tokens, batching={recipe.batching}; memory is of the fullest batch")
    if workload.phase == "train":
        said.append("the loss is the head's, without a head the mean of the last hidden state; the optimizer's own FLOPs are left out")
    if recipe.runtime in ("torch", "torch-compile") and _has_codes(recipe) and (placed is None or placed.plan is None):
        said.append(f"{recipe.runtime} expands codes when it loads them: smaller on disk, not in memory")
    if recipe.kv_dtype is not None:
        said.append("of cached codes the scales are left out: 16 bits for each group of channels")
    return (*said, *(placed.assumptions if placed else ()))


def _has_codes(recipe: Recipe) -> bool:
    return any(step.verb == "quantize" and step.method != "kv" for step in recipe.steps)


def _of_memory(spec: ModelSpec) -> tuple[str, ...]:
    if spec.family in HELD_TO_RUNS:
        return ()
    return (f"memory of {spec.family} is replayed by the rules of other families and was held against no run; --method trace follows it",)


def _warnings(placed: Placed | None) -> tuple[str, ...]:
    if placed is None or placed.free_bytes is None or placed.free_bytes >= 0:
        return ()
    return (f"needs {format_bytes(placed.needed_bytes)}, the device has {format_bytes(placed.capacity_bytes)}",)


def _time_label(placed: Placed | None) -> dict[str, str]:
    return {"time": placed.label if placed else "calibrated"}
