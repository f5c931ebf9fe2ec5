"""Scaling mappings, found in the graph of each family and held against two outside truths: the tables that people wrote by hand for AWQ
(AutoAWQ's `get_layers_for_scaling`, llm-compressor's `AWQ_MAPPING_REGISTRY`, which leave grouped-query values out), and the model itself,
whose outputs may not move when every mapping is given random scales at once.

Seeded faults, each caught: a residual's read does not fix a norm; a key/value head's factor is given to its first query head alone; Gemma's
norm is scaled without its 1; a GELU lets factors pass; a producer is multiplied instead of divided.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from equivalence_setup import FAMILIES, T5, config_of, module_of, moved, outputs
from tiny_models import save
from torch import nn

from lighten.compress.graph import record_graph
from lighten.compress.mappings import Channels, Mapping, find_mappings, fold, gather, spread
from lighten.compress.skeleton import find_places
from lighten.errors import TraceError


@cache
def mappings_of(family: str) -> tuple[Mapping, ...]:
    return find_mappings(record_graph(*config_of(family)))


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
