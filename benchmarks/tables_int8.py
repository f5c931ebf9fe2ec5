"""What do 8-bit codes in each table of an encoder lose by themselves? Everything else stays in float32.

    python benchmarks/tables_int8.py --model .models/minilm

The last line on stdout is one JSON object: `rows`, with the lost energy of the embeddings and what is kept of their neighbours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

from lighten.compress.rtn import quantize_rtn
from lighten.judge.quality import embedding_fidelity
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import PER_CHANNEL


def embed(module: Any, batches: list[Any], count: int) -> np.ndarray[Any, Any]:
    """[N, D] means of the last hidden states."""
    found = []
    for ids, mask in batches:
        hidden = module(input_ids=torch.as_tensor(ids), attention_mask=torch.as_tensor(mask)).last_hidden_state.numpy()
        weights = mask[..., None].astype(np.float32)
        found.append((hidden * weights).sum(1) / weights.sum(1))
    return np.concatenate(found)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file (default: the embedded text)")
    parser.add_argument("--seq-len", type=int, default=128)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    module, texts = AutoModel.from_pretrained(asked.model, dtype=torch.float32).eval(), load_text(asked.text).test
    batches = list(Tokenizer(asked.model).batches(texts, batch_size=32, length=asked.seq_len))
    reference, rows = embed(module, batches, len(texts)), []
    tables = {name: each for name, each in module.named_modules() if isinstance(each, nn.Embedding)}
    for chosen in [*([name] for name in tables), list(tables)]:
        exact = {name: tables[name].weight.data for name in chosen}
        for name, weight in exact.items():
            tables[name].weight.data = quantize_rtn(weight, bits=8, group_size=PER_CHANNEL, symmetric=True).dequantize()
        found = embed(module, batches, len(texts))
        for name, weight in exact.items():
            tables[name].weight.data = weight
        lost = float(np.square(found - reference).sum() / np.square(reference).sum())
        shapes = ", ".join(f"{name} {tuple(exact[name].shape)}" for name in chosen)
        rows.append({"tables": shapes, "lost_energy": lost, **{key: score.value for key, score in embedding_fidelity(reference, found).items()}})
        print(f"{shapes}: lost energy {lost:.2e}, neighbours {rows[-1]['neighbour_agreement']:.4f}", flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
