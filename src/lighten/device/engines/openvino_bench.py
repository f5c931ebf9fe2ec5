"""The micro-models in OpenVINO, in floats or statically quantized by NNCF."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openvino

from lighten.device.cases import Case, in_graphs
from lighten.device.engines.graph import feed, onnx_model
from lighten.device.engines.openvino_load import compile_options

QUANTIZED = ("linear", "attention", "block", "stack")
CALIBRATION_SIZES = {"attention": (2, 8, 8), "block": (2, 8)}
CALIBRATION_INPUTS = 2


def open_bench(engine: str, threads: int) -> OpenVinoBench:
    return OpenVinoBench(engine, threads)


class OpenVinoBench:
    def __init__(self, engine: str, threads: int) -> None:
        self.engine, self.threads = engine, threads
        self.version = openvino.__version__.split("-")[0]
        self.core = openvino.Core()
        self.compiled: dict[Case, Any] = {}
        self.quantized: dict[Case, Any] = {}
        self.precision = str(self._compile(self._float_model(Case("call"))).get_property("INFERENCE_PRECISION_HINT").to_string())

    def cases(self, wanted: Sequence[Case]) -> list[Case]:
        return in_graphs(wanted)

    def prepare(self, cases: Sequence[Case]) -> None:
        """Quantize all that is quantized in one go, as branches of one model that are then taken apart: NNCF's start costs seconds."""
        if self.engine.endswith("/int8"):
            chosen = [case for case in cases if case.kind in QUANTIZED]
            self.quantized = dict(zip(chosen, _quantized(self.core, chosen), strict=True))

    def runner(self, case: Case, size: tuple[int, ...]) -> Callable[[], object]:
        if case not in self.compiled:
            model = self.quantized.get(case)
            self.compiled[case] = self._compile(self._float_model(case) if model is None else model)
        request = self.compiled[case].create_infer_request()
        for name, value in feed(case, size).items():
            request.set_tensor(name, openvino.Tensor(value))
        return lambda: request.infer()

    def store(self, case: Case, folder: Path) -> tuple[Path, int]:
        path = folder / f"{case.name}.xml"
        model = self.quantized.get(case)
        if model is None:
            model = _quantized(self.core, [case])[0] if self.engine.endswith("/int8") else self._float_model(case)
        openvino.save_model(model, path, compress_to_fp16=False)
        return path, path.with_suffix(".bin").stat().st_size

    def _float_model(self, case: Case) -> Any:
        return self.core.read_model(onnx_model([case], runtime="openvino").SerializeToString())

    def _compile(self, model: Any) -> Any:
        return self.core.compile_model(model, "CPU", compile_options(self.engine, self.threads))


def _quantized(core: Any, cases: list[Case]) -> list[Any]:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    inputs: dict[str, Any] = {}
    for case in cases:
        inputs.update(feed(case, CALIBRATION_SIZES.get(case.kind, (8,))))
    model = core.read_model(onnx_model(cases, runtime="openvino").SerializeToString())
    whole = nncf.quantize(
        model, nncf.Dataset([inputs] * CALIBRATION_INPUTS), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_INPUTS,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),  # changes values, not the time of computing them
    )  # fmt: skip
    return [_branch(whole, case) for case in cases]


def _branch(model: Any, case: Case) -> Any:
    parameters = [each for each in model.get_parameters() if each.get_friendly_name().startswith(f"{case.name}.")]
    results = [each for each in model.get_results() if f"{case.name}.y" in each.input_value(0).get_names()]
    return openvino.Model(results, parameters, case.name)
