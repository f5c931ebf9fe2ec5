"""Does torch.compile with frozen weights (packed once, for oneDNN) beat torch.compile as it is, and both eager torch? In turn; above 1 is faster.

python benchmarks/torch_compile_freezing.py --model .models/minilm --shapes 1x128 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lighten.formats.torch_model import load_module
from lighten.model import read_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an encoder")
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "32x128"], help="batch x length")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for dtype in asked.dtypes:
        for shape in asked.shapes:
            rows.append({"dtype": dtype, "shape": shape, **_measured(asked.model, dtype, shape, asked.rounds)})
            print(rows[-1], flush=True)
    print(json.dumps({"rows": rows}))


def _measured(model: Path, dtype: str, shape: str, rounds: int) -> dict[str, float]:
    batch, length = map(int, shape.split("x"))
    ids = torch.from_numpy(np.random.default_rng(0).integers(10, 1000, (batch, length)))
    inputs, spec = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, read_spec(model)
    ways: dict[str, Any] = {"eager": load_module(model, spec, dtype=dtype, attention="sdpa")}
    found: dict[str, float] = {}
    for name, freezing in (("compiled", False), ("frozen", True)):
        torch._dynamo.reset()
        module = load_module(model, spec, dtype=dtype, attention="sdpa")
        start = time.perf_counter()
        with torch.inference_mode(), torch._inductor.config.patch(freezing=freezing):
            compiled = torch.compile(module, dynamic=False)
            compiled(**inputs)
        found[f"{name}_compile_s"] = time.perf_counter() - start
        ways[name] = compiled

    def seconds(run: Any) -> float:
        runs = max(1, 64 // (batch * length // 16))
        with torch.inference_mode():
            run(**inputs)
            start = time.perf_counter()
            for _ in range(runs):
                run(**inputs)
        return (time.perf_counter() - start) / runs

    samples = [{name: seconds(run) for name, run in ways.items()} for _ in range(rounds)]
    return found | {name: median(each["eager"] / each[name] for each in samples) for name in ("compiled", "frozen")}


if __name__ == "__main__":
    main()
