"""Load and run a stored stack in torch, tensor by tensor as `transformers` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers  # the torch runtime runs its models: its import is part of what a process costs
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional


def load(engine: str, path: Path, threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    _ = transformers.PreTrainedModel  # the import above is lazy, this one is not
    with safe_open(path, framework="pt") as file:
        names = sorted({name.rsplit(".", 1)[0] for name in file.keys()}, key=lambda name: int(name.rsplit(".", 1)[1]))  # noqa: SIM118 (no mapping)
        layers = [(file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.bias")) for name in names]
    start = torch.zeros(1, layers[0][0].shape[1], dtype=layers[0][0].dtype)

    def forward() -> Tensor:
        x = start
        with torch.inference_mode():
            for weight, bias in layers:
                x = functional.linear(x, weight, bias)
        return x

    return forward
