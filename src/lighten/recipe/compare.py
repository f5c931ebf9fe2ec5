"""Models, recipes and devices side by side: every combination as `lighten estimate` would say it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.errors import LightenError
from lighten.recipe.case import Case, Cost, Target, cost_of

WORKLOAD = ("phase", "batch_size", "seq_len", "new_tokens", "dtype", "kv_dtype", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One combination to look at, by the names that it was asked for by.

    Attributes:
        recipe, device: None: the model as it is; nowhere.
        make: its case and where it runs; what cannot be is an error there.
    """

    model: str
    recipe: str | None
    device: str | None
    make: Callable[[], tuple[Case, Target]]

    def __str__(self) -> str:
        return " · ".join(filter(None, (self.model, self.recipe, self.device)))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A combination and what it takes, or why it cannot be."""

    choice: Choice
    cost: Cost | None
    failure: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.cost is None or self.cost.time is None else self.cost.tokens / self.cost.time.seconds

    @property
    def usd_per_million_tokens(self) -> float | None:
        return None if self.cost is None or self.cost.usd is None else self.cost.usd / self.cost.tokens * 1e6

    def as_json(self) -> dict[str, Any]:
        asked = self.cost.estimate.workload if self.cost else None
        return {
            "model": self.choice.model, "recipe": self.choice.recipe, "device": self.choice.device,
            "workload": None if asked is None else {name: getattr(asked, name) for name in WORKLOAD},
            "failure": self.failure, **({} if self.cost is None else self.cost.as_json()),
        }  # fmt: skip


def compare(choices: Sequence[Choice]) -> tuple[Entry, ...]:
    """What each combination takes. One that cannot be says why, beside the others.

    Raises:
        LightenError: none of them can be; the first's reason.
    """
    entries: list[Entry] = []
    errors: list[LightenError] = []
    for choice in choices:
        try:
            entries.append(Entry(choice=choice, cost=cost_of(*choice.make())))
        except LightenError as error:
            errors.append(error)
            entries.append(Entry(choice=choice, cost=None, failure=str(error)))
    if entries and len(errors) == len(entries):
        raise errors[0]
    return tuple(entries)
