"""What a class of `transformers` does that its parts do not say: dropouts, types, scalings and copies, by its config or its `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lighten.model.families._config import complete
from lighten.model.spec import ModelSpec, Rows

HIDDEN = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "residual_dropout", "dropout_rate", "dropout")
ATTENTION = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attention_dropout_prob", "dropout_rate")
EMBEDDING = ("embd_pdrop", "embedding_dropout", "embed_dropout", *HIDDEN)
INNER = ("activation_dropout", "relu_dropout", "dropout_rate")
ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")
"""Config fields that say the same thing, the first that is there counts."""

UNDROPPED_EMBEDDING = frozenset({"opt", "clip", "clip_text_model", "clip_vision_model", "siglip"})
UNDROPPED_ATTENTION_OUTPUT = frozenset({"distilbert"})
SCALED_EMBEDDING = frozenset({
    "gemma", "gemma2", "gemma3", "gemma3_text", "bart", "mbart", "marian", "m2m_100", "blenderbot", "blenderbot-small", "pegasus", "plbart",
    "nllb-moe",
})  # fmt: skip
"""Embeddings that are multiplied by a number: GemmaTextScaledWordEmbedding, BartScaledWordEmbedding and their copies."""
SCALED_QUERIES = frozenset({"opt", "whisper", "speech_to_text"})
"""Queries are scaled by a product of their own before attention."""
CONTIGUOUS_HEADS = frozenset({"whisper"})
"""Queries, keys and values are laid out anew by head."""
BIASED_LOGITS = frozenset({"bart", "mbart", "marian", "blenderbot", "blenderbot-small", "pegasus", "plbart"})
"""A bias is added to the logits after their product (`final_logits_bias`)."""
NARROW_SOFTMAX = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "bart", "mbart", "marian", "t5", "mt5", "gpt2", "whisper"}
)
"""Softmax in the activations' type; others take it in float32."""
FLOAT32_LOGITS = frozenset({"mamba", "falcon_mamba", "mamba2"})
"""Logits are cast to float32 by the model itself."""
NARROW_LOSS = frozenset({
    "bart", "mbart", "marian", "t5", "mt5", "umt5", "longt5", "whisper", "pegasus", "blenderbot", "blenderbot-small", "m2m_100", "plbart",
    "speech_to_text",
})  # fmt: skip
"""Generating models whose cross entropy is taken in the logits' type."""
NO_SDPA = frozenset({
    "blip", "blip_vision_model", "bloom", "codegen", "convbert", "deberta", "deberta-v2", "donut-swin", "falcon_mamba", "flaubert", "gpt_neo",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "imagegpt", "mamba", "mamba2", "megatron-bert", "mimo_v2_flash",
    "mpnet", "mpt", "mvp", "nystromformer", "openai-gpt", "pvt", "pvt_v2", "rembert", "rwkv", "speech_to_text", "splinter", "squeezebert",
    "swinv2", "switch_transformers", "xglm", "xlm",
})  # fmt: skip
"""Attention that no SDPA kernel computes: eager whatever is asked for. Softcapped scores are found by the config's field.

Source: `_supports_sdpa` of the classes of transformers 5.23; held against them in tests/test_memory_families.py."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """Of one stream of a model.

    Attributes:
        embedding_dropout, hidden_dropout, attention_dropout, inner_dropout: probabilities: after the embedding, at the end of a branch, of
            attention's scores, after an MLP's activation.
        output_dropout: `hidden_dropout` holds for attention's branch too.
        last_dropout: after the last norm.
        activation: its name, which tells the variants of GELU apart.
        score_cap, logit_cap: softcapping (tanh) of scores and of logits.
        position_bias: relative positions that are added to scores, learned in each stream's first block (T5).
    """

    embedding_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    inner_dropout: float = 0.0
    output_dropout: bool = True
    last_dropout: float = 0.0
    activation: str = "gelu"
    scaled_embedding: bool = False
    scaled_queries: bool = False
    contiguous_heads: bool = False
    biased_logits: bool = False
    scaled_logits: bool = False
    wide_softmax: bool = True
    float32_logits: bool = False
    wide_loss: bool = True
    fused_attention: bool = True
    score_cap: bool = False
    logit_cap: bool = False


def habits(spec: ModelSpec, rows: Rows) -> Habits:
    """The habits of one of a model's streams; an image's and a text's configs stand in fields of their own."""
    return _habits(_Known(complete(spec.config)), spec.family, isinstance(rows, int))


class _Known:
    """A config, hashable by what it is."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._key = repr(sorted((name, repr(value)) for name, value in config.items()))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self._key == other._key


@lru_cache(maxsize=64)
def _habits(known: _Known, family: str, image: bool) -> Habits:
    config = dict(known.config)
    nested = config.get("vision_config" if image else "text_config")
    if isinstance(nested, Mapping):
        config |= nested
    t5 = "dropout_rate" in config
    found = {
        "embedding_dropout": 0.0 if family in UNDROPPED_EMBEDDING else _number(config, EMBEDDING),
        "hidden_dropout": 0.0 if family in ("clip", "siglip") else _number(config, HIDDEN),
        "attention_dropout": _number(config, ATTENTION),
        "inner_dropout": _number(config, INNER),
        "last_dropout": _number(config, ("dropout_rate",)),
    }
    return Habits(
        **found,
        output_dropout=family not in UNDROPPED_ATTENTION_OUTPUT,
        activation=str(next((config[name] for name in ACTIVATION if isinstance(config.get(name), str)), "gelu")),
        scaled_embedding=family in SCALED_EMBEDDING,
        scaled_queries=family in SCALED_QUERIES,
        contiguous_heads=family in CONTIGUOUS_HEADS,
        biased_logits=family in BIASED_LOGITS,
        scaled_logits=t5 and bool(config.get("tie_word_embeddings", True)),
        wide_softmax=family not in NARROW_SOFTMAX,
        float32_logits=family in FLOAT32_LOGITS,
        wide_loss=family not in NARROW_LOSS,
        fused_attention=family not in NO_SDPA and not config.get("attn_logit_softcapping"),
        score_cap=bool(config.get("attn_logit_softcapping")),
        logit_cap=bool(config.get("final_logit_softcapping")),
    )


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> float:
    """The first of these fields that is a number; 0 where none is."""
    found = (config.get(name) for name in names)
    return next((float(value) for value in found if isinstance(value, int | float) and not isinstance(value, bool)), 0.0)
