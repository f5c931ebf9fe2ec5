"""README and docs say what is true: their blocks run, their links lead somewhere, and what they name exists.

How a fenced block is read, by the first word after its fence:

    python    run; as a doctest where it has `>>>`. The blocks of one file share names, a folder that holds `.models`, and nothing with other files
    console   `$ lighten …` runs in this process; what it prints, stderr too, must follow, where `…` stands for anything. A mistake's exit code is
              shown by `$ echo $?`. No other command is allowed
    text, bash and all others are not run: put there what takes long or needs a network

A second word is a file's name: the block is written to it, for the blocks that follow. Tables between `<!-- generated: NAME -->` and
`<!-- end -->` come from the code; `python tests/test_docs.py` writes them anew.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from lighten.choose import constraints, space
from lighten.cli.main import COMMANDS, main
from lighten.cli.sizes import POINT_FIELDS
from lighten.device.profile import Calibration, EngineProfile, Profile
from lighten.formats import step_facts
from lighten.model.families import MODULES
from lighten.recipe import RUNTIMES, STEPS, parse_recipe
from lighten.recipe.recipe import parse_yaml

ROOT = Path(__file__).parent.parent
DOCS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))] if path.exists()]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
SOURCES = [path for folder in ("src", "tests", "benchmarks", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
WIDTH = "112"  # columns of the help texts


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands after its fence, its text, and the line where that starts."""

    path: Path
    info: tuple[str, ...]
    text: str
    line: int

    @property
    def kind(self) -> str:
        return self.info[0] if self.info else ""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name}:{self.line}"


def blocks_of(path: Path, text: str) -> list[Block]:
    """The fenced blocks of a document, those within lists too."""
    found = re.finditer(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(path, tuple(m["info"].split()), re.sub(rf"^{m['indent']}", "", m["body"], flags=re.MULTILINE), text[: m.start("body")].count("\n") + 1)
        for m in found
    ]


# ---- blocks run ----


class BlockError(AssertionError):
    """A block does not do what the document says."""


def run_blocks(blocks: list[Block], folder: Path) -> None:
    """Run what is to be run, in order, in `folder`, which is the working directory."""
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        if len(block.info) > 1:
            (folder / block.info[1]).write_text(block.text, encoding="utf-8")
        if block.kind == "python":
            run_python(block, names)
        elif block.kind == "console":
            run_console(block)


def run_python(block: Block, names: dict[str, object]) -> None:
    if ">>>" not in block.text:
        exec(compile(block.text, str(block), "exec"), names)
        return
    said = io.StringIO()
    test = doctest.DocTestParser().get_doctest(block.text, names, str(block), str(block), block.line)
    test.globs = names
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=said.write, clear_globs=False).failed
    if failed:
        raise BlockError(said.getvalue())


def run_console(block: Block) -> None:
    code, shown = 0, True
    for command, expected, line in sessions(block):
        at = f"{block}, line {line}"
        if command == "echo $?":
            printed, shown = f"{code}\n", True
        else:
            if not shown:
                break
            code, printed = run_command(command, at)
            shown = code == 0
        if not matches(printed, expected):
            raise BlockError(f"{at}: {command}\nprinted\n{printed}\nthe document says\n{expected}")
    if not shown:
        raise BlockError(f"{block}: exit code {code} of a command is not shown by `$ echo $?`")


def sessions(block: Block) -> Iterator[tuple[str, str, int]]:
    """(command, what the document says that it prints, line) of a console block; a command's line may end with a backslash."""
    text = block.text.replace("\\\n", "")
    if not text.startswith("$ "):
        raise BlockError(f"{block}: a console block starts with `$ `")
    line = block.line
    for piece in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = piece.partition("\n")
        yield command.strip(), expected, line
        line += piece.count("\n")


def run_command(command: str, at: str) -> tuple[int, str]:
    words = shlex.split(command)
    if words[0] != "lighten":
        raise BlockError(f"{at}: {words[0]} is not run here; a console block has `lighten …` and `echo $?`")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words[1:])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 2
    return code, said.getvalue()


def matches(printed: str, expected: str) -> bool:
    pattern = ".*?".join(re.escape(piece) for piece in "\n".join(line.rstrip() for line in expected.strip("\n").splitlines()).split("…"))
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()), re.DOTALL) is not None


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(path, tmp_path, monkeypatch):
    blocks = blocks_of(path, path.read_text("utf-8"))
    used = {name for block in blocks if block.kind in ("python", "console") for name in re.findall(r"\.models/([\w-]+)", block.text)}
    missing = sorted(name for name in used if not (ROOT / ".models" / name / "model.safetensors").is_file())
    if missing:
        pytest.fail(f"no sample model {', '.join(missing)} in {ROOT / '.models'}: run `make models`")
    (tmp_path / ".models").symlink_to(ROOT / ".models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", WIDTH)
    run_blocks(blocks, tmp_path)


# ---- what the code generates ----


def help_text(command: str) -> str:
    """What `lighten COMMAND --help` prints; of lighten itself where no command is given."""
    said = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*([command] if command else []), "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return said.getvalue()


def fenced_help(command: str) -> str:
    return f"```text\n{help_text(command).rstrip()}\n```"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def steps_table() -> str:
    rows = []
    for (verb, method), kind in STEPS.items():
        name = f"`{verb}({method})`"
        for argument, parameter in kind.parameters.items():
            default = "" if parameter.default is None else f"`{str(parameter.default).lower()}`"
            rows.append((name, f"`{argument}`", parameter.says, default))
            name = ""
        if not kind.parameters:
            rows.append((name, "none", "", ""))
    return table(("step", "argument", "values", "default"), rows)


def runtimes_table() -> str:
    rows = [
        (
            f"`{name}`",
            f"`lighten[{kind.extra}]`",
            ", ".join(kind.dtypes),
            ", ".join(kind.stored),
            kind.formats,
            ", ".join(kind.cuda) or "no",
            ", ".join(f"`{option}`" for option in kind.options) or "none",
        )
        for name, kind in RUNTIMES.items()
    ]
    return table(("runtime", "installed by", "computes in", "stores", "quantized weights", "on a CUDA device", "options"), rows)


def families_table() -> str:
    rows = [(f"`model/families/{module}.py`", " ".join(f"`{name}`" for name in types.split())) for module, types in MODULES.items()]
    return table(("described in", "`model_type`"), rows)


def figures_table() -> str:
    units = {name: ", ".join(filter(None, figure.units)) for name, figure in constraints.FIGURES.items()}
    both, encoder, decoder = (
        [*constraints.FIGURES, "quality"],
        constraints.ENCODER_QUALITY,
        constraints.DECODER_QUALITY,
    )
    rows = [
        (f"`{name}`", kind, "`<=`" if name in constraints.LOWER_IS_BETTER else "`>=`", units.get(name, "none"))
        for kind, names in (("both", both), ("encoders", encoder), ("decoders", decoder))
        for name in names
    ]
    return table(("figure", "of", "required by", "units"), rows)


def space_list(steps: tuple[str, ...], runtimes: tuple[str, ...], others: Sequence[str]) -> str:
    """The steps of a usual space, its runtimes, and the recipes beside them."""
    first = [step or "(nothing)" for step in steps]
    return "```text\n" + "\n".join([*first, "", *(f"@ {runtime}" for runtime in runtimes), "", *others]) + "\n```"


GENERATED: dict[str, Callable[[], str]] = {
    "help": lambda: fenced_help(""),
    **{f"help {name}": (lambda name=name: fenced_help(name)) for name in COMMANDS},
    "steps": steps_table,
    "runtimes": runtimes_table,
    "families": families_table,
    "figures": figures_table,
    "encoder space": lambda: space_list(space.ENCODER, space.ENCODER_RUNTIMES, space.COMPILED),
    "decoder space": lambda: space_list(space.DECODER, space.DECODER_RUNTIMES, [space.GGML]),
}
REGION = re.compile(r"(?P<start><!-- generated: (?P<name>[^>]*?) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def essence(text: str) -> str:
    """A text without what Python's versions and terminals change: line breaks, and `-o DIR, --output DIR` for `-o, --output DIR`."""
    return re.sub(r"\s+", "", re.sub(r"(-\w) ([A-Z]+), (--[\w-]+) \2", r"\1, \3 \2", text))


def regions() -> list[tuple[Path, str, str]]:
    return [(path, found["name"], found["body"]) for path in DOCS for found in REGION.finditer(path.read_text("utf-8"))]


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_is_as_the_code_has_it(name):
    found = [(path, body) for path, each, body in regions() if each == name]
    assert found, f"no document has the region {name!r}"
    for path, body in found:
        assert essence(body) == essence(GENERATED[name]()), f"{path.relative_to(ROOT)}: run `python tests/test_docs.py`"


def test_every_region_has_a_generator():
    assert {name for _, name, _ in regions()} == set(GENERATED)


# ---- what stands in tables by hand ----


def section(path: Path, heading: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{path.name} has no section {heading!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """What stands in backticks in the first column of a section's tables."""
    return [name for line in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", line)]


def literal_keys(module: str, function: str) -> set[str]:
    """The keys of the largest dict that stands in a function, as written."""
    tree = ast.parse((ROOT / "src" / "lighten" / module).read_text("utf-8"))
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    keys = [{key.value for key in node.keys if isinstance(key, ast.Constant)} for node in ast.walk(body) if isinstance(node, ast.Dict)]
    return max(keys, key=len)


COMMANDS_MD = ROOT / "docs" / "commands.md"
DOCUMENTS: dict[str, Callable[[], set[str]]] = {
    "Fields on a device": lambda: literal_keys("recipe/placement.py", "as_json"),
    "Fields of a sweep": lambda: literal_keys("cli/sizes.py", "sweep_document"),
    "Fields of a point": lambda: set(POINT_FIELDS),
    "Fields of max": lambda: literal_keys("cost/sweep.py", "as_json"),
    "Fields of measure": lambda: literal_keys("judge/measure.py", "as_json") | {"recipe", "task", "predicted", "ratio", "profile"},
    "Fields of predicted": lambda: literal_keys("choose/trial.py", "predict") | literal_keys("choose/trial.py", "derived"),
    "Fields of choice.json": lambda: set().union(
        literal_keys("choose/search.py", "_answer"), literal_keys("choose/search.py", "_explained"), literal_keys("choose/handover.py", "hand_over")
    ),
    "Fields of a trial": lambda: literal_keys("choose/trial.py", "record"),
    "Fields of the profile": lambda: {"version", *(field.name for field in fields(Profile))},
    "Fields of an engine": lambda: {field.name for field in fields(EngineProfile)},
    "Fields of a calibration": lambda: {field.name for field in fields(Calibration)},
    "Fields of lighten.json": lambda: literal_keys("formats/artifact.py", "_assemble"),
    "Fields of a step": lambda: literal_keys("formats/step_facts.py", "spec_facts") | {"step", "predicted", *step_facts.SAID},
    "Fields of run.json": lambda: literal_keys("formats/step_facts.py", "run_facts"),
}


@pytest.mark.parametrize("heading", DOCUMENTS)
def test_fields_of_a_document_are_those_that_the_code_writes(heading):
    assert sorted(first_cells(section(COMMANDS_MD, heading))) == sorted(DOCUMENTS[heading]())


def test_every_step_is_explained():
    text = section(ROOT / "docs" / "recipes.md", "What each step does")
    assert sorted(first_cells(text)) == sorted(f"{verb}({method})" for verb, method in STEPS)


def test_every_runtime_has_its_notes():
    text = section(ROOT / "docs" / "limits.md", "Runtimes")
    assert {name for name in RUNTIMES if f"`{name}`" not in text} == set()


def test_recipes_of_the_documents_parse():
    names = {f"{verb}({method})" for verb, method in STEPS}
    for path in DOCS:
        for block in blocks_of(path, path.read_text("utf-8")):
            if block.kind == "yaml" and "steps:" in block.text:
                parse_yaml(block.text)
        for code in inline_code(path):
            if re.match(rf"^(@|({'|'.join({verb for verb, _ in STEPS})})\()", code) and "…" not in code and code not in names:
                try:
                    parse_recipe(code)
                except Exception as error:
                    raise BlockError(f"{path.name}: `{code}`: {error}") from error


# ---- what the documents name exists ----


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    text = path.read_text("utf-8")
    for block in blocks_of(path, text):
        text = text.replace(block.text, "")
    return text


def inline_code(path: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(path))


def heading_anchors(path: Path) -> set[str]:
    """GitHub's: lower case, without what is no word, blanks as hyphens."""
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)}


def broken_links(path: Path) -> list[str]:
    found = []
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)", prose(path)):
        link = target[0] or target[1]
        if re.match(r"^[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        aim = (path.parent / name).resolve() if name else path
        if not aim.exists() or (anchor and aim.suffix == ".md" and anchor not in heading_anchors(aim)):
            found.append(link)
    return found


def flags_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text(command)))


def program_flags() -> set[str]:
    """Flags of the programs beside the package."""
    text = "".join(path.read_text("utf-8") for path in SOURCES if path.parent.name in ("benchmarks", "scripts"))
    return set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", text))


def unknown_flags(path: Path, text: str, known: dict[str, set[str]], others: set[str]) -> list[str]:
    """Flags of `lighten COMMAND …` that this command does not have, and any others that no program here has."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        command = re.search(r"\blighten ([a-z]+)\b", line)
        allowed = known.get(command[1], set()) | known[""] if command and command[1] in known else others.union(*known.values())
        allowed = allowed | {"--nproc-per-node"} if "torchrun " in line else allowed  # the launcher's own
        if any(name in line for name in ("pip ", "pytest", "git ")):
            continue
        found += [f"{path.name}: {flag} in {line.strip()[:100]!r}" for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line) if flag not in allowed]
    return found


def source_words() -> set[str]:
    """Every word of the sources, of the build files and of the names of files."""
    build = [ROOT / name for name in ("pyproject.toml", "Makefile", ".ci/run", ".gitignore")]
    text = "\n".join(path.read_text("utf-8") for path in [*SOURCES, *build])
    return set(re.findall(r"[A-Za-z_]\w*", text)) | {path.stem for path in SOURCES}


def unknown_names(path: Path, words: set[str]) -> list[str]:
    """Identifiers in inline code (with an underscore, or an inner capital) that stand nowhere in the sources."""
    found = []
    for code in inline_code(path):
        names = re.findall(r"(?<![\w./])_?[A-Za-z][\w]*", code)
        found += [name for name in names if ("_" in name.strip("_") or re.search(r"[a-z][A-Z]", name)) and name not in words]
    return found


def missing_files(path: Path) -> list[str]:
    """Paths in inline code that are neither in the checkout nor in the package, nor in a folder that git ignores, where commands write."""
    found = []
    ignored = tuple(line for line in (ROOT / ".gitignore").read_text("utf-8").splitlines() if line.endswith("/"))
    for code in inline_code(path):
        for name in re.findall(r"^(?:src|tests|docs|benchmarks|scripts|[a-z]+)/[\w./-]+$", code):
            places = (ROOT / name, ROOT / "src" / "lighten" / name, path.parent / name)
            if ("." in name or name.endswith("/")) and not name.startswith(ignored) and not any(place.exists() for place in places):
                found.append(name)
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_files_names_and_flags_exist(path):
    known = {name: flags_of(name) for name in ("", *COMMANDS)}
    assert broken_links(path) == []
    assert missing_files(path) == []
    assert unknown_names(path, source_words()) == []
    assert unknown_flags(path, path.read_text("utf-8"), known, program_flags()) == []


def test_every_document_is_reached_from_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", index.read_text("utf-8"))}
    assert {str(path.relative_to(ROOT)) for path in DOCS if path not in linked and path not in (index, ROOT / "README.md")} == set()


def test_every_benchmark_is_described():
    described = set(re.findall(r"\]\((\w+\.py)\)", (ROOT / "benchmarks" / "README.md").read_text("utf-8")))
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == described


def test_decisions_are_numbered_and_short():
    assert [path.name[:4] for path in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    for path in DECISIONS:
        text = path.read_text("utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequence"], path.name
        assert len(text.splitlines()) <= 40, path.name


# ---- the checks themselves ----


def document(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def run_text(tmp_path: Path, text: str) -> None:
    run_blocks(blocks_of(document(tmp_path, text), text), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```python\n>>> 1 + 1\n3\n```\n",
        "```python\nassert False\n```\n",
        "- in a list\n\n  ```python\n  assert False\n  ```\n",
        "```console\n$ lighten --version\n9.9.9\n```\n",
        "```console\n$ lighten nothing\n…\n```\n",
        "```console\n$ lighten nothing\n…\n$ lighten --version\n…\n```\n",
        "```console\n$ lighten nothing\n…\n$ echo $?\n0\n```\n",
        "```console\n$ rm -r there\n```\n",
        "```console\nlighten --version\n```\n",
    ],
)
def test_a_false_block_is_found(tmp_path, text):
    with pytest.raises(AssertionError):
        run_text(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "```python\n>>> x = 1\n```\nand\n```python\n>>> x + 1\n2\n```\n",
        "```console\n$ lighten \\\n  --version\n0.…\n```\n",
        "```console\n$ lighten nothing\nlighten: …\n$ echo $?\n2\n```\n",
        "```text\n$ rm -r there\n```\n```bash\nmake demo\n```\n",
        "```text note.txt\nhello\n```\n```python\n>>> from pathlib import Path\n>>> Path('note.txt').read_text()\n'hello\\n'\n```\n",
    ],
)
def test_a_true_block_passes(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    run_text(tmp_path, text)


def test_a_dead_link_a_missing_file_and_an_unknown_name_are_found(tmp_path):
    path = document(
        tmp_path, "# Here\n[a](page.md) [b](#here) [c](none.md) [d](#there) `src/lighten/none.py` `model/spec.py` `read_nothing(x)` `ModelSpec`\n"
    )
    assert broken_links(path) == ["none.md", "#there"]
    assert missing_files(path) == ["src/lighten/none.py"]
    assert unknown_names(path, {"ModelSpec"}) == ["read_nothing"]


def test_an_unknown_flag_is_found(tmp_path):
    known = {"": {"--help"}, "estimate": {"--json"}, "probe": {"--engine"}}
    text = "lighten estimate X --json --engine y\nuse --model or --nothing\npip install --upgrade\n"
    assert [found.split()[1] for found in unknown_flags(tmp_path / "page.md", text, known, {"--model"})] == ["--engine", "--nothing"]


def test_an_indented_block_and_its_line_are_found(tmp_path):
    (block,) = blocks_of(tmp_path / "page.md", "one\n\n  ```python x.py\n  pass\n  ```\n")
    assert (block.info, block.text, block.line) == (("python", "x.py"), "pass\n", 4)


def write_generated() -> None:
    """Put what the code says into every region."""
    for path in DOCS:
        text = path.read_text("utf-8")
        path.write_text(REGION.sub(lambda m: f"{m['start']}{GENERATED[m['name']]()}\n{m['end']}", text), encoding="utf-8")


if __name__ == "__main__":
    write_generated()
    sys.exit(0)
