"""Pruning, ours beside the peers': what zeros cost, what a recovery gives back, and how large the file is.

    python benchmarks/pruning.py --model .models/smollm2-135m-offgrid
    python benchmarks/pruning.py --model .models/smollm2-135m-offgrid --peers llm-compressor,torch-pruning --environments ENVS
    python benchmarks/pruning.py --recipe "prune(admm, sparsity=0.6, tokens={tokens})"

Everybody gets the same calibration tokens, `--tokens` in windows of 1,024 of the text's calibration part, and everybody's dense weights are scored by
one evaluator: 20 windows of 1,024 tokens of the test part, perplexity and divergence from the original, both in bfloat16. A row's figures are those
of benchmarks/compression.py, and

    sparsity     the share of zeros in the linears that the step prunes
    excess       the logarithm of perplexity over the original's
    dense_bytes  of the original's weights in the artifact's type, every zero of them stored

Rows that `--out` has already are not measured again, unless `--rerun PEER` names their peer. The last line on stdout is one JSON object: `rows`, and
`goals`, where each of ours is beside SparseGPT at the same zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compression import LENGTH, TEST_WINDOWS, Bench, Case, Failure, machine, our_cases

HERE = Path(__file__).parent
FFN_RATIO = 0.43
"""Of the inner features, that go: a quarter of SmolLM2-135M's parameters."""
RECIPES = (
    "prune(magnitude, sparsity=0.5)",
    "prune(wanda, sparsity=0.5, tokens={tokens})",
    "prune(sparsegpt, sparsity=0.5, damping=0.01, tokens={tokens})",
    "prune(sparsegpt, sparsity=0.5, tokens={tokens})",
    "prune(admm, sparsity=0.5, tokens={tokens})",
    "prune(wanda, pattern=2:4, tokens={tokens})",
    "prune(sparsegpt, pattern=2:4, damping=0.01, tokens={tokens})",
    "prune(admm, pattern=2:4, tokens={tokens})",
    "prune(admm, sparsity=0.7, tokens={tokens})",
    "prune(admm, sparsity=0.5, allocation=sensitivity, tokens={tokens})",
    f"shrink(ffn, ratio={FFN_RATIO}, tokens={{tokens}})",
)
PEERS = tuple(
    Case(peer="llm-compressor", settings={"method": method, "sparsity": 0.5, "mask_structure": pattern})
    for method in ("sparsegpt", "wanda")
    for pattern in ("0:0", "2:4")
) + tuple(
    Case(peer="torch-pruning", settings={"method": method, "ffn": FFN_RATIO, "round_to": 16}, calibrated=method == "taylor")
    for method in ("magnitude", "taylor")
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a case; None: not known, or it failed."""

    key: str
    peer: str
    name: str
    version: str | None = None
    model: str
    text: str
    tokens: int | None
    sparsity: float | None = None
    perplexity: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    excess: float | None = None
    kl: float | None = None
    top1: float | None = None
    size_bytes: int | None = None
    dense_bytes: int | None = None
    quantize_s: float | None = None
    process_s: float | None = None
    peak_above_imports_bytes: int | None = None
    threads: int | None = None
    quiet: bool = False
    machine: str = ""
    failure: str | None = None


def measure(bench: Bench, case: Case, tokens: int) -> Row:
    """Run the case and score what it made; a failure is a row too."""
    ids = bench.windows("calibration", -(-tokens // LENGTH))
    known: dict[str, Any] = {
        "key": bench.key(case, tokens), "peer": case.peer, "name": case.name, "model": bench.model.name, "text": bench.text_fingerprint(),
        "tokens": int(ids.size) if case.calibrated else None, "quiet": bench.quiet, "machine": machine(),
    }  # fmt: skip
    bench.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{case.peer}-", dir=bench.work))
    try:
        figures = bench._run(case, ids, folder) | scored(bench, folder)
    except (Failure, OSError, ValueError, subprocess.SubprocessError) as error:
        return Row(**known, failure=str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Row(**known | {name: value for name, value in figures.items() if name in Row.__dataclass_fields__})


def scored(bench: Bench, folder: Path) -> dict[str, Any]:
    """The dense weights of a folder, in the architecture that its artifact's config names, beside the original's own."""
    import math

    import torch
    from compression_quality import Evaluator
    from safetensors.torch import load_file

    torch.set_num_threads(bench.threads)
    weights = load_file(folder / "dense" / "model.safetensors")
    evaluator = Evaluator(
        model=bench.model, windows=bench.windows("test", bench.test_windows), dtype=torch.bfloat16, cache=bench.work / "reference",
        architecture=folder / "artifact",
    )  # fmt: skip
    scores = evaluator.scores(weights)
    ratio = scores["perplexity_ratio"]
    return {
        "perplexity": scores["perplexity"].value, "ratio": ratio.value, "ratio_error": ratio.standard_error, "excess": math.log(ratio.value),
        "kl": scores["kl"].value, "top1": scores["top1_agreement"].value,
        "dense_bytes": sum(path.stat().st_size for path in bench.model.glob("*.safetensors")),
    }  # fmt: skip


def read_rows(file: Path) -> dict[str, Row]:
    """Rows by key; fields that a version of this script no longer has are dropped."""
    rows = json.loads(file.read_text()) if file.exists() else []
    return {row["key"]: Row(**{name: value for name, value in row.items() if name in Row.__dataclass_fields__}) for row in rows}


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    file.write_text(json.dumps([asdict(row) for row in sorted(rows, key=lambda row: (row.model, row.peer, row.name))], indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':78} zeros   ratio            KL     MB  of dense      s   GB"]
    for row in sorted(rows, key=lambda row: (row.sparsity or 0, row.ratio or 99)):
        name = f"{row.peer}: {row.name}"
        if row.failure:
            lines.append(f"{name:78} {row.failure}")
            continue
        assert row.ratio is not None, "a row without failure has all figures"
        size, dense = row.size_bytes or 0, row.dense_bytes or 1
        lines.append(
            f"{name:78} {row.sparsity or 0:5.3f}  {row.ratio:7.4f} ± {row.ratio_error:.3f}  {row.kl:6.4f}  {size / 1e6:5.1f}  {size / dense:5.3f}"
            f"  {row.quantize_s or 0:7.1f}  {(row.peak_above_imports_bytes or 0) / 1e9:.2f}"
        )
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours beside llm-compressor's SparseGPT, and beside ours of the paper, at the same number of tokens: shares of the excess."""
    found = []
    for how, mask in (("sparsity=0.5", "0:0"), ("pattern=2:4", "2:4")):
        for tokens in sorted({row.tokens for row in rows if row.tokens}):
            same = {row.name: row for row in rows if row.tokens == tokens and row.excess}
            best = next((row for name, row in same.items() if name.startswith(f"prune(admm, {how}") and "|" not in name), None)
            peer = next((row for name, row in same.items() if name.startswith("sparsegpt(") and f"mask_structure={mask}" in name), None)
            paper = next((row for name, row in same.items() if name.startswith(f"prune(sparsegpt, {how}, damping")), None)
            if best is None:
                continue
            shares = {name: None if other is None else best.excess / other.excess for name, other in (("llm-compressor", peer), ("paper", paper))}  # type: ignore[operator]
            found.append({"how": how, "tokens": tokens, "ratio": best.ratio, "share_of_excess": shares})
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2-135m-offgrid"), help="a Hugging Face folder of a decoder")
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file (default: the embedded text)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="calibration tokens, in windows of 1,024")
    parser.add_argument("--peers", default="", help="llm-compressor, torch-pruning; parted by commas")
    parser.add_argument("--only", choices=("ours", "peers"), help="measure only these")
    parser.add_argument("--recipe", action="append", help="one of ours instead of the list; {tokens} becomes the number of tokens")
    parser.add_argument("--rerun", action="append", default=[], metavar="PEER", help="measure its rows again; `ours` too")
    parser.add_argument("--environments", type=Path, default=Path("/tmp/compression-peers"), help="where peers' environments are or are made")
    parser.add_argument("--work", type=Path, default=Path("/tmp/compression-work"), help="scratch: artifacts, and the original's logits (2 GB)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pruning.json")
    parser.add_argument("--test-windows", type=int, default=TEST_WINDOWS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=5400, help="seconds of one row")
    parser.add_argument("--quiet", action="store_true", help="say that the machine runs nothing else: times may be compared")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    bench = Bench(
        model=arguments.model, text=arguments.text, environments=arguments.environments, work=arguments.work, test_windows=arguments.test_windows,
        threads=arguments.threads, timeout_s=arguments.timeout, quiet=arguments.quiet, keep=False,
    )  # fmt: skip
    for tokens in arguments.tokens:
        theirs = [case for case in PEERS if case.peer in arguments.peers.split(",")] if arguments.only != "ours" else []
        for case in (*theirs, *(our_cases(arguments.recipe or RECIPES, tokens) if arguments.only != "peers" else ())):
            key = bench.key(case, tokens)
            if key in read_rows(arguments.out) and case.peer not in arguments.rerun:
                continue
            began = time.perf_counter()
            row = measure(bench, case, tokens)
            write_rows(arguments.out, (read_rows(arguments.out) | {key: row}).values())
            print(f"{row.peer} {row.name}: {row.failure or f'ratio {row.ratio:.4f}'} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
    text = bench.text_fingerprint()
    rows = [row for row in read_rows(arguments.out).values() if row.model == arguments.model.name and row.text == text]
    print(table(rows))
    print(json.dumps({"goals": goals(rows), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
