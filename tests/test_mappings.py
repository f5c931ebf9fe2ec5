"""Scaling mappings, found in the graph of each family and held against two outside truths: the tables that people wrote by hand for AWQ
(AutoAWQ's `get_layers_for_scaling`, llm-compressor's `AWQ_MAPPING_REGISTRY`, which leave grouped-query values out), and the model itself,
whose outputs may not move when every mapping is given random scales at once.

Seeded faults, each caught: a residual's read does not fix a norm; a key/value head's factor is given to its first query head alone; Gemma's
norm is scaled without its 1; a GELU lets factors pass; a producer is multiplied instead of divided.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tiny_models import save
from torch import nn
from torch.utils._pytree import tree_leaves

from lighten.compress.graph import record_graph
from lighten.compress.mappings import Channels, Mapping, find_mappings, fold, gather, spread
from lighten.compress.skeleton import find_places
from lighten.errors import TraceError

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 0,
}  # fmt: skip
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 16, "patch_size": 8}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64}

LLAMA_LIKE = [
    "input_layernorm > q_proj k_proj v_proj", "v_proj > o_proj", "post_attention_layernorm > gate_proj up_proj", "up_proj > down_proj",
]  # fmt: skip
GEMMA_LIKE = ["input_layernorm > q_proj k_proj v_proj", "v_proj > o_proj", "pre_feedforward_layernorm > gate_proj up_proj", "up_proj > down_proj"]
T5_ATTENTION = ["SelfAttention.v > SelfAttention.o", "EncDecAttention.v > EncDecAttention.o"]
BART_VALUES = ["self_attn.v_proj > self_attn.out_proj", "encoder_attn.v_proj > encoder_attn.out_proj"]

FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}, [*LLAMA_LIKE, "norm > lm_head"]),
    "llama tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, [*LLAMA_LIKE, "norm > lm_head"]),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 12}, [*LLAMA_LIKE, "norm > lm_head"]),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}, GEMMA_LIKE),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": False}, [*GEMMA_LIKE, "norm > lm_head"]),
    "mistral": ("MistralForCausalLM", GROUPED, [*LLAMA_LIKE, "norm > lm_head"]),
    "phi": ("PhiForCausalLM", GROUPED, ["input_layernorm > q_proj k_proj v_proj fc1", "v_proj > dense", "final_layernorm > lm_head"]),
    "phi3": (
        "Phi3ForCausalLM", GROUPED,
        ["input_layernorm > qkv_proj", "qkv_proj > o_proj", "post_attention_layernorm > gate_up_proj", "gate_up_proj > down_proj", "norm > lm_head"],
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, ["ln_1 > c_attn", "c_attn > c_proj", "ln_2 > c_fc"]),
    "gpt2 relu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu"}, ["ln_1 > c_attn", "c_attn > c_proj", "ln_2 > c_fc", "c_fc > c_proj"]),
    "gpt_neox": (
        "GPTNeoXForCausalLM", BASE,
        ["input_layernorm > query_key_value", "query_key_value > dense", "post_attention_layernorm > dense_h_to_4h", "final_layer_norm > lm_head"],
    ),
    "mixtral": (
        "MixtralForCausalLM", GROUPED | MOE,
        [*LLAMA_LIKE[:2], "post_attention_layernorm > gate gate_up_proj gate_up_proj gate_up_proj", "gate_up_proj > down_proj", "norm > lm_head"],
    ),
    "mamba": ("MambaForCausalLM", MAMBA, ["norm > in_proj", "x_proj > dt_proj", "x_proj D > out_proj"]),
    "bert": ("BertModel", BASE, ["self.value > output.dense"]),
    "roberta": ("RobertaModel", BASE, ["self.value > output.dense"]),
    "distilbert": ("DistilBertModel", DISTIL, ["v_lin > out_lin"]),
    "t5": ("T5ForConditionalGeneration", T5, [*T5_ATTENTION, "wi > wo", "layer_norm > q", "layer_norm > wi", "layer_norm > q k v"]),
    "t5 gated": (
        "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"},
        [*T5_ATTENTION, "wi_1 > wo", "layer_norm > q", "layer_norm > wi_0 wi_1", "layer_norm > q k v"],
    ),
    "bart": ("BartForConditionalGeneration", BART, BART_VALUES),
    "vit": ("ViTModel", VIT, ["layernorm_before > q_proj k_proj v_proj", "v_proj > o_proj", "layernorm_after > fc1"]),
    "whisper": (
        "WhisperForConditionalGeneration", WHISPER,
        [*BART_VALUES, "self_attn_layer_norm > q_proj k_proj v_proj", "encoder_attn_layer_norm > q_proj", "final_layer_norm > fc1"],
    ),
}  # fmt: skip
"""Family → its class, a tiny config, and every mapping that it has, by the last names of the modules."""


def config_of(family: str) -> tuple[Any, str]:
    architecture, fields, _ = FAMILIES[family]
    config = getattr(transformers, architecture).config_class(**fields)
    config.architectures = [architecture]
    return config, architecture


@cache
def mappings_of(family: str) -> tuple[Mapping, ...]:
    return find_mappings(record_graph(*config_of(family)))


def module_of(family: str, *, dtype: torch.dtype = torch.float64) -> Any:
    """A module of random weights, norms far from 1 and biases far from 0."""
    config, architecture = config_of(family)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    torch.manual_seed(0)
    module = getattr(transformers, architecture)(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return module


def outputs(module: Any) -> list[torch.Tensor]:
    takes = inspect.signature(module.forward).parameters
    torch.manual_seed(1)
    dtype = next(module.parameters()).dtype
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    inputs |= {name: torch.randint(3, 60, (2, length)) for name, length in (("input_ids", 7), ("decoder_input_ids", 5)) if name in takes}
    shapes = {"pixel_values": (2, 3, 16, 16), "input_features": (2, 8, 32)}
    inputs |= {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items() if name in takes}
    with torch.no_grad():
        out = module(**inputs)
    return [leaf for leaf in tree_leaves(tuple(out.values())) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest change of an output, relative to its largest value."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


def apply(module: nn.Module, mapping: Mapping, scales: torch.Tensor) -> None:
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in fold(mapping, scales, {name: parameters[name].detach() for name in mapping.names}).items():
            parameters[name].copy_(tensor)


def said(mapping: Mapping, depth: int) -> str:
    """As "input_layernorm > q_proj k_proj v_proj": the last `depth` names of each module, biases left out."""

    def names(ends: tuple[Channels, ...]) -> str:
        modules = [re.sub(r"\.(weight|bias)$", "", end.name) for end in ends]
        unique = modules if any(end.expert is not None for end in ends) else dict.fromkeys(modules)
        return " ".join(".".join(module.split(".")[-depth:]) for module in unique)

    return f"{names(mapping.producers)} > {names(mapping.consumers)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_mappings_that_its_code_allows(family):
    deep = {text for text in FAMILIES[family][2] if "." in text}
    told = {said(mapping, 2) if said(mapping, 2) in deep else said(mapping, 1) for mapping in mappings_of(family)}
    assert told == set(FAMILIES[family][2])


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_stay_where_every_mapping_has_random_scales(family):
    module = module_of(family)
    before = outputs(module)
    torch.manual_seed(2)
    for mapping in mappings_of(family):
        apply(module, mapping, torch.rand(mapping.channels) * 3 + 0.3)
    assert moved(before, outputs(module)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "t5"])
def test_each_consumer_needs_its_producer(family):
    """A mapping without its consumers, or without its producers, changes what the model gives: none is found for nothing."""
    module = module_of(family)
    before = outputs(module)
    for mapping in mappings_of(family)[:4]:
        for half in ({"producers": ()}, {"consumers": ()}):
            parts = {"kind": mapping.kind, "channels": mapping.channels, "producers": mapping.producers, "consumers": mapping.consumers} | half
            scales = torch.linspace(0.5, 3, mapping.channels)
            apply(module, Mapping(**parts), scales)
            assert moved(before, outputs(module)) > 1e-4
            apply(module, Mapping(**parts), 1 / scales)


def test_a_grouped_value_has_one_factor_for_all_its_query_heads():
    mapping = next(each for each in mappings_of("llama") if said(each, 1) == "v_proj > o_proj")
    heads = mapping.consumers[0].channel.reshape(4, 8)
    assert mapping.channels == 16  # 4 query heads on 2 key/value heads of 8
    assert heads.tolist() == [list(range(8)), list(range(8)), list(range(8, 16)), list(range(8, 16))]


def test_only_the_values_of_a_fused_projection_are_scaled():
    mapping = next(each for each in mappings_of("phi3") if said(each, 1) == "qkv_proj > o_proj")
    assert mapping.producers[0].channel.tolist() == [-1] * 48 + list(range(16))  # 32 rows of queries, 16 of keys, 16 of values


def test_gemmas_norm_multiplies_by_one_more_than_its_weight():
    assert {end.offset for mapping in mappings_of("gemma2") if mapping.kind == "norm" for end in mapping.producers} == {1.0}


def test_experts_are_named_as_the_checkpoint_names_them(tmp_path):
    config, architecture = config_of("mixtral")
    save(config, tmp_path)
    shapes = checkpoint_shapes(tmp_path)
    with torch.device("meta"):
        module = getattr(transformers, architecture)(config)
    found = find_mappings(record_graph(config, architecture), find_places(module, shapes))
    assert {name for mapping in found for name in mapping.names} <= set(shapes)
    up = next(mapping for mapping in found if mapping.producers[0].name == "model.layers.1.block_sparse_moe.experts.2.w3.weight")
    assert [(end.name, end.axis, end.expert) for end in up.consumers] == [("model.layers.1.block_sparse_moe.experts.2.w2.weight", -1, None)]
    norm = next(mapping for mapping in found if mapping.producers[0].name == "model.layers.0.post_attention_layernorm.weight")
    assert {end.name.split(".")[-2] for end in norm.consumers} == {"w1", "w3", "gate"}
    assert len(norm.consumers) == 2 * 3 + 1
    for mapping in found:  # each is as long as its tensor's axis
        assert all(shapes[end.name][end.axis] == len(end.channel) for end in (*mapping.producers, *mapping.consumers))


def test_a_checkpoint_reloaded_after_folding_gives_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    config, architecture = config_of("mixtral")
    save(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kind = getattr(transformers, architecture)
    before = outputs(kind.from_pretrained(tmp_path))
    with torch.device("meta"):
        module = kind(config)
    for mapping in find_mappings(record_graph(config, architecture), find_places(module, {name: tuple(t.shape) for name, t in tensors.items()})):
        tensors |= fold(mapping, torch.linspace(0.5, 2, mapping.channels), tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert moved(before, outputs(kind.from_pretrained(tmp_path))) < 1e-4


def checkpoint_shapes(folder: Any) -> dict[str, tuple[int, ...]]:
    from safetensors.torch import load_file

    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


def test_scales_of_one_change_nothing():
    module = module_of("gemma2", dtype=torch.float32)
    parameters = dict(module.named_parameters())
    for mapping in mappings_of("gemma2"):
        tensors = {name: parameters[name].detach() for name in mapping.names}
        same = fold(mapping, torch.ones(mapping.channels), tensors)
        assert all(torch.allclose(same[name], tensor, atol=1e-7) for name, tensor in tensors.items())


def test_folding_back_restores_and_keeps_types():
    norm = Channels(name="norm", axis=0, channel=torch.tensor([0, 1]), offset=1.0)
    down = Channels(name="w", axis=-1, channel=torch.tensor([1, 0, -1]))
    mapping = Mapping(kind="norm", channels=2, producers=(norm,), consumers=(down,))
    tensors = {"norm": torch.tensor([1.0, 3.0]), "w": torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)}
    there = fold(mapping, torch.tensor([2.0, 4.0]), tensors)
    assert there["norm"].tolist() == [0.0, 0.0]  # (1 + w) / s - 1
    assert there["w"].tolist() == [[4.0, 4.0, 4.0]]
    assert there["w"].dtype == torch.bfloat16
    back = fold(mapping, torch.tensor([0.5, 0.25]), there)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_spread_and_gather_are_inverse_on_a_mappings_channels():
    end = Channels(name="w", axis=-1, channel=torch.tensor([1, 0, -1, 1]))
    assert spread(end, torch.tensor([5.0, 7.0])).tolist() == [7.0, 5.0, 1.0, 7.0]
    assert gather(end, torch.tensor([2.0, 3.0, 9.0, 4.0]), 3, how="mean").tolist() == [3.0, 3.0, 0.0]
    assert gather(end, torch.tensor([2.0, 3.0, 9.0, 4.0]), 3, how="amax").tolist() == [3.0, 4.0, 0.0]


def test_a_model_that_looks_at_values_is_refused():
    config = transformers.SwitchTransformersConfig(**T5, num_experts=3)
    with pytest.raises(TraceError, match="SwitchTransformersForConditionalGeneration could not be followed on tensors without memory"):
        record_graph(config, "SwitchTransformersForConditionalGeneration")
