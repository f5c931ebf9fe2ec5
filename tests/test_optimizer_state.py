"""Bytes of optimizers against the storages that torch's own optimizers hold and make, on tiny tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes

from lighten.cost.optimizer_state import OPTIMIZERS, scratch_bytes, state_bytes, trained_shapes
from lighten.errors import WorkloadError
from lighten.model.spec import Embedding, Linear, ModelSpec, Norm

MADE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.1, **o),
    "sgd-momentum": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}
"""Those that torch has, with its defaults."""
SHAPES = {
    "matrices and vectors": [(64, 32), (128,), (32, 64), (300,)],
    "a vector first": [(512,), (40, 40)],
    "stacked experts": [(8, 16, 24), (24,), (16, 8)],
    "growing": [(3,), (5, 7), (11, 13), (17, 19, 2), (400,)],
}


def step(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, **options: bool) -> tuple[int, int]:
    """(bytes of the state's storages, most bytes that the second step makes beside it)."""
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = MADE[name](parameters, **options)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    live = LiveBytes()
    with live:
        live.watch([*parameters, *(parameter.grad for parameter in parameters), *kept], "there before")
        before = live.now
        live.start_over()
        optimizer.step()
    return sum(value.untyped_storage().nbytes() for value in kept), max(0, live.peak - before)


def fit(name: str, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if len(shape) == 2] if name == "muon" else shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", MADE)
def test_state_and_scratch_are_torchs_to_the_byte(name, shapes, dtype):
    shapes = fit(name, shapes)
    state, scratch = step(name, shapes, getattr(torch, dtype))
    assert state_bytes(name, shapes, dtype) == state
    assert scratch_bytes(name, shapes, dtype) == scratch


@pytest.mark.parametrize("name", [name for name in MADE if OPTIMIZERS[name].at_once is not None])
def test_an_update_of_all_at_once_makes_so_many_copies_of_all(name):
    shapes = SHAPES["matrices and vectors"]
    assert scratch_bytes(name, shapes, "float32", foreach=True) == step(name, shapes, torch.float32, foreach=True)[1]


def test_muon_leaves_what_is_no_hidden_matrix_to_adamw():
    hidden, others = [(16, 8), (8, 16)], [(100, 8), (8,)]
    expected = state_bytes("muon", hidden, "float32") + state_bytes("adamw", others, "float32")
    assert state_bytes("muon", hidden, "float32", others=others) == expected
    assert state_bytes("muon", [*hidden, (8,)], "float32", others=[(100, 8)]) == expected
    assert scratch_bytes("muon", [(2, 2)], "float32", others=others) == scratch_bytes("adamw", others, "float32")


def test_hidden_matrices_are_linears_between_embedding_and_head():
    parts = (
        Embedding(name="embed", component="embedding", num_embeddings=100, embedding_dim=8),
        Linear(name="layers.0.mlp", component="mlp", in_features=8, out_features=16, bias=True),
        Norm(name="norm", component="norm", size=8, kind="rmsnorm"),
        Linear(name="lm_head", component="head", in_features=8, out_features=100),
    )
    spec = ModelSpec(name="", family="", architecture="", source="", dtype="float32", config={}, parts=parts)
    assert trained_shapes(spec) == ([(16, 8)], [(100, 8), (16,), (8,), (100, 8)])


def test_eight_bits_are_a_byte_a_value_and_a_float_a_block_but_for_small_tensors():
    # bitsandbytes 0.50: Adam8bit's state1, state2, absmax1 and absmax2; two quantization tables of 256 float32 for all tensors
    assert state_bytes("adam8bit", [(64, 64)], "bfloat16") == 2 * (4096 + 4 * 16) + 2048
    assert state_bytes("adam8bit", [(63, 65)], "bfloat16") == 2 * 4 * 4095  # under 4096 elements: 32 bits
    assert state_bytes("adam8bit", [(64, 64), (63, 65), (4097,), (100, 100)], "float32") == 71_778  # summed over its state's storages
    assert state_bytes("adam8bit", [(4097,), (64, 64)], "float32") == 2 * (4097 + 4 * 17) + 2 * (4096 + 4 * 16) + 2048


def test_lion_keeps_one_momentum():
    assert state_bytes("lion", [(4, 8), (8,)], "float32") == 4 * (32 + 8)
    assert scratch_bytes("lion", [(4, 8), (8,)], "float32") == 3 * 4 * 32


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
)
def test_state_is_a_sum_over_tensors_and_scratch_at_least_that_of_each(name, shapes):
    small = [shape for shape in shapes if math.prod(shape) < 4096]  # a shared table is counted once
    assert state_bytes(name, small, "float32") == sum(state_bytes(name, [shape], "float32") for shape in small)
    whole = scratch_bytes(name, shapes, "float32")
    assert all(whole >= scratch_bytes(name, [shape], "float32") for shape in shapes)


def test_an_unknown_optimizer_is_one_line():
    with pytest.raises(WorkloadError, match=r"optimizer 'sophia' is not known; known: adamw, adam, sgd, .*adam8bit\."):
        state_bytes("sophia", [(1,)], "float32")
