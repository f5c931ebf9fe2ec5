"""shrink(vocab): which tokens stay, and the tokenizer, config and weights without the others.

What can be spelled can be spelled still: special and added tokens stay, and all single bytes or characters. Then the tokens that the calibration
text uses most, then the lowest ids. A text whose tokens all stay is cut into the same tokens as before:

- WordPiece takes the longest piece that is known at each place, and no longer one is new (Devlin et al. 2018, arXiv:1810.04805; Schuster and
  Nakajima 2012).
- BPE applies the earliest known merge again and again. With a token stay the tokens that lead to it, so every merge that made it is there, and no
  other is earlier than before (Sennrich et al. 2015, arXiv:1508.07909).
- Unigram takes the most probable cut, which is there still, and no other is new (Kudo 2018, arXiv:1804.10959).

New ids are in the order of the old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lighten.compress.grid import Weight
from lighten.compress.stage import Changed, Stage
from lighten.compress.walk import Job, Run, word_inputs
from lighten.errors import RecipeError
from lighten.model.read import parse_config
from lighten.model.spec import ModelSpec
from lighten.recipe.vocabulary import kept_rows, sliced_tensors

KINDS = ("WordPiece", "BPE", "Unigram")
TOKENIZER = "tokenizer.json"
STALE = ("tokenizer.model",)
"""Files that say the whole vocabulary again in a form that is not written here; tokenizer.json says all that they do, so they are left out."""
KEPT = "vocabulary"
UNUSED = re.compile(r"\[unused\d+\]")
"""What BERT calls the tokens that no text gives, which go first with the rows that have no token. Source: its vocab.txt."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A model's tokens, as its tokenizer.json and its config have them.

    Attributes:
        said: tokenizer.json.
        size: rows of the embedding; those above the tokenizer's tokens are never looked up.
        special: ids that a config names.
    """

    said: Mapping[str, Any]
    size: int
    special: frozenset[int]

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.said["model"]
        return found

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token → id, without added tokens that the model does not have."""
        known = self.model["vocab"]
        return dict(known) if isinstance(known, Mapping) else {token: place for place, (token, _) in enumerate(known)}

    @cached_property
    def required(self) -> frozenset[int]:
        """Ids of what must stay."""
        found = set(self.special) | {int(added["id"]) for added in self.said.get("added_tokens", ())}
        unknown = self.model.get("unk_token")
        found |= {self.ids[unknown]} & set(self.ids.values()) if unknown in self.ids else set()
        if self.model.get("unk_id") is not None:
            found.add(int(self.model["unk_id"]))
        return frozenset(found | {place for token, place in self.ids.items() if self._is_single(token)})

    def _is_single(self, token: str) -> bool:
        """Whether a token is a byte or character that texts are spelled with."""
        if self.model.get("byte_fallback"):
            return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        for affix in (self.model.get("continuing_subword_prefix"), self.model.get("end_of_word_suffix")):
            if affix and len(token) > len(affix):
                token = token.removeprefix(affix) if affix == self.model.get("continuing_subword_prefix") else token.removesuffix(affix)
        return len(token) == 1

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """Of BPE: pair → when it is merged."""
        return {pair: rank for rank, pair in enumerate(merges_of(self.model))}

    def spelled(self, token: str, kept: frozenset[str] | None = None) -> tuple[list[str], set[str]]:
        """Of BPE: what a token is cut into, and all tokens on the way there.

        Args:
            kept: tokens that merges may make and take; None: all.
        """
        suffix = self.model.get("end_of_word_suffix") or ""
        core = token.removesuffix(suffix) if suffix and token.endswith(suffix) and token != suffix else token
        pieces = list(core)
        if pieces and core != token:
            pieces[-1] += suffix
        met = set(pieces)
        while len(pieces) > 1:
            pairs = [(self.ranks.get(pair, -1), place) for place, pair in enumerate(pairwise(pieces))]
            known = [(rank, place) for rank, place in pairs if rank >= 0 and (kept is None or pieces[place] + pieces[place + 1] in kept)]
            if not known:
                break
            place = min(known)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            met.add(pieces[place])
        return pieces, met

    def needs(self, token: str) -> set[int]:
        """Ids that must stay for a token to be met in texts: its own, and of BPE those that lead to it."""
        if self.model["type"] != "BPE":
            return {self.ids[token]}
        pieces, met = self.spelled(token)
        leading = met if pieces == [token] else set()  # what no merges lead to is looked up whole, or never
        return {self.ids[token], *(self.ids[each] for each in leading if each in self.ids)}


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Raises:
    RecipeError: no tokenizer.json, or one that cannot be cut.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise RecipeError(f"shrink(vocab): {folder} has no {TOKENIZER}; AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it.")
    said = parse_config(path.read_bytes(), str(path))
    model = said.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in KINDS or not isinstance(model, dict):
        raise RecipeError(
            f"shrink(vocab): {path} is a tokenizer of type {kind}, whose tokens cannot be left out here; these can: {', '.join(KINDS)}."
        )
    if kind == "BPE" and model.get("continuing_subword_prefix"):
        raise RecipeError(f"shrink(vocab): {path} is BPE with a prefix of continued words, whose merges are not followed here.")
    configs = [config, *(parse_config((folder / name).read_bytes(), name) for name in ("generation_config.json",) if (folder / name).is_file())]
    special = {each for found in configs for key, value in found.items() if is_token_field(key) for each in _whole_numbers(value)}
    return Vocabulary(said=said, size=int(config["vocab_size"]), special=frozenset(each for each in special if each < int(config["vocab_size"])))


def is_token_field(key: str) -> bool:
    """Whether a field of a config names tokens by their ids."""
    return key.endswith(("_token_id", "_token_ids"))


def _whole_numbers(value: Any) -> Iterator[int]:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int) and not isinstance(each, bool) and each >= 0:
            yield each


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of BPE in their order; files have them as pairs or as texts parted by a space."""
    return [(pair[0], pair[1]) if isinstance(pair, list) else (pair.partition(" ")[0], pair.partition(" ")[2]) for pair in model["merges"]]


def require_room(vocabulary: Vocabulary, keep: int) -> None:
    """Raises:
    RecipeError: fewer tokens than must stay.
    """
    if keep < len(vocabulary.required):
        raise RecipeError(
            f"shrink(vocab): {keep} tokens are to stay, and {len(vocabulary.required)} must: special ones, and the single bytes or characters that "
            f"any text is spelled with; keep {len(vocabulary.required)} or more."
        )


def choose_kept(vocabulary: Vocabulary, counts: NDArray[np.int64], keep: int) -> list[int]:
    """Ids of exactly `keep` tokens, ascending: those that must stay, then the most used whose own needs still fit, then the lowest ids.

    Args:
        counts: [size] how often the calibration text has each.

    Raises:
        RecipeError: fewer than must stay.
    """
    require_room(vocabulary, keep)
    tokens = {place: token for token, place in vocabulary.ids.items()}
    kept = set(vocabulary.required)
    used = sorted((place for place in range(vocabulary.size) if counts[place]), key=lambda place: (-counts[place], place))
    rest = [place for place in range(vocabulary.size) if not counts[place]]
    rest.sort(key=lambda place: place not in tokens or UNUSED.fullmatch(tokens[place]) is not None)
    needs: dict[int, set[int]] = {}
    while len(kept) < keep:  # a token whose needs are many is passed over once, and shorter ones may have met them since
        for place in (*used, *rest):
            if place in kept:
                continue
            if place not in needs:
                needs[place] = vocabulary.needs(tokens[place]) if place in tokens else {place}
            if len(kept | needs[place]) <= keep:
                kept |= needs[place]
            if len(kept) == keep:
                break
    return sorted(kept)


# ---- files ----


def cut_files(folder: Path, vocabulary: Vocabulary, kept: Sequence[int]) -> dict[str, bytes | None]:
    """What becomes of the files beside the weights; None: it is left out."""
    new = {old: place for place, old in enumerate(kept)}
    found: dict[str, bytes | None] = {TOKENIZER: _json(cut_tokenizer(vocabulary.said, new), (folder / TOKENIZER).read_bytes())}
    tokens = {place: token for token, place in vocabulary.ids.items()}
    changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "generation_config.json": lambda said: cut_config(said, new),
        "tokenizer_config.json": lambda said: _with_keys(said, "added_tokens_decoder", new),
        "added_tokens.json": lambda said: {token: new[place] for token, place in said.items() if place in new},
        "vocab.json": lambda said: {token: new[place] for token, place in said.items() if place in new},
    }
    for name, change in changes.items():
        if (folder / name).is_file():
            before = (folder / name).read_bytes()
            found[name] = _json(change(parse_config(before, name)), before)
    if (folder / "vocab.txt").is_file():
        found["vocab.txt"] = "".join(f"{tokens.get(old, f'[unused{old}]')}\n" for old in kept).encode()
    if (folder / "merges.txt").is_file():
        merges = merges_of(cut_tokenizer(vocabulary.said, new)["model"])
        found["merges.txt"] = ("#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in merges)).encode()
    return found | {name: None for name in STALE if (folder / name).is_file()}


def _json(said: Any, like: bytes) -> bytes:
    """A file's new content, in lines where it was in lines."""
    if b"\n" in like.strip():
        return (json.dumps(said, ensure_ascii=False, indent=2) + "\n").encode()
    return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()


def _with_keys(said: Mapping[str, Any], field: str, new: Mapping[int, int]) -> dict[str, Any]:
    if field not in said:
        return dict(said)
    return {**said, field: {str(new[int(key)]): value for key, value in said[field].items() if int(key) in new}}


def cut_config(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config whose fields name tokens by their new ids; of lists that only forbid tokens, those that are gone are left out."""

    def changed(key: str, value: Any) -> Any:
        if not is_token_field(key) and key not in ("suppress_tokens", "begin_suppress_tokens"):
            return value
        if isinstance(value, list):
            return [new[each] for each in value if each in new]
        return new.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {key: changed(key, value) for key, value in config.items()}


def cut_tokenizer(said: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the tokens that have a new id alone."""
    model = dict(said["model"])
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = dict(sorted(((token, new[place]) for token, place in model["vocab"].items() if place in new), key=lambda found: found[1]))
    else:
        model["vocab"] = [entry for place, entry in enumerate(model["vocab"]) if place in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[int(model["unk_id"])]
    if "merges" in model:
        known = model["vocab"]
        pairs = zip(merges_of(model), model["merges"], strict=True)
        model["merges"] = [entry for (one, other), entry in pairs if one in known and other in known and one + other in known]
    added = [{**each, "id": new[each["id"]]} for each in said.get("added_tokens", ())]
    padding = said.get("padding")
    if isinstance(padding, dict) and "pad_id" in padding:
        padding = {**padding, "pad_id": new.get(padding["pad_id"], 0)}
    return {**said, "model": model, "added_tokens": added, "padding": padding, "post_processor": _processor(said.get("post_processor"), new)}


def _processor(said: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids: lists under `ids`, and the pairs of a token and its id that BERT's and RoBERTa's have."""
    if isinstance(said, list):
        return [_processor(each, new) for each in said]
    if not isinstance(said, dict):
        return said

    def changed(key: str, value: Any) -> Any:
        if key == "ids" and isinstance(value, list):
            return [new[each] for each in value]
        if key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            return [value[0], new[value[1]]]
        return _processor(value, new)

    return {key: changed(key, value) for key, value in said.items()}


# ---- the step ----


def shrink_vocabulary(job: Job) -> tuple[Stage, ModelSpec]:
    """shrink(vocab), carried out: rows are taken when a tensor is asked for."""
    run, keep = job.run, kept_rows(job.before, dict(job.step.arguments))
    vocabulary = read_vocabulary(run.folder, run.spec.config)
    if not run.journal.has(job.number, KEPT):
        counts = np.zeros(vocabulary.size, np.int64)
        for batch in run.batches(job.step["tokens"]):
            for name in batch.keys() & set(word_inputs(run.spec)):
                counts += np.bincount(batch[name][batch[name] >= 0].numpy(), minlength=vocabulary.size)
        run.journal.write(job.number, KEPT, {}, [{"kept": choose_kept(vocabulary, counts, keep)}])
    kept: list[int] = run.journal.read(job.number, KEPT).reports[0]["kept"]
    new = {old: place for place, old in enumerate(kept)}
    run.side_files.update(cut_files(run.folder, vocabulary, kept))
    run.new_ids.update(respelled(vocabulary, new))
    run.old_ids[:] = kept
    rows, dims = torch.tensor(kept), sliced_tensors(job.before, job.after)

    def change(name: str, tensor: Tensor) -> Weight:
        return tensor.index_select(dims[name], rows)

    spec = replace(job.after, config=cut_config(job.after.config, new))
    return Changed(before=job.stage, selected=frozenset(dims), change=change), spec


def respelled(vocabulary: Vocabulary, new: Mapping[int, int]) -> dict[int, list[int]]:
    """Every old id as new ids: its own, or those that spell it, or none where the tokenizer has no such token."""
    kept = frozenset(token for token, place in vocabulary.ids.items() if place in new)
    tokens = {place: token for token, place in vocabulary.ids.items()}

    def spell(place: int) -> list[int]:
        if place in new:
            return [new[place]]
        token = tokens.get(place, "")
        pieces = vocabulary.spelled(token, kept)[0] if vocabulary.model["type"] == "BPE" else _longest_first(token, kept, vocabulary.model)
        return [new[vocabulary.ids[piece]] for piece in pieces if piece in kept]

    return {place: spell(place) for place in range(vocabulary.size)}


def _longest_first(token: str, kept: frozenset[str], model: Mapping[str, Any]) -> Iterable[str]:
    """A token in the longest kept pieces, from its start on: WordPiece's own way, and near Unigram's."""
    prefix = model.get("continuing_subword_prefix") or ""
    start = len(prefix) if prefix and token.startswith(prefix) and token != prefix else 0
    inside = start > 0
    while start < len(token):
        for end in range(len(token), start, -1):
            piece = (prefix if inside else "") + token[start:end]
            if piece in kept:
                yield piece
                break
        else:
            end = start + 1
        start, inside = end, True


def require_vocabulary(run: Run, spec: ModelSpec, keep: int) -> None:
    """Raises, before any work:
    RecipeError: a tokenizer that cannot be cut, or fewer tokens than must stay.
    """
    require_room(read_vocabulary(run.folder, spec.config), keep)
