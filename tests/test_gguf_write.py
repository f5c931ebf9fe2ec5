"""Types of ggml and the GGUF files that are written: every type and every architecture of the two tables, held against the `gguf` package.

Seeded faults that these tests were seen to catch: the high bits of Q5_0 joined in the order of Q5_K; sub-scales of Q3_K packed without the 32 that
is added; sub-minima of Q4_K taken from the low bits alone; a search that returns its first step; the rows of q_proj left in transformers' order;
1 not added to Gemma's norms; experts written one row off; merges without scores.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bert_config, llama_config, save
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig

from lighten.compress.ggml import LAYOUTS, GgmlTensor, as_ggml, from_ggml, pack, unpack
from lighten.compress.ggml_search import fit_ggml_grid, quantize_ggml, quantize_ggml_together
from lighten.compress.grid import QuantizedTensor
from lighten.compress.rtn import quantize_rtn
from lighten.compress.statistics import InputStatistics
from lighten.compress.walk import Checkpoint
from lighten.errors import LightenError, OutputError, RecipeError
from lighten.formats.files import GGUF
from lighten.formats.gguf_families import ARCHITECTURES, halves_interleaved, rope_factors
from lighten.formats.gguf_file import lay_out, refuse_gguf, stored_type, verify_gguf, write_gguf
from lighten.formats.gguf_tokenizer import CONTROL, NORMAL, PATTERNS, read_tokenizer
from lighten.model import read_spec
from lighten.model.ggml_types import GGML_TYPES, RECIPE_TYPES, exact_ggml_type, ggml_fallback, ggml_format
from lighten.model.spec import PER_CHANNEL, Embedding, Linear, ModelSpec, WeightFormat
from lighten.runtimes import llama_cpp
from lighten.runtimes.session import Setup

COLUMNS = 512


def layer(seed: int = 0, rows: int = 12) -> torch.Tensor:
    """Weights as they occur, and rows that are awkward: zeros, one sign alone, very large, very small, one outlier."""
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, 64:200] = 0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3] *= 3000
    weight[4] *= 1e-3
    weight[5, 77] = 1.5
    weight[6] = 0
    return weight


def reference(weight: GgmlTensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(weight.blocks.numpy(), Type[weight.type]))


def squared(error: torch.Tensor, importance: torch.Tensor | float = 1.0) -> float:
    return float((error.double().square() * importance).sum())


# ---- types ----


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_a_type_are_those_of_ggml(name):
    """The `gguf` package reads them back to the values that they were packed for, bit for bit."""
    weight = layer()
    grid = fit_ggml_grid(weight, name)
    codes = grid.nearest(weight)
    packed = pack(grid, codes)
    assert packed.blocks.shape == (len(weight), GGML_TYPES[name].stored_bytes(1, COLUMNS))
    assert packed.shape == tuple(weight.shape)
    assert packed.bits == GGML_TYPES[name].bits
    assert torch.equal(reference(packed), grid.value(codes))
    assert torch.equal(reference(packed), packed.dequantize())


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_bytes_read_back_as_ggml_reads_them(name):
    """Each bit of a block has its place: random bytes, with finite scales, dequantize as in the `gguf` package and pack to themselves."""
    weight = layer()
    blocks = pack(fit_ggml_grid(weight, name), torch.zeros(weight.shape, dtype=torch.uint8)).blocks
    noise = torch.randint(0, 256, blocks.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kind = GGML_TYPES[name]
    halves = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(name, (0, 2) if LAYOUTS[name].middle is None else (0,))
    noise = noise.reshape(len(blocks), -1, kind.bytes)
    for start in halves:
        noise[..., start + 1] &= 0x3F  # float16 below 2, so finite
    random = GgmlTensor(type=name, blocks=noise.reshape(blocks.shape))
    assert torch.equal(reference(random), random.dequantize())
    assert torch.equal(pack(*unpack(random)).blocks, random.blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_search_is_better_than_the_formats_own_rounding(name):
    weight = layer(rows=24)
    packed = quantize_ggml(weight, name)
    if name.endswith("_K"):  # which the package does not quantize: no worse than rounding sub-scales of the widest range
        theirs = weight - naive(weight, name)
    else:
        theirs = weight - torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), Type[name]), Type[name]))
    ours = weight - packed.dequantize()
    for row in range(len(weight)):
        assert squared(ours[row]) <= squared(theirs[row]) * 1.0001 + 1e-12, row
    assert squared(ours[7:]) < 0.95 * squared(theirs[7:])


def naive(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Every group's range divided evenly, scales rounded to multiples of the largest."""
    layout = LAYOUTS[name]
    groups = weight.reshape(len(weight), -1, layout.group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    _, top = layout.scale_range
    if layout.middle is None:
        scale, minimum = (high - low) / (layout.levels - 1), -low
        scale, minimum = (multiples(value, top) for value in (scale, minimum))
        codes = ((groups + minimum[..., None]) / scale.clamp(min=1e-20)[..., None]).round().clamp(0, layout.levels - 1)
        return (codes * scale[..., None] - minimum[..., None]).reshape(weight.shape)
    scale = multiples(torch.maximum(-low, high) / (layout.middle - 1), top)
    codes = (groups / scale.clamp(min=1e-20)[..., None]).round().clamp(-layout.middle, layout.middle - 1)
    return (codes * scale[..., None]).reshape(weight.shape)


def multiples(values: torch.Tensor, top: int) -> torch.Tensor:
    blocks = values.reshape(len(values), 2, -1)
    unit = (blocks.amax(-1, keepdim=True) / top).half().float()
    return ((blocks / unit.clamp(min=1e-20)).round().clamp(0, top) * unit).reshape(values.shape)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q4_1"])
def test_the_search_comes_near_to_brute_force(name):
    """Groups of 32 by themselves: thousands of scales (and offsets), codes rounded to each, beside the grid that was found."""
    weight, importance = layer(seed=9, rows=8)[7:, :256], torch.rand(256, generator=torch.Generator().manual_seed(5)) ** 3
    layout, grid = LAYOUTS[name], fit_ggml_grid(weight, name, importance)
    groups, counts = weight.reshape(-1, 32), importance.reshape(-1, 32)
    found = ((groups - grid.value(grid.nearest(weight)).reshape(-1, 32)).square() * counts).sum(-1)
    span = groups.amax(-1) - groups.amin(-1)
    best = torch.full_like(span, torch.inf)
    for share in (torch.linspace(0.4, 1.4, 100) if layout.middle is None else torch.linspace(0.4, 2.4, 500)).tolist():
        scale = span * share / (layout.levels - 1)
        offsets = [groups.amin(-1) + span * part for part in torch.linspace(-0.25, 0.35, 50).tolist()]
        for offset in offsets if layout.middle is None else [-layout.middle * scale, layout.middle * scale]:
            step = scale if layout.middle is None or float(offset[0]) < 0 else -scale
            codes = ((groups - offset[:, None]) / step[:, None]).round().clamp(0, layout.levels - 1)
            error = ((groups - codes * step[:, None] - offset[:, None]).square() * counts).sum(-1)
            best = torch.minimum(best, error)
    assert float(found.sum()) < 1.15 * float(best.sum())


@pytest.mark.parametrize("name", LAYOUTS)
def test_importance_moves_the_error_to_where_it_counts_less(name):
    weight, importance = layer(seed=3)[7:], torch.rand(COLUMNS, generator=torch.Generator().manual_seed(4)) ** 4
    plain, weighted = fit_ggml_grid(weight, name), fit_ggml_grid(weight, name, importance)
    errors = [squared(weight - grid.value(grid.nearest(weight)), importance) for grid in (plain, weighted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_on_a_grid_stays_there(name):
    """Values that a type holds are found again, or as good as: a second quantization loses next to nothing."""
    weight = layer(seed=5)[7:]
    once = quantize_ggml(weight, name).dequantize()
    again = quantize_ggml(once, name).dequantize()
    assert squared(again - once) < 0.1 * squared(once - weight)


@settings(max_examples=15)
@given(name=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-4, 1.0, 100.0]))
def test_the_nearest_code_is_the_nearest(name, seed, scale):
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(seed)) * scale
    grid = fit_ggml_grid(weight, name)
    codes = grid.nearest(weight)
    chosen = (grid.value(codes) - weight).abs()
    for code in range(0, grid.levels, max(1, grid.levels // 16)):
        other = (grid.value(torch.full_like(codes, code)) - weight).abs()
        assert bool((chosen <= other + 1e-5 * weight.abs() + 1e-9).all())


def inputs(seed: int = 7) -> InputStatistics:
    """Correlated inputs, some columns a hundred times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator)[:, None] ** 2
    rows = torch.randn(2400, COLUMNS, generator=generator) @ mixed
    seen, held_out = rows[:1800], rows[1800:]
    return InputStatistics(
        hessian=seen.T @ seen / len(seen), held_out=held_out.T @ held_out / len(held_out), cross=None, mean_abs=seen.abs().mean(0),
        abs_max=seen.abs().amax(0), rows=len(seen),
    )  # fmt: skip


def output_error(error: torch.Tensor, statistics: InputStatistics) -> float:
    assert statistics.held_out is not None
    return float(((error @ statistics.held_out) * error).sum())


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_by_gptq_lose_less_of_the_output_than_the_nearest(name):
    """Held out, and with all weights of an input at once as by themselves; a group of zeros, whose scale is 0, stays zeros."""
    statistics, weight = inputs(), layer(seed=8, rows=24)[6:]
    grid = fit_ggml_grid(weight, name, statistics.hessian.diagonal())
    nearest = output_error(weight - grid.value(grid.nearest(weight)), statistics)
    found = quantize_ggml_together({"a": weight[:10], "b": weight[10:]}, name, statistics)
    ours = torch.cat([found["a"].dequantize(), found["b"].dequantize()])
    assert output_error(weight - ours, statistics) < 0.6 * nearest
    assert not bool(ours[0].any())
    alone = quantize_ggml(weight, name, statistics).dequantize()
    assert output_error(weight - alone, statistics) < 0.6 * nearest


def test_without_rows_the_nearest_codes_are_taken():
    statistics = replace(inputs(), rows=0)
    assert torch.equal(quantize_ggml(layer(), "Q4_K", statistics).blocks, quantize_ggml(layer(), "Q4_K").blocks)


def test_columns_that_blocks_do_not_fill_are_refused():
    with pytest.raises(RecipeError, match="Q4_K stores rows in blocks of 256 columns, and this weight has 576"):
        quantize_ggml(torch.zeros(2, 576), "Q4_K")
    with pytest.raises(RecipeError, match="no weight is quantized to IQ4_NL here; these are: Q8_0, Q6_K"):
        quantize_ggml(torch.zeros(2, 512), "IQ4_NL")
    with pytest.raises(RecipeError, match="weights in Q8_K are not read here"):
        GgmlTensor(type="Q8_K", blocks=torch.zeros(1, 292, dtype=torch.uint8)).dequantize()


@pytest.mark.parametrize("name", RECIPE_TYPES.values())
@pytest.mark.parametrize("columns", [512, 576, 100])
def test_the_fallback_fits_and_is_no_narrower(name, columns):
    """Source of the table: `tensor_type_fallback` of llama.cpp, at columns as SmolLM2's 576."""
    found = ggml_fallback(name, columns)
    assert columns % GGML_TYPES[found].block == 0
    assert (GGML_TYPES[found].bits or 16) >= (GGML_TYPES[name].bits or 0)
    expected = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}.get(name, name)
    assert found == {512: name, 576: expected, 100: "F16"}[columns]
    stored = WeightFormat(**ggml_format(name, columns))
    assert stored.stored_bytes(3, columns) == 3 * columns * GGML_TYPES[found].bytes // GGML_TYPES[found].block


# ---- without loss ----


@pytest.mark.parametrize(("bits", "symmetric"), [(bits, symmetric) for bits in (8, 6, 4, 3, 2) for symmetric in (True, False)])
@pytest.mark.parametrize("group_size", [32, 64, PER_CHANNEL])
def test_codes_go_into_types_of_ggml_without_loss(bits, symmetric, group_size):
    weight = quantize_rtn(layer(seed=6)[:6], bits=bits, group_size=group_size, symmetric=symmetric)
    name = exact_ggml_type(bits=bits, symmetric=symmetric, group_size=group_size, columns=COLUMNS)
    if bits == 8 and not symmetric:
        assert name is None
        with pytest.raises(RecipeError, match="no type of ggml that holds them without loss"):
            as_ggml(weight)
        return
    packed = as_ggml(weight)
    assert packed.type == name
    assert torch.equal(reference(packed), weight.dequantize())
    if name in ("Q4_0", "Q8_0"):
        back = from_ggml(packed)
        assert torch.equal(back.dequantize(), weight.dequantize())
        assert (back.bits, back.group_size, back.zero_point) == (GGML_TYPES[name].bits, 32, None)


def test_mxfp4_goes_into_ggml_without_loss():
    scale = torch.randint(100, 140, (4, 2), dtype=torch.uint8)
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    weight = QuantizedTensor(codes=codes, scale=scale, zero_point=None, bits=4, group_size=32, element="e2m1")
    packed = as_ggml(weight)
    assert packed.type == "MXFP4"
    assert torch.equal(reference(packed), weight.dequantize())
    assert torch.equal(packed.dequantize(), weight.dequantize())


def test_what_ggml_does_not_hold_is_refused():
    weight = quantize_rtn(layer()[:2], bits=4, group_size=64, symmetric=True)
    with pytest.raises(RecipeError, match=r"scales of torch\.float32 are no float16"):
        as_ggml(replace(weight, scale=weight.scale.float() * 1.0001))
    with pytest.raises(RecipeError, match="4-bit codes of int in groups of 16 over 512 columns have no type"):
        as_ggml(replace(weight, group_size=16, scale=weight.scale.repeat_interleave(4, 1)))
    with pytest.raises(RecipeError, match="Q6_K has no equal among symmetric codes"):
        from_ggml(quantize_ggml(layer(), "Q6_K"))


# ---- files ----

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", gguf_files._GROUPED),
    "llama-3": (
        "llama", "LlamaForCausalLM",
        gguf_files._WIDE | {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }},
    ),
    "mistral": ("mistral", "MistralForCausalLM", gguf_files._GROUPED | {"sliding_window": 64}),
    "mixtral": ("mixtral", "MixtralForCausalLM", gguf_files._GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", gguf_files._GROUPED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", gguf_files._WIDE),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM", gguf_files._GROUPED | gguf_files._EXPERTS | {"shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", gguf_files._WIDE | gguf_files._EXPERTS | {"norm_topk_prob": True}),
    "gemma": ("gemma", "GemmaForCausalLM", gguf_files._WIDE),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", gguf_files._WIDE | {"sliding_window": 64, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", gguf_files._WIDE | {"num_hidden_layers": 6, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "phi": ("phi", "PhiForCausalLM", gguf_files._SIZES | {"hidden_act": "gelu_new"}),
    "phi3": ("phi3", "Phi3ForCausalLM", gguf_files._GROUPED | {"pad_token_id": 0}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", gguf_files._SIZES),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", gguf_files._GROUPED | {"sliding_window": None}),
    "stablelm": ("stablelm", "StableLmForCausalLM", gguf_files._GROUPED | {"use_qkv_bias": True}),
    "granite": ("granite", "GraniteForCausalLM", gguf_files._GROUPED | {"embedding_multiplier": 2.0, "logits_scaling": 1.5}),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", gguf_files._GROUPED | {"pad_token_id": 0, "num_hidden_layers": 4}),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", gguf_files._GROUPED),
    "bert": ("bert", "BertModel", gguf_files._SIZES),
}  # fmt: skip
"""Case → (model_type, class, config fields)."""

MARKS = {"bos_token_id": 1, "eos_token_id": 2}


def saved(case: str, folder: Path, **changes: Any) -> Path:
    """A folder of a case's model, weights and vectors random."""
    model_type, architecture, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **MARKS, **(fields | changes))
    config.architectures, config.initializer_range = [architecture], 0.2
    torch.manual_seed(0)
    module = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    module.save_pretrained(folder)
    return folder


def written(folder: Path, path: Path) -> Path:
    spec, checkpoint = read_spec(folder), Checkpoint(folder)
    verify_gguf(path, write_gguf(((name, checkpoint[name]) for name in reversed(checkpoint.names)), spec, folder, path))
    return path


def compare(path: Path, weights: dict[str, Any], spec: ModelSpec) -> None:
    """Each weight in its place, as the `gguf` package dequantizes it; rows of each head by the converter's own reshaping."""
    read = {tensor.name: gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    slots = lay_out(spec).slots
    assert set(weights) >= set(slots)
    for name, slot in slots.items():
        weight = weights[name]
        value = (weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()).numpy()
        value = value.T if spec.family == "gpt2" and value.ndim == 2 and ".h." in name else value
        value = value + 1 if spec.family.startswith("gemma") and name.endswith("norm.weight") else value
        if slot.placed.name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")) and spec.family in TURNED:
            heads = spec.config["num_attention_heads"] if "attn_q" in slot.placed.name else spec.config["num_key_value_heads"]
            value = value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if "query_key_value" in name:
            value = value.reshape(spec.config["num_attention_heads"], 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        found = read[slot.placed.name]
        expert = re.search(r"experts\.(\d+)\.", name)
        found = found[int(expert[1])] if expert else found
        assert np.array_equal(found, value), name


TURNED = ("llama", "mistral", "mixtral", "granite", "smollm3")
"""Families whose rotated heads llama.cpp has in another order."""


def test_every_architecture_has_a_case():
    assert {model_type for model_type, _, _ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_a_written_file_reads_back_as_its_model(case, tmp_path):
    """The spec's parts, and each value as the `gguf` package reads it; whether llama.cpp computes the same is benchmarks/gguf_llama_cpp.py's."""
    folder = saved(case, tmp_path / "model")
    path = written(folder, tmp_path / GGUF)
    spec, back, checkpoint = read_spec(folder), read_spec(path), Checkpoint(folder)
    compare(path, {name: checkpoint[name] for name in checkpoint.names}, spec)
    poolers = sum(part.parameters for part in spec.parts if part.component == "pooler")
    assert back.total_parameters == spec.total_parameters - poolers
    kept = [part.tensors() for part in spec.parts if part.component != "pooler"]
    same = spec.family in (back.family, "mistral")
    assert same
    assert [part.tensors() for part in back.parts] == kept or spec.family == "mixtral"
    assert {part.weight.dtype for part in back.parts if isinstance(part, Linear | Embedding)} == {"float32"}


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "stablelm"])
def test_transformers_computes_the_same_from_the_file(case, tmp_path):
    """transformers undoes llama.cpp's order of rows and the 1 in Gemma's norms by its own code; it has a tokenizer to read beside them."""
    folder = saved(case, tmp_path / "model")
    written(folder, tmp_path / GGUF)
    kind = getattr(transformers, CASES[case][1])
    ids = torch.arange(3, 60)[None]
    expected = kind.from_pretrained(folder).eval()(ids).logits
    found = kind.from_pretrained(tmp_path, gguf_file=GGUF, config=AutoConfig.from_pretrained(folder)).eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_rows_of_rotated_heads_are_those_of_the_converter():
    """Worked by hand: two heads of four rows; the converter writes each head's first and second half in turns."""
    assert halves_interleaved(2, 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_factors_of_llama_3_are_what_transformers_divides_by(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spec = read_spec(saved("llama-3", tmp_path / "model"))
    config = AutoConfig.from_pretrained(tmp_path / "model")
    after, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    before = 1.0 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
    factors = rope_factors(spec)
    assert factors is not None
    assert torch.allclose(factors, before / after, rtol=1e-5)
    assert len(set(factors.tolist())) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_what_it_is(dtype, tmp_path):
    config = llama_config(dtype=dtype)
    folder = save(config, tmp_path / "model")
    path = written(folder, tmp_path / GGUF)
    back = read_spec(path)
    assert {part.weight.dtype for part in back.parts if isinstance(part, Linear | Embedding)} == {dtype}
    assert back.vector_dtype == "float32"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["output_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == {"bfloat16": "BF16", "float16": "F16"}[dtype]


def test_each_type_stands_in_a_file_beside_codes_of_our_own(tmp_path):
    """A Llama whose weights are of every type; names and rows are right, or the values would be others."""
    folder = save(llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4), tmp_path / "model")
    spec, checkpoint = read_spec(folder), Checkpoint(folder)
    kinds = [*LAYOUTS, "codes 4", "codes 8"]
    chosen: dict[str, str] = {}

    def stored(part: Any) -> Any:
        if not isinstance(part, Linear) or part.tied_to:
            return part
        chosen[part.name] = kind = kinds[len(chosen) % len(kinds)]
        if kind.startswith("codes"):
            return replace(part, weight=WeightFormat(bits=int(kind[-1]), group_size=64))
        return replace(part, weight=WeightFormat(**ggml_format(kind, part.in_features)))

    spec = spec.with_parts(stored)
    weights: dict[str, Any] = {name: checkpoint[name] for name in checkpoint.names}
    for module, kind in chosen.items():
        weight = weights[f"{module}.weight"]
        codes = kind.startswith("codes")
        weights[f"{module}.weight"] = (
            quantize_rtn(weight, bits=int(kind[-1]), group_size=64, symmetric=True) if codes else quantize_ggml(weight, kind)
        )
    verify_gguf(tmp_path / GGUF, write_gguf(weights.items(), spec, folder, tmp_path / GGUF))
    compare(tmp_path / GGUF, weights, spec)
    back = {part.name: part.weight.ggml_type for part in read_spec(tmp_path / GGUF).parts if isinstance(part, Linear)}
    assert all(back[module] == {"codes 4": "Q4_0", "codes 8": "Q8_0"}.get(kind, kind) for module, kind in chosen.items())


def test_a_file_is_the_same_bytes_each_time(tmp_path):
    folder = save(llama_config(), tmp_path / "model")
    assert written(folder, tmp_path / "a.gguf").read_bytes() == written(folder, tmp_path / "b.gguf").read_bytes()


def test_a_damaged_file_is_told(tmp_path):
    folder = save(llama_config(), tmp_path / "model")
    checkpoint, path = Checkpoint(folder), tmp_path / GGUF
    said = write_gguf(((name, checkpoint[name]) for name in checkpoint.names), read_spec(folder), folder, path)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(OutputError, match=r"does not read back as .* was written; the file is damaged, write it again"):
        verify_gguf(path, said)


# ---- the runtime ----


def test_the_runtime_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "llama.cpp is not installed (no llama_cpp); pip install 'lighten[llama-cpp]'" in refused(llama_cpp.version)
    said = refused(lambda: llama_cpp.load(tmp_path, read_spec(save(llama_config(), tmp_path / "model")), Setup(dtype="float32", threads=1)))
    assert "holds no model.gguf; llama.cpp runs GGUF files" in said


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(case, tmp_path):
    """In one piece, and token by token in two sequences at once. llama.cpp's GELU is a table of float16, which shows in the third digit."""
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is built from source and in no environment of the tests; benchmarks/gguf_llama_cpp.py has it"
    )
    folder = saved(case, tmp_path)
    written(folder, tmp_path / GGUF)
    spec, module = read_spec(folder), getattr(transformers, CASES[case][1]).from_pretrained(folder).eval()
    session = llama_cpp.load(folder, spec, Setup(dtype="float32", threads=1))
    ids = np.random.default_rng(0).integers(3, 96, (2, 40))
    with torch.inference_mode():
        output = module(torch.from_numpy(ids))
    if not spec.is_decoder:
        mask = np.ones_like(ids)
        mask[1, 30:] = 0
        with torch.inference_mode():
            expected = module(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
        found = session.encode(ids, mask)
        assert np.allclose(found[0], expected[0], atol=1e-2)
        assert np.allclose(found[1, :30], expected[1, :30], atol=1e-2)
        return
    expected = output.logits.float().numpy()
    assert np.allclose(session.logits(ids), expected, atol=1e-2)
    steps = [session.prefill(ids[:, :20]), *(session.decode(ids[:, place : place + 1]) for place in range(20, 40))]
    assert np.allclose(np.stack(steps, 1), expected[:, 19:], atol=1e-2)


# ---- refusals ----


def refused(call: Any) -> str:
    with pytest.raises(LightenError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar=16 where llama.cpp takes 32"),
        ("llama", {"hidden_act": "relu"}, "its activation is relu, and llama.cpp computes llama with silu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "its layers attend to a sliding window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=false where llama.cpp takes true"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic'; these are written: default"),
        ("gemma3", {"sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}, "layer_types are not 5 of sliding"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=true"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused(case, changes, says, tmp_path):
    folder = saved(case, tmp_path / "model", **changes)
    assert says in refused(lambda: refuse_gguf(read_spec(folder), folder))
    assert not (tmp_path / GGUF).exists()


def test_other_architectures_are_refused_with_those_that_are_written(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **gguf_files._T5}))
    assert "model_type 't5' is not written; these are: llama, mistral" in refused(lambda: lay_out(read_spec(tmp_path)))
    folder = save(bert_config("BertForMaskedLM"), tmp_path / "masked")
    assert "BertForMaskedLM is not written; of bert BertModel is" in refused(lambda: lay_out(read_spec(folder)))


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (WeightFormat(bits=8, element="e4m3"), "no type of ggml holds 8-bit codes (e4m3"),
        (WeightFormat(bits=8, activations="dynamic"), "activations dynamic"),
        (WeightFormat(bits=4, group_size=48), "groups of 48"),
        (WeightFormat(dtype="float64"), "no type of ggml holds float64-bit codes"),
    ],
)
def test_formats_without_a_type_are_refused(weight, says):
    assert says in refused(lambda: stored_type(weight, 576))


def test_weights_that_are_not_as_the_spec_says_are_refused(tmp_path):
    folder = save(llama_config(), tmp_path / "model")
    spec, checkpoint = read_spec(folder), Checkpoint(folder)
    weights: dict[str, Any] = {name: checkpoint[name] for name in checkpoint.names}
    name = "model.layers.0.mlp.up_proj.weight"
    some = weights | {name: quantize_ggml(weights[name], "Q8_0")}
    assert "came as Q8_0 [64, 32]; its place in the file is F32" in refused(lambda: write_gguf(some.items(), spec, folder, tmp_path / GGUF))
    del some[name]
    assert f"1 weights are missing, such as {name}" in refused(lambda: write_gguf(some.items(), spec, folder, tmp_path / GGUF))
    twice = [*weights.items(), (name, weights[name])]
    assert f"the weight {name} came twice" in refused(lambda: write_gguf(twice, spec, folder, tmp_path / GGUF))
    half = spec.with_parts(lambda part: replace(part, weight=WeightFormat(dtype="float16")) if isinstance(part, Linear | Embedding) else part)
    assert "which float16 does not hold without loss" in refused(lambda: write_gguf(weights.items(), half, folder, tmp_path / GGUF))


# ---- tokenizers ----


def test_the_tokenizer_of_a_llama_is_in_its_file(tmp_path):
    """Read back by transformers, it makes the same tokens of a text."""
    folder = save(llama_config(), tmp_path / "model")
    written(folder, tmp_path / GGUF)
    fields = gguf.GGUFReader(tmp_path / GGUF).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The while statement is used for repeated execution as long as an expression is true: 123!"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=GGUF)
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)


def test_word_pieces_are_marked_at_their_beginning(tmp_path):
    folder = save(bert_config(), tmp_path / "model")
    found = read_tokenizer(folder, 320)
    assert found is not None
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert (found.model, found.bos, found.eos) == ("bert", True, True)
    assert found.tokens[vocabulary["[CLS]"]] == "[CLS]"
    assert found.types[vocabulary["[CLS]"]] == CONTROL
    continued, first = next(text for text in vocabulary if text.startswith("##")), next(text for text in vocabulary if text.isalpha())
    assert found.tokens[vocabulary[continued]] == continued[2:]
    assert found.tokens[vocabulary[first]] == f"\u2581{first}"
    assert found.types[vocabulary[first]] == NORMAL


def test_pairs_of_sentencepiece_have_the_scores_of_their_merges(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "\u2581": 4, "a": 5, "b": 6, "ab": 7, "\u2581ab": 8}
    said = {
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary, "merges": [["a", "b"], ["\u2581", "ab"]]},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]},
        "added_tokens": [{"id": number, "content": text, "special": True} for number, text in enumerate(["<unk>", "<s>", "</s>"])],
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_file(said)))
    found = read_tokenizer(tmp_path, 10)
    assert found is not None
    assert (found.model, found.space_prefix) == ("llama", True)
    assert found.scores is not None
    assert found.scores[7] == 0
    assert found.scores[8] == -1
    assert found.scores[5] < -1000
    assert found.types[:4] == (2, 3, 3, 6)
    assert found.tokens[9] == "[PAD9]"


def tokenizer_file(said: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that the `tokenizers` package reads."""
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return whole | said | {"added_tokens": [token | marks for token in said["added_tokens"]]}


PRE: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    **{
        name: pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ])
        for pattern, name in PATTERNS.items()
    },
    "sentencepiece": None,
}  # fmt: skip
"""llama.cpp's name of a way to split a text → the pre-tokenizer of a tokenizer.json; the last is a normalizer's, with bytes for what is not known."""


def trained(name: str, folder: Path) -> Tokenizer:
    """A Llama's folder whose tokenizer splits a text in that way; the tokenizer."""
    save(llama_config(vocab_size=900), folder)
    pairs = name == "sentencepiece"
    tokenizer = Tokenizer(models.BPE(byte_fallback=pairs, unk_token="<unk>" if pairs else None, fuse_unk=pairs, ignore_merges=name == "llama-bpe"))
    if pairs:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = PRE[name]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))] if pairs else ["<s>", "</s>"]
    alphabet = [] if pairs else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator([" ".join(topics[topic].split()) for topic in list(topics)[:8]] + ["I'm you'Ll CamelCaseHTML 1999"] * 30, trainer)
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = said["added_tokens"][: 3 if pairs else 2]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", PRE)
def test_each_way_to_split_a_text_is_told_by_its_pattern(name, tmp_path):
    trained(name, tmp_path)
    found = read_tokenizer(tmp_path, 900)
    assert found is not None
    assert (found.model, found.pre) == (("llama", "default") if name == "sentencepiece" else ("gpt2", name))


TEXTS = [
    *(piece for topic in list(topics)[8:40] for piece in topics[topic].split("\n\n")[:4] if 20 < len(piece) < 600),
    "Döner 🚀 tabs\tand  two   spaces\n\n\n  x", "I'M you'Ll 1234567 12 3.14 CamelCaseHTMLParser ПриветМир नमस्ते", "a/b//c \r\n\r\n x  ", "'s'S 'RE",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE)
def test_llama_cpp_makes_the_same_tokens(name, tmp_path):
    library: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source and in no environment of the tests")
    tokenizer = trained(name, tmp_path)
    written(tmp_path, tmp_path / GGUF)
    parameters = library.llama_model_default_params()
    parameters.vocab_only = True
    vocabulary = library.llama_model_get_vocab(library.llama_model_load_from_file(str(tmp_path / GGUF).encode(), parameters))
    for text in TEXTS:
        raw = text.encode()
        tokens = (library.llama_token * (len(raw) + 8))()
        count = library.llama_tokenize(vocabulary, raw, len(raw), tokens, len(tokens), True, False)
        assert list(tokens[:count]) == tokenizer.encode(text).ids, text


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path):
    folder = save(llama_config(), tmp_path / "model")
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    said["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(said))
    assert "its pre-tokenizer (Whitespace) is none of those of llama.cpp that are known here: gpt-2, smollm" in refused(
        lambda: refuse_gguf(read_spec(folder), folder)
    )
    assert "it has token 319, and the model 300 rows of embeddings" in refused(lambda: read_tokenizer(folder, 300))
    said["model"] = {"type": "Unigram", "vocab": [["a", 0.0]]}
    path.write_text(json.dumps(said))
    assert "a tokenizer of kind Unigram is not written" in refused(lambda: read_tokenizer(folder, 320))
    path.write_text("[1]")
    assert "cannot be read as a tokenizer" in refused(lambda: read_tokenizer(folder, 320))
