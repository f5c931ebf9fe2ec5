"""What an optimizer keeps between steps, and what its update needs while it works, from the shapes of the parameters alone.

Sizes are exact: those of the storages that the implementation named beside each optimizer holds. All take the parameter's own type but
`adam8bit`. Held against torch's optimizers by tests/test_optimizer_state.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lighten.errors import WorkloadError
from lighten.model.spec import Linear, ModelSpec
from lighten.units import dtype_bytes

Shape: TypeAlias = tuple[int, ...]
Update: TypeAlias = tuple[tuple[str, int], ...]
"""Variables of the update of one parameter in the order in which they are bound: (name, bytes of the new tensor; 0: it is unbound).
The tensor that the variable held before goes after the new one is there, as in Python, so that one parameter's last tensors live on into
the update of the next."""

STEP_BYTES = 4
"""A float32 scalar for each parameter. Source: `_get_scalar_dtype` of torch/optim/optimizer.py."""
BLOCK = 256
SMALLEST_8BIT = 4096
MAPS_BYTES = 2 * 256 * 4
"""Blocks of `adam8bit`, the fewest elements that are kept in 8 bits, and its two tables of 256 float32 that all tensors share.
Source: `blocksize`, `min_8bit_size` and `fill_qmap` of bitsandbytes/optim/optimizer.py, version 0.50; Dettmers et al. 2021
(arXiv:2110.02861), whose blocks were of 2048."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What one optimizer costs beside parameters and gradients.

    Attributes:
        state: (shape, bytes of an element) → bytes kept between steps.
        values: of the parameter's type that are kept for each parameter, for what an update reads and writes; a mean of a row counts 0, two
            values of 8 bits count as one of 16.
        update: (shape, bytes of an element) → what updating one parameter after the other binds.
        at_once: copies of all parameters that an update of all at once makes ("foreach", torch's default on CUDA); None: there is none.
        shared_bytes: kept once for all tensors of at least `SMALLEST_8BIT` elements.
        outside: the optimizer of all that is not a hidden matrix; None: this one takes everything.
    """

    state: Callable[[Shape, float], int]
    values: int
    update: Callable[[Shape, float], Update] = lambda shape, element: ()
    at_once: int | None = None
    shared_bytes: int = 0
    outside: str | None = None


def _copies(count: int, *, steps: bool) -> Callable[[Shape, float], int]:
    return lambda shape, element: count * _bytes(shape, element) + steps * STEP_BYTES


def _bytes(shape: Shape, element: float) -> int:
    return round(math.prod(shape) * element)


def _adam_update(shape: Shape, element: float) -> Update:
    size = _bytes(shape, element)
    return ("root", size), ("denominator", size), ("root", 0)


def _root_update(shape: Shape, element: float) -> Update:
    return (("root", _bytes(shape, element)),)


def _lion_update(shape: Shape, element: float) -> Update:
    size = _bytes(shape, element)
    return ("momentum", size), ("gradient", size), ("update", size), ("momentum", 0), ("gradient", 0)


def _factors(shape: Shape, element: float) -> tuple[int, int]:
    """Bytes of the means over the last dimension, and over the one before it."""
    return _bytes((*shape[:-1], 1), element), _bytes((*shape[:-2], 1, shape[-1]), element)


def _adafactor_state(shape: Shape, element: float) -> int:
    return STEP_BYTES + (sum(_factors(shape, element)) if len(shape) > 1 else _bytes(shape, element))


def _adafactor_update(shape: Shape, element: float) -> Update:
    size = _bytes(shape, element)
    if len(shape) < 2:
        return ("squared", size), ("estimate", size)
    rows, columns = _factors(shape, element)
    mean = _bytes(shape[:-2], element)
    return ("rows", rows), ("columns", columns), ("mean", mean), ("estimate", size), ("mean", 0)


def _muon_update(shape: Shape, element: float) -> Update:
    """The largest of its five Newton-Schulz iterations: a product of the smaller side with itself, twice, and the old and new iterate."""
    half, product = _bytes(shape, 2), _bytes((min(shape), min(shape)), 2)
    inside = ("iterate", half), ("product", product), ("polynomial", product), ("next", half)
    ends = tuple((name, 0) for name, _ in inside)
    return ("update", _bytes(shape, element)), *inside, *ends, ("update", 0), ("update", half)


def _adam8bit_state(shape: Shape, element: float) -> int:
    count = math.prod(shape)
    return 2 * (4 * count if count < SMALLEST_8BIT else count + 4 * math.ceil(count / BLOCK))


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(state=_copies(2, steps=True), values=2, update=_adam_update, at_once=1),
    "adam": Optimizer(state=_copies(2, steps=True), values=2, update=_adam_update, at_once=1),
    "sgd": Optimizer(state=_copies(0, steps=False), values=0, at_once=0),
    "sgd-momentum": Optimizer(state=_copies(1, steps=False), values=1, at_once=0),
    "adagrad": Optimizer(state=_copies(1, steps=True), values=1, update=_root_update, at_once=2),
    "rmsprop": Optimizer(state=_copies(1, steps=True), values=1, update=_root_update, at_once=1),
    "adafactor": Optimizer(state=_adafactor_state, values=0, update=_adafactor_update),
    "lion": Optimizer(state=_copies(1, steps=False), values=1, update=_lion_update),
    "muon": Optimizer(state=_copies(1, steps=False), values=1, update=_muon_update, outside="adamw"),
    "adam8bit": Optimizer(state=_adam8bit_state, values=1, shared_bytes=MAPS_BYTES),
}
"""Name → what it costs.

Source: torch.optim 2.13 with its defaults (no amsgrad; RMSprop neither centered nor with momentum), its `_single_tensor_*` and
`_multi_tensor_*` functions; Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) keeps a mean for each row and column of the last two
dimensions and takes one parameter after the other by default; Muon takes matrices alone, the rest is AdamW's; Lion: the listing of Chen et
al. 2023 (arXiv:2302.06675), whose scratch is not measured; adam8bit: bitsandbytes, whose kernels update in place."""


def state_bytes(optimizer: str, shapes: Iterable[Shape], dtype: str, *, others: Iterable[Shape] = ()) -> int:
    """Bytes that an optimizer keeps between steps, once its first step is done.

    Args:
        shapes: of the tensors that get gradients, as the module holds them.
        dtype: their type, which is that of the state too.
        others: more of them, which an optimizer for hidden matrices leaves to another one: embeddings and heads.

    Raises:
        WorkloadError: the optimizer is not known.

    >>> state_bytes("adamw", [(4, 8)], "float32")  # two float32 of each value, and a step count
    260
    >>> state_bytes("adafactor", [(4, 8)], "float32")  # a mean of each row and of each column
    52
    """
    one, element = _known(optimizer), dtype_bytes(dtype)
    mine, rest = _split(one, shapes, others)
    kept = sum(one.state(shape, element) for shape in mine)
    shared = one.shared_bytes if any(math.prod(shape) >= SMALLEST_8BIT for shape in mine) else 0
    return kept + shared + (state_bytes(one.outside, rest, dtype) if one.outside else 0)


def scratch_bytes(
    optimizer: str, shapes: Iterable[Shape], dtype: str, *, others: Iterable[Shape] = (), foreach: bool = False
) -> int:  # fmt: skip
    """The most bytes that a step's own tensors take beside parameters, gradients and state.

    Args:
        shapes, dtype, others: as in `state_bytes`, in the order of the update.
        foreach: all parameters at once, as torch does on CUDA where the optimizer has such an update, else one after the other.

    Raises:
        WorkloadError: the optimizer is not known.

    >>> scratch_bytes("adamw", [(4, 8)], "float32")  # the root of the second moment, and the denominator
    256
    """
    one, element = _known(optimizer), dtype_bytes(dtype)
    mine, rest = _split(one, shapes, others)
    if foreach and one.at_once is not None:
        own = one.at_once * sum(_bytes(shape, element) for shape in mine)
    else:
        own = _fullest(bound for shape in mine for bound in one.update(shape, element))
    return max(own, scratch_bytes(one.outside, rest, dtype, foreach=foreach) if one.outside else 0)


def trained_shapes(spec: ModelSpec) -> tuple[list[Shape], list[Shape]]:
    """Shapes of all parameters: matrices of the hidden layers, and the rest (vectors, embeddings, the head, tensors of more dimensions)."""
    hidden: list[Shape] = []
    others: list[Shape] = []
    for part in spec.parts:
        for shape in part.tensors().values():
            inside = isinstance(part, Linear) and part.component != "head" and len(shape) == 2
            (hidden if inside else others).append(shape)
    return hidden, others


def _known(optimizer: str) -> Optimizer:
    if optimizer not in OPTIMIZERS:
        raise WorkloadError(f"optimizer {optimizer!r} is not known; known: {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[optimizer]


def _split(one: Optimizer, shapes: Iterable[Shape], others: Iterable[Shape]) -> tuple[Sequence[Shape], Sequence[Shape]]:
    """Shapes that the optimizer takes, and those that it leaves to the other."""
    if one.outside is None:
        return [*shapes, *others], []
    every = list(shapes)
    return [shape for shape in every if len(shape) == 2], [*(shape for shape in every if len(shape) != 2), *others]


def _fullest(bindings: Iterator[tuple[str, int]]) -> int:
    held: dict[str, int] = {}
    now = peak = 0
    for name, size in bindings:
        now += size
        peak = max(peak, now)
        now -= held.get(name, 0)
        held[name] = size
    return peak
