"""Is the estimate exact, and how long does the command take? Parameters and matmul FLOPs against the traced model, wall time of the whole process.

python benchmarks/estimate_exact.py --model .models/minilm .models/smollm2-135m --seq-len 128 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lighten import verbs
from lighten.formats.torch_model import load_module
from lighten.model import read_spec


def traced(folder: Path, batch_size: int, seq_len: int) -> tuple[int, int]:
    """Parameters (tied once) and FLOPs of one forward pass as FlopCounterMode sees it, with eager attention."""
    spec = read_spec(folder)
    module = load_module(folder, spec, dtype="float32", attention="eager")
    ids = torch.ones(batch_size, seq_len, dtype=torch.long)
    options = {"use_cache": False} if spec.is_decoder else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(input_ids=ids, **options)
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops()


def wall_s(folder: Path, runs: int) -> list[float]:
    """Seconds of `lighten estimate FOLDER --json` as a whole process."""
    command = [sys.executable, "-m", "lighten.cli.main", "estimate", str(folder), "--json"]
    found = []
    for _ in range(runs + 1):  # the first fills the disk cache
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", type=Path, required=True)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1])
    parser.add_argument("--seq-len", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    rows = []
    for folder in asked.model:
        for batch_size in asked.batch_size:
            for seq_len in asked.seq_len:
                found = verbs.estimate(folder, batch_size=batch_size, seq_len=seq_len)
                parameters, flops = traced(folder, batch_size, seq_len)
                matmul = sum(found.matmul.values())
                exact = (found.spec.total_parameters, matmul) == (parameters, flops)
                print(
                    f"{folder.name} {batch_size} x {seq_len}: {parameters:,} parameters, {flops:,} FLOPs traced; {matmul:,} predicted; exact: {exact}"
                )
                row = {"model": folder.name, "batch_size": batch_size, "seq_len": seq_len, "parameters": parameters, "traced_flops": flops}
                rows.append(row | {"predicted_flops": matmul, "exact": exact})
    times = {folder.name: wall_s(folder, asked.runs) for folder in asked.model}
    for name, seconds in times.items():
        print(f"{name}: lighten estimate takes {statistics.median(seconds):.3f} s (median of {len(seconds)}, worst {max(seconds):.3f})")
    wall = {name: {"median_s": statistics.median(seconds), "worst_s": max(seconds)} for name, seconds in times.items()}
    print(json.dumps({"rows": rows, "all_exact": all(row["exact"] for row in rows), "wall": wall}))


if __name__ == "__main__":
    main()
