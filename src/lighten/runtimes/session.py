"""The one contract of every runtime: load a folder, then run it.

Legend: B batch_size, S length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lighten.model.spec import ModelSpec

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is run.

    Attributes:
        dtype: the type to compute in.
        dynamic: whether int8 activations, scaled from each input, are asked for; they stay off else.
    """

    dtype: str
    threads: int
    dynamic: bool = False


class Session(Protocol):
    """A model that is loaded and ready."""

    @property
    def precision(self) -> str:
        """What it really computes in, read back from the runtime where it tells."""
        ...

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """An encoder's last hidden state, [B, S, D]."""
        ...

    def logits(self, input_ids: Ids) -> Floats:
        """A decoder's logits at every position, without a cache that lives on, [B, S, V]."""
        ...

    def prefill(self, input_ids: Ids) -> Floats:
        """Start a generation: fill the cache with a prompt; the last position's logits, [B, V]."""
        ...

    def decode(self, input_ids: Ids) -> Floats:
        """One more step of the generation with [B, 1] new tokens; their logits, [B, V]."""
        ...


class Runtime(Protocol):
    """A runtime, as a module of this package."""

    def version(self) -> str:
        """Its version, after importing it."""
        ...

    def load(self, folder: Path, spec: ModelSpec, setup: Setup) -> Session:
        """A session on an artifact, or on a model folder for the runtimes that run one as it is."""
        ...


def as_float32(value: Any) -> Floats:
    """A torch tensor of any float type as float32 numpy."""
    result: Floats = value.float().numpy()
    return result
