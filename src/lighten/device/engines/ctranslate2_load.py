"""Load and run a stored model in CTranslate2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ctranslate2
import numpy as np


def load(engine: str, path: Path, threads: int) -> Callable[[], object]:
    return first_tokens(path, threads, decoder=False)((1, 1))


def first_tokens(path: Path, threads: int, *, decoder: bool) -> Callable[[tuple[int, int]], Callable[[], object]]:
    """(batch, length) → one pass over as many tokens, all of them the vocabulary's first, outputs copied as a session does."""
    kind = ctranslate2.Generator if decoder else ctranslate2.Encoder
    model = kind(str(path), device="cpu", inter_threads=1, intra_threads=threads)

    def runner(size: tuple[int, int]) -> Callable[[], object]:
        ids, lengths = np.zeros(size, np.int32), np.full(size[0], size[1], np.int32)
        given = [ctranslate2.StorageView.from_array(value) for value in (ids, lengths)]
        if decoder:
            return lambda: np.array(model.forward_batch(*given))
        return lambda: np.array(model.forward_batch(*given).last_hidden_state)

    return runner
