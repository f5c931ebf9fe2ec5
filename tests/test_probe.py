"""The probe: child processes, their failures, and every micro-model on every runtime that is installed. Speeds are never asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from lighten.device import probe as probe_engines
from lighten.device.bandwidth import measure_bandwidth
from lighten.device.calibration import MIN_CALM, block_operators, fit_blocks
from lighten.device.cases import BLOCKS, CALL, CHAIN, COLD_ROWS, EMPTY, LARGE_WIDTH, LINEARS, STACK, Case, all_cases, in_graphs, sizes
from lighten.device.clock import involuntary_switches, time_all, time_call, waited_s
from lighten.device.engines.bench import open_bench, open_loader, required_modules
from lighten.device.probe_child import _believable as believable
from lighten.device.probe_child import main, measure_engine
from lighten.device.profile import ENGINES, Bandwidth, BlockSample, EngineProfile, Sample, engine_from_json
from lighten.device.roofline import sum_parts
from lighten.errors import DeviceError

PROBE = sys.modules["lighten.device.probe"]  # the package exports a function of the same name
SMALL = [EMPTY, CALL, CHAIN, Case("linear", (64, 64))]


def needs(engine: str) -> None:
    for module in required_modules(engine):
        pytest.importorskip(module, reason=f"{engine} needs {module}")


def fake_module(tmp_path, monkeypatch, name: str, body: str) -> None:
    """In child processes, `name` is this; here it stays what it is."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: the probe would not start a child for it")
    (tmp_path / f"{name}.py").write_text(body)
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


CRASHES = {
    "signal": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
    "exception": ("raise RuntimeError('no such instruction')", "RuntimeError: no such instruction"),
    "silent exit": ("import os; os._exit(3)", "exit code 3"),
    "success without a result": ("import os; os._exit(0)", "no result"),
    "hang": ("import time; time.sleep(600)", "no answer within 2 s"),
}


@pytest.mark.parametrize(("body", "reason"), CRASHES.values(), ids=CRASHES.keys())
def test_a_child_that_ends_badly_is_one_failed_line(tmp_path, monkeypatch, body: str, reason: str) -> None:
    fake_module(tmp_path, monkeypatch, "onnxruntime", body)
    monkeypatch.setattr(PROBE, "_measure_bandwidth", lambda run: ())
    monkeypatch.setattr(PROBE, "DEFAULT_TIMEOUT_S", 2.0 if "sleep" in body else 60.0)
    lines: list[str] = []
    profile = probe_engines(threads=1, log=lines.append, engines=["onnxruntime/float32"])
    assert profile.engines == {}
    assert reason in profile.failures["onnxruntime/float32"]
    assert len(lines) == 1
    assert "failed" in lines[0]
    assert "\n" not in lines[0]


def test_an_engine_that_is_not_installed_is_a_failure_when_asked_for_and_none_at_all_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(PROBE, "_measure_bandwidth", lambda run: ())
    monkeypatch.setattr(PROBE, "_missing", lambda name: ["onnxruntime"])
    asked = probe_engines(threads=1, log=lambda line: None, engines=["onnxruntime/int8"])
    assert asked.failures == {"onnxruntime/int8": "onnxruntime not installed"}
    with pytest.raises(DeviceError, match=r"no runtime is installed .*pip install 'lighten\[all\]'"):
        probe_engines(threads=1, log=lambda line: None)


def test_an_unknown_engine_and_no_thread_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"no engine tensorrt/int8; engines: torch/float32, .*openvino/int8"):
        probe_engines(threads=1, log=print, engines=["tensorrt/int8"])
    with pytest.raises(DeviceError, match="threads=0 is not positive"):
        probe_engines(threads=0, log=print)


@pytest.mark.slow
def test_the_probe_of_one_engine_gives_a_complete_profile(monkeypatch) -> None:
    needs("onnxruntime/float32")
    profile = probe_engines(threads=1, log=lambda line: None, engines=["onnxruntime/float32"])
    engine = profile.engine("onnxruntime/float32")
    assert MIN_CALM <= engine.calibration.blocks <= sum(map(len, BLOCKS.values()))  # disturbed ones do not count
    assert engine.base_memory_bytes > 10e6
    assert 0.5 < engine.weight_copies < 5
    assert [point.working_set_bytes for point in profile.bandwidth] == sorted(point.working_set_bytes for point in profile.bandwidth)


@pytest.mark.parametrize("engine", ["torch/float32", "onnxruntime/float32", "openvino/float32"])
def test_a_bench_measures_what_an_engine_profile_holds(engine: str, tmp_path, monkeypatch) -> None:
    needs(engine)
    monkeypatch.setattr("lighten.device.cases.LINEARS", {(64, 64): (1, 8)})
    found = measure_engine(engine, 1, tmp_path, SMALL)
    del found["tiny"], found["large"]
    profile = engine_from_json({**json.loads(json.dumps(found)), "calibration": {}})
    assert [(sample.kind, sample.rows, sample.shape) for sample in profile.samples] == [("linear", 1, (64, 64)), ("linear", 8, (64, 64))]
    assert profile.version[0].isdigit()


@pytest.mark.parametrize("engine", [name for name in ENGINES if not name.startswith("torch-compile")])
@pytest.mark.parametrize(
    "case",
    [Case("linear", (64, 48)), Case("attention", (32,)), Case("block", (64, 2, 128, 1)), Case("rmsnorm", (64,)), Case("rotary", (64,))],
)
def test_every_micro_model_runs_on_every_engine(engine: str, case: Case) -> None:
    needs(engine)
    bench = open_bench(engine, 1)
    bench.prepare([case])
    size = {"attention": (2, 3, 5), "block": (2, 6)}.get(case.kind, (7,))
    assert bench.runner(case, size)() is not False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_eager_runtimes_alone_measure_runs(dtype: str, tmp_path, monkeypatch) -> None:
    """A decoder's block, linears with weights of their own, new memory; the same cases are left out by runtimes of graphs."""
    needs(f"torch/{dtype}")
    monkeypatch.setattr("lighten.device.cases.LINEARS", {(64, 64): (1, 8)})
    monkeypatch.setattr("lighten.device.cases.FRESH", (64, 256))
    monkeypatch.setattr("lighten.device.engines.torch_bench.COLD_ELEMENTS", 64 * 64 * 3)
    decoder, cold = Case("decoder", (64, 4, 2, 96, 1)), Case("cold", (64, 64, 3))
    monkeypatch.setattr("lighten.device.cases.DECODERS", {decoder.shape: ((2, 6),)})
    eager = [decoder, cold, Case("fresh"), Case("filled")]
    assert in_graphs([*SMALL, *eager, Case("gelu", (LARGE_WIDTH,))]) == SMALL
    found = measure_engine(f"torch/{dtype}", 1, tmp_path, [*SMALL, *eager])
    element = 4 if dtype == "float32" else 2
    expected = [("linear", 1), ("linear", 8), *(("cold", rows) for rows in COLD_ROWS), ("fresh", 64 * element), ("fresh", 256 * element)]
    assert [(each["kind"], each["rows"]) for each in found["samples"]] == expected
    assert [(each["num_key_value_heads"], each["intermediate_size"], each["layers"]) for each in found["blocks"]] == [(2, 96, 1)]
    assert all(each["seconds"] > 0 for each in [*found["samples"], *found["blocks"]])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_runtime_of_whole_models_measures_those_and_borrows_the_rest(dtype: str, tmp_path, monkeypatch) -> None:
    engine = f"ctranslate2/{dtype}"
    needs(engine)
    decoder, block = Case("decoder", (64, 4, 2, 96, 1)), Case("block", (64, 4, 128, 2))
    monkeypatch.setattr("lighten.device.cases.LINEARS", {(64, 64): (1, 8)})
    monkeypatch.setattr("lighten.device.cases.DECODERS", {decoder.shape: ((2, 6), (1, 1))})
    monkeypatch.setattr("lighten.device.cases.BLOCKS", {block.shape: ((2, 6),)})
    asked = []
    monkeypatch.setattr("lighten.device.engines.torch_bench.TorchBench.runner", lambda self, case, size: asked.append(case.kind) or (lambda: None))
    found = measure_engine(engine, 1, tmp_path, [*SMALL, decoder, block, Case("fresh"), Case("cold", (64, 64, 3))])
    assert [(each["num_key_value_heads"], each["layers"], each["seq_len"]) for each in found["blocks"]] == [(None, 2, 6), (2, 1, 6), (2, 1, 1)]
    assert set(asked) == {"empty", "call", "chain", "linear"}
    assert found["precision"] == "float32"


def test_borrowed_products_may_be_far_off() -> None:
    """int8 products that take a third of what stands for them: the fit finds it, which it would not take for granted of a runtime's own."""
    linears = [Sample(kind="linear", rows=rows, shape=(i, o), seconds=rows * i * o / 1e11) for i, o in LINEARS for rows in (1, 64, 4096)]
    rest = [Sample(kind="attention", rows=heads, shape=(s, s, 32), seconds=heads * s * s / 1e11) for heads in (8, 512) for s in (16, 512)]
    rest += [Sample(kind=kind, rows=n, shape=(), seconds=n / 1e12) for kind in ("layernorm", "gelu", "add") for n in (1000, 10_000_000)]
    engine = EngineProfile(
        name="ctranslate2/int8", version="1", precision="float32", samples=(*linears, *rest), call_overhead_s=1e-7, operator_overhead_s=1e-8
    )
    block = BlockSample(hidden_size=512, num_attention_heads=8, intermediate_size=2048, layers=4, batch_size=1, seq_len=1, seconds=1.0)
    sizes = [(1, 64), (2, 64), (1, 256), (4, 128), (8, 64), (1, 512), (2, 256), (4, 256), (8, 128), (8, 256)]
    blocks = [replace(block, batch_size=b, seq_len=s) for b, s in sizes]
    fast = (Bandwidth(working_set_bytes=2**20, read_bytes_per_s=1e14, copy_bytes_per_s=1e14),)
    truth = [sum_parts(block_operators(each, "float32"), engine, fast).by_class["linear"] / 3 for each in blocks]
    blocks = tuple(replace(each, seconds=seconds) for each, seconds in zip(blocks, truth, strict=True))
    factors = {
        name: fit_blocks(replace(engine, name=name, blocks=blocks), fast).factors["linear"] for name in ("ctranslate2/int8", "onnxruntime/int8")
    }  # fmt: skip
    assert factors["ctranslate2/int8"] == pytest.approx(1 / 3, rel=0.15)
    assert factors["onnxruntime/int8"] > factors["ctranslate2/int8"]


@pytest.mark.parametrize("engine", [name for name in ENGINES if not name.startswith("torch-compile")])
def test_a_stored_stack_loads_and_runs(engine: str, tmp_path) -> None:
    needs(engine)
    small = Case("stack", (32, 48, 2))
    bench = open_bench(engine, 1)
    bench.store(small, tmp_path)  # as another engine of the runtime did
    path, stored = bench.store(small, tmp_path)
    parameters = 2 * (2 * 32 * 48 + 32 + 48)
    element = {"float32": 4, "bfloat16": 4 if engine.startswith("openvino") else 2, "int8": 1}[engine.split("/")[1]]
    assert stored >= parameters * element
    open_loader(engine)(engine, path, 1)()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_graph_s_attention_computes_what_its_formula_says(runtime) -> None:
    """The micro-model's output equals one written with numpy, in either form."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    import numpy as np

    from lighten.device.engines.graph import feed, onnx_model

    case = Case("attention", (4,))
    model = onnx_model([case], runtime=runtime)
    onnx.checker.check_model(model, full_check=True)
    inputs = feed(case, (2, 3, 5))
    got = ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    q, k, v = (inputs[f"{case.name}.{name}"].reshape(2, -1, 8, 4).transpose(0, 2, 1, 3) for name in "qkv")
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(4))
    expected = (scores / scores.sum(-1, keepdims=True)) @ v
    np.testing.assert_allclose(got, expected.transpose(0, 2, 1, 3).reshape(2, 3, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_graph_s_block_is_an_encoder_s_layer(runtime) -> None:
    """Its output equals torch's own layer with the graph's weights, in either form."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    import numpy as np
    import torch

    from lighten.device.engines.graph import EPSILON, feed, onnx_model

    case = Case("block", (32, 4, 64, 1))
    model = onnx_model([case], runtime=runtime)
    inputs = feed(case, (2, 5))
    got = ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    constants = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    linears = [constants[node.input[1]] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    biases = [constants[node.input[1]] for node in model.graph.node if node.op_type == "Add" and node.input[1] in constants]
    norms = [[constants[name] for name in node.input[1:]] for node in model.graph.node if node.op_type == "LayerNormalization"]
    *qkv, out, up, down = [(weight.T, bias) for weight, bias in zip(linears, biases, strict=True)]
    in_weight, in_bias = torch.cat([weight for weight, _ in qkv]), torch.cat([bias for _, bias in qkv])
    if runtime == "openvino":  # the scores' factor is in the weight
        in_weight, in_bias = (torch.cat([value[:32] * math.sqrt(8), value[32:]]) for value in (in_weight, in_bias))
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", EPSILON, batch_first=True).eval()
    values = [in_weight, in_bias, *out, *up, *down, *norms[0], *norms[1]]
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(value)
        expected = layer(torch.from_numpy(inputs[f"{case.name}.x"])).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_sizes_cover_what_the_tables_say() -> None:
    cases = all_cases()
    assert cases[:3] == [EMPTY, CALL, CHAIN]
    assert {case.shape for case in cases if case.kind == "linear"} == set(LINEARS)
    assert len({case.name for case in cases}) == len(cases)
    assert all(list(sizes(case)) for case in cases)
    parameters = STACK.shape[0] * STACK.shape[1] * 2 * STACK.shape[2]
    assert 40e6 < 4 * parameters < 60e6


def test_a_disturbed_sample_that_more_rows_contradict_is_dropped_and_others_stay() -> None:
    def sample(rows: int, seconds: float, kind: str = "linear") -> Sample:
        return Sample(kind=kind, rows=rows, shape=(8, 8), seconds=seconds)

    calm, slow, beyond, other = sample(16, 2e-6), sample(4, 3e-6), sample(64, 9e-6), sample(4, 3e-6, "cold")
    assert believable([(slow, False), (calm, True), (beyond, False), (other, False)]) == [calm, beyond, other]
    assert believable([(slow, True), (calm, True)]) == [slow, calm]


def test_of_bandwidth_s_rounds_the_best_counts(monkeypatch) -> None:
    rates = iter([1e9, 2e9, 4e9, 3e9])
    monkeypatch.setattr("lighten.device.bandwidth.WORKING_SETS", (1 << 16, 1 << 18))
    monkeypatch.setattr(
        "lighten.device.bandwidth._measure",
        lambda pool, threads, size: Bandwidth(working_set_bytes=size, read_bytes_per_s=(rate := next(rates)), copy_bytes_per_s=rate),
    )
    assert [point.read_bytes_per_s for point in measure_bandwidth(1)] == [4e9, 3e9]


def test_bandwidth_is_measured_at_each_size(monkeypatch) -> None:
    monkeypatch.setattr("lighten.device.bandwidth.WORKING_SETS", (1 << 16, 1 << 18))
    monkeypatch.setattr("lighten.device.bandwidth.SECONDS", 0.002)
    found = measure_bandwidth(2)
    assert [point.working_set_bytes for point in found] == [1 << 16, 1 << 18]
    assert all(math.isfinite(point.read_bytes_per_s) and point.read_bytes_per_s > 0 for point in found)


def test_the_memory_task_writes_its_figures(tmp_path, monkeypatch) -> None:
    needs("onnxruntime/float32")
    bench = open_bench("onnxruntime/float32", 1)
    tiny, _ = bench.store(Case("stack", (16, 16, 2)), tmp_path)
    out = tmp_path / "found.json"
    arguments = [
        "memory",
        "--engine",
        "onnxruntime/float32",
        "--threads",
        "1",
        "--out",
        out,
        "--tiny",
        tiny,
        "--large",
        tiny,
        "--large-bytes",
        1000,
        "--parent",
        0,
    ]
    monkeypatch.setattr("lighten.device.probe_child.die_with_parent", lambda parent: None)
    monkeypatch.setattr("sys.argv", ["probe_child", *map(str, arguments)])
    main()
    assert set(json.loads(out.read_text())) == {"base_memory_bytes", "weight_copies", "import_s", "load_s", "loaded_bytes"}


def test_a_killed_probe_takes_its_child_along(tmp_path) -> None:
    program = """
import subprocess
from lighten.device import probe
start = subprocess.Popen
def started(*command, **options):
    child = start(*command, **options)
    if "engine" in command[0]:
        print(child.pid, flush=True)  # which would go on for a minute
    return child
subprocess.Popen = started
probe(threads=1, log=lambda line: None, engines=["torch/float32"])
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        while "probe_child" not in " ".join(child.cmdline()):  # until then it is a copy of its parent
            time.sleep(0.01)
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


class Neighbour:
    """A made-up clock: each run says how long it takes, how long its threads compute and wait, and whether it loses its core."""

    def __init__(self, monkeypatch) -> None:
        self.wall = self.processor = self.waited = 0.0
        self.switches = 0
        monkeypatch.setattr("lighten.device.clock.involuntary_switches", lambda: self.switches)
        monkeypatch.setattr("lighten.device.clock.waited_s", lambda: self.waited)
        monkeypatch.setattr("lighten.device.clock.time", self)

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor

    def run(self, wall: float, processor: float, *, waited: float = 0.0, switches: int = 0) -> None:
        self.wall += wall
        self.processor += processor
        self.waited += waited
        self.switches += switches


@pytest.mark.parametrize("how", [{"switches": 1}, {"waited": 0.005}])
def test_a_disturbed_run_is_not_believed(monkeypatch, how: dict[str, float]) -> None:
    """Two runs in three are disturbed and take ten times as long: the result is what the others took."""
    machine, number = Neighbour(monkeypatch), [0]

    def run() -> None:
        number[0] += 1
        if number[0] % 3:
            machine.run(0.010, 0.002, **how)
        else:
            machine.run(0.001, 0.002)

    found = time_call(run, budget_s=0.2, threads=2)
    assert found.calm
    assert found.seconds == pytest.approx(0.001)


def test_a_long_call_that_is_always_disturbed_takes_what_is_left_without_its_waiting(monkeypatch) -> None:
    machine = Neighbour(monkeypatch)
    found = time_call(lambda: machine.run(0.040, 0.026, waited=0.021, switches=3), budget_s=0.2, threads=2)
    assert not found.calm
    assert found.seconds == pytest.approx(0.019)


def test_threads_that_waited_at_the_same_moment_did_not_save_processor_time(monkeypatch) -> None:
    machine = Neighbour(monkeypatch)
    found = time_call(lambda: machine.run(0.040, 0.036, waited=0.030, switches=3), budget_s=0.2, threads=2)
    assert found.seconds == pytest.approx(0.018)


def test_where_waiting_is_not_told_a_long_disturbed_call_takes_its_processor_time(monkeypatch) -> None:
    machine = Neighbour(monkeypatch)
    monkeypatch.setattr("lighten.device.clock.waited_s", lambda: None)
    found = time_call(lambda: machine.run(0.040, 0.026, switches=3), budget_s=0.2, threads=2)
    assert not found.calm
    assert found.seconds == pytest.approx(0.013)


def test_a_long_call_is_believed_though_the_system_took_a_core_for_a_moment(monkeypatch) -> None:
    machine = Neighbour(monkeypatch)
    found = time_call(lambda: machine.run(0.100, 0.195, waited=0.001, switches=2), budget_s=0.2, threads=2)
    assert found.calm
    assert found.seconds == pytest.approx(0.099)


def test_of_two_rounds_the_shorter_counts(monkeypatch) -> None:
    """For the length of a round all is twice as slow, and nothing in here tells why."""
    machine, prepared = Neighbour(monkeypatch), [0]

    def prepare():
        prepared[0] += 1
        seconds = 0.002 if prepared[0] == 1 else 0.001
        return lambda: machine.run(seconds, 2 * seconds)

    found = time_all({"only": prepare}, threads=2, budget_s=0.01, patience_s=1.0)["only"]
    assert found.calm
    assert found.seconds == pytest.approx(0.001)


def test_a_short_call_that_is_always_disturbed_takes_its_fastest_run(monkeypatch) -> None:
    machine = Neighbour(monkeypatch)
    found = time_call(lambda: machine.run(0.001, 0.0008, switches=1), budget_s=0.02, threads=2)
    assert not found.calm
    assert found.seconds == pytest.approx(0.001)


def test_disturbed_points_are_measured_again_until_patience_ends(monkeypatch) -> None:
    machine, calls = Neighbour(monkeypatch), {"calm": 0, "late": 0, "never": 0}

    def prepare(name: str):
        def run() -> None:
            calls[name] += 1
            machine.run(0.01, 0.02, switches=name == "never" or (name == "late" and calls[name] < 20))

        return lambda: run

    found = time_all({name: prepare(name) for name in calls}, threads=2, budget_s=0.02, patience_s=1.0)
    assert {name: timing.calm for name, timing in found.items()} == {"calm": True, "late": True, "never": False}
    assert all(timing.seconds == pytest.approx(0.01) for timing in found.values())
    assert calls["calm"] < 10
    assert machine.wall < 1.5


def test_waiting_threads_are_counted_where_the_system_tells() -> None:
    assert (waited_s() or 0.0) >= 0
    assert involuntary_switches() >= 0
