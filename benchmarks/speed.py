"""How long an estimate takes: from the shell, in a loop, and 100,000 points at once.

    python benchmarks/speed.py --model .models/minilm .models/smollm2-135m

From the shell: `lighten estimate MODEL` as a process of its own, its start included; median and spread of --repeat runs, after one that is not
counted. In a loop: the costs of one size after the other, of a spec that was read once; the first sizes, which are computed directly until
enough of them are worth fitting, are in it. At once: 100,000 pairs of a batch and a length, drawn at random, from nothing (fitting included);
--check of them are computed directly too and must be equal. Processor time stands beside the time, for a machine that is busy with other work.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lighten.cost.compiled import Costs, exact_costs, with_sizes
from lighten.cost.workload import Workload
from lighten.model import ModelSpec, read_spec

SHELL_S, LOOP_S, POINTS_S = 0.3, 1e-3, 2.0
"""Targets: of one estimate from the shell, of one in a loop, of 100,000 points."""
POINTS = 100_000
LARGEST_BATCH = 256
WITHOUT_POSITIONS = 131_072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders in Hugging Face format")
    parser.add_argument("--repeat", type=int, default=9, help="runs from the shell (default 9)")
    parser.add_argument("--check", type=int, default=50, help="of the points, how many are held against direct computation (default 50)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.model:
        shell, shell_cpu_s = time_shell(model, args.repeat)
        said = f"median {statistics.median(shell):.3f} s, {min(shell):.3f} to {max(shell):.3f} s ({shell_cpu_s:.3f} s of a processor)"
        print(f"{model.name}: from the shell, {args.repeat} runs: {said}")
        for workload in workloads(read_spec(model)):
            row = time_costs(read_spec(model), workload, check=args.check)
            rows.append(
                {
                    "model": model.name,
                    "shell_s": statistics.median(shell),
                    "shell_min_s": min(shell),
                    "shell_max_s": max(shell),
                    "shell_cpu_s": shell_cpu_s,
                    **row,
                }
            )
            print(
                f"  {workload.phase}: {row['loop_s'] * 1e3:.3f} ms each of {row['loop_count']:,} in a loop; "
                f"{POINTS:,} points in {row['points_s']:.2f} s ({row['points_cpu_s']:.2f} s of a processor, {row['computed']} computed directly), "
                f"{row['checked']} checked, {row['wrong']} wrong"
            )
    met = all(row["shell_s"] < SHELL_S and row["loop_s"] < LOOP_S and row["points_s"] < POINTS_S and not row["wrong"] for row in rows)
    print(json.dumps({"cores": os.cpu_count(), "points": POINTS, "met": met, "rows": rows}))


def time_shell(model: Path, repeat: int) -> tuple[list[float], float]:
    """Seconds of each run, and the mean processor time of one."""
    command = [sys.executable, "-m", "lighten.cli.main", "estimate", str(model)]
    found = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(repeat + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found[1:], (used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime) / (repeat + 1)


def workloads(spec: ModelSpec) -> list[Workload]:
    train = Workload(phase="train", optimizer="adamw")
    if spec.is_decoder:
        return [Workload(phase="prefill"), Workload(phase="generate", new_tokens=64), train]
    return [Workload(phase="encode"), train]


def time_costs(spec: ModelSpec, workload: Workload, *, check: int) -> dict[str, Any]:
    chance = random.Random(0)
    longest = (spec.max_positions or WITHOUT_POSITIONS) - workload.new_tokens
    batch = np.array([1, LARGEST_BATCH, *(chance.randint(1, LARGEST_BATCH) for _ in range(POINTS - 2))])
    length = np.array([1, longest, *(chance.randint(1, longest) for _ in range(POINTS - 2))])

    def exact(asked: Workload) -> dict[str, int]:
        return exact_costs(spec, asked)

    costs = Costs(exact, workload)
    start, start_cpu = time.perf_counter(), time.process_time()
    found = costs.at(batch, length)
    points_s, points_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    wrong = 0
    for index in chance.sample(range(POINTS), check):
        truth = exact(with_sizes(workload, "seq_len", (int(batch[index]), int(length[index]))))
        wrong += any(int(found[name][index]) != value for name, value in truth.items())
    again, count = Costs(exact, workload), 20_000
    sizes = list(zip(batch[:count].tolist(), length[:count].tolist(), strict=True))
    start = time.perf_counter()
    for size in sizes:
        again.point(*size)
    loop_s = (time.perf_counter() - start) / count
    timed = {"points_s": points_s, "points_cpu_s": points_cpu_s, "computed": costs.computed, "loop_s": loop_s, "loop_count": count}
    return {"phase": workload.phase, **timed, "checked": check, "wrong": wrong}


if __name__ == "__main__":
    main()
