"""Which models are more than described: their weights changed, and those that are run and measured here too."""

from __future__ import annotations

from pathlib import Path

from lighten.errors import UnsupportedFamily
from lighten.model.families import bert, llama
from lighten.model.source import read_spec
from lighten.model.spec import ModelSpec

RUNNABLE = {"bert": bert.ARCHITECTURES, "llama": llama.ARCHITECTURES}
"""`model_type` → the architectures whose weights the steps and runtimes know."""


def read_runnable(model: str | Path) -> ModelSpec:
    """The spec of a model with weights that can be compressed, run and measured.

    Raises:
        ModelError: it cannot be read.
        UnsupportedFamily: it can be estimated alone.
    """
    spec = read_compressible(model)
    if spec.architecture not in RUNNABLE.get(spec.family, ()):
        able = "; ".join(f"{family}: {', '.join(names)}" for family, names in RUNNABLE.items())
        raise UnsupportedFamily(f"{spec.name} ({spec.architecture}) can be estimated and compressed, not run or measured; these can: {able}.")
    return spec


def read_compressible(model: str | Path) -> ModelSpec:
    """The spec of a model of any family with weights that steps can change.

    Raises:
        ModelError: it cannot be read.
        UnsupportedFamily: it has no weights.
    """
    spec = read_spec(model)
    if spec.tensors is None:
        raise UnsupportedFamily(f"{spec.source}: no *.safetensors beside the config; a model without weights can be estimated alone.")
    return spec


def read_for(model: str | Path, *, exported: bool) -> ModelSpec:
    """The spec of a model whose weights are to be changed, of any family; of those with a graph where the artifact is one.

    Raises:
        ModelError: it cannot be read.
        UnsupportedFamily: it has no weights, or no graph is made of its kind.
    """
    return read_runnable(model) if exported else read_compressible(model)
