"""What is asked of a model: the phase, its sizes and its data types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lighten.cost.optimizer_state import OPTIMIZERS
from lighten.errors import WorkloadError
from lighten.model.spec import ModelSpec
from lighten.units import DTYPE_BITS

Phase = Literal["encode", "prefill", "decode", "generate", "train"]
Attention = Literal["eager", "sdpa", "flash"]
Recompute = Literal["none", "selective", "full"]
CrossEntropy = Literal["full", "chunked", "fused"]
KeptBy = Literal["transformers", "transformers-static", "transformers-quantized", "llama.cpp", "vllm"]

PHASES = get_args(Phase)
ATTENTIONS = get_args(Attention)
RECOMPUTES = get_args(Recompute)
CROSS_ENTROPIES = get_args(CrossEntropy)
CACHE_KEEPERS = get_args(KeptBy)
BASE_BITS = (4, 8)
ALL_LINEAR = "all-linear"
OPTIMIZER_STATE = {name: one.values for name, one in OPTIMIZERS.items()}
"""Optimizer → how many values of the parameter's type it keeps for each parameter, for what an update moves; `state_bytes` has the exact bytes."""

EFFECTIVE_IN = {
    "master_weights": ("train",), "lora_rank": ("train",), "base_bits": ("train",), "cross_entropy": ("train",), "kept_by": ("decode", "generate"),
    "lengths": ("encode",),
}  # fmt: skip
"""Field → the phases in which a value other than its default changes something."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One run of a model.

    Attributes:
        phase: encode (an encoder's forward), prefill (a decoder's forward over the prompt, logits at every position, as `model(...)`
            computes it), decode (`new_tokens` steps after a context of `seq_len`), generate (prefill with logits at the last position,
            then decode), train (forward, backward and optimizer step).
        batch_size: sequences at once.
        seq_len: tokens of each sequence, or of its prompt; of an encoder-decoder's source, where that has no fixed size; positions of an image.
        new_tokens: tokens that each sequence generates; 0 outside decode and generate.
        dtype: type of activations and of unquantized weights.
        kv_dtype: type of cached keys and values.
        attention: how attention is computed: eager keeps the score matrix, sdpa and flash do not.
        optimizer, recompute: of phase train; None and "none" elsewhere.
        master_weights: a float32 copy of each weight of a narrower `dtype`, which the optimizer updates; its state is float32 then too, as
            Megatron-LM and DeepSpeed keep it. Not torch's autocast, whose parameters are float32.
        lora_rank: adapters of this rank are trained (arXiv:2106.09685), all else is frozen; None: all parameters are trained.
        lora_targets: the modules that get an adapter, by the last parts of their names, as "q_proj,v_proj"; "all-linear": each linear but the head.
        base_bits: the frozen linears are quantized to 4 bits (QLoRA's NF4, arXiv:2305.14314) or 8 (LLM.int8(), arXiv:2208.07339).
        cross_entropy: how a training step takes the loss of its logits: all at once, by chunks of rows, or fused with the head's product.
        kept_by: whose cache keeps keys and values in phases decode and generate.
        target_len: tokens that an encoder-decoder is trained to give; None: as many as its source has.
        lengths: tokens of each text, `seq_len` at most, where the texts have lengths of their own: all of them are the workload, `batch_size` at
            once. Empty: one batch, of `seq_len` tokens each.
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
    master_weights: bool = False
    lora_rank: int | None = None
    lora_targets: str = ALL_LINEAR
    base_bits: int | None = None
    cross_entropy: CrossEntropy = "full"
    kept_by: KeptBy = "transformers"
    target_len: int | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        choices = (
            ("phase", PHASES), ("attention", ATTENTIONS), ("recompute", RECOMPUTES), ("cross_entropy", CROSS_ENTROPIES), ("kept_by", CACHE_KEEPERS),
        )  # fmt: skip
        for name, known in choices:
            if getattr(self, name) not in known:
                raise WorkloadError(f"{name}={getattr(self, name)!r} is not known; known: {', '.join(known)}.")
        for name in ("batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name}={getattr(self, name)} is not positive.")
        if self.target_len is not None and (self.target_len < 1 or self.phase != "train"):
            raise WorkloadError(f"target_len={self.target_len} with phase={self.phase}: phase train alone takes a positive one.")
        if self.lengths and not 1 <= min(self.lengths) <= max(self.lengths) <= self.seq_len:
            raise WorkloadError(f"lengths from {min(self.lengths)} to {max(self.lengths)}: each text has 1 to seq_len={self.seq_len} tokens.")
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
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise WorkloadError(f"optimizer {self.optimizer!r} is not known; known: {', '.join(OPTIMIZERS)}.")
        if self.recompute != "none" and self.phase != "train":
            raise WorkloadError(f"recompute={self.recompute} has no effect in phase {self.phase}.")
        if self.kv_dtype and self.phase not in ("decode", "generate"):
            raise WorkloadError(f"kv_dtype={self.kv_dtype} has no effect in phase {self.phase}, which keeps no cache.")
        self._check_effects()
        self._check_adapters()

    def _check_effects(self) -> None:
        for name, phases in EFFECTIVE_IN.items():
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and self.phase not in phases:
                raise WorkloadError(f"{name}={value} has no effect in phase {self.phase}; it has one in: {', '.join(phases)}.")
        if self.master_weights and DTYPE_BITS[self.dtype] >= 32:
            raise WorkloadError(f"master_weights has no effect with dtype={self.dtype}, which is no narrower than float32; use bfloat16 or float16.")

    def _check_adapters(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 1:
            raise WorkloadError(f"lora_rank={self.lora_rank} is not positive.")
        if self.lora_rank is None and self.lora_targets != ALL_LINEAR:
            raise WorkloadError(f"lora_targets={self.lora_targets} has no effect without lora_rank.")
        if not all(target.strip() for target in self.lora_targets.split(",")):
            raise WorkloadError(f"lora_targets={self.lora_targets!r} names no module; use names such as q_proj,v_proj or {ALL_LINEAR}.")
        if self.base_bits is not None and self.base_bits not in BASE_BITS:
            raise WorkloadError(f"base_bits={self.base_bits} is not known; known: {', '.join(map(str, BASE_BITS))}.")
        if self.base_bits is not None and self.lora_rank is None:
            raise WorkloadError(f"base_bits={self.base_bits} needs lora_rank: quantized weights are frozen, so that adapters alone can be trained.")
        if self.master_weights and self.lora_rank is not None:
            raise WorkloadError("master_weights has no effect with lora_rank: adapters of 16-bit models are float32 already.")

    @property
    def tokens(self) -> int:
        """Tokens that the whole workload processes (encode, prefill, train) or makes (decode, generate); padding is none of them."""
        return sum(self.lengths) if self.lengths else self.batch_size * (self.new_tokens or self.seq_len)


def has_free_source(spec: ModelSpec) -> bool:
    """Whether it is an encoder-decoder whose source is of tokens, in any number; false where the source has one size, as frames do."""
    return spec.is_encoder_decoder and any(part.rows == "source" for part in spec.parts)


def check_workload(spec: ModelSpec, workload: Workload) -> None:
    """Raises:
    WorkloadError: the phase does not fit the model, or the length is not one that it has.
    """
    _check_phase(spec, workload)
    positions = spec.fixed_len
    if positions is not None and workload.seq_len != positions:
        raise WorkloadError(f"seq_len={workload.seq_len}: {spec.name} takes an image of one size, {positions} positions; leave seq_len out.")
    if workload.target_len is not None and not has_free_source(spec):
        raise WorkloadError(f"target_len={workload.target_len} has no effect: {spec.name} has no source of tokens; use seq_len.")
    free = has_free_source(spec)
    longest = max(workload.seq_len, workload.target_len or 0, workload.new_tokens) if free else workload.seq_len + workload.new_tokens
    if spec.max_positions is not None and longest > spec.max_positions:
        raise WorkloadError(f"{longest} positions asked for; {spec.name} has max_position_embeddings={spec.max_positions}.")


def _check_phase(spec: ModelSpec, workload: Workload) -> None:
    decoding, generates = workload.phase in ("prefill", "decode", "generate"), spec.is_decoder or spec.is_encoder_decoder
    if decoding and not generates:
        raise WorkloadError(f"{spec.name} is an encoder; phase {workload.phase} needs a decoder. Phases of an encoder: encode, train.")
    if workload.phase == "encode" and generates:
        kind = "a decoder" if spec.is_decoder else "an encoder-decoder"
        raise WorkloadError(f"{spec.name} is {kind}; phase encode needs an encoder. Phases of {kind}: prefill, decode, generate, train.")
