"""Caches against the tensors that transformers' own caches hold on tiny models, against published sizes, and against hand-worked pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_truth import spec_of
from transformers import AutoConfig, PreTrainedModel, StaticCache

from lighten.cost.kv_cache import CacheOptions, cache_bytes, cache_layers
from lighten.errors import WorkloadError
from lighten.model.families import FAMILIES
from lighten.model.spec import Attention, Conv, ModelSpec, Scan

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {name: value for name, value in TINY.items() if name != "head_dim"} | {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "mistral": TINY | {"sliding_window": 8},
    "gemma2": TINY | {"sliding_window": 8},
    "gemma3_text": TINY | {"sliding_window": 8, "num_hidden_layers": 7},
    "cohere2": TINY | {"sliding_window": 8},
    "qwen2": TINY | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "phi3": TINY | {"sliding_window": 8},
    "starcoder2": TINY | {"sliding_window": 8},
    "olmo3": TINY | {"sliding_window": 8},
    "gpt_oss": TINY | {"sliding_window": 8, "num_local_experts": 4},
    "llama4_text": TINY | {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "deepseek_v3": LATENT,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "attention_types": [[["global", "local"], 1]], "window_size": 8,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon": OLD,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4, "eos_token_id": 2, "bos_token_id": 1},
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2,
        "eos_token_id": 2, "bos_token_id": 1,
    },
    "lfm2": TINY | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": TINY | {
        "num_hidden_layers": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
    },
    "jamba": TINY | {
        "num_hidden_layers": 8, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": TINY | {
        "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 2, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "deepseek_v2": LATENT | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "mixtral": TINY | {"num_local_experts": 2, "sliding_window": 8},
    "exaone4": TINY | {"sliding_window": 8},
    "opt": OLD | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": OLD | {"intermediate_size": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
}  # fmt: skip
"""model_type → a tiny config, with a window of 8 where the family has one."""
KNOWN = sorted(MODELS.keys() & FAMILIES.keys())
PROMPT, SOURCE = 20, 13


def build(model_type: str, dtype: str) -> tuple[PreTrainedModel, ModelSpec]:
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    architecture = next(name for name in FAMILIES[model_type].architectures if name.endswith(endings))
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval().to(getattr(torch, dtype))
    return model, spec_of(config, architecture)


def storages(cache: Any) -> int:
    """Bytes of the storages behind a cache's keys, values and states."""
    found: dict[int, int] = {}
    sides = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "cross_attention_cache") else [cache]
    for layer in [layer for side in sides for layer in side.layers]:
        states = [state for name in ("conv_states", "recurrent_states") for state in getattr(layer, name, {}).values()]
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None), *states):
            if isinstance(tensor, torch.Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@torch.no_grad()
def two_steps(model: PreTrainedModel) -> tuple[int, int]:
    """(bytes after a prompt of `PROMPT` tokens, after one more token)."""
    ids = torch.ones(2, PROMPT, dtype=torch.long)
    if model.config.is_encoder_decoder:
        source = model.get_encoder()(torch.ones(2, SOURCE, dtype=torch.long))
        first = model(encoder_outputs=source, decoder_input_ids=ids, use_cache=True)
        before = storages(first.past_key_values)
        after = model(encoder_outputs=source, decoder_input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
        return before, storages(after.past_key_values)
    first = model(ids, use_cache=True)
    name = "past_key_values" if "past_key_values" in first else "cache_params"
    before = storages(first[name])
    return before, storages(model(ids[:, :1], **{name: first[name]}, use_cache=True)[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", KNOWN)
def test_a_dynamic_cache_is_transformers_to_the_byte(model_type, dtype):
    model, spec = build(model_type, dtype)
    before, after = two_steps(model)
    whole = CacheOptions(new_tokens=PROMPT, source_len=SOURCE)
    assert cache_bytes(spec, batch_size=2, context_len=PROMPT, dtype=dtype, options=whole) == before
    assert cache_bytes(spec, batch_size=2, context_len=PROMPT + 1, dtype=dtype, options=CacheOptions(source_len=SOURCE)) == after


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("model_type", [name for name in KNOWN if name in ("llama", "mistral", "gemma2", "gemma3_text", "cohere2", "deepseek_v3")])
def test_a_static_cache_is_transformers_to_the_byte(model_type, length):
    model, spec = build(model_type, "float32")
    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        model(torch.ones(2, 4, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache_bytes(spec, batch_size=2, context_len=length, dtype="float32", kept_by="transformers-static") == storages(cache)


def test_layers_that_read_anothers_cache_and_encoders_keep_none():
    def attention(name: str, **more: Any) -> Attention:
        given = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "causal": True, "component": "attention"} | more
        return Attention(name=name, **given)

    spec = model(
        attention("encoder", causal=False, rows="source", keys="source"),
        attention("own"),
        attention("reads", cached=False),
        attention("cross", causal=False, keys="source"),
        attention("frames", causal=False, keys=1500),
    )
    layers = cache_layers(spec, batch_size=3, context_len=10, dtype="float16", options=CacheOptions(source_len=7))
    assert layers == {"own": 3 * 10 * 2 * 16 * 2, "cross": 3 * 7 * 2 * 16 * 2, "frames": 3 * 1500 * 2 * 16 * 2}


def model(*parts: Any, family: str = "llama", **config: Any) -> ModelSpec:
    return ModelSpec(name="a model", family=family, architecture="", source="", dtype="float16", config=config, parts=tuple(parts))


def decoder(layers: int, *, kv_heads: int, head_dim: int, full_every: int = 1, window: int = 1024, **more: Any) -> ModelSpec:
    """Every `full_every`-th layer sees all tokens, the others a window."""
    parts = [
        Attention(
            name=f"layers.{layer}", component="attention", causal=True, num_attention_heads=kv_heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            window=None if (layer + 1) % full_every == 0 else window, **more,
        )
        for layer in range(layers)
    ]  # fmt: skip
    return model(*parts, family="gemma3_text", sliding_window=window)


@pytest.mark.parametrize("kept_by", ["transformers", "transformers-static", "llama.cpp", "vllm"])
@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "bytes_per_token"),
    [
        (80, 8, 128, 327_680),  # Qwen2.5-72B, arXiv:2505.09343, table 1
        (126, 8, 128, 516_096),  # Llama-3.1-405B, the same table
        (40, 40, 128, 819_200),  # OPT-13B, arXiv:2309.06180, section 3: 800 KB a token
    ],
)
def test_published_bytes_of_a_token(layers, kv_heads, head_dim, bytes_per_token, kept_by):
    spec = decoder(layers, kv_heads=kv_heads, head_dim=head_dim)
    assert cache_bytes(spec, batch_size=1, context_len=4096, dtype="bfloat16", kept_by=kept_by) == 4096 * bytes_per_token


@pytest.mark.parametrize("kept_by", ["transformers", "llama.cpp", "vllm"])
def test_a_latent_cache_is_576_values_a_token_and_layer(kept_by):
    spec = decoder(61, kv_heads=128, head_dim=192, v_head_dim=128, latent_dim=576)
    # DeepSeek-V3, arXiv:2505.09343, table 1: 70.272 KB a token
    assert cache_bytes(spec, batch_size=1, context_len=4096, dtype="bfloat16", kept_by=kept_by) == 4096 * 70_272


def test_llama_cpp_rounds_tokens_up_to_256_and_windows_to_the_window_and_a_batch():
    token = 2 * 2 * 8 * 2  # two sides, G = 2, D = 8, float16
    spec = decoder(6, kv_heads=2, head_dim=8, full_every=6)
    assert cache_bytes(spec, batch_size=1, context_len=1, dtype="float16", kept_by="llama.cpp") == 6 * 256 * token
    # 32768 tokens: five layers of 1024 + 512 rounded up to 256, and one of all
    assert cache_bytes(spec, batch_size=2, context_len=32_700, dtype="float16", kept_by="llama.cpp") == 2 * (5 * 1536 + 32_768) * token
    narrow = CacheOptions(ubatch=100)
    assert cache_bytes(spec, batch_size=1, context_len=32_768, dtype="float16", kept_by="llama.cpp", options=narrow) == (5 * 1280 + 32_768) * token
    everything = CacheOptions(swa_full=True)
    assert cache_bytes(spec, batch_size=1, context_len=32_768, dtype="float16", kept_by="llama.cpp", options=everything) == 6 * 32_768 * token


def test_llama_cpp_keeps_all_tokens_of_families_whose_window_it_does_not_know():
    spec = decoder(2, kv_heads=2, head_dim=8, full_every=3, window=64)
    mistral = model(*spec.parts, family="mistral", sliding_window=64)
    assert cache_bytes(mistral, batch_size=1, context_len=4096, dtype="float16", kept_by="llama.cpp") == 2 * 4096 * 64


@pytest.mark.parametrize(
    ("kind", "of_32"),
    [("q8_0", 34), ("q4_0", 18), ("q4_1", 20), ("q5_0", 22), ("q5_1", 24), ("iq4_nl", 18), ("f16", 64), ("float32", 128)],
)
def test_llama_cpp_has_cache_types_of_its_own(kind, of_32):
    spec = decoder(1, kv_heads=8, head_dim=128)
    assert cache_bytes(spec, batch_size=1, context_len=256, dtype=kind, kept_by="llama.cpp") == 256 * 2 * 1024 // 32 * of_32


def test_a_recurrence_keeps_its_state_however_long_the_text_is():
    spec = model(
        Conv(name="conv", component="mixer", in_channels=6, out_channels=6, kernel=(4,), groups=6),
        Scan(name="mixer", component="mixer", flops_per_row=1, state_elements=100),
    )
    assert cache_bytes(spec, batch_size=2, context_len=10**6, dtype="float16") == 2 * (24 * 2 + 76 * 4)
    assert cache_bytes(spec, batch_size=2, context_len=10, dtype="float16", kept_by="vllm") == 2 * 100 * 2
    assert cache_bytes(spec, batch_size=2, context_len=10, dtype="q8_0", kept_by="llama.cpp") == 2 * 100 * 4


def test_vllm_keeps_whole_pages():
    spec = decoder(2, kv_heads=2, head_dim=8)
    assert cache_bytes(spec, batch_size=3, context_len=17, dtype="bfloat16", kept_by="vllm") == 3 * 2 * 32 * 64
    wide = CacheOptions(block_size=64)
    assert cache_bytes(spec, batch_size=3, context_len=17, dtype="bfloat16", kept_by="vllm", options=wide) == 3 * 2 * 64 * 64
    assert cache_bytes(spec, batch_size=1, context_len=16, dtype="float8_e4m3fn", kept_by="vllm") == 2 * 16 * 32


def test_vllm_frees_pages_before_the_window():
    spec = decoder(2, kv_heads=1, head_dim=1, full_every=3, window=32)  # all layers are windowed: one group
    page = 16 * 2 * 2
    for context, pages in ((32, 2), (33, 3), (48, 2), (49, 3), (1000, 3)):
        assert cache_bytes(spec, batch_size=1, context_len=context, dtype="float16", kept_by="vllm") == 2 * pages * page, context


def test_vllm_puts_layers_of_two_kinds_into_groups_of_one_size():
    # 62 layers, 10 of which see all: groups of 10, so 52 windowed layers take 6 groups, 8 places of which are padding
    spec = decoder(62, kv_heads=1, head_dim=1, full_every=6, window=1024)
    layers = cache_layers(spec, batch_size=1, context_len=32_768, dtype="float16", kept_by="vllm")
    page, windowed = 16 * 2 * 2, 2048 - (32_768 - 1024) // 16
    assert layers["padding"] == 8 * windowed * page
    assert sum(layers.values()) == (10 * 2048 + 60 * windowed) * page
    # 12 and 12: one group each, nothing wasted; 12 and 13 likewise, with one place of padding
    even = cache_layers(decoder(24, kv_heads=1, head_dim=1, full_every=2, window=128), batch_size=1, context_len=128, dtype="float16", kept_by="vllm")
    assert "padding" not in even
    odd = cache_layers(decoder(25, kv_heads=1, head_dim=1, full_every=2, window=128), batch_size=1, context_len=128, dtype="float16", kept_by="vllm")
    assert odd["padding"] == 8 * page


def test_a_quantized_cache_is_codes_scales_and_a_rest_in_full():
    spec = decoder(1, kv_heads=8, head_dim=64)
    side = 8 * 64
    # 1000 tokens of the prompt quantized at once: half a byte a value, a scale and a zero point of 2 bytes for each 64
    codes = 2 * (1000 * side // 2 + 2 * 2 * (1000 * side // 64))
    assert cache_bytes(spec, batch_size=1, context_len=1000, dtype="float16", kept_by="transformers-quantized") == codes
    # 127 tokens later these are still in full width; with the next one all are quantized anew
    later = CacheOptions(prompt_len=1000)
    kept = cache_bytes(spec, batch_size=1, context_len=1127, dtype="float16", kept_by="transformers-quantized", options=later)
    assert kept == codes + 127 * 2 * side * 2
    flushed = cache_bytes(spec, batch_size=1, context_len=1128, dtype="float16", kept_by="transformers-quantized", options=later)
    assert flushed == codes * 1128 // 1000


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"kept_by": "ollama"}, "kept_by='ollama' is not known; known: transformers, transformers-static, transformers-quantized, llama.cpp, vllm"),
        ({"dtype": "q8_0"}, "a cache of type 'q8_0' is not known to transformers; known: float64"),
        ({"dtype": "q2_k", "kept_by": "llama.cpp"}, "'q2_k' is not known to llama.cpp; known: float32, float16, bfloat16, q8_0"),
        ({"dtype": "q8_0", "kept_by": "llama.cpp"}, "a cache in blocks of 32 values cannot hold rows of 8"),
        ({"kept_by": "transformers-quantized"}, "layers.0 and 1 more layers have a sliding window, which transformers' QuantizedCache refuses"),
        ({"batch_size": 0}, "a cache of batch_size=0 and context_len=64 cannot be"),
    ],
)
def test_what_a_keeper_refuses_is_one_line(asked, text):
    spec = decoder(3, kv_heads=1, head_dim=8, full_every=3, window=16)
    with pytest.raises(WorkloadError, match=text):
        cache_bytes(spec, **{"batch_size": 1, "context_len": 64, "dtype": "float16", **asked})


def test_pages_that_do_not_divide_one_another_are_vllms_error():
    wide, narrow = decoder(2, kv_heads=3, head_dim=8).parts[1], decoder(1, kv_heads=2, head_dim=8, full_every=2, window=16).parts[0]
    spec = model(wide, narrow)
    with pytest.raises(WorkloadError, match=r"a page of layers\.0 is no whole part of the largest page, 1536 bytes"):
        cache_bytes(spec, batch_size=1, context_len=64, dtype="float16", kept_by="vllm")
