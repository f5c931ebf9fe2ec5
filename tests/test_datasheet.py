"""The roofline of published figures: its limits, its symmetries, what it refuses, and kernels that others measured."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.cost.operators import Op
from lighten.device.datasheet import (
    BOUNDS,
    Rates,
    attention_type,
    device_class,
    joined_seconds,
    known_rates,
    limits,
    load_rates,
    op_parts,
    op_seconds,
    pass_time,
    rates_from,
    type_class,
)
from lighten.device.device import Device, Link
from lighten.errors import DeviceError
from lighten.model.spec import WeightFormat

H100 = Device(
    name="h100", full_name="H100 SXM", vendor="NVIDIA", kind="gpu", memory_type="HBM3", bandwidth_bytes_per_s=3.35e12, memory_bytes=80 * 2**30,
    peak_flops_per_s={"float32": 67e12, "bfloat16": 989e12, "float16": 989e12, "float8": 1979e12}, links=(Link(name="NVLink4", bytes_per_s=450e9),),
)  # fmt: skip
PLAIN = Rates(
    name="plain", compute_share={"bit32": 1.0, "bit16": 1.0, "bit8": 1.0, "bit4": 1.0}, attention_share=1.0, bandwidth_share=1.0, cache_share=1.0,
    vector_share=1e-9, half_rows=0.0, half_columns=0.0, half_outputs=0.0, operator_s=0.0, pointwise=1.0, experts_share=1.0, sharpness=64.0,
)  # fmt: skip
"""No losses at all: what is left is the roofline."""


def product(rows: int, columns: int, outputs: int, weight: WeightFormat | None = None) -> Op:
    weight = weight or WeightFormat(dtype="bfloat16")
    flops = 2 * rows * columns * outputs
    return Op(
        name="", kind="linear", component="mlp", matmul_flops=flops, causal_flops=flops, weight_bytes=weight.stored_bytes(outputs, columns),
        activation_bytes=2 * rows * (columns + outputs), rows=rows, columns=columns, outputs=outputs, weight=weight,
    )  # fmt: skip


INFERENCE_RATES = [name for name in known_rates() if "training" not in name]


# ---- the rates that are kept: one set of promises for each ----


@pytest.mark.parametrize("name", INFERENCE_RATES)
def test_kept_rates_are_shares_and_seconds(name: str) -> None:
    rates = load_rates(name)
    assert rates.name == name
    assert rates.sources
    for one in (rates, *(dataclasses.replace(rates, by_class={}, **changed) for changed in rates.by_class.values())):
        shares = [*one.compute_share.values(), one.attention_share, one.bandwidth_share, one.cache_share, one.link_share, one.vector_share]
        assert all(0 < share <= 1 for share in shares), shares
        assert all(0 < share <= 1 for share in one.weight_only.values())
        assert 0 < one.pointwise <= 1
        assert all(0 <= seconds < 1e-2 for seconds in (one.operator_s, one.pass_s, one.recorded_s, one.sequence_s, one.collective_s, one.hop_s))
        assert set(one.compute_share) == {"bit32", "bit16", "bit8", "bit4"}


@pytest.mark.parametrize("name", [name for name in INFERENCE_RATES if name != "kernels"])
def test_kept_rates_have_a_range_for_each_kind(name: str) -> None:
    rates = load_rates(name)
    for kind in ("prefill", "decode", "serving"):
        assert 1.05 < rates.range_factor(kind) < 50
        assert rates.range_factor(kind, 0.2) > rates.range_factor(kind), "what is not said widens the range"


# ---- the roofline ----


def test_without_losses_a_large_product_takes_its_flops_over_the_peak() -> None:
    seconds, bound = op_seconds(product(65536, 8192, 8192), H100, PLAIN, dtype="bfloat16")
    assert bound == "compute"
    assert seconds == pytest.approx(2 * 65536 * 8192 * 8192 / 989e12, rel=1e-6)


def test_without_losses_one_row_takes_its_bytes_over_the_bandwidth() -> None:
    op = product(1, 8192, 8192)
    seconds, bound = op_seconds(op, H100, PLAIN, dtype="bfloat16")
    assert bound == "memory"
    assert seconds == pytest.approx(op.bytes / 3.35e12, rel=1e-6)


@given(rows=st.integers(1, 4096), columns=st.integers(64, 16384), outputs=st.integers(64, 16384), dtype=st.sampled_from(["bfloat16", "float8"]))
def test_no_product_is_faster_than_the_figures_allow(rows: int, columns: int, outputs: int, dtype: str) -> None:
    op = product(rows, columns, outputs)
    least = max(op.matmul_flops / H100.peak(dtype), op.bytes / H100.bandwidth())
    for name in INFERENCE_RATES:
        assert op_seconds(op, H100, load_rates(name), dtype=dtype)[0] >= least * (1 - 1e-9)


@given(rows=st.integers(1, 2048), more=st.integers(1, 2048), columns=st.integers(64, 8192), outputs=st.integers(64, 8192))
def test_more_rows_never_take_less_time(rows: int, more: int, columns: int, outputs: int) -> None:
    rates = load_rates("engine")
    one, other = (op_seconds(product(m, columns, outputs), H100, rates, dtype="bfloat16")[0] for m in (rows, rows + more))
    assert other >= one * (1 - 1e-9)


@given(compute=st.floats(1e-9, 1.0), memory=st.floats(1e-9, 1.0), sharpness=st.floats(1.0, 16.0))
def test_joined_seconds_lie_between_the_larger_and_the_sum(compute: float, memory: float, sharpness: float) -> None:
    joined = joined_seconds(compute, memory, sharpness)
    assert max(compute, memory) * (1 - 1e-9) <= joined <= (compute + memory) * (1 + 1e-9)
    assert joined == pytest.approx(joined_seconds(memory, compute, sharpness))


def test_narrower_codes_are_read_faster_and_computed_in_the_wide_type() -> None:
    rates = load_rates("engine")
    four = product(1, 8192, 8192, WeightFormat(bits=4, group_size=128))
    assert op_seconds(four, H100, rates, dtype="bfloat16")[0] < op_seconds(product(1, 8192, 8192), H100, rates, dtype="bfloat16")[0]
    many = product(8192, 8192, 8192, WeightFormat(bits=4, group_size=128))
    assert op_seconds(many, H100, rates, dtype="bfloat16")[0] >= op_seconds(product(8192, 8192, 8192), H100, rates, dtype="bfloat16")[0]


def test_experts_count_the_rows_that_one_of_them_gets() -> None:
    experts = dataclasses.replace(product(512, 4096, 4096), weight_bytes=64 * WeightFormat(dtype="bfloat16").stored_bytes(4096, 4096))
    one = product(512, 4096, 4096)
    rates = dataclasses.replace(PLAIN, half_rows=45.0, vector_share=1.0)
    assert op_seconds(experts, H100, rates, dtype="bfloat16")[0] > op_seconds(one, H100, rates, dtype="bfloat16")[0]


def test_parts_sum_to_the_seconds_and_to_the_pass() -> None:
    rates = load_rates("engine")
    ops = [product(m, 4096, 14336) for m in (1, 64, 4096)]
    whole = pass_time(ops, H100, rates, dtype="bfloat16")
    assert set(whole) == set(BOUNDS)
    expected = rates.on(H100).pass_s + sum(op_seconds(op, H100, rates, dtype="bfloat16")[0] for op in ops)
    assert sum(whole.values()) == pytest.approx(expected)
    assert sum(op_parts(ops[0], limits(H100, "bfloat16"), rates.on(H100)).values()) == pytest.approx(
        op_seconds(ops[0], H100, rates, dtype="bfloat16")[0]
    )


# Source: aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), systems/data/h100_sxm, gemm_perf, bfloat16: the best of 384 is 0.92 of the peak
@pytest.mark.parametrize("name", ["kernels", "engine"])
def test_large_products_reach_what_kernels_were_measured_to_reach(name: str) -> None:
    seconds, _ = op_seconds(product(16384, 16384, 16384), H100, load_rates(name), dtype="bfloat16")
    reached = 2 * 16384**3 / seconds
    assert 0.55 * 989e12 < reached < 0.93 * 989e12


# ---- classes of device and type ----


@pytest.mark.parametrize(
    ("kind", "memory", "expected"),
    [("gpu", "HBM3", "stacked"), ("gpu", "GDDR6X", "graphics"), ("soc", "LPDDR unified", "unified"), ("cpu", "8ch DDR5-4800", "host"),
     ("apu", "HBM3", "stacked"), ("gpu", None, "graphics"), ("npu", "HBM2e", "npu"), ("tpu", "HBM", "tpu")],
)  # fmt: skip
def test_device_class(kind: str, memory: str | None, expected: str) -> None:
    assert device_class(dataclasses.replace(H100, kind=kind, memory_type=memory)) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", "bit32"), ("tf32", "bit32"), ("int8", "bit8"), ("float8_e5m2", "bit8"), ("int4", "bit4")],
)
def test_type_class(dtype: str, expected: str) -> None:
    assert type_class(dtype) == expected


def test_attention_of_narrow_products_is_computed_in_16_bits() -> None:
    assert attention_type(H100, "float8") == "bfloat16"
    assert limits(H100, "float8").attention_flops_per_s == 989e12


def test_rates_of_a_class_differ_on_its_devices_alone() -> None:
    rates = dataclasses.replace(PLAIN, by_class={"graphics": {"bandwidth_share": 0.5}})
    assert rates.on(H100).bandwidth_share == 1.0
    assert rates.on(dataclasses.replace(H100, memory_type="GDDR6")).bandwidth_share == 0.5


def test_later_software_computes_more_and_reads_as_before() -> None:
    rates = dataclasses.replace(PLAIN, progress=0.2, year=2025.0, compute_share=dict.fromkeys(PLAIN.compute_share, 0.5))
    later = rates.in_year(2026.0)
    assert later.compute_share["bit16"] == pytest.approx(0.5 * math.exp(0.2))
    assert later.bandwidth_share == rates.bandwidth_share
    assert rates.in_year(1999.0).compute_share["bit16"] == rates.in_year(2022.0).compute_share["bit16"], "years without a row add nothing"


# ---- what is refused ----


def test_a_type_that_the_device_has_no_rate_of() -> None:
    with pytest.raises(DeviceError, match=r"^h100 has no known rate of float4 products; its known types: float32, bfloat16, float16, float8\.$"):
        op_seconds(product(1, 64, 64), H100, PLAIN, dtype="float4")


def test_a_device_without_bandwidth() -> None:
    with pytest.raises(DeviceError, match=r"^h100: its memory bandwidth is not known\.$"):
        op_seconds(product(1, 64, 64), dataclasses.replace(H100, bandwidth_bytes_per_s=None), PLAIN, dtype="bfloat16")


def test_narrow_products_alone_leave_attention_without_a_rate() -> None:
    device = dataclasses.replace(H100, peak_flops_per_s={"int8": 1e12})
    with pytest.raises(DeviceError, match=r"^h100 has no known rate of bfloat16, float16, tf32, float32 products, which attention needs; .*int8\.$"):
        limits(device, "int8")


@pytest.mark.parametrize("name", ["none-such", "../engine", ""])
def test_rates_that_do_not_exist(name: str) -> None:
    with pytest.raises(DeviceError, match=r"^no rates named .* are known; known: .*eager, engine, ggml, kernels, local"):
        load_rates(name)


@pytest.mark.parametrize(
    ("document", "message"),
    [({"name": "x", "compute_share": {}, "speed": 1}, r"^rates have no speed; they have: .*attention_share"),
     ({"name": "x"}, r"^rates without compute_share\.$")],
)  # fmt: skip
def test_rates_of_another_form(document: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        rates_from(json.loads(json.dumps(document)))


def test_a_spread_that_was_never_measured() -> None:
    with pytest.raises(DeviceError, match=r"^rates plain: the spread of decode was not measured; known: nothing\.$"):
        PLAIN.range_factor("decode")
