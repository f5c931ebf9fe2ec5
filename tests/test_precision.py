"""Mixed precision and the ways of taking a loss, against the storages that live in torch while it does that."""

from __future__ import annotations

import math

import pytest
import torch
from live_bytes import LiveBytes
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lighten.cost.cross_entropy import CHUNKS, loss_bytes
from lighten.cost.optimizer_state import state_bytes
from lighten.cost.precision import cast_bytes, parameter_bytes
from lighten.errors import WorkloadError
from lighten.model.spec import Embedding, Linear, ModelSpec, Norm

SCALARS = 64
"""Bytes of losses, weights' sums and the like, which no formula counts."""


def test_adam_in_float16_takes_16_bytes_a_parameter_as_zero_says():
    # arXiv:1910.02054, section 3.1: 1.5 billion parameters of GPT-2 take at least 24 GB
    found = parameter_bytes("master", "adam", [(1500, 10**6)], "float16")
    assert (found.weights, found.gradients, found.master + found.optimizer - 4) == (3 * 10**9, 3 * 10**9, 18 * 10**9)
    assert found.total - 4 == 24 * 10**9


def test_megatron_adds_gradients_up_in_float32():
    # 18 bytes a parameter: NVIDIA/Megatron-LM, docs/source/api-guide/dist_optimizer.md, bf16 parameters and fp32 gradients, not distributed
    found = parameter_bytes("master", "adamw", [(100, 100)], "bfloat16", gradient_dtype="float32")
    assert found.total == 18 * 100**2 + 4


def test_pure_is_one_type_for_all():
    found = parameter_bytes("pure", "adamw", [(10, 10)], "bfloat16")
    assert (found.weights, found.gradients, found.master, found.optimizer) == (200, 200, 0, 404)


def test_autocast_keeps_all_in_float32():
    found = parameter_bytes("autocast", "sgd-momentum", [(8, 4), (8,), (4,)], "bfloat16")
    assert (found.weights, found.gradients, found.optimizer, found.master) == (176, 176, 176, 0)


def test_the_casts_are_those_that_torch_keeps():
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 24), torch.nn.Linear(24, 100, bias=False))
    spec = ModelSpec(
        name="", family="", architecture="", source="", dtype="float32", config={},
        parts=(
            Linear(name="0", component="mlp", in_features=24, out_features=40, bias=True),
            Norm(name="1", component="norm", size=40, kind="layernorm"),
            Linear(name="2", component="mlp", in_features=40, out_features=24, bias=True),
            Linear(name="3", component="head", in_features=24, out_features=100),
        ),
    )  # fmt: skip
    x = torch.randn(2, 24)
    live = LiveBytes()
    with live:
        live.watch([*model.parameters(), x], "there before")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _out = model(x)
            weights = {tuple(parameter.shape) for parameter in model.parameters()}
            kept = sum(size for size, label, shape in live._live.values() if "_to_copy" in label and shape in weights)
    found = parameter_bytes("autocast", "adamw", [tuple(p.shape) for p in model.parameters()], "bfloat16")
    assert cast_bytes(spec, "bfloat16") == kept
    assert found.weights == sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def test_a_tied_head_is_cast_though_it_has_no_weight_of_its_own():
    table = Embedding(name="embed", component="embedding", num_embeddings=100, embedding_dim=8)
    head = Linear(name="lm_head", component="head", in_features=8, out_features=100, tied_to="embed")
    spec = ModelSpec(name="", family="", architecture="", source="", dtype="float32", config={}, parts=(table, head))
    assert cast_bytes(spec, "float16") == 2 * 800


def test_muons_rest_keeps_its_own_optimizer_in_float32():
    found = parameter_bytes("master", "muon", [(8, 8)], "bfloat16", others=[(100, 8)])
    assert found.optimizer == state_bytes("muon", [(8, 8)], "float32", others=[(100, 8)]) == 4 * 64 + 8 * 800 + 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp16"}, "precision 'fp16' is not known; known: pure, autocast, master"),
        ({"precision": "master", "dtype": "float32"}, "precision master has no effect with dtype=float32"),
        ({"precision": "autocast", "gradient_dtype": "bfloat16"}, "gradient_dtype=bfloat16 cannot be with precision autocast"),
    ],
)
def test_what_cannot_be_is_one_line(options, text):
    given = {"precision": "pure", "optimizer": "adamw", "shapes": [(1,)], "dtype": "bfloat16"} | options
    with pytest.raises(WorkloadError, match=text):
        parameter_bytes(**given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_cross_entropy_is_torchs(dtype):
    rows, vocab = 40, 300
    logits = torch.randn(rows, vocab, dtype=getattr(torch, dtype), requires_grad=True)
    live = LiveBytes()
    with live:
        live.watch([logits], "logits")
        targets = torch.zeros(rows, dtype=torch.long)
        others = live.now - logits.untyped_storage().nbytes()
        loss = functional.cross_entropy(logits.float(), targets)
        forward, saved = live.peak - others, live.now - others - logits.untyped_storage().nbytes()
        live.start_over()
        loss.backward()
        backward = live.peak - others - logits.untyped_storage().nbytes()
    found = loss_bytes("full", rows=rows, vocab_size=vocab, hidden_size=8, dtype=dtype)
    assert 0 <= forward - found.forward <= SCALARS
    assert 0 <= saved - found.saved <= SCALARS
    assert 0 <= backward - found.backward <= SCALARS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunked_cross_entropy_is_a_checkpoint_around_each_chunk(dtype):
    rows, vocab, width = 64, 2000, 4
    hidden = torch.randn(rows, width, dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.randn(vocab, width, dtype=getattr(torch, dtype))
    targets = torch.zeros(rows, dtype=torch.long)

    def loss_of(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(part, weight).float(), target, reduction="sum")

    live = LiveBytes()
    with live:
        live.watch([hidden, weight, targets], "there before")
        before = live.now
        parts = zip(hidden.chunk(CHUNKS), targets.chunk(CHUNKS), strict=True)
        loss = sum((checkpoint(loss_of, part, target, use_reentrant=False) for part, target in parts), torch.zeros(()))
        forward, saved = live.peak - before, live.now - before
        live.start_over()
        loss.backward()
        backward = live.peak - before
    found = loss_bytes("chunked", rows=rows, vocab_size=vocab, hidden_size=width, dtype=dtype)
    assert found.rows_at_once == 8
    room = 4 * rows * width + 1024  # the hidden state's gradient, losses, the generator's state
    assert saved <= room
    assert forward == pytest.approx(found.forward, abs=room)
    assert backward == pytest.approx(found.backward, abs=room)


def test_a_fused_cross_entropy_has_few_logits_and_makes_the_gradients_at_once():
    # arXiv:2410.10989, section 3.2: chunks of 2^ceil(log2(ceil(BT / ceil(V / H)))) rows; BT = 4 x 4096, V = 32000, H = 4096 gives 2048 rows
    found = loss_bytes("fused", rows=4 * 4096, vocab_size=32_000, hidden_size=4096, dtype="bfloat16")
    assert found.rows_at_once == 2048
    assert found.saved == 2 * 4096 * (4 * 4096 + 32_000)
    assert found.forward == 2 * 2048 * 32_000 + found.saved + 4 * 4 * 4096
    assert found.forward < loss_bytes("full", rows=4 * 4096, vocab_size=32_000, hidden_size=4096, dtype="bfloat16").forward / 6


@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 10, 10), (7, 100, 3), (1000, 17, 64), (3, 1, 1)])
def test_no_chunk_is_larger_than_the_whole(rows, vocab, hidden):
    for kind in ("chunked", "fused"):
        assert 1 <= loss_bytes(kind, rows=rows, vocab_size=vocab, hidden_size=hidden, dtype="float16").rows_at_once <= rows
    assert loss_bytes("chunked", rows=rows, vocab_size=vocab, hidden_size=hidden, dtype="float16").rows_at_once == math.ceil(rows / CHUNKS)


def test_an_unknown_kind_is_one_line():
    with pytest.raises(WorkloadError, match="cross_entropy='cut' is not known; known: full, chunked, fused"):
        loss_bytes("cut", rows=1, vocab_size=1, hidden_size=1, dtype="float32")
