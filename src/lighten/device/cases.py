"""What the probe measures, as data: the same micro-models and sizes for every engine. No runtime is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lighten.device.profile import BlockSample
from lighten.model.spec import Attention, Elementwise, Linear, ModelSpec, Norm, Part

HEADS = 8
"""Heads of the attention micro-models: the batch varies, the heads need not."""


@dataclass(frozen=True)
class Case:
    """One micro-model. Its rows (or batch and length) are dynamic, as in an exported model.

    kinds and their shapes: empty () · call () · chain (width, count) · linear (in_features, out_features) · attention (head_dim,) ·
    layernorm, rmsnorm, gelu, add, rotary (width,) · stack (width, inner width, pairs) · block (hidden, heads, intermediate, layers)
    """

    kind: str
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return "_".join([self.kind, *map(str, self.shape)])

    @property
    def axes(self) -> tuple[str, ...]:
        """The dynamic axes that a size gives: batch, queries, keys; batch, sequence; or rows."""
        return {"attention": ("b", "q", "k"), "block": ("b", "s")}.get(self.kind, ("r",))

    @property
    def inputs(self) -> dict[str, tuple[str | int, ...]]:
        """Inputs and their shapes, dynamic axes by name. All are floats but `mask`, which is 1 where a key is seen."""
        match self.kind:
            case "attention":
                width = HEADS * self.shape[0]
                return {"q": ("b", "q", width), "k": ("b", "k", width), "v": ("b", "k", width), "mask": ("b", "k")}
            case "block":
                return {"x": ("b", "s", self.shape[0]), "mask": ("b", "s")}
            case "add" | "rotary":
                return {"x": ("r", self.shape[0]), "z": ("r", self.shape[0])}
            case _:
                return {"x": ("r", self.shape[0] if self.shape else 1)}

    @property
    def output(self) -> tuple[str | int, ...]:
        """Shape of the one output."""
        if self.kind == "linear":
            return ("r", self.shape[1])
        return next(iter(self.inputs.values()))

    def input_shapes(self, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Inputs and their shapes at one size."""
        sides = dict(zip(self.axes, size, strict=True))
        return {name: tuple(side if isinstance(side, int) else sides[side] for side in shape) for name, shape in self.inputs.items()}


EMPTY = Case("empty")
CALL = Case("call")
CHAIN = Case("chain", (16, 32))
LINEAR_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
LINEARS: dict[tuple[int, int], tuple[int, ...]] = {
    (64, 64): LINEAR_ROWS,
    (384, 384): LINEAR_ROWS,
    (384, 1536): LINEAR_ROWS,
    (1536, 384): LINEAR_ROWS,
    (576, 1536): (1, 16, 256, 1024),
    (2048, 2048): (1, 4, 16, 64, 256, 1024),
}
"""(in_features, out_features) → rows: products from a token's to a batch's, weights from 16 KB to 16 MB in fp32, which
last-level caches hold between two runs."""
ATTENTIONS: dict[tuple[int, int, int], tuple[int, ...]] = {
    (16, 16, 32): (1, 8, 64),
    (128, 128, 32): (1, 8, 32),
    (512, 512, 32): (1, 4),
    (16, 16, 64): (1, 8, 64),
    (128, 128, 64): (1, 8, 32),
    (512, 512, 64): (1, 4),
    (1, 128, 64): (1, 8),
    (1, 1024, 64): (1, 8),
}
"""(queries, keys, head_dim) → batches of `HEADS` heads each."""
POINTWISE = ("layernorm", "rmsnorm", "gelu", "add", "rotary")
POINTWISE_WIDTH = 512
POINTWISE_ROWS = (1, 64, 1024, 8192)
BLOCKS: dict[tuple[int, int, int, int], tuple[tuple[int, int], ...]] = {
    (256, 8, 1024, 2): ((1, 1), (1, 16), (1, 128), (8, 64), (2, 512), (32, 128)),
    (320, 10, 1280, 2): ((1, 32), (4, 128), (16, 32), (16, 192)),
    (640, 10, 2560, 2): ((1, 1), (1, 16), (1, 128), (2, 256), (16, 64)),
    (1024, 16, 4096, 2): ((1, 1), (1, 8), (1, 32), (1, 128)),
}
"""(hidden_size, heads, intermediate_size, layers) → (batch, length): synthetic encoders that calibrate the sum of single operators, with
weights from 6 MB to 100 MB in fp32, from few rows (weights arrive from memory) to many (products bind)."""
COMPILED_BLOCKS: dict[tuple[int, int, int, int], tuple[tuple[int, int], ...]] = {
    (256, 8, 1024, 1): ((1, 16), (8, 64), (16, 128)),
    (640, 10, 2560, 1): ((1, 128), (8, 128)),
}
"""The same for torch-compile, which compiles each size anew (20 to 60 s on 2 cores): one layer, few sizes."""
TINY = Case("stack", (16, 16, 2))
STACK = Case("stack", (1024, 1536, 4))
"""12.6 M parameters in 8 linears, 50 MB in fp32, to see how many copies of the weights a runtime keeps."""


def sizes(case: Case) -> Iterator[tuple[int, ...]]:
    """The sizes at which a case is measured."""
    match case.kind:
        case "linear":
            yield from ((rows,) for rows in LINEARS[case.shape[0], case.shape[1]])
        case "attention":
            for (queries, keys, head_dim), batches in ATTENTIONS.items():
                if head_dim == case.shape[0]:
                    yield from ((batch, queries, keys) for batch in batches)
        case "block":
            yield from (BLOCKS | COMPILED_BLOCKS)[case.shape]  # type: ignore[index]
        case "empty" | "call" | "chain":
            yield (1,)
        case _:
            yield from ((rows,) for rows in POINTWISE_ROWS)


def all_cases() -> list[Case]:
    """Everything that is measured on an engine, overheads first."""
    return [
        EMPTY,
        CALL,
        CHAIN,
        *(Case("linear", shape) for shape in LINEARS),
        *(Case("attention", (head_dim,)) for head_dim in sorted({shape[2] for shape in ATTENTIONS})),
        *(Case(kind, (POINTWISE_WIDTH,)) for kind in POINTWISE),
        *(Case("block", shape) for shape in BLOCKS),
    ]


def block_spec(block: BlockSample) -> ModelSpec:
    """The synthetic block as a spec, so that its operators are described as any model's are."""
    parts = tuple(part for layer in range(block.layers) for part in _layer(f"layer.{layer}", block))
    return ModelSpec(name="synthetic", family="synthetic", architecture="", source="", dtype="float32", config={}, parts=parts)


def _layer(at: str, block: BlockSample) -> list[Part]:
    hidden, inner, heads = block.hidden_size, block.intermediate_size, block.num_attention_heads

    def linear(name: str, columns: int, outputs: int) -> Linear:
        return Linear(name=f"{at}.{name}", component="block", in_features=columns, out_features=outputs, bias=True)

    def pointwise(name: str, size: int, kind: str) -> Elementwise:
        return Elementwise(name=f"{at}.{name}", component="block", size=size, kind=kind, flops_per_element=1)  # type: ignore[arg-type]

    def norm(name: str) -> Norm:
        return Norm(name=f"{at}.{name}", component="block", size=hidden, kind="layernorm")

    return [
        *(linear(name, hidden, hidden) for name in "qkv"),
        Attention(
            name=f"{at}.attention",
            component="block",
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden // heads,
            causal=False,
        ),
        linear("o", hidden, hidden),
        pointwise("add_1", hidden, "add"),
        norm("norm_1"),
        linear("up", hidden, inner),
        pointwise("act", inner, "gelu"),
        linear("down", inner, hidden),
        pointwise("add_2", hidden, "add"),
        norm("norm_2"),
    ]
