"""A case, and what it costs on a target: a model, what is asked of it, what it becomes first, and how it is spread."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Workload
from lighten.device.bill import bill_of
from lighten.device.device import Device
from lighten.device.profile import Profile
from lighten.device.roofline import TimePrediction
from lighten.model.spec import Linear, ModelSpec
from lighten.parallel.plan import Plan
from lighten.recipe.estimate import Estimate, estimate, forward_passes
from lighten.recipe.placement import Use
from lighten.recipe.predict import apply_recipe
from lighten.recipe.recipe import Recipe
from lighten.recipe.sparse import has_sparse_products

Target: TypeAlias = Device | Profile | None
"""Where it runs: a device of published figures, a machine that was probed, or nowhere: then memory and FLOPs alone are known."""
SPARSE_SPEEDUP = 2.0
"""Dense rate → rate of 2:4 products. Source: Mishra et al. 2021 (arXiv:2104.08378), section 3."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what is asked of it, what it becomes first, and how it is spread.

    Attributes:
        plan: over devices of one kind; all sizes 1: one device.
        stack: the kind of software on a device of published figures; None: the usual.
    """

    spec: ModelSpec
    workload: Workload
    recipe: Recipe = field(default_factory=Recipe)
    plan: Plan = field(default_factory=Plan)
    stack: str | None = None

    @property
    def changed(self) -> ModelSpec:
        """The model as the recipe leaves it."""
        return apply_recipe(self.recipe, self.spec)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a case takes.

    Attributes:
        estimate: of the case, all figures.
        memory: of the fullest device, by what holds it.
        needed_bytes: of the fullest device; the runtime of a measured machine counts too.
        capacity_bytes: that there are; None: not known.
        time: of the whole workload; None: not known, or no device.
        devices: that it runs on.
        usd, joules: of the whole workload; None: no price or power, or no time. Joules are the most that the devices may draw.
    """

    estimate: Estimate
    memory: MemoryBreakdown
    needed_bytes: int
    capacity_bytes: int | None
    time: TimePrediction | None
    devices: int
    usd: float | None = None
    joules: float | None = None

    @property
    def tokens(self) -> int:
        return self.estimate.workload.tokens

    @property
    def flops(self) -> int:
        return self.estimate.total_flops

    @property
    def fits(self) -> bool | None:
        return None if self.capacity_bytes is None else self.needed_bytes <= self.capacity_bytes

    @property
    def seconds(self) -> float | None:
        return self.time.seconds if self.time else None

    @property
    def seconds_per_token(self) -> float | None:
        return self.time.seconds / self.tokens if self.time else None

    @property
    def device_seconds_per_token(self) -> float | None:
        """What money is proportional to."""
        return self.time.seconds * self.devices / self.tokens if self.time else None

    @property
    def usd_per_token(self) -> float | None:
        return None if self.usd is None else self.usd / self.tokens

    def as_json(self) -> dict[str, Any]:
        time = self.time
        return {
            "memory": {"needed": self.needed_bytes, "capacity": self.capacity_bytes, "peak": self.memory.peak, **asdict(self.memory)},
            "fits": self.fits, "flops": self.flops, "parameters": self.estimate.spec.total_parameters, "size_bytes": self.estimate.size_bytes,
            "devices": self.devices,
            "time": None if time is None else {
                "seconds": time.seconds, "low": time.low, "high": time.high, "bound_by": time.bound_by,
                "tokens_per_second": self.tokens / time.seconds,
            },
            "joules": self.joules, "usd": self.usd, "usd_per_million_tokens": None if self.usd is None else self.usd / self.tokens * 1e6,
        }  # fmt: skip


def cost_of(case: Case, target: Target = None) -> Cost:
    """What a case takes on a target, as `lighten estimate` says it; 2:4 weights alone are timed here, for data sheets give dense rates.

    Raises:
        LightenError: what is asked does not fit the model, the recipe's runtime or the device.
    """
    found = _estimated(case, target)
    placed, time = found.placed, found.time
    if time is not None and any(isinstance(part, Linear) and part.weight.pattern == (2, 4) for part in case.changed.parts):
        time = _sparse_time(case, target, time)
    cost = Cost(
        estimate=found, memory=found.memory, needed_bytes=placed.needed_bytes if placed else found.memory.peak,
        capacity_bytes=placed.capacity_bytes if placed else None, time=time, devices=case.plan.devices,
    )  # fmt: skip
    return priced(cost, target)


def priced(cost: Cost, target: Target) -> Cost:
    """The same with its money and energy: the time of all devices at the device's price and power."""
    if not isinstance(target, Device) or cost.time is None:
        return replace(cost, usd=None, joules=None)
    bill = bill_of(target, cost.devices, cost.time.seconds, cost.tokens)
    return replace(cost, usd=bill.usd, joules=bill.joules)


def device_name(target: Target) -> str | None:
    """As `--device` takes it."""
    return None if target is None else target.name if isinstance(target, Device) else "this"


def _estimated(case: Case, target: Target) -> Estimate:
    if isinstance(target, Device):
        return estimate(case.spec, case.workload, recipe=case.recipe, device=target, plan=case.plan, use=Use(stack=case.stack))
    return estimate(case.spec, case.workload, recipe=case.recipe, device=target)


def _sparse_time(case: Case, target: Target, packed: TimePrediction) -> TimePrediction | None:
    """Time of 2:4 weights: where the device's matrix units skip zeros, linears at twice the dense rate; elsewhere that of dense weights."""
    if not isinstance(target, Device) or not has_sparse_products(target):
        return packed
    doubled = {name: SPARSE_SPEEDUP * rate for name, rate in target.peak_flops_per_s.items()}
    fast = _estimated(case, replace(target, peak_flops_per_s=doubled)).time
    if fast is None:
        return None
    share = _share_of_linears(case)

    def between(one: float, other: float) -> float:
        return share * one + (1 - share) * other

    low, high = (None if None in ends else between(*ends) for ends in ((fast.low, packed.low), (fast.high, packed.high)))  # type: ignore[arg-type]
    return replace(fast, seconds=between(fast.seconds, packed.seconds), low=low, high=high)


def _share_of_linears(case: Case) -> float:
    """Of the FLOPs of matrix products."""
    ops = [(op, count) for ops, count in forward_passes(case.changed, case.workload) for op in ops]
    linears = sum(op.matmul_flops * count for op, count in ops if op.kind == "linear")
    return linears / max(1, sum(op.matmul_flops * count for op, count in ops))
