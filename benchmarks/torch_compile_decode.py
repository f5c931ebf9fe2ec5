"""Does a compiled step of a decoder beat eager torch's, and what does compiling cost? In turn; a ratio above 1 is faster.

python benchmarks/torch_compile_decode.py --model .models/smollm2-135m-offgrid --dtypes float32 bfloat16
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from lighten.model import read_spec
from lighten.runtimes import open_session
from lighten.runtimes.session import Setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a decoder")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    spec, rows = read_spec(asked.model), []
    for dtype in asked.dtypes:
        setup = Setup(dtype=dtype, threads=asked.threads)
        eager, compiled = (open_session(name, asked.model, spec, setup) for name in ("torch", "torch-compile"))
        for batch in asked.batches:
            ids = np.random.default_rng(0).integers(10, 10_000, (batch, 64))
            start = time.perf_counter()
            first = compiled.generate(ids, 2).ids
            cold_s = time.perf_counter() - start
            same = bool((eager.generate(ids, 2).ids == first).all())
            ratios = [eager.generate(ids, asked.new_tokens).rest_s / compiled.generate(ids, asked.new_tokens).rest_s for _ in range(asked.rounds)]
            rows.append({"dtype": dtype, "batch_size": batch, "first_run_s": cold_s, "speed": median(ratios), "spread": sorted(ratios), "same": same})
            print(rows[-1], flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
