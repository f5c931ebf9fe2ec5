"""Where a workload runs, and what it takes there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Workload
from lighten.device.roofline import TimePrediction
from lighten.errors import WorkloadError
from lighten.parallel.plan import Plan

if TYPE_CHECKING:
    from lighten.device.bill import Bill
    from lighten.parallel.serving import Serving


@dataclass(frozen=True, kw_only=True)
class Use:
    """What else is asked of devices of published figures.

    Attributes:
        stack: the kind of software: of training fused, compiled or eager; else engine, ggml, local or eager; None: the first of these.
        tokens: of a whole training run.
        linear_dtype: of training: what products with weights run in, such as float8 under a recipe that scales them; None: the workload's type.
        concurrency: requests that are served at once; 0: as many as fit.
    """

    stack: str | None = None
    tokens: int | None = None
    concurrency: int | None = None
    linear_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A workload on a device, or on several of one kind.

    Attributes:
        device: its name.
        memory: of the fullest device.
        process_bytes: peak resident size of the process that runs it; None: not known.
        capacity_bytes: memory of one device; None: not known.
        time: of the whole workload; None: not known.
        peak_flops_per_s: of all devices together, in the type that most is computed in; None: not known.
        plan: how it is spread; None: on one machine.
        bill: energy and money of the workload; None on a machine of one's own.
        run: the same of a whole training run.
        serving: batching in flight at a steady load of requests like this one; `served`: energy and money of its new tokens in a second.
        label: how the time was found: calibrated (by measurements on the device) or fitted (to published runs of others).
    """

    device: str
    count: int
    memory: MemoryBreakdown
    process_bytes: int | None = None
    capacity_bytes: int | None = None
    time: TimePrediction | None = None
    peak_flops_per_s: float | None = None
    label: str = "calibrated"
    plan: Plan | None = None
    bill: Bill | None = None
    run: Bill | None = None
    serving: Serving | None = None
    served: Bill | None = None
    assumptions: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Beside time and memory: the plan, what it costs, a whole run, a server."""
        return {
            "plan": None if self.plan is None else asdict(self.plan), "bill": None if self.bill is None else bill_json(self.bill),
            "run": None if self.run is None else {"tokens": self.run.tokens, "seconds": self.run.seconds, **bill_json(self.run)},
            "serving": None if self.serving is None else self.serving.as_json() | (bill_json(self.served) if self.served else {}),
        }  # fmt: skip

    @property
    def needed_bytes(self) -> int:
        """Of the fullest device."""
        return self.process_bytes or self.memory.peak

    @property
    def free_bytes(self) -> int | None:
        """What is left; negative where it does not fit; None where the device's memory is not known."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.needed_bytes


def bill_json(bill: Bill) -> dict[str, float | None]:
    """Energy and money in base units."""
    return {
        "joules": bill.joules, "joules_per_token": bill.joules_per_token, "usd": bill.usd, "usd_per_million_tokens": bill.usd_per_million_tokens,
    }  # fmt: skip


def default_plan(workload: Workload, count: int, asked: dict[str, object]) -> Plan:
    """The plan of so many devices, where some of its sizes are given.

    The rest are data-parallel ranks; outside training, where no size is given, all devices share each layer.

    Raises:
        WorkloadError: the sizes do not multiply out to the devices.
    """
    sizes = {name: int(str(asked[name])) for name in ("tp", "pp", "cp") if name in asked}
    if workload.phase != "train" and not sizes and "dp" not in asked:
        asked = {**asked, "tp": count}
        sizes = {"tp": count}
    product = 1
    for size in sizes.values():
        product *= size
    said = " · ".join(f"{name}={size}" for name, size in sizes.items())
    if product < 1 or count % product:
        raise WorkloadError(f"{said} does not divide {count} devices.")
    if "dp" in asked and int(str(asked["dp"])) * product != count:
        said = " · ".join([f"dp={asked['dp']}", *([said] if said else [])])
        raise WorkloadError(f"{said} is {int(str(asked['dp'])) * product} devices, not {count}; leave dp out, or ask for so many.")
    return Plan(**{"dp": count // product, **asked})  # type: ignore[arg-type]
