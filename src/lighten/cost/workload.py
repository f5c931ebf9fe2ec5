"""What is asked of a model: the phase, its sizes and its data types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lighten.errors import WorkloadError
from lighten.model.spec import ModelSpec
from lighten.units import DTYPE_BITS

Phase = Literal["encode", "prefill", "decode", "generate", "train"]
Attention = Literal["eager", "sdpa", "flash"]
Recompute = Literal["none", "selective", "full"]

PHASES = get_args(Phase)
ATTENTIONS = get_args(Attention)
RECOMPUTES = get_args(Recompute)
OPTIMIZER_STATE = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "adagrad": 1, "rmsprop": 1, "lion": 1}
"""Optimizer → how many values of the parameter's type it keeps for each parameter. Source: `torch.optim`'s state of each; Lion: arXiv:2302.06675."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One run of a model.

    Attributes:
        phase: encode (an encoder's forward), prefill (a decoder's forward over the prompt, logits at every position, as `model(...)`
            computes it), decode (`new_tokens` steps after a context of `seq_len`), generate (prefill with logits at the last position,
            then decode), train (forward, backward and optimizer step).
        batch_size: sequences at once.
        seq_len: tokens of each sequence, or of its prompt.
        new_tokens: tokens that each sequence generates; 0 outside decode and generate.
        dtype: type of activations and of unquantized weights.
        kv_dtype: type of cached keys and values.
        attention: how attention is computed: eager keeps the score matrix, sdpa and flash do not.
        optimizer, recompute: of phase train; None and "none" elsewhere.
    """

    phase: Phase
    batch_size: int = 1
    seq_len: int = 128
    new_tokens: int = 0
    dtype: str = "float32"
    kv_dtype: str | None = None
    attention: Attention = "sdpa"
    optimizer: str | None = None
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        for name, known in (("phase", PHASES), ("attention", ATTENTIONS), ("recompute", RECOMPUTES)):
            if getattr(self, name) not in known:
                raise WorkloadError(f"{name}={getattr(self, name)!r} is not known; known: {', '.join(known)}.")
        for name in ("batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name}={getattr(self, name)} is not positive.")
        if self.new_tokens < 0:
            raise WorkloadError(f"new_tokens={self.new_tokens} is negative.")
        if self.dtype not in DTYPE_BITS or (self.kv_dtype or self.dtype) not in DTYPE_BITS:
            raise WorkloadError(f"dtype {self.dtype!r} or kv_dtype {self.kv_dtype!r} is not known; known: {', '.join(DTYPE_BITS)}.")
        if (self.phase in ("decode", "generate")) != (self.new_tokens > 0):
            raise WorkloadError(
                f"new_tokens={self.new_tokens} with phase={self.phase}: phases decode and generate need at least 1, others take none."
            )
        if (self.phase == "train") != (self.optimizer is not None):
            raise WorkloadError(f"optimizer={self.optimizer} with phase={self.phase}: phase train needs one, others take none.")
        if self.optimizer is not None and self.optimizer not in OPTIMIZER_STATE:
            raise WorkloadError(f"optimizer {self.optimizer!r} is not known; known: {', '.join(OPTIMIZER_STATE)}.")
        if self.recompute != "none" and self.phase != "train":
            raise WorkloadError(f"recompute={self.recompute} has no effect in phase {self.phase}.")
        if self.kv_dtype and self.phase not in ("decode", "generate"):
            raise WorkloadError(f"kv_dtype={self.kv_dtype} has no effect in phase {self.phase}, which keeps no cache.")

    @property
    def tokens(self) -> int:
        """Tokens that the whole workload processes (encode, prefill, train) or makes (decode, generate)."""
        return self.batch_size * (self.new_tokens or self.seq_len)


def check_workload(spec: ModelSpec, workload: Workload) -> None:
    """Raises:
    WorkloadError: the phase does not fit the model, or the length exceeds its positions.
    """
    if workload.phase in ("prefill", "decode", "generate") and not spec.is_decoder:
        raise WorkloadError(f"{spec.name} is an encoder; phase {workload.phase} needs a decoder. Phases of an encoder: encode, train.")
    if workload.phase == "encode" and spec.is_decoder:
        raise WorkloadError(f"{spec.name} is a decoder; phase encode needs an encoder. Phases of a decoder: prefill, decode, generate, train.")
    longest = workload.seq_len + workload.new_tokens
    if spec.max_positions is not None and longest > spec.max_positions:
        raise WorkloadError(f"{longest} positions asked for; {spec.name} has max_position_embeddings={spec.max_positions}.")
