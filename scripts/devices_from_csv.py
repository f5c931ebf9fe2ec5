"""Write one TOML file a device from a table of published hardware figures.

    python scripts/devices_from_csv.py hardware.csv src/lighten/device/known [--again]

It was run once; since then the files are extended by hand, so a file that exists is left as it is unless `--again` is said. Columns: peaks in TFLOP/s
(dense), memory in GB as sold, bandwidths in GB/s. What a row does not say is left out. A figure that was recalled rather than read keeps that word.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEAK_COLUMNS = {
    "fp64_tflops": "float64", "fp32_tflops": "float32", "tf32_tflops": "tf32", "fp16_tflops": "float16", "fp16_fp16acc_tflops": "float16_acc16",
    "bf16_tflops": "bfloat16", "fp8_tflops": "float8", "fp4_tflops": "float4", "int8_tops": "int8", "int4_tops": "int4",
}  # fmt: skip
ORDER = (
    "name", "full_name", "vendor", "kind", "memory_bytes", "memory_varies", "memory_type", "bandwidth_bytes_per_s", "power_w", "aliases", "notes",
    "peak_flops_per_s", "measured_flops_per_s", "links", "price", "sources",
)  # fmt: skip
SUBSTITUTES = [
    (r"\(chip\)|\(per GPU\)|\(announced\)|\(AWS\)|GPU$|-core", ""),
    (r"^H100 (SXM|PCIe) 80GB", r"H100 \1"),
    (r"^H(100|200) NVL \d+GB", r"H\1 NVL"),
    (r"^H200 SXM 141GB", "H200 SXM"),
    (r"^H100 96GB.*", "H100 96GB HBM2e"),
    (r"^(A800|H800) SXM 80GB", r"\1 SXM"),
    (r"^H20 96GB", "H20"),
    (r"^(P100 SXM2|P40) \d+GB", r"\1"),
    (r"^(V100) SXM2", r"\1 SXM"),
    (r"^(RTX 3060|RTX 3080|RTX 4060 Ti|RTX 5060 Ti|Arc A770|MI50) \d+GB", r"\1"),
    (r"^Jetson AGX Orin 64GB", "Jetson AGX Orin"),
    (r"^DGX Spark GB10", "DGX Spark"),
    (r"^(B[23]00|Rubin) SXM", r"\1"),
    (r"Blackwell WS", "Blackwell Workstation"),
    (r"\(Strix Halo\)", ""),
    (r"\((SPR|EMR|GNR), .*", ""),
    (r"\(\d+c\)", ""),
    (r" Trillium| Ironwood", ""),
    (r"Platinum |Data Center ", ""),
    (r"^Gaudi ", "Gaudi"),
    (r"^TPU v", "TPU-v"),
    (r"Ryzen AI Max\+", "Ryzen AI Max"),
]
"""What of a row's name is no part of a device's name: what tells it from no other one."""


def device_name(text: str) -> str:
    """The name of a row as `--device` takes it."""
    for pattern, by in SUBSTITUTES:
        text = re.sub(pattern, by, text.strip())
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("+", "-plus" if "Max+" in text else "")).strip("-")


def document(row: Mapping[str, str]) -> dict[str, Any]:
    """A row as a device's TOML document."""
    recalled = "recalled" in row["source_repo_or_doc"]
    place = " ".join(part for part in (row["source_repo_or_doc"].replace(" (recalled, not re-read)", ""), row["source_path_or_section"]) if part)
    others = f"{place}; {'recalled, not re-read' if recalled else 'read'}; confidence {row['confidence']}"
    sources = {"others": others}
    if "recalled (tdp)" in row["provenance"] and row["tdp_w"]:
        sources["power_w"] = "vendor datasheet; recalled, not re-read"
    if "read (bandwidth) + recalled (TFLOPs)" in row["provenance"]:
        sources["bandwidth_bytes_per_s"] = "llama.cpp discussion #4167, table; read"
        sources["others"] = f"public specifications; recalled, not re-read; confidence {row['confidence']}"
    measured = row["measured_matmul_bf16_tflops"]
    if measured:
        sources["measured_flops_per_s"] = row["note"] if "gpu-flops-bench" in row["note"] else place
    if row["memory_gb"]:
        sources["memory_bytes"] = f"sold as {row['memory_gb']} GB, read as GiB; {sources['others']}"
    found: dict[str, Any] = {
        "name": device_name(row["name"]), "full_name": f"{row['vendor']} {row['name']}", "vendor": row["vendor"], "kind": row["kind"].lower(),
        "memory_bytes": round(float(row["memory_gb"]) * 2**30) if row["memory_gb"] else None, "memory_type": row["memory_type"] or None,
        "bandwidth_bytes_per_s": giga(row["memory_bw_gbs"]), "power_w": float(row["tdp_w"]) if row["tdp_w"] else None,
        "notes": [row["note"]] if row["note"] else [],
        "peak_flops_per_s": {name: tera(row[column]) for column, name in PEAK_COLUMNS.items() if row[column]},
        "measured_flops_per_s": {"bfloat16": tera(measured)} if measured else {},
        "links": [{"name": row["intra_node_link"], "bytes_per_s": giga(row["intra_node_unidir_gbs"])}] if row["intra_node_unidir_gbs"] else [],
        "sources": sources,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def tera(text: str) -> float | None:
    return float(text + "e12") if text else None


def giga(text: str) -> float | None:
    return float(text + "e9") if text else None


def to_toml(found: Mapping[str, Any]) -> str:
    """A device's document as TOML, in the order in which one reads it."""
    lines = [f"{key} = {_value(found[key])}" for key in ORDER if key in found and not isinstance(found[key], Mapping) and key != "links"]
    for key in ORDER:
        if key == "links":
            for link in found.get(key, []):
                lines += ["", "[[links]]", *(f"{name} = {_value(value)}" for name, value in link.items())]
        elif isinstance(found.get(key), Mapping) and found[key]:
            lines += ["", f"[{key}]", *(f"{_key(name)} = {_value(value)}" for name, value in found[key].items())]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, float):
        return _scaled(value)
    return str(value).lower()  # of a truth value too


def _scaled(value: float) -> str:
    """A float as people write it: 989e12, 450e9, 62.5."""
    for power in (12, 9):
        if value >= 10**power:
            return f"{float(f'{value / 10**power:.12g}'):.12g}e{power}"
    return repr(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", action="store_true", help="write over files that exist")
    arguments = parser.parse_args()
    with arguments.table.open(encoding="utf-8", newline="") as file:
        documents = [document(row) for row in csv.DictReader(file)]
    written = 0
    for found in documents:
        path = arguments.folder / f"{found['name']}.toml"
        if arguments.again or not path.exists():
            path.write_text(to_toml(found), "utf-8")
            written += 1
    print(f"{len(documents)} rows, {len({found['name'] for found in documents})} names, {written} files written")


if __name__ == "__main__":
    main()
