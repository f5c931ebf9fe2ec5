"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lighten.formats.files import ONNX
from lighten.formats.graph_inputs import HIDDEN, cache_names, decoder_inputs, empty_cache, encoder_inputs, encoder_outputs
from lighten.formats.settings import onnxruntime_settings
from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Ids, Setup, model_file, without_head
from lighten.runtimes.speculate import Croppable


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup, *, profile: Path | None = None) -> OnnxSession:
    """The folder's graph in a session.

    Args:
        profile: the beginning of the name of a file for what each node takes.

    Raises:
        RuntimeUnavailable: the folder holds no graph.
    """
    import onnxruntime

    path = model_file(folder, ONNX, "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setup.threads, 1
    options.log_severity_level = 3
    for name, value in onnxruntime_settings(dynamic=setup.activations == "dynamic").items():
        options.add_session_config_entry(name, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return OnnxSession(session, path, spec, dynamic=setup.activations == "dynamic")


def _precision(path: Path, *, dynamic: bool) -> str:
    """`int8` where integer products do the work, by the operators of the graph; else the width of most products' weights."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    if INTEGER_PRODUCTS & operators.keys():
        return "int8"
    types = {initializer.name: initializer.data_type for initializer in graph.initializer}
    expanded = {node.output[0]: types.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"}
    products = Counter(expanded.get(node.input[1]) for node in graph.node if node.op_type in ("MatMul", "Gemm"))
    most = next((kind for kind, _ in products.most_common() if kind is not None), None)
    if most is None:
        return "float32"
    return "int8" if dynamic else f"float32 with {'8' if most in (TENSOR_INT8, TENSOR_UINT8) else '4'}-bit weights"


INTEGER_PRODUCTS = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"}
TENSOR_UINT8, TENSOR_INT8 = 2, 3
"""Numbers of types in onnx.TensorProto.DataType."""


class OnnxSession(Croppable):
    """See `Session`. A decoder's keys and values stay in ONNX Runtime's own memory from step to step."""

    def __init__(self, session: Any, path: Path, spec: ModelSpec, *, dynamic: bool) -> None:
        self.session = session
        self._path = path
        self._spec = spec
        self._dynamic = dynamic
        self._cache: list[Any] = []
        self._positions = 0

    @property
    def precision(self) -> str:
        return _precision(self._path, dynamic=self._dynamic)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        output: Floats = self.session.run([HIDDEN], encoder_inputs(self._spec, input_ids, attention_mask))[0]
        return output

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        if not (outputs := encoder_outputs(self._spec)[1:]):
            raise without_head("onnxruntime")
        found: list[Floats] = self.session.run(outputs, encoder_inputs(self._spec, input_ids, attention_mask, token_type_ids))
        return found[0] if len(found) == 1 else np.stack(found, -1)

    def logits(self, input_ids: Ids) -> Floats:
        output: Floats = self.session.run(["logits"], decoder_inputs(input_ids, 0) | empty_cache(self._spec, len(input_ids)))[0]
        return output

    def prefill(self, input_ids: Ids) -> Floats:
        import onnxruntime

        self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in empty_cache(self._spec, len(input_ids)).values()]
        self._positions = 0
        return self.decode(input_ids)

    def decode(self, input_ids: Ids) -> Floats:
        return self.verify(input_ids)[:, -1]

    def verify(self, input_ids: Ids) -> Floats:
        layers = len(self._cache) // 2
        binding = self.session.io_binding()
        for name, value in decoder_inputs(input_ids, self._positions).items():
            binding.bind_cpu_input(name, value)
        for name, value in zip(cache_names(layers, "past"), self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in ["logits", *cache_names(layers, "present")]:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, *self._cache = binding.get_outputs()
        self._positions += input_ids.shape[1]
        found: Floats = logits.numpy()
        return found

    def crop(self, length: int) -> None:
        import onnxruntime

        if length < self._positions:
            self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :length])) for value in self._cache]
            self._positions = length
