"""Models, recipes and devices side by side: every combination as `lighten estimate` would say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighten.errors import LightenError
from lighten.recipe.case import Case, Cost, Target, cost_of, device_name
from lighten.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One combination to look at."""

    case: Case
    target: Target = None

    @property
    def device(self) -> str | None:
        """As `--device` takes it."""
        name, count = device_name(self.target), self.case.plan.devices
        return name if name is None or count == 1 else f"{name}:{count}"

    @property
    def recipe(self) -> str | None:
        """Its text; None where the model stays as it is."""
        return None if self.case.recipe == Recipe() else str(self.case.recipe)


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
        asked, spec = self.choice.case.workload, self.choice.case.spec
        return {
            "model": spec.name, "source": spec.source, "recipe": self.choice.recipe, "device": self.choice.device,
            "workload": {name: getattr(asked, name) for name in ("phase", "batch_size", "seq_len", "new_tokens", "dtype", "kv_dtype", "optimizer")},
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
            entries.append(Entry(choice=choice, cost=cost_of(choice.case, choice.target)))
        except LightenError as error:
            errors.append(error)
            entries.append(Entry(choice=choice, cost=None, failure=str(error)))
    if len(errors) == len(entries):
        raise errors[0]
    return tuple(entries)
