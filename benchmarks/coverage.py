"""For every model that transformers' auto mappings build from its default config: parameters and matrix FLOPs by trace and by formula.

Truth: the number of elements of the module's distinct parameters, and PyTorch's FlopCounterMode over one forward pass of the same module on
fake tensors with eager attention (where a module calls SDPA all the same, its mathematical form) and batched experts, which that counter
sees in full. It knows nothing of lighten's own counting.

    python benchmarks/coverage.py                        every mapping (ten minutes)
    python benchmarks/coverage.py --mapping causal-lm --types llama,qwen2 --verbose
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto import modeling_auto as auto

from lighten.cost.operators import Forward, forward_operators
from lighten.cost.workload import Workload
from lighten.errors import LightenError
from lighten.model.families import describe, has_formula
from lighten.model.spec import ModelSpec
from lighten.trace.torch_model import TransformersModel
from lighten.trace.torch_run import Run, fake_tensors, follow_run

MAPPINGS = {
    "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq-lm": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "speech-seq2seq": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
BATCH, LENGTH = 2, 32


class TooLong(Exception):
    """A model that took longer than its share."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: Any) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def truth(followed: TransformersModel) -> tuple[int, int]:
    """(parameters, matmul FLOPs) by PyTorch's own counter."""
    workload = Workload(phase="train", batch_size=BATCH, seq_len=LENGTH, attention="eager", optimizer="sgd")
    config = followed.config
    for each in (config, *(value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig))):
        each._experts_implementation = "batched_mm"
    with fake_tensors(), torch.no_grad():
        module = followed._build(workload).eval()
        inputs = followed._inputs(module, workload)
        options = {"use_cache": False} if "use_cache" in followed._takes else {}
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(**inputs, **options)
        return sum(p.numel() for p in module.parameters()), counter.get_total_flops()


def by_trace(followed: TransformersModel) -> tuple[int, int, dict[str, int]]:
    if followed.is_encoder_decoder:  # both sides as long, as the truth has it: the inputs of a training step
        both = Workload(phase="train", batch_size=BATCH, seq_len=LENGTH, attention="eager", optimizer="sgd")
        run = Run(
            build=lambda: followed._build(both), inputs=lambda module, _: followed._inputs(module, both), loss=followed._loss,
            infer=lambda module, inputs, _: module(**inputs, **({"use_cache": False} if "use_cache" in followed._takes else {})),
        )  # fmt: skip
        program = follow_run(run, Workload(phase="encode", batch_size=BATCH, seq_len=LENGTH, attention="eager"))
    else:
        phase = "encode" if "encode" in followed.phases else "prefill"
        program = followed.follow(Workload(phase=phase, batch_size=BATCH, seq_len=LENGTH, attention="eager"))  # type: ignore[arg-type]
    return program.total_parameters, program.matmul_flops, dict(program.unknown_ops)


def by_formula(followed: TransformersModel) -> tuple[int, int] | None:
    raw = followed.config.to_dict()
    if not has_formula(raw, followed.architecture):
        return None
    parts = describe(raw, followed.architecture)
    spec = ModelSpec(
        name="", family=followed.family, architecture=followed.architecture, source="", dtype="float32", config=raw, parts=parts
    )  # fmt: skip
    forward = Forward(batch_size=BATCH, query_len=LENGTH, key_len=LENGTH, source_len=LENGTH)
    return spec.total_parameters, sum(op.matmul_flops for op in forward_operators(spec, forward, "float32"))


def short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def examine(model_type: str, architecture: str, seconds: int) -> dict[str, Any]:
    """One row: what each way says, and whether it agrees with the truth."""
    row: dict[str, Any] = {"type": model_type, "architecture": architecture}
    try:
        with at_most(seconds):
            config = transformers.AutoConfig.for_model(model_type)
            followed = TransformersModel(config, architecture)
            row["truth"] = truth(followed)
    except Exception as error:  # noqa: BLE001 - transformers' own failures are rows of the table
        return row | {"outcome": "not built", "why": short(error)}
    try:
        with at_most(3 * seconds):
            parameters, flops, unknown = by_trace(TransformersModel(transformers.AutoConfig.for_model(model_type), architecture))
            row |= {"trace": (parameters, flops), "unknown": unknown}
    except (LightenError, TooLong, AssertionError) as error:
        row["trace_error"] = short(error)
    try:
        row["formula"] = by_formula(followed)
    except LightenError as error:
        row["formula_error"] = short(error)
    return row | {"outcome": "built"}


def examine_task(task: tuple[str, str, str, int]) -> dict[str, Any]:
    mapping, model_type, architecture, seconds = task
    return examine(model_type, architecture, seconds) | {"mapping": mapping}


def quieten() -> None:
    """In each process: one thread, and no advice from transformers."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mapping", choices=MAPPINGS, action="append", help="default: all")
    parser.add_argument("--types", help="model types, separated by commas (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each model (default 60)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--formula-only", action="store_true", help="leave out what has no formula")
    parser.add_argument("--verbose", action="store_true", help="a line for each model")
    asked = parser.parse_args()
    wanted = set(asked.types.split(",")) if asked.types else None
    todo = [
        (mapping, model_type, names if isinstance(names, str) else names[0], asked.seconds)
        for mapping in asked.mapping or MAPPINGS for model_type, names in MAPPINGS[mapping].items()
        if wanted is None or model_type in wanted
    ]  # fmt: skip
    if asked.formula_only:
        todo = [each for each in todo if has_formula({"model_type": each[1]}, each[2])]
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(asked.jobs, initializer=quieten, maxtasksperchild=40) as pool:
        for row in pool.imap(examine_task, todo):
            rows.append(row)
            if asked.verbose or differs(row):
                print(describe_row(row), file=sys.stderr, flush=True)
    print(table(rows))
    for row in rows:
        if row["outcome"] == "not built":
            print(f"not built: {row['mapping']} {row['architecture']}: {row['why']}")
    claimed = sorted({row["type"] for row in rows if row.get("formula")})
    print(f"formula claims {len(claimed)} model types here: {', '.join(claimed)}")
    print(json.dumps(figures(rows)))


def differs(row: dict[str, Any]) -> bool:
    return any(key in row for key in ("trace_error", "formula_error")) or any(
        row.get(way) and tuple(row[way]) != tuple(row["truth"]) for way in ("trace", "formula")
    )


def describe_row(row: dict[str, Any]) -> str:
    said = [f"{row['mapping']} {row['architecture']}:"]
    said += [f"{key}={row[key]}" for key in ("why", "truth", "trace", "trace_error", "formula", "formula_error") if row.get(key)]
    return " ".join(said) + (f" unknown={row['unknown']}" if row.get("unknown") else "")


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    built = [row for row in rows if row["outcome"] == "built"]
    count: Counter[str] = Counter()
    for row in built:
        for way in ("trace", "formula"):
            if row.get(way):
                count[f"{way}_parameters_equal"] += row[way][0] == row["truth"][0]
                count[f"{way}_flops_equal"] += row[way][1] == row["truth"][1]
                count[way] += 1
    unknown: Counter[str] = Counter()
    for row in built:
        unknown.update(row.get("unknown", {}).keys())
    return {
        "rows": len(rows), "built": len(built), **count, "formula_types": len({row["type"] for row in rows if row.get("formula")}),
        "unknown_operators": dict(unknown),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'mapping':<26}{'types':>6}{'built':>7}{'traced':>8}{'params =':>9}{'FLOPs =':>9}{'formula':>9}{'params =':>9}{'FLOPs =':>9}"]
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        found = figures([row for row in rows if row["mapping"] == mapping])
        values = [found.get(key, 0) for key in ("rows", "built", "trace", "trace_parameters_equal", "trace_flops_equal", "formula")]
        values += [found.get(key, 0) for key in ("formula_parameters_equal", "formula_flops_equal")]
        lines.append(f"{mapping:<26}" + "".join(f"{value:>{width}}" for value, width in zip(values, (6, 7, 8, 9, 9, 9, 9, 9), strict=True)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
