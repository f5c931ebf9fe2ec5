"""Devices by name."""

from __future__ import annotations

from lighten.device.device import Device
from lighten.device.profile import Profile, load_profile
from lighten.errors import DeviceError

THIS_MACHINE = ("this", "cpu")


def find_device(name: str) -> Profile:
    """The profile of a device; `this` and `cpu` are this machine.

    Raises:
        DeviceError: an unknown name, or a machine that was not measured yet.
    """
    if name not in THIS_MACHINE:
        raise DeviceError(f"no device {name!r}; devices: {', '.join(THIS_MACHINE)} (this machine, measured by `lighten probe`).")
    return load_profile()


def find_place(
    text: str, *, price: str | None = None, network: str | None = None, devices_per_node: int | None = None
) -> tuple[Profile | Device, int]:  # fmt: skip
    """What `--device` names, and how many of it: this machine, or devices of published figures with what is the user's own of them.

    Raises:
        DeviceError: no such device or count, a machine that was not measured, or figures of one's own for it.
    """
    if text in THIS_MACHINE:
        if network is not None or devices_per_node is not None:
            raise DeviceError(f"--network and --devices-per-node have no effect on {text}, which is one machine.")
        if price is not None:
            raise DeviceError(f"--price has no effect on {text}: money is of devices that are rented; name one of `lighten devices`.")
        return load_profile(), 1
    from lighten.device.catalog import parse_devices, with_devices_per_node, with_network, with_price  # which most estimates do without

    if text.partition(":")[0] in THIS_MACHINE:
        raise DeviceError(f"{text}: this machine is one; it takes no count.")
    device, count = parse_devices(text)
    if network is not None:
        device = with_network(device, network)
    if devices_per_node is not None:
        device = with_devices_per_node(device, devices_per_node)
    return (device if price is None else with_price(device, price)), count
