"""A model as data: steps that each give the parts of one module, put together by family modules.

A step reads its sizes from the config where it stands: a width is a number, the name of a config field, or a function of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families._fields import MOST_LAYERS, activation
from lighten.model.spec import Attention, Chunks, Elementwise, Embedding, Linear, Norm, Part, Product, Rows, Size, Table

Config: TypeAlias = Mapping[str, Any]
Width: TypeAlias = "str | int | Callable[[Config], int]"
Condition: TypeAlias = "bool | str | Callable[[Config], bool]"


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where a step stands.

    Attributes:
        config: the completed config.
        at: what its names begin with: empty, or a path that ends in a dot.
        base: the same of the model without its head.
        rows: which positions it computes.
        layer: number of the block.
    """

    config: Config
    at: str = ""
    base: str = ""
    rows: Rows = "token"
    layer: int = 0

    def size(self, width: Width) -> int:
        """The number that a width stands for.

        Raises:
            ModelError: a field that is no positive whole number.
        """
        if isinstance(width, int):
            return width
        if callable(width):
            return width(self.config)
        return positive(self.config, (width,))[width]

    def true(self, condition: Condition) -> bool:
        """Whether a condition holds: a truth, the name of a config field, or a function of the config."""
        if isinstance(condition, str):
            return bool(self.config.get(condition))
        return condition(self.config) if callable(condition) else condition

    def name(self, name: str) -> str:
        """The full name of a module here; `{}` in it stands for the block's number."""
        return self.at + name.replace("{}", str(self.layer))

    def inside(self, path: str, layer: int) -> Scope:
        """The scope of a block; an empty path: its modules carry its number themselves."""
        return replace(self, at=f"{self.at}{path}." if path else self.at, layer=layer)


Step: TypeAlias = Callable[[Scope], Iterable[Part]]


def positive(config: Config, names: Iterable[str]) -> dict[str, int]:
    """The named fields.

    Raises:
        ModelError: naming all that are missing or not positive whole numbers.
    """
    wrong = [name for name in names if isinstance(config.get(name), bool) or not isinstance(config.get(name), int) or config[name] <= 0]
    if wrong:
        found = ", ".join(f"{name}={config[name]!r}" if name in config else f"{name} is missing" for name in wrong)
        raise ModelError(f"config.json of a {config.get('model_type')} model needs positive whole numbers; found: {found}.")
    return {name: config[name] for name in names}


def run(steps: Iterable[Step], scope: Scope) -> list[Part]:
    """The parts of steps, in order."""
    return [part for step in steps for part in step(scope)]


def blocks(path: str, count: Width, *steps: Step) -> Step:
    """`count` times the same steps; `{}` in the path stands for the block's number.

    Raises (when it is run):
        ModelError: more blocks than any model has.
    """

    def parts(scope: Scope) -> Iterable[Part]:
        times = scope.size(count)
        if times > MOST_LAYERS:
            raise ModelError(f"config.json: {count if isinstance(count, str) else 'number of layers'}={times} is more than {MOST_LAYERS}.")
        return [part for layer in range(times) for part in run(steps, scope.inside(path.format(layer), layer))]

    return parts


def base(*steps: Step) -> Step:
    """Steps of the model below the head."""
    return lambda scope: run(steps, replace(scope, at=scope.base))


def on(rows: Rows, *steps: Step) -> Step:
    """Steps on other rows."""
    return lambda scope: run(steps, replace(scope, rows=rows))


def product(  # noqa: PLR0913  what a product is
    name: str, m: Size | Width, k: Size | Width, n: Size | Width, *, times: Width = 1, component: str = "attention", once: bool = False,
) -> Step:  # fmt: skip
    """`times` products m × k × n of activations for each sequence, or `once` for all of them; "query" and "key" are lengths."""

    def parts(scope: Scope) -> Iterable[Part]:
        def length(size: Size | Width) -> Size:
            if isinstance(size, Chunks) or size in get_args(get_args(Size)[0]):
                return cast(Size, size)
            return scope.size(size)

        rows: Rows = "position" if once else scope.rows
        return [Product(name=scope.name(name), component=component, rows=rows, m=length(m), k=length(k), n=length(n), products=scope.size(times))]

    return parts


def when(condition: Condition, *steps: Step) -> Step:
    """Steps where a condition holds."""
    return lambda scope: run(steps, scope) if scope.true(condition) else ()


def unless_first(*steps: Step) -> Step:
    """Steps of all blocks but the first."""
    return lambda scope: run(steps, scope) if scope.layer else ()


def refuse(field: str, value: Any = True) -> Step:
    """A config field that asks for what no formula describes.

    Raises (when it is run):
        UnsupportedFamily: the field has that value.
    """

    def parts(scope: Scope) -> Iterable[Part]:
        if scope.config.get(field) == value:
            raise UnsupportedFamily(f"{scope.config.get('model_type')} with {field}={value!r} has no formula; it can be traced.")
        return ()

    return parts


def table(name: str, count: Width, size: Width = "hidden_size", *, rows: Rows | None = None, component: str = "embedding") -> Step:
    """A table that is looked up."""
    return lambda scope: [
        Embedding(
            name=scope.name(name), component=component, rows=scope.rows if rows is None else rows,
            num_embeddings=scope.size(count), embedding_dim=scope.size(size),
        )
    ]  # fmt: skip


def weights(component: str, shapes: Mapping[str, tuple[Width, ...]]) -> Step:
    """Parameters that are no weight matrix of a linear, by their tensors' names."""

    def parts(scope: Scope) -> Iterable[Part]:
        found = {scope.name(name): tuple(map(scope.size, shape)) for name, shape in shapes.items()}
        return [Table(name=next(iter(found)), component=component, rows=scope.rows, shapes=found)]

    return parts


def linear(  # noqa: PLR0913  what a linear is
    name: str, component: str, inputs: Width, outputs: Width, *, bias: Condition = True, tied_to: str | None = None, rows: Rows | None = None,
) -> Step:  # fmt: skip
    """A linear. `tied_to` is a path of the base model; it holds where `tie_word_embeddings` says so."""

    def parts(scope: Scope) -> Iterable[Part]:
        tied = scope.base + tied_to if tied_to and scope.config.get("tie_word_embeddings", True) else None
        return [
            Linear(
                name=scope.name(name), component=component, rows=scope.rows if rows is None else rows, in_features=scope.size(inputs),
                out_features=scope.size(outputs), bias=scope.true(bias), tied_to=tied,
            )
        ]  # fmt: skip

    return parts


@dataclass(frozen=True, kw_only=True)
class VocabularyHead(Linear):
    """A linear whose bias is a parameter of another module.

    Attributes:
        shared_bias: full name of that parameter. Where the weight is not tied, transformers keeps a bias of its own beside it.
    """

    shared_bias: str

    def tensors(self) -> dict[str, tuple[int, ...]]:
        found = super().tensors()
        if self.tied_to:
            found.pop(f"{self.name}.bias", None)
        return found | {self.shared_bias: (self.out_features,)}


def vocabulary_head(name: str, inputs: Width, *, shared_bias: str, tied_to: str, own_bias: bool = True, always_tied: bool = False) -> Step:
    """The last linear of a language model, its bias kept under another name; `own_bias`: under its own too where it is not tied."""

    def parts(scope: Scope) -> Iterable[Part]:
        tied = scope.base + tied_to if always_tied or scope.config.get("tie_word_embeddings", True) else None
        return [
            VocabularyHead(
                name=scope.name(name), component="head", rows=scope.rows, in_features=scope.size(inputs), out_features=scope.size("vocab_size"),
                bias=own_bias, tied_to=tied, shared_bias=scope.name(shared_bias),
            )
        ]  # fmt: skip

    return parts


def norm(
    name: str, size: Width = "hidden_size", kind: Literal["layernorm", "rmsnorm"] = "layernorm", *, component: str = "norm",
    bias: Condition | None = None, rows: Rows | None = None,
) -> Step:  # fmt: skip
    """A normalization."""
    return lambda scope: [
        Norm(
            name=scope.name(name), component=component, rows=scope.rows if rows is None else rows, size=scope.size(size), kind=kind,
            bias=None if bias is None else scope.true(bias),
        )
    ]  # fmt: skip


def act(name: str, size: Width, *, field: str | None = None, kind: str = "gelu", component: str = "mlp", rows: Rows | None = None) -> Step:
    """An activation function: that of a config field, else `kind`."""

    def parts(scope: Scope) -> Iterable[Part]:
        chosen = str(scope.config.get(field)) if field else kind
        made = activation(scope.name(name), chosen, scope.size(size))
        return [replace(made, component=component, rows=scope.rows if rows is None else rows)]

    return parts


def elementwise(name: str, component: str, size: Width, kind: Any, flops: int = 1, *, rows: Rows | None = None) -> Step:
    """An operation on each value: a residual addition, a gate, a tanh."""
    return lambda scope: [
        Elementwise(
            name=scope.name(name), component=component, rows=scope.rows if rows is None else rows, size=scope.size(size), kind=kind,
            flops_per_element=flops,
        )
    ]  # fmt: skip


def add(name: str, component: str, size: Width = "hidden_size", flops: int = 1) -> Step:
    """A residual addition."""
    return elementwise(name, component, size, "add", flops)


def head_dim(config: Config) -> int:
    """hidden_size / num_attention_heads.

    Raises:
        ModelError: not a whole number.
    """
    c = positive(config, ("hidden_size", "num_attention_heads"))
    return divided(c, "hidden_size", "num_attention_heads")


def divided(config: Config, size: str, heads: str) -> int:
    """A width of each head.

    Raises:
        ModelError: not a whole number.
    """
    c = positive(config, (size, heads))
    if c[size] % c[heads]:
        raise ModelError(f"config.json: {size}={c[size]} is not a multiple of {heads}={c[heads]}.")
    return c[size] // c[heads]


def attend(  # noqa: PLR0913  what an attention is
    name: str, *, heads: Width = "num_attention_heads", dim: Width = head_dim, causal: Condition = "is_decoder", keys: Size | None = None,
    kv_heads: Width | None = None, window: Callable[[Scope], int | None] = lambda scope: None,
) -> Step:  # fmt: skip
    """softmax(Q Kᵀ) V; `keys` are the scope's own unless said otherwise."""

    def parts(scope: Scope) -> Iterable[Part]:
        own: Size = "source" if scope.rows == "source" else "key"
        return [
            Attention(
                name=scope.name(name), component="attention", rows=scope.rows, causal=scope.true(causal), keys=own if keys is None else keys,
                num_attention_heads=scope.size(heads), num_key_value_heads=scope.size(heads if kv_heads is None else kv_heads),
                head_dim=scope.size(dim), window=window(scope),
            )
        ]  # fmt: skip

    return parts


def labels(config: Config) -> int:
    """Number of classes of a task head: `num_labels`, else of the names in `id2label`, else transformers' 2.

    Raises:
        ModelError: neither is what it should be.
    """
    names = config.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ModelError("config.json: id2label is not a table of numbers and names.")
    if config.get("num_labels") is not None:
        return positive(config, ("num_labels",))["num_labels"]
    return len(names) or 2
