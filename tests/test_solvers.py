"""Scales by search against brute force, small floats against torch's and compressed-tensors' own, HQQ against round-to-nearest.

Seeded faults that these tests catch, each tried by hand: a search that rounds its scale after the codes are chosen (caught with bfloat16 only:
a float16 one ends in a refit); that leaves out the importance; that tries no zero point beside the centered one; ties of e2m1 rounded away
from zero; nvfp4's global scale multiplied instead of divided by; an mxfp4 exponent of floor(log2(largest)) - 2 without e2m1's rounding;
HQQ's shrinkage without its sign.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lighten.compress.grid import QuantizedTensor, to_groups
from lighten.compress.hqq import quantize_hqq
from lighten.compress.minifloat import LARGEST, decode, encode, nvfp4_global_scale, quantize_float, round_array, round_to
from lighten.compress.rtn import quantize_rtn
from lighten.compress.scale_search import search_scales
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, WeightFormat

FP8 = WeightFormat(bits=8, element="e4m3", scale_dtype="bfloat16")
MXFP4 = WeightFormat(bits=4, element="e2m1", scale_dtype="uint8", group_size=32)
NVFP4 = WeightFormat(bits=4, element="e2m1", scale_dtype="float8_e4m3fn", group_size=16, global_scale=True)
ELEMENTS = ("e4m3", "e2m1")
seeds = st.integers(0, 2**31 - 1)


def random_weight(rows: int, columns: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight + 3 * weight * (torch.rand(rows, columns, generator=generator) < 0.02)


def importance_of(columns: int, *, seed: int) -> Tensor:
    return torch.exp(2 * torch.randn(columns, generator=torch.Generator().manual_seed(seed + 1)))


def error_of(weight: Tensor, found: QuantizedTensor, importance: Tensor) -> Tensor:
    """[O, G]."""
    squares = (weight.float() - found.dequantize()).square() * importance
    return to_groups(squares, found.group_size).sum(-1)


# scales by search


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, PER_CHANNEL, PER_TENSOR])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_search_is_never_worse_than_the_grid_that_spans_the_group(bits: int, symmetric: bool, group_size: int, dtype: str) -> None:
    weight, importance = random_weight(9, 64, seed=bits), importance_of(64, seed=bits)
    format = WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    found = search_scales(weight, format=format, importance=importance)
    plain = quantize_rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    assert found.scale.dtype == getattr(torch, dtype)
    assert (found.zero_point is None) == symmetric
    assert int(found.codes.max()) < 2**bits
    if dtype == "float16":
        assert (error_of(weight, found, importance) <= error_of(weight, plain, importance) * (1 + 1e-5)).all()
    if bits < 8:
        assert error_of(weight, found, importance).sum() < 0.9 * error_of(weight, plain, importance).sum()


def brute_force(weight: Tensor, importance: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    """[O] least error over 2,000 scales of either sign, all zero points, and the nearest codes on each grid."""
    top, best = 2**bits - 1, torch.full((len(weight),), torch.inf)
    largest = 2 * weight.abs().amax(1) / (1 if bits == 2 else 2 ** (bits - 2))
    zeros = (2 ** (bits - 1),) if symmetric else range(top + 1)
    for share, sign, zero in product(torch.linspace(0.001, 1, 1000).tolist(), (1, -1), zeros):
        scale = (sign * share * largest).half().float()[:, None]
        codes = (weight / scale + zero).round().clamp(0, top)
        best = torch.minimum(best, (((codes - zero) * scale - weight).square() * importance).sum(1))
    return best


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (3, False), (4, True)])
def test_the_search_comes_near_the_best_of_all_grids(bits: int, symmetric: bool) -> None:
    weight, importance = random_weight(40, 16, seed=1), importance_of(16, seed=2)
    found = search_scales(weight, format=WeightFormat(bits=bits, group_size=16, symmetric=symmetric), importance=importance)
    ours, best = error_of(weight, found, importance)[:, 0], brute_force(weight, importance, bits=bits, symmetric=symmetric)
    assert (ours >= best * 0.99).all()  # a refit may lie between two of the tried scales
    assert ours.sum() < 1.08 * best.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_are_the_nearest_on_the_stored_grid(dtype: str, symmetric: bool) -> None:
    weight = random_weight(512, 64, seed=3)  # many: a scale that was not yet rounded gives another code to one in some hundred or thousand
    found = search_scales(weight, format=WeightFormat(bits=4, group_size=16, symmetric=symmetric, scale_dtype=dtype))
    zero = torch.tensor(8.0) if found.zero_point is None else found.zero_point.float()[..., None]
    nearest = (to_groups(weight, 16) / found.scale.float()[..., None] + zero).round().clamp(0, 15)
    assert torch.equal(found.codes.float(), nearest.reshape(weight.shape))


def test_zero_stays_zero() -> None:
    weight = random_weight(8, 32, seed=4)
    weight[:, ::3] = 0
    for bits, symmetric in product((2, 4, 8), (True, False)):
        values = search_scales(weight, format=WeightFormat(bits=bits, group_size=8, symmetric=symmetric)).dequantize()
        assert (values[:, ::3] == 0).all()


@pytest.mark.parametrize("format", [WeightFormat(bits=4, group_size=8), WeightFormat(bits=3, group_size=8, symmetric=False), FP8, MXFP4, NVFP4])
def test_groups_of_zeros_and_of_no_importance(format: WeightFormat) -> None:
    weight, importance = random_weight(4, 32, seed=5), torch.ones(32)
    weight[1] = 0
    importance[:16] = 0
    found = search_scales(weight, format=format, importance=importance)
    assert (found.dequantize()[1] == 0).all()
    assert found.scales().isfinite().all()
    if format.group_size == 8:
        unweighted = search_scales(weight, format=format)
        assert torch.equal(found.dequantize()[:, :16], unweighted.dequantize()[:, :16])


@given(seed=seeds, symmetric=st.booleans(), bits=st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=20)
def test_rows_do_not_see_each_other(seed: int, symmetric: bool, bits: int) -> None:
    weight, importance = random_weight(7, 24, seed=seed), importance_of(24, seed=seed)
    format = WeightFormat(bits=bits, group_size=8, symmetric=symmetric)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    whole, moved = (search_scales(w, format=format, importance=importance) for w in (weight, weight[order]))
    torch.testing.assert_close(moved.dequantize(), whole.dequantize()[order], rtol=1e-3, atol=1e-3)


def test_a_weight_that_lies_on_a_grid_is_kept() -> None:
    codes = torch.randint(0, 16, (4, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 7) * 0.125
    found = search_scales(weight, format=WeightFormat(bits=4, group_size=32, symmetric=False))
    assert torch.equal(found.dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_rtn_takes_every_width(bits: int) -> None:
    found = quantize_rtn(random_weight(3, 32, seed=6), bits=bits, group_size=16, symmetric=False)
    assert found.bits == bits
    assert int(found.codes.max()) == 2**bits - 1


# floats of 8 and 4 bits


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code_decodes_and_encodes_to_itself(element: str) -> None:
    codes = torch.arange(256 if element == "e4m3" else 16, dtype=torch.uint8)
    values = decode(element, codes)
    kept = values.isfinite() & ~((values == 0) & values.signbit())
    assert torch.equal(encode(element, values[kept]), codes[kept])
    assert float(values[kept].max()) == LARGEST[element]
    assert torch.equal(round_to(element, values[kept]), values[kept])


@pytest.mark.parametrize("element", ELEMENTS)
def test_rounding_takes_the_nearest_and_at_ties_the_even_code(element: str) -> None:
    codes = torch.arange(128 if element == "e4m3" else 8, dtype=torch.uint8)
    values = decode(element, codes)
    values = values[values.isfinite()]
    middles = (values[1:] + values[:-1]) / 2
    even = torch.where(codes[: len(middles)] % 2 == 0, values[:-1], values[1:])
    assert torch.equal(round_to(element, middles), even)
    assert torch.equal(round_to(element, -middles), -even)
    below, above = torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(1e9))
    assert torch.equal(round_to(element, below), values[:-1])
    assert torch.equal(round_to(element, above), values[1:])


@pytest.mark.parametrize("element", ELEMENTS)
def test_rounding_in_place_is_the_same(element: str) -> None:
    x = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * scale for scale in (1e-4, 1e-2, 1, 3, 100)])
    edges = decode(element, torch.arange(8, dtype=torch.uint8))
    x = torch.cat([x, (edges[1:] + edges[:-1]) / 2, torch.tensor([0.0, -0.0, 1e4, -1e4])])
    rounded = x.numpy().copy()
    round_array(element, rounded)
    assert np.array_equal(rounded, round_to(element, x).numpy())


def theirs(weight: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """compressed-tensors' scale of each group and the weight that it makes of its codes."""
    groups = to_groups(weight, args.group_size or PER_CHANNEL)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)
    return scale, fake_quantize(weight, scale, zero, args, global_scale=global_scale)


def test_fp8_is_what_compressed_tensors_makes() -> None:
    """Its scale maps the magnitude to half of e4m3's whole range of 896."""
    weight = random_weight(16, 64, seed=7)
    scale, value = theirs(weight, QuantizationArgs(num_bits=8, type="float", strategy="channel"))
    found = quantize_float(weight, format=WeightFormat(bits=8, element="e4m3", scale_dtype="float32"))
    torch.testing.assert_close(found.scale, scale, rtol=1e-6, atol=0)
    assert (found.dequantize() != value).float().mean() < 0.01  # where a float32 scale's last bit moves a tie
    torch.testing.assert_close(found.dequantize(), value, rtol=0.13, atol=1e-6)


def test_mxfp4_is_what_compressed_tensors_makes() -> None:
    weight = random_weight(64, 128, seed=8) * torch.exp(torch.randn(64, 1, generator=torch.Generator().manual_seed(0)))
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)
    scale, value = theirs(weight, args)
    found = quantize_float(weight, format=MXFP4)
    assert found.scale.dtype == torch.uint8
    torch.testing.assert_close(found.scales(), scale.float())
    torch.testing.assert_close(found.dequantize(), value)


def test_nvfp4_is_what_compressed_tensors_makes() -> None:
    weight = random_weight(16, 128, seed=9)
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn
    )
    share = generate_gparam(weight.min(), weight.max())
    torch.testing.assert_close(nvfp4_global_scale([weight]), share)
    scale, value = theirs(weight, args, share)
    found = quantize_float(weight, format=NVFP4)
    assert torch.equal(found.scale.float(), scale.float())
    assert (found.dequantize() - value).abs().gt(1e-6).float().mean() < 0.005  # ties, after a division in another order
    torch.testing.assert_close(found.dequantize(), value, rtol=0.5, atol=1e-6)


@pytest.mark.parametrize("format", [FP8, MXFP4, NVFP4])
def test_searched_scales_of_floats_are_no_worse(format: WeightFormat) -> None:
    weight, importance = random_weight(16, 64, seed=10), importance_of(64, seed=11)
    found, plain = (quantize_float(weight, format=format, importance=i) for i in (importance, None))
    assert found.scale.dtype == plain.scale.dtype
    assert (error_of(weight, found, importance) <= error_of(weight, plain, importance) * (1 + 1e-6)).all()
    if format is not FP8:  # 8 bits over a row: the range already fits
        assert error_of(weight, found, importance).sum() < 0.97 * error_of(weight, plain, importance).sum()


def test_a_shared_global_scale_is_the_larger_weights() -> None:
    small, large = random_weight(4, 16, seed=12), 10 * random_weight(4, 16, seed=13)
    assert torch.equal(nvfp4_global_scale([small, large]), nvfp4_global_scale([large]))
    found = quantize_float(small, format=NVFP4, global_scale=nvfp4_global_scale([small, large]))
    torch.testing.assert_close(found.dequantize(), small, rtol=0.5, atol=0.3)


@pytest.mark.parametrize("format", [FP8, MXFP4, NVFP4])
def test_very_large_and_very_small_weights_stay_finite(format: WeightFormat) -> None:
    for size in (1e-30, 1e-12, 1e12, 1e30):
        found = quantize_float(size * random_weight(2, 32, seed=14), format=format, importance=torch.ones(32))
        assert found.dequantize().isfinite().all()


# HQQ


def phi(weight: Tensor, found: QuantizedTensor) -> Tensor:
    return to_groups((weight - found.dequantize()).abs().pow(0.7), found.group_size).mean(-1)


@given(seed=seeds, bits=st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=15)
def test_hqqs_error_in_its_own_norm_is_no_larger_than_rtns(seed: int, bits: int) -> None:
    weight = random_weight(5, 32, seed=seed)
    found = quantize_hqq(weight, bits=bits, group_size=8)
    assert (phi(weight, found) <= phi(weight, quantize_rtn(weight, bits=bits, group_size=8, symmetric=False)) * (1 + 1e-5) + 1e-7).all()
    assert found.scale.dtype == torch.float16
    assert int(found.codes.max()) < 2**bits


@pytest.mark.parametrize(("bits", "share"), [(2, 0.76), (3, 0.915), (4, 0.96)])
def test_hqq_lowers_it_clearly_where_bits_are_few(bits: int, share: float) -> None:
    weight = random_weight(32, 128, seed=3)
    plain = quantize_rtn(weight, bits=bits, group_size=64, symmetric=False)
    assert phi(weight, quantize_hqq(weight, bits=bits, group_size=64)).sum() < share * phi(weight, plain).sum()


def test_hqq_keeps_what_lies_on_a_grid_and_gives_up_an_outlier() -> None:
    """All but one weight on a grid of three bits: p < 1 takes them exactly, and the outlier's large error once."""
    codes = torch.randint(0, 8, (1, 64), generator=torch.Generator().manual_seed(0))
    codes[0, 0], codes[0, 1] = 0, 7
    weight = (codes - 3) * 0.25
    weight[0, 5] = 1.3
    values = quantize_hqq(weight, bits=3, group_size=64).dequantize()
    exact = (values - weight).abs() < 1e-3
    assert int(exact.sum()) == 63
    plain = quantize_rtn(weight, bits=3, group_size=64, symmetric=False).dequantize()
    assert int(((plain - weight).abs() < 1e-3).sum()) < 30


def test_hqq_leaves_zeros_zero() -> None:
    weight = random_weight(4, 32, seed=5)
    weight[:, ::4], weight[2] = 0, 0
    values = quantize_hqq(weight, bits=3, group_size=16).dequantize()
    assert (values[:, ::4] == 0).all()
    assert (values[2] == 0).all()
