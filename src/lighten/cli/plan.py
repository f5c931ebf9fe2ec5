"""How to spread a training step over many devices: every plan is tried, the best few are shown, with why the next ones are worse."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lighten import verbs
from lighten.cli.options import add_device, add_json, add_plan, place_of, plan_of, positive, print_json, progress
from lighten.cost.optimizer_state import OPTIMIZERS
from lighten.cost.workload import ATTENTIONS, CROSS_ENTROPIES, PHASES, RECOMPUTES, Recompute, Workload
from lighten.device.bill import Bill, parse_tokens, training_run
from lighten.device.device import Device
from lighten.errors import OutputError, WorkloadError
from lighten.parallel.flags import FRAMEWORKS, Flags, can_express, plan_flags
from lighten.parallel.plan import Plan
from lighten.parallel.search import GOALS, MARGIN, Asked, Candidate, Found, search_plans
from lighten.report.table import format_table
from lighten.report.written import write_whole
from lighten.units import format_bytes, format_count, format_seconds

EXAMPLE = """lighten plan .models/smollm2-135m --device h100-sxm:64 --global-batch 1024 --seq-len 2048
  lighten plan .models/smollm2-135m --device h100-sxm:8 --global-batch 64 --seq-len 1024 --shard zero3 --write torchtitan -o plan.toml"""
TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format, a config.json, .safetensors or .gguf file, or a hub id")
    parser.add_argument("--phase", choices=PHASES, default="train", help="default train, of which alone plans are searched")
    parser.add_argument(
        "--global-batch", "--batch-size", dest="batch_size", type=positive, required=True, metavar="N", help="sequences of a step, of all devices"
    )
    parser.add_argument("--seq-len", type=positive, required=True, metavar="N", help="tokens of a sequence")
    parser.add_argument("--dtype", metavar="D", help="of activations and weights (default: the checkpoint's)")
    parser.add_argument("--no-master-weights", action="store_true", help="16-bit weights are updated as they are (default: float32 copies are)")
    parser.add_argument("--attention", choices=ATTENTIONS, default="sdpa", help="default sdpa")
    parser.add_argument("--optimizer", metavar="NAME", default="adamw", help=f"{', '.join(OPTIMIZERS)} (default adamw)")
    parser.add_argument("--recompute", choices=RECOMPUTES, help="default: searched")
    parser.add_argument("--cross-entropy", choices=CROSS_ENTROPIES, default="full", help="how the loss is taken (default full)")
    add_device(parser)
    add_plan(parser)
    parser.add_argument(
        "--goal", choices=GOALS, default="time", help="what is least: a step's time (default), its money, where fewer devices may do, or memory"
    )
    parser.add_argument(
        "--memory-margin", type=_share, default=MARGIN, metavar="X", help=f"share of a device's memory that stays free (default {MARGIN})"
    )
    parser.add_argument("--top", type=positive, default=TOP, metavar="N", help=f"plans that are shown (default {TOP})")
    parser.add_argument("--tokens", metavar="N", help="of a whole training run, such as 2T: its days, energy and money")
    parser.add_argument("--write", metavar="FRAMEWORK", help=f"the best plan in the words of one: {', '.join(FRAMEWORKS)}")
    parser.add_argument("-o", "--output", metavar="FILE", help="where --write goes (default: standard output)")
    parser.add_argument("--plot", metavar="FILE", help=".html or .svg: memory against time of all plans that fit")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    asked = _asked(arguments)
    tokens = None if arguments.tokens is None else parse_tokens(arguments.tokens)
    started = time.perf_counter()
    found = search_plans(asked, top=arguments.top)
    took = time.perf_counter() - started
    written = _written(arguments, asked, found) if arguments.write else None
    if arguments.plot:
        _plot(arguments.plot, asked, found)
    if arguments.json:
        document = plan_json(asked, found, tokens, took)
        print_json(document | ({"written": _written_json(arguments, *written)} if written else {}))
    elif written is None or arguments.output:
        print(plan_text(asked, found, tokens, took, arguments.model))
    if written is not None:
        _hand_over(arguments, *written)
    return 0


def _asked(arguments: argparse.Namespace) -> Asked:
    """What the options ask for."""
    own = place_of(arguments)
    own.pop("tokens", None)
    return verbs.plan_request(
        arguments.model, device=arguments.device, goal=arguments.goal, margin=arguments.memory_margin, phase=arguments.phase,
        batch_size=arguments.batch_size, seq_len=arguments.seq_len, dtype=arguments.dtype, attention=arguments.attention,
        optimizer=arguments.optimizer, cross_entropy=arguments.cross_entropy, recompute=arguments.recompute,
        master_weights=False if arguments.no_master_weights else None, **own, **plan_of(arguments),
    )  # fmt: skip


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; 0.1 leaves a tenth free")
    return value


# ---- the plan in a framework's words ----


def _written(arguments: argparse.Namespace, asked: Asked, found: Found) -> tuple[Candidate, Flags]:
    """The best plan that the framework can express, and its words."""

    def accept(plan: Plan, recompute: Recompute) -> bool:
        return can_express(plan, asked.spec, _with(asked.workload, recompute), arguments.write)

    best = found.best[0]
    if not accept(best.plan, best.recompute):
        best = search_plans(asked, top=1, accept=accept).best[0]
    workload = _with(asked.workload, best.recompute)
    return best, plan_flags(best.plan, asked.spec, workload, arguments.write, devices_per_node=asked.device.devices_per_node)


def _with(workload: Workload, recompute: Recompute) -> Workload:
    return replace(workload, recompute=recompute)


def _hand_over(arguments: argparse.Namespace, best: Candidate, flags: Flags) -> None:
    """Write or print the framework's file; what it cannot say goes to stderr."""
    if arguments.output:
        write_whole(Path(arguments.output), flags.text)
        progress(f"{arguments.output}: {best.plan} for {flags.framework}")
    elif not arguments.json:
        print(flags.text, end="")
    for line in flags.beside:
        progress(f"  · {line}")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse what could not be written before anything is searched.

    Raises:
        OutputError: a file that is there already, a folder that is not, or a kind of picture that is not drawn.
        WorkloadError: a framework that is not known, or an output without one.
    """
    if arguments.write is not None and arguments.write not in FRAMEWORKS:
        raise WorkloadError(f"framework {arguments.write!r} is not known; known: {', '.join(FRAMEWORKS)}.")
    if arguments.output is not None and arguments.write is None:
        raise OutputError(f"-o {arguments.output} has no effect without --write; frameworks: {', '.join(FRAMEWORKS)}.")
    if arguments.plot is not None and Path(arguments.plot).suffix not in (".html", ".svg"):
        raise OutputError(f"--plot {arguments.plot}: a plot is written as .html or .svg.")
    for text in (arguments.output, arguments.plot):
        if text is not None and Path(text).exists():
            raise OutputError(f"{text} is there already; remove it, or name another file.")
        if text is not None and not Path(text).parent.is_dir():
            raise OutputError(f"{text} cannot be written: there is no folder {Path(text).parent}.")


def _plot(path: str, asked: Asked, found: Found) -> None:
    from lighten.report.plan_page import plan_picture

    write_whole(Path(path), plan_picture(asked, found, kind=Path(path).suffix))


# ---- for programs ----


def plan_json(asked: Asked, found: Found, tokens: int | None, seconds: float) -> dict[str, Any]:
    """The document of `lighten plan --json`."""
    spec, workload = asked.spec, asked.workload
    return {
        "model": {"name": spec.name, "family": spec.family, "source": spec.source, "dtype": spec.dtype, "layers": spec.layers},
        "workload": {
            "phase": workload.phase, "batch_size": workload.batch_size, "seq_len": workload.seq_len, "dtype": workload.dtype,
            "attention": workload.attention, "optimizer": workload.optimizer, "master_weights": workload.master_weights,
            "cross_entropy": workload.cross_entropy, "tokens": workload.tokens,
        },
        "device": asked.device.name, "count": asked.count, "goal": asked.goal, "fixed": dict(asked.fixed), "memory_margin": asked.margin,
        "capacity": round(found.capacity), "searched": found.searched, "fitting": found.fitting, "seconds": seconds,
        "plans": [_candidate_json(each, asked, tokens) for each in found.best],
        "missed": None if found.missed is None else _candidate_json(found.missed, asked, tokens),
    }  # fmt: skip


def _candidate_json(each: Candidate, asked: Asked, tokens: int | None) -> dict[str, Any]:
    step = each.time
    document = {
        "plan": asdict(each.plan) | {"recompute": each.recompute, "devices": each.plan.devices},
        "memory": {"peak": each.memory.peak, **asdict(each.memory)},
        "time": {
            "seconds": step.seconds, "low": step.low, "high": step.high, "bound_by": step.bound_by, "tokens_per_second": step.tokens_per_s,
            "parts": dict(each.details),
        },
        "mfu": step.mfu, "usd_per_step": each.usd, "why": each.why or None,
    }  # fmt: skip
    return document | ({} if tokens is None else {"run": _run_json(_run(each, asked, tokens))})


def _run(each: Candidate, asked: Asked, tokens: int) -> Bill:
    return training_run(asked.device, each.plan.devices, tokens=tokens, tokens_per_s=each.time.tokens_per_s)


def _run_json(bill: Bill) -> dict[str, Any]:
    return {"tokens": bill.tokens, "days": bill.days, "megawatt_hours": bill.megawatt_hours, "usd": bill.usd}


def _written_json(arguments: argparse.Namespace, best: Candidate, flags: Flags) -> dict[str, Any]:
    return {
        "framework": flags.framework, "file": arguments.output, "text": flags.text, "beside": list(flags.beside),
        "plan": asdict(best.plan) | {"recompute": best.recompute, "devices": best.plan.devices},
    }  # fmt: skip


# ---- for people ----


def plan_text(asked: Asked, found: Found, tokens: int | None, seconds: float, model: str) -> str:
    """The best plans as a table, a line of why under each but the first."""
    header = ["#", "plan", "memory", "a step", "tokens/s", "MFU", "money", *([] if tokens is None else ["run"])]
    rows: list[list[str]] = []
    for rank, each in enumerate(found.best, start=1):
        rows += _rows(str(rank), each, asked, tokens)
    if found.missed is not None:
        rows += _rows("-", found.missed, asked, tokens)
    best = found.best[0]
    lines = [_headline(asked, found, seconds), "", format_table(rows, header), "", f"  · the first one: {_command(best, asked, model)}"]
    lines.append(f"  · a step's range holds 90 %; money is of {_money(asked.device)}")
    return "\n".join(lines)


def _headline(asked: Asked, found: Found, seconds: float) -> str:
    workload, spec = asked.workload, asked.spec
    masters = " with float32 masters" if workload.master_weights else ""
    shape = f"batch {workload.batch_size} × {workload.seq_len}"
    what = f"{spec.name} ({format_count(spec.total_parameters)} parameters), train, {shape}, {workload.dtype}{masters}, {workload.optimizer}"
    memory = f"{format_bytes(found.capacity)} of {format_bytes(asked.device.memory_bytes)} a device"
    return (
        f"{what}, on {asked.count} × {asked.device.name}\n"
        f"{found.searched:,} plans in {format_seconds(seconds)}, {found.fitting:,} of them fit into {memory}; goal: {asked.goal}"
    )


def _rows(rank: str, each: Candidate, asked: Asked, tokens: int | None) -> list[list[str]]:
    step = each.time
    time_ = f"{format_seconds(step.seconds)} ({format_seconds(step.low)} to {format_seconds(step.high)})"
    money = "not known" if each.usd is None else f"${each.usd:,.3g}"
    row = [rank, plan_words(each), format_bytes(each.memory.peak), time_, format_count(step.tokens_per_s), f"{step.mfu:.0%}", money]
    if tokens is not None:
        row.append(_run_words(_run(each, asked, tokens)))
    return [row, *([["", f"  {each.why}"]] if each.why else [])]


def _run_words(bill: Bill) -> str:
    money = "" if bill.usd is None else f", ${format_count(bill.usd)}"
    energy = "" if bill.megawatt_hours is None else f", {bill.megawatt_hours:,.3g} MWh"
    return f"{bill.days:,.3g} days{energy}{money}"


def plan_words(each: Candidate) -> str:
    """A plan in few letters: sizes above 1, what is shared out and over how many ranks, how a micro-batch runs."""
    plan = each.plan
    sizes = " ".join(f"{name}={size}" for name in ("dp", "tp", "pp", "cp", "ep") if (size := getattr(plan, name)) > 1) or "one device"
    how = [plan.shard + (f"/{plan.shard_group}" if plan.shard_group else "")] if plan.shard != "none" else []
    how += [f"micro {plan.micro_batch_size}"]
    how += [f"v={plan.virtual_stages}"] if plan.virtual_stages > 1 else []
    how += ["sp"] if plan.sequence_parallel else []
    how += [f"recompute {each.recompute}"] if each.recompute != "none" else []
    how += [f"offload {plan.offload}"] if plan.offload != "none" else []
    return f"{sizes}\n{', '.join(how)}"


def _command(best: Candidate, asked: Asked, model: str) -> str:
    """The same plan for `lighten estimate`."""
    values: Mapping[str, Any] = asdict(best.plan)
    defaults = asdict(Plan())
    flags = []
    for name, value in values.items():
        if value != defaults[name]:
            flag = f"--{name.replace('_', '-')}"
            flags.append(flag if value is True else f"{flag} {value}")
    again = [] if best.recompute == "none" else [f"--recompute {best.recompute}"]
    masters = ["--master-weights"] if asked.workload.master_weights else []
    shape = f"--batch-size {asked.workload.batch_size} --seq-len {asked.workload.seq_len} --dtype {asked.workload.dtype}"
    return " ".join([f"lighten estimate {model} --device {asked.device.name}:{best.plan.devices} --phase train {shape}", *masters, *again, *flags])


def _money(device: Device) -> str:
    if device.price is None:
        return "no known price: --price 2.10/h gives one"
    return f"${device.price.usd_per_hour:.2f} an hour and device ({device.price.source.partition(',')[0]}, {device.price.date})"
