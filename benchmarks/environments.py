"""(no program) Environments of peers: made from the `REQUIREMENTS` that a peer's file names, where they are missing or of other versions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path


def requirements(script: Path) -> list[str]:
    """The `REQUIREMENTS` of a peer's file, read without running it.

    Raises:
        ValueError: it has none.
    """
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "REQUIREMENTS" for target in node.targets):
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{script} has no REQUIREMENTS; name the packages of its environment there.")


def interpreter(script: Path, folder: Path) -> Path:
    """The Python of a peer's environment, made where it is missing or lacks a requirement of another version."""
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements(script))
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if not stamp.exists() or stamp.read_text() != wanted:
        for packages in stages(wanted.splitlines()):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def stages(packages: list[str]) -> list[list[str]]:
    """torch first: some packages look for it while they are built."""
    first = [name for name in packages if name.startswith("torch==")]
    return [part for part in (first, [name for name in packages if name not in first]) if part]
