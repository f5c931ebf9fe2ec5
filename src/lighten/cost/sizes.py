"""Sizes as people write them: one, several, ranges. Needs nothing but the standard library, since every command's options use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from lighten.errors import WorkloadError

SizeName = Literal["batch_size", "seq_len", "new_tokens"]
SIZE_NAMES = get_args(SizeName)
MOST_POINTS = 1_000_000
"""A sweep of more points is refused: its table would be read by nobody, and takes more than a gigabyte."""
FARTHEST = 2**40
"""Where the search for the largest size ends; a memory that is not full then never will be."""

_ITEM = re.compile(r"(?P<first>\d+)(?::(?P<last>\d+):(?P<kind>[*+])(?P<step>\d+))?")


def parse_sizes(text: str, name: str) -> tuple[int, ...]:
    """The sizes that a text lists, in order: numbers and ranges with both ends, `first:last:*factor` or `first:last:+step`.

    Raises:
        WorkloadError: not such a list, a size that is not positive, the same twice, or too many.

    >>> parse_sizes("1,8,32:128:*2", "batch_size"), parse_sizes("100:250:+50", "seq_len")
    ((1, 8, 32, 64, 128), (100, 150, 200, 250))
    """
    found: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip()) if item.isascii() and len(item) < 64 else None
        if not match:
            raise WorkloadError(
                f"{name}={text[:60]!r}: {item[:40]!r} is no size; write numbers and ranges such as 1,8,32 or 512:4096:*2 or 64:512:+64."
            )
        first, last, step = int(match["first"]), int(match["last"] or match["first"]), int(match["step"] or 1)
        multiplies = match["kind"] == "*"
        if not 1 <= first <= last <= FARTHEST or step < 1 + multiplies:
            raise WorkloadError(f"{name}: {item.strip()} has no sizes; they go up from 1 to 2**40 at most, by *2 or more, or by +1 or more.")
        if not multiplies and len(found) + (last - first) // step >= MOST_POINTS:
            raise WorkloadError(f"{name}: {item.strip()} is more than the {MOST_POINTS:,} points of a sweep.")
        found += _powers(first, last, step) if multiplies else range(first, last + 1, step)
    if len(set(found)) < len(found):
        raise WorkloadError(f"{name}={text[:60]} names a size twice.")
    return tuple(found)


def _powers(first: int, last: int, factor: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= factor


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The sizes of a sweep, whose points are all their combinations."""

    batch_size: tuple[int, ...] = (1,)
    seq_len: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.points > MOST_POINTS:
            raise WorkloadError(f"{self.points:,} points asked for; a sweep has {MOST_POINTS:,} at most.")

    @property
    def points(self) -> int:
        return len(self.batch_size) * len(self.seq_len) * len(self.new_tokens)

    @property
    def swept(self) -> tuple[SizeName, ...]:
        """The sizes of which there are several."""
        return tuple(name for name in SIZE_NAMES if len(getattr(self, name)) > 1)
