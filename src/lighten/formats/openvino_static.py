"""Static int8 of an encoder's OpenVINO graph: activations on scales from calibration, weights by GPTQ, and dynamic scales where static ones spoil.

Each input of products with constant weights is one site. In the order of the graph, a few at a time, on the inputs that the part before them gives,
which is quantized already:

    y = x / s,  s_j = max|x_j|^α / max|w_j|^(1 - α)            outliers move into the weights (SmoothQuant); the division is part of the rounding
    ŷ = (clamp(round(y / Δ) + z, 0, 255) - z) · Δ              one scale for all, [min, max] of calibration
    Ŵ ≈ W · s                                                  8 bits by channel, GPTQ with the moments of y
    bias + mean(x Wᵀ - ŷ Ŵᵀ)                                   what rounding shifts on average

α is the one of `ALPHAS` whose product is nearest to x Wᵀ on rows that nothing was fitted to. Where a few tokens have activations far beyond all
others', one scale for all leaves nothing of the rest: a site whose product is then farther off than `SPOILED`, and less than half as far with scales
of each token's groups of columns, keeps float inputs, which OpenVINO rounds itself.

Source: Xiao et al. 2022 (arXiv:2211.10438), eq. 4; Frantar et al. 2022 (arXiv:2210.17323); Nagel et al. 2019 (arXiv:1906.04721), section 4.2, for the
bias. Deviations: (1) channels are divided where the input is rounded, so that norms and residual sums stay as they are; (2) α by site; (3) the
mixture.

Shape legend: B batch_size, S length, T rows (tokens), I columns (input features), O rows of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.fake_quant import round_dynamic
from lighten.compress.gptq import quantize_gptq
from lighten.compress.grid import QuantizedTensor
from lighten.compress.rtn import quantize_rtn
from lighten.compress.statistics import InputStatistics, Moments
from lighten.formats.settings import STATIC_GROUP
from lighten.model.spec import WeightFormat
from lighten.recipe.words import FEW_ROWS

Batch: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
ALPHAS = (0.75, 0.85, 1.0)
SPOILED = 1e-4
"""Squared error of a product over its square. Choice; benchmarks/static_int8.py prints what each site of a model has."""
AT_ONCE = 4
"""Sites between two looks at the graph as it is then; an encoder's block has four: choice."""
ROWS = 16_384
"""Calibration rows of a site at most, evenly spread: choice, 100 MB of an input of 1,536 columns."""
HELD_OUT = 4
"""Every so many-th row judges what the others chose."""
LEAST = 1e-5
"""Maxima below it count as this much, as in `smoothquant.py`."""
FORMAT = WeightFormat(bits=8, scale_dtype="float32")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input and the products that have it.

    Attributes:
        source: operator and output that give it.
        operators: names of the products.
    """

    source: tuple[str, int]
    operators: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a site is rounded.

    Attributes:
        error: squared error of its products over their square, on held-out rows.
        scales: [I] what its channels are divided by.
        low, high: of what is left; None: each token's groups have scales of their own.
        weights: by operator.
        shifts: [O] by operator: what its product is too small by on average.
    """

    error: float
    scales: Tensor
    low: float | None
    high: float | None
    weights: Mapping[str, QuantizedTensor]
    shifts: Mapping[str, Tensor]

    @property
    def is_static(self) -> bool:
        return self.low is not None


def quantize_static(model: Any, batches: Sequence[Batch]) -> dict[str, Rounding]:
    """Put codes into a graph, in place.

    Args:
        batches: inputs of the graph; rows that `attention_mask` hides do not count.

    Returns:
        how each site was rounded, by the operator that gives its input.
    """
    sites, found = find_sites(model), {}
    left = iter(sites)
    while group := list(islice(left, AT_ONCE)):
        inputs = look(model, group, batches)
        for site in group:
            weights = {name: weight_of(_operator(model, name)) for name in site.operators}
            rounding = choose_rounding(inputs.pop(site.source), weights)
            _put(model, site, rounding)
            found[site.source[0]] = rounding
    return found


def quantize_tables(model: Any) -> None:
    """Put 8-bit codes in the place of every table [R, D] of more than `FEW_ROWS` rows that are gathered, in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Gather" and (table := _constant(node.input_value(0))) is not None and table.ndim == 2 and len(table) > FEW_ROWS:
            codes = quantize_rtn(torch.from_numpy(table), bits=8, group_size=FORMAT.group_size, symmetric=True)
            node.input(0).replace_source_output(_expanded(codes, turned=False).output(0))


def find_sites(model: Any) -> list[Site]:
    """Every input of products with constant weights, in the order of the graph."""
    operators: dict[tuple[str, int], list[str]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _is_product(node):
            source = node.input_value(0)
            operators.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(node.get_friendly_name())
    return [Site(source=source, operators=tuple(names)) for source, names in operators.items()]


def _is_product(node: Any) -> bool:
    """Whether it is x W or x Wᵀ, W a constant."""
    weight = _constant(node.input_value(1))
    return weight is not None and weight.ndim == 2 and not node.get_attributes()["transpose_a"] and _constant(node.input_value(0)) is None


def _constant(output: Any) -> np.ndarray[Any, Any] | None:
    """The values of a constant of floats; None: it is something else."""
    node = output.get_node()
    if node.get_type_name() != "Constant" or node.get_element_type().to_string() not in ("f32", "f16", "bf16"):
        return None
    return np.array(node.data, np.float32)


def weight_of(node: Any) -> Tensor:
    """[O, I]."""
    values = _constant(node.input_value(1))
    assert values is not None, "a site's weight is constant"
    return torch.from_numpy(values if node.get_attributes()["transpose_b"] else values.T.copy())


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
            rows.append(_rows(np.array(results[place], np.float32), batch))
    return {site.source: _spread(torch.cat(rows)) for site, rows in zip(sites, seen, strict=True)}


def _rows(values: np.ndarray[Any, Any], batch: Batch) -> Tensor:
    """[T, I] of [B, S, I], those that count; of [B, I] all."""
    mask = batch.get("attention_mask")
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return torch.from_numpy(values[mask.astype(bool)])
    return torch.from_numpy(values.reshape(-1, values.shape[-1]))


def _spread(rows: Tensor) -> Tensor:
    return rows if len(rows) <= ROWS else rows[torch.linspace(0, len(rows) - 1, ROWS).long()]


def choose_rounding(x: Tensor, weights: Mapping[str, Tensor]) -> Rounding:
    """The static rounding of least error; or the dynamic one, where that spoils too much.

    Args:
        x: [T, I].
        weights: [O, I] each.
    """
    statistics = statistics_of(x)
    tried = (round_by(x, weights, smooth_scales(x, weights, alpha), statistics=statistics) for alpha in ALPHAS)
    best = min(tried, key=lambda found: found.error)
    if best.error <= SPOILED or x.shape[1] % STATIC_GROUP:
        return best
    other = round_by(x, weights, torch.ones(x.shape[1]), static=False, statistics=statistics)
    return other if other.error < best.error / 2 else best


def smooth_scales(x: Tensor, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """[I], their geometric mean 1."""
    inputs = x.abs().amax(0).clamp(min=LEAST)
    columns = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp(min=LEAST)
    scales = inputs**alpha / columns ** (1 - alpha)
    return scales / scales.log().mean().exp()


def statistics_of(x: Tensor) -> InputStatistics:
    """The moments of x [T, I], those of its held-out rows apart."""
    moments, held_out = Moments(x.shape[1]), _held_out(x)
    moments.add(x[~held_out])
    moments.add(x[held_out], held_out=True)
    return moments.finish()


def _held_out(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1


def _of_divided(found: InputStatistics, scales: Tensor) -> InputStatistics:
    """The moments of x / scales, from those of x."""
    both = scales[:, None] * scales
    return replace(
        found, hessian=found.hessian / both, held_out=None if found.held_out is None else found.held_out / both,
        mean_abs=found.mean_abs / scales, abs_max=found.abs_max / scales,
    )  # fmt: skip


def round_by(x: Tensor, weights: Mapping[str, Tensor], scales: Tensor, *, statistics: InputStatistics, static: bool = True) -> Rounding:
    """A site rounded with given scales, and how far off its products then are.

    Args:
        statistics: of x.
    """
    smoothed, held_out = x / scales, _held_out(x)
    low, high = static_range(smoothed) if static else (None, None)
    codes = quantize_gptq({name: weight * scales for name, weight in weights.items()}, _of_divided(statistics, scales), FORMAT)
    rounded = round_static(smoothed, low, high) if low is not None and high is not None else round_groups(smoothed)
    wrong = total = 0.0
    shifts = {}
    for name, weight in weights.items():
        exact, coded = x @ weight.T, rounded @ codes[name].dequantize().T
        wrong += float((coded - exact)[held_out].square().sum())
        total += float(exact[held_out].square().sum())
        shifts[name] = (exact - coded).mean(0)
    return Rounding(error=wrong / total if total else 0.0, scales=scales, low=low, high=high, weights=codes, shifts=shifts)


def static_range(x: Tensor) -> tuple[float, float]:
    """The least range of 256 steps that holds all of x and of which 0 is a value."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    zero = round(-low / step)
    return -zero * step, (255 - zero) * step


def round_static(x: Tensor, low: float, high: float) -> Tensor:
    """
    >>> round_static(torch.tensor([-9.0, 0.2, 0.6]), 0.0, 255.0).tolist()
    [0.0, 0.0, 1.0]
    """
    step = (high - low) / 255
    return ((x - low) / step).round().clamp(0, 255) * step + low


def round_groups(x: Tensor) -> Tensor:
    """As OpenVINO rounds what it quantizes dynamically: a symmetric scale for each row's groups of columns."""
    return round_dynamic(x[:, None], element="int", zero_points=False, group_size=STATIC_GROUP)[:, 0]


def _operator(model: Any, name: str) -> Any:
    return next(node for node in model.get_ordered_ops() if node.get_friendly_name() == name)


def _put(model: Any, site: Site, rounding: Rounding) -> None:
    """Put a site's rounding into the graph."""
    import openvino
    from openvino import opset13 as op

    nodes = [_operator(model, name) for name in site.operators]
    source = nodes[0].input_value(0)
    if rounding.is_static:
        shape = [1] * (len(source.get_partial_shape()) - 1) + [-1]
        divided = _divided(source, rounding.scales.numpy().reshape(shape))
        low, high = (openvino.op.Constant(np.full([1] * len(shape), end, np.float32)) for end in (rounding.low, rounding.high))
        rounded = op.fake_quantize(divided, low, high, low, high, 256)
        rounded.set_friendly_name(f"{site.source[0]}/rounded")
        source = rounded.output(0)
    for node in nodes:
        codes = _expanded(rounding.weights[node.get_friendly_name()], turned=not node.get_attributes()["transpose_b"])
        node.input(0).replace_source_output(source)
        node.input(1).replace_source_output(codes.output(0))
        _shift(node, rounding.shifts[node.get_friendly_name()])


def _shift(node: Any, shift: Tensor) -> None:
    """Add to the bias that follows a product, or put one there."""
    import openvino
    from openvino import opset13 as op

    targets = list(node.output(0).get_target_inputs())
    if len(targets) == 1 and targets[0].get_node().get_type_name() == "Add":
        add = targets[0].get_node()
        other = 1 - targets[0].get_index()
        if (bias := _constant(add.input_value(other))) is not None:
            add.input(other).replace_source_output(openvino.op.Constant(bias + shift.numpy()).output(0))
            return
    added = op.add(node, openvino.op.Constant(shift.numpy()))
    for target in targets:
        target.replace_source_output(added.output(0))


def _divided(source: Any, scales: np.ndarray[Any, Any]) -> Any:
    """source / scales. Of a norm, x · weight + bias, both are divided beside it, so that it is computed and rounded in one go."""
    import openvino
    from openvino import opset13 as op

    def constant(values: np.ndarray[Any, Any]) -> Any:
        return openvino.op.Constant(np.ascontiguousarray(values, np.float32))

    add = source.get_node()
    if add.get_type_name() == "Add" and (bias := _constant(add.input_value(1))) is not None:
        multiply = add.input_value(0).get_node()
        if multiply.get_type_name() == "Multiply" and (weight := _constant(multiply.input_value(1))) is not None:
            return op.add(op.multiply(multiply.input_value(0), constant(weight / scales)), constant(bias / scales))
    return op.multiply(source, constant(1 / scales))


def _expanded(weight: QuantizedTensor, *, turned: bool) -> Any:
    """Constant(int8) → Convert → Multiply(scale): float32 [O, I], or [I, O]."""
    import openvino
    from openvino import opset13 as op

    codes, scale = (weight.codes.to(torch.int16) - 128).to(torch.int8), weight.scale.float()
    if turned:
        codes, scale = codes.T, scale.T
    value = op.convert(openvino.op.Constant(np.ascontiguousarray(codes.numpy())), openvino.Type.f32)
    return op.multiply(value, openvino.op.Constant(np.ascontiguousarray(scale.numpy())))


def described(found: Mapping[str, Rounding]) -> Iterator[str]:
    """A line for each site, for people."""
    for name, rounding in found.items():
        kind = "static" if rounding.is_static else f"dynamic, groups of {STATIC_GROUP}"
        yield f"{name}: {kind}, error {rounding.error:.1e} ({', '.join(rounding.weights)})"
