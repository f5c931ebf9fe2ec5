"""Bad input, through the command line: one clear line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lighten import runtimes
from lighten.cli.main import main
from lighten.formats import artifact

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; gives its one line."""

    def run(*arguments: str | Path) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # a command line that the parser refuses
            code = int(stopped.code or 0)
        found = capsys.readouterr()
        lines = [line for line in found.err.splitlines() if not line.startswith("compressing ")]  # progress, not the mistake
        assert (code, found.out) == (2, "")
        assert len(lines) == 1, found.err
        assert lines[0].startswith("lighten")
        return lines[0]

    return run


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """A model folder of this test's own, to be spoilt."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (config | fields).items() if value is not ...}))


def header(length: int, content: bytes) -> bytes:
    return struct.pack("<Q", length) + content


# ---- the model ----


def test_no_such_path(refused, tmp_path):
    assert "no such folder" in refused("estimate", tmp_path / "nowhere")


def test_a_file_is_no_model_folder(refused, model):
    assert "is a file; a model is a folder" in refused("estimate", model / "config.json")


def test_a_folder_without_config(refused, model):
    (model / "config.json").unlink()
    assert "no config.json" in refused("estimate", model)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"], ids=["empty", "cut", "list", "binary", "deep", "null"])
def test_a_config_that_is_no_json_object(refused, model, content):
    (model / "config.json").write_bytes(content)
    assert "not JSON" in (line := refused("estimate", model)) or "not a JSON object" in line


@pytest.mark.parametrize("value", [..., 0, -3, "32", 2.5, True, None, [32]], ids=str)
def test_a_config_field_that_is_missing_or_no_positive_whole_number(refused, model, value):
    edit_config(model, hidden_size=value)
    assert "hidden_size" in refused("estimate", model)


@pytest.mark.parametrize("value", ["mamba", None, 7, ["bert"], {}], ids=str)
def test_a_family_without_a_formula_names_those_that_have_one(refused, model, value):
    edit_config(model, model_type=value)
    assert "supported: bert, llama" in refused("estimate", model)


@pytest.mark.parametrize("value", [..., [], [None], "BertModel", [["BertModel"]]], ids=str)
def test_a_config_that_names_no_architecture(refused, model, value):
    edit_config(model, architectures=value)
    assert "names no architecture" in refused("estimate", model)


def test_config_and_weights_that_contradict_each_other(refused, model):
    edit_config(model, intermediate_size=48)
    line = refused("estimate", model)
    assert "config and weights contradict each other" in line
    assert "intermediate.dense.weight" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no safetensors file"),
        (b"1234567", "no safetensors file"),
        (header(2**63, b"{}"), "its header claims"),
        (header(200_000_000, b"{}"), "its header claims"),
        (header(50, b"{}"), "its header claims"),
        (header(4, b"nope"), "cannot be read"),
        (header(2, b"[]"), "cannot be read"),
        (header(40, b'{"a":{"dtype":"F99","shape":[1]}}       '), "cannot be read"),
        (header(59, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}   '), "no whole number"),
        (header(59, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}     ') + b"1234", "does not fill"),
    ],
    ids=["empty", "short", "enormous", "oversized", "truncated", "no JSON", "list", "unknown type", "negative", "wrong size"],
)
def test_a_safetensors_header_that_is_broken(refused, model, content, says):
    (model / "model.safetensors").write_bytes(content)
    assert says in refused("estimate", model)


def test_weights_that_were_cut_off(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused("estimate", model)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", 7, None], ids=str)
def test_an_index_that_leads_outside(refused, model, place):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert "weight_map" in refused("estimate", model)


def test_a_pickle_is_refused_with_how_to_convert_it(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refused("estimate", model)
    assert "can run any code when read" in line
    assert "save_pretrained" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(refused, model, tmp_path, value):
    weights = load_file(model / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    weights[name] = weights[name].copy()
    weights[name][1, 2] = value
    save_file(weights, model / "model.safetensors")
    line = refused("compress", model, "--recipe", "quantize(rtn)", "-o", tmp_path / "out")
    assert f"tensor {name} holds 1 values that are not finite" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# ---- recipes, runtimes, workloads ----


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("quantize(magic)", "methods: rtn, dynamic, static"),
        ("squash(rtn)", "steps: cast, prune, quantize"),
        ("quantize(rtn, bits=5)", "bits is one of 8, 4, 3, 2"),
        ("quantize(rtn, bites=4)", "arguments: bits"),
        ("quantize(rtn) @ tpu", "runtimes: torch, torch-compile, onnxruntime, openvino"),
        ("quantize(rtn, bits=2) @ openvino", "runtime openvino cannot carry"),
        ("quantize(rtn, group_size=7)", "does not divide"),
        ("quantize(rtn", "not of the form"),
    ],
)
def test_a_recipe_that_cannot_be(refused, model, tmp_path, recipe, says):
    assert says in refused("compress", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_that_is_not_there(refused, model, tmp_path):
    assert "No such file" in refused("compress", model, "--recipe", tmp_path / "none.yaml", "-o", tmp_path / "out")


def test_an_unknown_runtime(refused, model):
    assert "invalid choice: 'tpu'" in refused("measure", model, "--runtime", "tpu")


@pytest.mark.parametrize(("runtime", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnx"), ("torch", "torch")])
def test_a_runtime_that_is_not_installed_names_its_extra(refused, model, tmp_path, monkeypatch, runtime, extra):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    line = refused("compress", model, "--recipe", f"@ {runtime}", "-o", tmp_path / "out")
    assert f"runtime {runtime} is not installed" in line
    assert f"pip install 'lighten[{extra}]'" in line


@pytest.mark.parametrize(
    "options",
    [
        ("--batch-size", "0"), ("--seq-len", "-1"), ("--seq-len", "100000"), ("--dtype", "fp7"), ("--phase", "prefill"), ("--new-tokens", "5"),
        ("--phase", "encode", "--recompute", "full"), ("--phase", "train", "--optimizer", "magic"), ("--device", "abacus"), ("--batch-size", "x"),
        ("--kv-dtype", "int8"), ("--nonsense",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_workload_that_cannot_be(refused, model, options):
    refused("estimate", model, *options)


# ---- texts and constraints ----


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"), ("a.txt", b" \n\n ", "holds no text"), ("a.txt", b"One passage.", "too short"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"), ("a.pdf", b"x", ".txt"),
    ],
    ids=["empty", "blank", "short", "binary", "pdf"],
)  # fmt: skip
def test_a_text_that_cannot_be_judged_by(refused, model, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    line = refused("choose", model, "--text", tmp_path / name, "-o", tmp_path / "out")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_not_there(refused, model, tmp_path):
    assert "none.txt" in refused("choose", model, "--text", tmp_path / "none.txt", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--require", "size<=50ms"), "units of"),
        (("--require", "latency<=3MB"), "units of"),
        (("--require", "size<=50"), "units of"),
        (("--require", "speed>=2"), "figures: "),
        (("--require", "perplexity<=1.05x"), "figures: "),
        (("--require", "size>=50MB"), "would ask for a worse size"),
        (("--require", "size"), "not of the form"),
        (("--minimize", "beauty"), "one of size, memory, latency"),
        (("--budget", "10"), "units of budget"),
        (("--budget", "0min"), "not positive"),
        (("--engine", "ray"), "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wish_that_cannot_be_understood(refused, model, tmp_path, options, says):
    assert says in refused("choose", model, *options, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the output folder ----


def test_an_output_folder_that_is_not_empty(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    for command in (("compress", model, "--recipe", "cast(float16)"), ("choose", model)):
        assert "not empty" in refused(*command, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_an_output_folder_below_a_file(refused, model, tmp_path):
    (tmp_path / "file").write_text("kept")
    for command in (("compress", model, "--recipe", "cast(float16)"), ("choose", model)):
        assert "cannot be written" in refused(*command, "-o", tmp_path / "file" / "out")


def test_a_read_only_output_folder(refused, model, tmp_path, monkeypatch):
    def read_only(*arguments: Any, **options: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(artifact.tempfile, "mkdtemp", read_only)
    assert "Read-only file system" in refused("compress", model, "--recipe", "cast(float16)", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_with_too_little_room(refused, model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert "has 10 B free" in refused("compress", model, "--recipe", "cast(float16)", "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up_while_it_is_written(refused, model, tmp_path, monkeypatch, error):
    def full(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(artifact, "write_folder", full)
    assert "o space left on device" in refused("compress", model, "--recipe", "cast(float16)", "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
