"""Rotations: the matrices, and models that compute the same once they are turned.

Seeded faults, each caught: a norm's weight is not folded into its readers; values are turned across heads; a LayerNorm's basis is turned
without keeping the ones in place; a head that shares its embedding is not folded apart; biases are not turned.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from equivalence_setup import FAMILIES, config_of, module_of, moved, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save

from lighten.compress.graph import Graph, record_graph
from lighten.compress.hadamard import Rotation, _within, dense, hadamard_matrix, plan_rotation, random_hadamard
from lighten.compress.rtn import quantize_rtn
from lighten.compress.skeleton import find_places
from lighten.compress.turns import TurnedEnd, find_turns
from lighten.errors import RecipeError

TURNED = {"llama", "llama tied", "qwen2", "qwen3", "mistral", "phi", "phi3", "gpt2", "gpt2 relu", "gpt_neox", "mixtral", "deepseek_v3", "mamba"}
"""Families whose stream can be turned. The others add a norm's output to it (BERT's and BART's kin, Gemma's norms after each layer), give an
encoder's normalized stream out (T5, Whisper), or write to it by a convolution (ViT, Whisper)."""


# ---- matrices ----


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76, 80, 84])
def test_paleys_constructions_give_hadamard_matrices(order):
    matrix = hadamard_matrix(order)
    if matrix is None:  # of prime powers that are no primes: Sylvester's doubling makes those
        assert order in (28, 36, 76, 16, 52) or order & (order - 1) == 0
        return
    assert set(matrix.reshape(-1).tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert (matrix[0] == 1).all()


@pytest.mark.parametrize("order", [3, 5, 6, 10, 52, 92])
def test_other_orders_have_none_here(order):
    assert hadamard_matrix(order) is None


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 12, 36, 64, 80, 96, 100, 172, 384, 576])
def test_turns_are_orthogonal(size, keeps_ones):
    matrix = dense(random_hadamard(size, seed=1, keeps_ones=keeps_ones))
    assert float((matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-12
    if keeps_ones:
        torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [64, 80, 96, 128, 384, 576, 768, 896, 960, 1536, 2048, 3584])  # head and hidden sizes of real models
def test_sizes_of_real_models_are_turned_by_entries_of_one_magnitude(size):
    row = random_hadamard(size, seed=0).turn(torch.eye(1, size, dtype=torch.float64))
    torch.testing.assert_close(row.abs(), torch.full((1, size), 1 / math.sqrt(size), dtype=torch.float64))


@settings(max_examples=15)
@given(size=st.integers(1, 60), seed=st.integers(0, 100))
def test_a_turn_keeps_lengths_and_depends_on_its_seed_alone(size, seed):
    x = torch.randn(3, size, dtype=torch.float64)
    turned = random_hadamard(size, seed=seed).turn(x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    assert torch.equal(turned, random_hadamard(size, seed=seed).turn(x))


# ---- models ----


@cache
def graph_of(family: str) -> Graph:
    return record_graph(*config_of(family))


def turned_module(family: str, rotation: Rotation) -> tuple[Any, Any]:
    """(a module, and the same one turned)."""
    exact, parameters = module_of(family), {}
    for name, parameter in exact.named_parameters():
        parameters[name] = parameter.detach()
    config, architecture = config_of(family)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    if rotation.untied:
        config.tie_word_embeddings = False
    turned = getattr(transformers, architecture)(config).eval().double()
    with torch.no_grad():
        for name in rotation.names(parameters):
            turned.get_parameter(name).copy_(rotation.tensor(name, parameters.__getitem__))
    return exact, turned


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_model_computes_the_same(family):
    rotation = plan_rotation(graph_of(family), residual=family in TURNED)
    exact, turned = turned_module(family, rotation)
    assert moved(outputs(exact), outputs(turned)) < 1e-5
    before, after = dict(exact.named_parameters()), dict(turned.named_parameters())
    assert all(not torch.equal(before.get(name, after[name]), after[name]) for name in rotation.changes if name not in rotation.untied)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - TURNED))
def test_a_stream_that_cannot_be_turned_is_refused_before_any_work(family):
    with pytest.raises(RecipeError, match=r"rotate\(hadamard\): the stream between the layers of this model cannot be turned"):
        plan_rotation(graph_of(family))


def test_nothing_to_turn_is_refused():
    config = transformers.Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4, num_heads=8, head_dim=8, n_groups=2)
    with pytest.raises(RecipeError, match=r"rotate\(hadamard\): no basis of this model can be turned"):
        plan_rotation(record_graph(config, "Mamba2ForCausalLM"), residual=False)


def test_all_that_reads_or_writes_the_stream_is_turned_and_nothing_else():
    (stream, *heads) = find_turns(graph_of("llama"))
    writes = {end.name.split(".")[-2] for end in stream.ends if end.axis == -2}
    reads = {end.name.split(".")[-2] for end in stream.ends if end.axis == -1 and end.norm}
    assert writes == {"o_proj", "down_proj"}
    assert reads == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
    assert {end.name.split(".")[-2] for end in stream.ends if end.axis == -1 and not end.norm} == {"embed_tokens"}
    assert len(stream.norms) == 2 * 2 + 1
    assert [turn.size for turn in heads] == [8] * 4  # two layers of two key/value heads
    outs = [end for turn in heads for end in turn.ends if "o_proj" in end.name]
    assert all(end.positions.shape == (2, 8) for end in outs)  # two query heads read each


def test_a_tied_head_becomes_a_tensor_of_its_own():
    rotation = plan_rotation(graph_of("llama tied"))
    assert rotation.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert rotation.names(["model.embed_tokens.weight"]) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert not plan_rotation(graph_of("llama tied"), residual=False).untied
    exact, turned = turned_module("llama tied", rotation)
    table = dict(exact.named_parameters())["model.embed_tokens.weight"]
    matrix = dense(rotation.matrices[0])
    torch.testing.assert_close(turned.get_parameter("model.embed_tokens.weight"), table @ matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.get_parameter("lm_head.weight"), (table * exact.model.norm.weight) @ matrix, rtol=1e-5, atol=1e-5)


def test_norms_multiply_by_one_afterwards():
    rotation = plan_rotation(graph_of("phi"))
    exact, turned = turned_module("phi", rotation)
    norms = [name for name, module in turned.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms
    assert all((turned.get_parameter(f"{name}.weight") == 1).all() for name in norms)
    name = norms[0]
    expected = (exact.get_parameter(f"{name}.bias") / exact.get_parameter(f"{name}.weight")) @ dense(rotation.matrices[0])
    torch.testing.assert_close(turned.get_parameter(f"{name}.bias"), expected, rtol=1e-4, atol=1e-5)


def test_a_layernorm_weight_of_zero_is_refused():
    rotation = plan_rotation(graph_of("phi"))
    parameters = {name: parameter.detach().clone() for name, parameter in module_of("phi").named_parameters()}
    parameters["model.layers.0.input_layernorm.weight"][3] = 0
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.input_layernorm\.weight is 0 at 1 places where its bias is not"):
        rotation.check(parameters.__getitem__)


def test_a_checkpoint_is_turned_under_its_own_names(tmp_path):
    from safetensors.torch import load_file, save_file

    config, architecture = config_of("mixtral")
    save(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kind = getattr(transformers, architecture)
    before = outputs(kind.from_pretrained(tmp_path))
    with torch.device("meta"):
        module = kind(config)
    places = find_places(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    rotation = plan_rotation(graph_of("mixtral"), places)
    made = {name: rotation.tensor(name, tensors.__getitem__).contiguous() for name in rotation.names(tensors)}
    assert set(made) == set(tensors)
    save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert moved(before, outputs(kind.from_pretrained(tmp_path))) < 1e-4


def test_a_tensor_that_stays_is_given_as_it_is_and_others_in_float32():
    rotation = plan_rotation(graph_of("qwen3"))
    parameters = {name: parameter.detach().bfloat16() for name, parameter in module_of("qwen3").named_parameters()}
    name = "model.layers.0.self_attn.q_norm.weight"
    assert rotation.tensor(name, parameters.__getitem__) is parameters[name]
    assert rotation.tensor("model.layers.0.self_attn.q_proj.weight", parameters.__getitem__).dtype == torch.float32


def test_a_basis_that_a_checkpoint_cuts_is_refused():
    end = TurnedEnd(name="fused", axis=-2, expert=None, positions=torch.tensor([[0, 1], [2, 3]]))
    assert _within(end, slice(2, 4)).tolist() == [[0, 1]]
    with pytest.raises(RecipeError, match="the checkpoint cuts a basis of fused into several tensors"):
        _within(end, slice(1, 4))


def test_an_outlier_column_is_spread_and_rounding_loses_less():
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    weight[:, 5] *= 40
    turned = random_hadamard(96, seed=0).turn(weight.double()).float()

    def error(matrix: torch.Tensor) -> float:
        return float((quantize_rtn(matrix, bits=4, group_size=32, symmetric=True).dequantize() - matrix).norm() / matrix.norm())

    assert turned.abs().max() < 0.5 * weight.abs().max()
    assert error(turned) < error(weight)
