"""llama.cpp on the CPU, by the package llama-cpp-python.

A native build ends the process on its first quantized product on virtual machines with AMX (llama.cpp #20824): run it in a child, as
`lighten measure` does with every runtime.

Shape legend: B sequences, S tokens of each, V vocabulary, D hidden size.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import RuntimeUnavailable
from lighten.formats.files import GGUF
from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Ids, Session, Setup, Stepping, without_head

AT_ONCE = 512
"""Tokens that a decoder computes at once; llama.cpp's own default (`n_ubatch` in include/llama.h)."""

_TYPES = {"float32": 0, "float16": 1}  # ggml_type of ggml/include/ggml.h
_FLASH = {"float32": 0, "float16": 1}  # llama_flash_attn_type of include/llama.h: its flash attention computes in float16
_NO_POOLING = 0  # llama_pooling_type of include/llama.h


def version() -> str:
    return str(_api().__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """The folder's GGUF file, mapped. In float32 everything is that but the products with quantized weights; in float16 attention and its cache are.

    Raises:
        RuntimeUnavailable: the folder holds no GGUF file, or one that llama.cpp does not load.
    """
    path = folder if folder.is_file() else folder / GGUF
    if not path.is_file():
        raise RuntimeUnavailable(f"{folder} holds no {GGUF}; llama.cpp runs GGUF files: compress the model @ llama.cpp, or lighten export --to gguf.")
    return LlamaSession(path, setup.threads, decoder=spec.is_decoder, dtype=setup.dtype)


def _api() -> Any:
    """The package.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    try:
        return import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise RuntimeUnavailable("runtime llama.cpp is not installed (no llama_cpp); pip install 'lighten[llama-cpp]', built from source.") from error


@cache
def _silenced() -> Any:
    """llama.cpp's own log goes nowhere, it would fill stderr. It calls back as long as the process lives: what is kept here must not be freed."""
    llama_cpp = _api()
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, None)
    return callback


class LlamaSession(Stepping):
    """See `Session`."""

    def __init__(self, path: Path, threads: int, *, decoder: bool, dtype: str) -> None:
        self._api = llama_cpp = _api()
        _silenced()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeUnavailable(f"llama.cpp {llama_cpp.__version__} does not load {path}; `lighten estimate` of it says what it holds.")
        self._threads, self._decoder, self._dtype = threads, decoder, dtype
        self._context: Any = None
        self._room = (0, 0)
        self._history = np.empty((0, 0), np.int64)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._width = llama_cpp.llama_model_n_embd(self._model)

    @property
    def precision(self) -> str:
        """The file's type, in llama.cpp's words, and that of attention where it is not float32."""
        import ctypes

        text = ctypes.create_string_buffer(128)
        self._api.llama_model_desc(self._model, text, len(text))
        return text.value.decode().split()[-1] + (", attention in float16" if self._dtype == "float16" else "")

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        hidden = np.zeros((*input_ids.shape, self._width), np.float32)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            kept = np.flatnonzero(mask)
            self._ensure(1, len(kept))
            self._run(ids[kept][None], 0, every=True)
            for place, token in enumerate(kept):
                hidden[row, token] = self._floats(self._api.llama_get_embeddings_ith(self._context, place), self._width)
        return hidden

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        raise without_head("llama.cpp")

    def logits(self, input_ids: Ids) -> Floats:
        found = np.empty((*input_ids.shape, self._vocabulary), np.float32)
        for row, ids in enumerate(input_ids):
            self._ensure(1, len(ids))
            self._run(ids[None], 0, every=True)
            for place in range(len(ids)):
                found[row, place] = self._floats(self._api.llama_get_logits_ith(self._context, place), self._vocabulary)
        return found

    def prefill(self, input_ids: Ids) -> Floats:
        sequences, length = input_ids.shape
        self._history = input_ids
        self._ensure(sequences, length + max(length, AT_ONCE))
        return self._last(input_ids, 0)

    def decode(self, input_ids: Ids) -> Floats:
        sequences, known = self._history.shape
        self._history = np.concatenate([self._history, input_ids], 1)
        if self._room[1] < known + 1:  # a longer cache, filled anew
            self._ensure(sequences, 2 * known)
            return self._last(self._history, 0)
        return self._last(input_ids, known)

    def _last(self, input_ids: Ids, start: int) -> Floats:
        """[B, V] the logits of the last position of each sequence."""
        sequences, length = input_ids.shape
        self._run(input_ids, start, every=False)
        places = [length * (sequence + 1) - 1 for sequence in range(sequences)]
        return np.stack([self._floats(self._api.llama_get_logits_ith(self._context, place), self._vocabulary) for place in places])

    def _floats(self, pointer: Any, count: int) -> Floats:
        found: Floats = np.ctypeslib.as_array(pointer, (count,)).copy()
        return found

    def _ensure(self, sequences: int, length: int) -> None:
        """An empty context with room for so many sequences of a length."""
        if self._context and sequences == self._room[0] and length <= self._room[1]:
            if self._decoder:
                self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
            return
        self._free_context()
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = sequences * length
        parameters.n_ubatch = min(AT_ONCE, sequences * length) if self._decoder else sequences * length
        parameters.n_seq_max = sequences
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.embeddings = not self._decoder
        parameters.pooling_type = _NO_POOLING
        parameters.type_k = parameters.type_v = _TYPES[self._dtype]
        parameters.flash_attn_type = _FLASH[self._dtype]
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeUnavailable(f"llama.cpp has no memory for {sequences} sequences of {length} tokens.")
        self._room = (sequences, length)

    def _run(self, input_ids: Ids, start: int, *, every: bool) -> None:
        """Compute [B, S] new tokens, each sequence after its first `start`; outputs of every token, or of the last of each sequence."""
        sequences, length = input_ids.shape
        batch = self._api.llama_batch_init(sequences * length, 0, 1)
        batch.n_tokens = sequences * length
        for place, token in enumerate(input_ids.reshape(-1)):
            sequence, position = divmod(place, length)
            batch.token[place], batch.pos[place] = int(token), start + position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = every or position == length - 1
        code = (self._api.llama_decode if self._decoder else self._api.llama_encode)(self._context, batch)
        self._api.llama_batch_free(batch)
        if code:
            raise RuntimeUnavailable(f"llama.cpp stopped with code {code} on {sequences} sequences of {length} tokens.")

    def _free_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._free_context()
            self._api.llama_model_free(self._model)
