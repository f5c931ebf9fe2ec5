"""GenZ (the package `genz-llm` 0.0.16, MIT): prefill and decode of dense and mixture models on a roofline of each operator, with collectives.

Settings are its defaults (an efficiency of 1) but for the beam width, whose default is 4: one, as the rows have. The device is made of the row's
figures. One width holds for weights, cache and arithmetic: bf16, int8, fp8, int4, fp4. Decode of weights of fewer bits takes the nearest width, as it
is bound by memory; prefill of them computes in bf16, as these kernels do, on a device whose memory is larger by as much as they are smaller.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]  # this file has the package's name

from GenZ import decode_moddeling, prefill_moddeling  # noqa: E402
from GenZ.Models import ModelConfig  # noqa: E402

Case = dict[str, Any]


class Cannot(Exception):
    """Why a case is not expressed."""


def model_config(case: Case) -> ModelConfig:
    model = case["model"]
    if not all(model[name] for name in ("layers", "hidden", "heads", "kv_heads", "expert_ffn", "vocab")):
        raise Cannot("sizes of the model not known")
    experts = (
        {"num_experts": model["n_experts"], "expert_top_k": model["top_k"], "moe_intermediate_size": model["expert_ffn"], "moe_layer_freq": 1}
        if model["n_experts"]
        else {}
    )
    return ModelConfig(
        model="case",
        vocab_size=model["vocab"],
        hidden_size=model["hidden"],
        intermediate_size=model["expert_ffn"],
        num_ffi=2 if model["gated"] else 1,
        num_decoder_layers=model["layers"],
        num_attention_heads=model["heads"],
        num_key_value_heads=model["kv_heads"],
        head_dim=model["head_dim"],
        **experts,
    )


def width(case: Case) -> str:
    """Its name of the width that the row's weights have."""
    work = case["work"]
    if work["weight_format"] in ("FP8", "FP4"):
        return str(work["weight_format"].lower())
    if work["weight_bits"] > 16:
        return "f32"
    return "int4" if work["weight_bits"] < 6 else "int8" if work["weight_bits"] < 12 else "bf16"


def system(case: Case, room: float = 1) -> dict[str, Any]:
    """The device in its units (TFLOP/s, GB, GB/s), with `room` times its memory."""
    device = case["device"]
    if "fp16" not in device["peak_flops_per_s"] or not device["bandwidth_bytes_per_s"] or not device["memory_bytes"]:
        raise Cannot(f"no fp16 peak, memory or bandwidth of {device['name']}")
    return {
        "Flops": device["peak_flops_per_s"]["fp16"] / 1e12,
        "Memory_size": room * device["memory_bytes"] / 1e9,
        "Memory_BW": device["bandwidth_bytes_per_s"] / 1e9,
        "ICN": (device["link_bytes_per_s"] or 16e9) / 1e9,
        "real_values": True,
    }


def seconds(case: Case, phase: str, generated: int = 0) -> float:
    """Seconds of the prompts, or of one step after `generated` tokens."""
    work, bits = case["work"], width(case)
    common = {
        "model": model_config(case),
        "batch_size": work["batch"] or 1,
        "input_tokens": max(1, work["input_len"]),
        "system_name": system(case),
        "tensor_parallel": work["tp"],
    }
    if phase == "prefill":
        computed = bits if bits in ("fp8", "fp4") else "bf16"
        common["system_name"] = system(case, max(1, 16 / work["weight_bits"])) if computed == "bf16" else common["system_name"]
        return float(prefill_moddeling(**common, bits=computed)["Latency"]) / 1e3
    return float(decode_moddeling(**common, bits=bits, output_tokens=generated, Bb=1)["Latency"]) / 1e3


def predict(case: Case) -> float:
    work = case["work"]
    if case["kind"] == "training_time":
        raise Cannot("inference alone")
    if work["saturated"]:
        raise Cannot("does not choose the batch of a saturating load")
    if work["pp"] > 1:
        raise Cannot("pipelines micro-batches, not one stream through layers on many devices")
    batch, output = work["batch"] or 1, work["output_len"]
    if case["kind"] == "prefill":
        return float(batch * work["input_len"] / seconds(case, "prefill"))
    step = seconds(case, "decode", output // 2)
    if case["kind"] == "decode":
        return batch / step
    return float(batch * output / (seconds(case, "prefill") + output * step))


def main() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        case = json.loads(line)
        answer: Case = {"id": case["id"], "kind": case["kind"]}
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                answer["predicted"] = predict(case)
        except Cannot as reason:
            answer["cannot"] = str(reason)
        except (ValueError, AssertionError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            fits = "fit on chip" in str(error)
            answer["cannot"] = "says that it does not fit" if fits else f"fails with {type(error).__name__}: {str(error)[:60]}"
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
