"""What a model costs: parameters, FLOPs, memory, and with --device the time. No weight is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lighten import verbs
from lighten.cli.options import add_device, add_json, add_numerics, add_plan, add_sizes, place_of, plan_of, positive, print_json, workload_of
from lighten.cost.sizes import SIZE_NAMES
from lighten.device.bill import Bill
from lighten.errors import LightenError
from lighten.recipe.estimate import Estimate
from lighten.recipe.placement import Placed
from lighten.units import format_bytes, format_count, format_seconds

METHODS = ("auto", "formula", "trace")
EXAMPLE = """lighten estimate .models/minilm --batch-size 32 --seq-len 128 --device this
  lighten estimate .models/minilm --phase train --batch-size 1,8,32 --seq-len 16:512:*2 --plot minilm.html
  lighten estimate .models/minilm --phase train --max batch-size --memory 8GB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder in Hugging Face format, a config.json, .safetensors, .gguf, .onnx or .keras file, a hub id, or package.module:factory",
    )
    add_sizes(parser)
    add_numerics(parser)
    add_device(parser)
    parser.add_argument("--tokens", type=_tokens, metavar="N", help="of a whole training run, such as 2T: days, MWh and money")
    parser.add_argument(
        "--concurrency", type=_concurrency, metavar="N|max", help="of phase generate: serve so many requests at once, batched in flight"
    )
    parser.add_argument("--linear-dtype", choices=("float8", "float4", "tf32"), help="of phase train there: what products with weights run in")
    add_plan(parser)
    parser.add_argument("--recipe", metavar="TEXT|FILE", help="what the model becomes first, such as 'quantize(rtn, bits=4, group_size=64)'")
    parser.add_argument("--method", choices=METHODS, default="auto", help="default auto: the formula where there is one, else by following the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a model's folder brings, to follow it")
    parser.add_argument("--max", choices=[name.replace("_", "-") for name in SIZE_NAMES], help="find the largest that fits into --memory")
    parser.add_argument("--memory", metavar="SIZE", help="such as 24GB or 24GiB: what --max fills; marks what fits in a sweep and a plot")
    parser.add_argument("--csv", metavar="FILE", help="write the points of a sweep")
    parser.add_argument("--plot", metavar="FILE", help=".html or .svg: memory and FLOPs against length, and what has the parameters and FLOPs")
    add_json(parser)


def _tokens(text: str) -> int:
    from lighten.device.bill import parse_tokens

    try:
        return parse_tokens(text)
    except LightenError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _concurrency(text: str) -> int:
    return 0 if text == "max" else positive(text)


def run(arguments: argparse.Namespace) -> int:
    sizes = {name: values for name in SIZE_NAMES if (values := getattr(arguments, name)) is not None}
    if arguments.max or arguments.memory or arguments.csv or arguments.plot or any(len(each) > 1 for each in sizes.values()):
        from lighten.cli.sizes import run_largest, run_sweep

        return run_largest(arguments, sizes) if arguments.max else run_sweep(arguments, sizes)
    found = estimate_at(arguments, {name: each[0] for name, each in sizes.items()})
    print_json(found.as_json()) if arguments.json else print(estimate_text(found))
    return 0


def estimate_at(arguments: argparse.Namespace, sizes: dict[str, int]) -> Estimate:
    """The estimate that the options ask for, at one size; a size that is not given is the model's own."""
    words: dict[str, Any] = {name: value for name, value in workload_of(arguments).items() if name not in SIZE_NAMES} | sizes
    return verbs.estimate(
        arguments.model,
        recipe=arguments.recipe,
        device=arguments.device,
        method=arguments.method,
        trust_remote_code=arguments.trust_remote_code,
        **place_of(arguments),
        **plan_of(arguments),
        **words,
    )


def estimate_text(found: Estimate) -> str:
    """The estimate for people: one line a figure, the parts behind it."""
    spec, asked, memory = found.spec, found.workload, found.memory
    shape = f"batch {asked.batch_size} × {asked.seq_len}" + (f" + {asked.new_tokens} new" if asked.new_tokens else "")
    matmul = sum(found.matmul.values())
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations", "kv_cache", "temporary")}
    lines = [
        f"{spec.name} ({spec.architecture}, {spec.layers} layers), {asked.phase}, {shape}, {asked.dtype}",
        f"  parameters  {spec.total_parameters:,}  ({_shares(spec.parameters(), format_count)})",
        *([f"  trained     {found.trainable_parameters:,}"] if found.trainable_parameters != spec.total_parameters else []),
        f"  FLOPs       {format_count(found.total_flops)}, of them {matmul:,} in matrix products  ({_shares(found.matmul, format_count)})",
        f"  memory      {format_bytes(memory.peak)}  ({_shares({k.replace('_', ' '): v for k, v in parts.items() if v}, format_bytes)})",
        f"  on disk     {format_bytes(found.size_bytes)}",
    ]
    if found.placed:
        lines += _placed_lines(found.placed, asked.tokens, found.mfu)
    if found.process_bytes:
        lines.append(f"  process     {format_bytes(found.process_bytes)} resident at the peak, the runtime included")
    if found.reserved_bytes is not None:
        lines.append(f"  reserved    {format_bytes(found.reserved_bytes)} by CUDA's caching allocator, simulated")
    lines += [f"  · {line}" for line in found.assumptions]
    lines += [f"  ! {line}" for line in found.warnings]
    return "\n".join(lines)


def _placed_lines(placed: Placed, tokens: int, mfu: float | None) -> list[str]:
    """Time, whether it fits, money, a whole run, a server."""
    lines, name = [], placed.device if placed.count == 1 else f"{placed.count} × {placed.device}"
    if time := placed.time:
        range_ = f" ({format_seconds(time.low)} to {format_seconds(time.high)})" if time.low is not None else ""
        share = f", {mfu:.0%} of the {'measured' if placed.label == 'calibrated' else 'published'} peak" if mfu is not None else ""
        lines.append(
            f"  time        {format_seconds(time.seconds)}{range_} on {name}: {tokens / time.seconds:,.0f} tokens/s, bound by {time.bound_by}{share}"
        )
    if placed.free_bytes is not None:
        verdict = (
            f"fits, {format_bytes(placed.free_bytes)} free"
            if placed.free_bytes >= 0
            else f"does not fit, {format_bytes(-placed.free_bytes)} too much"
        )
        lines.append(f"  of {format_bytes(placed.capacity_bytes)}  {verdict}" + (", on the fullest device" if placed.count > 1 else ""))
    if placed.bill:
        lines.append(f"  cost        {_bill(placed.bill)}")
    if placed.run:
        run = placed.run
        energy = f"{run.megawatt_hours:,.4g} MWh at most" if run.megawatt_hours is not None else "energy not known"
        money = f"${run.usd:,.0f}" if run.usd is not None else "price not known, --price gives one"
        lines.append(f"  whole run   {run.days:,.1f} days for {format_count(run.tokens)} tokens, {energy}, {money}")
    if placed.serving:
        serving = placed.serving
        low, high = (f"{serving.output_tokens_per_s * factor:,.0f}" for factor in (serving.low, serving.high))
        lines.append(
            f"  serving     {serving.concurrency} requests at once (at most {serving.largest_concurrency}): "
            f"{serving.output_tokens_per_s:,.0f} new tokens/s ({low} to {high}), "
            f"first token {format_seconds(serving.ttft_s)}, then {format_seconds(serving.tpot_s)} each"
            + (f"; ${placed.served.usd_per_million_tokens:,.3g} a million" if placed.served and placed.served.usd is not None else "")
        )
    return lines


def _bill(bill: Bill) -> str:
    energy = f"{bill.joules:,.3g} J at most" if bill.joules is not None else "energy not known"
    if bill.usd is None:
        return f"{energy}; price not known, --price gives one"
    return f"{energy}; ${bill.usd:,.3g}, ${bill.usd_per_million_tokens:,.3g} a million tokens"


def _shares(parts: dict[str, int], say: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {say(value)}" for name, value in parts.items())
