"""Names and shapes of what an exported graph takes and gives. Needs no torch: the processes that run graphs read it.

Shape legend: B sequences, P positions known, Q new tokens, H key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.model.spec import Attention, ModelSpec
from lighten.model.tasks import runs_with_head, takes_token_types, task_of

ENCODER_INPUTS = ("input_ids", "attention_mask")
TYPES = "token_type_ids"
"""What an encoder with a head is told beside these, where it tells two texts apart."""
HIDDEN, LOGITS = "last_hidden_state", "logits"
START, END = "start_logits", "end_logits"
"""What comes out of an encoder; its head's answer: of classes, or of where an answer starts and ends."""
DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
HEADS_FIRST, KEYS_TURNED = [0, 2, 1, 3], [0, 2, 3, 1]
"""[B, S, H, D] → [B, H, S, D] and back; → [B, H, D, S]."""
BEAMS = "beam_idx"
"""[B] which sequence's cache each one goes on from, where a graph keeps its cache inside."""
KEPT = "logits_to_keep"
"""[1] of how many of the last tokens such a graph gives logits."""


def encoder_inputs(
    spec: ModelSpec, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], token_type_ids: NDArray[np.int64] | None = None
) -> dict[str, NDArray[np.int64]]:
    """What goes into an encoder's graph, all [B, S]; without types all tokens are the first text's."""
    found = dict(zip(ENCODER_INPUTS, (input_ids, attention_mask), strict=True))
    if takes_token_types(spec):
        found[TYPES] = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    return found


def encoder_outputs(spec: ModelSpec) -> list[str]:
    """Names of what comes out of an encoder's graph: the last hidden state, and what its head says."""
    if not runs_with_head(spec):
        return [HIDDEN]
    return [HIDDEN, START, END] if task_of(spec) == "span" else [HIDDEN, LOGITS]


def cache_names(layers: int, stem: str) -> list[str]:
    """Names of the cached keys and values, as inputs (`past`) or outputs (`present`)."""
    return [f"{stem}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def kv_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Key/value heads, head size and layers of a decoder whose layers are alike."""
    attention = [part for part in spec.parts if isinstance(part, Attention)]
    return attention[0].num_key_value_heads, attention[0].head_dim, len(attention)


def decoder_inputs(input_ids: NDArray[np.int64], past: int) -> dict[str, NDArray[np.int64]]:
    """What goes into a decoder beside its cache: [B, Q] tokens after `past` others, none of them padding."""
    batch, new = input_ids.shape
    positions = np.tile(np.arange(past, past + new), (batch, 1))
    return dict(zip(DECODER_INPUTS, (input_ids, np.ones((batch, past + new), np.int64), positions), strict=True))


def stateful_inputs(input_ids: NDArray[np.int64], past: int, *, last: bool = False) -> dict[str, NDArray[Any]]:
    """The same of a decoder that keeps its cache inside; each sequence goes on from its own.

    Args:
        last: logits of the last token alone, and not of all.
    """
    beams, kept = np.arange(len(input_ids), dtype=np.int32), np.array([1 if last else input_ids.shape[1]])
    return {**decoder_inputs(input_ids, past), BEAMS: beams, KEPT: kept}


def empty_cache(spec: ModelSpec, batch: int) -> dict[str, NDArray[np.float32]]:
    """Keys and values of no positions, by the names of a decoder's inputs."""
    heads, head_dim, layers = kv_shape(spec)
    return dict.fromkeys(cache_names(layers, "past"), np.zeros((batch, heads, 0, head_dim), np.float32))
