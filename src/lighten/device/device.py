"""What is published of an accelerator or a processor: peaks, memory, links, power and price, each figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lighten.errors import DeviceError

PEAKS = ("float64", "float32", "tf32", "float16", "float16_acc16", "bfloat16", "float8", "float6", "float4", "int8", "int4")
"""Types that a data sheet gives a rate for; dense rates of matrix products, with float32 accumulation where there is a choice.

float16_acc16 accumulates in float16, which GeForce cards do twice as fast.
"""
KINDS = ("gpu", "tpu", "npu", "cpu", "apu", "soc", "fpga", "asic", "other")
PEAK_OF = {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "uint8": "int8", "uint4": "int4"}
"""Type of values → the peak that products of it run at, where the names differ."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins devices at one level.

    Attributes:
        bytes_per_s: that one device sends, in one direction, while it receives as much.
        devices: how many it joins; None: any number.
        latency_s: of a message between two of them; None: not known.
    """

    name: str
    bytes_per_s: float
    devices: int | None = None
    latency_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Price:
    """A public list price of one device for an hour, with the day on which it was listed, as far as that is known: 2026-11-22, 2026-11 or 2026."""

    usd_per_hour: float
    date: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device. None, or a missing peak: not known; no figure is derived from another one.

    Attributes:
        name: as `--device` takes it, such as h100-sxm.
        kind: one of `KINDS`.
        peak_flops_per_s: type of `PEAKS` → dense operations per second, 2 for a multiply-add.
        measured_flops_per_s: the same, the most that somebody measured of large products.
        memory_bytes: that programs can have, as the driver says it where a source shows that; the most that it is sold with.
        memory_varies: it is sold with less memory too.
        bandwidth_bytes_per_s: of the device's memory, read.
        links: from the innermost level outwards, each slower: inside a node, then between nodes (devices: None).
        power_w: what it may draw (TDP).
        aliases: what else it is called, by drivers and in tables.
        sources: figure, or "others" → where it is from.
    """

    name: str
    full_name: str
    vendor: str
    kind: str
    peak_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    measured_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None
    memory_varies: bool = False
    bandwidth_bytes_per_s: float | None = None
    memory_type: str | None = None
    links: tuple[Link, ...] = ()
    power_w: float | None = None
    price: Price | None = None
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def peak(self, dtype: str) -> float:
        """Operations per second of matrix products of a type.

        Raises:
            DeviceError: no source gives a rate of this type; says which there are.
        """
        name = PEAK_OF.get(dtype, dtype)
        if name not in self.peak_flops_per_s:
            known = ", ".join(self.peak_flops_per_s) or "none"
            raise DeviceError(f"{self.name} has no known rate of {dtype} products; its known types: {known}.")
        return self.peak_flops_per_s[name]

    def bandwidth(self) -> float:
        """Bytes per second of its memory.

        Raises:
            DeviceError: not known.
        """
        if self.bandwidth_bytes_per_s is None:
            raise DeviceError(f"{self.name}: its memory bandwidth is not known.")
        return self.bandwidth_bytes_per_s

    @property
    def devices_per_node(self) -> int:
        """How many its links inside a node join; 1 where no such link is known."""
        return max((link.devices for link in self.links if link.devices is not None), default=1)

    def link(self, devices: int) -> Link:
        """The narrowest link that a group of neighbouring devices needs.

        Raises:
            DeviceError: no known link joins so many.
        """
        for link in self.links:
            if link.devices is None or devices <= link.devices:
                return link
        joined = "; ".join(f"{link.name} joins {link.devices}" for link in self.links) or "no link of it is known"
        raise DeviceError(f"{devices} of {self.name} cannot talk to each other: {joined}.")
