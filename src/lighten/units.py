"""Quantities as people write them, and back: sizes, durations, counts. Inside, base units only."""

from __future__ import annotations

import re

from lighten.errors import ConstraintError

SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

DTYPE_BITS = {
    "float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "uint4": 4, "int4": 4, "bool": 8,
}  # fmt: skip
DTYPE_ALIASES = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16", "fp64": "float64", "f64": "float64", "fp8": "float8_e4m3fn",
}  # fmt: skip

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*$")


def parse_quantity(text: str, units: dict[str, float] | dict[str, int], what: str) -> float:
    """The number in base units that `text` says, such as `50MB` or `20min`.

    Raises:
        ConstraintError: not a number, no unit, or a unit of another kind.

    >>> parse_quantity("50MB", SIZE_UNITS, "size")
    50000000.0
    """
    found = _NUMBER.match(text)
    if not found or found[2] not in units:
        known = ", ".join(unit or "none" for unit in units)
        raise ConstraintError(f"{what}: {text!r} is not a number with a unit; units of {what}: {known}.")
    return float(found[1]) * units[found[2]]


def parse_dtype(text: str) -> str:
    """The full name of a data type: `bf16` → `bfloat16`.

    Raises:
        ConstraintError: not a data type of `DTYPE_BITS`.
    """
    name = DTYPE_ALIASES.get(text, text)
    if name not in DTYPE_BITS:
        raise ConstraintError(f"dtype {text!r} is not known; known: {', '.join([*DTYPE_BITS, *DTYPE_ALIASES])}.")
    return name


def dtype_bytes(name: str) -> float:
    """Bytes of one element.

    >>> dtype_bytes("bfloat16")
    2.0
    """
    return DTYPE_BITS[name] / 8


def format_bytes(count: float | None) -> str:
    """
    >>> format_bytes(90868376), format_bytes(None)
    ('90.9 MB', 'not known')
    """
    return _scaled(count, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")], "B")


def format_count(count: float | None) -> str:
    """
    >>> format_count(22713216), format_count(347892350976)
    ('22.7 M', '347.9 G')
    """
    return _scaled(count, [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")], "")


def format_seconds(seconds: float | None) -> str:
    """
    >>> format_seconds(0.0123), format_seconds(754)
    ('12.3 ms', '12 min 34 s')
    """
    if seconds is None:
        return "not known"
    if round(seconds) >= 3600:
        return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"
    if seconds >= 59.95:  # below, three digits do not round up to a minute
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return _scaled(seconds, [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")], "s")


def _scaled(value: float | None, scales: list[tuple[float, str]], unit: str) -> str:
    if value is None:
        return "not known"
    for scale, name in scales:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}" if value / scale < 99.95 else f"{value / scale:.1f} {name}".replace(".0 ", " ")
    return f"{value:.3g} {unit}".strip()
