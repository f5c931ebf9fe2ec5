"""The devices that are known, and those that a user describes in a TOML file: read, checked, found by what people call them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from datetime import date
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from lighten.device.device import KINDS, PEAK_OF, PEAKS, Device, Link, Price
from lighten.device.spelling import Spelling, certain, choose, common, explained
from lighten.errors import DeviceError

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # the same module, which joined the standard library in 3.11

KNOWN = Path(__file__).parent / "known"
MAX_FILE_BYTES = 1_000_000
DEEPEST_KEY = 100
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_COUNT = re.compile(r"(.+):([^:/\\]*)")


def read_device(text: str) -> Device:
    """The device of a name such as h100-sxm, of another spelling of it, or of a TOML file.

    Raises:
        DeviceError: no device is called so, several are, or the file is not a device's.
    """
    path = Path(text)
    if text.lower().endswith(".toml") or text.startswith(("/", "./", "../", ".\\", "..\\")):
        return read_file(path)
    name = text.strip().lower()
    if _NAME.fullmatch(name) and (KNOWN / f"{name}.toml").is_file():
        return _known(name)
    asked = Spelling.of(text)
    found = [device for device in all_devices() if explained(asked, device)]
    best = choose(asked, found)
    if len(best) == 1 and certain(asked, best[0]):
        return _with_memory_of(asked, best[0])
    if len(best) == 1:
        raise DeviceError(f"{_short(text)} leaves open which; the only one known that it may be is {best[0].name}.")
    if not best:
        raise DeviceError(
            f"no device is called {_short(text)}; {_nearest(text)}`lighten devices` lists all, and a TOML file of yours may describe one."
        )
    raise DeviceError(f"{_short(text)} may be any of {', '.join(device.name for device in best)}; say which.")


def match_device(text: str, *, memory_bytes: float | None = None, bandwidth_bytes_per_s: float | None = None) -> Device | None:
    """The device that a free text means, as tables of results spell it; None where that is not certain.

    A text that leaves a choice (M1 Max, of 24 or 32 cores) gives what the choices have in common, where memory and bandwidth are among that.

    Args:
        memory_bytes, bandwidth_bytes_per_s: what else is known of it: they decide between devices that the text leaves.

    >>> match_device("RTX4090-24GB").name, match_device("NVIDIA A100-SXM4-80GB").name, match_device("RTX4090+RTX3090Ti")
    ('rtx-4090', 'a100-sxm-80gb', None)
    """
    for asked in Spelling.readings(text):
        found = choose(asked, [device for device in all_devices() if explained(asked, device)])
        if len(found) > 1 or not all(certain(asked, device) for device in found):
            known = memory_bytes or bandwidth_bytes_per_s
            found = [device for device in found if (known or len(found) > 1) and _has_figures(device, memory_bytes, bandwidth_bytes_per_s)]
        if found:
            one = found[0] if len(found) == 1 else common(found)
            return one and _with_memory_of(asked, one)
    return None


def parse_devices(text: str) -> tuple[Device, int]:
    """A device and how many of it: h100-sxm:64.

    Raises:
        DeviceError: no such device, or no such count.
    """
    found = _COUNT.fullmatch(text)
    if not found:
        return read_device(text), 1
    if not re.fullmatch(r"0*[1-9][0-9]{0,7}", found[2]):
        raise DeviceError(f"{_short(text)}: {_short(found[2])} is no number of devices; write {found[1]}:8.")
    return read_device(found[1]), int(found[2])


@cache
def all_devices() -> tuple[Device, ...]:
    """Every known device, by name."""
    return tuple(_known(path.stem) for path in sorted(KNOWN.glob("*.toml")))


@cache
def _known(name: str) -> Device:
    return read_file(KNOWN / f"{name}.toml")


def with_price(device: Device, text: str) -> Device:
    """The device at another price, in US dollars for an hour of one.

    Raises:
        DeviceError: not a price.

    >>> with_price(read_device("h100-sxm"), "2.10/h").price.usd_per_hour
    2.1
    """
    return replace(device, price=Price(usd_per_hour=parse_price(text), date=date.today().isoformat(), source="given"))


def parse_price(text: str) -> float:
    """US dollars for an hour of one device.

    Raises:
        DeviceError: not a price.

    >>> parse_price("0.40/h")
    0.4
    """
    found = re.fullmatch(r"\s*\$?\s*(\d{1,9}(?:\.\d{1,9})?)\s*(?:USD)?\s*(?:/\s*(?:h|hr|hour))?\s*", text, re.IGNORECASE)
    if not found:
        raise DeviceError(f"--price {_short(text)} is no price of one device; write US dollars for an hour, such as 2.10/h.")
    return float(found[1])


def with_network(device: Device, text: str) -> Device:
    """The device with another network between nodes: bits (b) or bytes (B) per second of one device, in one direction; or of a node, `/node`.

    Raises:
        DeviceError: not a rate; or a node's rate of a device of which no node is known.

    >>> with_network(read_device("h100-sxm"), "8x400Gb/s/node").links[-1].bytes_per_s
    50000000000.0
    """
    found = re.fullmatch(r"\s*(?:(\d{1,4})\s*x\s*)?(\d{1,9}(?:\.\d{1,9})?)\s*([kKMGT]?)([bB])(?:ps|/s)\s*(/\s*node)?\s*", text)
    if not found or not float(found[2]) or found[1] == "0":
        raise DeviceError(f"--network {_short(text)} is no rate of one device; write 400Gb/s, 50GB/s, or of a whole node 8x400Gb/s/node.")
    rate = (
        int(found[1] or 1) * float(found[2]) * {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[3]] / (8 if found[4] == "b" else 1)
    )
    inside = tuple(link for link in device.links if link.devices is not None)
    if found[5]:
        if not inside or inside[-1].devices is None:
            raise DeviceError(f"--network {_short(text)}: how many {device.name} a node has is not known; give the rate of one device.")
        rate /= inside[-1].devices
    return replace(device, links=(*inside, Link(name=f"network of {text.strip()}", bytes_per_s=rate)))


def with_devices_per_node(device: Device, count: int) -> Device:
    """The device in nodes of another size.

    Raises:
        DeviceError: of a device alone in its node no link inside is asked for; of more, none is known.
    """
    if count < 1:
        raise DeviceError(f"{count} devices a node: at least 1.")
    outside = tuple(link for link in device.links if link.devices is None)
    inside = [link for link in device.links if link.devices is not None]
    if count == 1:
        return replace(device, links=outside)
    if not inside:
        raise DeviceError(f"{count} of {device.name} in a node: no link inside a node is known of it.")
    inner = tuple(link for link in inside[:-1] if link.devices is not None and link.devices < count)
    return replace(device, links=(*inner, replace(inside[-1] if len(inner) == len(inside) - 1 else inside[len(inner)], devices=count), *outside))


# ---- a file ----


def read_file(path: Path) -> Device:
    """The device that a TOML file describes; every figure is checked for its unit.

    Raises:
        DeviceError: no file, no TOML, unknown keys, or figures that cannot be; one line says all of it.
    """
    document = _parsed(path)
    problems = _Problems()
    device = _device(document, problems)
    if problems.found:
        raise DeviceError(f"{path.name}: {'; '.join(problems.found)}.")
    return device


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        if path.is_dir():
            raise DeviceError(f"{path} is a folder; a device is one TOML file.")
        if not path.is_file():
            raise DeviceError(f"{path} is no file that can be read." if path.exists() else f"there is no file {path}.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DeviceError(f"{path} has {path.stat().st_size} bytes; a device's TOML file has at most {MAX_FILE_BYTES}.")
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DeviceError(f"{path} is no text; a device is a TOML file in UTF-8.") from error
    except (OSError, ValueError) as error:  # a name that the system refuses
        raise DeviceError(f"{_short(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if any(line.partition("=")[0].count(".") > DEEPEST_KEY for line in text.splitlines()):  # the parser's time is quadratic in it
        raise DeviceError(f"{path.name} is no device's TOML: a key has more than {DEEPEST_KEY} dots.")
    try:
        document: Mapping[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError of its own
        raise DeviceError(f"{path.name} is no TOML: {error or 'nested too deeply'}.") from error
    return document


class _Problems:
    """What is wrong with a document; each check takes its value out and notes what it found."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def text(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > 2000:
            self.found.append(f"{where} = {_short(value)} is no text")
            return ""
        return value

    def texts(self, where: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            self.found.append(f"{where} = {_short(value)} is no list of texts")
            return ()
        return tuple(self.text(where, item) for item in value)

    def number(self, where: str, value: Any, low: float, high: float, unit: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            self.found.append(f"{where} = {_short(value)} is no number; give {unit}")
            return low
        if not low <= value <= high:
            side, bound = ("below", low) if value < low else ("above", high)
            self.found.append(f"{where} = {_short(value)} is {side} {bound:g}; give {unit}")
            return low
        return float(value)

    def whole(self, where: str, value: Any, low: int, high: int, unit: str) -> int:
        number = self.number(where, value, low, high, unit)
        if number != int(number):
            self.found.append(f"{where} = {value} is no whole number; give {unit}")
        return int(number)

    def truth(self, where: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.found.append(f"{where} = {_short(value)} is neither true nor false")
        return value is True

    def table(self, where: str, value: Any, keys: Mapping[str, bool]) -> Mapping[str, Any]:
        """A table of these keys; those that are True have to be there."""
        if not isinstance(value, Mapping):
            self.found.append(f"{where} = {_short(value)} is no table")
            return {}
        if unknown := [key for key in value if key not in keys]:
            self.found.append(f"{where + ' has' if where else 'has'} unknown keys {', '.join(map(_short, unknown))}; known: {', '.join(keys)}")
        if missing := [key for key, needed in keys.items() if needed and key not in value]:
            self.found.append(f"{where + ' has' if where else 'has'} no {', '.join(missing)}")
        return value


_KEYS = {field.name: field.name == "name" for field in fields(Device)}
_SHORT_TYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8", "fp6": "float6", "fp4": "float4"}


def _device(document: Mapping[str, Any], problems: _Problems) -> Device:
    table = problems.table("", document, _KEYS)
    read = {name: _READERS[name](problems, table[name]) for name in _KEYS if name in table}
    name = read.setdefault("name", "")
    if name and not _NAME.fullmatch(name):
        problems.found.append(f"name = {_short(name)} is not of lower-case letters, digits, '.' and '-'")
    read.setdefault("full_name", name)
    read.setdefault("vendor", "not said")
    read.setdefault("kind", "other")
    return Device(**read)


def _kind(problems: _Problems, value: Any) -> str:
    if value not in KINDS:
        problems.found.append(f"kind = {_short(value)} is none of {', '.join(KINDS)}")
        return "other"
    return str(value)


def _rates(where: str) -> Callable[[_Problems, Any], Mapping[str, float]]:
    def read(problems: _Problems, value: Any) -> Mapping[str, float]:
        if not isinstance(value, Mapping):
            problems.found.append(f"{where} = {_short(value)} is no table")
            return {}
        found = {}
        for key, rate in value.items():
            name: str = _SHORT_TYPES.get(key) or PEAK_OF.get(key) or key
            if name not in PEAKS:
                problems.found.append(f"{where}.{_short(key)[1:-1]} is no type of products; known: {', '.join(PEAKS)}")
            elif name in found:
                problems.found.append(f"{where} says {name} twice")
            found[name] = problems.number(f"{where}.{key}", rate, 1e9, 1e18, "FLOP/s, such as 989e12")
        return found

    return read


def _links(problems: _Problems, value: Any) -> tuple[Link, ...]:
    if not isinstance(value, list):
        problems.found.append("links is no list; write [[links]] over each")
        return ()
    return tuple(_link(problems, f"links[{index}]", item) for index, item in enumerate(value))


def _link(problems: _Problems, where: str, value: Any) -> Link:
    table = problems.table(where, value, {"name": True, "bytes_per_s": True, "devices": False, "latency_s": False})
    return Link(
        name=problems.text(f"{where}.name", table["name"]) if "name" in table else "",
        bytes_per_s=problems.number(
            f"{where}.bytes_per_s", table.get("bytes_per_s", 1e9), 1e5, 1e15, "bytes per second in one direction, such as 450e9"
        ),
        devices=problems.whole(f"{where}.devices", table["devices"], 2, 10**7, "how many devices it joins") if "devices" in table else None,
        latency_s=problems.number(f"{where}.latency_s", table["latency_s"], 0, 10, "seconds") if "latency_s" in table else None,
    )


def _price(problems: _Problems, value: Any) -> Price:
    table = problems.table("price", value, {"usd_per_hour": True, "date": True, "source": True})
    day = table.get("date", "2000")
    text = day.isoformat() if isinstance(day, date) else str(day)
    if not re.fullmatch(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?", text):
        problems.found.append(f"price.date = {_short(day)} is no day such as 2026-11-22, nor a month or a year of that form")
    return Price(
        usd_per_hour=problems.number("price.usd_per_hour", table.get("usd_per_hour", 1.0), 0, 1e4, "US dollars for an hour of one device"),
        date=text,
        source=problems.text("price.source", table["source"]) if "source" in table else "",
    )


def _sources(problems: _Problems, value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        problems.found.append(f"sources = {_short(value)} is no table")
        return {}
    if unknown := [key for key in value if key.split(".")[0] not in (*_KEYS, "others")]:
        problems.found.append(f"sources has unknown keys {', '.join(map(_short, unknown))}; known: others, {', '.join(_KEYS)}")
    return {key: problems.text(f"sources.{key}", text) for key, text in value.items()}


def _text(name: str) -> Callable[[_Problems, Any], str]:
    return lambda problems, value: problems.text(name, value)


def _texts(name: str) -> Callable[[_Problems, Any], tuple[str, ...]]:
    return lambda problems, value: problems.texts(name, value)


_READERS: dict[str, Callable[[_Problems, Any], Any]] = {
    **{name: _text(name) for name in ("name", "full_name", "vendor", "memory_type")},
    **{name: _texts(name) for name in ("aliases", "notes")},
    "kind": _kind,
    "peak_flops_per_s": _rates("peak_flops_per_s"),
    "measured_flops_per_s": _rates("measured_flops_per_s"),
    "memory_bytes": lambda problems, value: problems.whole("memory_bytes", value, 2**20, 2**50, "bytes, such as 85899345920"),
    "memory_varies": lambda problems, value: problems.truth("memory_varies", value),
    "bandwidth_bytes_per_s": lambda problems, value: problems.number("bandwidth_bytes_per_s", value, 1e6, 1e17, "bytes per second, such as 3.35e12"),
    "power_w": lambda problems, value: problems.number("power_w", value, 1e-3, 1e6, "watts"),
    "links": _links,
    "price": _price,
    "sources": _sources,
}  # fmt: skip
"""Field of `Device` → how its value in a document is read and checked."""


# ---- texts ----


def _with_memory_of(asked: Spelling, device: Device) -> Device:
    """What is sold with several sizes of memory, with the size that the text says."""
    if not device.memory_varies or asked.memory_gb is None:
        return device
    return replace(device, memory_bytes=round(asked.memory_gb * 2**30))


def _has_figures(device: Device, memory_bytes: float | None, bandwidth_bytes_per_s: float | None) -> bool:
    """Whether a device may be one of which these figures are told: memory within 8 %, as sold or as left by the driver; bandwidth within 3 %."""
    held, bandwidth = device.memory_bytes, device.bandwidth_bytes_per_s
    if memory_bytes and held and not (device.memory_varies and memory_bytes <= held) and abs(memory_bytes / held - 1) > 0.08:
        return False
    return not (bandwidth_bytes_per_s and bandwidth and abs(bandwidth_bytes_per_s / bandwidth - 1) > 0.03)


def _nearest(text: str) -> str:
    """What may be meant instead, as the beginning of a sentence."""
    from difflib import get_close_matches  # of an error alone

    names = [device.name for device in all_devices()]
    near = get_close_matches(text.lower()[:100], names, n=4, cutoff=0.5)
    return f"near it: {', '.join(near)}; " if near else ""


def _short(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        return "a number of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}…"
