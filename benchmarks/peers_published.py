"""Other estimators on published training and inference rows: how far are their times and speeds from the measured ones?

    python benchmarks/peers_published.py --rows FOLDER --peer flat --env llm_analysis=PYTHON --env genz=PYTHON …

FOLDER holds training.csv, inference.csv and hardware.csv. Each row that gives a measured time becomes a case, in one form for all peers: the
model's sizes, the device's figures, the workload, and what was measured. A peer is one file of `benchmarks/peers`: it reads cases, one JSON object
a line, and answers each with what it predicts, or with why it cannot express it. `--env NAME=PYTHON` runs the peer NAME with the interpreter of an
environment that has it; `--peer NAME` runs one that needs none. `--path NAME=FOLDER` gives a peer the checkout that it is imported from.

    kind            quantity, and what is compared
    training_time   seconds a step: from the step's time, else from tokens or sequences a second, else from model TFLOP/s
    decode          tokens a second that are generated, prompts not counted
    prefill         tokens a second of the prompts
    serving         tokens a second that are generated, the time of their prompts counted: static batches, and a load that saturates

The error of a row is |predicted / measured - 1|. Rows that a peer does not express are counted by its reason. A row is left out for everybody where
its own note says that it is wrong or that its length varies, where it ran out of memory, or where it lacks what the quantity needs.

Prints one JSON line for each prediction (to FILE with `--out FILE`), then a table, then one JSON object as the last line. `--ours FILE` takes
other predictions, JSON lines with `id`, `kind`, `predicted` and at best `truth`, and shows them beside each peer's on the rows that both express.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, str]
Case = dict[str, Any]
PEERS = Path(__file__).parent / "peers"
KINDS = ("training_time", "decode", "prefill", "serving")


class LeftOut(Exception):
    """Why nobody can be graded on a row."""


# ---- hardware ----

VARIANTS = (
    (r"H100-(SXM|80GB \(variant)", "H100 SXM 80GB"), (r"H100-PCIe", "H100 PCIe 80GB"), (r"^H200", "H200 SXM 141GB"), (r"GH200", "GH200 96GB"),
    (r"GB200", "GB200 (per GPU)"), (r"GB300", "GB300 (per GPU)"), (r"^B200", "B200 SXM"), (r"^B300", "B300 SXM"),
    (r"A100-(SXM-)?80GB", "A100 SXM 80GB"), (r"A100-SXM-40GB", "A100 SXM 40GB"), (r"A100-PCIe-80GB", "A100 PCIe 80GB"),
    (r"TPUv5p", "TPU v5p (chip)"), (r"TPUv6e", "TPU v6e Trillium (chip)"), (r"TPUv7x", "TPU v7x Ironwood (chip)"),
    (r"Trainium1", "Trainium1 (chip)"), (r"Inferentia2", "Inferentia2 (chip)"), (r"A10G", "A10G (AWS)"), (r"Spark", "DGX Spark GB10"),
    (r"RTX ?PRO 6000", "RTX PRO 6000 Blackwell WS"), (r"RTXA6000", "RTX A6000"),
)  # fmt: skip
"""Rows' names whose words are not those of hardware.csv. A100-80GB without a board is taken for the SXM board."""
HALVES = re.compile(r"NeuronCore")
"""Devices that rows count in cores, two a chip."""


def _words(name: str) -> str:
    """A device's name in comparable form: no vendor, no memory size, no host around it, one space between letters and digits."""
    inside = re.search(r"\((?:NVIDIA|AMD|Intel) ([^)]*)\)", name, re.IGNORECASE)
    text = (inside[1] if inside else name).lower()
    text = re.sub(r"\b(nvidia|amd|intel|apple|geforce|radeon)\b|\[.*?\]|\bgpu\b|[-(),]", " ", text)
    text = re.sub(r"\b\d+ ?gb\b", " ", text)
    return re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])|\s+", " ", text).replace("  ", " ").strip()


def device_of(name: str, devices: Mapping[str, Row]) -> Row | None:
    """The row of hardware.csv that a row's `hardware` means; None where it is not there, or the name says no device."""
    if re.search(r"\[CPU\]|cluster|\+RTX|unspecified", name, re.IGNORECASE):
        return None
    for pattern, known in VARIANTS:
        if re.search(pattern, name):
            return devices[known]
    plain = {_words(known): row for known, row in devices.items()}
    words = _words(name)
    for candidate in (words, f"rtx {words}", f"rx {words}", re.sub(r"1$", "", words).strip()):  # a footnote's mark is glued to some names
        if candidate in plain:
            return plain[candidate]
    return None


# ---- sizes of the model ----


def _number(row: Row, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def _count(row: Row, name: str, default: int | None = None) -> int | None:
    value = _number(row, name)
    return default if value is None else round(value)


def _parameters(model: Case, *, gated: bool, tied: bool) -> float:
    """Matrices and tables of a decoder's stack of one kind of layer."""
    hidden, head = model["hidden"], model["head_dim"]
    attention = hidden * head * (2 * model["heads"] + 2 * model["kv_heads"])
    experts = (model["n_experts"] or 1) * (3 if gated else 2) * hidden * model["expert_ffn"]
    return float(model["layers"] * (attention + experts) + (1 if tied else 2) * hidden * model["vocab"])


SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
KNOWN = (
    (r"falcon.?180b", (80, 14848, 232, 8, 64, 59392, 65024)), (r"gpt-?j.?6b", (28, 4096, 16, 16, 256, 16384, 50400)),
    (r"deepseek.*33b", (62, 7168, 56, 8, 128, 19200, 32256)), (r"open.?llama.?3b", (26, 3200, 32, 32, 100, 8640, 32000)),
)  # fmt: skip
"""Names of models whose rows give no sizes → `SIZES`. Source: their published config.json."""


def model_of(row: Row) -> Case:
    """Sizes of the row's model. A gated feed-forward is inferred: from the number of parameters, else from a width that is not 4 hidden."""
    model: Case = {name: _count(row, name) for name in (*SIZES, "n_experts", "top_k")}
    if not row["layers"]:
        known = next((sizes for pattern, sizes in KNOWN if re.search(pattern, row["model"].lower())), ())
        model |= dict(zip(SIZES, known, strict=False))
    model |= {"name": row["model"].strip(), "params_total": _count(row, "params_total"), "params_active": _count(row, "params_active")}
    moe_ffn = _count(row, "moe_ffn")
    model["expert_ffn"] = moe_ffn if model["n_experts"] and moe_ffn else model["ffn"]
    model["gated"] = None
    if all(model[name] for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")):
        options = [(gated, tied) for gated in (True, False) for tied in (True, False)]
        sizes = {option: _parameters(model, gated=option[0], tied=option[1]) for option in options}
        stated = model["params_total"]
        best = min(options, key=lambda option: abs(sizes[option] - stated)) if stated else (model["ffn"] != 4 * model["hidden"], False)
        model["gated"], model["tied"] = best
        model["params_total"] = stated or round(sizes[best])
    model["params_active"] = model["params_active"] or (None if model["n_experts"] else model["params_total"])
    return model


# ---- what was measured ----

PRECISIONS = (("fp4", r"fp4"), ("fp8", r"fp8"), ("tf32", r"tf32"), ("bf16", r"bf16"), ("fp16", r"fp16"))
WRONG = re.compile(r"typo|: exclude$|sample \(varies\)|duplicates resource|OOM")


def _leave_out_wrong(row: Row) -> None:
    if "OOM" in row["measured"]:
        raise LeftOut("ran out of memory")
    if found := WRONG.search(row["note"]):
        raise LeftOut(f"its note says {found[0].lower()!r}")


UNSAID_ACCUMULATION = 8
"""Micro-batches of a step where a row says nothing of its batch: enough that what happens once a step weighs little, as in pre-training."""


def step_tokens(row: Row) -> float | None:
    """Tokens of an optimizer's step, of all devices."""
    seconds, rate, devices = _number(row, "step_time_s"), _number(row, "tokens_per_s_per_gpu"), _number(row, "n_gpus")
    if seconds and rate and devices:
        return seconds * rate * devices
    length = _number(row, "seq_len")
    if row["global_batch_seqs"] and length:
        return float(row["global_batch_seqs"]) * length
    if row["global_batch_tokens"]:
        return float(row["global_batch_tokens"])
    if length and devices:
        micro, accumulated = _number(row, "micro_batch"), _number(row, "grad_accum")
        if not (micro and accumulated) and (seconds or (_count(row, "pp") or 1) > 1):
            raise LeftOut("says no batch, on which its step's time or its pipeline's idle time depends")
        parallel = (_count(row, "tp", 1) or 1) * (_count(row, "pp", 1) or 1) * (_count(row, "cp", 1) or 1)
        copies = _count(row, "dp") or devices / parallel
        return copies * (micro or 1) * (accumulated or UNSAID_ACCUMULATION) * length
    return None


def flops_per_token(model: Case, length: float) -> float | None:
    """6 · active parameters + 12 · layers · heads · head_dim · length: training's model FLOPs, the whole square of attention counted.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
    """
    if not model["params_active"] or not model["layers"] or not model["heads"]:
        return None
    return float(
        6 * model["params_active"] + 12 * model["layers"] * model["heads"] * (model["head_dim"] or model["hidden"] / model["heads"]) * length
    )


def step_seconds(row: Row, model: Case, tokens: float, peak_flops_per_s: float | None) -> float:
    """Seconds of a step, by the first of the row's figures that gives it."""
    if row["step_time_s"]:
        return float(row["step_time_s"])
    devices = float(row["n_gpus"])
    if row["tokens_per_s_per_gpu"]:
        return tokens / (float(row["tokens_per_s_per_gpu"]) * devices)
    if row["samples_per_s"] and row["seq_len"]:
        return tokens / (float(row["samples_per_s"]) * float(row["seq_len"]))
    achieved = float(row["tflops_per_gpu"]) * 1e12 if row["tflops_kind"] == "model" and row["tflops_per_gpu"] else None
    if achieved is None and row["mfu_pct"] and peak_flops_per_s:
        achieved = float(row["mfu_pct"]) / 100 * peak_flops_per_s
    work = flops_per_token(model, float(row["seq_len"] or 0))
    if achieved is None or work is None or not row["seq_len"]:
        raise LeftOut("gives no time, no tokens a second and no model FLOPs of a known model")
    return tokens * work / (devices * achieved)


def precision_of(text: str) -> str | None:
    return next((name for name, pattern in PRECISIONS if re.search(pattern, text, re.IGNORECASE)), None)


def device_case(device: Row, share: float) -> Case:
    """The device's figures in base units; `share`: of a chip that rows count in cores."""
    peaks = {
        name: float(device[f"{name}_tflops"]) * 1e12 * share for name in ("fp32", "tf32", "fp16", "bf16", "fp8", "fp4") if device[f"{name}_tflops"]
    }
    if device["int8_tops"]:
        peaks["int8"] = float(device["int8_tops"]) * 1e12 * share
    peaks.setdefault("fp16", peaks.get("bf16", 0.0))
    peaks.setdefault("bf16", peaks["fp16"])
    return {
        "name": device["name"], "peak_flops_per_s": {name: value for name, value in peaks.items() if value},
        "memory_bytes": float(device["memory_gb"]) * 1e9 * share if device["memory_gb"] else None,
        "bandwidth_bytes_per_s": float(device["memory_bw_gbs"]) * 1e9 * share if device["memory_bw_gbs"] else None,
        "link_bytes_per_s": float(device["intra_node_unidir_gbs"]) * 1e9 if device["intra_node_unidir_gbs"] else None,
    }  # fmt: skip


PLAN = ("n_gpus", "seq_len", "dp", "tp", "pp", "vp", "cp", "ep", "zero_stage", "micro_batch", "grad_accum", "global_batch_seqs")


def training_case(row: Row, devices: Mapping[str, Row]) -> Case:
    """A row of training.csv as a case."""
    _leave_out_wrong(row)
    device = device_of(row["hardware"], devices)
    if device is None:
        raise LeftOut(f"hardware {row['hardware']!r} is not in hardware.csv")
    model, tokens, precision = model_of(row), step_tokens(row), precision_of(row["precision"])
    if tokens is None:
        raise LeftOut("gives no tokens a step")
    if precision is None:
        raise LeftOut(f"precision {row['precision']!r} is not known")
    figures = device_case(device, 0.5 if HALVES.search(row["hardware"]) else 1.0)
    work: Case = {name: _count(row, name) for name in PLAN}
    work |= {"precision": precision, "recompute": row["act_ckpt"] or None, "method": row["method"], "tokens": tokens}
    work["sequence_parallel"] = row["seq_parallel"] == "True"
    truth = step_seconds(row, model, tokens, figures["peak_flops_per_s"].get(precision))
    return {
        "id": row["id"],
        "kind": "training_time",
        "source": row["source_repo_or_doc"],
        "model": model,
        "device": figures,
        "work": work,
        "truth": truth,
    }


def _context(row: Row) -> tuple[int, int]:
    """(prompt, generated) tokens of a decode test. llama-bench generates from an empty context; a length that the row lacks is 512."""
    prompt, output = _count(row, "input_len"), _count(row, "output_len")
    if re.search(r"\btg ?\d|tg L|empty ctx|short ctx", row["metric"]):
        prompt = 0
    return 0 if prompt is None and output is not None else prompt if prompt is not None else 512, output if output is not None else 1


def measured_speeds(row: Row) -> Iterator[tuple[str, float, int, int]]:
    """(kind, tokens a second, prompt length, generated length) of what a row of inference.csv measured."""
    batch, prompt, output = _number(row, "batch_or_concurrency"), _count(row, "input_len"), _count(row, "output_len")
    before, after = _context(row)
    if row["decode_tok_s"]:
        yield "decode", float(row["decode_tok_s"]), before, after
    elif row["tpot_ms"] and batch and "in-flight" not in row["batch_kind"]:  # there prompts of others are between two tokens
        yield "decode", batch / float(row["tpot_ms"]) * 1e3, before, after
    if row["prefill_tok_s"] and prompt and "full ctx" not in row["metric"]:
        yield "prefill", float(row["prefill_tok_s"]), prompt, 0
    elif row["ttft_ms"] and not row["prefill_tok_s"] and batch and prompt and "static" in row["batch_kind"]:
        yield "prefill", batch * prompt / float(row["ttft_ms"]) * 1e3, prompt, 0
    if row["total_output_tok_s"] and prompt and output:
        yield "serving", float(row["total_output_tok_s"]), prompt, output


def inference_cases(row: Row, devices: Mapping[str, Row]) -> list[Case]:
    """The cases of a row of inference.csv: one for each kind that it measured."""
    _leave_out_wrong(row)
    device = device_of(row["hardware"], devices)
    if device is None:
        raise LeftOut("its device is not named, not in hardware.csv, a CPU or two unlike ones")
    model = model_of(row)
    if not model["params_total"] or not model["layers"]:
        raise LeftOut("gives no sizes of its model")
    figures = device_case(device, 0.5 if HALVES.search(row["hardware"]) else 1.0)
    if not row["weight_bits"]:
        raise LeftOut("gives no bits a weight")
    bits, tp, pp = float(row["weight_bits"]), _count(row, "tp") or 1, _count(row, "pp") or 1
    if figures["memory_bytes"] and model["params_total"] * bits / 8 > figures["memory_bytes"] * (_count(row, "n_devices") or 1):
        raise LeftOut("its weights do not fit in its devices: it ran partly on the host")
    small_cache = row["kv_dtype"] == "fp8" or (
        not row["kv_dtype"] and row["weight_format"] in ("FP8", "FP4")
    )  # as these checkpoints' recipes have it
    work = {
        "n_devices": _count(row, "n_devices") or 1,
        "tp": tp,
        "pp": pp,
        "moe_ep": _count(row, "moe_ep"),
        "weight_bits": bits,
        "weight_format": row["weight_format"],
        "kv_dtype": "fp8" if small_cache else "fp16",
        "batch": _count(row, "batch_or_concurrency"),
        "saturated": "saturating" in row["batch_kind"],
        "continuous": "in-flight" in row["batch_kind"],
        "framework": row["framework"],
    }
    cases = []
    for kind, truth, prompt, output in measured_speeds(row):
        lengths = {"input_len": prompt, "output_len": output}
        case = {"id": row["id"], "kind": kind, "source": row["source_repo_or_doc"], "model": model, "device": figures, "truth": truth}
        cases.append(case | {"work": work | lengths})
    if not cases:
        raise LeftOut("measured no speed of known lengths")
    return cases


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cases_of(folder: Path) -> tuple[list[Case], Counter[str]]:
    """All cases of the two files, and why other rows are left out."""
    devices = {row["name"]: row for row in read(folder / "hardware.csv")}
    cases: list[Case] = []
    left_out: Counter[str] = Counter()
    for name in ("training.csv", "inference.csv"):
        for row in read(folder / name):
            try:
                cases += [training_case(row, devices)] if name == "training.csv" else inference_cases(row, devices)
            except LeftOut as reason:
                left_out[f"{name}: {reason}"] += 1
    return cases, left_out


# ---- the peers ----


def ask(peer: str, python: str, path: str | None, cases: Iterable[Case]) -> list[Case]:
    """What a peer answers, one for each case: `predicted`, or `cannot` with the reason."""
    command = [python, str(PEERS / f"{peer}.py"), *([path] if path else [])]
    lines = "".join(json.dumps({name: value for name, value in case.items() if name != "truth"}) + "\n" for case in cases)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"peer {peer}: ended with {done.returncode}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}"
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def graded(peer: str, cases: list[Case], answers: list[Case]) -> tuple[list[Case], Counter[str]]:
    """Predictions beside what was measured, and why others are missing."""
    by_key = {(case["id"], case["kind"]): case for case in cases}
    found: list[Case] = []
    missing: Counter[str] = Counter()
    for answer in answers:
        case = by_key[answer["id"], answer["kind"]]
        if answer.get("predicted") is None:
            missing[f"{case['kind']}: {answer['cannot']}"] += 1
            continue
        ratio = answer["predicted"] / case["truth"]
        found.append({"id": case["id"], "source": case["source"], "kind": case["kind"], "peer": peer, "predicted": answer["predicted"],
                      "truth": case["truth"], "ratio": ratio})  # fmt: skip
    return found, missing


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(lines: list[Case]) -> dict[str, dict[str, float]]:
    """Of each kind: how many rows, the median and the 90th percentile of the error, the median ratio."""
    table = {}
    for kind in KINDS:
        ratios = [line["ratio"] for line in lines if line["kind"] == kind]
        errors = [abs(ratio - 1) for ratio in ratios]
        if errors:
            table[kind] = {"n": len(errors), "median_error": round(statistics.median(errors), 4), "p90_error": round(percentile(errors, 0.9), 4),
                           "median_ratio": round(statistics.median(ratios), 4)}  # fmt: skip
    return table


def by_source(lines: list[Case]) -> list[tuple[str, str, str, int, float]]:
    groups: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for line in lines:
        groups[line["peer"], line["kind"], line["source"]].append(abs(line["ratio"] - 1))
    return [(*key, len(errors), statistics.median(errors)) for key, errors in sorted(groups.items())]


def ours_on(path: Path, cases: list[Case]) -> list[Case]:
    """Predictions of a file; rows that are no case here, or without a prediction, are passed over.

    Each is held against its own `truth` where it has one, as its step may be of other tokens than the case's, else against the case's.
    """
    truths = {(case["id"], case["kind"]): case for case in cases}
    found = []
    for line in path.read_text("utf-8").splitlines():
        given = json.loads(line)
        case = truths.get((given.get("id"), given.get("kind")))
        if case is not None and given.get("predicted") is not None:
            truth = given.get("truth") or case["truth"]
            more = {"predicted": given["predicted"], "truth": truth, "ratio": given["predicted"] / truth}
            found.append({"id": case["id"], "source": case["source"], "kind": case["kind"], "peer": "ours"} | more)
    return found


def beside(lines: list[Case], ours: list[Case]) -> list[tuple[str, str, int, float, float]]:
    """(peer, kind, rows that both express, the peer's median error there, ours)."""
    own = {(line["id"], line["kind"]): abs(line["ratio"] - 1) for line in ours}
    groups: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        if (line["id"], line["kind"]) in own:
            groups[line["peer"], line["kind"]].append((abs(line["ratio"] - 1), own[line["id"], line["kind"]]))
    return [(*key, len(found), *(statistics.median(side) for side in zip(*found, strict=True))) for key, found in sorted(groups.items())]


def _pairs(given: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in given)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="the folder of training.csv, inference.csv and hardware.csv")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON", help="a peer, and the interpreter that has it")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER", help="a peer, and the checkout that it is imported from")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="a peer that needs nothing but Python")
    parser.add_argument("--out", type=Path, help="where the predictions go, one JSON object a line")
    parser.add_argument("--ours", type=Path, help="predictions to show beside each peer's, one JSON object a line")
    given = parser.parse_args()
    cases, left_out = cases_of(given.rows)
    print(f"{len(cases)} cases: " + ", ".join(f"{sum(case['kind'] == kind for case in cases)} {kind}" for kind in KINDS))
    for reason, count in left_out.most_common():
        print(f"  left out {count:4d}  {reason}")
    environments, folders = dict.fromkeys(given.peer, sys.executable) | _pairs(given.env), _pairs(given.path)
    tables, everything = {}, []
    for peer, python in environments.items():
        lines, missing = graded(peer, cases, ask(peer, python, folders.get(peer), cases))
        everything += lines
        tables[peer] = summary(lines)
        print(f"\n{peer}: cannot express {sum(missing.values())} of {len(cases)}")
        for reason, count in missing.most_common():
            print(f"  {count:4d}  {reason}")
    text = "".join(json.dumps(line) + "\n" for line in everything)
    given.out.write_text(text, encoding="utf-8") if given.out else print(text, end="")
    print(f"\n{'peer':14s} {'kind':14s} {'source':64s} {'n':>5s} {'median':>8s}")
    for peer, kind, source, count, error in by_source(everything):
        print(f"{peer:14s} {kind:14s} {source[:64]:64s} {count:5d} {error:8.1%}")
    print(f"\n{'peer':14s} {'kind':14s} {'n':>5s} {'of':>5s} {'median |error|':>15s} {'p90':>8s} {'predicted/measured':>19s}")
    totals = Counter(case["kind"] for case in cases)
    for peer, table in tables.items():
        for kind, line in table.items():
            figures = f"{line['n']:5d} {totals[kind]:5d} {line['median_error']:15.1%} {line['p90_error']:8.1%} {line['median_ratio']:19.3f}"
            print(f"{peer:14s} {kind:14s} {figures}")
    shared = beside(everything, ours_on(given.ours, cases)) if given.ours else []
    if shared:
        print(f"\n{'peer':14s} {'kind':14s} {'both':>5s} {'its median':>11s} {'ours':>8s}")
    for peer, kind, count, its, own in shared:
        print(f"{peer:14s} {kind:14s} {count:5d} {its:11.1%} {own:8.1%}")
    print(json.dumps({"cases": dict(totals), "peers": tables}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
