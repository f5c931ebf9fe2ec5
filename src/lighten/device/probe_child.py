"""The child processes of the probe: `python -m lighten.device.probe_child TASK …` writes one JSON object into the file --out.

    engine     the micro-models of one engine, timed
    memory     a fresh process: import the runtime, run a tiny model, then load and run a large one
    bandwidth  what all threads together read and copy

A crash, a hang or an out-of-memory ends this process alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lighten.device.cases import CALL, CHAIN, EMPTY, HEADS, STACK, TINY, Case, all_cases, sizes
from lighten.device.clock import Timing, time_all
from lighten.device.environment import die_with_parent
from lighten.device.profile import BlockSample, Sample
from lighten.units import dtype_bytes

POINT_S = 0.006
"""Time given to each measured point and round; a short one is run often, a long one three times."""
BLOCK_S = 0.02
"""The same for a block: few, and all factors hang on them."""
PATIENCE_S = 2.5
"""Time beyond that to measure disturbed points again, and as much for disturbed blocks."""
BLOCKS = ("block", "decoder")
OVERHEADS = (EMPTY, CHAIN, CALL)
NET_FLOOR = 0.1
"""An operator keeps at least this share of its time when overheads are taken off: they are noisy too."""


def measure_engine(engine: str, threads: int, folder: Path, cases: Sequence[Case] | None = None) -> dict[str, Any]:
    """All micro-models of one engine, and the stored ones that the memory task loads."""
    from lighten.device.engines.bench import open_bench

    bench = open_bench(engine, threads)
    chosen = bench.cases(all_cases() if cases is None else list(cases))
    bench.prepare([*chosen, TINY, STACK])
    points = {(case, size): partial(bench.runner, case, size) for case in chosen for size in sizes(case)}
    whole = {point: runner for point, runner in points.items() if point[0].kind in BLOCKS}
    single = {point: runner for point, runner in points.items() if point not in whole}
    timings = time_all(single, threads=threads, budget_s=POINT_S, patience_s=PATIENCE_S)
    timings |= time_all(whole, threads=threads, budget_s=BLOCK_S, patience_s=PATIENCE_S)
    chain, call = timings[CHAIN, (1,)].seconds, timings[CALL, (1,)].seconds
    empty = min(timing.seconds for timing in timings.values())  # none can take less than the empty one, unless that was disturbed
    operator = max((chain - empty) / CHAIN.shape[1], 1e-8)
    samples: list[tuple[Sample, bool]] = []
    blocks: list[BlockSample] = []
    for (case, size), timing in timings.items():
        if case.kind in BLOCKS:
            blocks.append(_block(case, size, timing))
        elif case.kind == "cold":
            seconds = timing.seconds / case.shape[2]
            samples.append((_sample(case, size, max(seconds - operator, NET_FLOOR * seconds)), timing.calm))
        elif case.kind == "fresh":
            filled = timings[Case("filled"), size]
            samples.append((_fresh(size[0], bench.precision, timing, filled), timing.calm and filled.calm))
        elif case not in OVERHEADS and case.kind != "filled":
            samples.append((_sample(case, size, max(timing.seconds - empty - operator, NET_FLOOR * timing.seconds)), timing.calm))
    found = {
        "name": engine, "version": bench.version, "precision": bench.precision, "call_overhead_s": call, "operator_overhead_s": operator,
        "disturbed_ratio": sum(not timing.calm for timing in timings.values()) / len(timings),
        "samples": [asdict(each) for each in _believable(samples)], "blocks": [asdict(each) for each in blocks],
    }  # fmt: skip
    return found | {"tiny": str(bench.store(TINY, folder)[0]), "large": [str(part) for part in bench.store(STACK, folder)]}


def _believable(samples: Sequence[tuple[Sample, bool]]) -> list[Sample]:
    """Without the disturbed ones that took as long as an undisturbed one of the same operator with more rows, which cannot be.

    The others stay: their time without the waiting is nearer to the truth than what other numbers of rows let expect, which was up to 1.4 times off.
    """
    calm: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
    for sample, undisturbed in samples:
        if undisturbed:
            calm.setdefault((sample.kind, sample.shape), []).append(sample)

    def contradicted(sample: Sample) -> bool:
        return any(more.rows >= sample.rows and more.seconds <= sample.seconds for more in calm.get((sample.kind, sample.shape), []))

    return [sample for sample, undisturbed in samples if undisturbed or not contradicted(sample)]


def _sample(case: Case, size: tuple[int, ...], seconds: float) -> Sample:
    if case.kind == "attention":
        return Sample(kind="attention", rows=size[0] * HEADS, shape=(*size[1:], case.shape[0]), seconds=seconds)
    if case.kind in ("linear", "cold"):
        return Sample(kind=case.kind, rows=size[0], shape=case.shape[:2], seconds=seconds)
    return Sample(kind=case.kind, rows=size[0] * case.shape[0], shape=(), seconds=seconds)


def _block(case: Case, size: tuple[int, ...], timing: Timing) -> BlockSample:
    hidden, heads, *key_value_heads, inner, layers = case.shape
    return BlockSample(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner, layers=layers,
        batch_size=size[0], seq_len=size[1], seconds=timing.seconds, calm=timing.calm, num_key_value_heads=next(iter(key_value_heads), None),
    )  # fmt: skip


def _fresh(elements: int, precision: str, timing: Timing, filled: Timing) -> Sample:
    """What a tensor costs by being new, at least a hundredth of writing it."""
    seconds = max(timing.seconds - filled.seconds, 0.01 * filled.seconds)
    return Sample(kind="fresh", rows=round(elements * dtype_bytes(precision)), shape=(), seconds=seconds)


def measure_memory(engine: str, threads: int, tiny: Path, large: Path, large_bytes: int) -> dict[str, Any]:
    """Peak resident memory, import and load seconds. Only this process's own imports count, so nothing else is imported before."""
    from lighten.device.engines.bench import open_loader

    start = time.perf_counter()
    load = open_loader(engine)
    import_s = time.perf_counter() - start
    load(engine, tiny, threads)()
    base = peak_resident_bytes()
    start = time.perf_counter()
    run = load(engine, large, threads)
    run()
    load_s = time.perf_counter() - start
    run()
    peak = peak_resident_bytes()
    copies = None if peak is None or base is None else (peak - base) / large_bytes
    return {"base_memory_bytes": base, "weight_copies": copies, "import_s": import_s, "load_s": load_s, "loaded_bytes": large_bytes}


def peak_resident_bytes() -> int | None:
    """This process's highest resident memory so far. Linux's own figure where there is one: `getrusage` may inherit the parent's there."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
        import sys
    except ImportError:
        return None  # Windows: not known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lighten.device.probe_child", description=__doc__)
    parser.add_argument("task", choices=("engine", "memory", "bandwidth"))
    parser.add_argument("--engine", default="")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", type=Path)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--large-bytes", type=int, default=0)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    if args.task == "engine":
        found: Any = measure_engine(args.engine, args.threads, args.out.parent)
    elif args.task == "memory":
        found = measure_memory(args.engine, args.threads, args.tiny, args.large, args.large_bytes)
    else:
        from lighten.device.bandwidth import measure_bandwidth

        found = [asdict(each) for each in measure_bandwidth(args.threads)]
    args.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
