"""The artifact of ONNX Runtime: `model.onnx`, float32, with a recipe's own codes of 8 or 4 bits, or with int8 activations, dynamic or static.

A weight's codes stand in the graph with the standard operator `DequantizeLinear` (opset 21: 4-bit types, blocks), which ONNX Runtime fuses with the
product that follows. Its scales are stored as float16 and cast. A looked-up table is gathered as codes and dequantized after, so that no step
expands all of it. 8-bit weights with dynamic activations become `DynamicQuantizeLinear` and `MatMulInteger`.

Source: the ONNX operator reference, DequantizeLinear-21; onnxruntime's contrib operators, com.microsoft.GatherBlockQuantized.

Shape legend: O rows (output features), I columns (input features), G groups of a row.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lighten.compress.grid import Quantized, QuantizedTensor
from lighten.errors import RecipeError
from lighten.formats import files
from lighten.formats.onnx_attention import fuse_attention, join_products
from lighten.formats.onnx_export import INLINE_BYTES, dense_weights, write_onnx
from lighten.formats.onnx_static import quantize_static
from lighten.formats.static_rounding import Array, Batch
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, ModelSpec
from lighten.recipe.words import FEW_ROWS

OPSET = 21
"""The first that has 4-bit types and blocks in DequantizeLinear."""
SMALLEST_BLOCK = 16
"""Of GatherBlockQuantized, whose blocks are powers of two. Source: onnxruntime's ContribOperators.md."""


def write_onnx_artifact(
    exported: Path,
    weights: Mapping[str, Tensor | Quantized],
    spec: ModelSpec,
    folder: Path,
    *,
    fused: bool = True,
    calibration: Sequence[Batch] | None = None,
) -> None:
    """Write `folder/model.onnx`. What `quantize(dynamic)` leaves to the runtime ONNX Runtime's own quantizer rounds.

    Per channel: per tensor, that quantizer's default, costs far more quality (all-MiniLM-L6-v2: cosine 0.960 against 0.9925).

    Args:
        fused: an encoder's attention is ONNX Runtime's own operator.
        calibration: inputs, where the spec has static activations.

    Raises:
        RecipeError: static activations without calibration.
    """
    codes = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}
    linears = any(isinstance(part, Linear) and part.weight.activations == "dynamic" for part in spec.parts)
    embeddings = any(isinstance(part, Embedding) and part.weight.activations == "dynamic" for part in spec.parts)
    if codes:
        dynamic = {f"{part.name}.weight" for part in spec.parts if isinstance(part, Linear) and part.weight.activations == "dynamic"}
        return _write_codes(exported, weights, dynamic & codes.keys(), spec, folder / files.ONNX, fused=fused)

    def fuse(model: Any) -> None:
        if fused:
            fuse_attention(model, spec)

    def join(model: Any) -> None:
        fuse(model)
        join_products(model)

    if any(isinstance(part, Linear) and part.weight.activations == "static" for part in spec.parts):
        return _quantize_static(exported, dense_weights(weights, spec), folder, calibration, fuse)
    if not linears:
        return write_onnx(exported, dense_weights(weights, spec), folder / files.ONNX, rewrite=join)
    plain, shaped = folder / "plain.onnx", folder / "shaped.onnx"
    write_onnx(exported, dense_weights(weights, spec), plain, rewrite=join)
    _quantize_dynamic(plain, shaped, folder / files.ONNX, ["MatMul", "Gemm", "Attention"] + (["Gather"] if embeddings else []))
    for path in folder.glob("plain.onnx*"):
        path.unlink()
    for path in folder.glob("shaped.onnx*"):
        path.unlink()
    return None


def _quantize_static(
    exported: Path, weights: Mapping[str, Tensor], folder: Path, calibration: Sequence[Batch] | None, fuse: Callable[[Any], None]
) -> None:
    import onnx

    if not calibration:
        raise RecipeError("quantize(static) needs calibration text, and none was given.")
    plain = folder / "plain.onnx"
    write_onnx(exported, weights, plain, rewrite=fuse)
    model = onnx.load(plain)
    for path in folder.glob("plain.onnx*"):
        path.unlink()
    quantize_static(model, calibration, folder)
    onnx.save(model, folder / files.ONNX, save_as_external_data=model.ByteSize() > INLINE_BYTES, location=f"{files.ONNX}.data")


def _quantize_dynamic(plain: Path, shaped: Path, out: Path, operators: list[str]) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with contextlib.redirect_stdout(io.StringIO()):
        logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises at the root logger
        quant_pre_process(str(plain), str(shaped), skip_symbolic_shape=True)
        _forget_weight_shapes(shaped)
        quantize_dynamic(
            str(shaped), str(out), per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=operators,
            nodes_to_exclude=_of_few_rows(shaped), extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )  # fmt: skip


def _of_few_rows(path: Path) -> list[str]:
    """What gathers from a table that recipes leave as it is."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    tables = {initializer.name for initializer in graph.initializer if len(initializer.dims) == 2 and initializer.dims[0] <= FEW_ROWS}
    return [node.name for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]


def _forget_weight_shapes(path: Path) -> None:
    """Drop what a graph says of its weights' shapes beside the weights: the quantizer turns the weight of a `Gemm`, and stumbles over it."""
    import onnx

    model = onnx.load(path)
    weights = {initializer.name for initializer in model.graph.initializer}
    kept = [info for info in model.graph.value_info if info.name not in weights]
    if len(kept) < len(model.graph.value_info):
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        onnx.save(model, path)


# the recipe's own codes


def _write_codes(exported: Path, weights: Mapping[str, Tensor | Quantized], dynamic: set[str], spec: ModelSpec, path: Path, *, fused: bool) -> None:
    """Write an exported graph with the given weights in place of those that it was exported with, codes as codes.

    Args:
        dynamic: names of the weights whose products take int8 activations.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(exported)
    places: dict[str, tuple[str, bool]] = json.loads(exported.with_suffix(".weights.json").read_text())
    values = dense_weights({name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}, spec)
    graph, kept = _Graph(model.graph), []
    for initializer in model.graph.initializer:
        name, turned = places.get(initializer.name, ("", False))
        weight = weights.get(name)
        if isinstance(weight, QuantizedTensor):
            graph.put(initializer.name, weight, turned=turned, dynamic=name in dynamic)
            continue
        if name:
            value = values[name].float().numpy()
            initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.T if turned else value), initializer.name))
        kept.append(initializer)
    graph.finish(kept)
    for imported in model.opset_import:
        if imported.domain == "":
            imported.version = max(imported.version, OPSET)
    if not (fused and fuse_attention(model, spec)):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    large = sum(len(initializer.raw_data) for initializer in model.graph.initializer) > INLINE_BYTES
    onnx.save(model, path, save_as_external_data=large, location=path.name + ".data")


class _Graph:
    """A graph whose float weights are exchanged for codes."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._first: list[Any] = []
        self._initializers: list[Any] = []
        self._changed: dict[int, list[Any]] = {}

    def put(self, name: str, weight: QuantizedTensor, *, turned: bool, dynamic: bool) -> None:
        """Exchange one initializer, [O, I] or, where it is `turned`, [I, O]."""
        rest = False
        for place, node in enumerate(self._graph.node):
            if name not in node.input:
                continue
            if dynamic and turned and node.op_type == "MatMul" and node.input[1] == name:
                self._changed[place] = list(self._integer_product(node, name, weight))
            elif node.op_type == "Gather" and node.input[0] == name and not turned and _can_gather(node, weight):
                self._changed[place] = list(self._gathered(node, name, weight))
            elif node.op_type == "Transpose" and not turned and _in_blocks(weight) and (products := self._products_with(node.output[0])):
                self._changed[place] = []
                self._changed |= {other: list(self._block_product(self._graph.node[other], name, weight)) for other in products}
            else:
                rest = True
        if rest:
            self._first += self._expanded(name, weight, turned=turned)

    def finish(self, kept: list[Any]) -> None:
        """Write the changed nodes and initializers back."""
        nodes = [each for place, node in enumerate(self._graph.node) for each in self._changed.get(place, [node])]
        unique = {initializer.name: initializer for initializer in [*kept, *self._initializers]}
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend([*self._first, *nodes])
        self._graph.initializer.extend(unique.values())

    def _expanded(self, name: str, weight: QuantizedTensor, *, turned: bool) -> Iterator[Any]:
        """The nodes that give the weight under its old name."""
        from onnx import helper

        inputs = [self._codes(f"{name}_codes", weight.codes.numpy(), weight, turned=turned)]
        yield from self._scales(f"{name}_scale", weight, turned=turned)
        inputs.append(f"{name}_scale")
        if weight.zero_point is not None:
            inputs.append(self._codes(f"{name}_zero", _grid(weight.zero_point.numpy(), weight), weight, turned=turned))
        axis = 0 if turned else 1
        told: dict[str, Any] = {} if weight.group_size == PER_TENSOR else {"axis": 1 - axis}
        if weight.group_size > 0:
            told = {"axis": axis, "block_size": weight.group_size}
        yield helper.make_node("DequantizeLinear", inputs, [name], **told)

    def _products_with(self, value: str) -> list[int]:
        """Places of the products with a value on their right; none where anything else reads it."""
        readers = [(place, node) for place, node in enumerate(self._graph.node) if value in node.input]
        return [place for place, _ in readers] if all(node.op_type == "MatMul" and node.input[1] == value for _, node in readers) else []

    def _block_product(self, node: Any, name: str, weight: QuantizedTensor) -> Iterator[Any]:
        """x Wᵀ with the codes of a table that is looked up too: stored once."""
        from onnx import helper

        rows, columns = weight.codes.shape
        table, *rest = yield from self._table(name, weight)
        blocks, shape = f"{name}_blocks", (rows, columns // weight.group_size, weight.group_size * weight.bits // 8)
        yield helper.make_node("Reshape", [table, self._constant(f"{blocks}_shape", np.array(shape, np.int64))], [blocks])
        told: dict[str, Any] = {"K": columns, "N": rows, "bits": weight.bits, "block_size": weight.group_size, "accuracy_level": 1}
        product = helper.make_node("MatMulNBits", [node.input[0], blocks, *rest], [node.output[0]], node.name, domain="com.microsoft", **told)
        product.metadata_props.extend(node.metadata_props)
        yield product

    def _table(self, name: str, weight: QuantizedTensor) -> Generator[Any, None, list[str]]:
        """Codes in blocks, scales and zero points, as the operators of com.microsoft take them: the nodes that make them; returns their names."""
        found = [self._constant(f"{name}_table", _packed(weight.codes.numpy(), weight.bits)), f"{name}_table_scale"]
        if not any(found[1] in each.output for nodes in self._changed.values() for each in nodes):
            yield from self._scales(found[1], weight, turned=False)
        if weight.zero_point is not None:
            found.append(self._constant(f"{name}_table_zero", _packed(weight.zero_point.numpy(), weight.bits)))
        return found

    def _gathered(self, node: Any, name: str, weight: QuantizedTensor) -> Iterator[Any]:
        """Look codes up and dequantize what was found."""
        from onnx import helper

        ids, out = node.input[1], node.output[0]
        if weight.group_size > 0:
            table, *rest = yield from self._table(name, weight)
            told: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": weight.group_size, "bits": weight.bits}
            yield helper.make_node("GatherBlockQuantized", [table, ids, *rest], [out], domain="com.microsoft", **told)
            return
        signed = weight.zero_point is None
        yield from self._looked_up(self._codes(f"{name}_codes", weight.codes.numpy(), weight, turned=False), ids, f"{out}_codes")
        value = f"{out}_codes"
        if not signed and weight.zero_point is not None:
            yield from self._looked_up(self._constant(f"{name}_table_zero", weight.zero_point.numpy()), ids, f"{out}_zero")
            yield helper.make_node("Sub", [value, f"{out}_zero"], [f"{out}_centred"])
            value = f"{out}_centred"
        yield from self._looked_up(self._constant(f"{name}_table_scale", weight.scale.numpy()), ids, f"{out}_scale")
        yield helper.make_node("Mul", [value, f"{out}_scale"], [out])

    def _looked_up(self, table: str, ids: str, out: str) -> Iterator[Any]:
        """Rows of a table as float32."""
        from onnx import TensorProto, helper

        yield helper.make_node("Gather", [table, ids], [f"{out}_rows"], axis=0)
        yield helper.make_node("Cast", [f"{out}_rows"], [out], to=TensorProto.FLOAT)

    def _integer_product(self, node: Any, name: str, weight: QuantizedTensor) -> Iterator[Any]:
        """x Wᵀ in integers: x is rounded to 8 bits by its own range, once for all products of the same x."""
        from onnx import TensorProto, helper

        x, out = node.input[0], node.output[0]
        rounded = [f"{x}_{kind}" for kind in ("rounded", "rounded_scale", "rounded_zero")]
        if not any(rounded[0] in each.output for nodes in self._changed.values() for each in nodes):
            yield helper.make_node("DynamicQuantizeLinear", [x], rounded)
        codes = self._codes(f"{name}_codes", weight.codes.numpy(), weight, turned=True)
        scale = self._constant(f"{name}_scales", weight.scale.float().numpy().reshape(-1))
        yield helper.make_node("MatMulInteger", [rounded[0], codes, rounded[2]], [f"{out}_sum"])
        yield helper.make_node("Cast", [f"{out}_sum"], [f"{out}_float"], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [rounded[1], scale], [f"{out}_scale"])
        yield helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out])

    def _scales(self, name: str, weight: QuantizedTensor, *, turned: bool) -> Iterator[Any]:
        """The scales as float32 under `name`, stored in their own type."""
        from onnx import TensorProto, helper

        value = _grid(weight.scale.float().numpy().astype(np.float16 if weight.scale.element_size() == 2 else np.float32), weight)
        yield helper.make_node("Cast", [self._constant(f"{name}_stored", value.T if turned else value)], [name], to=TensorProto.FLOAT)

    def _codes(self, name: str, codes: Array, weight: QuantizedTensor, *, turned: bool) -> str:
        """An initializer of 8- or 4-bit codes, about 0 on a symmetric grid."""
        from onnx import TensorProto

        signed = weight.zero_point is None
        value = np.ascontiguousarray(codes.T if turned else codes)
        if signed:
            value = (value.astype(np.int16) - 2 ** (weight.bits - 1)).astype(np.int8)
        if weight.bits == 8:
            return self._constant(name, value)
        flat = value.reshape(-1).view(np.uint8) & np.uint8(15)
        flat = np.pad(flat, (0, len(flat) % 2))
        raw = (flat[0::2] | flat[1::2] << np.uint8(4)).tobytes()
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        self._initializers.append(TensorProto(name=name, data_type=kind, dims=value.shape, raw_data=raw))
        return name

    def _constant(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def _grid(value: Array, weight: QuantizedTensor) -> Array:
    """Scales or zero points as DequantizeLinear wants them: [O, G], [O] by channel, one number by tensor."""
    return value if weight.group_size > 0 else value.reshape(()) if weight.group_size == PER_TENSOR else value.reshape(-1)


def _can_gather(node: Any, weight: QuantizedTensor) -> bool:
    """Whether rows can be dequantized after they are looked up."""
    if any(attribute.name == "axis" and attribute.i != 0 for attribute in node.attribute):
        return False
    return _in_blocks(weight) or (weight.bits == 8 and weight.group_size == PER_CHANNEL)


def _in_blocks(weight: QuantizedTensor) -> bool:
    """Whether the operators of com.microsoft take its groups."""
    return weight.group_size >= SMALLEST_BLOCK and weight.group_size & (weight.group_size - 1) == 0


def _packed(codes: Array, bits: int) -> Array:
    """Whole bytes: two codes of 4 bits each, the first below."""
    if bits == 8:
        return codes
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: Array = padded[:, 0::2] | padded[:, 1::2] << np.uint8(4)
    return packed
