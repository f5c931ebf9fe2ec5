"""lighten itself, by the same protocol as its peers: `lighten compress` in this process, its artifact read back. Run by benchmarks/compression.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import compress_job
import safetensors.torch  # noqa: F401  what a compress run imports sooner or later is imported before the meter begins, as the peers' scripts do
import transformers  # noqa: F401

import lighten.compress.methods
import lighten.formats.artifact
import lighten.formats.verify  # noqa: F401
from lighten import verbs
from lighten.compress.memory_plan import import_class
from lighten.formats.safetensors_folder import expanded_weights
from lighten.judge.measure import artifact_target
from lighten.model import read_spec
from lighten.model.spec import Linear, ModelSpec, WeightFormat
from lighten.recipe import parse_recipe
from lighten.runtimes import MODULES, Setup


def code_bits(spec: ModelSpec, linears: dict[str, int]) -> float:
    """The mean width of a code over the weights of the linears; dense ones count their dtype."""
    formats: dict[str, WeightFormat] = {part.name: part.weight for part in spec.parts if isinstance(part, Linear)}
    widths = {name: formats[name].bits for name in linears}
    if dense := [name for name, bits in widths.items() if bits is None]:
        raise ValueError(f"{len(dense)} of {len(linears)} linears have no codes, {dense[0]} for one.")
    return sum((widths[name] or 0) * count for name, count in linears.items()) / sum(linears.values())


def embed(job: compress_job.Job, artifact: Path) -> None:
    """The texts' embeddings by the runtime that the recipe names."""
    target = artifact_target(artifact)
    runtime = MODULES[target.runtime]
    read = artifact if any(artifact.glob("*.safetensors")) else Path(job.model)
    threads = int(os.environ["OMP_NUM_THREADS"])
    session = runtime.load(artifact, read_spec(read), Setup(dtype=target.dtype, threads=threads, activations=target.activations))
    compress_job.write_embeddings(job, session.encode)


def main() -> None:
    job = compress_job.read_job()
    import_class(read_spec(Path(job.model)).architecture)
    meter = compress_job.Meter()
    settings = job.settings
    reads_text = any(step.calibrated for step in parse_recipe(settings["recipe"]).steps)
    text = settings["text"] if reads_text else None
    with meter.quantizing():
        verbs.compress(job.model, settings["recipe"], job.artifact, text=text, log=lambda line: print(line, file=sys.stderr))
    meter.saved()
    artifact = Path(job.artifact)
    if job.texts:
        embed(job, artifact)
        meter.report(job, "lighten", {})
        return
    spec = read_spec(artifact)
    linears = compress_job.linears_of(job.model)
    if all(part.weight.bits is None for part in spec.parts if isinstance(part, Linear)):
        dense = dict(expanded_weights(artifact, spec))
        compress_job.write_dense(job, dense, smaller=True)
        meter.report(job, "lighten", {"sparsity": compress_job.share_of_zeros(dense, linears)})
        return
    weights = {part.name: part.out_features * part.in_features for part in spec.parts if isinstance(part, Linear)}
    linears = {name: weights[name] for name in linears if name in weights}
    bits: dict[str, Any] = compress_job.counted_bits(artifact, linears, code_bits=code_bits(spec, linears), symmetric=False)
    formats = {part.name: part.weight for part in spec.parts if isinstance(part, Linear)}
    bits["int8_inputs"] = sorted(name for name in linears if formats[name].activations is not None)
    compress_job.write_dense(job, dict(expanded_weights(artifact, spec)), smaller="shrink(" in settings["recipe"])
    meter.report(job, "lighten", bits)


if __name__ == "__main__":
    main()
