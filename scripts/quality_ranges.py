"""Ranges of what compression costs in quality, made of published rows: what `lighten advise` says beside a lever.

    python scripts/quality_ranges.py --rows compression.csv

writes src/lighten/recipe/quality_ranges.json. A row counts where its figure has a baseline of the same model, text, metric and source: its own
`baseline_value`, else the 16-bit row beside it. Rows whose metric is called not comparable are left out. Per method, width, grouping or pattern the
lowest and the highest ratio to the baseline are kept, with the number of rows, the models' sizes and the sources.

Legacy types of ggml are plain rounding by blocks of 32 (Q8_0, Q4_0, Q5_0 symmetric; Q4_1, Q5_1 with a minimum), so they count as rtn with groups.
Source: `quantize_row_q4_0_ref` and its neighbours in ggml/src/ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

OUT = Path(__file__).parent.parent / "src" / "lighten" / "recipe" / "quality_ranges.json"
COLUMNS = (
    "model", "method", "bits", "group_size", "sparsity", "dataset", "metric", "value", "baseline_value", "source_repo_or_doc",
    "source_path_or_section", "provenance",
)  # fmt: skip
FINEST_COARSE = 128
"""Groups of at most so many columns are called `group`: 32, 64 and 128 are what published rows have."""


class Key(NamedTuple):
    method: str
    bits: int | None
    grouping: str | None
    pattern: str | None
    measure: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", required=True, type=Path, help="a file with the columns of compression.csv")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    try:
        rows = list(csv.DictReader(arguments.rows.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        print(f"{arguments.rows}: {error}", file=sys.stderr)
        return 2
    if missing := [name for name in COLUMNS if not rows or name not in rows[0]]:
        print(f"{arguments.rows}: no columns {', '.join(missing)}", file=sys.stderr)
        return 2
    found, left_out = collect(rows)
    ranges = [describe(key, found[key]) for key in sorted(found, key=str)]
    document = {"rows": arguments.rows.name, "script": "scripts/quality_ranges.py", "ranges": ranges}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for each in ranges:
        name = " ".join(str(each[part]) for part in ("method", "bits", "grouping", "pattern") if each[part] is not None)
        print(f"{name:24} {each['measure']:16} {each['low']:.4f} to {each['high']:.4f}  n={each['n']}")
    used = sum(map(len, found.values()))
    print(json.dumps({"rows": len(rows), "used": used, "ranges": len(found), "left_out": dict(left_out)}))
    return 0


def collect(rows: list[dict[str, str]]) -> tuple[dict[Key, list[tuple[float, dict[str, str]]]], Counter[str]]:
    """Ratios to the baseline with their rows, by what was done; and how many rows were left out, by reason."""
    plain = {setting(row): number(row["value"]) for row in rows if is_plain(row)}
    found: dict[Key, list[tuple[float, dict[str, str]]]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for row in rows:
        value, baseline = number(row["value"]), number(row["baseline_value"]) or plain.get(setting(row))
        if "not comparable" in row["metric"]:
            left_out["not comparable"] += 1
        elif is_plain(row):
            left_out["the baseline itself"] += 1
        elif not value or not baseline:
            left_out["no baseline"] += 1
        elif (key := key_of(row)) is None:
            left_out["method not understood"] += 1
        else:
            found[key].append((value / baseline, row))
    return found, left_out


def setting(row: dict[str, str]) -> tuple[str, ...]:
    """What a figure and its baseline have in common."""
    return row["model"], row["dataset"], row["metric"], row["source_repo_or_doc"]


def is_plain(row: dict[str, str]) -> bool:
    return bool(re.fullmatch(r"(llama\.cpp )?(fp|f|bf)16", row["method"].strip().lower()))


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def key_of(row: dict[str, str]) -> Key | None:
    """What was done; None where the row's words are not understood."""
    said = row["method"].lower().strip()
    measure = "perplexity_ratio" if "perplexity" in row["metric"] else "score_ratio"
    if pattern := sparsity_of(row["sparsity"]):
        return Key(said, None, None, pattern, measure)
    if found := re.fullmatch(r"kv cache int(\d)", said):
        return Key("kv_cache", int(found[1]), None, None, measure)
    if found := re.match(r"llama\.cpp (iq|q)(\d)_(\w+)", said):
        if found[1] == "q" and found[3] in ("0", "1"):
            return Key("rtn", int(found[2]), "group", None, measure)
        return Key("i-quant" if found[1] == "iq" else "k-quant", int(found[2]), None, None, measure)
    words = re.match(r"(rtn|gptq|awq)\b", said)
    bits = number(row["bits"]) or number((re.search(r"\b(\d)b\b", said) or ["", ""])[1])
    return Key(words[1], int(bits), grouping_of(row["group_size"]), None, measure) if words and bits else None


def sparsity_of(text: str) -> str | None:
    """`2:4`, or `0.5` for `unstructured 50%`."""
    if re.fullmatch(r"\d+:\d+", text.strip()):
        return text.strip()
    share = re.search(r"(\d+)\s*%", text)
    return str(int(share[1]) / 100) if share else None


def grouping_of(text: str) -> str | None:
    """channel, group (of at most 128 columns), or None where it is not said."""
    if "channel" in text:
        return "channel"
    size = number(text)
    return None if size is None else "group" if size <= FINEST_COARSE else f"group of {size:.0f}"


def describe(key: Key, entries: list[tuple[float, dict[str, str]]]) -> dict[str, Any]:
    ratios = [ratio for ratio, _ in entries]
    rows = [row for _, row in entries]
    sizes = [float(found[1]) for row in rows if (found := re.search(r"(\d+(?:\.\d+)?)\s*b\b", row["model"].lower()))]
    return {
        **key._asdict(), "low": round(min(ratios), 4), "high": round(max(ratios), 4), "n": len(rows),
        "recalled": sum(row["provenance"] == "recalled" for row in rows),
        "parameters": [round(min(sizes) * 1e9), round(max(sizes) * 1e9)] if sizes else None,
        "models": sorted({row["model"] for row in rows}),
        "sources": sorted({" ".join(filter(None, (row["source_repo_or_doc"], row["source_path_or_section"]))) for row in rows}),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
