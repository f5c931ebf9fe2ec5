"""A decoder's graph that keeps its keys and values inside, in the form that OpenVINO runs as one operator by layer.

    softmax(Q Kᵀ · scale + mask) V     becomes     ScaledDotProductAttention(Q, K, V, mask, scale)
    K = [past, new]                    becomes     K = [past of the sequences beam_idx, new]

Past, cache and attention are one operator then, which neither copies the past nor expands shared heads. The state begins with no positions by itself.
The head is computed for as many of the last tokens as are asked for: of a prompt one does.

Source: OpenVINO's guide on stateful models; its CPU plugin's StatefulSDPAFusion, for the form.

Shape legend: B sequences, P positions known, Q new tokens, H key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lighten.formats.graph_inputs import BEAMS, KEPT, cache_names, kv_shape
from lighten.formats.openvino_rewrite import constant_of, make_constant, only_reader
from lighten.model.spec import ModelSpec


def keep_state(model: Any, spec: ModelSpec, *, keeps_last: bool = True) -> None:
    """Make past and present keys and values of an exported decoder a state of it, in place.

    Args:
        keeps_last: it takes `logits_to_keep`.
    """
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    layers = kv_shape(spec)[2]
    apply_make_stateful_transformation(model, dict(zip(cache_names(layers, "past"), cache_names(layers, "present"), strict=True)))
    fuse_attention(model)
    beams, kept = op.parameter([-1], np.int32, name=BEAMS), op.parameter([1], np.int64, name=KEPT)
    _begin_empty(model, beams)
    if keeps_last:
        _keep_last(model, kept)
    added = {BEAMS: beams, **({KEPT: kept} if keeps_last else {})}
    for name, parameter in added.items():
        parameter.output(0).set_names({name})
    model.add_parameters(list(added.values()))
    model.validate_nodes_and_infer_types()


def fuse_attention(model: Any) -> int:
    """Put one operator in the place of every softmax(Q Kᵀ · scale + mask) V, in place; how many there are."""
    from openvino import opset13 as op

    done = 0
    for softmax in [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]:
        added, mixed = softmax.input_value(0).get_node(), only_reader(softmax, "MatMul")
        scaled = added.input_value(0).get_node() if added.get_type_name() == "Add" else added
        scores = scaled.input_value(0).get_node() if scaled.get_type_name() == "Multiply" else scaled
        if mixed is None or mixed.get_attributes()["transpose_b"] or scaled is added or scores is scaled or scores.get_type_name() != "MatMul":
            continue
        scale, turned = constant_of(scaled.input_value(1)), scores.get_attributes()
        if scale is None or scale.size != 1 or turned["transpose_a"] or not turned["transpose_b"]:
            continue
        query, key, value = scores.input_value(0), scores.input_value(1), mixed.input_value(1)
        one = op.scaled_dot_product_attention(query, key, value, added.input_value(1), make_constant(scale.reshape(())), causal=False)
        mixed.output(0).replace(one.output(0))
        done += 1
    return done


def _begin_empty(model: Any, beams: Any) -> None:
    """States of B sequences and no positions at first; who asks for their shapes is told by the other inputs."""
    from openvino import opset13 as op

    given = {each.get_any_name(): each.get_node() for each in model.inputs}

    def side(name: str, axis: int) -> Any:
        return op.gather(op.shape_of(given[name]), op.constant([axis], np.int64), op.constant(0, np.int64))

    def sides(*each: Any) -> Any:
        return op.concat([op.constant([one], np.int64) if isinstance(one, int) else one for one in each], 0)

    batch, past = side("input_ids", 0), op.subtract(side("attention_mask", 1), side("input_ids", 1))
    for state in [node for node in model.get_ordered_ops() if node.get_type_name() == "ReadValue"]:
        heads, width = (state.get_output_partial_shape(0)[axis].get_length() for axis in (1, 3))
        for target in list(state.output(0).get_target_inputs()):
            if target.get_node().get_type_name() == "ShapeOf":
                target.get_node().output(0).replace(sides(batch, heads, past, width).output(0))
            else:
                target.replace_source_output(op.gather(state, beams, op.constant(0, np.int64)).output(0))
        state.set_arguments([op.broadcast(make_constant(np.zeros(())), sides(batch, heads, 0, width)).output(0)])


def _keep_last(model: Any, kept: Any) -> None:
    """[B, kept, V] logits of the last tokens in the place of all."""
    from openvino import opset13 as op

    head = model.output("logits").get_node().input_value(0).get_node()
    axis, end, step = (op.constant([value], np.int64) for value in (1, np.iinfo(np.int64).max, 1))
    hidden = head.input_value(0)
    head.input(0).replace_source_output(op.slice(hidden, op.negative(kept), end, step, axis).output(0))
