"""The data goes one way: no stage imports a later one, and the first stages need neither torch nor a runtime."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).parent.parent / "src" / "lighten"
ORDER = [
    ["errors"], ["units"], ["model"], ["cost"], ["trace"], ["device"], ["parallel"], ["recipe"], ["compress"], ["formats"], ["runtimes"], ["judge"],
    ["choose"], ["report"], ["verbs"], ["cli", "web"],
    ["__main__"],
]  # fmt: skip
RANK = {stage: rank for rank, stages in enumerate(ORDER) for stage in stages}
LIGHT = ["errors", "units", "model", "cost", "trace", "device", "parallel", "recipe"]  # `pip install lighten` without extras runs these
BASE_REQUIREMENTS = {"numpy", "huggingface_hub", "yaml", "platformdirs", "tomli"}  # `dependencies` in pyproject.toml, by their import names
HEAVY = ["torch", "transformers", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "ctranslate2", "safetensors", "tokenizers", "gguf", "ray"]
LATE = "torch_"  # modules of the stage trace that are imported where torch is asked for, and never before
CHILD_ONLY = PACKAGE / "device" / "engines"  # imported in the probe's child processes alone, one runtime each
ROOT_NAMES = {"__version__"}  # what a stage may take from `lighten` itself, whose other names lead to every stage


def imports(tree: ast.AST, package: str, *, top_level: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import: all of them, or those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, name.value) for name in node.args[:1] if isinstance(name, ast.Constant))
        elif top_level and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (found for branch in node.orelse for found in imports(ast.Module([branch], []), package, top_level=True))
            continue
        if not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from imports(node, package, top_level=top_level)


def arrows_back(stage: str, source: str, package: str) -> list[str]:
    """What `source`, a module of `stage` in `package`, imports from a later stage, or from a folder that is no stage."""
    found = []
    for line, name in imports(ast.parse(source), package, top_level=False):
        parts = name.split(".")
        if parts[0] != "lighten" or (len(parts) == 2 and parts[1] in ROOT_NAMES):
            continue
        target = parts[1] if len(parts) > 1 else ""
        if RANK.get(target, len(ORDER)) > RANK[stage]:
            found.append(f"line {line}: {stage} imports {name}")
    return found


def not_light(source: str, package: str) -> list[str]:
    """What `source` needs when it is imported beyond the standard library, this package and the base requirements."""
    known = BASE_REQUIREMENTS | {"lighten", "__future__"} | set(sys.stdlib_module_names)
    return [f"line {line}: {name}" for line, name in imports(ast.parse(source), package, top_level=True) if name.split(".")[0] not in known]


def modules() -> list[tuple[str, Path]]:
    """(stage, file) of every module but `lighten/__init__.py`, which may offer any stage's verbs."""
    files = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).parent.parts)


def test_every_module_belongs_to_a_stage():
    assert {stage for stage, _ in modules()} <= set(RANK)
    assert {"errors", "units", "model"} <= {stage for stage, _ in modules()}


def test_no_stage_imports_a_later_one():
    found = {str(path.relative_to(PACKAGE)): arrows_back(stage, path.read_text("utf-8"), package_of(path)) for stage, path in modules()}
    assert {path: arrows for path, arrows in found.items() if arrows} == {}


def test_the_first_stages_import_with_the_base_requirements_alone():
    light = [path for stage, path in modules() if stage in LIGHT and path.parent != CHILD_ONLY and not path.stem.startswith(LATE)]
    found = {str(path.relative_to(PACKAGE)): not_light(path.read_text("utf-8"), package_of(path)) for path in light}
    assert {path: names for path, names in found.items() if names} == {}


def imported_heavy(statement: str) -> str:
    """Which heavy libraries a fresh Python has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_first_stages_loads_nothing_heavy():
    present = [stage for stage in LIGHT if (PACKAGE / stage / "__init__.py").exists() or (PACKAGE / f"{stage}.py").exists()]
    assert imported_heavy("import lighten, " + ", ".join(f"lighten.{stage}" for stage in present)) == "[]"


def test_importing_the_command_line_loads_nothing_heavy():
    assert imported_heavy("import lighten, lighten.cli.main") == "[]"


def test_base_requirements_are_those_of_the_project():
    project = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    names = {name.split(";")[0].split(">")[0].split("=")[0].strip() for name in project["dependencies"]}
    assert {{"pyyaml": "yaml"}.get(name, name) for name in names} == BASE_REQUIREMENTS


# ---- the check itself ----


@pytest.mark.parametrize(
    ("stage", "source"),
    [
        ("model", "import lighten.cost"),
        ("model", "from lighten.cost.operators import flops"),
        ("model", "from lighten import cost"),
        ("model", "from .. import cost"),
        ("model", "from ..cost import workload"),
        ("model", "def f():\n    from lighten.judge import quality"),
        ("model", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lighten.recipe import Recipe"),
        ("model", "import importlib\nimportlib.import_module('lighten.runtimes.torch')"),
        ("errors", "from lighten.units import parse_dtype"),
        ("choose", "from lighten.report import html"),
        ("report", "import lighten"),
        ("report", "from lighten import estimate"),
        ("report", "from lighten.cli.main import main"),
        ("judge", "from lighten.helpers import f"),
    ],
)
def test_an_arrow_back_is_found(stage, source):
    assert len(arrows_back(stage, source, f"lighten.{stage}")) == 1


@pytest.mark.parametrize(
    ("stage", "source"),
    [
        (
            "model",
            "from lighten.errors import ModelError\nfrom .spec import ModelSpec\nfrom . import read\nfrom ..units import parse_dtype",
        ),
        ("units", "from lighten.errors import ConstraintError"),
        ("report", "from lighten import __version__, choose"),
        ("cli", "from lighten.web import serve\nfrom lighten.model import read_spec"),
        ("cost", "import lightening, torch"),
    ],
)
def test_what_points_forward_is_let_through(stage, source):
    assert arrows_back(stage, source, f"lighten.{stage}") == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from transformers import AutoModel",
        "import onnxruntime as ort",
        "try:\n    import nncf\nexcept ImportError:\n    nncf = None",
        "class A:\n    import openvino",
        "import typing\nif typing.TYPE_CHECKING:\n    import numpy\nelse:\n    import torch",
    ],
)
def test_a_heavy_import_is_found(source):
    assert len(not_light(source, "lighten.model")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import json, numpy.linalg\nfrom . import spec\nfrom ..units import parse_dtype\nimport yaml",
        "def probe():\n    import torch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ],
)
def test_a_light_or_late_import_is_let_through(source):
    assert not_light(source, "lighten.model") == []


def test_a_module_that_is_loaded_is_seen():
    assert imported_heavy("sys.modules['torch'] = sys") == "['torch']"
    assert importlib.util.find_spec("lighten") is not None
