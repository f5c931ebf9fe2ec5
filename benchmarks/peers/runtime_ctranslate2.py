"""CTranslate2 by its own converter. Run by benchmarks/runtimes.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import runtime_job

REQUIREMENTS = ("torch==2.13.0", "ctranslate2==4.8.5", "transformers==5.23.0", "tokenizers")


class CTranslate2(runtime_job.Engine):
    """settings: quantization, as `ct2-transformers-converter --quantization` takes it."""

    PACKAGE = "ctranslate2"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        self.folder = work / "model"
        if not (self.folder / "model.bin").exists():
            ctranslate2.converters.TransformersConverter(str(model)).convert(str(self.folder), quantization=settings["quantization"], force=True)
        decoder = (self.folder / "vocabulary.json").exists() and "CausalLM" in (model / "config.json").read_text()
        kind = ctranslate2.Generator if decoder else ctranslate2.Encoder
        self.model = kind(str(self.folder), device="cpu", inter_threads=1, intra_threads=self.threads)
        self.names: list[str] = []
        if decoder:
            import json

            self.names = json.loads((self.folder / "vocabulary.json").read_text())

    def encode(self, ids: Any, mask: Any) -> Any:
        lengths = view(mask.sum(1))
        return np.array(self.model.forward_batch(view(ids), lengths, token_type_ids=np.zeros_like(ids).tolist()).last_hidden_state)

    def logits(self, ids: Any) -> Any:
        return np.array(self.model.forward_batch(view(ids), view(np.full(len(ids), ids.shape[1]))))

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, float]:
        first = [0.0]

        def told(step: Any) -> bool:
            first[0] = first[0] or time.perf_counter()
            return False

        prompts = [[self.names[token] for token in row] for row in ids.tolist()]
        start = time.perf_counter()
        self.model.generate_batch(
            prompts, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False, beam_size=1, sampling_topk=1, end_token=[],
            callback=told,
        )  # fmt: skip
        return first[0] - start, time.perf_counter() - first[0]

    def files(self) -> int:
        return runtime_job.folder_bytes(self.folder)


def view(value: Any) -> Any:
    return ctranslate2.StorageView.from_array(np.ascontiguousarray(value, np.int32))


if __name__ == "__main__":
    runtime_job.serve(CTranslate2)
