"""Static int8 of an encoder's ONNX graph, in operators that ONNX Runtime computes in integers.

In the order of the graph, a few sites at a time (`static_rounding.py`), on the inputs that the part before them gives, which is quantized already:

    x → Mul(1 / s) → QuantizeLinear → MatMulIntegerToFloat(codes of W · s) + bias
    q, k and v of the same x → QAttention, one product for the three; its result's 1 / s goes into the scales of v

A site that one scale spoils takes MatMulNBits, which rounds each token's groups of columns on scales of their own.

Source: ONNX Runtime's contrib operators, com.microsoft.{MatMulIntegerToFloat, QAttention, MatMulNBits}.

Shape legend: T rows (tokens), I columns (input features), O rows of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.compress.rtn import quantize_rtn
from lighten.formats.onnx_attention import DOMAIN, constants_of, declare, keep_read, needed
from lighten.formats.onnx_export import INLINE_BYTES
from lighten.formats.settings import STATIC_GROUP
from lighten.formats.static_rounding import AT_ONCE, FORMAT, Array, Batch, Rounding, choose_rounding, counted_rows, round_groups, spread, together
from lighten.recipe.words import FEW_ROWS

INT8_BLOCKS = 4
"""`accuracy_level` of MatMulNBits: inputs are rounded to int8 in blocks."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input and the products that have it, by the names of their values."""

    source: str
    products: tuple[str, ...]


def quantize_static(model: Any, batches: Sequence[Batch], folder: Path) -> dict[str, Rounding]:
    """Put codes into a graph, in place.

    Args:
        batches: inputs of the graph; rows that `attention_mask` hides do not count.
        folder: for the graphs that are calibrated.

    Returns:
        how each site was rounded, by its source.
    """
    graph, batches, found = _Graph(model), together(batches), {}
    graph.split_sums()
    left = iter(graph.sites())
    while group := list(islice(left, AT_ONCE)):
        inputs = look(model, [site.source for site in group], batches, folder)
        for site in group:
            x = inputs.pop(site.source)
            weights = {name: torch.from_numpy(graph.weight_of(name)) for name in site.products}
            rounding = choose_rounding(x, weights, None if x.shape[1] % STATIC_GROUP else round_groups)
            graph.put(site, rounding)
            found[site.source] = rounding
    graph.join_attention()
    graph.quantize_tables()
    graph.finish()
    return found


def look(model: Any, sources: Sequence[str], batches: Sequence[Batch], folder: Path) -> dict[str, Tensor]:
    """[T, I] what the graph gives at each source."""
    import onnx
    import onnxruntime

    watched, path = onnx.ModelProto(), folder / "calibration.onnx"
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sources)
    nodes = needed(list(watched.graph.node), sources)
    del watched.graph.node[:]
    watched.graph.node.extend(nodes)
    keep_read(watched.graph)
    onnx.save(watched, path, save_as_external_data=watched.ByteSize() > INLINE_BYTES, location=path.name + ".data")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        known = {each.name for each in session.get_inputs()}
        seen: list[list[Tensor]] = [[] for _ in sources]
        for batch in batches:
            results = session.run(list(sources), {name: value for name, value in batch.items() if name in known})
            for rows, values in zip(seen, results, strict=True):
                rows.append(counted_rows(values, batch))
    finally:
        for each in folder.glob("calibration.onnx*"):
            each.unlink()
    return {name: spread(torch.cat(rows)) for name, rows in zip(sources, seen, strict=True)}


class _Graph:
    """A graph whose products are exchanged for those of codes."""

    def __init__(self, model: Any) -> None:
        self._model, self._graph = model, model.graph
        self._values = constants_of(model.graph)

    def split_sums(self) -> None:
        """Write every Gemm with a constant weight, as the products of heads are exported, as a product and a sum."""
        from onnx import helper

        nodes = []
        for node in self._graph.node:
            told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            plain = told.get("alpha", 1.0) == told.get("beta", 1.0) == 1.0 and not told.get("transA")
            if node.op_type != "Gemm" or not plain or node.input[1] not in self._values:
                nodes.append(node)
                continue
            weight, out = self._values[node.input[1]], node.output[0]
            turned = self._constant(f"{out}_weight", weight.T if told.get("transB") else weight)
            summed = len(node.input) > 2 and bool(node.input[2])
            nodes.append(helper.make_node("MatMul", [node.input[0], turned], [f"{out}_product" if summed else out], node.name))
            nodes += [helper.make_node("Add", [f"{out}_product", node.input[2]], [out])] if summed else []
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def sites(self) -> list[Site]:
        """In the order of the graph."""
        found: dict[str, list[str]] = {}
        for node in self._graph.node:
            if node.op_type == "MatMul" and node.input[1] in self._values and self._values[node.input[1]].ndim == 2:
                found.setdefault(node.input[0], []).append(node.output[0])
        return [Site(source=source, products=tuple(products)) for source, products in found.items()]

    def _products_of(self, source: str) -> tuple[str, ...]:
        """What a site's products give."""
        return next((site.products for site in self.sites() if site.source == source), ())

    def weight_of(self, product: str) -> Array:
        """[O, I] of the product that gives a value."""
        return np.ascontiguousarray(self._values[self._giver(product).input[1]].T)

    def put(self, site: Site, rounding: Rounding) -> None:
        """Exchange a site's products."""
        from onnx import helper

        first, source, before = self._place(site.products[0]), site.source, []
        if rounding.low is not None and rounding.high is not None:
            divided = source if self._divide_values(source, 1 / rounding.scales.numpy()) else f"{source}_divided"
            if divided != source:
                inverse = self._constant(f"{source}_divisor", (1 / rounding.scales).numpy())
                before = [helper.make_node("Mul", [source, inverse], [divided])]
            scale, zero = _grid(rounding.low, rounding.high)
            names = [self._constant(f"{source}_scale", scale), self._constant(f"{source}_zero", zero)]
            before.append(helper.make_node("QuantizeLinear", [divided, *names], [f"{source}_rounded"]))
        for product in site.products:
            place, out, bias = self._place(product), product, rounding.shifts[product].numpy()
            added = self._bias_after(product)
            if added is not None:
                out, bias = added.output[0], bias + self._values[_other(added, product)].reshape(-1)
                self._graph.node.remove(added)
            make = self._product if rounding.is_static else self._block_product
            self._graph.node[place].CopyFrom(make(source, product, out, rounding.weights[product], bias))
        for node in reversed(before):
            self._graph.node.insert(first, node)

    def _divide_values(self, source: str, inverse: Array) -> bool:
        """Multiply the columns of what attention mixes, where that is a product of codes that nothing else reads: the division behind attention is
        then no pass of its own."""
        attention = self._giver(source)
        if attention is None or attention.op_type != "MultiHeadAttention" or self._readers(source) != len(self._products_of(source)):
            return False
        node = self._giver(attention.input[2])
        if node is None or node.op_type != "MatMulIntegerToFloat" or self._readers(node.output[0]) != 1:
            return False
        for place in (3, 6):
            node.input[place] = self._constant(f"{node.input[place]}_divided", self._values[node.input[place]] * inverse)
        return True

    def _product(self, source: str, product: str, out: str, weight: QuantizedTensor, bias: Array) -> Any:
        from onnx import helper

        codes, scale = _signed(weight)
        names = [
            f"{source}_rounded", self._constant(f"{product}_codes", codes.T), f"{source}_scale", self._constant(f"{product}_scale", scale),
            f"{source}_zero", "", self._constant(f"{product}_bias", bias.astype(np.float32)),
        ]  # fmt: skip
        return helper.make_node("MatMulIntegerToFloat", names, [out], product, domain=DOMAIN)

    def _block_product(self, source: str, product: str, out: str, weight: QuantizedTensor, bias: Array) -> Any:
        from onnx import helper

        rows, columns = weight.codes.shape
        blocks = columns // STATIC_GROUP
        codes = weight.codes.numpy().astype(np.uint8).reshape(rows, blocks, STATIC_GROUP)
        scale = np.repeat(weight.scale.float().numpy().reshape(-1, 1), blocks, 1)
        names = [
            source, self._constant(f"{product}_codes", codes), self._constant(f"{product}_scale", scale), "", "",
            self._constant(f"{product}_bias", bias.astype(np.float32)),
        ]  # fmt: skip
        return helper.make_node(
            "MatMulNBits", names, [out], product, domain=DOMAIN, K=columns, N=rows, bits=8, block_size=STATIC_GROUP, accuracy_level=INT8_BLOCKS
        )  # fmt: skip

    def join_attention(self) -> None:
        """Put QAttention in the place of every attention whose query, key and value are products of one rounded input, each as wide."""
        from onnx import helper

        for attention in [node for node in self._graph.node if node.op_type == "MultiHeadAttention"]:
            products = [self._giver(name) for name in attention.input[:3]]
            if any(node is None or node.op_type != "MatMulIntegerToFloat" for node in products):
                continue
            if len({node.input[0] for node in products}) > 1 or len({len(self._values[node.input[6]]) for node in products}) > 1:
                continue
            if any(self._readers(node.output[0]) != 1 for node in products):
                continue
            out, first = attention.output[0], products[0].input
            joined = [
                self._constant(f"{out}_joined_{what}", np.concatenate([self._values[node.input[place]] for node in products], axis=-1))
                for what, place in (("codes", 1), ("bias", 6), ("scale", 3))
            ]  # fmt: skip
            kept = {each.name: helper.get_attribute_value(each) for each in attention.attribute}
            node = helper.make_node(
                "QAttention", [first[0], joined[0], joined[1], first[2], joined[2], attention.input[4], first[4]], [out], attention.name,
                domain=DOMAIN, **kept,
            )  # fmt: skip
            attention.CopyFrom(node)
            for product in products:
                self._graph.node.remove(product)

    def quantize_tables(self) -> None:
        """Put 8-bit codes in the place of every table [R, D] of more than `FEW_ROWS` rows that is looked up, and expand what was found."""
        from onnx import TensorProto, helper

        nodes = []
        for node in self._graph.node:
            table = self._values.get(node.input[0]) if node.op_type == "Gather" else None
            if table is None or table.ndim != 2 or len(table) <= FEW_ROWS:
                nodes.append(node)
                continue
            codes, scale = _signed(quantize_rtn(torch.tensor(table), bits=8, group_size=FORMAT.group_size, symmetric=True))
            name, out = node.input[0], node.output[0]
            rows = self._constant(f"{name}_codes", codes), self._constant(f"{name}_scale", scale.reshape(-1, 1))
            nodes += [
                helper.make_node("Gather", [rows[0], node.input[1]], [f"{out}_codes"], axis=0),
                helper.make_node("Gather", [rows[1], node.input[1]], [f"{out}_scale"], axis=0),
                helper.make_node("Cast", [f"{out}_codes"], [f"{out}_float"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out]),
            ]  # fmt: skip
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def finish(self) -> None:
        """Leave no constant that nothing reads, and no value that nothing asks for."""
        nodes = needed(list(self._graph.node), [output.name for output in self._graph.output])
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        keep_read(self._graph)
        declare(self._model)

    def _constant(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        assert name not in self._values, f"{name} is the name of another constant"
        self._values[name] = np.ascontiguousarray(value)
        self._graph.initializer.append(numpy_helper.from_array(self._values[name], name))
        return name

    def _place(self, value: str) -> int:
        return next(place for place, node in enumerate(self._graph.node) if value in node.output)

    def _giver(self, value: str) -> Any:
        return next((node for node in self._graph.node if value in node.output), None)

    def _readers(self, value: str) -> int:
        return len([node for node in self._graph.node if value in node.input]) + len([out for out in self._graph.output if out.name == value])

    def _bias_after(self, product: str) -> Any:
        """The sum with a constant row that alone reads a product."""
        readers = [node for node in self._graph.node if product in node.input]
        if self._readers(product) != 1 or not readers or readers[0].op_type != "Add":
            return None
        other = self._values.get(_other(readers[0], product))
        columns = self._values[self._giver(product).input[1]].shape[1]
        return readers[0] if other is not None and other.size == columns == other.shape[-1] else None


def _other(node: Any, value: str) -> str:
    """The one of two inputs that is not a value."""
    return str(node.input[1] if node.input[0] == value else node.input[0])


def _grid(low: float, high: float) -> tuple[Array, Array]:
    """The step and the code of 0 of a range of 256 steps."""
    step = (high - low) / 255
    return np.array(step, np.float32), np.array(round(-low / step), np.uint8)


def _signed(weight: QuantizedTensor) -> tuple[Array, Array]:
    """int8 [O, I] around 0, and scales [O]."""
    codes: Array = (weight.codes.to(torch.int16) - 128).to(torch.int8).numpy()
    return codes, weight.scale.float().numpy().reshape(-1)
