"""Decoders against published counts, against what transformers fills in, and with configs that no model can have."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families import FAMILIES, decoders, describe
from lighten.model.spec import Attention, Linear, Part


def parts_of(model_type: str, architecture: str, **config: Any) -> tuple[Part, ...]:
    return describe({"model_type": model_type, **config}, architecture)


def count(model_type: str, architecture: str, **config: Any) -> int:
    return sum(part.parameters for part in parts_of(model_type, architecture, **config))


def sizes(layers: int, hidden: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "vocab_size": vocab, **more}


# ---- counts that others published ----


@pytest.mark.parametrize(
    ("model_type", "architecture", "config", "published"),
    [
        # the safetensors metadata of each on the Hugging Face hub
        ("mistral", "MistralForCausalLM", sizes(32, 4096, 32, 32000, num_key_value_heads=8, intermediate_size=14336), 7_241_732_096),
        (
            "qwen2", "Qwen2ForCausalLM",
            sizes(24, 896, 14, 151936, num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True), 494_032_768,
        ),
        (
            "qwen3", "Qwen3ForCausalLM",
            sizes(36, 2560, 32, 151936, num_key_value_heads=8, intermediate_size=9728, head_dim=128, tie_word_embeddings=True), 4_022_468_096,
        ),
        ("gemma", "GemmaForCausalLM", sizes(18, 2048, 8, 256000, num_key_value_heads=1, intermediate_size=16384, head_dim=256), 2_506_172_416),
        ("gemma2", "Gemma2ForCausalLM", sizes(42, 3584, 16, 256000, num_key_value_heads=8, intermediate_size=14336, head_dim=256), 9_241_705_984),
        ("phi", "PhiForCausalLM", sizes(24, 2048, 32, 51200, intermediate_size=8192), 1_418_270_720),
        # Qwen's model cards, and its config.json: kv_channels 128, intermediate_size of both halves
        ("qwen", "QWenLMHeadModel", sizes(32, 4096, 32, 151936, intermediate_size=22016, kv_channels=128), 7_721_324_544),
        ("qwen", "QWenLMHeadModel", sizes(80, 8192, 64, 152064, intermediate_size=49152, kv_channels=128), 72_287_920_128),
        # EleutherAI/pythia, README
        ("gpt_neox", "GPTNeoXForCausalLM", sizes(6, 512, 8, 50304, intermediate_size=2048), 70_426_624),
        ("gpt_neox", "GPTNeoXForCausalLM", sizes(36, 5120, 40, 50688, intermediate_size=20480), 11_846_072_320),
    ],
)  # fmt: skip
def test_parameters_are_those_published(model_type, architecture, config, published):
    assert count(model_type, architecture, **config) == published


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "length", "published"),
    [  # mosaicml/llm-foundry, scripts/train/benchmarking/README.md: learned positions, biases, 50368 tokens
        (12, 768, 12, 2048, 125_311_488), (24, 1024, 16, 1024, 354_936_832), (24, 1536, 12, 8192, 769_907_712),
        (24, 2048, 16, 32768, 1_378_865_152), (32, 2560, 20, 512, 2_647_905_280), (32, 4096, 32, 65536, 6_918_905_856),
        (40, 5120, 40, 16384, 12_927_354_880), (80, 8192, 64, 2048, 64_862_437_376),
    ],
)  # fmt: skip
def test_parameters_of_llm_foundrys_mpt_are_those_published(layers, hidden, heads, length, published):
    config = {"n_layers": layers, "d_model": hidden, "n_heads": heads, "max_seq_len": length, "vocab_size": 50368}
    options = {"learned_pos_emb": True, "no_bias": False, "attn_config": {"alibi": False}}
    assert count("mpt", "MPTForCausalLM", **config, **options) == published


# ---- what a config leaves out ----

SPARSE: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": 160, "hidden_size": 1024, "num_hidden_layers": 9, "num_attention_heads": 32, "intermediate_size": 64,
        "num_key_value_heads": 16,
    }
    for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "vaultgemma", "cohere2", "olmo3", "exaone4", "smollm3", "cwm",
        "granite_swa", "phi3", "starcoder2", "ernie4_5", "seed_oss", "jais2", "apertus",
    )
}  # fmt: skip
CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 4}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 64}),
    ("gemma3_text", {"sliding_window_pattern": 3, "sliding_window": 64}),
    ("cohere2", {"sliding_window_pattern": 2}),
    ("exaone4", {"sliding_window_pattern": 2, "sliding_window": 64}),
]


@pytest.mark.parametrize(("model_type", "changes"), [*((name, {}) for name in SPARSE), *CHANGED], ids=str)
def test_a_config_that_leaves_fields_out_is_read_as_transformers_reads_it(model_type, changes):
    sparse = SPARSE[model_type] | changes
    filled = AutoConfig.for_model(model_type, **sparse)
    architecture = FAMILIES[model_type].architectures[0]
    assert parts_of(model_type, architecture, **sparse) == describe(filled.to_dict(), architecture)
    windows = [part.window for part in parts_of(model_type, architecture, **sparse) if isinstance(part, Attention)]
    if types := getattr(filled, "layer_types", None):
        assert windows == [filled.sliding_window if kind == "sliding_attention" else None for kind in types]


def test_each_layer_of_gpt_neo_looks_as_far_as_its_pattern_says():
    sizes_of = {"vocab_size": 9, "hidden_size": 8, "num_layers": 4, "num_heads": 2, "max_position_embeddings": 16, "window_size": 5}
    parts = parts_of("gpt_neo", "GPTNeoForCausalLM", **sizes_of, attention_types=[[["global", "local"], 1], [["local"], 2]])
    assert [part.window for part in parts if isinstance(part, Attention)] == [None, 5, 5, 5]


def test_a_model_that_looks_both_ways_is_not_causal():
    parts = parts_of("gemma3_text", "Gemma3TextModel", **SPARSE["gemma3_text"], use_bidirectional_attention=True, sliding_window=64)
    assert {(part.causal, part.window) for part in parts if isinstance(part, Attention)} == {(False, 65), (False, None)}


def test_an_older_falcon_and_bloom_name_their_width_otherwise():
    bloom = parts_of("bloom", "BloomForCausalLM", vocab_size=9, n_embed=8, n_layer=1, n_head=2)
    assert bloom == parts_of("bloom", "BloomForCausalLM", vocab_size=9, hidden_size=8, n_layer=1, n_head=2)


def test_a_classifier_has_as_many_outputs_as_labels():
    parts = parts_of("llama", "LlamaForTokenClassification", **SPARSE["llama"], id2label={"0": "a", "1": "b", "2": "c"})
    head = parts[-1]
    assert isinstance(head, Linear)
    assert (head.name, head.out_features, head.bias) == ("score", 3, True)


# ---- configs that no model can have ----


@pytest.mark.parametrize("model_type", sorted(decoders.FAMILIES))
def test_all_missing_sizes_are_named_at_once(model_type):
    with pytest.raises(ModelError, match=r"vocab_size is missing.*num_hidden_layers is missing.*num_attention_heads is missing"):
        parts_of(model_type, FAMILIES[model_type].architectures[0])


SMALL = sizes(2, 32, 4, 160, intermediate_size=40)
NEO = {"num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "says"),
    [
        ("gemma2", "Gemma2Model", {"layer_types": ["full_attention"]}, "needs one entry for each of 2 layers; found: 1"),
        ("gemma2", "Gemma2Model", {"layer_types": 3}, "needs one entry for each of 2 layers; found: 3"),
        ("gemma2", "Gemma2Model", {"layer_types": ["full_attention", "chunked"]}, "layer_types has chunked; known: sliding_attention"),
        ("gemma2", "Gemma2Model", {"sliding_window": -8}, "sliding_window=-8 is not a positive whole number"),
        (
            "qwen2", "Qwen2Model", {"num_key_value_heads": 4, "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers=-1 is not a whole number from 0",
        ),
        ("smollm3", "SmolLM3Model", {"no_rope_layers": [1]}, "no_rope_layers has no entry for layer 1"),
        ("mistral", "MistralModel", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("glm", "GlmModel", {"num_key_value_heads": 2, "partial_rotary_factor": 2}, "partial_rotary_factor=2 is not a number from 0 to 1"),
        ("arcee", "ArceeModel", {"hidden_act": "sine"}, "hidden_act 'sine' is not known; known: gelu"),
        ("persimmon", "PersimmonModel", {"hidden_size": 34}, "hidden_size=34 is not a multiple of num_attention_heads=4"),
        ("phi3", "Phi3Model", {"intermediate_size": -1}, "found: intermediate_size=-1"),
        ("llama", "LlamaForSequenceClassification", {"id2label": ["a"]}, "id2label is not a table"),
        (
            "falcon", "FalconModel", {"new_decoder_architecture": True, "parallel_attn": False},
            "does not run in transformers; new_decoder_architecture needs parallel_attn",
        ),
        ("gpt_neo", "GPTNeoModel", NEO | {"attention_types": 3}, "is not a list of patterns"),
        (
            "gpt_neo", "GPTNeoModel", NEO | {"attention_types": [[["global"], 1]]},
            "gives 1 layers of global; 2 of global or local are needed",
        ),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_itself_is_one_line(model_type, architecture, fields, says):
    with pytest.raises(ModelError) as raised:
        parts_of(model_type, architecture, **SMALL | fields)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "says"),
    [
        ("gpt2", "GPT2Model", {"n_positions": 64, "add_cross_attention": True}, "gpt2 with add_cross_attention=True has no formula"),
        ("mpt", "MPTForCausalLM", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type='multiquery_attention'"),
    ],
)
def test_a_variant_without_a_formula_says_so(model_type, architecture, fields, says):
    with pytest.raises(UnsupportedFamily) as raised:
        parts_of(
            model_type, architecture, **SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4} | {"d_model": 32, "n_layers": 2, "n_heads": 4} | fields
        )
    assert says in str(raised.value)
