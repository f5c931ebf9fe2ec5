"""Several processes of one run: the first one does all of it, the others take part in its training alone and touch no file.

They are started by torch's own launcher: `torchrun --nproc-per-node 2 -m lighten compress …`. Between trainings the others wait for the first
one's word; where it ends, their connection does, and so do they.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lighten.errors import LightenError, RecipeError

WAIT = timedelta(days=30)
"""How long a process waits for the first one: choice, longer than any step before a training; that it ended is seen by its connection."""


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a run; one alone unless they were started together."""

    rank: int = 0
    size: int = 1
    joined: bool = False

    def share(self, parts: Sequence[Any] | None) -> Any:
        """What the first process has for this one.

        Args:
            parts: one for each process, of the first one; None of the others.
        """
        if self.size == 1:
            assert parts is not None, "a process alone is the first"
            return parts[0]
        found: list[Any] = [None]
        dist.scatter_object_list(found, None if parts is None else list(parts), src=0)
        return found[0]

    def tell(self, said: Any) -> Any:
        """The same to all."""
        return self.share([said] * self.size if self.rank == 0 else None)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all processes, number by number."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def spread(self, tensor: Tensor) -> None:
        """Give the others the first one's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)


def this_team() -> Team:
    """The team that this process has joined; itself alone where it has joined none."""
    if not (dist.is_available() and dist.is_initialized()):
        return Team()
    return Team(rank=dist.get_rank(), size=dist.get_world_size(), joined=True)


def require_team(parallel: str) -> Team:
    """The processes that a step is to be spread over.

    Raises:
        RecipeError: it is to be spread, and nothing started several processes; or they were started, and it is not to be spread.
    """
    team = this_team()
    if parallel == "none" and team.size > 1:
        raise RecipeError(f"{team.size} processes were started together and this step is not spread over them; say parallel=ddp or parallel=fsdp.")
    if parallel != "none" and not team.joined:
        raise RecipeError(
            f"parallel={parallel} is for processes that are started together; start them by `torchrun --nproc-per-node 2 -m lighten compress …`."
        )
    return team


def work_together(work: Callable[[], int]) -> int:
    """Do `work` in the first process, and help it in the others; the exit code of this one."""
    from lighten.compress.training import help_training

    dist.init_process_group("gloo", timeout=WAIT)
    team = this_team()
    try:
        if team.rank:
            return _follow(team, help_training)
        code = work()
        team.tell(None)
        return code
    finally:
        dist.destroy_process_group()


def _follow(team: Team, help_training: Callable[[Team, Any], None]) -> int:
    """Raises:
    LightenError: the first process ended before its work did.
    """
    try:
        while (task := team.tell(None)) is not None:
            help_training(team, task)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "onnection" not in str(error):
            raise
        raise LightenError(f"process {team.rank}: the first process ended before its work did, so this one ends too.") from error
    return 0
