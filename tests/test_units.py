"""Quantities as people write them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lighten.errors import ConstraintError
from lighten.units import (
    COUNT_UNITS,
    DTYPE_ALIASES,
    DTYPE_BITS,
    SIZE_UNITS,
    TIME_UNITS,
    dtype_bytes,
    format_bytes,
    format_count,
    format_seconds,
    parse_dtype,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("50MB", SIZE_UNITS, 50e6),
        (" 1.5 GiB ", SIZE_UNITS, 1.5 * 2**30),
        ("0B", SIZE_UNITS, 0),
        ("1e3KiB", SIZE_UNITS, 1024e3),
        ("20min", TIME_UNITS, 1200),
        ("12.5ms", TIME_UNITS, 0.0125),
        (".5h", TIME_UNITS, 1800),
        ("7B", COUNT_UNITS, 7e9),
        ("128", COUNT_UNITS, 128),
        ("2e-3s", TIME_UNITS, 0.002),
    ],
)
def test_parse_quantity(text, units, value):
    assert parse_quantity(text, units, "size") == pytest.approx(value)


@pytest.mark.parametrize("kind", [SIZE_UNITS, TIME_UNITS, COUNT_UNITS])
@given(number=st.integers(0, 10**12), data=st.data())
def test_every_unit_scales_its_number(kind, number, data):
    unit = data.draw(st.sampled_from(list(kind)))
    assert parse_quantity(f"{number}{unit}", kind, "x") == pytest.approx(number * kind[unit], rel=1e-15)


@pytest.mark.parametrize("text", ["", "MB", "fast", "50", "50mb", "50 ms", "-5MB", "5MBs", "1,5GB", "5 0MB", "0x5MB", "nanMB", "infMB"])
def test_what_is_no_size_is_refused_with_the_units(text):
    with pytest.raises(ConstraintError) as caught:
        parse_quantity(text, SIZE_UNITS, "size")
    assert str(caught.value) == f"size: {text!r} is not a number with a unit; units of size: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB."


def test_a_count_without_unit_is_listed_as_none():
    with pytest.raises(ConstraintError, match=r"budget: '3x' is not a number with a unit; units of budget: none, K, M, B, T\."):
        parse_quantity("3x", COUNT_UNITS, "budget")


@pytest.mark.parametrize(("text", "name"), [("bf16", "bfloat16"), ("fp32", "float32"), ("half", "float16"), ("int8", "int8"), ("float64", "float64")])
def test_parse_dtype(text, name):
    assert parse_dtype(text) == name


@pytest.mark.parametrize("text", ["", "fp12", "FP32", "torch.float32"])
def test_an_unknown_dtype_is_refused_with_those_that_exist(text):
    with pytest.raises(ConstraintError) as caught:
        parse_dtype(text)
    assert str(caught.value).startswith(f"dtype {text!r} is not known; known: float64, float32, bfloat16")
    assert all(name in str(caught.value) for name in (*DTYPE_BITS, *DTYPE_ALIASES))


def test_every_alias_is_a_dtype():
    assert {parse_dtype(alias) for alias in DTYPE_ALIASES} <= set(DTYPE_BITS)


@pytest.mark.parametrize(("name", "count"), [("float32", 4), ("float16", 2), ("float8_e5m2", 1), ("int4", 0.5)])
def test_dtype_bytes(name, count):
    assert dtype_bytes(name) == count


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_bytes, 0, "0 B"),
        (format_bytes, 999, "999 B"),
        (format_bytes, 1000, "1 kB"),
        (format_bytes, 90_868_376, "90.9 MB"),
        (format_bytes, 538_060_800, "538.1 MB"),
        (format_bytes, 538_000_000, "538 MB"),
        (format_bytes, 3.35e12, "3.35 TB"),
        (format_count, 12, "12"),
        (format_count, 2.5e9, "2.5 G"),
        (format_count, 989.4e12, "989.4 T"),
        (format_count, 312e15, "312 P"),
        (format_seconds, 1.5e-6, "1.5 µs"),
        (format_seconds, 0.25, "250 ms"),
        (format_seconds, 59.9, "59.9 s"),
        (format_seconds, 60, "1 min 0 s"),
        (format_seconds, 3600, "1 h 0 min"),
        (format_seconds, 9000, "2 h 30 min"),
    ],
)
def test_format(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize("function", [format_bytes, format_count, format_seconds])
def test_what_is_not_known_says_so(function):
    assert function(None) == "not known"


@given(st.floats(1, 9.9e14))
def test_formatted_bytes_are_within_a_half_per_cent(value):
    number, unit = format_bytes(value).split(" ")
    assert float(number) * SIZE_UNITS[unit.replace("k", "K")] == pytest.approx(value, rel=0.0051)


@given(st.floats(1, 1e6))
@example(119.7)
def test_formatted_seconds_have_no_sixtieth_second_or_minute(seconds):
    assert " 60 " not in f"{format_seconds(seconds)} "
