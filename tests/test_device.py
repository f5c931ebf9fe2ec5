"""Stage 3: profiles and predictions, on profiles made by hand; nothing is measured here."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.cost.operators import Forward, Op, forward_operators
from lighten.device import (
    ENGINES,
    Bandwidth,
    BlockSample,
    Calibration,
    EngineProfile,
    Machine,
    Profile,
    Sample,
    find_device,
    load_profile,
    pinned_environment,
    predict_peak_memory,
    predict_time,
    profile_from_json,
    profile_path,
    profile_to_json,
    save_profile,
)
from lighten.device.calibration import block_operators, fit_blocks
from lighten.device.cases import block_spec
from lighten.device.rates import Curve, RateTable, bandwidth_at
from lighten.device.roofline import CLASSES, OPERATOR_KINDS, seconds_by_kind, sum_parts
from lighten.errors import DeviceError, OutputError
from lighten.model.families.llama import describe as describe_llama
from lighten.model.spec import ModelSpec, WeightFormat

FLAT = (Bandwidth(working_set_bytes=1 << 16, read_bytes_per_s=1e20, copy_bytes_per_s=1e20),)
"""So fast that nothing is bound by memory."""
CACHES = (
    Bandwidth(working_set_bytes=1 << 20, read_bytes_per_s=4e11, copy_bytes_per_s=2e11),
    Bandwidth(working_set_bytes=1 << 26, read_bytes_per_s=1e11, copy_bytes_per_s=5e10),
)


def linear_samples() -> list[Sample]:
    """A machine of 100 GFLOP/s with 5 µs to start a product."""
    return [
        Sample(kind="linear", rows=rows, shape=shape, seconds=5e-6 + 2 * rows * shape[0] * shape[1] / 1e11)
        for shape in ((64, 64), (384, 384), (384, 1536), (2048, 2048))
        for rows in (1, 16, 256, 4096)
    ]


def other_samples() -> list[Sample]:
    attention = [
        Sample(kind="attention", rows=rows, shape=(q, k, 32), seconds=1e-6 + 4 * rows * q * k * 32 / 5e10)
        for q, k in ((1, 128), (16, 16), (128, 128), (512, 512))
        for rows in (8, 256)
    ]
    kinds = ("layernorm", "rmsnorm", "gelu", "add", "rotary")
    return attention + [Sample(kind=kind, rows=rows, shape=(), seconds=1e-6 + rows / 5e9) for kind in kinds for rows in (512, 1 << 20)]


def make_engine(**changes: object) -> EngineProfile:
    engine = EngineProfile(
        name="torch/float32", version="1", precision="float32", samples=(*linear_samples(), *other_samples()),
        call_overhead_s=1e-5, operator_overhead_s=2e-6, calibration=Calibration(factors={"linear": 1.0}, spread=0.2, blocks=9),
    )  # fmt: skip
    return replace(engine, **changes)  # type: ignore[arg-type]


def make_profile(bandwidth: tuple[Bandwidth, ...] = FLAT, **engines: EngineProfile) -> Profile:
    machine = Machine(cpu="made up", cores=2, memory_bytes=1 << 34, os="none")
    found = engines or {"torch/float32": make_engine()}
    return Profile(
        machine=machine,
        threads=2,
        bandwidth=bandwidth,
        engines=found,
        failures={"openvino/int8": "ended by signal 11"},
        versions={"torch": "1"},
    )


def linear_op(rows: int, columns: int, outputs: int, weight: WeightFormat | None = None) -> Op:
    weight = weight or WeightFormat()
    return Op(
        name="l", kind="linear", component="mlp", matmul_flops=2 * rows * columns * outputs,
        weight_bytes=weight.stored_bytes(outputs, columns),
        activation_bytes=4 * rows * (columns + outputs), rows=rows, columns=columns, outputs=outputs, weight=weight,
    )  # fmt: skip


def block(**changes: int) -> BlockSample:
    sizes = {
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "layers": 2,
        "batch_size": 4,
        "seq_len": 64,
        **changes,
    }
    return BlockSample(**sizes, seconds=1.0)  # type: ignore[arg-type]


# --- prediction ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", linear_samples())
def test_a_measured_linear_is_predicted_to_the_digit(sample: Sample) -> None:
    table = RateTable(linear_samples())
    assert table.seconds(sample.rows, sample.shape) == pytest.approx(sample.seconds, rel=1e-12)


def test_a_measured_linear_costs_its_sample_and_the_overheads() -> None:
    sample = linear_samples()[5]
    op = linear_op(sample.rows, *sample.shape)
    engine = make_engine()
    predicted = predict_time([op], engine, make_profile())
    assert predicted.seconds == pytest.approx(sample.seconds + engine.call_overhead_s + engine.operator_overhead_s, rel=1e-12)
    assert predicted.bound_by == "compute"
    assert predict_time([linear_op(1, 64, 64)], engine, make_profile()).bound_by == "overhead"


@given(batch=st.integers(1, 64), length=st.integers(1, 512))
def test_seconds_by_kind_are_together_those_of_the_prediction(batch: int, length: int) -> None:
    engine, profile = make_engine(), make_profile(CACHES)
    ops = block_operators(block(batch_size=batch, seq_len=length), "float32")
    found = seconds_by_kind(ops, engine, profile.bandwidth)
    assert tuple(found) == OPERATOR_KINDS
    assert sum(found.values()) == pytest.approx(predict_time(ops, engine, profile).seconds, rel=1e-9)
    assert found["embedding"] == 0
    assert min(found[kind] for kind in ("linear", "attention", "norm", "activation", "other", "between")) > 0


@given(rows=st.integers(1, 20000), more=st.integers(1, 5000), columns=st.integers(16, 9000), outputs=st.integers(16, 9000))
def test_time_grows_with_rows(rows: int, more: int, columns: int, outputs: int) -> None:
    engine, profile = make_engine(), make_profile(CACHES)
    fewer, many = (predict_time([linear_op(count, columns, outputs)], engine, profile).seconds for count in (rows, rows + more))
    assert fewer <= many * (1 + 1e-9)


@given(batch=st.integers(1, 64), more=st.integers(1, 64), length=st.integers(1, 512))
def test_a_model_s_time_grows_with_the_batch_and_lies_in_its_range(batch: int, more: int, length: int) -> None:
    engine, profile = make_engine(), make_profile(CACHES)
    fewer = predict_time(block_operators(block(batch_size=batch, seq_len=length), "float32"), engine, profile)
    many = predict_time(block_operators(block(batch_size=batch + more, seq_len=length), "float32"), engine, profile)
    assert fewer.seconds <= many.seconds
    assert fewer.low is not None
    assert fewer.high is not None
    assert fewer.low < fewer.seconds < fewer.high


def test_between_measured_shapes_the_rate_lies_between_theirs() -> None:
    table = RateTable(linear_samples())
    slowest, between, fastest = (2 * 256 * a * b / table.seconds(256, (a, b)) for a, b in ((64, 64), (600, 600), (2048, 2048)))
    assert slowest < between < fastest


def test_a_product_between_measured_ones_costs_what_a_machine_with_a_start_up_cost_takes() -> None:
    """The made-up machine takes 5 µs for a product of one row however small it is, so time is far from proportional to work."""
    table = RateTable(linear_samples())
    for columns, outputs in ((128, 128), (512, 256), (1024, 1024)):
        truth = 5e-6 + 2 * columns * outputs / 1e11
        assert table.seconds(1, (columns, outputs)) == pytest.approx(truth, rel=0.35)
        assert table.seconds(4096, (columns, outputs)) == pytest.approx(5e-6 + 2 * 4096 * columns * outputs / 1e11, rel=0.02)


def test_noise_that_makes_fewer_rows_slower_does_not_make_time_fall() -> None:
    curve = Curve([(1, 5e-6), (16, 2e-6), (256, 9e-6)])
    assert [math.exp(curve.log_seconds(rows)) for rows in (1, 16, 256)] == pytest.approx([5e-6, 5e-6, 9e-6])


def test_beyond_the_last_point_time_is_in_proportion_to_rows() -> None:
    curve = Curve([(1, 1e-6), (1024, 1e-3)])
    assert math.exp(curve.log_seconds(4096)) == pytest.approx(4e-3)


def test_weights_that_exceed_the_caches_are_bound_by_memory() -> None:
    op = linear_op(1, 2048, 2048)
    predicted = predict_time([op] * 12, make_engine(), make_profile(CACHES))
    weights = 12 * 4 * 2048 * 2048
    assert predicted.bound_by == "memory"
    overheads = 1e-5 + 12 * (2e-6 + 5e-6 + 2 * 2048 * 2048 / 1e11)
    assert predicted.seconds == pytest.approx(weights / 1e11 + overheads, rel=1e-3)


def cold_engine(**changes: object) -> EngineProfile:
    """The made-up machine, on which a weight that comes from memory takes 20 µs more, at 64 rows 8 µs."""
    cold = [
        Sample(kind="cold", rows=rows, shape=shape, seconds=RateTable(linear_samples()).seconds(rows, shape) + added)
        for shape in ((384, 384), (2048, 2048))
        for rows, added in ((1, 20e-6), (64, 8e-6))
    ]
    return make_engine(samples=(*make_engine().samples, *cold), **changes)


@pytest.mark.parametrize(("rows", "added"), [(1, 20e-6), (64, 8e-6), (4096, 8e-6)])
def test_weights_that_no_cache_holds_add_what_was_measured(rows: int, added: float) -> None:
    ops = [linear_op(rows, 2048, 2048)] * 12  # 200 MB, more than the probe's cold set
    warm = sum_parts(ops, cold_engine(), CACHES).by_class["linear"]
    parts = sum_parts(ops, cold_engine(), CACHES).by_class
    assert parts["weights"] == pytest.approx(12 * added, rel=1e-3)
    assert parts["linear"] == warm == sum_parts(ops, make_engine(), CACHES).by_class["linear"]


def test_weights_that_a_cache_holds_add_nothing_and_others_a_share() -> None:
    def added(count: int) -> float:
        return sum_parts([linear_op(1, 384, 384)] * count, cold_engine(), CACHES).by_class["weights"] / count

    assert added(1) == pytest.approx(0, abs=1e-9)  # 0.6 MB of 1 MB
    assert 1e-6 < added(20) < 19e-6
    assert added(300) == pytest.approx(20e-6, rel=1e-3)


def test_large_outputs_pay_for_new_memory() -> None:
    fresh = [Sample(kind="fresh", rows=rows, shape=(), seconds=seconds) for rows, seconds in ((1 << 24, 1e-6), (1 << 25, 1e-2), (1 << 26, 2e-2))]
    engine = make_engine(samples=(*make_engine().samples, *fresh))
    large, small = (sum_parts([linear_op(rows, 64, 4096)], engine, FLAT).by_class["fresh"] for rows in (4096, 1024))
    assert large == pytest.approx(2e-2)  # 64 MB of output
    assert small == pytest.approx(1e-6)
    assert sum_parts([linear_op(4096, 64, 4096)], make_engine(), FLAT).by_class["fresh"] == 0


def test_weight_only_quantization_saves_bytes_and_no_computation() -> None:
    engine, profile = make_engine(name="openvino/float32"), make_profile(CACHES)
    small = WeightFormat(bits=4, group_size=64)

    def seconds(rows: int, weight: WeightFormat | None = None) -> float:
        return predict_time([linear_op(rows, 2048, 2048, weight)] * 12, engine, profile).seconds

    saved = 12 * (4 * 2048 * 2048 - small.stored_bytes(2048, 2048)) / 1e11
    assert seconds(1) - seconds(1, small) == pytest.approx(saved, rel=0.2)  # the fewer bytes stay in faster caches too
    assert seconds(4096) - seconds(4096, small) == pytest.approx(seconds(1) - seconds(1, small), rel=1e-6)


def test_torch_expands_weight_only_codes_and_saves_nothing() -> None:
    engine, profile = make_engine(), make_profile(CACHES)
    small = WeightFormat(bits=4, group_size=64)
    assert predict_time([linear_op(1, 2048, 2048, small)] * 12, engine, profile) == predict_time([linear_op(1, 2048, 2048)] * 12, engine, profile)


def test_an_int8_engine_reads_int8_weights_though_the_spec_is_float() -> None:
    slow = (Bandwidth(working_set_bytes=1 << 16, read_bytes_per_s=1e6, copy_bytes_per_s=1e12),)
    engine = make_engine(name="onnxruntime/int8")
    assert predict_time([linear_op(1, 384, 384)], engine, make_profile(slow)).seconds == pytest.approx(384 * 384 / 1e6, rel=1e-3)  # not 4 bytes each


def test_factors_scale_their_class_alone() -> None:
    profile, ops = make_profile(), block_operators(block(), "float32")
    parts = sum_parts(ops, make_engine(), FLAT).by_class
    plain = predict_time(ops, make_engine(), profile).seconds
    assert plain == pytest.approx(sum(parts.values()))
    doubled = predict_time(ops, make_engine(calibration=Calibration(factors={"attention": 2.0}, spread=0.1, blocks=1)), profile).seconds
    assert doubled - plain == pytest.approx(parts["attention"])


def test_without_blocks_the_range_is_not_known() -> None:
    predicted = predict_time([linear_op(1, 64, 64)], make_engine(calibration=Calibration()), make_profile())
    assert (predicted.low, predicted.high) == (None, None)


def test_every_operator_of_both_families_has_a_measured_kind() -> None:
    config = {
        "vocab_size": 1000,
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
    }
    spec = ModelSpec(
        name="",
        family="llama",
        architecture="",
        source="",
        dtype="float32",
        config=config,
        parts=describe_llama(config, "LlamaForCausalLM"),
    )
    ops = forward_operators(spec, Forward(batch_size=1, query_len=1, key_len=77), "float32")
    assert predict_time(ops, make_engine(), make_profile(CACHES)).seconds > 0
    one_kind = make_engine(samples=tuple(sample for sample in make_engine().samples if sample.kind != "rotary"))
    with pytest.raises(DeviceError, match="measured without rotary; measured: linear"):
        predict_time(ops, one_kind, make_profile())
    assert predict_time(block_operators(block(), "bfloat16"), one_kind, make_profile()).seconds > 0  # a BERT layer has no rotary embedding


def test_operators_without_rows_cost_nothing() -> None:
    """An encoder-decoder's encoder, in a step that has its output in a cache."""
    idle = [
        Op(name="l", kind="linear", component="mlp", columns=64, outputs=64, weight_bytes=4 * 64 * 64),
        Op(name="a", kind="attention", component="attention", outputs=32),
        Op(name="e", kind="gather", component="embedding"),
    ]
    engine, profile = make_engine(), make_profile(CACHES)
    assert predict_time([*idle, linear_op(8, 64, 64)], engine, profile) == predict_time([linear_op(8, 64, 64)], engine, profile)


def test_a_scan_is_timed_by_its_bytes() -> None:
    scan = Op(name="s", kind="elementwise", component="mixer", other_flops=1 << 20, activation_bytes=3 * 4 << 20, rows=64)
    add = Op(name="s", kind="elementwise", component="mixer", other_flops=1 << 20, activation_bytes=3 * 4 << 20, rows=64, columns=1 << 14)
    engine, profile = make_engine(), make_profile(CACHES)
    assert predict_time([scan], engine, profile) == predict_time([add], engine, profile)


def test_peak_memory_is_base_copies_and_activations() -> None:
    engine = make_engine(base_memory_bytes=100, weight_copies=1.5)
    assert predict_peak_memory(200, 30, engine) == 430
    assert predict_peak_memory(200, 30, make_engine()) is None


# --- calibration --------------------------------------------------------------------------------------------------------------------


def blocks_with(factors: dict[str, float], engine: EngineProfile) -> tuple[BlockSample, ...]:
    found = []
    for batch, length in ((1, 8), (1, 64), (4, 128), (16, 32), (2, 512), (32, 128), (1, 256)):
        each = block(batch_size=batch, seq_len=length)
        parts = sum_parts(block_operators(each, "float32"), engine, FLAT).by_class
        found.append(replace(each, seconds=sum(factors[name] * value for name, value in parts.items())))
    return tuple(found)


def test_blocks_that_cost_their_sum_give_factors_of_1_and_no_spread() -> None:
    engine = make_engine()
    found = fit_blocks(replace(engine, blocks=blocks_with(dict.fromkeys(CLASSES, 1.0), engine)), FLAT)
    assert list(found.factors.values()) == pytest.approx([1.0] * len(CLASSES), abs=1e-6)
    assert found.spread == pytest.approx(0, abs=1e-6)
    assert found.blocks == 7


def test_calibration_finds_what_fusion_saves() -> None:
    engine = make_engine()
    truth = {"linear": 1.1, "weights": 1.0, "attention": 0.9, "pointwise": 0.3, "fresh": 1.0, "overhead": 2.0, "overhead_rms": 1.0, "call": 1.0}
    calibrated = replace(engine, blocks=blocks_with(truth, engine))
    calibrated = replace(calibrated, calibration=fit_blocks(calibrated, FLAT))
    unseen = block(batch_size=8, seq_len=200)
    ops = block_operators(unseen, "float32")
    parts = sum_parts(ops, engine, FLAT).by_class
    assert predict_time(ops, calibrated, make_profile()).seconds == pytest.approx(sum(truth[name] * parts[name] for name in parts), rel=0.05)


def test_scattered_blocks_widen_the_range() -> None:
    engine = make_engine()
    even = blocks_with(dict.fromkeys(CLASSES, 1.0), engine)
    noisy = tuple(replace(each, seconds=each.seconds * (1.3 if number % 2 else 1 / 1.3)) for number, each in enumerate(even))
    spread = fit_blocks(replace(engine, blocks=noisy), FLAT).spread
    assert spread is not None
    assert spread > 1.6449 * math.log(1.3)


def test_disturbed_blocks_weigh_less() -> None:
    engine = make_engine()
    even = blocks_with(dict.fromkeys(CLASSES, 1.0), engine)
    slow = tuple(replace(each, seconds=2 * each.seconds, calm=False) for each in even)

    def linear(blocks: tuple[BlockSample, ...]) -> float:
        return fit_blocks(replace(engine, blocks=blocks), FLAT).factors["linear"]

    trusted = tuple(replace(each, calm=True) for each in slow)
    assert 1 < linear((*even, *slow)) < linear((*even, *trusted))


def test_eager_engines_keep_to_what_their_operators_cost() -> None:
    """Where cold weights were measured, models run the very operators that were: blocks twice as slow move their factors less."""
    eager, other = cold_engine(), cold_engine(name="torch-compile/float32")
    doubled = {**dict.fromkeys(CLASSES, 2.0), "overhead": 1.0, "call": 1.0}
    found = [fit_blocks(replace(each, blocks=blocks_with(doubled, each)), FLAT).factors["pointwise"] for each in (eager, other)]
    assert found[0] < found[1]


def test_no_blocks_no_calibration() -> None:
    assert fit_blocks(make_engine(blocks=()), FLAT) == Calibration()


def test_a_block_has_the_flops_of_its_layers() -> None:
    # a layer: 4 projections h×h, 2 of h×4h, 2 attention products; 2 FLOPs a multiply-add (Kaplan et al. 2020, arXiv:2001.08361, table 1)
    each = block()
    tokens, hidden = 4 * 64, 384
    expected = 2 * (24 * tokens * hidden**2 + 4 * 4 * 64 * 64 * hidden)
    ops = forward_operators(block_spec(each), Forward(batch_size=4, query_len=64, key_len=64), "float32")
    assert sum(op.matmul_flops for op in ops) == expected


def test_a_decoder_block_has_the_operators_of_a_llama_s_layers() -> None:
    each = block(hidden_size=192, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512)
    config = {
        "vocab_size": 8, "hidden_size": 192, "num_hidden_layers": each.layers, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 512,
    }  # fmt: skip
    parts = describe_llama(config, "LlamaModel")
    llama = ModelSpec(name="", family="llama", architecture="", source="", dtype="float32", config=config, parts=parts)
    forward = Forward(batch_size=4, query_len=64, key_len=64)

    def shapes(spec: ModelSpec) -> list[tuple[object, ...]]:
        ops = forward_operators(spec, forward, "float32")
        return [(op.kind, op.rows, op.columns, op.outputs, op.flops, op.activation_bytes) for op in ops if op.kind != "gather"]

    assert shapes(block_spec(each)) == shapes(llama)


# --- bandwidth ----------------------------------------------------------------------------------------------------------------------


def test_bandwidth_is_exact_at_points_level_beyond_and_between_them_elsewhere() -> None:
    assert bandwidth_at(CACHES, 1 << 20) == pytest.approx((4e11, 2e11))
    assert bandwidth_at(CACHES, 1 << 26) == pytest.approx((1e11, 5e10))
    assert bandwidth_at(CACHES, 1 << 40) == bandwidth_at(CACHES, 1 << 26)
    assert bandwidth_at(CACHES, 0) == bandwidth_at(CACHES, 1 << 20)
    assert bandwidth_at(CACHES, 1 << 23) == pytest.approx((2e11, 1e11))  # halfway in log


# --- the file -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTEN_HOME", str(tmp_path))
    return tmp_path


def test_a_profile_survives_its_file(home) -> None:
    engine = make_engine(blocks=(block(),), base_memory_bytes=1, weight_copies=1.5, import_s=0.1, load_s=0.2, loaded_bytes=3)
    profile = make_profile(CACHES, **{"torch/float32": engine})
    assert profile_from_json(json.loads(json.dumps(profile_to_json(profile)))) == profile
    assert save_profile(profile) == profile_path() == home / "profile.json"
    assert find_device("this") == find_device("cpu") == load_profile() == profile


def test_blocks_of_a_file_without_key_value_heads_are_encoders(home) -> None:
    data = profile_to_json(make_profile(CACHES, **{"torch/float32": make_engine(blocks=(block(),))}))
    del data["engines"]["torch/float32"]["blocks"][0]["num_key_value_heads"]
    assert profile_from_json(data).engine("torch/float32").blocks == (block(),)


def test_the_profile_lies_in_the_user_s_data_folder(monkeypatch) -> None:
    monkeypatch.delenv("LIGHTEN_HOME", raising=False)
    assert profile_path().parts[-2:] == ("lighten", "profile.json")


def test_a_failed_write_leaves_the_old_profile_and_nothing_beside_it(home, monkeypatch) -> None:
    save_profile(make_profile())
    before = profile_path().read_text()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OutputError, match=r"profile\.json: cannot be written \(No space left on device\); LIGHTEN_HOME names another folder"):
        save_profile(make_profile(CACHES))
    assert profile_path().read_text() == before
    assert [path.name for path in home.iterdir()] == ["profile.json"]


def test_a_folder_that_is_a_file_is_said(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_profile(make_profile(), tmp_path / "file" / "profile.json")


def test_no_profile_says_what_to_run(home) -> None:
    with pytest.raises(DeviceError, match=r"not measured yet .*run `lighten probe` once"):
        find_device("this")


def test_an_unknown_device_lists_what_exists() -> None:
    with pytest.raises(DeviceError, match=r"no device 'h100'; devices: this, cpu"):
        find_device("h100")


def damaged(change) -> str:
    data = profile_to_json(make_profile())
    change(data)
    return json.dumps(data)


DAMAGE = {
    "not JSON": ('{"version": 1, "mach', r"not JSON \(.*at character"),
    "no object": ("[1, 2]", "not a machine profile"),
    "empty": ("", "not JSON"),
    "old": (damaged(lambda d: d.update(version=1)), "version 1, this lighten reads version 2"),
    "missing field": (damaged(lambda d: d.pop("machine")), r"damaged \(KeyError: 'machine'"),
    "unknown field": (damaged(lambda d: d["machine"].update(gpu=1)), "damaged .*gpu"),
    "engines a list": (damaged(lambda d: d.update(engines=[])), r"damaged \(AttributeError"),
    "negative seconds": (damaged(lambda d: d["engines"]["torch/float32"]["samples"][0].update(seconds=-1.0)), r"damaged .*seconds=-1\.0"),
    "seconds not a number": (
        damaged(lambda d: d["engines"]["torch/float32"]["samples"][0].update(seconds=float("nan"))),
        "damaged .*seconds=nan",
    ),
}


@pytest.mark.parametrize(("text", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_profile_is_one_clear_line(home, text: str, said: str) -> None:
    profile_path().write_text(text)
    with pytest.raises(DeviceError, match=said) as caught:
        load_profile()
    assert "run `lighten probe` again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_clear_line(home) -> None:
    profile_path().write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeviceError, match=r"cannot be read .*run `lighten probe` again"):
        load_profile()


def test_an_engine_that_was_not_measured_says_why() -> None:
    profile = make_profile()
    assert profile.engine("torch/float32").runtime == "torch"
    with pytest.raises(DeviceError, match=r"openvino/int8 failed in the probe \(ended by signal 11\).*measured: torch/float32"):
        profile.engine("openvino/int8")
    with pytest.raises(DeviceError, match="onnxruntime/int8 was not measured on this machine"):
        profile.engine("onnxruntime/int8")


def test_only_torch_s_threads_are_bound_to_cores() -> None:
    assert pinned_environment(3, runtime="torch-compile")["OMP_PROC_BIND"] == "close"
    assert "OMP_PROC_BIND" not in pinned_environment(3, runtime="openvino")
    assert pinned_environment(3, runtime="openvino")["OMP_NUM_THREADS"] == "3"
    assert len(set(ENGINES)) == 11
