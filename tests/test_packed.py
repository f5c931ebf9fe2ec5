"""Every way in which a quantized weight is stored: packed and unpacked without loss, read by compressed-tensors, streamed to files that are the
library's own, run with the same logits by `transformers`.

Seeded faults that these tests were seen to catch: the halves of a byte exchanged in `pack` (4-bit floats); zero points packed along columns
instead of rows; the global scale multiplied instead of divided; a file's tensors ordered by name alone; the header's filling left out; a tied
head's scales not written; activations divided by 127 instead of 127.5; the cache's newest tokens attended before they are coded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from tiny_models import build, llama_config, save

from lighten.compress.fake_quant import dynamic_grid, dynamic_scale, round_dynamic
from lighten.compress.grid import QuantizedTensor
from lighten.compress.minifloat import quantize_float
from lighten.compress.rtn import quantize_rtn
from lighten.compress.walk import Checkpoint
from lighten.errors import ModelError, OutputError, RecipeError
from lighten.formats.packing import pack, unpack
from lighten.formats.quantized_cache import encode
from lighten.formats.safetensors_file import SafetensorsWriter, header_of, split
from lighten.formats.safetensors_folder import expanded_weights, other_loaders_refuse, quantization_config, read_weights, write_folder
from lighten.formats.torch_model import load_module
from lighten.formats.verify import Witness, verify_folder
from lighten.model import ModelSpec, read_spec
from lighten.model.quantized import kind_of, scheme, stored_tensors
from lighten.model.quantized.kv import KVFormat, kv_format_for, read_kv_format
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Attention, Embedding, Linear, Part, TensorSpec, WeightFormat
from lighten.runtimes.torch_eager import TorchSession

FP8 = WeightFormat(bits=8, element="e4m3", scale_dtype="float32")
MXFP4 = WeightFormat(bits=4, element="e2m1", scale_dtype="uint8", group_size=32)
NVFP4 = WeightFormat(bits=4, element="e2m1", scale_dtype="float8_e4m3fn", group_size=16, global_scale=True)
INTS = [
    WeightFormat(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (1, 2, 3, 4, 5, 6, 7, 8) for group in (PER_CHANNEL, PER_TENSOR, 16) for symmetric in (True, False)
    if bits > 1 or not symmetric
]  # fmt: skip
FORMATS = [
    *INTS, FP8, replace(FP8, group_size=PER_TENSOR), MXFP4, NVFP4,
    *(replace(weight, activations=kind) for weight in (FP8, WeightFormat(bits=8)) for kind in ("dynamic", "static")),
    WeightFormat(bits=8, activations="dynamic", activation_zero_points=True), replace(FP8, activations="dynamic", activation_group_size=16),
]  # fmt: skip
LINEAR = Linear(name="linear", component="mlp", in_features=64, out_features=40)
TABLE = Embedding(name="table", component="embedding", num_embeddings=40, embedding_dim=64)


def said(weight: WeightFormat) -> str:
    group = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(weight.group_size, str(weight.group_size))
    return f"{weight.element}{weight.bits}-{group}-{'symmetric' if weight.symmetric else 'zeros'}-{weight.activations}"


def quantized(matrix: torch.Tensor, weight: WeightFormat) -> QuantizedTensor:
    """A matrix in a format, by rounding."""
    if weight.element == "int":
        found = quantize_rtn(matrix.float(), bits=weight.bits or 0, group_size=weight.group_size, symmetric=weight.symmetric)
    else:
        found = quantize_float(matrix.float(), format=weight)
    return replace(found, input_scale=torch.tensor([0.05 if weight.element == "int" else 0.02])) if weight.activations == "static" else found


def matrix(rows: int = 40, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- one weight ----


@pytest.mark.parametrize("part", [LINEAR, TABLE], ids=["linear", "table"])
@pytest.mark.parametrize("weight", FORMATS, ids=said)
def test_a_weight_of_every_format_is_packed_into_the_tensors_that_the_spec_says_and_comes_back(weight, part):
    part = replace(part, weight=weight)
    found = quantized(matrix(), weight)
    kind = kind_of(part)
    assert kind is not None
    tensors = pack(found, kind)
    assert {f"{part.name}.{name}": tuple(value.shape) for name, value in tensors.items()} == stored_tensors(part)
    back = unpack(tensors, weight, kind)
    for name in ("codes", "scale", "zero_point", "global_scale", "input_scale"):
        mine, theirs = getattr(found, name), getattr(back, name)
        assert (mine is None and theirs is None) or (mine.dtype == theirs.dtype and torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))), (
            name
        )
    assert torch.equal(back.dequantize(), found.dequantize())


@pytest.mark.parametrize("part", [LINEAR, TABLE], ids=["linear", "table"])
@pytest.mark.parametrize("weight", [weight for weight in FORMATS if weight.bits != 1], ids=said)
def test_compressed_tensors_reads_the_same_weight_by_the_words_of_the_config(weight, part):
    """In float32; nvfp4 it rounds to bfloat16 itself."""
    kind = kind_of(replace(part, weight=weight))
    found = quantized(matrix(), weight)
    words = QuantizationScheme(targets=["Linear"], **scheme(kind, weight))
    tensors = pack(found, kind)
    if weight.element == "int":
        tensors["weight_scale"] = tensors["weight_scale"].float()
    read = BaseCompressor.get_value_from_registry(kind).decompress(tensors, words)["weight"]
    expected = found.dequantize().bfloat16() if weight.global_scale else found.dequantize()
    assert torch.equal(read.float(), expected.float())


# ---- files ----

KINDS = [
    ("c.weight", torch.bfloat16, (3, 5)), ("a.weight", torch.float32, (2, 2)), ("b", torch.int8, (7,)), ("d", torch.float8_e4m3fn, (5,)),
    ("e.weight_shape", torch.int64, (2,)), ("f", torch.float16, (3, 1)), ("g", torch.uint8, (3,)), ("h.weight_packed", torch.int32, (2, 3)),
    ("i", torch.float32, (0, 4)), ("j", torch.float32, ()), ("ü", torch.bool, (3,)), ("k", torch.int16, (1,)), ("l", torch.float64, (1,)),
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, dtype, shape in KINDS}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_written_tensor_by_tensor_in_any_order_is_the_librarys_byte_by_byte(order, tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    writer = SafetensorsWriter(tmp_path / "ours", specs_of(tensors))
    for name, tensor in list(tensors.items())[::order]:
        assert name in writer.missing
        writer.write(name, tensor)
    writer.close()
    assert not writer.missing
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_of_another_shape_or_type_than_the_header_says_is_a_bug(tmp_path):
    writer = SafetensorsWriter(tmp_path / "ours", specs_of({"a": torch.zeros(2, 3)}))
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16)):
        with pytest.raises(AssertionError, match="the header says"):
            writer.write("a", wrong)
    writer.close()


@pytest.mark.parametrize(("limit", "sizes"), [(12, [[8, 4], [8], [20], [4]]), (7, [[8, 4], [8], [20], [4]]), (44, [[8, 4, 8, 20, 4]])])
def test_shards_are_full_and_keep_what_belongs_together(limit, sizes):
    groups = [[TensorSpec(name=f"{n}{i}", shape=(size // 4,), dtype="float32") for i, size in enumerate(group)] for n, group in
              enumerate([[8, 4], [8], [20], [4]])]  # fmt: skip
    found = split(groups, limit)
    assert [[4 * tensor.shape[0] for tensor in shard] for shard in found] == sizes
    assert all(len(header_of(shard)[0]) % 8 == 0 for shard in found)


# ---- folders ----


Choice = Callable[[Linear | Embedding], WeightFormat | None]


def linears(weight: WeightFormat) -> Choice:
    return lambda part: weight if isinstance(part, Linear) and part.component != "head" else None


def everything(weight: WeightFormat, tables: WeightFormat | None = None) -> Choice:
    return lambda part: (tables or weight) if isinstance(part, Embedding) or part.component == "head" else weight


def predicted(source: Path, choice: Choice) -> ModelSpec:
    spec = read_spec(source)

    def changed(part: Part) -> Part:
        if isinstance(part, Linear | Embedding) and (weight := choice(part)) is not None:
            tied = isinstance(part, Linear) and part.tied_to is not None
            return replace(part, weight=replace(weight, dtype=part.weight.dtype, activations=None if tied else weight.activations))
        return part

    return spec.with_parts(changed)


def write(source: Path, choice: Choice, out: Path, **options: Any) -> tuple[ModelSpec, dict[str, Any]]:
    """Write a model with the chosen formats; its spec, and what was given to the writer."""
    spec, checkpoint = predicted(source, choice), Checkpoint(source)
    parts = [p for p in spec.parts if isinstance(p, Linear | Embedding) and p.weight.bits and not getattr(p, "tied_to", None)]
    turned = {f"{p.name}.weight" for p in parts if isinstance(p, Linear) and p.transposed}
    formats = {f"{part.name}.weight": part.weight for part in parts}
    given: dict[str, Any] = {}
    for name in checkpoint.names:
        value = checkpoint[name]
        given[name] = quantized(value.T if name in turned else value, formats[name]) if name in formats else value
    out.mkdir()
    write_folder(given.items(), spec, source, out, **options)
    return spec, given


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Wide enough for groups of 32; its head is tied."""
    return save(llama_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1), tmp_path_factory.mktemp("models") / "llama")


INT4 = WeightFormat(bits=4, group_size=16)
INT8 = WeightFormat(bits=8)
SAME: dict[str, tuple[Choice, float]] = {
    "4 bit": (linears(INT4), 0), "3 and 2 bit": (lambda p: None if isinstance(p, Embedding) or p.component == "head" else
                                                replace(INT4, bits=3 if "attn" in p.name else 2), 0),
    "4 bit, tied 8-bit table": (everything(INT4, INT8), 0), "8 bit with zero points, table too": (everything(replace(INT8, symmetric=False)), 0),
    "fp8, table too": (everything(FP8), 0), "mxfp4": (linears(MXFP4), 0), "int8 activations": (linears(replace(INT8, activations="dynamic")), 0),
    "int8 activations with zero points": (linears(replace(INT8, activations="dynamic", activation_zero_points=True)), 0),
    "int8 activations by group": (
        linears(WeightFormat(bits=8, group_size=16, activations="dynamic", activation_zero_points=True, activation_group_size=16)), 0,
    ),
    "static int8 activations": (linears(replace(INT8, activations="static")), 0),
    "fp8 activations": (linears(replace(FP8, activations="dynamic")), 0),
    "static fp8 activations": (linears(replace(FP8, activations="static")), 0),
    "4 bit with zero points (rounded to float16)": (linears(replace(INT4, symmetric=False)), 5e-3),
    "4 bit, table too (rounded to float16)": (everything(INT4), 5e-3), "nvfp4 (rounded to bfloat16)": (linears(NVFP4), 4e-2),
}  # fmt: skip
"""What `transformers` with `compressed-tensors` runs, and how far its logits are from ours, relative to the largest."""
IDS = torch.arange(5, 39).reshape(2, 17)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(IDS).logits
    return found


def theirs(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", SAME)
def test_transformers_loads_it_and_gives_our_logits(name, llama, tmp_path):
    choice, tolerance = SAME[name]
    spec, given = write(llama, choice, tmp_path / "out")
    assert other_loaders_refuse(spec) == []
    again = read_spec(tmp_path / "out")
    back = dict(read_weights(tmp_path / "out", again))
    assert back.keys() == given.keys()
    for tensor, weight in given.items():
        value, read = (w.dequantize() if isinstance(w, QuantizedTensor) else w for w in (weight, back[tensor]))
        assert torch.equal(value, read)
    ours, original = logits(load_module(tmp_path / "out", again, dtype="float32", attention="eager")), logits(theirs(llama))
    found = logits(theirs(tmp_path / "out"))
    assert (found - ours).abs().max() <= tolerance * ours.abs().max()
    assert (ours - original).abs().max() > 1e-3 * original.abs().max(), "quantization changed nothing: is it read at all?"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (everything(INT4, replace(INT4, group_size=32)), "a packed embedding only where all quantized weights have one format"),
        (everything(replace(INT4, symmetric=False), INT8), "packed zero points only where all quantized weights have one format"),
    ],
)
def test_what_transformers_does_not_load_is_said_and_read_by_lighten(choice, words, llama, tmp_path):
    """It refuses to, instead of running something else."""
    spec, _ = write(llama, choice, tmp_path / "out")
    assert words in other_loaders_refuse(spec)[0]
    load_module(tmp_path / "out", read_spec(tmp_path / "out"), dtype="float32", attention="eager")
    with pytest.raises((RuntimeError, AttributeError)):
        theirs(tmp_path / "out")


def test_shards_hold_the_same_and_the_index_says_where(llama, tmp_path):
    write(llama, everything(INT4, INT8), tmp_path / "one")
    write(llama, everything(INT4, INT8), tmp_path / "many", shard_bytes=9_000)
    write(llama, everything(INT4, INT8), tmp_path / "again", shard_bytes=9_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    found = {name: load_file(tmp_path / "many" / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert {name: (tmp_path / "many" / name).read_bytes() for name in files} == {name: (tmp_path / "again" / name).read_bytes() for name in files}
    assert torch.equal(logits(theirs(tmp_path / "many")), logits(theirs(tmp_path / "one")))


def test_a_missing_weight_is_said_and_an_unknown_one_left_out(llama, tmp_path):
    checkpoint, spec = Checkpoint(llama), read_spec(llama)
    given = {name: checkpoint[name] for name in checkpoint.names}
    (tmp_path / "out").mkdir()
    write_folder([*given.items(), ("stranger", torch.zeros(2))], spec, llama, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == given.keys()
    given.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"^1 tensors that the model has were not written: model\.norm\.weight\.$"):
        write_folder(given.items(), spec, llama, tmp_path / "out")


def test_gpt2s_turned_matrices_are_read_by_lighten_alone(tmp_path):
    """Conv1D stores [in, out]; its codes are [out, in], and no other loader is told that they are compressed-tensors'."""
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=1, n_head=4, n_positions=32, initializer_range=0.2, architectures=["GPT2LMHeadModel"],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    build(config).save_pretrained(tmp_path / "gpt2")
    spec, given = write(tmp_path / "gpt2", linears(INT4), tmp_path / "out")
    assert other_loaders_refuse(spec) == ["compressed-tensors has no quantized Conv1D; lighten alone reads these weights."]
    assert quantization_config(spec)["format"] == "transposed-pack-quantized"
    original, again = load_file(tmp_path / "gpt2" / "model.safetensors"), read_spec(tmp_path / "out")
    expanded = dict(expanded_weights(tmp_path / "out", again))
    name = next(name for name in given if "c_fc.weight" in name)
    assert given[name].codes.shape == original[name].T.shape
    assert torch.equal(expanded[name], given[name].dequantize().T)
    module = theirs(tmp_path / "gpt2")
    with torch.no_grad():
        for tensor, weight in given.items():
            if isinstance(weight, QuantizedTensor):
                module.get_parameter(tensor if tensor.startswith("transformer.") else f"transformer.{tensor}").copy_(weight.dequantize().T)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = load_module(tmp_path / "out", again, dtype="float32", attention="eager")(ids).logits
        torch.testing.assert_close(ours, module(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="transposed-pack-quantized"):
        theirs(tmp_path / "out")


# ---- verified ----


def test_an_artifact_that_reads_back_otherwise_is_refused_and_removed(llama, tmp_path):
    spec, checkpoint = predicted(llama, everything(INT4, INT8)), Checkpoint(llama)
    formats = {f"{p.name}.weight": p.weight for p in spec.parts if isinstance(p, Linear | Embedding) and p.weight.bits}
    given = {name: quantized(checkpoint[name], formats[name]) if name in formats else checkpoint[name] for name in checkpoint.names}
    for corrupt in (False, True):
        out, witness = tmp_path / "out", Witness(spec, llama)
        out.mkdir()
        write_folder(witness.watch(given.items()), spec, llama, out)
        if not corrupt:
            verified = verify_folder(out, witness)
            assert (verified.tensors, verified.tolerance) == (len(given), 1e-5)
            assert verified.output_error is not None
            assert verified.output_error <= 1e-6
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
            continue
        file = out / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
        with pytest.raises(OutputError, match=r"out was written and does not agree .*: 1 of \d+ tensors read back are not those .*it is removed"):
            verify_folder(out, witness)
        assert not out.exists()


# ---- activations and cache ----


@pytest.mark.parametrize(("element", "zero_points"), [("int", False), ("int", True), ("e4m3", False)])
@pytest.mark.parametrize(("shape", "group_size"), [((2, 5, 16), None), ((3, 16), None), ((2, 3, 4, 8), None), ((2, 5, 16), 4)])
def test_activations_are_rounded_as_compressed_tensors_does(element, zero_points, shape, group_size):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as expected
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 2
    x.view(-1)[0] = 0
    kind = "int" if element == "int" else "float"
    how = {"strategy": "token"} if group_size is None else {"strategy": "group", "group_size": group_size}
    arguments = QuantizationArgs(num_bits=8, type=kind, dynamic=True, symmetric=not zero_points, **how)
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(1, 1))
    rounded = partial(round_dynamic, element=element, zero_points=zero_points, group_size=group_size)
    assert torch.equal(rounded(x), expected(x, scale, zero, arguments))
    assert torch.equal(rounded(torch.zeros(shape)), torch.zeros(shape))
    if group_size is not None:
        return
    if zero_points:
        assert [found.equal(wanted.to(found.dtype)) for found, wanted in zip(dynamic_grid(x), (scale, zero), strict=True)] == [True, True]
    else:
        assert torch.equal(dynamic_scale(x, element=element), scale)


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_gradient_of_rounded_activations_is_that_of_the_values(zero_points):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    (round_dynamic(x, element="int", zero_points=zero_points) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("window", [None, 6])
def test_a_cache_of_codes_is_smaller_and_every_position_attends_to_codes(bits, group, window, llama, tmp_path):
    """Prefill and single steps give what all positions at once give, and `transformers` with the same config too."""
    spec = read_spec(llama)
    kv = kv_format_for(spec, bits=bits, group_size=group)
    if window is None:
        write(llama, lambda part: None, tmp_path / "out", kv_cache=kv)
        assert read_kv_format(read_spec(tmp_path / "out").config) == kv
        module = load_module(tmp_path / "out", read_spec(tmp_path / "out"), dtype="float32", attention="eager")
    else:
        config = transformers.MistralConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            sliding_window=window, initializer_range=0.2, architectures=["MistralForCausalLM"],
        )  # fmt: skip
        module = build(config)
    coded, plain = TorchSession(module, kv), TorchSession(module)
    ids = IDS.numpy()
    whole = coded.logits(ids)
    assert np.abs(whole - plain.logits(ids)).max() > 1e-3, "nothing was coded"
    for session in (coded, plain):
        steps = [session.prefill(ids[:, :9]), *(session.decode(ids[:, at : at + 1]) for at in range(9, 17))]
        expected = whole if session is coded else plain.logits(ids)
        np.testing.assert_allclose(np.stack(steps, 1), expected[:, 8:], atol=1e-3)
    held = kv.bytes_per_group(4) / (4 * kv.group_size)
    assert coded.cache_bytes == pytest.approx(held * plain.cache_bytes)
    if window is None:
        np.testing.assert_allclose(logits(theirs(tmp_path / "out")).numpy(), whole, atol=2e-5)


def test_codes_of_a_cache_are_within_half_a_step_and_4_bits_lie_two_in_a_byte():
    states = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(2))
    for kv in (KVFormat(bits=8, group_size=16), KVFormat(bits=4, group_size=4), KVFormat(bits=4, group_size=8, symmetric=True)):
        coded = encode(states, kv)
        error = (coded.decode(torch.float32) - states).abs().reshape(2, 3, 5, -1, kv.group_size).amax(-1)
        assert (error <= coded.scale * (0.51 if not kv.symmetric else 1.01)).all()
        assert coded.packed.shape[-1] == 16 * kv.bits // 8
        assert torch.equal(coded.last(2).decode(torch.float32), coded.decode(torch.float32)[:, :, -2:])


def test_a_cache_that_cannot_be_coded_is_refused():
    spec = read_kv_spec()
    with pytest.raises(RecipeError, match=r"group_size=5 does not divide heads of 16 channels; use a divisor of 16\.$"):
        kv_format_for(spec, bits=8, group_size=5)
    with pytest.raises(RecipeError, match=r"keeps no cache of keys and values of heads\.$"):
        kv_format_for(spec.with_parts(lambda part: replace(part, cached=False) if isinstance(part, Attention) else part), bits=8)
    with pytest.raises(ModelError, match=r"kv_cache_scheme .* is not run here"):
        read_kv_format({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}})


def read_kv_spec() -> ModelSpec:
    parts = (Attention(name="a", component="attention", num_attention_heads=4, num_key_value_heads=2, head_dim=16, causal=True),)
    return ModelSpec(name="tiny", family="llama", architecture="LlamaForCausalLM", source="", dtype="float32", config={}, parts=parts)
