"""What one rank holds and computes of a model under a plan: its share of heads, widths, vocabulary and experts, and its stage's layers.

Tensor parallelism is Megatron-LM's (Shoeybi et al. 2019, arXiv:1909.08053): in each branch of a block the linears that read the hidden
state are split by outputs (columns), the one that writes it by inputs (rows), so that one collective stands before and one behind a branch.
Roles are told from a part's place in its block, its component and its widths, never from names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

from lighten.cost.operators import Forward, Op, forward_operators
from lighten.cost.passes import training_forward
from lighten.cost.replay.layout import ACTIVATIONS, chains, streams
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, ModelSpec, Norm, Part, Product, Scan, Table, block_name
from lighten.parallel.plan import Plan

Role: TypeAlias = Literal["column", "row", "inside", "whole", "vocabulary"]
"""Split by outputs; split by inputs; of activations between these; the same on every tensor-parallel rank; split by the vocabulary's rows."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A part of the model, and what tensor parallelism makes of it.

    Attributes:
        attention: whose heads a part of role column, row or inside belongs to; None: an MLP's.
        gathers: the first of the parts of its branch that need the whole hidden state of all positions: a collective stands before it.
        reduces: its output is a sum over the tensor-parallel ranks: a collective stands behind it.
        block: the numbered block, None outside.
        routed: of experts, of which ep divides the number.
        seen: all positions of the rank pass through it, also where sequence parallelism splits the parts around it over positions.
    """

    part: Part
    role: Role
    attention: Attention | None = None
    gathers: bool = False
    reduces: bool = False
    block: str | None = None
    seen: bool = False
    routed: bool = False


def place(spec: ModelSpec) -> tuple[Placed, ...]:
    """Every part with its role, in order; kept with the spec."""
    kept: tuple[Placed, ...] | None = spec.__dict__.get("_placed")
    if kept is None:
        kept = tuple(replace(each, routed=isinstance(each.part, Linear) and each.part.experts > 1) for each in _place(spec))
        spec.__dict__["_placed"] = kept
    return kept


def rank_spec(spec: ModelSpec, plan: Plan, stage: int = 0) -> ModelSpec:
    """The model that one rank of a pipeline stage computes: existing operators and memory rules apply to it.

    With tp: attention heads, the widths of MLPs (of experts too) and the vocabulary are divided; key/value heads too, or, where there are
    fewer than ranks, each rank keeps the one that its query heads read. Norms, biases behind a row-split linear, routers, small tables and
    heads of classes stay whole. A vocabulary that tp does not divide is rounded up, as the first ranks hold it. With ep: experts are
    divided; each rank then computes as many routed rows as it has itself, the balanced case. With pp: the blocks of its stage
    (`stage_blocks`); what stands before the blocks is the first stage's, what stands behind them the last one's, whose tied head then has
    a weight of its own. dp, cp and `shard` change nothing here.

    Raises:
        WorkloadError: a size that tp or ep does not divide, more stages than blocks, or a kind of part that is not described.
    """
    if plan.ep > 1 and not any(each.routed for each in place(spec)):
        raise WorkloadError(f"ep={plan.ep}: {spec.name} has no experts; use ep=1.")
    key = (plan.tp, plan.ep, plan.pp, plan.virtual_stages, stage)
    kept: dict[tuple[int, ...], ModelSpec] = spec.__dict__.setdefault("_rank_specs", {})
    if key not in kept:
        kept[key] = replace(spec, parts=tuple(_share(spec, each, plan, stage) for each in _on_stage(spec, plan, stage)), tensors=None)
    return kept[key]


def rank_parts(spec: ModelSpec, plan: Plan, stage: int = 0) -> tuple[Placed, ...]:
    """The placed parts of a stage, with their shapes on one rank."""
    key = (plan.tp, plan.ep, plan.pp, plan.virtual_stages, stage)
    kept: dict[tuple[int, ...], tuple[Placed, ...]] = spec.__dict__.setdefault("_rank_parts", {})
    if key not in kept:
        held = rank_spec(spec, plan, stage)
        kept[key] = tuple(replace(each, part=part) for each, part in zip(_on_stage(spec, plan, stage), held.parts, strict=True))
    return kept[key]


def rank_forward(spec: ModelSpec, workload: Workload, plan: Plan) -> Forward:
    """The forward pass of one micro-batch on one rank: its sequences, and its share of their positions against all keys.

    Raises:
        WorkloadError: a batch or a length that the plan does not divide.
    """
    micro = rank_workload(spec, workload, plan)
    forward = training_forward(spec, micro)
    return forward if plan.cp == 1 else replace(forward, query_len=forward.query_len // plan.cp)


def rank_workload(spec: ModelSpec, workload: Workload, plan: Plan) -> Workload:
    """The workload of one micro-batch, still of whole sequences.

    Raises:
        WorkloadError: a batch or a length that the plan does not divide.
    """
    _check_lengths(spec, workload, plan)
    return replace(workload, batch_size=plan.micro_batch(workload.batch_size))


def rank_operators(spec: ModelSpec, workload: Workload, plan: Plan, stage: int = 0) -> list[Op]:
    """The operators of one micro-batch's forward pass on one rank of a stage, in the order of `rank_parts`.

    With sequence parallelism parts outside the split branches compute their share of the positions. With context parallelism every part
    does, and attention its share of all pairs, masked ones spread evenly over the ranks (both ends of a sequence in turn, as Llama 3
    (arXiv:2407.21783, section 3.3.2) has it).

    Raises:
        WorkloadError: the plan does not fit the model or the workload.
    """
    micro = rank_workload(spec, workload, plan)
    held = rank_spec(spec, plan, stage)
    ops = forward_operators(held, training_forward(held, micro), workload.dtype)
    placed = rank_parts(spec, plan, stage)
    sp = plan.tp if plan.sequence_parallel else 1
    return [_share_of(op, plan.cp * (1 if each.seen else sp)) for op, each in zip(ops, placed, strict=True)]


def stage_blocks(blocks: int, plan: Plan, name: str = "the model") -> list[list[range]]:
    """Stage → the blocks of each of its virtual stages, by number.

    As even as can be; blocks left over go to the pieces in the middle, then to the first ones: the first piece has the embedding and the
    last one the head. So Llama 3 405B has 126 blocks on 16 stages: 7 on the first and last, 8 elsewhere (arXiv:2407.21783, section 3.3.2).

    Raises:
        WorkloadError: more pieces than blocks.

    >>> [len(pieces[0]) for pieces in stage_blocks(126, Plan(pp=16))][:2]
    [7, 8]
    """
    pieces = plan.pp * plan.virtual_stages
    if pieces > blocks:
        raise WorkloadError(
            f"pp={plan.pp} with virtual_stages={plan.virtual_stages} needs {pieces} blocks, {name} has {blocks}; use at most {blocks} pieces."
        )
    sizes = [blocks // pieces] * pieces
    order = [*range(1, pieces - 1), 0, pieces - 1]
    for extra in order[: blocks % pieces]:
        sizes[extra] += 1
    starts = [sum(sizes[:piece]) for piece in range(pieces)]
    each = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [each[stage :: plan.pp] for stage in range(plan.pp)]


def stage_names(spec: ModelSpec, plan: Plan, stage: int) -> frozenset[str]:
    """Names of the blocks on one of several stages, with "<" for what stands before all blocks and ">" for what stands behind them.

    Raises:
        WorkloadError: no such stage, more stages than blocks, or a model of more than one stream.
    """
    if not 0 <= stage < plan.pp:
        raise WorkloadError(f"stage={stage} is none of the {plan.pp} stages, which count from 0.")
    if plan.pp > 1 and len(streams(spec)) > 1:
        raise WorkloadError(f"pp={plan.pp}: {spec.name} has {len(streams(spec))} streams of blocks (an encoder and a decoder); use pp=1.")
    if plan.pp == 1:
        return frozenset()
    names = block_names(spec)
    mine = stage_blocks(len(names), plan, spec.name)[stage]
    ends = ({"<"} if stage == 0 else set()) | ({">"} if stage == plan.pp - 1 else set())
    return frozenset({names[i] for piece in mine for i in piece} | ends)


def block_names(spec: ModelSpec) -> list[str]:
    """The numbered blocks that mix positions, in order."""
    return list(dict.fromkeys(each.block for each in place(spec) if each.block not in (None, "<", ">")))


def block_kinds(spec: ModelSpec, *, windows: bool) -> dict[str, int]:
    """Block → number of its kind: blocks of one kind differ in their names alone, and in the windows of attention unless `windows`."""
    kept: dict[bool, dict[str, int]] = spec.__dict__.setdefault("_block_kinds", {})
    if windows not in kept:
        numbers: dict[tuple[str, ...], int] = {}
        blocks: dict[str, list[str]] = {}
        for each in place(spec):
            if each.block not in (None, "<", ">"):
                part = replace(each.part, window=None) if isinstance(each.part, Attention) and not windows else each.part
                blocks.setdefault(str(each.block), []).append(repr(part).replace(f"{each.block}.", ""))
        kept[windows] = {name: numbers.setdefault(tuple(parts), len(numbers)) for name, parts in blocks.items()}
    return kept[windows]


def check_plan(spec: ModelSpec, workload: Workload, plan: Plan) -> None:
    """Raises:
    WorkloadError: the plan does not fit the model or the workload; one line says which size does not divide and what would.
    """
    _check_lengths(spec, workload, plan)
    for stage in {0, plan.pp - 1}:
        rank_spec(spec, plan, stage)


def _check_lengths(spec: ModelSpec, workload: Workload, plan: Plan) -> None:
    plan.micro_batch(workload.batch_size)
    if plan.cp > 1 and (spec.is_encoder_decoder or spec.fixed_len is not None):
        raise WorkloadError(f"cp={plan.cp}: {spec.name} has no one sequence of tokens to divide; use cp=1.")
    if plan.cp > 1 and any(isinstance(part, Scan) for part in spec.parts):
        raise WorkloadError(f"cp={plan.cp}: {spec.name} has recurrences, whose state goes from position to position; use cp=1.")
    if workload.seq_len % plan.cp:
        raise WorkloadError(f"seq_len={workload.seq_len} does not divide over cp={plan.cp} ranks; use a multiple of {plan.cp}.")
    share = workload.seq_len // plan.cp
    if plan.sequence_parallel and share % plan.tp:
        raise WorkloadError(f"sequence_parallel: {share} positions of a rank do not divide over tp={plan.tp}; use a multiple of {plan.tp}.")


# ---- roles ----


def _place(spec: ModelSpec) -> Iterator[Placed]:
    table = _vocabulary(spec)
    for stream in streams(spec):
        yield from (_outside(part, "<", table) for part in stream.before)
        for block in stream.blocks:
            yield from _block(block)
        yield from (_outside(part, ">", table) for part in stream.after)


def _vocabulary(spec: ModelSpec) -> int:
    """Rows of the largest table of tokens; 0 where there is none."""
    return max((part.num_embeddings for part in spec.parts if isinstance(part, Embedding) and part.rows in ("token", "source")), default=0)


def _outside(part: Part, block: str, table: int) -> Placed:
    if isinstance(part, Embedding) and part.num_embeddings == table and part.rows in ("token", "source"):
        return Placed(part=part, role="vocabulary", reduces=True, block=block)
    if isinstance(part, Linear) and part.component == "head" and table and part.out_features == table:
        return Placed(part=part, role="vocabulary", gathers=True, block=block, seen=True)
    if isinstance(part, Elementwise) and part.component == "head" and table and part.size == table:
        return Placed(part=part, role="vocabulary", block=block, seen=True)
    return Placed(part=part, role="whole", block=block)


def _block(block: Sequence[Part]) -> Iterator[Placed]:
    """The parts of a block; indices, since two parts can have one name."""
    name = next((found for found in map(block_name, block) if found), None)
    roles: dict[int, Placed] = {}
    for first, last, core in _attentions(block):
        roles |= _attention_roles(block, first, last, core)
    roles |= _mlp_roles(block, roles)
    for i, part in enumerate(block):
        yield replace(roles.get(i, Placed(part=part, role="whole")), block=name)


def _attentions(block: Sequence[Part]) -> list[tuple[int, int, int]]:
    """Each attention: the first and last of the parts of its branch, and itself."""
    found, start = [], 0
    for core, part in enumerate(block):
        if isinstance(part, Attention):
            out = next(
                (i for i in range(core + 1, len(block)) if isinstance(block[i], Linear) and block[i].component == part.component),
                core,
            )  # fmt: skip
            first = next((i for i in range(start, core) if isinstance(block[i], Linear) and block[i].component == part.component), core)
            found.append((first, out, core))
            start = out + 1
    return found


def _attention_roles(block: Sequence[Part], first: int, last: int, core: int) -> dict[int, Placed]:
    attention = block[core]
    assert isinstance(attention, Attention)
    found: dict[int, Placed] = {}
    before = block[first:core]
    columns = {id(linears[-1]) for chain in chains(before) if (linears := [part for part in chain if isinstance(part, Linear)])}
    wide = {attention.head_dim * attention.num_attention_heads, attention.value_dim * attention.num_attention_heads}
    wide.add(attention.head_dim * attention.num_key_value_heads)
    for i in range(first, last + 1):
        part = block[i]
        role: Role = "whole"
        if isinstance(part, Linear):
            role = "column" if id(part) in columns and i < core else "row" if i == last and i > core else "whole"
        elif isinstance(part, Norm):
            per_head = part.groups in (attention.num_attention_heads, attention.num_key_value_heads) and part.groups > 1
            role = "inside" if per_head or (part.size in wide and part.size != attention.head_dim) else "whole"
        elif isinstance(part, Attention | Elementwise | Product | Table | Scan):
            role = "inside"
        found[i] = Placed(part=part, role=role, attention=attention, gathers=i == first, reduces=role == "row", seen=True)
    return found


def _mlp_roles(block: Sequence[Part], taken: Iterable[int]) -> dict[int, Placed]:
    """An MLP's columns wait for the row-split linear that writes the hidden state again, behind an activation."""
    taken = set(taken)
    hidden = next((part.in_features for part in block if isinstance(part, Linear)), 0)
    experts = {part.experts for part in block if isinstance(part, Linear)} - {1}
    found: dict[int, Placed] = {}
    waiting: list[int] = []
    activated = False
    start: int | None = None
    for i, part in enumerate(block):
        if i in taken:
            waiting, activated = [], False
            continue
        if isinstance(part, Elementwise) and part.kind in ACTIVATIONS and waiting:
            activated = True
        if not isinstance(part, Linear) or part.out_features in (*experts, 1):
            continue
        closes = activated and part.out_features == hidden and _fits(block[waiting[-1]], part)
        if closes:
            found |= _mlp(block, waiting, i)
            waiting, activated = [], False
        elif part.in_features == hidden:
            waiting.append(i)
    if found:
        start = min(i for i in range(len(block)) if i in found or _reads_with(block, i, found, experts))
        found.setdefault(start, Placed(part=block[start], role="whole", seen=True))
        found[start] = replace(found[start], gathers=True)
        for i in range(start, max(found)):
            if i not in taken and i not in found:
                found[i] = Placed(part=block[i], role="whole", seen=not _is_residual(block[i], hidden))
        last = max(i for i, each in found.items() if each.role == "row")
        found[last] = replace(found[last], reduces=True)
        for i in range(last + 1, len(block)):  # each row's share of its experts' sums
            if not (isinstance(part := block[i], Elementwise) and part.kind == "multiply"):
                break
            found[i] = Placed(part=part, role="whole", seen=True)
    return found


def _is_residual(part: Part, hidden: int) -> bool:
    return isinstance(part, Norm) or (isinstance(part, Elementwise) and part.kind == "add" and part.size == hidden)


def _reads_with(block: Sequence[Part], i: int, found: Iterable[int], experts: set[int]) -> bool:
    """A router stands before the experts that it chooses."""
    part = block[i]
    return isinstance(part, Linear) and part.experts == 1 and part.out_features in experts and i < min(found)


def _fits(column: Part, part: Linear) -> bool:
    return isinstance(column, Linear) and column.experts == part.experts and column.out_features in (part.in_features, 2 * part.in_features)


def _mlp(block: Sequence[Part], columns: Sequence[int], row: int) -> dict[int, Placed]:
    found = {i: Placed(part=block[i], role="column", seen=True) for i in columns}
    for i in range(columns[0], row):
        part = block[i]
        if i not in found and isinstance(part, Elementwise | Norm):
            found[i] = Placed(part=part, role="inside", seen=True)
    return found | {row: Placed(part=block[row], role="row", seen=True)}


# ---- shares ----


def _on_stage(spec: ModelSpec, plan: Plan, stage: int) -> list[Placed]:
    names = stage_names(spec, plan, stage)
    return [each for each in place(spec) if plan.pp == 1 or each.block in names]


def _share(spec: ModelSpec, each: Placed, plan: Plan, stage: int) -> Part:
    part = _untied(each, plan, stage)
    if isinstance(part, Linear) and each.routed and plan.ep > 1:
        part = replace(part, experts=_divided(part.experts, plan.ep, "ep", f"experts of {spec.name}"))
    if plan.tp == 1:
        return part
    if isinstance(part, Scan):
        raise WorkloadError(f"tp={plan.tp}: {part.name} is a recurrence, whose split over ranks is not described; use tp=1.")
    if each.role == "vocabulary":
        return _vocabulary_share(part, plan.tp)
    if each.role == "whole":
        return part
    return _head_share(spec, part, each.role, each.attention, plan.tp) if each.attention is not None else _width_share(spec, part, each.role, plan.tp)


def _untied(each: Placed, plan: Plan, stage: int) -> Part:
    """A tied head on another stage than its embedding has a weight of its own there."""
    part = each.part
    if plan.pp > 1 and stage > 0 and each.block == ">" and isinstance(part, Linear) and part.tied_to:
        return Linear(**{each.name: getattr(part, each.name) for each in fields(Linear)} | {"tied_to": None})
    return part


def _vocabulary_share(part: Part, tp: int) -> Part:
    if isinstance(part, Embedding):
        return replace(part, num_embeddings=-(-part.num_embeddings // tp))
    if isinstance(part, Elementwise):
        return replace(part, size=-(-part.size // tp))
    assert isinstance(part, Linear)
    return replace(part, out_features=-(-part.out_features // tp))


def _width_share(spec: ModelSpec, part: Part, role: Role, tp: int) -> Part:
    what = f"inner width of {spec.name}'s MLP ({part.name})"
    if isinstance(part, Linear):
        if role == "column":
            return replace(part, out_features=_divided(part.out_features, tp, "tp", what))
        return replace(part, in_features=_divided(part.in_features, tp, "tp", what))
    if isinstance(part, Elementwise | Norm):
        return replace(part, size=_divided(part.size, tp, "tp", what))
    return part


def _head_share(spec: ModelSpec, part: Part, role: Role, attention: Attention, tp: int) -> Part:
    heads, groups = attention.num_attention_heads, attention.num_key_value_heads
    mine = _divided(heads, tp, "tp", f"attention heads of {spec.name}")
    if groups % tp and tp % groups:
        raise WorkloadError(f"tp={tp} and the {groups} key/value heads of {spec.name}: one has to divide the other; use {_divisors(heads, groups)}.")
    own = max(1, groups // tp)
    match part:
        case Attention():
            return replace(part, num_attention_heads=mine, num_key_value_heads=own)
        case Linear() if role == "column":
            return replace(part, out_features=_columns(spec, part, attention, mine, own))
        case Linear():
            return replace(part, in_features=part.in_features // tp)
        case Norm() if part.groups > 1:
            return replace(part, groups=mine if part.groups == heads else own)
        case Norm():
            return replace(part, size=part.size * (mine if part.size == heads * attention.head_dim else own) // heads)
        case Elementwise() if part.size % (heads + groups) == 0 and part.kind == "rotary":
            return replace(part, size=part.size // (heads + groups) * (mine + own))
        case Elementwise():
            return replace(part, size=-(-part.size // tp))
        case Product():
            return replace(part, products=part.products // tp if part.products % heads == 0 else part.products)
        case Table():
            return replace(part, shapes={name: tuple(mine if size == heads else size for size in shape) for name, shape in part.shapes.items()})
    return part


def _columns(spec: ModelSpec, part: Linear, attention: Attention, mine: int, own: int) -> int:
    """Outputs of a projection to queries, keys and values, or some of them."""
    heads, groups, d, v = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim, attention.value_dim
    tp = heads // mine
    if own * tp == groups:
        return _divided(part.out_features, tp, "tp", f"outputs of {part.name}")
    sizes = ((heads, 0, 0), (0, groups, 0), (0, 0, groups), (0, groups, groups), (heads, groups, groups))
    known = {q * d + k * d + n * v: (q and mine) * d + (k and own) * d + (n and own) * v for q, k, n in sizes}
    if part.out_features not in known:
        raise WorkloadError(
            f"tp={tp}: how {part.name} of {spec.name}, {part.out_features} outputs, is split over more ranks than its {groups} key/value heads "
            f"is not described; use at most tp={groups}."
        )
    return known[part.out_features]


def _divided(size: int, by: int, name: str, what: str) -> int:
    if size % by:
        raise WorkloadError(f"{name}={by} does not divide the {size} {what}; use {_divisors(size)}.")
    return size // by


def _divisors(*sizes: int) -> str:
    """The first few numbers that divide all sizes."""
    found = [each for each in range(1, min(sizes) + 1) if all(size % each == 0 for size in sizes)]
    return ", ".join(map(str, found[:8]))


def _share_of(op: Op, ranks: int) -> Op:
    if ranks == 1:
        return op
    names = ("matmul_flops", "causal_flops", "other_flops", "activation_bytes", "rows")
    return replace(op, **{name: -(-getattr(op, name) // ranks) for name in names})
