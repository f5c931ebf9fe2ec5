"""What the probe measures, as data: the same micro-models and sizes for every engine. No runtime is imported here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lighten.device.profile import BlockSample
from lighten.model.spec import Attention, Elementwise, Linear, ModelSpec, Norm, Part

EAGER = ("cold", "fresh", "filled", "decoder")
"""Kinds that are measured only where single operators are called."""
HEADS = 8
"""Heads of the attention micro-models: the batch varies, the heads need not."""


@dataclass(frozen=True)
class Case:
    """One micro-model. Its rows (or batch and length) are dynamic, as in an exported model.

    kinds and their shapes: empty () · call () · chain (width, count) · linear (in_features, out_features) · attention (head_dim,) ·
    layernorm, rmsnorm, gelu, add, rotary (width,) · stack (width, inner width, pairs) · block (hidden, heads, intermediate, layers) ·
    cold (in_features, out_features, count): so many linears in turn · fresh (): a tensor of so many rows is made and filled ·
    filled (): the same without making it · decoder (hidden, heads, key-value heads, intermediate, layers)
    """

    kind: str
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return "_".join([self.kind, *map(str, self.shape)])

    @property
    def axes(self) -> tuple[str, ...]:
        """The dynamic axes that a size gives: batch, queries, keys; batch, sequence; or rows."""
        return {"attention": ("b", "q", "k"), "block": ("b", "s"), "decoder": ("b", "s")}.get(self.kind, ("r",))

    @property
    def inputs(self) -> dict[str, tuple[str | int, ...]]:
        """Inputs and their shapes, dynamic axes by name. All are floats but `mask`, which is 1 where a key is seen."""
        match self.kind:
            case "attention":
                width = HEADS * self.shape[0]
                return {"q": ("b", "q", width), "k": ("b", "k", width), "v": ("b", "k", width), "mask": ("b", "k")}
            case "block":
                return {"x": ("b", "s", self.shape[0]), "mask": ("b", "s")}
            case "decoder":
                return {"x": ("b", "s", self.shape[0])}
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
WIDE = (512, 16384)
"""As heads are; exported models have none here, so that runtimes of graphs do without."""
LINEAR_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
LINEARS: dict[tuple[int, int], tuple[int, ...]] = {
    (64, 64): LINEAR_ROWS,
    (512, 128): (1, 16, 64, 256, 1024),
    (256, 256): LINEAR_ROWS,
    (256, 1024): LINEAR_ROWS,
    (1024, 256): LINEAR_ROWS,
    (640, 640): LINEAR_ROWS,
    (640, 2560): LINEAR_ROWS[:-1],
    (2560, 640): LINEAR_ROWS[:-1],
    (2048, 2048): LINEAR_ROWS[:-2],
    WIDE: (1, 16, 64, 256),
}
"""(in_features, out_features) → rows: products from a token's to a batch's, weights from 16 KB to 32 MB in fp32. No
output is larger than 32 MB: what larger ones cost beyond their computation is measured as `fresh`."""
COLD_ELEMENTS = 32_000_000
COLD_ROWS = (1, 16, 64)
COLD_LINEARS = ((512, 128), (256, 1024), (640, 640), (2560, 640), (2048, 2048))
"""Linears measured with weights that come from memory: so many copies in turn that they have 32 million elements, 128 MB in fp32. A single linear
that is run again and again has its weight in a cache, a model's pass has not."""
FRESH = (1 << 20, 1 << 22, 1 << 23, 10_000_000, 1 << 25)
"""Elements of the made and filled tensors. C libraries give large blocks back to the system at once and get them anew, page by page: beyond
32 MiB writing was seen to take 12 times as long (glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits; mallopt(3))."""
ATTENTIONS: dict[tuple[int, int, int], tuple[int, ...]] = {
    (16, 16, 32): (1, 8, 64),
    (64, 64, 32): (1, 8, 32),
    (128, 128, 32): (1, 8, 32),
    (256, 256, 32): (1, 8),
    (512, 512, 32): (1, 4),
    (16, 16, 64): (1, 8, 64),
    (64, 64, 64): (1, 8, 32),
    (128, 128, 64): (1, 8, 32),
    (256, 256, 64): (1, 8),
    (512, 512, 64): (1, 4),
    (1, 128, 64): (1, 8),
    (1, 384, 64): (1, 8),
    (1, 1024, 64): (1, 8),
}
"""(queries, keys, head_dim) → batches of `HEADS` heads each."""
POINTWISE = ("layernorm", "rmsnorm", "gelu", "add", "rotary")
POINTWISE_WIDTH = 512
POINTWISE_ROWS = (1, 64, 1024, 8192)
LARGE_WIDTH, LARGE_ROWS = 1024, 16640
"""Measured once more where memory is given back at once (`FRESH`): 68 MB in fp32, 34 MB in bf16."""
BLOCKS: dict[tuple[int, int, int, int], tuple[tuple[int, int], ...]] = {
    (256, 8, 1024, 6): ((1, 1), (1, 16), (1, 128), (8, 64), (1, 512)),
    (320, 10, 1280, 2): ((1, 1), (1, 32), (4, 128), (16, 32), (16, 128)),
    (640, 10, 2560, 2): ((1, 1), (1, 16), (1, 128), (1, 256), (8, 64)),
    (1024, 16, 4096, 2): ((1, 1), (1, 8), (1, 32), (1, 128)),
}
"""(hidden_size, heads, intermediate_size, layers) → (batch, length): synthetic encoders that calibrate the sum of single operators, with
weights from 6 MB to 100 MB in fp32, from few rows (weights arrive from memory) to many (products bind)."""
COMPILED_BLOCKS: dict[tuple[int, int, int, int], tuple[tuple[int, int], ...]] = {
    (256, 8, 1024, 1): ((1, 16), (8, 64), (16, 128)),
    (640, 10, 2560, 1): ((1, 128), (8, 128)),
}
"""The same for torch-compile, which compiles each size anew (20 to 60 s on 2 cores): one layer, few sizes."""
DECODERS: dict[tuple[int, int, int, int, int], tuple[tuple[int, int], ...]] = {
    (512, 8, 2, 1408, 6): ((1, 1), (1, 24), (1, 128), (4, 64), (1, 320), (4, 96)),
    (896, 14, 2, 2560, 2): ((1, 1), (1, 16), (1, 64), (1, 256), (4, 128)),
}
"""(hidden_size, heads, key-value heads, intermediate_size, layers) → (batch, length): synthetic decoders with rotary positions, RMSNorm and a gated
MLP, for runtimes that run a model's modules as they are."""
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
        case "decoder":
            yield from DECODERS[case.shape]  # type: ignore[index]
        case "cold":
            yield from ((rows,) for rows in COLD_ROWS)
        case "fresh" | "filled":
            yield from ((elements,) for elements in FRESH)
        case "empty" | "call" | "chain":
            yield (1,)
        case _:
            yield from ((rows,) for rows in (POINTWISE_ROWS if case.shape[0] == POINTWISE_WIDTH else (LARGE_ROWS,)))


def all_cases() -> list[Case]:
    """Everything that is measured on an engine, overheads first; some engines leave some out (`in_graphs`)."""
    return [
        EMPTY,
        CALL,
        CHAIN,
        *(Case("linear", shape) for shape in LINEARS),
        *(Case("attention", (head_dim,)) for head_dim in sorted({shape[2] for shape in ATTENTIONS})),
        *(Case(kind, (width,)) for kind in POINTWISE for width in (POINTWISE_WIDTH, LARGE_WIDTH)),
        *(Case("cold", (columns, outputs, COLD_ELEMENTS // (columns * outputs))) for columns, outputs in COLD_LINEARS),
        Case("fresh"),
        Case("filled"),
        *(Case("block", shape) for shape in BLOCKS),
        *(Case("decoder", shape) for shape in DECODERS),
    ]


def in_graphs(cases: Sequence[Case]) -> list[Case]:
    """Those that say something of runtimes which build a graph beforehand, plan its memory and hold all its weights."""
    return [case for case in cases if case.kind not in EAGER and case.shape not in ((LARGE_WIDTH,), WIDE)]


def block_spec(block: BlockSample) -> ModelSpec:
    """The synthetic block as a spec, so that its operators are described as any model's are."""
    layer_of = _encoder_layer if block.num_key_value_heads is None else _decoder_layer
    parts = [part for layer in range(block.layers) for part in layer_of(f"layer.{layer}", block)]
    if block.num_key_value_heads is not None:
        parts.append(_norm("norm", block.hidden_size, "rmsnorm"))
    return ModelSpec(name="synthetic", family="synthetic", architecture="", source="", dtype="float32", config={}, parts=tuple(parts))


def _linear(name: str, columns: int, outputs: int, *, bias: bool) -> Linear:
    return Linear(name=name, component="block", in_features=columns, out_features=outputs, bias=bias)


def _pointwise(name: str, size: int, kind: str, flops: int = 1) -> Elementwise:
    return Elementwise(name=name, component="block", size=size, kind=kind, flops_per_element=flops)  # type: ignore[arg-type]


def _norm(name: str, size: int, kind: Literal["layernorm", "rmsnorm"]) -> Norm:
    return Norm(name=name, component="block", size=size, kind=kind)


def _attention(name: str, block: BlockSample, *, causal: bool) -> Attention:
    heads = block.num_attention_heads
    kv_heads, head_dim = block.num_key_value_heads or heads, block.hidden_size // heads
    return Attention(name=name, component="block", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, causal=causal)


def _encoder_layer(at: str, block: BlockSample) -> list[Part]:
    hidden, inner = block.hidden_size, block.intermediate_size
    return [
        *(_linear(f"{at}.{name}", hidden, hidden, bias=True) for name in "qkv"),
        _attention(f"{at}.attention", block, causal=False),
        _linear(f"{at}.o", hidden, hidden, bias=True),
        _pointwise(f"{at}.add_1", hidden, "add"),
        _norm(f"{at}.norm_1", hidden, "layernorm"),
        _linear(f"{at}.up", hidden, inner, bias=True),
        _pointwise(f"{at}.act", inner, "gelu"),
        _linear(f"{at}.down", inner, hidden, bias=True),
        _pointwise(f"{at}.add_2", hidden, "add"),
        _norm(f"{at}.norm_2", hidden, "layernorm"),
    ]


def _decoder_layer(at: str, block: BlockSample) -> list[Part]:
    hidden, inner = block.hidden_size, block.intermediate_size
    keys = hidden // block.num_attention_heads * (block.num_key_value_heads or block.num_attention_heads)
    return [
        _norm(f"{at}.norm_1", hidden, "rmsnorm"),
        *(_linear(f"{at}.{name}", hidden, outputs, bias=False) for name, outputs in (("q", hidden), ("k", keys), ("v", keys))),
        _pointwise(f"{at}.rotary", hidden + keys, "rotary", 3),
        _attention(f"{at}.attention", block, causal=True),
        _linear(f"{at}.o", hidden, hidden, bias=False),
        _pointwise(f"{at}.add_1", hidden, "add"),
        _norm(f"{at}.norm_2", hidden, "rmsnorm"),
        _linear(f"{at}.gate", hidden, inner, bias=False),
        _linear(f"{at}.up", hidden, inner, bias=False),
        _pointwise(f"{at}.act", inner, "silu"),
        _pointwise(f"{at}.multiply", inner, "multiply"),
        _linear(f"{at}.down", inner, hidden, bias=False),
        _pointwise(f"{at}.add_2", hidden, "add"),
    ]
