"""Decoding with proposals: the text that plain decoding writes, whatever is proposed, and fewer passes where proposals are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from choose_setup import made_up_profile
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import llama_config, save

from lighten.cost import Workload
from lighten.errors import DeviceError, RecipeError, RuntimeUnavailable
from lighten.formats.artifact import write_artifact
from lighten.judge.latency import together
from lighten.model import read_spec
from lighten.recipe import RUNTIMES, apply_recipe, parse_recipe
from lighten.recipe.acceptance import LOOKUP_ACCEPTED, expected_tokens
from lighten.recipe.estimate import estimate
from lighten.recipe.recipe import format_yaml, parse_yaml
from lighten.recipe.speculated import tokens_per_pass
from lighten.runtimes import Setup, open_session
from lighten.runtimes.session import Accepted, Floats, Ids
from lighten.runtimes.speculate import Croppable, DraftModel, PromptLookup, Speculating, followed

VOCABULARY = 12
SPECULATING = [name for name, kind in RUNTIMES.items() if "speculate" in kind.options]


class Chain(Croppable):
    """A model whose next token depends on the last `reach` tokens, by a table; it remembers what it was fed, as a cache does."""

    def __init__(self, reach: int, seed: int) -> None:
        self.reach, self.seed = reach, seed
        self.held = np.zeros((0, 0), np.int64)
        self.known: dict[tuple[int, ...], Floats] = {}

    @property
    def precision(self) -> str:
        return "float32"

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        raise NotImplementedError

    def logits(self, input_ids: Ids) -> Floats:
        return np.array([[self.after(row[: place + 1]) for place in range(len(row))] for row in input_ids], np.float32)

    def after(self, known: Ids) -> Floats:
        newest = tuple(known[-self.reach :].tolist())
        if newest not in self.known:
            self.known[newest] = np.random.default_rng([self.seed, *newest]).normal(size=VOCABULARY).astype(np.float32)
        return self.known[newest]

    def prefill(self, input_ids: Ids) -> Floats:
        self.held = np.zeros((len(input_ids), 0), np.int64)
        return self.decode(input_ids)

    def decode(self, input_ids: Ids) -> Floats:
        return self.verify(input_ids)[:, -1]

    def verify(self, input_ids: Ids) -> Floats:
        start = max(self.held.shape[1] - self.reach, 0)
        self.held = np.concatenate([self.held, input_ids], 1)
        return self.logits(self.held[:, start:])[:, -input_ids.shape[1] :]

    def crop(self, length: int) -> None:
        assert length <= self.held.shape[1], "a cache cannot be made longer"
        self.held = self.held[:, :length]


class Fixed:
    """Proposes the same tokens in every round."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def start(self) -> None:
        """Nothing to forget."""

    def propose(self, known: Ids, count: int) -> Ids:
        return np.tile(np.array(self.tokens[:count], np.int64), (len(known), 1))


def prompts(batch: int, length: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


@given(
    st.integers(0, 50), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 30),
    st.sampled_from(["lookup", "same model", "other model", "fixed"]),
)  # fmt: skip
def test_whatever_is_proposed_the_text_is_that_of_plain_decoding(seed, reach, batch, tokens, new, kind):
    proposer = {
        "lookup": PromptLookup(), "same model": DraftModel(Chain(reach, seed)), "other model": DraftModel(Chain(1, seed + 1)),
        "fixed": Fixed([3, 1] * 3),
    }[kind]  # fmt: skip
    ids = prompts(batch, 5, seed)
    plain = Chain(reach, seed).generate(ids, new).ids
    session = Chain(reach, seed)
    speculating = Speculating(session, proposer, tokens)
    for _ in range(2):  # a second text starts from nothing
        made = speculating.generate(ids, new)
        np.testing.assert_array_equal(made.ids, plain)
    assert made.accepted is not None
    assert made.accepted.tokens == new - 1
    assert 0 <= made.accepted.accepted <= made.accepted.proposed
    assert session.held.shape[1] == 5 + new - 1, "the newest token is in no cache yet, as in plain decoding"


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 3))
def test_a_draft_that_is_the_model_has_everything_accepted(seed, tokens, batch):
    made = Speculating(Chain(2, seed), DraftModel(Chain(2, seed)), tokens).generate(prompts(batch, 4, seed), 31)
    assert made.accepted is not None
    assert made.accepted.accepted == made.accepted.proposed
    assert made.accepted.passes == -(-30 // (tokens + 1))


def test_beyond_its_positions_a_draft_proposes_nothing():
    """It holds 12 positions, the text 34."""

    class Short(Chain):
        def verify(self, input_ids: Ids) -> Floats:
            found = super().verify(input_ids)
            assert self.held.shape[1] <= 12
            return found

    ids = prompts(1, 4)
    made = Speculating(Chain(2, 0), DraftModel(Short(2, 0), 12), 3).generate(ids, 30)
    np.testing.assert_array_equal(made.ids, Chain(2, 0).generate(ids, 30).ids)
    assert made.accepted is not None
    assert 0 < made.accepted.proposed == made.accepted.accepted < 12


def test_a_proposal_that_is_always_wrong_costs_no_more_passes_than_plain():
    """The model never says 11."""

    class Never(Chain):
        def after(self, known: Ids) -> Floats:
            found = super().after(known).copy()
            found[11] = -100
            return found

    session = Never(2, 0)
    made = Speculating(session, Fixed([11, 11, 11]), 3).generate(prompts(1, 4), 20)
    assert made.accepted == Accepted(passes=19, tokens=19, proposed=3 * 16 + 2 + 1, accepted=0)


def test_copies_are_what_followed_the_newest_tokens_at_their_latest_place():
    assert followed(np.array([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]), 2).tolist() == [4, 9]
    assert followed(np.array([7, 1, 2, 3, 8, 2, 3, 6, 1, 2, 3]), 4).tolist() == [8, 2, 3, 6], "three tokens in common go before two"
    assert followed(np.array([5, 5]), 3).tolist() == [5]
    assert followed(np.array([1, 2, 3]), 3).tolist() == []
    assert followed(np.array([1]), 3).tolist() == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6))
def test_a_copy_stands_in_the_text_behind_what_ends_it(tokens, count):
    found = followed(np.array(tokens), count).tolist()
    assert len(found) <= count
    if found:
        assert any(
            tokens[place - 1] == tokens[-1] and tokens[place : place + count] == found for place in range(1, len(tokens))
        )  # fmt: skip
    else:
        assert tokens[-1] not in tokens[:-1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("models")
    return {
        "model": save(llama_config(num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True), work / "model"),
        "draft": save(llama_config(num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True), work / "draft"),
    }


@pytest.mark.parametrize("runtime", SPECULATING)
def test_every_runtime_writes_what_it_writes_without_proposals(runtime, models):
    """By copies and by a draft, for one sequence and several, in float32: where tokens differ, the model finds both as likely but for rounding."""
    folders = {
        name: write_artifact(path, parse_recipe(f"@ {runtime}"), path.parent / f"{name}-{runtime}", calibration=list).folder
        for name, path in models.items()
    }  # fmt: skip
    spec = read_spec(models["model"])
    plain = open_session(runtime, folders["model"], spec, Setup(dtype="float32", threads=1))
    for draft in ("prompt-lookup", f'"{folders["draft"]}"'):
        said = parse_recipe(f"@ {runtime}(speculate={draft}, draft_tokens=3)").speculation
        session = open_session(runtime, folders["model"], spec, Setup(dtype="float32", threads=1, speculation=said))
        for batch in (2, 1):
            ids = np.random.default_rng(batch).integers(5, 320, (batch, 9))
            own, expected = session.generate(ids, 30), plain.generate(ids, 30).ids
            for row, other in zip(*np.nonzero(own.ids != expected), strict=True):
                if (own.ids[row, :other] == expected[row, :other]).all():  # the first: what follows is another text
                    logits = plain.logits(np.concatenate([ids[row], expected[row, :other]])[None])[0, -1]
                    assert logits.max() - logits[own.ids[row, other]] < 1e-4 * np.abs(logits).max()
            assert own.accepted is not None
            assert own.accepted.passes <= own.accepted.tokens == 29
        np.testing.assert_allclose(session.logits(ids), plain.logits(ids), rtol=1e-5, atol=1e-5)


def test_a_draft_for_another_runtime_is_refused(models):
    said = parse_recipe(f'@ openvino(speculate="{models["draft"]}")').speculation
    made = write_artifact(models["model"], parse_recipe("@ openvino"), models["model"].parent / "for-openvino", calibration=list).folder
    with pytest.raises(RuntimeUnavailable, match=r"holds no openvino_model\.xml; compress the model @ openvino\.$"):
        open_session("openvino", made, read_spec(models["model"]), Setup(dtype="float32", threads=1, speculation=said))


def test_options_are_read_from_text_and_yaml_and_written_in_one_order():
    recipe = parse_recipe("@ torch(draft_tokens=3, dtype=bfloat16, speculate=prompt-lookup)")
    assert str(recipe) == "@ torch(dtype=bfloat16, speculate=prompt-lookup, draft_tokens=3)"
    assert parse_recipe(str(recipe)) == recipe == parse_yaml(format_yaml(recipe))
    assert str(parse_recipe('@ torch(speculate="a/b")')) == '@ torch(speculate="a/b")'


MISTAKES = {
    "@ torch(draft_tokens=3)": "runtime torch: draft_tokens=3 has no effect without speculate.",
    "@ torch(speculate=prompt-lookup, draft_tokens=0)":
        "runtime torch: draft_tokens=0 is not possible; draft_tokens is a number of tokens from 1 to 16.",
    "@ torch(speculate=2)": "runtime torch: speculate=2 is not possible; speculate is prompt-lookup, or the folder of a draft model.",
    "@ ctranslate2(speculate=prompt-lookup)": "runtime ctranslate2: no option speculate; options: dtype, device, batching.",
    "@ llama.cpp(speculate=prompt-lookup)": "runtime llama.cpp: no option speculate; options: dtype, device.",
    '@ torch(speculate="no/such")': "speculate=no/such: no such folder; it is prompt-lookup, or the folder of a draft model.",
    "quantize(kv, bits=8) @ torch(speculate=prompt-lookup)":
        "speculate=prompt-lookup cuts the cache back, which quantize(kv)'s cannot be; leave one of them out.",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_what_cannot_be_is_said_when_the_recipe_is_checked(text, models):
    with pytest.raises(RecipeError) as found:
        apply_recipe(parse_recipe(text), read_spec(models["model"]))
    assert str(found.value) == MISTAKES[text]


def test_a_draft_has_to_be_a_smaller_decoder_of_the_same_tokens(models, tmp_path):
    from tiny_models import bert_config

    spec = read_spec(models["model"])

    def refused(folder: Path) -> str:
        with pytest.raises(RecipeError) as found:
            apply_recipe(parse_recipe(f'@ torch(speculate="{folder}")'), spec)
        return str(found.value)

    assert "is no decoder alone; a draft has to be one." in refused(save(bert_config(), tmp_path / "bert"))
    assert "is no smaller than model" in refused(models["model"])
    other = save(llama_config(num_hidden_layers=1, vocab_size=200, num_key_value_heads=2), tmp_path / "other")
    assert refused(other) == f"speculate={other} has 200 tokens, model has 320; a draft has to have the model's vocabulary."
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert refused(tmp_path / "broken").startswith(f"speculate={tmp_path / 'broken'}: ")


def test_windows_and_encoders_are_refused(tmp_path, models):
    windowed = save(llama_config(), tmp_path / "windowed")
    config = json.loads((windowed / "config.json").read_text()) | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 8,
    }
    (windowed / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="which that of windowed cannot be: it has sliding windows or states"):
        apply_recipe(parse_recipe("@ torch(speculate=prompt-lookup)"), read_spec(windowed))


def test_phases_that_do_not_decode_and_published_devices_are_refused(models):
    from lighten.device.find import find_place

    spec, recipe = read_spec(models["model"]), parse_recipe("@ torch(speculate=prompt-lookup)")
    said = r"^speculate=prompt-lookup has no effect in phase prefill; it has one in: decode, generate \(--new-tokens N\)\.$"
    with pytest.raises(RecipeError, match=said):
        estimate(spec, Workload(phase="prefill"), recipe=recipe)
    with pytest.raises(DeviceError, match=r"^torch\(speculate=prompt-lookup\) is timed on this machine alone"):
        estimate(spec, Workload(phase="decode", new_tokens=4), recipe=recipe, device=find_place("h100-sxm")[0])


def test_predicted_rounds_are_the_papers(models):
    """With nothing accepted every token takes a round; a batch goes on by what all accept; time follows the rounds."""
    said = parse_recipe("@ torch(speculate=prompt-lookup, draft_tokens=4)").speculation
    assert said is not None
    assert tokens_per_pass(said, 1) == tuple(expected_tokens(accepted, 4) for accepted in LOOKUP_ACCEPTED)
    assert tokens_per_pass(said, 1)[0] == 1.0
    assert all(several <= one for several, one in zip(tokens_per_pass(said, 4), tokens_per_pass(said, 1), strict=True))


def test_a_prediction_says_what_it_assumes_and_its_range_holds_both_ends(models):
    spec, profile = read_spec(models["model"]), made_up_profile()
    asked = Workload(phase="decode", seq_len=16, new_tokens=32)
    plain = estimate(spec, asked, device=profile).time
    found = estimate(spec, asked, recipe=parse_recipe("@ torch(speculate=prompt-lookup)"), device=profile)
    drafted = estimate(spec, asked, recipe=parse_recipe(f'@ torch(speculate="{models["draft"]}")'), device=profile)
    assert plain is not None
    assert found.time is not None
    assert drafted.time is not None
    assert found.time.low < found.time.seconds < found.time.high
    assert found.time.high > plain.seconds, "nothing may be accepted"
    assert any("40% of proposals are taken to be accepted, 0% to 80%" in line for line in found.assumptions)
    assert any("70% of proposals are taken to be accepted" in line for line in drafted.assumptions)
    assert drafted.process_bytes > found.process_bytes, "the draft's weights are in the process"


def test_several_runs_count_as_one():
    one, other = Accepted(passes=3, tokens=9, proposed=12, accepted=6), Accepted(passes=2, tokens=2, proposed=1, accepted=0)
    assert together([one, other]) == Accepted(passes=5, tokens=11, proposed=13, accepted=6)
    assert together([]) is None
