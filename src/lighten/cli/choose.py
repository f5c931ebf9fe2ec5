"""Try recipes on runtimes and choose the best under your constraints: an artifact and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lighten import verbs
from lighten.cli.options import add_json, add_lengths, add_task, add_workload, positive, print_json, progress, workload_of
from lighten.model.runnable import read_runnable
from lighten.recipe import read_recipe

EXAMPLE = 'lighten choose .models/minilm --require "neighbour_agreement>=0.97" --minimize latency --batch-size 32 -o chosen'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format")
    parser.add_argument(
        "--require", action="append", default=[], metavar="LIMIT", help="such as size<=50MB, latency<=0.5x, quality>=0.99; repeatable"
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--minimize", metavar="FIGURE", help="latency (default), time_to_first_token, size, memory, energy, cost, perplexity_ratio, kl")
    goal.add_argument("--maximize", metavar="FIGURE", help="throughput, or a figure of quality such as neighbour_agreement or the task's")
    parser.add_argument("--budget", metavar="TIME", help="no trial starts that would end later, such as 20min (default: none)")
    parser.add_argument("--recipe", action="append", default=[], metavar="TEXT|FILE", help="try this one instead of the usual ones; repeatable")
    parser.add_argument("--space", metavar="FILE", help="search the recipes that this YAML file spans instead of the usual ones (docs/choosing.md)")
    parser.add_argument("--power", metavar="W", help="what this machine draws, such as 65W: for energy")
    parser.add_argument("--price", metavar="USD/h", help="what this machine costs, such as 0.40/h: for cost")
    parser.add_argument("--fresh", action="store_true", help="measure anew what earlier runs of this user measured here")
    parser.add_argument("--text", metavar="FILE", help="calibrate and judge by it: .txt or .jsonl (default: the embedded text)")
    add_task(parser)
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where trials run: here, or on the machines of a Ray cluster")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="of the cluster (default: RAY_ADDRESS, else one that is started here)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of every trial (default: all cores that this process may use)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a folder; run again with the same one to go on")
    add_workload(parser, phases=("encode", "prefill", "decode", "generate"))
    add_lengths(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from lighten.choose.request import Request, parse_budget, parse_power
    from lighten.choose.space import read_space
    from lighten.device.catalog import parse_price
    from lighten.report import choice_table, prediction_table

    spec = read_runnable(arguments.model)
    workload = verbs.make_workload(spec, dtype="float32", **workload_of(arguments))
    if arguments.lengths_of == "text":
        workload = verbs.with_own_lengths(workload, arguments.model, arguments.text)
    request = Request(
        model=Path(arguments.model), out=Path(arguments.output), workload=workload,
        require=tuple(arguments.require), minimize=arguments.minimize, maximize=arguments.maximize,
        budget_s=parse_budget(arguments.budget) if arguments.budget else None,
        text=Path(arguments.text) if arguments.text else None, recipes=tuple(read_recipe(text) for text in arguments.recipe),
        task=Path(arguments.task) if arguments.task else None, metrics=tuple(arguments.metric),
        space=read_space(Path(arguments.space)) if arguments.space else None, fresh=arguments.fresh,
        engine=arguments.engine, ray_address=arguments.ray_address,
        power_w=parse_power(arguments.power) if arguments.power else None, usd_per_hour=parse_price(arguments.price) if arguments.price else None,
        threads=arguments.threads or verbs.usable_cores(), command=shlex.join(["lighten", *sys.argv[1:]]),
    )  # fmt: skip
    choice = verbs.choose(request, log=progress)
    if arguments.json:
        print_json(choice)
    else:
        print(f"\n{choice_table(choice)}\n\n{prediction_table(choice)}\n\nreport: {request.out / 'report.html'}")
    return 0 if choice["chosen"] else 1
