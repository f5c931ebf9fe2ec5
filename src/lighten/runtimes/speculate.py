"""Speculative decoding, for every session whose cache can be cut back: something proposes tokens, the model checks them in one pass, and those
that it would have said itself stay, with one more of its own.

What comes out is what `generate` gives without it, token for token; where two tokens are as likely as each other but for the rounding of floats,
either may come, for a pass over several tokens may round otherwise than a pass over one.

Legend: B sequences, S tokens known so far, K proposals, V vocabulary.

Source: Leviathan et al. 2022 (arXiv:2211.17192), algorithm 1 at temperature 0, where the rule of acceptance is equality with the likeliest token.
Deviations: 1. the sequences of a batch go on together, by as many tokens as the one that accepts least; 2. proposals may be copied (`PromptLookup`).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from lighten.errors import RuntimeUnavailable
from lighten.model.spec import ModelSpec
from lighten.recipe.options import PROMPT_LOOKUP, Speculation, draft_spec
from lighten.runtimes.session import Accepted, Floats, Generated, Ids, Session, Setup, Stepping, without_head

LONGEST_MATCH = 3
"""Newest tokens that are looked up, and fewer where they do not stand in the text: the default of prompt-lookup-decoding (Saxena 2023)."""


class Croppable(Stepping):
    """A session that checks several tokens in one pass and takes back what it has cached of them."""

    @abstractmethod
    def verify(self, input_ids: Ids) -> Floats:
        """Go on with [B, K] new tokens; the logits after each of them, [B, K, V]."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first `length` positions of the cache."""


class Proposer(Protocol):
    """What proposes tokens."""

    def start(self) -> None:
        """Forget the last text."""

    def propose(self, known: Ids, count: int) -> Ids:
        """[B, S] → [B, K]: what may come next, `count` tokens at most, or none."""
        ...


class PromptLookup:
    """Copies what followed the newest tokens when they last stood in the text; a sequence in which they never did proposes what another's are filled
    up with.

    Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; Yang et al. 2023 (arXiv:2304.04487), section 3.
    """

    def start(self) -> None:
        """See `Proposer`."""

    def propose(self, known: Ids, count: int) -> Ids:
        """See `Proposer`."""
        rows = [followed(row, count) for row in known]
        found = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, copied in enumerate(rows):
            found[row, : len(copied)] = copied
        return found


def followed(tokens: Ids, count: int, longest: int = LONGEST_MATCH) -> Ids:
    """What followed the newest tokens at their latest earlier place, `count` tokens at most; none where they stand nowhere.

    >>> followed(np.array([5, 6, 7, 8, 5, 6]), 3).tolist(), followed(np.array([1, 2, 3]), 3).tolist()
    ([7, 8, 5], [])
    """
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        places = np.flatnonzero((windows == tokens[-size:]).all(1))
        if len(places):
            start = int(places[-1]) + size
            return tokens[start : start + count]
    return tokens[:0]


class DraftModel:
    """A smaller model, with a cache of its own, which is cut back to what became known; beyond its positions it proposes nothing.

    Args:
        positions: that it has; None: any number.
    """

    def __init__(self, session: Croppable, positions: int | None = None) -> None:
        self._session, self._positions = session, positions
        self._cached = 0

    def start(self) -> None:
        """See `Proposer`."""
        self._cached = 0

    def propose(self, known: Ids, count: int) -> Ids:
        """See `Proposer`."""
        length = known.shape[1]
        if self._positions is not None and length + count - 1 > self._positions:
            return known[:, :0]
        if self._cached == 0:
            logits = self._session.prefill(known)
        else:
            kept = min(self._cached, length - 1)
            self._session.crop(kept)
            logits = self._session.decode(known[:, kept:])
        found = [logits.argmax(-1)[:, None]]
        for _ in range(count - 1):
            found.append(self._session.decode(found[-1]).argmax(-1)[:, None])
        # what it said last is not in its cache; of the others those are right that the model accepts, and the newest known token never is
        self._cached = length + count - 1
        return np.concatenate(found, 1)


class Speculating:
    """A session that generates with proposals, and does all else as the one that it holds."""

    def __init__(self, session: Croppable, proposer: Proposer, tokens: int) -> None:
        self._session, self._proposer, self._tokens = session, proposer, tokens

    @property
    def precision(self) -> str:
        """See `Session`."""
        return self._session.precision

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """See `Session`."""
        return self._session.encode(input_ids, attention_mask)

    def logits(self, input_ids: Ids) -> Floats:
        """See `Session`."""
        return self._session.logits(input_ids)

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        """See `Session`."""
        raise without_head("that speculates")

    def generate(self, input_ids: Ids, new_tokens: int, ends: Collection[int] = ()) -> Generated:
        """See `Session`."""
        length = input_ids.shape[1]
        passes = proposed = accepted = 0
        start = time.perf_counter()
        known = np.concatenate([input_ids, self._session.prefill(input_ids).argmax(-1)[:, None]], 1)
        first = time.perf_counter()
        self._proposer.start()
        stops = list(ends)
        while (left := length + new_tokens - known.shape[1]) > 0:
            if stops and np.isin(known[:, length:], stops).any(1).all():
                break
            proposals = self._proposer.propose(known, min(self._tokens, left - 1)) if left > 1 else known[:, :0]
            said = self._session.verify(np.concatenate([known[:, -1:], proposals], 1)).argmax(-1)
            agreed = (said[:, :-1] == proposals).cumprod(1).sum(1)
            passes, proposed, accepted = passes + 1, proposed + proposals.size, accepted + int(agreed.sum())
            known = np.concatenate([known, said[:, : int(agreed.min()) + 1]], 1)
            self._session.crop(known.shape[1] - 1)
        found = Accepted(passes=passes, tokens=known.shape[1] - length - 1, proposed=proposed, accepted=accepted)
        return Generated(ids=known[:, length:], first_s=first - start, rest_s=time.perf_counter() - first, accepted=found)


def speculating(session: Session, said: Speculation, setup: Setup, load: Callable[[Path, ModelSpec, Setup], Session]) -> Speculating:
    """A session that speculates as a recipe says.

    Args:
        load: the runtime's own, which a draft model is loaded with.

    Raises:
        RuntimeUnavailable: the runtime keeps its cache to itself, or the draft's folder holds nothing that it runs.
    """
    if not isinstance(session, Croppable):
        raise RuntimeUnavailable(f"speculate={said.draft}: this runtime's cache cannot be cut back.")
    if said.draft == PROMPT_LOOKUP:
        return Speculating(session, PromptLookup(), said.tokens)
    spec = draft_spec(Path(said.draft))
    draft = load(Path(said.draft), spec, setup)
    assert isinstance(draft, Croppable), "the same runtime loads alike"
    return Speculating(session, DraftModel(draft, spec.max_positions), said.tokens)
