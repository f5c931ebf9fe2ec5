"""Artifacts: each runtime gives what torch gives on the same weights, and nothing half-written stays."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import bert_config, llama_config, save

from lighten import __version__
from lighten.errors import ModelError, OutputError, RecipeError
from lighten.formats import artifact as artifact_module
from lighten.formats.artifact import MANIFEST, RUN, Artifact, fingerprint, folder_bytes, read_artifact, write_artifact
from lighten.formats.deploy import CARD, SCRIPT
from lighten.formats.step_facts import facts_before
from lighten.formats.torch_model import load_module
from lighten.model import read_spec
from lighten.model.read import SIDE_FILES
from lighten.model.spec import Embedding, Linear
from lighten.recipe import apply_recipe, notes, parse_recipe
from lighten.recipe.predict import artifact_bytes
from lighten.runtimes import MODULES, Session
from lighten.runtimes.session import Setup


def random_ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 320, (batch, length))


def padded(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and a mask that leaves each sequence but the first shorter by its number."""
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        mask[row, -row:] = 0
    return random_ids(batch, length), mask


def calibration() -> list[dict[str, np.ndarray]]:
    return [{"input_ids": random_ids(1, 24, seed), "attention_mask": np.ones((1, 24), np.int64)} for seed in range(8)]


def session(folder: Path, original: Path, recipe: str, dtype: str = "float32") -> Session:
    runtime = parse_recipe(recipe).runtime
    spec = read_spec(folder if runtime.startswith("torch") else original)
    return MODULES[runtime].load(folder, spec, Setup(dtype=dtype, threads=1, activations=parse_recipe(recipe).activations))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Path, str], tuple[Artifact, Session]]:
    """The artifact of a model and a recipe, and a session on it; made once, from one export a model."""
    work, known = tmp_path_factory.mktemp("artifacts"), {}

    def make(source: Path, recipe: str) -> tuple[Artifact, Session]:
        if (source, recipe) not in known:
            out = work / f"{len(known)}"
            artifact = write_artifact(source, parse_recipe(recipe), out, calibration=calibration, exports=work / "exports")
            known[source, recipe] = artifact, session(out, source, recipe, artifact.dtype)
        return known[source, recipe]

    return make


def reference(folder: Path, attention: str = "eager") -> Any:
    return load_module(folder, read_spec(folder), dtype="float32", attention=attention)


def hidden(module: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# ---- encoders ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_body_of_a_model_with_a_task_head_is_exported_in_float32(dtype, tmp_path):
    """Its tensors stand under a prefix in the checkpoint. The size is that of what is exported; without a place for exports none stays."""
    source = save(bert_config("BertForMaskedLM", num_hidden_layers=1, vocab_size=2000, hidden_size=64, dtype=dtype), tmp_path / "model")
    assert read_spec(source).dtype == dtype
    recipe = {"float32": "@ onnxruntime", "bfloat16": "@ openvino"}[dtype]
    artifact = write_artifact(source, parse_recipe(recipe), tmp_path / "out", calibration=list)
    ids, mask = padded(2, 9)
    runs = session(artifact.folder, source, recipe)
    assert (artifact.dtype, runs.precision) == ("float32", "float32")
    np.testing.assert_allclose(runs.encode(ids, mask), hidden(reference(source), ids, mask), atol=1e-4)
    weights = sum(parameter.numel() * 4 for name, parameter in reference(source).named_parameters() if "pooler" not in name)
    assert weights < artifact.size_bytes < weights * 1.25
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert not list(artifact.folder.glob("*.weights.json"))


WEIGHT_ONLY = [
    "quantize(rtn) @ openvino", "quantize(rtn, bits=4, group_size=16) @ openvino", "quantize(rtn, symmetric=true, embeddings=true) @ openvino",
    "quantize(rtn, bits=4, group_size=16, targets=attention) | quantize(rtn, targets=intermediate) @ openvino",
    "quantize(rtn, symmetric=true, embeddings=true) @ onnxruntime", "quantize(rtn, bits=4, group_size=16, embeddings=true) @ onnxruntime",
    "quantize(rtn, bits=4, group_size=8, targets=attention) | quantize(rtn, targets=intermediate) @ onnxruntime",
]  # fmt: skip


@pytest.mark.parametrize("recipe", WEIGHT_ONLY)
def test_a_graph_computes_with_exactly_lightens_codes(recipe, made, tiny_bert, tmp_path):
    """Ten times nearer to torch on the dequantized weights than quantization moved it."""
    _, runs = made(tiny_bert, recipe)
    packed = write_artifact(tiny_bert, parse_recipe(recipe.partition(" @")[0]), tmp_path / "packed", calibration=list)
    ids, mask = padded(3, 17)
    found, expected = runs.encode(ids, mask), hidden(reference(packed.folder), ids, mask)
    moved = relative_error(expected, hidden(reference(tiny_bert), ids, mask))
    assert relative_error(found, expected) < min(1e-3, moved / 10)
    assert runs.precision == f"float32 with {'4' if 'bits=4' in recipe else '8'}-bit weights"


def elements_stored_as(path: Path, types: tuple[str, ...]) -> int:
    """How many elements of matrices an exported graph keeps in the given types, but for BERT's two token types, for vectors and for zero points."""
    if path.suffix == ".onnx":
        import onnx

        graph = onnx.load(path).graph
        shapes = [tuple(t.dims) for t in graph.initializer if onnx.TensorProto.DataType.Name(t.data_type) in types]
    else:
        import openvino

        constants = [node for node in openvino.Core().read_model(path).get_ordered_ops() if node.get_type_name() == "Constant"]
        shapes = [tuple(node.get_output_shape(0)) for node in constants if node.get_element_type().get_type_name() in types]
    return sum(math.prod(shape) for shape in shapes if math.prod(shape) > 320)


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("quantize(dynamic, embeddings=true) @ onnxruntime", ("INT8", "UINT8")),
        ("quantize(dynamic) @ onnxruntime", ("INT8", "UINT8")),
        ("quantize(static) @ openvino", ("i8", "u8")),
        ("quantize(static) @ onnxruntime", ("INT8", "UINT8")),
        ("quantize(dynamic) @ openvino", ("i8", "u8")),
        ("quantize(rtn) @ openvino", ("i8", "u8")),
        ("quantize(rtn, bits=4, group_size=32, embeddings=true, targets='embed|attention') @ openvino", ("i4", "u4")),
        ("quantize(rtn, symmetric=true, embeddings=true) @ onnxruntime", ("INT8", "UINT8")),
        ("quantize(rtn, activations=dynamic) @ onnxruntime", ("INT8", "UINT8")),
        ("quantize(rtn, bits=4, group_size=16) @ openvino", ("i4", "u4")),
    ],
)
def test_the_weights_that_are_predicted_to_be_codes_are_codes(recipe, types, made, tiny_bert):
    """The graph's integer elements, counted, against the recipe's reading on the spec."""
    artifact, _ = made(tiny_bert, recipe)
    predicted = apply_recipe(parse_recipe(recipe), read_spec(tiny_bert))
    codes = [part for part in predicted.parts if isinstance(part, Linear | Embedding) and part.weight.bits and part.component != "pooler"]
    expected = sum(int(np.prod(part.tensors()[f"{part.name}.weight"])) for part in codes)
    graph = next(path for path in artifact.folder.iterdir() if path.suffix in (".onnx", ".xml"))
    assert elements_stored_as(graph, types) == expected


def test_a_table_of_few_rows_is_stored_as_floats(made, tiny_bert):
    """By ONNX Runtime's own quantizer too."""
    onnx = pytest.importorskip("onnx")
    artifact, _ = made(tiny_bert, "quantize(dynamic, embeddings=true) @ onnxruntime")
    graph = onnx.load(artifact.folder / "model.onnx").graph
    types = {tuple(each.dims): onnx.TensorProto.DataType.Name(each.data_type) for each in graph.initializer if len(each.dims) == 2}
    assert types[2, 32] == "FLOAT"
    assert types[128, 32] in ("INT8", "UINT8")


INT8_ACTIVATIONS = [
    "quantize(dynamic) @ onnxruntime", "quantize(static) @ onnxruntime", "quantize(static) @ openvino", "quantize(dynamic) @ openvino",
    "quantize(rtn, activations=dynamic) @ onnxruntime",
]  # fmt: skip


@pytest.mark.parametrize("recipe", INT8_ACTIVATIONS)
def test_int8_activations_run_in_int8_and_stay_near(recipe, made, tiny_bert):
    _, runs = made(tiny_bert, recipe)
    ids, mask = padded(3, 17)
    found, expected = runs.encode(ids, mask), hidden(reference(tiny_bert), ids, mask)
    assert runs.precision == "int8"
    assert 1e-4 < relative_error(found, expected) < 0.15


def test_half_precision_is_stored_and_computed_where_it_is_said(made, tiny_bert):
    plain, _ = made(tiny_bert, "@ openvino")
    half, runs = made(tiny_bert, "cast(float16) @ openvino")
    ids, mask = padded(2, 9)
    expected = hidden(reference(tiny_bert), ids, mask)
    assert runs.precision == "float32"
    assert relative_error(runs.encode(ids, mask), expected) < 2e-3
    binary = [(artifact.folder / "openvino_model.bin").stat().st_size for artifact in (plain, half)]
    assert binary[1] == pytest.approx(binary[0] / 2, rel=0.02)
    narrow = session(half.folder, tiny_bert, "@ openvino(dtype=bfloat16)", "bfloat16")
    assert narrow.precision == "bfloat16"
    assert relative_error(narrow.encode(ids, mask), expected) < 0.05


# ---- decoders ----


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "steps",
    [
        "quantize(rtn, bits=4, group_size=16, targets=self_attn) | quantize(rtn, embeddings=true, targets='mlp|embed')",
        "quantize(rtn, bits=4, group_size=16, embeddings=true)", "quantize(rtn, bits=4, group_size=16, symmetric=true, embeddings=true)",
    ],
)  # fmt: skip
def test_a_quantized_decoder_computes_with_exactly_lightens_codes(steps, runtime, made, tiny_llama, tmp_path):
    """Its head is tied to its embeddings, which are quantized too."""
    _, runs = made(tiny_llama, f"{steps} @ {runtime}")
    packed = write_artifact(tiny_llama, parse_recipe(steps), tmp_path / "packed", calibration=list)
    ids = random_ids(2, 7)
    with torch.no_grad():
        found, original = (reference(folder)(torch.from_numpy(ids)).logits.numpy() for folder in (packed.folder, tiny_llama))
    assert relative_error(runs.logits(ids), found) < min(1e-3, relative_error(found, original) / 10)


def test_a_decoder_without_a_head_is_not_run_with_a_random_one(tmp_path):
    source = save(llama_config("LlamaModel", num_hidden_layers=1), tmp_path / "model")
    with pytest.raises(ModelError, match=r"model: LlamaModel has no language-model head, so it gives no logits and cannot be run here\.$"):
        load_module(source, read_spec(source), dtype="float32", attention="eager")


# ---- exports ----


@pytest.mark.parametrize("recipe", ["prune(magnitude, sparsity=0.5) @ onnxruntime", "@ onnxruntime"])
def test_a_second_recipe_takes_the_export_of_the_first(recipe, made, tiny_bert, tmp_path, monkeypatch):
    """And changes nothing of it: the plain recipe after the pruned one gives the plain model."""
    made(tiny_bert, "@ onnxruntime")
    exports = next(iter(made(tiny_bert, "@ onnxruntime")[0].folder.parent.glob("exports")))
    before = {path.name: path.read_bytes() for path in exports.iterdir() if path.name.startswith(fingerprint(tiny_bert))}
    monkeypatch.setattr(artifact_module, "export_onnx", None)
    write_artifact(tiny_bert, parse_recipe(recipe), tmp_path / "out", calibration=list, exports=exports)
    assert {name: (exports / name).read_bytes() for name in before} == before
    ids, mask = padded(2, 9)
    found = session(tmp_path / "out", tiny_bert, recipe).encode(ids, mask)
    expected = hidden(reference(tiny_bert), ids, mask)
    assert (relative_error(found, expected) < 1e-4) == (recipe == "@ onnxruntime")


def test_a_change_of_the_weights_is_another_fingerprint(tmp_path):
    source = save(bert_config(num_hidden_layers=1), tmp_path / "model")
    before = fingerprint(source)
    assert fingerprint(source) == before
    os.utime(source / "model.safetensors", ns=(1, 1))
    after = fingerprint(source)
    (source / "config.json").write_text((source / "config.json").read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    assert len({before, after, fingerprint(source)}) == 3


# ---- what lies in the folder ----


@pytest.mark.parametrize("recipe", ["quantize(rtn, bits=4, group_size=16) @ torch", "quantize(dynamic) @ onnxruntime", "quantize(static) @ openvino"])
def test_the_manifest_says_what_the_artifact_is(recipe, made, tiny_bert):
    artifact, _ = made(tiny_bert, recipe)
    manifest = json.loads((artifact.folder / MANIFEST).read_text())
    said, spec = parse_recipe(recipe), read_spec(tiny_bert)
    layers = manifest.pop("layers")
    assert manifest == {
        "lighten": __version__, "recipe": str(said), "runtime": said.runtime, "dtype": "float32", "original": str(tiny_bert.resolve()),
        "original_fingerprint": fingerprint(tiny_bert), "size_bytes": folder_bytes(artifact.folder),
        "predicted": {"size_bytes": artifact_bytes(said, apply_recipe(said, spec))}, "notes": notes(said, spec), "run": manifest["run"],
        "curves": [], "before": facts_before(spec, said, tiny_bert), "steps": manifest["steps"],
    }  # fmt: skip
    assert [step["step"] for step in manifest["steps"]] == [str(step) for step in said.steps]
    assert manifest["steps"][-1]["size_bytes"] == manifest["predicted"]["size_bytes"]
    linears = sum(isinstance(part, Linear) for part in spec.parts)
    assert len(layers) == (linears if "rtn" in recipe else 0)
    assert all(layer.keys() == {"name", "sparsity", "relative_error", "bits"} for layer in layers)
    assert replace(artifact, made=None) == read_artifact(artifact.folder)
    assert artifact.recipe == said
    assert (artifact.original, artifact.size_bytes) == (tiny_bert.resolve(), manifest["size_bytes"])


@pytest.mark.parametrize(
    ("recipe", "files"),
    [
        ("@ torch", {"model.safetensors"}), ("@ onnxruntime", {"model.onnx"}), ("quantize(dynamic) @ onnxruntime", {"model.onnx"}),
        ("quantize(static) @ onnxruntime", {"model.onnx"}),
        ("@ openvino", {"openvino_model.xml", "openvino_model.bin"}), ("quantize(static) @ openvino", {"openvino_model.xml", "openvino_model.bin"}),
    ],
)  # fmt: skip
def test_the_folder_holds_weights_side_files_the_manifest_and_what_it_is_handed_on_with_alone(recipe, files, made, tiny_bert):
    artifact, _ = made(tiny_bert, recipe)
    side = {name for name in SIDE_FILES if (tiny_bert / name).is_file()}
    found = {str(path.relative_to(artifact.folder)) for path in artifact.folder.rglob("*")}
    assert found == files | side | {MANIFEST, RUN, SCRIPT, CARD}
    for name in side - {"config.json"}:
        assert (artifact.folder / name).read_bytes() == (tiny_bert / name).read_bytes()
    assert artifact.folder.stat().st_mode & 0o777 == 0o755


def test_calibration_inputs_are_made_only_where_a_step_needs_them(tiny_bert, tmp_path):
    def none() -> Any:
        raise AssertionError("called")

    write_artifact(tiny_bert, parse_recipe("quantize(rtn) @ torch"), tmp_path / "out", calibration=none)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_static_quantization_without_calibration_is_refused(runtime, made, tiny_bert, tmp_path):
    exports = made(tiny_bert, "@ openvino")[0].folder.parent / "exports"
    with pytest.raises(RecipeError, match=r"^quantize\(static\) needs calibration text, and none was given\.$"):
        write_artifact(tiny_bert, parse_recipe(f"quantize(static) @ {runtime}"), tmp_path / "out", calibration=list, exports=exports)
    assert list(tmp_path.iterdir()) == []


# ---- what goes wrong ----


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES: dict[str, tuple[Exception | type[BaseException], type[BaseException]]] = {
    "a bug": (RuntimeError("some bug"), RuntimeError),
    "interrupted": (KeyboardInterrupt, KeyboardInterrupt),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), OutputError),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), OutputError),
    "full disk, wrapped": (RuntimeError("safetensors: I/O error: No space left on device (os error 28)"), OutputError),
    "another system error": (OSError(errno.EIO, "Input/output error"), OSError),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_whatever_fails_in_the_middle_leaves_nothing_behind(failure, exists, tiny_bert, tmp_path, monkeypatch):
    """Weights are written by then."""
    raised, expected = FAILURES[failure]

    def fail(source: Path, folder: Path, changed: Any = None) -> None:
        assert (folder / "model.safetensors").stat().st_size > 0
        raise raised

    monkeypatch.setattr("lighten.formats.safetensors_folder.copy_side_files", fail)
    out = tmp_path / "made" / "out"
    if exists:
        out.mkdir(parents=True)
    with pytest.raises(expected) as caught:
        write_artifact(tiny_bert, parse_recipe("cast(bfloat16)"), out, calibration=list)
    assert [path.name for path in out.parent.iterdir()] == (["out"] if exists else [])
    if expected is OutputError:
        assert str(caught.value).startswith(f"{out} cannot be written: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["os.open", "os.replace", "pathlib.Path.mkdir"])
def test_a_place_that_cannot_be_written_is_said(step, tiny_bert, tmp_path, monkeypatch):
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    out = tmp_path / "made" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(step, read_only)
        with pytest.raises(OutputError, match=rf"^{out} cannot be written: Read-only file system\.$"):
            write_artifact(tiny_bert, parse_recipe("cast(bfloat16)"), out, calibration=list)
    assert [path for path in tmp_path.rglob("*") if path.name != "made"] == []


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tiny_bert, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=rf"^{tmp_path} exists and is not empty; name a new folder, or remove it\.$"):
        write_artifact(tiny_bert, parse_recipe("@ torch"), tmp_path, calibration=list)
    with pytest.raises(OutputError, match=rf"^{tmp_path / 'mine.txt'} exists and is not empty; "):
        write_artifact(tiny_bert, parse_recipe("@ torch"), tmp_path / "mine.txt", calibration=list)
    with pytest.raises(OutputError, match=r"/mine.txt/out cannot be written: (Not a directory|File exists)\.$"):
        write_artifact(tiny_bert, parse_recipe("@ torch"), tmp_path / "mine.txt" / "out", calibration=list)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine.txt": "mine"}


def test_an_empty_folder_and_a_missing_parent_are_taken(tiny_bert, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert write_artifact(tiny_bert, parse_recipe("@ torch"), out, calibration=list).folder == out
        assert (out / MANIFEST).is_file()


@pytest.mark.parametrize(("recipe", "copies"), [("@ torch", 0), ("@ openvino", 2)])
def test_a_disk_that_is_too_small_is_said_before_any_work(recipe, copies, tiny_bert, tmp_path, monkeypatch):
    spec, said = read_spec(tiny_bert), parse_recipe(recipe)
    needed = artifact_bytes(said, apply_recipe(said, spec)) + copies * 4 * spec.total_parameters
    usage = shutil.disk_usage(tmp_path)._asdict()
    monkeypatch.setattr(artifact_module, "do_recipe", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), usage | {"free": needed - 1}))
    with pytest.raises(OutputError, match=rf"^{tmp_path} has .* free; writing this artifact takes .*\.$"):
        write_artifact(tiny_bert, said, tmp_path / "out", calibration=list)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"recipe": 4}', '{"recipe": "@ torch", "original": 5}', "\udcff"])
def test_a_manifest_that_cannot_be_read_is_said(content, tmp_path):
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=rf"^{tmp_path}: no readable lighten\.json \("):
        read_artifact(tmp_path)


def test_a_model_that_a_recipe_does_not_fit_leaves_nothing(tiny_llama, tmp_path):
    with pytest.raises(RecipeError, match="has a cache of its own"):
        write_artifact(tiny_llama, parse_recipe("quantize(kv) @ torch-compile"), tmp_path / "out", calibration=list)
    assert list(tmp_path.iterdir()) == []
    assert replace(read_spec(tiny_llama), name="").is_decoder
