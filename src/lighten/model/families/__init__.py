"""The architectures that have a formula: one module a kind of model, one entry for each `model_type` in its `FAMILIES`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from lighten.errors import UnsupportedFamily
from lighten.model.families._config import complete
from lighten.model.families._family import Family
from lighten.model.low_rank import with_low_rank
from lighten.model.spec import Part

MODULES = {
    "bert": """
        bert
    """,
    "blip": """
        blip blip_vision_model
    """,
    "chunked": """
        mamba2 bamba falcon_h1 nemotron_h granitemoehybrid qwen3_next qwen3_5_text qwen3_5_moe_text
    """,
    "decoders": """
        llama internlm3 iquestcoder mistral ministral ministral3 qwen2 qwen3 gemma gemma2 vaultgemma phi3 smollm3 granite cwm helium ernie4_5
        seed_oss hunyuan_v1_dense arcee apertus bitnet olmo olmo2 olmo3 exaone4 glm glm4 gpt2 gpt_bigcode gpt_neo openai-gpt gptj codegen gpt_neox
        bloom xglm biogpt ctrl phi persimmon starcoder2 cohere cohere2 nemotron jais2 nanochat gemma3_text qwen modernbert-decoder granite_swa
        falcon mpt gpt_neox_japanese opt stablelm hyperclovax
    """,
    "encoders": """
        roberta xlm-roberta camembert data2vec-text roberta-prelayernorm xlm-roberta-xl distilbert electra mpnet ernie megatron-bert bert-generation
        albert deberta deberta-v2 modernbert mobilebert convbert layoutlm rembert splinter squeezebert nystromformer eurobert nomic_bert xlm
        flaubert
    """,
    "experts": """
        mixtral qwen2_moe qwen3_moe olmoe flex_olmo deepseek_v2 deepseek_v3 glm4_moe glm4_moe_lite dots1 gpt_oss granitemoe granitemoeshared phimoe
        llama4_text minimax_m2 ernie4_5_moe afmoe solar_open exaone_moe hunyuan_v1_moe mellum hy_v3 granitemoe_swa deepseek_v32 axk1 mimo_v2_flash
        minicpm3 youtu
    """,
    "imagegpt": """
        imagegpt
    """,
    "pairs": """
        clip metaclip_2 siglip chinese_clip clip_vision_model metaclip_2_vision_model chinese_clip_vision_model altclip_vision_model
        siglip_vision_model clip_text_model metaclip_2_text_model siglip_text_model
    """,
    "pyramid": """
        swin swinv2 donut-swin convnext convnextv2 pvt pvt_v2
    """,
    "recurrent": """
        mamba falcon_mamba jamba lfm2 lfm2_moe recurrent_gemma rwkv
    """,
    "seq2seq": """
        t5 mt5 umt5 switch_transformers bart mvp plbart mbart pegasus marian blenderbot blenderbot-small m2m_100
    """,
    "speech": """
        whisper speech_to_text moonshine audio-spectrogram-transformer
    """,
    "video": """
        vivit videomae
    """,
    "vision": """
        vit deit beit data2vec-vision dinov2 dinov2_with_registers dinov3_vit ijepa vit_mae vit_msn yolos
    """,
}
"""Module → the `model_type`s that it describes. A module is imported when one of them is asked for: all of them take longer than an estimate."""


class Families(Mapping[str, Family]):
    """`model_type` → its architectures and the function that gives their parts."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._module_of = {model_type: module for module, types in modules.items() for model_type in types.split()}

    def __getitem__(self, model_type: str) -> Family:
        module = importlib.import_module(f"{__name__}.{self._module_of[model_type]}")
        found: Family = module.FAMILIES[model_type]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._module_of)

    def __len__(self) -> int:
        return len(self._module_of)

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._module_of


FAMILIES = Families(MODULES)


def has_formula(config: Mapping[str, Any], architecture: str) -> bool:
    """Whether a formula describes the architecture."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and architecture in (*family.architectures, *family.elsewhere)


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """The parts of a model.

    Raises:
        UnsupportedFamily: no formula for its `model_type` or its architecture.
        ModelError: the config lacks fields.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        near = difflib.get_close_matches(str(family), FAMILIES, n=3, cutoff=0) or []
        raise UnsupportedFamily(
            f"model_type {family!r} has no formula; {len(FAMILIES)} have one, by name the nearest: {', '.join(near)}.", config=config
        )
    known = (*FAMILIES[family].architectures, *FAMILIES[family].elsewhere)
    if architecture not in known:
        raise UnsupportedFamily(f"{family} architecture {architecture!r} has no formula; these have one: {', '.join(known)}.", config=config)
    return with_low_rank(FAMILIES[family].describe(complete(config), architecture), config)
