"""Static int8 of an encoder's OpenVINO graph: activations on scales from calibration, weights by GPTQ, and dynamic scales where static ones spoil.

Each input of products with constant weights is one site. In the order of the graph, a few at a time, on the inputs that the part before them gives,
which is quantized already:

    y = x / s,  s_j = max|x_j|^α / max|w_j|^(1 - α)            outliers move into the weights (SmoothQuant); the division is part of the rounding
    ŷ = (clamp(round(y / Δ) + z, 0, 255) - z) · Δ              one scale for all, [min, max] of calibration
    Ŵ ≈ W · s                                                  8 bits by channel, GPTQ with the moments of y
    bias + mean(x Wᵀ - ŷ Ŵᵀ)                                   what rounding shifts on average

α is the one of `ALPHAS` whose product is nearest to x Wᵀ on rows that nothing was fitted to. Where a few tokens have activations far beyond all
others', one scale for all leaves nothing of the rest: a site whose product is then farther off than `SPOILED`, and less than half as far with scales
of each token's groups of columns, keeps float inputs, which OpenVINO rounds itself in float32, and multiplies as they are in bfloat16.

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
from lighten.compress.gptq import GptqSettings, quantize_gptq
from lighten.compress.grid import QuantizedTensor
from lighten.compress.rtn import quantize_rtn
from lighten.compress.statistics import InputStatistics, Moments
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
from lighten.model.spec import WeightFormat
from lighten.recipe.words import FEW_ROWS

Batch: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
ALPHAS = (0.75, 0.85, 1.0)
SPOILED = 3e-4
"""Squared error of a product over its square. Choice; benchmarks/static_int8.py prints what each site of a model has."""
AT_ONCE = 4
"""Sites between two looks at the graph as it is then; an encoder's block has four: choice."""
ROWS = 16_384
"""Calibration rows of a site at most, evenly spread: choice, 100 MB of an input of 1,536 columns."""
SEQUENCES = 16
"""In a batch of calibration: choice."""
HELD_OUT = 4
"""Every so many-th row judges what the others chose."""
LEAST = 1e-5
"""Maxima below it count as this much, as in `smoothquant.py`."""
FORMAT = WeightFormat(bits=8, scale_dtype="float32")
PLAIN = GptqSettings(damping=0.03, refine=0, search=False)
"""Choice: at 8 bits most of a product's error is of its inputs; by hand, on a block of MiniLM, GPTQ's other settings lowered it by 1 to 3 %."""


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
    batches, found = together(batches), {}
    scale_queries(model)
    join_heads(model)
    left = iter(find_sites(model))
    while group := list(islice(left, AT_ONCE)):
        inputs = look(model, group, batches)
        for site in group:
            weights = {name: torch.from_numpy(weight_of(_operator(model, name))) for name in site.operators}
            rounding = choose_rounding(inputs.pop(site.source), weights)
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
            rows.append(_rows(np.array(results[place], np.float32), batch))
    return {site.source: _spread(torch.cat(rows)) for site, rows in zip(sites, seen, strict=True)}


def together(batches: Sequence[Batch]) -> list[Batch]:
    """The same sequences, `SEQUENCES` in a batch beside others of about their length, padded where a mask hides it."""
    if any("attention_mask" not in batch for batch in batches):
        return list(batches)
    single = [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(len(batch["attention_mask"]))]
    single.sort(key=lambda each: len(each["attention_mask"]))
    return [_padded(single[start : start + SEQUENCES]) for start in range(0, len(single), SEQUENCES)]


def _padded(sequences: Sequence[Batch]) -> Batch:
    longest = max(len(each["attention_mask"]) for each in sequences)
    return {
        name: np.stack([np.pad(each[name], [(0, longest - len(each[name]))] + [(0, 0)] * (each[name].ndim - 1)) for each in sequences])
        for name in sequences[0]
    }  # fmt: skip


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
    seen = Seen.of(x)
    best = min((round_by(seen, weights, smooth_scales(seen, weights, alpha)) for alpha in ALPHAS), key=lambda found: found.error)
    if best.error <= SPOILED or x.shape[1] % STATIC_GROUP:
        return best
    other = round_by(seen, weights, torch.ones(x.shape[1]), static=False)
    return other if other.error < best.error / 2 else best


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What rounding needs to know of an input's rows x.

    Attributes:
        low, high: [I], of all rows.
        statistics: moments, those of the held-out rows apart.
        held_out: [T / HELD_OUT, I].
    """

    low: Tensor
    high: Tensor
    statistics: InputStatistics
    held_out: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        """
        Args:
            x: [T, I].
        """
        moments, held_out = Moments(x.shape[1]), torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
        moments.add(x[~held_out])
        moments.add(x[held_out], held_out=True)
        return cls(low=x.amin(0), high=x.amax(0), statistics=moments.finish(), held_out=x[held_out])

    def divided(self, scales: Tensor) -> Seen:
        """Of x / scales [I]."""
        own, both = self.statistics, scales[:, None] * scales
        statistics = replace(
            own, hessian=own.hessian / both, held_out=None if own.held_out is None else own.held_out / both,
            mean_abs=own.mean_abs / scales, abs_max=own.abs_max / scales,
        )  # fmt: skip
        return Seen(low=self.low / scales, high=self.high / scales, statistics=statistics, held_out=self.held_out / scales)


def smooth_scales(seen: Seen, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """[I], their geometric mean 1."""
    inputs = torch.maximum(-seen.low, seen.high).clamp(min=LEAST)
    columns = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp(min=LEAST)
    scales = inputs**alpha / columns ** (1 - alpha)
    return scales / scales.log().mean().exp()


def round_by(seen: Seen, weights: Mapping[str, Tensor], scales: Tensor, *, static: bool = True) -> Rounding:
    """A site rounded with given scales, and how far off its products then are."""
    divided = seen.divided(scales)
    low, high = static_range(float(divided.low.min()), float(divided.high.max())) if static else (None, None)
    codes = quantize_gptq({name: weight * scales for name, weight in weights.items()}, divided.statistics, FORMAT, PLAIN)
    x = divided.held_out
    rounded = round_static(x, low, high) if low is not None and high is not None else round_groups(x)
    wrong = total = 0.0
    shifts = {}
    for name, weight in weights.items():
        exact, coded = seen.held_out @ weight.T, rounded @ codes[name].dequantize().T
        wrong += float((coded - exact).square().sum())
        total += float(exact.square().sum())
        shifts[name] = (exact - coded).mean(0)
    return Rounding(error=wrong / total if total else 0.0, scales=scales, low=low, high=high, weights=codes, shifts=shifts)


def static_range(low: float, high: float) -> tuple[float, float]:
    """The least range of 256 steps that holds all between two values and of which 0 is one."""
    low, high = min(low, 0.0), max(high, 0.0)
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


def described(found: Mapping[str, Rounding]) -> Iterator[str]:
    """A line for each site, for people."""
    for name, rounding in found.items():
        kind = "static" if rounding.is_static else f"dynamic, groups of {STATIC_GROUP}"
        yield f"{name}: {kind}, error {rounding.error:.1e} ({', '.join(rounding.weights)})"
