"""The micro-models in torch, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lighten.device.cases import COLD_ELEMENTS, COMPILED_BLOCKS, HEADS, Case

MAX_POSITIONS = 512
COMPILED = ("call", "block")
"""Cases that torch-compile compiles. Its single operators are measured eager: the products come from the same library, and what fusion and
generated code save on the rest is what the compiled blocks calibrate."""


def open_bench(engine: str, threads: int) -> TorchBench:
    return TorchBench(engine, threads)


class TorchBench:
    def __init__(self, engine: str, threads: int) -> None:
        runtime, self.precision = engine.split("/")
        self.compiles = runtime == "torch-compile"
        self.dtype: torch.dtype = getattr(torch, self.precision)
        self.version = torch.__version__
        self.built: dict[Case, Callable[..., Tensor]] = {}
        self.weights: Tensor | None = None
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)

    def cases(self, wanted: Sequence[Case]) -> list[Case]:
        if not self.compiles:
            return list(wanted)
        return [case for case in wanted if case.kind not in ("block", "decoder")] + [Case("block", shape) for shape in COMPILED_BLOCKS]

    def prepare(self, cases: Sequence[Case]) -> None:
        """Nothing: each is built when it is first run."""

    def runner(self, case: Case, size: tuple[int, ...]) -> Callable[[], object]:
        if case.kind == "cold":
            return self._cold(case, self._input("x", (*size, case.shape[0])))
        if case.kind in ("fresh", "filled"):
            elements, there = size[0], torch.empty(size if case.kind == "filled" else 0, dtype=self.dtype)
            return (lambda: there.fill_(1)) if case.kind == "filled" else (lambda: torch.empty(elements, dtype=self.dtype).fill_(1))
        if case not in self.built:
            module = MODULES[case.kind](*case.shape).eval().to(self.dtype)
            compiled = self.compiles and case.kind in COMPILED
            self.built[case] = torch.compile(module, dynamic=False) if compiled else module
        model = self.built[case]
        inputs = [self._input(name, shape) for name, shape in case.input_shapes(size).items()]
        return lambda: model(*inputs)

    def _cold(self, case: Case, x: Tensor) -> Callable[[], object]:
        """So many linears, each with a weight of its own, parts of one memory that all cases share."""
        columns, outputs, count = case.shape
        if self.weights is None:
            self.weights = torch.randn(COLD_ELEMENTS // 64, dtype=self.dtype).repeat(64)
        weights = self.weights[: count * outputs * columns].view(count, outputs, columns).unbind()

        def run() -> None:
            for weight in weights:
                functional.linear(x, weight)

        return run

    def _input(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A row of random numbers, again and again: drawing millions of them would take longer than what is measured."""
        return torch.ones(shape, dtype=torch.int64) if name == "mask" else torch.randn(shape[-1]).to(self.dtype).expand(shape).contiguous()

    def store(self, case: Case, folder: Path) -> tuple[Path, int]:
        state = MODULES[case.kind](*case.shape).to(self.dtype).state_dict()
        path = folder / f"{case.name}.safetensors"
        save_file(state, path)
        return path, sum(tensor.nbytes for tensor in state.values())


class _Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class _Linears(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Attention(nn.Module):
    """As `transformers` calls it: heads are views of the projections, a mask that hides nothing is dropped, the result is made contiguous."""

    def __init__(self, head_dim: int, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).contiguous().flatten(2)


class _RMSNorm(nn.Module):
    """In single operators, as `transformers` computes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


class _Add(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x + z


class _Gelu(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x)


class _Rotary(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * z + torch.cat((-high, low), dim=-1) * z


class _Encoder(nn.Module):
    """An encoder of `transformers` with random weights: this runtime runs its modules, whose Python code costs as much as small products."""

    def __init__(self, hidden: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "vocab_size": 8, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
            "max_position_embeddings": MAX_POSITIONS, "attn_implementation": "sdpa",
        }  # fmt: skip
        self.model = transformers.BertModel(transformers.BertConfig(**settings), add_pooling_layer=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = self.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return output


class _Decoder(nn.Module):
    """A decoder of `transformers` with random weights, as `_Encoder`."""

    def __init__(self, hidden: int, heads: int, key_value_heads: int, inner: int, layers: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "vocab_size": 8, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
            "intermediate_size": inner, "max_position_embeddings": MAX_POSITIONS, "attn_implementation": "sdpa",
        }  # fmt: skip
        self.model = transformers.LlamaModel(transformers.LlamaConfig(**settings))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return output


class _Call(nn.Module):
    """What surrounds the layers: an encoder without any."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder(1, 1, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.encoder(x[None], torch.ones(1, len(x), dtype=torch.int64))
        return output


def _stack(outer: int, inner: int, pairs: int) -> nn.Module:
    return _Linears([outer, inner] * pairs + [outer])


MODULES: dict[str, Callable[..., nn.Module]] = {
    "empty": _Empty,
    "call": _Call,
    "chain": lambda width, count: _Linears([width] * (count + 1)),
    "stack": _stack,
    "linear": lambda columns, outputs: _Linears([columns, outputs]),
    "attention": _Attention,
    "layernorm": nn.LayerNorm,
    "rmsnorm": _RMSNorm,
    "gelu": _Gelu,
    "add": _Add,
    "rotary": _Rotary,
    "block": _Encoder,
    "decoder": _Decoder,
}
