"""What `--device`, its figures and the plan's sizes name: where a case runs, and how it is spread there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lighten.cli.options import plan_of
from lighten.cost.workload import Phase
from lighten.device.catalog import parse_devices, with_devices_per_node, with_network, with_price
from lighten.device.device import Device
from lighten.device.find import THIS_MACHINE, find_device
from lighten.errors import DeviceError, WorkloadError
from lighten.parallel.plan import Plan
from lighten.recipe.case import Target


def place_of(text: str | None, arguments: argparse.Namespace) -> tuple[Target, int]:
    """The device and how many of it; None where no device is named.

    Raises:
        DeviceError: no such device, or an option that has no effect on it.
    """
    own = {name: value for name in ("price", "network", "devices_per_node") if (value := getattr(arguments, name, None)) is not None}
    if text is None or text in THIS_MACHINE:
        if own:
            where = "without --device" if text is None else f"with --device {text}"
            raise DeviceError(f"{', '.join(_option(name) for name in own)} has no effect {where}; it goes with a device of `lighten devices`.")
        return (None if text is None else find_device(text)), 1
    device, count = parse_devices(text)
    return _with_own(device, own), count


def _with_own(device: Device, own: Mapping[str, Any]) -> Device:
    if "devices_per_node" in own:
        device = with_devices_per_node(device, own["devices_per_node"])
    if "network" in own:
        device = with_network(device, own["network"])
    return with_price(device, own["price"]) if "price" in own else device


def plan_for(arguments: argparse.Namespace, target: Target, count: int, phase: Phase) -> Plan:
    """The plan over `count` devices: sizes that are not given are 1, and data parallelism takes what they leave; outside training, where none
    is given, all devices hold a share of each tensor.

    Raises:
        WorkloadError: sizes that do not multiply out to the count, or that have no effect.
    """
    given = plan_of(arguments)
    if given and not isinstance(target, Device):
        named = ", ".join(_option(name) for name in given)
        raise WorkloadError(f"{named} has no effect here; plans go with --device NAME:COUNT of `lighten devices`.")
    if not given.keys() & {"dp", "tp", "pp", "cp"} and phase != "train":
        return Plan(**given, tp=count)
    others = given.get("tp", 1) * given.get("pp", 1) * given.get("cp", 1)
    if "dp" not in given and (others < 1 or count % others):
        raise WorkloadError(f"tp · pp · cp = {others} does not divide {count} devices.")
    plan = Plan(**{"dp": count // others, **given})
    if plan.devices != count:
        raise WorkloadError(f"dp · tp · pp · cp = {plan.devices}, but --device names {count} devices.")
    return plan


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
