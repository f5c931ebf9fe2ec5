"""`lighten export`: every pair of formats converts without loss or says in one line why not.

Seeded faults that these tests were seen to catch: rows of a GGUF file's heads not turned back; Q8_0 read with its codes' sign bit left;
codes of an asymmetric grid put into ggml without their zero point; float16 taken where bfloat16 alone holds the values.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from test_gguf_write import saved
from tiny_models import bert_config, llama_config, save

from lighten.cli import export as command
from lighten.compress.ggml_search import quantize_ggml
from lighten.compress.rtn import quantize_rtn
from lighten.compress.walk import Checkpoint
from lighten.errors import LightenError
from lighten.formats import export as module
from lighten.formats import ort_file
from lighten.formats.artifact import write_artifact
from lighten.formats.export import DENSE, GGUF, PACKED, SPARSE, TARGETS, Exported, export
from lighten.formats.gguf_file import write_gguf
from lighten.formats.safetensors_folder import expanded_weights, write_folder
from lighten.formats.settings import onnxruntime_settings
from lighten.model import read_spec
from lighten.model.ggml_types import ggml_format
from lighten.model.spec import Embedding, Linear, WeightFormat
from lighten.recipe import parse_recipe

IDS = torch.arange(3, 40)[None]


def packed(folder: Path, out: Path, *, bits: int = 4, group_size: int = 32, symmetric: bool = True, **format: Any) -> Path:
    """A compressed-tensors folder of a model's linears and embeddings, rounded to the nearest."""
    spec, checkpoint = read_spec(folder), Checkpoint(folder)
    stored = WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric, **format)
    names = {f"{part.name}.weight" for part in spec.parts if isinstance(part, Linear | Embedding) and f"{part.name}.weight" in part.tensors()}
    spec = spec.with_parts(lambda part: replace(part, weight=stored) if isinstance(part, Linear | Embedding) else part)
    out.mkdir()
    weights = (
        (name, quantize_rtn(checkpoint[name], bits=bits, group_size=group_size, symmetric=symmetric) if name in names else checkpoint[name])
        for name in checkpoint.names
    )
    write_folder(weights, spec, folder, out)
    return out


def ggml_file(folder: Path, path: Path, kind: str) -> Path:
    """A GGUF file of a model whose matrices are of one type."""
    spec, checkpoint = read_spec(folder), Checkpoint(folder)
    names = {f"{part.name}.weight" for part in spec.parts if isinstance(part, Linear | Embedding)}

    def changed(part: Any) -> Any:
        columns = part.in_features if isinstance(part, Linear) else getattr(part, "embedding_dim", 0)
        return replace(part, weight=WeightFormat(**ggml_format(kind, columns))) if isinstance(part, Linear | Embedding) else part

    weights = ((name, quantize_ggml(checkpoint[name], kind) if name in names else checkpoint[name]) for name in checkpoint.names)
    write_gguf(weights, spec.with_parts(changed), folder, path)
    return path


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in expanded_weights(folder, read_spec(folder))}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    return found


def refused(call: Any) -> str:
    with pytest.raises(LightenError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_pair_of_formats_is_done_or_refused():
    """The two tables are one: each pair in exactly one of them."""
    pairs = {(kind, target) for kind in (DENSE, SPARSE, PACKED, GGUF, module.FACTORED) for target in TARGETS}
    assert set(module._WAYS) | set(module._REFUSED) == pairs
    assert not set(module._WAYS) & set(module._REFUSED)
    assert tuple(command.TARGETS) == TARGETS


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save(llama_config(hidden_size=64), tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "kind"),
    [(4, 32, True, "Q4_0"), (4, 64, False, "Q5_0"), (8, -1, True, "Q8_0"), (3, 32, False, "Q4_0"), (6, 64, True, "Q8_0")],
)
def test_codes_go_to_gguf_and_back_as_they_are(bits, group_size, symmetric, kind, llama, tmp_path):
    source = packed(llama, tmp_path / "packed", bits=bits, group_size=group_size, symmetric=symmetric)
    made = export(source, GGUF, tmp_path / "model.gguf")
    assert made.types == {kind: 15}
    assert made.size_bytes == (tmp_path / "model.gguf").stat().st_size
    back = export(tmp_path / "model.gguf", DENSE, tmp_path / "dense")
    assert back.types == {"float32": 15}
    assert equal(values(tmp_path / "dense"), values(source))
    if kind != "Q5_0":
        again = export(tmp_path / "model.gguf", PACKED, tmp_path / "again")
        assert set(again.types) == {f"int{4 if kind == 'Q4_0' else 8}"}
        assert equal(values(tmp_path / "again"), values(source))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_go_to_gguf_and_back_in_their_type(dtype, tmp_path):
    folder = save(llama_config(dtype=dtype), tmp_path / "model")
    made = export(folder, GGUF, tmp_path / "out")
    assert made.types == {dtype: 15}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    back = export(tmp_path / "out", DENSE, tmp_path / "back")
    assert back.types == {dtype: 15}
    assert equal(values(tmp_path / "back"), values(folder))
    assert any(f"its weights are {dtype}" in note for note in back.notes)


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2", "qwen3", "gemma"])
def test_a_gguf_file_comes_back_as_the_model_that_it_was_made_from(case, tmp_path):
    """Every family that is turned back: its config too, or the output would be another. Gemma's norms in float32 are what they are with 1 added,
    as its class adds it."""
    folder = saved(case, tmp_path / "model")
    export(folder, GGUF, tmp_path / "model.gguf")
    export(tmp_path / "model.gguf", DENSE, tmp_path / "back")
    one = {name: 1.0 if case == "gemma" and name.endswith("norm.weight") else 0.0 for name in values(folder)}
    back, original = ({name: value + one[name] for name, value in values(each).items()} for each in (tmp_path / "back", folder))
    assert equal(back, original)
    assert torch.allclose(logits(tmp_path / "back"), logits(folder), atol=1e-5)
    assert case in module.RETURNED


def test_a_dequantized_folder_has_the_values_of_the_codes(llama, tmp_path):
    source = packed(llama, tmp_path / "packed", symmetric=False, group_size=64)
    made = export(source, DENSE, tmp_path / "dense")
    assert made.tensors == len(values(source))
    assert made.output_error is not None
    assert made.output_error < 1e-5
    assert equal(values(tmp_path / "dense"), values(source))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_types_with_scales_of_their_own_go_to_safetensors_alone(tmp_path):
    folder = save(llama_config(hidden_size=256, intermediate_size=256, num_hidden_layers=1), tmp_path / "model")
    path = ggml_file(folder, tmp_path / "model.gguf", "Q4_K")
    export(path, DENSE, tmp_path / "dense")
    read = {tensor.name: gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    assert np.array_equal(values(tmp_path / "dense")["model.layers.0.mlp.up_proj.weight"].numpy(), read["blk.0.ffn_up.weight"])
    said = refused(lambda: export(path, PACKED, tmp_path / "packed"))
    assert "stores model.embed_tokens as Q4_K, whose scales compressed-tensors cannot say; Q4_0 and Q8_0 can be" in said
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("target", "codes"), [("onnx", 3), ("openvino", 4)])
@pytest.mark.parametrize("config", [bert_config, llama_config])
def test_a_model_goes_to_graphs(target, codes, config, tmp_path):
    """Its codes where the runtime has such, else their values."""
    folder = save(config(num_hidden_layers=1), tmp_path / "model")
    source = packed(folder, tmp_path / "packed", bits=codes)
    made = export(source, target, tmp_path / target)
    assert set(made.types) == {"int4" if codes == 4 else "float32"}
    assert bool(made.notes) == (codes == 3)
    assert made.output_error is not None
    assert made.output_error < 1e-3
    said = refused(lambda: export(tmp_path / target, DENSE, tmp_path / "back"))
    assert "from which no weights come back; export the folder that it was made from instead" in said


def test_exported_graphs_are_for_any_program(llama, tmp_path):
    """None of a runtime's own operators, and no input that other programs do not give."""
    import onnx
    import openvino

    encoder = save(bert_config(num_hidden_layers=1), tmp_path / "encoder")
    export(encoder, "onnx", tmp_path / "onnx")
    assert {node.domain for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node} == {""}
    export(llama, "openvino", tmp_path / "openvino")
    found = openvino.Core().read_model(tmp_path / "openvino" / "openvino_model.xml")
    assert {each.get_any_name() for each in found.inputs} == {"input_ids", "attention_mask", "position_ids", "beam_idx"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (DENSE, "is dense safetensors already"),
        (PACKED, "is not quantized, and rounding loses; lighten compress"),
        ("pickle", "format 'pickle' is not written; these are: safetensors, compressed-tensors, gguf, onnx, openvino, ort"),
    ],
)
def test_a_dense_folder_is_refused_what_would_not_be_lossless(target, says, llama, tmp_path):
    assert says in refused(lambda: export(llama, target, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_sources_are_refused_in_one_line(llama, tmp_path):
    source = packed(llama, tmp_path / "packed", bits=8, symmetric=False)
    assert "as 8-bit asymmetric codes (int, groups of 32), which no type of ggml holds" in refused(lambda: export(source, GGUF, tmp_path / "a.gguf"))
    assert "is compressed-tensors already" in refused(lambda: export(source, PACKED, tmp_path / "out"))
    export(llama, GGUF, tmp_path / "b.gguf")
    assert "becomes a graph by way of safetensors" in refused(lambda: export(tmp_path / "b.gguf", "onnx", tmp_path / "out"))
    assert "becomes a graph by way of safetensors" in refused(lambda: export(tmp_path / "b.gguf", "ort", tmp_path / "out"))
    assert "is a GGUF file already" in refused(lambda: export(tmp_path / "b.gguf", GGUF, tmp_path / "c.gguf"))
    assert "exists and is not empty" in refused(lambda: export(llama, GGUF, tmp_path / "b.gguf"))
    assert "no such folder" in refused(lambda: export(tmp_path / "nothing", GGUF, tmp_path / "d.gguf"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((llama / "config.json").read_text())
    assert "no weights; a source is a folder of safetensors" in refused(lambda: export(tmp_path / "config", GGUF, tmp_path / "d.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gguf", "config", "packed"]


@pytest.mark.parametrize("recipe", ["", "quantize(rtn, bits=4, group_size=16, embeddings=true)"])
def test_an_ort_file_computes_what_the_graph_computes(recipe, llama, tmp_path):
    """Held to the artifact's own graph; activations stay in float32 beside codes, which the file says itself and a graph's session must be told."""
    made = write_artifact(llama, parse_recipe(f"{recipe} @ onnxruntime"), tmp_path / "made", calibration=list).folder
    found = export(made, "ort", tmp_path / "phone")
    assert found.output_error < 1e-6
    assert found.target == "ort"
    assert {path.name for path in found.path.iterdir()} >= {"model.ort", "tokenizer.json"}
    assert (found.path / "model.ort").read_bytes()[4:8] == b"ORTM"
    options = onnxruntime.SessionOptions()
    for name, value in onnxruntime_settings(dynamic=False).items():
        options.add_session_config_entry(name, value)
    before, after = onnxruntime.InferenceSession(made / "model.onnx", options), onnxruntime.InferenceSession(found.path / "model.ort")
    ids = np.array([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.array([[0, 1, 2]])}
    inputs |= {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in before.get_inputs()[3:]}
    assert np.allclose(before.run(None, inputs)[0], after.run(None, inputs)[0], atol=1e-5)


def test_a_model_becomes_an_ort_file_at_once(tmp_path):
    made = export(save(bert_config(), tmp_path / "bert"), "ort", tmp_path / "phone")
    assert made.output_error < 1e-5
    assert (tmp_path / "phone" / "model.ort").is_file()


def test_a_graph_that_is_too_large_for_an_ort_file_is_refused(llama, tmp_path, monkeypatch):
    made = write_artifact(llama, parse_recipe("@ onnxruntime"), tmp_path / "made", calibration=list).folder
    monkeypatch.setattr(ort_file, "LARGEST_BYTES", 1000)
    assert "bytes, and a .ort file has at most 1,000; quantize it, or take it to onnx." in refused(lambda: export(made, "ort", tmp_path / "phone"))
    assert not (tmp_path / "phone").exists()


def test_files_whose_metadata_is_not_translated_whole_are_not_turned_back(tmp_path):
    export(saved("gemma2", tmp_path / "gemma2"), GGUF, tmp_path / "a.gguf")
    assert "GGUF files of gemma2 are not turned back; these are: llama, mixtral" in refused(
        lambda: export(tmp_path / "a.gguf", DENSE, tmp_path / "o")
    )
    export(saved("llama-3", tmp_path / "llama-3"), GGUF, tmp_path / "b.gguf")
    assert "with scaled positions are not turned back" in refused(lambda: export(tmp_path / "b.gguf", DENSE, tmp_path / "o"))


def test_what_a_gguf_file_lacks_is_said(tmp_path):
    made = export(saved("mistral", tmp_path / "mistral"), GGUF, tmp_path / "a.gguf")
    assert [note.split(":")[0] for note in made.notes] == [
        "llama.cpp does not know this architecture's sliding window",
        "the folder has no tokenizer.json, so the file is without a tokenizer",
    ]
    assert "promises 64 positions of 256" in made.notes[0]
    made = export(save(bert_config(), tmp_path / "bert"), GGUF, tmp_path / "b.gguf")
    assert made.notes == ("GGUF files of bert have no pooler",)


def test_activations_that_a_format_does_not_say_are_refused(llama, tmp_path):
    source = packed(llama, tmp_path / "packed", bits=8, group_size=-1, scale_dtype="float16", activations="dynamic")
    assert "with dynamic 8-bit activations, which only compressed-tensors says" in refused(lambda: export(source, GGUF, tmp_path / "a.gguf"))


def test_the_command_prints_what_was_made(llama, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(llama), "--to", "gguf", "-o", str(tmp_path / "a.gguf"), "--json"])) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["from"] == "safetensors"
    assert said["compared"]["tensors"] == 20
    assert said["types"] == {"float32": 15}
    assert command.run(parser.parse_args([str(llama), "--to", "gguf", "-o", str(tmp_path / "b.gguf")])) == 0
    assert "matrices 15 × float32; 20 tensors read back equal" in capsys.readouterr().out


def test_an_exported_is_told_by_its_fields():
    assert {"path", "source", "target", "size_bytes", "types", "tensors", "output_error", "notes"} == set(Exported.__dataclass_fields__)
