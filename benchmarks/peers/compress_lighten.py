"""lighten itself, by the same protocol as its peers: `lighten compress` in this process, its artifact read back. Run by benchmarks/compression.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compress_job
import safetensors.torch  # noqa: F401  what a compress run imports sooner or later is imported before the meter begins
import transformers  # noqa: F401

from lighten import verbs
from lighten.formats.safetensors_folder import expanded_weights
from lighten.model import read_spec
from lighten.model.spec import Linear, ModelSpec, WeightFormat


def code_bits(spec: ModelSpec, linears: dict[str, int]) -> float:
    """The mean width of a code over the weights of the linears; dense ones count their dtype."""
    formats: dict[str, WeightFormat] = {part.name: part.weight for part in spec.parts if isinstance(part, Linear)}
    widths = {name: formats[name].bits for name in linears}
    if dense := [name for name, bits in widths.items() if bits is None]:
        raise ValueError(f"{len(dense)} of {len(linears)} linears have no codes, {dense[0]} for one.")
    return sum((widths[name] or 0) * count for name, count in linears.items()) / sum(linears.values())


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    settings = job.settings
    with meter.quantizing():
        verbs.compress(job.model, settings["recipe"], job.artifact, text=settings["text"], log=lambda line: print(line, file=sys.stderr))
    meter.saved()
    artifact = Path(job.artifact)
    spec = read_spec(artifact)
    linears = compress_job.linears_of(job.model)
    bits: dict[str, Any] = compress_job.counted_bits(artifact, linears, code_bits=code_bits(spec, linears), symmetric=False)
    formats = {part.name: part.weight for part in spec.parts if isinstance(part, Linear)}
    bits["int8_inputs"] = sorted(name for name in linears if formats[name].activations is not None)
    compress_job.write_dense(job, dict(expanded_weights(artifact, spec)))
    meter.report(job, "lighten", bits)


if __name__ == "__main__":
    main()
