"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lighten.cost.workload import ATTENTIONS, OPTIMIZER_STATE, PHASES, RECOMPUTES


def add_workload(parser: argparse.ArgumentParser, *, phases: tuple[str, ...] = PHASES) -> None:
    """--phase, --batch-size, --seq-len, --new-tokens."""
    parser.add_argument("--phase", choices=phases, help="default: encode of an encoder, prefill of a decoder")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    parser.add_argument("--seq-len", type=int, default=128, metavar="N", help="tokens of a sequence, or of its prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=0, metavar="N", help="tokens to generate")


def add_numerics(parser: argparse.ArgumentParser) -> None:
    """--dtype, --kv-dtype, --attention, --optimizer, --recompute."""
    parser.add_argument("--dtype", metavar="D", help="of activations and unquantized weights (default: the checkpoint's)")
    parser.add_argument("--kv-dtype", metavar="D", help="of cached keys and values")
    parser.add_argument("--attention", choices=ATTENTIONS, default="sdpa", help="default sdpa")
    parser.add_argument("--optimizer", metavar="NAME", help=f"of phase train: {', '.join(OPTIMIZER_STATE)} (default adamw)")
    parser.add_argument("--recompute", choices=RECOMPUTES, default="none", help="of phase train (default none)")


def workload_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The workload options that a command has, by the names of `Workload`."""
    names = ("phase", "batch_size", "seq_len", "new_tokens", "dtype", "kv_dtype", "attention", "optimizer", "recompute")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


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
