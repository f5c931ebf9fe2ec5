"""Every error that a user can cause, in one tree.

LightenError                 one line, exit code 2
├── ModelError               the model cannot be read, or contradicts itself
│   └── UnsupportedFamily    its architecture has no description here
├── TraceError               a model that cannot be followed: it failed on tensors without memory, or its graph does not fit together
├── WorkloadError            an option of the workload is missing, impossible or has no effect
├── DeviceError              no such device, or a figure of it is not known
├── RecipeError              a recipe that cannot be parsed, or a step that cannot be carried out
├── RuntimeUnavailable       a runtime that does not exist, is not installed, or cannot run this
├── TextError                a text that is missing, empty or too short
├── TaskError                a task whose file, metric or answers do not fit the model or each other
├── ConstraintError          a constraint or budget that cannot be understood
└── OutputError              the output folder cannot be written, or belongs to another run
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LightenError(Exception):
    """A user's mistake: the command line prints its text in one line and exits with 2."""


class ModelError(LightenError):
    """The model cannot be read, or its parts contradict each other."""


class UnsupportedFamily(ModelError):
    """The model's architecture has no description here; `config` is what was read of it, for those who can follow it instead."""

    def __init__(self, text: str, *, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self.config = config


class TraceError(LightenError):
    """A model that cannot be followed operator by operator."""


class WorkloadError(LightenError):
    """An option of the workload is missing, impossible or without effect."""


class DeviceError(LightenError):
    """No such device, or a figure of it is not known."""


class RecipeError(LightenError):
    """A recipe that cannot be parsed, or a step that cannot be carried out."""


class RuntimeUnavailable(LightenError):
    """A runtime that does not exist, is not installed, or cannot run this."""


class TextError(LightenError):
    """A text that is missing, empty or too short."""


class TaskError(LightenError):
    """A task whose file, metric or answers do not fit the model or each other."""


class ConstraintError(LightenError):
    """A constraint or a budget that cannot be understood."""


class OutputError(LightenError):
    """The output folder cannot be written, or belongs to another run."""
