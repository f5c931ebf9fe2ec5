"""Decoders whose MLPs are mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538), as `transformers` has them.

Checkpoints name each expert's matrices apart (`experts.7.up_proj.weight`), or keep those of all experts as one tensor of three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lighten.errors import ModelError
from lighten.model.families._decoder import (
    ANSWERS,
    CLASSES,
    FIELDS,
    LM,
    TOKENS,
    Condition,
    Config,
    Decoder,
    Gated,
    GroupedQuery,
    Mixer,
    Norms,
    Rule,
    always,
    count,
    elementwise,
    every,
    flag,
    head_dim_of,
    kv_heads_of,
    linear,
    no,
    norm,
    numbers,
    rotary,
    rotary_dim,
    size,
    types,
    when,
    yes,
)
from lighten.model.families._family import Family
from lighten.model.families._fields import activation
from lighten.model.spec import Attention, Linear, Part, Product, Table

GATED = Gated()
FUSED = Gated(names=("input_linear", "output_linear"))


@dataclass(frozen=True, kw_only=True)
class Router(Linear):
    """A linear to one score for each expert; `buffers` are stored with it and are no parameters (biases that balance the experts' load)."""

    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return super().tensors() | dict(self.buffers)

    @property
    def parameters(self) -> int:
        return self.out_features * (self.in_features + self.bias)


@dataclass(frozen=True, kw_only=True)
class StackedExperts(Linear):
    """The same linear of all experts in one tensor, [experts, out_features, in_features], or the last two exchanged where `transposed`.

    Attributes:
        tensor: its full name; `bias_tensor`: that of the biases, [experts, out_features].
        routed: experts that a token is routed to, where the layer computes more of them (Llama 4: all, the others times zero).
    """

    tensor: str
    bias_tensor: str = ""
    routed: int

    @property
    def active_parameters(self) -> int:
        return self.parameters * self.routed // self.experts

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return {self.tensor: (self.experts, *shape)} | ({self.bias_tensor: (self.experts, self.out_features)} if self.bias else {})


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """How a checkpoint keeps the matrices of all experts in one tensor: gate and up as one, and down; with their names below the block's.

    Attributes:
        computes_all: every expert sees every token.
    """

    names: tuple[str, str]
    transposed: bool = False
    bias: bool = False
    computes_all: bool = False

    def linear(self, at: str, which: int, columns: int, outputs: int, experts: int, chosen: int) -> Linear:
        """One of the two products."""
        name = f"{at}.{self.names[which]}"
        return StackedExperts(
            name=name.removesuffix(".weight"), component="mlp", in_features=columns, out_features=outputs, bias=self.bias, transposed=self.transposed,
            experts=experts, experts_per_row=experts if self.computes_all else chosen, routed=chosen, tensor=name,
            bias_tensor=f"{name}_bias" if self.bias else "",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Experts that every token meets, as one gated MLP.

    Attributes:
        at: its name below that of the mixture.
        width: gives its width, 0 for none.
        mlp: its matrices.
        gate: name of a linear to one value that scales its output.
        beside: `at` stands below the block and not below the mixture.
    """

    at: str = "shared_experts"
    width: Callable[[Config], int]
    mlp: Gated = GATED
    gate: str | None = None
    beside: bool = False

    def parts(self, block: str, mixture: str, config: Config) -> list[Part]:
        """Its parts, of a mixture of that name."""
        at = block if self.beside else f"{block}.{mixture}"
        width, hidden = self.width(config), size(config, "hidden_size")
        if not width:
            return []
        parts = self.mlp.parts(f"{at}.{self.at}", config, width)
        if self.gate:
            parts += [
                linear(f"{at}.{self.gate}", "mlp", hidden, 1),
                elementwise(f"{at}.{self.gate}.sigmoid", "mlp", 1, "sigmoid"),
                elementwise(f"{at}.{self.gate}.multiply", "mlp", hidden, "multiply"),
            ]
        return [*parts, elementwise(f"{at}.{self.at}.add", "mlp", hidden, "add")]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """A bias on each expert's score that balances their load, DeepSeek-V3's (arXiv:2412.19437, section 2.1.2).

    Attributes:
        name: its name below the mixture's.
        parameter: counted as one; else a buffer that is stored with the parameters.
        row: kept as [1, experts].
        present: whether a config has it.
    """

    name: str = "gate.e_score_correction_bias"
    parameter: bool = False
    row: bool = False
    present: Callable[[Config], bool] = lambda config: True

    def tensors(self, at: str, config: Config, experts: int) -> dict[str, tuple[int, ...]]:
        """Its tensor."""
        return {f"{at}.{self.name}": (1, experts) if self.row else (experts,)} if self.present(config) else {}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of gated experts.

    Attributes:
        at: its name in the block.
        router: its router's, below `at`; `router_bias`: whether it has a bias; `scores`: how scores become weights.
        experts: names of an expert's gate, up and down, `*` for its number; or how they are stacked.
        number, chosen, width: fields of how many experts there are, how many a token meets, and how wide each is.
        balance: the bias that balances the load.
        shared: the experts that every token meets.
    """

    at: str = "mlp"
    router: str = "gate"
    router_bias: bool = False
    scores: str = "softmax"
    experts: tuple[str, str, str] | Stacked = ("experts.*.gate_proj", "experts.*.up_proj", "experts.*.down_proj")
    number: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    balance: Balance | None = None
    shared: Shared | None = None

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Router, the experts that each token is routed to, their weighted sum, and the shared ones.

        Raises:
            ModelError: more experts a token than there are.
        """
        at = f"{block}.{self.at}"
        hidden = size(config, "hidden_size")
        width, experts, chosen = (of_layer(config, name, layer) for name in (self.width, self.number, self.chosen))
        if chosen > experts:
            raise ModelError(f"config.json: {self.chosen}={chosen} is more than {self.number}={experts}.")
        balance = self.balance.tensors(at, config, experts) if self.balance else {}
        counted = self.balance is not None and self.balance.parameter
        return [
            Router(
                name=f"{at}.{self.router}", component="mlp", in_features=hidden, out_features=experts, bias=self.router_bias,
                buffers={} if counted else balance,
            ),
            *([Table(name=f"{at}.balance", component="mlp", shapes=balance)] if counted else []),
            elementwise(f"{at}.{self.router}.{self.scores}", "mlp", experts, self.scores, 5 if self.scores == "softmax" else 1),
            *self._experts(at, config, hidden, width, experts, chosen),
            elementwise(f"{at}.experts.combine", "mlp", chosen * hidden, "multiply", 2),  # times its weight, added to the sum
            *(self.shared.parts(block, self.at, config) if self.shared else []),
        ]  # fmt: skip

    def _experts(self, at: str, config: Config, hidden: int, width: int, experts: int, chosen: int) -> list[Part]:
        between = [
            activation(f"{at}.experts.act_fn", str(config.get("hidden_act", "silu")), chosen * width),
            elementwise(f"{at}.experts.multiply", "mlp", chosen * width, "multiply"),
        ]
        if isinstance(self.experts, Stacked):
            into = self.experts.linear(at, 0, hidden, 2 * width, experts, chosen)
            return [into, *between, self.experts.linear(at, 1, width, hidden, experts, chosen)]
        gate, up, down = (f"{at}.{name}" for name in self.experts)
        return [
            linear(gate, "mlp", hidden, width, experts=experts, experts_per_row=chosen),
            linear(up, "mlp", hidden, width, experts=experts, experts_per_row=chosen),
            *between,
            linear(down, "mlp", width, hidden, experts=experts, experts_per_row=chosen),
        ]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Attention whose keys and values are projected up from one latent vector a token, DeepSeek-V2's MLA (arXiv:2405.04434, section 2.1).

    Attributes:
        at: its name in the block.
        indexed: an indexer scores all keys and the best are attended to (DeepSeek-V3.2, arXiv:2512.02556, section 2.1). Transformers computes the
            scores of the others too and masks them, and so they are counted.
    """

    at: str = "self_attn"
    indexed: bool = False

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Queries (by way of a latent of their own where `q_lora_rank` is set), the latent, keys and values from it, attention, output."""
        at, hidden, heads = f"{block}.{self.at}", size(config, "hidden_size"), size(config, "num_attention_heads")
        nope, rope, value, latent = (size(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
        bias = flag(config, "attention_bias")
        index = self._indexer(f"{at}.indexer", config, hidden) if self.indexed else []
        indexed = size(config, "index_head_dim") if self.indexed else 0
        return [
            *self._queries(at, config, hidden, heads * (nope + rope), bias),
            linear(f"{at}.kv_a_proj_with_mqa", "attention", hidden, latent + rope, bias=bias),
            norm(f"{at}.kv_a_layernorm", latent),
            rotary(f"{at}.rotary", heads + 1, rope),  # one key of positions for all heads
            replace(linear(f"{at}.kv_b_proj", "attention", latent, heads * (nope + value)), over_cache=True),
            *index,
            Attention(
                name=at, component="attention", causal=True, num_attention_heads=heads, num_key_value_heads=heads, head_dim=nope + rope,
                v_head_dim=value, latent_dim=latent + rope + indexed,
            ),
            linear(f"{at}.o_proj", "attention", heads * value, hidden, bias=bias),
        ]  # fmt: skip

    def _queries(self, at: str, config: Config, hidden: int, outputs: int, bias: bool) -> list[Part]:
        if config.get("q_lora_rank") is None:
            return [linear(f"{at}.q_proj", "attention", hidden, outputs)]
        rank = size(config, "q_lora_rank")
        return [
            linear(f"{at}.q_a_proj", "attention", hidden, rank, bias=bias),
            norm(f"{at}.q_a_layernorm", rank),
            linear(f"{at}.q_b_proj", "attention", rank, outputs),
        ]

    def _indexer(self, at: str, config: Config, hidden: int) -> list[Part]:
        heads, width, rank = (size(config, name) for name in ("index_n_heads", "index_head_dim", "q_lora_rank"))
        return [
            linear(f"{at}.wq_b", "attention", rank, heads * width),
            linear(f"{at}.wk", "attention", hidden, width),
            norm(f"{at}.k_norm", width, "layernorm"),
            rotary(f"{at}.rotary", heads + 1, size(config, "qk_rope_head_dim")),
            linear(f"{at}.weights_proj", "attention", hidden, heads),
            Product(name=f"{at}.scores", component="attention", m="query", k=width, n="key", products=heads),
            Product(name=f"{at}.sum", component="attention", m="query", k=heads, n="key"),
        ]


@dataclass(frozen=True, kw_only=True)
class WideWindows:
    """MiMo-V2's attention: layers with a window have twice the heads of keys and values, and a learned score for each head; values have a width
    of their own.

    Attributes:
        kinds: the rule for `layer_types`.
    """

    at: str = "self_attn"
    kinds: Rule

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Projections, attention, the projection of its output.

        Raises:
            ModelError: heads of keys that do not divide those of queries.
        """
        at, hidden, heads = f"{block}.{self.at}", size(config, "hidden_size"), size(config, "num_attention_heads")
        slides = types(config, "layer_types", self.kinds)[layer] == "sliding_attention"
        head_dim, value, kv = head_dim_of(config), size(config, "v_head_dim"), kv_heads_of(config) * (2 if slides else 1)
        if heads % kv:
            raise ModelError(f"config.json: num_attention_heads={heads} is not a multiple of the {kv} heads of keys of a layer with a window.")
        bias, sinks = flag(config, "attention_bias"), {f"{at}.attention_sink_bias": (heads,)}
        return [
            linear(f"{at}.q_proj", "attention", hidden, heads * head_dim, bias=bias),
            linear(f"{at}.k_proj", "attention", hidden, kv * head_dim, bias=bias),
            linear(f"{at}.v_proj", "attention", hidden, kv * value, bias=bias),
            rotary(f"{at}.rotary", heads + kv, rotary_dim(config, head_dim)),
            *([Table(name=f"{at}.sinks", component="attention", shapes=sinks)] if slides else []),
            Attention(
                name=at, component="attention", causal=True, num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim,
                v_head_dim=value, window=size(config, "sliding_window") if slides else None,
            ),
            linear(f"{at}.o_proj", "attention", heads * value, hidden),
        ]  # fmt: skip


GROUPED, PRE_NORMS, PLAIN = GroupedQuery(), Norms(), Mixture()


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a decoder with mixtures: attention, then experts, or a plain gated MLP in the layers that `dense` names.

    Attributes:
        norms: of a block; `dense_norms`: of one without experts, where they are others.
        dense: (config, layer) → whether the layer has no experts.
        dense_width: the field of the plain MLP's width, or what gives it; `mlp`: its matrices; `dense_at`: its name, where it is not the mixture's.
    """

    attention: Mixer = GROUPED
    mixture: Mixture = PLAIN
    norms: Norms = PRE_NORMS
    dense_norms: Norms | None = None
    dense: Condition = no
    dense_width: str | Callable[[Config], int] = "intermediate_size"
    dense_at: str | None = None
    mlp: Gated = GATED

    def __call__(self, block: str, config: Config, layer: int) -> list[Part]:
        """The parts of one block."""
        if self.dense(config, layer):
            norms = self.dense_norms or self.norms
            width = size(config, self.dense_width) if isinstance(self.dense_width, str) else self.dense_width(config)
            feeds = self.mlp.parts(f"{block}.{self.dense_at or self.mixture.at}", config, width)
        else:
            norms, feeds = self.norms, self.mixture.parts(block, config, layer)
        return norms.around(block, config, self.attention.parts(block, config, layer), feeds)


def first_dense(config: Config, layer: int) -> bool:
    """The first `first_k_dense_replace` layers."""
    return layer < count(config, "first_k_dense_replace")


def sparse_steps(config: Config, layer: int) -> bool:
    """All but each `decoder_sparse_step`-th layer, and those that `mlp_only_layers` lists."""
    return layer in numbers(config, "mlp_only_layers") or (layer + 1) % size(config, "decoder_sparse_step") != 0


def listed_dense(rule: Rule) -> Condition:
    """The layers that `mlp_layer_types` calls dense."""
    return lambda config, layer: types(config, "mlp_layer_types", rule)[layer] == "dense"


def of_layer(config: Config, field: str, layer: int) -> int:
    """A field that is a positive whole number, or a list of one for each layer.

    Raises:
        ModelError: neither, or a list that is too short.
    """
    value = config.get(field)
    if not isinstance(value, list | tuple):
        return size(config, field)
    if layer >= len(value):
        raise ModelError(f"config.json: {field} names {len(value)} layers, num_hidden_layers={size(config, 'num_hidden_layers')}.")
    return size({field: value[layer]}, field)


def shared_width(number: str, width: str = "moe_intermediate_size") -> Callable[[Config], int]:
    """So many shared experts, each as wide as a routed one."""
    return lambda config: count(config, number) * size(config, width)


FIRST_DENSE: Rule = lambda config, layer: "sparse" if layer else "dense"  # noqa: E731 - a value of the table below
NO_DENSE = tuple(name for name in FIELDS if name != "intermediate_size")
ALL_HEADS = (LM, CLASSES, TOKENS, ANSWERS)
W123 = ("experts.*.w1", "experts.*.w3", "experts.*.w2")
"""Mixtral's names of gate, up and down."""
N_SHARED = Shared(width=shared_width("n_shared_experts"))
MIXTRAL = Mixture(at="block_sparse_moe", number="num_local_experts", width="intermediate_size", experts=W123)
DEEPSEEK_V3 = Mixture(number="n_routed_experts", scores="sigmoid", balance=Balance(), shared=N_SHARED)
QWEN_MOE = Mixture(
    shared=Shared(at="shared_expert", width=lambda config: count(config, "shared_expert_intermediate_size"), gate="shared_expert_gate")
)
GRANITE = Mixture(
    at="block_sparse_moe", router="router.layer", number="num_local_experts", width="intermediate_size",
    experts=Stacked(names=("input_linear.weight", "output_linear.weight")),
)  # fmt: skip


def _qwen2_moe_kind(config: Config, layer: int) -> str:
    slides = flag(config, "use_sliding_window") and layer % 2 == 0 and layer < count(config, "max_window_layers")
    return "sliding_attention" if slides else "full_attention"


def _dots1_kind(config: Config, layer: int) -> str:
    slides = config.get("sliding_window") is not None and layer >= count(config, "max_window_layers")
    return "sliding_attention" if slides else "full_attention"


def _unrotated(config: Config) -> list[int]:
    """Llama 4's layers with rotary positions: 1, the others 0."""
    interval = size(config, "no_rope_layer_interval")
    return numbers(config, "no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(size(config, "num_hidden_layers"))]


def _llama4_rotates(config: Config, layer: int) -> bool:
    listed = _unrotated(config)
    if len(listed) != size(config, "num_hidden_layers"):
        raise ModelError(f"config.json: no_rope_layers names {len(listed)} layers, num_hidden_layers={size(config, 'num_hidden_layers')}.")
    return bool(listed[layer])


def _llama4_dense(config: Config, layer: int) -> bool:
    if config.get("moe_layers") is None:
        return (layer + 1) % size(config, "interleave_moe_layer_step") != 0
    return layer not in numbers(config, "moe_layers")


def _ernie_dense(config: Config, layer: int) -> bool:
    interval, first = size(config, "moe_layer_interval"), count(config, "moe_layer_start_index")
    last = config.get("moe_layer_end_index")
    last = size(config, "num_hidden_layers") - 1 if last in (None, -1) else count(config, "moe_layer_end_index")
    return (layer + 1) % interval != 0 or not first <= layer <= last


def _first_k_kind(config: Config, layer: int) -> str:
    return "dense" if first_dense(config, layer) else "sparse"


def _axk1_kind(config: Config, layer: int) -> str:
    first, step = count(config, "first_k_dense_replace", 1), count(config, "moe_layer_freq", 1) or 1
    return "sparse" if layer >= first and layer % step == 0 else "dense"


def _exaone_kind(config: Config, layer: int) -> str:
    pattern = count(config, "sliding_window_pattern") if config.get("sliding_window") is not None else 0
    return "sliding_attention" if pattern and (layer + 1) % pattern else "full_attention"


EXAONE = GroupedQuery(
    bias=False, out_bias=False, head_norm="head", kinds=_exaone_kind,
    rotates=lambda config, layer: config.get("sliding_window") is None or types(config, "layer_types", _exaone_kind)[layer] == "sliding_attention",
)  # fmt: skip
AFMOE_KINDS = every("global_attn_every_n_layers", "full_attention", "sliding_attention")

DECODERS: dict[str, Decoder] = {
    "mixtral": Decoder(stem="Mixtral", heads=ALL_HEADS, block=Blocks(attention=GroupedQuery(bias=False, out_bias=False), mixture=MIXTRAL)),
    "qwen2_moe": Decoder(
        stem="Qwen2Moe",
        heads=ALL_HEADS,
        block=Blocks(
            attention=GroupedQuery(bias="qkv_bias", out_bias=False, kinds=_qwen2_moe_kind),
            mixture=QWEN_MOE,
            dense=sparse_steps,
        ),
    ),
    "qwen3_moe": Decoder(
        stem="Qwen3Moe",
        heads=ALL_HEADS,
        answers_at="transformer",
        block=Blocks(attention=GroupedQuery(head_norm="head"), mixture=Mixture(number="num_local_experts"), dense=sparse_steps),
    ),
    "olmoe": Decoder(stem="Olmoe", block=Blocks(attention=GroupedQuery(head_norm="row"), mixture=Mixture(width="intermediate_size"))),
    "flex_olmo": Decoder(
        stem="FlexOlmo",
        block=Blocks(
            attention=GroupedQuery(head_norm="row"),
            mixture=Mixture(width="intermediate_size"),
            norms=Norms(
                before_attention=None, after_attention="post_attention_layernorm", before_mlp=None, after_mlp="post_feedforward_layernorm"
            ),
        ),
    ),
    "deepseek_v2": Decoder(
        stem="DeepseekV2",
        heads=(LM, CLASSES),
        block=Blocks(
            attention=Latent(),
            mixture=Mixture(number="n_routed_experts", shared=Shared(width=shared_width("n_shared_experts"), mlp=Gated(bias="mlp_bias"))),
            dense=first_dense,
            mlp=Gated(bias="mlp_bias"),
        ),
    ),
    "deepseek_v3": Decoder(
        stem="DeepseekV3", heads=(LM, CLASSES, TOKENS), block=Blocks(attention=Latent(), mixture=DEEPSEEK_V3, dense=first_dense)
    ),
    "glm4_moe": Decoder(
        stem="Glm4Moe",
        block=Blocks(
            attention=GroupedQuery(out_bias=False, head_norm="head", head_norm_if=when("use_qk_norm")), mixture=DEEPSEEK_V3, dense=first_dense
        ),
    ),
    "glm4_moe_lite": Decoder(
        stem="Glm4MoeLite",
        block=Blocks(
            attention=Latent(), mixture=DEEPSEEK_V3, dense=listed_dense(FIRST_DENSE)
        ),
    ),
    "dots1": Decoder(
        stem="Dots1", block=Blocks(attention=GroupedQuery(head_norm="head", kinds=_dots1_kind), mixture=DEEPSEEK_V3, dense=first_dense)
    ),
    "gpt_oss": Decoder(
        stem="GptOss",
        heads=(LM, CLASSES, TOKENS),
        block=Blocks(
            attention=GroupedQuery(sinks=True, kinds=every(2, "full_attention", "sliding_attention")),
            mixture=Mixture(
                router="router", router_bias=True, number="num_local_experts", width="intermediate_size",
                experts=Stacked(names=("experts.gate_up_proj", "experts.down_proj"), transposed=True, bias=True),
            ),
        ),
    ),
    "granitemoe": Decoder(stem="GraniteMoe", block=Blocks(mixture=GRANITE)),
    "granitemoeshared": Decoder(
        stem="GraniteMoeShared",
        block=Blocks(
            mixture=replace(
                GRANITE,
                shared=Shared(
                    at="shared_mlp", width=lambda config: count(config, "shared_intermediate_size"), beside=True,
                    mlp=FUSED,
                ),
            )
        ),
    ),
    "phimoe": Decoder(
        stem="Phimoe", heads=(LM, CLASSES), norm_kind="layernorm", head_bias="lm_head_bias",
        block=Blocks(mixture=MIXTRAL, norms=Norms(kind="layernorm")),
    ),
    "llama4_text": Decoder(
        stem="Llama4",
        base="TextModel",
        block=Blocks(
            attention=GroupedQuery(
                head_norm="head", norm_affine=False, rotates=_llama4_rotates,
                head_norm_if=lambda config, layer: flag(config, "use_qk_norm") and _llama4_rotates(config, layer),
                kinds=lambda config, layer: "chunked_attention" if _llama4_rotates(config, layer) else "full_attention",
            ),
            mixture=Mixture(
                at="feed_forward", router="router", scores="sigmoid", number="num_local_experts", width="intermediate_size",
                experts=Stacked(names=("experts.gate_up_proj", "experts.down_proj"), transposed=True, computes_all=True),
                shared=Shared(at="shared_expert", width=lambda config: size(config, "intermediate_size")),
            ),
            dense=_llama4_dense,
            dense_width="intermediate_size_mlp",
        ),
    ),
    "minimax_m2": Decoder(
        stem="MiniMaxM2",
        block=Blocks(
            attention=GroupedQuery(bias=False, out_bias=False, head_norm="row"),
            mixture=replace(MIXTRAL, scores="sigmoid", balance=Balance(name="e_score_correction_bias")),
        ),
    ),
    "ernie4_5_moe": Decoder(
        stem="Ernie4_5_Moe",
        head_bias="use_bias",
        block=Blocks(
            attention=GroupedQuery(bias="use_bias", out_bias="use_bias"),
            mixture=Mixture(
                number="moe_num_experts", chosen="moe_k", balance=Balance(name="moe_statics.e_score_correction_bias", parameter=True, row=True),
                shared=Shared(width=shared_width("moe_num_shared_experts"), mlp=Gated(bias="use_bias")),
            ),
            dense=_ernie_dense,
            mlp=Gated(bias="use_bias"),
        ),
    ),
    "afmoe": Decoder(
        stem="Afmoe",
        block=Blocks(
            attention=GroupedQuery(
                head_norm="head", gate="gate_proj", kinds=AFMOE_KINDS,
                rotates=lambda config, layer: types(config, "layer_types", AFMOE_KINDS)[layer] == "sliding_attention",
            ),
            mixture=Mixture(
                router="router.gate", scores="sigmoid", balance=Balance(name="expert_bias", parameter=True),
                shared=Shared(width=shared_width("num_shared_experts")),
            ),
            norms=Norms(after_attention="post_attention_layernorm", before_mlp="pre_mlp_layernorm", after_mlp="post_mlp_layernorm"),
            dense=lambda config, layer: layer < count(config, "num_dense_layers"),
        ),
    ),
    "solar_open": Decoder(stem="SolarOpen", fields=NO_DENSE, block=Blocks(attention=GroupedQuery(out_bias=False), mixture=DEEPSEEK_V3)),
    "exaone_moe": Decoder(
        stem="ExaoneMoe",
        block=Blocks(
            attention=EXAONE,
            mixture=Mixture(
                scores="sigmoid", balance=Balance(name="e_score_correction_bias"), shared=Shared(width=shared_width("num_shared_experts"))
            ),
            dense=listed_dense(_first_k_kind),
        ),
    ),
    "hunyuan_v1_moe": Decoder(
        stem="HunYuanMoEV1",
        heads=(LM, CLASSES),
        block=Blocks(
            attention=GroupedQuery(head_norm="head", norm_names=("query_layernorm", "key_layernorm")),
            mixture=Mixture(
                router="gate.wg", chosen="moe_topk", width="intermediate_size",
                shared=Shared(at="shared_mlp", width=lambda config: size(config, "intermediate_size")),
            ),
        ),
    ),
    "mellum": Decoder(
        stem="Mellum",
        block=Blocks(
            attention=GroupedQuery(head_norm="head", kinds=always("full_attention")), mixture=Mixture(), dense=listed_dense(always("sparse"))
        ),
    ),
    "hy_v3": Decoder(
        stem="HYV3",
        block=Blocks(
            attention=GroupedQuery(head_norm="head"),
            mixture=Mixture(
                router="router.gate", scores="sigmoid", number="num_local_experts", balance=Balance(name="expert_bias"),
                shared=Shared(at="shared_mlp", width=shared_width("num_shared_experts"), mlp=Gated(bias="mlp_bias")),
            ),
            dense=listed_dense(FIRST_DENSE),
            mlp=Gated(bias="mlp_bias"),
        ),
    ),
    "granitemoe_swa": Decoder(
        stem="GraniteMoeSWA",
        block=Blocks(
            attention=GroupedQuery(sinks=True, kinds=lambda config, layer: "sliding_attention" if layer % 4 else "full_attention"),
            mixture=Mixture(
                at="block_sparse_moe", router="router", number="num_local_experts", width="intermediate_size",
                experts=Stacked(names=("experts.gate_up_proj", "experts.down_proj")),
            ),
        ),
    ),
    "deepseek_v32": Decoder(
        stem="DeepseekV32",
        block=Blocks(attention=Latent(indexed=True), mixture=DEEPSEEK_V3, dense=listed_dense(_first_k_kind)),
    ),
    "axk1": Decoder(
        stem="AXK1",
        heads=(LM, CLASSES, TOKENS),
        block=Blocks(
            attention=Latent(), mixture=DEEPSEEK_V3, dense=listed_dense(_axk1_kind), norms=Norms(after_mlp="post_mlp_layernorm"),
            dense_norms=PRE_NORMS,
        ),
    ),
    "mimo_v2_flash": Decoder(
        stem="MiMoV2Flash",
        block=Blocks(
            attention=WideWindows(kinds=lambda config, layer: "sliding_attention" if layer and (layer + 1) % 6 else "full_attention"),
            mixture=replace(DEEPSEEK_V3, shared=None),
            dense=listed_dense(FIRST_DENSE),
        ),
    ),
    "minicpm3": Decoder(stem="MiniCPM3", heads=(LM, CLASSES), block=Blocks(attention=Latent(), dense=yes)),
    "youtu": Decoder(stem="Youtu", block=Blocks(attention=Latent(), dense=yes)),
}  # fmt: skip

FAMILIES: dict[str, Family] = {name: decoder.family() for name, decoder in DECODERS.items()}
