"""Calculon (a checkout of calculon-ai/calculon, Apache-2.0; `--path calculon=FOLDER`): training steps of GPT-like models under tensor, pipeline and
data parallelism. The package `calculon` of the index is another program.

Settings: its shipped systems of the A100 and the H100, and those of its example but for what a row says: attention with as many key heads as
queries, or one for all where there are fewer (the nearest that it has); a gated feed-forward of width f as an ungated one of 3/2 f; reduce-scatter
and all-gather with sequence parallelism, all-reduce without. Tensor parallelism is on the first network, the rest on the second beyond eight
devices. No logits. The A100 of 40 GB is its A100 with that memory. Where a row does not say what it recomputes, the least that fits by its own
count is taken.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(sys.argv[1]) if len(sys.argv) > 1 else sys.exit("calculon.py FOLDER: needs the folder of Calculon's checkout")
sys.path[:] = [str(CHECKOUT), *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent)]

from calculon.llm import Llm  # noqa: E402
from calculon.system import System  # noqa: E402

FILES = {"A100 SXM 80GB": "a100_80g", "A100 SXM 40GB": "a100_80g", "H100 SXM 80GB": "h100_80g_nvl8"}
TYPES = {"bf16": "float16", "fp16": "float16", "fp8": "float8"}
NODE = 8
Case = dict[str, Any]


class Cannot(Exception):
    """Why a case is not expressed."""


def system_of(case: Case) -> Case:
    name = case["device"]["name"]
    if name not in FILES:
        raise Cannot(f"no shipped system for {name}")
    system = dict(json.loads((CHECKOUT / "systems" / f"{FILES[name]}.json").read_text("utf-8")))
    if name == "A100 SXM 40GB":
        system["mem1"] |= {"GiB": 40, "GBps": case["device"]["bandwidth_bytes_per_s"] / 1e9}
    return system


def model_of(case: Case) -> Case:
    model = case["model"]
    if not all(model[name] for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn")):
        raise Cannot("sizes of the model not known")
    if model["n_experts"]:
        raise Cannot("no mixtures of experts")
    return {
        "hidden": model["hidden"], "feedforward": round(model["ffn"] * (1.5 if model["gated"] else 1)), "seq_size": case["work"]["seq_len"],
        "attn_heads": model["heads"], "attn_size": model["head_dim"], "num_blocks": model["layers"],
    }  # fmt: skip


RECOMPUTE = {"full": "full", "selective": "attn_only", "none": "none"}


def execution_of(case: Case, system: Case, recompute: str) -> Case:
    work, model = case["work"], case["model"]
    datatype = TYPES.get(work["precision"])
    if datatype not in system["matrix"]:
        raise Cannot(f"its system has no {work['precision']}")
    if work["method"] in ("lora", "qlora", "pruning"):
        raise Cannot(f"no {work['method']}")
    if (work["cp"] or 1) > 1:
        raise Cannot("no context parallelism")
    tp, pp, micro = work["tp"] or 1, work["pp"] or 1, work["micro_batch"] or 1
    dp = work["n_gpus"] // (tp * pp)
    far = 1 if work["n_gpus"] > NODE else 0
    sequence = tp > 1 and work["sequence_parallel"]
    return {
        "num_procs": work["n_gpus"], "tensor_par": tp, "pipeline_par": pp, "data_par": dp, "tensor_par_net": 0, "pipeline_par_net": far,
        "data_par_net": far, "batch_size": round(work["tokens"] / work["seq_len"]), "microbatch_size": micro, "datatype": datatype,
        "fused_activation": True, "attention_type": "multihead" if model["kv_heads"] == model["heads"] else "multiquery",
        "activation_recompute": recompute,
        "pipeline_interleaving": (work["vp"] or 1) if pp > 1 else 1, "optimizer_sharding": dp > 1 and (work["zero_stage"] or 0) > 0,
        "tensor_par_comm_type": "rs_ag" if sequence else "ar", "tensor_par_overlap": "none", "seq_par_ag_redo": False, "data_par_overlap": False,
        "weight_offload": False, "activations_offload": False, "optimizer_offload": False, "training": True,
    }  # fmt: skip


def seconds(case: Case, recompute: str) -> float:
    system, log = system_of(case), logging.getLogger("calculon")
    model = Llm(Llm.Application(model_of(case)), log)
    device = System(system)
    try:
        model.compile(device, Llm.Execution.from_json(execution_of(case, system, recompute)))
        model.run(device)
    except Llm.Error as error:
        raise Cannot("says that it does not fit" if "Mem tier" in str(error) else f"says: {str(error)[:60]}") from error
    return float(model.get_total_time())


def predict(case: Case) -> float:
    if case["kind"] != "training_time":
        raise Cannot("training alone")
    said = RECOMPUTE.get(case["work"]["recompute"])
    tried = [said] if said else list(RECOMPUTE.values())[::-1]
    for recompute in tried:
        try:
            return seconds(case, recompute)
        except Cannot as reason:
            if recompute == tried[-1] or "fit" not in str(reason):
                raise
    raise Cannot("says that it does not fit")


def main() -> None:
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        case = json.loads(line)
        answer: Case = {"id": case["id"], "kind": case["kind"]}
        try:
            answer["predicted"] = predict(case)
        except Cannot as reason:
            answer["cannot"] = str(reason)
        except (AssertionError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            answer["cannot"] = f"fails with {type(error).__name__}: {str(error)[:60]}"
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
