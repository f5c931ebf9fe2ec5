"""The one contract of every runtime: load a folder, then run it.

Legend: B batch_size, S length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lighten.errors import RuntimeUnavailable, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.recipe.options import Batching, Speculation

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is run.

    Attributes:
        dtype: the type to compute in.
        activations: whether int8 activations are asked for, scaled from each input or from calibration; they stay off else.
        speculation: what proposes tokens while it decodes; None: nothing.
        batching: how texts of different lengths come into batches.
        device: cpu, or cuda for the runtimes that run there.
    """

    dtype: str
    threads: int
    activations: Literal["dynamic", "static"] | None = None
    speculation: Speculation | None = None
    batching: Batching = "padded"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """How speculative decoding went.

    Attributes:
        passes: of the model, after the prompt's.
        tokens: that each sequence got from them.
        proposed, accepted: tokens, of all sequences; those after a token that was not accepted count as proposed alone.
    """

    passes: int
    tokens: int
    proposed: int
    accepted: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a decoder wrote greedily.

    Attributes:
        ids: [B, N] new tokens.
        first_s: seconds until each sequence had its first.
        rest_s: seconds that the others took.
        accepted: of speculative decoding; None of plain.
    """

    ids: Ids
    first_s: float
    rest_s: float
    accepted: Accepted | None = None


class Session(Protocol):
    """A model that is loaded and ready."""

    @property
    def precision(self) -> str:
        """What it really computes in, read back from the runtime where it tells."""
        ...

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """An encoder's last hidden state, [B, S, D]."""
        ...

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        """What an encoder's head says: logits of classes, [B, L], or of where an answer starts and of where it ends, [B, S, 2]."""
        ...

    def logits(self, input_ids: Ids) -> Floats:
        """A decoder's logits at every position, without a cache that lives on, [B, S, V]."""
        ...

    def generate(self, input_ids: Ids, new_tokens: int, ends: Collection[int] = ()) -> Generated:
        """Go on with [B, S] prompts, the likeliest token at a time, whatever ends a text; no further than until each has one of `ends`."""
        ...


class Stepping(ABC):
    """A session whose cache is fed one token at a time."""

    @property
    @abstractmethod
    def precision(self) -> str:
        """See `Session`."""

    @abstractmethod
    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """See `Session`."""

    @abstractmethod
    def logits(self, input_ids: Ids) -> Floats:
        """See `Session`."""

    @abstractmethod
    def prefill(self, input_ids: Ids) -> Floats:
        """Start a generation: fill the cache with a prompt; the last position's logits, [B, V]."""

    @abstractmethod
    def decode(self, input_ids: Ids) -> Floats:
        """One more step of the generation with [B, 1] new tokens; their logits, [B, V]."""

    def generate(self, input_ids: Ids, new_tokens: int, ends: Collection[int] = ()) -> Generated:
        """See `Session`."""
        start = time.perf_counter()
        found = [self.prefill(input_ids).argmax(-1)[:, None]]
        first = time.perf_counter()
        stops = list(ends)
        for _ in range(new_tokens - 1):
            if stops and np.isin(np.concatenate(found, 1), stops).any(1).all():
                break
            found.append(self.decode(found[-1]).argmax(-1)[:, None])
        return Generated(ids=np.concatenate(found, 1), first_s=first - start, rest_s=time.perf_counter() - first)


class Checked:
    """A session with what no runtime does alike: what is too long or empty is refused, and no sequences give none.

    Raises:
        WorkloadError: a decoder's prompt of no tokens, or more tokens than the model has positions.
    """

    def __init__(self, session: Session, spec: ModelSpec) -> None:
        self._session = session
        self._spec = spec

    @property
    def precision(self) -> str:
        """See `Session`."""
        return self._session.precision

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """See `Session`."""
        self._check(input_ids)
        if not input_ids.size:
            return np.zeros((*input_ids.shape, int(self._spec.config["hidden_size"])), np.float32)
        return self._session.encode(input_ids, attention_mask)

    def logits(self, input_ids: Ids) -> Floats:
        """See `Session`."""
        self._check(input_ids)
        if not input_ids.size:
            return np.zeros((*input_ids.shape, int(self._spec.config["vocab_size"])), np.float32)
        return self._session.logits(input_ids)

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        """See `Session`."""
        self._check(input_ids)
        return self._session.classify(input_ids, attention_mask, token_type_ids)

    def generate(self, input_ids: Ids, new_tokens: int, ends: Collection[int] = ()) -> Generated:
        """See `Session`."""
        if input_ids.shape[1] == 0:
            raise WorkloadError("a prompt without tokens cannot be gone on with.")
        self._check(input_ids, new_tokens)
        if not len(input_ids):
            return Generated(ids=np.zeros((0, new_tokens), np.int64), first_s=0.0, rest_s=0.0)
        return self._session.generate(input_ids, new_tokens, ends)

    def _check(self, input_ids: Ids, more: int = 0) -> None:
        length, most = input_ids.shape[1] + more, self._spec.max_positions
        if most is not None and length > most:
            raise WorkloadError(f"{length} tokens, and {self._spec.name} has {most} positions.")


class Runtime(Protocol):
    """A runtime, as a module of this package."""

    def version(self) -> str:
        """Its version, after importing it."""
        ...

    def load(self, folder: Path, spec: ModelSpec, setup: Setup) -> Session:
        """A session on an artifact, or on a model folder for the runtimes that run one as it is."""
        ...


def model_file(folder: Path, name: str, runtime: str) -> Path:
    """Where an artifact's model lies.

    Raises:
        RuntimeUnavailable: the folder holds no such file.
    """
    path = folder / name
    if not path.is_file():
        raise RuntimeUnavailable(f"{folder} holds no {name}; compress the model @ {runtime}.")
    return path


def without_head(runtime: str) -> RuntimeUnavailable:
    """What is said where a model that runs without its head is asked what it answers."""
    return RuntimeUnavailable(f"runtime {runtime} holds no head of this model, which could classify or answer.")


def as_float32(value: Any) -> Floats:
    """A torch tensor of any float type as float32 numpy."""
    result: Floats = value.float().cpu().numpy()
    return result
