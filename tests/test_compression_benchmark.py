"""The pure parts of benchmarks/compression.py: bits counted from files, the evaluator, the layouts that peers' weights are read from, the rows.

Faults that were put in by hand, each of which a test here caught: scales left out of `bits`; constant zero points counted in `bits`; `unpack_gptq`
with codes from the high end of a byte; activations rounded with one scale for all tokens; a reference of another type taken from the cache; the
original's tokens judged one position off.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lighten.judge.quality import score_window
from lighten.recipe import parse_recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up, and the benchmark imports its evaluator by name
    spec.loader.exec_module(module)
    return module


job = load(BENCHMARKS / "peers" / "compress_job.py")
quality = load(BENCHMARKS / "compression_quality.py")
environments = load(BENCHMARKS / "environments.py")
bench = load(BENCHMARKS / "compression.py")
SCRIPTS = sorted(path for path in (BENCHMARKS / "peers").glob("compress_*.py") if path.stem != "compress_job")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# ---- bits ----


def test_bits_are_the_code_and_its_share_of_scale() -> None:
    """4-bit codes with a 16-bit scale for 64: 4.25, and what the shape's tensor adds is stored alone."""
    counted = job.tensor_bits([("codes", "I32", 1024 // 8), ("scale", "BF16", 16), ("other", "I64", 2)], 1024, 4)
    assert counted == {"bits": 4.25, "stored_bits": 4.25 + 128 / 1024}


def test_constant_zero_points_count_where_they_are_stored_alone() -> None:
    real, constant = (job.tensor_bits([("codes", "I32", 128), (kind, "I32", 2)], 1024, 4) for kind in ("zero", "constant"))
    assert (real["bits"], constant["bits"]) == (4.0625, 4.0)
    assert real["stored_bits"] == constant["stored_bits"] == 4.0625


def test_bits_of_an_artifact_come_from_its_file(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(8, 8, dtype=torch.int32), "a.weight_scale": torch.zeros(8, 1, dtype=torch.bfloat16),
        "b.qweight": torch.zeros(8, 8, dtype=torch.int32), "b.scales": torch.zeros(1, 8, dtype=torch.float16),
        "b.qzeros": torch.zeros(1, 1, dtype=torch.int32), "norm.weight": torch.zeros(64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    counted = job.counted_bits(tmp_path, {"a": 512, "b": 512}, code_bits=4, symmetric=True)
    assert counted["bits"] == 4 + 16 * 16 / 1024
    assert counted["stored_bits"] == 4 + (16 * 16 + 32) / 1024


def test_a_linear_that_was_not_quantized_is_no_silent_success(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight \(F32\) is no tensor of a quantized linear"):
        job.counted_bits(tmp_path, {"a": 64}, code_bits=4, symmetric=True)
    with pytest.raises(ValueError, match="1 of 1 linears have no codes, b for one"):
        job.counted_bits(tmp_path, {"b": 64}, code_bits=4, symmetric=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_format_is_read_as_autogptq_packs_it(bits: int) -> None:
    """The packing of AutoGPTQ's QuantLinear, written out: a 3-bit word ends in the middle of a code."""
    rows, columns, group = 3, 64, 16
    generator = np.random.default_rng(bits)
    codes = generator.integers(0, 2**bits, (rows, columns))
    packed = np.zeros((columns * bits // 32, rows), np.uint32)
    for row in range(rows):
        whole = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        packed[:, row] = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(len(packed))]
    scales = torch.rand(columns // group, rows)
    read = job.unpack_gptq({"qweight": torch.from_numpy(packed.view(np.int32)), "scales": scales}, bits)
    expected = (torch.from_numpy(codes) - 2 ** (bits - 1)) * scales.T.repeat_interleave(group, dim=1)
    torch.testing.assert_close(read, expected.float())


def test_linears_are_those_of_the_blocks(model: Path) -> None:
    linears = job.linears_of(str(model))
    assert len(linears) == 14
    assert linears["model.layers.0.mlp.up_proj"] == 16 * 32


def test_dense_weights_that_do_not_fit_the_original_are_refused(model: Path, tmp_path: Path) -> None:
    asked = job.Job(model=str(model), ids="", artifact="", dense=str(tmp_path / "dense"), report="", settings={})
    weights = load_file(model / "model.safetensors")
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"], "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    job.write_dense(asked, weights | extra)
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == weights.keys()
    with pytest.raises(ValueError, match=r"1 tensors differ from the original's in name or shape, model\.norm\.weight for some"):
        job.write_dense(asked, weights | {"model.norm.weight": torch.ones(3)})
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match="1 tensors differ"):
        job.write_dense(asked, weights)


def test_rotated_weights_are_scored_with_a_head_of_their_own(model: Path, tmp_path: Path) -> None:
    from lighten.formats.safetensors_folder import expanded_weights
    from lighten.model import read_spec
    from lighten.verbs import compress

    scaled = LlamaForCausalLM.from_pretrained(model)
    scaled.model.norm.weight.data.uniform_(0.5, 2)  # what is folded into the head and not into the table
    scaled.save_pretrained(model := tmp_path / "scaled")
    asked = job.Job(model=str(model), ids="", artifact=str(tmp_path / "artifact"), dense=str(tmp_path / "dense"), report="", settings={})
    compress(model, "rotate(hadamard)", Path(asked.artifact))
    job.write_dense(asked, dict(expanded_weights(Path(asked.artifact), read_spec(Path(asked.artifact)))))
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" in dense
    assert evaluator(model, tmp_path).scores(dense)["kl"].value == pytest.approx(0.0, abs=1e-6)


# ---- the evaluator ----


def evaluator(model: Path, cache: Path, dtype: torch.dtype = torch.float32) -> Any:
    windows = np.random.default_rng(1).integers(0, 50, (3, 12))
    return quality.Evaluator(model=model, windows=windows, dtype=dtype, cache=cache)


def test_the_original_is_its_own_equal(model: Path, tmp_path: Path) -> None:
    scores = evaluator(model, tmp_path).scores(load_file(model / "model.safetensors"))
    assert scores["perplexity_ratio"].value == pytest.approx(1.0, abs=1e-6)
    assert scores["kl"].value == pytest.approx(0.0, abs=1e-6)
    assert scores["top1_agreement"].value == 1.0


def test_perplexity_is_transformers_own_loss(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    asked = evaluator(model, tmp_path)
    module = LlamaForCausalLM.from_pretrained(model)
    module.load_state_dict(weights, strict=False)
    ids = torch.from_numpy(asked.windows)
    with torch.inference_mode():
        loss = float(module(input_ids=ids, labels=ids).loss)
    assert asked.scores(weights)["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)


def test_token_scores_are_the_judges() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(300, 40, generator=generator) * 3 for _ in range(2))
    targets = torch.randint(0, 40, (300,), generator=generator)
    ours = quality.token_scores(before, after, targets)[1]
    judged = score_window(after.numpy(), targets.numpy(), before.numpy())
    np.testing.assert_allclose(ours.log_likelihood, judged.log_likelihood, atol=1e-4)
    np.testing.assert_allclose(ours.kl, judged.kl, atol=1e-4)
    assert (ours.top1 == judged.top1).all()


def test_a_type_has_a_reference_of_its_own(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        assert evaluator(model, tmp_path, dtype).scores(weights)["kl"].value == pytest.approx(0.0, abs=1e-6)
    assert len(list(tmp_path.glob("reference-*.npy"))) == 2


def test_weights_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"the weights lack \['model.norm.weight'\]"):
        evaluator(model, tmp_path).scores(weights)


def test_activations_are_rounded_token_by_token() -> None:
    x = torch.tensor([[127.0, 1.4, -0.6], [1.27, 0.014, -1.27]])
    torch.testing.assert_close(quality.round_per_token(x), torch.tensor([[127.0, 1.0, -1.0], [1.27, 0.01, -1.27]]))


def test_rounded_inputs_are_seen_inside_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    x = torch.tensor([[127.0, 1.4, -0.6]])
    plain = module(x)
    with quality.round_inputs(module, frozenset({"0"})):
        torch.testing.assert_close(module(x), module[0](quality.round_per_token(x)))
        assert not torch.equal(module(x), plain)
    torch.testing.assert_close(module(x), plain)
    with (
        pytest.raises(ValueError, match="1 modules to round the inputs of are not in the model, 7 for one"),
        quality.round_inputs(module, frozenset({"7"})),
    ):
        pass


def test_a_width_is_told_by_the_values_in_a_group() -> None:
    torch.manual_seed(0)
    scale = torch.rand(4, 8, 1) + 0.5
    weight = (torch.randint(0, 4, (4, 8, 16)) * scale).reshape(4, 128)
    assert quality.most_values(weight, 16) == 4
    assert quality.most_values(weight, None) > 4


# ---- cases, rows, table, picture ----


def test_every_case_has_its_peers_file_with_requirements() -> None:
    for peer in {case.peer for case in (*bench.CASES, *bench.ENCODER_CASES)}:
        assert environments.requirements(bench.script_of(peer)), peer


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_peer_file_is_a_program_of_the_protocol(script: Path) -> None:
    """Each reads the job, times itself, writes what is scored and reports: by its syntax, for most need an environment to be imported."""
    called = {
        node.func.attr for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert {"read_job", "Meter", "quantizing", "saved", "report"} <= called
    assert {"write_dense", "write_embeddings"} & called


def test_asked_cases_name_each_row_once() -> None:
    arguments = bench.parse(["--tokens", "4096", "32768", "--peers", "hqq,llm-compressor"])
    asked = bench.asked_cases(arguments)
    names = [(case.peer, case.name, tokens) for case, tokens in asked]
    assert len(names) == len(set(names))
    assert {tokens for case, tokens in asked if case.peer == "hqq"} == {None}  # it reads no tokens: one row for both numbers
    assert any("tokens=32768" in case.name for case, _ in asked if case.peer == "ours")
    with pytest.raises(SystemExit, match="unknown peers nobody; known: llm-compressor"):
        bench.asked_cases(bench.parse(["--peers", "nobody"]))


@pytest.mark.parametrize("recipe", [*bench.RECIPES, *bench.ENCODER_RECIPES])
def test_our_recipes_are_recipes(recipe: str) -> None:
    """Each is read, and means the same when it is written again."""
    (case,) = bench.our_cases([recipe], 4096)
    said = parse_recipe(case.settings["recipe"])
    assert parse_recipe(str(said)) == said
    assert any(step.calibrated for step in said.steps) == case.calibrated or "distill" in recipe or "static" in recipe


def row(**figures: Any) -> Any:
    known = {
        "key": "k",
        "peer": "ours",
        "name": "recipe",
        "settings": {},
        "model": "m",
        "text": "t",
        "tokens_asked": None,
        "tokens": None,
        "test_windows": 20,
    }
    return bench.Row(**(known | figures))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [row(key="a", bits=4.25, ratio=1.1, perplexity=20.0, size_bytes=10**8), row(key="b", peer="hqq", failure="exit 1: no path for CPU")]
    bench.write_rows(tmp_path / "deeper" / "rows.json", rows)
    assert list(bench.read_rows(tmp_path / "deeper" / "rows.json").values()) == rows
    assert bench.read_rows(tmp_path / "none.json") == {}


def test_the_table_shows_failures_too() -> None:
    shown = bench.table([row(bits=4.25, ratio=1.1, perplexity=20.0, size_bytes=10**8), row(peer="hqq", failure="exit 1: no path for CPU")])
    assert "1.1000" in shown
    assert "failed: exit 1: no path for CPU" in shown


def test_classes_put_ours_beside_the_best_peer_of_the_same_bits_tokens_and_size() -> None:
    rows = [
        row(bits=4.25, tokens_asked=4096, ratio=1.1, size_bytes=7 * 10**7),
        row(peer="gptq", bits=4.3, tokens_asked=4096, ratio=1.4, size_bytes=10**8),
        row(peer="awq", bits=4.25, tokens_asked=4096, ratio=1.5, size_bytes=10**8), row(peer="rtn", bits=4.25, ratio=1.2, size_bytes=10**8),
        row(peer="gptq", bits=4.25, tokens_asked=32768, ratio=1.05, size_bytes=10**8), row(peer="small", bits=2.25, ratio=3.0, size_bytes=6 * 10**7),
        row(peer="broken", failure="no path"),
    ]  # fmt: skip
    found = bench.classes(rows)
    few = found["4.25 bits, 4096 tokens"]
    assert (few["ours"]["ratio"], few["best_peer"]["peer"]) == (1.1, "rtn")  # one that reads no tokens is in each class
    assert few["loss_share"] == pytest.approx(0.5)
    assert few["log_share"] == pytest.approx(math.log(1.1) / math.log(1.2))
    assert found["4.25 bits, 32768 tokens"]["ours"] is None
    assert found["4.25 bits, 32768 tokens"]["loss_share"] is None
    assert (found["at most 80 MB"]["ours"]["ratio"], found["at most 80 MB"]["best_peer"]["peer"]) == (1.1, "small")
    assert found["at most 60 MB"]["ours"] is None


def test_rows_of_two_texts_are_not_compared() -> None:
    said = {"bits": 4.25, "size_bytes": 10**8}
    rows = [row(ratio=1.1, text="a", **said), row(peer="gptq", ratio=1.4, text="b", **said), row(peer="hqq", ratio=1.5, text="a", **said)]
    found = bench.classes(rows)
    assert found["text a: 4.25 bits, None tokens"]["best_peer"]["peer"] == "hqq"
    assert found["text b: 4.25 bits, None tokens"]["ours"] is None
    drawn = bench.picture(rows)
    assert "gptq" not in drawn
    assert "hqq" in drawn


def test_the_picture_is_of_one_number_of_calibration_tokens() -> None:
    said = {"bits": 4.25, "size_bytes": 10**8}
    few = [row(peer="gptq", ratio=1.4, tokens_asked=4096, **said), row(ratio=1.2, tokens_asked=4096, **said), row(peer="hqq", ratio=1.5, **said)]
    drawn = bench.picture([*few, row(ratio=1.111, tokens_asked=32768, **said)])
    assert "1.1110" not in drawn
    assert all(shown in drawn for shown in ("1.4000", "1.2000", "1.5000"))


def test_speeds_compare_gptq_alone_at_the_same_work() -> None:
    known = {"bits": 4.25, "tokens": 4096, "threads": 2, "peak_above_imports_bytes": 5, "quiet": True}
    rows = [
        row(name="cast(bfloat16) | quantize(gptq, bits=4)", quantize_s=10.0, process_s=20.0, **known),
        row(name="quantize(gptq, bits=4) | distill(scales, steps=64)", quantize_s=99.0, process_s=99.0, **known),
        row(peer="llm-compressor", settings={"method": "gptq"}, quantize_s=40.0, process_s=50.0, **known),
        row(peer="llm-compressor", settings={"method": "gptq"}, quantize_s=80.0, process_s=90.0, **(known | {"tokens": 32768})),
    ]
    (found,) = bench.speeds(rows)
    assert (found["quantize_share"], found["process_share"]) == (0.25, 0.4)


def test_the_picture_has_a_point_for_each_row_with_a_size() -> None:
    drawn = bench.picture([row(ratio=1.1, size_bytes=10**8), row(peer="hqq", ratio=1.3, size_bytes=6 * 10**7), row(failure="none")])
    assert drawn.count("<circle") == 2
    beyond = bench.picture(
        [row(ratio=1.1, size_bytes=10**8, bits=4.25), row(ratio=1.2, size_bytes=10**8, bits=4.25), row(ratio=500.0, size_bytes=10**7)]
    )
    assert beyond.count("<circle") == 2  # the best of its peer, bits and size
    assert ">4.25 bits</text>" in beyond
    assert "(×500)" in beyond
    assert drawn.rstrip().endswith("</svg>")


def test_a_failures_line_is_its_error_not_a_progress_bar() -> None:
    log = "Traceback (most recent call last):\n  File x\nImportError: Requires mslk >= 1.0.0\nLoading:  50%|##  | 1/2 [00:01<00:01, 1.0it/s]\n"
    assert bench.last_line(log) == "ImportError: Requires mslk >= 1.0.0"
    assert bench.last_line("") == "no output"


def test_size_counts_weights_and_config_not_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"x" * 10)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    assert bench.weight_bytes(tmp_path) == 110


def test_published_rows_have_the_schema() -> None:
    """What lies in results/ can be read by this version, each row either failed or with figures that hang together."""
    file = BENCHMARKS / "results" / "compression.json"
    for measured in bench.read_rows(file).values():
        if measured.failure is not None:
            continue
        assert measured.peak_above_imports_bytes < measured.peak_rss_bytes
        if measured.perplexity is None:
            assert 0 <= measured.neighbours <= 1, measured.name
        else:
            assert measured.bits <= measured.stored_bits + 1e-9, measured.name
            assert measured.perplexity > 1
            assert measured.kl >= 0
    assert not file.exists() or json.loads(file.read_text()).keys() == {"rows"}
