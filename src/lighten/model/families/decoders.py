"""Dense causal decoders as `transformers` computes them, one entry of data each.

Source: the modeling files of transformers 5 (`src/transformers/models/<model_type>/`); tests/test_families.py holds each against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from lighten.errors import ModelError
from lighten.model.families._causal import Config, Decoder, QueryNorm, Windows, family, other
from lighten.model.families._fields import optional

LM, SEQUENCE, TOKEN, QUESTION = "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
GENERATES = (LM, "Model")
CLASSIFIES = (*GENERATES, SEQUENCE, TOKEN)
ANSWERS = (*CLASSIFIES, QUESTION)


# ---- windows ----


def everywhere(config: Config, layers: int) -> Sequence[int | None]:
    """`sliding_window` in every layer."""
    return [optional(config, "sliding_window")] * layers


def by_layer_types(otherwise: Windows) -> Windows:
    """`sliding_window` in the layers that `layer_types` names so; where it is not there, as the class would fill it in."""

    def windows(config: Config, layers: int) -> Sequence[int | None]:
        types = config.get("layer_types")
        if types is None:
            return otherwise(config, layers)
        if not isinstance(types, Sequence) or isinstance(types, str) or len(types) != layers:
            found = len(types) if isinstance(types, Sequence) else repr(types)
            raise ModelError(f"config.json: layer_types needs one entry for each of {layers} layers; found: {found}.")
        if unknown := {str(kind) for kind in types} - {"sliding_attention", "full_attention"}:
            raise ModelError(f"config.json: layer_types has {', '.join(sorted(unknown))}; known: sliding_attention, full_attention.")
        window = optional(config, "sliding_window")
        return [window if kind == "sliding_attention" else None for kind in types]

    return windows


def all_but_every(period: int, *, first: bool = False, fields: tuple[str, ...] = ()) -> Windows:
    """A window in all layers but the last of each `period` (with `first`: the first of each), which a field may set."""

    def windows(config: Config, layers: int) -> Sequence[int | None]:
        every = next((value for name in fields if (value := optional(config, name))), period)
        window = optional(config, "sliding_window")
        return [None if (layer + (0 if first else 1)) % every == 0 else window for layer in range(layers)]

    return by_layer_types(windows)


def _upper_layers(config: Config, layers: int) -> Sequence[int | None]:
    """Qwen's: none but where `use_sliding_window` says so, then from `max_window_layers` on."""
    if not config.get("use_sliding_window"):
        return [None] * layers
    window, first = optional(config, "sliding_window"), config.get("max_window_layers", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ModelError(f"config.json: max_window_layers={first!r} is not a whole number from 0.")
    return [window if layer >= first else None for layer in range(layers)]


def _qwen(config: Config, layers: int) -> Sequence[int | None]:
    if not config.get("use_sliding_window"):
        return [None] * layers
    return by_layer_types(_upper_layers)(config, layers)


def _smollm3(config: Config, layers: int) -> Sequence[int | None]:
    if not config.get("use_sliding_window"):
        return [None] * layers
    window = optional(config, "sliding_window")
    return by_layer_types(lambda c, n: [None if _has_rotary(c, layer, None) else window for layer in range(n)])(config, layers)


def _gpt_neo(config: Config, layers: int) -> Sequence[int | None]:
    """`attention_types`, [[["global", "local"], 12]]: a pattern and how often it comes."""
    types = config.get("attention_types") or [[["global", "local"], 12]]
    try:
        kinds = [kind for pattern, times in types for _ in range(min(times, layers)) for kind in pattern]
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json: attention_types={types!r} is not a list of patterns with how often each comes.") from error
    if len(kinds) < layers or set(kinds) - {"global", "local"}:
        raise ModelError(
            f"config.json: attention_types gives {len(kinds)} layers of {', '.join(sorted(set(kinds)))}; {layers} of global or local are needed."
        )
    return [optional(config, "window_size") if kind == "local" else None for kind in kinds[:layers]]


def _gemma3(config: Config, layers: int) -> Sequence[int | None]:
    """Of a model that looks both ways, the window reaches half as far to each side."""
    found = all_but_every(6, fields=("sliding_window_pattern", "_sliding_window_pattern"))(config, layers)
    if not config.get("use_bidirectional_attention"):
        return found
    return [None if window is None else 2 * (window // 2) + 1 for window in found]


# ---- rotary positions in some layers ----


def _has_rotary(config: Config, layer: int, window: int | None) -> bool:
    """SmolLM3's: `no_rope_layers` has 1 where a layer has rotary positions; else all but each fourth."""
    marks = config.get("no_rope_layers")
    if marks is None:
        return (layer + 1) % (optional(config, "no_rope_layer_interval") or 4) != 0
    if not isinstance(marks, Sequence) or layer >= len(marks):
        raise ModelError(f"config.json: no_rope_layers has no entry for layer {layer}.")
    return bool(marks[layer])


def _in_windows(config: Config, layer: int, window: int | None) -> bool:
    return window is not None


def _in_windows_if_any(config: Config, layer: int, window: int | None) -> bool:
    return window is not None or config.get("sliding_window") is None


# ---- Llama and its like ----

LLAMA = Decoder(
    stem="Llama", heads=ANSWERS, question_prefix="transformer.",
    qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias",
)  # fmt: skip
MISTRAL = Decoder(stem="Mistral", heads=ANSWERS, windows=everywhere)
QWEN2 = Decoder(stem="Qwen2", heads=ANSWERS, question_prefix="transformer.", qkv_bias=True, windows=_qwen)
QWEN3 = other(QWEN2, stem="Qwen3", qkv_bias="attention_bias", out_bias="attention_bias", query_norm=QueryNorm())
GEMMA = Decoder(
    stem="Gemma", heads=CLASSIFIES, qkv_bias="attention_bias", out_bias="attention_bias", bidirectional="use_bidirectional_attention",
)  # fmt: skip
GEMMA2 = other(
    GEMMA, stem="Gemma2", attention_out_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm", windows=all_but_every(2), act="hidden_activation",
)  # fmt: skip
OLMO2 = Decoder(
    stem="Olmo2", heads=(*GENERATES, SEQUENCE), qkv_bias="attention_bias", out_bias="attention_bias", attention_norm=None, mlp_norm=None,
    attention_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm", query_norm=QueryNorm(span="width"),
)  # fmt: skip
GLM = Decoder(stem="Glm", heads=CLASSIFIES, qkv_bias="attention_bias", gate_up="gate_up_proj", rotary=0.5)

LLAMA_LIKE: dict[str, Decoder] = {
    "llama": LLAMA,
    "internlm3": LLAMA,
    "mistral": MISTRAL,
    "ministral": other(MISTRAL, stem="Ministral", question_prefix="transformer.", windows=by_layer_types(everywhere)),
    "ministral3": other(MISTRAL, stem="Ministral3"),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "vaultgemma": other(GEMMA2, stem="VaultGemma", heads=GENERATES, attention_out_norm=None, mlp_out_norm=None, bidirectional=False),
    "phi3": Decoder(stem="Phi3", heads=CLASSIFIES, fused="qkv_proj", gate_up="gate_up_proj", windows=everywhere),
    "smollm3": other(LLAMA, stem="SmolLM3", windows=_smollm3, rotary_layers=_has_rotary),
    "granite": other(LLAMA, stem="Granite", heads=GENERATES),
    "cwm": Decoder(stem="Cwm", heads=GENERATES, windows=all_but_every(4, first=True)),
    "helium": Decoder(stem="Helium", heads=CLASSIFIES, qkv_bias="attention_bias", mlp_bias="mlp_bias"),
    "ernie4_5": Decoder(stem="Ernie4_5", heads=GENERATES, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias"),
    "seed_oss": other(LLAMA, stem="SeedOss", out_bias="attention_out_bias"),
    "hunyuan_v1_dense": Decoder(
        stem="HunYuanDenseV1", heads=(*GENERATES, SEQUENCE), qkv_bias="attention_bias", out_bias="attention_bias",
        query_norm=QueryNorm(names=("query_layernorm", "key_layernorm"), after_rotary=True),
    ),
    "arcee": other(LLAMA, stem="Arcee", gate=None),
    "apertus": Decoder(
        stem="Apertus", heads=(*GENERATES, TOKEN), qkv_bias="attention_bias", out_bias="attention_bias", attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm", query_norm=QueryNorm(), gate=None, act_parameters=("alpha_p", "alpha_n"), act_buffers=("beta", "eps"),
    ),
    "bitnet": Decoder(
        stem="BitNet", heads=GENERATES, qkv_bias="attention_bias", out_bias="attention_bias", inner_norms=("attn_sub_norm", "ffn_sub_norm"),
    ),
    "olmo": Decoder(
        stem="Olmo", heads=(*GENERATES, SEQUENCE), norm="layernorm", norm_affine=False, qkv_bias="attention_bias", out_bias="attention_bias",
    ),
    "olmo2": OLMO2,
    "olmo3": other(OLMO2, stem="Olmo3", windows=all_but_every(4)),
    "exaone4": other(
        OLMO2, stem="Exaone4", heads=ANSWERS, question_prefix="transformer.", qkv_bias=False, out_bias=False, query_norm=QueryNorm(),
        windows=all_but_every(4, fields=("sliding_window_pattern",)), rotary_layers=_in_windows_if_any,
    ),
    "glm": GLM,
    "glm4": other(GLM, stem="Glm4", attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm"),
}  # fmt: skip


FAMILIES = {name: family(traits) for name, traits in LLAMA_LIKE.items()}
"""`model_type` → its classes and their formula."""
