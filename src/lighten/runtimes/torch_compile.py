"""PyTorch, compiled by `torch.compile` for the shapes that it meets: encoders."""

from __future__ import annotations

from pathlib import Path

from lighten.model.spec import ModelSpec
from lighten.runtimes import torch_eager
from lighten.runtimes.session import Session, Setup
from lighten.runtimes.torch_eager import version

__all__ = ["load", "version"]


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """The eager session with its module compiled; compilation happens at the first run of each shape."""
    import torch

    session = torch_eager.load(folder, spec, setup)
    assert isinstance(session, torch_eager.TorchSession), "torch_eager loads nothing else"
    module = session.module
    session.module = torch.compile(module, dynamic=False)
    return session
