"""Bad input, through the command line: one clear line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import bert_config, save

import lighten.device
from lighten import runtimes, verbs
from lighten.cli.main import main
from lighten.device import Bandwidth, Machine, Profile
from lighten.errors import LightenError, ModelError
from lighten.formats import artifact
from lighten.formats.artifact import write_artifact
from lighten.judge.latency import Latency
from lighten.judge.measure import Judge, Measurement
from lighten.model.safetensors_header import read_header
from lighten.recipe import parse_recipe

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
    assert "is a file; a model is a folder" in refused("estimate", model / "tokenizer.json")


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
def test_a_family_that_is_none_is_refused_by_formula_and_by_following(refused, model, value):
    edit_config(model, model_type=value)
    assert "has no formula" in refused("estimate", model, "--method", "formula")
    followed = "contradict each other" if value == "mamba" else "is not known to transformers"
    assert followed in refused("estimate", model)


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
        ("quantize(magic)", "methods: rtn, hqq, gptq, awq, smoothquant, auto, kv, dynamic, static"),
        ("squash(rtn)", "steps: cast, distill, factorize, prune, quantize, rotate, shrink"),
        ("quantize(rtn, bits=5)", "bits is one of 8, 6, 4, 3, 2"),
        ("quantize(rtn, bites=4)", "arguments: bits"),
        ("quantize(rtn) @ tpu", "runtimes: torch, torch-compile, onnxruntime, openvino"),
        ("quantize(rtn, bits=2) @ openvino", "runtime openvino cannot carry"),
        ("quantize(rtn, group_size=0)", "group_size is a number of columns, channel or tensor"),
        ("quantize(rtn", "not of the form"),
    ],
)
def test_a_recipe_that_cannot_be(refused, model, tmp_path, recipe, says):
    assert says in refused("compress", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_that_is_not_there(refused, model, tmp_path):
    assert "No such file" in refused("compress", model, "--recipe", tmp_path / "none.yaml", "-o", tmp_path / "out")


def test_an_unknown_runtime(refused, model):
    assert "runtime 'tpu' does not exist; runtimes: torch," in refused("measure", model, "--runtime", "tpu")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--runtime", "torch(batching=sorted)"), "batching=sorted has no effect where all texts have one length; measure with --lengths text."),
        (("--runtime", "torch(batching=any)", "--lengths", "text"), "batching='any' is not possible; batching is one of padded, sorted, bucketed."),
        (("--runtime", "torch(speculate=prompt-lookup)"), "speculate=prompt-lookup is of decoders; model is none."),
        (("--runtime", "torch(draft_tokens=2)"), "draft_tokens=2 has no effect without speculate."),
        (("--lengths", "long"), "argument --lengths: invalid choice: 'long'"),
    ],
)
def test_options_of_a_runtime_that_cannot_be(refused, model, asked, says):
    assert says in refused("measure", model, *asked)


def test_lengths_of_prompts(refused, tiny_llama, tmp_path):
    said = "--lengths text has no effect in phase prefill: a batch of prompts has one length; it has one in: encode."
    assert said in refused("measure", tiny_llama, "--lengths", "text")
    assert said in refused("choose", tiny_llama, "--lengths", "text", "-o", tmp_path / "out")


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
        (("--engine", "spark"), "invalid choice"),
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

    monkeypatch.setattr(artifact.os, "replace", read_only)
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


@pytest.mark.parametrize("error", [OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), OSError(errno.EIO, "Input/output error", "aaa")])
def test_what_the_system_refuses_of_a_file_is_said(refused, model, monkeypatch, error):
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(verbs, "estimate", broken)
    assert refused("estimate", model) == f"lighten: aaa: {error.strerror}"


# ---- hostile files ----


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "\0", "a\nb", "-", "..", "https://example.org/x", ""])
def test_a_name_that_can_be_no_model(refused, name):
    assert "Traceback" not in refused("estimate", f"--json={name}" if name == "-" else name)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, "overlap or leave a hole at byte 4"),
        ({"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [8, 12])}, "overlap or leave a hole at byte 4"),
        ({"a": ("F32", [1], [8, 12])}, "overlap or leave a hole at byte 0"),
        ({"a": ("F32", [True, 2], [0, 8])}, "no whole number"),
        ({"a": ("F32", [1.0, 2], [0, 8])}, "no whole number"),
        ({"a": ("F32", ["2"], [0, 8])}, "no whole number"),
        ({"a": ("F32", [10**200, 10**200], [0, 8])}, "does not fill"),
        ({"a": ("F32", [2], [0, 10**30])}, "does not fill"),
        ({"a": ("F32", [2], [8, 0])}, "does not fill"),
        ({"a": ("F32", [2], [0, 4, 8])}, "cannot be read"),
        ({"a": ("F32", 2, [0, 8])}, "cannot be read"),
        ({"a": (["F32"], [2], [0, 8])}, "cannot be read"),
    ],
)
def test_a_header_that_lies_about_its_tensors(refused, model, tensors, says):
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets} for name, (dtype, shape, offsets) in tensors.items()}
    raw = json.dumps(entries).encode()
    (model / "model.safetensors").write_bytes(header(len(raw), raw + bytes(12)))
    assert says in refused("estimate", model)


@pytest.mark.parametrize("raw", [b"[" * 50_000, b'{"a":' * 50_000, b'{"a": 1' + b"0" * 5000 + b"}", b"\xff" * 64, b'{"__metadata__": 5}'])
def test_a_header_that_is_no_table_of_tensors(refused, model, raw):
    (model / "model.safetensors").write_bytes(header(len(raw), raw))
    assert re.search(r"cannot be read|contradict each other|no tensor", refused("estimate", model))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=3))
def test_what_this_reader_takes_of_a_spoilt_file_safetensors_own_reader_takes_too(edits, tmp_path):
    """Any bytes of the header changed: it is read or refused, and never read where the format's own library refuses."""
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int8), "c": np.zeros((), np.float16)}, path)
    content = bytearray(path.read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        found = {tensor.name: tensor.shape for tensor in read_header(path)}
    except ModelError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
        return
    try:
        with safe_open(path, framework="np") as opened:
            assert found == {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        pytest.fail(f"read as {found}, refused by safetensors: {error}")


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 3, 10**30, 1.5, 1e308, float("inf"), float("nan"), "", "2", [], [1], [["x"]], {}, {"0": "a"},
]  # fmt: skip
SCHEME = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
SCHEMES: list[Any] = [
    5, None, [], {}, *({"targets": targets, "weights": SCHEME} for targets in (5, None, "Linear", ["re:("], [5], [[1]], ["Linear"])),
    *({"targets": ["Linear"], "weights": weights} for weights in (5, None, {}, SCHEME | {"num_bits": float("inf")}, SCHEME | {"num_bits": 0},
      SCHEME | {"num_bits": 64}, SCHEME | {"num_bits": "8"}, SCHEME | {"strategy": [1]}, SCHEME | {"strategy": "group", "group_size": "x"},
      SCHEME | {"strategy": "group", "group_size": -3}, SCHEME | {"strategy": "group"})),
]  # fmt: skip
QUANTIZED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
OPTIONAL = ("num_labels", "id2label", "head_dim", "num_key_value_heads", "attention_bias", "hidden_dropout_prob", "attention_dropout", "hidden_act")


@pytest.mark.parametrize("model_name", ["tiny_bert", "tiny_llama", "tiny_llama_untied", "classifier"])
def test_no_config_field_whatever_its_value_ends_in_a_traceback(model_name, request, tmp_path):
    """Each field in turn: the model is estimated all the same, or refused in words."""
    if model_name == "classifier":
        folder = save(bert_config("BertForSequenceClassification"), tmp_path / "model")
    else:
        folder = shutil.copytree(request.getfixturevalue(model_name), tmp_path / "model")
    config, refusals = json.loads((folder / "config.json").read_text()), 0
    groups = [{"quantization_config": QUANTIZED | {"config_groups": {"g": scheme}}} for scheme in SCHEMES]
    fields = [{name: value} for name in sorted({*config, *OPTIONAL, "quantization_config"}) for value in HOSTILE]
    for change in [*fields, *groups, {"quantization_config": QUANTIZED | {"config_groups": [1]}}]:
        (folder / "config.json").write_text(json.dumps(config | change))
        try:
            json.dumps(verbs.estimate(folder, phase="train").as_json(), allow_nan=False)
        except LightenError:
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 10000"),
        ({"head_dim": 8.0}, "head_dim=8.0 is not a positive whole number"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2 is not a positive whole number"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True is not a positive whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings='512' is not a positive whole number"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5 is not a number from 0 to 1"),
        ({"hidden_act": ["silu"]}, "is not known; known: gelu"),
        ({"vocab_size": 0, "hidden_size": "32"}, "found: vocab_size=0, hidden_size='32'"),
        ({"quantization_config": True}, "its quantization_config is not a table"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "its quantization_config cannot be read (ValueError: bits=None is not a whole number)",
        ),
        ({"quantization_config": QUANTIZED | {"config_groups": {"g": SCHEMES[7]}}}, "its quantization_config cannot be read (error: missing )"),
    ],
    ids=str,
)
def test_a_config_field_is_named_with_what_it_should_be(refused, tiny_llama, tmp_path, fields, says):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    edit_config(folder, **fields)
    assert says in refused("estimate", folder)


@pytest.mark.parametrize(
    "content", ['{"weight_map": 5}', "[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": "\\ud800"}}']
)
def test_an_index_that_is_no_table(refused, model, content):
    (model / "model.safetensors.index.json").write_text(content)
    assert re.search(r"not a table|not a JSON object|not JSON|is missing|are missing|contradict", refused("estimate", model))


# ---- what each command refuses before it works ----


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5"])
@pytest.mark.parametrize("command", ["measure", "choose", "probe"])
def test_threads_that_are_none(refused, command, threads, tmp_path):
    arguments = {"measure": ["m"], "choose": ["m", "-o", tmp_path / "out"], "probe": []}[command]
    assert f"{threads!r} is not a positive whole number" in refused(command, *arguments, f"--threads={threads}")


@pytest.mark.parametrize("options", [("--new-tokens=-1",), ("--phase=encode", "--new-tokens=-3")])
def test_tokens_that_are_less_than_none(refused, model, options):
    assert "new_tokens=" in refused("estimate", model, *options)


@pytest.mark.parametrize(("content", "says"), [(b"", "holds no text"), (b"One passage.", "too short"), (None, "cannot be read")])
def test_a_calibration_text_that_cannot_be_used_is_said_before_any_work(refused, model, tmp_path, content, says):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    line = refused("compress", model, "--recipe", "quantize(static) @ openvino", "--text", tmp_path / "a.txt", "-o", tmp_path / "out")
    assert says in line
    assert says in refused("measure", model, "--text", tmp_path / "a.txt")
    assert not (tmp_path / "out").exists()


def test_a_text_that_no_step_looks_at(refused, model, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"Passage number {number}." for number in range(20)))
    line = refused("compress", model, "--recipe", "quantize(rtn)", "--text", tmp_path / "a.txt", "-o", tmp_path / "out")
    assert "has no effect: no step of quantize(rtn) @ torch looks at calibration text" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "nowhere: no such folder; this command needs the model's weights"),
        (("on-cuda",), f"device=cuda: torch {torch.__version__} finds no CUDA device; leave device out to run on the CPU."),
        (("llama", "--phase", "encode"), "phase encode needs an encoder"),
        (("bert", "--phase", "generate"), "phase generate needs a decoder"),
        (("bert", "--seq-len", "1000"), "1000 positions asked for"),
        (("made", "--runtime", "openvino"), "is an artifact for runtime torch; it does not run on openvino"),
        (
            ("bert", "--runtime", "torch-compile", "--profile"),
            "runtime torch-compile does not tell what its operators take: its kernels join operators of several kinds; "
            "these do: torch, onnxruntime, openvino.",
        ),
        (("bert", "--profile", "--lengths", "text"), "what operators take is told of one batch of one length; leave --lengths text out."),
        (
            ("llama", "--profile", "--phase", "decode", "--runtime", "torch(speculate=prompt-lookup)"),
            "what operators take is told of plain decoding; leave speculate out.",
        ),
        (("orphan",), "which is not there any more; quality is measured against it"),
        (("torn",), "no readable lighten.json"),
        (("bare",), "no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_measured(refused, arguments, says, tiny_bert, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "measure", lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "llama").symlink_to(tiny_llama)
    (tmp_path / "bert").symlink_to(tiny_bert)
    for name in ("torn", "bare"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "lighten.json").write_text("{")
    write_artifact(tiny_bert, parse_recipe("cast(bfloat16)"), tmp_path / "made", calibration=list)
    write_artifact(tiny_bert, parse_recipe("@ torch(device=cuda, dtype=float16)"), tmp_path / "on-cuda", calibration=list)
    manifest = json.loads((tmp_path / "made" / "lighten.json").read_text())
    shutil.copytree(tmp_path / "made", tmp_path / "orphan")
    (tmp_path / "orphan" / "lighten.json").write_text(json.dumps(manifest | {"original": str(tmp_path / "gone")}))
    assert says in refused("measure", tmp_path / arguments[0], *arguments[1:])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_not_measured(refused, model, monkeypatch, value):
    monkeypatch.setattr(Judge, "measure", lambda *_: pytest.fail("it was run"))
    weights = load_file(model / "model.safetensors")
    weights["pooler.dense.bias"] = np.full_like(weights["pooler.dense.bias"], value)
    save_file(weights, model / "model.safetensors")
    assert "tensor pooler.dense.bias holds 32 values that are not finite (NaN or infinite)." in refused("measure", model)


@pytest.mark.parametrize("name", ["", "pytorch_model.bin"])
@pytest.mark.parametrize("command", ["compress", "measure"])
def test_commands_that_need_weights_refuse_a_folder_without_them(refused, model, tmp_path, command, name):
    (model / "model.safetensors").unlink()
    if name:
        (model / name).write_bytes(b"\x80")
    more = ("--recipe", "quantize(rtn)", "-o", tmp_path / "out") if command == "compress" else ()
    assert ("is a pickle" if name else "no *.safetensors") in refused(command, model, *more)


def test_a_profile_that_could_not_be_kept_is_said_before_minutes_of_measuring(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("LIGHTEN_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(lighten.device, "probe", lambda **_: pytest.fail("it was measured"))
    assert "cannot be written" in (line := refused("probe"))
    assert "LIGHTEN_HOME names another folder" in line


def test_an_engine_that_does_not_exist(refused):
    assert "invalid choice: 'abacus/int8'" in refused("probe", "--engine", "abacus/int8")


# ---- what is accepted says one thing ----

ROW = {"working_set_bytes": 1 << 20, "read_bytes_per_s": 1e10, "copy_bytes_per_s": 5e9}
FOUND = Measurement(
    size_bytes=10, peak_memory_bytes=None, latency=Latency(samples=(1.0, 2.0), speedup=1.0, baseline_s=1.5), throughput=1.0, precision="float32",
    runtime_version="1", cold_start_s=0.1, quality={},
)  # fmt: skip


@pytest.mark.parametrize("command", ["estimate", "compress", "measure", "probe"])
def test_json_is_one_document_on_stdout_and_nothing_else(command, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Judge, "measure", lambda *_: FOUND)
    profile = Profile(machine=Machine(cpu="", cores=1, memory_bytes=None, os=""), threads=1, bandwidth=(Bandwidth(**ROW),), engines={})
    monkeypatch.setattr(lighten.device, "probe", lambda **_: dataclasses.replace(profile))
    arguments = {"compress": [model, "--recipe", "quantize(rtn)", "-o", tmp_path / "out"], "probe": []}.get(command, [model])
    assert main([command, *map(str, arguments), "--json"]) == 0
    found = capsys.readouterr()
    assert isinstance(json.loads(found.out), dict)
    assert command != "estimate" or found.err == ""


def test_estimating_imports_neither_torch_nor_a_runtime(model):
    """With a recipe and every output, in a fresh Python."""
    heavy = ("torch", "transformers", "safetensors", "tokenizers", "onnx", "onnxruntime", "openvino", "nncf", "psutil", "scipy")
    recipe = "prune(magnitude, sparsity=0.5) | quantize(rtn, bits=4, group_size=16) @ openvino(dtype=bfloat16)"
    program = (
        "import sys; from lighten.cli.main import main\n"
        f"for more in ([], ['--json'], ['--recipe', {recipe!r}]): assert main(['estimate', {str(model)!r}, *more]) == 0\n"
        f"print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
