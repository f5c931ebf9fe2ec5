"""Encoders that the oracle cannot follow on tensors without values; what configs of encoders and encoder-decoders are refused for."""

from __future__ import annotations

import contextlib

import family_truth
import pytest
from family_cases.encoders import NEEDS_VALUES
from test_families import test_a_formula_is_what_transformers_builds_and_saves as contract

from lighten.model.families import FAMILIES

EACH = [
    pytest.param(name, architecture, changes, id=f"{architecture}-{index}")
    for name, variants in NEEDS_VALUES.items() for architecture in FAMILIES[name].architectures for index, changes in enumerate(variants)
]  # fmt: skip


@pytest.fixture
def real_tensors(monkeypatch):
    """Tensors with values and without gradients: the counter of FLOPs fails on a table that is a module's argument and wants a gradient."""
    build = family_truth.build
    monkeypatch.setattr(family_truth, "fake_tensors", contextlib.nullcontext)
    monkeypatch.setattr(family_truth, "build", lambda config, architecture: build(config, architecture).requires_grad_(False))


@pytest.mark.usefixtures("real_tensors")
@pytest.mark.parametrize(("model_type", "architecture", "changes"), EACH)
def test_a_formula_is_what_transformers_builds_runs_and_saves(model_type, architecture, changes, tmp_path):
    contract(model_type, architecture, changes, tmp_path)
