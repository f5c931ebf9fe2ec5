"""GPTQModel: GPTQ with its package's defaults, saved in GPTQ's format. Run by benchmarks/compression.py."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # two cores give it no worker of its own choice, and it stops

import compress_job
import torch
from gptqmodel import BACKEND, GPTQConfig, GPTQModel

REQUIREMENTS = ("torch==2.15.0", "setuptools", "wheel", "--no-build-isolation", "gptqmodel==7.7.0")


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    settings = job.settings
    rows = compress_job.windows(job).tolist()
    config = GPTQConfig(bits=settings["bits"], group_size=settings["group_size"], sym=settings["symmetric"], device="cpu")
    model = GPTQModel.load(job.model, config, dtype=torch.bfloat16)
    with meter.quantizing():
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1, backend=BACKEND.TORCH)
    model.save(job.artifact)
    meter.saved()
    bits = compress_job.counted_bits(
        Path(job.artifact), compress_job.linears_of(job.model), code_bits=settings["bits"], symmetric=settings["symmetric"]
    )
    compress_job.write_dense(job, compress_job.dense_from_gptq(job))
    meter.report(job, "gptqmodel", bits)


if __name__ == "__main__":
    main()
