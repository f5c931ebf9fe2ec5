"""Stage 1: read a model into a `ModelSpec` without loading a weight."""

from lighten.model.source import read_spec
from lighten.model.spec import ModelSpec

__all__ = ["ModelSpec", "read_spec"]
