"""The pass of one micro-batch on one rank of a plan, replayed on tensors of sizes alone; which blocks need no replay of their own.

Source of the events: torch 2.13, `torch/distributed/fsdp/_fully_shard` (`FSDPParamGroup`, `foreach_all_gather`, `foreach_reduce`) and
`torch/distributed/tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from lighten.cost.operators import Forward, rows_of
from lighten.cost.passes import training_forward
from lighten.cost.replay.habits import habits
from lighten.cost.replay.kernels import INT64
from lighten.cost.replay.layout import Stream, Sublayer, reads_source
from lighten.cost.replay.tape import Kind, Ledger, Storage, Tensor, _Node
from lighten.cost.tuning import _Tuned
from lighten.cost.workload import Workload
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Norm, Part, block_name
from lighten.parallel.plan import Plan
from lighten.parallel.rank import Placed

FLOAT32 = 4
SHORT = 4
"""Blocks of a run of equal ones that are replayed: the first two and the last two of a run meet all that can be the fullest moment."""
Moments: TypeAlias = dict[str, dict[Kind, int]]
"""Phase of a pass → what lives at its fullest moment."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Weights that FSDP2 gathers at once, in bytes.

    Attributes:
        whole: gathered weights, rows padded; gradient: their gradients in the type that is reduced, padded; shard: the rank's gradients.
    """

    names: frozenset[str]
    whole: int
    gradient: int
    shard: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One rank, and what it computes.

    Attributes:
        spec, parts: what the rank holds (`rank_spec`, `rank_parts`).
        kinds: block → its kind; blocks of one kind take the same memory.
        micro: the workload of one micro-batch.
        units: block, or "" for what stands outside → its unit, where gradients are shared out.
        gathers: weights are shared out too.
        gradient_bytes: of all weights of the rank, in the activations' type.
        fused: norms and activations are one kernel each, and a gathered input is not kept.
    """

    spec: ModelSpec
    parts: tuple[Placed, ...]
    kinds: Mapping[str, int]
    micro: Workload
    plan: Plan
    stage: int
    units: Mapping[str, Unit]
    gathers: bool
    gradient_bytes: int
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Bytes of one micro-batch's pass.

    Attributes:
        moments: of each phase.
        saved: held between its forward and its backward pass.
        inputs: of token ids and the tables beside the weights.
        hidden: of what goes from stage to stage.
        more_gradients: of split tables whose gradient is whole on every rank.
    """

    moments: Moments
    saved: int
    inputs: int
    hidden: int
    more_gradients: int

    @property
    def fullest(self) -> dict[Kind, int]:
        best: dict[Kind, int] = max(self.moments.values(), key=_total)
        return dict(best)


def _total(kinds: Mapping[Kind, int]) -> int:
    return sum(kinds.values())


def figures(setting: Setting, *, summing: bool) -> Figures:
    """Of any number of blocks from the replay of a few: each phase's fullest moment is linear in the number of equal blocks that follow each other.

    Args:
        summing: gradients of earlier micro-batches are there.
    """
    runs = [list(run) for _, run in groupby(_blocks(setting.parts), key=setting.kinds.__getitem__)]
    short = [run[:SHORT] for run in runs]
    longer = [i for i, run in enumerate(runs) if len(run) > SHORT]
    if sum(map(len, runs)) <= sum(map(len, short)) * (1 + len(longer)) + len(longer):
        return _replayed(setting, runs, summing=summing)
    base = _replayed(setting, short, summing=summing)
    found = base
    for i in longer:
        one_more = [run if j != i else runs[i][: SHORT + 1] for j, run in enumerate(short)]
        found = _along(found, base, _replayed(setting, one_more, summing=summing), len(runs[i]) - SHORT)
    return found


def _blocks(parts: Iterable[Placed]) -> list[str]:
    return list(dict.fromkeys(str(each.block) for each in parts if each.block not in (None, "<", ">")))


def _along(found: Figures, base: Figures, more: Figures, times: int) -> Figures:
    """Figures with so many times what one more block adds."""
    moments: Moments = {
        name: {kind: value + times * (more.moments[name][kind] - base.moments[name][kind]) for kind, value in kinds.items()}
        for name, kinds in found.moments.items()
    }
    return replace(found, moments=moments, saved=found.saved + times * (more.saved - base.saved))


def _replayed(setting: Setting, runs: Sequence[Sequence[str]], *, summing: bool) -> Figures:
    names = {name for run in runs for name in run}
    parts = tuple(part for part in setting.spec.parts if (block_name(part) or "") in names or block_name(part) not in setting.kinds)
    spec = setting.spec if len(parts) == len(setting.spec.parts) else replace(setting.spec, parts=parts)
    forward = training_forward(spec, replace(setting.micro, seq_len=setting.micro.seq_len // setting.plan.cp))
    model = Replay(setting, spec, forward, summing=summing)
    model.labels = {name: f"{r}.{i if i < 2 else i - len(run)}" for r, run in enumerate(runs) for i, name in enumerate(run)}
    loss = model.loss()
    model.leave_root()
    inputs = model.inputs_bytes()
    saved = model.ledger.live["activations"] - inputs
    hidden = 0 if setting.plan.pp == 1 else model.width_bytes()
    model.backward(loss)
    model.finish()
    more = sum(elements - elements // setting.plan.tp for name, elements in model.tables.items() if name not in model.twice)
    return Figures(moments=model.moments.by_phase, saved=saved, inputs=inputs, hidden=hidden, more_gradients=round(more * model.element))


class PhaseLedger(Ledger):
    """The fullest moment of each phase of a pass."""

    def __init__(self, before: Ledger) -> None:
        super().__init__()
        self.live, self.now = before.live, before.now
        self.phase = "start"
        self.by_phase: Moments = {}
        self.peaks: dict[str, int] = {}

    def count(self, size: int, kind: Kind) -> None:
        self.live[kind] += size
        self.now += size
        if self.now > self.peaks.get(self.phase, 0):
            self.peaks[self.phase], self.by_phase[self.phase] = self.now, dict(self.live)


@dataclass(kw_only=True)
class _Hook(_Node):
    """An operator of the backward pass that hands on its gradient and then calls."""

    call: Callable[[], None]


class Replay(_Tuned):
    """One micro-batch on one rank.

    Attributes:
        moments: its ledger.
        labels: block → how its phases are called.
        tables: split embeddings → elements of the whole table; twice: those whose gradient is a sum, since they are tied.
    """

    def __init__(self, setting: Setting, spec: ModelSpec, forward: Forward, *, summing: bool) -> None:
        self.setting, self.plan = setting, setting.plan
        self.roles: dict[str, Placed] = {each.part.name: each for each in setting.parts}
        self.units = setting.units
        self.gathered: dict[str, Storage] = {}
        self.buffers: dict[str, Storage] = {}
        self.reduced: dict[str, Storage] = {}
        self.reducing: Storage | None = None
        self.copied: Storage | None = None
        self.order = [name for name in dict.fromkeys(map(block_name, spec.parts)) if name is not None and name in setting.kinds]
        self.labels: dict[str, str] = {}
        self.routing = False
        self.tables: dict[str, int] = {}
        self.twice: set[str] = set()
        self.sources: dict[int, Tensor] = {}
        super().__init__(spec, replace(setting.micro, seq_len=forward.query_len), forward)
        self.ledger = self.moments = PhaseLedger(self.ledger)
        if self.units and summing:
            self.reduced = {name: self.hold(unit.shard, "gradients") for name, unit in self.units.items()}
        self.summing = not self.units and summing
        self.totals = self.hold(setting.gradient_bytes if self.summing else 0, "gradients")

    def loss(self) -> Tensor:
        """A stage that is not the last one starts its backward pass from a gradient of what it sent, which lives as long as that."""
        if self.setting.stage == self.plan.pp - 1:
            return super().loss()
        ((_, hidden),) = self.run()
        return hidden

    def embed(self, stream: Stream) -> Tensor:
        """What the first blocks read: of a later stage, what it received."""
        if self.setting.stage == 0:
            return super().embed(stream)
        return self.tensor(round(self.width_bytes() / self.element))

    def headed(self, stream: Stream, hidden: Tensor) -> Tensor:
        """A stage's output, which a pipeline keeps to the end of its backward pass."""
        made = super().headed(stream, hidden)
        self.kept += [made] if self.plan.pp > 1 else []
        return made

    def width_bytes(self) -> int:
        """Of the hidden state that goes from stage to stage."""
        first = next(part for part in self.spec.parts if isinstance(part, Norm))
        return round(self.batch * self.queries * first.size * self.element) // self.split_positions

    def inputs_bytes(self) -> int:
        return sum(storage.size for storage in self.inputs)

    # ---- tensor parallelism ----

    @property
    def split_positions(self) -> int:
        return self.plan.tp if self.plan.sequence_parallel else 1

    def gather(self, x: Tensor) -> Tensor:
        """What a split branch reads: all positions. Its gradient is a sum over the ranks."""
        if self.plan.tp == 1:
            return x
        if not self.plan.sequence_parallel:
            return self.record(x.view(), [x])
        whole = x.elements * self.plan.tp
        apart = self.hold(whole * x.element)  # as the collective gives it, before its pieces are put in order
        made = self.tensor(whole, x.element)
        del apart
        found = self.record(made, [x], scratch=made.bytes)
        if self.setting.fused:
            self.sources[id(found.storage)] = x
        return found

    def sum_up(self, x: Tensor) -> Tensor:
        """What a split branch gives: the sum over the ranks, of the rank's own positions with sequence parallelism."""
        if self.plan.tp == 1:
            return x
        if not self.plan.sequence_parallel:
            return self.record(x.elements, [x], passes=True)
        apart = self.hold(x.bytes)
        made = self.tensor(x.elements // self.plan.tp, x.element)
        del apart
        return self.record(made, [x], scratch=x.bytes)

    def attention(self, sub: Sublayer, x: Tensor, memory: Tensor | None, after: Sequence[Part] = ()) -> tuple[Tensor, Tensor | None]:
        core = sub.core
        if memory is not None and isinstance(core, Attention) and reads_source(core):
            memory = self.gather(memory)
        return super().attention(sub, self.gather(x), memory, after)

    def mlp(self, sub: Sublayer, x: Tensor) -> Tensor:
        return super().mlp(sub, self.gather(x))

    def experts(self, sub: Sublayer, x: Tensor) -> Tensor:
        self.routing = True
        seen = replace(sub, before=self.as_experts(sub.before), after=self.as_experts(sub.after))
        made = super().experts(seen, self.gather(x))
        self.routing = False
        return self.sum_up(made)

    def as_experts(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Parts of a branch as the replay knows experts and their router: by their number in the whole model, however many the rank has."""
        return tuple(replace(part, experts=self.experts_of(part)) if isinstance(part, Linear) and self.is_routed(part) else part for part in parts)

    def experts_of(self, part: Linear) -> int:
        return part.experts * self.plan.ep

    def fused_weights(self, parts: Sequence[Linear]) -> Mapping[str, tuple[int, ...]]:
        held = super().fused_weights([replace(part, experts=part.experts // self.plan.ep) for part in parts])
        return {name: shape if shape[0] * self.plan.ep == parts[0].experts else (1, *shape) for name, shape in held.items()}

    def branch(self, sub: Sublayer, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One expert a rank is still an expert."""
        if isinstance(sub.core, Attention) or not any(self.is_routed(part) for part in (*sub.before, *sub.after)):
            return super().branch(sub, x, memory)
        out = self.experts(sub, x)
        return self.dropout(out, self.habits.hidden_dropout), None

    def is_routed(self, part: Part) -> bool:
        return part.name in self.roles and self.roles[part.name].routed

    def linear(self, part: Linear, x: Tensor) -> Tensor:
        placed = self.roles.get(part.name)
        if placed is None or self.plan.tp == 1:
            return super().linear(part, x)
        if placed.role == "vocabulary":
            x = self.gather(x)
        if not placed.seen and self.split_positions > 1:
            return self.record(x.elements // part.in_features * part.out_features, [x], [x], part=part)
        source = self.sources.get(id(x.storage))
        if source is not None:  # whose gathered form is made again in backward
            made = self.record(rows_of(part, self.forward) * part.out_features, [x], [source], part=part, scratch=x.bytes)
        else:
            made = super().linear(part, x)
        return self.sum_up(made) if placed.role == "row" and not self.routing else made

    def embedding(self, part: Embedding, indices: Sequence[Tensor]) -> Tensor:
        """DTensor makes the gradient of a split table whole, and cuts it."""
        placed = self.roles.get(part.name)
        if placed is None or placed.role != "vocabulary" or self.plan.tp == 1:
            made = super().embedding(part, indices)
            return made if self.split_positions == 1 else self.record(made.elements // self.split_positions, [made])
        out = self.tensor(rows_of(part, self.forward) * part.embedding_dim)
        name, shape = next(iter(part.tensors().items()), ("", (0, 0)))
        self.tables[name] = math.prod(shape) * self.plan.tp
        whole = {name: (shape[0] * self.plan.tp, shape[1])} if name else {}
        return self.sum_up(self.record(out, saved=indices, part=whole))

    def cross_entropy(self, logits: Tensor, stream: Stream) -> Tensor:
        """Of a split vocabulary: each rank keeps its share of the log-probabilities, and its backward pass is one operator.

        Source: `_log_softmax` and `_nll_loss_and_log_softmax_backward` of torch/distributed/tensor/parallel/loss.py.
        """
        heads = [part for part in stream.after if part.name in self.roles and self.roles[part.name].role == "vocabulary"]
        if self.plan.tp == 1 or not heads:
            return super().cross_entropy(logits, stream)
        wide = self.cast(logits, FLOAT32) if self.spec.is_decoder and self.habits.wide_loss else logits
        narrow = wide.element < FLOAT32  # its values are computed in float32
        copy = self.hold(wide.elements * FLOAT32 if narrow else 0)
        shifted = self.hold(wide.elements * FLOAT32)
        powers = self.hold(wide.elements * FLOAT32)
        del powers
        result = self.hold(wide.elements * FLOAT32 if narrow else 0)
        found = self.tensor(wide.elements, wide.element)
        del copy, shifted, result
        self.record(found, [wide], passes=True)
        targets = self.tensor(self.batch * self.queries, INT64)
        return self.record(1, [found], [found, targets], scratch=2 * found.bytes)

    def fused(self, part: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """With context parallelism keys and values of all positions pass through."""
        passing = self.hold((k.bytes + v.bytes) * self.plan.cp if self.plan.cp > 1 else 0, "temporary")
        made = super().fused(part, q, k, v, mask)
        del passing
        return made

    # ---- one kernel for what transformers writes out ----

    def rmsnorm(self, part: Norm, x: Tensor) -> Tensor:
        if not self.setting.fused:
            return super().rmsnorm(part, x)
        out, statistics = self.tensor(x.elements), self.tensor(x.elements // part.size, FLOAT32)
        return self.record(out, [x], [x, statistics], part=part)

    def rotate(self, x: Tensor) -> Tensor:
        return self.record(x.elements, [x]) if self.setting.fused else super().rotate(x)

    def gelu_new(self, x: Tensor) -> Tensor:
        return self.kept_input(x) if self.setting.fused else super().gelu_new(x)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """A gate's activation is computed again from its input, which is kept for it."""
        return self.record(x.elements, [x, y], [y]) if self.setting.fused else super().multiply(x, y)

    # ---- FSDP2 ----

    def body(self, stream: Stream, memory: Tensor | None) -> Tensor:
        """A stream's last hidden state, each block gathered before it runs."""
        self.queries = self.length(stream)
        self.keys = self.forward.key_len if stream.rows == "token" else self.queries
        self.habits = habits(self.spec, stream.rows)
        self.enter("")
        embedded = self.embed(stream)
        self.shared = self.position_tables(stream)
        x = embedded
        given = [memory] if memory is not None and any(isinstance(part, Attention) and reads_source(part) for part in stream.parts) else []
        for parts in stream.blocks:
            name = next((found for found in map(block_name, parts) if found), "")
            self.enter_phase(f"forward {self.labels[name]}")
            self.enter(name)
            x = self.hook(x, lambda name=name: self.scatter(name))  # type: ignore[misc]
            run = self.block(parts)
            x = self.checkpoint(run, x, *given) if self.workload.recompute == "full" else run(x, *given)
            self.leave(name)
            x = self.hook(x, lambda name=name: self.return_to(name))  # type: ignore[misc]
        self.enter_phase("end")
        self.shared = []
        self.bias = {}
        x = self.sequence([part for part in stream.after if part.component == "norm"], x)
        return self.dropout(x, self.habits.last_dropout)

    def hook(self, x: Tensor, call: Callable[[], None]) -> Tensor:
        if not self.recording:
            return x
        out = x.view()
        self.nodes.append(_Hook(outs=(out.edge,), inputs=[(x.edge, None)], call=call))
        return out

    def enter_phase(self, name: str) -> None:
        self.moments.phase = name
        self.moments.count(0, "activations")

    @property
    def gathers(self) -> bool:
        return self.setting.gathers

    def enter(self, name: str) -> None:
        """Gather into a buffer, drop the one before, copy out."""
        if not self.gathers or name not in self.units or name in self.gathered:
            return
        buffer = self.hold(self.units[name].whole, "temporary")
        self.copied = None
        self.gathered[name] = self.hold(self.units[name].whole, "temporary")
        self.copied = buffer

    def leave(self, name: str) -> None:
        self.gathered.pop(name, None)

    def leave_root(self) -> None:
        """The end of the forward pass; the last block is asked for when its backward pass is near."""
        self.copied = None
        if self.gathers and self.order:
            self.prefetch(len(self.order) - 1)

    def prefetch(self, index: int) -> None:
        if index >= 0:
            self.buffers[self.order[index]] = self.hold(self.units[self.order[index]].whole, "temporary")

    def return_to(self, name: str) -> None:
        """Before a block's backward pass: its weights are copied out of their buffer, and the next ones asked for."""
        self.enter_phase(f"backward {self.labels[name]}")
        if not self.gathers or name not in self.units:
            return
        self.gathered[name] = self.hold(self.units[name].whole, "temporary")
        self.buffers.pop(name, None)
        self.prefetch(self.order.index(name) - 1)

    def scatter(self, name: str) -> None:
        """Behind a unit's backward pass: whole weights go, gradients are copied into a buffer, which lives until the next one."""
        if name not in self.units:
            return
        self.gathered.pop(name, None)
        unit = self.units[name]
        self.reducing = None
        self.reducing = self.hold(unit.gradient, "temporary")
        for each in unit.names:
            self.gradients.pop(each, None)
        shard = self.hold(unit.shard, "gradients")
        if name not in self.reduced:
            self.reduced[name] = shard
        if self.order and name == self.order[0]:
            self.enter_phase("start")

    def finish(self) -> None:
        """What stands outside the blocks comes last."""
        self.enter_phase("start")
        self.scatter("")
        self.reducing = None

    def _step(self, node: _Node) -> None:
        again = [name for name in node.weights if name in self.tables and name in self.gradients]
        if self.summing and node.weights:
            self._step_summing(node)
        elif again:
            self._step_again(node, again[0])
        else:
            super()._step(node)
        if isinstance(node, _Hook):
            node.call()

    def _step_again(self, node: _Node, name: str) -> None:
        """The second gradient of a split table that is tied: whole, then cut, then added to the first."""
        whole = self.hold(self.tables[name] * self.element, "gradients")
        node.weights = {}
        super()._step(node)
        cut = self.hold(whole.size // self.plan.tp, "gradients")
        total = self.hold(cut.size, "gradients")
        self.gradients[name] = total
        self.twice.add(name)

    def _step_summing(self, node: _Node) -> None:
        """A weight's new gradient is added to the sum and goes."""
        made = {name: self.hold(math.prod(shape) * self.element, "temporary") for name, shape in node.weights.items()}
        node.weights = {}
        super()._step(node)
        del made
