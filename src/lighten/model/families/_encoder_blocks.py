"""Blocks of encoders that are built in a way of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families import _steps as s
from lighten.model.families._fields import MOST_LAYERS
from lighten.model.families._steps import Config, Scope, Step
from lighten.model.spec import Conv, Linear, Norm, Part, Product, Size

# ALBERT (Lan et al. 2019, arXiv:1909.11942): the same few blocks, many times


class _LinearAgain(Linear):
    """A linear met before: all its parameters are counted there."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}


class _NormAgain(Norm):
    """A norm met before."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}


def _again(part: Part, first: str, later: str) -> Part:
    """The part as a later layer meets it: named by that layer, its weights the first's."""
    name = later + part.name.removeprefix(first)
    if isinstance(part, Linear):
        return _LinearAgain(
            name=name, component=part.component, rows=part.rows, in_features=part.in_features, out_features=part.out_features, bias=part.bias,
            tied_to=part.name,
        )  # fmt: skip
    if isinstance(part, Norm):
        return _NormAgain(name=name, component=part.component, rows=part.rows, size=part.size, kind=part.kind)
    return replace(part, name=name)


def albert_layers(block: tuple[Step, ...]) -> Step:
    """`num_hidden_layers` layers that use `num_hidden_groups` groups of `inner_group_num` blocks in turn, each as often as it comes.

    The modules of a group's first use have the checkpoint's names; those of later uses are named by their layer.
    """

    def parts(scope: Scope) -> Iterable[Part]:
        c = s.positive(scope.config, ("num_hidden_layers", "num_hidden_groups", "inner_group_num"))
        layers, groups = c["num_hidden_layers"], c["num_hidden_groups"]
        if layers * c["inner_group_num"] > MOST_LAYERS:
            raise ModelError(f"config.json: num_hidden_layers={layers} is more than {MOST_LAYERS}.")
        if groups > layers:
            raise UnsupportedFamily(f"num_hidden_groups={groups} with {layers} layers has no formula: groups without use; it can be traced.")
        used: set[int] = set()
        for layer in range(layers):
            group = layer * groups // layers
            at = f"{scope.at}encoder.albert_layer_groups.{group}."
            own = replace(scope, at=at)
            found = s.run((s.blocks("albert_layers.{}", "inner_group_num", *block),), own)
            yield from (_again(part, at, f"{scope.at}encoder.layer.{layer}.") for part in found) if group in used else found
            used.add(group)

    return parts


# DeBERTa (He et al. 2020, arXiv:2006.03654): scores of content to position and of position to content


class _PositionLinear(Product):
    """A linear on the table of relative positions: once for all sequences, with a weight [n, k]."""

    biased = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        assert isinstance(self.k, int)
        assert isinstance(self.n, int)
        return {f"{self.name}.weight": (self.n, self.k)} | ({f"{self.name}.bias": (self.n,)} if self.biased else {})


class _PositionLinearUnbiased(_PositionLinear):
    biased = False


def position_types(config: Config) -> list[str]:
    """`pos_att_type`: which of "c2p" and "p2c" a model has, a list or a text with bars."""
    found = config.get("pos_att_type") or []
    return [kind.strip() for kind in found.lower().split("|")] if isinstance(found, str) else list(found)


def position_span(config: Config) -> int:
    """Relative positions to one side that have a row of their own: `position_buckets`, else `max_relative_positions`, else all positions."""
    for name in ("position_buckets", "max_relative_positions"):
        value = config.get(name, -1)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return s.positive(config, ("max_position_embeddings",))["max_position_embeddings"]


def _full_span(scope: Scope) -> Iterable[Part]:
    """DeBERTa's span grows with the length up to `max_relative_positions`; beyond it no product of lengths says what it is."""
    value = scope.config.get("max_relative_positions", -1)
    if isinstance(value, int) and 0 < value < scope.size("max_position_embeddings"):
        raise UnsupportedFamily(f"deberta with max_relative_positions={value} below max_position_embeddings has no formula; it can be traced.")
    return ()


def _has(kind: str) -> s.Condition:
    return lambda config: bool(config.get("relative_attention")) and kind in position_types(config)


def _position_linear(name: str, *, biased: bool, by_length: bool) -> Step:
    def parts(scope: Scope) -> Iterable[Part]:
        hidden, made = scope.size("hidden_size"), _PositionLinear if biased else _PositionLinearUnbiased
        m: Size = "key" if by_length else 2 * position_span(scope.config)
        times = 2 if by_length else 1
        return [made(name=scope.name(name), component="attention", rows="position", m=m, k=hidden, n=hidden, products=times)]

    return parts


def deberta_attention() -> tuple[Step, ...]:
    """Disentangled attention of DeBERTa: queries, keys and values in one product, biases on two of them."""

    def scores(name: str, rows: Size) -> Step:
        return s.product(name, rows, s.head_dim, "key", times=lambda c: 2 * int(c["num_attention_heads"]))

    return (
        s.refuse("talking_head"),
        s.when("relative_attention", _full_span),
        s.linear("attention.self.in_proj", "attention", "hidden_size", lambda c: 3 * c["hidden_size"], bias=False),
        s.weights("attention", {"attention.self.q_bias": ("hidden_size",), "attention.self.v_bias": ("hidden_size",)}),
        s.when(_has("c2p"), _position_linear("attention.self.pos_proj", biased=False, by_length=True), scores("attention.self.c2p", "query")),
        s.when(_has("p2c"), _position_linear("attention.self.pos_q_proj", biased=True, by_length=True), scores("attention.self.p2c", "key")),
        s.attend("attention.self", causal=False),
        s.linear("attention.output.dense", "attention", "hidden_size", "hidden_size"),
    )


def deberta_v2_attention() -> tuple[Step, ...]:
    """Disentangled attention of DeBERTa-v2 and v3: positions in buckets, their projections shared with the content's or not."""

    def own(kind: str) -> s.Condition:
        return lambda config: not config.get("share_att_key") and config.get("relative_attention", False) and kind in position_types(config)

    def shared(config: Config) -> bool:
        return bool(config.get("share_att_key") and config.get("relative_attention"))

    def rows(config: Config) -> int:
        return 2 * position_span(config)

    return (
        *(s.linear(f"attention.self.{name}_proj", "attention", "hidden_size", "hidden_size") for name in ("query", "key", "value")),
        s.when(own("c2p"), _position_linear("attention.self.pos_key_proj", biased=True, by_length=False)),
        s.when(own("p2c"), _position_linear("attention.self.pos_query_proj", biased=True, by_length=False)),
        s.when(shared, s.product("attention.self.positions", rows, "hidden_size", "hidden_size", times=2, once=True)),
        s.when(_has("c2p"), s.product("attention.self.c2p", "query", s.head_dim, rows, times="num_attention_heads")),
        s.when(_has("p2c"), s.product("attention.self.p2c", "key", s.head_dim, rows, times="num_attention_heads")),
        s.attend("attention.self", causal=False),
        s.linear("attention.output.dense", "attention", "hidden_size", "hidden_size"),
    )


def convolution(name: str, component: str, sizes: tuple[s.Width, s.Width], kernel: s.Width, *, groups: s.Width = 1, bias: bool = True) -> Step:
    """A convolution along the sequence; `sizes` are its channels in and out."""
    return lambda scope: [
        Conv(
            name=scope.name(name), component=component, rows=scope.rows, in_channels=scope.size(sizes[0]), out_channels=scope.size(sizes[1]),
            kernel=(scope.size(kernel),), groups=scope.size(groups), bias=bias,
        )
    ]  # fmt: skip


def position_norm(name: str) -> Step:
    """The norm of the table of relative positions: once, whatever the input."""
    return lambda scope: [
        Norm(
            name=scope.name(name),
            component="norm",
            rows="sequence",
            size=scope.size("hidden_size"),
            kind="layernorm",
            groups=2 * position_span(scope.config),
        )
    ]


def after_first_block(name: str) -> Step:
    """DeBERTa-v2's convolution, whose output is added to that of the first block."""

    def parts(scope: Scope) -> Iterable[Part]:
        if scope.layer:
            return []
        steps = (
            convolution(
                f"{name}.conv", "mlp", ("hidden_size", "hidden_size"), "conv_kernel_size",
                groups=lambda c: s.positive(c, ("conv_groups",))["conv_groups"] if "conv_groups" in c else 1,
            ),
            s.elementwise(f"{name}.activation", "mlp", "hidden_size", _conv_act(scope.config)),
            s.add(f"{name}.add", "mlp"),
            s.norm(f"{name}.LayerNorm"),
        )  # fmt: skip
        return s.run(steps, replace(scope, at=scope.base))

    return parts


def _conv_act(config: Config) -> str:
    name = config.get("conv_act", "tanh")
    if name not in ("tanh", "gelu"):
        raise UnsupportedFamily(f"deberta-v2 with conv_act={name!r} has no formula; these have one: tanh, gelu.")
    return str(name)


# ConvBERT (Jiang et al. 2020, arXiv:2008.02496): half of the heads are convolutions whose kernels come from the tokens


def _conv_heads(config: Config) -> int:
    c = s.positive(config, ("num_attention_heads", "head_ratio"))
    return max(1, c["num_attention_heads"] // c["head_ratio"])


def _conv_head_dim(config: Config) -> int:
    hidden, heads = s.positive(config, ("hidden_size",))["hidden_size"], _conv_heads(config)
    if hidden % heads:
        raise ModelError(f"config.json: hidden_size={hidden} is not a multiple of the {heads} heads that head_ratio leaves.")
    return hidden // heads // 2


def _conv_width(config: Config) -> int:
    return _conv_heads(config) * _conv_head_dim(config)


def convbert_attention() -> tuple[Step, ...]:
    """Mixed attention."""
    at = "attention.self"

    def bare(scope: Scope) -> Iterable[Part]:
        if scope.config.get("num_groups", 1) != 1:
            raise UnsupportedFamily(f"convbert with num_groups={scope.config['num_groups']!r} has no formula; it can be traced.")
        return ()

    return (
        bare,
        *(s.linear(f"{at}.{name}", "attention", "hidden_size", _conv_width) for name in ("key", "value")),
        convolution(
            f"{at}.key_conv_attn_layer.depthwise", "attention", ("hidden_size", "hidden_size"), "conv_kernel_size", groups="hidden_size", bias=False
        ),
        convolution(f"{at}.key_conv_attn_layer.pointwise", "attention", ("hidden_size", _conv_width), 1, bias=False),
        s.weights("attention", {f"{at}.key_conv_attn_layer.bias": (_conv_width, 1)}),
        s.linear(f"{at}.query", "attention", "hidden_size", _conv_width),
        s.linear(f"{at}.conv_kernel_layer", "attention", _conv_width, lambda c: _conv_heads(c) * int(c["conv_kernel_size"])),
        s.linear(f"{at}.conv_out_layer", "attention", "hidden_size", _conv_width),
        s.product(f"{at}.convolution", "query", "conv_kernel_size", _conv_head_dim, times=_conv_heads),
        s.attend(at, heads=_conv_heads, dim=_conv_head_dim, causal=False),
        s.linear("attention.output.dense", "attention", lambda c: 2 * _conv_width(c), "hidden_size"),
    )


# Nyströmformer (Xiong et al. 2021, arXiv:2102.03902)


@dataclass(frozen=True, kw_only=True)
class _ValueConv(Conv):
    """A convolution along the sequence with one kernel for each head, the same for all of its values."""

    heads: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.heads, 1, *self.kernel)}


def value_convolution(scope: Scope) -> Iterable[Part]:
    """The convolution that is added to the values; none where `conv_kernel_size` is null."""
    if scope.config.get("conv_kernel_size") is None:
        return ()
    hidden, kernel = scope.size("hidden_size"), scope.size("conv_kernel_size")
    return [
        _ValueConv(
            name=scope.name("attention.self.conv"), component="attention", rows=scope.rows, in_channels=hidden, out_channels=hidden,
            groups=hidden, kernel=(kernel, 1), bias=False, heads=scope.size("num_attention_heads"),
        )
    ]  # fmt: skip


def full_attention_only(scope: Scope) -> Iterable[Part]:
    """Landmarks as many as segments: attention in full."""
    if scope.config.get("num_landmarks") != scope.config.get("segment_means_seq_len"):
        raise UnsupportedFamily("nystromformer with segment_means_seq_len other than num_landmarks has no formula; it can be traced.")
    return ()


# MobileBERT (Sun et al. 2020, arXiv:2004.02984): narrow blocks between bottlenecks


def mobilebert_norm(name: str, size: s.Width) -> Step:
    """`no_norm` scales and shifts by learned values, as a batch norm does in use; else LayerNorm."""
    return lambda scope: [
        Norm(
            name=scope.name(name), component="norm", rows=scope.rows, size=scope.size(size),
            kind="batchnorm" if scope.config.get("normalization_type") == "no_norm" else "layernorm",
        )
    ]  # fmt: skip


def trigram_width(config: Config) -> int:
    """Width of a word with its two neighbours beside it."""
    return s.positive(config, ("embedding_size",))["embedding_size"] * (3 if config.get("trigram_input") else 1)


def mobilebert_block() -> tuple[Step, ...]:
    """Bottlenecks, attention, `num_feedforward_networks` MLPs in a row and the way out."""
    inner, outer = "true_hidden_size", "hidden_size"

    def bottleneck(name: str) -> tuple[Step, ...]:
        return s.linear(f"bottleneck.{name}.dense", "mlp", outer, "intra_bottleneck_size"), mobilebert_norm(f"bottleneck.{name}.LayerNorm", inner)

    unused = {  # made and not run where `use_bottleneck_attention` takes the first bottleneck for all
        "bottleneck.attention.dense.weight": ("intra_bottleneck_size", outer), "bottleneck.attention.dense.bias": ("intra_bottleneck_size",),
        "bottleneck.attention.LayerNorm.weight": (inner,), "bottleneck.attention.LayerNorm.bias": (inner,),
    }  # fmt: skip

    def queries(config: Config) -> int:
        narrow = config.get("use_bottleneck_attention") or config.get("key_query_shared_bottleneck")
        return int(config[inner] if narrow else config[outer])

    def mlp(at: str) -> tuple[Step, ...]:
        return (
            s.linear(f"{at}intermediate.dense", "mlp", inner, "intermediate_size"),
            s.act(f"{at}intermediate.intermediate_act_fn", "intermediate_size", field="hidden_act"),
            s.linear(f"{at}output.dense", "mlp", "intermediate_size", inner),
            s.add(f"{at}output.add", "mlp", inner),
            mobilebert_norm(f"{at}output.LayerNorm", inner),
        )

    def ffns(scope: Scope) -> Iterable[Part]:
        count = scope.size("num_feedforward_networks")
        return s.run((s.blocks("ffn.{}", count - 1, *mlp("")),), scope)

    return (
        s.refuse("use_bottleneck", False),
        *bottleneck("input"),
        s.when(
            "key_query_shared_bottleneck",
            s.when("use_bottleneck_attention", s.weights("mlp", unused)),
            s.when(lambda c: not c.get("use_bottleneck_attention"), *bottleneck("attention")),
        ),
        s.linear("attention.self.query", "attention", queries, inner),
        s.linear("attention.self.key", "attention", queries, inner),
        s.linear("attention.self.value", "attention", lambda c: c[inner] if c.get("use_bottleneck_attention") else c[outer], inner),
        s.attend("attention.self", dim=lambda c: s.divided(c, inner, "num_attention_heads"), causal=False),
        s.linear("attention.output.dense", "attention", inner, inner),
        s.add("attention.output.add", "attention", inner),
        mobilebert_norm("attention.output.LayerNorm", inner),
        ffns,
        *mlp(""),
        s.linear("output.bottleneck.dense", "mlp", inner, outer),
        s.add("output.bottleneck.add", "mlp", outer),
        mobilebert_norm("output.bottleneck.LayerNorm", outer),
    )


@dataclass(frozen=True, kw_only=True)
class _SplitHead(s.VocabularyHead):
    """The table of words, widened by a matrix of its own to the model's width."""

    extra: str
    tied_width: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        table = {} if self.tied_to else {f"{self.name}.weight": (self.out_features, self.tied_width), f"{self.name}.bias": (self.out_features,)}
        return table | {self.shared_bias: (self.out_features,), f"{self.extra}.weight": (self.in_features - self.tied_width, self.out_features)}


def mobilebert_vocabulary(scope: Scope) -> Iterable[Part]:
    """`cls.predictions`: hidden × [words ‖ dense]."""
    at = scope.name("cls.predictions.")
    if scope.size("embedding_size") >= scope.size("hidden_size"):
        raise UnsupportedFamily("mobilebert with embedding_size not below hidden_size has no formula; it can be traced.")
    return [
        _SplitHead(
            name=f"{at}decoder", component="head", rows=scope.rows, in_features=scope.size("hidden_size"), out_features=scope.size("vocab_size"),
            bias=True, shared_bias=f"{at}bias", extra=f"{at}dense", tied_width=scope.size("embedding_size"),
            tied_to=f"{scope.base}embeddings.word_embeddings" if scope.config.get("tie_word_embeddings", True) else None,
        )
    ]  # fmt: skip
