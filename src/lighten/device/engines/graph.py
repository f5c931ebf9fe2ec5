"""Micro-models as ONNX graphs, written as `torch.onnx.export(dynamo=True)` writes a Transformer (torch 2.13, opset 20,
eager attention: what the runtimes recognise and fuse), but for attention, which each runtime has as in its artifacts.

The exporter itself takes seconds for each model; these take milliseconds. Weights are random: only their shapes matter to time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lighten.device.cases import HEADS, Case

OPSET = 20
OWN = "com.microsoft"
"""Where ONNX Runtime's own operators are."""
IR_VERSION = 10
EPSILON = 1e-5


def onnx_model(cases: Sequence[Case], *, runtime: Literal["onnxruntime", "openvino"]) -> onnx.ModelProto:
    """One model with a branch for each case; a branch's inputs are `{case.name}.{input}`, its output `{case.name}.y`."""
    graph = _Graph(runtime)
    for case in cases:
        graph.branch(case)
    proto = helper.make_graph(graph.nodes, "probe", graph.inputs, graph.outputs, graph.constants, value_info=graph.shapes)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OWN, 1)], ir_version=IR_VERSION)


def feed(case: Case, size: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs of a case at one size, named as in its model; nothing is masked."""
    random = np.random.default_rng(0)
    return {
        f"{case.name}.{name}": np.ones(shape, np.int64) if name == "mask" else random.standard_normal(shape, dtype=np.float32)
        for name, shape in case.input_shapes(size).items()
    }


@dataclass
class _Graph:
    runtime: str
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)
    name: str = ""
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def branch(self, case: Case) -> None:
        self.name = case.name
        for name, shape in case.inputs.items():
            self.inputs.append(self.typed(f"{case.name}.{name}", shape, TensorProto.INT64 if name == "mask" else TensorProto.FLOAT))
        output = self.body(case, {name: f"{case.name}.{name}" for name in case.inputs})
        self.nodes.append(helper.make_node("Identity", [output], [f"{case.name}.y"]))
        self.outputs.append(self.typed(f"{case.name}.y", case.output))

    def typed(self, name: str, shape: tuple[str | int, ...], dtype: int = TensorProto.FLOAT) -> Any:
        """A tensor's type; its dynamic axes are named within the branch. Runtimes fuse some operators only where they know that shapes agree."""
        return helper.make_tensor_value_info(name, dtype, [side if isinstance(side, int) else f"{self.name}.{side}" for side in shape])

    def body(self, case: Case, x: dict[str, str]) -> str:
        match case.kind:
            case "empty" | "call":
                return self.op("Add", x["x"], self.constant(np.ones(1, np.float32)))
            case "chain":
                return self.linears(x["x"], [case.shape[0]] * (case.shape[1] + 1))
            case "stack":
                return self.linears(x["x"], [case.shape[0], case.shape[1]] * case.shape[2] + [case.shape[0]])
            case "linear":
                return self.linears(x["x"], list(case.shape))
            case "attention":
                return self.attention(x["q"], x["k"], x["v"], self.padding(x["mask"]), (HEADS, case.shape[0]))
            case "block":
                return self.block(x["x"], self.padding(x["mask"]), case.shape)
            case "layernorm":
                return self.layernorm(x["x"], case.shape[0])
            case "rmsnorm":
                return self.rmsnorm(x["x"], case.shape[0])
            case "gelu":
                return self.op("Gelu", x["x"])
            case "add":
                return self.op("Add", x["x"], x["z"])
            case "rotary":
                return self.rotary(x["x"], x["z"], case.shape[0])
        raise AssertionError(case)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, value: np.ndarray[Any, Any]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def whole(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[0]))

    def linear(self, x: str, columns: int, outputs: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(columns, outputs)), self.weight(outputs))

    def linears(self, x: str, widths: list[int]) -> str:
        for columns, outputs in pairwise(widths):
            x = self.linear(x, columns, outputs)
        return x

    def layernorm(self, x: str, width: int) -> str:
        return self.op("LayerNormalization", x, self.weight(width), self.weight(width), axis=-1, epsilon=EPSILON)

    def rmsnorm(self, x: str, width: int) -> str:
        mean = self.op("ReduceMean", self.op("Pow", x, self.constant(np.array(2, np.float32))), self.whole(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(np.array(EPSILON, np.float32))))
        return self.op("Mul", self.weight(width), self.op("Mul", x, self.op("Reciprocal", root)))

    def rotary(self, x: str, z: str, width: int) -> str:
        low = self.op("Slice", x, self.whole(0), self.whole(width // 2), self.whole(1))
        high = self.op("Slice", x, self.whole(width // 2), self.whole(width), self.whole(1))
        turned = self.op("Concat", self.op("Neg", high), low, axis=-1)
        return self.op("Add", self.op("Mul", x, z), self.op("Mul", turned, z))

    def padding(self, mask: str) -> str:
        """0 or -∞ for each key, [B, 1, 1, K]; as ONNX Runtime's operator takes it, 0 for those that are not seen, [B, K]."""
        if self.runtime == "onnxruntime":
            return self.op("Cast", mask, to=TensorProto.INT32)
        keep = self.op("Unsqueeze", self.op("Cast", mask, to=TensorProto.BOOL), self.whole(1, 2))
        return self.op("Where", keep, self.constant(np.array(0, np.float32)), self.constant(np.array(-np.inf, np.float32)))

    def heads(self, x: str, heads: tuple[int, int], order: tuple[int, ...]) -> str:
        return self.op("Transpose", self.op("Reshape", x, self.whole(0, 0, *heads)), perm=order)

    def attention(self, q: str, k: str, v: str, mask: str, heads: tuple[int, int]) -> str:
        if self.runtime == "onnxruntime":
            return self.op("MultiHeadAttention", q, k, v, "", mask, domain=OWN, num_heads=heads[0], scale=heads[1] ** -0.5)
        return self.mixed(self.heads(q, heads, (0, 2, 1, 3)), self.heads(k, heads, (0, 2, 3, 1)), self.heads(v, heads, (0, 2, 1, 3)), mask, heads)

    def joined_attention(self, x: str, mask: str, heads: tuple[int, int]) -> str:
        """Query, key and value as one product; the scores' factor is in its weight."""
        hidden = heads[0] * heads[1]
        shaped = self.op("Reshape", self.linear(x, hidden, 3 * hidden), self.whole(0, 0, 3, *heads))
        turned = self.op("Transpose", shaped, perm=(2, 0, 3, 1, 4))
        parts = [f"{turned}.{place}" for place in range(3)]
        self.nodes.append(helper.make_node("Split", [turned], parts, axis=0, num_outputs=3))
        q, k, v = (self.op("Squeeze", part, self.whole(0)) for part in parts)
        return self.mixed(q, self.op("Transpose", k, perm=(0, 1, 3, 2)), v, mask, heads, scaled=True)

    def mixed(self, q: str, k: str, v: str, mask: str, heads: tuple[int, int], *, scaled: bool = False) -> str:
        """softmax(Q Kᵀ) V of heads: q and v [B, H, S, D], k [B, H, D, S]."""
        scores = self.op("MatMul", q, k)
        scores = scores if scaled else self.op("Mul", scores, self.constant(np.array(heads[1] ** -0.5, np.float32)))
        shares = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        turned = self.op("Transpose", self.op("MatMul", shares, v), perm=(0, 2, 1, 3))
        return self.op("Reshape", turned, self.whole(0, 0, heads[0] * heads[1]))

    def block(self, x: str, mask: str, shape: tuple[int, ...]) -> str:
        hidden, heads, inner, layers = shape
        for _ in range(layers):
            if self.runtime == "openvino":
                mixed = self.joined_attention(x, mask, (heads, hidden // heads))
            else:
                q, k, v = (self.linear(x, hidden, hidden) for _ in range(3))
                mixed = self.attention(q, k, v, mask, (heads, hidden // heads))
            self.shapes.append(self.typed(mixed, ("b", "s", hidden)))
            mixed = self.linear(mixed, hidden, hidden)
            x = self.layernorm(self.op("Add", mixed, x), hidden)
            mlp = self.linear(self.op("Gelu", self.linear(x, hidden, inner)), inner, hidden)
            x = self.layernorm(self.op("Add", mlp, x), hidden)
        return x
