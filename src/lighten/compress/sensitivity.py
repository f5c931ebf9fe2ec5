"""How much an error in each weight matters: its share of the divergence between the original's answers and those of the changed model.

To second order, KL(original ‖ changed) = ½ E[(Σ ΔW · G)²], where G is the gradient of the log-likelihood of answers that the original itself draws.
One backward pass over a batch gives a sample of G for every weight. Rounding errors of different rows are taken as independent, so each row of a
weight is a sample of its own, ½ Σ_o ⟨ΔW_o, G_o⟩², and a few passes are enough; what errors of one row have in common, over all its columns and
over all tokens, is counted in full.

It is measured for a probe, each weight rounded to nearest in one format; an option's error follows by the ratio of its own squared error to the
probe's, columns weighted by how large their gradients are. So no option is multiplied with every sample.

A model without logits answers with hidden states; then G is the gradient of their product with normal noise, and the error ½ |Δh|² a position.

Blocks run forward and backward with their own weights alone in memory; between them lies one input for each.

Source: the Fisher information as the second-order term of KL, Martens 2014 (arXiv:1412.1193), section 5; drawing labels from the model itself,
Kunstner et al. 2019 (arXiv:1905.12558); blocks by recomputation, Chen et al. 2016 (arXiv:1604.06174).

Shape legend: O rows (output features), I columns (input features), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lighten.compress.memory_plan import release_free
from lighten.compress.rtn import quantize_rtn
from lighten.compress.scale_search import search_scales
from lighten.compress.skeleton import Skeleton, Source
from lighten.compress.teacher import answer_of_head
from lighten.model.spec import PER_TENSOR, WeightFormat
from lighten.recipe.automatic import Budget

Matrix = Callable[[str, Tensor], Tensor]
"""A checkpoint tensor's name and value, or anything of its shape → [O, I]."""


_ROWS = 512  # choice: their mean squared error is within a few per cent of that of all rows


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What backward passes saw of one weight.

    Attributes:
        importance: [I], the mean over its rows of G², which weights the columns' errors.
        probe_error: the divergence that the probe's error gives, a position.
        probe_square: the probe's squared error, weighted by `importance`.
    """

    importance: Tensor
    probe_error: float
    probe_square: float

    def error(self, weight: Tensor, format: WeightFormat) -> float:
        """The divergence, a position, that rounding the weight [O, I] in a format gives, on the grid of least error; told by some of its rows."""
        rows = weight[:: math.ceil(len(weight) / _ROWS)].float()
        rounded = search_scales(rows, format=format, importance=self.importance).dequantize()
        square = _square(rows - rounded, self.importance) * len(weight) / len(rows)
        return self.probe_error * square / max(self.probe_square, 1e-300)


def measure_sensitivity(
    skeleton: Skeleton, source: Source, batches: Sequence[Mapping[str, Any]], probes: Mapping[str, WeightFormat], *, matrix: Matrix, seed: int = 0,
) -> dict[str, Sensitivity]:  # fmt: skip
    """What each weight's rounding costs, from one backward pass for each batch.

    Args:
        skeleton: left without weights.
        source: the tensors as they are now.
        batches: what the model is called with; more and smaller ones cost time, and give more samples.
        probes: checkpoint tensor → the format of whole-number codes in which it is rounded to be measured.
    """
    seen = _Seen(skeleton, source, probes, matrix)
    generator = torch.Generator().manual_seed(seed)
    positions = 0
    with _running(skeleton, source, seen):
        for batch in batches:
            with torch.enable_grad():
                answer, is_logits = answer_of_head(skeleton.module, skeleton.module(**batch))
                gradient, count = _drawn(answer.detach(), batch.get("attention_mask"), generator, is_logits=is_logits)
                answer.backward(gradient)  # type: ignore[no-untyped-call]
            del answer, gradient
            seen.finish_batch()
            release_free()
            positions += count
    return seen.found(positions)


def option_errors(
    budget: Budget, seen: Mapping[str, Sensitivity], source: Source, tensors: Mapping[str, Sequence[str]], *, matrix: Matrix
) -> dict[str, list[float]]:
    """For each weight of a budget the divergence that each of its options gives, as `seen` tells it.

    Args:
        tensors: module → its matrices in the checkpoint, one for each expert.
    """
    found: dict[str, list[float]] = {}
    for module, options in budget.options.items():
        sums = [0.0] * len(options)
        for name in tensors[module]:
            weight = matrix(name, source(name))
            for place, option in enumerate(options):
                sums[place] += seen[name].error(weight, option.format)
        found[module] = sums
    return found


_DRAWN_ELEMENTS = 2**23  # choice: 33 MB of float32 a copy


def _drawn(answer: Tensor, mask: Tensor | None, generator: torch.Generator, *, is_logits: bool) -> tuple[Tensor, int]:
    """The gradient in the answer [..., V] of the log-likelihood of what is drawn from it, and how many positions count: padding does not."""
    rows = answer.shape[:-1]
    counts = mask.bool() if mask is not None and mask.shape == rows else torch.ones(rows, dtype=torch.bool)
    flat, found = answer.reshape(-1, answer.shape[-1]), torch.zeros_like(answer).reshape(-1, answer.shape[-1])
    for chosen in torch.split(counts.reshape(-1).nonzero()[:, 0], max(1, _DRAWN_ELEMENTS // answer.shape[-1])):
        if is_logits:
            likely = torch.softmax(flat[chosen].float(), -1)
            labels = torch.multinomial(likely, 1, generator=generator)
            found[chosen] = likely.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=likely.dtype)).to(answer.dtype)
        else:
            found[chosen] = torch.randn(len(chosen), answer.shape[-1], generator=generator).to(answer.dtype)
    return found.reshape(answer.shape), int(counts.sum())


class _Seen:
    """Sums over the backward passes, for each probed tensor.

    Attributes:
        leaves: probed parameters that lie outside of the units, and so stay in memory, where their gradients gather.
    """

    def __init__(self, skeleton: Skeleton, source: Source, probes: Mapping[str, WeightFormat], matrix: Matrix) -> None:
        self._skeleton, self._source, self._probes, self._matrix = skeleton, source, probes, matrix
        self.names: dict[str, list[str]] = {}
        for name in probes:
            self.names.setdefault(skeleton.places[name].key, []).append(name)
        self._importance: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._errors = dict.fromkeys(probes, 0.0)
        self._rows = dict.fromkeys(probes, 0)
        self._parts: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def add(self, key: str, gradient: Tensor, *, whole: bool) -> None:
        """A parameter's gradient; one that is not `whole` waits for the others of this batch."""
        if key in self._parts:
            gradient = self._parts.pop(key).add_(gradient)
        if not whole:
            self._parts[key] = gradient
            return
        for name in self.names[key]:
            self._add(name, self._matrix(name, self._skeleton.places[name].of(gradient)))

    def finish_batch(self) -> None:
        """Count what waits, and the gradients of parameters that stay in memory."""
        for key, leaf in self.leaves.items():
            if leaf.grad is not None:
                self.add(key, leaf.grad, whole=True)
                leaf.grad = None
        for key in list(self._parts):
            gradient = self._parts.pop(key)
            self.add(key, gradient, whole=True)

    def _add(self, name: str, gradient: Tensor) -> None:
        """Sums of one tensor's gradient [O, I], some rows at a time."""
        weight, probe = self._matrix(name, self._source(name)), self._probes[name]
        columns = weight.shape[1]
        importance = self._importance.setdefault(name, torch.zeros(columns))
        squares = torch.zeros(columns)
        for rows in _pieces(weight, probe):
            values, slopes = weight[rows].float(), gradient[rows].float()
            error = values - _rounded(values, probe)
            self._errors[name] += 0.5 * float((error * slopes).sum(1).double().square().sum())
            importance += slopes.square().sum(0)
            squares += error.square().sum(0)
        self._squares[name] = squares
        self._rows[name] += len(weight)

    def found(self, positions: int) -> dict[str, Sensitivity]:
        """What was seen of each tensor. One that no gradient reached, such as a pooler or an expert that no token met, is not therefore worth
        nothing: it is taken to matter as much as the others do on average, for the same squared error."""
        met = {
            name: Sensitivity(
                importance=(importance := self._importance[name] / self._rows[name]), probe_error=self._errors[name] / positions,
                probe_square=float((self._squares[name] * importance).double().sum()),
            )
            for name in self._probes if name in self._importance
        }  # fmt: skip
        squares = sum(float(self._squares[name].double().sum()) for name in met)
        usual = sum(each.probe_error for each in met.values()) / max(squares, 1e-300)
        return {name: met.get(name) or self._unmet(name, usual) for name in self._probes}

    def _unmet(self, name: str, usual: float) -> Sensitivity:
        weight = self._matrix(name, self._source(name))
        square = sum(float((weight[rows].float() - _rounded(weight[rows].float(), self._probes[name])).double().square().sum())
                     for rows in _pieces(weight, self._probes[name]))  # fmt: skip
        return Sensitivity(importance=torch.ones(weight.shape[1]), probe_error=usual * square, probe_square=square)


_PIECE_ELEMENTS = 2**21  # choice: 8 MB of float32 a copy


def _pieces(weight: Tensor, format: WeightFormat) -> Iterator[slice]:
    rows = len(weight) if format.group_size == PER_TENSOR else max(1, _PIECE_ELEMENTS // weight.shape[1])
    yield from (slice(start, start + rows) for start in range(0, len(weight), rows))


def _rounded(weight: Tensor, format: WeightFormat) -> Tensor:
    assert format.bits is not None, "a probe has a width"
    return quantize_rtn(weight, bits=format.bits, group_size=format.group_size, symmetric=format.symmetric).dequantize()


def _square(error: Tensor, importance: Tensor) -> float:
    return float((error.square() @ importance).double().sum())


# forward and backward, block by block


@contextmanager
def _running(skeleton: Skeleton, source: Source, seen: _Seen) -> Iterator[None]:
    """The module can be called and gone back through inside; the gradients of all that is probed arrive at `seen`."""
    for module in skeleton.outside():
        skeleton.load_own(module, source)
    for key in seen.names:
        if not (value := skeleton.value(key)).is_meta:
            seen.leaves[key] = value.requires_grad_()
    for unit in skeleton.units:
        _Wrapped(unit.module, skeleton, source, seen)
    try:
        yield
    finally:
        for unit in skeleton.units:
            del unit.module.__dict__["forward"]
        skeleton.drop(skeleton.module)


class _Wrapped:
    """A unit that has its weights while it runs alone, and runs once more when the backward pass comes to it."""

    def __init__(self, module: nn.Module, skeleton: Skeleton, source: Source, seen: _Seen) -> None:
        self._module, self._skeleton, self._source, self._seen = module, skeleton, source, seen
        self._original = module.forward
        self._keys = sorted({skeleton.places[name].key for name in skeleton.names_in(module)} & seen.names.keys())
        self._calls = 0
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not any(leaves[place].requires_grad for place in places):  # nothing before it is probed
            first = next(place for place in places if leaves[place].is_floating_point())
            leaves[first] = leaves[first].detach().requires_grad_()
        self._calls += 1
        made: list[Any] = []

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            given, named = tree_unflatten(filled, structure)
            found, shape = tree_flatten(self._original(*given, **named))
            made[:] = [found, shape]
            return [leaf for leaf in found if isinstance(leaf, Tensor)]

        outputs = iter(_Recomputed.apply(self, run, *(leaves[place] for place in places)))  # type: ignore[no-untyped-call]
        found, shape = made
        return tree_unflatten([next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in found], shape)

    @contextmanager
    def loaded(self) -> Iterator[list[Tensor]]:
        """The probed parameters, in memory with all the others."""
        self._skeleton.load(self._module, self._source)
        try:
            yield [self._skeleton.value(key).requires_grad_() for key in self._keys]
        finally:
            self._skeleton.drop(self._module)

    def meet(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradients of the probed parameters from one of this batch's calls."""
        self._calls -= 1
        for key, gradient in zip(self._keys, gradients, strict=True):
            if gradient is not None:
                self._seen.add(key, gradient, whole=self._calls == 0 and key not in self._seen.leaves)


class _Recomputed(torch.autograd.Function):
    """A unit's outputs; its gradients by running it again."""

    @staticmethod
    def forward(ctx: Any, unit: _Wrapped, run: Callable[[Sequence[Tensor]], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.unit, ctx.run = unit, run
        ctx.save_for_backward(*tensors)
        with torch.no_grad(), unit.loaded():
            outputs = run(tensors)
        outputs = [output.clone() if any(output is tensor for tensor in tensors) else output for output in outputs]
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        with torch.enable_grad(), ctx.unit.loaded() as parameters:
            outputs = ctx.run(tensors)
            pairs = [(output, slope) for output, slope in zip(outputs, gradients, strict=True) if output.requires_grad]
            answers, slopes = [output for output, _ in pairs], [slope for _, slope in pairs]
            found = torch.autograd.grad(answers, [*wanted, *parameters], slopes, allow_unused=True)
            del outputs, pairs, answers
        ctx.unit.meet(found[len(wanted) :])
        passed = iter(found[: len(wanted)])
        return (None, None, *(next(passed) if tensor.requires_grad else None for tensor in tensors))
