"""The grader of published rows: strange rows are counted and never stop it, files that are no tables are one line, and what its columns mean."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import fit_inference
import published
import published_inference as inference
from published_rows import NotGradable, Row

ROW: dict[str, str] = {
    "id": "1",
    "model": "Llama-3-8B",
    "params_total": "8030261248",
    "layers": "32",
    "hidden": "4096",
    "heads": "32",
    "kv_heads": "8",
    "head_dim": "128",
    "ffn": "14336",
    "vocab": "128256",
    "hardware": "RTX4090-24GB",
    "device_mem_gb": "",
    "device_mem_bw_gbs": "1008",
    "n_devices": "1",
    "tp": "1",
    "pp": "1",
    "framework": "llama.cpp May-2024",
    "weight_format": "F16",
    "weight_bits": "16",
    "kv_dtype": "f16",
    "batch_or_concurrency": "1",
    "batch_kind": "single stream",
    "input_len": "512",
    "output_len": "512",
    "metric": "pp L / tg L",
    "prefill_tok_s": "9382",
    "decode_tok_s": "54.84",
    "total_output_tok_s": "",
    "latency_ms": "",
    "ttft_ms": "",
    "tpot_ms": "",
    "model_file_gib": "",
    "source_repo_or_doc": "someone",
    "note": "",
}


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    sys.argv = ["published.py", *arguments]
    code = published.main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_last_line_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "--rows", str(written(tmp_path / "rows.csv", [ROW, ROW | {"id": "2", "framework": "never heard of", "prefill_tok_s": ""}]))
    )
    figures = json.loads(out.splitlines()[-1])
    assert code == 0
    assert figures["decode"]["n"] == 2
    assert figures["prefill"]["n"] == 1
    assert figures["prefill"]["median_error"] < 1
    assert figures["serving"] == {"median_error": None, "p90_error": None, "n": 0}
    assert figures["fits"] == {"accuracy": 1.0, "n": 2}
    assert 0 <= figures["all"]["range_coverage"] <= 1


STRANGE = [
    {"layers": "many"},
    {"hidden": "-1"},
    {"hidden": "1e999"},
    {"weight_bits": "nan"},
    {"weight_bits": ""},
    {"hardware": "abacus", "device_mem_bw_gbs": ""},
    {"decode_tok_s": "fast", "prefill_tok_s": ""},
    {"decode_tok_s": "", "prefill_tok_s": ""},
    {"n_devices": "0"},
    {"tp": "3", "n_devices": "3"},
    {"batch_or_concurrency": "1e9"},
    {"input_len": "99999999999"},
    {"model": "", "layers": "", "hidden": "", "params_total": ""},
    {"output_len": "1.5"},
    {"weight_bits": "0.0001"},
    {"heads": "7"},
    {"device_mem_bw_gbs": "0"},
    {"hardware": "\x00\ufffd"},
    {"kv_heads": "999"},
]


def test_strange_rows_never_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROW | change | {"id": str(number)} for number, change in enumerate(STRANGE)]
    code, out, _ = run(capsys, "--rows", str(written(tmp_path / "rows.csv", [*rows, ROW])))
    assert code == 0
    assert "not gradable" in out
    assert json.loads(out.splitlines()[-1])["decode"]["n"] >= 1


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no column id"), (b"a,b\n1,2\n", "no column id"), (b"\xff\xfe\x00", ""), (b"id,model,hardware\n1,x,y\n", "no rows with a column of"),
     (b"id,model,hardware,decode_tok_s\n", "no rows with a column of")],
)  # fmt: skip
def test_files_that_are_no_tables_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    code, _, error = run(capsys, "--rows", str(path))
    assert code == 2
    assert len(error.splitlines()) == 1
    assert says in error


def test_a_file_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "--rows", "no-such-file.csv")
    assert code == 2
    assert len(error.splitlines()) == 1


# ---- what columns mean ----


@pytest.mark.parametrize(("name", "expected"), [
    ("llama.cpp CUDA 2025", "ggml"), ("ollama", "ggml"), ("vLLM 0.6.3", "engine"), ("TensorRT-LLM 0.17", "engine"),
    ("Transformers NeuronX", "engine"),
    ("HF", "eager"), ("transformers (pytorch)", "eager"), ("ExLlamaV2", "local"), ("mlx-lm", "local"),
])  # fmt: skip
def test_the_kind_of_software(name: str, expected: str) -> None:
    stack, unsaid = inference.stack_of_row({"framework": name})
    assert (stack.name, unsaid) == (expected, ())


def test_software_that_nobody_knows_is_said_to_be_unsaid() -> None:
    assert inference.stack_of_row({"framework": "never heard of"})[1] == ("software",)


def test_what_a_row_leaves_out_widens_its_range() -> None:
    known, unknown = inference.grade_inference([ROW, ROW | {"input_len": "", "output_len": "", "metric": "tokens a second"}])[:6:3]
    assert known.kind == unknown.kind == "decode"
    assert known.high is not None
    assert known.low is not None
    assert unknown.high is not None
    assert unknown.low is not None
    assert unknown.high / unknown.low > known.high / known.low


def test_parts_of_a_chip_have_its_share() -> None:
    device, _ = inference.device_of_inference_row({"hardware": "Inferentia2 (inf2.48xl) NeuronCores", "device_mem_bw_gbs": "410"})
    assert device.bandwidth() == 410e9
    assert device.peak("bfloat16") == pytest.approx(95e12)


def test_a_device_of_the_rows_own_columns() -> None:
    device, unsaid = inference.device_of_inference_row({"hardware": "Never Built 9000", "device_mem_bw_gbs": "500", "device_mem_gb": "16"})
    assert (device.bandwidth(), device.memory_bytes, unsaid) == (500e9, 16 * 2**30, ("device",))
    with pytest.raises(NotGradable, match=r"^device 'Never Built 9000' is not in the catalogue, and the row gives no bandwidth$"):
        inference.device_of_inference_row({"hardware": "Never Built 9000"})


@pytest.mark.parametrize(("row", "expected"), [
    ({"decode_tok_s": "50", "tpot_ms": "1"}, {"decode": 50.0}),
    ({"tpot_ms": "20"}, {"decode": 200.0}),
    ({"ttft_ms": "500"}, {"prefill": 4 * 512 / 0.5}),
    ({"latency_ms": "2000"}, {"serving": 4 * 128 / 2}),
    ({"total_output_tok_s": "99", "latency_ms": "1"}, {"serving": 99.0}),
])  # fmt: skip
def test_speeds_of_a_row(row: Row, expected: dict[str, float]) -> None:
    assert inference.truths_of_row(row, 4, 512, 128, in_flight=False) == expected


def test_times_under_load_are_not_those_of_a_lone_batch() -> None:
    assert inference.truths_of_row({"ttft_ms": "500", "tpot_ms": "20"}, 4, 512, 128, in_flight=True) == {}


def test_mean_bits_fill_the_published_file() -> None:
    case = inference.inference_case(ROW | {"weight_format": "Q4_K_M", "weight_bits": "4.89", "model_file_gib": "4.58"})
    assert case.spec.weight_bytes() == pytest.approx(4.58 * 2**30, rel=0.01)


@pytest.mark.parametrize(("text", "year"), [("llama.cpp Dec-2023", 2023.92), ("runtime 2026-03", 2026.17), ("Vulkan 2025", 2025.5), ("b7941", None)])
def test_year_of_software(text: str, year: float | None) -> None:
    assert inference.year_of(text) == (None if year is None else pytest.approx(year, abs=0.01))


def test_errors_are_of_predicted_over_published() -> None:
    grade = inference.grade_inference([ROW])[1]
    assert grade.predicted is not None
    assert grade.truth is not None
    assert published.error_of(grade) == pytest.approx(grade.predicted / grade.truth - 1)
    assert math.isfinite(published.error_of(grade) or math.nan)


def test_what_is_fitted_is_what_the_package_computes():
    """The fit's roofline over arrays, and the package's over operators, from the same constants: the same speeds."""
    rows = [
        ROW,
        ROW | {"id": "2", "hardware": "Apple M2 Ultra 76-core", "device_mem_bw_gbs": "800", "weight_format": "Q4_0", "weight_bits": "4.5"},
        ROW | {"id": "3", "n_devices": "4", "pp": "4", "note": "", "input_len": "2048"},
        ROW | {"id": "4", "model": "Mixtral-8x7B", "params_total": "46702792704", "vocab": "32000", "n_experts": "8", "top_k": "2"},
    ]
    samples = fit_inference.samples_of_rows(rows)
    assert len(samples) >= 7
    table = fit_inference.table_of(samples)
    names = fit_inference.names_of("ggml", table)
    theta = np.log([fit_inference.prior_of("ggml", name).value for name in names])
    fitted = table.rows["tokens"] / fit_inference.seconds_of(table, names, theta)
    rates = {"ggml": replace(fit_inference.rates_of("ggml", names, theta), spread=dict.fromkeys(("decode", "prefill", "serving"), 0.1))}
    graded = {(grade.id, grade.kind): grade.predicted for grade in inference.grade_inference(rows, rates=rates)}
    for sample, speed in zip(samples, fitted, strict=True):
        assert graded[sample.case.id, sample.kind] == pytest.approx(speed, rel=1e-3), (sample.case.id, sample.kind)
