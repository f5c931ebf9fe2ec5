"""shrink(vocab): tokenizers of three kinds cut to exactly so many tokens, and models that answer at those as they did before.

Oracles: the `tokenizers` library, which reads what is written and cuts texts; the original model's logits.

Faults put in by hand, each caught: a token of BPE kept without those that lead to it; merges that make a token that is gone; ids of a post-processor
left as they were; a head's bias not sliced; marks of a config left at their old ids; calibration text left in old ids; a teacher that is given new
ids; its logits compared with those of other tokens.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bert_config, byte_pairs, llama_config, save
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lighten.compress.vocabulary import Vocabulary, choose_kept, cut_tokenizer, read_vocabulary, respelled
from lighten.errors import LightenError, RecipeError
from lighten.formats.artifact import Work, read_artifact, write_artifact
from lighten.model.read import read_config
from lighten.model.source import read_spec
from lighten.model.spec import Embedding, Linear
from lighten.recipe import apply_recipe, parse_recipe
from lighten.recipe.size import artifact_size

MODELS = Path(__file__).parent.parent / ".models"
PROSE = [topics[name] for name in ("assert", "booleans", "break", "continue", "while", "lists", "numbers", "strings")]


@cache
def unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(PROSE, trainer)
    return str(tokenizer.to_str())


@cache
def vocabulary(name: str) -> Vocabulary:
    if name == "unigram":
        said = json.loads(unigram())
        return Vocabulary(said=said, size=len(said["model"]["vocab"]), special=frozenset({0}))
    return read_vocabulary(MODELS / name, read_config(MODELS / name))


@cache
def tokenizer_of(text: str) -> Any:
    made = Tokenizer.from_str(text)
    made.no_padding()
    made.no_truncation()
    return made


def counted(name: str, texts: list[str]) -> np.ndarray[Any, Any]:
    ids = [each for text in texts for each in tokenizer_of(json.dumps(vocabulary(name).said)).encode(text).ids]
    return np.bincount(ids, minlength=vocabulary(name).size)


KEEP = {"minilm": 4000, "smollm2-135m-offgrid": 3000, "unigram": 200}


@cache
def cut(name: str) -> tuple[Any, Any, dict[int, int]]:
    """The tokenizer before, after, and old ids → new ones."""
    found = vocabulary(name)
    kept = choose_kept(found, counted(name, PROSE), KEEP[name])
    new = {old: place for place, old in enumerate(kept)}
    return tokenizer_of(json.dumps(found.said)), tokenizer_of(json.dumps(cut_tokenizer(found.said, new))), new


# ---- which tokens ----


@pytest.mark.parametrize("name", KEEP)
def test_exactly_so_many_tokens_stay_and_new_ids_have_no_gap(name: str) -> None:
    before, after, new = cut(name)
    assert len(new) == KEEP[name] == after.get_vocab_size()
    assert sorted(after.get_vocab().values()) == list(range(KEEP[name]))
    assert all(after.id_to_token(place) == before.id_to_token(old) for old, place in new.items())


@pytest.mark.parametrize("name", KEEP)
def test_what_must_stay_stays_and_the_most_used_come_first(name: str) -> None:
    found, counts = vocabulary(name), counted(name, PROSE)
    _, _, new = cut(name)
    assert found.required <= new.keys()
    if name != "unigram":
        assert all(int(added["id"]) in new for added in found.said["added_tokens"])
    lost = [place for place in range(found.size) if place not in new and counts[place]]
    used = [place for place in new if place not in found.required and counts[place]]
    if lost and name != "smollm2-135m-offgrid":  # of BPE a token may bring others with it
        assert max(counts[lost]) <= min(counts[used])


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), extra=st.integers(0, 300))
def test_kept_tokens_of_bpe_are_closed_under_the_merges_that_make_them(seed: int, extra: int) -> None:
    found = vocabulary("smollm2-135m-offgrid")
    counts = np.random.default_rng(seed).integers(0, 3, found.size)
    counts[np.random.default_rng(seed).random(found.size) < 0.99] = 0
    kept = set(choose_kept(found, counts, len(found.required) + extra))
    assert len(kept) == len(found.required) + extra
    tokens = {place: token for token, place in found.ids.items()}
    names = frozenset(tokens[place] for place in kept if place in tokens)
    for place in kept - found.required:
        pieces, _ = found.spelled(tokens[place], names)
        assert pieces == [tokens[place]]


# ---- texts ----

pieces_of_text = st.lists(
    st.sampled_from([*" ".join(PROSE[:3]).split(" ")[:400], "naïve", "日本語", "🙂", "\t", "Ωmega", "don't", "x_1"]), max_size=30
)


@pytest.mark.parametrize("name", KEEP)
@settings(max_examples=40)
@given(words=pieces_of_text)
def test_a_text_whose_tokens_all_stay_is_cut_as_before(name: str, words: list[str]) -> None:
    before, after, new = cut(name)
    for text in (" ".join(words), *words):
        ids = before.encode(text).ids
        if all(each in new for each in ids):
            assert after.encode(text).ids == [new[each] for each in ids]


@settings(max_examples=60)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_bytes(text: str) -> None:
    """As it came back before, where a tokenizer lacks some bytes itself, as SmolLM2's does."""
    before, after, _ = cut("smollm2-135m-offgrid")
    found, expected = (each.decode(each.encode(text).ids, skip_special_tokens=False) for each in (after, before))
    assert found == expected
    said = json.loads(byte_pairs().to_str())
    whole = Vocabulary(said=said, size=len(said["model"]["vocab"]), special=frozenset())
    kept = {old: place for place, old in enumerate(sorted(whole.required))}
    bytes_alone = tokenizer_of(json.dumps(cut_tokenizer(said, kept)))
    assert bytes_alone.decode(bytes_alone.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", KEEP)
def test_a_token_that_is_gone_is_spelled_by_those_that_stay(name: str) -> None:
    before, after, new = cut(name)
    found = vocabulary(name)
    spelled = respelled(found, new)
    gone = [place for place in found.ids.values() if place not in new][:500]
    assert gone
    for place in gone:
        text = before.id_to_token(place)
        plain = "".join(after.id_to_token(each).removeprefix("##") for each in spelled[place])
        assert plain == text.removeprefix("##")


# ---- models ----


def windows(tokens: int) -> list[dict[str, Any]]:
    return [{"input_ids": np.random.default_rng(3).integers(5, 300, (4, 16))}]


def compress(model: Path, recipe: str, out: Path, **work: Any) -> Path:
    write_artifact(model, parse_recipe(recipe), out, calibration=list, work=Work(windows=windows, **work))
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return {
        "llama": save(llama_config(**marks), root / "llama"),
        "untied": save(llama_config(tie_word_embeddings=False, dtype="bfloat16", **marks), root / "untied"),
        "bert": save(bert_config(), root / "bert"),
        "masked": save(bert_config("BertForMaskedLM"), root / "masked"),
    }


@pytest.mark.parametrize("name", ["llama", "untied", "bert", "masked"])
def test_the_result_loads_by_transformers_and_answers_at_kept_tokens_as_before(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = compress(folders[name], "shrink(vocab, keep=300)", tmp_path / "out")
    before = read_vocabulary(folders[name], read_config(folders[name]))
    after = read_vocabulary(folder, read_config(folder))
    assert (after.size, len(after.ids | {each["content"]: each["id"] for each in after.said["added_tokens"]})) == (300, 300)
    old = [before.ids[token] for token, _ in sorted(after.ids.items(), key=lambda each: each[1])]
    kind = getattr(transformers, read_spec(folders[name]).architecture)
    original = kind.from_pretrained(folders[name])
    loaded, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    new_ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = original(torch.tensor(old)[new_ids])[0], loaded(new_ids)[0]
    assert torch.equal(found, expected if name == "bert" else expected[..., old])
    text = "While the list is empty, assert nothing"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 300
    assert tokenizer.decode(ids, skip_special_tokens=True).lower().replace(" ", "").replace("##", "") == text.lower().replace(" ", "")


@pytest.mark.parametrize("name", ["llama", "untied", "bert", "masked"])
@pytest.mark.parametrize(
    "recipe", ["shrink(vocab, keep=301)", "shrink(vocab, ratio=0.1)", "shrink(vocab, keep=300) | quantize(rtn, embeddings=true)"]
)
def test_rows_are_predicted_exactly(folders: dict[str, Path], tmp_path: Path, name: str, recipe: str) -> None:
    folder = compress(folders[name], recipe, tmp_path / "out")
    predicted, read = apply_recipe(parse_recipe(recipe), read_spec(folders[name])), read_spec(folder)
    rows = 301 if "301" in recipe else 288 if "ratio" in recipe else 300
    assert read.config["vocab_size"] == predicted.config["vocab_size"] == rows
    assert {part.num_embeddings for part in read.parts if (isinstance(part, Embedding) and "word" in part.name) or "tokens" in part.name} == {rows}
    assert [part.tensors() for part in read.parts] == [part.tensors() for part in predicted.parts]
    assert (read.total_parameters, read.weight_bytes()) == (predicted.total_parameters, predicted.weight_bytes())
    before = sum(path.stat().st_size for path in folders[name].glob("tokenizer*"))
    assert 0 <= artifact_size(predicted, "torch") - read_artifact(folder).size_bytes + 2_000 < before  # tokenizers are counted whole


def test_marks_have_new_ids_everywhere(folders: dict[str, Path], tmp_path: Path) -> None:
    """Marks at the end of the vocabulary, as Llama 3 has them, move."""
    model = save(llama_config(bos_token_id=318, eos_token_id=[319, 317], pad_token_id=319), tmp_path / "model")
    folder = compress(model, "shrink(vocab, keep=280)", tmp_path / "out")
    before, after = (read_vocabulary(each, read_config(each)) for each in (model, folder))
    names = {place: token for token, place in before.ids.items()}
    for place in (folder / "config.json", folder / "generation_config.json"):
        said = json.loads(place.read_text())
        assert said["bos_token_id"] == after.ids[names[318]]
        assert said["eos_token_id"] == [after.ids[names[319]], after.ids[names[317]]]
        assert said["pad_token_id"] == after.ids[names[319]]


def test_a_post_processor_and_padding_have_new_ids() -> None:
    said = json.loads(json.dumps(vocabulary("minilm").said))
    new = {old: place for place, old in enumerate(sorted(vocabulary("minilm").required))}
    made = cut_tokenizer(said, new)
    assert made["post_processor"]["special_tokens"]["[CLS]"]["ids"] == [new[101]] != [101]
    assert made["padding"]["pad_id"] == new[0]
    assert [each["id"] for each in made["added_tokens"]] == [new[each["id"]] for each in said["added_tokens"]]
    said["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}
    made = cut_tokenizer(said, new)["post_processor"]
    assert made == {"type": "BertProcessing", "sep": ["[SEP]", new[102]], "cls": ["[CLS]", new[101]]}


def test_files_that_say_the_vocabulary_again_say_the_new_one(tmp_path: Path) -> None:
    model = save(bert_config(), tmp_path / "model")
    tokens = sorted(read_vocabulary(model, read_config(model)).ids.items(), key=lambda each: each[1])
    (model / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens))
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    folder = compress(model, "shrink(vocab, keep=300)", tmp_path / "out")
    after = read_vocabulary(folder, read_config(folder))
    assert (folder / "vocab.txt").read_text().splitlines() == [token for token, _ in sorted(after.ids.items(), key=lambda each: each[1])]
    assert not (folder / "tokenizer.model").exists()


def test_later_steps_calibrate_on_the_new_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = compress(folders["llama"], "shrink(vocab, keep=280) | quantize(gptq, bits=4, group_size=16)", tmp_path / "out")
    spec = read_spec(folder)
    assert all(part.weight.bits == 4 for part in spec.parts if isinstance(part, Linear) and part.component != "head")
    assert spec.config["vocab_size"] == 280


SHORT = "steps=2, tokens=256, batch_tokens=32"


@pytest.mark.parametrize(
    ("name", "architecture", "step"),
    [
        ("llama", "LlamaForCausalLM", f"distill(logits, {SHORT})"),
        ("llama", "LlamaForCausalLM", f"distill(logits, {SHORT}, hidden=1, attention=1, temperature=2)"),
        ("llama", "LlamaForCausalLM", f"distill(logits, {SHORT}, top_k=300)"),
        ("llama", "LlamaForCausalLM", f"distill(logits, {SHORT}, top_k=5, self_tokens=64)"),
        ("bert", "BertForMaskedLM", f"distill(logits, {SHORT})"),
        ("bert", "BertForSequenceClassification", f"distill(logits, {SHORT})"),
        ("bert", "BertModel", f"distill(embeddings, {SHORT}, hidden=1)"),
    ],
)
def test_a_cut_vocabulary_alone_is_no_distance_from_the_original(tmp_path: Path, name: str, architecture: str, step: str) -> None:
    """The original's distribution among the tokens that stay is what the cut model gives; its states are the same."""
    model = save(llama_config() if name == "llama" else bert_config(architecture), tmp_path / "model")
    said = losses(model, f"shrink(vocab, keep=280) | {step}", tmp_path / "out")
    assert said["held_out"][0] == pytest.approx(0, abs=1e-6)
    assert not said["kept"]
    assert all(abs(loss) < 1e-4 for _, _, loss in said["curve"][:1])


@pytest.mark.parametrize("step", ["logits", "embeddings"])
def test_a_model_of_fewer_tokens_learns_from_one_of_all(folders: dict[str, Path], tmp_path: Path, step: str) -> None:
    name = "llama" if step == "logits" else "bert"
    text = f"shrink(vocab, keep=280) | prune(magnitude, sparsity=0.5) | distill({step}, steps=12, learning_rate=0.003, tokens=256, batch_tokens=64)"
    said = losses(folders[name], f"{text} | quantize(rtn)", tmp_path / "out")
    assert said["kept"]
    assert said["held_out"][1] < 0.9 * said["held_out"][0]


def test_codes_of_a_cut_vocabulary_are_tuned_against_the_model_that_was_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    for number, text in enumerate(
        ("shrink(vocab, keep=280) | quantize(rtn, bits=3, group_size=16)", "quantize(rtn, bits=3, group_size=16) | shrink(vocab, keep=280)")
    ):
        said: list[str] = []
        compress(folders["llama"], f"{text} | distill(scales, steps=4, tokens=256, self_tokens=64)", tmp_path / str(number), log=said.append)
        assert read_spec(tmp_path / str(number)).config["vocab_size"] == 280
        assert any("the original writes" in line for line in said)


def losses(model: Path, text: str, out: Path) -> dict[str, Any]:
    """What the manifest says of a recipe's training."""
    compress(model, text, out)
    found: dict[str, Any] = json.loads((out / "lighten.json").read_text())["curves"][0]
    return found


def test_a_graph_of_fewer_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = compress(folders["bert"], "shrink(vocab, keep=300) @ onnxruntime", tmp_path / "out")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[299, 1, 2]])
    assert session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0].shape == (1, 3, 32)
    assert read_config(folder)["vocab_size"] == 300


# ---- what is refused, in one line ----


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("llama", "shrink(vocab)", "give exactly one of keep and ratio; given: none"),
        ("llama", "shrink(vocab, keep=9, ratio=0.5)", "give exactly one of keep and ratio; given: keep, ratio"),
        ("llama", "shrink(vocab, keep=320)", "has 320 tokens, and 320 are to stay; keep fewer"),
        ("llama", "shrink(vocab, keep=100)", "100 tokens are to stay, and 258 must"),
        ("llama", "quantize(rtn, embeddings=true) | shrink(vocab, keep=300)", "is already quantized to 8 bits"),
        ("llama", "shrink(vocab, keep=300) | shrink(vocab, keep=290)", "the original has other tokens"),
        ("llama", "shrink(vocab, keep=300) @ llama.cpp", "lighten export --to gguf"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(folders: dict[str, Path], tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compress(folders[name], text, tmp_path / "out")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (None, "has no tokenizer.json"), ({"type": "WordLevel", "vocab": {}}, "of type WordLevel"),
        ({"type": "BPE", "continuing_subword_prefix": "##"}, "prefix"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_cut_is_said(tmp_path: Path, model: Any, says: str) -> None:
    folder = save(llama_config(), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    if model is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(LightenError, match=says) as caught:
        compress(folder, "shrink(vocab, keep=300)", tmp_path / "out")
    assert "\n" not in str(caught.value)
