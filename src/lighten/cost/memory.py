"""ModelSpec × Workload → the bytes that live at the fullest moment, from shapes alone.

Memory is the highest sum of live tensor bytes. What lives depends on what each operator saves for its backward pass and on how long
the program refers to a tensor, so the pass is *replayed* on tensors that have a size and nothing else (`lighten.cost.replay`).

Held against the life of every storage in transformers 5.23 and torch 2.13 on CPU (tests/live_bytes.py, tests/test_memory.py,
tests/test_memory_families.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lighten.cost.operators import Forward
from lighten.cost.optimizer_state import OPTIMIZERS, Shape, scratch_bytes, state_bytes
from lighten.cost.passes import first_forward, step_forward, steps_after_first, training_forward
from lighten.cost.replay.model import Model
from lighten.cost.replay.tape import Ledger
from lighten.cost.workload import Workload, check_workload
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Part, part_weight_bytes
from lighten.units import dtype_bytes

HELD_TO_RUNS = frozenset({
    "bart", "bert", "clip", "distilbert", "gemma", "gemma2", "gpt2", "llama", "mamba", "mixtral", "opt", "qwen2", "qwen3", "roberta", "t5",
    "vit", "whisper",
})  # fmt: skip
"""Families whose peaks tests/test_memory_families.py and benchmarks/memory_truth.py hold against the storages that live in real runs."""


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
    """Memory of a workload as PyTorch runs `transformers`' own modules eagerly on a CPU: within 1 % of the live bytes of BERT and Llama,
    within 15 % of those of the other families that tests/test_memory_families.py names; other specs follow the same general rules.

    encode and prefill are one forward pass, logits at every position, without a cache. decode is its last step: the cache is a
    `DynamicCache` and grows by a copy of one layer's keys, then values. generate is the fuller of two: a prefill that fills the cache
    and gives the first token, with logits at the last position, and the last of the steps that follow. A training step is any but the
    first, since the optimizer's state exists; its loss is the head's cross entropy, or the mean of the last hidden state where there is
    no head. Only the loss is kept of the model's output; gradients are freed after the step. Inputs have no padding, so that no mask
    of theirs exists. An encoder-decoder's prefill encodes the source and gives the first token; its decode and generate keep the
    encoder's output and the keys and values of the source.

    Three things are the CPU's: dropout keeps its noise in the activations' type (CUDA's kernel keeps 1 byte an element);
    `attention="sdpa"` with attention dropout builds the score matrix, in float32 ("flash" never does); the optimizer updates one
    parameter after the other (CUDA's default makes the scratch of all of them at once). Softcapped scores are eager ones, since no
    kernel of SDPA has them. Experts run as grouped products; an expert's share of the rows does not matter then.

    Not covered: what a kernel takes and frees inside itself, dequantized copies of quantized weights, the sampling and beams of
    `generate`, autocast, question answering's two losses (one is counted). Recomputation of BERT counts one bias too many.

    Raises:
        WorkloadError: the phase does not fit the model.
    """
    check_workload(spec, workload)
    if workload.phase == "train":
        return _training(spec, workload)
    stored = sum(_inference_bytes(part, workload.dtype) for part in spec.parts)
    moments = [_inference(spec, workload, forward, cached) for forward, cached in _forwards(spec, workload)]
    return _breakdown(max(moments, key=lambda ledger: ledger.peak), weights=stored)


def _forwards(spec: ModelSpec, workload: Workload) -> list[tuple[Forward, int | None]]:
    """The forward passes that can be the fullest, each with the positions that its cache held before; None: no cache."""
    passes: list[tuple[Forward, int | None]] = []
    if workload.phase != "decode":
        passes.append((first_forward(spec, workload), 0 if workload.phase == "generate" else None))
    if steps := steps_after_first(workload):
        last = step_forward(spec, workload, steps)
        passes.append((last, last.key_len - 1))
    return passes


def _inference_bytes(part: Part, dtype: str) -> int:
    packed = isinstance(part, Linear | Embedding) and (part.weight.bits is not None or part.weight.pattern is not None)
    return part_weight_bytes(part, dtype) if packed else round(part.parameters * dtype_bytes(dtype))


def _inference(spec: ModelSpec, workload: Workload, forward: Forward, cached: int | None) -> Ledger:
    model = Model(spec, workload, forward)
    if cached is not None:
        model.fill_cache(cached)
    model.logits()
    return model.ledger


def _training(spec: ModelSpec, workload: Workload) -> MemoryBreakdown:
    model = Model(spec, workload, training_forward(spec, workload))
    loss = model.loss()  # alive to the end of the step
    model.backward(loss)
    optimizer = workload.optimizer or ""
    hidden, others = _trained(spec, model, apart=OPTIMIZERS[optimizer].outside is not None)
    _update = model.hold(scratch_bytes(optimizer, hidden, workload.dtype, others=others), "temporary")
    kept = state_bytes(optimizer, hidden, workload.dtype, others=others)
    weights = round(sum(part.parameters for part in spec.parts) * dtype_bytes(workload.dtype))
    return _breakdown(model.ledger, weights=weights, optimizer=kept)


def _trained(spec: ModelSpec, model: Model, *, apart: bool) -> tuple[list[Shape], list[Shape]]:
    """Shapes of what got a gradient (a pooler without a loss gets none), in the modules' order; `apart`: hidden layers' matrices, and the rest."""
    shapes: dict[str, tuple[Shape, bool]] = {}
    for part in spec.parts:
        inside = not apart or (isinstance(part, Linear) and part.component != "head")
        own = model.stored_as.get(part.name)
        for name, shape in (own or part.tensors()).items():
            if name in model.gradients:
                shapes[name] = shape, inside and (not apart or len(shape) == 2)
    return [shape for shape, inside in shapes.values() if inside], [shape for shape, inside in shapes.values() if not inside]


def _breakdown(ledger: Ledger, *, weights: int, optimizer: int = 0) -> MemoryBreakdown:
    return MemoryBreakdown(weights=weights, optimizer=optimizer, **ledger.fullest)
