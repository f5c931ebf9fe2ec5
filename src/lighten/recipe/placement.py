"""Where a workload runs, and what it takes there."""

from __future__ import annotations

from dataclasses import dataclass, field

from lighten.cost.memory import MemoryBreakdown
from lighten.device.roofline import TimePrediction


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
    assumptions: tuple[str, ...] = field(default=())

    @property
    def needed_bytes(self) -> int:
        """Of the fullest device."""
        return self.process_bytes or self.memory.peak

    @property
    def free_bytes(self) -> int | None:
        """What is left; negative where it does not fit; None where the device's memory is not known."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.needed_bytes
