"""Without the extras: estimates work, and every other command says in one line what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MINILM = Path(__file__).parent.parent / ".models" / "minilm"
EXTRAS = ("torch", "transformers", "safetensors", "tokenizers", "psutil", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
PROGRAM = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from lighten.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where no package of an extra can be imported."""
    command = [sys.executable, "-c", PROGRAM.format(extras=EXTRAS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_estimate_needs_no_extra():
    done = run("estimate", str(MINILM), "--recipe", "quantize(rtn, bits=4, group_size=64) @ openvino")
    assert (done.returncode, done.stderr) == (0, "")
    assert "22,713,216" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("choose", str(MINILM), "-o", "OUT"), ("compress", str(MINILM), "--recipe", "@ openvino", "-o", "OUT"), ("measure", str(MINILM)), ("probe",)],
    ids=lambda arguments: arguments[0],
)
def test_every_other_command_names_the_extra(arguments, tmp_path):
    done = run(*(str(tmp_path / "out") if word == "OUT" else word for word in arguments))
    assert done.returncode == 2
    assert "pip install 'lighten[" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
