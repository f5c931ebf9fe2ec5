"""Every plan is found, each is judged as `step_time` and `rank_memory` judge it alone, and what is said of it holds."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from test_flags import LLAMA, MIXTRAL, spec_of

from lighten.cli import plan as command
from lighten.cost.workload import RECOMPUTES, Workload
from lighten.device.device import Device, Link, Price
from lighten.errors import DeviceError, LightenError, OutputError, WorkloadError
from lighten.model import ModelSpec
from lighten.parallel.columns import all_plans, divisors
from lighten.parallel.footprint import plan_bytes
from lighten.parallel.memory import rank_memory
from lighten.parallel.pipeline import check_schedule
from lighten.parallel.plan import OFFLOADS, SHARDS, Plan
from lighten.parallel.rank import check_plan
from lighten.parallel.search import Asked, Field, Found, plan_seconds, search_plans, time_details
from lighten.parallel.step_time import Stack, step_time

GB = 10**9
BIG: dict[str, Any] = LLAMA | {
    "hidden_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 32000,
}  # fmt: skip


def box(**changes: Any) -> Device:
    """A device of round figures: four in a node."""
    figures: dict[str, Any] = {
        "name": "box", "full_name": "Box", "vendor": "Nobody", "kind": "gpu", "peak_flops_per_s": {"bfloat16": 1e15, "float32": 1e14},
        "memory_bytes": 80 * GB, "bandwidth_bytes_per_s": 3e12, "price": Price(usd_per_hour=3.6, date="2026-11-22", source="given"),
        "links": (Link(name="bus", bytes_per_s=400e9, devices=4), Link(name="wire", bytes_per_s=50e9)), "power_w": 700.0,
    }  # fmt: skip
    return Device(**(figures | changes))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(tmp_path_factory.mktemp("mixtral"), MIXTRAL)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(tmp_path_factory.mktemp("big"), BIG)


def training(**changes: Any) -> Workload:
    asked: dict[str, Any] = {
        "phase": "train", "batch_size": 16, "seq_len": 1024, "dtype": "bfloat16", "optimizer": "adamw", "master_weights": True,
    }  # fmt: skip
    return Workload(**(asked | changes))


def asked(spec: ModelSpec, count: int = 8, **changes: Any) -> Asked:
    given: dict[str, Any] = {"spec": spec, "workload": training(), "device": box(), "count": count, "fixed": {}}
    return Asked(**(given | changes))


# ---- which plans there are ----


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_valid_plan_is_there_once(name: str, request: pytest.FixtureRequest) -> None:
    """Brute force: each combination of divisors that neither `Plan` nor `check_plan` refuses, by the rules that `all_plans` states."""
    spec, workload, count = request.getfixturevalue(name), training(batch_size=8), 4
    columns = all_plans(spec, workload, box(), count, {"shard_group": 4})
    found = [(columns.plan(row), columns.recompute_of(row)) for row in range(len(columns))]
    sizes = divisors(count)
    wanted = set()
    for dp, tp, pp, cp in product(sizes, repeat=4):
        if dp * tp * pp * cp != count or (cp > 1 and (workload.seq_len % (2 * cp) or workload.seq_len // cp < 256)):
            continue
        ways = product([1, 2, 4, 8], SHARDS[1:], [1, 2, 4, 8], [1, 2, 4, 8], [False, True], RECOMPUTES, OFFLOADS)
        for ep, shard, micro, v, split, recompute, offload in ways:
            try:
                plan = Plan(
                    dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, shard=shard, shard_group=4, micro_batch_size=micro, sequence_parallel=split, virtual_stages=v,
                    schedule="interleaved" if v > 1 else "1f1b", offload=offload,
                )  # fmt: skip
                check_plan(spec, workload, plan)
                check_schedule(plan, plan.micro_batches(workload.batch_size))
            except LightenError:
                continue
            if (pp > 1 or v == 1) and (ep == 1 or name == "mixtral"):
                wanted.add((plan, recompute))
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_groups_fill_levels_of_links(llama: ModelSpec) -> None:
    columns = all_plans(llama, training(batch_size=64), box(), 64, {"tp": 1, "pp": 1, "cp": 1})
    assert set(columns.shard_group.tolist()) == {0, 4, 32}


def test_what_is_decided_is_kept(llama: ModelSpec) -> None:
    fixed = {"tp": 2, "shard": "zero3", "recompute": "full", "micro_batch_size": 2, "offload": "optimizer", "sequence_parallel": True}
    columns = all_plans(llama, training(), box(), 8, fixed)
    for row in range(len(columns)):
        plan = columns.plan(row)
        assert columns.recompute_of(row) == "full"
        assert (plan.tp, plan.shard, plan.micro_batch_size, plan.offload, plan.sequence_parallel) == (2, "zero3", 2, "optimizer", True)
    assert set(all_plans(llama, training(), box(), 8, {"schedule": "1f1b"}).virtual_stages.tolist()) == {1}
    assert min(all_plans(llama, training(), box(), 8, {"schedule": "interleaved"}).virtual_stages.tolist()) == 2


# ---- the same seconds and bytes as alone ----


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_seconds_are_those_of_step_time(name: str, request: pytest.FixtureRequest) -> None:
    spec, workload = request.getfixturevalue(name), training(batch_size=32)
    columns = all_plans(spec, workload, box(), 16)
    parts = plan_seconds(columns, spec, workload, box(), Stack())
    for row in random.Random(7).sample(range(len(columns)), 150):
        own = replace(workload, recompute=columns.recompute_of(row))
        alone = step_time(spec, own, columns.plan(row), box())
        assert {part: float(each[row]) for part, each in parts.items()} == pytest.approx(dict(alone.parts), rel=1e-9, abs=1e-15)
        details = time_details(spec, own, columns.plan(row), box(), Stack())
        assert sum(details.values()) == pytest.approx(alone.seconds, rel=1e-9)


@pytest.mark.parametrize(("name", "worst"), [("big", 0.25), ("mixtral", 0.35)])
def test_bytes_are_near_those_of_rank_memory(name: str, worst: float, request: pytest.FixtureRequest) -> None:
    """The search ranks by `plan_bytes` and asks `rank_memory` where it decides; small models are more uneven."""
    spec, workload = request.getfixturevalue(name), training(batch_size=32, seq_len=4096)
    columns = all_plans(spec, workload, box(), 16)
    found = plan_bytes(columns, spec, workload)
    ratios = []
    for row in random.Random(3).sample(range(len(columns)), 60):
        alone = rank_memory(spec, replace(workload, recompute=columns.recompute_of(row)), columns.plan(row)).peak
        ratios.append(found[row] / alone)
    assert median(ratios) == pytest.approx(1, abs=0.02)
    assert max(abs(ratio - 1) for ratio in ratios) < worst


GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
    "vocab_size": 32128,
}  # fmt: skip
QWEN_MOE: dict[str, Any] = MIXTRAL | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0, 1], "moe_intermediate_size": 256,
    "head_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize("config", [GPT2, T5, QWEN_MOE], ids=["tied head", "two streams", "blocks that differ"])
def test_bytes_of_other_models_are_no_less_than_rank_memory_has(config: dict[str, Any], tmp_path: Path) -> None:
    """What does not fit by `rank_memory` should not be taken for fitting; too much is asked again."""
    spec, workload = spec_of(tmp_path, config), training(batch_size=32, seq_len=512)
    columns = all_plans(spec, workload, box(), 8)
    found = plan_bytes(columns, spec, workload)
    ratios = [
        found[row] / rank_memory(spec, replace(workload, recompute=columns.recompute_of(row)), columns.plan(row)).peak
        for row in random.Random(11).sample(range(len(columns)), 30)
    ]
    assert 0.9 < min(ratios) < median(ratios) < 1.1
    assert max(ratios) < 1.5


def test_large_models_fit_where_rank_memory_says(big: ModelSpec) -> None:
    workload = training(batch_size=64, seq_len=4096)
    columns = all_plans(big, workload, box(), 32)
    found, capacity = plan_bytes(columns, big, workload), 40 * GB
    wrong = 0
    rows = random.Random(5).sample(range(len(columns)), 60)
    for row in rows:
        alone = rank_memory(big, replace(workload, recompute=columns.recompute_of(row)), columns.plan(row)).peak
        wrong += (found[row] <= capacity) != (alone <= capacity)
    assert wrong <= 0.05 * len(rows)


# ---- the best ones ----


@pytest.fixture(scope="module")
def found(big: ModelSpec) -> Found:
    return search_plans(asked(big, 16, workload=training(batch_size=32, seq_len=4096), device=box(memory_bytes=40 * GB)), top=4)


def test_the_best_is_the_fastest_that_fits(llama: ModelSpec) -> None:
    """Brute force over all plans, with the functions for one plan."""
    question = asked(llama, 4, workload=training(batch_size=4), device=box(memory_bytes=250 * 10**6))
    best = search_plans(question, top=1).best[0]
    field = Field(asked=question, count=4, columns=all_plans(llama, question.workload, question.device, 4))
    times = [
        step_time(llama, field.workload(row), field.columns.plan(row), question.device).seconds
        for row in range(len(field))
        if field.memory(row).peak <= question.capacity
    ]
    assert 0 < len(times) < len(field)
    assert best.time.seconds == pytest.approx(min(times), rel=1e-9)


def test_shown_plans_fit_and_get_slower(found: Found) -> None:
    seconds = [each.time.seconds for each in found.best]
    assert seconds == sorted(seconds)
    assert all(each.memory.peak <= found.capacity == 36 * GB for each in found.best)
    assert len({(each.plan.dp, each.plan.tp, each.plan.pp, each.plan.cp, each.plan.ep) for each in found.best}) == len(found.best) == 4
    assert 0 < found.fitting < found.searched


def test_why_the_next_ones_are_worse(found: Found) -> None:
    assert found.best[0].why == ""
    for each in found.best[1:]:
        slower = each.time.seconds / found.best[0].time.seconds - 1
        assert each.why
        if slower > 0.02:
            said = float(each.why.split("+")[1].split()[0])
            assert 0 < said / 100 < 10 * slower


def test_a_faster_plan_without_room_is_told(found: Found) -> None:
    missed = found.missed
    assert missed is not None
    assert missed.memory.peak > found.capacity
    assert missed.time.seconds < found.best[0].time.seconds
    assert "more than a device has, else" in missed.why


def test_money_may_take_fewer_devices(llama: ModelSpec) -> None:
    fast = search_plans(asked(llama, 16), top=1).best[0]
    cheap = search_plans(asked(llama, 16, goal="money"), top=1).best[0]
    assert cheap.plan.devices < fast.plan.devices == 16
    assert cheap.usd is not None and fast.usd is not None  # noqa: PT018 - for the type checker
    assert cheap.usd < fast.usd
    assert cheap.usd == pytest.approx(3.6 * cheap.plan.devices * cheap.time.seconds / 3600)


def test_least_memory(big: ModelSpec, found: Found) -> None:
    question = replace(asked(big, 16, workload=training(batch_size=32, seq_len=4096), device=box(memory_bytes=40 * GB)), goal="memory")
    least = search_plans(question, top=2).best
    assert least[0].memory.peak < min(each.memory.peak for each in found.best)
    assert "more memory" in least[1].why


def test_only_what_is_accepted(llama: ModelSpec) -> None:
    best = search_plans(asked(llama), top=3, accept=lambda plan, recompute: plan.tp == 2 and recompute == "full").best
    assert all(each.plan.tp == 2 and each.recompute == "full" for each in best)


def test_slow_links_are_named(big: ModelSpec) -> None:
    question = asked(big, 16, workload=training(batch_size=32, seq_len=4096))
    best = search_plans(replace(question, fixed={"tp": 4}), top=1).best[0]
    worse = search_plans(replace(question, fixed={"tp": 16, "sequence_parallel": True}), top=1).best[0]
    from lighten.parallel.search import why_worse

    assert "tensor traffic over wire +" in why_worse(worse, best, question)


# ---- what cannot be ----

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"fixed": {"tp": 3}}, "tp=3 does not divide the number of devices, 8; sizes of 8 are 1, 2, 4, 8"),
    ({"fixed": {"tp": 2, "dp": 2, "pp": 1, "cp": 1}}, "tp=2 · pp=1 · cp=1 = 4 is not the number of devices, 8"),
    ({"count": 48, "fixed": {"tp": 16}}, "tp=16 does not divide the 8 attention heads"),
    ({"count": 32, "fixed": {"pp": 16}}, "needs 16 blocks"),
    ({"fixed": {"ep": 3}}, "ep=3"),
    ({"fixed": {"cp": 8}, "workload": training(seq_len=1001)}, "cp=8 has to divide seq_len=1001 into pairs of equal pieces"),
    ({"fixed": {"dp": 8}, "workload": training(batch_size=12)}, "dp=8 does not divide the batch of 12 sequences"),
    ({"fixed": {"dp": 0}}, "dp=0 is not positive"),
    ({"fixed": {"schedule": "gpipe"}}, "schedule=gpipe is 1f1b with more memory"),
    ({"fixed": {"colour": "red"}}, "colour: no part of a plan; parts: dp, tp"),
    ({"fixed": {"micro_batch_size": 5}}, "micro_batch_size=5 divides none of the possible shares of the batch: 2, 4, 8, 16"),
    ({"fixed": {"shard": "zero3", "shard_group": 3}}, "shard_group=3 divides none of the possible dp · cp: 1, 2, 4, 8"),
    ({"fixed": {"shard": "none", "shard_group": 4}}, "shard_group needs shard zero1, zero2 or zero3"),
    ({"fixed": {"sequence_parallel": True, "tp": 1}}, "no plan of 8 devices has sequence_parallel=True, tp=1: sequence_parallel needs tp above 1"),
    ({"fixed": {"schedule": "1f1b", "virtual_stages": 4}}, "at most blocks / pp virtual stages (1F1B has 1), and micro-batches in groups of pp"),
    ({"count": 7 * 11, "workload": training(batch_size=16)}, "on 77 devices; the next smaller number that works is"),
    ({"device": box(memory_bytes=10**7)}, "none of "),
    ({"device": box(memory_bytes=10**7)}, "too much; more devices, or a smaller batch or length, would need less"),
    ({"device": box(memory_bytes=None)}, "box: its memory is not known"),
    ({"goal": "beauty"}, "goal 'beauty' is not known; known: time, money, memory"),
    ({"margin": 1.5}, "memory margin 1.5 is no share of a device's memory"),
    ({"workload": Workload(phase="prefill")}, "plans of phase prefill are not searched"),
]


@pytest.mark.parametrize(("changes", "text"), MISTAKES)
def test_mistakes_are_one_line(llama: ModelSpec, changes: dict[str, Any], text: str) -> None:
    with pytest.raises((WorkloadError, DeviceError)) as error:
        search_plans(asked(llama, **changes))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


@pytest.fixture
def run(folder: Path) -> Callable[..., int]:
    def call(*options: str) -> int:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        asked_for = [] if "--device" in options else ["--device", "h100-sxm:16"]
        return command.run(parser.parse_args([str(folder), "--global-batch", "64", "--seq-len", "1024", *asked_for, *options]))

    return call


def test_json_says_all_of_it(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "--top", "3", "--tokens", "1B", "--price", "2.00/h") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "h100-sxm"
    assert found["count"] == 16
    assert found["searched"] >= found["fitting"] > 0
    assert found["workload"]["master_weights"] is True
    assert len(found["plans"]) == 3
    for each in found["plans"]:
        plan = each["plan"]
        assert plan["dp"] * plan["tp"] * plan["pp"] * plan["cp"] == plan["devices"] == 16
        assert sum(each["time"]["parts"].values()) == pytest.approx(each["time"]["seconds"])
        assert each["time"]["low"] < each["time"]["seconds"] < each["time"]["high"]
        assert each["usd_per_step"] == pytest.approx(2.0 * 16 * each["time"]["seconds"] / 3600)
        assert each["run"]["days"] == pytest.approx(1e9 / each["time"]["tokens_per_second"] / 86400)
        assert each["memory"]["peak"] <= found["capacity"]
    assert found["plans"][0]["why"] is None


def test_text_is_a_table(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--top", "2") == 0
    text = capsys.readouterr().out
    assert "on 16 × h100-sxm" in text
    assert "lighten estimate" in text
    assert "--dp" in text
    assert max(map(len, text.splitlines()[2:8])) <= 120


@pytest.mark.parametrize(("framework", "suffix"), [("torchtitan", ".toml"), ("megatron", ".args"), ("deepspeed", ".json"), ("accelerate", ".yaml")])
def test_flags_are_written(run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, framework: str, suffix: str) -> None:
    path = tmp_path / f"plan{suffix}"
    assert run("--write", framework, "-o", str(path), "--cp", "1") == 0
    assert path.read_text()
    assert list(tmp_path.iterdir()) == [path]
    capsys.readouterr()
    assert run("--write", framework, "--cp", "1") == 0
    assert capsys.readouterr().out == path.read_text()


def test_a_framework_gets_the_best_plan_that_it_can_express(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--write", "accelerate", "--json", "--tp", "2") == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written["plan"]["pp"] == 1
    assert written["plan"]["sequence_parallel"] is False
    assert "parallelism_config_tp_size: 2" in written["text"]
    with pytest.raises(WorkloadError, match=r"none of .* as asked; one that fits is"):
        run("--write", "deepspeed", "--pp", "2")


@pytest.mark.parametrize("kind", [".html", ".svg"])
def test_picture(run: Callable[..., int], tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"plan{kind}"
    assert run("--plot", str(path)) == 0
    text = path.read_text()
    assert "memory of the fullest device" in text
    assert "<script" not in text
    assert text.count("what takes the time") >= 1
    if kind == ".svg":
        assert "var(" not in text


OPTIONS: list[tuple[list[str], type[LightenError], str]] = [
    (["--write", "colossal"], WorkloadError, "framework 'colossal' is not known; known: torchtitan"),
    (["-o", "x.toml"], OutputError, "-o x.toml has no effect without --write"),
    (["--write", "torchtitan", "-o", "/nowhere/x.toml"], OutputError, "/nowhere/x.toml cannot be written: there is no folder /nowhere"),
    (["--plot", "x.png"], OutputError, "--plot x.png: a plot is written as .html or .svg"),
    (["--phase", "decode"], WorkloadError, "plans of phase decode are not searched"),
    (["--device", "h100-sxm:0"], DeviceError, "h100-sxm"),
    (["--device", "this"], DeviceError, "--device this"),
    (["--stack", "ggml"], WorkloadError, "--stack ggml runs inference; kinds of software that train: fused"),
    (["--dtype", "float32", "--no-master-weights"], WorkloadError, "--no-master-weights has no effect with float32"),
]


@pytest.mark.parametrize(("options", "kind", "text"), OPTIONS)
def test_wrong_options_are_one_line(run: Callable[..., int], options: list[str], kind: type[LightenError], text: str) -> None:
    with pytest.raises(kind) as error:
        run(*options)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_overwritten(run: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("mine")
    with pytest.raises(OutputError, match="is there already; remove it, or name another file"):
        run("--write", "torchtitan", "-o", str(path))
    assert path.read_text() == "mine"


def test_device_is_needed(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(DeviceError, match="--device NAME:COUNT is needed"):
        command.run(parser.parse_args([str(folder), "--global-batch", "64", "--seq-len", "1024"]))
