"""PyTorch, compiled by `torch.compile`: an encoder as a whole for each shape that it meets, a decoder's step block by block.

A decoder's prompt is computed by the eager module; its keys and values are copied into a cache of fixed size, where every further token costs one
call of the same compiled block for each block, and one of the head. One block is compiled, not all: seconds, where the whole step takes minutes.

On a CUDA device the whole step is recorded once and replayed as one CUDA graph; an encoder's is recorded by torch.compile.

Legend: B batch_size, H key/value heads, R positions that the cache has room for, E head_dim, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from lighten.errors import RuntimeUnavailable
from lighten.model.spec import ModelSpec
from lighten.runtimes import torch_eager
from lighten.runtimes.session import Floats, Generated, Ids, Session, Setup, Stepping, as_float32
from lighten.runtimes.torch_eager import version

__all__ = ["ROOM", "load", "version"]

_States: TypeAlias = "Sequence[tuple[Any, Any]]"
"""Each block's keys and values, [B, H, S, E] of S positions."""

ROOM = 128
"""Positions that a cache is rounded up to: one compilation serves all lengths between two multiples. Choice: a short text reads at most 127 masked
positions more, which is far below what a step reads of weights."""
DECODERS = ("llama",)
"""Families whose blocks are called here as their class calls them, without a sliding window."""
KINDS_OF_BLOCKS = 256
"""Compilations in one process: blocks of other widths, and other shapes of the cache. What would be more is an error, not run eagerly in silence."""


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """The eager session with its module compiled; compilation happens at the first run of each shape.

    Raises:
        RuntimeUnavailable: what a config asks of the cache, which has codes there; no such device.
    """
    import torch

    session = torch_eager.load(folder, spec, setup)
    assert isinstance(session, torch_eager.TorchSession), "torch_eager loads nothing else"
    if spec.is_decoder:
        if spec.family not in DECODERS:
            raise RuntimeUnavailable(f"{folder} is a {spec.family}; runtime torch-compile runs decoders of {', '.join(DECODERS)}.")
        if session.kv is not None:
            raise RuntimeUnavailable(f"{folder} has a quantized cache, which runtime torch runs; torch-compile keeps floats.")
        return CompiledDecoder(session)
    module, body = session.module, session.body
    mode = "reduce-overhead" if setup.device == "cuda" else "default"
    session.module = torch.compile(module, dynamic=False, mode=mode)
    session.body = session.module if body is module else torch.compile(body, dynamic=False, mode=mode)
    return session


class CompiledDecoder(Stepping):
    """See `Session`. A prompt and `logits` are the eager session's."""

    def __init__(self, eager: torch_eager.TorchSession) -> None:
        self._eager = eager
        self._asked = 0
        self._step: _Step | None = None

    @property
    def precision(self) -> str:
        return self._eager.precision

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        return self._eager.encode(input_ids, attention_mask)

    def logits(self, input_ids: Ids) -> Floats:
        return self._eager.logits(input_ids)

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        return self._eager.classify(input_ids, attention_mask, token_type_ids)

    def generate(self, input_ids: Ids, new_tokens: int, ends: Collection[int] = ()) -> Generated:
        """See `Session`; the cache gets room for all tokens beforehand."""
        self._asked = input_ids.shape[1] + new_tokens
        return super().generate(input_ids, new_tokens, ends)

    def prefill(self, input_ids: Ids) -> Floats:
        logits = self._eager.prefill(input_ids)
        wanted, self._asked = max(self._asked, input_ids.shape[1] + 1), 0
        self._go_on([(layer.keys, layer.values) for layer in self._eager.cache.layers], wanted)
        self._eager.cache = None
        return logits

    def decode(self, input_ids: Ids) -> Floats:
        assert self._step is not None, "a prompt comes first"
        if self._step.position == self._step.room:
            self._go_on(self._step.states(), self._step.room + 1)
        return as_float32(self._step(self._eager.on_device(input_ids)))

    def _go_on(self, states: _States, length: int) -> None:
        """From a cache's keys and values, in one with room for a length; what was compiled for such shapes is used again."""
        room = -(-length // ROOM) * ROOM
        if self._step is None or (self._step.batch, self._step.room) != (len(states[0][0]), room):
            self._step = _Step(self._eager.module, states[0][0], room)
        self._step.take(states)


class _Place:
    """One block's keys and values, [B, H, R, E] each, as a block of `transformers` asks for its cache."""

    def __init__(self, like: Any, room: int, at: Any) -> None:
        shape = (*like.shape[:2], room, like.shape[3])
        self.keys, self.values, self.at = like.new_zeros(shape), like.new_zeros(shape), at

    def update(self, keys: Any, values: Any, layer_idx: int, *more: Any, **said: Any) -> tuple[Any, Any]:
        """Write one position; all of them."""
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values


class _Step:
    """One compiled step of fixed shapes."""

    def __init__(self, module: Any, like: Any, room: int) -> None:
        import torch

        self.batch, self.room, self.position = len(like), room, 0
        self._module, self._body = module, module.model
        self._blocks = [_first_of_its_cache(block) for block in self._body.layers]
        self._at = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._positions = torch.arange(room, device=like.device)
        self._places = [_Place(like, room, self._at) for _ in self._blocks]
        self._block, self._head = _compiled()
        self._limits = {"fail_on_recompile_limit_hit": True, "recompile_limit": KINDS_OF_BLOCKS}
        self._graph: _Recorded | None = None

    def take(self, states: _States) -> None:
        """Copy what another cache holds."""
        self.position = states[0][0].shape[2]
        for place, (keys, values) in zip(self._places, states, strict=True):
            place.keys[:, :, : self.position] = keys
            place.values[:, :, : self.position] = values

    def states(self) -> _States:
        """What is held, to be copied."""
        return [(place.keys[:, :, : self.position], place.values[:, :, : self.position]) for place in self._places]

    def __call__(self, ids: Any) -> Any:
        """[B, V] logits of one more token for each sequence."""
        import torch

        with torch.inference_mode(), torch._dynamo.config.patch(self._limits):
            self._at.fill_(self.position)
            self.position += 1
            if not ids.is_cuda:
                return self._compute(ids)
            self._graph = self._graph or _Recorded(self._compute, ids)
            return self._graph(ids)

    def _compute(self, ids: Any) -> Any:
        hidden = self._body.embed_tokens(ids)
        turns = self._body.rotary_emb(hidden, position_ids=self._at[None])
        seen = (self._positions <= self._at).expand(len(ids), 1, 1, self.room)
        for block, place in zip(self._blocks, self._places, strict=True):
            hidden = self._block(block, hidden, seen, turns, place)
        return self._head(self._module, hidden)


def _first_of_its_cache(block: Any) -> Any:
    """The block, its weights shared, as the first one of a cache of its own: its number would be compiled into its code."""
    attention, found = copy.copy(block.self_attn), copy.copy(block)
    attention.layer_idx = 0
    found._modules = {**block._modules, "self_attn": attention}
    return found


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[[Any, Any], Any]]:
    """`_block` and `_head`, compiled: once in a process, for all sessions; a graph that breaks is an error."""
    import torch

    return torch.compile(_block, dynamic=False, fullgraph=True), torch.compile(_head, dynamic=False, fullgraph=True)


def _block(block: Any, hidden: Any, seen: Any, turns: Any, place: _Place) -> Any:
    """[B, 1, D] after a block."""
    return block(hidden, attention_mask=seen, position_embeddings=turns, past_key_values=place, use_cache=True)


def _head(module: Any, hidden: Any) -> Any:
    """[B, V] after the last norm and the head."""
    return module.lm_head(module.model.norm(hidden))[:, -1]


class _Recorded:
    """A function of one tensor as a CUDA graph.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture; three runs before it, on a stream of their own,
    compile and warm up.
    """

    def __init__(self, compute: Callable[[Any], Any], value: Any) -> None:
        import torch

        self._given = value.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                compute(self._given)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found = compute(self._given)

    def __call__(self, value: Any) -> Any:
        self._given.copy_(value)
        self._graph.replay()
        return self._found
