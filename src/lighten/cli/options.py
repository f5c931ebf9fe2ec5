"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from functools import partial
from typing import Any

from lighten.cost.optimizer_state import OPTIMIZERS
from lighten.cost.sizes import parse_sizes
from lighten.cost.workload import ATTENTIONS, BASE_BITS, CACHE_KEEPERS, CROSS_ENTROPIES, PHASES, RECOMPUTES, Workload
from lighten.errors import WorkloadError
from lighten.parallel.plan import OFFLOADS, SCHEDULES, SHARDS


def add_workload(parser: argparse.ArgumentParser, *, phases: tuple[str, ...] = PHASES) -> None:
    """--phase, --batch-size, --seq-len, --new-tokens."""
    _add_phase(parser, phases)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    parser.add_argument("--seq-len", type=int, default=128, metavar="N", help="tokens of a sequence, or of its prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=0, metavar="N", help="tokens to generate")


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """--lengths."""
    parser.add_argument(
        "--lengths", dest="lengths_of", choices=("equal", "text"), default="equal",
        help="of texts that are encoded: all of --seq-len tokens (default), or each its own, of the texts of --text, --seq-len at most",
    )  # fmt: skip


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """--phase, and the sizes of `add_workload`, each of which may be several."""
    _add_phase(parser, PHASES)
    several = "N or several: 1,8,32 or 512:131072:*2 or 64:512:+64"
    for flag, says in (
        ("batch-size", "sequences at once (default 1)"),
        ("seq-len", "tokens of a sequence, or of its prompt (default 128, or the model's own)"),
        ("new-tokens", "tokens to generate"),
    ):
        parser.add_argument(f"--{flag}", type=partial(_sizes, flag.replace("-", "_")), metavar="N,…", help=f"{says}; {several}")
        several = "several likewise"


def add_task(parser: argparse.ArgumentParser) -> None:
    """--task, --metric."""
    parser.add_argument(
        "--task", metavar="FILE|lm-eval:NAME",
        help="your own labelled file, .csv, .tsv or .jsonl, or a task of lm-eval whose data is here: quality at what you use the model for",
    )  # fmt: skip
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME|FILE.py:FUNCTION",
        help="of the task (default: the usual one of its answers), or your own function (predictions, references), whose file is run; repeatable",
    )  # fmt: skip


def _add_phase(parser: argparse.ArgumentParser, phases: tuple[str, ...]) -> None:
    parser.add_argument("--phase", choices=phases, help="default: encode of an encoder, prefill of a decoder")


def _sizes(name: str, text: str) -> tuple[int, ...]:
    """One whole number, which `Workload` judges, or several sizes."""
    try:
        return (int(text),) if len(text) < 20 and "_" not in text else parse_sizes(text, name)
    except (ValueError, WorkloadError):
        pass
    try:
        return parse_sizes(text, name)
    except WorkloadError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_numerics(parser: argparse.ArgumentParser) -> None:
    """--dtype, --kv-dtype, --attention, --optimizer, --recompute, and what a training step or a cache has beside these."""
    parser.add_argument("--dtype", metavar="D", help="of activations and unquantized weights (default: the checkpoint's)")
    parser.add_argument("--kv-dtype", metavar="D", help="of cached keys and values")
    parser.add_argument("--attention", choices=ATTENTIONS, default="sdpa", help="default sdpa")
    parser.add_argument("--optimizer", metavar="NAME", help=f"of phase train: {', '.join(OPTIMIZERS)} (default adamw)")
    parser.add_argument("--recompute", choices=RECOMPUTES, default="none", help="of phase train (default none)")
    for field, (flag, options) in _MORE.items():
        if field in _WORKLOAD_FIELDS:
            parser.add_argument(flag, dest=field, default=_WORKLOAD_FIELDS[field].default, **options)


_WORKLOAD_FIELDS = {field.name: field for field in fields(Workload)}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "target_len": ("--target-len", {"type": int, "metavar": "N", "help": "of an encoder-decoder: tokens of the target (default: the source's)"}),
    "master_weights": ("--master-weights", {"action": "store_true", "help": "of phase train: a float32 copy of narrower weights, which is updated"}),
    "lora_rank": ("--lora-rank", {"type": int, "metavar": "R", "help": "of phase train: adapters of this rank are trained, all else is frozen"}),
    "lora_targets": ("--lora-targets", {"metavar": "NAMES", "help": "modules that get an adapter, such as q_proj,v_proj (default all-linear)"}),
    "base_bits": ("--base-bits", {"type": int, "choices": BASE_BITS, "help": "with --lora-rank: the frozen linears are quantized to so many bits"}),
    "cross_entropy": ("--cross-entropy", {"choices": CROSS_ENTROPIES, "help": "of phase train: how the loss is taken (default full)"}),
    "kept_by": ("--cache", {"choices": CACHE_KEEPERS, "help": "whose cache keeps keys and values (default transformers)"}),
}  # fmt: skip
"""Field of `Workload` → its option; one that has no effect is refused by `Workload`."""


_PLAN: dict[str, dict[str, Any]] = {
    "dp": {"type": int, "metavar": "N", "help": "data-parallel ranks (default: what the other sizes leave of the devices)"},
    "tp": {"type": int, "metavar": "N", "help": "tensor-parallel ranks (default 1; outside training all devices, where no size is given)"},
    "pp": {"type": int, "metavar": "N", "help": "pipeline stages (default 1)"},
    "cp": {"type": int, "metavar": "N", "help": "context-parallel ranks (default 1)"},
    "ep": {"type": int, "metavar": "N", "help": "expert-parallel ranks, of the data-parallel ones (default 1)"},
    "shard": {"choices": SHARDS, "help": "what data-parallel ranks share out (default none)"},
    "shard_group": {"type": int, "metavar": "N", "help": "ranks that one copy is shared out over (default: all)"},
    "sequence_parallel": {"action": "store_true", "default": None, "help": "with --tp: norms and dropouts are split over positions"},
    "schedule": {"choices": SCHEDULES, "help": "order of a pipeline's micro-batches (default 1f1b)"},
    "virtual_stages": {"type": int, "metavar": "N", "help": "pieces a device of an interleaved pipeline (default 1)"},
    "micro_batch_size": {"type": int, "metavar": "N", "help": "sequences of one forward pass of a rank (default: its share of the batch)"},
    "offload": {"choices": OFFLOADS, "help": "what lies in the host's memory (default none)"},
}  # fmt: skip
"""Field of `Plan` → its option."""


STACKS = ("fused", "compiled", "eager", "engine", "ggml", "local")
"""Kinds of software that train, then kinds that run inference; which phase takes which is checked where they are used."""


def add_plan(parser: argparse.ArgumentParser) -> None:
    """How a workload is spread over the devices of --device NAME:COUNT; what is not given is None."""
    group = parser.add_argument_group("how --device NAME:COUNT is used")
    for name, options in _PLAN.items():
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def plan_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan options that are given, by the names of `Plan`."""
    return {name: value for name in _PLAN if (value := getattr(arguments, name, None)) is not None}


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, and what of it is the user's own."""
    parser.add_argument(
        "--device", metavar="NAME[:COUNT]", help="this: the machine that `lighten probe` measured; a name of `lighten devices`; or a .toml file"
    )
    parser.add_argument("--price", metavar="USD/h", help="of one device, such as 2.10/h (default: its list price, where one is known)")
    parser.add_argument("--network", metavar="RATE", help="between nodes, of one device and direction, such as 400Gb/s or 50GB/s")
    parser.add_argument("--devices-per-node", type=int, metavar="N", help="that the innermost link joins (default: the device's own)")
    parser.add_argument("--stack", choices=STACKS, help="kind of software: of training fused (default), compiled, eager; else engine (default), …")


def place_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the device is the user's own, and the software, where given."""
    names = ("price", "network", "devices_per_node", "stack", "tokens", "concurrency", "linear_dtype")
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def workload_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The workload options that a command has, by the names of `Workload`."""
    return {name: getattr(arguments, name) for name in _WORKLOAD_FIELDS if hasattr(arguments, name)}


def add_case(parser: argparse.ArgumentParser) -> None:
    """The workload's options; a length that is not given is the model's own, as an image's is."""
    add_workload(parser)
    parser.set_defaults(seq_len=None)
    add_numerics(parser)


def case_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the workload, the device and the plan is given, as `verbs.estimate` takes it."""
    return {**workload_of(arguments), **place_of(arguments), **plan_of(arguments)}


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def progress(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
