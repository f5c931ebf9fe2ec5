"""Options → the case that they ask for and where it runs: what `lighten advise` and `lighten compare` have in common."""

from __future__ import annotations

import argparse

from lighten.cli.options import add_numerics, add_workload, place_of, plan_of, workload_of
from lighten.cost.workload import Workload
from lighten.device.device import Device
from lighten.device.find import find_place
from lighten.errors import UnsupportedFamily, WorkloadError
from lighten.model.spec import ModelSpec
from lighten.parallel.plan import Plan
from lighten.recipe.case import Case, Target
from lighten.recipe.placement import default_plan
from lighten.recipe.predict import apply_recipe, compute_dtype
from lighten.recipe.recipe import Recipe
from lighten.trace.open import open_model
from lighten.verbs import make_workload


def add_case(parser: argparse.ArgumentParser) -> None:
    """The workload's options; a length that is not given is the model's own, as an image's is."""
    add_workload(parser)
    parser.set_defaults(seq_len=None)
    add_numerics(parser)


def open_spec(model: str) -> ModelSpec:
    """The spec of a model that has a formula: a recipe is read on nothing else.

    Raises:
        UnsupportedFamily: it has none.
    """
    found = open_model(model, method="formula")
    if not isinstance(found, ModelSpec):
        raise UnsupportedFamily(f"{model}: levers are read on a formula's spec; this model has none.")
    return found


def case_of(spec: ModelSpec, arguments: argparse.Namespace, recipe: Recipe, device: str | None) -> tuple[Case, Target]:
    """The model with what the options ask for, and where; its type is that of the weights after the recipe where none is given.

    Raises:
        LightenError: what is asked does not fit together.
    """
    words = {name: value for name, value in workload_of(arguments).items() if value is not None}
    dtype = words.pop("dtype", None) or compute_dtype(recipe, apply_recipe(recipe, spec))
    workload = make_workload(spec, dtype=dtype, **words)
    own = place_of(arguments)
    stack = own.pop("stack", None)
    target, count = find_place(device, **own) if device is not None else (None, 1)
    plan = _plan(arguments, workload, target, count)
    if not isinstance(target, Device) and (given := {**own, **({} if stack is None else {"stack": stack})}):
        raise _without_effect(given)
    return Case(spec=spec, workload=workload, recipe=recipe, plan=plan, stack=stack), target


def _plan(arguments: argparse.Namespace, workload: Workload, target: Target, count: int) -> Plan:
    given = plan_of(arguments)
    if isinstance(target, Device):
        return default_plan(workload, count, given)
    if given:
        raise _without_effect(given)
    return Plan()


def _without_effect(options: dict[str, object]) -> WorkloadError:
    name, value = next(iter(options.items()))
    return WorkloadError(f"--{name.replace('_', '-')}={value} has no effect without a --device of published figures; `lighten devices` lists them.")
