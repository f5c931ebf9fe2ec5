"""OpenVINO on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lighten.formats.files import OPENVINO
from lighten.formats.graph_inputs import encoder_inputs, encoder_outputs, stateful_inputs
from lighten.formats.settings import openvino_settings
from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Ids, Setup, model_file, without_head
from lighten.runtimes.speculate import Croppable

NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
CODES = {"i8": "8-bit", "u8": "8-bit", "i4": "4-bit", "u4": "4-bit"}


def version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]


def load(folder: Path, spec: ModelSpec, setup: Setup, *, profile: bool = False) -> OpenVINOSession:
    """Every property that OpenVINO would choose by itself is stated: precision, cache type, dynamic quantization of activations.

    Args:
        profile: count what each node takes.

    Raises:
        RuntimeUnavailable: the folder holds no model of OpenVINO.
    """
    import openvino

    said = openvino_settings(setup.dtype, activations=setup.activations, decoder=spec.is_decoder)
    properties = {**said, "INFERENCE_NUM_THREADS": setup.threads, "NUM_STREAMS": 1, **({"PERF_COUNT": True} if profile else {})}
    compiled = openvino.Core().compile_model(model_file(folder, OPENVINO, "openvino"), "CPU", properties)
    return OpenVINOSession(compiled, spec)


def _precision(compiled: Any) -> str:
    """The types in which most linears really run, as the executed graph tells: of activations, and of weights where they are codes.

    Dynamic quantization happens inside an operator: the graph shows float activations, the property that was set tells.
    """
    found: Counter[tuple[str, str]] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        if told(node, "layerType") == "FullyConnected":
            data, weight = (told(node.input(port).get_source_output().get_node(), "outputPrecisions") for port in (0, 1))
            found[data, weight] += 1
    if not found:
        return "not known"
    (data, weight), _ = found.most_common(1)[0]
    codes = weight in CODES
    if data in CODES or (codes and compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") > 0):
        return "int8"
    return NAMES.get(data, data) + (f" with {CODES[weight]} weights" if codes else "")


def told(node: Any, key: str) -> str:
    """What the executed graph says of a node; empty where it says nothing."""
    info = node.get_rt_info()
    return info[key].astype(str) if key in info else ""


class OpenVINOSession(Croppable):
    """See `Session`. A decoder's keys and values live in the request's state, which has no positions before each prompt."""

    def __init__(self, compiled: Any, spec: ModelSpec) -> None:
        self.compiled = compiled
        self.request: Any = compiled.create_infer_request()
        self._spec = spec
        self._taken = {name for each in compiled.inputs for name in each.names}
        self._positions = 0

    @property
    def precision(self) -> str:
        return _precision(self.compiled)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        output: Floats = self.request.infer(encoder_inputs(self._spec, input_ids, attention_mask))[0]
        return output

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        if not (outputs := encoder_outputs(self._spec)[1:]):
            raise without_head("openvino")
        found = self.request.infer(encoder_inputs(self._spec, input_ids, attention_mask, token_type_ids))
        heads = [np.array(found[name]) for name in outputs]
        return heads[0] if len(heads) == 1 else np.stack(heads, -1)

    def logits(self, input_ids: Ids) -> Floats:
        self._reset()
        return self._run(input_ids)

    def prefill(self, input_ids: Ids) -> Floats:
        self._reset()
        return self.decode(input_ids)

    def decode(self, input_ids: Ids) -> Floats:
        return self._run(input_ids, last=True)[:, -1]

    def verify(self, input_ids: Ids) -> Floats:
        return self._run(input_ids)

    def crop(self, length: int) -> None:
        import openvino

        if length < self._positions:
            for state in self.request.query_state():
                state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
            self._positions = length

    def _run(self, input_ids: Ids, *, last: bool = False) -> Floats:
        inputs = stateful_inputs(input_ids, self._positions, last=last)
        output: Floats = self.request.infer({name: value for name, value in inputs.items() if name in self._taken})[0]
        self._positions += input_ids.shape[1]
        return output

    def _reset(self) -> None:
        self.request.reset_state()
        self._positions = 0
