"""Attention in its forms: projections of their own or fused, eager, in one kernel, or as SDPA does it where no kernel will."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.cost.operators import Forward
from lighten.cost.replay.kernels import FLOAT32, Kernels
from lighten.cost.replay.layout import Sublayer, chains, has_rotary, linears, reads_source
from lighten.cost.replay.tape import Storage, Tensor
from lighten.cost.workload import Workload
from lighten.model.spec import Attention, Elementwise, Linear, ModelSpec, Norm, Part
from lighten.units import dtype_bytes


class Attentions(Kernels):
    """Attention's branch of a block.

    Attributes:
        cache: attention's name → stored keys and values, those of a source too.
        bias: relative positions' share of the scores, which a stream's blocks have in common.
        stored_as: part's name → names and shapes of the parameters that hold it, where these are not its own.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, forward: Forward) -> None:
        super().__init__(spec, workload, forward)
        self.cache: dict[str, tuple[Storage, Storage]] = {}
        self.bias: dict[str, Tensor] = {}
        self.stored_as: dict[str, dict[str, tuple[int, ...]]] = {}

    def sequence(self, parts: Sequence[Part], x: Tensor) -> Tensor:
        for part in parts:
            if isinstance(part, Linear):
                x = self.linear(part, x)
            elif isinstance(part, Norm):
                x = self.norm(part, x)
            elif isinstance(part, Elementwise) and part.kind not in ("add", "multiply", "rotary", "softmax"):
                x = self.activate(part, x)
            elif isinstance(part, Elementwise) and part.kind == "multiply":  # by a vector of its own, or a gate
                x = self.record(x.elements, [x], [x], scratch=x.bytes)
        return x

    def attention(self, sub: Sublayer, x: Tensor, memory: Tensor | None, after: Sequence[Part] = ()) -> tuple[Tensor, Tensor | None]:
        """What attention makes of its input, and the probabilities where they exist; `after`: what its module ends with."""
        part = sub.core
        assert isinstance(part, Attention)
        q, k, v = self.projected(sub, part, x, memory)
        keys = self.keys_of(part)
        if part.name in self.cache:
            k, v = self.append(part, k, v, keys)
        bias = self.bias.get(part.name)
        if self.recording and self.workload.recompute == "selective":
            read = [q, k, v] if bias is None else [q, k, v, bias]
            out, probabilities = self.checkpoint(lambda *again: self.core(part, keys, *again)[0], *read), None
        else:
            out, probabilities = self.core(part, keys, q, k, v, bias)
        return self.sequence(after, out) if after else out, probabilities

    def core(self, part: Attention, keys: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """From queries, keys and values to their output, and the probabilities where they exist."""
        if self.one_kernel(part):
            out = self.fused(part, q, k, v, self.lay_out(bias) if bias is not None else None)
            return self.join_heads(out, part.num_attention_heads) if self.habits.contiguous_heads else out, None
        if self.mode() == "eager":
            return self.eager(part, q, k, v, keys, bias)
        return self.join_heads(self.unfused(part, q, k, v, keys, bias), part.num_attention_heads), None

    def mode(self) -> str:
        """How the stream computes attention: what is asked for, but eager where no kernel has it."""
        return self.workload.attention if self.habits.fused_attention else "eager"

    def one_kernel(self, part: Attention) -> bool:
        mode, drops = self.mode(), self.training and self.habits.attention_dropout > 0
        return mode == "flash" or (mode == "sdpa" and not drops and not (part.name in self.bias and self.training))

    def keys_of(self, part: Attention) -> int:
        """Positions that its keys have; of those in a cache no more than the window."""
        if part.window is not None and part.windowed_cache and part.name in self.cache and self.queries < self.keys:
            return min(self.keys, part.window - 1 + self.queries)
        return self.forward.source_len if part.keys == "source" else part.keys if isinstance(part.keys, int) else self.keys

    def projected(self, sub: Sublayer, part: Attention, x: Tensor, memory: Tensor | None) -> list[Tensor]:
        """Queries, keys and values by head, rotated; those of a source from its encoder's output, or from the cache alone."""
        rotary, apart = has_rotary(sub.before), self.one_kernel(part)
        strided = (not apart or rotary, not apart or rotary, not apart)
        heads = part.num_attention_heads, part.num_key_value_heads, part.num_key_value_heads
        found = chains(sub.before)
        if reads_source(part) and not self.forward.encodes:
            q = self.heads(self.sequence(found[0], x), heads[0], strided=strided[0], queries=True)
            return [q, q, q]  # its keys and values stand in the cache
        if len(found) == 3:
            inputs = (x, memory or x, memory or x) if reads_source(part) else (x, x, x)
            states = [
                self.heads(self.sequence(chain, source), count, strided=gradient, queries=i == 0)
                for i, (chain, source, count, gradient) in enumerate(zip(found, inputs, heads, strided, strict=True))
            ]
        else:
            states = self.unpacked(part, found, x, memory if reads_source(part) else None)
        if rotary:
            states[:2] = self.rotate(states[0]), self.rotate(states[1])
        return states

    def heads(self, x: Tensor, count: int, *, strided: bool, queries: bool) -> Tensor:
        if queries and self.habits.scaled_queries:
            x = self.scale(x)
        x = self.split_heads(x, count, strided=strided and not self.habits.contiguous_heads)
        return self.lay_out(x) if self.habits.contiguous_heads and count > 1 and self.queries > 1 else x

    def unpacked(self, part: Attention, found: Sequence[Sequence[Part]], x: Tensor, memory: Tensor | None) -> list[Tensor]:
        """From one product (GPT-2) or two (latent attention: queries; keys and values from what is cached)."""
        q, k, v = (
            part.num_attention_heads * part.head_dim,
            part.num_key_value_heads * part.head_dim,
            part.num_key_value_heads * part.value_dim,
        )
        made = [self.sequence(chain, memory if memory is not None and i else x) for i, chain in enumerate(found)]
        if len(made) == 1:
            return self.split(made[0], q, k, v)
        if len(made) == 2:
            return [made[0], *self.split(made[1], k, v)]
        whole = self.tensor(x.elements // max(1, _width(found)) * (q + k + v))
        return self.split(self.record(whole, [x], [x]), q, k, v)

    def append(self, part: Attention, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The cache with the new keys and values: a copy, after which the old one goes. A source's are stored once."""
        element = dtype_bytes(self.workload.kv_dtype or self.workload.dtype)
        keys, values = self.cache.pop(part.name)
        if part.latent_dim is not None:
            return self.append_latent(part, k, v, length)
        if not reads_source(part) or self.forward.encodes:
            each = self.batch * length * part.num_key_value_heads
            keys = self.hold(each * part.head_dim * element, "kv_cache")
            values = self.hold(each * part.value_dim * element, "kv_cache")
        self.cache[part.name] = keys, values
        return (
            Tensor(storage=keys, elements=round(keys.size / element), element=element),
            Tensor(storage=values, elements=round(values.size / element), element=element),
        )

    def append_latent(self, part: Attention, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The latent of all positions is cached, and keys and values of all of them are made from it in each step."""
        element = dtype_bytes(self.workload.kv_dtype or self.workload.dtype)
        assert part.latent_dim is not None
        self.cache[part.name] = self.hold(self.batch * length * part.latent_dim * element, "kv_cache"), self.hold(0, "kv_cache")
        if length == self.queries:
            return k, v
        each = self.batch * length * part.num_attention_heads
        _expanded = self.tensor(each * (part.head_dim + part.value_dim))  # of which the keys' part is joined with their positions'
        return self.tensor(each * part.head_dim), self.tensor(each * part.value_dim)

    def fused(self, part: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Saves its inputs, its output and a float32 logarithm of each row's sum; no scores."""
        out = self.tensor(q.elements // part.head_dim * part.value_dim)
        sums = self.tensor(self.batch * part.num_attention_heads * self.queries, FLOAT32)
        return self.record(out, [q, k, v], [q, k, v, out, sums, *([mask] if mask else [])])

    def eager(self, part: Attention, q: Tensor, k: Tensor, v: Tensor, keys: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B·H·Q·K scores, in several copies: saves the softmax's output and, where that is another tensor, what multiplies the values."""
        heads, out_elements = part.num_attention_heads, q.elements // part.head_dim * part.value_dim
        k, v = self.repeat_heads(part, k), self.repeat_heads(part, v)
        own = self.habits.contiguous_heads
        head_major = own or heads != part.num_key_value_heads or part.name in self.cache
        scores = self.product(
            self.as_matrices(q, heads, head_major=own),
            self.repeated_matrices(part, k, head_major=head_major),
            self.batch * heads * self.queries * keys,
        )
        scores = self.scale(scores)
        if self.habits.score_cap:
            scores = self.scale(scores)
            scores = self.kept_output(scores)
            scores = self.scale(scores)
        if bias is not None:
            scores = self.add(scores, self.spread(bias))
        if part.causal:  # the mask
            scores = self.record(scores.elements, [scores], passes=True)
        wide = FLOAT32 if part.causal and self.habits.wide_softmax else self.element
        scores = self.cast(self.softmax(self.cast(scores, wide)), self.element)
        scores = self.dropout(scores, self.habits.attention_dropout)
        out = self.product(scores, self.repeated_matrices(part, v, head_major=head_major), out_elements)
        return self.join_heads(out, heads), scores

    def unfused(self, part: Attention, q: Tensor, k: Tensor, v: Tensor, keys: int, bias: Tensor | None = None) -> Tensor:
        """What SDPA does where no fused kernel will: float32 throughout, queries and keys scaled before their product."""
        heads, times = part.num_attention_heads, part.num_attention_heads // part.num_key_value_heads
        wide, out_elements = max(FLOAT32, self.element), q.elements // part.head_dim * part.value_dim
        q, k, v = self.cast(q, wide), self.cast(k, wide), self.cast(v, wide)
        if times > 1:
            k, v = self.record(k.elements * times, [k]), self.record(v.elements * times, [v])
        scaled = self.scale(q)
        scores = self.product(
            self.as_matrices(scaled, heads),
            self.as_matrices(self.scale(k), heads, head_major=times > 1),
            self.batch * heads * self.queries * keys,
        )
        if bias is not None:
            scores = self.record(scores, [self.lay_out(self.spread(bias))], passes=True)
        scores = self.softmax(scores)
        scores = self.dropout(scores, self.habits.attention_dropout)
        _narrow = self.hold(scores.elements * self.element if wide != self.element else 0)  # returned beside the output
        return self.cast(self.product(scores, self.as_matrices(v, heads, head_major=times > 1), out_elements), self.element)


def _width(found: Sequence[Sequence[Part]]) -> int:
    return next((part.in_features for chain in found for part in linears(chain)), 1)
