"""Where a workload runs, and what it takes there."""

from __future__ import annotations

from dataclasses import dataclass, field

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Workload
from lighten.device.roofline import TimePrediction
from lighten.errors import WorkloadError
from lighten.parallel.plan import Plan


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
    assumptions: tuple[str, ...] = field(default=())

    @property
    def needed_bytes(self) -> int:
        """Of the fullest device."""
        return self.process_bytes or self.memory.peak

    @property
    def free_bytes(self) -> int | None:
        """What is left; negative where it does not fit; None where the device's memory is not known."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.needed_bytes


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
