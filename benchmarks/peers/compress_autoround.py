"""AutoRound: rounding and clipping learned block by block (SignRound), saved in its own format. Run by benchmarks/compression.py."""

from __future__ import annotations

from pathlib import Path

import compress_job
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENTS = ("torch==2.13.0", "auto-round==0.16.1")


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    rows = compress_job.windows(job)
    settings = job.settings
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rounder = AutoRound(
        model, tokenizer, scheme="W4A16", bits=settings["bits"], group_size=settings["group_size"], sym=settings["symmetric"],
        iters=settings["iterations"], nsamples=len(rows), seqlen=rows.shape[1], batch_size=min(8, len(rows)),
        dataset=list(rows.split(min(8, len(rows)))), device_map="cpu",
        enable_torch_compile=False,
    )  # fmt: skip
    with meter.quantizing():
        rounder.quantize()
    rounder.save_quantized(job.artifact, format="auto_round")
    meter.saved()
    folder = next(file.parent for file in sorted(Path(job.artifact).rglob("*.safetensors")))
    bits = compress_job.counted_bits(folder, compress_job.linears_of(job.model), code_bits=settings["bits"], symmetric=settings["symmetric"])
    compress_job.write_dense(job, compress_job.dense_from_gptq(job))
    meter.report(job, "auto-round", bits)


if __name__ == "__main__":
    main()
