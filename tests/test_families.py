"""Each family's formula against transformers: a tiny model's checkpoint read without contradiction, its parameters and FLOPs to the last one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import family_cases
import pytest
from family_truth import save, spec_of, truth
from transformers import AutoConfig

from lighten.cost.operators import Forward, forward_operators
from lighten.model import read_spec
from lighten.model.families import FAMILIES, MODULES

CASES: dict[str, list[dict[str, Any]]] = {}
for _module in pkgutil.iter_modules(family_cases.__path__):
    CASES |= importlib.import_module(f"family_cases.{_module.name}").CASES
"""model_type → changes to its config that make it tiny, one for each variant to try."""

EACH = [
    pytest.param(name, architecture, changes, id=f"{architecture}-{index}")
    for name, variants in CASES.items() if name in FAMILIES
    for architecture in FAMILIES[name].architectures for index, changes in enumerate(variants)
]  # fmt: skip


def test_the_registry_names_what_each_module_describes():
    for name, types in MODULES.items():
        assert set(types.split()) == set(importlib.import_module(f"lighten.model.families.{name}").FAMILIES)
    assert len(FAMILIES) == sum(len(types.split()) for types in MODULES.values())  # none is described twice


def test_every_family_has_its_cases():
    assert set(CASES) | {"bert", "llama"} >= set(FAMILIES)


@pytest.mark.parametrize(("model_type", "architecture", "changes"), EACH)
def test_a_formula_is_what_transformers_builds_and_saves(model_type, architecture, changes, tmp_path):
    config = AutoConfig.for_model(model_type, **changes)
    spec = spec_of(config, architecture)
    shapes, flops = truth(config, architecture, batch=2, length=24)
    assert spec.total_parameters == sum(map(_elements, shapes.values()))
    assert matmul_flops(spec, batch=2, length=24) == flops
    read = read_spec(save(config, architecture, tmp_path / "model"))  # a tensor that one has and the other has not is an error
    assert read.total_parameters == spec.total_parameters


def matmul_flops(spec: Any, *, batch: int, length: int) -> int:
    forward = Forward(batch_size=batch, query_len=length, key_len=length, source_len=length)
    return sum(op.matmul_flops for op in forward_operators(spec, forward, "float32"))


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
