"""Decoders whose recurrences are computed in chunks of positions, as matrix products: Mamba-2's state spaces, and gated delta rules.

Matrix products are counted as PyTorch's counter sees those of transformers' own code, which runs where no fused kernel is installed: the last
chunk is filled up. `Scan.flops_per_row` is what that counter does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lighten.errors import ModelError
from lighten.model.families._decoder import (
    ANSWERS,
    CLASSES,
    FIELDS,
    LM,
    TOKENS,
    ByKind,
    Config,
    Decoder,
    Gated,
    GroupedQuery,
    Mixer,
    Norms,
    always,
    count,
    elementwise,
    flag,
    linear,
    no,
    norm,
    numbers,
    size,
    yes,
)
from lighten.model.families._family import Family
from lighten.model.families._fields import activation, optional
from lighten.model.families.experts import FUSED, GRANITE, QWEN_MOE, Blocks, Router, Shared, sparse_steps
from lighten.model.families.recurrent import MAMBA_FIELDS, causal_conv, expanded, mamba_block
from lighten.model.spec import Chunks, Part, Product, Scan, Size, Table


@dataclass(frozen=True, kw_only=True)
class StateSpaceDuality:
    """Mamba-2's mixer (Dao & Gu 2024, arXiv:2405.21060, section 7.1), its recurrence computed in chunks (section 6, listing 1).

    Attributes:
        at: its name in the block.
        width: gives the channels; the other fields name the config's: of heads, the width of one, the state's size, groups of B and C, the
            convolution's kernel, positions of a chunk, and biases.
        normed: the output is gated within an RMSNorm: whether, or the field that says so; else by a product alone.
    """

    at: str = "mamba"
    width: Callable[[Config], int]
    heads: str = "mamba_n_heads"
    head_dim: str = "mamba_d_head"
    state: str = "mamba_d_state"
    groups: str = "mamba_n_groups"
    kernel: str = "mamba_d_conv"
    chunk: str = "mamba_chunk_size"
    bias: str = "mamba_proj_bias"
    out_bias: str = "mamba_proj_bias"
    conv_bias: str = "mamba_conv_bias"
    act: str = "hidden_act"
    normed: str | bool = True

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Projection, convolution, the recurrence, gate and norm, and the projection out.

        Raises:
            ModelError: heads that do not make up the width.
        """
        at, hidden, width = f"{block}.{self.at}", size(config, "hidden_size"), self.width(config)
        heads, n, groups, kernel = (size(config, name) for name in (self.heads, self.state, self.groups, self.kernel))
        p = width // heads if config.get(self.head_dim) in (None, "auto") else size(config, self.head_dim)
        if heads * p != width or heads % groups:
            raise ModelError(f"config.json: {self.heads}={heads}, {self.head_dim}={p} and {self.groups}={groups} do not make up {width} channels.")
        mixed, act = width + 2 * groups * n, str(config.get(self.act, "silu"))
        return [
            linear(f"{at}.in_proj", "attention", hidden, width + mixed + heads, bias=flag(config, self.bias)),
            *causal_conv(f"{at}.conv1d", mixed, kernel, bias=flag(config, self.conv_bias)),
            activation(f"{at}.act", act, mixed),
            elementwise(f"{at}.softplus", "attention", heads, "softplus", 4),
            Table(name=f"{at}.A", component="attention", shapes={f"{at}.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}),
            *self._recurrence(at, heads, p, n, size(config, self.chunk), mixed * kernel),
            activation(f"{at}.gate", act, width),
            elementwise(f"{at}.gate.multiply", "attention", width, "multiply"),
            *([norm(f"{at}.norm", width)] if flag(config, self.normed) else []),
            linear(f"{at}.out_proj", "attention", width, hidden, bias=flag(config, self.out_bias)),
        ]

    def _recurrence(self, at: str, heads: int, p: int, n: int, chunk: int, convolved: int) -> list[Part]:
        whole, before = Chunks(length=chunk), Chunks(length=chunk, more=1)  # the state before the first chunk is one more

        def product(name: str, m: Size, k: Size, n: Size, products: int = 1) -> Product:
            return Product(name=f"{at}.{name}", component="attention", m=m, k=k, n=n, products=heads * products)

        return [
            product("scores", whole, n, chunk * chunk),  # C·B, of each pair of positions in a chunk
            product("within", whole, chunk, chunk * p),  # masked scores times x
            product("states", whole, chunk, n * p),  # what each chunk adds to the state
            product("between", before, before, n * p),  # the state before each chunk, from those of all chunks
            product("readout", whole, n, chunk * p),  # C times that
            # a position: of each pair a difference, mask, exponential and product; B's decay; x·Δ, decay of the readout, two sums and D·x
            Scan(
                name=f"{at}.scan", component="attention", flops_per_row=heads * (4 * chunk + n + 6 * p),
                state_elements=heads * p * n + convolved,
            ),
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GatedDelta:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464), its recurrence computed in chunks (section 3.3).

    Attributes:
        at: its name in the block.
        projections: name → multiples of the keys' width, the values' width and the values' heads that it puts out, which make q, k, v, z, b, a.
        chunk: positions of a chunk. Source: transformers' torch_chunk_gated_delta_rule.
    """

    at: str = "linear_attn"
    projections: Mapping[str, tuple[int, int, int]]
    chunk: int = 64

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Projections, convolution, normalized queries and keys, the recurrence, its gated norm, and the projection out.

        Raises:
            ModelError: heads of values that are no multiple of those of keys.
        """
        at, hidden, act = f"{block}.{self.at}", size(config, "hidden_size"), str(config.get("hidden_act", "silu"))
        key_heads, heads, kernel = (size(config, f"linear_{name}") for name in ("num_key_heads", "num_value_heads", "conv_kernel_dim"))
        k, v = size(config, "linear_key_head_dim"), size(config, "linear_value_head_dim")
        if heads % key_heads:
            raise ModelError(f"config.json: linear_num_value_heads={heads} is not a multiple of linear_num_key_heads={key_heads}.")
        keys, values = key_heads * k, heads * v
        mixed = 2 * keys + values
        return [
            *(
                linear(f"{at}.{name}", "attention", hidden, of_keys * keys + of_values * values + of_heads * heads)
                for name, (of_keys, of_values, of_heads) in self.projections.items()
            ),
            *causal_conv(f"{at}.conv1d", mixed, kernel, bias=False),
            activation(f"{at}.act", act, mixed),
            Table(name=f"{at}.A", component="attention", shapes={f"{at}.A_log": (heads,), f"{at}.dt_bias": (heads,)}),
            elementwise(f"{at}.beta", "attention", heads, "sigmoid"),
            elementwise(f"{at}.softplus", "attention", heads, "softplus", 5),
            *self._recurrence(at, heads, k, v, mixed * kernel),
            norm(f"{at}.norm", v, groups=heads),
            activation(f"{at}.gate", act, values),
            elementwise(f"{at}.gate.multiply", "attention", values, "multiply"),
            linear(f"{at}.out_proj", "attention", values, hidden),
        ]

    def _recurrence(self, at: str, heads: int, k: int, v: int, convolved: int) -> list[Part]:
        chunk, whole = self.chunk, Chunks(length=self.chunk)

        def product(name: str, inner: int, outer: int, products: int) -> Product:
            return Product(name=f"{at}.{name}", component="attention", m=whole, k=inner, n=outer, products=products)

        return [
            product("scores", k, chunk * chunk, 2 * heads),  # of keys with keys, and of queries with keys
            product("reads", k, chunk * v, 2 * heads),  # of the state before the chunk: by its keys, and by its queries
            product("within", chunk, chunk * v, heads),
            product("writes", chunk, k * v, heads),
            # a position: two unit norms (3 k each), β and decays (4 k + v), of each pair in a chunk 5; a triangular system for k + v columns, which
            # PyTorch's counter does not see; the state's decay, once a chunk
            Scan(
                name=f"{at}.scan", component="attention", state_elements=heads * k * v + convolved,
                flops_per_row=heads * (10 * k + v + 5 * chunk + chunk * (k + v) + 2 * k * v // chunk),
            ),
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Mixers of the same input whose outputs are added."""

    mixers: tuple[Mixer, ...]

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """The parts of each, and the sums."""
        hidden, parts = size(config, "hidden_size"), [part for mixer in self.mixers for part in mixer.parts(block, config, layer)]
        return [*parts, elementwise(f"{block}.parallel.add", "attention", hidden, "add", len(self.mixers) - 1)]


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Nemotron-H's MLP: down(act(up x))."""

    at: str = "mixer"

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Its parts at the block's mixer."""
        return self.of_width(f"{block}.{self.at}", config, size(config, "intermediate_size"))

    def of_width(self, at: str, config: Config, width: int) -> list[Part]:
        """Its parts at `at`."""
        hidden, bias = size(config, "hidden_size"), flag(config, "mlp_bias")
        return [
            linear(f"{at}.up_proj", "mlp", hidden, width, bias=bias),
            activation(f"{at}.act_fn", str(config.get("mlp_hidden_act", "relu2")), width),
            linear(f"{at}.down_proj", "mlp", width, hidden, bias=bias),
        ]


@dataclass(frozen=True, kw_only=True)
class PlainExperts:
    """Nemotron-H's mixture: experts without gates, between projections to a latent where `moe_latent_size` is set, and a shared one."""

    at: str = "mixer"

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Router, experts, shared expert.

        Raises:
            ModelError: more experts a token than there are.
        """
        at, hidden, bias = f"{block}.{self.at}", size(config, "hidden_size"), flag(config, "mlp_bias")
        experts, chosen, width = (size(config, name) for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
        if chosen > experts:
            raise ModelError(f"config.json: num_experts_per_tok={chosen} is more than n_routed_experts={experts}.")
        latent = optional(config, "moe_latent_size")
        inner = latent or hidden
        return [
            Router(
                name=f"{at}.gate", component="mlp", in_features=hidden, out_features=experts,
                buffers={f"{at}.gate.e_score_correction_bias": (experts,)},
            ),
            elementwise(f"{at}.gate.sigmoid", "mlp", experts, "sigmoid"),
            *([linear(f"{at}.fc1_latent_proj", "mlp", hidden, inner, bias=bias)] if latent else []),
            linear(f"{at}.experts.*.up_proj", "mlp", inner, width, experts=experts, experts_per_row=chosen),
            activation(f"{at}.experts.act_fn", str(config.get("mlp_hidden_act", "relu2")), chosen * width),
            linear(f"{at}.experts.*.down_proj", "mlp", width, inner, experts=experts, experts_per_row=chosen),
            elementwise(f"{at}.experts.combine", "mlp", chosen * inner, "multiply", 2),
            *([linear(f"{at}.fc2_latent_proj", "mlp", inner, hidden, bias=bias)] if latent else []),
            *Plain().of_width(f"{at}.shared_experts", config, size(config, "moe_shared_expert_intermediate_size")),
            elementwise(f"{at}.shared_experts.add", "mlp", hidden, "add"),
        ]  # fmt: skip


HYBRID_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
"""Letters of `hybrid_override_pattern`. Source: transformers, NemotronHConfig._pattern_to_list."""


@dataclass(frozen=True, kw_only=True)
class Listed(Decoder):
    """A decoder whose number of layers is that of the kinds that its config lists, or spells as a pattern."""

    def describe(self, config: Config, architecture: str) -> tuple[Part, ...]:
        """The parts of one of its architectures.

        Raises:
            ModelError: a pattern of other letters, or what any decoder raises.
        """
        kinds, pattern = config.get("layers_block_type"), config.get("hybrid_override_pattern")
        if pattern is not None:
            if not isinstance(pattern, str) or not pattern or set(pattern) - set(HYBRID_PATTERN):
                raise ModelError(f"config.json: hybrid_override_pattern={pattern!r} is not made of the letters {' '.join(HYBRID_PATTERN)}.")
            kinds = [HYBRID_PATTERN[letter] for letter in pattern]
        layers = len(kinds) if isinstance(kinds, list | tuple) else None
        return super().describe({**config, "layers_block_type": kinds, "num_hidden_layers": layers}, architecture)


def _qwen_kind(config: Config, layer: int) -> str:
    interval = optional(config, "full_attention_interval") or 4
    return "linear_attention" if (layer + 1) % interval else "full_attention"


def _bamba_kind(config: Config, layer: int) -> str:
    return "full_attention" if layer in numbers(config, "attn_layer_indices") else "linear_attention"


def _falcon_h1_width(config: Config) -> int:
    return optional(config, "mamba_d_ssm") or expanded("mamba_expand")(config)


def _qwen_mixers(**projections: tuple[int, int, int]) -> ByKind:
    full = GroupedQuery(head_norm="head", gated_queries=True, windowed=False)
    return ByKind(mixers={"linear_attention": GatedDelta(projections=projections), "full_attention": full}, rule=_qwen_kind)


QWEN_NEXT = _qwen_mixers(in_proj_qkvz=(2, 2, 0), in_proj_ba=(0, 0, 2))
QWEN_3_5 = _qwen_mixers(in_proj_qkv=(2, 1, 0), in_proj_z=(0, 1, 0), in_proj_b=(0, 0, 1), in_proj_a=(0, 0, 1))
MAMBA_2 = StateSpaceDuality(width=expanded("mamba_expand"))

DECODERS: dict[str, Decoder] = {
    "mamba2": Decoder(
        stem="Mamba2", fields=MAMBA_FIELDS, trunk="backbone", table="embeddings", norm="norm_f",
        block=mamba_block(
            StateSpaceDuality(
                at="mixer", width=expanded("expand"), heads="num_heads", head_dim="head_dim", state="state_size", groups="n_groups",
                kernel="conv_kernel", chunk="chunk_size", bias="use_bias", out_bias="use_bias", conv_bias="use_conv_bias",
            )
        ),
    ),
    "bamba": Decoder(
        stem="Bamba",
        norm="final_layernorm",
        block=Blocks(
            attention=ByKind(
                mixers={"linear_attention": MAMBA_2, "full_attention": GroupedQuery(windowed=False)}, rule=_bamba_kind, field="layers_block_type"
            ),
            norms=Norms(before_mlp="pre_ff_layernorm"),
            dense=yes,
            dense_at="feed_forward",
            mlp=Gated(bias="mlp_bias"),
        ),
    ),
    "falcon_h1": Decoder(
        stem="FalconH1",
        norm="final_layernorm",
        block=Blocks(
            attention=Parallel(
                mixers=(
                    StateSpaceDuality(width=_falcon_h1_width, out_bias="projectors_bias", normed="mamba_rms_norm"), GroupedQuery(windowed=False)
                )
            ),
            norms=Norms(before_mlp="pre_ff_layernorm"),
            dense=yes,
            dense_at="feed_forward",
            mlp=Gated(bias="mlp_bias"),
        ),
    ),
    "nemotron_h": Listed(
        stem="NemotronH", trunk="backbone", table="embeddings", norm="norm_f",
        block=mamba_block(
            ByKind(
                mixers={
                    "linear_attention": StateSpaceDuality(
                        at="mixer", width=lambda config: size(config, "mamba_num_heads") * size(config, "mamba_head_dim"),
                        heads="mamba_num_heads", head_dim="mamba_head_dim", state="ssm_state_size", groups="n_groups", kernel="conv_kernel",
                        chunk="chunk_size", bias="use_bias", out_bias="use_bias", conv_bias="use_conv_bias", act="mamba_hidden_act",
                    ),
                    "full_attention": GroupedQuery(at="mixer", bias=False, out_bias=False, rotates=no, windowed=False),
                    "moe": PlainExperts(),
                    "mlp": Plain(),
                },
                rule=always("linear_attention"),
                field="layers_block_type",
            )
        ),
    ),
    "granitemoehybrid": Decoder(
        stem="GraniteMoeHybrid",
        block=Blocks(
            attention=ByKind(
                mixers={
                    "linear_attention": MAMBA_2,
                    "full_attention": GroupedQuery(windowed=False, rotates=lambda config, layer: config.get("position_embedding_type") == "rope"),
                },
                rule=always("linear_attention"),
            ),
            mixture=replace(
                GRANITE,
                shared=Shared(
                    at="shared_mlp", width=lambda config: size(config, "shared_intermediate_size"), beside=True, mlp=FUSED,
                ),
            ),
            dense=lambda config, layer: count(config, "num_local_experts") == 0,
            dense_at="shared_mlp",
            dense_width="shared_intermediate_size",
            mlp=FUSED,
        ),
    ),
    "qwen3_next": Decoder(
        stem="Qwen3Next", heads=(LM, CLASSES, TOKENS, ANSWERS), answers_at="transformer",
        block=Blocks(attention=QWEN_NEXT, mixture=QWEN_MOE, dense=sparse_steps),
    ),
    "qwen3_5_text": Decoder(stem="Qwen3_5", base="TextModel", block=Blocks(attention=QWEN_3_5, dense=yes)),
    "qwen3_5_moe_text": Decoder(
        stem="Qwen3_5Moe", base="TextModel", fields=tuple(name for name in FIELDS if name != "intermediate_size"),
        block=Blocks(attention=QWEN_3_5, mixture=QWEN_MOE),
    ),
}  # fmt: skip

FAMILIES: dict[str, Family] = {name: decoder.family() for name, decoder in DECODERS.items()}
