"""A block's branches: attention, MLP, experts and recurrence, before or after their norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lighten.cost.operators import rows_of
from lighten.cost.replay.attention import Attentions
from lighten.cost.replay.kernels import FLOAT32, INT64
from lighten.cost.replay.layout import Sublayer, chains, is_core, is_post_norm, linears, sublayers
from lighten.cost.replay.tape import Tensor
from lighten.model.spec import Attention, Conv, Elementwise, Linear, Norm, Part, Scan


class Blocks(Attentions):
    """The blocks of a stream. Each function's variables are those that hold tensors in the `forward` of `transformers`' module."""

    def block(self, parts: Sequence[Part]) -> Callable[..., Tensor]:
        """What runs a block on its input and, in a decoder that has one, its encoder's output."""
        subs = sublayers(parts)
        run = self.post_norm_block if is_post_norm(parts) else self.pre_norm_block
        lengths, habits = (self.queries, self.keys), self.habits

        def replay(x: Tensor, memory: Tensor | None = None) -> Tensor:
            self.queries, self.keys = lengths
            self.habits = habits
            return run(subs, x, memory)

        return replay

    def pre_norm_block(self, subs: Sequence[Sublayer], x: Tensor, memory: Tensor | None) -> Tensor:
        residual, normed = x, x
        for sub in subs:
            if sub.norms or not sub.adds:
                normed = self.sequence(sub.norms, residual)
            h, _kept = self.branch(sub, normed, memory)  # held to the end of the block, as in LlamaDecoderLayer
            h = self.add(residual, h) if sub.adds else h
            residual = h
        return residual

    def post_norm_block(self, subs: Sequence[Sublayer], x: Tensor, memory: Tensor | None) -> Tensor:
        for sub in subs:
            if isinstance(sub.core, Attention):
                middle, _probabilities = self.attention(sub, x, memory)  # held to the end of the block, as in BertLayer
            else:
                middle = self.mlp(sub, x) if isinstance(sub.core, Elementwise) else self.branch(sub, x, memory)[0]
            h = self.project(sub, middle, x)
            x = h
            del middle
        return x

    def project(self, sub: Sublayer, h: Tensor, residual: Tensor) -> Tensor:
        """Norm of the residual sum: the last linear of a post-norm sublayer, dropout, addition."""
        h = self.sequence(linears(sub.after), h)
        if self.habits.output_dropout or not isinstance(sub.core, Attention):
            h = self.dropout(h, self.habits.hidden_dropout)
        return self.norm(sub.norm, self.add(h, residual)) if sub.norm else self.add(h, residual)

    def branch(self, sub: Sublayer, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A pre-norm branch up to its residual addition, and what lives beside it."""
        probabilities = None
        cores = [part for part in sub.after if is_core(part) and isinstance(part, Elementwise)]
        if isinstance(sub.core, Attention):
            after, more = _own(sub.after, linears(sub.before)[0].in_features) if cores else (sub.after, ())
            out, probabilities = self.attention(sub, x, memory, after)
            if more:  # attention and MLP side by side
                out = self.add(out, self.mlp(_as_sublayer(more), x))
        elif isinstance(sub.core, Scan) or any(isinstance(part, Scan) for part in sub.after):
            out = self.recurrence(sub, x)
        elif any(part.experts > 1 for part in linears((*sub.before, *sub.after))):
            out = self.experts(sub, x)
        elif sub.core is not None:
            out = self.after(sub.after, self.mlp(sub, x))
        else:
            out = self.plain(sub.before, x)
        if self.habits.output_dropout or not isinstance(sub.core, Attention):
            out = self.dropout(out, self.habits.hidden_dropout)
        return out, probabilities

    def after(self, parts: Sequence[Part], x: Tensor) -> Tensor:
        """The product out of a branch, norms and scalings that follow it."""
        return self.sequence([part for part in parts if not (isinstance(part, Elementwise) and _is_gate(part, parts))], x)

    def mlp(self, sub: Sublayer, x: Tensor) -> Tensor:
        """The activation of one linear, times a second one where it is gated; without the linear out of it."""
        activation = sub.core
        assert isinstance(activation, Elementwise)
        inner = chains(sub.before)
        h = self.sequence(inner[0], x) if inner else x
        gate = None
        if len(inner) <= 1 and _is_gated(sub) and h.elements * activation.size != 0:
            gate, h = self.split(h, 1, 1)
        h = self.activate(activation, h)
        if len(inner) > 1:
            h = self.multiply(h, self.sequence(inner[1], x))
        elif gate is not None:
            h = self.multiply(h, gate)
        return self.dropout(h, self.habits.inner_dropout)

    def plain(self, parts: Sequence[Part], x: Tensor) -> Tensor:
        """What is not known otherwise: each operator saves its inputs, its output lives until the last that reads it."""
        return self.sequence(parts, x)

    def experts(self, sub: Sublayer, x: Tensor) -> Tensor:
        """A router, its best experts' gated MLPs as grouped products over S = rows · experts_per_row rows, and shared experts beside them.

        Source: `grouped_mm_experts_forward` in transformers' integrations/moe.py, which is its default.
        """
        parts = (*sub.before, *([sub.core] if sub.core else []), *sub.after)
        routed = [part for part in linears(parts) if part.experts > 1]
        first = routed[0]
        router = next((part for part in linears(parts) if part.out_features == first.experts and part.experts == 1), None)
        rows, chosen = rows_of(first, self.forward), rows_of(first, self.forward) * first.experts_per_row
        scores = self.routed_scores(router, x, rows, first.experts_per_row)
        order = [self.tensor(chosen, INT64) for _ in range(3)]  # sorted expert of each row, its place, and the place's row
        picked = self.record(chosen * first.in_features, [x], [order[2]])
        gated = sum(part.in_features == first.in_features for part in routed) > 1 or _packed(routed)
        up = [part for part in routed if part.in_features == first.in_features]
        down = routed[-1]
        width = down.in_features
        h = self.record(chosen * width * (1 + gated), [picked], [picked], part=self.fused_weights(up))
        weighed = self.record(chosen, [scores], [order[1]])
        activation = next((part for part in parts if isinstance(part, Elementwise) and is_core(part)), None)
        if gated:
            gate, value = self.split(h, 1, 1)
            h = self.multiply(self.activate(activation, gate) if activation else self.kept_input(gate), value)
        else:
            h = self.activate(activation, h) if activation else self.kept_input(h)
        h = self.record(chosen * down.out_features, [h], [h], part=self.fused_weights([down]))
        h = self.record(h.elements, [h, weighed], [h, weighed], scratch=h.bytes)
        inverse = self.tensor(chosen, INT64)
        h = self.record(h.elements, [h], [inverse])
        h = self.record(rows * down.out_features, [h])
        own = [part for part in linears(parts) if part.experts == 1 and part is not router]
        return self.add(h, self.shared_experts(own, activation, x)) if len(own) > 1 else h

    def fused_weights(self, parts: Sequence[Linear]) -> Mapping[str, tuple[int, ...]]:
        """The experts' weights as transformers keeps them: one tensor for all experts of a layer."""
        first, outputs = parts[0], sum(part.out_features for part in parts)
        whole: dict[str, tuple[int, ...]] = {f"{first.name}.weight": (first.experts, outputs, first.in_features)}
        if first.bias:
            whole[f"{first.name}.bias"] = (first.experts, outputs)
        for part in parts:
            self.stored_as[part.name] = whole
        return whole

    def routed_scores(self, router: Linear | None, x: Tensor, rows: int, per_row: int) -> Tensor:
        """Softmax over the experts in float32, and the best of them, which sum to 1 again."""
        logits = self.linear(router, x) if router else self.tensor(rows)
        probabilities = self.softmax(self.cast(logits, FLOAT32))
        self.tensor(rows * per_row, INT64)
        indices = self.tensor(rows * per_row, INT64)
        best = self.record(self.tensor(rows * per_row, FLOAT32), [probabilities], [indices])
        total = self.record(rows, [best], scratch=best.bytes)
        return self.record(best.elements, [best, total], [best, total], scratch=best.bytes)

    def shared_experts(self, own: Sequence[Linear], activation: Part | None, x: Tensor) -> Tensor:
        wide = [part for part in own if part.in_features == own[0].in_features]
        h = self.linear(wide[0], x)
        h = self.activate(activation, h) if isinstance(activation, Elementwise) else self.kept_input(h)
        if len(wide) > 1:
            h = self.multiply(h, self.linear(wide[1], x))
        return self.linear(own[-1], h) if own[-1] not in wide else h

    def recurrence(self, sub: Sublayer, x: Tensor) -> Tensor:
        """Mamba's mixer as `transformers` writes it out: a state of N values a channel at every position, one step after the other.

        Other recurrences follow the general rule: their projections and what each of them saves, and a state for each row.

        Source: `mamba_selective_scan` in transformers' models/mamba/modeling_mamba.py (Gu & Dao 2023, arXiv:2312.00752).
        """
        parts = (*sub.before, *([sub.core] if sub.core else []), *sub.after)
        products, convs = linears(parts), [part for part in parts if isinstance(part, Conv)]
        scan = next(part for part in parts if isinstance(part, Scan))
        if not (len(products) == 4 and len(convs) == 1):
            return self.other_recurrence(parts, scan, x)
        into, selects, steps, out = products
        inner, rows = steps.out_features, rows_of(out, self.forward)
        state = (selects.out_features - steps.in_features) // 2
        dense = self.linear(into, x)
        hidden, gate = self.split(dense, 1, 1)
        del dense
        small = self.tensor(inner * state)  # −exp(A)
        small = self.record(small.elements, [small], [small], part=_others(sub, "A"))
        hidden = self.causal_conv(convs[0], hidden, rows, inner)
        chosen = self.record(rows * selects.out_features, [hidden], [hidden], part=selects)
        delta, b, c = self.split(chosen, steps.in_features, state, state)
        delta = self.record(rows * inner, [delta], [delta], part=steps)
        shifted = self.record(delta.elements, [delta], passes=True)
        if self.cached_step(scan):
            return self.linear(out, self.one_step(shifted, hidden, gate, inner, state))
        delta = self.record(shifted.elements, [shifted], [shifted])
        del shifted
        expanded = rows * inner * state
        decay = self.tensor(expanded, FLOAT32)
        exponent = self.record(self.tensor(expanded, FLOAT32), [delta, small], [delta, small], scratch=expanded * FLOAT32)
        self.record(decay, [exponent], [decay])
        del exponent
        spread = self.record(self.tensor(expanded, FLOAT32), [delta, b], [delta, b], scratch=2 * expanded * FLOAT32)
        gained = self.record(self.tensor(expanded, FLOAT32), [spread, hidden], [spread, hidden], scratch=expanded * FLOAT32)
        scanned = self.scan(decay, gained, c, rows, inner, state)
        scanned = self.add(scanned, self.record(rows * inner, [hidden], [hidden], scratch=rows * inner * FLOAT32, part=_others(sub, "D")))
        scanned = self.multiply(scanned, self.kept_input(gate))
        return self.linear(out, scanned)

    def causal_conv(self, part: Conv, x: Tensor, rows: int, inner: int) -> Tensor:
        """Padded on both sides by all but one of the kernel's positions, cut on the right, and its activation."""
        padded = (rows // self.batch + part.kernel[-1] - 1) * self.batch * inner
        x = self.lay_out(x) if self.recording else x
        made = self.record(padded, [x], [x], part=part)
        return self.kept_input(self.record(made.view(rows * inner), [made]))

    def scan(self, decay: Tensor, gained: Tensor, c: Tensor, rows: int, inner: int, state: int) -> Tensor:
        """One state after the other, each kept with its own product; a slice's gradient is as large as what it is a slice of.

        All positions at once: they do the same, and the fullest moment of their backward pass is its first.
        """
        each = self.batch * inner * state
        states = self.tensor(rows * inner * state if self.recording else 2 * each, FLOAT32)
        read = self.tensor(rows * inner)
        step = self.record(read, [decay, gained, c], [decay, states, c], scratch=decay.bytes + 3 * round(each * FLOAT32))
        return self.record(rows * inner, [step])

    def cached_step(self, scan: Scan) -> bool:
        return self.queries == 1 and not self.training and self.workload.phase in ("decode", "generate")

    def one_step(self, delta: Tensor, hidden: Tensor, gate: Tensor, inner: int, state: int) -> Tensor:
        """The state of one position: its decay, what it gains, and the new state beside the old."""
        _parts = [self.hold(self.batch * inner * state * FLOAT32) for _ in range(4)]
        return self.multiply(self.tensor(delta.elements), self.kept_input(gate))

    def other_recurrence(self, parts: Sequence[Part], scan: Scan, x: Tensor) -> Tensor:
        """Each projection of the input, what the recurrence keeps of them at each position, and the projection out."""
        products = linears(parts)
        width = products[0].in_features
        read = [self.linear(part, x) for part in products[:-1] if part.in_features == width]
        inner = products[-1].in_features
        rows = rows_of(products[-1], self.forward)
        kept = [self.kept_input(made) for made in read] or [x]
        state = self.tensor(self.batch * scan.state_elements, FLOAT32)
        mixed = self.record(rows * inner, kept, [*kept, state])
        return self.linear(products[-1], self.kept_input(mixed))


def _own(parts: Sequence[Part], width: int) -> tuple[Sequence[Part], Sequence[Part]]:
    """What follows attention in its own branch, and the MLP that stands beside it."""
    end = 1 + next((i for i, part in enumerate(parts) if isinstance(part, Linear)), -1)
    return parts[:end], [part for part in parts[end:] if not isinstance(part, Norm) or part.size != width]


def _as_sublayer(parts: Sequence[Part]) -> Sublayer:
    at = next(i for i, part in enumerate(parts) if is_core(part))
    return Sublayer(norms=(), before=tuple(parts[:at]), core=parts[at], after=tuple(parts[at + 1 :]), norm=None, adds=False)


def _is_gated(sub: Sublayer) -> bool:
    """One product makes both halves of a gated MLP: twice as wide as what the product out reads."""
    into, out = linears(sub.before), linears(sub.after)
    return bool(into and out) and into[0].out_features == 2 * out[0].in_features


def _is_gate(part: Elementwise, parts: Sequence[Part]) -> bool:
    """The product of an MLP's halves, which stands before the product out."""
    return part.kind == "multiply" and any(isinstance(later, Linear) for later in parts[list(parts).index(part) :])


def _packed(routed: Sequence[Linear]) -> bool:
    return routed[0].out_features == 2 * routed[-1].in_features


def _others(sub: Sublayer, letter: str) -> Mapping[str, tuple[int, ...]]:
    """Tensors of a branch's tables whose name begins with a letter."""
    parts = (*sub.before, *([sub.core] if sub.core else []), *sub.after)
    tables = [part for part in parts if not isinstance(part, Linear | Conv | Norm)]
    return {name: shape for part in tables for name, shape in part.tensors().items() if name.rpartition(".")[2].startswith(letter)}
