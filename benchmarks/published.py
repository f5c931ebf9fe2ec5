"""Published rows of training and inference held against what is predicted for them.

    python benchmarks/published.py --rows training.csv inference.csv [--leave-one-out]

FILE has the columns of training.csv or of inference.csv; which of them, its header tells. Each figure of a row is graded by itself: step time and
peak memory of training, decode, prefill and serving speed of inference, and whether the model fits. The error is |predicted / published - 1|: of
seconds a step for training, of tokens a second for inference. Tables show signed error (bias: the median of its log), absolute error and how
often the 90 % range held the truth, by source, framework, device and parallelism; rows that cannot be graded are counted by reason. With
--leave-one-out the constants are fitted again without each source in turn, and the same tables are shown for the rows that were left out.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from published_inference import grade_inference
from published_rows import Grade, LeftOut, Row, read_rows
from published_training import grade_left_out as grade_training_left_out
from published_training import grade_training

TIMED = ("training_time", "training_memory", "decode", "prefill", "serving")
TRAINING_COLUMNS = {"step_time_s", "tokens_per_s_per_gpu", "tokens_per_s", "samples_per_s", "tflops_per_gpu", "mfu_pct", "peak_mem_gb"}
INFERENCE_COLUMNS = {"decode_tok_s", "prefill_tok_s", "total_output_tok_s", "latency_ms", "ttft_ms", "tpot_ms"}
SHOWN = 40
"""Groups of a table that are shown: those with the most figures."""


def kind_of_file(path: Path, rows: Sequence[Row]) -> str:
    """Training or inference, whichever figures the header has more of.

    Raises:
        LeftOut: neither.
    """
    header = set(rows[0]) if rows else set()
    training, inference = len(header & TRAINING_COLUMNS), len(header & INFERENCE_COLUMNS)
    if not training and not inference:
        raise LeftOut(f"it has no rows with a column of {', '.join(sorted(TRAINING_COLUMNS | INFERENCE_COLUMNS))}")
    return "training" if training > inference else "inference"


def graded(path: Path) -> tuple[str, list[Row], list[Grade]]:
    """A file's kind, rows and grades.

    Raises:
        LeftOut, OSError: it is no such table.
    """
    rows = read_rows(path)
    kind = kind_of_file(path, rows)
    return kind, rows, (grade_training if kind == "training" else grade_inference)(rows, file=path.name)


def left_out(kind: str, rows: Sequence[Row], file: str) -> list[Grade]:
    """The same by constants that were fitted without each row's source."""
    if kind == "training":
        return grade_training_left_out(rows, file=file)
    from fit_inference import grade_left_out

    return grade_left_out(rows, file=file)


# ---- figures ----


def error_of(grade: Grade) -> float | None:
    """Predicted over published, less 1; None where there is no figure, or one beyond what floats hold."""
    if grade.predicted is None or not grade.truth or grade.left_out:
        return None
    error = grade.predicted / grade.truth - 1
    return error if math.isfinite(error) else None


def figures(grades: Iterable[Grade]) -> dict[str, Any]:
    """The JSON object: errors by kind, right answers of `fits`, coverage of the range."""
    grades = list(grades)
    found: dict[str, Any] = {}
    for kind in TIMED:
        off = [abs(error) for grade in grades if grade.kind == kind and (error := error_of(grade)) is not None]
        median, high = (round(float(np.quantile(off, share)), 4) if off else None for share in (0.5, 0.9))
        found[kind] = {"median_error": median, "p90_error": high, "n": len(off)}
    answers = [grade.predicted == grade.truth for grade in grades if grade.kind == "fits" and not grade.left_out]
    found["fits"] = {"accuracy": round(sum(answers) / len(answers), 4) if answers else None, "n": len(answers)}
    found["does_not_fit"] = _does_not_fit(grades)
    inside = [held for grade in grades if (held := in_range(grade)) is not None]
    found["all"] = {"range_coverage": round(sum(inside) / len(inside), 4) if inside else None}
    return found


def _does_not_fit(grades: Iterable[Grade]) -> dict[str, Any]:
    """Right answers of the rows that ran out of memory alone: nearly all published rows fit, which a constant answer would get right."""
    answers = [grade.predicted == grade.truth for grade in grades if grade.kind == "fits" and not grade.left_out and not grade.truth]
    return {"accuracy": round(sum(answers) / len(answers), 4) if answers else None, "n": len(answers)}


def in_range(grade: Grade) -> bool | None:
    """Whether the range holds the truth; None where there is none."""
    if grade.low is None or grade.high is None or grade.truth is None or grade.left_out:
        return None
    return grade.low <= grade.truth <= grade.high


# ---- tables ----

GROUPINGS: tuple[tuple[str, Callable[[Grade], str]], ...] = (
    ("source", lambda grade: grade.source),
    ("framework", lambda grade: grade.framework),
    ("device", lambda grade: grade.device),
    ("parallelism", lambda grade: grade.parallelism),
)


def show(title: str, grades: Sequence[Grade]) -> None:
    """Tables by source, framework, device and parallelism, and what could not be graded."""
    print(f"\n# {title}")
    for name, key in GROUPINGS:
        groups: defaultdict[tuple[str, str], list[Grade]] = defaultdict(list)
        for grade in grades:
            if error_of(grade) is not None and grade.kind != "fits":
                groups[grade.kind, key(grade)].append(grade)
        print(f"\nby {name:44} {'kind':16} {'n':>4} {'bias':>6} {'median':>7} {'p90':>7} {'in range':>8}")
        largest = sorted(groups.items(), key=lambda group: -len(group[1]))
        for (kind, value), own in largest[:SHOWN]:
            print(_line(value, kind, own))
        if rest := [grade for _, own in largest[SHOWN:] for grade in own]:
            print(_line(f"{len(largest) - SHOWN} more", "all", rest))
    wrong = [grade for grade in grades if grade.kind == "fits" and not grade.left_out and grade.predicted != grade.truth]
    if wrong:
        print(f"\nfits: {len(wrong)} wrong: {' '.join(grade.id for grade in wrong[:SHOWN])}")
    reasons = Counter(f"{grade.kind}: {grade.left_out}" for grade in grades if grade.left_out)
    print(f"\nnot gradable: {sum(reasons.values())}")
    for reason, count in reasons.most_common():
        print(f"  {count:5d}  {reason[:140]}")


def _line(value: str, kind: str, grades: Sequence[Grade]) -> str:
    errors = [error for grade in grades if (error := error_of(grade)) is not None]
    logs = [math.log1p(error) for error in errors if error > -1]
    held = [inside for grade in grades if (inside := in_range(grade)) is not None]
    median, high = np.quantile(np.abs(errors), 0.5), np.quantile(np.abs(errors), 0.9)
    share = f"{sum(held) / len(held):8.0%}" if held else f"{'-':>8}"
    return f"   {value[:44]:44} {kind:16} {len(errors):4d} {np.median(logs):+6.2f} {median:7.1%} {high:7.1%} {share}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, metavar="FILE", help="tables with columns of training.csv or inference.csv")
    parser.add_argument("--leave-one-out", action="store_true", help="fit again without each source, and show those errors apart (minutes)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write each grade, one JSON object a line; with --leave-one-out those not fitted")
    given = parser.parse_args()
    everything: list[Grade] = []
    apart: list[Grade] = []
    for path in given.rows:
        try:
            kind, rows, grades = graded(path)
        except (LeftOut, OSError, ValueError, LookupError) as error:  # no table, no text, or no such file
            print(f"published.py: {path}: {(str(error).splitlines() or ['cannot be read'])[0]}", file=sys.stderr)
            return 2
        show(path.name, grades)
        everything += grades
        if given.leave_one_out:
            without = left_out(kind, rows, path.name)
            show(f"{path.name}: not fitted, each source by constants that never saw it", without)
            apart += without
    found = figures(everything)
    if given.leave_one_out:
        found["not_fitted"] = figures(apart)
    if given.out:
        graded_rows = [grade for grade in (apart if given.leave_one_out else everything) if error_of(grade) is not None]
        given.out.write_text("".join(json.dumps(asdict(grade), allow_nan=False) + "\n" for grade in graded_rows), "utf-8")
    print(json.dumps(found, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
