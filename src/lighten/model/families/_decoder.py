"""The frame of decoders: a table of tokens, blocks, a last norm and the heads of the auto classes; and what blocks of several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import MOST_LAYERS, activation, check_probabilities, label_count, optional
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, Norm, Part, Table

Config: TypeAlias = Mapping[str, Any]
Block: TypeAlias = Callable[[str, Config, int], list[Part]]
"""(path of the block, config, its number) → its parts in forward order."""
NormKind: TypeAlias = Literal["rmsnorm", "layernorm"]

FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LM, CLASSES, TOKENS, ANSWERS = "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A family of decoders.

    Attributes:
        stem: what its classes' names begin with; `base`: the rest of the name of the one without a head.
        block: gives a block's parts.
        fields: config fields that must be positive whole numbers.
        heads: the heads that it has; `answers_at`: the attribute under which the one for question answering keeps the model.
        trunk, table, layers, norm, head_name: names of the model, its embedding, its blocks, its last norm and its language-model head.
        norm_kind: of the last norm.
        head_bias: the field that says whether the language-model head has a bias, or whether it has.
        before: parts that follow the embedding.
    """

    stem: str
    block: Block
    fields: tuple[str, ...] = FIELDS
    heads: tuple[str, ...] = (LM,)
    base: str = "Model"
    answers_at: str = "model"
    trunk: str = "model"
    table: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    norm_kind: NormKind = "rmsnorm"
    head_name: str = "lm_head"
    head_bias: str | bool = False
    before: Callable[[str, Config], list[Part]] | None = None

    @property
    def architectures(self) -> tuple[str, ...]:
        return (*(self.stem + head for head in self.heads), self.stem + self.base)

    def family(self) -> Family:
        """Its entry in the registry."""
        return Family(describe=self.describe, architectures=self.architectures)

    def describe(self, config: Config, architecture: str) -> tuple[Part, ...]:
        """The parts of one of its architectures.

        Raises:
            ModelError: fields that are missing, no positive whole numbers, or contradict each other.
        """
        c = sizes(config, self.fields)
        optional(config, "max_position_embeddings")
        check_probabilities(config, ("attention_dropout", "hidden_dropout", "hidden_dropout_prob"))
        head = architecture.removeprefix(self.stem)
        trunk = self.answers_at if head == ANSWERS else self.trunk
        prefix = "" if head == self.base else f"{trunk}."
        table = f"{prefix}{self.table}"
        parts: list[Part] = [Embedding(name=table, component="embedding", num_embeddings=c["vocab_size"], embedding_dim=c["hidden_size"])]
        parts += self.before(prefix, config) if self.before else []
        for layer in range(c["num_hidden_layers"]):
            parts += self.block(f"{prefix}{self.layers}.{layer}", config, layer)
        parts.append(norm(f"{prefix}{self.norm}", c["hidden_size"], self.norm_kind))
        if head == LM:
            tied = table if config.get("tie_word_embeddings", True) else None
            vocabulary, bias = c["vocab_size"], flag(config, self.head_bias)
            return (*parts, linear(self.head_name, "head", c["hidden_size"], vocabulary, bias=bias, tied_to=tied, rows="logits"))
        return (*parts, *task_head(head, config))


def task_head(head: str, config: Config) -> list[Part]:
    """A task's head, over every token: transformers takes a sequence's class from its last one after the product."""
    hidden = size(config, "hidden_size")
    if head == CLASSES:
        return [linear("score", "head", hidden, label_count(config))]
    if head == TOKENS:
        return [linear("score", "head", hidden, label_count(config), bias=bool(config.get("token_classification_bias", True)))]
    return [linear("qa_outputs", "head", hidden, 2, bias=True)] if head == ANSWERS else []


def linear(name: str, component: str, columns: int, outputs: int, *, bias: bool = False, **more: Any) -> Linear:
    """A linear layer over every token."""
    return Linear(name=name, component=component, in_features=columns, out_features=outputs, bias=bias, **more)


def norm(name: str, size: int, kind: NormKind = "rmsnorm", **more: Any) -> Norm:
    """A normalization of every token."""
    return Norm(name=name, component="norm", size=size, kind=kind, **more)


def elementwise(name: str, component: str, size: int, kind: Any, flops: int = 1) -> Elementwise:
    """`flops` operations on each of `size` values of a token."""
    return Elementwise(name=name, component=component, size=size, kind=kind, flops_per_element=flops)


def flag(config: Config, field: str | bool) -> bool:
    """What a yes-or-no field says; or the constant itself."""
    return bool(config.get(field)) if isinstance(field, str) else field


def sizes(config: Config, fields: Iterable[str]) -> dict[str, int]:
    """The named fields, each a positive whole number.

    Raises:
        ModelError: naming all that are missing or none; or more layers than any model has.
    """
    found = {name: config.get(name) for name in fields}
    right = {name: value for name, value in found.items() if isinstance(value, int) and not isinstance(value, bool) and value > 0}
    if wrong := [f"{name}={value!r}" if name in config else f"{name} is missing" for name, value in found.items() if name not in right]:
        raise ModelError(f"config.json of a {config.get('model_type')} model needs positive whole numbers; found: {', '.join(wrong)}.")
    if right.get("num_hidden_layers", 0) > MOST_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers={right['num_hidden_layers']} is more than {MOST_LAYERS}.")
    return right


def size(config: Config, field: str) -> int:
    """A field that must be a positive whole number.

    Raises:
        ModelError: it is missing or is none.
    """
    value = optional(config, field)
    if value is None:
        raise ModelError(f"config.json of a {config.get('model_type')} model needs positive whole numbers; found: {field} is missing.")
    return value


def count(config: Config, field: str, default: int = 0) -> int:
    """A field that is a whole number of zero or more; missing or null: `default`.

    Raises:
        ModelError: neither.
    """
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(f"config.json: {field}={value!r} is not a whole number of zero or more.")
    return value


def numbers(config: Config, field: str) -> list[int]:
    """A field that is a list of whole numbers; missing or null: none.

    Raises:
        ModelError: another value.
    """
    value = config.get(field)
    if value is None:
        return []
    if not isinstance(value, list | tuple) or any(isinstance(each, bool) or not isinstance(each, int) for each in value):
        raise ModelError(f"config.json: {field}={value!r} is not a list of whole numbers.")
    return list(value)


Rule: TypeAlias = Callable[[Config, int], str]
"""(config, a layer's number) → its kind, where the config does not list them."""


def types(config: Config, field: str, rule: Rule) -> list[str]:
    """The kind of each layer: what the config lists, else what the family's `rule` gives.

    Raises:
        ModelError: no list of names, or one of another length than `num_hidden_layers`.
    """
    layers, listed = size(config, "num_hidden_layers"), config.get(field)
    if listed is None:
        return [rule(config, layer) for layer in range(layers)]
    if not isinstance(listed, list | tuple) or not all(isinstance(each, str) for each in listed):
        raise ModelError(f"config.json: {field} is not a list of names.")
    if len(listed) != layers:
        raise ModelError(f"config.json: {field} names {len(listed)} layers, num_hidden_layers={layers}.")
    return list(listed)


def always(kind: str) -> Rule:
    """A rule for `types` where all layers are alike."""
    return lambda config, layer: kind


def every(period: int | str, kind: str, other: str) -> Rule:
    """A rule for `types`: each `period`-th layer is of `kind`; a field's name stands for its value."""
    return lambda config, layer: kind if (layer + 1) % (size(config, period) if isinstance(period, str) else period) == 0 else other


Condition: TypeAlias = Callable[[Config, int], bool]
"""(config, a layer's number) → whether the layer has something."""


def yes(config: Config, layer: int) -> bool:
    """The condition that always holds."""
    return True


def no(config: Config, layer: int) -> bool:
    """The condition that never holds."""
    return False


def when(field: str) -> Condition:
    """The condition that a yes-or-no field holds."""
    return lambda config, layer: flag(config, field)


@dataclass(frozen=True, kw_only=True)
class GroupedQuery:
    """Attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245) and rotary positions, its projections apart.

    Attributes:
        at: its name in the block.
        bias, out_bias: of the three projections in and the one out: a field, or whether.
        head_norm: norm of queries and keys, over each head or over the whole row; `head_norm_if`: (config, layer) → whether it is there.
        names: of q, k, v, o and the norms.
        kinds: the rule for `layer_types` where the config has windows by layer; None where `sliding_window` holds for all.
        sinks: a learned score for each head (gpt-oss).
        gate: name of a linear that gates each value of the output (afmoe); `gated_queries`: that linear is part of the queries' (Qwen3-Next).
        rotates: (config, layer) → whether it has rotary positions.
    """

    at: str = "self_attn"
    bias: str | bool = "attention_bias"
    out_bias: str | bool = "attention_bias"
    head_norm: Literal["head", "row"] | None = None
    head_norm_if: Condition = yes
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    norm_kind: NormKind = "rmsnorm"
    norm_affine: bool = True
    kinds: Rule | None = None
    windowed: bool = True
    sinks: bool = False
    gate: str | None = None
    gated_queries: bool = False
    rotates: Condition = yes

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """The norms and projections of queries, keys and values, the attention itself, and the projection of its output."""
        at = f"{block}.{self.at}" if self.at else block
        hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        kv_heads, head_dim = kv_heads_of(config), head_dim_of(config)
        q, kv = heads * head_dim, kv_heads * head_dim
        bias, names = flag(config, self.bias), [f"{at}.{name}" for name in self.names]
        widths = (2 * q if self.gated_queries else q, kv, kv)
        parts: list[Part] = [linear(name, "attention", hidden, width, bias=bias) for name, width in zip(names, widths, strict=False)]
        if self.head_norm and self.head_norm_if(config, layer):
            parts += self._norms(at, heads, kv_heads, head_dim)
        if self.rotates(config, layer):
            parts.append(rotary(f"{at}.rotary", heads + kv_heads, rotary_dim(config, head_dim)))
        if self.sinks:
            parts.append(Table(name=f"{at}.sinks", component="attention", shapes={f"{at}.sinks": (heads,)}))
        parts.append(
            Attention(
                name=at, component="attention", causal=True, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                window=self.window(config, layer),
            )
        )  # fmt: skip
        if self.gate:
            parts.append(linear(f"{at}.{self.gate}", "attention", hidden, q))
        if self.gate or self.gated_queries:
            parts += [
                elementwise(f"{at}.gate.sigmoid", "attention", q, "sigmoid"),
                elementwise(f"{at}.gate.multiply", "attention", q, "multiply"),
            ]
        return [*parts, linear(names[3], "attention", q, hidden, bias=flag(config, self.out_bias))]

    def _norms(self, at: str, heads: int, kv_heads: int, head_dim: int) -> list[Part]:
        each = self.head_norm == "head"
        more: dict[str, Any] = {"kind": self.norm_kind, "affine": self.norm_affine}
        return [
            norm(f"{at}.{name}", head_dim if each else n * head_dim, groups=n if each else 1, **more)
            for name, n in zip(self.norm_names, (heads, kv_heads), strict=True)
        ]

    def window(self, config: Config, layer: int) -> int | None:
        """Keys that a query of this layer sees at most."""
        if not self.windowed:
            return None
        if self.kinds is None:
            return None if config.get("use_sliding_window") is False else count(config, "sliding_window") or None
        kind = types(config, "layer_types", self.kinds)[layer]
        if kind == "chunked_attention":  # within chunks of so many positions: a query sees half of one in the mean, all of it at most
            return optional(config, "attention_chunk_size")
        return count(config, "sliding_window") or None if kind == "sliding_attention" else None


def kv_heads_of(config: Config) -> int:
    """Heads of keys and values.

    Raises:
        ModelError: they do not divide the heads of queries.
    """
    heads = size(config, "num_attention_heads")
    kv_heads = optional(config, "num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}.")
    return kv_heads


def head_dim_of(config: Config) -> int:
    """Width of a head; without `head_dim`, what transformers takes, which is rounded down.

    Raises:
        ModelError: more heads than there are values.
    """
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if hidden < heads and config.get("head_dim") is None:
        raise ModelError(f"config.json: hidden_size={hidden} is less than num_attention_heads={heads}, and head_dim is missing.")
    return optional(config, "head_dim") or hidden // heads


def rotary_dim(config: Config, head_dim: int) -> int:
    """Values of a head that rotary positions turn.

    Raises:
        ModelError: a `partial_rotary_factor` that is no share.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = (rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None) or config.get("partial_rotary_factor") or 1.0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ModelError(f"config.json: partial_rotary_factor={share!r} is not a number above 0 and at most 1.")
    return int(head_dim * share)


def rotary(name: str, heads: int, values: int) -> Elementwise:
    """x·cos + rotate(x)·sin on `values` of each head."""
    return elementwise(name, "attention", heads * values, "rotary", 3)


@dataclass(frozen=True, kw_only=True)
class Gated:
    """down(act(gate x) · up x) (Shazeer 2020, arXiv:2002.05202).

    Attributes:
        names: of gate, up and down; of two names the first is that of gate and up in one matrix.
        bias: the field that says whether its matrices have a bias, or whether.
        act: the field of its activation function.
    """

    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    bias: str | bool = False
    act: str = "hidden_act"

    def parts(self, at: str, config: Config, width: int) -> list[Part]:
        """Its parts at `at`."""
        hidden, bias = size(config, "hidden_size"), flag(config, self.bias)
        *into, out = (f"{at}.{name}" for name in self.names)
        return [
            *(linear(name, "mlp", hidden, 2 * width // len(into), bias=bias) for name in into),
            activation(f"{at}.act_fn", str(config.get(self.act, "silu")), width),
            elementwise(f"{at}.multiply", "mlp", width, "multiply"),
            linear(out, "mlp", width, hidden, bias=bias),
        ]


class Mixer(Protocol):
    """What mixes the positions of a block: attention, or a recurrence."""

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Its parts, in a block of that path and number."""


LEGACY_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
"""Names of kinds that older configs have. Source: transformers, configuration_utils.remap_legacy_layer_types."""


@dataclass(frozen=True, kw_only=True)
class ByKind:
    """A mixer for each kind of layer.

    Attributes:
        mixers: by kind.
        field: the config's list of kinds; `rule`: gives them where it is not there.
    """

    mixers: Mapping[str, Mixer]
    rule: Rule
    field: str = "layer_types"

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """The parts of this layer's mixer.

        Raises:
            ModelError: a kind that the family does not have.
        """
        kind = types(config, self.field, self.rule)[layer]
        kind = kind if kind in self.mixers else LEGACY_KINDS.get(kind, kind)
        if kind not in self.mixers:
            raise ModelError(f"config.json: {self.field} of a {config.get('model_type')} model knows {', '.join(self.mixers)}; found {kind!r}.")
        return self.mixers[kind].parts(block, config, layer)


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The norms of a block: before and after the attention, before and after the MLP; None where there is none."""

    kind: NormKind = "rmsnorm"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    affine: bool = True

    def around(self, block: str, config: Config, attends: list[Part], feeds: list[Part]) -> list[Part]:
        """x + attention(x), then x + mlp(x), with the norms where they belong."""
        return [
            *self._half(block, "self_attn.add", "attention", config, (self.before_attention, self.after_attention), attends),
            *self._half(block, "mlp.add", "mlp", config, (self.before_mlp, self.after_mlp), feeds),
        ]

    def _half(self, block: str, add: str, component: str, config: Config, names: tuple[str | None, str | None], inner: list[Part]) -> list[Part]:
        hidden = size(config, "hidden_size")
        before, after = ([norm(f"{block}.{name}", hidden, self.kind, affine=self.affine)] if name else [] for name in names)
        return [*before, *inner, *after, elementwise(f"{block}.{add}", component, hidden, "add")]
