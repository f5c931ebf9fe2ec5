"""Run a model or an artifact beside its original: latency, memory, size, quality, each with its prediction."""

from __future__ import annotations

import argparse
from typing import Any

from lighten import verbs
from lighten.cli.options import add_json, add_lengths, add_task, add_workload, positive, print_json, progress, workload_of
from lighten.units import format_bytes, format_seconds

EXAMPLE = "lighten measure minilm-int8 --batch-size 32 --seq-len 128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|ARTIFACT", help="a model folder, or a folder that `lighten compress` wrote")
    parser.add_argument(
        "--runtime", metavar="NAME",
        help="for a model folder (default torch), also with options, such as 'torch(speculate=prompt-lookup)'; an artifact has its own, and takes "
        "other options with it",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="text to judge by: .txt or .jsonl (default: the embedded text)")
    add_task(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores that this process may use")
    parser.add_argument("--profile", action="store_true", help="tell too what its operators take, by the profiler of torch, onnxruntime or openvino")
    add_workload(parser, phases=("encode", "prefill", "decode", "generate"))
    add_lengths(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    found = verbs.measure(
        arguments.model, runtime=arguments.runtime, text=arguments.text, task=arguments.task, metrics=arguments.metric,
        threads=arguments.threads, own_lengths=arguments.lengths_of == "text",
        profile=arguments.profile, log=progress, **workload_of(arguments),
    )  # fmt: skip
    print_json(found) if arguments.json else print(measurement_text(found))
    return 0


def measurement_text(found: dict[str, Any]) -> str:
    """predicted | measured | ratio, then quality."""
    predicted, ratio = found["predicted"], found["ratio"]
    rows = [("", "predicted", "measured", "ratio")]
    for key, name, say in (
        ("size_bytes", "size", format_bytes), ("peak_memory_bytes", "peak memory", format_bytes), ("latency_s", "latency", format_seconds),
    ):  # fmt: skip
        rows.append((name, say(predicted[key]), say(found[key]), f"{ratio[key]:.2f}" if ratio[key] else "not known"))
    lines = [f"{name:12} {a:>12} {b:>12} {c:>10}" for name, a, b, c in rows]
    first, third = format_seconds(found["latency_q1_s"]), format_seconds(found["latency_q3_s"])
    lines.append(
        f"latency quartiles {first} to {third}, {found['throughput']:,.0f} tokens/s, {found['speedup']:.2f}x as fast as the original beside it"
    )
    if found["texts_per_second"] is not None:
        lines.append(f"{found['texts_per_second']:,.1f} texts/s, each of its own length")
    if found["tokens_per_pass"] is not None:
        share = f"{found['accepted']:.0%} of proposals accepted, {found['tokens_per_pass']:.2f} tokens a pass"
        said = predicted["tokens_per_pass"]
        lines.append(f"{share}, on prompts of the text" + (f"; {said:.2f} were predicted" if said is not None else ""))
    lines.append(f"ran in {found['precision']}, ready after {format_seconds(found['cold_start_s'])}")
    for name, score in found["quality"].items():
        error = f" ± {score['standard_error']:.4f}" if score["standard_error"] is not None else ""
        before = found["original_quality"].get(name)
        beside = f", the original {before['value']:.4f}" if before else ""
        lines.append(f"{name:20} {score['value']:.4f}{error}{beside}")
    return "\n".join([*lines, *profile_lines(found["profile"])])


def profile_lines(profile: dict[str, Any] | None) -> list[str]:
    """Seconds by kind of operator, predicted and measured, and their shares of the run."""
    if profile is None:
        return []
    predicted, measured = profile["predicted"] or {}, profile["measured"]
    lines = ["", f"{'operators':12} {'predicted':>12} {'measured':>12} {'share':>10}"]
    for kind, seconds in measured.items():
        lines.append(f"{kind:12} {format_seconds(predicted.get(kind)):>12} {format_seconds(seconds):>12} {seconds / profile['measured_s']:>10.0%}")
    total = sum(predicted.values()) if predicted else None
    return [*lines, f"{'all':12} {format_seconds(total):>12} {format_seconds(profile['measured_s']):>12}"]
