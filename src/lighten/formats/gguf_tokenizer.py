"""A tokenizer.json as the metadata of a GGUF file: tokens, their types, merges or scores, the marks around a text, the chat template.

llama.cpp has its own tokenizers, and splits a text before the merges by one of its built-in patterns, which the file names. The pattern is
found here by what tokenizer.json says of its pre-tokenizer; one that llama.cpp does not have is refused.

Source: `LLAMA_VOCAB_PRE_TYPE_*` in src/llama-vocab.cpp of llama.cpp, with the patterns of the original tokenizers beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens. Source: `llama_token_type` in include/llama.h of llama.cpp."""

SPACE = "\u2581"

_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?|"
)
PATTERNS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}": "qwen2",
    rf"{_CASED}\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}": "gpt-4o",
    rf"{_CASED.replace(_CONTRACTIONS + '?', '')}\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}": "tekken",
}
"""Pattern of a `Split` → llama.cpp's name for it."""


@dataclass(frozen=True, kw_only=True)
class TokenizerData:
    """What the file says of the tokenizer.

    Attributes:
        model: of llama.cpp: `gpt2` (pairs of bytes), `llama` (SentencePiece's pairs), `bert` (word pieces).
        pre: how a text is split first.
        scores: of the pairs of SentencePiece; None for others.
        bos: whether a text is preceded by the first mark; eos: whether it is followed by the last one.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: bool
    space_prefix: bool | None
    bos: bool
    eos: bool


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerData | None:
    """The tokenizer of a model folder; None where there is no tokenizer.json.

    Raises:
        ModelError: a kind of tokenizer or pre-tokenizer that llama.cpp does not have, or more tokens than the model has rows.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = _kind(said, path)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read as a tokenizer ({type(error).__name__}: {error}).") from error
    tokens, types = _tokens(said, vocab_size, path, kind)
    bos, eos = _marks(path)
    return TokenizerData(
        model=kind, pre=_pre(said, path) if kind == "gpt2" else "default", tokens=tokens, types=types, bos=bos, eos=eos,
        scores=_scores(said, tokens) if kind == "llama" else None, merges=kind == "gpt2",
        space_prefix=_adds_space(said) if kind == "llama" else None,
    )  # fmt: skip


def _kind(said: dict[str, Any], path: Path) -> str:
    model = said["model"]
    if model["type"] == "WordPiece":
        normalizer = said.get("normalizer") or {}
        if normalizer.get("type") == "BertNormalizer" and not normalizer.get("lowercase", True):
            raise ModelError(f"{path}: word pieces with case are not told apart by llama.cpp, which lowers all text.")
        return "bert"
    if model["type"] == "BPE":
        return "llama" if model.get("byte_fallback") else "gpt2"
    raise ModelError(f"{path}: a tokenizer of kind {model['type']} is not written into GGUF files here; BPE and WordPiece are.")


def _tokens(said: dict[str, Any], vocab_size: int, path: Path, kind: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    vocabulary: dict[str, int] = said["model"]["vocab"]
    added = said.get("added_tokens") or []
    largest = max([*vocabulary.values(), *(token["id"] for token in added)], default=0)
    if largest >= vocab_size:
        raise ModelError(f"{path}: it has token {largest}, and the model {vocab_size} rows of embeddings; llama.cpp refuses such a file.")
    unknown = said["model"].get("unk_token")
    for text, number in vocabulary.items():
        is_byte = kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[number] = _piece(text) if kind == "bert" else text
        types[number] = BYTE if is_byte else UNKNOWN if text == unknown and kind == "llama" else NORMAL
    for token in added:
        special = token["special"] or (token["content"].startswith("<|") and token["content"].endswith("|>"))
        tokens[token["id"]] = token["content"] if special else token["content"].replace(SPACE, " ")
        if types[token["id"]] != UNKNOWN:
            types[token["id"]] = CONTROL if special else USER_DEFINED
    return tuple(tokens), tuple(types)


def _piece(text: str) -> str:
    """A word piece as llama.cpp has it: the beginning of a word is marked, not its continuation."""
    return text[2:] if text.startswith("##") else SPACE + text


def _scores(said: dict[str, Any], tokens: tuple[str, ...]) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes a token: llama.cpp merges by highest score, tokenizer.json by lowest rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(said["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return tuple(-float(ranks[token]) if token in ranks else -1e6 for token in tokens)


def _adds_space(said: dict[str, Any]) -> bool:
    normalizer, pre = said.get("normalizer") or {}, said.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never") for step in steps
    )


def _pre(said: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for how a text is split before the merges.

    Raises:
        ModelError: a way that it does not have.
    """
    pre = said.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", False):
        splits = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and splits:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and splits and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits and (name := PATTERNS.get(steps[0]["pattern"].get("Regex", ""))):
            return name
    able = ", ".join(["gpt-2", "smollm", *PATTERNS.values()])
    raise ModelError(f"{path}: its pre-tokenizer ({' → '.join(map(str, kinds))}) is none of those of llama.cpp that are known here: {able}.")


def _marks(path: Path) -> tuple[bool, bool]:
    """Whether a text is preceded, and whether it is followed by a mark."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    plain, marked = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if plain == marked:
        return False, False
    return marked[0] != plain[0], marked[-1] != plain[-1]


def add_tokenizer(writer: Any, data: TokenizerData, folder: Path) -> None:
    """Put it into a `gguf.GGUFWriter`."""
    import gguf

    writer.add_tokenizer_model(data.model)
    writer.add_tokenizer_pre(data.pre)
    writer.add_token_list(list(data.tokens))
    writer.add_token_types(list(data.types))
    if data.scores is not None:
        writer.add_token_scores(list(data.scores))
    if data.space_prefix is not None:
        writer.add_add_space_prefix(data.space_prefix)
    kinds = ("bos", "eos", "unk", "sep", "pad", "mask")  # a first mark that is called `cls` counts as `bos`
    special = gguf.SpecialVocab(folder, load_merges=data.merges, n_vocab=len(data.tokens), special_token_types=kinds)
    special.add_special_token = {"bos": data.bos, "eos": data.eos}
    special.add_to_gguf(writer, quiet=True)
