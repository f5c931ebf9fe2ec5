"""Speech transformers: convolutions over the frames of an audio of one length, a tower over what they leave, and a decoder that reads it.

An audio is as long as the config lets it be: Whisper's is always 30 s (Radford et al. 2022, arXiv:2212.04356), the others' the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities, optional
from lighten.model.families._tower import (
    BART_NAMES,
    Block,
    act_fn,
    blocks,
    check_layers,
    decoder_block,
    divided,
    elementwise,
    embedding,
    labels_of,
    layernorm,
    linear,
    positive,
    table,
)
from lighten.model.families.vision import Grid, Vit, describe_vit
from lighten.model.spec import Attention, Conv, Linear, Norm, Part

Config = Mapping[str, Any]
CROSS_NAMES = replace(
    BART_NAMES, attention="encoder_attn", q="encoder_attn.q_proj", k="encoder_attn.k_proj", v="encoder_attn.v_proj", out="encoder_attn.out_proj",
    attention_norm="encoder_attn_layer_norm",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Blocks of encoder and decoder, how many there are, and the rows of the encoder."""

    encoder: Block
    decoder: Block
    cross: Block
    encoder_layers: int
    decoder_layers: int
    frames: int
    vocab: int

    @property
    def hidden(self) -> int:
        return self.encoder.hidden


def _conv(name: str, rows: int, columns: int, outputs: int, kernel: int, *, bias: bool = True) -> Conv:
    return Conv(name=name, component="embedding", rows=rows, in_channels=columns, out_channels=outputs, kernel=(kernel,), bias=bias)


def _bart_sides(config: Config, family: str, frames: int, *, k_bias: bool) -> Sides:
    """Encoder and decoder of a config that names its sizes as BART does."""
    c = positive(config, (
        "d_model", "vocab_size", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim",
        "decoder_ffn_dim",
    ), family)  # fmt: skip
    check_probabilities(config, ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"))
    check_layers(max(c["encoder_layers"], c["decoder_layers"]))
    act = str(config.get("activation_function", "gelu"))

    def side(name: str, **more: Any) -> Block:
        heads = c[f"{name}_attention_heads"]
        return Block(
            hidden=c["d_model"], ffn=c[f"{name}_ffn_dim"], heads=heads, kv_heads=heads, head_dim=divided(c["d_model"], heads), act=act,
            k_bias=k_bias, names=BART_NAMES, **more,
        )  # fmt: skip

    decoder = side("decoder", causal=True)
    return Sides(
        encoder=side("encoder"), decoder=decoder, cross=replace(decoder, names=CROSS_NAMES), encoder_layers=c["encoder_layers"],
        decoder_layers=c["decoder_layers"], frames=frames, vocab=c["vocab_size"],
    )  # fmt: skip


def _decoder(at: str, sides: Sides) -> list[Part]:
    found: list[Part] = []
    for layer in range(sides.decoder_layers):
        found += decoder_block(f"{at}decoder.layers.{layer}", sides.decoder, sides.cross, keys=sides.frames, key_rows=sides.frames)
    return found


def _output(name: str, sides: Sides, config: Config, table_name: str) -> Linear:
    tied = table_name if config.get("tie_word_embeddings", True) else None
    return Linear(name=name, component="head", in_features=sides.hidden, out_features=sides.vocab, tied_to=tied, rows="logits")


# --- Whisper


def describe_whisper(config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of Whisper: its encoder over 30 s of audio, its decoder, or both."""
    c = positive(config, ("max_source_positions", "max_target_positions", "num_mel_bins"), "whisper")
    sides = _bart_sides(config, "whisper", c["max_source_positions"], k_bias=False)
    if architecture == "WhisperForAudioClassification":
        return (*_whisper_encoder("", sides, c["num_mel_bins"]), *_audio_classifier(sides, config))
    at = "" if architecture == "WhisperModel" else "model."
    encoder = [] if architecture == "WhisperForCausalLM" else _whisper_encoder(at, sides, c["num_mel_bins"])
    decoder: list[Part] = [
        embedding(f"{at}decoder.embed_tokens", sides.vocab, sides.hidden, "token"),
        embedding(f"{at}decoder.embed_positions", c["max_target_positions"], sides.hidden, "position"),
        elementwise(f"{at}decoder.add", sides.hidden, "add", "embedding", "token"),
        *_decoder(at, sides),
        layernorm(f"{at}decoder.layer_norm", sides.hidden, "token"),
    ]
    if architecture == "WhisperForCausalLM":
        decoder = [part for each in decoder if (part := _without_source(each)) is not None]
    head = [] if architecture == "WhisperModel" else [_output("proj_out", sides, config, f"{at}decoder.embed_tokens")]
    return (*encoder, *decoder, *head)


def _whisper_encoder(at: str, sides: Sides, mel_bins: int) -> list[Part]:
    hidden, frames = sides.hidden, sides.frames
    return [
        _conv(f"{at}encoder.conv1", 2 * frames, mel_bins, hidden, 3),
        act_fn(f"{at}encoder.conv1.gelu", "gelu", hidden, "embedding", 2 * frames),
        _conv(f"{at}encoder.conv2", frames, hidden, hidden, 3),
        act_fn(f"{at}encoder.conv2.gelu", "gelu", hidden, "embedding", frames),
        table(f"{at}encoder.embed_positions", {"weight": (frames, hidden)}),
        elementwise(f"{at}encoder.add", hidden, "add", "embedding", frames),
        *blocks(f"{at}encoder.layers.{{}}", sides.encoder_layers, sides.encoder, frames),
        layernorm(f"{at}encoder.layer_norm", hidden, frames),
    ]


def _without_source(part: Part) -> Part | None:
    """A decoder alone keeps the weights of its cross attention and does not compute it."""
    if ".encoder_attn" not in part.name:
        return part
    return replace(part, rows=0) if part.parameters else None


def _audio_classifier(sides: Sides, config: Config) -> list[Part]:
    size, labels = positive(config, ("classifier_proj_size",), "whisper")["classifier_proj_size"], labels_of(config)
    weights = [table("", {"layer_weights": (sides.encoder_layers + 1,)}, "head")] if config.get("use_weighted_layer_sum") else []
    return [
        *weights,
        linear("projector", sides.hidden, size, True, "head", sides.frames),
        linear("classifier", size, labels, True, "head", "sequence"),
    ]


# --- Speech2Text


def describe_speech_to_text(config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of Speech2Text (Wang et al. 2020, arXiv:2010.05171): gated convolutions of stride 2, encoder, decoder; positions without weights."""
    c = positive(config, ("max_source_positions", "input_feat_per_channel", "input_channels", "conv_channels", "d_model"), "speech_to_text")
    kernels = config.get("conv_kernel_sizes")
    if not isinstance(kernels, list | tuple) or not kernels or not all(isinstance(k, int) and k > 0 for k in kernels):
        raise ModelError(f"config.json of a speech_to_text model: conv_kernel_sizes={kernels!r} is not a list of positive whole numbers.")
    at = "" if architecture == "Speech2TextModel" else "model."
    rows, columns = c["max_source_positions"], c["input_feat_per_channel"] * c["input_channels"]
    convs: list[Part] = []
    for layer, kernel in enumerate(kernels):
        rows = (rows + 2 * (kernel // 2) - kernel) // 2 + 1
        outputs = c["conv_channels"] if layer < len(kernels) - 1 else 2 * c["d_model"]
        name = f"{at}encoder.conv.conv_layers.{layer}"
        convs.append(_conv(name, rows, columns, outputs, kernel))
        convs.append(elementwise(f"{name}.glu", outputs // 2, "sigmoid", "embedding", rows, flops=2))
        columns = outputs // 2
    sides = _bart_sides(config, "speech_to_text", rows, k_bias=True)
    parts: list[Part] = [
        *convs,
        elementwise(f"{at}encoder.add", sides.hidden, "add", "embedding", rows),
        *blocks(f"{at}encoder.layers.{{}}", sides.encoder_layers, sides.encoder, rows),
        layernorm(f"{at}encoder.layer_norm", sides.hidden, rows),
        embedding(f"{at}decoder.embed_tokens", sides.vocab, sides.hidden, "token"),
        elementwise(f"{at}decoder.add", sides.hidden, "add", "embedding", "token"),
        *_decoder(at, sides),
        layernorm(f"{at}decoder.layer_norm", sides.hidden, "token"),
    ]
    head = [] if architecture == "Speech2TextModel" else [_output("lm_head", sides, config, f"{at}decoder.embed_tokens")]
    return (*parts, *head)


# --- Moonshine

MOONSHINE_CONVS = ((127, 64), (7, 3), (3, 2))
"""Kernel and stride of its convolutions over samples (Jeffries et al. 2024, arXiv:2410.15608, section 3.1)."""
MOONSHINE_NAMES = replace(
    BART_NAMES, out="self_attn.o_proj", attention_norm="input_layernorm", up="mlp.fc1", down="mlp.fc2", mlp_norm="post_attention_layernorm"
)


def describe_moonshine(config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of Moonshine over an audio of `max_position_embeddings` frames: convolutions over samples, rotary encoder and decoder."""
    sides = _moonshine_sides(config)
    at, hidden, rows = "" if architecture == "MoonshineModel" else "model.", sides.hidden, [sides.frames]
    for kernel, stride in reversed(MOONSHINE_CONVS[1:]):
        rows.insert(0, (rows[0] - 1) * stride + kernel)
    widths = (1, hidden, 2 * hidden, hidden)
    convs: list[Part] = []
    for layer, (kernel, _) in enumerate(MOONSHINE_CONVS):
        name = f"{at}encoder.conv{layer + 1}"
        convs.append(_conv(name, rows[layer], widths[layer], widths[layer + 1], kernel, bias=layer > 0))
        convs.append(act_fn(f"{name}.act_fn", "gelu" if layer else "tanh", widths[layer + 1], "embedding", rows[layer]))
        if layer == 0:
            convs.append(Norm(name=f"{at}encoder.groupnorm", component="norm", rows=rows[0], size=hidden, kind="groupnorm"))
    parts: list[Part] = [
        *convs,
        *blocks(f"{at}encoder.layers.{{}}", sides.encoder_layers, sides.encoder, sides.frames),
        layernorm(f"{at}encoder.layer_norm", hidden, sides.frames, bias=False),
        embedding(f"{at}decoder.embed_tokens", sides.vocab, hidden, "token"),
        *_decoder(at, sides),
        layernorm(f"{at}decoder.norm", hidden, "token", bias=False),
    ]
    head = [] if architecture == "MoonshineModel" else [_output("proj_out", sides, config, f"{at}decoder.embed_tokens")]
    return tuple(_padded(part, optional(config, "pad_head_dim_to_multiple_of")) for part in (*parts, *head))


def _moonshine_sides(config: Config) -> Sides:
    c = positive(config, (
        "hidden_size", "vocab_size", "intermediate_size", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "encoder_num_attention_heads",
        "decoder_num_attention_heads", "max_position_embeddings",
    ), "moonshine")  # fmt: skip
    check_probabilities(config, ("attention_dropout",))
    check_layers(max(c["encoder_num_hidden_layers"], c["decoder_num_hidden_layers"]))
    bias = bool(config.get("attention_bias"))
    head_dim = optional(config, "head_dim") or divided(c["hidden_size"], c["decoder_num_attention_heads"])

    def side(name: str, act: str, **more: Any) -> Block:
        heads = c[f"{name}_num_attention_heads"]
        return Block(
            hidden=c["hidden_size"], ffn=c["intermediate_size"], heads=heads, head_dim=head_dim, act=str(config.get(f"{name}_hidden_act", act)),
            kv_heads=optional(config, f"{name}_num_key_value_heads") or heads, q_bias=bias, k_bias=bias, v_bias=bias, out_bias=False,
            norm_bias=False, rotary=True, **more,
        )  # fmt: skip

    decoder = side("decoder", "silu", names=replace(MOONSHINE_NAMES, mlp_norm="final_layernorm"), packed=True, causal=True)
    cross = replace(decoder, rotary=False, names=replace(CROSS_NAMES, out="encoder_attn.o_proj", attention_norm="post_attention_layernorm"))
    return Sides(
        encoder=side("encoder", "gelu", names=MOONSHINE_NAMES), decoder=decoder, cross=cross, encoder_layers=c["encoder_num_hidden_layers"],
        decoder_layers=c["decoder_num_hidden_layers"], frames=c["max_position_embeddings"], vocab=c["vocab_size"],
    )  # fmt: skip


def _padded(part: Part, multiple: int | None) -> Part:
    """Attention computes heads that zeros pad to a multiple; its cache holds them as they were."""
    if multiple is None or not isinstance(part, Attention):
        return part
    return replace(part, head_dim=-(-part.head_dim // multiple) * multiple)


# --- Audio Spectrogram Transformer


def describe_spectrogram(config: Config, architecture: str) -> tuple[Part, ...]:
    """Parts of AST (Gong et al. 2021, arXiv:2104.01778): a ViT over overlapping patches of a spectrogram."""
    family = "audio-spectrogram-transformer"
    c = positive(config, ("num_mel_bins", "max_length", "patch_size", "frequency_stride", "time_stride"), family)
    if min(c["num_mel_bins"], c["max_length"]) < c["patch_size"]:
        raise ModelError(f"config.json of a {family} model: a spectrogram of {c['num_mel_bins']} × {c['max_length']} is smaller than patch_size.")
    down, across = (
        (c[size] - c["patch_size"]) // c[stride] + 1 for size, stride in (("num_mel_bins", "frequency_stride"), ("max_length", "time_stride"))
    )
    patch = c["patch_size"]
    as_image = {**config, "image_size": (down * patch, across * patch), "num_channels": 1}
    return describe_vit(AST, family, as_image, architecture)


def _ast_classifier(vit: Vit, config: Config, grid: Grid) -> list[Part]:
    return [
        layernorm("classifier.layernorm", grid.hidden, "sequence", "head"),
        linear("classifier.dense", grid.hidden, labels_of(config), True, "head", "sequence"),
    ]


AST = Vit(
    base="audio_spectrogram_transformer", tokens={"cls_token": 1, "distillation_token": 1},
    heads={"ASTModel": lambda vit, config, grid: [], "ASTForAudioClassification": _ast_classifier},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "whisper": Family(
        describe=describe_whisper,
        architectures=("WhisperForConditionalGeneration", "WhisperModel", "WhisperForAudioClassification", "WhisperForCausalLM"),
    ),
    "speech_to_text": Family(describe=describe_speech_to_text, architectures=("Speech2TextForConditionalGeneration", "Speech2TextModel")),
    "moonshine": Family(describe=describe_moonshine, architectures=("MoonshineForConditionalGeneration", "MoonshineModel")),
    "audio-spectrogram-transformer": Family(describe=describe_spectrogram, architectures=tuple(AST.heads)),
}
