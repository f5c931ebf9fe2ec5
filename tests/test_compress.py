"""Compression's algorithms: held to their bounds, to brute force, and to the packages that read what they write."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, PackedQuantizationCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lighten.compress.grid import QuantizedTensor, to_groups
from lighten.compress.magnitude import global_threshold, prune_threshold
from lighten.compress.rtn import quantize_rtn
from lighten.compress.walk import Checkpoint, compress_weights
from lighten.errors import ModelError
from lighten.formats.artifact import write_artifact
from lighten.formats.safetensors_folder import pack, pack_codes, unpack, unpack_codes
from lighten.formats.torch_model import load_module
from lighten.model import read_spec
from lighten.model.quantized import packed_shapes
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, WeightFormat
from lighten.recipe import parse_recipe

COLUMNS = 16
GROUPS = (PER_CHANNEL, PER_TENSOR, 1, 4, COLUMNS)
SMALLEST_SCALE = 2.0**-14
"""float16's smallest normal number (IEEE 754): below it scales are coarse."""

sizes = st.floats(1, 1024, width=32)
nice = st.integers(-9, 9).map(lambda n: n / 2)  # so that many are equal, and many quotients are ties
numbers = nice | st.floats(-2, 2, width=32).map(lambda x: x if abs(x) > 0.05 else 0.0)
layers = st.builds(
    lambda values, size: torch.from_numpy(values) * size,
    arrays(np.float32, st.tuples(st.integers(1, 4), st.just(COLUMNS)), elements=numbers),
    sizes | st.just(1.0),
)
widths, groups = st.integers(2, 8), st.sampled_from(GROUPS)


def step_sizes(found: QuantizedTensor) -> torch.Tensor:
    """[O, I]: the step of each weight's grid."""
    return found.scale.float().abs()[..., None].expand_as(to_groups(found.codes, found.group_size)).reshape(found.codes.shape)


# ---- round to nearest ----


@given(layers, widths, groups)
def test_rtn_asymmetric_moves_no_weight_by_more_than_half_a_step(layer, bits, group_size):
    """And at the grid's ends, where rounding the scale to float16 cuts off at most a quarter of a step, by no more than 3/4."""
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=False)
    moved = (found.dequantize() - layer).abs() / step_sizes(found)
    inside = (found.codes > 0) & (found.codes < 2**bits - 1)
    assert (moved[inside] <= 0.5 + 1e-4).all()
    assert (moved <= 0.75 + 1e-4).all()


@given(layers, widths, groups)
def test_rtn_symmetric_moves_no_weight_by_more_than_half_a_step_but_at_the_far_end(layer, bits, group_size):
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=True)
    moved = (found.dequantize() - layer).abs() / step_sizes(found)
    assert (moved[found.codes < 2**bits - 1] <= 0.5 + 1e-4).all()
    assert (moved <= 17 / 16 + 1e-4).all()


@given(layers, st.integers(2, 5), groups, st.booleans())
def test_rtn_finds_the_nearest_of_all_grid_points(layer, bits, group_size, symmetric):
    """Brute force: every point of each weight's grid is tried."""
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=symmetric)
    points = [replace(found, codes=torch.full_like(found.codes, code)).dequantize() for code in range(2**bits)]
    nearest = (torch.stack(points) - layer).abs().amin(0)
    assert torch.allclose((found.dequantize() - layer).abs(), nearest, atol=float(step_sizes(found).max()) * 1e-5)


@given(layers, widths, groups, st.booleans())
def test_rtn_keeps_zero(layer, bits, group_size, symmetric):
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=symmetric)
    assert (found.dequantize()[layer == 0] == 0).all()


PAIRS = torch.cartesian_prod(torch.arange(-9, 10), torch.arange(-9, 10)) / 2
"""Ends of groups whose zero points are ties, among others: -0.5 … 2.5 on 2 bits has its zero halfway between codes 0 and 1."""
NORMAL = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (512, COLUMNS)).astype(np.float32))
NORMAL += 0.05 * NORMAL.sign()  # away from what float16's scales are too coarse for


@given(layers | st.sampled_from([PAIRS, NORMAL]), widths, groups, st.booleans())
@example(layer=PAIRS, bits=2, group_size=PER_CHANNEL, symmetric=False)
@example(layer=PAIRS, bits=3, group_size=PER_CHANNEL, symmetric=False)
@example(layer=NORMAL, bits=8, group_size=PER_CHANNEL, symmetric=False)
@example(layer=NORMAL, bits=8, group_size=PER_CHANNEL, symmetric=True)
def test_rtn_again_gives_the_same_codes_and_scales(layer, bits, group_size, symmetric):
    if group_size > layer.shape[1]:
        group_size = PER_CHANNEL
    once = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=symmetric)
    again = quantize_rtn(once.dequantize(), bits=bits, group_size=group_size, symmetric=symmetric)
    assert torch.equal(again.scale, once.scale)
    assert torch.equal(again.codes, once.codes)
    assert (again.zero_point is None) == (once.zero_point is None) == symmetric
    if once.zero_point is not None and again.zero_point is not None:
        assert torch.equal(again.zero_point, once.zero_point)


@given(layers, widths, st.booleans())
def test_a_group_as_wide_as_the_row_is_a_channel_and_a_row_of_everything_is_the_tensor(layer, bits, symmetric):
    by_group, by_channel = (quantize_rtn(layer, bits=bits, group_size=size, symmetric=symmetric) for size in (COLUMNS, PER_CHANNEL))
    assert torch.equal(by_group.codes, by_channel.codes)
    assert torch.equal(by_group.scale, by_channel.scale)
    by_tensor = quantize_rtn(layer, bits=bits, group_size=PER_TENSOR, symmetric=symmetric)
    one_row = quantize_rtn(layer.reshape(1, -1), bits=bits, group_size=PER_CHANNEL, symmetric=symmetric)
    assert torch.equal(by_tensor.codes, one_row.codes.reshape(layer.shape))
    assert torch.equal(by_tensor.scale, one_row.scale)


@given(layers, widths, groups, st.booleans())
def test_codes_scales_and_zero_points_have_the_stated_shapes_and_ranges(layer, bits, group_size, symmetric):
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=symmetric)
    scales = WeightFormat(bits=bits, group_size=group_size).scales(*layer.shape)
    assert found.scale.numel() == scales
    assert found.scale.dtype == torch.float16
    assert found.codes.shape == layer.shape
    assert int(found.codes.max()) < 2**bits
    assert (found.scale != 0).all()
    assert found.zero_point is None if symmetric else int(found.zero_point.max()) < 2**bits


@given(layers, st.integers(2, 4), st.booleans())
def test_more_bits_are_never_worse_by_more_than_their_own_step(layer, bits, symmetric):
    few, many = (quantize_rtn(layer, bits=b, group_size=PER_CHANNEL, symmetric=symmetric) for b in (bits, 2 * bits))
    assert (many.dequantize() - layer).abs().max() <= (few.dequantize() - layer).abs().max() + step_sizes(many).max()


def test_rtn_by_hand():
    """Weights -1 … 2 on 2 bits: a step of 1, zero at code 1. Symmetric: the extreme 2 takes code 0, so the step is -1 and zero is code 2."""
    weight = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    found = quantize_rtn(weight, bits=2, group_size=PER_CHANNEL, symmetric=False)
    assert (found.codes.tolist(), found.scale.tolist(), found.zero_point.tolist()) == ([[0, 1, 1, 3]], [[1.0]], [[1]])
    assert found.dequantize().tolist() == [[-1.0, 0.0, 0.0, 2.0]]
    found = quantize_rtn(weight, bits=2, group_size=PER_CHANNEL, symmetric=True)
    assert (found.codes.tolist(), found.scale.tolist(), found.zero_point) == ([[3, 2, 2, 0]], [[-1.0]], None)
    assert found.dequantize().tolist() == [[-1.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 4), torch.full((1, 4), 1e-30), torch.tensor([[3e38, -3e38, 0, 1]]), torch.full((2, 4), 7.0), -torch.eye(4)]
)
def test_the_smallest_and_the_largest_weights_stay_finite(weight, symmetric):
    found = quantize_rtn(weight, bits=4, group_size=4, symmetric=symmetric).dequantize()
    assert torch.isfinite(found).all()
    assert (found.abs() <= weight.abs().amax() * 1.01).all()


@given(st.floats(1e-9, 1e-2), widths)
def test_scales_below_float16s_normal_numbers_are_coarse_but_never_add_more_than_the_range(size, bits):
    weight = torch.linspace(-1, 1, COLUMNS)[None] * size
    for symmetric in (True, False):
        found = quantize_rtn(weight, bits=bits, group_size=PER_CHANNEL, symmetric=symmetric)
        assert (found.dequantize() - weight).abs().max() <= 2 * size
        if float(found.scale.abs()) >= SMALLEST_SCALE:
            assert (found.dequantize() - weight).abs().max() <= 17 / 16 * found.scale.abs().float().max() * 1.0001


# ---- magnitude ----

shares = st.floats(0.01, 0.99)


@given(layers, st.floats(1e-3, 1e3))
def test_a_threshold_zeroes_what_lies_below_it_and_nothing_else(layer, threshold):
    pruned, limit = prune_threshold(layer, threshold=threshold), torch.tensor(threshold)
    assert torch.equal(pruned, torch.where(layer.abs() < limit, torch.zeros(()), layer))


@settings(max_examples=25)  # each counts 2**16 bins for each matrix, twice, and the machine may be busy
@example(matrices=[torch.ones(1, COLUMNS)], sparsity=0.97, dtype=torch.float32)  # rounds to all
@given(st.lists(layers, min_size=1, max_size=4), shares, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_global_threshold_is_that_of_one_sort(matrices, sparsity, dtype):
    matrices = [matrix.to(dtype) for matrix in matrices]
    everything = torch.cat([matrix.abs().float().reshape(-1) for matrix in matrices]).sort().values
    rank = round(sparsity * len(everything))
    threshold = global_threshold(lambda: iter(matrices), sparsity=sparsity)
    assert threshold == (float(everything[rank]) if rank < len(everything) else math.inf)
    zeros = sum(int((prune_threshold(matrix, threshold=threshold) == 0).sum()) for matrix in matrices)
    assert zeros == max(int((everything < threshold).sum()), int((everything == 0).sum()))
    if len(set(everything.tolist())) == len(everything):
        assert zeros == rank


# ---- packing ----


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing_and_is_compressed_tensors_layout(bits, rows, columns, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, math.ceil(columns * bits / 32))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size([rows, columns])), signed)


@given(layers, widths, groups, st.booleans())
def test_a_quantized_tensor_survives_its_file_form(layer, bits, group_size, symmetric):
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=symmetric)
    tensors = pack(found)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == packed_shapes(
        WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric), *layer.shape
    )
    back = unpack(tensors, WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric))
    assert torch.equal(back.dequantize(), found.dequantize())
    assert torch.equal(back.codes, found.codes)


STRATEGIES = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}


def decompressed(tensors: dict[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The weight as compressed-tensors reads it, in float32."""
    return PackedQuantizationCompressor.decompress(tensors | {"weight_scale": tensors["weight_scale"].float()}, scheme)["weight"]


@given(layers, widths, groups, st.booleans())
def test_compressed_tensors_reads_the_same_weight(layer, bits, group_size, symmetric):
    found = quantize_rtn(layer, bits=bits, group_size=group_size, symmetric=symmetric)
    strategy = STRATEGIES.get(group_size, "group")
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size if strategy == "group" else None)
    read = decompressed(pack(found), QuantizationScheme(targets=["Linear"], weights=weights))
    assert torch.equal(read, found.dequantize())


# ---- a checkpoint, walked ----


def folder_of(text: str, source: Path, out: Path) -> Path:
    return write_artifact(source, parse_recipe(text), out, calibration=list).folder


@pytest.mark.parametrize("rest", ["", " | quantize(rtn, bits=4, group_size=16)", " | quantize(rtn, bits=4, group_size=16, embeddings=true)"])
def test_vectors_are_stored_in_the_type_that_a_cast_says_whatever_is_quantized_after_it(rest, tiny_llama, tmp_path):
    stored = load_file(folder_of(f"cast(bfloat16){rest}", tiny_llama, tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "norm" in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    "text",
    [
        "quantize(rtn, embeddings=true)", "quantize(rtn, bits=4, group_size=16)", "quantize(rtn, bits=3, group_size=tensor)",
        "quantize(rtn, bits=2, symmetric=true, group_size=8) | quantize(rtn, targets=embedding, embeddings=true)",
    ],
)  # fmt: skip
def test_a_written_folder_is_read_by_compressed_tensors_module_by_module(text, tiny_bert, tmp_path):
    """By the schemes that its own config.json states."""
    folder, spec = folder_of(text, tiny_bert, tmp_path / "out"), read_spec(tiny_bert)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    schemes = {target: QuantizationScheme(**group) for group in config["config_groups"].values() for target in group["targets"]}
    done = {
        name: weight for name, weight, _ in compress_weights(Checkpoint(tiny_bert), spec, parse_recipe(text)) if isinstance(weight, QuantizedTensor)
    }
    assert {f"{name}.weight" for name in schemes} == set(done)
    stored = load_file(folder / "model.safetensors")
    for name, scheme in schemes.items():
        tensors = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}.weight")}
        read = BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors | {"weight_scale": tensors["weight_scale"].float()}, scheme)
        assert torch.equal(read["weight"], done[f"{name}.weight"].dequantize())


@pytest.mark.parametrize("grid", ["bits=4, group_size=16", "bits=8", "bits=8, group_size=tensor", "bits=4"])
def test_transformers_reads_a_symmetric_folder_and_gives_the_same_logits(grid, tiny_llama_untied, tmp_path):
    folder = folder_of(f"quantize(rtn, symmetric=true, {grid})", tiny_llama_untied, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_module(folder, read_spec(folder), dtype="float32", attention="eager")
    original = load_module(tiny_llama_untied, read_spec(tiny_llama_untied), dtype="float32", attention="eager")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = [model(ids).logits for model in (theirs, ours, original)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert not torch.allclose(logits[1], logits[2], atol=1e-3), "quantization changed nothing: is it read at all?"


@pytest.mark.parametrize("text", ["prune(magnitude, sparsity=0.5)", "cast(bfloat16)", "quantize(rtn, bits=3, group_size=8, embeddings=true)"])
def test_a_folder_that_was_written_loads_as_what_was_done(text, tiny_llama, tmp_path):
    """The head of this model is tied to its embeddings, quantized ones too."""
    folder, spec = folder_of(text, tiny_llama, tmp_path / "out"), read_spec(tiny_llama)
    module = load_module(folder, read_spec(folder), dtype="float32", attention="eager")
    state = module.state_dict()
    for name, weight, _ in compress_weights(Checkpoint(tiny_llama), spec, parse_recipe(text)):
        expected = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.float()
        assert torch.equal(state[name], expected), name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_reports_tell_what_each_weight_lost(tiny_bert):
    spec, source = read_spec(tiny_bert), Checkpoint(tiny_bert)
    walked = list(compress_weights(source, spec, parse_recipe("prune(magnitude, sparsity=0.25, targets=query) | quantize(rtn, bits=4)")))
    assert [name for name, _, _ in walked] == source.names
    linears = {f"{part.name}.weight" for part in spec.parts if isinstance(part, Linear)}
    assert {report.name for _, _, report in walked if report} == linears
    for name, weight, report in walked:
        original = source[name]
        if report is None:
            assert weight is not None
            assert torch.equal(weight, original)
            continue
        after = weight.dequantize()
        assert report.bits == 4
        assert report.relative_error == pytest.approx(float((after - original).norm() / original.norm()))
        assert report.sparsity == pytest.approx(float((after == 0).float().mean()))
        assert (report.sparsity >= 0.25) or "query" not in name


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_a_scope_is_what_a_share_is_counted_over_and_nothing_narrower(scope, tiny_bert):
    recipe = parse_recipe(f"prune(magnitude, sparsity=0.25, scope={scope})")
    zeros = [weight == 0 for _, weight, report in compress_weights(Checkpoint(tiny_bert), read_spec(tiny_bert), recipe) if report]
    of_rows = {float(row.float().mean()) for matrix in zeros for row in matrix}
    of_layers = {float(matrix.float().mean()) for matrix in zeros}
    assert (of_rows == {0.25}) == (scope == "row")
    assert (of_layers == {0.25}) == (scope != "global")


def test_a_global_share_is_counted_over_what_the_steps_before_left(tiny_llama):
    spec, source = read_spec(tiny_llama), Checkpoint(tiny_llama)
    text = "prune(magnitude, sparsity=0.5, targets=mlp) | prune(magnitude, sparsity=0.6, scope=global)"
    weights = {name: weight for name, weight, report in compress_weights(source, spec, parse_recipe(text)) if report}
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == pytest.approx(0.6 * total, abs=1)
    kept = torch.cat([weight[weight != 0].abs() for weight in weights.values()]).min()
    gone = max(float(source[name][weight == 0].abs().max()) for name, weight in weights.items() if "mlp" not in name)
    assert gone <= kept


def test_tables_and_the_head_are_left_alone_unless_asked_for(tiny_llama_untied):
    spec = read_spec(tiny_llama_untied)
    tables = {f"{part.name}.weight" for part in spec.parts if isinstance(part, Embedding) or part.component == "head"}
    for asked in (False, True):
        recipe = parse_recipe(f"quantize(rtn, embeddings={str(asked).lower()})")
        changed = {report.name for _, _, report in compress_weights(Checkpoint(tiny_llama_untied), spec, recipe) if report}
        assert changed & tables == (tables if asked else set())


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_name_their_tensor(broken, tiny_bert, tmp_path):
    tensors = load_file(tiny_bert / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    tensors[name][3, 4] = tensors[name][0, 0] = broken
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} holds 2 values that are not finite \(NaN or infinite\)\.$"):
        checkpoint[name]
    assert torch.isfinite(checkpoint["encoder.layer.0.output.dense.weight"]).all()
    with pytest.raises(ModelError, match=name):
        list(compress_weights(checkpoint, read_spec(tmp_path), parse_recipe("cast(bfloat16)")))


def test_saved_buffers_are_no_weights(tiny_bert, tmp_path):
    """Checkpoints of older versions keep `position_ids`."""
    tensors = load_file(tiny_bert / "model.safetensors") | {"embeddings.position_ids": torch.arange(128)[None]}
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).names == Checkpoint(tiny_bert).names
    assert read_spec(tmp_path).total_parameters == read_spec(tiny_bert).total_parameters
    folder = folder_of("cast(float16)", tmp_path, tmp_path / "out")
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert "embeddings.position_ids" not in set(opened.keys())
