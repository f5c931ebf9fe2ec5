"""Batches of texts of different lengths: every text once, in whatever batch; what comes out as one text at a time gives it, in the texts' order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import bert_config, save

from lighten.cost import Workload
from lighten.errors import DeviceError, RecipeError, WorkloadError
from lighten.formats.artifact import write_artifact
from lighten.model import read_spec
from lighten.recipe import apply_recipe, parse_recipe
from lighten.recipe.batching import BUCKET, dense_workloads, make_batches
from lighten.recipe.estimate import estimate
from lighten.recipe.options import BATCHINGS
from lighten.runtimes import Setup, open_session
from lighten.runtimes.batching import encode_texts

lengths = st.lists(st.integers(1, 128), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(bert_config(num_hidden_layers=2), tmp_path_factory.mktemp("bert"))


@given(lengths, st.integers(1, 9), st.sampled_from(BATCHINGS))
def test_every_text_is_in_one_batch_that_holds_it(found, size, batching):
    batches = make_batches(found, size, batching)
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(found)))
    for batch in batches:
        assert 1 <= len(batch.places) <= batch.rows <= size
        assert batch.width >= max(found[place] for place in batch.places)


@given(lengths, st.integers(1, 9))
@example(found=[2, 2, 1], size=2)
def test_sorting_computes_no_more_positions_than_any_order(found, size):
    """Against every batch of the texts' own order; and no less than the tokens that there are."""

    def positions(batching):
        return sum(batch.rows * batch.width for batch in make_batches(found, size, batching))

    assert sum(found) <= positions("sorted") <= positions("padded")


@given(lengths, st.integers(1, 9))
def test_buckets_have_few_shapes_and_full_rows(found, size):
    batches = make_batches(found, size, "bucketed", most=100)
    assert all(batch.rows == size for batch in batches)
    assert all(batch.width % BUCKET == 0 or batch.width == 100 for batch in batches)
    assert len({(batch.rows, batch.width) for batch in batches}) <= 4


def test_padded_keeps_the_order_of_the_texts():
    assert [batch.places for batch in make_batches([3, 9, 4], 2)] == [(0, 1), (2,)]
    assert [batch.width for batch in make_batches([3, 9, 4], 2)] == [9, 4]


@pytest.mark.parametrize("runtime", ["torch", "openvino", "onnxruntime"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_states_are_those_of_one_text_at_a_time_in_the_order_of_the_texts(runtime, batching, bert, tmp_path_factory):
    folder = bert.parent / f"artifact-{runtime}"
    if not folder.exists():
        write_artifact(bert, parse_recipe(f"@ {runtime}"), folder, calibration=list, exports=bert.parent / "exports")
    spec = read_spec(bert)
    session = open_session(runtime, folder, spec, Setup(dtype="float32", threads=1))
    random = np.random.default_rng(0)
    texts = [random.integers(5, 320, length) for length in (7, 2, 40, 7, 33, 1, 12)]
    found = encode_texts(session, texts, batch_size=3, batching=batching, most=spec.max_positions)
    for text, states in zip(texts, found, strict=True):
        alone = session.encode(text[None], np.ones((1, len(text)), np.int64))[0]
        assert states.shape == alone.shape
        np.testing.assert_allclose(states, alone, atol=2e-5)


def test_a_workload_of_lengths_is_the_sum_of_its_batches(bert):
    """FLOPs of each way by hand from workloads of one shape; tokens count no padding."""
    spec, asked = read_spec(bert), Workload(phase="encode", batch_size=2, seq_len=64, lengths=(5, 60, 7, 50))
    assert asked.tokens == 122

    def flops(*widths):
        return sum(estimate(spec, Workload(phase="encode", batch_size=2, seq_len=width)).total_flops for width in widths)

    assert estimate(spec, asked).total_flops == flops(60, 50)
    assert estimate(spec, asked, recipe=parse_recipe("@ torch(batching=sorted)")).total_flops == flops(60, 7)
    assert estimate(spec, asked, recipe=parse_recipe("@ torch(batching=bucketed)")).total_flops == flops(64, 32)
    assert estimate(spec, asked).memory == estimate(spec, Workload(phase="encode", batch_size=2, seq_len=60)).memory
    assert estimate(spec, asked).mfu is None


def test_a_workload_of_one_length_is_itself():
    asked = Workload(phase="encode", batch_size=4, seq_len=9)
    assert dense_workloads(asked, "sorted") == {asked: 1}


def test_what_cannot_be_is_said_in_one_line(bert):
    spec = read_spec(bert)
    plain = Workload(phase="encode", batch_size=2, seq_len=64)
    with pytest.raises(RecipeError, match=r"^batching=sorted has no effect where all texts have one length; measure with --lengths text\.$"):
        estimate(spec, plain, recipe=parse_recipe("@ torch(batching=sorted)"))
    with pytest.raises(RecipeError, match=r"^runtime torch: batching='longest' is not possible; batching is one of padded, sorted, bucketed\.$"):
        parse_recipe("@ torch(batching=longest)")
    with pytest.raises(RecipeError, match=r"^runtime llama\.cpp: no option batching; options: dtype, device\.$"):
        parse_recipe("@ llama.cpp(batching=sorted)")
    with pytest.raises(WorkloadError, match=r"^lengths from 3 to 65: each text has 1 to seq_len=64 tokens\.$"):
        Workload(phase="encode", seq_len=64, lengths=(3, 65))
    with pytest.raises(WorkloadError, match="has no effect in phase prefill; it has one in: encode"):
        Workload(phase="prefill", seq_len=64, lengths=(3,))


def test_a_decoder_has_no_batches_of_texts(tmp_path):
    from tiny_models import llama_config

    spec = read_spec(save(llama_config(), tmp_path / "llama"))
    with pytest.raises(RecipeError, match=r"^batching=sorted is of encoders; llama writes text, and a batch of prompts has one length\.$"):
        apply_recipe(parse_recipe("@ torch(batching=sorted)"), spec)


def test_devices_of_published_figures_refuse_lengths(bert):
    from lighten.device.find import find_place

    device, _ = find_place("h100-sxm")
    asked = Workload(phase="encode", batch_size=2, seq_len=64, lengths=(5, 6), dtype="float32")
    with pytest.raises(DeviceError, match=r"^lengths of texts is timed on this machine alone \(--device this\)"):
        estimate(read_spec(bert), asked, device=device)
