"""lighten: what a Transformer costs before it is run, how to make it smaller and faster, and which way is best, by experiment.

The verbs of the command line are functions here: `estimate`, `advise`, `plan`, `compare`, `compress`, `export`, `measure`, `choose`, `probe`;
`summary` shows a live module by submodule.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lighten.verbs import advise, choose, compare, compress, estimate, export, measure, plan, probe, summary

__version__ = "0.1.0"
__all__ = ["__version__", "advise", "choose", "compare", "compress", "estimate", "export", "measure", "plan", "probe", "summary"]


def __getattr__(name: str) -> Any:
    """The verbs, imported when they are first asked for: `import lighten` loads nothing else."""
    if name in __all__:
        from lighten import verbs

        return getattr(verbs, name)
    raise AttributeError(f"module 'lighten' has no attribute {name!r}; verbs: {', '.join(__all__[1:])}.")


class _Stage(ModuleType):
    """A stage that has a verb's name: called, it is the verb."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from lighten import verbs

        return getattr(verbs, self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """`lighten.choose` is a function until the stage `lighten.choose` is imported and takes its place here: then the stage is callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
