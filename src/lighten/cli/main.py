"""`lighten`: one parser, one module a command, one place where a mistake becomes a line and an exit code."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from lighten import __version__
from lighten.errors import LightenError

COMMANDS = ("estimate", "advise", "plan", "compare", "devices", "compress", "export", "measure", "choose", "probe", "report")
"""Each is a module of its name beside this one, imported when it is asked for: an estimate takes a quarter of a second."""

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "tokenizers", "psutil", "greenlet"), "torch"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"), **dict.fromkeys(("openvino", "nncf"), "openvino"),
    "gguf": "gguf", "llama_cpp": "llama-cpp", "ctranslate2": "ctranslate2",
}  # fmt: skip
"""Package that a command imports when it is used → the extra that installs it."""


class _Parser(argparse.ArgumentParser):
    """A wrong command line is one line and exit 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 where nothing met the constraints, 2 with one line on a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    asked = [name for name in COMMANDS if name == next(iter(argv), None)] or COMMANDS
    modules = {name: _module(name) for name in asked}
    parser = _Parser(prog="lighten", description="What a Transformer costs, how to make it smaller and faster, and which way is best.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in modules.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        code: int = modules[arguments.command].run(arguments)
        return code
    except LightenError as error:
        return _mistake(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _mistake(f"lighten {arguments.command} needs {package}, which is not installed; pip install 'lighten[{EXTRAS[package]}]'")
    except KeyboardInterrupt:
        return _mistake("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output left; there is nobody to tell
        return 1
    except OSError as error:  # of a file that the system refuses: a full disk, a name too long, a broken device
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _mistake(f"{error.filename or 'output'}: {error.strerror}")


def _module(name: str) -> ModuleType:
    return import_module(f"lighten.cli.{name}")


def _mistake(text: str, code: int = 2) -> int:
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()  # names of files may be no text
    print(f"lighten: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
