"""Estimates on devices of published figures: the plan that follows from a count, what each option does, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA

import lighten
from lighten.cli.main import main
from lighten.cost.flops import workload_flops
from lighten.cost.workload import Workload
from lighten.errors import DeviceError, WorkloadError
from lighten.model import read_spec
from lighten.model.read import config_spec
from lighten.parallel.memory import rank_memory
from lighten.parallel.plan import Plan
from lighten.recipe import on_machine, parse_recipe
from lighten.recipe.on_machine import engine_name
from lighten.recipe.placement import default_plan

TRAIN = Workload(phase="train", batch_size=16, seq_len=64, dtype="bfloat16", optimizer="adamw")
DECODE = Workload(phase="decode", batch_size=16, seq_len=64, new_tokens=4, dtype="bfloat16")
CONFIG = {
    **LLAMA,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


@given(tp=st.integers(1, 8), pp=st.integers(1, 8), dp=st.integers(1, 8))
def test_data_parallel_ranks_are_what_the_other_sizes_leave(tp, pp, dp):
    assert default_plan(TRAIN, tp * pp * dp, {"tp": tp, "pp": pp}) == Plan(dp=dp, tp=tp, pp=pp)


def test_without_sizes_training_copies_the_model_and_inference_shares_it_out():
    assert default_plan(TRAIN, 8, {}) == Plan(dp=8)
    assert default_plan(DECODE, 8, {}) == Plan(tp=8)
    assert default_plan(DECODE, 8, {"pp": 2}) == Plan(dp=4, pp=2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tp": 3}, "tp=3 does not divide 8 devices."),
        ({"tp": 2, "pp": 8}, "tp=2 · pp=8 does not divide 8 devices."),
        ({"dp": 4, "tp": 4}, "dp=4 · tp=4 is 16 devices, not 8; leave dp out, or ask for so many."),
        ({"dp": 3}, "dp=3 is 3 devices, not 8; leave dp out, or ask for so many."),
        ({"ep": 3}, "ep=3 does not divide dp · cp = 8: experts are spread over data-parallel ranks."),
        ({"tp": 0}, "tp=0 does not divide 8 devices."),
    ],
)
def test_a_plan_that_does_not_multiply_out_is_refused(asked, says):
    with pytest.raises(WorkloadError, match="^" + says.replace("(", r"\(")):
        default_plan(TRAIN, 8, asked)


def test_memory_is_that_of_the_fullest_device(model):
    found = lighten.estimate(model, phase="train", batch_size=16, seq_len=64, dtype="bf16", device="h100-sxm:8", tp=2, shard="zero1")
    plan = Plan(dp=4, tp=2, shard="zero1")
    assert found.placed.plan == plan
    assert found.memory == rank_memory(config_spec(CONFIG, name="m", source=""), TRAIN, plan)
    assert found.as_json()["fits"] == [{"device": "h100-sxm", "count": 8, "free": found.placed.capacity_bytes - found.memory.peak}]


def test_recomputed_products_are_no_work_of_the_model(model):
    """MFU leaves out what is computed twice: the same FLOPs over a longer time."""
    options = {"phase": "train", "batch_size": 16, "seq_len": 64, "dtype": "bf16", "device": "h100-sxm"}
    plain, again = lighten.estimate(model, **options), lighten.estimate(model, recompute="full", **options)
    assert again.mfu * again.time.seconds == pytest.approx(plain.mfu * plain.time.seconds)
    matmul = workload_flops(config_spec(CONFIG, name="m", source=""), TRAIN)["matmul_causal"]
    assert plain.mfu == pytest.approx(matmul / plain.time.seconds / 989e12)


def test_a_whole_run_is_its_tokens_at_the_steps_speed(model):
    found = lighten.estimate(model, phase="train", batch_size=16, seq_len=64, device="h100-sxm:4", price="2.00/h", tokens=10**9).as_json()
    run, seconds = found["run"], 10**9 / found["time"]["tokens_per_second"]
    assert run["seconds"] == pytest.approx(seconds)
    assert run["usd"] == pytest.approx(4 * 2.0 * seconds / 3600)
    assert run["joules"] == pytest.approx(4 * 700.0 * seconds)
    assert found["bill"]["usd_per_million_tokens"] == pytest.approx(run["usd"] / 1e3)


def test_copies_of_the_model_share_the_batch(model):
    one = lighten.estimate(model, phase="decode", batch_size=4, seq_len=64, new_tokens=4, device="h100-sxm")
    four = lighten.estimate(model, phase="decode", batch_size=16, seq_len=64, new_tokens=4, device="h100-sxm:4", dp=4)
    assert four.time.seconds == pytest.approx(one.time.seconds)
    assert four.as_json()["time"]["tokens_per_second"] == pytest.approx(4 * one.as_json()["time"]["tokens_per_second"])


def test_a_server_holds_as_many_requests_as_fit(model):
    options = {"phase": "generate", "seq_len": 64, "new_tokens": 32, "device": "h100-sxm"}
    most = lighten.estimate(model, concurrency=0, **options).as_json()["serving"]
    few = lighten.estimate(model, concurrency=4, **options).as_json()["serving"]
    assert few["concurrency"] == 4 < most["concurrency"] == most["largest_concurrency"]
    assert few["tpot_s"] <= most["tpot_s"]
    assert few["output_tokens_per_s"] < most["output_tokens_per_s"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--device nonsense-9000", "no device is called"),
        ("--device h100", "may be any of"),
        ("--device h100-sxm:0", "0"),
        ("--device h100-sxm:8 --phase prefill --shard zero3", "shard=zero3 has no effect in phase prefill"),
        ("--device h100-sxm:3 --phase prefill", "tp=3"),
        ("--device h100-sxm:8 --phase prefill --dp 8 --batch-size 4", "batch_size=4 does not divide over dp=8"),
        ("--device h100-sxm --phase train --stack ggml", "stack='ggml' does not train"),
        ("--device h100-sxm --stack fused", "stack='fused' runs no inference"),
        ("--device h100-sxm --tokens 2T", "--tokens has no effect in phase prefill"),
        ("--device h100-sxm --concurrency 8", "--concurrency has no effect in phase prefill"),
        ("--device h100-sxm --recipe '@ openvino'", "runtime openvino is timed on this machine alone"),
        (
            "--device h100-sxm --recipe '@ torch(device=cuda)'",
            "device=cuda runs a recipe on this machine; of h100-sxm the prediction needs",
        ),
        ("--device v100-sxm-16gb --dtype bf16", "no known rate of bfloat16"),
        ("--tp 2", "--tp=2 has no effect without a --device of published figures"),
        ("--price 2/h", "--price=2/h has no effect without a --device of published figures"),
        ("--stack eager", "--stack=eager has no effect without a --device of published figures"),
    ],
)
def test_what_does_not_fit_together_is_one_line(model, capsys, options, says):
    import shlex

    assert main(["estimate", model, *shlex.split(options)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_what_runs_on_a_cuda_device_is_not_timed_by_this_machines_processor(model):
    name = engine_name(parse_recipe("@ torch-compile(device=cuda, dtype=float16)"), read_spec(model))
    assert name == "torch-compile-cuda/float16"
    with pytest.raises(DeviceError, match=r"^engine torch-compile-cuda/float16: a CUDA device is not probed; --device NAME predicts one of "):
        on_machine._engine(name, SimpleNamespace(failures={}, engines={}))


def test_one_stream_on_a_device_without_known_products_is_timed_by_its_memory(model):
    found = lighten.estimate(model, phase="decode", seq_len=64, new_tokens=4, device="raspberry-pi-5", stack="ggml")
    assert found.time.bound_by == "memory" or found.time.bound_by == "overhead"
    assert found.mfu is None
    with pytest.raises(DeviceError, match="no known rate of"):
        lighten.estimate(model, phase="decode", batch_size=2, seq_len=64, new_tokens=4, device="raspberry-pi-5", stack="ggml")


def test_half_precision_checkpoints_stay_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float16"}))
    assert lighten.estimate(str(tmp_path)).workload.dtype == "float16"
    assert lighten.estimate(str(tmp_path), phase="decode", device="v100-sxm-16gb").workload.dtype == "float16"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"phase": "train", "dtype": "int8"}, "phase train keeps weights in 16 bits or more, not in int8"),
        ({"phase": "train", "micro_batch_size": 0}, "micro_batch_size=0 is not positive."),
        ({"phase": "generate", "new_tokens": 8, "batch_size": 4, "concurrency": 8}, "--batch-size 4 has no effect with --concurrency"),
        ({"phase": "prefill", "linear_dtype": "float8"}, "--linear-dtype has no effect in phase prefill"),
    ],
)
def test_what_would_be_taken_without_effect_is_refused(model, options, says):
    with pytest.raises(WorkloadError, match=says.replace("(", r"\(")):
        lighten.estimate(model, seq_len=64, device="h100-sxm", **options)


def test_narrow_products_train_faster(model):
    options = {"phase": "train", "batch_size": 64, "seq_len": 512, "dtype": "bf16", "device": "h100-sxm"}
    big = json.loads(Path(model, "config.json").read_text()) | {"hidden_size": 4096, "intermediate_size": 14336}
    Path(model, "config.json").write_text(json.dumps(big))
    assert lighten.estimate(model, linear_dtype="float8", **options).time.seconds < lighten.estimate(model, **options).time.seconds


def test_what_changes_memory_alone_is_said(model):
    fused, eager = (lighten.estimate(model, phase="prefill", seq_len=512, device="h100-sxm", attention=attention) for attention in ("sdpa", "eager"))
    assert eager.memory.peak > fused.memory.peak
    assert eager.time == fused.time
    assert any("attention=eager changes memory alone" in line for line in eager.assumptions)
    assert not any("changes memory alone" in line for line in fused.assumptions)


def test_this_machine_takes_no_count():
    with pytest.raises(DeviceError, match="this machine is one; it takes no count"):
        lighten.estimate("anything", device="this:8")


def test_a_followed_model_has_no_time_on_published_devices():
    import torch

    with pytest.raises(DeviceError, match=r"is followed .*; on h100-sxm the time of a formula's model alone is known\."):
        lighten.estimate(torch.nn.Linear(4, 4), inputs=torch.zeros(2, 4), device="h100-sxm")
