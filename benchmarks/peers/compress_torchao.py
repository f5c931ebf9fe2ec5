"""torchao: whole-number weights by rounding, with int8 activations too, saved as its own tensors. Run by benchmarks/compression.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compress_job
import torch
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)
from transformers import AutoModel, AutoModelForCausalLM

REQUIREMENTS = ("torch==2.13.0", "torchao==0.18.0", "transformers==5.23.0")
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def config_of(settings: dict[str, Any]) -> Any:
    """The configuration of a method, with its package's defaults."""
    group = settings["group_size"]
    if settings.get("activations"):
        return Int8DynamicActivationInt8WeightConfig()
    if settings["method"] == "int4":
        return Int4WeightOnlyConfig(group_size=group)
    if settings["method"] == "int8":
        return Int8WeightOnlyConfig()
    if settings["method"] == "intx":
        mapping = MappingType.SYMMETRIC if settings["symmetric"] else MappingType.ASYMMETRIC
        return IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{settings['bits']}"), granularity=PerGroup(group) if group else PerAxis(0), mapping_type=mapping
        )
    raise ValueError(f"method {settings['method']!r} is not known; one of int4, int8, intx.")


def tensors_of(weight: Any, *, symmetric: bool) -> list[tuple[str, str, int]]:
    """What a quantized tensor keeps: (kind, dtype's name, elements) of each plain tensor in it. Zero points of symmetric codes are constants."""
    names = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"} | FLOATS
    kinds = {"qdata": "codes", "scale": "scale", "zero_point": "constant" if symmetric else "zero"}
    parts = {name: getattr(weight, name) for name in weight.tensor_data_names + list(getattr(weight, "optional_tensor_data_names", []))}
    return [(kinds.get(name, "other"), names[part.dtype], part.numel()) for name, part in parts.items() if torch.is_tensor(part)]


def hidden_states(model: Any, ids: Any, mask: Any) -> Any:
    return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.float().numpy()


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    settings = job.settings
    model = (
        AutoModel.from_pretrained(job.model, dtype=torch.float32)
        if job.texts
        else AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    )
    linears = compress_job.linears_of(job.model)
    with meter.quantizing():
        quantize_(model, config_of(settings), filter_fn=lambda part, name: name in linears)
    Path(job.artifact).mkdir(parents=True)
    torch.save(model.state_dict(), Path(job.artifact) / "model.pt")
    meter.saved()
    modules = dict(model.named_modules())
    untouched = [name for name in linears if not hasattr(modules[name].weight, "dequantize") or type(modules[name].weight.data) is torch.Tensor]
    if untouched:
        raise ValueError(f"{len(untouched)} of {len(linears)} linears were skipped, {untouched[0]} for one.")
    if job.texts:
        with torch.inference_mode():
            compress_job.write_embeddings(job, lambda ids, mask: hidden_states(model, ids, mask))
    found = [tensor for name in linears for tensor in tensors_of(modules[name].weight, symmetric=settings["symmetric"])]
    if not job.texts:
        dense = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in linears}
        compress_job.write_dense(job, dense | {f"{name}.weight": modules[name].weight.dequantize() for name in linears})
    bits: dict[str, Any] = compress_job.tensor_bits(found, sum(linears.values()), settings["bits"])
    bits["int8_inputs"] = sorted(linears) if settings.get("activations") else []
    meter.report(job, "torchao", bits)
    print("written", job.dense, file=sys.stderr)


if __name__ == "__main__":
    main()
