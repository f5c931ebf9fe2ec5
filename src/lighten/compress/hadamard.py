"""Rotations folded into the weights: outliers of a weight's columns and of activations are spread over all directions before rounding.

A basis that the model's function does not depend on is turned by an orthogonal matrix R: what writes to it becomes R's image, what reads
it undoes R, norms between them give their weights to their readers. Nothing is left to do at run time.

R is a Hadamard matrix over √n times random signs, where n is the product of orders for which one can be made (Sylvester, Paley), such as
576 = 12 · 12 · 4; an odd part is a random orthogonal matrix. A basis that a LayerNorm reads is turned by Uᵀ diag(signs) U instead, U with
a constant first row and its sign +1, which leaves the vector of ones, and so the mean, where it is.

Source: Ashkboos et al. 2024 (arXiv:2404.00456), sections 3 and 4, stages 1a and 1b; random signs: Tseng et al. 2024 (arXiv:2402.04396).
Deviations: (1) which parameters lie in a basis is found in the traced graph, not listed for one architecture; (2) LayerNorm models need no
mean subtraction folded in; (3) turns at run time (queries, keys, the input of down_proj) are not made.

Shape legend: n size of a basis, O rows, I columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lighten.compress.graph import Graph
from lighten.compress.skeleton import Place
from lighten.compress.turns import FoldedNorm, Turn, TurnedEnd, find_turns
from lighten.errors import RecipeError

CHUNK = 2**20
"""Elements of a tensor that are turned at once, in float64 (8 MB)."""
SMALLEST_WEIGHT = 1e-6
"""A norm's bias moves behind its weight by a division; below this share of the largest weight the quotient means nothing."""


# ---- matrices ----


@dataclass(frozen=True, kw_only=True)
class Orthogonal:
    """An orthogonal matrix as a product that is never written out.

    Attributes:
        factors: U is their Kronecker product, each orthogonal, float64, the first row of each constant.
        signs: [n] ±1.
        keeps_ones: the matrix is Uᵀ diag(signs) U, else Uᵀ diag(signs).
    """

    factors: tuple[Tensor, ...]
    signs: Tensor
    keeps_ones: bool

    def turn(self, rows: Tensor) -> Tensor:
        """[..., n] float64 each row times the matrix."""
        turned = _times(rows, self.factors, transposed=True) * self.signs
        return _times(turned, self.factors, transposed=False) if self.keeps_ones else turned


def random_hadamard(size: int, *, seed: int, keeps_ones: bool = False) -> Orthogonal:
    """A random orthogonal matrix of this size, Hadamard as far as such matrices can be made."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    if keeps_ones:
        signs[0] = 1
    factors = tuple(_factor(order, generator) for order in _orders(size))
    return Orthogonal(factors=factors, signs=signs, keeps_ones=keeps_ones)


def hadamard_matrix(order: int) -> Tensor | None:
    """[order, order] ±1 with orthogonal rows and a first row of ones, of orders 1 and 2 or by one of Paley's constructions; None: neither.

    Source: Paley 1933, lemmas 3 and 4, over the whole numbers modulo a prime.
    """
    if not _is_order(order):
        return None
    if order <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if _is_prime(order - 1):
        return _first_row_of_ones(_paley(order - 1, skew=True) + torch.eye(order, dtype=torch.float64))
    core = _paley(order // 2 - 1, skew=False)
    off, on = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
    return _first_row_of_ones(torch.kron(core, off) + torch.kron(torch.eye(order // 2, dtype=torch.float64), on))


def _is_order(order: int) -> bool:
    """Whether `hadamard_matrix` makes one: a prime of 3 modulo 4 is one less, or a prime of 1 modulo 4 is one less than the half."""
    return order in (1, 2) or (order % 4 == 0 and (_is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1))))


def _paley(prime: int, *, skew: bool) -> Tensor:
    """The conference matrix of order prime + 1: 0 on the diagonal, ±1 elsewhere."""
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0.0, *(1.0 if value in squares else -1.0 for value in range(1, prime))], dtype=torch.float64)
    at = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(at[:, None] - at) % prime]
    matrix[0, 0] = 0
    if skew:
        matrix[1:, 0] = -1
    return matrix


def _first_row_of_ones(matrix: Tensor) -> Tensor:
    return matrix * matrix[0]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _orders(size: int) -> list[int]:
    """Orders whose product is `size`: as much of it as can be in Hadamard matrices, the largest powers of 2 last, what is left first."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    for parts in _splits(odd):
        for powers in _powers(len(parts), twos):
            orders = [part << power for part, power in zip(parts, powers, strict=True)]
            if all(_is_order(order) for order in orders):
                return orders + [2] * (twos - sum(powers))
    return [odd] + [2] * twos if odd > 1 else [2] * twos


def _splits(odd: int, least: int = 3) -> Iterator[list[int]]:
    """An odd number as products of factors in rising order, itself first; nothing of 1."""
    if odd > 1:
        yield [odd]
    for factor in range(least, math.isqrt(odd) + 1, 2):
        if odd % factor == 0:
            yield from ([factor, *rest] for rest in _splits(odd // factor, factor))


def _powers(parts: int, twos: int) -> Iterator[list[int]]:
    """How many of the 2s go to each part: Hadamard matrices other than of order 2 have orders of at least 4."""
    if not parts:
        yield []
        return
    for power in range(2, min(twos, 6) + 1):
        yield from ([power, *rest] for rest in _powers(parts - 1, twos - power))


def _factor(order: int, generator: torch.Generator) -> Tensor:
    """[order, order] orthogonal with a constant first row: a Hadamard matrix over its root, or else a random one."""
    found = hadamard_matrix(order)
    if found is not None:
        return found / math.sqrt(order)
    drawn = torch.randn(order, order, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1
    basis: Tensor = torch.linalg.qr(drawn).Q.T
    return basis * basis[0, 0].sign()


def _times(rows: Tensor, factors: Sequence[Tensor], *, transposed: bool) -> Tensor:
    """[..., n] rows times the Kronecker product of the factors, or times its transpose."""
    shape = [len(factor) for factor in factors]
    made = rows.reshape(-1, *shape)
    for axis, factor in enumerate(factors, start=1):
        made = torch.tensordot(made, factor if not transposed else factor.T, dims=([axis], [0])).movedim(-1, axis)
    return made.reshape(rows.shape)


# ---- a model's rotation ----


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What is done to one tensor: norm weights go into its columns, or it is a norm's; then its parts are turned."""

    ends: tuple[tuple[TurnedEnd, FoldedNorm | None, Orthogonal], ...] = ()
    weight_of: FoldedNorm | None = None
    bias_of: tuple[FoldedNorm, Orthogonal] | None = None


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A rotation of a whole model, one tensor at a time.

    Attributes:
        changes: name of a tensor of the rotated model → what is done to it.
        untied: heads that get a tensor of their own → the table that they shared; the config's `tie_word_embeddings` becomes false.
        matrices: the orthogonal matrix of each basis that is turned.
    """

    changes: Mapping[str, _Change]
    untied: Mapping[str, str]
    matrices: tuple[Orthogonal, ...]

    def names(self, names: Iterable[str]) -> list[str]:
        """The tensors of the rotated checkpoint."""
        kept = list(names)
        return kept + [name for name in self.untied if name not in kept]

    def tensor(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the rotated checkpoint: float32 where it changes, else as it is.

        Args:
            get: a tensor of the original checkpoint by its name; norms are read beside the tensor itself.

        Raises:
            RecipeError: a LayerNorm with a bias whose weight is 0 somewhere.
        """
        change = self.changes.get(name)
        original = get(self.untied.get(name, name))
        if change is None:
            return original
        if change.weight_of is not None:
            return _without(original, change.weight_of)
        if change.bias_of is not None:
            norm, matrix = change.bias_of
            return _moved_bias(original, norm, matrix, get)
        value = original.float()
        for end, folded, matrix in change.ends:
            value = _turned(value, end, None if folded is None else _factor_of(get(folded.name), folded), matrix)
        return value

    def check(self, get: Callable[[str], Tensor]) -> None:
        """Read the norms.

        Raises:
            RecipeError: what `tensor` would raise of one of them.
        """
        for name, change in self.changes.items():
            if change.bias_of is not None:
                self.tensor(name, get)


def plan_rotation(graph: Graph, places: Mapping[str, Place] | None = None, *, residual: bool = True, heads: bool = True, seed: int = 0) -> Rotation:
    """Which tensors of a model are rotated, and how.

    Args:
        places: where the checkpoint's tensors lie in the module; the rotation then has the checkpoint's names, else the module's.
        residual: turn the bases that norms read: the stream that all layers add to.
        heads: turn the others: the values of each head.
        seed: of the random signs.

    Raises:
        RecipeError: nothing of what is asked can be turned.
    """
    turns = [turn for turn in find_turns(graph) if (residual if turn.is_residual else heads)]
    if residual and not any(_is_stream(turn, graph) for turn in turns):
        raise RecipeError(
            "rotate(hadamard): the stream between the layers of this model cannot be turned: a norm's output is added to it, or something "
            "else than embeddings, linears and norms reads or writes it. Models of Llama's, Qwen's, Phi's and GPT-2's build can be rotated."
        )
    if not turns:
        raise RecipeError("rotate(hadamard): no basis of this model can be turned.")
    matrices = [random_hadamard(turn.size, seed=seed * 1_000_003 + number, keeps_ones=turn.keeps_ones) for number, turn in enumerate(turns)]
    named = _Names(graph, places)
    changes: dict[str, _Change] = {}
    for turn, matrix in zip(turns, matrices, strict=True):
        _add_changes(changes, turn, matrix, named)
    untied = {head: named.one(table) for turn in turns for head, table in turn.untied.items()}
    return Rotation(changes=changes, untied=untied, matrices=tuple(matrices))


def _is_stream(turn: Turn, graph: Graph) -> bool:
    """Whether a table of embeddings writes to it."""
    aliases = {first: {name for name, other in graph.tied.items() if other == first} for first in graph.tied.values()}
    return any(end.name in graph.tables or aliases.get(end.name, set()) & graph.tables for end in turn.ends)


def _add_changes(changes: dict[str, _Change], turn: Turn, matrix: Orthogonal, named: _Names) -> None:
    norms = {norm.name: replace(norm, name=named.one(norm.name)) for norm in turn.norms}
    for end in turn.ends:
        folded = norms[end.norm] if end.norm is not None else None
        for part in [end] if end.name in turn.untied else named.parts(end):
            before = changes.get(part.name, _Change())
            columns_first = sorted([*before.ends, (part, folded, matrix)], key=lambda each: each[1] is None)
            changes[part.name] = replace(before, ends=tuple(columns_first))
    for key, norm in norms.items():
        changes[norm.name] = _Change(weight_of=norm)
        bias = next(each.bias for each in turn.norms if each.name == key)
        if bias is not None:
            changes[named.one(bias)] = _Change(bias_of=(norm, matrix))


class _Names:
    """The checkpoint's names of a module's parameters."""

    def __init__(self, graph: Graph, places: Mapping[str, Place] | None) -> None:
        self._named: dict[str, list[tuple[str, Place]]] | None = None
        if places is not None:
            self._named = {}
            for name, place in places.items():
                self._named.setdefault(graph.tied.get(place.key, place.key), []).append((name, place))

    def one(self, key: str) -> str:
        """The name of a parameter that is one tensor of the checkpoint."""
        if self._named is None:
            return key
        (name, place), *more = self._named.get(key) or self._missing(key)
        if more or place.region is not None:
            raise RecipeError(f"rotate(hadamard): {key} is made of several tensors of the checkpoint, {name} among them; it cannot be turned.")
        return name

    def parts(self, end: TurnedEnd) -> Iterator[TurnedEnd]:
        """What an end is of each tensor of the checkpoint."""
        if self._named is None:
            yield end
            return
        for name, place in self._named.get(end.name) or self._missing(end.name):
            expert, positions = end.expert, end.positions
            if place.region is not None:
                if end.expert is not None:
                    first, last = place.region[0].start, place.region[0].stop
                    if not first <= end.expert < last:
                        continue
                    expert = None if last - first == 1 else end.expert - first
                positions = _within(end, place.region[end.axis])
            if len(positions):
                yield replace(end, name=name, expert=expert, positions=positions)

    @staticmethod
    def _missing(key: str) -> list[tuple[str, Place]]:
        raise RecipeError(f"rotate(hadamard): the checkpoint has no tensor for {key}, which would have to be turned.")


def _within(end: TurnedEnd, along: slice) -> Tensor:
    """The copies of a basis that lie in a part of the axis, counted from its start.

    Raises:
        RecipeError: the part cuts one in two.
    """
    inside = (end.positions >= along.start) & (end.positions < along.stop)
    if bool((inside.any(1) != inside.all(1)).any()):
        raise RecipeError(f"rotate(hadamard): the checkpoint cuts a basis of {end.name} into several tensors; it cannot be turned.")
    first: int = along.start
    return end.positions[inside.all(1)] - first


def _turned(value: Tensor, end: TurnedEnd, factors: Tensor | None, matrix: Orthogonal) -> Tensor:
    """A tensor whose rows or columns at the end's positions are multiplied by the factors and turned."""
    value = value.clone()
    part = value if end.expert is None else value[end.expert]
    lines = part.movedim(end.axis, -1) if part.ndim > 1 else part[None]
    for start in range(0, len(lines), max(1, CHUNK // lines.shape[-1])):
        some = lines[start : start + max(1, CHUNK // lines.shape[-1])]
        for copy in end.positions:
            taken = some[:, copy].double()
            some[:, copy] = matrix.turn(taken if factors is None else taken * factors).float()
    return value


def _factor_of(weight: Tensor, norm: FoldedNorm) -> Tensor:
    """[n] float64 what a norm multiplies by."""
    return weight.double()[norm.positions] + norm.offset


def _without(weight: Tensor, norm: FoldedNorm) -> Tensor:
    """The norm's weight once it multiplies by 1."""
    made = weight.float().clone()
    made[norm.positions] = 1 - norm.offset
    return made


def _moved_bias(bias: Tensor, norm: FoldedNorm, matrix: Orthogonal, get: Callable[[str], Tensor]) -> Tensor:
    """The bias that a LayerNorm adds once its weight is in its readers: what a reader makes of it stays the same."""
    factors = _factor_of(get(norm.name), norm)
    added = bias.double()[norm.positions]
    empty = factors.abs() < SMALLEST_WEIGHT * factors.abs().max()
    if bool((empty & (added != 0)).any()):
        raise RecipeError(f"rotate(hadamard): {norm.name} is 0 at {int(empty.sum())} places where its bias is not; its weight cannot be folded away.")
    made = bias.float().clone()
    made[norm.positions] = matrix.turn(torch.where(empty, 0.0, added / torch.where(empty, 1.0, factors))[None])[0].float()
    return made


def dense(matrix: Orthogonal) -> Tensor:
    """[n, n] float64 a matrix written out."""
    return matrix.turn(torch.eye(len(matrix.signs), dtype=torch.float64))
