"""Fit the constants of `lighten.device.datasheet` to published rows of inference, one set for each kind of software.

    python scripts/fit_inference.py --rows inference.csv --write

A constant is a physical quantity (share of a peak, seconds of a launch) with a prior around what kernels measured alone give; it moves away from
that only as far as rows ask for it. Errors are of log speed, with a robust loss; a source's rows weigh together as the root of their number, so
that a long table does not decide alone. Every source in turn is left out, the rest is fitted, and the errors of the rows that were left out
give the spread that ranges are made of. The same with devices. Writes rates_known/KIND.json with what it was fitted to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from published_inference import KINDS, InferenceCase, Kind, grade_inference, inference_case, limits_of, work_of
from published_rows import Grade, Row, read_rows

from lighten.device.datasheet import (
    CLASS_BITS,
    MOST_YEARS,
    OVER_DEVICES,
    RANGE_90,
    Limits,
    Rates,
    device_class,
    is_weight_only,
    load_rates,
    matrices_of,
    rates_from,
    rows_of_matrix,
    scores_of,
    weight_bits,
)
from lighten.parallel.device_pass import exchange_terms, is_narrow
from lighten.parallel.serving import STACKS, Work

Array = NDArray[np.float64]
RATES = Path(__file__).resolve().parents[1] / "src" / "lighten" / "device" / "rates_known"
TYPE_CLASSES = tuple(CLASS_BITS)
DEVICE_CLASSES = ("stacked", "graphics", "unified", "host", "npu", "tpu", "fpga", "asic")
OPS = ("linear", "attention", "other")
ROW_SPREAD = 0.12
"""Standard deviation of log speed that one row is taken to be uncertain by: what two measurements of one thing by different people differ by."""
SHARES = (
    "bit32", "bit16", "bit8", "bit4", "attention_share", "vector_share", "bandwidth_share", "cache_share", "link_share", "weight_only_compute",
    "pointwise", "weight_only_4", "weight_only_8",
)  # fmt: skip
"""Constants that are shares: kept below `MOST_SHARE`."""
MOST_SHARE = 1.0


@dataclass(frozen=True)
class Prior:
    """Where a constant is taken to lie before any row is seen, and how far a factor of e is from that in standard deviations."""

    value: float
    sd: float


PRIORS: dict[str, Prior] = {
    "bit32": Prior(0.75, 0.3), "bit16": Prior(0.75, 0.3), "bit8": Prior(0.65, 0.3), "bit4": Prior(0.5, 0.4),
    "attention_share": Prior(0.45, 0.5), "vector_share": Prior(0.5, 0.4), "score_bytes": Prior(0.3, 1.0),
    "bandwidth_share": Prior(0.8, 0.15), "cache_share": Prior(0.65, 0.4),
    "weight_only_4": Prior(0.8, 0.3), "weight_only_8": Prior(0.9, 0.3), "weight_only_compute": Prior(0.7, 0.4),
    "operator_s": Prior(4e-6, 0.5), "pointwise": Prior(0.4, 0.5), "pass_s": Prior(3e-4, 0.7), "recorded_s": Prior(5e-4, 1.0),
    "experts_share": Prior(0.6, 0.3), "sequence_s": Prior(1e-6, 1.5),
    "progress": Prior(1.2, 0.1),
    "collective_s": Prior(1e-5, 0.7), "far_collective_s": Prior(4e-5, 0.7), "hop_s": Prior(5e-5, 1.0), "link_share": Prior(0.7, 0.3),
}  # fmt: skip
"""Source of the values: kernels measured alone (aiconfigurator-core 0.12.0, NVIDIA, Apache-2.0, systems/data: gemm_perf, attention, nccl_perf)."""
STACK_PRIORS: dict[str, dict[str, Prior]] = {
    "eager": {
        "operator_s": Prior(1.2e-5, 0.5),
        "pointwise": Prior(0.95, 0.1),
        "score_bytes": Prior(8.0, 0.7),
        "pass_s": Prior(1e-3, 1.0),
        "weight_only_4": Prior(0.5, 0.7),
        "weight_only_8": Prior(0.4, 0.7),
    },
    "ggml": {"bit8": Prior(0.45, 0.4), "weight_only_compute": Prior(0.8, 0.2), "pointwise": Prior(0.7, 0.3), "score_bytes": Prior(16.0, 0.5)},
}
BY_CLASS = ("compute", "bandwidth", "latency", "score", "link")
DEVIATIONS = {"compute": 0.25, "bandwidth": 0.25, "latency": 0.5, "score": 1.0, "link": 0.4}
"""What may differ between classes of device, and how far, in standard deviations of its log."""
COMPILED_FOR = ("npu", "tpu", "fpga", "asic")
YOUNGER = 0.75
"""What accelerators that are no GPUs are taken to reach of what GPUs do before any row is seen: their kernels come from compilers, not from hands."""
UNFUSED_BYTES = 9.0
"""Bytes that a score moves there at least: compilers write scores out, as software without a kernel for attention does."""
LATENCIES = ("operator_s", "pass_s", "recorded_s", "collective_s", "far_collective_s", "hop_s")
YEAR = 2025.0
"""Of the software that the constants are of; rows whose software names no year are taken to be of it."""
FIXED = {"half_rows": 45.0, "half_columns": 90.0, "half_outputs": 90.0, "sharpness": 4.0}
"""Shape of the efficiency of products, as kernels measured alone show it."""


# ---- rows as arrays ----


@dataclass
class Columns:
    """Lists that grow by row and become arrays."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, **one: float) -> None:
        for name, value in one.items():
            self.values[name].append(value)

    def arrays(self) -> dict[str, Array]:
        return {name: np.array(values, dtype=float) for name, values in self.values.items()}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One figure that is predicted."""

    case: InferenceCase
    kind: Kind
    truth: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """The operators of all samples of one kind of software, and what else each sample costs."""

    samples: tuple[Sample, ...]
    ops: Mapping[str, Array]
    rows: Mapping[str, Array]

    @property
    def truth(self) -> Array:
        return np.array([sample.truth for sample in self.samples])


def table_of(samples: Sequence[Sample]) -> Table:
    ops, rows = Columns(), Columns()
    kept: list[Sample] = []
    for sample in samples:
        with suppress(Exception):  # the grader counts rows that cannot be read, with their reasons; here they are left out
            work, limits = work_of(sample.case, sample.kind), limits_of(sample.case, sample.kind)
            _add(len(kept), sample.case, work, limits, ops, rows)
            kept.append(sample)
    return Table(samples=tuple(kept), ops=ops.arrays(), rows=rows.arrays())


def _add(row: int, case: InferenceCase, work: Work, limits: tuple[Limits, Limits], ops: Columns, rows: Columns) -> None:
    cost = dict.fromkeys(("passes", "steps", "sequences", "hops", "hop_wire", "near", "near_wire", "far", "far_wire"), 0.0)
    for count, one in work.passes:
        cost["passes"] += count * (not one.recorded)
        cost["steps"] += count * one.recorded
        cost["sequences"] += count * one.sequences
        if work.pp > 1:
            cost["hops"] += count * (work.pp - 1)
            cost["hop_wire"] += count * (work.pp - 1) * one.boundary_bytes / case.device.link(one.tp * work.pp).bytes_per_s
        for exchange in one.collectives:
            for name, value in exchange_terms(exchange, one.tp, case.device).items():
                cost[name] += count * exchange.count * value
    years = max(-MOST_YEARS, min(MOST_YEARS / 2, case.year - YEAR)) if case.year else 0.0
    for count, one in work.passes:
        for op, times in one.ops:
            bound_by = limits[is_narrow(op)]
            linear = op.kind == "linear"
            if linear and not op.rows:
                continue
            ops.add(
                row=row, years=years, count=count * times, sort=OPS.index(op.kind) if op.kind in OPS else 2,
                flops=op.matmul_flops if linear else op.causal_flops, weight=op.weight_bytes, moved=op.activation_bytes,
                m=rows_of_matrix(op) if linear else 1.0, matrices=matrices_of(op) if linear else 1.0, k=op.columns or 1.0, n=op.outputs or 1.0,
                peak=bound_by.product_flops_per_s if linear else bound_by.attention_flops_per_s, bandwidth=bound_by.bytes_per_s,
                vector=bound_by.vector_flops_per_s, scores=0.0 if linear or case.flash else scores_of(op),
                type=TYPE_CLASSES.index(bound_by.type_class), expanded=float(linear and is_weight_only(op.weight, bound_by.type_class)),
                bits=float(weight_bits(op.weight) or 16), place=DEVICE_CLASSES.index(device_class(case.device)),
            )  # fmt: skip
    rows.add(tokens=work.tokens, place=DEVICE_CLASSES.index(device_class(case.device)), **cost)


# ---- the model on arrays ----


def names_of(stack: str, table: Table) -> list[str]:
    """The constants that this software's rows say something of."""
    classes = sorted({int(place) for place in table.rows["place"]})
    return [*PRIORS, *(f"{what}@{DEVICE_CLASSES[place]}" for place in classes if len(classes) > 1 for what in BY_CLASS)]


def prior_of(stack: str, name: str) -> Prior:
    if "@" in name:
        what, _, place = name.partition("@")
        if place in COMPILED_FOR and what == "score":
            return Prior(max(1.0, UNFUSED_BYTES / prior_of(stack, "score_bytes").value), DEVIATIONS[what])
        return Prior(YOUNGER if place in COMPILED_FOR and what in ("compute", "bandwidth", "link") else 1.0, DEVIATIONS[what])
    return STACK_PRIORS.get(stack, {}).get(name) or PRIORS[name]


def seconds_of(table: Table, names: Sequence[str], theta: Array) -> Array:
    """Seconds of each sample."""
    value = dict(zip(names, np.exp(theta), strict=True))
    ops, rows = table.ops, table.rows
    own = {what: np.array([value.get(f"{what}@{name}", 1.0) for name in DEVICE_CLASSES]) for what in BY_CLASS}
    place = ops["place"].astype(int)
    linear, attention = ops["sort"] == 0, ops["sort"] == 1
    compute_share = np.minimum(np.array([value[name] for name in TYPE_CLASSES])[ops["type"].astype(int)] * own["compute"][place], MOST_SHARE)
    compute_share = np.where(ops["matrices"] > 1, compute_share * value["experts_share"], compute_share)
    expanded = ops["expanded"] > 0
    compute_share = np.where(expanded, compute_share * value["weight_only_compute"], compute_share)
    compute_share = np.where(attention, np.minimum(value["attention_share"] * own["compute"][place], MOST_SHARE), compute_share)
    compute_share = np.minimum(compute_share * value["progress"] ** ops["years"], MOST_SHARE)
    sizes = (1 + FIXED["half_rows"] / ops["m"]) * (1 + FIXED["half_columns"] / ops["k"]) * (1 + FIXED["half_outputs"] / ops["n"])
    compute = ops["flops"] / (ops["peak"] * compute_share) * np.where(linear, sizes, 1.0) * (linear | attention)
    vector = ops["flops"] / np.maximum(
        ops["vector"] * np.minimum(value["vector_share"] * own["compute"][place] * value["progress"] ** ops["years"], MOST_SHARE), 1e-9
    )
    compute = np.where(linear & (ops["vector"] > 0), np.minimum(compute, vector), compute)
    read = np.where(expanded, np.where(ops["bits"] < 6, value["weight_only_4"], value["weight_only_8"]), 1.0)
    share = np.where(attention, value["cache_share"], value["bandwidth_share"])
    memory = (ops["weight"] / read + ops["moved"]) / (ops["bandwidth"] * np.minimum(own["bandwidth"][place] * share, MOST_SHARE))
    scores = np.where(attention, ops["scores"] * value["score_bytes"] * own["score"][place], 0.0)
    memory = memory + scores / (ops["bandwidth"] * np.minimum(own["bandwidth"][place] * value["bandwidth_share"], MOST_SHARE))
    p = FIXED["sharpness"]
    roofline = (compute**p + memory**p) ** (1 / p) + value["operator_s"] * own["latency"][place]
    each = np.where(linear | attention, roofline, roofline * value["pointwise"])
    total = np.bincount(ops["row"].astype(int), weights=ops["count"] * each, minlength=len(table.samples))
    where = rows["place"].astype(int)
    wire = (rows["near_wire"] + rows["far_wire"] + rows["hop_wire"]) / np.minimum(value["link_share"] * own["link"][where], MOST_SHARE)
    latency = rows["near"] * value["collective_s"] + rows["far"] * value["far_collective_s"] + rows["hops"] * value["hop_s"]
    latency = latency + rows["passes"] * value["pass_s"] + rows["steps"] * value["recorded_s"]
    return np.asarray(total + wire + latency * own["latency"][where] + rows["sequences"] * value["sequence_s"])


def log_error(table: Table, names: Sequence[str], theta: Array) -> Array:
    """Log of predicted over published speed."""
    return np.asarray(np.log(table.rows["tokens"] / seconds_of(table, names, theta) / table.truth))


def possible(table: Table) -> Array:
    """Samples that are no faster than the device's figures allow: every weight read once at full bandwidth, every product at full rate."""
    ops = table.ops
    busy = np.maximum(ops["flops"] * (ops["sort"] == 0) / ops["peak"], ops["weight"] / ops["bandwidth"])
    least = np.bincount(ops["row"].astype(int), weights=ops["count"] * busy, minlength=len(table.samples))
    return np.asarray(table.truth <= table.rows["tokens"] / least)


def weights_of(table: Table, use: Array) -> Array:
    """Weight of each sample: those of one source and kind together as the root of their number."""
    count: dict[tuple[str, str], int] = defaultdict(int)
    keys = [(sample.case.source, sample.kind) for sample in table.samples]
    for key, used in zip(keys, use, strict=True):
        count[key] += bool(used)
    return np.array([1 / math.sqrt(count[key]) if used else 0.0 for key, used in zip(keys, use, strict=True)])


def fit(table: Table, stack: str, use: Array, start: Array | None = None) -> tuple[list[str], Array]:
    """The constants that fit the samples in `use` best, under their priors: Gauss-Newton with damping, and Huber's weights."""
    names = names_of(stack, table)
    priors = [prior_of(stack, name) for name in names]
    center, sd = np.log([prior.value for prior in priors]), np.array([prior.sd for prior in priors])
    ceiling = np.log([MOST_SHARE if name in SHARES else 1e9 for name in names])
    weight = np.sqrt(weights_of(table, use * possible(table))) / ROW_SPREAD
    theta = np.minimum(center if start is None else start, ceiling)

    def residuals(at: Array) -> Array:
        error = log_error(table, names, at) * weight
        robust = np.sign(error) * np.sqrt(2 * huber(np.abs(error), weight))
        return np.concatenate([robust, (at - center) / sd])

    now, damping = residuals(theta), 1e-2
    for _ in range(40):
        jacobian = np.stack([(residuals(theta + 1e-4 * unit) - now) / 1e-4 for unit in np.eye(len(theta))], 1)
        step = np.linalg.solve(jacobian.T @ jacobian + damping * np.eye(len(theta)), -jacobian.T @ now)
        tried = np.minimum(theta + np.clip(step, -0.5, 0.5), ceiling)
        after = residuals(tried)
        if after @ after < now @ now:
            done = now @ now - after @ after < 1e-4 * (now @ now)
            theta, now, damping = tried, after, damping / 3
            if done:
                break
        else:
            damping *= 5
            if damping > 1e6:
                break
    return names, theta


def huber(error: Array, weight: Array) -> Array:
    """Huber's loss: square up to one row's spread, then straight."""
    knee = 1.0 * np.maximum(weight * ROW_SPREAD, 1e-12)
    return np.where(error <= knee, 0.5 * error**2, knee * (error - 0.5 * knee))


# ---- left out in turn ----


def left_out_errors(table: Table, stack: str, key: Callable[[Sample], str]) -> Array:
    """Log errors of each sample, by constants fitted without all samples of the same key."""
    keys = [key(sample) for sample in table.samples]
    names, whole = fit(table, stack, np.ones(len(keys)))
    errors = np.zeros(len(keys))
    for one in sorted(set(keys)):
        out = np.array([each == one for each in keys])
        _, theta = fit(table, stack, (~out).astype(float), start=whole)
        errors[out] = log_error(table, names, theta)[out]
    return errors


def rates_of(stack: str, names: Sequence[str], theta: Array) -> Rates:
    """The constants as the package reads them."""
    return rates_from({"name": stack, **document_of(stack, names, theta)})


def document_of(stack: str, names: Sequence[str], theta: Array) -> dict[str, Any]:
    value = {name: float(f"{one:.4g}") for name, one in zip(names, np.exp(theta), strict=True)}
    shares = {name: value[name] for name in TYPE_CLASSES}
    plain = [name for name in PRIORS if name not in (*TYPE_CLASSES, "weight_only_4", "weight_only_8", "progress")]
    by_class: dict[str, dict[str, Any]] = {}
    for place in DEVICE_CLASSES:
        own = {what: value.get(f"{what}@{place}") for what in BY_CLASS}
        if place in COMPILED_FOR and own["compute"] is None:  # no row of one: what is taken for granted of them
            own = {what: prior_of(stack, f"{what}@{place}").value for what in BY_CLASS}
        if own["compute"] is None or own["bandwidth"] is None or own["latency"] is None:
            continue
        by_class[place] = {
            "compute_share": {name: _share(share, own["compute"]) for name, share in shares.items()},
            **{name: _share(value[name], own["compute"]) for name in ("attention_share", "vector_share")},
            **{name: _share(value[name], own["bandwidth"]) for name in ("bandwidth_share", "cache_share")},
            "link_share": _share(value["link_share"], own["link"]), "score_bytes": float(f"{value['score_bytes'] * (own['score'] or 1):.4g}"),
            **{name: float(f"{value[name] * own['latency']:.4g}") for name in LATENCIES},
        }  # fmt: skip
    return {
        "compute_share": shares, **{name: value[name] for name in plain},
        "weight_only": {"4": value["weight_only_4"], "8": value["weight_only_8"]}, **FIXED, "year": YEAR,
        "progress": round(math.log(value["progress"]), 4), "by_class": by_class,
    }  # fmt: skip


def _share(value: float, factor: float | None) -> float:
    return round(min(value * (factor or 1.0), MOST_SHARE), 4)


def describe(label: str, table: Table, errors: Array) -> None:
    """Median and 90th percentile of the error of speed, by kind."""
    for kind in KINDS:
        mine = np.array([sample.kind == kind for sample in table.samples])
        if mine.any():
            off = np.abs(np.exp(errors[mine]) - 1)
            bias = np.median(errors[mine])
            print(f"  {label:8} {kind:8} n {mine.sum():4d}  median {np.median(off):.3f}  p90 {np.quantile(off, 0.9):.3f}  bias {bias:+.3f}")


def by_source(table: Table, errors: Array) -> None:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, sample in enumerate(table.samples):
        groups[sample.case.source[:44], sample.kind].append(index)
    for (source, kind), own in sorted(groups.items()):
        off = errors[own]
        print(f"    {source:44} {kind:8} n {len(own):4d}  bias {np.median(off):+.3f}  median |e| {np.median(np.abs(np.exp(off) - 1)):.3f}")


def samples_of(paths: Iterable[Path]) -> list[Sample]:
    return [sample for path in paths for sample in samples_of_rows(read_rows(path))]


def samples_of_rows(rows: Sequence[Row]) -> list[Sample]:
    """The figures of rows that are gradable."""
    found = []
    for row in rows:
        with suppress(Exception):  # as above
            case = inference_case(row)
            found += [Sample(case=case, kind=kind, truth=truth) for kind, truth in case.truths.items()]
    return found


def grade_left_out(rows: Sequence[Row], *, file: str = "") -> list[Grade]:
    """Grades of rows by constants that were fitted to these rows without those of the graded row's source."""
    cases = samples_of_rows(rows)
    tables = {stack: table_of([one for one in cases if one.case.stack.name == stack and not one.case.doubtful]) for stack in STACKS}
    whole = {stack: fit(table, stack, np.ones(len(table.samples)))[1] for stack, table in tables.items() if table.samples}
    grades: list[Grade] = []
    for source in sorted({row.get("source_repo_or_doc") or "not said" for row in rows}):
        rates = {
            stack: rates_without(tables[stack], stack, source, start) for stack, start in whole.items()
            if any(one.case.source == source for one in tables[stack].samples)
        }  # fmt: skip
        own = [row for row in rows if (row.get("source_repo_or_doc") or "not said") == source]
        grades += grade_inference(own, file=file, rates=rates, fitted=False)
    return grades


def rates_without(table: Table, stack: str, source: str, start: Array) -> Rates:
    """Constants fitted without a source, with the spread that is kept."""
    use = np.array([float(one.case.source != source) for one in table.samples])
    names, theta = fit(table, stack, use, start=start)
    return replace(rates_of(stack, names, theta), spread=load_rates(stack).spread)


def spread_of(errors: Array) -> float:
    """The standard deviation whose 90 % range holds 90 % of these errors."""
    return float(np.quantile(np.abs(errors), 0.9) / RANGE_90) if len(errors) else math.nan


FEWEST = 15
"""Figures below which a spread of their own says nothing: that of all figures of this software is taken."""


def spreads(table: Table, errors: Array) -> dict[str, float]:
    """What is predicted, on one device and over many → its spread; without figures that no device could reach."""
    own: dict[str, float] = {}
    can = possible(table)
    for kind in KINDS:
        for suffix, many in (("", False), (OVER_DEVICES, True)):
            mine = np.array([sample.kind == kind and (sample.case.tp * sample.case.pp > 1) == many for sample in table.samples]) & can
            own[kind + suffix] = round(spread_of(errors[mine] if mine.sum() >= FEWEST else errors[can]), 4)
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--stack", choices=list(STACKS), nargs="*", default=list(STACKS))
    parser.add_argument("--devices", action="store_true", help="leave out each device too")
    parser.add_argument("--write", action="store_true", help="keep the constants in the package")
    arguments = parser.parse_args()
    samples = samples_of(arguments.rows)
    for stack in arguments.stack:
        table = table_of([sample for sample in samples if sample.case.stack.name == stack and not sample.case.doubtful])
        report(stack, table, devices=arguments.devices, write=arguments.write)


def report(stack: str, table: Table, *, devices: bool = False, write: bool) -> None:
    print(f"{stack}: {len(table.samples)} figures of {len({sample.case.source for sample in table.samples})} sources")
    names, theta = fit(table, stack, np.ones(len(table.samples)))
    print("  " + "  ".join(f"{name} {value:.3g}" for name, value in zip(names, np.exp(theta), strict=True)))
    describe("fitted", table, log_error(table, names, theta))
    left = left_out_errors(table, stack, lambda sample: sample.case.source)
    describe("source", table, left)
    by_source(table, left)
    if devices:
        describe("device", table, left_out_errors(table, stack, lambda sample: sample.case.device.name))
    if write:
        spread = spreads(table, left)
        document = {
            "name": stack, **document_of(stack, names, theta), "spread": spread,
            "sources": sorted({sample.case.source for sample in table.samples}),
            "note": "Fitted by scripts/fit_inference.py; spread is of each source's rows by constants fitted without that source.",
        }  # fmt: skip
        (RATES / f"{stack}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
