"""Do torchao's int8 products beat torch's own on this CPU? In turn, by the thread's CPU seconds; above 1 is faster than float32.

python benchmarks/torchao_int8.py --compile     # needs torchao, which lighten does not use
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from statistics import median
from typing import Any

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

SHAPES = ((384, 1536, 16), (384, 1536, 128), (384, 1536, 1024), (576, 1536, 1))
"""Columns, inner columns and rows: MiniLM at 1 x 16, 1 x 128 and more, SmolLM2 decoding."""


class Stack(torch.nn.Module):
    """Twelve linears, up and down in turn."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList(torch.nn.Linear(*((hidden, inner) if place % 2 == 0 else (inner, hidden))) for place in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, linear in enumerate(self.linears):
            x = linear(x) if place % 2 else torch.nn.functional.gelu(linear(x))
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="each by torch.compile")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [_measured(shape, compiled=asked.compile, rounds=asked.rounds) for shape in SHAPES]
    print(json.dumps({"rows": rows}))


def _measured(shape: tuple[int, int, int], *, compiled: bool, rounds: int) -> dict[str, Any]:
    hidden, inner, count = shape
    plain, x = Stack(hidden, inner).eval(), torch.randn(count, hidden)
    ways: dict[str, tuple[Any, torch.Tensor]] = {"float32": (plain, x), "bfloat16": (copy.deepcopy(plain).bfloat16(), x.bfloat16())}
    for name, config in (("int8 activations", Int8DynamicActivationInt8WeightConfig()), ("int8 weights", Int8WeightOnlyConfig())):
        for dtype in (torch.float32, torch.bfloat16):
            module = copy.deepcopy(plain).to(dtype)
            quantize_(module, config)
            ways[f"{name}, {str(dtype).removeprefix('torch.')}"] = (module, x.to(dtype))
    if compiled:
        ways = {name: (torch.compile(module), given) for name, (module, given) in ways.items()}
    runs = 2 if count > 500 else 8
    with torch.inference_mode():
        for module, given in ways.values():
            module(given)
        samples = []
        for _ in range(rounds):
            found = {}
            for name, (module, given) in ways.items():
                module(given)
                start = time.thread_time()
                for _ in range(runs):
                    module(given)
                found[name] = (time.thread_time() - start) / runs
            samples.append(found)
    row = {"shape": shape, "compiled": compiled} | {name: round(median(each["float32"] / each[name] for each in samples), 2) for name in ways}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
