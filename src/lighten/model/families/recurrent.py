"""Decoders with recurrences in place of attention, or between layers of it: state spaces, gated linear recurrences, short convolutions, RWKV.

Matrix products are counted as PyTorch's counter sees those of transformers' own code, which runs where no fused kernel is installed: a causal
convolution computes `kernel - 1` positions more than it keeps, and a step of a scan is elementwise but for its readout. `Scan.flops_per_row` is
what that counter does not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lighten.errors import ModelError
from lighten.model.families._decoder import (
    CLASSES,
    LM,
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
from lighten.model.families.experts import Balance, Blocks, Mixture
from lighten.model.spec import Conv, Linear, Part, Product, Scan, Table

MOST_EXPANDED = 10_000
"""A factor that no model's width has reached; those that are known are below 10."""


def causal_conv(name: str, channels: int, kernel: int, *, bias: bool) -> list[Part]:
    """A convolution of each channel over the last `kernel` positions, padded on both sides and cut to the positions' number."""
    parts: list[Part] = [
        Conv(name=name, component="attention", in_channels=channels, out_channels=channels, kernel=(kernel,), groups=channels, bias=bias)
    ]
    if kernel > 1:
        beyond = kernel - 1
        parts.append(Product(name=f"{name}.beyond", component="attention", rows=beyond, m=beyond, k=kernel, n=1, products=channels))
    return parts


def factor(config: Config, field: str) -> float:
    """A field that is a positive number.

    Raises:
        ModelError: it is none.
    """
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_EXPANDED:
        raise ModelError(f"config.json: {field}={value!r} is not a positive number, such as 2.")
    return value


def expanded(field: str) -> Callable[[Config], int]:
    """hidden_size times a factor of the config, rounded down, and at least 1."""
    return lambda config: max(1, int(factor(config, field) * size(config, "hidden_size")))


@dataclass(frozen=True, kw_only=True)
class SelectiveScan:
    """Mamba's mixer (Gu & Dao 2023, arXiv:2312.00752, section 3.4).

    Attributes:
        at: its name in the block.
        width: gives the channels d; the other fields name the config's: of the state's size n, the convolution's kernel, the rank of Δ
            ("auto": hidden_size / 16, rounded up), and biases.
        normed: Δ, B and C are normalized, with weights (Jamba) or without (Falcon).
    """

    at: str = "mixer"
    width: Callable[[Config], int]
    state: str = "state_size"
    kernel: str = "conv_kernel"
    rank: str = "time_step_rank"
    bias: str = "use_bias"
    conv_bias: str = "use_conv_bias"
    normed: Literal["weighted", "plain"] | None = None

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Projection, convolution, the inputs' Δ, B and C, the scan, its readout and gate, and the projection out."""
        at, hidden, d = f"{block}.{self.at}", size(config, "hidden_size"), self.width(config)
        n, kernel, bias = size(config, self.state), size(config, self.kernel), flag(config, self.bias)
        rank = math.ceil(hidden / 16) if config.get(self.rank) in (None, "auto") else size(config, self.rank)
        act = str(config.get("hidden_act", "silu"))
        return [
            linear(f"{at}.in_proj", "attention", hidden, 2 * d, bias=bias),
            *causal_conv(f"{at}.conv1d", d, kernel, bias=flag(config, self.conv_bias)),
            activation(f"{at}.act", act, d),
            linear(f"{at}.x_proj", "attention", d, rank + 2 * n),
            *(
                norm(f"{at}.{name}_layernorm", width, affine=self.normed == "weighted")
                for name, width in (("dt", rank), ("b", n), ("c", n)) if self.normed
            ),
            linear(f"{at}.dt_proj", "attention", rank, d, bias=True),
            elementwise(f"{at}.softplus", "attention", d, "softplus", 4),
            Table(name=f"{at}.A", component="attention", shapes={f"{at}.A_log": (d, n), f"{at}.D": (d,)}),
            # for each of d·n states: Δ·A and its exponential, Δ·B and times x, the old state times the one and plus the other; D·x for each channel
            Scan(name=f"{at}.scan", component="attention", flops_per_row=6 * d * n + 2 * d, state_elements=d * (n + kernel)),
            Product(name=f"{at}.readout", component="attention", m="query", k=n, n=1, products=d),
            activation(f"{at}.gate", act, d),
            elementwise(f"{at}.gate.multiply", "attention", d, "multiply"),
            linear(f"{at}.out_proj", "attention", d, hidden, bias=bias),
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """LFM2's mixer: C · conv(B · x), the three from one projection."""

    at: str = "conv"

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Projection, gate, convolution, gate, projection."""
        at, hidden, kernel, bias = f"{block}.{self.at}", size(config, "hidden_size"), size(config, "conv_L_cache"), flag(config, "conv_bias")
        return [
            linear(f"{at}.in_proj", "attention", hidden, 3 * hidden, bias=bias),
            elementwise(f"{at}.multiply_in", "attention", hidden, "multiply"),
            *causal_conv(f"{at}.conv", hidden, kernel, bias=bias),
            Scan(name=f"{at}.state", component="attention", flops_per_row=0, state_elements=hidden * kernel),
            elementwise(f"{at}.multiply_out", "attention", hidden, "multiply"),
            linear(f"{at}.out_proj", "attention", hidden, hidden, bias=bias),
        ]


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(Linear):
    """A linear of `blocks` square blocks, kept as [blocks, width, width] and [blocks, width]; `in_features` of all, `out_features` of one.

    Attributes:
        tensor: what the names of its weight and bias begin with.
    """

    blocks: int
    tensor: str

    def tensors(self) -> dict[str, tuple[int, ...]]:
        width = self.out_features
        return {f"{self.tensor}_weight": (self.blocks, width, width), f"{self.tensor}_bias": (self.blocks, width)}


@dataclass(frozen=True, kw_only=True)
class GatedRecurrence:
    """Griffin's recurrent block (De et al. 2024, arXiv:2402.19427, section 2.3), around its RG-LRU (equations 1 to 4)."""

    at: str = "temporal_block"

    def parts(self, block: str, config: Config, layer: int) -> list[Part]:
        """Two branches in, convolution and recurrence on one of them, their product, and the projection out."""
        at, hidden, heads, kernel = f"{block}.{self.at}", *(size(config, name) for name in ("hidden_size", "num_attention_heads", "conv1d_width"))
        width = optional(config, "lru_width") or hidden
        if width % heads:
            raise ModelError(f"config.json: lru_width={width} is not a multiple of num_attention_heads={heads}.")
        gates = [
            BlockDiagonal(
                name=f"{at}.rg_lru.{gate}", component="attention", in_features=width, out_features=width // heads, bias=True, blocks=heads,
                tensor=f"{at}.rg_lru.{gate}",
            )
            for gate in ("input_gate", "recurrent_gate")
        ]  # fmt: skip
        return [
            linear(f"{at}.linear_y", "attention", hidden, width, bias=True),
            activation(f"{at}.act_fn", str(config.get("hidden_activation", "gelu_pytorch_tanh")), width),
            linear(f"{at}.linear_x", "attention", hidden, width, bias=True),
            *causal_conv(f"{at}.conv_1d", width, kernel, bias=True),
            *gates,
            elementwise(f"{at}.rg_lru.sigmoid", "attention", 2 * width, "sigmoid"),
            Table(name=f"{at}.rg_lru", component="attention", shapes={f"{at}.rg_lru.recurrent_param": (width,)}),
            # a = exp(-8·gate·softplus(Λ)): 3; √(1 - a²)·gate·x: 5; a·state + that: 2
            Scan(name=f"{at}.rg_lru.scan", component="attention", flops_per_row=10 * width, state_elements=width * kernel),
            elementwise(f"{at}.multiply", "attention", width, "multiply"),
            linear(f"{at}.linear_out", "attention", width, hidden, bias=True),
        ]


def mamba_block(mixer: Mixer) -> Callable[[str, Config, int], list[Part]]:
    """x + mixer(norm(x))."""

    def block(at: str, config: Config, layer: int) -> list[Part]:
        hidden = size(config, "hidden_size")
        return [norm(f"{at}.norm", hidden), *mixer.parts(at, config, layer), elementwise(f"{at}.mixer.add", "attention", hidden, "add")]

    return block


def rwkv_block(at: str, config: Config, layer: int) -> list[Part]:
    """RWKV-4's time mixing and channel mixing (Peng et al. 2023, arXiv:2305.13048, section 3.1)."""
    hidden = size(config, "hidden_size")
    width, ffn = optional(config, "attention_hidden_size") or hidden, optional(config, "intermediate_size") or 4 * hidden
    time, channel = f"{at}.attention", f"{at}.feed_forward"
    mixes = {f"{time}.time_mix_{name}": (1, 1, hidden) for name in ("key", "value", "receptance")}
    return [
        *([norm(f"{at}.pre_ln", hidden, "layernorm")] if layer == 0 else []),
        norm(f"{at}.ln1", hidden, "layernorm"),
        Table(name=time, component="attention", shapes={f"{time}.time_decay": (width,), f"{time}.time_first": (width,), **mixes}),
        elementwise(f"{time}.time_mix", "attention", 3 * hidden, "multiply", 3),
        *(linear(f"{time}.{name}", "attention", hidden, width) for name in ("key", "value", "receptance")),
        elementwise(f"{time}.sigmoid", "attention", width, "sigmoid"),
        # equation 16 and its state: two maxima, four exponentials of differences, six products, four sums, one division, for each channel
        Scan(name=f"{time}.scan", component="attention", flops_per_row=21 * width, state_elements=2 * hidden + 3 * width),
        elementwise(f"{time}.multiply", "attention", width, "multiply"),
        linear(f"{time}.output", "attention", width, hidden),
        elementwise(f"{time}.add", "attention", hidden, "add"),
        norm(f"{at}.ln2", hidden, "layernorm"),
        Table(
            name=channel, component="mlp", shapes={f"{channel}.time_mix_{name}": (1, 1, hidden) for name in ("key", "receptance")}
        ),
        elementwise(f"{channel}.time_mix", "mlp", 2 * hidden, "multiply", 3),
        linear(f"{channel}.key", "mlp", hidden, ffn),
        elementwise(f"{channel}.relu2", "mlp", ffn, "relu2", 2),
        linear(f"{channel}.value", "mlp", ffn, hidden),
        linear(f"{channel}.receptance", "mlp", hidden, hidden),
        elementwise(f"{channel}.sigmoid", "mlp", hidden, "sigmoid"),
        elementwise(f"{channel}.multiply", "mlp", hidden, "multiply"),
        elementwise(f"{channel}.add", "mlp", hidden, "add"),
    ]  # fmt: skip


def _jamba_kind(config: Config, layer: int) -> str:
    attends = layer % size(config, "attn_layer_period") == count(config, "attn_layer_offset")
    return "full_attention" if attends else "linear_attention"


def _jamba_dense(config: Config, layer: int) -> bool:
    mixes = layer % size(config, "expert_layer_period") == count(config, "expert_layer_offset")
    return not mixes or size(config, "num_experts") == 1


def _lfm2_kind(config: Config, layer: int) -> str:
    listed = config.get("full_attn_idxs")
    return "full_attention" if listed is None or layer in numbers(config, "full_attn_idxs") else "conv"


def _lfm2_width(config: Config) -> int:
    width = size(config, "intermediate_size")
    if not flag(config, "block_auto_adjust_ff_dim"):
        return width
    width = 2 * width // 3
    if config.get("block_ffn_dim_multiplier") is None:
        return width
    multiple = size(config, "block_multiple_of")
    return multiple * math.ceil(int(factor(config, "block_ffn_dim_multiplier") * width) / multiple)


def _griffin_kind(config: Config, layer: int) -> str:
    kinds = config.get("block_types")
    if not isinstance(kinds, list | tuple) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise ModelError(f"config.json: block_types={kinds!r} is not a list of names.")
    return str(kinds[layer % len(kinds)])


def _scaled(prefix: str, config: Config) -> list[Part]:
    return [elementwise(f"{prefix}embed_tokens.scale", "embedding", size(config, "hidden_size"), "multiply")]


MAMBA_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers")
LFM2 = ByKind(
    mixers={
        "conv": ShortConvolution(),
        "full_attention": GroupedQuery(
            bias=False, out_bias=False, head_norm="head", names=("q_proj", "k_proj", "v_proj", "out_proj"),
            norm_names=("q_layernorm", "k_layernorm"), windowed=False,
        ),
    },
    rule=_lfm2_kind,
)  # fmt: skip
LOCAL = GroupedQuery(at="temporal_block", out_bias=True, kinds=always("sliding_attention"))
LFM2_NORMS = Norms(before_attention="operator_norm", before_mlp="ffn_norm")

DECODERS: dict[str, Decoder] = {
    "mamba": Decoder(
        stem="Mamba", fields=MAMBA_FIELDS, trunk="backbone", table="embeddings", norm="norm_f",
        block=mamba_block(SelectiveScan(width=expanded("expand"))),
    ),
    "falcon_mamba": Decoder(
        stem="FalconMamba", fields=MAMBA_FIELDS, trunk="backbone", table="embeddings", norm="norm_f",
        block=mamba_block(SelectiveScan(width=expanded("expand"), normed="plain")),
    ),
    "jamba": Decoder(
        stem="Jamba",
        heads=(LM, CLASSES),
        norm="final_layernorm",
        block=Blocks(
            attention=ByKind(
                mixers={
                    "linear_attention": SelectiveScan(
                        at="mamba", width=expanded("mamba_expand"), state="mamba_d_state", kernel="mamba_d_conv", rank="mamba_dt_rank",
                        bias="mamba_proj_bias", conv_bias="mamba_conv_bias", normed="weighted",
                    ),
                    "full_attention": GroupedQuery(bias=False, out_bias=False, rotates=no, windowed=False),
                },
                rule=_jamba_kind,
                field="layers_block_type",
            ),
            mixture=Mixture(at="feed_forward", router="router", width="intermediate_size"),
            norms=Norms(before_mlp="pre_ff_layernorm"),
            dense=_jamba_dense,
        ),
    ),
    "lfm2": Decoder(
        stem="Lfm2",
        norm="embedding_norm",
        block=Blocks(
            attention=LFM2, mixture=Mixture(at="feed_forward"), norms=LFM2_NORMS, dense=yes, dense_width=_lfm2_width,
            mlp=Gated(names=("w1", "w3", "w2")),
        ),
    ),
    "lfm2_moe": Decoder(
        stem="Lfm2Moe",
        norm="embedding_norm",
        block=Blocks(
            attention=LFM2,
            mixture=Mixture(
                at="feed_forward", scores="sigmoid", experts=("experts.*.w1", "experts.*.w3", "experts.*.w2"),
                balance=Balance(name="expert_bias", present=lambda config: flag(config, "use_expert_bias")),
            ),
            norms=LFM2_NORMS,
            dense=lambda config, layer: layer < count(config, "num_dense_layers"),
            mlp=Gated(names=("w1", "w3", "w2")),
        ),
    ),
    "recurrent_gemma": Decoder(
        stem="RecurrentGemma",
        norm="final_norm",
        before=_scaled,
        block=Blocks(
            attention=ByKind(
                mixers={"recurrent": GatedRecurrence(), "attention": LOCAL}, rule=_griffin_kind, field="layers_block_type"
            ),
            mixture=Mixture(at="mlp_block"),
            norms=Norms(before_attention="temporal_pre_norm", before_mlp="channel_pre_norm"),
            dense=yes,
            dense_width=lambda config: size(config, "intermediate_size") // 2,
            mlp=Gated(bias=True, act="hidden_activation"),
        ),
    ),
    "rwkv": Decoder(
        stem="Rwkv", fields=MAMBA_FIELDS, trunk="rwkv", table="embeddings", layers="blocks", norm="ln_out", norm_kind="layernorm",
        head_name="head", block=rwkv_block,
    ),
}  # fmt: skip

FAMILIES: dict[str, Family] = {name: decoder.family() for name, decoder in DECODERS.items()}
