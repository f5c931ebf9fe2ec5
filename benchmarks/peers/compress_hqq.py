"""HQQ: zero points by half-quadratic splitting, no calibration. Run by benchmarks/compression.py."""

from __future__ import annotations

from typing import Any

import compress_job
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM

REQUIREMENTS = ("torch==2.13.0", "hqq==0.2.8.post1", "transformers==5.23.0", "setuptools")
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    settings = job.settings
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=settings["bits"], group_size=settings["group_size"], axis=1)
    with meter.quantizing():
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
    AutoHQQHFModel.save_quantized(model, job.artifact)
    meter.saved()
    layers = {name: part for name, part in model.named_modules() if isinstance(part, HQQLinear)}
    linears = compress_job.linears_of(job.model)
    if missing := sorted(set(linears) - set(layers)):
        raise ValueError(f"{len(missing)} linears were not quantized, {missing[0]} for one.")
    found: list[tuple[str, str, int]] = []
    dense: dict[str, Any] = {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    dense = {name: tensor for name, tensor in dense.items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        meta = layer.meta
        packed = layer.W_q
        found.append(("codes", "U8" if packed.dtype == torch.uint8 else "I32", packed.numel()))
        found += [(kind, FLOATS[meta[kind].dtype], meta[kind].numel()) for kind in ("scale", "zero")]
        dense[f"{name}.weight"] = Quantizer.dequantize(packed, {**meta, "compute_dtype": torch.float32})
    compress_job.write_dense(job, dense)
    meter.report(job, "hqq", compress_job.tensor_bits(found, sum(linears.values()), settings["bits"]))


if __name__ == "__main__":
    main()
