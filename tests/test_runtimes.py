"""One contract, held by every runtime: same inputs, same outputs as torch gives on the same weights, and nothing done in silence."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny_models import bert_config, llama_config, save

from lighten.errors import RuntimeUnavailable, WorkloadError
from lighten.formats.artifact import write_artifact
from lighten.formats.torch_model import load_module
from lighten.judge.worker import device_peak_bytes
from lighten.model import read_spec
from lighten.recipe import parse_recipe
from lighten.recipe.targets import RUNTIMES
from lighten.runtimes import MODULES, Session, missing_packages, open_session, torch_compile, torch_eager
from lighten.runtimes.session import Setup

INSTALLED = [name for name in RUNTIMES if not missing_packages(name)]
ENCODERS = [f"@ {name}" for name in INSTALLED] + [
    "@ openvino(dtype=bfloat16)", "@ torch(dtype=bfloat16)", "quantize(dynamic, embeddings=true) @ onnxruntime", "quantize(static) @ openvino",
    "quantize(static) @ onnxruntime",
    "quantize(dynamic, embeddings=true) @ ctranslate2",
    "quantize(rtn, symmetric=true, embeddings=true, activations=dynamic, symmetric_activations=true) @ ctranslate2",
]  # fmt: skip
DECODERS = [f"@ {name}" for name in INSTALLED] + [
    "@ openvino(dtype=bfloat16)", "@ torch(dtype=bfloat16)", "@ torch-compile(dtype=bfloat16)",
    "quantize(rtn, bits=4, group_size=16, embeddings=true) @ onnxruntime",
    "quantize(rtn, symmetric=true, embeddings=true) @ openvino", "quantize(dynamic, embeddings=true) @ ctranslate2",
    *(["@ llama.cpp(dtype=float16)"] if "llama.cpp" in INSTALLED else []),
]  # fmt: skip
TOLERANCES = {"float32": 1e-4, "F32": 1e-3, "F32, attention in float16": 1e-2, "bfloat16": 0.05, "int8": 0.35}
"""Relative error of the output (Frobenius) by the precision that a session says; codes are compared with the weights that they stand for. F32 is
llama.cpp's, which looks GELU up in a table of float16."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("models")
    return {
        "bert": save(bert_config(num_hidden_layers=2), work / "bert"),
        "llama": save(llama_config(num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True), work / "llama"),
    }


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory) -> Callable[[str, str], tuple[Session, Any]]:
    """A session on a recipe's artifact, and the original's class with the weights that the artifact has."""
    work, known = tmp_path_factory.mktemp("artifacts"), {}

    def open_one(family: str, text: str) -> tuple[Session, Any]:
        if (family, text) not in known:
            source, recipe = models[family], parse_recipe(text)
            made = write_artifact(source, recipe, work / f"{len(known)}", calibration=calibration, exports=work / "exports")
            found = open_session(
                recipe.runtime, made.folder, read_spec(source), Setup(dtype=made.dtype, threads=1, activations=recipe.activations),
            )  # fmt: skip
            steps = recipe.steps_text if "rtn" in recipe.steps_text else ""
            same = write_artifact(source, parse_recipe(steps or "@ torch"), work / f"{len(known)}-torch", calibration=list).folder
            known[family, text] = found, load_module(same, read_spec(same), dtype="float32", attention="eager")
        return known[family, text]

    return open_one


def calibration() -> list[dict[str, np.ndarray]]:
    return [{"input_ids": tokens(1, 24, seed), "attention_mask": np.ones((1, 24), np.int64)} for seed in range(8)]


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 320, (batch, length))


def padded(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        mask[row, -row:] = 0
    return tokens(batch, length), mask


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def tolerance(session: Session) -> float:
    return TOLERANCES[session.precision.split(" with ")[0].split(",")[0]]


@pytest.mark.parametrize("recipe", ENCODERS)
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 17), (2, 128)])
def test_an_encoder_gives_what_torch_gives_whatever_batch_length_and_padding(recipe, batch, length, opened):
    if "compile" in recipe and batch == 1:
        pytest.skip("it compiles for each shape anew; two are enough")
    session, same = opened("bert", recipe)
    ids, mask = padded(batch, length)
    with torch.no_grad():
        expected = same(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    found = session.encode(ids, mask)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    kept = mask.astype(bool)
    assert error(found[kept], expected[kept]) < tolerance(session)


@pytest.mark.parametrize("recipe", [each for each in ENCODERS if "compile" not in each])
def test_padding_changes_nothing_of_the_tokens_beside_it(recipe, opened):
    session, _ = opened("bert", recipe)
    ids, mask = padded(2, 12)
    alone = session.encode(ids[1:, :11], mask[1:, :11])
    assert error(session.encode(ids, mask)[1:, :11], alone) < tolerance(session) / 2


@pytest.mark.parametrize("recipe", DECODERS)
def test_a_decoder_gives_torchs_logits_and_goes_on_with_what_is_likeliest(recipe, opened):
    """Batches of other sizes on one session: each prompt starts from an empty cache. A token must be among those that torch finds as likely."""
    session, same = opened("llama", recipe)
    for batch in (2, 1) if "compile" in recipe else (2, 3, 1):  # each is compiled anew
        ids = tokens(batch, 7, seed=batch)
        with torch.no_grad():
            expected = same(torch.from_numpy(ids)).logits.numpy()
        assert error(session.logits(ids), expected) < tolerance(session)
        made = session.generate(ids, 5)
        assert made.ids.shape == (batch, 5)
        assert min(made.first_s, made.rest_s) > 0
        whole = np.concatenate([ids, made.ids], 1)
        with torch.no_grad():
            after = same(torch.from_numpy(whole)).logits.numpy()[:, 6:-1]
        chosen = np.take_along_axis(after, made.ids[..., None], -1)[..., 0]
        assert (after.max(-1) - chosen).max() <= 2 * tolerance(session) * np.abs(after).max()


@pytest.mark.parametrize(("family", "recipe"), [*(("bert", each) for each in ENCODERS), *(("llama", each) for each in DECODERS)])
def test_no_sequences_give_none_and_what_cannot_be_is_said(family, recipe, opened, models):
    session, _ = opened(family, recipe)
    empty, most = np.zeros((0, 5), np.int64), read_spec(models[family]).max_positions
    if family == "bert":
        assert session.encode(empty, empty).shape[:2] == (0, 5)
        with pytest.raises(WorkloadError, match=rf"^{most + 1} tokens, and bert has {most} positions\.$"):
            session.encode(tokens(1, most + 1), np.ones((1, most + 1), np.int64))
        return
    assert session.logits(empty).shape[:2] == (0, 5)
    assert session.generate(empty, 3).ids.shape == (0, 3)
    with pytest.raises(WorkloadError, match=r"^a prompt without tokens cannot be gone on with\.$"):
        session.generate(np.zeros((1, 0), np.int64), 3)
    with pytest.raises(WorkloadError, match=rf"^{most + 1} tokens, and llama has {most} positions\.$"):
        session.generate(tokens(1, most), 1)
    assert session.generate(tokens(1, most - 1), 1).ids.shape == (1, 1)


@pytest.mark.parametrize("recipe", [each for each in ENCODERS if "compile" not in each])
def test_an_encoder_takes_as_many_tokens_as_it_has_positions(recipe, opened, models):
    session, same = opened("bert", recipe)
    ids = tokens(1, read_spec(models["bert"]).max_positions)
    with torch.no_grad():
        expected = same(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    assert error(session.encode(ids, np.ones_like(ids)), expected) < tolerance(session)


@pytest.mark.parametrize("recipe", DECODERS)
def test_a_row_of_a_batch_is_what_it_is_alone(recipe, opened):
    """And a prompt after another is not told of it."""
    session, _ = opened("llama", recipe)
    ids = tokens(2, 9, seed=4)
    assert error(session.logits(ids)[1:], session.logits(ids[1:])) < tolerance(session) / 2
    first = session.generate(ids, 4).ids
    session.generate(tokens(2, 9, seed=5), 4)
    assert np.array_equal(session.generate(ids, 4).ids, first)


@pytest.mark.parametrize(("family", "recipe", "precision"), [
    ("bert", "@ torch", "float32"), ("bert", "@ torch(dtype=bfloat16)", "bfloat16"), ("bert", "@ onnxruntime", "float32"),
    ("bert", "quantize(dynamic, embeddings=true) @ onnxruntime", "int8"), ("bert", "@ openvino", "float32"),
    ("bert", "quantize(static) @ openvino", "int8"), ("bert", "quantize(static) @ onnxruntime", "int8"), ("bert", "@ ctranslate2", "float32"),
    ("bert", "quantize(dynamic, embeddings=true) @ ctranslate2", "int8"),
    ("llama", "quantize(rtn, bits=4, group_size=16, embeddings=true) @ onnxruntime", "float32 with 4-bit weights"),
    ("llama", "@ torch-compile", "float32"), ("bert", "quantize(rtn) @ torch", "float32"),
    ("llama", "quantize(dynamic, embeddings=true) @ ctranslate2", "int8"),
])  # fmt: skip
def test_precision_and_version_are_read_back(family, recipe, precision, opened):
    session, _ = opened(family, recipe)
    assert session.precision == precision
    assert MODULES[parse_recipe(recipe).runtime].version()[0].isdigit()


def test_bfloat16_without_instructions_for_it_is_not_called_bfloat16(models, monkeypatch):
    """Nor is it refused: it is right, and slow."""
    session = open_session("torch", models["bert"], read_spec(models["bert"]), Setup(dtype="bfloat16", threads=1))
    for able, said in ((True, "bfloat16"), (False, "bfloat16, emulated")):
        monkeypatch.setattr(torch_eager, "multiplies_bfloat16", lambda able=able: able)
        assert session.precision == said


def test_a_compiled_decoder_goes_on_where_its_cache_ends(models):
    """The cache has room for a multiple of 128 positions; a step beyond gives what eager torch gives, to the last digits of float32."""
    folder, spec = models["llama"], read_spec(models["llama"])
    eager, compiled = (MODULES[name].load(folder, spec, Setup(dtype="float32", threads=1)) for name in ("torch", "torch-compile"))
    ids = tokens(1, torch_compile.ROOM - 2, seed=7)
    assert error(compiled.prefill(ids), eager.prefill(ids)) < 1e-5
    for token in range(5):
        one = np.array([[20 + token]])
        assert error(compiled.decode(one), eager.decode(one)) < 1e-5


def test_a_compiled_decoder_compiles_one_block_and_the_head(models):
    """However many blocks there are: their code is the same."""
    folder, spec = models["llama"], read_spec(models["llama"])
    session = open_session("torch-compile", folder, spec, Setup(dtype="float32", threads=1))
    torch._dynamo.utils.counters.clear()
    session.generate(tokens(4, 6), 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_torch_compile_does_not_decode_is_said(models, tmp_path):
    config = json.loads((models["llama"] / "config.json").read_text())
    spec = replace(read_spec(models["llama"]), family="mistral")
    with pytest.raises(RuntimeUnavailable, match=r"is a mistral; runtime torch-compile runs decoders of llama\.$"):
        open_session("torch-compile", models["llama"], spec, Setup(dtype="float32", threads=1))
    coded = write_artifact(models["llama"], parse_recipe("quantize(kv, bits=8)"), tmp_path / "coded", calibration=list).folder
    assert json.loads((coded / "config.json").read_text()) != config
    with pytest.raises(RuntimeUnavailable, match=r"has a quantized cache, which runtime torch runs; torch-compile keeps floats\.$"):
        open_session("torch-compile", coded, read_spec(coded), Setup(dtype="float32", threads=1))


@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
def test_a_device_that_is_not_there_is_said(runtime, models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match=r"^device=cuda: torch \S+ finds no CUDA device; leave device out to run on the CPU\.$"):
        open_session(runtime, models["bert"], read_spec(models["bert"]), Setup(dtype="float32", threads=1, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cuda_device_gives_what_the_cpu_gives(runtime, family, dtype, models):
    folder, spec = models[family], read_spec(models[family])
    cpu = open_session("torch", folder, spec, Setup(dtype="float32", threads=1))
    found = open_session(runtime, folder, spec, Setup(dtype=dtype, threads=1, device="cuda"))
    assert found.precision == dtype
    allowed = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}[dtype]
    ids, mask = padded(2, 17)
    if family == "bert":
        assert error(found.encode(ids, mask)[mask > 0], cpu.encode(ids, mask)[mask > 0]) < allowed
    else:
        assert error(found.logits(ids), cpu.logits(ids)) < allowed
        made = found.generate(ids, 6).ids
        after = cpu.logits(np.concatenate([ids, made], 1))[:, 16:-1]
        chosen = np.take_along_axis(after, made[..., None], -1)[..., 0]
        assert (after.max(-1) - chosen).max() <= 2 * allowed * np.abs(after).max()
    assert device_peak_bytes() > 2 * spec.total_parameters


@pytest.mark.parametrize("runtime", INSTALLED)
def test_a_folder_of_another_runtime_is_refused_in_one_line(runtime, tmp_path, models):
    if RUNTIMES[runtime].exported:
        with pytest.raises(RuntimeUnavailable, match=rf"^{tmp_path} holds no .*; compress the model @ {runtime}\.$"):
            open_session(runtime, tmp_path, read_spec(models["bert"]), Setup(dtype="float32", threads=1))


USED = """
import json, sys, time
import numpy as np
from pathlib import Path
from lighten.model import read_spec
from lighten.runtimes import open_session
from lighten.runtimes.session import Setup
runtime, folder, source = sys.argv[1:]
session = open_session(runtime, Path(folder), read_spec(Path(source)), Setup(dtype="float32", threads=1))
ids = np.random.default_rng(0).integers(5, 320, (64, 128))
mask = np.ones_like(ids)
session.encode(ids, mask)
wall, cpu = time.perf_counter(), time.process_time()
while time.perf_counter() - wall < 1:
    session.encode(ids, mask)
print(json.dumps((time.process_time() - cpu) / (time.perf_counter() - wall)))
"""


EAGER = [name for name in INSTALLED if name != "torch-compile"]
"""torch-compile has torch's threads and memory, and takes half a minute to say so."""


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that takes a moment to compute, and a place for its artifacts."""
    work = tmp_path_factory.mktemp("wider")
    return save(bert_config(num_hidden_layers=2, hidden_size=128, intermediate_size=512), work / "model"), work


def artifact(wider: tuple[Path, Path], runtime: str) -> Path:
    source, work = wider
    if not (work / runtime).exists():
        write_artifact(source, parse_recipe(f"@ {runtime}"), work / runtime, calibration=list, exports=work / "exports")
    return work / runtime


@pytest.mark.parametrize("runtime", EAGER)
def test_one_thread_is_one_thread(runtime, wider):
    """CPU seconds of the process over the clock's."""
    command = [sys.executable, "-c", USED, runtime, str(artifact(wider, runtime)), str(wider[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) < 1.2


@pytest.mark.parametrize("runtime", EAGER)
def test_what_is_unloaded_is_gone(runtime, wider):
    """Twelve sessions one after the other hold no more memory than a few of them would, and leave no threads of their own; those of other tests may
    start meanwhile."""
    folder, spec, ids = artifact(wider, runtime), read_spec(wider[0]), tokens(2, 16)
    threads, held = set(threading.enumerate()), []
    for _ in range(12):
        session = open_session(runtime, folder, spec, Setup(dtype="float32", threads=1))
        session.encode(ids, np.ones_like(ids))
        del session
        gc.collect()
        held.append(psutil.Process().memory_info().rss)
    assert held[-1] - held[2] < 4 * 4 * spec.total_parameters
    assert len(set(threading.enumerate()) - threads) < 12
