"""Static int8 of an encoder's OpenVINO graph: activations on scales from calibration, weights by GPTQ, and dynamic scales where static ones spoil.

In the order of the graph, a few sites at a time (`static_rounding.py`), on the inputs that the part before them gives, which is quantized already.
The division by s is part of the rounding, or of what gives the input. A site that one scale spoils keeps float inputs, which OpenVINO rounds itself
in float32, in each token's groups of columns, and multiplies as they are in bfloat16.

Shape legend: T rows (tokens), I columns (input features), O rows of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.compress.rtn import quantize_rtn
from lighten.formats.openvino_rewrite import (
    bias_of,
    constant_of,
    divide_source,
    find_products,
    join_heads,
    make_constant,
    scale_queries,
    weight_of,
)
from lighten.formats.settings import STATIC_GROUP
from lighten.formats.static_rounding import AT_ONCE, FORMAT, Batch, Rounding, choose_rounding, counted_rows, round_groups, spread, together
from lighten.recipe.words import FEW_ROWS


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input and the products that have it.

    Attributes:
        source: operator and output that give it.
        operators: names of the products.
    """

    source: tuple[str, int]
    operators: tuple[str, ...]


def quantize_static(model: Any, batches: Sequence[Batch]) -> dict[str, Rounding]:
    """Put codes into a graph, in place.

    Args:
        batches: inputs of the graph; rows that `attention_mask` hides do not count.

    Returns:
        how each site was rounded, by the operator that gives its input.
    """
    batches, found = together(batches), {}
    scale_queries(model)
    join_heads(model)
    left = iter(find_sites(model))
    while group := list(islice(left, AT_ONCE)):
        inputs = look(model, group, batches)
        for site in group:
            weights = {name: torch.from_numpy(weight_of(_operator(model, name))) for name in site.operators}
            x = inputs.pop(site.source)
            rounding = choose_rounding(x, weights, None if x.shape[1] % STATIC_GROUP else round_groups)
            _put(model, site, rounding)
            found[site.source[0]] = rounding
    return found


def quantize_tables(model: Any) -> None:
    """Put 8-bit codes in the place of every table [R, D] of more than `FEW_ROWS` rows that are gathered, in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Gather" and (table := constant_of(node.input_value(0))) is not None and table.ndim == 2 and len(table) > FEW_ROWS:
            codes = quantize_rtn(torch.from_numpy(table), bits=8, group_size=FORMAT.group_size, symmetric=True)
            node.input(0).replace_source_output(_expanded(codes, turned=False).output(0))


def find_sites(model: Any) -> list[Site]:
    """Every input of products with constant weights, in the order of the graph."""
    operators: dict[tuple[str, int], list[str]] = {}
    for node in find_products(model):
        source = node.input_value(0)
        operators.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(node.get_friendly_name())
    return [Site(source=source, operators=tuple(names)) for source, names in operators.items()]


def look(model: Any, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[tuple[str, int], Tensor]:
    """[T, I] what the graph gives at each site, in float32 where nothing is quantized."""
    import openvino
    from openvino import opset13 as op

    clone = model.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ordered_ops()}
    wanted = [nodes[name].output(index) for name, index in (site.source for site in sites)]
    watched = openvino.Model([op.result(output) for output in wanted], clone.get_parameters(), "calibration")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": STATIC_GROUP}
    request = openvino.Core().compile_model(watched, "CPU", settings).create_infer_request()
    known = {name for parameter in clone.get_parameters() for name in parameter.output(0).get_names()}
    seen: list[list[Tensor]] = [[] for _ in sites]
    for batch in batches:
        results = request.infer({name: value for name, value in batch.items() if name in known})
        for place, rows in enumerate(seen):
            rows.append(counted_rows(np.array(results[place], np.float32), batch))
    return {site.source: spread(torch.cat(rows)) for site, rows in zip(sites, seen, strict=True)}


def _operator(model: Any, name: str) -> Any:
    return next(node for node in model.get_ordered_ops() if node.get_friendly_name() == name)


def _put(model: Any, site: Site, rounding: Rounding) -> None:
    """Put a site's rounding into the graph."""
    from openvino import opset13 as op

    nodes = [_operator(model, name) for name in site.operators]
    source = nodes[0].input_value(0)
    if rounding.is_static:
        scales = rounding.scales.numpy()
        source = divide_source(source, scales) or op.multiply(source, make_constant(1 / scales)).output(0)
        low, high = (make_constant(np.full([1] * len(source.get_partial_shape()), end)) for end in (rounding.low, rounding.high))
        rounded = op.fake_quantize(source, low, high, low, high, 256)
        rounded.set_friendly_name(f"{site.source[0]}/rounded")
        source = rounded.output(0)
    for node in nodes:
        codes = _expanded(rounding.weights[node.get_friendly_name()], turned=not node.get_attributes()["transpose_b"])
        node.input(0).replace_source_output(source)
        node.input(1).replace_source_output(codes.output(0))
        _shift(node, rounding.shifts[node.get_friendly_name()])


def _shift(node: Any, shift: Tensor) -> None:
    """Add to the bias that follows a product, or put one there."""
    from openvino import opset13 as op

    if (bias := bias_of(node)) is not None:
        bias.replace_source_output(make_constant(constant_of(bias.get_source_output()) + shift.numpy()).output(0))
        return
    targets = list(node.output(0).get_target_inputs())
    added = op.add(node, make_constant(shift.numpy()))
    for target in targets:
        target.replace_source_output(added.output(0))


def _expanded(weight: QuantizedTensor, *, turned: bool) -> Any:
    """Constant(int8) → Convert → Multiply(scale): float32 [O, I], or [I, O]."""
    import openvino
    from openvino import opset13 as op

    codes, scale = (weight.codes.to(torch.int16) - 128).to(torch.int8), weight.scale.float()
    if turned:
        codes, scale = codes.T, scale.T
    value = op.convert(openvino.op.Constant(np.ascontiguousarray(codes.numpy())), openvino.Type.f32)
    return op.multiply(value, openvino.op.Constant(np.ascontiguousarray(scale.numpy())))
