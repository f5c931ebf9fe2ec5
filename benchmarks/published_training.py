"""Published training steps against the tool: time, memory of the fullest device, and whether it fits.

    python benchmarks/published_training.py --rows FILE… [--leave-one-out]

`grade_training` gives one `Grade` for each thing that a row publishes; benchmarks/published.py shows them with those of inference. With
`--leave-one-out` the constants are fitted again without each source in turn, so that no row is predicted by what was fitted to it. The last
line is one JSON object: of each kind the median and 90th percentile of |predicted / published - 1|, of `fits` the share that is right, and
the share of figures that lie in their 90 % range.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from published_rows import Grade, LeftOut, NotGradable, Row, TrainingCase, number, read_rows, step_seconds, training_case

from lighten.device.datasheet import RANGE_90
from lighten.errors import LightenError
from lighten.parallel.memory import rank_memory
from lighten.parallel.step_time import Stack, TrainingRates, load_training_rates, step_time

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

GIB, GB = 2**30, 10**9
CONTEXT_BYTES = 0.8 * GIB
"""What CUDA's context, its libraries and NCCL's buffers take of a device beside a process's tensors: 0.5 to 1.2 GiB from an A100 to a B200."""
SLACK = 1.08
"""What the caching allocator reserves beside what is allocated: blocks that are cached and pieces that fit nothing."""
MEMORY_SPREAD = 0.22
"""Standard deviation of log(predicted / published) of peaks; held to the range's coverage in benchmarks/LOG.md."""
UNSAID_SPREAD = 0.25
"""What a peak's spread has more where the row does not say what is recomputed, or its batch."""
USABLE = 0.985
"""Share of a device's memory that a process can get: the driver, ECC's tables and page tables keep the rest."""


def grade_training(rows: Sequence[Row], *, file: str = "", rates: TrainingRates | None = None, fitted: Sequence[str] | None = None) -> list[Grade]:
    """The grades of rows with the columns of training.csv.

    Args:
        rates: the constants; None: those that are kept.
        fitted: the sources that these were fitted on; None: all that the constants name.
    """
    rates = rates or load_training_rates()
    known = set(fitted) if fitted is not None else {source.rpartition(":")[0] for source in rates.sources}
    return [grade for row in rows for grade in _grades(row, file, rates, known)]


def _grades(row: Row, file: str, rates: TrainingRates, known: set[str]) -> Iterator[Grade]:
    about: dict[str, Any] = {
        "id": row.get("id", ""), "file": file, "source": row.get("source_repo_or_doc") or "not said", "framework": row.get("framework", ""),
        "device": row.get("hardware", ""), "parallelism": parallelism(row), "fitted": (row.get("source_repo_or_doc") or "not said") in known,
    }  # fmt: skip
    kinds: tuple[tuple[str, bool, Callable[..., dict[str, Any]]], ...] = (
        ("training_time", row.get("measured", "measured") == "measured" and _has_time(row), _time),
        ("training_memory", bool(row.get("peak_mem_gb")), _memory),
        ("fits", bool(row.get("gpu_mem_gb")), _fits),
    )
    for kind, asked, grade in kinds:
        if asked:
            try:
                yield Grade(kind=kind, **about, **grade(row, training_case(row), rates))
            except (LeftOut, LightenError) as error:
                yield Grade(kind=kind, **about, left_out=str(error).splitlines()[0])
            except (ValueError, ZeroDivisionError, KeyError, OverflowError, ArithmeticError, TypeError, AttributeError, IndexError) as error:
                yield Grade(kind=kind, **about, left_out=f"a row that could not be read: {type(error).__name__}: {error}")  # never the run


TIMES = ("step_time_s", "tokens_per_s_per_gpu", "tokens_per_s", "samples_per_s", "tflops_per_gpu", "mfu_pct", "hfu_pct")


def _has_time(row: Row) -> bool:
    return any(row.get(name) for name in TIMES)


def parallelism(row: Row) -> str:
    """What a row's work is spread by, such as `tp8 pp12 dp4 zero1`."""
    sizes = [f"{name}{row[name]}" for name in ("tp", "pp", "cp", "ep", "dp") if row.get(name) not in (None, "", "1")]
    stage = row.get("zero_stage") or ""
    return " ".join([*sizes, *([f"zero{stage}"] if stage not in ("", "0") else [])]) or "one device or not said"


def _time(row: Row, case: TrainingCase, rates: TrainingRates) -> dict[str, Any]:
    truth, unsaid = step_seconds(row, case)
    if truth <= 0:
        raise NotGradable("the published time is 0")
    stack = Stack(software=case.software, linear_dtype=case.linear_dtype)  # type: ignore[arg-type]
    found = step_time(case.spec, case.workload, case.plan, case.device, stack=stack, rates=rates, unsaid=(*case.unsaid, *unsaid))
    return {"predicted": found.seconds, "low": found.low, "high": found.high, "truth": truth}


# ---- memory ----


def _memory(row: Row, case: TrainingCase, rates: TrainingRates) -> dict[str, Any]:
    unit = GIB if row.get("mem_unit") == "GiB" else GB
    truth = (number(row, "peak_mem_gb") or 0) * unit
    if truth <= 0:
        raise NotGradable("the published peak is 0")
    predicted = device_bytes(row, case)
    spread = math.hypot(MEMORY_SPREAD, UNSAID_SPREAD * bool({"recompute", "batch", "length", "shape"} & set(case.unsaid)))
    factor = math.exp(RANGE_90 * spread)
    return {"predicted": predicted, "low": predicted / factor, "high": predicted * factor, "truth": truth}


def device_bytes(row: Row, case: TrainingCase) -> float:
    """Bytes of the fullest device, as the row's kind of figure counts them: tensors alone, or all that the process holds."""
    if row.get("cpu_offload") == "True":
        raise NotGradable("weights and optimizer are offloaded to the host")
    tensors_alone = re.search("torch|active", row.get("mem_kind") or "")
    return _peak(row, case) if tensors_alone else _peak(row, case) * SLACK + CONTEXT_BYTES


def _peak(row: Row, case: TrainingCase) -> float:
    workload, plan = case.workload, case.plan
    if workload.recompute == "selective":
        workload = replace(workload, attention="flash")  # what selective recomputation keeps of attention is what one kernel keeps
    if case.software == "compiled" or case.chunked_loss:
        workload = replace(workload, cross_entropy="chunked")  # a loss that keeps no float32 copy of all logits
    if (row.get("optimizer") or "").startswith("Paged"):
        plan = replace(plan, offload="optimizer")
    found = rank_memory(case.spec, workload, plan)
    # Megatron-LM adds bfloat16's gradients up in float32: as many bytes again. Source: `--accumulate-allreduce-grads-in-fp32`
    wide = workload.master_weights and workload.dtype == "bfloat16" and case.software == "fused" and plan.shard != "zero3"
    return float(found.peak + found.gradients * wide)


def _fits(row: Row, case: TrainingCase, rates: TrainingRates) -> dict[str, Any]:
    """Whether it fits: the least that the row's open questions leave room for, against what a process can get of the device."""
    if row.get("cpu_offload") == "True":
        raise NotGradable("weights and optimizer are offloaded to the host")
    capacity = (number(row, "gpu_mem_gb") or 0) * GIB * USABLE
    needed = min(_peaks(row, _least(case))) * SLACK + CONTEXT_BYTES
    needed /= math.exp(MEMORY_SPREAD * (1.0 if MATTERS & set(case.unsaid) else 0.5))
    return {"predicted": float(needed <= capacity), "truth": float(row.get("measured", "measured") == "measured")}


MATTERS = {"recompute", "batch", "plan", "length", "shape", "precision"}
"""What a row may leave out that memory depends on."""


def _peaks(row: Row, case: TrainingCase) -> Iterator[float]:
    """Peaks under the row's plan, or under each of several that it leaves open: all data parallel, or with tensor parallelism beside it."""
    yield _peak(row, case)
    if "plan" in case.unsaid and case.workload.lora_rank is None:
        for tp in (4, 8, 16):
            if case.plan.dp % tp == 0 and case.workload.batch_size % (case.plan.dp // tp) == 0:
                plan = replace(case.plan, dp=case.plan.dp // tp, tp=tp, sequence_parallel=True, ep=1)
                try:
                    yield _peak(row, replace(case, plan=plan))
                except LightenError:
                    continue  # heads or experts that it does not divide


def _least(case: TrainingCase) -> TrainingCase:
    """The case with each open question answered by what needs least: all recomputed, one sequence at once."""
    workload, plan = case.workload, case.plan
    if "recompute" in case.unsaid and workload.lora_rank is None:
        workload = replace(workload, recompute="full")
    if {"batch", "plan"} & set(case.unsaid):
        plan = replace(plan, micro_batch_size=1)
    return replace(case, workload=workload, plan=plan)


# ---- left out ----


def grade_left_out(rows: Sequence[Row], *, file: str = "") -> list[Grade]:
    """Grades of time by constants that were fitted from the prior on, without the row's source; the width of the range is the kept one."""
    from fit_training import cases_of, fit, rates_at

    cases, _ = cases_of(rows)
    kept = load_training_rates()
    grades: list[Grade] = []
    for source in sorted({case.source for case in cases}):
        rates = replace(rates_at(fit([case for case in cases if case.source != source])), spread=kept.spread)
        own = [row for row in rows if (row.get("source_repo_or_doc") or "not said") == source]
        grades += [grade for grade in grade_training(own, file=file, rates=rates, fitted=()) if grade.kind == "training_time"]
    return grades


# ---- the figures ----


def figures(grades: Sequence[Grade]) -> dict[str, Any]:
    """Errors by kind, the share of right answers of `fits`, and how often the range held the truth."""
    found: dict[str, Any] = {}
    for kind in ("training_time", "training_memory"):
        off = [abs(g.predicted / g.truth - 1) for g in grades if g.kind == kind and g.predicted is not None and g.truth]
        if off:
            found[kind] = {"median_error": round(float(np.median(off)), 4), "p90_error": round(float(np.quantile(off, 0.9)), 4), "n": len(off)}
    answers = [g.predicted == g.truth for g in grades if g.kind == "fits" and not g.left_out]
    if answers:
        found["fits"] = {"accuracy": round(sum(answers) / len(answers), 4), "n": len(answers)}
    ranged = [g for g in grades if g.low is not None and g.high is not None and g.truth is not None]
    inside = [g.low <= g.truth <= g.high for g in ranged if g.low is not None and g.high is not None and g.truth is not None]
    found["all"] = {"range_coverage": round(sum(inside) / len(inside), 4) if inside else None, "n": len(inside)}
    return found


def show(title: str, grades: Sequence[Grade]) -> None:
    print(f"\n{title}")
    groups: defaultdict[tuple[str, str], list[Grade]] = defaultdict(list)
    for grade in grades:
        if not grade.left_out:
            groups[grade.kind, grade.source].append(grade)
    for (kind, source), own in sorted(groups.items()):
        if kind == "fits":
            wrong = [g.id for g in own if g.predicted != g.truth]
            print(f"  {kind:16s} {source[:45]:45s} {len(own):4d} rows, wrong: {len(wrong)} {' '.join(wrong[:12])}")
            continue
        logs = [math.log(g.predicted / g.truth) for g in own if g.predicted and g.truth]
        held = sum(g.low <= g.truth <= g.high for g in own if g.low is not None and g.high is not None and g.truth is not None) / len(own)
        off = np.abs(np.expm1(logs))
        ends = f"p90 {np.quantile(off, 0.9):6.1%}  bias {np.median(logs):+.2f}  in range {held:4.0%}"
        print(f"  {kind:16s} {source[:45]:45s} {len(own):4d} rows  median {np.median(off):6.1%}  {ends}")
    for reason, count in Counter(f"{g.kind}: {g.left_out[:110]}" for g in grades if g.left_out).most_common():
        print(f"  not gradable {count:4d}: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="files with the columns of training.csv")
    parser.add_argument("--leave-one-out", action="store_true", help="fit again without each source; some minutes")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for path in given.rows:
        try:
            rows = read_rows(path)
        except (LeftOut, OSError, UnicodeDecodeError) as error:
            print(f"published_training: {error}", file=sys.stderr)
            return 2
        grades = grade_training(rows, file=path.name)
        show(path.name, grades)
        found = figures(grades)
        if given.leave_one_out:
            apart = grade_left_out(rows, file=path.name)
            show(f"{path.name}, each source predicted without it", apart)
            found["source_left_out"] = figures(apart)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
