"""SimuMax 1.2 (a checkout of MooreThreads/SimuMax, Apache-2.0; `--path simumax=FOLDER`): training steps under Megatron's plans, from operators'
efficiencies that were measured on one A100 PCIe and one B200.

Settings: the shipped system files. An A100 SXM is the A100's file, whose chip it is, with the board's bandwidth and memory, and with the NVLink
network of the B200's file at the A100's link rate. Other devices have no file; its documentation asks to measure them first, so they are not
expressed. A row that does not say what it recomputes recomputes nothing. It takes ZeRO 2 and 3 and says that it counts them as ZeRO 1.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

CHECKOUT = Path(sys.argv[1]) if len(sys.argv) > 1 else sys.exit("simumax.py FOLDER: needs the folder of SimuMax's checkout")
sys.path[:] = [str(CHECKOUT), *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent)]

from simumax.core.config import ModelConfig, StrategyConfig, SystemConfig  # noqa: E402
from simumax.core.perf_llm import PerfLLM  # noqa: E402

FILES = {"A100 SXM 80GB": "a100_pcie", "A100 SXM 40GB": "a100_pcie", "A100 PCIe 80GB": "a100_pcie", "B200 SXM": "b200_bf16_ceperm"}
NVLINK = ("low_intra_node", "high_intra_node")
Case = dict[str, Any]


class Cannot(Exception):
    """Why a case is not expressed."""


def shipped(name: str) -> Case:
    return dict(json.loads((CHECKOUT / "configs" / "system" / f"{name}.json").read_text("utf-8")))


def system_of(device: Case) -> Case:
    """The shipped system of the device's chip, with its board's memory and links."""
    if device["name"] not in FILES:
        raise Cannot(f"no shipped system for {device['name']}")
    system = shipped(FILES[device["name"]])
    if "A100 SXM" not in device["name"]:
        return system
    for figures in system["accelerator"]["bandwidth"].values():
        figures["gbps"] = device["bandwidth_bytes_per_s"] / 1e9
    system["accelerator"]["mem_gbs"] = device["memory_bytes"] / 1e9
    other, own = shipped("b200_bf16_ceperm")["networks"], system["networks"]
    links = {name: copy.deepcopy(other[name]) for name in NVLINK}
    for link in links.values():
        link["bandwidth"]["gbps"] = device["link_bytes_per_s"] / 1e9
    return system | {"networks": {"intra_with_pcie": False, **links, "inter_node": own["inter_node"]}}


def model_of(model: Case) -> Case:
    if not all(model[name] for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")):
        raise Cannot("sizes of the model not known")
    config = {
        "model_name": "case",
        "hidden_size": model["hidden"],
        "head_num": model["heads"],
        "kv_head_num": model["kv_heads"],
        "head_size": model["head_dim"],
        "intermediate_size": model["ffn"],
        "layer_num": model["layers"],
        "vocab_size": model["vocab"],
        "use_swiglu": bool(model["gated"]),
    }
    if not model["n_experts"]:
        return config | {"model_type": "dense"}
    return config | {"model_type": "moe", "expert_num": model["n_experts"], "topk": model["top_k"], "moe_ffn_hidden_size": model["expert_ffn"]}


def strategy_of(case: Case) -> Case:
    work = case["work"]
    if work["precision"] not in ("bf16", "fp16"):
        raise Cannot(f"no measured efficiency of {work['precision']}")
    if work["method"] in ("lora", "qlora", "pruning"):
        raise Cannot(f"no {work['method']}")
    tp, pp, cp = work["tp"] or 1, work["pp"] or 1, work["cp"] or 1
    dp, micro = work["n_gpus"] // (tp * pp * cp), work["micro_batch"] or 1
    batches = round(work["tokens"] / work["seq_len"] / (dp * micro))
    if dp * tp * pp * cp != work["n_gpus"] or batches < 1:
        raise Cannot("a plan that does not multiply out to the devices and the batch")
    stage_layers = -(-case["model"]["layers"] // pp)
    recompute = {"full": "full_block", "selective": "sdp_only"}.get(work["recompute"] or "none")
    return {
        "seq_len": work["seq_len"],
        "micro_batch_size": micro,
        "micro_batch_num": batches,
        "dtype": "bf16",
        "world_size": work["n_gpus"],
        "tp_size": tp,
        "cp_size": cp,
        "pp_size": pp,
        "ep_size": work["ep"] or 1,
        "etp_size": 1,
        "enable_sequence_parallel": bool(work["sequence_parallel"] and tp > 1),
        "interleaving_size": (work["vp"] or 1) if pp > 1 else 1,
        "zero_state": work["zero_stage"] or 0,
        "enable_recompute": recompute is not None,
        "recompute_granularity": recompute,
        "recompute_layer_num": stage_layers if recompute else 0,
        "pp_comm_async": False,
        "use_flash_sdp": True,
        "use_math_sdp": False,
    }


def seconds(case: Case, folder: Path) -> float:
    parts = {"model": model_of(case["model"]), "strategy": strategy_of(case), "system": system_of(case["device"])}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    perf = PerfLLM()
    perf.configure(
        strategy_config=StrategyConfig.init_from_config_file(str(folder / "strategy.json")),
        model_config=ModelConfig.init_from_config_file(str(folder / "model.json")),
        system_config=SystemConfig.init_from_config_file(str(folder / "system.json")),
    )
    perf.run_estimate()
    rate = perf.analysis_cost().data["throughput_per_accelerator"]
    return float(case["work"]["tokens"] / (rate * case["work"]["n_gpus"]))


def predict(case: Case, folder: Path) -> float:
    if case["kind"] != "training_time":
        raise Cannot("training alone")
    return seconds(case, folder)


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            case = json.loads(line)
            answer: Case = {"id": case["id"], "kind": case["kind"]}
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    answer["predicted"] = predict(case, Path(folder))
            except Cannot as reason:
                answer["cannot"] = str(reason)
            except (AssertionError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
                answer["cannot"] = f"fails with {type(error).__name__}: {str(error).splitlines()[0][:70] if str(error) else ''}"
            print(json.dumps(answer))


if __name__ == "__main__":
    main()
