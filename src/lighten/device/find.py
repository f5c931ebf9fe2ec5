"""Devices by name."""

from __future__ import annotations

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
