"""List the known devices, filter them, or show one with the source of each figure."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lighten.cli.options import add_json, print_json
from lighten.device.catalog import all_devices, read_device
from lighten.device.device import KINDS, PEAK_OF, Device
from lighten.errors import ConstraintError, DeviceError
from lighten.report.table import format_table
from lighten.units import DTYPE_ALIASES, SIZE_UNITS, format_bytes, parse_quantity

EXAMPLE = 'lighten devices --kind gpu --memory ">=80GB" --dtype float8 --sort bandwidth'

_MEMORY = re.compile(r"\s*(>=|<=|>|<|=)?\s*([^<>=]+)")
_SORTS = {
    "name": lambda device: (device.vendor, device.name),
    "memory": lambda device: -(device.memory_bytes or 0),
    "bandwidth": lambda device: -(device.bandwidth_bytes_per_s or 0),
    "power": lambda device: -(device.power_w or 0),
    "price": lambda device: device.price.usd_per_hour if device.price else float("inf"),
    "bfloat16": lambda device: -device.peak_flops_per_s.get("bfloat16", device.peak_flops_per_s.get("float16", 0)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one: a name, another spelling of it, or a TOML file")
    parser.add_argument("--vendor", metavar="V", help="of this vendor alone")
    parser.add_argument("--kind", choices=KINDS, help="of this kind alone")
    parser.add_argument("--memory", metavar="SIZE", help='with so much memory: ">=80GB", "<32GiB"')
    parser.add_argument("--dtype", metavar="D", help="with a known rate of products of this type")
    parser.add_argument("--sort", choices=tuple(_SORTS), default="name", help="largest first, of price the smallest (default name)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        _refuse_filters(arguments)
        device = read_device(arguments.name)
        if arguments.json:
            print_json(device_to_json(device))
        else:
            print(describe(device))
        return 0
    found = sorted(_filtered(arguments), key=_SORTS[arguments.sort])
    if arguments.json:
        print_json([device_to_json(device) for device in found])
    else:
        print(_list(found, _dtype(arguments.dtype)))
    return 0


def device_to_json(device: Device) -> dict[str, Any]:
    """All figures in base units, null where not known."""
    return asdict(device)


def describe(device: Device) -> str:
    """One device, a figure a line, each with its source."""
    others = device.sources.get("others", "not said")
    sources = {**device.sources, **({"price": f"{device.price.source}; {device.price.date}"} if device.price else {})}
    rows = [[what, figure, sources.get(key, sources.get(key.split(".")[0], others))] for what, figure, key in _figures(device)]
    lines = [f"{device.full_name} ({device.name}), {device.vendor}, {device.kind}", "", *(_sourced(rows))]
    if device.aliases:
        lines += ["", f"also called {', '.join(device.aliases)}"]
    lines += [f"note: {note}" for note in device.notes]
    return "\n".join(lines)


def _sourced(rows: list[list[str]]) -> list[str]:
    """The table, with each source once, by its number."""
    sources = list(dict.fromkeys(row[2] for row in rows if row[1] != "not known"))
    numbered = [[row[0], row[1], f"[{sources.index(row[2]) + 1}]" if row[1] != "not known" else ""] for row in rows]
    return [format_table(numbered, ["", "", "source"]), "", *(f"[{number}] {source}" for number, source in enumerate(sources, 1))]


def _figures(device: Device) -> list[tuple[str, str, str]]:
    """(what, figure, its key among the sources) of all that is known, and of what is missed most."""
    varies = " at most" if device.memory_varies and device.memory_bytes else ""
    memory = f"{_gibibytes(device.memory_bytes)}{varies}{f', {device.memory_type}' if device.memory_type else ''}"
    rows = [("memory", memory, "memory_bytes"), ("bandwidth", _rate(device.bandwidth_bytes_per_s), "bandwidth_bytes_per_s")]
    rows += [(f"{name} products, dense", _flops(rate), f"peak_flops_per_s.{name}") for name, rate in device.peak_flops_per_s.items()]
    if not device.peak_flops_per_s:
        rows.append(("products", "not known", "peak_flops_per_s"))
    rows += [(f"{name} products, measured", _flops(rate), f"measured_flops_per_s.{name}") for name, rate in device.measured_flops_per_s.items()]
    for link in device.links:
        joins = f"joins {link.devices}" if link.devices else "between nodes"
        rows.append((f"{link.name}, {joins}", f"{_rate(link.bytes_per_s)} each way", "links"))
    rows.append(("power", "not known" if device.power_w is None else f"{device.power_w:g} W", "power_w"))
    if device.price is None:
        return [*rows, ("price", "not known", "price")]
    return [*rows, ("price", f"${device.price.usd_per_hour:.2f}/h", "price")]


def _list(found: list[Device], dtype: str | None) -> str:
    header = ["name", "vendor", "kind", "memory", "bandwidth", dtype or "bf16 or fp16", "power", "$/h"]
    columns = [
        [device.name for device in found],
        [device.vendor for device in found],
        [device.kind for device in found],
        *map(_to_the_right, zip(*([_dash(cell) for cell in _cells(device, dtype)] for device in found), strict=True)),
    ]
    table = format_table([list(row) for row in zip(*columns, strict=True)], header)
    return f"{table}\n\n{len(found)} devices; dense rates; -: not known; `lighten devices NAME` says where each figure is from"


def _cells(device: Device, dtype: str | None) -> list[str]:
    rates = device.peak_flops_per_s
    rate = rates.get(dtype) if dtype else rates.get("bfloat16", rates.get("float16"))
    power = "not known" if device.power_w is None else f"{device.power_w:g} W"
    price = "not known" if device.price is None else f"{device.price.usd_per_hour:.2f}"
    return [_gibibytes(device.memory_bytes), _rate(device.bandwidth_bytes_per_s), _flops(rate), power, price]


def _to_the_right(column: Sequence[str]) -> list[str]:
    width = max(map(len, column), default=0)
    return [cell.rjust(width) for cell in column]


def _filtered(arguments: argparse.Namespace) -> list[Device]:
    """Those that all filters let through.

    Raises:
        DeviceError: no device is left, or a filter means nothing here.
    """
    found = list(all_devices())
    if arguments.vendor is not None:
        found = [device for device in found if device.vendor.lower() == arguments.vendor.strip().lower()]
        if not found:
            vendors = ", ".join(sorted({device.vendor for device in all_devices()}))
            raise DeviceError(f"--vendor {arguments.vendor}: no device is of this vendor; known: {vendors}.")
    if arguments.kind is not None:
        found = [device for device in found if device.kind == arguments.kind]
    if arguments.memory is not None:
        found = [device for device in found if _has(device, arguments.memory)]
    if (dtype := _dtype(arguments.dtype)) is not None:
        found = [device for device in found if dtype in device.peak_flops_per_s]
    if not found:
        raise DeviceError("no known device is of all that was asked; leave a filter out, or describe one in a TOML file of yours.")
    return found


def _has(device: Device, text: str) -> bool:
    """Whether a device's memory is as `text` says; sizes in GB are as devices are sold: what the driver leaves of them counts.

    Raises:
        ConstraintError: not a size.
    """
    found = _MEMORY.fullmatch(text)
    if not found:
        raise ConstraintError(f'--memory {text!r} is no size; write ">=80GB" or "<32GiB".')
    size = parse_quantity(found[2].strip(), SIZE_UNITS, "size")
    held = device.memory_bytes
    if held is None:
        return False
    return {">=": held >= size, "<=": held <= size, ">": held > size, "<": held < size, "=": abs(held - size) < 0.1 * size}[found[1] or ">="]


def _dtype(text: str | None) -> str | None:
    """A type of products by its name among the rates.

    Raises:
        DeviceError: no device has a rate of it.
    """
    if text is None:
        return None
    short = {"fp8": "float8", "fp4": "float4", "fp6": "float6"}
    name = short.get(text) or DTYPE_ALIASES.get(text, text)
    name = PEAK_OF.get(name, name)
    known = sorted({peak for device in all_devices() for peak in device.peak_flops_per_s})
    if name not in known:
        raise DeviceError(f"--dtype {text}: no device has a known rate of it; known: {', '.join(known)}.")
    return name


def _refuse_filters(arguments: argparse.Namespace) -> None:
    given = [f"--{name}" for name in ("vendor", "kind", "memory", "dtype") if getattr(arguments, name) is not None]
    if arguments.sort != "name":
        given.append("--sort")
    if given:
        raise DeviceError(f"{', '.join(given)} without effect: one device was asked for, {arguments.name}.")


def _rate(value: float | None) -> str:
    return "not known" if value is None else f"{format_bytes(value)}/s"


def _flops(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value / 1e12:.0f} TFLOP/s" if value >= 1e14 else f"{value / 1e12:.3g} TFLOP/s"


def _gibibytes(value: int | None) -> str:
    """In the unit in which devices are sold."""
    if value is None:
        return "not known"
    return f"{value / 2**30:.4g} GiB" if value >= 2**30 else format_bytes(value)


def _dash(text: str) -> str:
    return "-" if text == "not known" else text
