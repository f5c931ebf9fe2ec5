"""Which parts read what: a model's streams and blocks, a block's sublayers, and the products inside them, told from order, widths and rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from lighten.model.spec import Attention, Conv, Elementwise, Linear, ModelSpec, Norm, Part, Rows, Scan, block_name

ACTIVATIONS = frozenset({"gelu", "silu", "relu", "tanh", "relu2", "sigmoid"})
"""Kinds of `Elementwise` that stand between the products of an MLP."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Parts that run over the same positions: a decoder, its encoder, the tower of an image.

    Attributes:
        rows: "token", "source" or a number of positions.
        before, after: parts outside the numbered blocks: embeddings; last norm, pooler, head.
        blocks: the parts of each block.
    """

    rows: Rows
    before: tuple[Part, ...]
    blocks: tuple[tuple[Part, ...], ...]
    after: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.before, *(part for block in self.blocks for part in block), *self.after)


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """A branch of a block and its residual addition.

    Attributes:
        norms: of its input, before everything else; empty where it stands after the addition.
        core: attention, activation or recurrence: what stands between the products; None where there is none.
        before, after: what stands before and after the core in the branch.
        norm: after the residual addition.
        adds: it ends in a residual addition.
    """

    norms: tuple[Norm, ...]
    before: tuple[Part, ...]
    core: Part | None
    after: tuple[Part, ...]
    norm: Norm | None
    adds: bool


def streams(spec: ModelSpec) -> list[Stream]:
    """The streams in the order in which their blocks stand."""
    keys = _keys(spec.parts)
    runs = [(key, tuple(part for _, part in run)) for key, run in groupby(zip(keys, spec.parts, strict=True), key=lambda pair: pair[0])]
    found: list[tuple[Rows, list[Part]]] = []
    for key, run in runs:  # a head over other positions than the blocks before it belongs to them
        if found and (found[-1][0] == key or not any(map(block_name, run))) and any(map(block_name, found[-1][1])):
            found[-1][1].extend(run)
        elif found and not any(map(block_name, found[-1][1])):
            found[-1] = key, [*found[-1][1], *run]
        else:
            found.append((key, list(run)))
    return [_stream(rows, parts) for rows, parts in found]


def _keys(parts: Sequence[Part]) -> list[Rows]:
    """The stream of each part: its rows; where these do not say it, that of the neighbour whose name begins most alike."""
    keys: list[Rows | None] = [_key(part) for part in parts]
    known = [i for i, key in enumerate(keys) if key is not None]
    for i, key in enumerate(keys):
        if key is None:
            near = [j for j in (max((k for k in known if k < i), default=None), min((k for k in known if k > i), default=None)) if j is not None]
            keys[i] = keys[max(near, key=lambda j: _alike(parts[i].name, parts[j].name))] if near else "token"
    return [key if key is not None else "token" for key in keys]


def _key(part: Part) -> Rows | None:
    block = block_name(part) is not None
    if isinstance(part, Attention):
        return part.rows
    if part.rows in ("sequence", "position") or not (isinstance(part, Linear | Norm | Conv | Scan) or part.rows == "source"):
        return None
    if block and isinstance(part, Linear) and part.rows != "token":
        return None  # a cross-attention's keys and values have the source's rows and stand in the decoder's block
    return "token" if part.rows == "logits" else part.rows


def _alike(name: str, other: str) -> int:
    """Path components that two names begin with alike."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return next((i for i, (one, two) in enumerate(pairs) if one != two), 99)


def _stream(rows: Rows, parts: Sequence[Part]) -> Stream:
    groups = [(block, tuple(each)) for block, each in groupby(parts, key=block_name)]
    numbered = [i for i, (block, _) in enumerate(groups) if block and any(isinstance(part, Attention | Scan) for part in groups[i][1])]
    if not numbered:
        return Stream(rows=rows, before=tuple(parts), blocks=(), after=())
    first, last = numbered[0], numbered[-1]
    return Stream(
        rows=rows,
        before=tuple(part for _, each in groups[:first] for part in each),
        blocks=tuple(each for _, each in groups[first : last + 1]),
        after=tuple(part for _, each in groups[last + 1 :] for part in each),
    )


def is_post_norm(block: Sequence[Part]) -> bool:
    """Whether a block's norms follow its residual additions: it begins with none and ends in one."""
    return not isinstance(block[0], Norm) and isinstance(block[-1], Norm)


def sublayers(block: Sequence[Part]) -> list[Sublayer]:
    """The branches of a block, each up to its residual addition, with the norm after it in a post-norm block."""
    post, found, start = is_post_norm(block), [], 0
    adds = [i for i, part in enumerate(block) if isinstance(part, Elementwise) and part.kind == "add"]
    for add in adds:
        if add < start:
            continue
        norm = block[add + 1] if post and add + 1 < len(block) else None
        if len(block[start:add]) > 0:
            found.append(_sublayer(block[start:add], norm if isinstance(norm, Norm) else None, adds=True))
        start = add + 1 + isinstance(norm, Norm)
    if start < len(block):
        found.append(_sublayer(block[start:], None, adds=False))
    return found


def _sublayer(parts: Sequence[Part], norm: Norm | None, *, adds: bool) -> Sublayer:
    lead = next((i for i, part in enumerate(parts) if not isinstance(part, Norm)), len(parts))
    at = next((i for i, part in enumerate(parts) if is_core(part)), None)
    return Sublayer(
        norms=tuple(part for part in parts[:lead] if isinstance(part, Norm)),
        before=tuple(parts[lead : len(parts) if at is None else at]),
        core=None if at is None else parts[at],
        after=() if at is None else tuple(parts[at + 1 :]),
        norm=norm,
        adds=adds,
    )  # fmt: skip


def is_core(part: Part) -> bool:
    """Whether a part is what a branch is about: attention, an MLP's activation or a recurrence."""
    return isinstance(part, Attention | Scan) or (isinstance(part, Elementwise) and part.kind in ACTIVATIONS)


def chains(parts: Iterable[Part], width: int | None = None) -> list[list[Part]]:
    """Linears that read a branch's input, each with the linears and norms that read its output: low-rank factors, norms of queries and keys."""
    found: list[list[Part]] = []
    for part in parts:
        if isinstance(part, Linear):
            width = width or part.in_features
            if found and part.in_features != width:
                found[_feeding(found, part)].append(part)
            else:
                found.append([part])
        elif isinstance(part, Norm) and found:
            found[_normed(found, part)].append(part)
    return found


def _feeding(found: Sequence[Sequence[Part]], part: Linear) -> int:
    """The chain whose last product has as many outputs as a linear has inputs; else the last."""
    fitting = [i for i, chain in enumerate(found) if _outputs(chain) == part.in_features]
    return fitting[-1] if fitting else len(found) - 1


def _normed(found: Sequence[Sequence[Part]], part: Norm) -> int:
    """The chain that a norm belongs to: queries', keys' by its name; else the last."""
    letter = part.name.rpartition(".")[2][0]
    named = {"q": 0, "k": 1}.get(letter, len(found) - 1)
    return min(named, len(found) - 1)


def _outputs(chain: Sequence[Part]) -> int:
    return next(part.out_features for part in reversed(chain) if isinstance(part, Linear))


def reads_source(part: Attention) -> bool:
    """Whether its keys and values come from another stream."""
    return part.is_cross and part.keys != part.rows


def linears(parts: Iterable[Part]) -> list[Linear]:
    return [part for part in parts if isinstance(part, Linear)]


def has_rotary(parts: Iterable[Part]) -> bool:
    return any(isinstance(part, Elementwise) and part.kind == "rotary" for part in parts)
