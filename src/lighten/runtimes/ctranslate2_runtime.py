"""CTranslate2 on the CPU: in float32, or with int8 weights and activations.

It generates by itself, from tokens that it is given by name, and keeps its cache to itself.

Shape legend: B sequences, S tokens of each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import RuntimeUnavailable
from lighten.formats.files import CTRANSLATE2
from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Generated, Ids, Session, Setup, model_file, without_head


def version() -> str:
    import ctranslate2

    return str(ctranslate2.__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """Raises:
    RuntimeUnavailable: the folder holds no model of CTranslate2.
    """
    import ctranslate2

    model = model_file(folder, f"{CTRANSLATE2}/model.bin", "ctranslate2").parent
    kind = ctranslate2.Generator if spec.is_decoder else ctranslate2.Encoder
    return _CTranslate2Session(kind(str(model), device="cpu", inter_threads=1, intra_threads=setup.threads), model)


class _CTranslate2Session:
    """See `Session`."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._tokens: list[str] = json.loads((folder / "vocabulary.json").read_text())
        self._places = {token: place for place, token in enumerate(self._tokens)}

    @property
    def precision(self) -> str:
        kind = str(self._model.compute_type)
        return "int8" if kind.startswith("int8") else kind

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        lengths = attention_mask.sum(1)
        if not (attention_mask == (np.arange(attention_mask.shape[1]) < lengths[:, None])).all():
            raise RuntimeUnavailable("ctranslate2 takes padding after the tokens of a sequence alone.")
        found = self._model.forward_batch(_view(input_ids), _view(lengths), token_type_ids=np.zeros_like(input_ids).tolist())
        return np.array(found.last_hidden_state)

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        raise without_head("ctranslate2")

    def logits(self, input_ids: Ids) -> Floats:
        return np.array(self._model.forward_batch(_view(input_ids), _view(np.full(len(input_ids), input_ids.shape[1]))))

    def generate(self, input_ids: Ids, new_tokens: int, ends: Collection[int] = ()) -> Generated:
        prompts = [[self._tokens[token] for token in row] for row in input_ids.tolist()]
        first = 0.0

        def told(step: Any) -> bool:
            nonlocal first
            first = first or time.perf_counter()
            return False

        start = time.perf_counter()
        found = self._model.generate_batch(
            prompts, max_length=new_tokens, min_length=1 if ends else new_tokens, include_prompt_in_result=False, beam_size=1, sampling_topk=1,
            end_token=sorted(ends), return_end_token=True, callback=told,
        )  # fmt: skip
        end = time.perf_counter()
        rows = [[self._places[token] for token in each.sequences[0]] for each in found]
        longest = max(map(len, rows))
        ids = np.array([row + row[-1:] * (longest - len(row)) for row in rows])  # what ends a shorter one ends it again
        return Generated(ids=ids, first_s=first - start, rest_s=end - first)


def _view(value: Ids) -> Any:
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(value, np.int32))
