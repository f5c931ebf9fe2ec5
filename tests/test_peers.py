"""Rows of other people's measurements as cases, and the flat rule on them. No other estimator runs here."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peers_under_test_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers = load(BENCHMARKS / "peers_published.py")
flat = load(BENCHMARKS / "peers" / "flat.py")

HARDWARE = (
    "name,fp32_tflops,tf32_tflops,fp16_tflops,bf16_tflops,fp8_tflops,fp4_tflops,int8_tops,memory_gb,memory_bw_gbs,intra_node_unidir_gbs\n"
    "A100 SXM 80GB,19.5,156,312,312,,,624,80,2039,300\n"
    "H200 SXM 141GB,67,494.5,989,989,1979,,1979,141,4800,450\n"
    "GH200 96GB,67,494.5,989,989,1979,,1979,96,4000,450\n"
    "RTX 4090,82.6,82.6,165.2,165.2,330.3,,660.6,24,1008,\n"
    "RX 7900 XT,51.6,,103.2,103.2,,,,20,800,\n"
    "M1 Max 32-core GPU,10.4,,10.4,,,,,64,400,\n"
    "Inferentia2 (chip),,,190,190,,,,32,820,\n"
)
DEVICES = {row["name"]: row for row in csv.DictReader(HARDWARE.splitlines())}
LLAMA_2_7B = {
    "model": "Llama-2-7B", "params_total": "6738415616", "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "32", "head_dim": "128",
    "ffn": "11008", "vocab": "32000",
}  # fmt: skip


def row(**more: str) -> defaultdict[str, str]:
    return defaultdict(str, LLAMA_2_7B | {"id": "X1", "source_repo_or_doc": "someone"} | more)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("H200-SXM-141GB", "H200 SXM 141GB"), ("GH200-480GB", "GH200 96GB"), ("RTX4090-24GB", "RTX 4090"),
        ("Apple M1 Max 32-core", "M1 Max 32-core GPU"), ("Pi CM5 - 16GB (Nvidia RTX 40901) [GPU]", "RTX 4090"),
        ("Ryzen 9 9950X (AMD 7900 XT) [GPU]", "RX 7900 XT"), ("A100-80GB", "A100 SXM 80GB"),
        ("Intel 13900K (Nvidia 4090) [GPU]", "RTX 4090"),
    ],
)  # fmt: skip
def test_a_device_is_found_by_the_words_of_its_name(written: str, meant: str) -> None:
    assert peers.device_of(written, DEVICES)["name"] == meant


@pytest.mark.parametrize(
    "written", ["RTX4090+RTX3090Ti", "Apple Silicon (unspecified in README)", "Pi 5 - 8GB [CPU]", "RTX 4080 SUPER", "Apple M1 7-core GPU"]
)
def test_a_device_that_the_table_lacks_is_not_taken_for_a_near_one(written: str) -> None:
    assert peers.device_of(written, DEVICES) is None


def test_a_gated_feed_forward_is_inferred_from_the_number_of_parameters() -> None:
    assert peers.model_of(row())["gated"] is True
    ungated = {"params_total": "6658000000", "ffn": "16384", "vocab": "50368"}  # 12 hidden² a layer: MPT's blocks
    assert peers.model_of(row(**ungated))["gated"] is False


def test_a_step_takes_the_first_figure_that_gives_its_time() -> None:
    given = {"hardware": "A100-SXM-80GB", "precision": "bf16", "n_gpus": "8", "seq_len": "4096", "global_batch_seqs": "64", "measured": "measured"}
    tokens = 64 * 4096
    assert peers.training_case(row(**given, step_time_s="9", tokens_per_s="1"), DEVICES)["truth"] == 9
    assert peers.training_case(row(**given, tokens_per_s_per_gpu="3000", samples_per_s="1"), DEVICES)["truth"] == pytest.approx(tokens / 24000)
    assert peers.training_case(row(**given, samples_per_s="8"), DEVICES)["truth"] == pytest.approx(8)
    work = 6 * 6738415616 + 12 * 32 * 4096 * 4096
    by_flops = peers.training_case(row(**given, tflops_per_gpu="150", tflops_kind="model"), DEVICES)
    assert by_flops["truth"] == pytest.approx(tokens * work / (8 * 150e12))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"measured": "measured: OOM"}, "out of memory"),
        ({"note": "seq = longest Alpaca sample (varies)"}, "its note says"),
        ({"tflops_per_gpu": "150", "tflops_kind": "hardware"}, "gives no time"),
        ({"hardware": "Abacus", "step_time_s": "1"}, "not in hardware.csv"),
        ({"precision": "posit16", "step_time_s": "1"}, "precision 'posit16' is not known"),
        ({"global_batch_seqs": "", "step_time_s": "1"}, "says no batch"),
    ],
)
def test_a_row_is_left_out_with_its_reason(more: dict[str, str], reason: str) -> None:
    given = {"hardware": "A100-SXM-80GB", "precision": "bf16", "n_gpus": "8", "seq_len": "4096", "global_batch_seqs": "64", "measured": "measured"}
    with pytest.raises(peers.LeftOut, match=reason):
        peers.training_case(row(**(given | more)), DEVICES)


def inference(**more: str) -> list[dict[str, Any]]:
    given = {"hardware": "A100-SXM-80GB", "weight_bits": "16", "weight_format": "FP16", "batch_or_concurrency": "4", "batch_kind": "static batch"}
    found: list[dict[str, Any]] = peers.inference_cases(row(**(given | {"input_len": "512", "output_len": "128"} | more)), DEVICES)
    return found


def test_a_row_gives_a_case_for_each_speed_that_it_measured() -> None:
    found = inference(tpot_ms="20", ttft_ms="100", total_output_tok_s="180")
    assert {case["kind"]: case["truth"] for case in found} == {"decode": 200, "prefill": pytest.approx(4 * 512 / 0.1), "serving": 180}


def test_llama_bench_generates_from_an_empty_context() -> None:
    (case,) = inference(decode_tok_s="60", metric="pp512/tg128", batch_or_concurrency="1")
    assert (case["work"]["input_len"], case["work"]["output_len"]) == (0, 128)


def test_under_a_load_time_per_token_is_no_speed_of_decode() -> None:
    assert [case["kind"] for case in inference(tpot_ms="20", total_output_tok_s="180", batch_kind="in-flight batching, closed loop")] == ["serving"]


def test_cores_are_half_a_chip() -> None:
    (case,) = inference(decode_tok_s="60", hardware="Inferentia2 (inf2.48xl) NeuronCores")
    assert case["device"]["bandwidth_bytes_per_s"] == 410e9


def test_the_flat_rules_are_those_that_it_says() -> None:
    decode, prefill = inference(decode_tok_s="60", prefill_tok_s="9000")
    moved = 2 * 6738415616 + 4 * (512 + 64) * 2 * 32 * 4096 * 2
    assert flat.predict(decode) == pytest.approx(4 / (moved / (0.7 * 2039e9)))
    assert flat.predict(prefill) == pytest.approx(0.4 * 312e12 / (2 * 6738415616))


def test_a_flat_batch_reads_no_more_than_all_experts() -> None:
    case = inference(decode_tok_s="60", params_total="46702792704", params_active="12879925248", n_experts="8", top_k="2", tp="4", n_devices="4")[0]
    assert flat.weight_bytes(case, 1) == pytest.approx(2 * 12879925248)
    assert flat.weight_bytes(case, 1) < flat.weight_bytes(case, 4) < flat.weight_bytes(case, 10**4) == pytest.approx(2 * 46702792704)


def test_predictions_stand_beside_ours_on_shared_rows_alone(tmp_path: Path) -> None:
    cases = [{"id": name, "kind": "decode", "source": "s", "truth": 100.0} for name in "abc"]
    answers = [
        {"id": "a", "kind": "decode", "predicted": 150.0},
        {"id": "b", "kind": "decode", "cannot": "no"},
        {"id": "c", "kind": "decode", "predicted": 90.0},
    ]
    lines, missing = peers.graded("them", cases, answers)
    assert [line["ratio"] for line in lines] == [1.5, 0.9]
    assert missing == {"decode: no": 1}
    (tmp_path / "ours").write_text(
        '{"id": "a", "kind": "decode", "predicted": 110}\n{"id": "b", "kind": "decode", "predicted": 1}\n', encoding="utf-8"
    )
    assert peers.beside(lines, peers.ours_on(tmp_path / "ours", cases)) == [("them", "decode", 1, 0.5, pytest.approx(0.1))]


def test_the_script_ends_with_one_json_object(tmp_path: Path) -> None:
    (tmp_path / "hardware.csv").write_text(HARDWARE, encoding="utf-8")
    given = {"hardware": "A100-SXM-80GB", "weight_bits": "16", "weight_format": "FP16", "batch_or_concurrency": "1", "decode_tok_s": "90"}
    others = (
        "input_len output_len metric note measured params_active moe_ffn n_experts top_k tp pp kv_dtype batch_kind framework n_devices moe_ep ttft_ms"
    )
    columns = sorted({*row(), *given, *others.split(), "tpot_ms", "prefill_tok_s", "total_output_tok_s"})
    for name, rows in (("training.csv", []), ("inference.csv", [row(**given, output_len="64")])):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    command = [sys.executable, str(BENCHMARKS / "peers_published.py"), "--rows", str(tmp_path), "--peer", "flat"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    last = json.loads(printed[-1])
    assert last["cases"] == {"decode": 1}
    assert last["peers"]["flat"]["decode"]["n"] == 1
