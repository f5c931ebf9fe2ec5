"""ModelSpec × Workload → the bytes that live at the fullest moment, from shapes alone.

Memory is the highest sum of live tensor bytes. What lives depends on what each operator saves for its backward pass and on how long
the program refers to a tensor, so the pass is *replayed* on tensors that have a size and nothing else. The functions below read like
the modules of `transformers`; a tensor lives as long as a variable or a saved reference holds it (CPython's reference counts, on
which PyTorch relies too); backward runs over the recorded operators in reverse. What an operator makes, saves and needs beside that is
one closed form in these shapes, stated where the operator is:

    B batch_size, Q query positions, K key positions, H attention heads, G key/value heads, D head_dim, V vocabulary,
    I in_features, O out_features, e bytes of one element of `Workload.dtype`

Held against the life of every storage in transformers 5.23 and torch 2.13 on CPU (tests/live_bytes.py, tests/test_memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby
from typing import Literal, TypeAlias

from lighten.cost.operators import Forward, rows_of
from lighten.cost.workload import OPTIMIZER_STATE, Workload, check_workload
from lighten.errors import WorkloadError
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, ModelSpec, Norm, Part, block_name, part_weight_bytes
from lighten.units import dtype_bytes

Kind: TypeAlias = Literal["gradients", "activations", "kv_cache", "temporary"]

POST_NORM = frozenset({"bert"})
"""Families whose norm follows the residual addition; in the others it precedes the sublayer."""
OPTIMIZER_SCRATCH = {
    "adamw": (2, 1), "adam": (2, 1), "adagrad": (1, 1), "rmsprop": (1, 1), "lion": (3, 1), "sgd": (0, 0), "sgd-momentum": (0, 0),
}  # fmt: skip
"""Optimizer → copies of a parameter that its update makes, and of the parameter before it that a variable still holds. Source: the
`_single_tensor_*` functions of torch.optim (square root and denominator of Adam); Lion: the listing in arXiv:2302.06675, not measured."""
STEP_COUNTERS = frozenset({"adamw", "adam", "adagrad", "rmsprop"})
"""Optimizers that keep a float32 step count for each parameter."""
ACTIVATIONS = frozenset({"gelu", "silu", "relu", "tanh"})
FLOAT32 = 4
INT64 = 8


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """Bytes at the fullest moment, by what holds them. None: not known.

    Attributes:
        weights: as stored: quantized weights in their format, all others in the workload's type.
        gradients: of the parameters.
        optimizer: its state.
        activations: what the forward pass made and still holds, for the backward pass or for itself; inputs and position tables.
        kv_cache: keys and values; while a cache grows by copying, one layer's old copy too.
        temporary: gradients of activations and what an operator or the optimizer needs while it works.
        overhead: the runtime's context and its allocator's slack: measured, never derived.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    kv_cache: int
    temporary: int
    overhead: int | None = None

    @property
    def peak(self) -> int:
        """The sum of what is known."""
        return sum(getattr(self, part.name) or 0 for part in fields(self))

    def fits(self, capacity_bytes: int) -> bool | None:
        """True or False where that is certain; None where an unknown part decides.

        >>> MemoryBreakdown(weights=8, gradients=0, optimizer=0, activations=1, kv_cache=0, temporary=0, overhead=1).fits(10)
        True
        """
        if self.peak > capacity_bytes:
            return False
        unknown = any(getattr(self, part.name) is None for part in fields(self))
        return None if unknown else True


def kv_cache_bytes(spec: ModelSpec, *, batch_size: int, context_len: int, dtype: str) -> int:
    """Bytes that the key and value caches of all layers hold.

        Σ over layers of 2 · B · context_len · G · D · bytes of an element

    Counts the stored keys and values alone: not a paged allocator's table, nor a quantized cache's scales.

    Source: Shazeer 2019 (arXiv:1911.02150), for fewer key/value heads than query heads; checked against a real cache in
    tests/test_memory.py.
    """
    widths = sum(part.num_key_value_heads * part.head_dim for part in spec.parts if isinstance(part, Attention) and part.causal)
    return round(2 * batch_size * context_len * widths * dtype_bytes(dtype))


def workload_memory(spec: ModelSpec, workload: Workload) -> MemoryBreakdown:
    """Memory of a workload as PyTorch runs it eagerly on a CPU, within 1 % of the live bytes of `transformers`' own BERT and Llama.

    encode and prefill are one forward pass, logits at every position, without a cache. decode is its last step: the cache is a
    `DynamicCache` and grows by a copy of one layer's keys, then values. generate is the fuller of two: a prefill that fills the cache
    and gives the first token, with logits at the last position, and the last of the steps that follow. A training step is any but the
    first, since the optimizer's state exists; its loss is the head's cross entropy, or the mean of the last hidden state where there is
    no head. Only the loss is kept of the model's output; gradients are freed after the step. Inputs have no padding, so that no mask
    of theirs exists.

    Three things are the CPU's: dropout keeps its noise in the activations' type (CUDA's kernel keeps 1 byte an element);
    `attention="sdpa"` with attention dropout builds the score matrix, in float32 ("flash" never does); the optimizer updates one
    parameter after the other (CUDA's default makes the scratch of all of them at once).

    Not covered: what a kernel takes and frees inside itself, dequantized copies of quantized weights, the sampling and beams of
    `generate`, autocast, question answering's two losses (one is counted). Recomputation of BERT counts one bias too many.

    Raises:
        WorkloadError: the phase does not fit the model, or selective recomputation is asked for.
    """
    check_workload(spec, workload)
    if workload.recompute == "selective":
        raise WorkloadError("recompute=selective is not described, for what it keeps differs between frameworks; described: none, full.")
    if workload.phase == "train":
        return _training(spec, workload)
    stored = sum(_inference_bytes(part, workload.dtype) for part in spec.parts)
    moments = [_inference(spec, workload, forward, cached) for forward, cached in _forwards(workload)]
    return _breakdown(max(moments, key=lambda ledger: ledger.peak), weights=stored)


def _forwards(workload: Workload) -> list[tuple[Forward, int | None]]:
    """The forward passes that can be the fullest, each with the positions that its cache held before; None: no cache."""
    batch, prompt, generates = workload.batch_size, workload.seq_len, workload.phase == "generate"
    steps = workload.new_tokens - generates  # the prefill of a generation gives its first token
    whole = Forward(batch_size=batch, query_len=prompt, key_len=prompt, last_logits_only=generates)
    last_step = Forward(batch_size=batch, query_len=1, key_len=prompt + steps, last_logits_only=True)
    passes: list[tuple[Forward, int | None]] = []
    if workload.phase != "decode":
        passes.append((whole, 0 if generates else None))
    if steps > 0:
        passes.append((last_step, prompt + steps - 1))
    return passes


def _inference_bytes(part: Part, dtype: str) -> int:
    quantized = isinstance(part, Linear | Embedding) and part.weight.bits is not None
    return part_weight_bytes(part, dtype) if quantized else _elements(part.tensors().values(), dtype_bytes(dtype))


def _elements(shapes: Iterable[tuple[int, ...]], size: float = 1) -> int:
    return round(sum(math.prod(shape) for shape in shapes) * size)


def _inference(spec: ModelSpec, workload: Workload, forward: Forward, cached: int | None) -> _Ledger:
    model = _Model(spec, workload, forward)
    if cached is not None:
        model.fill_cache(cached)
    model.logits()
    return model.ledger


def _training(spec: ModelSpec, workload: Workload) -> MemoryBreakdown:
    length = workload.seq_len
    model = _Model(spec, workload, Forward(batch_size=workload.batch_size, query_len=length, key_len=length))
    loss = model.loss()  # alive to the end of the step
    model.backward(loss)
    trained = [name for part in spec.parts for name in part.tensors() if name in model.gradients]  # a pooler without a loss gets none
    sizes = [model.gradients[name].size for name in trained]
    optimizer = workload.optimizer or ""
    made, held = OPTIMIZER_SCRATCH[optimizer]
    _update = model.hold(max(made * size + held * before for size, before in zip(sizes, [0, *sizes], strict=False)), "temporary")
    counters = FLOAT32 * len(sizes) if optimizer in STEP_COUNTERS else 0
    weights = sum(_elements(part.tensors().values(), dtype_bytes(workload.dtype)) for part in spec.parts)
    return _breakdown(model.ledger, weights=weights, optimizer=OPTIMIZER_STATE[optimizer] * sum(sizes) + counters)


def _breakdown(ledger: _Ledger, *, weights: int, optimizer: int = 0) -> MemoryBreakdown:
    return MemoryBreakdown(weights=weights, optimizer=optimizer, **ledger.fullest)


class _Ledger:
    """What lives now, by kind, and what lived at the fullest moment."""

    def __init__(self) -> None:
        self.live: dict[Kind, int] = {"gradients": 0, "activations": 0, "kv_cache": 0, "temporary": 0}
        self.fullest = dict(self.live)
        self.now = self.peak = 0

    def count(self, size: int, kind: Kind) -> None:
        self.live[kind] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.fullest = self.now, dict(self.live)


class _Storage:
    """Bytes that are counted until the last reference to them goes."""

    __slots__ = ("_kind", "_ledger", "size")

    def __init__(self, ledger: _Ledger, size: int, kind: Kind) -> None:
        self._ledger, self.size, self._kind = ledger, size, kind
        ledger.count(size, kind)

    def __del__(self) -> None:
        self._ledger.count(-self.size, self._kind)


class _Edge:
    """Where the gradient of one tensor gathers."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        self.gradient: _Storage | None = None

    def add(self, gradient: _Storage) -> None:
        """A second gradient is added to the first in place, and goes."""
        self.gradient = self.gradient or gradient


@dataclass(kw_only=True)
class _Tensor:
    """A storage, how many elements of which size it shows, and where its gradient goes."""

    storage: _Storage
    elements: int
    element: float
    edge: _Edge = field(default_factory=_Edge)

    @property
    def bytes(self) -> int:
        return round(self.elements * self.element)


@dataclass(kw_only=True)
class _Node:
    """One operator of the backward pass.

    Attributes:
        out: whose gradient it takes.
        inputs: which gradients it makes, and of how many bytes.
        saved: what it needs from the forward pass, freed when it is done.
        weights: names and shapes of the parameters whose gradients it makes.
        scratch: bytes that it needs while it works.
        passes: it makes no gradient but hands on the one it takes.
        recompute: the forward pass to replay first, which saves `recompute_saves` times.
    """

    out: _Edge
    inputs: list[tuple[_Edge, int]]
    saved: tuple[_Tensor, ...] = ()
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scratch: int = 0
    passes: bool = False
    recompute: Callable[[_Tensor], _Tensor] | None = None
    recompute_saves: int = 0


class _Tape:
    """Tensors of sizes alone, and the operators that autograd recorded."""

    def __init__(self, dtype: str, *, training: bool) -> None:
        self.ledger = _Ledger()
        self.gradients: dict[str, _Storage] = {}
        self.element = dtype_bytes(dtype)
        self.training = self.recording = training
        self.nodes: list[_Node] = []
        self.shared: list[_Tensor] = []
        self.saves = self.last_save = 0

    def hold(self, size: float, kind: Kind = "activations") -> _Storage:
        stopped = self.saves == self.last_save > 0  # in a recomputation, after its last save
        return _Storage(self.ledger, 0 if stopped else round(size), kind)

    def tensor(self, elements: int, element: float | None = None) -> _Tensor:
        element = element or self.element
        return _Tensor(storage=self.hold(elements * element), elements=elements, element=element)

    def record(
        self, out: _Tensor | int, inputs: Sequence[_Tensor] = (), saved: Sequence[_Tensor] = (), *,
        part: Part | None = None, scratch: int = 0, passes: bool = False,
    ) -> _Tensor:  # fmt: skip
        """Note what an operator's backward pass takes, and return `out`; a number of elements is made here, after the inputs are saved."""
        self.saves += bool(saved)
        if isinstance(out, int):
            out = self.tensor(out, inputs[0].element if inputs else None)
        if self.recording:
            made = [(x.edge, x.bytes) for x in inputs]
            self.nodes.append(_Node(out=out.edge, inputs=made, saved=tuple(saved), weights=_weights(part), scratch=scratch, passes=passes))
        return out

    def checkpoint(self, run: Callable[[_Tensor], _Tensor], x: _Tensor) -> _Tensor:
        """Run without a record; backward runs again with one. The input is kept, and what all blocks share."""
        self.recording, self.saves = False, 0
        made = run(x)
        self.recording = True
        out = _Tensor(storage=made.storage, elements=made.elements, element=made.element)
        kept = (x, *self.shared)
        self.nodes.append(_Node(out=out.edge, inputs=[(x.edge, x.bytes)], saved=kept, recompute=run, recompute_saves=self.saves))
        return out

    def backward(self, loss: _Tensor) -> None:
        root = loss.edge.gradient = self.hold(loss.bytes, "temporary")
        self._unwind(loss.edge)
        del root  # which the caller of autograd holds

    def _unwind(self, last: _Edge) -> None:
        needed, reached = {last}, []
        while self.nodes:  # what the loss does not depend on is freed before the first gradient
            node = self.nodes.pop()
            if node.out in needed:
                needed.update(edge for edge, _ in node.inputs)
                reached.append(node)
        del node
        for node in reached:
            (self._recompute if node.recompute else self._step)(node)

    def _step(self, node: _Node) -> None:
        gradient, node.out.gradient = node.out.gradient, None
        assert gradient is not None
        scratch, second = self.hold(node.scratch, "temporary"), []
        for name, shape in node.weights.items():
            made = [self.hold(math.prod(shape) * self.element, "gradients")]
            if name in self.gradients:
                second += made
            else:
                self.gradients[name] = made.pop()
        passed = [gradient if node.passes else self.hold(size, "temporary") for _, size in node.inputs]
        node.saved = ()
        del scratch, gradient
        for (edge, _), new in zip(node.inputs, passed, strict=True):
            edge.add(new)
        _sums = [self.hold(table.size, "gradients") for table in second]  # of a tied table's two gradients: not in place

    def _recompute(self, node: _Node) -> None:
        """Replay up to the last operator that saves something, as torch.utils.checkpoint does; nothing after that is counted."""
        assert node.recompute is not None
        kept, *self.shared = node.saved
        x = _Tensor(storage=kept.storage, elements=kept.elements, element=kept.element)
        start, ((edge, _),) = x.edge, node.inputs
        node.saved = ()
        del kept
        self.saves, self.last_save = 0, node.recompute_saves
        last = node.recompute(x).edge
        self.last_save = 0
        del x
        last.gradient, node.out.gradient = node.out.gradient, None
        self._unwind(last)
        self.shared = []
        assert start.gradient is not None
        edge.add(start.gradient)


def _weights(part: Part | None) -> dict[str, tuple[int, ...]]:
    """Parameters that a part computes with: its own, and the embedding's that it is tied to."""
    if part is None:
        return {}
    if isinstance(part, Linear) and part.tied_to:
        return part.tensors() | {f"{part.tied_to}.weight": (part.out_features, part.in_features)}
    return part.tensors()


class _Operators(_Tape):
    """Each operator's closed form: what it makes, what it saves, what its backward pass makes."""

    def __init__(self, spec: ModelSpec, workload: Workload, forward: Forward) -> None:
        super().__init__(workload.dtype, training=workload.phase == "train")
        self.spec, self.workload, self.forward = spec, workload, forward
        self.batch, self.queries, self.keys = forward.batch_size, forward.query_len, forward.key_len
        self.post_norm = spec.family in POST_NORM

    def linear(self, part: Linear, x: _Tensor) -> _Tensor:
        """rows · O; saves x for the weight's gradient."""
        return self.record(rows_of(part, self.forward) * part.out_features, [x], [x], part=part)

    def embedding(self, part: Embedding, indices: Sequence[_Tensor]) -> _Tensor:
        """rows · dim; backward makes a whole table, and first sums what positions share over the batch."""
        out = self.tensor(rows_of(part, self.forward) * part.embedding_dim)
        return self.record(out, saved=indices, part=part, scratch=out.bytes if part.rows == "position" else 0)

    def norm(self, part: Norm, x: _Tensor) -> _Tensor:
        return self.layernorm(part, x) if part.kind == "layernorm" else self.rmsnorm(part, x)

    def layernorm(self, part: Norm, x: _Tensor) -> _Tensor:
        """One kernel: saves its input, and mean and deviation of each row."""
        out, statistics = self.tensor(x.elements), self.tensor(2 * x.elements // part.size)
        return self.record(out, [x], [x, statistics], part=part)

    def rmsnorm(self, part: Norm, x: _Tensor) -> _Tensor:
        """Written out in float32, so autograd saves the input (twice the size of a bfloat16 one), the root and the normed value."""
        wide = self.cast(x, FLOAT32)
        square = self.hold(wide.bytes)
        root = self.record(wide.elements // part.size, [wide], [wide], scratch=3 * wide.bytes)  # expanded gradient, power, their product
        del square
        normed = self.record(wide.elements, [wide, root], [wide, root], scratch=wide.bytes)  # the root's gradient before it is summed
        normed = self.cast(normed, self.element)
        return self.record(x.elements, [normed], [normed], part=part, scratch=x.bytes)  # so the weight's

    def cast(self, x: _Tensor, element: float) -> _Tensor:
        return x if x.element == element else self.record(self.tensor(x.elements, element), [x])

    def add(self, x: _Tensor, y: _Tensor) -> _Tensor:
        """Saves nothing; both get the same gradient."""
        return self.record(max(x.elements, y.elements), [x, y], passes=True)

    def multiply(self, x: _Tensor, y: _Tensor) -> _Tensor:
        return self.record(x.elements, [x, y], [x, y])

    def activate(self, part: Elementwise, x: _Tensor) -> _Tensor:
        """GELU and SiLU save their input, ReLU and tanh their output."""
        if part.kind == "gelu" and self.spec.config.get("hidden_act") == "gelu_new":
            return self.gelu_new(x)
        out = self.tensor(x.elements)
        return self.record(out, [x], [out if part.kind in ("relu", "tanh") else x])

    def gelu_new(self, x: _Tensor) -> _Tensor:
        """½x · (1 + tanh(c · (x + a·x³))), written out."""
        half = self.scale(x)
        inner = self.scale(self.add(x, self.scale(self.record(x.elements, [x], [x], scratch=2 * x.bytes))))
        tanh = self.tensor(x.elements)
        self.record(tanh, [inner], [tanh])
        del inner
        shifted = self.record(x.elements, [tanh], passes=True)
        del tanh
        return self.multiply(half, shifted)

    def dropout(self, x: _Tensor, probability: float) -> _Tensor:
        """Saves the noise that it multiplied with."""
        if not (self.training and probability):
            return x
        noise = self.tensor(x.elements, x.element)
        return self.record(x.elements, [x], [noise])

    def scale(self, x: _Tensor) -> _Tensor:
        """A product with a number saves nothing, but its gradient is a new tensor."""
        return self.record(x.elements, [x])

    def softmax(self, x: _Tensor) -> _Tensor:
        out = self.tensor(x.elements, x.element)
        return self.record(out, [x], [out])

    def product(self, x: _Tensor, y: _Tensor, elements: int) -> _Tensor:
        """Of batches of matrices: saves both."""
        return self.record(elements, [x, y], [x, y])

    def rotate(self, x: _Tensor) -> _Tensor:
        """x·cos + rotate_half(x)·sin, where sine and cosine need no gradient: saves them alone."""
        cosine_part, halves = self.hold(x.bytes), self.hold(x.bytes)
        sine_part = self.hold(x.bytes)
        del halves
        out = self.record(x.elements, [x], self.shared[:1], scratch=2 * x.bytes)
        del cosine_part, sine_part
        return out

    def split_heads(self, x: _Tensor, heads: int, *, strided: bool) -> _Tensor:
        """[B, Q, H·D] seen as [B, H, Q, D]. Backward lays a strided gradient out anew for the linear before."""
        view = _Tensor(storage=x.storage, elements=x.elements, element=x.element)
        return self.record(view, [x], passes=not (strided and self.queries > 1 and heads > 1))

    def join_heads(self, x: _Tensor, heads: int) -> _Tensor:
        """[B, H, Q, D] laid out as [B, Q, H·D]."""
        if self.queries == 1 or heads == 1:
            return x
        return self.record(x.elements, [x], passes=self.batch == 1)

    def as_matrices(self, x: _Tensor, heads: int, *, head_major: bool = False) -> _Tensor:
        """[B, H, Q, D] as B·H matrices: a copy where the positions lie between batch and heads."""
        if head_major or self.batch == 1 or self.queries == 1 or heads == 1:
            return x
        return self.record(x.elements, [x], passes=True)

    def repeat_heads(self, part: Attention, x: _Tensor) -> _Tensor:
        """Each key/value head once for each of its query heads: a copy, unless there is but one head and one sequence to see again."""
        times = part.num_attention_heads // part.num_key_value_heads
        if times == 1:
            return x
        again = self.batch == 1 and part.num_key_value_heads == 1
        return self.record(_Tensor(storage=x.storage, elements=x.elements * times, element=x.element) if again else x.elements * times, [x])

    def cross_entropy(self, logits: _Tensor) -> _Tensor:
        """Saves the log-probabilities, once, and the targets; causal models take it in float32."""
        wide = self.cast(logits, FLOAT32) if self.spec.is_decoder else logits
        rows = self.batch * self.queries
        targets = self.tensor(rows, INT64)
        log_probabilities = self.tensor(wide.elements, wide.element)
        self.record(log_probabilities, [wide], [log_probabilities])
        return self.record(1, [log_probabilities], [log_probabilities, targets])

    def mean(self, x: _Tensor) -> _Tensor:
        return self.record(1, [x])


class _Model(_Operators):
    """The modules. Each function's variables are those that hold tensors in the `forward` of `transformers`' module."""

    def __init__(self, spec: ModelSpec, workload: Workload, forward: Forward) -> None:
        super().__init__(spec, workload, forward)
        default = 0.1 if self.post_norm else 0.0  # BertConfig's and LlamaConfig's
        self.hidden_dropout = float(spec.config.get("hidden_dropout_prob", default))
        self.attention_dropout = float(spec.config.get("attention_probs_dropout_prob", spec.config.get("attention_dropout", default)))
        self.cache: dict[str, tuple[_Storage, _Storage]] = {}
        self.inputs = [self.hold(size) for size in _input_bytes(spec, workload, forward)]
        groups = [(block, tuple(parts)) for block, parts in groupby(spec.parts, key=block_name)]
        self.blocks = [parts for block, parts in groups if block]
        outside = [parts for block, parts in groups if not block]
        self.embeddings = outside[0]
        tail = outside[1] if len(outside) > 1 else ()
        self.final = [part for part in tail if part.component == "norm"]
        self.pooler = [part for part in tail if part.component == "pooler"]
        self.head = [part for part in tail if part.component not in ("norm", "pooler")]

    def fill_cache(self, positions: int) -> None:
        element = dtype_bytes(self.workload.kv_dtype or self.workload.dtype)
        for part in self.spec.parts:
            if isinstance(part, Attention):
                size = self.batch * positions * part.num_key_value_heads * part.head_dim * element
                self.cache[part.name] = self.hold(size, "kv_cache"), self.hold(size, "kv_cache")

    def loss(self) -> _Tensor:
        hidden, pooled = self.body()
        if not self.head:
            return self.mean(hidden)
        return self.cross_entropy(self.sequence(self.head, pooled or hidden))

    def logits(self) -> None:
        hidden, pooled = self.body()
        self.sequence(self.head, pooled or hidden)

    def body(self) -> tuple[_Tensor, _Tensor | None]:
        """The last hidden state, and what the pooler makes of it."""
        embedded = self.embed()
        self.shared = self.position_tables()
        x = embedded  # which a variable holds to the end
        for parts in self.blocks:
            block = partial(self.post_norm_block if self.post_norm else self.pre_norm_block, parts)
            x = self.checkpoint(block, x) if self.workload.recompute == "full" else block(x)
        x = self.sequence(self.final, x)
        pooled = self.sequence(self.pooler, x) if self.pooler else None
        self.shared = []
        return x, pooled

    def embed(self) -> _Tensor:
        tables = [part for part in self.embeddings if isinstance(part, Embedding)]
        types = [self.tensor(self.queries, INT64)] if len(tables) > 1 else []  # token type ids, the same for all sequences
        found = [self.embedding(part, types) for part in tables]
        x = found[0]
        for other in found[1:]:
            x = self.add(x, other)
        x = self.sequence([part for part in self.embeddings if isinstance(part, Norm)], x)
        return self.dropout(x, self.hidden_dropout)

    def position_tables(self) -> list[_Tensor]:
        """What all blocks share: sines and cosines, their positions, and the causal mask that eager attention adds to the scores."""
        part = next(part for part in self.spec.parts if isinstance(part, Attention))
        tables = [self.tensor(2 * self.queries * part.head_dim), self.tensor(self.queries, INT64)] if _rotary(self.spec.parts) else []
        if part.causal and self.workload.attention == "eager":
            tables.append(self.tensor(self.batch * self.queries * self.keys))
        return tables

    def sequence(self, parts: Iterable[Part], x: _Tensor) -> _Tensor:
        for part in parts:
            if isinstance(part, Linear):
                x = self.linear(part, x)
            elif isinstance(part, Norm):
                x = self.norm(part, x)
            elif isinstance(part, Elementwise):
                x = self.activate(part, x)
        return x

    def pre_norm_block(self, parts: Sequence[Part], x: _Tensor) -> _Tensor:
        first, second = _sublayers(parts)
        h = self.norm(_norm_of(first), x)
        h, _probabilities = self.attention(first, h)  # held to the end of the block, as in LlamaDecoderLayer
        h = self.add(x, h)
        residual = h
        h = self.norm(_norm_of(second), h)
        h = self.mlp(second, h)
        return self.add(residual, h)

    def post_norm_block(self, parts: Sequence[Part], x: _Tensor) -> _Tensor:
        first, second = _sublayers(parts)
        h, _probabilities = self.attention(first, x)  # held to the end of the block, as in BertLayer
        h = self.project(first, h, x)
        middle = self.mlp(second, h)
        return self.project(second, middle, h)

    def project(self, parts: Sequence[Part], h: _Tensor, residual: _Tensor) -> _Tensor:
        """Norm of the residual sum: the last linear of a post-norm sublayer, dropout, addition."""
        h = self.sequence(_linears_after(parts), h)
        h = self.dropout(h, self.hidden_dropout)
        return self.norm(_norm_of(parts), self.add(h, residual))

    def mlp(self, parts: Sequence[Part], x: _Tensor) -> _Tensor:
        """The activation of one linear, times a second one where it is gated; down again here in pre-norm models."""
        activation = _core(parts)
        assert isinstance(activation, Elementwise)
        inner = _chains(_linears_before(parts))
        h = self.activate(activation, self.sequence(inner[0], x))
        if len(inner) > 1:
            h = self.multiply(h, self.sequence(inner[1], x))
        return h if self.post_norm else self.sequence(_linears_after(parts), h)

    def attention(self, parts: Sequence[Part], x: _Tensor) -> tuple[_Tensor, _Tensor | None]:
        """The output, and the probabilities where they exist; the output projection is part of it in pre-norm models."""
        part = _core(parts)
        assert isinstance(part, Attention)
        mode, drops = self.workload.attention, self.training and self.attention_dropout > 0
        one_kernel = mode == "flash" or (mode == "sdpa" and not drops)
        rotary = _rotary(parts)
        heads = part.num_attention_heads, part.num_key_value_heads, part.num_key_value_heads
        strided = not one_kernel or rotary, not one_kernel or rotary, not one_kernel
        q, k, v = (
            self.split_heads(self.sequence(chain, x), count, strided=gradient)
            for chain, count, gradient in zip(_chains(_linears_before(parts)), heads, strided, strict=True)
        )
        if rotary:
            q, k = self.rotate(q), self.rotate(k)
        if part.name in self.cache:
            k, v = self.append(part, k, v)
        probabilities = None
        if one_kernel:
            out = self.fused(part, q, k, v)
        elif mode == "eager":
            out, probabilities = self.eager(part, q, k, v)
        else:
            out = self.join_heads(self.unfused(part, q, k, v), part.num_attention_heads)
        if not self.post_norm:
            out = self.sequence(_linears_after(parts), out)
        return out, probabilities

    def append(self, part: Attention, k: _Tensor, v: _Tensor) -> tuple[_Tensor, _Tensor]:
        """The cache with the new keys and values: a copy, after which the old one goes."""
        elements = self.batch * self.keys * part.num_key_value_heads * part.head_dim
        element = dtype_bytes(self.workload.kv_dtype or self.workload.dtype)
        keys, values = self.cache.pop(part.name)
        keys = self.hold(elements * element, "kv_cache")
        values = self.hold(elements * element, "kv_cache")
        self.cache[part.name] = keys, values
        return _Tensor(storage=keys, elements=elements, element=element), _Tensor(storage=values, elements=elements, element=element)

    def fused(self, part: Attention, q: _Tensor, k: _Tensor, v: _Tensor) -> _Tensor:
        """Saves its inputs, its output and a float32 logarithm of each row's sum; no scores."""
        out = self.tensor(q.elements)
        sums = self.tensor(self.batch * part.num_attention_heads * self.queries, FLOAT32)
        return self.record(out, [q, k, v], [q, k, v, out, sums])

    def eager(self, part: Attention, q: _Tensor, k: _Tensor, v: _Tensor) -> tuple[_Tensor, _Tensor]:
        """B·H·Q·K scores, in several copies: saves the softmax's output and, where that is another tensor, what multiplies the values."""
        heads = part.num_attention_heads
        k, v = self.repeat_heads(part, k), self.repeat_heads(part, v)
        head_major = heads != part.num_key_value_heads or part.name in self.cache
        scores = self.product(
            self.as_matrices(q, heads), self.as_matrices(k, heads, head_major=head_major), self.batch * heads * self.queries * self.keys
        )
        scores = self.scale(scores)
        if part.causal:  # the mask
            scores = self.record(scores.elements, [scores], passes=True)
        scores = self.cast(self.softmax(self.cast(scores, FLOAT32 if part.causal else self.element)), self.element)
        scores = self.dropout(scores, self.attention_dropout)
        out = self.product(scores, self.as_matrices(v, heads, head_major=head_major), q.elements)
        return self.join_heads(out, heads), scores

    def unfused(self, part: Attention, q: _Tensor, k: _Tensor, v: _Tensor) -> _Tensor:
        """What SDPA does where no fused kernel will: float32 throughout, queries and keys scaled before their product."""
        heads, times = part.num_attention_heads, part.num_attention_heads // part.num_key_value_heads
        wide = max(FLOAT32, self.element)
        q, k, v = self.cast(q, wide), self.cast(k, wide), self.cast(v, wide)
        if times > 1:
            k, v = self.record(k.elements * times, [k]), self.record(v.elements * times, [v])
        scaled = self.scale(q)
        scores = self.product(
            self.as_matrices(scaled, heads),
            self.as_matrices(self.scale(k), heads, head_major=times > 1),
            self.batch * heads * self.queries * self.keys,
        )
        scores = self.softmax(scores)
        scores = self.dropout(scores, self.attention_dropout)
        _narrow = self.hold(scores.elements * self.element if wide != self.element else 0)  # returned beside the output
        return self.cast(self.product(scores, self.as_matrices(v, heads, head_major=times > 1), q.elements), self.element)


def _input_bytes(spec: ModelSpec, workload: Workload, forward: Forward) -> list[int]:
    """Token ids, and the tables that modules keep beside their weights: BERT's position and type ids, Llama's frequencies, twice."""
    tokens = workload.seq_len if workload.phase == "generate" else forward.query_len
    positions = sum(part.num_embeddings for part in spec.parts if isinstance(part, Embedding) and part.rows == "position")
    head_dim = next(part.head_dim for part in spec.parts if isinstance(part, Attention))
    return [INT64 * forward.batch_size * tokens, 2 * INT64 * positions, FLOAT32 * head_dim if _rotary(spec.parts) else 0]


def _rotary(parts: Iterable[Part]) -> bool:
    return any(isinstance(part, Elementwise) and part.kind == "rotary" for part in parts)


def _sublayers(parts: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
    """A block's attention and MLP: the first ends with its residual addition, and the norm that belongs to it."""
    end = 1 + next(i for i, part in enumerate(parts) if isinstance(part, Elementwise) and part.kind == "add")
    own_norm = isinstance(parts[end], Norm) and parts[end].name.rpartition(".")[0] == parts[end - 1].name.rpartition(".")[0]
    return parts[: end + own_norm], parts[end + own_norm :]


def _norm_of(parts: Sequence[Part]) -> Norm:
    return next(part for part in parts if isinstance(part, Norm))


def _core(parts: Sequence[Part]) -> Part:
    """What stands between the linears of a sublayer: attention, or the activation."""
    return next(part for part in parts if isinstance(part, Attention) or (isinstance(part, Elementwise) and part.kind in ACTIVATIONS))


def _linears_before(parts: Sequence[Part]) -> list[Linear]:
    return [part for part in parts[: parts.index(_core(parts))] if isinstance(part, Linear)]


def _linears_after(parts: Sequence[Part]) -> list[Linear]:
    return [part for part in parts[parts.index(_core(parts)) :] if isinstance(part, Linear)]


def _chains(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Linears that read the same input, each with the linears that read its output: the factors of a low-rank weight."""
    chains: list[list[Linear]] = []
    for part in linears:
        if chains and part.in_features != linears[0].in_features:
            chains[-1].append(part)
        else:
            chains.append([part])
    return chains
