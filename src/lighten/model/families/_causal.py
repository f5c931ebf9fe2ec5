"""Dense causal decoders: what tells one from another as data, and the one builder that makes parts of it.

Left out, for they cost next to nothing: products with one number (Gemma's and Granite's scaling of embeddings, branches and logits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families._family import Family
from lighten.model.families._fields import activation, check_probabilities, label_count, optional, require
from lighten.model.spec import Attention, Elementwise, Embedding, Linear, Norm, Part, Table

Config: TypeAlias = Mapping[str, Any]
Flag: TypeAlias = bool | str
"""A truth, or the name of the config field that says it."""
Windows: TypeAlias = Callable[[Config, int], Sequence[int | None]]
"""(config, number of layers) → the keys that a query of each layer sees at most."""

DROPOUTS = (
    "attention_dropout", "hidden_dropout_prob", "hidden_dropout", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "emb_pdrop", "dropout", "activation_dropout", "residual_dropout", "embedding_dropout", "resid_dropout", "embed_dropout",
    "classifier_dropout", "layerdrop",
)  # fmt: skip


SHAPES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
KINDS = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
"""What the names of classes end with; the first that fits."""


def no_windows(config: Config, layers: int) -> Sequence[int | None]:
    """Every layer sees all."""
    return [None] * layers


@dataclass(frozen=True, kw_only=True)
class QueryNorm:
    """Norms of queries and keys before their product.

    Attributes:
        names: of the two modules.
        span: what one normalizes: a head, all heads with one weight each ("heads"), all heads as one row ("width"), or a head with a module
            of its own ("each").
        present: whether there are such norms.
        bias: of a LayerNorm.
        after_rotary: they follow the rotary embedding.
    """

    names: tuple[str, str] = ("q_norm", "k_norm")
    span: Literal["head", "heads", "width", "each"] = "head"
    present: Flag = True
    bias: bool | None = None
    affine: bool = True
    after_rotary: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """How a kind of causal decoder differs from Llama, whose values are the defaults. Names are those of its checkpoint.

    Attributes:
        stem: what the names of its classes begin with.
        heads: what they end with.
        elsewhere: its classes in other code than transformers'.
        prefix: path of the decoder in a class with a head; `inner`: in the bare one too (OPT's "decoder.").
        question_prefix: that in its class for question answering, where it is another.
        positions: its table of learned positions, `position_count` the field of how many, `position_offset` the rows that it has beyond them.
        adds_positions: positions are added that are no parameters.
        norm_bias: None: as the kind of norm has.
        attention_norm, mlp_norm: before each branch; None in a parallel block: shared with attention.
        attention_out_norm, mlp_out_norm: of a branch's output, before the residual addition.
        inner_norms: of the values before the projections back: attention's, the MLP's.
        norm_after_add: the norms stand after the residual additions, not before the branches.
        first_norm: the first block has one before attention.
        parallel: both branches read the same input.
        query, key, value, out: projections; `fused`: one for the first three.
        head_dim: the field that may set a head's width; None: always hidden_size / num_attention_heads.
        key_value_heads: its field; None: as many as queries have.
        rotary: share of a head that is turned by the position (0: no rotary positions); a config may say another.
        windowed_cache: caches of windowed layers keep their window alone.
        rotary_layers: (config, layer, window) → whether a layer has them.
        intermediate: field of the MLP's width (None: no field sets it); `times`: that over hidden_size where no field says it (None: one has to).
        halved: that field counts the gate and the values together.
        fixed_act: an activation that no field changes.
        act_parameters, act_buffers: scalars of the activation function that are trained, and constants that its checkpoint has beside them.
        bidirectional: attention is not causal.
        word_width: field of the embedding's width where it may differ from hidden_size.
        hidden: an older field that sets hidden_size.
        sinks: a table with one number a head, which takes part in its softmax.
        last_bias: a bias of the last block's attention alone.
        transform: before its head for tokens, and before that for sequences: a linear, an activation and a norm under that name.
        unsupported: fields that make another model of it, which is not described.
    """

    stem: str
    heads: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    prefix: str = "model."
    inner: str = ""
    question_prefix: str | None = None
    embedding: str = "embed_tokens"
    embedding_norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    position_count: str = "max_position_embeddings"
    adds_positions: bool = False
    layers: str = "layers"
    final_norm: str | None = "norm"
    head: str = "lm_head"
    head_bias: Flag = False
    sequence_head: str = "score"
    sequence_bias: Flag = False
    token_head: str = "score"
    question_labels: int | None = 2
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_bias: Flag | None = None
    norm_affine: Flag = True
    attention_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    inner_norms: tuple[str, str] | None = None
    norm_after_add: bool = False
    first_norm: bool = True
    parallel: Flag = False
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "o_proj"
    fused: str | None = None
    qkv_bias: Flag = False
    out_bias: Flag = False
    head_dim: str | None = "head_dim"
    key_value_heads: str | None = "num_key_value_heads"
    one_key_value_head: Flag = False
    query_norm: QueryNorm | None = None
    rotary: float = 1.0
    rotary_layers: Callable[[Config, int, int | None], bool] = lambda config, layer, window: True
    windows: Windows = no_windows
    windowed_cache: bool = True
    bidirectional: Flag = False
    mlp: str = "mlp."
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None
    mlp_bias: Flag = False
    transposed: bool = False
    intermediate: str | None = "intermediate_size"
    times: int | None = None
    halved: bool = False
    act: str = "hidden_act"
    fixed_act: str | None = None
    act_parameters: tuple[str, ...] = ()
    act_buffers: tuple[str, ...] = ()
    word_width: str | None = None
    hidden: str | None = None
    sinks: str | None = None
    last_bias: str | None = None
    transform: tuple[str, str] | None = None
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The shapes of one decoder."""

    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    ffn: int
    rotary: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_value_heads * self.head_dim


Traits: TypeAlias = Decoder | Callable[[Config, str], Decoder]
"""What a decoder is like: always the same, or by its config and architecture."""


def family(traits: Traits, *, of: Decoder | None = None) -> Family:
    """The registry's entry of a decoder; `of`: one whose classes it has, where the traits depend on the config."""
    known = of or traits
    if not isinstance(known, Decoder):
        raise TypeError("a family whose traits depend on the config says its classes by another's")
    names = tuple(f"{known.stem}{head}" for head in known.heads)
    return Family(describe=lambda config, architecture: _describe(traits, config, architecture), architectures=names, elsewhere=known.elsewhere)


def _describe(traits: Traits, config: Config, architecture: str) -> tuple[Part, ...]:
    family_name = str(config.get("model_type"))
    t = traits if isinstance(traits, Decoder) else traits(config, architecture)
    if t.hidden and config.get(t.hidden) is not None:
        config = {**config, "hidden_size": config[t.hidden]}
    positions = (t.position_count,) if t.positions is not None else ()
    ffn = (t.intermediate,) if t.intermediate and not t.times else ()
    c = require(config, (*SHAPES, *ffn, *positions), family_name)
    check_probabilities(config, [name for name in DROPOUTS if config.get(name) is not None])
    optional(config, "max_position_embeddings")
    for name in t.unsupported:
        if config.get(name):
            raise UnsupportedFamily(f"{family_name} with {name}={config[name]!r} has no formula; without {name} it has.")
    s = _sizes(t, config, c)
    kind = next(each for each in KINDS if architecture.endswith(each))
    outer = "" if kind == "Model" else t.question_prefix if kind == "ForQuestionAnswering" and t.question_prefix else t.prefix
    base = f"{outer}{t.inner}"
    windows = t.windows(config, c["num_hidden_layers"])
    parts = _embeddings(t, config, c, base)
    for layer, window in enumerate(windows):
        parts += _block(f"{base}{t.layers}.{layer}", t, s, config, layer, window)
    if t.final_norm is not None:
        parts.append(_norm(f"{base}{t.final_norm}", t, config, s.hidden))
    return (*parts, *_head(t, config, c, base, kind))


def _sizes(t: Decoder, config: Config, c: Mapping[str, int]) -> _Sizes:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    if t.head_dim is None and hidden % heads:
        raise ModelError(f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}.")
    head_dim = (optional(config, t.head_dim) if t.head_dim else None) or hidden // heads
    kv_heads = (optional(config, t.key_value_heads) if t.key_value_heads else None) or heads
    if _true(t.one_key_value_head, config):
        kv_heads = 1
    if heads % kv_heads:
        raise ModelError(f"config.json: num_attention_heads={heads} is not a multiple of {t.key_value_heads}={kv_heads}.")
    ffn = (optional(config, t.intermediate) if t.intermediate else None) or hidden * (t.times or 1)
    if t.halved:
        ffn //= 2
    return _Sizes(hidden=hidden, heads=heads, key_value_heads=kv_heads, head_dim=head_dim, ffn=ffn, rotary=_rotary_width(t, config, head_dim))


def _rotary_width(t: Decoder, config: Config, head_dim: int) -> int:
    """Values of a head that the position turns: `rotary_dim`, or a share of the head that stands in one of two places."""
    if not t.rotary:
        return 0
    if width := optional(config, "rotary_dim"):
        return min(width, head_dim)
    rope = config.get("rope_parameters")
    stated = [config.get("partial_rotary_factor"), config.get("rotary_pct"), rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None]
    share = next((value for value in stated if value is not None), t.rotary)
    check_probabilities({"partial_rotary_factor": share}, ("partial_rotary_factor",))
    return int(head_dim * share)


def _true(flag: Flag, config: Config) -> bool:
    return bool(config.get(flag)) if isinstance(flag, str) else flag


def _norm(name: str, t: Decoder, config: Config, size: int, **more: Any) -> Norm:
    bias = None if t.norm_bias is None else _true(t.norm_bias, config)
    return Norm(name=name, component="norm", size=size, kind=t.norm, **({"bias": bias, "affine": _true(t.norm_affine, config)} | more))


def _add(name: str, component: str, size: int) -> Elementwise:
    return Elementwise(name=name, component=component, size=size, kind="add", flops_per_element=1)


def _embeddings(t: Decoder, config: Config, c: Mapping[str, int], base: str) -> list[Part]:
    hidden = c["hidden_size"]
    width = (optional(config, t.word_width) if t.word_width else None) or hidden
    parts: list[Part] = [Embedding(name=f"{base}{t.embedding}", component="embedding", num_embeddings=c["vocab_size"], embedding_dim=width)]
    if width != hidden:
        parts.append(Linear(name=f"{base}project_in", component="embedding", in_features=width, out_features=hidden))
    if t.positions is not None:
        count = c[t.position_count] + t.position_offset
        parts.append(Embedding(name=f"{base}{t.positions}", component="embedding", num_embeddings=count, embedding_dim=hidden, rows="position"))
    if t.positions is not None or t.adds_positions:
        parts.append(_add(f"{base}{t.embedding}.add", "embedding", hidden))
    if t.embedding_norm is not None:
        parts.append(_norm(f"{base}{t.embedding_norm}", t, config, hidden))
    return parts


def _block(at: str, t: Decoder, s: _Sizes, config: Config, layer: int, window: int | None) -> list[Part]:
    def norm(name: str | None) -> list[Part]:
        return [] if name is None else [_norm(f"{at}.{name}", t, config, s.hidden)]

    attention = [*_attention(f"{at}.{t.attention}", t, s, config, layer, window), *norm(t.attention_out_norm)]
    mlp = [*_mlp(at, t, s, config), *norm(t.mlp_out_norm)]
    first, second = _add(f"{at}.{t.attention}.add", "attention", s.hidden), _add(f"{at}.{t.mlp}add", "mlp", s.hidden)
    if _true(t.parallel, config):
        return [*norm(t.attention_norm), *attention, *norm(t.mlp_norm), *mlp, first, second]
    if t.norm_after_add:
        return [*attention, first, *norm(t.attention_norm), *mlp, second, *norm(t.mlp_norm)]
    before = norm(t.attention_norm) if layer or t.first_norm else []
    return [*before, *attention, first, *norm(t.mlp_norm), *mlp, second]


def _attention(at: str, t: Decoder, s: _Sizes, config: Config, layer: int, window: int | None) -> list[Part]:
    def linear(name: str, columns: int, rows: int, bias: Flag) -> Linear:
        return Linear(
            name=f"{at}.{name}", component="attention", in_features=columns, out_features=rows,
            bias=_true(bias, config), transposed=t.transposed,
        )  # fmt: skip

    names = [(t.query, s.query_width), (t.key, s.key_width), (t.value, s.key_width)]
    if t.fused is not None:
        names = [(t.fused, s.query_width + 2 * s.key_width)]
    turned = (s.heads + s.key_value_heads) * s.rotary
    rotary: list[Part] = []
    if turned and t.rotary_layers(config, layer, window):  # x·cos + rotate(x)·sin
        rotary = [Elementwise(name=f"{at}.rotary", component="attention", size=turned, kind="rotary", flops_per_element=3)]
    norms = _query_norms(at, t, s, config)
    last = f"{at}.{t.last_bias}" if t.last_bias and layer == config["num_hidden_layers"] - 1 else None
    sinks = [Table(name=f"{at}.{t.sinks}", component="attention", shapes={f"{at}.{t.sinks}": (s.heads,)})] if t.sinks else []
    return [
        *(linear(name, s.hidden, width, t.qkv_bias) for name, width in names),
        *(rotary + norms if t.query_norm and t.query_norm.after_rotary else norms + rotary),
        *sinks,
        Attention(
            name=at, component="attention", causal=not _true(t.bidirectional, config), num_attention_heads=s.heads,
            num_key_value_heads=s.key_value_heads, head_dim=s.head_dim, window=window, windowed_cache=t.windowed_cache,
        ),
        *([_norm(f"{at}.{t.inner_norms[0]}", t, config, s.query_width)] if t.inner_norms else []),
        linear(t.out, s.query_width, s.hidden, t.out_bias),
        *([Table(name=last, component="attention", shapes={last: (s.hidden,)})] if last else []),
    ]  # fmt: skip


def _query_norms(at: str, t: Decoder, s: _Sizes, config: Config) -> list[Part]:
    found = t.query_norm
    if found is None or not _true(found.present, config):
        return []
    parts: list[Part] = []
    for name, heads in zip((f"{at}.{name}" for name in found.names), (s.heads, s.key_value_heads), strict=True):
        more = {"bias": found.bias, "affine": found.affine}
        if found.span == "width":
            parts.append(_norm(name, t, config, heads * s.head_dim, **more))
        elif found.span == "head":
            parts.append(_norm(name, t, config, s.head_dim, groups=heads, **more))
        elif found.span == "heads":
            parts.append(HeadsNorm(name=name, component="norm", size=s.head_dim, groups=heads, kind=t.norm, bias=False))
        else:
            parts += [_norm(f"{name}.norms.{head}", t, config, s.head_dim, **more) for head in range(heads)]
    return parts


class HeadsNorm(Norm):
    """A norm of each head with a weight of its own, kept as one tensor [heads, head_dim]."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.groups, self.size)}


class Buffers(Table):
    """Constants that a checkpoint stores and that are no parameters."""

    @property
    def parameters(self) -> int:
        return 0


def _mlp(at: str, t: Decoder, s: _Sizes, config: Config) -> list[Part]:
    bias = _true(t.mlp_bias, config)
    dot = f"{at}.{t.mlp}"

    def linear(name: str, columns: int, rows: int) -> Linear:
        return Linear(name=f"{dot}{name}", component="mlp", in_features=columns, out_features=rows, bias=bias, transposed=t.transposed)

    first = [linear(t.up, s.hidden, s.ffn)]
    if t.gate_up is not None:
        first = [linear(t.gate_up, s.hidden, 2 * s.ffn)]
    elif t.gate is not None:
        first = [linear(t.gate, s.hidden, s.ffn), *first]
    parts: list[Part] = [*first, activation(f"{dot}act_fn", t.fixed_act or _act(t, config), s.ffn)]
    if t.act_parameters:
        shapes = {f"{dot}act_fn.{name}": (1,) for name in t.act_parameters}
        parts.append(Table(name=f"{dot}act_fn.parameters", component="mlp", shapes=shapes))
        parts.append(Buffers(name=f"{dot}act_fn.buffers", component="mlp", shapes={f"{dot}act_fn.{name}": () for name in t.act_buffers}))
    if t.gate is not None or t.gate_up is not None:
        parts.append(Elementwise(name=f"{dot}multiply", component="mlp", size=s.ffn, kind="multiply", flops_per_element=1))
    if t.inner_norms:
        parts.append(_norm(f"{dot}{t.inner_norms[1]}", t, config, s.ffn))
    return [*parts, linear(t.down, s.ffn, s.hidden)]


def _act(t: Decoder, config: Config) -> str:
    return str(config.get(t.act))


def _head(t: Decoder, config: Config, c: Mapping[str, int], base: str, kind: str) -> list[Part]:
    width = (optional(config, t.word_width) if t.word_width else None) or c["hidden_size"]
    projection: list[Part] = []
    if width != c["hidden_size"]:
        projection = [Linear(name=f"{base}project_out", component="head", in_features=c["hidden_size"], out_features=width)]
    if t.transform and kind != "Model":
        projection = _transform(t.transform[kind == "ForSequenceClassification"], t, config, width)
    if kind in ("ForCausalLM", "LMHeadModel"):
        tied = f"{base}{t.embedding}" if config.get("tie_word_embeddings") else None
        head = Linear(
            name=t.head,
            component="head",
            in_features=width,
            out_features=c["vocab_size"],
            bias=_true(t.head_bias, config),
            tied_to=tied,
            rows="logits",
        )
        cap = [Elementwise(name=f"{t.head}.softcap", component="head", size=c["vocab_size"], kind="tanh", flops_per_element=3, rows="logits")]
        return [*projection, head, *(cap if config.get("final_logit_softcapping") else [])]
    if kind == "Model":
        return projection
    names = {"ForSequenceClassification": t.sequence_head, "ForTokenClassification": t.token_head, "ForQuestionAnswering": "qa_outputs"}
    labels = t.question_labels if kind == "ForQuestionAnswering" and t.question_labels else label_count(config)
    biased = _true(t.sequence_bias, config) if kind == "ForSequenceClassification" else True
    head = Linear(name=names[kind], component="head", in_features=width, out_features=labels, bias=biased)
    return [*projection, head]


def _transform(name: str, t: Decoder, config: Config, width: int) -> list[Part]:
    dense = Linear(name=f"{name}.dense", component="head", in_features=width, out_features=width, bias=_true(t.sequence_bias, config))
    act = activation(f"{name}.act", str(config.get("classifier_activation")), width)
    return [dense, replace(act, component="head"), replace(_norm(f"{name}.norm", t, config, width), component="head")]


def other(base: Decoder, **changes: Any) -> Decoder:
    """A decoder like another but for some traits."""
    return replace(base, **changes)
