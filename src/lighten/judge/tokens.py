"""Text to tokens, by the model's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.errors import ModelError, TextError

Ids = NDArray[np.int64]


class Tokenizer:
    """A model folder's tokenizer.

    Raises:
        ModelError: no tokenizer.json there, or not readable.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Read

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder}: no tokenizer.json; AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it.")
        try:
            self._tokenizer: Any = Read.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} cannot be read ({error}).") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, *texts: str, length: int | None = None, marks: bool = True) -> Any:
        """One text, or two as a pair, as the tokenizer's own encoding: ids, type_ids, offsets, sequence_ids.

        Args:
            length: tokens at most: of a pair the second text is cut where the first leaves room for it, else both are.
            marks: with those that the tokenizer puts around a text.
        """
        if length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(length, strategy=self._strategy(texts, length) if len(texts) > 1 else "longest_first")
        found = self._tokenizer.encode(*texts, add_special_tokens=marks)
        self._tokenizer.no_truncation()
        return found

    def prompt(self, text: str) -> list[int]:
        """A text to go on with: the marks that stand before it, and none after it."""
        found = self.encode(text)
        ids, marks = list(found.ids), list(found.special_tokens_mask)
        while marks and marks[-1]:
            ids.pop()
            marks.pop()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without marks."""
        return str(self._tokenizer.decode(list(ids)))

    def tokens_with(self, letters: str) -> set[int]:
        """Tokens whose text holds so many letters."""
        return {token for token in range(self._tokenizer.get_vocab_size()) if letters in self.decode([token])}

    def _strategy(self, texts: tuple[str, ...], length: int) -> str:
        """`only_second` fails where the first text leaves no room."""
        self._tokenizer.no_truncation()
        room = length - self._tokenizer.num_special_tokens_to_add(True) - len(self._tokenizer.encode(texts[0], add_special_tokens=False).ids)
        self._tokenizer.enable_truncation(length)
        return "only_second" if room > 0 else "longest_first"

    def batches(self, texts: Sequence[str], *, batch_size: int, length: int) -> Iterator[tuple[Ids, Ids]]:
        """(input_ids, attention_mask), both [batch_size, length], in order: cut to `length`, padded with 0 where shorter, the last batch
        filled up with copies of its first text, so that every batch has one shape."""
        self._tokenizer.enable_truncation(length)
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            rows = [encoding.ids for encoding in self._tokenizer.encode_batch(batch + batch[:1] * (batch_size - len(batch)))]
            ids, mask = np.zeros((batch_size, length), np.int64), np.zeros((batch_size, length), np.int64)
            for row, found in enumerate(rows):
                ids[row, : len(found)], mask[row, : len(found)] = found, 1
            yield ids, mask
        self._tokenizer.no_truncation()

    def lengths(self, texts: Sequence[str], *, length: int) -> tuple[int, ...]:
        """Tokens of each text, with those that the tokenizer puts around it, cut to `length`."""
        self._tokenizer.enable_truncation(length)
        found = tuple(len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts)))
        self._tokenizer.no_truncation()
        return found

    def pieces(self, text: str, length: int) -> list[list[int]]:
        """The text cut into as many tokens as there is room for, each piece between the marks of a text; what is left over is dropped."""
        self._tokenizer.enable_truncation(length)
        whole = self._tokenizer.encode(text)
        self._tokenizer.no_truncation()
        return [piece.ids for piece in (whole, *whole.overflowing) if len(piece.ids) == length]

    def windows(self, texts: Sequence[str], *, count: int, length: int) -> Ids:
        """[count, length]: the texts' tokens one after another, cut into windows.

        Raises:
            TextError: not enough tokens for one window.
        """
        stream: list[int] = []
        for text in texts:
            stream += self._tokenizer.encode(text + "\n\n", add_special_tokens=False).ids
            if len(stream) >= count * length:
                break
        found = min(count, len(stream) // length)
        if not found:
            raise TextError(f"the text's test part has {len(stream)} tokens; one window of {length} is the least that can be judged.")
        return np.array(stream[: found * length], np.int64).reshape(found, length)
