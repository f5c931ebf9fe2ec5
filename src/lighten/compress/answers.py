"""What a teacher answered to each row of a text, on disk: it runs once, and neither a second epoch nor a resumed run asks it again.

The file holds the tensors one after another; the index says where each lies. Both are there whole or not at all: the file gets its name before the
journal gets the index.

Shape legend: S positions, D width, V vocabulary, K largest logits that are kept, N positions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lighten.compress.checkpoint import map_tensor
from lighten.compress.distances import TopLogits, keep_top, pooled
from lighten.compress.journal import ALIGNMENT, sync
from lighten.compress.memory_plan import DENSE_LOGITS
from lighten.compress.pupil import Objective, Target, Watching, answer_name, answer_of, type_of, without_labels
from lighten.compress.teacher import Sample, among, answer_of_head, counting, find_head, through_head
from lighten.errors import RecipeError

ROWS_AT_ONCE = 4
"""Rows of one shape that the teacher runs at once: choice, as many as calibration does."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where each row's answers lie.

    Attributes:
        rows: of each row, what → its place, shape and type.
        passes: forward passes of the teacher that made them.
        kind, answer: of the `Objective` that they are for.
        sizes: mean square of the states of each layer that is kept.
    """

    rows: Sequence[Mapping[str, Mapping[str, Any]]]
    passes: int
    kind: str
    answer: str
    sizes: Sequence[float]


class Answers:
    """Answers that lie in a file."""

    def __init__(self, path: Path, index: Index) -> None:
        self._path, self.index = path, index

    def of(self, rows: Sequence[int]) -> Target:
        """What was answered to some rows of one shape, [rows, ...] each."""
        found = self.index.rows
        return {key: torch.cat([self._read(found[row][key]) for row in rows]) for key in found[rows[0]]}

    def widths(self) -> dict[str, int]:
        """The last dimension of each kind of answer."""
        return {key: int(place["shape"][-1]) for key, place in self.index.rows[0].items()}

    def count(self, row: int, sample: Sample) -> int:
        """How many answers of a row are compared: positions, or one of a whole text."""
        said = self.index.rows[row]
        if "embedding" in said:
            return 1
        shape = next(said[key]["shape"] for key in ("states", "logits", "values") if key in said)
        return int(counting(sample, torch.empty(shape, device="meta")).sum())

    def _read(self, place: Mapping[str, Any]) -> Tensor:
        return map_tensor(self._path, place["offset"], tuple(place["shape"]), getattr(torch, place["dtype"]))


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a teacher is asked.

    Attributes:
        module: the teacher, all its weights in memory.
        objective: without its kind, which is found by asking, but for embeddings.
        top_k: largest logits of a position that are kept; 0: what all are made from.
        computing: entered while it runs.
        dtype: states of layers are kept in it.
        words: the tokens whose logits are compared, by the teacher's ids; None: all.
    """

    module: Any
    objective: Objective
    top_k: int = 0
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext
    dtype: torch.dtype = torch.float32
    words: Tensor | None = None


def find_kind(module: Any, sample: Sample, objective: Objective) -> tuple[str, str]:
    """(kind, answer) of the objective that fits a model: `head` where logits come from each position's last state."""
    if objective.kind == "embeddings":
        return "embeddings", ""
    given = without_labels(sample)
    with torch.no_grad():
        head = find_head(module, given)
        if head is not None:
            return "head", answer_name(head.answer)
        return ("logits" if answer_of_head(module, module(**given))[1] else "values"), ""


def record(asking: Asking, rows: Sequence[Sample], path: Path) -> Index:
    """Ask the teacher about each row, and keep what it answers in a file that is there whole when this returns.

    Raises:
        RecipeError: an attention loss on a model whose code calls none of torch's attention; more logits asked for than there are.
    """
    beside = path.with_name(f"{path.name}.tmp")
    index: list[dict[str, Any]] = []
    passes, squares = 0, [0.0] * len(asking.objective.layers)
    with beside.open("wb") as file, torch.no_grad(), asking.computing():
        for _, group in groupby(range(len(rows)), key=lambda row: [(name, value.shape) for name, value in rows[row].items()]):
            numbers = list(group)
            for start in range(0, len(numbers), ROWS_AT_ONCE):
                together = numbers[start : start + ROWS_AT_ONCE]
                batch = {name: torch.cat([rows[row][name] for row in together]) for name in rows[together[0]]}
                found = _ask(asking, batch)
                passes += 1
                squares = [total + len(together) * _mean_square(found[f"layer.{place}"]) for place, total in enumerate(squares)]
                index += [{key: _put(file, value[place : place + 1]) for key, value in found.items()} for place in range(len(together))]
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)
    said, sizes = asking.objective, [total / len(rows) for total in squares]
    return Index(rows=index, passes=passes, kind=said.kind, answer=said.answer, sizes=sizes)


def _ask(asking: Asking, batch: Sample) -> dict[str, Tensor]:
    """All that the objective compares, of a batch."""
    said = asking.objective
    blocks = tuple(theirs for _, theirs in said.layers)
    with Watching(asking.module, blocks, said.attending[1] if said.attending else None) as seen:
        answer = answer_of(asking.module, batch, said)
    found = dict(_main(asking, answer, batch))
    found |= {f"layer.{place}": seen.states[name].to(asking.dtype) for place, name in enumerate(blocks)}
    if said.attending:
        if not seen.attended:
            raise RecipeError(
                f"distill: attention={said.attention} follows torch's scaled_dot_product_attention, which {type(asking.module).__name__} does not "
                "call in its last block; leave attention out."
            )
        found |= {key: value.to(asking.dtype) for key, value in zip("qkv", seen.attended, strict=True)}
    return found


def _main(asking: Asking, answer: Tensor, batch: Sample) -> Iterator[tuple[str, Tensor]]:
    said = asking.objective
    if said.kind == "embeddings":
        yield "embedding", pooled(answer.float(), counting(batch, answer), first_token=said.first_token)
    elif not asking.top_k:
        yield ("states", answer) if said.kind == "head" else ("logits", among(answer, asking.words))
    else:
        pieces = [keep_top(logits, count=asking.top_k, temperature=said.temperature) for logits in _logits(asking, answer.flatten(0, -2))]
        top = TopLogits(**{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in ("values", "ids", "log_sum")})
        shape = answer.shape[:-1]
        yield from (("values", top.values.reshape(*shape, -1)), ("ids", top.ids.reshape(*shape, -1)), ("log_sum", top.log_sum.reshape(shape)))


def _logits(asking: Asking, answer: Tensor) -> Iterator[Tensor]:
    """[N, D or V] → [N, V], in pieces."""
    if asking.objective.kind != "head":
        yield among(answer, asking.words)
        return
    module = asking.module
    base, kind = getattr(module, module.base_model_prefix), type_of(asking.objective.answer)
    piece = max(1, DENSE_LOGITS // int(module.config.get_text_config().vocab_size))
    for start in range(0, len(answer), piece):
        yield among(through_head(module, base, kind, answer[start : start + piece]), asking.words)


def _mean_square(states: Tensor) -> float:
    return float(states.float().square().mean())


def _put(file: BinaryIO, tensor: Tensor) -> dict[str, Any]:
    """Write a tensor; where it is."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return {"offset": start, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
