"""A whole pass: what goes in, the streams of blocks, heads and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lighten.cost.operators import Forward, rows_of
from lighten.cost.replay.blocks import Blocks
from lighten.cost.replay.habits import habits
from lighten.cost.replay.kernels import FLOAT32, INT64
from lighten.cost.replay.layout import Stream, has_rotary, linears, reads_source, streams
from lighten.cost.replay.tape import Tensor, weights_of
from lighten.cost.workload import Workload
from lighten.model.spec import Attention, Conv, Elementwise, Embedding, Linear, ModelSpec, Norm, Part, Scan, Table
from lighten.units import dtype_bytes


class Model(Blocks):
    """The modules of a model around its blocks."""

    def __init__(self, spec: ModelSpec, workload: Workload, forward: Forward) -> None:
        super().__init__(spec, workload, forward)
        self.streams = streams(spec)
        self.kept: list[Tensor] = []
        self.inputs = [self.hold(size) for size in self.input_bytes()]

    def input_bytes(self) -> list[int]:
        """Token ids, pixels or frames, and the tables that modules keep beside their weights: position and type ids, rotary frequencies, twice."""
        found = []
        for stream in self.streams:
            tables = [part for part in stream.before if isinstance(part, Embedding)]
            convs = [part for part in stream.before if isinstance(part, Conv)]
            if convs:
                found.append(self.pixels(convs[0]))
            if any(part.rows in ("token", "source") for part in tables) or (stream.rows == "token" and not convs):
                found.append(INT64 * self.forward.batch_size * self.tokens(stream))
            positions = sum(part.num_embeddings for part in tables if part.rows == "position" or isinstance(part.rows, int))
            types = len([part for part in tables if part.rows == "token"]) > 1
            found.append(INT64 * positions * (2 if types else 1) if positions and self.has_position_ids() else 0)
        heads = {(part.head_dim, part.rows) for part in self.spec.parts if isinstance(part, Attention)}
        return [*found, FLOAT32 * max(heads, key=lambda head: head[0])[0] if heads and has_rotary(self.spec.parts) else 0]

    def has_position_ids(self) -> bool:
        """Whether the embedding keeps numbers of positions as a buffer, as those do that came before rotary ones in encoders."""
        return not self.spec.is_decoder and not self.spec.is_encoder_decoder

    def tokens(self, stream: Stream) -> int:
        if stream.rows == "source":
            return self.forward.source_len
        generates = self.workload.phase == "generate" and not self.spec.is_encoder_decoder
        return self.workload.seq_len if generates else self.forward.query_len

    def pixels(self, part: Conv) -> int:
        """What the first convolution reads: patches that do not overlap, or one frame a row."""
        each = math.prod(part.kernel) if len(part.kernel) > 1 else 1
        rows = part.rows if isinstance(part.rows, int) else self.forward.source_len
        return round(self.batch * rows * part.in_channels * each * self.element)

    def fill_cache(self, positions: int) -> None:
        """Keys and values of so many positions, no more than a window's, and those of a source; a recurrence's states."""
        element = dtype_bytes(self.workload.kv_dtype or self.workload.dtype)
        for part in self.spec.parts:
            if isinstance(part, Attention) and part.cached and (part.causal or reads_source(part)):
                length = min(positions, (part.window - 1 if part.window and part.windowed_cache else positions))
                if reads_source(part):
                    length = 0 if self.forward.encodes else self.keys_of(part)
                if part.latent_dim is not None:
                    self.cache[part.name] = self.hold(self.batch * length * part.latent_dim * element, "kv_cache"), self.hold(0, "kv_cache")
                    continue
                each = self.batch * length * part.num_key_value_heads * element
                self.cache[part.name] = self.hold(each * part.head_dim, "kv_cache"), self.hold(each * part.value_dim, "kv_cache")
            elif isinstance(part, Scan) and positions:
                self.inputs.append(self.hold(self.batch * part.state_elements * self.element, "kv_cache"))

    def loss(self) -> Tensor:
        """Of the last stream's head: cross entropy, a pair's contrast, or the mean of the last hidden state where there is no head."""
        ends = self.run()
        if len(ends) > 1:
            return self.contrast([self.headed(stream, hidden) for stream, hidden in ends])
        ((stream, hidden),) = ends
        if not _head(stream):
            return self.mean(hidden)
        return self.cross_entropy(self.headed(stream, hidden), stream)

    def logits(self) -> None:
        _outputs = [(hidden, self.headed(stream, hidden)) for stream, hidden in self.run()]

    def run(self) -> list[tuple[Stream, Tensor]]:
        """The streams, each with its last hidden state; an encoder that a decoder reads is none of its own."""
        memory, ends = None, []
        reads = [any(isinstance(part, Attention) and reads_source(part) for part in stream.parts) for stream in self.streams]
        for i, stream in enumerate(self.streams):
            feeds = any(reads[i + 1 :])
            if feeds and not self.forward.encodes:
                memory = self.tensor(self.batch * self.length(stream) * _width(stream))
                self.kept.append(memory)
                continue
            hidden = self.body(stream, memory)
            if feeds:
                memory = hidden
                self.kept += [] if self.training else [hidden]  # as part of the output
            else:
                ends.append((stream, hidden))
        return ends

    def length(self, stream: Stream) -> int:
        if isinstance(stream.rows, int):
            return stream.rows
        return self.forward.source_len if stream.rows == "source" else self.forward.query_len

    def body(self, stream: Stream, memory: Tensor | None) -> Tensor:
        """A stream's last hidden state."""
        self.queries = self.length(stream)
        self.keys = self.forward.key_len if stream.rows == "token" else self.queries
        self.habits = habits(self.spec, stream.rows)
        embedded = self.embed(stream)
        self.shared = self.position_tables(stream)
        x = embedded  # which a variable holds to the end
        given = [memory] if memory is not None and any(isinstance(part, Attention) and reads_source(part) for part in stream.parts) else []
        for parts in stream.blocks:
            run = self.block(parts)
            x = self.checkpoint(run, x, *given) if self.workload.recompute == "full" else run(x, *given)
        self.shared = []
        self.bias = {}
        x = self.sequence([part for part in stream.after if part.component == "norm"], x)
        return self.dropout(x, self.habits.last_dropout)

    def embed(self, stream: Stream) -> Tensor:
        """The sum of what tables give, of convolutions and class tokens; normed, projected."""
        x: Tensor | None = None
        tables = [part for part in stream.before if isinstance(part, Embedding)]
        types = [self.tensor(self.queries, INT64)] if len(tables) > 1 else []  # token type ids, the same for all sequences
        rows = self.batch * self.queries
        late: list[Part] = []
        found = []
        for part in stream.before:
            if isinstance(part, Embedding):
                found.append(self.embedding(part, types))
            elif isinstance(part, Conv):
                x = self.convolved(part, x)
            elif isinstance(part, Norm | Linear) or (isinstance(part, Elementwise) and part.kind not in ("add", "multiply")):
                late.append(part)
        if x is not None and isinstance(late[0] if late else None, Elementwise):
            late.clear()  # the activations of convolutions
        table = next((part for part in stream.before if isinstance(part, Table)), None)
        if x is None and not any(part.rows in ("token", "source") for part in tables):  # it reads its encoder's table
            found.insert(0, self.record(rows * _width(stream), part=_shared_table(self.spec)))
        if x is not None:
            x = self.with_tokens(x, table, rows * _width(stream))
        elif self.habits.scaled_embedding:
            found[0] = self.scale(found[0])
        x, *others = [x, *found] if x is not None else found
        for other in others:
            x = self.add(x, other)
        x = self.sequence(late, x)
        return self.dropout(x, self.habits.embedding_dropout)

    def convolved(self, part: Conv, x: Tensor | None) -> Tensor:
        """A convolution of patches is all of it; one of frames has its activation."""
        if x is None:
            x = self.tensor(0)
            made = self.record(rows_of(part, self.forward) * part.out_channels, [], [x], part=part)
        else:
            made = self.conv(part, x)
        return self.kept_input(made) if len(part.kernel) == 1 else made

    def with_tokens(self, x: Tensor, table: Table | None, elements: int) -> Tensor:
        """Class tokens put before the patches: a copy; and positions added that are no embedding's."""
        weights = table.tensors() if table else {}
        if elements != x.elements:
            x = self.record(elements, [x], part={name: shape for name, shape in weights.items() if "position" not in name})
        positions = {name: shape for name, shape in weights.items() if "position" in name}
        return self.record(x.elements, [x], passes=True, part=positions) if positions else x

    def position_tables(self, stream: Stream) -> list[Tensor]:
        """What all blocks share: sines and cosines, their positions, the causal mask that eager attention adds to the scores, and biases."""
        own = [part for parts in stream.blocks for part in parts if isinstance(part, Attention)]
        if not own:
            return []
        part = own[0]
        rotary = has_rotary(stream.parts)
        tables = [self.tensor(2 * self.queries * part.head_dim), self.tensor(self.queries, INT64)] if rotary else []
        if part.causal and self.mode() == "eager":
            masks = len({each.window for each in own if each.causal})
            tables += [self.tensor(self.batch * self.queries * self.keys) for _ in range(masks)]
        self.bias = self.relative_bias(stream, own)
        return [*tables, *{id(bias): bias for bias in self.bias.values()}.values()]

    def relative_bias(self, stream: Stream, own: Sequence[Attention]) -> dict[str, Tensor]:
        """T5's: a value for each head and pair of positions, from a table of the stream's first block; zeros for a source's keys."""
        table = next((part for part in stream.parts if "relative_attention_bias" in part.name), None)
        if table is None:
            return {}
        found: dict[str, Tensor] = {}
        mine = self.record(
            own[0].num_attention_heads * self.queries * self.keys, part=table.tensors(), saved=[self.tensor(self.queries * self.keys, INT64)]
        )
        source = None
        for part in own:
            if reads_source(part) and source is None:
                source = self.tensor(part.num_attention_heads * self.queries * self.keys_of(part))
            found[part.name] = source if reads_source(part) and source is not None else mine
        return found

    def headed(self, stream: Stream, hidden: Tensor) -> Tensor:
        """What the parts behind the blocks make of the last hidden state."""
        self.habits = habits(self.spec, stream.rows)
        pooled = hidden
        capped = self.habits.logit_cap
        head = [part for part in stream.after if part.component != "norm" and not (capped and isinstance(part, Elementwise) and part.kind == "tanh")]
        if self.habits.scaled_logits and linears(head) and self.spec.is_encoder_decoder:
            pooled = self.scale(pooled)
        x = self.sequence(head, pooled)
        if not any(part.rows == "logits" or part.component == "head" for part in head):
            return x
        if capped:
            x = self.scale(x)
            x = self.kept_output(x)
            x = self.scale(x)
        if self.habits.biased_logits:
            x = self.record(x.elements, [x], passes=True)
        return self.cast(x, FLOAT32) if self.habits.float32_logits else x

    def cross_entropy(self, logits: Tensor, stream: Stream) -> Tensor:
        """Saves the log-probabilities, once, and the targets; causal models take it in float32."""
        wide = self.cast(logits, FLOAT32) if self.spec.is_decoder and self.habits.wide_loss else logits
        classes = [part for part in linears(stream.after) if part.component == "head"]
        rows = self.batch * self.queries if not classes or classes[-1].rows in ("token", "logits") else self.batch
        targets = self.tensor(rows, INT64)
        log_probabilities = self.tensor(wide.elements, wide.element)
        self.record(log_probabilities, [wide], [log_probabilities])
        return self.record(1, [log_probabilities], [log_probabilities, targets])

    def contrast(self, sides: Sequence[Tensor]) -> Tensor:
        """CLIP's: each side's vectors scaled to length 1, and the products of all pairs, compared along rows and columns."""
        unit = [self.record(x.elements, [x], [x]) for x in sides]
        scores = self.product(unit[0], unit[-1], self.batch * self.batch)
        return self.record(1, [scores], [scores])


def _head(stream: Stream) -> list[Part]:
    return [part for part in stream.after if part.component == "head"]


def _width(stream: Stream) -> int:
    """Values of a hidden state."""
    sizes = [part.in_features for parts in stream.blocks for part in parts if isinstance(part, Linear)]
    norms = [part.size for parts in stream.blocks for part in parts if isinstance(part, Norm)]
    return next(iter(sizes or norms), 0)


def _shared_table(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The weight of an embedding that encoder and decoder have in common."""
    part = next((part for part in spec.parts if isinstance(part, Embedding)), None)
    return weights_of(part)
