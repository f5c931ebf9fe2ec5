"""Workload → the forward passes that it is made of: how many new positions against how many keys, and whether a source is encoded.

An encoder-decoder's `seq_len` is its source's length; where the source has but one size (frames of a recording) it counts the decoder's
tokens. Prefill encodes the source and runs the decoder over its prompt: one token, or `seq_len` of them.
"""

from __future__ import annotations

from lighten.cost.operators import Forward
from lighten.cost.workload import Workload, has_free_source
from lighten.model.spec import ModelSpec


def prompt_len(spec: ModelSpec, workload: Workload) -> int:
    """Tokens that the decoder, or the only stream of tokens, starts with."""
    return 1 if has_free_source(spec) and workload.phase != "train" else workload.seq_len


def source_len(spec: ModelSpec, workload: Workload) -> int:
    """Tokens of the source; 0 where there is none whose length is free."""
    return workload.seq_len if has_free_source(spec) else 0


def training_forward(spec: ModelSpec, workload: Workload) -> Forward:
    """The forward pass of a training step: a target as long as the source unless `target_len` says otherwise."""
    length = workload.target_len or workload.seq_len
    return Forward(batch_size=workload.batch_size, query_len=length, key_len=length, source_len=source_len(spec, workload))


def first_forward(spec: ModelSpec, workload: Workload) -> Forward:
    """Over the prompt: encode, prefill, and what gives a generation's first token."""
    length, generates = prompt_len(spec, workload), workload.phase == "generate"
    source = source_len(spec, workload)
    last = generates and not spec.is_encoder_decoder  # whose models compute all logits of a prompt
    return Forward(batch_size=workload.batch_size, query_len=length, key_len=length, last_logits_only=last, source_len=source)


def step_forward(spec: ModelSpec, workload: Workload, step: int) -> Forward:
    """The `step`-th of the tokens that follow, from 1: its key is the last; a source is in the cache."""
    context = 0 if has_free_source(spec) and workload.phase == "decode" else prompt_len(spec, workload)
    source = source_len(spec, workload)
    return Forward(
        batch_size=workload.batch_size, query_len=1, key_len=context + step, last_logits_only=True, source_len=source, encodes=False
    )  # fmt: skip


def steps_after_first(workload: Workload) -> int:
    """Decoding steps: all new tokens, but for a generation's first, which its prefill gives."""
    return workload.new_tokens - (workload.phase == "generate")
