"""Bytes that the loss of a training step takes on its way from the last hidden state: logits, their copies, and their gradients.

Legend: R rows (tokens that get a loss), V vocabulary, H width of the hidden state, e bytes of an element of the model's type,
w = max(4, e) bytes of an element of the loss, which is computed in float32 at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lighten.cost.workload import CROSS_ENTROPIES, CrossEntropy
from lighten.errors import WorkloadError
from lighten.units import dtype_bytes

FLOAT32 = 4
CHUNKS = 8
"""Into how many the rows are cut. Source: `num_output_chunks` of torchtune's `LinearCrossEntropyLoss`."""


@dataclass(frozen=True, kw_only=True)
class LossBytes:
    """What one way of taking the loss needs beside the hidden state, the head's weight, the targets, and a few scalars.

    Attributes:
        forward: the most bytes at once until the loss is there.
        saved: bytes that stay until backward.
        backward: the most bytes at once, `saved` with them, until the hidden state's gradient is asked for.
        rows_at_once: rows whose logits are there together.
    """

    forward: int
    saved: int
    backward: int
    rows_at_once: int


def loss_bytes(kind: CrossEntropy, *, rows: int, vocab_size: int, hidden_size: int, dtype: str) -> LossBytes:
    """Bytes of the head's output and its cross entropy.

        full     forward R·V·(e + w + w where e < w, else e + w): logits, their wide copy, log-probabilities
                 saved R·V·w: log-probabilities; backward R·V·3w: with the gradients of both sides of the softmax
        chunked  R' = ⌈R / 8⌉ rows at a time: forward R'·V·2w, nothing is saved, backward R'·V·3w: head and loss of a chunk are one
                 checkpoint, whose logits no variable holds and which backward runs again
        fused    R'·V·e + R·H·e + V·H·e + 4·R: logits of R' rows, overwritten by their gradient; the gradients of the hidden state and of
                 the head's weight, which the forward pass makes already and saves; a float32 loss a row.
                 R' = the least power of two of at least R / ⌈V / H⌉, and at most R

    `fused` makes the head's gradient here, which the others make later: it is counted here and nowhere else.

    Source: full: `ForCausalLMLoss` of transformers 5.23 and torch's `log_softmax`, `nll_loss` and their backwards, checked in
    tests/test_precision.py; fused: `fused_linear_cross_entropy_forward` of Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989), gradients in
    the model's type.

    Raises:
        WorkloadError: the kind is not known.

    >>> loss_bytes("full", rows=8192, vocab_size=128256, hidden_size=4096, dtype="bfloat16").backward / 1e9
    12.608077824
    >>> loss_bytes("fused", rows=8192, vocab_size=128256, hidden_size=4096, dtype="bfloat16").backward / 1e9
    1.117782016
    """
    if kind not in CROSS_ENTROPIES:
        raise WorkloadError(f"cross_entropy={kind!r} is not known; known: {', '.join(CROSS_ENTROPIES)}.")
    element = dtype_bytes(dtype)
    if kind == "fused":
        return _fused(rows, vocab_size, hidden_size, element)
    at_once = rows if kind == "full" else math.ceil(rows / CHUNKS)
    wide = max(FLOAT32, element)
    values = at_once * vocab_size
    backward = round(values * 3 * wide)
    if kind == "chunked":
        return LossBytes(forward=round(values * 2 * wide), saved=0, backward=backward, rows_at_once=at_once)
    forward = round(values * (element + wide + (wide if element < wide else 0)))
    return LossBytes(forward=forward, saved=round(values * wide), backward=backward, rows_at_once=at_once)


def _fused(rows: int, vocab_size: int, hidden_size: int, element: float) -> LossBytes:
    pieces = math.ceil(vocab_size / hidden_size)
    at_once = min(rows, 1 << (math.ceil(rows / pieces) - 1).bit_length())
    gradients = round((rows + vocab_size) * hidden_size * element)
    logits = round(at_once * vocab_size * element)
    return LossBytes(forward=logits + gradients + FLOAT32 * rows, saved=gradients, backward=gradients, rows_at_once=at_once)
