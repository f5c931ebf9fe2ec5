"""Dense causal decoders as `transformers` computes them, one entry of data each.

Source: the modeling files of transformers 5 (`src/transformers/models/<model_type>/`); tests/test_families.py holds each against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lighten.errors import ModelError, UnsupportedFamily
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


def _modernbert(config: Config, layers: int) -> Sequence[int | None]:
    """ModernBERT's decoder has half of `local_attention`, for it looks one way alone."""
    half = {**config, "sliding_window": (optional(config, "local_attention") or 0) // 2 or None}
    return all_but_every(3, first=True, fields=("global_attn_every_n_layers",))(half, layers)


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
    "iquestcoder": LLAMA,
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


# ---- GPT and its like ----

GPT2 = Decoder(
    stem="GPT2", heads=("LMHeadModel", "Model", SEQUENCE, TOKEN, QUESTION), prefix="transformer.", embedding="wte", positions="wpe", layers="h",
    final_norm="ln_f", token_head="classifier", norm="layernorm", attention_norm="ln_1", mlp_norm="ln_2", attention="attn", fused="c_attn",
    out="c_proj", qkv_bias=True, out_bias=True, head_dim=None, key_value_heads=None, rotary=0, gate=None, up="c_fc", down="c_proj",
    mlp_bias=True, transposed=True, intermediate="n_inner", times=4, act="activation_function", unsupported=("add_cross_attention",),
)  # fmt: skip
GPTJ = Decoder(
    stem="GPTJ", heads=(*GENERATES, SEQUENCE, QUESTION), prefix="transformer.", embedding="wte", layers="h", final_norm="ln_f", head_bias=True,
    question_labels=None, norm="layernorm", attention_norm="ln_1", mlp_norm=None, parallel=True, attention="attn", out="out_proj",
    head_dim=None, key_value_heads=None, gate=None, up="fc_in", down="fc_out", mlp_bias=True, intermediate="n_inner", times=4,
    act="activation_function",
)  # fmt: skip
BLOOM = Decoder(
    stem="Bloom", heads=ANSWERS, prefix="transformer.", embedding="word_embeddings", embedding_norm="word_embeddings_layernorm", layers="h",
    final_norm="ln_f", token_head="classifier", norm="layernorm", attention="self_attention", fused="query_key_value", out="dense",
    qkv_bias=True, out_bias=True, head_dim=None, key_value_heads=None, rotary=0, gate=None, up="dense_h_to_4h", down="dense_4h_to_h",
    mlp_bias=True, intermediate=None, times=4, fixed_act="gelu", hidden="n_embed",
)  # fmt: skip
FALCON = other(
    BLOOM, stem="Falcon", embedding_norm=None, qkv_bias="bias", out_bias="bias", mlp_bias="bias", intermediate="ffn_hidden_size",
    act="activation", fixed_act=None, key_value_heads="num_kv_heads", parallel="parallel_attn",
)  # fmt: skip
NEOX = Decoder(
    stem="GPTNeoX", heads=ANSWERS, prefix="gpt_neox.", embedding="embed_in", final_norm="final_layer_norm", head="embed_out", token_head="classifier",
    norm="layernorm", parallel="use_parallel_residual", attention="attention", fused="query_key_value", out="dense",
    qkv_bias="attention_bias", out_bias="attention_bias", head_dim=None, key_value_heads=None, rotary=0.25, gate=None, up="dense_h_to_4h",
    down="dense_4h_to_h", mlp_bias=True,
)  # fmt: skip
NEOX_JAPANESE = other(
    NEOX, stem="GPTNeoXJapanese", heads=GENERATES, prefix="gpt_neox_japanese.", parallel=False, qkv_bias=False, out_bias=False, mlp_bias=False,
    intermediate=None, rotary=1, last_bias="dense_bias",
)  # fmt: skip
OPT = Decoder(
    stem="OPT", heads=(*GENERATES, SEQUENCE, QUESTION), inner="decoder.", positions="embed_positions", position_offset=2,
    final_norm="final_layer_norm", norm="layernorm", norm_affine="layer_norm_elementwise_affine", attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm", out="out_proj", qkv_bias="enable_bias", out_bias="enable_bias", head_dim=None, key_value_heads=None, rotary=0,
    mlp="", gate=None, up="fc1", down="fc2", mlp_bias="enable_bias", intermediate="ffn_dim", act="activation_function",
    word_width="word_embed_proj_dim",
)  # fmt: skip
XGLM = other(
    OPT, stem="XGLM", heads=GENERATES, inner="", positions=None, adds_positions=True, final_norm="layer_norm", norm_affine=True, qkv_bias=True,
    out_bias=True, mlp_bias=True, word_width=None, unsupported=("add_cross_attention",),
)  # fmt: skip
STABLELM = Decoder(
    stem="StableLm", heads=CLASSIFIES, norm="layernorm", qkv_bias="use_qkv_bias", head_dim=None, rotary=0.25,
    query_norm=QueryNorm(names=("q_layernorm", "k_layernorm"), span="each", present="qk_layernorm", bias=False),
)  # fmt: skip
COHERE = Decoder(
    stem="Cohere", heads=GENERATES, norm="layernorm", norm_bias=False, mlp_norm=None, parallel=True, qkv_bias="attention_bias",
    out_bias="attention_bias", query_norm=QueryNorm(span="heads", present="use_qk_norm"),
)  # fmt: skip
MPT = other(
    BLOOM, stem="Mpt", elsewhere=("MPTForCausalLM",), embedding="wte", embedding_norm=None, layers="blocks", final_norm="norm_f",
    norm_bias=False, attention_norm="norm_1", mlp_norm="norm_2", attention="attn", fused="Wqkv", out="out_proj", qkv_bias=False,
    out_bias=False, mlp="ffn.", up="up_proj", down="down_proj", mlp_bias=False, hidden=None,
)  # fmt: skip
HYPERCLOVAX = other(LLAMA, stem="HyperCLOVAX", heads=GENERATES)


def _falcon(config: Config, architecture: str) -> Decoder:
    """Falcon's three blocks: 180B and 40B (grouped heads, two norms), 7B (one key head, one norm), RW (bias, no parallel branches)."""
    new, parallel = bool(config.get("new_decoder_architecture")), bool(config.get("parallel_attn"))
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if (new and not parallel) or (norms == 2 and not new):
        raise ModelError(
            f"config.json: a falcon with new_decoder_architecture={new}, parallel_attn={parallel}, num_ln_in_parallel_attn={norms} does not run in "
            "transformers; new_decoder_architecture needs parallel_attn, and two norms need new_decoder_architecture."
        )
    two = new and norms == 2
    return other(
        FALCON,
        attention_norm="ln_attn" if two else "input_layernorm",
        mlp_norm="ln_mlp" if two else None if parallel else "post_attention_layernorm",
        one_key_value_head=not new and bool(config.get("multi_query")),
        rotary=0 if config.get("alibi") else 1,
        key_value_heads="num_kv_heads" if new else None,
    )


def _neox_japanese(config: Config, architecture: str) -> Decoder:
    return other(NEOX_JAPANESE, times=optional(config, "intermediate_multiple_size") or 4)


def _opt(config: Config, architecture: str) -> Decoder:
    """OPT-350m has its norms after the residual additions and none at the end; the others before."""
    before = bool(config.get("do_layer_norm_before"))
    return other(
        OPT,
        norm_after_add=not before,
        final_norm="final_layer_norm" if before and not config.get("_remove_final_layer_norm") else None,
    )


def _mpt(config: Config, architecture: str) -> Decoder:
    """MPT: transformers has it with ALiBi and no biases alone; llm-foundry, whose class is MPTForCausalLM, with learned positions and biases too.

    Source: llm-foundry, llmfoundry/models/mpt/modeling_mpt.py; its counts in scripts/train/benchmarking/README.md are in tests/test_decoders.py.
    """
    if architecture not in MPT.elsewhere:
        return MPT
    attention = config.get("attn_config")
    attention = attention if isinstance(attention, Mapping) else {}
    if (kind := attention.get("attn_type", "multihead_attention")) != "multihead_attention" or attention.get("qk_ln"):
        raise UnsupportedFamily(
            f"an MPT with attn_type={kind!r}, qk_ln={attention.get('qk_ln')!r} has no formula; multihead_attention without qk_ln has."
        )
    biased = not config.get("no_bias")
    learned = bool(config.get("learned_pos_emb")) and not attention.get("alibi") and not attention.get("rope")
    return other(
        MPT, norm_bias=biased, qkv_bias=biased, out_bias=biased, mlp_bias=biased, positions="wpe" if learned else None,
        position_count="max_seq_len", times=optional(config, "expansion_ratio") or 4,
    )  # fmt: skip


def _stablelm(config: Config, architecture: str) -> Decoder:
    return other(STABLELM, parallel=True, mlp_norm=None) if config.get("use_parallel_residual") else STABLELM


def _hyperclovax(config: Config, architecture: str) -> Decoder:
    if not config.get("use_post_norm"):
        return HYPERCLOVAX
    return other(HYPERCLOVAX, attention_out_norm="post_norm1", mlp_out_norm="post_norm2")


GPT_LIKE: dict[str, Decoder] = {
    "gpt2": GPT2,
    "gpt_bigcode": other(
        GPT2, stem="GPTBigCode", heads=CLASSIFIES, transposed=False, one_key_value_head="multi_query",
    ),
    "gpt_neo": other(
        GPT2, stem="GPTNeo", heads=ANSWERS, attention="attn.attention", fused=None, out="out_proj", qkv_bias=False, transposed=False,
        intermediate="intermediate_size", windows=_gpt_neo, windowed_cache=False, unsupported=(),
    ),
    "openai-gpt": other(
        GPT2, stem="OpenAIGPT", heads=("LMHeadModel", "Model", SEQUENCE), embedding="tokens_embed", positions="positions_embed",
        final_norm=None, norm_after_add=True, intermediate=None, act="afn", unsupported=(),
    ),
    "gptj": GPTJ,
    "codegen": other(GPTJ, stem="CodeGen", heads=GENERATES, fused="qkv_proj"),
    "gpt_neox": NEOX,
    "bloom": BLOOM,
    "xglm": XGLM,
    "biogpt": other(
        XGLM, stem="BioGpt", heads=CLASSIFIES, prefix="biogpt.", positions="embed_positions", adds_positions=False, head="output_projection",
        token_head="classifier", intermediate="intermediate_size", act="hidden_act",
    ),
    "ctrl": Decoder(
        stem="CTRL", heads=("LMHeadModel", "Model", SEQUENCE), prefix="transformer.", embedding="w", adds_positions=True, layers="h",
        final_norm="layernorm", head_bias=True, sequence_head="classifier", norm="layernorm", attention_norm="layernorm1",
        mlp_norm="layernorm2", attention="multi_head_attention", query="Wq", key="Wk", value="Wv", out="dense", qkv_bias=True, out_bias=True,
        head_dim=None, key_value_heads=None, rotary=0, mlp="ffn.", gate=None, up="0", down="2", mlp_bias=True, intermediate="dff",
        fixed_act="relu",
    ),
    "phi": Decoder(
        stem="Phi", heads=CLASSIFIES, final_norm="final_layernorm", head_bias=True, norm="layernorm", mlp_norm=None, parallel=True, out="dense",
        qkv_bias=True, out_bias=True, rotary=0.5, gate=None, up="fc1", down="fc2", mlp_bias=True,
        query_norm=QueryNorm(names=("q_layernorm", "k_layernorm"), present="qk_layernorm"),
    ),
    "persimmon": Decoder(
        stem="Persimmon", heads=CLASSIFIES, final_norm="final_layernorm", norm="layernorm", fused="query_key_value", out="dense", qkv_bias=True,
        out_bias=True, head_dim=None, key_value_heads=None, rotary=0.5, gate=None, up="dense_h_to_4h", down="dense_4h_to_h", mlp_bias=True,
        query_norm=QueryNorm(names=("q_layernorm", "k_layernorm"), present="qk_layernorm"),
    ),
    "starcoder2": Decoder(
        stem="Starcoder2", heads=CLASSIFIES, norm="layernorm", qkv_bias="use_bias", out_bias="use_bias", gate=None, up="c_fc", down="c_proj",
        mlp_bias="use_bias", windows=everywhere,
    ),
    "cohere": COHERE,
    "cohere2": other(
        COHERE, stem="Cohere2", head_dim=None, query_norm=None, windows=all_but_every(4, fields=("sliding_window_pattern",)),
        rotary_layers=_in_windows,
    ),
    "nemotron": other(LLAMA, stem="Nemotron", norm="layernorm", gate=None, rotary=0.5),
    "jais2": other(LLAMA, stem="Jais2", heads=GENERATES, norm="layernorm", gate=None),
    "nanochat": Decoder(
        stem="NanoChat", heads=GENERATES, embedding_norm="norm", norm_affine=False, qkv_bias="attention_bias", out_bias="attention_bias",
        gate=None, up="fc1", down="fc2", query_norm=QueryNorm(affine=False, after_rotary=True),
    ),
    "gemma3_text": other(
        GEMMA2, stem="Gemma3", heads=(LM, "TextModel", "TextForSequenceClassification"), query_norm=QueryNorm(), windows=_gemma3,
    ),
    "qwen": Decoder(  # the first, which is not of transformers (Bai et al. 2023, arXiv:2309.16609)
        stem="QWen", heads=("LMHeadModel",), prefix="transformer.", embedding="wte", layers="h", final_norm="ln_f", attention_norm="ln_1",
        mlp_norm="ln_2", attention="attn", fused="c_attn", out="c_proj", qkv_bias=True, head_dim="kv_channels", key_value_heads=None,
        gate="w2", up="w1", down="c_proj", halved=True, fixed_act="silu",
    ),
    "modernbert-decoder": Decoder(
        stem="ModernBertDecoder", heads=(*GENERATES, SEQUENCE), embedding="embeddings.tok_embeddings", embedding_norm="embeddings.norm",
        final_norm="final_norm", head="decoder", head_bias="decoder_bias", sequence_head="classifier", sequence_bias="classifier_bias",
        norm="layernorm", norm_bias="norm_bias", attention_norm="attn_norm", mlp_norm="mlp_norm", first_norm=False, attention="attn", out="Wo",
        qkv_bias="attention_bias", out_bias="attention_bias", head_dim=None, key_value_heads=None, gate_up="Wi", down="Wo", mlp_bias="mlp_bias",
        act="hidden_activation", windows=_modernbert, transform=("lm_head", "head"),
    ),
    "granite_swa": other(LLAMA, stem="GraniteSWA", heads=GENERATES, windows=all_but_every(4, first=True), sinks="sinks"),
}  # fmt: skip

FAMILIES = {name: family(traits) for name, traits in (LLAMA_LIKE | GPT_LIKE).items()} | {
    "falcon": family(_falcon, of=FALCON),
    "mpt": family(_mpt, of=MPT),
    "gpt_neox_japanese": family(_neox_japanese, of=NEOX_JAPANESE),
    "opt": family(_opt, of=OPT),
    "stablelm": family(_stablelm, of=STABLELM),
    "hyperclovax": family(_hyperclovax, of=HYPERCLOVAX),
}
"""`model_type` → its classes and their formula."""
