"""A tower of Transformer blocks over a sequence of any kind: patches of an image, frames of audio, tokens of a text.

What differs between families is data: `Block` says what a block computes, `BlockNames` where its checkpoint keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._fields import MOST_LAYERS, activation, optional
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, Norm, Part, Rows, Size, Table


@dataclass(frozen=True, kw_only=True)
class BlockNames:
    """Names of a block's modules below the block's own; `qkv` where query, key and value are one matrix."""

    attention: str = "attention.attention"
    q: str = "attention.attention.query"
    k: str = "attention.attention.key"
    v: str = "attention.attention.value"
    out: str = "attention.output.dense"
    qkv: str | None = None
    attention_norm: str = "layernorm_before"
    up: str = "intermediate.dense"
    gate: str = "mlp.gate_proj"
    down: str = "output.dense"
    mlp_norm: str = "layernorm_after"
    attention_scale: str = "layer_scale1.lambda1"
    mlp_scale: str = "layer_scale2.lambda1"


BERT_NAMES = BlockNames(
    attention="attention.self", q="attention.self.query", k="attention.self.key", v="attention.self.value",
    attention_norm="attention.output.LayerNorm", mlp_norm="output.LayerNorm",
)  # fmt: skip
BART_NAMES = BlockNames(
    attention="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm", up="fc1", down="fc2", mlp_norm="final_layer_norm",
)  # fmt: skip
CLIP_NAMES = replace(BART_NAMES, attention_norm="layer_norm1", up="mlp.fc1", down="mlp.fc2", mlp_norm="layer_norm2")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: attention and an MLP, each with a norm and a residual addition.

    Attributes:
        inner: width of all query heads together; the hidden size where heads divide it.
        gated: the MLP multiplies what its activation gives by a second projection.
        packed: gated, and both projections are one matrix of twice the width.
        scaled: each residual branch is multiplied by a learned vector (LayerScale; Touvron et al. 2021, arXiv:2103.17239).
        norm_first: the norms stand before attention and MLP; else after their residual additions.
        rotary: queries and keys are rotated by their positions.
        source_hidden: width of the rows that keys and values are projected from, where it is not its own.
    """

    hidden: int
    ffn: int
    heads: int
    act: str
    head_dim: int
    kv_heads: int
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    packed: bool = False
    scaled: bool = False
    norm_first: bool = True
    norm_bias: bool = True
    rotary: bool = False
    source_hidden: int | None = None
    causal: bool = False
    names: BlockNames = field(default_factory=BlockNames)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim


def block_of(config: Mapping[str, Any], family: str, **traits: Any) -> Block:
    """The block of a config that names its sizes as ViT and BERT do.

    Raises:
        ModelError: sizes that are missing, not positive, or no multiple of the number of heads.
    """
    act = traits.pop("act", None) or config.get("hidden_act", "gelu")
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads") + (() if "ffn" in traits else ("intermediate_size",))
    c = positive(config, wanted, family)
    check_layers(c["num_hidden_layers"])
    head_dim = optional(config, "head_dim") or divided(c["hidden_size"], c["num_attention_heads"])
    sizes = {"ffn": traits.pop("ffn", None) or c["intermediate_size"], "kv_heads": traits.pop("kv_heads", c["num_attention_heads"])}
    return Block(hidden=c["hidden_size"], heads=c["num_attention_heads"], head_dim=head_dim, act=str(act), **sizes, **traits)


def block(at: str, shape: Block, rows: Rows) -> list[Part]:
    """The parts of one block in forward order."""
    names = shape.names
    return [
        *residual(at, shape, attention(at, shape, rows), names.attention_norm, rows, scale_name=names.attention_scale),
        *residual(at, shape, mlp(at, shape, rows), names.mlp_norm, rows, scale_name=names.mlp_scale),
    ]


def decoder_block(at: str, shape: Block, cross: Block, *, keys: Size, key_rows: Rows, rows: Rows = "token") -> list[Part]:
    """A block whose queries attend, after themselves, to `keys` of an encoder; `cross` names that attention and its norm."""
    names = shape.names
    return [
        *residual(at, shape, attention(at, shape, rows), names.attention_norm, rows),
        *residual(at, shape, attention(at, cross, rows, keys=keys, key_rows=key_rows), cross.names.attention_norm, rows),
        *residual(at, shape, mlp(at, shape, rows), names.mlp_norm, rows),
    ]


def residual(at: str, shape: Block, branch: list[Part], norm_name: str, rows: Rows, *, scale_name: str = "") -> list[Part]:
    """A branch with its norm, its scale and its residual addition."""
    component = branch[-1].component
    norm = layernorm(f"{at}.{norm_name}", shape.hidden, rows, bias=shape.norm_bias)
    add = elementwise(f"{at}.{norm_name}.add", shape.hidden, "add", component, rows)
    scaled: list[Part] = []
    if shape.scaled:
        multiply = elementwise(f"{at}.{norm_name}.multiply", shape.hidden, "multiply", component, rows)
        scaled = [table("", {f"{at}.{scale_name}": (shape.hidden,)}, component), multiply]
    return [norm, *branch, *scaled, add] if shape.norm_first else [*branch, *scaled, add, norm]


def blocks(template: str, count: int, shape: Block, rows: Rows) -> list[Part]:
    """`count` equal blocks; `{}` in the template stands for a block's number."""
    return [part for number in range(count) for part in block(template.format(number), shape, rows)]


def attention(at: str, shape: Block, rows: Rows, *, keys: Size | None = None, key_rows: Rows | None = None) -> list[Part]:
    """Projections and attention, to the own sequence or to `keys` of another one, which are projected for `key_rows`."""
    names, hidden, kv = shape.names, shape.hidden, shape.kv_heads * shape.head_dim
    seen: Size = keys if keys is not None else rows if isinstance(rows, int) else "source" if rows == "source" else "key"
    projections: list[Part]
    if names.qkv is not None:
        projections = [linear(f"{at}.{names.qkv}", hidden, shape.inner + 2 * kv, shape.q_bias, "attention", rows)]
    else:
        of_keys, source = rows if key_rows is None else key_rows, shape.source_hidden or hidden
        projections = [
            linear(f"{at}.{names.q}", hidden, shape.inner, shape.q_bias, "attention", rows),
            linear(f"{at}.{names.k}", source, kv, shape.k_bias, "attention", of_keys),
            linear(f"{at}.{names.v}", source, kv, shape.v_bias, "attention", of_keys),
        ]
    return [
        *projections,
        *([elementwise(f"{at}.{names.attention}.rotary", shape.inner + kv, "rotary", "attention", rows, flops=3)] if shape.rotary else []),
        Attention(
            name=f"{at}.{names.attention}", component="attention", causal=shape.causal and keys is None, rows=rows, keys=seen,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        ),
        linear(f"{at}.{names.out}", shape.inner, hidden, shape.out_bias, "attention", rows),
    ]  # fmt: skip


def mlp(at: str, shape: Block, rows: Rows) -> list[Part]:
    """Two projections with an activation between them, or three where it is gated."""
    names, hidden, ffn = shape.names, shape.hidden, shape.ffn
    if shape.packed:
        return [
            linear(f"{at}.{names.up}", hidden, 2 * ffn, shape.mlp_bias, "mlp", rows),
            act_fn(f"{at}.mlp.act_fn", shape.act, ffn, "mlp", rows),
            elementwise(f"{at}.mlp.multiply", ffn, "multiply", "mlp", rows),
            linear(f"{at}.{names.down}", ffn, hidden, shape.mlp_bias, "mlp", rows),
        ]
    gate = [linear(f"{at}.{names.gate}", hidden, ffn, shape.mlp_bias, "mlp", rows)] if shape.gated else []
    multiply = [elementwise(f"{at}.mlp.multiply", ffn, "multiply", "mlp", rows)] if shape.gated else []
    return [
        *gate,
        linear(f"{at}.{names.up}", hidden, ffn, shape.mlp_bias, "mlp", rows),
        act_fn(f"{at}.mlp.act_fn", shape.act, ffn, "mlp", rows),
        *multiply,
        linear(f"{at}.{names.down}", ffn, hidden, shape.mlp_bias, "mlp", rows),
    ]


@dataclass(frozen=True, kw_only=True)
class Buffers(Table):
    """Tensors that a checkpoint holds and that are no parameters: the running statistics of a BatchNorm, an index of positions."""

    @property
    def parameters(self) -> int:
        return 0


def linear(name: str, columns: int, outputs: int, bias: bool, component: str, rows: Rows) -> Linear:
    return Linear(name=name, component=component, rows=rows, in_features=columns, out_features=outputs, bias=bias)


def layernorm(name: str, size: int, rows: Rows, component: str = "norm", *, bias: bool = True) -> Norm:
    return Norm(name=name, component=component, rows=rows, size=size, kind="layernorm", bias=bias)


def elementwise(name: str, size: int, kind: Any, component: str, rows: Rows, flops: int = 1) -> Elementwise:
    return Elementwise(name=name, component=component, rows=rows, size=size, kind=kind, flops_per_element=flops)


def act_fn(name: str, act: str, size: int, component: str, rows: Rows) -> Elementwise:
    """The activation function that a config names.

    Raises:
        ModelError: one that is not known.
    """
    return replace(activation(name, act, size), component=component, rows=rows)


def table(name: str, shapes: Mapping[str, tuple[int, ...]], component: str = "embedding") -> Table:
    """Parameters `name.key`, or `key` where there is no name."""
    return Table(
        name=name or next(iter(shapes)), component=component, shapes={f"{name}.{key}" if name else key: shape for key, shape in shapes.items()}
    )


def embedding(name: str, count: int, size: int, rows: Rows) -> Embedding:
    return Embedding(name=name, component="embedding", num_embeddings=count, embedding_dim=size, rows=rows)


def positive(config: Mapping[str, Any], names: Iterable[str], family: str) -> dict[str, int]:
    """The named fields, each a positive whole number.

    Raises:
        ModelError: naming all fields that are missing or not positive whole numbers.
    """
    values = {name: config.get(name) for name in names}
    wrong = [name for name, value in values.items() if not isinstance(value, int) or isinstance(value, bool) or value < 1]
    if wrong:
        found = ", ".join(f"{name}={config[name]!r}" if name in config else f"{name} is missing" for name in wrong)
        raise ModelError(f"config.json of a {family} model needs positive whole numbers; found: {found}.")
    return {name: int(value) for name, value in values.items() if value is not None}


def says(config: Mapping[str, Any], value: bool | str) -> bool:
    """A fact, or what a field of the config says: a switch, or a number that is more than 0. Missing or null: no.

    Raises:
        ModelError: a field that is neither a switch nor a number.
    """
    found = value if isinstance(value, bool) else config.get(value)
    if found is not None and not isinstance(found, int | float):
        raise ModelError(f"config.json: {value}={found!r} is neither true, false nor a number.")
    return found is not None and found > 0


def check_layers(count: int) -> None:
    """Raises:
    ModelError: more layers than any model has.
    """
    if count > MOST_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers={count} is more than {MOST_LAYERS}.")


def divided(hidden: int, heads: int) -> int:
    """Width of one head.

    Raises:
        ModelError: heads that do not divide the hidden size.
    """
    if hidden % heads:
        raise ModelError(f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}.")
    return hidden // heads


def pair(config: Mapping[str, Any], name: str, family: str) -> tuple[int, int]:
    """A field that is one positive whole number, or two: of height and width.

    Raises:
        ModelError: neither.
    """
    value = config.get(name)
    both: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(both) != 2 or not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in both):
        raise ModelError(f"config.json of a {family} model: {name}={value!r} is neither a positive whole number nor two of them.")
    return both[0], both[1]


def lengths(config: Mapping[str, Any], names: Iterable[str], family: str) -> dict[str, list[int]]:
    """The named fields, each a list of positive whole numbers, all equally long.

    Raises:
        ModelError: one that is not, or lists of different lengths.
    """
    values = {name: config.get(name) for name in names}
    wrong = [name for name, value in values.items() if not _is_list_of_counts(value)]
    if wrong:
        found = ", ".join(f"{name}={config[name]!r}" if name in config else f"{name} is missing" for name in wrong)
        raise ModelError(f"config.json of a {family} model needs lists of positive whole numbers; found: {found}.")
    lists = {name: [int(each) for each in value] for name, value in values.items() if value is not None}
    if len({len(value) for value in lists.values()}) > 1:
        raise ModelError(f"config.json of a {family} model: {', '.join(lists)} must be equally long; found: {list(lists.values())}.")
    return lists


def _is_list_of_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)


def labels_of(config: Mapping[str, Any]) -> int:
    """Classes of a task head: transformers' 2 where the config names none.

    Raises:
        ModelError: names that are no table.
    """
    names = config.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ModelError("config.json: id2label is not a table of numbers and names.")
    return optional(config, "num_labels") or len(names) or 2
