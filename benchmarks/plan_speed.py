"""How fast is the search over plans: enumeration, time and memory of at least a million plans of a large model on many devices.

    python benchmarks/plan_speed.py --model llama-405b --device h100-sxm:16384 --batch-size 2048 --seq-len 8192

MODEL is a folder with a config.json. A batch gives some hundred thousand plans; larger and smaller batches follow until `--plans` were evaluated.
The first batch measures the model's blocks, the others find that kept with the spec. Both clocks are told, the wall's and the process's own, which
other processes do not slow down. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from itertools import pairwise

from lighten.cost.workload import Workload
from lighten.device.catalog import parse_devices
from lighten.errors import WorkloadError
from lighten.model import ModelSpec, read_spec
from lighten.parallel.columns import all_plans
from lighten.parallel.footprint import plan_bytes
from lighten.parallel.search import Asked, plan_seconds, search_plans
from lighten.parallel.step_time import Stack

PARTS = ("enumerate", "time", "memory")


def batches(first: int) -> Iterator[int]:
    """A batch, then its doubles and halves in turn."""
    yield first
    for power in range(1, 12):
        yield first * 2**power
        if first % 2**power == 0:
            yield first // 2**power


def evaluate(spec: ModelSpec, device: str, workload: Workload) -> tuple[int, int, dict[str, float]]:
    """Plans, how many fit, and seconds of each part."""
    place, count = parse_devices(device)
    marks = [time.perf_counter()]
    columns = all_plans(spec, workload, place, count)
    marks.append(time.perf_counter())
    plan_seconds(columns, spec, workload, place, Stack())
    marks.append(time.perf_counter())
    needed = plan_bytes(columns, spec, workload)
    marks.append(time.perf_counter())
    fitting = int((needed <= 0.9 * (place.memory_bytes or 0)).sum())
    return len(columns), fitting, dict(zip(PARTS, (b - a for a, b in pairwise(marks)), strict=True))


def question(spec: ModelSpec, arguments: argparse.Namespace, workload: Workload) -> Asked:
    place, count = parse_devices(arguments.device)
    return Asked(spec=spec, workload=workload, device=place, count=count, fixed={})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="h100-sxm:16384")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--plans", type=int, default=1_000_000, help="to evaluate at least")
    arguments = parser.parse_args()
    total, fit, spent, spec = 0, 0, dict.fromkeys(PARTS, 0.0), read_spec(arguments.model)
    own = time.process_time()
    print(f"{'batch':>8} {'plans':>10} {'fit':>10} {'enumerate':>10} {'time':>8} {'memory':>8}   seconds")
    for batch in batches(arguments.batch_size):
        if total >= arguments.plans:
            break
        workload = training(batch, arguments.seq_len)
        try:
            plans, fitting, seconds = evaluate(spec, arguments.device, workload)
        except WorkloadError:
            continue
        total, fit = total + plans, fit + fitting
        spent = {part: spent[part] + seconds[part] for part in PARTS}
        print(f"{batch:>8} {plans:>10,} {fitting:>10,} {seconds['enumerate']:>10.2f} {seconds['time']:>8.2f} {seconds['memory']:>8.2f}")
    whole, own = sum(spent.values()), time.process_time() - own
    started = time.perf_counter()
    best = search_plans(question(read_spec(arguments.model), arguments, training(arguments.batch_size, arguments.seq_len)))
    search = time.perf_counter() - started
    print(f"{total:,} plans in {whole:.2f} s: {total / whole:,.0f} a second, one thread; {1e6 * whole / total:.2f} s a million")
    print(f"of the process's own time: {own:.2f} s, {1e6 * own / total:.2f} s a million")
    print(f"the whole search of the first batch, best plans replayed: {search:.2f} s for {best.searched:,} plans")
    figures = {
        "plans": total, "fitting": fit, "seconds": whole, "plans_per_s": total / whole, "seconds_per_million": 1e6 * whole / total,
        "cpu_s": own, "cpu_s_per_million": 1e6 * own / total, "parts": spent, "search_s": search, "searched": best.searched,
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(figures))


def training(batch: int, seq_len: int) -> Workload:
    return Workload(phase="train", batch_size=batch, seq_len=seq_len, dtype="bfloat16", optimizer="adamw", master_weights=True, attention="flash")


if __name__ == "__main__":
    main()
