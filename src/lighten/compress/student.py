"""A module whose weights are made from what is stored of them each time that a block runs, so that what is stored can be trained.

No dense copy of the weights lives: a block's are made before it runs and given back after, in the backward pass once more (Chen et al. 2016,
arXiv:1604.06174, recomputation by block). What lives is what the latents hold, one input a block, and what one block saves.

Shape legend: O rows (output features), I columns (input features), G scales of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lighten.compress.grid import Quantized, QuantizedTensor, Weight, to_groups
from lighten.compress.skeleton import Skeleton, Source

_REAL_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Latent(Protocol):
    """What is trained in place of a tensor."""

    def value(self) -> Tensor:
        """The tensor as the model computes with it now; codes' as [O, I]. Gradients flow to the leaves."""
        ...

    def leaves(self) -> list[Tensor]:
        """Factors around 1, or offsets around 0, that an optimizer of the usual kind moves."""
        ...

    def finish(self) -> Weight:
        """What is stored, in the format of what there was before."""
        ...


class Fixed:
    """A weight that stays, expanded whenever it is used."""

    def __init__(self, weight: Quantized, *, dtype: torch.dtype) -> None:
        self._weight, self._dtype = weight, dtype

    def value(self) -> Tensor:
        return self._weight.dequantize().to(self._dtype)

    def leaves(self) -> list[Tensor]:
        return []

    def finish(self) -> Weight:
        return self._weight


def scale_factor(leaf: Tensor, *, bits: int) -> Tensor:
    """What a leaf makes of a scale: 1 + 2**(4 - bits) · leaf, at least 1/2.

    A code's distance from its weight is a share of about 2**-bits of the largest weight, and so is what a scale can be off without harm: one
    learning rate serves all widths. Trials: benchmarks/LOG.md.
    """
    return (1 + 2.0 ** (4 - bits) * leaf).clamp(min=0.5)


class Scales:
    """Codes that stay under scales that move. Signs stay, and no scale loses more than half of its size."""

    def __init__(self, weight: QuantizedTensor, *, dtype: torch.dtype) -> None:
        self._weight, self._dtype = weight, dtype
        self._scale = weight.scales()
        self._leaf = torch.zeros_like(self._scale).requires_grad_()

    def value(self) -> Tensor:
        found: Tensor = _Scaled.apply(self._moved(), self._weight, self._dtype)  # type: ignore[no-untyped-call]
        return found

    def leaves(self) -> list[Tensor]:
        return [self._leaf]

    def finish(self) -> Weight:
        return with_scales(self._weight, self._moved().detach())

    def _moved(self) -> Tensor:
        return self._scale * scale_factor(self._leaf, bits=self._weight.bits)


class Offset:
    """A norm's weight or bias: the tensor plus its root mean square times the leaf, so that one learning rate serves all."""

    def __init__(self, tensor: Tensor, *, dtype: torch.dtype) -> None:
        self._tensor, self._dtype = tensor, dtype
        self._size = tensor.float().square().mean().sqrt()
        self._leaf = torch.zeros_like(tensor, dtype=torch.float32).requires_grad_()

    def value(self) -> Tensor:
        return (self._tensor + self._size * self._leaf).to(self._dtype)

    def leaves(self) -> list[Tensor]:
        return [self._leaf]

    def finish(self) -> Weight:
        return (self._tensor + self._size * self._leaf.detach()).to(self._tensor.dtype)


class _Scaled(torch.autograd.Function):
    """levels · scale in the computing type; to the scales goes the gradient, to the codes none."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        ctx.weight = weight
        groups = to_groups(levels(weight), weight.group_size) * scale[..., None]
        return groups.to(dtype).reshape(weight.codes.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        size = ctx.weight.group_size
        return (to_groups(gradient, size) * to_groups(levels(ctx.weight), size)).sum(-1, dtype=torch.float32), None, None


def levels(weight: QuantizedTensor) -> Tensor:
    """[O, I] bfloat16, exact: what the codes stand for before the scale."""
    if weight.element != "int":
        return QuantizedTensor(
            codes=weight.codes, scale=torch.ones_like(weight.scales()), zero_point=None, bits=weight.bits, group_size=weight.group_size,
            element=weight.element,
        ).dequantize().bfloat16()  # fmt: skip
    codes = weight.codes.bfloat16()
    if weight.zero_point is None:
        return codes - float(2 ** (weight.bits - 1))
    groups = to_groups(codes, weight.group_size) - weight.zero_point.bfloat16()[..., None]
    return groups.reshape(codes.shape)


def with_scales(weight: QuantizedTensor, scales: Tensor, codes: Tensor | None = None) -> QuantizedTensor:
    """The weight under other scales, rounded to the type that they are stored in.

    Args:
        scales: [O, G] float32, what a code is multiplied by.
    """
    stored = scales if weight.global_scale is None else scales * weight.global_scale
    limit = torch.finfo(weight.scale.dtype).max
    return QuantizedTensor(
        codes=weight.codes if codes is None else codes, scale=stored.clamp(-limit, limit).to(weight.scale.dtype), zero_point=weight.zero_point,
        bits=weight.bits, group_size=weight.group_size, element=weight.element, global_scale=weight.global_scale, input_scale=weight.input_scale,
    )  # fmt: skip


def has_real_scales(weight: Weight) -> TypeGuard[QuantizedTensor]:
    """Whether the scales are fine enough to be tuned; 8-bit scales are not."""
    return isinstance(weight, QuantizedTensor) and weight.scale.dtype in _REAL_SCALES


class Student:
    """A skeleton's module that computes with latents, until the end of a `with` block.

    Args:
        skeleton: its weights are replaced.
        source: all tensors of the checkpoint as they now are, expanded.
        latents: by the names of the checkpoint's tensors.
        transposed: names of the weights that the checkpoint stores as [I, O].
    """

    def __init__(self, skeleton: Skeleton, source: Source, latents: Mapping[str, Latent], transposed: frozenset[str]) -> None:
        self.module = skeleton.module
        self._skeleton, self.latents, self._transposed = skeleton, latents, transposed
        self._members: dict[str, list[str]] = {}
        for name, place in skeleton.places.items():
            self._members.setdefault(place.key, []).append(name)
        self._keys = {skeleton.places[name].key for name in latents}
        self._fixed: dict[str, Tensor] = {}
        skeleton.load(skeleton.module, self._instead(source))
        self._owners = {key: list(_owners(self.module, skeleton.value(key))) for key in sorted(self._keys)}
        self._shapes = {key: skeleton.value(key).shape for key in self._owners}
        for key, owners in self._owners.items():
            for module, name in owners:
                module._parameters[name] = nn.Parameter(torch.empty(self._shapes[key], dtype=skeleton.dtype, device="meta"), requires_grad=False)
        self._wrapped: list[nn.Module] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The module can be called inside, with gradients or without."""
        inside: set[str] = set()
        for unit in self._skeleton.units:
            parts = {id(part) for part in unit.module.modules()}
            keys = [key for key, owners in self._owners.items() if any(id(module) in parts for module, _ in owners)]
            if keys:
                self._wrap(unit.module, keys)
                inside.update(keys)
        try:
            with self._swapped([key for key in self._owners if key not in inside]):
                yield
        finally:
            for module in self._wrapped:
                del module.__dict__["forward"]
            self._wrapped.clear()

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the weights' memory back."""
        self._skeleton.drop(self.module)

    def _wrap(self, module: nn.Module, keys: list[str]) -> None:
        original = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._swapped(keys):
                return original(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        module.forward = forward
        self._wrapped.append(module)

    def _swapped(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        values = {key: self._value(key) for key in keys}
        return with_tensors([(module, name, value) for key, value in values.items() for module, name in self._owners[key]])

    def _value(self, key: str) -> Tensor:
        names = self._members[key]
        if len(names) == 1 and self._skeleton.places[names[0]].region is None:
            return self._oriented(names[0]).reshape(self._shapes[key])
        value = torch.empty(self._shapes[key], dtype=self._skeleton.dtype)
        for name in names:
            self._skeleton.places[name].of(value).copy_(self._oriented(name) if name in self.latents else self._fixed[name])
        return value

    def _oriented(self, name: str) -> Tensor:
        value = self.latents[name].value()
        return value.T if name in self._transposed else value

    def _instead(self, source: Source) -> Source:
        """A source that has no memory for what latents make, and keeps what shares a parameter with it."""

        def read(name: str) -> Tensor:
            if self._skeleton.places[name].key not in self._keys:
                return source(name)
            if name not in self.latents:
                self._fixed[name] = source(name).to(self._skeleton.dtype)
                return self._fixed[name]
            place = self._skeleton.places[name]
            return torch.zeros((), dtype=self._skeleton.dtype).expand(place.of(self._skeleton.value(place.key)).shape)

        return read


@contextmanager
def with_tensors(tensors: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Other parameters for a moment."""
    before = [(module, name, module._parameters[name]) for module, name, _ in tensors]
    for module, name, value in tensors:
        module._parameters[name] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _owners(module: nn.Module, parameter: Tensor) -> Iterator[tuple[nn.Module, str]]:
    for part in module.modules():
        for name, found in part._parameters.items():
            if found is parameter:
                yield part, name
